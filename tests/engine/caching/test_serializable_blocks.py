"""SERIALIZABLE keys in trees of runs, in flows, and in transactions, which hold them until their outcome."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from contextvars import Context
from typing import Any

import pytest
from counted import Counted
from onceflow.engine import (
    INPUTS,
    CommitError,
    DeadlockError,
    Engine,
    flow,
    get_run_context,
    task,
    transaction,
)
from onceflow.locking import LockTimeoutError, MemoryLockManager
from onceflow.storage import MemoryStorage
from onceflow.storage._format.envelope import unpack_header
from serial_ways import Side, Way
from until import until

SERIAL = INPUTS.configure(isolation_level="SERIALIZABLE")
Logged = pytest.LogCaptureFixture


async def test_two_tasks_of_one_flow(side: Side) -> None:
    """Two tasks with the same inputs share a key: the second gets the first's result; two flows may do so at once."""
    counted = Counted()

    @task(cache_policy=SERIAL)
    async def left(x: int) -> int:
        await counted.visit(x, seconds=0.005)
        return x

    right = left.with_options(name="right")

    @flow
    async def both(x: int) -> list[int]:
        return [*(await asyncio.gather(left(x), right(x))), await left(x)]

    assert [*await asyncio.gather(both(1), both(1))] == [[1, 1, 1]] * 2
    assert counted.runs == {1: 1}


async def test_the_own_tree(side: Side) -> None:
    """15: the same key again inside its own tree, also through other tasks, does not wait for itself."""

    @task(cache_policy=SERIAL)
    async def outer(x: int) -> int:
        if x > 0 and get_run_context().parent is None:
            return 1 + await between(x)
        return 10

    @task
    async def between(x: int) -> int:
        return await outer(x)

    async with asyncio.timeout(10):
        assert await outer(1) == 11
    assert await outer(1) == 11


async def test_the_same_key_of_another_storage(side: Side) -> None:
    """15: a run may call one whose record has the same key in another storage: its own lock is no obstacle."""
    other = MemoryStorage()

    @task(cache_policy=SERIAL, result_storage=other)
    async def inner(x: int) -> int:
        return x

    @task(cache_policy=SERIAL)
    async def outer(x: int) -> int:
        value = await inner(x) + 1
        assert side.way.claims or await side.locks.is_locked(
            str(await outer.cache_key(1))
        )  # it is still ours
        return value

    async with asyncio.timeout(10):
        assert await outer(1) == 2
    assert await inner.cache_key(1) == await outer.cache_key(1)
    assert await side.is_free(str(await outer.cache_key(1)))
    assert not await side.locks.is_locked(str(await outer.cache_key(1)))


async def test_the_same_key_of_another_lock_manager() -> None:
    """15: a lock is lent to a run below only by the lock manager that has granted it."""
    others = MemoryLockManager()
    policy = SERIAL.configure(lock_manager=others, lock_timeout=0.05)

    @task(cache_policy=policy, result_storage=MemoryStorage())
    async def inner(x: int) -> int:
        return x

    @task(cache_policy=SERIAL)
    async def outer(x: int) -> int:
        return await inner(x)

    async with Engine(MemoryStorage(), MemoryLockManager()):
        assert await others.acquire(str(await inner.cache_key(1)), "stranger")
        with pytest.raises(LockTimeoutError, match="stranger"):
            await outer(1)


async def test_the_lock_of_another_key_is_not_lent() -> None:
    """15: a run that holds one key waits for another one like everybody."""
    locks = MemoryLockManager()

    @task(cache_policy=SERIAL.configure(lock_timeout=0.05))
    async def inner(x: int) -> int:
        return x

    @task(cache_policy=SERIAL)
    async def outer(x: int) -> int:
        return await inner(x + 1)

    async with Engine(MemoryStorage(), locks):
        assert await locks.acquire(str(await inner.cache_key(2)), "stranger")
        with pytest.raises(LockTimeoutError, match="stranger"):
            await outer(1)


async def test_runs_of_one_name(side: Side) -> None:
    """B7: two runs that are called the same, in two engines of one process, are two holders all the same."""
    counted = Counted()

    @task(cache_policy=SERIAL, task_run_name="same")
    async def one(x: int) -> int:
        await counted.visit(x, seconds=0.02)
        raise ValueError

    async def in_other() -> None:
        async with Side(side.way):
            await one.run_to_state(1)

    async with side.engine:
        await asyncio.gather(_alone(in_other()), one.run_to_state(1))
    assert counted.runs == {1: 2}


