# ruff: noqa: PT012 - a block of a transaction that is left by an exception has more than one statement
"""Odd orders and places in which blocks are used: overlapping, ended, broken off, asked about, one inside the other."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
from onceflow.engine import INPUTS, Engine, flow, task, transaction
from onceflow.engine._errors import CommitError, ConfigurationError
from onceflow.engine._transactions import outcome
from onceflow.storage import LocalStorage, MemoryStorage
from transacting import SERIALIZABLE, Boom, load, local_engine, nothing_ran, process, ran, records_in

__all__ = ["local_engine", "nothing_ran"]


async def names(*calls: Any) -> list[str]:
    return [(await call).name for call in calls]


# --- where a block begins and ends


async def test_blocks_that_overlap(local_engine: Engine) -> None:
    """X1: the end of a block in one open generator leaves that of another one, begun later, the current one."""

    async def generator(x: int, fail: bool) -> AsyncIterator[transaction]:
        async with transaction() as txn:
            await load(x)
            yield txn
            await load(x + 10)
            if fail:
                raise Boom

    first, second = generator(1, False), generator(2, True)
    await anext(first)
    inner = await anext(second)
    assert await anext(first, None) is None
    assert transaction.current() is inner
    with pytest.raises(Boom):
        await anext(second)
    assert transaction.current() is None
    assert await names(load.run_to_state(1), load.run_to_state(12)) == ["Cached", "Completed"]


async def test_a_generator_that_is_closed_rolls_its_block_back(local_engine: Engine) -> None:
    """X6: GeneratorExit leaves the block like any exception."""

    async def generator() -> AsyncIterator[transaction]:
        async with transaction() as txn:
            await load(1)
            yield txn

    values = generator()
    txn = await anext(values)
    await values.aclose()  # type: ignore[attr-defined]
    assert txn.is_rolled_back()
    assert transaction.current() is None
    assert (await load.run_to_state(1)).name == "Completed"


async def test_left_in_another_task(local_engine: Engine) -> None:
    """A block that another asyncio task leaves is committed, and is no longer the current one anywhere."""
    txn = transaction()
    await txn.__aenter__()
    await load(1)
    await asyncio.create_task(txn.__aexit__(None, None, None))
    assert txn.is_committed()
    assert transaction.current() is None
    await load(2)
    assert await names(load.run_to_state(1), load.run_to_state(2)) == ["Cached", "Cached"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, asyncio.CancelledError, Boom])
async def test_whatever_leaves_the_block_rolls_it_back(local_engine: Engine, error: type[Any]) -> None:
    """X6: an exception of any kind rolls back, runs the hooks, frees the keys, and passes."""
    called: list[str] = []
    held = load.with_options(
        cache_policy=SERIALIZABLE, on_rollback=[lambda txn: called.append("rollback")], on_commit=[]
    )
    with pytest.raises(error):
        async with transaction() as txn:
            await held(1)
            raise error
    assert txn.is_rolled_back()
    assert called == ["rollback"]
    assert len(local_engine.flights) == 0
    assert await records_in(local_engine.storage) == []


# --- what is said of it


async def test_the_outcome_stands(local_engine: Engine) -> None:
    """X7: `rollback()` of a block that is not open is an error, and changes nothing of what is said of it."""
    fresh = transaction()
    with pytest.raises(ConfigurationError, match="inside of its"):
        fresh.rollback()
    async with fresh:
        async with transaction() as inner:
            await load(1)
        with pytest.raises(ConfigurationError, match="not open"):
            inner.rollback()
        assert not inner.is_rolled_back()
    with pytest.raises(ConfigurationError, match="not open"):
        fresh.rollback()
    assert (fresh.is_committed(), fresh.is_rolled_back()) == (True, False)
    assert (inner.is_committed(), inner.is_rolled_back()) == (True, False)
    async with transaction() as dropped:
        dropped.rollback()
    dropped.rollback()  # it is
    assert (dropped.is_committed(), dropped.is_rolled_back()) == (False, True)


async def test_a_keyed_block_inside_of_another(local_engine: Engine) -> None:
    """X10: a record that is there, or staged around, makes a keyed block committed, also after its own end."""
    async with transaction():
        async with transaction(key="report") as first:
            assert not first.is_committed()
            first.stage(1)
        async with transaction(key="report") as second:
            assert second.is_committed()
            assert await second.read() == 1
            second.stage("ignored")
        async with transaction(key="report", overwrite=True) as third:
            assert not third.is_committed()
            third.stage(3)
    with pytest.raises(Boom):
        async with transaction():
            async with transaction(key="report") as later:
                assert later.is_committed()
                assert await later.read() == 3
                await load(1)
            assert later.is_committed()
            raise Boom
    assert later.is_rolled_back()
    with pytest.raises(Boom):
        async with transaction():
            async with transaction(key="other") as first:
                first.stage(1)
            async with transaction(key="other") as second:
                assert second.is_committed()
            raise Boom
    assert not second.is_committed()


async def test_explained_inside(local_engine: Engine) -> None:
    """A call that its block would serve from what is staged would hit, and the reason says from where."""
    async with transaction():
        await load(1)
        explanation = await load.explain(1)
        assert explanation.would_hit
        assert "staged in this transaction" in explanation.reason
        assert not await load.explain(2)
        async with transaction(independent=True):
            assert not await load.explain(1)
    assert "written by run" in (await load.explain(1)).reason


async def test_invalidated_inside(local_engine: Engine) -> None:
    """What is staged under the call's key is dropped with its record: the call runs again, and is what is committed."""
    await load(0)
    async with transaction():
        assert await load.invalidate(0)
        await load(1)
        async with transaction():
            assert await load.invalidate(1)
            assert not await load.invalidate(1)
        assert (await load.run_to_state(1)).name == "Completed"
        await load(2)
        assert await load.invalidate(2)
    calls = (load.run_to_state(0), load.run_to_state(1), load.run_to_state(2))
    assert await names(*calls) == ["Completed", "Cached", "Completed"]


