"""The record of a stream: its values in chunks, written and read one at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from ..storage import StorageError
from ..storage._weight import weigh
from ._caching import Call, commit, look_up_value
from ._context import new_id
from ._logging import logger
from ._records import Facts, Hit
from ._steps import ABSENT, ANY

CHUNK = 1024 * 1024
"""Bytes, roughly, after which a chunk is written."""


class ChunkWriter:
    """Collects values, and writes a chunk whenever enough have come together."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._values: list[Any] = []
        self._weight = 0
        self._keys: list[str] = []
        self._is_broken = False

    async def add(self, value: Any) -> None:
        if self._is_broken:
            return
        self._values.append(value)
        self._weight += weigh(value)
        if self._weight >= CHUNK:
            await self._write()

    async def _write(self) -> None:
        run = self._call.run
        key = f"chunk-{new_id()}"
        values, self._values, self._weight = self._values, [], 0
        try:
            place = self._call.place._replace(key_storage=None, location=None)
            facts = Facts(run.id, self._call.definition.name)
            prepared = await run.engine.records.prepare(place, key, values, facts)
            self._keys.append(key)
            await run.engine.records.write(prepared, expect=ABSENT)
        except (StorageError, OSError) as error:
            self._is_broken = True
            logger.warning(
                "%s %r - its stream could not be stored, and is not cached: %s",
                self._call.definition.kind, run.name, error,
            )  # fmt: skip
            await self.discard()

    async def commit(self) -> None:
        """The stream was read to its end: write the last chunk, and the record that names them all."""
        if self._is_broken:
            return
        await self._write()
        if self._is_broken:
            return
        run = self._call.run
        run.states[-1].data = self._keys
        try:
            await commit(self._call, ANY)
        finally:
            run.states[-1].data = None

    async def discard(self) -> None:
        """Remove what was written of a stream that did not come to its end."""
        keys, self._keys = self._keys, []
        storage = self._call.place.storage
        for key in keys:
            try:
                await storage.delete(key)
            except (StorageError, OSError) as error:
                logger.warning("The chunk %r of a broken stream stays in %s: %s", key, storage.url, error)


class ChunkReader:
    """Replays a stream, one chunk in memory at a time and the next on its way."""

    def __init__(self, call: Call, keys: list[str], first: list[Any]) -> None:
        self._call = call
        self._keys = keys
        self._first = first
        self.count = 0
        """How many values have been read."""
        self.is_whole = False
        """Whether they were all there. A chunk that cannot be read ends the iteration, with a warning."""

    @classmethod
    async def open(cls, call: Call) -> ChunkReader | None:
        """The committed stream under the key, if there is one whose first chunk can be read."""
        keys = await look_up_value(call)
        if type(keys) is not list or not keys:
            return None
        first = await cls._read(call, keys[0])
        return None if first is None else cls(call, keys, first)

    @staticmethod
    async def _read(call: Call, key: str) -> list[Any] | None:
        place = call.place._replace(key_storage=None, location=None)
        chunk = await call.run.engine.records.lookup(place, key)
        return chunk.value if isinstance(chunk, Hit) else None

    async def __aiter__(self) -> AsyncIterator[Any]:
        values = self._first
        for following in [*self._keys[1:], None]:
            fetch = None if following is None else asyncio.ensure_future(self._read(self._call, following))
            try:
                for value in values:
                    self.count += 1
                    yield value
            except BaseException:
                if fetch is not None:
                    fetch.cancel()
                raise
            if fetch is None:
                break
            chunk = await fetch
            if chunk is None:
                logger.warning(
                    "%s %r - a part of its stored stream is gone, so it runs again for the rest",
                    self._call.definition.kind, self._call.run.name,
                )  # fmt: skip
                return
            values = chunk
        self.is_whole = True
