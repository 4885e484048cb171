"""SERIALIZABLE within one process, the same for every way to lock: one execution, and nobody is forgotten."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from counted import Counted
from onceflow.engine import INPUTS, ConfigurationError, Engine, EngineClosedError, task, transaction
from onceflow.locking import MemoryLockManager, StorageLockManager
from onceflow.storage import MemoryStorage, StorageUnavailableError
from serial_ways import Side, Way

SERIAL = INPUTS.configure(isolation_level="SERIALIZABLE")
Logged = pytest.LogCaptureFixture


# --- one execution


async def test_three_gathered_runs(side: Side) -> None:
    """L15: three gathered runs of one task: all results are equal, the body ran once, and the key is free."""
    counted = Counted()

    @task(cache_policy=SERIAL)
    async def slow(x: int) -> list[int]:
        await counted.visit(x, seconds=0.01)
        return [x, counted.runs[x]]

    assert await asyncio.gather(*(slow(1) for _ in range(3))) == [[1, 1]] * 3
    assert await slow(1) == [1, 1]
    assert counted.runs == {1: 1}
    assert await side.is_free(str(await slow.cache_key(1)))


async def test_waiters_get_values_of_their_own(side: Side) -> None:
    """Every caller may change what it is given: nobody else sees it, neither waiters nor later hits."""
    counted = Counted()

    @task(cache_policy=SERIAL)
    async def make(x: int) -> dict[str, list[int]]:
        await counted.visit(x, seconds=0.01)
        return {"a": [1]}

    values = await asyncio.gather(*(make(1) for _ in range(4)))
    values.append(await make(1))
    for value in values:
        assert value == {"a": [1]}
        value["a"].append(2)
    assert await make(1) == {"a": [1]}
    assert counted.runs == {1: 1}


async def test_1000_keys(side: Side) -> None:
    """1 000 keys at once, each asked for three times: each runs once, and two of one key are never inside."""
    counted = Counted()
    count = 60 if side.way.kind == "claims_s3" else 200 if side.way.kind != "memory" else 1000

    @task(cache_policy=SERIAL)
    async def one(x: int) -> int:
        await counted.visit(x)
        return x

    wanted = [x % count for x in range(3 * count)]
    assert await asyncio.gather(*map(one, wanted)) == wanted
    assert set(counted.runs.values()) == {1}
    assert len(counted.runs) == count


async def test_two_engines(side: Side) -> None:
    """B7: two engines, each with a storage and a lock manager of its own, execute a key once between them."""
    counted = Counted()

    @task(cache_policy=SERIAL)
    async def one(x: int) -> int:
        await counted.visit(x, seconds=0.02)
        return x

    async def four() -> list[int]:
        return await asyncio.gather(*(one(x) for x in (1, 2, 1, 2)))

    async def in_other() -> list[int]:
        async with Side(side.way):
            return await four()

    async with side.engine:  # this test's task; `in_other` enters its own in a task of its own
        assert [*await asyncio.gather(asyncio.create_task(in_other()), four())] == [[1, 2, 1, 2]] * 2
    assert counted.runs == {1: 1, 2: 1}


async def test_first_come_first_served(side: Side) -> None:
    """B7: within a process those who wait for a key run in the order in which they came; here each one fails."""
    counted = Counted()

    @task(cache_policy=SERIAL - "name")
    async def failing(x: int, name: int) -> None:
        await counted.visit(x, name)
        raise ValueError(name)

    outcomes = await asyncio.gather(*(failing(1, name) for name in range(20)), return_exceptions=True)
    assert counted.order == list(range(20))
    assert [error.args for error in outcomes if isinstance(error, ValueError)] == [(n,) for n in range(20)]


# --- failures, timeouts, cancellation


@pytest.mark.parametrize("failures", [1, 7])
async def test_failures_in_a_row(side: Side, failures: int) -> None:
    """28: of ten runs the first k fail; each passes on to exactly the next; the rest is served by the first success."""
    counted = Counted()

    @task(cache_policy=SERIAL)
    async def moody(x: int) -> int:
        await counted.visit(x, seconds=0.001)
        if counted.runs[x] <= failures:
            raise ValueError(counted.runs[x])
        return counted.runs[x]

    outcomes = await asyncio.gather(*(moody(1) for _ in range(10)), return_exceptions=True)
    assert [str(outcome) for outcome in outcomes] == [str(min(n, failures + 1)) for n in range(1, 11)]
    assert counted.runs[1] == failures + 1


def _finishes(inside: asyncio.Event) -> Any:
    @task(cache_policy=SERIAL)
    async def end(how: str) -> str:
        inside.set()
        return how

    return end


def _fails(inside: asyncio.Event) -> Any:
    @task(cache_policy=SERIAL)
    async def end(how: str) -> str:
        inside.set()
        raise ValueError(how)

    return end


def _times_out(inside: asyncio.Event) -> Any:
    @task(cache_policy=SERIAL, timeout_seconds=0.01)
    async def end(how: str) -> str:
        inside.set()
        await asyncio.Event().wait()
        return how

    return end


def _sync(inside: asyncio.Event) -> Any:
    @task(cache_policy=SERIAL)
    def end(how: str) -> str:
        return how

    return end


@pytest.mark.parametrize("making", [_finishes, _fails, _times_out, _sync])
async def test_the_lock_is_free_when_the_run_has_ended(
    side: Side, making: Callable[[asyncio.Event], Any]
) -> None:
    """B4: when a run has ended, however, its key is free: not soon, but by then."""
    end = making(asyncio.Event())
    await end.run_to_state("so")
    assert await side.is_free(str(await end.cache_key("so")))


async def test_cancelled_holder(side: Side) -> None:
    """B4, 26: a holder that is cancelled frees the key before its cancellation goes on, and the next one runs."""
    inside, counted = asyncio.Event(), Counted()

    @task(cache_policy=SERIAL)
    async def stuck(x: int) -> int:
        inside.set()
        await counted.visit(x, seconds=60 if counted.runs[x] == 0 else 0)
        return x

    first = asyncio.create_task(stuck(1))
    await inside.wait()
    second = asyncio.create_task(stuck(1))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert await second == 1
    assert counted.runs[1] == 2
    assert await side.is_free(str(await stuck.cache_key(1)))


async def test_cancelled_at_every_point(side: Side) -> None:
    """30: cancelled at its n-th step, for every n: nothing stays held, and the record is there whole or not at all."""

    @task(cache_policy=SERIAL)
    async def short(x: int) -> int:
        await asyncio.sleep(0)
        return x

    for steps in range(40):
        running = asyncio.create_task(short(steps))
        for _ in range(steps):
            await asyncio.sleep(0)
        is_done = running.done()
        running.cancel()
        running.cancel()  # a second one cuts through what only shields against the first
        outcome = (await asyncio.gather(running, return_exceptions=True))[0]
        assert outcome == steps if is_done else isinstance(outcome, (int, asyncio.CancelledError))
        assert await side.is_free(str(await short.cache_key(steps)))
        assert await short(steps) == steps


async def test_random_cancellations(side: Side) -> None:
    """26, 27: 60 runs of 4 keys, a third of them cancelled at random moments: the others all end with the value."""
    chosen = random.Random(side.way.kind)
    counted = Counted()

    @task(cache_policy=SERIAL)
    async def one(x: int) -> int:
        await counted.visit(x, seconds=chosen.random() / 200)
        if chosen.random() < 0.5:
            raise ValueError("again")
        return x

    async def until_there(x: int) -> int:
        while True:
            try:
                return await one(x)
            except ValueError:
                pass

    runs = [asyncio.create_task(until_there(n % 4)) for n in range(60)]
    for run in chosen.sample(runs, 20):
        await asyncio.sleep(chosen.random() / 500)
        run.cancel()
    outcomes = await asyncio.gather(*runs, return_exceptions=True)
    for number, outcome in enumerate(outcomes):
        assert isinstance(outcome, asyncio.CancelledError) or outcome == number % 4
    assert sum(isinstance(outcome, int) for outcome in outcomes) >= 40
    for x in range(4):
        assert await side.is_free(str(await one.cache_key(x)))


# --- configuration, loops, the end


async def test_no_lock_manager(tmp_path: Path) -> None:
    """87: SERIALIZABLE without a lock manager is a configuration error that says where to name one."""

    @task(cache_policy=SERIAL)
    async def one(x: int) -> int:
        return x

    async with Engine(tmp_path):
        with pytest.raises(ConfigurationError, match=r"no lock manager.*ONCEFLOW_LOCKS"):
            await one(1)


async def test_the_nearest_lock_manager() -> None:
    """The lock manager is the policy's, else the transaction's, else the engine's."""
    managers = [MemoryLockManager(name) for name in ("policy", "block", "engine")]
    used: list[str] = []

    @task
    async def one(x: int) -> None:
        await asyncio.sleep(0)

    class Named(MemoryLockManager):
        async def acquire(self, *args: Any, **kwargs: Any) -> Any:
            used.append(self.name)
            return await super().acquire(*args, **kwargs)

    named = [Named(manager.name) for manager in managers]
    async with Engine(MemoryStorage(), named[2]):
        plain = one.with_options(cache_policy=SERIAL)
        await one.with_options(cache_policy=SERIAL.configure(lock_manager=named[0]))(1)
        async with transaction(lock_manager=named[1]):
            await plain(2)
        async with transaction(isolation_level="SERIALIZABLE", lock_manager=named[1]):
            await one.with_options(cache_policy=INPUTS)(3)
        await plain(4)
        async with transaction(lock_manager=named[1]):
            await one.with_options(cache_policy=SERIAL.configure(lock_manager=named[0]))(5)
    assert used == ["policy", "block", "block", "engine", "policy"]


