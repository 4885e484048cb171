"""What lies under a key when SERIALIZABLE runs want it: records that are old, large, torn or cannot be stored."""

from __future__ import annotations

import asyncio
import threading
from datetime import timedelta
from typing import Any

import pytest
from counted import Counted
from onceflow.engine import INPUTS, Engine, task, transaction
from onceflow.locking import MemoryLockManager
from onceflow.storage import MemoryStorage
from serial_ways import Side, Way

SERIAL = INPUTS.configure(isolation_level="SERIALIZABLE")
Logged = pytest.LogCaptureFixture


async def test_refresh(side: Side) -> None:
    """A refresh runs though there is a record, one at a time, and replaces it only when it succeeds."""
    counted = Counted()

    @task(cache_policy=SERIAL)
    async def one(x: int) -> list[int]:
        await counted.visit(x, seconds=0.005)
        if counted.runs[x] == 2:
            raise ValueError("not this time")
        return [counted.runs[x]]

    again = one.with_options(refresh_cache=True)
    assert await one(1) == [1]
    with pytest.raises(ValueError):
        await again(1)
    assert await one(1) == [1]
    assert sorted(await asyncio.gather(again(1), again(1), again(1))) == [[3], [4], [5]]
    assert await one(1) == [5]


async def test_a_refresh_is_read_past(side: Side) -> None:
    """Readers that are READ_COMMITTED see the old record while a SERIALIZABLE refresh is under way."""
    go, inside = asyncio.Event(), asyncio.Event()

    @task(cache_policy=SERIAL)
    async def one(x: int) -> str:
        if inside.is_set():
            return "new"
        return "old"

    @task(cache_policy=SERIAL, refresh_cache=True)
    async def gate(x: int) -> str:
        return ""

    assert await one(1) == "old"

    async def new(x: int) -> str:
        inside.set()
        await go.wait()
        return "new"

    again = task(cache_policy=SERIAL, refresh_cache=True)(new)
    relaxed = one.with_options(cache_policy=INPUTS.configure(isolation_level="READ_COMMITTED"))
    assert await again.cache_key(1) == await one.cache_key(1)
    refreshing = asyncio.create_task(again(1))
    await inside.wait()
    assert await relaxed(1) == "old"
    go.set()
    assert await refreshing == "new"
    assert await relaxed(1) == "new"


async def test_expired_records(side: Side) -> None:
    """An expired record is replaced by one execution, whoever asks at once; one that fails leaves no lock."""
    counted = Counted()

    @task(cache_policy=SERIAL, cache_expiration=timedelta(hours=1))
    async def one(x: int) -> int:
        await counted.visit(x, seconds=0.005)
        if counted.runs[x] == 2:
            raise ValueError("not this time")
        return counted.runs[x]

    assert await one(1) == 1
    later = side.engine.clock() + 7200
    side.engine.records._clock = side.engine.clock = lambda: later
    outcomes = await asyncio.gather(*(one(1) for _ in range(4)), return_exceptions=True)
    assert isinstance(outcomes[0], ValueError)
    assert outcomes[1:] == [3, 3, 3]
    assert await one(1) == 3
    assert await side.is_free(str(await one.cache_key(1)))


async def test_a_result_that_cannot_be_stored(side: Side, caplog: Logged) -> None:
    """R5: it is returned all the same with a warning; every waiter then runs for itself, one after the other."""
    counted = Counted()

    @task(cache_policy=SERIAL)
    async def locks(x: int) -> Any:
        await counted.visit(x, seconds=0.001)
        return threading.Lock()

    values = await asyncio.gather(*(locks(1) for _ in range(3)))
    assert len({id(value) for value in values}) == 3
    assert counted.runs[1] == 3
    assert caplog.text.count("could not be stored") == 3
    assert await side.is_free(str(await locks.cache_key(1)))


class Shy:
    """A value that cannot be unpickled the second time, and can otherwise; the first is before it is stored."""

    times = 0

    def __setstate__(self, state: object) -> None:
        Shy.times += 1
        if Shy.times == 2:
            raise ValueError("not now")

    def __getstate__(self) -> object:
        return "state"


async def test_a_waiter_that_cannot_read_what_it_is_served(caplog: Logged) -> None:
    """R5: it says so, and looks for itself when it is its turn; the others are served."""
    ran = 0

    @task(cache_policy=SERIAL, result_serializer="pickle")
    async def shy(x: int) -> Shy:
        nonlocal ran
        ran += 1
        await asyncio.sleep(0)
        return Shy()

    Shy.times = 0
    async with Engine(MemoryStorage(), MemoryLockManager()):
        values = await asyncio.gather(*(shy(1) for _ in range(3)))
    assert all(isinstance(value, Shy) for value in values)
    assert caplog.text.count("cannot be read") == 2  # once by the log, once by the error in it
    assert ran == 1


async def test_commit_hooks_hold_no_key(side: Side) -> None:
    """B8: the key of a run outside of any block is free when its record is committed, not after its hooks."""
    served = asyncio.Event()

    async def waits(txn: transaction) -> None:
        async with asyncio.timeout(10):
            await served.wait()

    @task(cache_policy=SERIAL, on_commit=[waits])
    async def one(x: int) -> int:
        await asyncio.sleep(0.001)
        return x

    first, second = asyncio.create_task(one(1)), asyncio.create_task(one(1))
    assert await second == 1
    assert await side.is_free(str(await one.cache_key(1)))
    served.set()
    assert await first == 1


async def test_two_engines_cannot_store_the_result(way: Way) -> None:
    """R5: where no holder's record can be written, the waiters of every process go on, one after the other."""
    counted = Counted()

    @task(cache_policy=SERIAL)
    async def locks(x: int) -> Any:
        await counted.visit(x, seconds=0.001)
        return threading.Lock()

    async def elsewhere() -> None:
        async with Side(way) as side:
            values = await asyncio.gather(*(locks(1) for _ in range(3)))
            assert len({id(value) for value in values}) == 3
            assert len(side.engine.flights) == 0

    async with asyncio.timeout(20):
        await asyncio.gather(elsewhere(), elsewhere())
    assert counted.runs[1] == 6


async def test_a_record_that_is_over_at_once(side: Side) -> None:
    """E5: who waits is not served by a record that has expired when it is written, but runs in its turn."""
    counted = Counted()

    @task(cache_policy=SERIAL, cache_expiration=timedelta(seconds=-1))
    async def brief(x: int) -> int:
        await counted.visit(x, seconds=0.001)
        return counted.runs[x]

    async def in_a_block() -> int:
        async with transaction():
            return await brief(2)

    assert await asyncio.gather(*(brief(1) for _ in range(3))) == [1, 2, 3]
    assert await asyncio.gather(*(in_a_block() for _ in range(3))) == [1, 2, 3]


async def test_a_large_record_is_refreshed(side: Side) -> None:
    """A record that is too large to be carried along by a claim is refreshed once, and kept until then."""
    counted = Counted()

    @task(cache_policy=SERIAL)
    async def large(x: int) -> bytes:
        await counted.visit(x, seconds=0.005)
        return bytes([counted.runs[x]]) * 300_000

    assert (await large(1))[:1] == b"\1"
    again = large.with_options(refresh_cache=True)
    assert sorted(value[0] for value in await asyncio.gather(again(1), again(1))) == [2, 3]
    assert (await large(1))[:1] == b"\3"
    assert await side.is_free(str(await large.cache_key(1)))
