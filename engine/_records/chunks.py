"""The stored form of a stream: its values in chunks, written and read one at a time.

A chunk is an object of its own, of 1 MiB or one value, written while the stream is read; the stream's record
names them all and is committed when the body has ended. So storing and replaying need memory for a chunk or two.
A stream that is broken off, or fails, leaves no record, and its chunks are removed.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncGenerator
from typing import Any

from ...storage import SerializationError, StorageError
from ...storage._values.serializers import decode, is_builtin
from ...storage._values.weight import is_heavy, weigh
from .._caching.call import policy_of
from .._commit.driver import uncancelled
from .._commit.requests import ABSENT
from .._errors import CacheKeyError
from .._runs.logging import logger
from .._runs.run import TaskRun, new_id
from .orphans import chunk_name, streaming
from .record import SHAREABLE, Facts, Hit, Place
from .roundtrip import check_same

CHUNK = 1024 * 1024
"""Bytes, roughly, after which a chunk is written."""
_MARK = "onceflow.stream"


def _values_of(place: Place) -> Place:
    """Where the chunks of a stream lie: with its values."""
    return place._replace(key_storage=None, location=None)


class ChunkWriter:
    """Collects values, and writes a chunk whenever enough have come together."""

    def __init__(self, run: TaskRun, place: Place) -> None:
        assert run.key is not None
        self._run = weakref.proxy(run)  # which knows this writer
        self._owner = place, run.key
        self._place = _values_of(place)
        self.stream = new_id()
        streaming[self.stream] = self
        self._values: list[Any] = []
        self._weight = 0
        self._count = 0
        self._keys: list[str] = []
        self._error: Exception | None = None

    @property
    def are_there(self) -> bool:
        """Whether chunks lie in the storage."""
        return bool(self._keys)

    @classmethod
    def of(cls, run: TaskRun) -> ChunkWriter | None:
        """For a run that has a key, and so will have a record."""
        if run.key is None:
            return None
        try:
            run.chunks = cls(run, run.engine.place_for(run, policy_of(run, run.task)))
        except CacheKeyError:
            return None  # the run has warned of it, and goes without a record
        return run.chunks

    async def add(self, value: Any) -> None:
        """Take a value in, as it is now: its reader may go on to change it."""
        if self._error is not None:
            return
        try:
            if type(value) in SHAREABLE:
                size = weigh(value)
            elif is_heavy(value):
                value, size = await self._run.engine.in_thread(self._copy, value)
            else:
                value, size = self._copy(value)
            self._values.append(value)
            self._count += 1
            self._weight += size
            if self._weight >= CHUNK:
                await self._write()
        except Exception as error:  # a storage or serializer of the user's own may raise anything
            self._error = error
            self._values.clear()
            await self.discard()

    def _copy(self, value: Any) -> tuple[Any, int]:
        """A value of our own, and how many bytes it takes."""
        serializer = self._place.serializer
        encoded = serializer.encode(value)
        segments = [bytes(segment) for segment in encoded.segments]
        copy = decode(encoded.serializer, segments, using=serializer, imports=True)
        if not is_builtin(serializer):
            check_same(encoded.serializer, value, copy)
        return copy, sum(map(len, segments))

    async def _write(self) -> None:
        run = self._run
        key = chunk_name(*self._owner, self.stream, len(self._keys))
        values, self._values, self._weight = self._values, [], 0
        prepared = await run.engine.records.prepare(self._place, key, values, Facts(run.id, run.task.name))
        self._keys.append(key)
        await run.engine.records.write(prepared, expect=ABSENT)

    async def finish(self) -> Any:
        """The stream was read to its end: write the last chunk. What the record shall say."""
        if self._error is None and (self._values or not self._keys):
            try:
                await self._write()
            except Exception as error:  # as above
                self._error = error
                await self.discard()
        if self._error is not None:
            return _Unstored(self._error)
        return {_MARK: self._keys, "count": self._count}

    async def discard(self) -> None:
        """Remove what was written of a stream that did not come to its end."""
        keys, self._keys = self._keys, []
        storage = self._place.storage
        for key in keys:
            try:
                await storage.delete(key)
            except (StorageError, OSError) as error:
                logger.warning("The chunk %r of a broken stream stays in %s: %s", key, storage.url, error)


class _Unstored:
    """What stands in for the record of a stream that could not be stored: it cannot be stored either, and says why."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __reduce__(self) -> Any:
        raise SerializationError("stream", str(self._error)) from self._error


class ChunkReader:
    """Replays the stream that a run was served, one chunk in memory and the next on its way."""

    def __init__(self, run: TaskRun) -> None:
        self._run = run
        self._place = _values_of(run.engine.place_for(run, policy_of(run, run.task)))
        self.count = 0
        """How many values have been read."""
        self.is_whole = False
        """Whether they were all there. A chunk that cannot be read ends the iteration, with a warning."""

    async def values(self) -> AsyncGenerator[Any, None]:
        """The values, or the beginning of them."""
        record = self._run.state.data
        if type(record) is not dict or _MARK not in record:
            self._warn("what is stored under its key is no stream, so it runs")
            return
        fetch: asyncio.Task[list[Any] | None] | None = None
        try:
            keys = [*record[_MARK]]
            for position in range(len(keys)):
                values = await (fetch or self._read(keys[position]))
                fetch = None
                if values is None:
                    self._warn("a part of its stored stream is gone, so it runs again for the rest")
                    return
                if position + 1 < len(keys):
                    fetch = asyncio.ensure_future(self._read(keys[position + 1]))
                for value in values:
                    self.count += 1
                    yield value
        finally:
            if fetch is not None:
                fetch.cancel()
                await uncancelled(_ended(fetch))
        self.is_whole = True

    async def _read(self, key: str) -> list[Any] | None:
        chunk = await self._run.engine.records.lookup(self._place, key)
        return chunk.value if isinstance(chunk, Hit) else None

    def _warn(self, text: str) -> None:
        logger.warning("%s %r - %s", self._run.kind, self._run.name, text)


async def _ended(fetch: asyncio.Task[Any]) -> None:
    await asyncio.wait([fetch])