async def test_a_release_that_fails(caplog: Logged) -> None:
    """41: a key that cannot be given back is a warning; the result is returned, and the next in line goes on."""

    class Stuck(MemoryLockManager):
        async def _release_lease(self, lease: Any) -> None:
            await super()._release_lease(lease)
            raise RuntimeError("no answer.")

    @task(cache_policy=SERIAL)
    async def one(x: int) -> int:
        await asyncio.sleep(0)
        return x

    async with Engine(MemoryStorage(), Stuck()):
        assert [*await asyncio.gather(one(1), one(1))] == [1, 1]
    assert "no answer. The key is free when its lease ends." in caplog.text


async def test_the_record_names_its_token(side: Side) -> None:
    """4: a record carries the token under which it was written, and tokens grow."""

    @task(cache_policy=SERIAL, refresh_cache=True)
    async def one(x: int) -> int:
        return x

    tokens = []
    for _ in range(3):
        await one(1)
        header, _ = unpack_header(await side.storage.read(str(await one.cache_key(1))))
        tokens.append(header.token or 0)
    assert 0 < tokens[0] < tokens[1] < tokens[2]


async def test_two_flows_in_opposite_order(side: Side) -> None:
    """15: two runs that each hold a key and want the other's: one is refused with the chain, the other goes on."""
    both = asyncio.Barrier(2)

    @task(cache_policy=SERIAL)
    async def outer(x: int) -> int:
        if get_run_context().parent is None or get_run_context().parent is get_run_context().flow_run:
            await both.wait()
            return await outer(1 - x)
        return x

    @flow
    async def run(x: int) -> int:
        return await outer(x)

    async with asyncio.timeout(10):
        outcomes = await asyncio.gather(run(0), run(1), return_exceptions=True)
    refused = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert len(refused) == 1
    assert isinstance(refused[0], DeadlockError)
    assert len(refused[0].chain) == 3
    assert any("waits for" in link for link in refused[0].chain)


async def test_a_transaction_keeps_its_keys(side: Side) -> None:
    """The keys of a SERIALIZABLE block are held until its outcome: others wait, and then are served by its records."""
    counted = Counted()
    go, staged = asyncio.Event(), asyncio.Event()

    @task(cache_policy=SERIAL)
    async def one(x: int) -> list[int]:
        await counted.visit(x)
        return [x]

    async def block() -> None:
        async with transaction():
            assert [*await asyncio.gather(one(1), one(1))] == [[1], [1]]
            assert await one(2) == [2]
            staged.set()
            await go.wait()

    held = asyncio.create_task(block())
    await staged.wait()
    outside = asyncio.create_task(one(1))
    await until(lambda: any(flight.waiters for flight in side.engine.flights._flights.values()))
    go.set()
    await held
    assert await outside == [1]
    assert counted.runs == {1: 1, 2: 1}
    for x in (1, 2):
        assert await side.is_free(str(await one.cache_key(x)))


async def test_a_transaction_that_rolls_back(side: Side) -> None:
    """B8: after a roll-back no key is held, neither of a miss nor of a hit, and the next one runs."""
    counted = Counted()

    @task(cache_policy=SERIAL)
    async def one(x: int) -> int:
        await counted.visit(x)
        return x

    assert await one(1) == 1

    async def block() -> None:
        async with transaction(isolation_level="SERIALIZABLE"):
            await one(1)
            await one(2)
            raise KeyError

    with pytest.raises(KeyError):
        await block()
    for x in (1, 2):
        assert await side.is_free(str(await one.cache_key(x)))
        assert await one(x) == x
    assert counted.runs == {1: 1, 2: 2}


async def test_a_block_keeps_no_key_of_what_it_cannot_store(side: Side) -> None:
    """R5, B8: where a value cannot be staged the block is broken, and its key another's, though it is still open."""

    @task(cache_policy=SERIAL)
    async def locks(x: int) -> Any:
        await asyncio.sleep(0)
        return threading.Lock()

    async def outside() -> None:
        async with side.engine, asyncio.timeout(10):
            await locks(1)

    async def block() -> None:
        async with side.engine, transaction():
            await locks(1)
            await _alone(outside())

    with pytest.raises(CommitError):
        await _alone(block())


async def test_blocks_side_by_side_in_one_block(side: Side) -> None:
    """Two inner blocks that want one key: the second is served when the first has joined the outer one."""
    counted = Counted()

    @task(cache_policy=SERIAL)
    async def one(x: int) -> list[int]:
        await counted.visit(x, seconds=0.01)
        return [x]

    async def inner(seconds: float) -> None:
        await asyncio.sleep(seconds)
        async with transaction():
            assert await one(1) == [1]
            await asyncio.sleep(0.03)

    async with asyncio.timeout(10), transaction():
        await asyncio.gather(inner(0), inner(0), inner(0.02))
    assert counted.runs == {1: 1}
    assert await one(1) == [1]