# --- one inside of the other


async def test_the_last_value_goes(local_engine: Engine) -> None:
    """A key that is written again, in the block or in one inside, has its last value, but for those rolled back."""

    @task(cache_key_fn=lambda context, parameters: "key", refresh_cache=True)
    async def write(value: int) -> int:
        return value

    @task(cache_key_fn=lambda context, parameters: "key")
    async def read() -> int:
        return -1

    async with transaction():
        await write(1)
        async with transaction():
            await write(2)
            assert await read() == 2
        assert await read() == 2
        async with transaction() as dropped:
            await write(3)
            assert await read() == 3
            dropped.rollback()
            assert await read() == 2
        with pytest.raises(Boom):
            async with transaction():
                await write(4)
                raise Boom
        assert await read() == 2
    assert await read() == 2


@pytest.mark.parametrize("policy", [INPUTS, SERIALIZABLE], ids=["read committed", "serializable"])
async def test_an_independent_block_may_write_what_the_outer_holds(local_engine: Engine, policy: Any) -> None:
    """X4: the same key in a block and in an independent one inside: both commit, the outer one's value last."""

    @task(cache_policy=policy, result_storage=local_engine.storage)
    async def count(x: int) -> int:
        ran.append("count")
        return len(ran)

    for number in range(2):
        fresh = count.with_options(refresh_cache=bool(number))
        ran.clear()
        async with transaction() as outer:
            assert await fresh(1) == 1
            async with transaction(independent=True) as alone:
                assert await fresh(1) == 2
            assert alone.is_committed()
        assert outer.is_committed()
        assert await count(1) == 1
    assert len(local_engine.flights) == 0


async def test_submitted_twice_at_once(local_engine: Engine) -> None:
    """The same key by several submitted runs of one block: SERIALIZABLE runs once; one value is committed."""
    held = load.with_options(cache_policy=SERIALIZABLE)

    @flow
    async def main() -> list[str]:
        async with transaction():
            futures = [held.submit(1) for _ in range(3)] + [load.submit(2) for _ in range(3)]
            for future in futures:
                await future
        return [future.state.name for future in futures[:3]]

    assert sorted(await main()) == ["Cached", "Cached", "Completed"]
    assert ran.count("load 1") == 1
    assert len(local_engine.flights) == 0
    assert await names(held.run_to_state(1), load.run_to_state(2)) == ["Cached", "Cached"]


async def test_blocks_do_not_see_each_other(local_engine: Engine) -> None:
    """What one open block has staged is not seen in another one that is open at the same time."""
    staged, looked = asyncio.Event(), asyncio.Event()

    async def writes() -> None:
        async with transaction():
            await load(1)
            staged.set()
            await looked.wait()

    async def looks() -> str:
        await staged.wait()
        async with transaction():
            state = await load.run_to_state(1)
        looked.set()
        return state.name

    assert (await asyncio.gather(writes(), looks()))[1] == "Completed"
    assert (await load.run_to_state(1)).name == "Cached"


