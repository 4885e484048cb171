"""What a run costs that is not cached: one by one, many at once, in memory, asleep, and in numbers."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from statistics import fmean
from time import perf_counter

from harness import FLOOR, OURS, Measure, Workload
from onceflow.engine import Engine, flow, task

try:
    import dask
except ImportError:
    dask = None


async def body(x: int) -> int:
    return x


trivial = task(body)


def plain(x: int) -> int:
    return x


# --- one by one


async def floor_awaited(count: int) -> float:
    started = perf_counter()
    for x in range(count):
        await asyncio.create_task(body(x))
    return (perf_counter() - started) / count * 1e6


@flow
async def ours_awaited(count: int) -> float:
    started = perf_counter()
    for x in range(count):
        await trivial(x)
    return (perf_counter() - started) / count * 1e6


async def dask_awaited(count: int) -> float:
    started = perf_counter()
    for x in range(count):
        dask.delayed(plain, pure=False)(x).compute(scheduler="sync")
    return (perf_counter() - started) / count * 1e6


# --- at once


async def floor_gathered(count: int) -> float:
    started = perf_counter()
    await asyncio.gather(*[body(x) for x in range(count)])
    return (perf_counter() - started) / count * 1e6


@flow
async def ours_gathered(count: int) -> float:
    started = perf_counter()
    await trivial.map(range(count))
    return (perf_counter() - started) / count * 1e6


async def dask_gathered(count: int) -> float:
    started = perf_counter()
    delayed = [dask.delayed(plain, pure=False)(x) for x in range(count)]
    dask.compute(*delayed, scheduler="threads")
    return (perf_counter() - started) / count * 1e6


# --- in flight

gate: asyncio.Event


async def waiting(x: int) -> int:
    await gate.wait()
    return x


waiting_task = task(waiting)


async def _bytes_in_flight(start: Callable[[int], list[Awaitable[int]]], count: int) -> float:
    """KiB that each of `count` runs holds while all of them wait."""
    global gate
    gate = asyncio.Event()
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    runs = start(count)
    for _ in range(5):
        await asyncio.sleep(0)
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    gate.set()
    await asyncio.gather(*runs)
    return held / count / 1024


async def floor_in_flight(count: int) -> float:
    return await _bytes_in_flight(lambda n: [asyncio.ensure_future(waiting(x)) for x in range(n)], count)


@flow
async def ours_in_flight(count: int) -> float:
    return await _bytes_in_flight(lambda n: [waiting_task.submit(x) for x in range(n)], count)


# --- asleep


async def asleep(seconds: float) -> None:
    await asyncio.sleep(seconds)


asleep_task = task(asleep)


async def floor_asleep(count: int) -> float:
    started = perf_counter()
    await asyncio.gather(*[asleep(0.5) for _ in range(count)])
    return (perf_counter() - started) * 1e3


@flow
async def ours_asleep(count: int) -> float:
    started = perf_counter()
    await asleep_task.map([0.5] * count)
    return (perf_counter() - started) * 1e3


def times(run: Callable[[int], Awaitable[float]], count: int, repeats: int = 1) -> Measure:
    """A measurement of so many operations, the mean of some, with an engine around them."""

    async def measured() -> float:
        async with Engine(storage="memory://bench"):
            return fmean([await run(count) for _ in range(repeats)])

    return measured


def workloads() -> Iterator[Workload]:
    yield Workload(
        "W1",
        "1 000 trivial tasks awaited one by one, nothing cached",
        "create_task and await",
        {
            FLOOR: times(floor_awaited, 1000),
            OURS: times(ours_awaited, 1000),
            "dask.delayed, synchronous": times(dask_awaited, 100) if dask else None,
        },
        budget=1.0,
        rounds=15,
    )
    yield Workload(
        "W2",
        "10 000 trivial tasks submitted at once and gathered",
        "gather",
        {
            FLOOR: times(floor_gathered, 10_000),
            OURS: times(ours_gathered, 10_000),
            "dask.delayed, threads": times(dask_gathered, 1000) if dask else None,
        },
        budget=3.0,
        rounds=9,
    )
    yield Workload(
        "W2m",
        "memory of a task in flight, 5 000 of them",
        "ensure_future",
        {FLOOR: times(floor_in_flight, 5000), OURS: times(ours_in_flight, 5000)},
        unit="KiB",
        budget=2.5,
        rounds=3,
    )
    yield Workload(
        "W3",
        "5 000 tasks that sleep for 0.5 s",
        "gather",
        {FLOOR: times(floor_asleep, 5000), OURS: times(ours_asleep, 5000)},
        unit="ms",
        budget=1.15,
        rounds=3,
    )
    for name, run in (("awaited one by one", ours_awaited), ("submitted at once", ours_gathered)):
        for count in (10_000, 100_000):
            yield Workload(
                "W10",
                f"{count:,} tasks {name}: the cost of each".replace(",", " "),
                "onceflow with 1 000",
                {FLOOR: times(run, 1000, repeats=10), OURS: times(run, count)},
                budget=1.2,
                rounds=3 if count == 100_000 else 5,
            )