async def test_refreshed_twice_in_a_block(side: Side) -> None:
    """What a block refreshes twice is committed as it was last, though the block holds the key already."""
    counted = Counted()

    @task(cache_policy=SERIAL, refresh_cache=True)
    async def one(x: int) -> int:
        await counted.visit(x)
        return counted.runs[x]

    async with transaction():
        assert await one(1) == 1
        assert await one(1) == 2
    assert await one.with_options(refresh_cache=False)(1) == 2


async def test_a_keyed_transaction_waits_for_another_process(way: Way) -> None:
    """4: a keyed block looks again when it has the key: what another has committed is there, and no key is held."""
    inside, go = asyncio.Event(), asyncio.Event()

    async def elsewhere() -> None:
        async with Side(way), transaction(key="own", isolation_level="SERIALIZABLE") as txn:
            inside.set()
            await go.wait()
            txn.stage("theirs")

    other = _alone(elsewhere())
    await inside.wait()
    async with Side(way) as side:
        with pytest.raises(LockTimeoutError):
            async with transaction(key="own", isolation_level="SERIALIZABLE", lock_timeout=0.05):
                pass
        asyncio.get_running_loop().call_later(0.02, go.set)
        async with transaction(key="own", isolation_level="SERIALIZABLE") as txn:
            assert txn.is_committed()
            assert await txn.read() == "theirs"
            assert len(side.engine.flights) == 0
            assert not await side.locks.is_locked("own")
        await other
        assert await side.locks.acquire("own", "stranger")
        async with (
            asyncio.timeout(10),
            transaction(key="own", isolation_level="SERIALIZABLE") as txn,
        ):
            assert txn.is_committed()  # a hit takes no lock
        await side.locks.release("own", "stranger")


async def test_a_keyed_transaction_that_is_cancelled(side: Side) -> None:
    """30: a keyed block that is cancelled while it opens holds nothing, at whatever step that was."""

    async def block() -> None:
        async with transaction(key="own", isolation_level="SERIALIZABLE") as txn:
            txn.stage(1)
            raise KeyError

    for steps in range(12):
        running = asyncio.create_task(block())
        for _ in range(steps):
            await asyncio.sleep(0)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert len(side.engine.flights) == 0
        assert not await side.locks.is_locked("own")


def _alone(work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """As a process of its own would do it: with nothing of what is entered or open here."""
    return asyncio.create_task(work, context=Context())


@pytest.mark.parametrize("inner", [True, False])
async def test_a_keyed_block_commits_on_what_it_saw(way: Way, inner: bool) -> None:
    """6: the record of a keyed block never covers one that was written meanwhile, whoever staged it in the block."""

    @task(cache_key_fn=lambda context, parameters: "own")
    async def one(value: str) -> str:
        return value

    async def elsewhere() -> None:
        async with Side(way):
            await one("theirs")  # READ_COMMITTED: it asks for no lock

    async def block() -> None:
        async with transaction(key="own", isolation_level="SERIALIZABLE") as txn:
            if inner:
                assert await one("mine") == "mine"
            else:
                txn.stage("mine")
            await _alone(elsewhere())

    async with Side(way) as side:
        with pytest.raises(CommitError, match="'own'"):
            await block()
        assert await one("again") == "theirs"
        assert not await side.locks.is_locked("own")


@pytest.mark.parametrize("inner", [True, False])
async def test_a_keyed_block_that_replaces_its_own_work(inner: bool) -> None:
    """6: what a block itself, or an independent one inside, has written or removed under its key is no stranger's."""

    @task(cache_key_fn=lambda context, parameters: "own", refresh_cache=True)
    async def one(value: str) -> str:
        return value

    async def again(txn: transaction, value: str) -> None:
        if inner:
            await one(value)
        else:
            txn.stage(value)

    async with Engine(MemoryStorage(), MemoryLockManager()):
        await one("first")
        async with transaction(key="own", isolation_level="SERIALIZABLE", overwrite=True) as txn:
            await one.invalidate("")
            await again(txn, "second")
        assert await one.with_options(refresh_cache=False)("") == "second"
        async with transaction(key="own", isolation_level="SERIALIZABLE", overwrite=True) as txn:
            async with transaction(independent=True):
                await one("third")
            await again(txn, "fourth")
        assert await one.with_options(refresh_cache=False)("") == "fourth"
