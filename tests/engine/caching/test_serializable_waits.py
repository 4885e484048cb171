"""Waiting for a key: what it costs, who sees it, and when it ends. The same for every way to lock."""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest
from onceflow.engine import INPUTS, RunTimeoutError, Settings, flow, get_run_context, task
from onceflow.locking import LockTimeoutError
from onceflow.locking._waiting import report as telling
from serial_ways import Side, Way
from until import until

SERIAL = INPUTS.configure(isolation_level="SERIALIZABLE")
Logged = pytest.LogCaptureFixture


async def test_waiting_costs_nothing(side: Side) -> None:
    """B5, 21: 300 waiters use no thread and no request of their own, and other work goes on."""
    go, inside = asyncio.Event(), asyncio.Event()

    @task(cache_policy=SERIAL)
    async def gated(x: int) -> int:
        inside.set()
        await go.wait()
        return x

    leader = asyncio.create_task(gated(1))
    await inside.wait()
    threads = threading.active_count()
    waiters = [asyncio.create_task(gated(1)) for _ in range(300)]
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(next(iter(side.engine.flights._flights.values())).waiters) == 300
    assert threading.active_count() <= threads
    go.set()
    assert await asyncio.gather(leader, *waiters) == [1] * 301


async def test_a_wait_is_visible(side: Side) -> None:
    """B11: who waits is in the state Waiting, and its states tell afterwards that it did; the holder's do not."""
    go, inside = asyncio.Event(), asyncio.Event()

    @task(cache_policy=SERIAL)
    async def gated(x: int) -> int:
        inside.set()
        await go.wait()
        return x

    @flow
    async def both() -> None:
        first = gated.submit(1)
        await inside.wait()
        second = gated.submit(1)
        await until(lambda: second.state.name == "Waiting")
        go.set()
        await first, await second
        assert [state.name for state in first.run.states] == ["Pending", "Running", "Completed"]
        assert [state.name for state in second.run.states] == ["Pending", "Waiting", "Cached"]

    await both()


async def test_a_wait_for_another_process_is_visible(side: Side) -> None:
    """B11: the same where the holder is another engine, and the first in line waits for the lock manager."""
    go, inside = asyncio.Event(), asyncio.Event()

    @task(cache_policy=SERIAL)
    async def gated(x: int) -> int:
        inside.set()
        await go.wait()
        return x

    async def elsewhere() -> int:
        async with Side(side.way):
            return await gated(1)

    other = asyncio.create_task(elsewhere())
    await inside.wait()
    async with side.engine:
        mine = gated.submit(1)
        await until(lambda: mine.state.name == "Waiting")
        go.set()
        assert await mine == await other == 1
        assert [state.name for state in mine.run.states][-2:] == ["Waiting", "Cached"]


async def test_a_long_wait_is_told(way: Way, caplog: Logged, monkeypatch: pytest.MonkeyPatch) -> None:
    """B11: who waits for long for another process says so in the log, with the key and the name of its holder."""
    monkeypatch.setattr(telling, "TELL_AFTER", ((0.05, logging.WARNING),))
    go, inside = asyncio.Event(), asyncio.Event()

    @task(cache_policy=SERIAL)
    async def gated(x: int) -> int:
        inside.set()
        await go.wait()
        return x

    async def elsewhere() -> int:
        async with Side(way):
            return await gated(1)

    holder = asyncio.create_task(elsewhere())
    await inside.wait()
    async with Side(way):
        waiting = [asyncio.create_task(gated(1)) for _ in range(5)]
        await until(lambda: "has been waiting" in caplog.text)
        go.set()
        assert await asyncio.gather(holder, *waiting) == [1] * 6
    told = [record.message for record in caplog.records if "has been waiting" in record.message]
    assert len(told) == 1
    assert f"{await gated.cache_key(1)}" in told[0]
    assert "'gated-" in told[0].partition(": ")[2]