async def test_a_broken_value_of_a_task_that_is_dropped(local_engine: Engine) -> None:
    """B3, B12: a value that cannot be stored breaks the block only if its task takes part in the outcome."""

    @task(cache_policy=INPUTS)
    async def bad(x: int) -> Any:
        return (i for i in range(x))

    @task
    async def calls_it() -> None:
        await bad(1)
        raise Boom

    async with transaction() as txn:
        await load(1)
        with pytest.raises(Boom):
            await calls_it()
    assert txn.is_committed()
    assert (await load.run_to_state(1)).name == "Cached"
    with pytest.raises(CommitError, match="'bad-"):
        async with transaction(), transaction():
            await bad(2)


async def test_members_in_several_storages(local_engine: Engine, tmp_path: Any) -> None:
    """Members in two folders and in memory become visible together, or not at all."""
    elsewhere = load.with_options(result_storage=LocalStorage(tmp_path / "b"))
    remembered = process.with_options(result_storage=MemoryStorage())
    for fail in (True, False):
        try:
            async with transaction():
                await load(1)
                await elsewhere(1)
                await remembered(1)
                if fail:
                    raise Boom
        except Boom:
            pass
        calls = (load.explain(1), elsewhere.explain(1), remembered.explain(1))
        assert [bool(await call) for call in calls] == [not fail] * 3


# --- hooks


async def test_a_hook_that_is_cancelled(local_engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """H1: a hook that cancels itself is logged; the others run, and the block has committed all the same."""
    called: list[str] = []

    async def cancels(txn: transaction) -> None:
        asyncio.current_task().cancel()  # type: ignore[union-attr]
        await asyncio.sleep(0)
        called.append("never")

    hooked = load.with_options(on_commit=[cancels, lambda txn: called.append("second")])
    async with transaction() as txn:
        await hooked(1)
    assert txn.is_committed()
    assert called == ["second"]
    assert "'cancels' was cancelled" in caplog.text


@pytest.mark.parametrize("fail", [False, True])
async def test_a_hook_that_does_not_end(
    local_engine: Engine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, fail: bool
) -> None:
    """H1: cancelled in its hooks, a block leaves them some time, and breaks them off; its outcome stands."""
    monkeypatch.setattr(outcome, "HOOK_SECONDS", 0.01)
    inside = asyncio.Event()

    async def endless(txn: transaction) -> None:
        inside.set()
        await asyncio.Event().wait()

    hooked = load.with_options(on_commit=[endless, endless], on_rollback=[endless, endless])

    async def block() -> None:
        async with transaction():
            await hooked(1)
            if fail:
                raise Boom

    running = asyncio.create_task(block())
    await inside.wait()
    running.cancel()
    async with asyncio.timeout(10):
        with pytest.raises(asyncio.CancelledError):
            await running
    assert "2 hooks of a transaction were broken off" in caplog.text
    assert (await load.run_to_state(1)).name == ("Completed" if fail else "Cached")


async def test_a_cancelled_block_gives_its_hooks_their_time(local_engine: Engine) -> None:
    """H1: the rollback hooks of a block that is cancelled run to their end, also when it is cancelled again."""
    inside, cleaning, go = asyncio.Event(), asyncio.Event(), asyncio.Event()
    cleaned: list[str] = []

    async def clean(txn: transaction) -> None:
        cleaning.set()
        await go.wait()
        cleaned.append("done")

    hooked = load.with_options(on_rollback=[clean])

    async def block() -> None:
        async with transaction():
            await hooked(1)
            inside.set()
            await asyncio.Event().wait()

    running = asyncio.create_task(block())
    await inside.wait()
    running.cancel()
    await cleaning.wait()
    running.cancel()
    asyncio.get_running_loop().call_soon(go.set)
    with pytest.raises(asyncio.CancelledError):
        await running
    assert cleaned == ["done"]


async def test_hooks_may_use_the_engine(local_engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """H1: what hooks run is not part of the block that has ended: tasks and blocks of theirs commit."""
    caplog.set_level(logging.INFO, "onceflow")
    seen: list[Any] = []

    async def uses(txn: transaction) -> None:
        seen.append(transaction.current())
        await load(5 + len(seen))
        async with transaction() as own:
            await process(5 + len(seen))
        seen.append(own.is_committed())
        raise Boom

    hooked = load.with_options(on_commit=[uses], on_rollback=[uses])
    async with transaction():
        await hooked(1)
    with pytest.raises(ValueError, match="late"):
        async with transaction():
            await hooked(2)
            raise ValueError("late")
    assert seen == [None, True, None, True]
    calls = [load.run_to_state(6), process.run_to_state(6), load.run_to_state(8), process.run_to_state(8)]
    assert await names(*calls) == ["Cached"] * 4
