"""What a large value costs, written durably and read back, in time and in memory."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from files import hop, micros, read_whole, write_renamed
from harness import FLOOR, OURS, Measure, Workload, in_folder
from onceflow.engine import INPUTS, Engine, task
from onceflow.storage import LocalStorage
from peers import diskcache, if_there, joblib

LARGE = os.urandom(16 * 1024 * 1024)
ARRAY = np.random.default_rng(1).random(2 * 1024 * 1024 + 300_000)


@task(cache_policy=INPUTS)
async def large(kind: str) -> Any:
    return LARGE if kind == "bytes" else ARRAY


def floor_large(kind: str, what: str) -> Callable[[Path], Coroutine[Any, Any, float]]:
    async def run(folder: Path) -> float:
        path, value = f"{folder}/value", LARGE if kind == "bytes" else ARRAY.data
        started = perf_counter()
        await hop(write_renamed, path, value, True)
        if what == "read":
            started = perf_counter()
            await hop(read_whole, path)
        return micros(started, 1) / 1000

    return run


def ours_large(kind: str, what: str) -> Callable[[Path], Coroutine[Any, Any, float]]:
    async def run(folder: Path) -> float:
        async with Engine(storage=LocalStorage(folder, durability="power")):
            started = perf_counter()
            await large(kind)
            cost = micros(started, 1)
        if what == "read":
            async with Engine(storage=LocalStorage(folder)):
                started = perf_counter()
                await large(kind)
                cost = micros(started, 1)
        return cost / 1000

    return run


def joblib_large(kind: str, what: str) -> Callable[[Path], Coroutine[Any, Any, float]]:
    async def run(folder: Path) -> float:
        cached = joblib.Memory(folder, verbose=0).cache(joblib_large_body)
        started = perf_counter()
        cached(kind)
        if what == "read":
            started = perf_counter()
            cached(kind)
        return micros(started, 1) / 1000

    return run


def joblib_large_body(kind: str) -> Any:
    return LARGE if kind == "bytes" else ARRAY


def diskcache_large(kind: str, what: str) -> Callable[[Path], Coroutine[Any, Any, float]]:
    async def run(folder: Path) -> float:
        with diskcache.Cache(folder) as cache:
            started = perf_counter()
            cache.set(kind, LARGE if kind == "bytes" else ARRAY)
            if what == "read":
                started = perf_counter()
                cache.get(kind)
            return micros(started, 1) / 1000

    return run


def peak(kind: str, what: str) -> Callable[[Path], Coroutine[Any, Any, float]]:
    """MiB that the write or read of a large value holds at its peak, beyond what was there before."""

    async def run(folder: Path) -> float:
        async with Engine(storage=LocalStorage(folder)):
            if what == "read":
                await large(kind)
            tracemalloc.start()
            before = tracemalloc.get_traced_memory()[0]
            async with Engine(storage=LocalStorage(folder)):
                await large(kind)
            held = tracemalloc.get_traced_memory()[1] - before
            tracemalloc.stop()
            return held / 1024 / 1024

    return run


def size_of(kind: str) -> Measure:
    async def run() -> float:
        return (len(LARGE) if kind == "bytes" else ARRAY.nbytes) / 1024 / 1024

    return run


def workloads() -> Iterator[Workload]:
    for kind, name in (("bytes", "16 MiB of bytes"), ("array", "an 18 MiB array of float64")):
        for what, budget in (("written", 1.2), ("read", 1.1)):
            yield Workload(
                "W7",
                f"{name}, {what}",
                "write and fsync" if what == "written" else "read",
                {
                    FLOOR: in_folder(floor_large(kind, what)),
                    OURS: in_folder(ours_large(kind, what)),
                    "joblib (blocking)": if_there(joblib, joblib_large(kind, what)),
                    "diskcache (blocking)": if_there(diskcache, diskcache_large(kind, what)),
                },
                budget=budget,
                unit="ms",
                rounds=5,
            )
            yield Workload(
                "W7",
                f"{name}, {what}: peak memory",
                "the value",
                {FLOOR: size_of(kind), OURS: in_folder(peak(kind, what))},
                budget=1.1,
                unit="MiB",
                rounds=1,
            )
