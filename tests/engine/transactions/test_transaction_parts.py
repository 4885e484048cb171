# ruff: noqa: PT012 - a block of a transaction that is left by an exception has more than one statement
"""Values, hooks, keys, isolation, cancellation and cost of `transaction()`."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from onceflow.engine import INPUTS, Engine, get_run_context, task, transaction
from onceflow.engine._errors import CommitError, ConfigurationError, DeadlockError, NoValueError
from onceflow.engine._runs.run import current_transaction
from onceflow.engine._transactions.keyed import place_of
from onceflow.locking import MemoryLockManager, StorageLockManager
from onceflow.storage import LocalStorage, MemoryStorage, Storage
from stored_records import CountingStorage, keys_in
from transacting import (
    SERIALIZABLE,
    Boom,
    engine,
    kind,
    load,
    local_engine,
    nothing_ran,
    process,
    ran,
    records_in,
    storage,
)

__all__ = ["engine", "kind", "local_engine", "nothing_ran", "storage"]

# --- values


async def test_values_are_found_outwards(local_engine: Engine) -> None:
    """X15, X17: inner blocks see values of outer ones, set before or after; overriding stays inside."""
    async with transaction() as outer:
        outer.set("a", 1)
        async with transaction() as inner:
            outer.set("b", None)
            assert (inner.get("a"), inner.get("b")) == (1, None)
            inner.set("a", 2)
            assert (inner.get("a"), outer.get("a")) == (2, 1)
            assert inner.get("c", None) is None
            with pytest.raises(NoValueError, match="'c'") as caught:
                inner.get("c")
            assert isinstance(caught.value, KeyError)
            assert isinstance(caught.value, ValueError)


async def test_hooks_see_what_their_task_has_set(local_engine: Engine) -> None:
    """H1: values set inside a task are on the transaction that its hooks are given, in a block and outside of one."""
    seen: list[Any] = []

    @task(cache_policy=INPUTS)
    async def writes(path: str) -> str:
        txn = get_run_context().transaction
        assert txn is transaction.current()
        assert txn is not None
        txn.set("path", path)
        return path

    @writes.on_commit
    async def committed(txn: transaction) -> None:
        seen.append(("commit", txn.get("path"), txn.get("block", None)))

    @writes.on_rollback
    def rolled_back(txn: transaction) -> None:
        assert txn.parent is outer
        seen.append(("rollback", txn.get("path"), txn.get("block", None)))

    await writes("0")
    async with transaction() as outer:
        outer.set("block", "b")
        await writes("1")
        await writes("2")
    with pytest.raises(Boom):
        async with transaction() as outer:
            await writes("3")
            await writes("4")
            raise Boom
    assert seen == [
        ("commit", "0", None), ("commit", "1", "b"), ("commit", "2", "b"),
        ("rollback", "4", None), ("rollback", "3", None),
    ]  # fmt: skip


async def test_hooks_run_once_and_are_logged(local_engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """H1, H2: each hook runs once; start and success are logged by name, errors with their traceback."""
    called = []

    def fine(txn: transaction) -> None:
        called.append("fine")

    async def broken(txn: transaction) -> None:
        called.append("broken")
        raise Boom("in a hook")

    hooked = load.with_options(on_commit=[fine, broken, fine])
    caplog.set_level(logging.INFO, "onceflow")
    async with transaction() as txn, transaction():
        await hooked(1)
    assert called == ["fine", "broken", "fine"]
    assert txn.is_committed()
    lines = [record.getMessage() for record in caplog.records]
    assert sum("Running commit hook 'fine'" in line for line in lines) == 2
    assert sum("Commit hook 'fine' finished running successfully" in line for line in lines) == 2
    (failed,) = [record for record in caplog.records if "error was encountered" in record.getMessage()]
    assert failed.exc_info is not None
    assert "commit hook 'broken'" in failed.getMessage()
    assert (await load.run_to_state(1)).name == "Cached"


async def test_no_hooks_no_lines(local_engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """H3: without rollback hooks nothing is said of hooks."""
    caplog.set_level(logging.INFO, "onceflow")
    with pytest.raises(Boom):
        async with transaction():
            await load(1)
            raise Boom
    assert not [record for record in caplog.records if "hook" in record.getMessage()]


async def test_hooks_of_a_task_that_was_served(local_engine: Engine) -> None:
    """H1: what was committed before is neither committed nor rolled back by a hit; its hooks do not run again."""
    called = []
    hooked = load.with_options(
        on_commit=[lambda txn: called.append("commit")],
        on_rollback=[lambda txn: called.append("rollback")],
    )
    await hooked(1)
    assert called == ["commit"]
    with pytest.raises(Boom):
        async with transaction():
            assert (await hooked.run_to_state(1)).name == "Cached"
            raise Boom
    async with transaction():
        assert (await hooked.run_to_state(1)).name == "Cached"
    assert (await hooked.run_to_state(1)).name == "Cached"
    assert called == ["commit"]
    with pytest.raises(Boom):
        async with transaction():
            await hooked(2)
            assert (await hooked.run_to_state(2)).name == "Cached"
            raise Boom
    assert called == ["commit", "rollback"]


# --- keyed transactions


async def test_a_keyed_transaction(engine: Engine, storage: Storage) -> None:
    """X10, X12: what is staged is committed under the key; the next one is committed already, unless it overwrites."""
    async with transaction(key="report") as txn:
        assert not txn.is_committed()
        with pytest.raises(NoValueError):
            await txn.read()
        value = {"rows": [1, 2]}
        txn.stage(value)
        value["rows"].append(3)
        assert await txn.read() == {"rows": [1, 2]}
        assert await keys_in(storage) == []
    async with transaction(key="report") as txn:
        assert txn.is_committed()
        assert await txn.read() == {"rows": [1, 2]}
        txn.stage("ignored")
    async with transaction(key="report", overwrite=True) as txn:
        assert not txn.is_committed()
        txn.stage([4])
    async with transaction(key="report") as txn:
        assert await txn.read() == [4]


async def test_a_keyed_transaction_elsewhere(engine: Engine, storage: Storage) -> None:
    """X12: an explicit storage returns an equal record under that key; with tasks inside all of it is one commit."""
    store = MemoryStorage()
    with pytest.raises(Boom):
        async with transaction(key="report", storage=store) as txn:
            txn.stage(1)
            await load(1)
            raise Boom
    assert await keys_in(store) == []
    async with transaction():
        async with transaction(key="report", storage=store) as txn:
            txn.stage((1, {2}))
            await load(1)
        assert await keys_in(store) == []
    async with transaction(key="report", storage=store) as txn:
        assert await txn.read() == (1, {2})
    assert (await load.run_to_state(1)).name == "Cached"


async def test_a_keyed_value_that_cannot_be_stored(engine: Engine, storage: Storage) -> None:
    """B12: the block is rolled back, and the error names the key."""
    with pytest.raises(CommitError, match="report"):
        async with transaction(key="report") as txn:
            await load(1)
            txn.stage(i for i in range(3))
    assert await records_in(storage) == []


async def test_stage_needs_a_key_and_an_open_block(local_engine: Engine) -> None:
    """The error says what to do."""
    async with transaction() as txn:
        with pytest.raises(ConfigurationError, match="key="):
            txn.stage(1)
        with pytest.raises(ConfigurationError, match="key="):
            await txn.read()
    with pytest.raises(ConfigurationError, match="block"):
        transaction(key="x").stage(1)


# --- isolation


async def test_isolation_is_inherited(local_engine: Engine) -> None:
    """X18: READ_COMMITTED by default; inside a SERIALIZABLE parent it is inherited, with its lock manager."""
    manager = MemoryLockManager()
    async with transaction() as plain:
        assert plain.isolation_level is not None
        assert plain.isolation_level.name == "READ_COMMITTED"
    async with transaction(isolation_level="SERIALIZABLE", lock_manager=manager), transaction() as inner:
        assert inner.isolation_level is not None
        assert (inner.isolation_level.name, inner.lock_manager) == ("SERIALIZABLE", manager)


async def test_serializable_needs_a_lock_manager(tmp_path: Path) -> None:
    """X19: opening the block, or using the task, is a configuration error that says how to get one."""
    async with Engine(storage=LocalStorage(tmp_path)):
        with pytest.raises(ConfigurationError, match="lock_manager"):
            async with transaction(isolation_level="SERIALIZABLE"):
                pass
        with pytest.raises(ConfigurationError, match="lock manager"):
            async with transaction():
                await load.with_options(cache_policy=SERIALIZABLE)(1)


async def test_readers_are_not_held_up(engine: Engine) -> None:
    """X13: while a writer holds a key SERIALIZABLE, readers see the committed value."""
    async with transaction(key="report") as txn:
        txn.stage("old")
    async with transaction(key="report", isolation_level="SERIALIZABLE", overwrite=True) as txn:
        txn.stage("new")
        async with transaction(key="report", independent=True, isolation_level="READ_COMMITTED") as reader:
            assert reader.is_committed()
            found = await engine.records.lookup(place_of(reader), "report")
            assert found.value == "old"  # type: ignore[union-attr]
    async with transaction(key="report") as reader:
        assert await reader.read() == "new"


@pytest.mark.parametrize("in_record", [False, True], ids=["memory", "claims"])
async def test_serializable_keys_are_held_until_the_outcome(
    engine: Engine, storage: Storage, in_record: bool
) -> None:
    """B8, X20: others wait for the outcome; served after a commit, they run after a rollback. None stays held."""
    manager = StorageLockManager(storage) if in_record else MemoryLockManager()
    held = load.with_options(cache_policy=SERIALIZABLE.configure(lock_manager=manager))
    for number, fail in enumerate((True, False)):
        inside, go = asyncio.Event(), asyncio.Event()

        async def block(fail: bool = fail, inside: asyncio.Event = inside, go: asyncio.Event = go) -> None:
            async with transaction():
                await asyncio.gather(held(1), process(1), held(2))
                inside.set()
                await go.wait()
                if fail:
                    raise Boom

        running = asyncio.create_task(block())
        await inside.wait()
        waiting = asyncio.create_task(held.run_to_state(1))
        await asyncio.sleep(0)
        assert not waiting.done()
        go.set()
        assert (await waiting).name == ("Completed" if fail else "Cached")
        await asyncio.gather(running, return_exceptions=True)
        assert len(engine.flights) == 0
        if fail:
            await held.invalidate(1)
        assert ran.count("load 1") == [2, 3][number]
    assert {(await held.run_to_state(1)).name, (await held.run_to_state(2)).name} == {"Cached"}
    if in_record:
        await manager.aclose()


async def test_a_hit_leaves_no_lock(engine: Engine) -> None:
    """B8: a hit in a block that is rolled back, and a failing body: no key is held when it is over."""
    held = process.with_options(cache_policy=SERIALIZABLE)
    await held(1)
    with pytest.raises(Boom):
        async with transaction():
            assert (await held.run_to_state(1)).name == "Cached"
            raise Boom
    async with transaction():
        assert (await held.run_to_state(1, fail=True)).name == "Failed"
        assert len(engine.flights) == 0
    assert len(engine.flights) == 0


async def test_opposite_order_is_a_deadlock(local_engine: Engine) -> None:
    """16: two blocks that take the same keys in opposite order: one gets a DeadlockError, the other commits."""
    held = load.with_options(cache_policy=SERIALIZABLE)
    first = asyncio.Barrier(2)

    async def block(one: int, two: int) -> str:
        async with transaction():
            await held(one)
            await first.wait()
            await held(two)
        return "committed"

    async with asyncio.timeout(10):
        outcomes = await asyncio.gather(block(1, 2), block(2, 1), return_exceptions=True)
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["DeadlockError", "str"]
    (deadlock,) = [outcome for outcome in outcomes if isinstance(outcome, DeadlockError)]
    assert "waits for" in str(deadlock)
    assert len(local_engine.flights) == 0
    assert {(await held.run_to_state(1)).name, (await held.run_to_state(2)).name} == {"Cached"}


async def test_the_last_commit_wins_whole(engine: Engine) -> None:
    """READ_COMMITTED: of blocks that commit the same keys at once one wins, with all its records."""

    async def value(name: str) -> None:
        ready = asyncio.Barrier(1)

        @task(cache_key_fn=lambda context, parameters: parameters["key"], refresh_cache=True)
        async def write(key: str) -> str:
            return name

        async with transaction():
            for key in ("a", "b", "c"):
                await write(key)
            await ready.wait()

    await asyncio.gather(*(value(name) for name in "xyz"))

    @task(cache_key_fn=lambda context, parameters: parameters["key"])
    async def read(key: str) -> str:
        raise AssertionError

    assert len({await read("a"), await read("b"), await read("c")}) == 1


# --- cancellation


async def test_cancelled_inside_it_rolls_back(engine: Engine, storage: Storage) -> None:
    """30: cancelled inside the block, nothing is visible, its runs are cancelled and its hooks have run."""
    called, inside = [], asyncio.Event()
    hooked = load.with_options(on_rollback=[lambda txn: called.append("rollback")])

    @task
    async def endless() -> None:
        await asyncio.Event().wait()

    async def block() -> None:
        async with transaction():
            await hooked(1)
            endless.submit()
            inside.set()
            await asyncio.Event().wait()

    work = asyncio.create_task(block())
    await inside.wait()
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert called == ["rollback"]
    assert await records_in(storage) == []


class Stepping(MemoryStorage):
    """Memory that suspends at every request, so that every step of a commit is a point to be cancelled at."""

    def __init__(self) -> None:
        super().__init__(f"test-{uuid4().hex}")

    async def fetch(self, *args: Any, **options: Any) -> Any:
        await asyncio.sleep(0)
        return await super().fetch(*args, **options)

    async def write(self, *args: Any, **options: Any) -> str:
        await asyncio.sleep(0)
        version = await super().write(*args, **options)
        await asyncio.sleep(0)
        return version


async def test_cancelled_at_every_step() -> None:
    """30, 33: cancelled at any step, twice, a block has committed whole or not at all; nothing is left or held."""
    manager = MemoryLockManager()
    held = load.with_options(cache_policy=SERIALIZABLE)
    for steps in range(200):
        storage = Stepping()
        async with Engine(storage=storage, lock_manager=manager) as engine:

            async def block() -> None:
                async with transaction():
                    await held(1)
                    await process(1)
                    await process(2)

            work = asyncio.create_task(block())
            for _ in range(steps):
                await asyncio.sleep(0)
            finished = work.done()
            work.cancel()
            await asyncio.sleep(0)
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            assert len(engine.flights) == 0
            kinds = await records_in(storage)
            assert kinds in ([], ["record"] * 3), f"after {steps} steps"
        if finished:
            return
    raise AssertionError("it never came to its end")


# --- cost


@pytest.mark.parametrize("count", [1, 2, 10])
async def test_the_cost_in_requests(count: int) -> None:
    """n tasks in a block cost n look-ups, n + 1 writes before they are visible and 2n + 1 in all; one, one write."""
    storage = CountingStorage()
    async with Engine(storage=storage):
        async with transaction():
            for x in range(count):
                await load(x)
            assert (len(mine(storage.fetched)), mine(storage.written)) == (count, [])
        assert len(mine(storage.fetched)) == count
        assert len(mine(storage.written)) == (1 if count == 1 else 2 * count + 1)
        storage.fetched.clear()
        storage.written.clear()
        for x in range(count):
            assert (await load.run_to_state(x)).name == "Cached"
        assert len(mine(storage.fetched)) == count
        assert mine(storage.written) == []


def mine(keys: list[str]) -> list[str]:
    """Requests for records; the engine's own notes left out."""
    return [key for key in keys if key[0] not in ".\0"]


async def test_the_cost_of_meeting_an_intent() -> None:
    """A reader that meets an intent pays one read more, none on the primary; the settled records cost one."""
    storage = CountingStorage()

    meets: list[tuple[int, str]] = []
    original = storage.write

    async def write(key: str, data: Any, **conditions: Any) -> str:
        version = await original(key, data, **conditions)
        if len(mine(storage.written)) == 4:  # three intents and the decision: visible, nothing settled
            before = len(storage.fetched)
            token = current_transaction.set(None)
            for x in range(3):
                state = await load.run_to_state(x)
                meets.append((len(storage.fetched) - before, state.name))
                before = len(storage.fetched)
            current_transaction.reset(token)
        return version

    storage.write = write  # type: ignore[method-assign]
    async with Engine(storage=storage), transaction():
        for x in range(3):
            await load(x)
    assert sorted(meets) == [(1, "Cached"), (2, "Cached"), (2, "Cached")]