@pytest.mark.parametrize("ends", ["commit", "roll back", "cancel"])
async def test_keys_are_freed_in_order(ends: str) -> None:
    """B8: a block frees its keys in the order in which it took them, each once, however it ends."""
    freed: list[str] = []

    class Noting(MemoryLockManager):
        async def _release_lease(self, lease: Any) -> None:
            freed.append(lease.key)
            await super()._release_lease(lease)

    @task(cache_policy=SERIAL)
    async def one(x: int) -> int:
        return x

    async with Engine(MemoryStorage(), Noting()):
        inside = asyncio.Event()

        async def block() -> None:
            async with transaction():
                async with transaction():
                    await one(1)
                    await one(2)
                await one(3)
                if ends == "roll back":
                    raise KeyError
                if ends == "cancel":
                    inside.set()
                    await asyncio.Event().wait()

        running = asyncio.create_task(block())
        if ends == "cancel":
            await inside.wait()
            running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert freed == [await one.cache_key(x) for x in (1, 2, 3)]


async def test_a_read_that_fails(caplog: Logged) -> None:
    """B8: where the record cannot be read, the run fails or goes on, but no lock remains."""

    class Broken(MemoryStorage):
        async def fetch(self, *args: Any, **kwargs: Any) -> Any:
            raise StorageUnavailableError("read", "key", self.url, "gone", "Wait.")

    @task(cache_policy=SERIAL)
    async def one(x: int) -> int:
        return x

    for locks in (MemoryLockManager(), None):
        storage = Broken()
        manager = locks or StorageLockManager(storage)
        async with Engine(storage, manager) as engine:
            await asyncio.gather(*(one.run_to_state(1) for _ in range(3)))
            assert len(engine.flights) == 0
            if locks is not None:
                assert not await locks.is_locked(str(await one.cache_key(1)))


