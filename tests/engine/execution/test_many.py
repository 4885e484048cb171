"""Very many runs: what each costs does not grow with their number, neither in memory nor in work."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import tracemalloc
from asyncio.subprocess import PIPE
from types import FrameType
from typing import Any

import pytest
from onceflow.engine import flow, task

pytestmark = pytest.mark.usefixtures("engine")
KIB = 1024


@task
async def trivial(x: int) -> int:
    return x


def heavy(count: int) -> Any:
    return pytest.param(count, marks=pytest.mark.chaos)


@pytest.mark.parametrize("count", [2000, heavy(100_000)])
@pytest.mark.parametrize("verb", ["submit", "map"])
async def test_a_task_in_flight_takes_little_memory(verb: str, count: int) -> None:
    """W2m: of however many submitted tasks each takes 2.5 KiB at most while it waits, 1.5 KiB when it has ended and
    somebody keeps its future, and nothing when nobody does."""
    gate = asyncio.Event()
    before = 0

    @task
    async def waiting(x: int) -> int:
        await gate.wait()
        return x

    def each() -> float:
        gc.collect()
        return (tracemalloc.get_traced_memory()[0] - before) / count / KIB

    @flow
    async def main() -> tuple[float, float, float]:
        nonlocal before
        await trivial.map(range(count))  # what is allocated once is there now
        before = tracemalloc.get_traced_memory()[0]
        futures: Any = (
            waiting.map(range(count)) if verb == "map" else [waiting.submit(x) for x in range(count)]
        )
        for _ in range(3):
            await asyncio.sleep(0)
        in_flight = each()
        gate.set()
        assert sum([await future for future in futures]) == sum(range(count))
        ended = each()
        del futures
        return in_flight, ended, each()

    tracemalloc.start()
    try:
        in_flight, ended, gone = await main()
    finally:
        tracemalloc.stop()
    assert in_flight <= 2.5
    assert ended <= 1.5
    assert gone <= 0.1


WAITERS = """
import asyncio, gc, tracemalloc
from onceflow.engine import INPUTS, Engine, task
from onceflow.locking import MemoryLockManager
from onceflow.storage import MemoryStorage

@task(cache_policy=INPUTS.configure(isolation_level="SERIALIZABLE"))
async def gated(x):
    await go.wait()
    return x

async def main():
    global go
    go = asyncio.Event()
    async with Engine(MemoryStorage(), MemoryLockManager()):
        calls = [asyncio.create_task(gated(1))]
        await asyncio.sleep(0.01)
        gc.collect()
        tracemalloc.start()
        calls += [asyncio.create_task(gated(1)) for _ in range(2000)]
        for _ in range(3):
            await asyncio.sleep(0)
        print(tracemalloc.get_traced_memory()[0] / 2000)
        tracemalloc.stop()
        go.set()
        assert await asyncio.gather(*calls) == [1] * 2001

asyncio.run(main())
"""


async def test_a_waiter_takes_little_memory() -> None:
    """W6: of 2 000 runs that wait for the key of another one each takes 3 KiB at most, its asyncio task included."""
    # In a process of its own: what went before in this one decides how much of it is newly allocated.
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", WAITERS, stdout=PIPE)
    out, _ = await process.communicate()
    assert process.returncode == 0
    assert float(out) <= (3 if sys.version_info < (3, 13) else 3.2) * KIB  # a coroutine of 3.13 takes more


@pytest.mark.parametrize("way", ["awaited", "submitted", "mapped", "streamed"])
async def test_the_work_for_a_task_does_not_grow_with_their_number(way: str) -> None:
    """B24, W10: the calls of Python functions for each of 10 000 tasks are those for each of 1 000, and few."""

    @flow
    async def main(count: int) -> None:
        if way == "awaited":
            for x in range(count):
                await trivial(x)
        elif way == "submitted":
            futures = [trivial.submit(x) for x in range(count)]
            for future in futures:
                await future
        elif way == "mapped":
            await trivial.map(range(count))
        else:
            async for _ in trivial.stream(range(count)):
                pass

    async def calls(count: int) -> float:
        number = 0

        def note(frame: FrameType, event: str, argument: Any) -> None:
            nonlocal number
            number += event == "call"

        sys.setprofile(note)
        try:
            await main(count)
        finally:
            sys.setprofile(None)
        return number / count

    await main(10)
    few, many = await calls(1000), await calls(10_000)
    assert many <= 1.05 * few
    assert many <= 150


async def test_ten_thousand_sleeping_tasks_need_no_thread() -> None:
    """W3: 10 000 tasks that sleep are 10 000 suspended coroutines: as many asyncio tasks, and no thread."""
    asleep = 0
    all_asleep = asyncio.Event()

    @task
    async def sleeps(seconds: float) -> None:
        nonlocal asleep
        asleep += 1
        if asleep == 10_000:
            all_asleep.set()
        await asyncio.sleep(seconds)

    @flow
    async def main() -> tuple[int, int]:
        before = threading.active_count()
        futures = sleeps.map([0.2] * 10_000)
        await all_asleep.wait()
        alive = len(asyncio.all_tasks()), threading.active_count() - before
        await futures
        return alive

    tasks, threads = await main()
    assert 10_000 <= tasks <= 10_005
    assert threads == 0
