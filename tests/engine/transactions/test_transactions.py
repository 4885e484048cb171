# ruff: noqa: PT012 - a block of a transaction that is left by an exception has more than one statement
"""`transaction()`: what becomes visible when, and what is dropped. On memory, a folder and a bucket."""

from __future__ import annotations

import asyncio
import pickle
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from onceflow.engine import INPUTS, Engine, flow, get_run_context, task, transaction
from onceflow.engine._errors import CommitError, ConfigurationError
from onceflow.locking import MemoryLockManager
from onceflow.storage import MemoryStorage, Storage, StorageUnavailableError
from stored_records import Clock, keys_in
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

# --- what becomes visible when


async def test_all_or_nothing(engine: Engine, storage: Storage) -> None:
    """X22: when the second task fails, both execute again; after a success both are Cached."""
    for fail in (True, False):
        try:
            async with transaction():
                await load(1)
                assert await records_in(storage) == []
                await process(1, fail)
        except ValueError:
            assert fail
        ran.append("|")
    assert ran == ["load 1", "process 1", "|", "load 1", "process 1", "|"]
    assert await records_in(storage) == ["record", "record"]
    assert [(await load.run_to_state(1)).name, (await process.run_to_state(1)).name] == ["Cached", "Cached"]


async def test_another_process_sees_them_together(engine: Engine, storage: Storage) -> None:
    """Before the block's end a reader elsewhere sees nothing, after it both."""
    async with pickle.loads(pickle.dumps(storage)) as other:
        async with transaction():
            await load(1)
            await process(1)
            assert await records_in(other) == []
        assert await records_in(other) == ["record", "record"]
        async with Engine(storage=other):
            assert (await load.run_to_state(1)).name == "Cached"
            assert (await process.run_to_state(1)).name == "Cached"


async def test_inside_its_own_values_are_visible(engine: Engine) -> None:
    """Staged values are served inside: directly, to submitted runs, in flows and in inner blocks."""

    @flow
    async def sub() -> str:
        return (await load.run_to_state(1)).name

    @flow
    async def outer() -> list[str]:
        async with transaction():
            await load(1)
            names = [(await load.run_to_state(1)).name, await sub()]
            future = load.submit(1)
            await future
            names.append(future.state.name)
            async with transaction():
                names.append((await load.run_to_state(1)).name)
        return names

    assert await outer() == ["Cached"] * 4
    assert ran == ["load 1"]


async def test_what_was_committed_before_stays(engine: Engine) -> None:
    """A refresh in a block that is rolled back leaves the old record; in one that ends well it replaces it."""
    anew = load.with_options(refresh_cache=True)

    @task(cache_policy=INPUTS, refresh_cache=True)
    async def number(x: int) -> int:
        ran.append("number")
        return len(ran)

    await load(1)
    assert await number(1) == 2
    with pytest.raises(Boom):
        async with transaction():
            await anew(1)
            assert await number(1) == 4
            raise Boom
    stale = number.with_options(refresh_cache=False)
    assert await stale(1) == 2
    async with transaction():
        await anew(1)
        assert await number(1) == 6
    assert await stale(1) == 6


async def test_values_are_taken_as_they_were(engine: Engine) -> None:
    """What a task returned may be changed before the block ends: the record has the value that was returned."""
    import numpy

    @task(cache_policy=INPUTS)
    async def array(x: int) -> Any:
        return numpy.full(1000, x)

    @task(cache_policy=INPUTS)
    async def block(x: int) -> bytearray:
        return bytearray(b"x" * 300_000)

    async with transaction():
        values, data, loaded = await array(7), await block(2), await load(3)
        values[:] = 0
        data[:] = bytes(300_000)
        loaded["loaded"] = 99
        assert (await array(7))[0] == 7
        (await array(7))[:] = 1
    assert (await array.run_to_state(7)).name == "Cached"
    assert (await array(7)).tolist() == [7] * 1000
    assert await block(2) == b"x" * 300_000
    assert (await load(3)) == {"loaded": 3}


async def test_large_values_lie_apart(engine: Engine, storage: Storage) -> None:
    """Intents stay small: a large value is written once, beside its record, and goes with it."""

    @task(cache_policy=INPUTS)
    async def large(x: int) -> bytes:
        return bytes(1_000_000)

    async def objects() -> list[int]:
        return sorted([stat.size async for stat in storage.list() if stat.key[0] not in ".\0"])

    async with transaction():
        await load(1)
        await large(10)
    sizes = await objects()
    assert len(sizes) == 3
    assert sizes[2] >= 1_000_000 > 4_000 > sizes[1]
    assert (await large.run_to_state(10)).name == "Cached"
    async with transaction():
        await load(2)
        await large.with_options(refresh_cache=True)(10)
    assert len(await objects()) == 4  # the replaced value is gone
    await large.with_options(refresh_cache=True)(10)  # in one object again
    assert len(await objects()) == 3
    with pytest.raises(Boom):
        async with transaction():
            await large(20)
            raise Boom
    assert len(await objects()) == 3
    await load.invalidate(1)
    assert len(await objects()) == 2


