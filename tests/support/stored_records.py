"""Looking at what the engine stored, and counting what it asked a storage for."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from onceflow.storage import MemoryStorage, Storage, Stored
from onceflow.storage._format.envelope import Header, unpack_header
from onceflow.storage._storage import Data


async def names_in(folder: Path) -> set[str]:
    """The names of the files in a folder; none where there is no folder."""

    def names() -> set[str]:
        return set(os.listdir(folder)) if folder.is_dir() else set()

    return await asyncio.to_thread(names)


async def header_of(storage: Storage, key: str) -> Header:
    """What the record under `key` says of itself."""
    return unpack_header(await storage.read(key))[0]


async def keys_in(storage: Storage) -> list[str]:
    return [stat.key async for stat in storage.list()]


class CountingStorage(MemoryStorage):
    """Memory that counts what it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.written: list[str] = []

    async def fetch(
        self,
        key: str,
        start: int = 0,
        stop: int | None = None,
        *,
        unless: str | None = None,
        if_version: str | None = None,
        into: bytearray | memoryview | None = None,
    ) -> Stored | None:
        self.fetched.append(key)
        return await super().fetch(key, start, stop, unless=unless, if_version=if_version, into=into)

    async def write(
        self, key: str, data: Data, *, if_absent: bool = False, if_version: str | None = None
    ) -> str:
        self.written.append(key)
        return await super().write(key, data, if_absent=if_absent, if_version=if_version)


class Clock:
    """A clock that moves when it is told to. Give it to an engine: `Engine(clock=clock)`."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def move(self, seconds: float) -> None:
        self.now += seconds
