"""What LocalStorage does with files: synchronous functions, each meant for one thread hop.

An object is a file that is never changed once it has its name. It comes into being as a draft beside it,
`.tmp-<random>`, and gets its name by a rename (or a hard link, which fails where the name is taken), so a
reader sees the old file or the new one. A killed writer leaves a draft, which is swept when it is a day old.

The version is made of the file's modification time, inode and size. The time is set to the clock's
nanoseconds before the rename: the kernel itself stamps in steps of milliseconds, in which an inode can be
freed and given out again, and that would bring a version back.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from mmap import mmap
from typing import Any

from ._data import clip
from ._storage import Buffer, Stored

try:
    import fcntl

    SUPPORTED = True
except ImportError:  # Windows: LocalStorage says so when it is made
    SUPPORTED = False

DRAFT = ".tmp-"
DRAFT_LIFE = 24 * 3600.0
"""Seconds after which a draft was surely left by a writer that is dead."""

INLINE = 256 * 1024
"""Bytes up to which a read may happen on the event loop: copying them takes about 20 µs."""

PIECE = 16 * 1024 * 1024
"""Bytes between two looks at whether a write or a read is still wanted."""

# A symbolic link must not lead outside, and a pipe must not hold its opener up.
_READ = (
    os.O_RDONLY
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_NOCTTY", 0)
)
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
_NOWAIT: int = getattr(os, "RWF_NOWAIT", 0) if sys.platform == "linux" else 0
_VECTORS = 512  # buffers for one writev; the least that systems promise is 16, Linux and macOS take 1024


class NotAFileError(OSError):
    """Where an object should be lies something that onceflow did not put there."""


class Mismatch(Exception):
    """Another version, or nothing, is there. A signal to the coroutine, never seen outside."""


class Unwanted(Exception):
    """The writer was cancelled. Likewise never seen outside."""


def version_of(info: os.stat_result) -> str:
    return f"{info.st_mtime_ns:x}-{info.st_ino:x}-{info.st_size:x}"


def check_file(info: os.stat_result) -> None:
    if not stat.S_ISREG(info.st_mode):
        raise NotAFileError(errno.EINVAL, "it is not a regular file")


# -- reading ----------------------------------------------------------------------------------------------


def can_read_inline() -> bool:
    """Whether this system can read without waiting at all; the file system is asked by the first read."""
    return _NOWAIT != 0


def look(path: str) -> os.stat_result:
    """The file's stat, by a descriptor, so that a link is not followed: 5 µs, and nothing is read of it."""
    fd = os.open(path, _READ)
    try:
        info = os.fstat(fd)
    finally:
        os.close(fd)
    check_file(info)
    return info


def read(
    path: str,
    start: int,
    stop: int | None,
    unless: str | None,
    if_version: str | None,
    into: bytearray | memoryview | None,
    *,
    wait: bool = True,
) -> Stored | None:
    """The bytes of `[start, stop)` and the version of the very file they come from; None for `unless`.

    Raises:
        BlockingIOError: `wait` is off, and the bytes are many or not in memory. Nothing was waited for.
        OSError: With ENOTSUP where the file system cannot promise not to wait, and for all the usual reasons.
        Mismatch: `if_version` is another.
    """
    fd = os.open(path, _READ)
    try:
        info = os.fstat(fd)
        check_file(info)
        version, size = version_of(info), info.st_size
        if if_version is not None and version != if_version:
            raise Mismatch
        if version == unless:
            return None
        start, end = clip(start, stop, size)
        length = end - start
        if into is not None:
            target = memoryview(into).cast("B")
            length = min(length, len(target))
            data: Buffer = target[:length]
        else:
            data = b""
        if length:
            if wait:
                data = _fill(fd, data, start) if into is not None else _load(fd, start, length)
            else:
                data = _read_now(fd, data if into is not None else None, start, length)
        return Stored(data, version, size)
    finally:
        os.close(fd)


def _read_now(fd: int, target: Buffer | None, start: int, length: int) -> Buffer:
    if length > INLINE:
        raise BlockingIOError
    data = bytearray(length) if target is None else target
    if os.preadv(fd, [data], start, _NOWAIT) < length:
        raise BlockingIOError  # the rest is not in memory
    return data


def _load(fd: int, start: int, length: int) -> Buffer:
    """Bytes as the kernel gives them: neither zeroed first, which holds the interpreter, nor copied after."""
    if length > 4 * PIECE:
        return _fill(fd, memoryview(mmap(-1, length)), start)
    data = os.pread(fd, length, start)
    return data if len(data) == length else _fill(fd, memoryview(bytearray(length)), start)


def _fill(fd: int, target: Buffer, start: int) -> memoryview:
    view = memoryview(target)
    filled = 0
    while filled < len(view):
        got = os.preadv(fd, [view[filled : filled + PIECE]], start + filled)
        if not got:  # somebody cut the file in place, which onceflow never does
            raise OSError(errno.EIO, "the file became shorter while it was read")
        filled += got
    return view


# -- writing ----------------------------------------------------------------------------------------------