async def test_records_apart(engine: Engine, storage: Storage) -> None:
    """S2: with a key storage and a storage key of one's own, records and values appear together, and are read."""
    keys = MemoryStorage()
    apart = load.with_options(cache_policy=INPUTS.configure(key_storage=keys))
    named = process.with_options(
        cache_policy=INPUTS.configure(key_storage=keys), result_storage_key="report-{x}"
    )
    async with transaction():
        await apart(1)
        await named(1)
        assert await keys_in(keys) == []
        assert await records_in(storage) == []
    assert len(await keys_in(keys)) == 2
    assert (await apart.run_to_state(1)).name == (await named.run_to_state(1)).name == "Cached"
    before = await storage.read("report-1")
    anew = named.with_options(refresh_cache=True)
    with pytest.raises(Boom):
        async with transaction():
            await apart(2)
            await anew(1)
            raise Boom
    assert await storage.read("report-1") == before
    assert (await named.run_to_state(1)).name == "Cached"
    async with transaction():
        await apart(2)
        await anew(1)
    assert (await named.run_to_state(1)).name == "Cached"


async def test_expiry_inside(storage: Storage) -> None:
    """E5: what has expired inside a block runs again there, and its record is the later one."""
    clock = Clock()
    brief = load.with_options(cache_expiration=timedelta(seconds=10))
    async with Engine(storage=storage, clock=clock):
        async with transaction():
            await brief(1)
            clock.move(5)
            assert (await brief.run_to_state(1)).name == "Cached"
            clock.move(6)
            assert (await brief.run_to_state(1)).name == "Completed"
            await process(1)
        clock.move(9)
        assert (await brief.run_to_state(1)).name == "Cached"
        clock.move(2)
        assert (await brief.run_to_state(1)).name == "Completed"