def test_asyncio_run_twice(way: Way) -> None:
    """90: two loops one after the other, each with the same engine object: the second finds the first's record."""
    side = Side(way)
    ran: list[int] = []

    @task(cache_policy=SERIAL)
    async def one(x: int) -> int:
        ran.append(x)
        return x

    async def main() -> None:
        async with side.engine:
            assert [*await asyncio.gather(one(1), one(1))] == [1, 1]

    async def last() -> None:
        async with side:
            assert await one(1) == 1

    asyncio.run(main())
    asyncio.run(main())
    asyncio.run(last())
    assert ran == [1]


async def test_two_loops_in_two_threads(way: Way) -> None:
    """90, B7: four loops in four threads, an engine in each: of one key never two are inside, and it runs once."""
    ran: list[int] = []
    ready = threading.Barrier(4)

    @task(cache_policy=SERIAL)
    async def one(x: int) -> int:
        ran.append(x)
        await asyncio.sleep(0.005)
        return x

    async def main() -> None:
        async with Side(way):
            await asyncio.to_thread(ready.wait)
            wanted = [x for x in range(5) for _ in range(3)]
            assert await asyncio.gather(*map(one, wanted)) == wanted

    async def in_thread() -> None:
        await asyncio.to_thread(asyncio.run, main())

    await asyncio.gather(*(in_thread() for _ in range(4)))
    assert sorted(ran) == [0, 1, 2, 3, 4]


async def test_closing_with_a_holder_and_waiters(way: Way) -> None:
    """Closing an engine ends its runs and frees what they hold; a new engine can have it at once."""
    inside = asyncio.Event()

    @task(cache_policy=SERIAL)
    async def stuck(x: int) -> int:
        inside.set()
        await asyncio.Event().wait()
        return x

    side = Side(way, grace=0.0)
    async with side:
        futures = [stuck.submit(1) for _ in range(3)]
        await inside.wait()
    for future in futures:
        assert future.state.is_final()
    async with Side(way) as other:
        assert await other.is_free(str(await stuck.cache_key(1)))
        with pytest.raises((EngineClosedError, asyncio.CancelledError, RuntimeError)):
            await futures[0]


async def test_no_waiter_is_kept(side: Side) -> None:
    """Nothing of the waiters of a key stays in the engine when it is done."""

    @task(cache_policy=SERIAL)
    async def one(x: int) -> int:
        await asyncio.sleep(0.001)
        return x

    await asyncio.gather(*(one(x % 7) for x in range(100)))
    gc.collect()
    assert len(side.engine.flights) == 0
    assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]


async def test_what_the_log_says(side: Side, caplog: Logged) -> None:
    """A run that was served says by whose record, once and in whole sentences, whoever read it first."""
    caplog.set_level(logging.INFO, "onceflow")

    @task(cache_policy=SERIAL)
    async def one(x: int) -> int:
        await asyncio.sleep(0.001)
        return x

    await asyncio.gather(*(one(1) for _ in range(3)))
    await asyncio.gather(*(one(1) for _ in range(3)))
    lines = [
        record.getMessage() for record in caplog.records if "cached: written by run" in record.getMessage()
    ]
    assert len(lines) == 5
    writers = {line.partition("written by run ")[2].split()[0] for line in lines}
    assert len(writers) == 1
    assert all(line.count("written by run") == 1 for line in lines)
