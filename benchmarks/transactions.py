"""What a task costs in a transaction of 1, 10 and 100, beside the same tasks without one: time, and requests."""

from __future__ import annotations

import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

from harness import FLOOR, OURS, Measure, Workload
from onceflow.engine import INPUTS, Engine, task, transaction
from onceflow.storage import LocalStorage, MemoryStorage, Storage

VALUE = bytes(100)
SIZES = (1, 10, 100)
TASKS = 300
"""In all, however many go into one transaction."""


@task(cache_policy=INPUTS)
async def small(x: int) -> bytes:
    return VALUE


async def plain(size: int, first: int) -> None:
    for x in range(first, first + size):
        await small(x)


async def together(size: int, first: int) -> None:
    async with transaction():
        await plain(size, first)


class Counting(MemoryStorage):
    """Memory that counts the requests for records; the engine's own notes left out."""

    requests = 0

    async def fetch(self, key: str, *args: Any, **options: Any) -> Any:
        self.requests += key[0] not in ".\0"
        return await super().fetch(key, *args, **options)

    async def write(self, key: str, *args: Any, **options: Any) -> str:
        self.requests += key[0] not in ".\0"
        return await super().write(key, *args, **options)

    async def delete(self, key: str, *args: Any, **options: Any) -> bool:
        self.requests += key[0] not in ".\0"
        return await super().delete(key, *args, **options)


async def run(storage: Storage, how: Callable[[int, int], Awaitable[None]], size: int) -> float:
    """Microseconds for a task, all of them misses."""
    async with Engine(storage=storage):
        await small(-1)
        rounds = max(1, TASKS // size)
        started = perf_counter()
        for number in range(rounds):
            await how(size, number * size)
        return (perf_counter() - started) / (rounds * size) * 1e6


def timed(how: Callable[[int, int], Awaitable[None]], size: int) -> Measure:
    async def measured() -> float:
        with tempfile.TemporaryDirectory() as folder:
            return await run(LocalStorage(Path(folder)), how, size)

    return measured


def counted(how: Callable[[int, int], Awaitable[None]], size: int) -> Measure:
    async def measured() -> float:
        storage = Counting()
        async with Engine(storage=storage):
            await small(-1)
            storage.requests = 0
            await how(size, 0)
        return storage.requests / size

    return measured


def workloads() -> Iterator[Workload]:
    for size in SIZES:
        tasks = f"{size} task{'s' if size > 1 else ''}"
        yield Workload(
            "W12",
            f"{tasks} in a transaction, misses on local files",
            "the same without one",
            {FLOOR: timed(plain, size), OURS: timed(together, size)},
            budget=1.3 if size == 1 else 2.5,
        )
        yield Workload(
            "W12",
            f"{tasks} in a transaction: requests for a task",
            "the same without one",
            {FLOOR: counted(plain, size), OURS: counted(together, size)},
            budget=1.0 if size == 1 else (3 * size + 2) / (2 * size),
            unit="requests",
            rounds=1,
        )