async def test_signed_records(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Intents are signed like records: with the key a block commits, and readers without it see a miss."""
    monkeypatch.setenv("ONCEFLOW_RESULTS_SIGNING_KEY", "secret")
    async with Engine(storage=storage):
        async with transaction():
            await load(1)
            await process(1)
        assert (await load.run_to_state(1)).name == "Cached"
    async with Engine(storage=storage):
        assert (await process.run_to_state(1)).name == "Cached"


# --- rolling back


async def test_an_exception_rolls_back(engine: Engine, storage: Storage) -> None:
    """X6: the exception passes, the state is rolled back."""
    with pytest.raises(Boom):
        async with transaction() as txn:
            await load(1)
            raise Boom
    assert txn.is_rolled_back()
    assert not txn.is_committed()
    assert await records_in(storage) == []


async def test_a_failure_that_is_caught_drops_that_task_only(engine: Engine, storage: Storage) -> None:
    """B3: a task that fails, with all that it has called, is dropped; what the user goes on with is committed."""

    @task(cache_policy=INPUTS)
    async def parent(x: int) -> None:
        await load(x)
        raise ValueError("after its child")

    async with transaction() as txn:
        await process(1)
        with pytest.raises(ValueError, match="after its child"):
            await parent(2)
        state = await process.run_to_state(3, fail=True)
        assert state.name == "Failed"
    assert txn.is_committed()
    assert await records_in(storage) == ["record"]
    assert (await process.run_to_state(1)).name == "Cached"
    assert (await load.run_to_state(2)).name == "Completed"


async def test_a_retry_that_succeeds_counts(engine: Engine, storage: Storage) -> None:
    """B2: a task that fails and then succeeds on retry is committed with the rest."""

    @task(cache_policy=INPUTS, retries=2)
    async def flaky(x: int) -> int:
        ran.append("flaky")
        await load(x)
        if ran.count("flaky") < 3:
            raise ConnectionError
        return x

    async with transaction() as txn:
        assert await flaky(1) == 1
        await process(1)
    assert txn.is_committed()
    assert ran.count("load 1") == 1
    for each in (flaky, load, process):
        assert (await each.run_to_state(1)).name == "Cached"


async def test_rollback_of_an_inner_block(engine: Engine) -> None:
    """X7: `rollback()` drops the inner block's staging, at once and until its end; the outer goes on."""
    async with transaction() as outer:
        await load(1)
        async with transaction() as inner:
            await process(1)
            inner.rollback()
            assert inner.is_rolled_back()
            assert (await process.run_to_state(1)).name == "Completed"
            await load(2)
        assert not outer.is_rolled_back()
    assert outer.is_committed()
    assert (await load.run_to_state(1)).name == "Cached"
    assert (await process.run_to_state(1)).name == "Completed"
    assert (await load.run_to_state(2)).name == "Completed"


async def test_rollback_of_the_outermost_block(engine: Engine, storage: Storage) -> None:
    """X7: with the outermost block everything is dropped, also what inner blocks have staged."""
    with pytest.raises(Boom):
        async with transaction():
            async with transaction() as inner:
                await load(1)
            assert not inner.is_committed()
            raise Boom
    assert inner.is_rolled_back()
    assert await records_in(storage) == []


async def test_states_end_with_rolled_back(local_engine: Engine) -> None:
    """X23: the history of a run that is rolled back ends with RolledBack, after Completed, or Cached inside the block.

    What was committed before the block is not rolled back with it.
    """
    runs = []

    @task(cache_policy=INPUTS)
    async def noted(x: int) -> int:
        runs.append(get_run_context())
        return x

    await noted(0)
    with pytest.raises(Boom):
        async with transaction():
            await noted(1)
            before, inside = noted.submit(0), noted.submit(1)
            await before
            await inside
            raise Boom
    assert [state.name for state in runs[1].states][-2:] == ["Completed", "RolledBack"]
    assert [state.name for state in inside.run.states][-2:] == ["Cached", "RolledBack"]
    assert before.state.name == "Cached"
    assert runs[1].state.result() == 1


async def test_submitted_runs_belong_to_the_block(engine: Engine, storage: Storage) -> None:
    """The block waits for what was submitted in it; a failure that nobody looked at rolls it back."""
    gate = asyncio.Event()

    @task(cache_policy=INPUTS)
    async def slow(x: int) -> int:
        await gate.wait()
        return x

    async with transaction() as txn:
        future = slow.submit(1)
        asyncio.get_running_loop().call_soon(gate.set)
    assert future.done()
    assert txn.is_committed()
    assert len(await records_in(storage)) == 1
    with pytest.raises(ExceptionGroup) as group:
        async with transaction():
            await load(1)
            process.submit(1, fail=True)
    assert isinstance(group.value.exceptions[0], ValueError)
    assert len(await records_in(storage)) == 1


async def test_submitted_by_a_task_that_ends_first(local_engine: Engine) -> None:
    """A run that outlives the task which submitted it is staged in the block all the same."""

    @task
    async def submits() -> None:
        load.submit(5)

    @flow
    async def main() -> None:
        async with transaction():
            await submits()
        assert (await load.run_to_state(5)).name == "Cached"
        with pytest.raises(Boom):
            async with transaction():
                await submits.with_options(name="again")()
                load.submit(6)
                await asyncio.sleep(0)
                raise Boom
        assert (await load.run_to_state(6)).name == "Completed"

    await main()


async def test_inside_of_worker_threads(local_engine: Engine) -> None:
    """What a synchronous task runs from its thread belongs to the block, and is dropped with the task's failure."""

    @task
    def in_thread(x: int, fail: bool) -> None:
        assert transaction.current() is not None
        load.run(x)
        if fail:
            raise Boom

    async with transaction():
        await in_thread(1, fail=False)
        assert (await load.run_to_state(1)).name == "Cached"
        assert (await in_thread.run_to_state(2, fail=True)).name == "Failed"
    assert (await load.run_to_state(1)).name == "Cached"
    assert (await load.run_to_state(2)).name == "Completed"


async def test_a_task_that_outlives_its_block(local_engine: Engine) -> None:
    """What the user's own background task runs after the block's end commits for itself."""
    ended = asyncio.Event()

    async def later() -> None:
        await ended.wait()
        await load(8)

    async with transaction():
        background = asyncio.create_task(later())
        await load(7)
    ended.set()
    await background
    assert (await load.run_to_state(8)).name == "Cached"


# --- what cannot be stored


async def test_a_value_that_cannot_be_stored(engine: Engine, storage: Storage) -> None:
    """B12: no member becomes visible and no commit hook has run; the error names the run."""
    called = []

    @task(
        cache_policy=INPUTS,
        on_commit=[lambda txn: called.append("commit")],
        on_rollback=[lambda txn: called.append("rollback")],
    )
    async def good(x: int) -> int:
        return x

    @task(cache_policy=INPUTS, task_run_name="the bad one")
    async def bad(x: int) -> Any:
        return (i for i in range(x))

    with pytest.raises(CommitError, match="'the bad one'") as caught:
        async with transaction() as txn:
            await good(1)
            await bad(2)
            await good(3)
    assert called == ["rollback", "rollback"]
    assert txn.is_rolled_back()
    assert await records_in(storage) == []
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


class Failing(MemoryStorage):
    """Memory whose n-th write fails, before or after it was carried out, and all after it if `for_good`."""

    def __init__(self, at: int, applied: bool, for_good: bool) -> None:
        super().__init__(f"test-{uuid4().hex}")
        self.left, self.applied, self.for_good = at, applied, for_good

    async def write(self, key: str, data: Any, **conditions: Any) -> str:
        self.left -= 1
        if self.left == 0 or (self.left < 0 and self.for_good):
            if self.applied:
                await super().write(key, data, **conditions)
            raise StorageUnavailableError("write", key, self.url, "it is away", "Try later.")
        return await super().write(key, data, **conditions)


@pytest.mark.parametrize("for_good", [False, True])
@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("at", range(1, 12))
async def test_a_store_that_fails_at_any_write(at: int, applied: bool, for_good: bool) -> None:
    """B12: whichever write fails, the block commits whole, or raises CommitError and nothing is visible."""
    storage = Failing(at, applied, for_good)
    hooks: list[str] = []
    hooked = load.with_options(on_commit=[lambda txn: hooks.append("commit")])
    async with Engine(storage=storage, lock_manager=MemoryLockManager()):
        try:
            async with transaction() as txn:
                await hooked(1)
                await process(1)
                await process(2)
        except CommitError as error:
            outcome = None if error.in_doubt else "Completed"
            assert hooks == []
            assert txn.is_rolled_back()
        else:
            outcome = "Cached"
            assert hooks == ["commit"]
        storage.left = 10_000
        states = [
            await load.run_to_state(1),
            await process.run_to_state(1),
            await process.run_to_state(2),
        ]
        names = {state.name for state in states}
    assert len(names) == 1
    assert outcome in (None, *names)
    assert await records_in(storage) == ["record"] * 3


async def test_an_error_of_any_kind_frees_the_keys(local_engine: Engine) -> None:
    """A storage of the user's own may raise anything: the block raises CommitError, and no key stays held."""

    class Strange(MemoryStorage):
        async def write(self, *args: Any, **options: Any) -> str:
            raise RuntimeError("strange")

    held = load.with_options(cache_policy=SERIALIZABLE, result_storage=Strange(), on_rollback=[])
    with pytest.raises(CommitError, match="strange"):
        async with transaction():
            await held(1)
    assert len(local_engine.flights) == 0


# --- nesting


async def test_the_current_transaction(local_engine: Engine) -> None:
    """X1, X2: `current()` is the innermost, restored on exit also after errors; a child knows its parent for good."""
    assert transaction.current() is None
    async with transaction() as outer:
        assert transaction.current() is outer
        with pytest.raises(Boom):
            async with transaction() as inner:
                assert transaction.current() is inner
                assert inner.parent is outer
                raise Boom
        assert transaction.current() is outer
        assert inner.parent is outer
    assert transaction.current() is None


async def test_an_inner_block_waits_for_the_outermost(engine: Engine, storage: Storage) -> None:
    """X3: what an inner block has staged is committed when the outermost exits."""
    async with transaction():
        async with transaction() as inner:
            await load(1)
        assert not inner.is_committed()
        assert await records_in(storage) == []
    assert inner.is_committed()
    assert await records_in(storage) == ["record"]


async def test_an_independent_block(engine: Engine, storage: Storage) -> None:
    """X4: it commits at its own exit, whatever the outer one does."""
    with pytest.raises(Boom):
        async with transaction():
            await load(1)
            async with transaction(independent=True) as alone:
                await process(1)
            assert alone.is_committed()
            raise Boom
    assert alone.is_committed()
    assert await records_in(storage) == ["record"]


async def test_a_block_is_entered_once(local_engine: Engine) -> None:
    """A second use of the same object is an error that says what to do."""
    txn = transaction()
    async with txn:
        pass
    with pytest.raises(ConfigurationError, match="Make a new"):
        async with txn:
            pass


async def test_outside_of_a_block_each_task_commits(engine: Engine) -> None:
    """E16: without an explicit block nested tasks commit when they complete, also where the outer one has hooks."""
    called = []

    @task(
        cache_policy=INPUTS,
        on_commit=[lambda txn: called.append("commit")],
        on_rollback=[lambda txn: called.append("rollback")],
    )
    async def outer(x: int) -> int:
        await load(x)
        assert (await load.run_to_state(x)).name == "Cached"
        async with transaction():
            await process(x)
        assert (await process.run_to_state(x)).name == "Cached"
        raise ValueError("late")

    assert (await outer.run_to_state(1)).name == "Failed"
    assert called == []
    assert (await load.run_to_state(1)).name == "Cached"