class Draft:
    """A file on its way to become an object. No descriptor is open between calls, so none can leak."""

    __slots__ = ("durable", "folder", "path", "unwanted")

    def __init__(self, folder: str, durable: bool) -> None:
        self.folder, self.durable = folder, durable
        self.path = f"{folder}/{DRAFT}{secrets.token_hex(8)}"
        self.unwanted = False

    def write_object(
        self, target: str, buffers: Sequence[memoryview], if_absent: bool, if_version: str | None
    ) -> str:
        """Everything in one go: new file, content, name. Returns the version; leaves no draft if it fails."""
        try:
            fd = self.create()
            try:
                self._write(fd, buffers)
            finally:
                os.close(fd)
            return self.publish(target, if_absent, if_version)
        except BaseException:
            self.discard()
            raise

    def create(self) -> int:
        """A descriptor of the new, empty file, in a folder that is made if it is missing."""
        try:
            return os.open(self.path, _CREATE, 0o600)
        except FileNotFoundError:
            make_folder(self.folder, self.durable)
            return os.open(self.path, _CREATE, 0o600)

    def _write(self, fd: int, buffers: Sequence[memoryview]) -> None:
        for piece in _pieces(buffers):
            rest = piece
            while rest:
                if self.unwanted:
                    raise Unwanted
                rest = _rest(rest, os.writev(fd, rest))

    def stop(self) -> None:
        """Have it end before its next piece, and get no name; for another thread to say."""
        self.unwanted = True

    def publish(self, target: str, if_absent: bool, if_version: str | None) -> str:
        """Give the draft the object's name, if the condition holds, in one step with looking at it.

        Raises:
            FileExistsError: `if_absent`, and the name is taken.
            Mismatch: `if_version`, and another version or nothing has the name.
            Unwanted: The writer was cancelled before the name was given.
        """
        now = time.time_ns()
        os.utime(self.path, ns=(now, now))
        if self.durable:
            _sync(self.path)
        version = version_of(os.stat(self.path))
        if self.unwanted:
            raise Unwanted
        if not (if_absent and self._link(target)):
            with locked(self.folder):
                if if_absent and exists(target):
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)
                if if_version is not None:
                    check_version(target, if_version)
                os.replace(self.path, target)
        if self.durable:
            _sync(self.folder)
        return version

    def discard(self) -> None:
        """Remove the draft if it is there. What cannot be removed now is swept later."""
        try:
            os.unlink(self.path)
        except OSError:
            pass

    def _link(self, target: str) -> bool:
        """Only-if-absent by the kernel, without a lock; False where the file system knows no hard links."""
        try:
            os.link(self.path, target, follow_symlinks=False)
        except OSError as error:
            if error.errno in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                return False
            raise
        self.discard()
        return True


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
        _sync(folder)
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
        _sync(parent)


def sweep(folder: str) -> None:
    """Remove the drafts of writers that were killed a day ago or longer."""
    oldest = time.time() - DRAFT_LIFE
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(DRAFT) and entry.stat(follow_symlinks=False).st_mtime < oldest:
                    os.unlink(entry.path)
    except OSError:
        pass  # another process sweeps as well, or may; nothing depends on it


class Scan:
    """The regular files of a folder, in batches; drafts, links and folders are no objects."""

    __slots__ = ("_entries", "_folder")

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._entries: Any = None  # os.scandir's iterator, opened by the first batch

    def batch(self, beginning: str, most: int) -> list[tuple[str, os.stat_result]]:
        """Names and stats of the next files with this beginning; none means the end, or no folder."""
        if self._entries is None:
            try:
                self._entries = os.scandir(self._folder)
            except FileNotFoundError:
                return []
        found: list[tuple[str, os.stat_result]] = []
        for entry in self._entries:
            if entry.name[0] == "." or not entry.name.startswith(beginning):
                continue
            try:
                info = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue  # deleted since
            if stat.S_ISREG(info.st_mode):
                found.append((entry.name, info))
                if len(found) == most:
                    break
        return found

    def close(self) -> None:
        if self._entries is not None:
            self._entries.close()


def _pieces(buffers: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    """The buffers in batches for one writev: few enough for the system, short enough to stop between."""
    batch: list[memoryview] = []
    room = PIECE
    for buffer in buffers:
        while len(buffer) > room:
            batch.append(buffer[:room])
            buffer = buffer[room:]
            yield batch
            batch, room = [], PIECE
        if len(buffer):
            batch.append(buffer)
            room -= len(buffer)
        if len(batch) == _VECTORS:
            yield batch
            batch, room = [], PIECE
    if batch:
        yield batch


def _rest(batch: list[memoryview], written: int) -> list[memoryview]:
    for index, buffer in enumerate(batch):
        if written < len(buffer):
            return [buffer[written:], *batch[index + 1 :]]
        written -= len(buffer)
    return []


def _sync(path: str) -> None:
    """Bring a file, or the names in a folder, to the disk itself."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if sys.platform == "darwin":
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)  # there, fsync leaves it in the drive's cache
        else:
            os.fsync(fd)
    finally:
        os.close(fd)