async def test_a_wait_is_not_work(side: Side) -> None:
    """B11: waiting is not counted against timeout_seconds, and holds no slot of a limit."""
    inside = asyncio.Event()

    @task(cache_policy=SERIAL, timeout_seconds=1.1, retries=1, concurrency=1)
    async def slow(x: int) -> int:
        inside.set()
        await asyncio.sleep(0.6)
        if get_run_context().run_count == 1 and x == 1:
            raise ValueError("again")
        return x

    runs = [asyncio.create_task(slow(1)) for _ in range(3)]  # 1.2 s, longer than one may run
    await inside.wait()
    assert await slow(2) == 2  # the one slot was free between the attempts, though two wait for key 1
    assert await asyncio.gather(*runs) == [1, 1, 1]
    with pytest.raises(RunTimeoutError):
        await slow.with_options(timeout_seconds=0.01)(3)


@pytest.mark.parametrize("where", ["policy", "settings"])
async def test_lock_timeout(way: Way, where: str) -> None:
    """B11: a wait has a timeout of its own, from the policy or the settings: the run fails, and the holder goes on."""
    go, inside = asyncio.Event(), asyncio.Event()
    policy = SERIAL.configure(lock_timeout=0.05) if where == "policy" else SERIAL
    settings = Settings() if where == "policy" else Settings(lock_timeout=0.05)

    @task(cache_policy=policy)
    async def gated(x: int) -> int:
        inside.set()
        await go.wait()
        return x

    async def elsewhere() -> int:
        async with Side(way, settings=settings):
            return await gated(1)

    holder = asyncio.create_task(elsewhere())
    await inside.wait()
    async with Side(way, settings=settings) as side:
        states = await asyncio.gather(*(gated.run_to_state(1) for _ in range(3)))
        for state in states:
            error = state.error()
            assert isinstance(error, LockTimeoutError)
            assert error.timeout == 0.05
            assert "gated-" in str(error.owner)
            assert f"{await gated.cache_key(1)}" in str(error)
        assert len(side.engine.flights) == 0
        go.set()
        assert await holder == 1
        assert await gated(1) == 1


async def test_lock_timeout_behind_the_own_process(side: Side) -> None:
    """B11: who waits in line behind a run of the same engine has the same timeout; that run goes on."""
    go, inside = asyncio.Event(), asyncio.Event()

    @task(cache_policy=SERIAL.configure(lock_timeout=0.05))
    async def gated(x: int) -> int:
        inside.set()
        await go.wait()
        return x

    holder = asyncio.create_task(gated(1))
    await inside.wait()
    async with asyncio.timeout(10):
        error = (await gated.run_to_state(1)).error()
    assert isinstance(error, LockTimeoutError)
    go.set()
    assert await holder == 1


async def test_lock_timeout_counts_the_whole_wait(side: Side) -> None:
    """lock_timeout is for all of a wait: in line behind others of this process, and then for the holder elsewhere."""
    inside, go = asyncio.Event(), asyncio.Event()

    @task(cache_policy=SERIAL.configure(lock_timeout=0.3))
    async def gated(x: int) -> int:
        inside.set()
        await go.wait()
        return x

    async def elsewhere() -> int:
        async with Side(side.way):
            return await gated(1)

    holder = asyncio.create_task(elsewhere())
    await inside.wait()
    loop = asyncio.get_running_loop()
    async with side.engine:
        first = asyncio.create_task(gated.run_to_state(1))
        await asyncio.sleep(0.15)
        began = loop.time()
        second = asyncio.create_task(gated.run_to_state(1))
        assert isinstance((await first).error(), LockTimeoutError)
        assert isinstance((await second).error(), LockTimeoutError)
    assert loop.time() - began < 0.6  # not 0.15 s in line and 0.3 s more as the first
    go.set()
    await holder


async def test_a_hit_takes_no_slot(side: Side) -> None:
    """B29: a hit, and a waiter that is served, do not wait for a limit that is used up."""
    go, inside = asyncio.Event(), asyncio.Event()

    @task(cache_policy=SERIAL, concurrency=1)
    async def limited(x: int) -> int:
        if x == 2:
            inside.set()
            await go.wait()
        return x

    await limited(1)
    busy = asyncio.create_task(limited(2))
    await inside.wait()
    async with asyncio.timeout(10):
        assert await limited(1) == 1
    go.set()
    assert await busy == 2
