"""A folder of objects: made and synced, names given, locked and removed. Synchronous, for thread hops."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from .reading import OPEN, Mismatch, version_of

if sys.platform != "win32":
    import fcntl

SUPPORTED = sys.platform != "win32"  # LocalStorage says so when it is made

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
# What cannot be opened for reading has no version that a condition could have seen: a link, a socket, another user's.
_UNSEEN = {errno.ELOOP, errno.EMLINK, errno.ENXIO, errno.EACCES}
_NOT_FOR_WRITING = {errno.EACCES, errno.EISDIR, errno.EPERM, errno.EROFS, errno.ETXTBSY}


def remove(target: str, if_version: str | None, durable: bool) -> bool:
    """Delete an object, if it is this version; whether there was one.

    Raises:
        Mismatch: `if_version` is another. Nothing is removed.
    """
    with locked(target) as found:
        if found is None:
            return False
        if if_version is not None and version_of(found) != if_version:
            raise Mismatch
        os.unlink(target)
    if durable:
        sync(os.path.dirname(target))
    return True


@contextmanager
def locked(target: str) -> Iterator[os.stat_result | None]:
    """Hold what has this name against replacement and removal, in this process and others: some 10 µs.

    Yields its stat; None where nothing has the name, and then nothing is held.

    Comparing a version and renaming are two system calls. Whatever could come between them takes the lock:
    also an unconditional write, which would otherwise be overwritten, unseen, by a conditional one that has
    just found the old version. What is created by a link needs none: it changes nothing that a condition has seen.

    The lock is that of the object's own file. Who replaces it must hold the file that has the name now, so who has
    waited looks whether it still has. A lock for the whole folder would do as well until many write: each system
    call gives the interpreter away, and a thread that waits 5 ms for it, or a paused process, would hold up all.

    The descriptor is opened for this one use: nothing lies around, the kernel frees the lock when the holder is
    killed, and threads exclude each other like processes. It is given back in words, for a child forked meanwhile
    has a copy of the descriptor, and closing ours would not end it.
    """
    while True:
        try:
            fd = _open(target)
        except FileNotFoundError:
            yield None
            return
        except OSError as error:
            if error.errno not in _UNSEEN:
                raise
            if (unseen := _stat(target)) is None:
                continue
            yield unseen
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            try:
                found, named = os.fstat(fd), _stat(target)
                if named is not None and os.path.samestat(found, named):
                    yield found
                    return
            finally:
                fcntl.flock(fd, fcntl.LOCK_UN)
        finally:
            os.close(fd)


def _open(path: str) -> int:
    """A descriptor to lock: for writing as well where that is allowed, which NFS demands of an exclusive lock."""
    try:
        return os.open(path, OPEN | os.O_RDWR)
    except OSError as error:
        if error.errno not in _NOT_FOR_WRITING:
            raise
        return os.open(path, OPEN)


def _stat(path: str) -> os.stat_result | None:
    """Of what has this name; None where nothing has. Not os.path.lexists, to which every error means no."""
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None


def name_if_free(path: str, target: str) -> None:
    """Give a file its name, in one step with finding that the name is free.

    By a hard link; where the file system knows none, by a lock of the folder, which all who come this way take.

    Raises:
        FileExistsError: It is taken. The file keeps the name that it had.
    """
    try:
        os.link(path, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    else:
        try:
            os.unlink(path)
        except OSError:
            pass  # swept later, as what a killed writer leaves
        return
    fd = os.open(os.path.dirname(target), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        try:
            if _stat(target) is not None:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)
            os.rename(path, target)
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)
    finally:
        os.close(fd)


def make_folder(folder: str, durable: bool) -> None:
    """The folder and what is missing above it, for this user only."""
    parent = os.path.dirname(folder)
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        if not os.path.isdir(folder):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), folder) from None
    except FileNotFoundError:
        if parent == folder:
            raise
        make_folder(parent, durable)
        make_folder(folder, durable)
    if durable:
        sync(parent)


def sync(path: str) -> None:
    """Bring a file, or the names in a folder, to the disk itself."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if sys.platform == "darwin":
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)  # there, fsync leaves it in the drive's cache
        else:
            os.fsync(fd)
    finally:
        os.close(fd)
