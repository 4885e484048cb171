"""How a file becomes an object: synchronous functions, each meant for one thread hop.

It comes into being as a draft beside the objects, `.tmp-<random>`, and gets its name by a rename (or a hard
link, which fails where the name is taken), so a reader sees the old file or the new one. A killed writer
leaves a draft, which is swept when it is a day old.

Before it gets its name its modification time is set to the clock's nanoseconds. The kernel itself stamps in
steps of milliseconds, in which an inode can be freed and given out again: a version would come back.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence

from .._runtime.random import nonce
from .locking import locked, make_folder, name_if_free, sync
from .reading import Mismatch, version_of

DRAFT = ".tmp-"
DRAFT_LIFE = 24 * 3600.0
"""Seconds after which a draft was surely left by a writer that is dead."""

PIECE = 16 * 1024 * 1024
"""Bytes between two looks at whether a write is still wanted."""

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
_VECTORS = 512  # buffers for one writev; the least that systems promise is 16, Linux and macOS take 1024


class Unwanted(Exception):
    """The writer was cancelled. A signal to the coroutine, never seen outside."""


class Draft:
    """A file on its way to become an object. No descriptor is open between calls, so none can leak."""

    __slots__ = ("durable", "folder", "path", "unwanted")

    def __init__(self, folder: str, durable: bool) -> None:
        self.folder, self.durable = folder, durable
        self.path = f"{folder}/{DRAFT}{nonce(16)}"
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
            sync(self.path)
        version = version_of(os.stat(self.path))
        if self.unwanted:
            raise Unwanted
        if if_absent:
            name_if_free(self.path, target)
        else:
            self._replace(target, if_version)
        if self.durable:
            sync(self.folder)
        return version

    def _replace(self, target: str, if_version: str | None) -> None:
        while True:
            with locked(target) as found:
                if if_version is not None and (found is None or version_of(found) != if_version):
                    raise Mismatch
                if found is not None:
                    os.replace(self.path, target)
                    return None
            try:
                return name_if_free(self.path, target)
            except FileExistsError:
                pass  # somebody has been faster: replace what he wrote

    def discard(self) -> None:
        """Remove the draft if it is there. What cannot be removed now is swept later."""
        try:
            os.unlink(self.path)
        except OSError:
            pass


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
