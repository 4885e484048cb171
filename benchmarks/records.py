"""What a record costs on local files: written and read. Folders are new for each measurement."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import peers
from files import hop, micros, read_whole, write_renamed
from harness import FLOOR, OURS, Workload, in_folder
from onceflow.engine import INPUTS, Engine, flow, task
from onceflow.storage import LocalStorage
from peers import COUNT, VALUE

# --- the floor: one thread hop around plain file calls


async def floor_misses(folder: Path) -> float:
    await hop(int)  # the pool's first thread
    started = perf_counter()
    for x in range(COUNT):
        await hop(write_renamed, f"{folder}/{x}", VALUE)
    return micros(started, COUNT)


async def floor_hits(folder: Path) -> float:
    for x in range(COUNT):
        await hop(write_renamed, f"{folder}/{x}", VALUE)
    started = perf_counter()
    for x in range(COUNT):
        await hop(read_whole, f"{folder}/{x}")
    return micros(started, COUNT)


# --- onceflow


@task(cache_policy=INPUTS)
async def small(x: int) -> bytes:
    return VALUE


@flow
async def one_by_one(count: int) -> float:
    started = perf_counter()
    for x in range(count):
        await small(x)
    return micros(started, count)


@flow
async def at_once(count: int) -> float:
    started = perf_counter()
    await small.map(range(count))
    return micros(started, count)


async def ours_misses(folder: Path) -> float:
    async with Engine(storage=folder):
        await small(-1)
        return await one_by_one(COUNT)


async def ours_misses_at_once(folder: Path) -> float:
    async with Engine(storage=folder):
        await small(-1)
        return await at_once(100)


async def ours_hits(folder: Path) -> float:
    """Another engine than the one that wrote, so that every record is read from its file."""
    async with Engine(storage=folder):
        await one_by_one(COUNT)
    async with Engine(storage=LocalStorage(folder)):
        await small(0)
        return await one_by_one(COUNT)


async def ours_hits_at_once(folder: Path) -> float:
    async with Engine(storage=folder):
        await at_once(1000)
    async with Engine(storage=LocalStorage(folder)):
        await small(0)
        return await at_once(1000)


async def ours_hits_in_memory(folder: Path) -> float:
    """The same engine again: a copy in memory, if there is one, is asked whether it still holds."""
    async with Engine(storage=folder):
        await one_by_one(COUNT)
        await one_by_one(COUNT)
        return await one_by_one(COUNT)


class Watched(LocalStorage):
    """Notes whether anybody asks to be spared what it knows already."""

    asked = False

    async def fetch(self, *args: Any, unless: str | None = None, **kwargs: Any) -> Any:
        type(self).asked |= unless is not None
        return await super().fetch(*args, unless=unless, **kwargs)


async def has_memory_copy(folder: Path) -> float:
    async with Engine(storage=Watched(folder)):
        await small(1)
        await small(1)
        await small(1)
    return Watched.asked


def workloads() -> Iterator[Workload]:
    floor = "one hop, temporary file and rename"
    yield Workload(
        "W4",
        "miss and commit of 100 bytes, local files",
        floor,
        {
            FLOOR: in_folder(floor_misses),
            OURS: in_folder(ours_misses),
            "joblib (blocking)": peers.if_there(peers.joblib, peers.joblib_misses),
            "diskcache (blocking)": peers.if_there(peers.diskcache, peers.diskcache_misses),
            "cashews": peers.if_there(peers.Cashews and peers.diskcache, peers.cashews_misses),
        },
        budget=1.2,
    )
    yield Workload(
        "W4",
        "the same, 100 at once",
        floor,
        {FLOOR: in_folder(floor_misses), OURS: in_folder(ours_misses_at_once)},
        budget=0.5,
        rounds=9,
    )
    yield Workload(
        "W5",
        "hit from a file that lies in the page cache",
        "one hop, read",
        {
            FLOOR: in_folder(floor_hits),
            OURS: in_folder(ours_hits),
            "joblib (blocking)": peers.if_there(peers.joblib, peers.joblib_hits),
            "diskcache (blocking)": peers.if_there(peers.diskcache, peers.diskcache_hits),
            "cashews": peers.if_there(peers.Cashews and peers.diskcache, peers.cashews_hits),
        },
        budget=1.1,
    )
    yield Workload(
        "W5",
        "the same, 1 000 at once",
        "one hop, read",
        {FLOOR: in_folder(floor_hits), OURS: in_folder(ours_hits_at_once)},
        budget=0.3,
    )
    there = asyncio.run(in_folder(has_memory_copy)())
    yield Workload(
        "W5m",
        "hit, from a copy in memory that is validated",
        "one hop, read",
        {FLOOR: in_folder(floor_hits), OURS: in_folder(ours_hits_in_memory) if there else None},
        budget=0.15,
    )
