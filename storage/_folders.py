"""A folder of objects: made, locked, synced, and one of its files removed. Synchronous, for thread hops."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ._files import Mismatch, version_of

if sys.platform != "win32":
    import fcntl

SUPPORTED = sys.platform != "win32"  # LocalStorage says so when it is made


def remove(folder: str, target: str, if_version: str | None, durable: bool) -> bool:
    """Delete an object, if it is this version; whether there was one.

    Raises:
        Mismatch: `if_version` is another. Nothing is removed.
    """
    if not exists(target):
        return False  # and the folder, which would be locked, may be missing as well
    with locked(folder):
        if not exists(target):
            return False
        if if_version is not None:
            check_version(target, if_version)
        os.unlink(target)
    if durable:
        sync(folder)
    return True


def exists(path: str) -> bool:
    """Whether something has this name; not os.path.lexists, to which every error means no."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True


def check_version(path: str, expected: str) -> None:
    """Raises Mismatch unless this version is there."""
    try:
        if version_of(os.stat(path, follow_symlinks=False)) == expected:
            return
    except FileNotFoundError:
        pass
    raise Mismatch


@contextmanager
def locked(folder: str) -> Iterator[None]:
    """Hold the folder against other replacements and removals, in this process and others: some 10 µs.

    Comparing a version and renaming are two system calls. Whatever could come between them takes the lock:
    also an unconditional write, which would otherwise be overwritten, unseen, by a conditional one that has
    just found the old version. Only-if-absent needs none: it changes nothing that a condition has seen.

    The lock is that of the folder's own descriptor, opened for this one use: nothing lies around, the kernel
    frees it when the holder is killed, and threads exclude each other like processes. It is given back in
    words, for a child forked meanwhile has a copy of the descriptor, and closing ours would not end it.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        try:
            yield
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
