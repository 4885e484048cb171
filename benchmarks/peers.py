"""What others take for a small record, each at its best; None where one is not installed."""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from time import perf_counter
from typing import Any

from harness import Measure, in_folder

try:
    import joblib
except ImportError:
    joblib = None
try:
    import diskcache
except ImportError:
    diskcache = None
try:
    from cashews import Cache as Cashews
except ImportError:
    Cashews = None

VALUE = os.urandom(100)
COUNT = 200


def if_there(installed: Any, run: Callable[[Path], Coroutine[Any, Any, float]]) -> Measure | None:
    """The measurement of a peer, in an empty folder of its own."""
    return in_folder(run) if installed else None


async def joblib_misses(folder: Path) -> float:
    cached = joblib.Memory(folder, verbose=0).cache(joblib_body)
    started = perf_counter()
    for x in range(COUNT):
        cached(x)
    return (perf_counter() - started) / COUNT * 1e6


async def joblib_hits(folder: Path) -> float:
    await joblib_misses(folder)
    return await joblib_misses(folder)


def joblib_body(x: int) -> bytes:
    return VALUE


async def diskcache_misses(folder: Path) -> float:
    with diskcache.Cache(folder) as cache:
        started = perf_counter()
        for x in range(COUNT):
            if cache.get(x) is None:
                cache.set(x, VALUE)
        return (perf_counter() - started) / COUNT * 1e6


async def diskcache_hits(folder: Path) -> float:
    await diskcache_misses(folder)
    return await diskcache_misses(folder)


async def cashews_misses(folder: Path) -> float:
    cache = Cashews()
    cache.setup(f"disk://?directory={folder}&shards=0")
    cached = cache(ttl="1h")(cashews_body)
    started = perf_counter()
    for x in range(COUNT):
        await cached(x)
    cost = (perf_counter() - started) / COUNT * 1e6
    await cache.close()
    return cost


async def cashews_hits(folder: Path) -> float:
    await cashews_misses(folder)
    return await cashews_misses(folder)


async def cashews_body(x: int) -> bytes:
    return VALUE
