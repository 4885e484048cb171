"""Looking at the files of a folder: synchronous functions, for one thread hop or, without waiting, for none.

An object is a file that is never changed once it has its name, so whoever has opened it reads one version.
That is made of the file's modification time, which its writer sets (see `writing`), its inode and its size.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from typing import Any

from .._runtime.buffers import clip, new_bytes
from .._storage import Buffer, Stored

INLINE = 256 * 1024
"""Bytes up to which a read may happen on the event loop: copying them takes about 20 µs."""

_PIECE = 16 * 1024 * 1024
_WHOLE = 1 << 30  # bytes that one system call may bring, while nobody else can use the thread

# A symbolic link must not lead outside, and a pipe must not hold its opener up.
OPEN = (
    os.O_RDONLY
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_NOCTTY", 0)
)
_NOWAIT: int = getattr(os, "RWF_NOWAIT", 0) if sys.platform == "linux" else 0


class NotAFileError(OSError):
    """Where an object should be lies something that onceflow did not put there."""


class Mismatch(Exception):
    """Another version, or nothing, is there. A signal to the coroutine, never seen outside."""


def version_of(info: os.stat_result) -> str:
    return f"{info.st_mtime_ns:x}-{info.st_ino:x}-{info.st_size:x}"


def check_file(info: os.stat_result) -> None:
    if not stat.S_ISREG(info.st_mode):
        raise NotAFileError(errno.EINVAL, "it is not a regular file")


def can_read_inline() -> bool:
    """Whether this system can read without waiting at all; the file system is asked by the first read."""
    return _NOWAIT != 0


def look(path: str) -> os.stat_result:
    """The file's stat, by a descriptor, so that a link is not followed: 5 µs, and nothing is read of it."""
    fd = os.open(path, OPEN)
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
    fd = os.open(path, OPEN)
    try:
        info = os.fstat(fd)
        check_file(info)
        version, size = version_of(info), info.st_size
        if if_version is not None and version != if_version:
            raise Mismatch
        if version == unless:
            return None
        start, end = clip(start, stop, size)
        target = None if into is None else memoryview(into).cast("B")[: end - start]
        length = end - start if target is None else len(target)
        data: Buffer
        if not length:
            data = b""
        elif not wait:
            data = _read_now(fd, target, start, length)
        elif target is None:
            data = _load(fd, start, length)
        else:
            data = _fill(fd, target, start)
        return Stored(data, version, size)
    finally:
        os.close(fd)


def _read_now(fd: int, target: memoryview | None, start: int, length: int) -> Buffer:
    if length > INLINE:
        raise BlockingIOError
    data: Buffer = bytearray(length) if target is None else target
    if os.preadv(fd, [data], start, _NOWAIT) < length:
        raise BlockingIOError  # the rest is not in memory
    return data


def _load(fd: int, start: int, length: int) -> Buffer:
    """Bytes as the kernel gives them: neither zeroed first, which holds the interpreter, nor copied after."""
    if length <= _WHOLE:
        data = os.pread(fd, length, start)
        if len(data) == length:
            return data
    room = new_bytes(length)
    _fill(fd, room.getbuffer(), start)
    return room.getvalue()


def _fill(fd: int, view: memoryview, start: int) -> memoryview:
    filled = 0
    while filled < len(view):
        got = os.preadv(fd, [view[filled : filled + _PIECE]], start + filled)
        if not got:  # somebody cut the file in place, which onceflow never does
            raise OSError(errno.EIO, "the file became shorter while it was read")
        filled += got
    return view


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
