"""Runs that wait for each other: refused, named, and nobody else with them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from gated import Gate, in_flow, same
from onceflow.engine import (
    DeadlockError,
    as_completed,
    get_run_context,
    task,
    wait,
)

pytestmark = pytest.mark.usefixtures("engine")


# --- deadlocks


async def test_a_run_that_waits_for_itself_is_refused() -> None:
    """F1: awaiting one's own future, by any means, raises DeadlockError with the chain."""
    box: dict[str, Any] = {}
    tries: dict[str, Callable[[], Any]] = {
        "await": lambda: box["me"],
        "wait": lambda: box["me"].wait(),
        "result": lambda: box["me"].result(),
        "wait of many": lambda: wait([box["other"], box["me"]]),
        "argument": lambda: same(box["me"]),
        "nested argument": lambda: same([{"k": [box["other"], box["me"]]}]),
        "submitted": lambda: same.submit(box["me"]),
        "as_completed": lambda: anext(aiter(as_completed([box["me"]]))),
    }
    refused: list[str] = []

    @task(name="narcissus")
    async def waits_for_itself() -> None:
        box["other"] = same.submit(1)
        await box["other"]
        box["other"] = gate.task.submit()
        for name, attempt in tries.items():
            with pytest.raises(DeadlockError, match="narcissus") as caught:
                await attempt()
            assert caught.value.chain[0] == caught.value.chain[-1] == get_run_context().name
            refused.append(name)
        gate.open.set()

    gate = Gate()

    async def body() -> None:
        box["me"] = waits_for_itself.submit()
        await box["me"]

    async with asyncio.timeout(20):
        await in_flow(body)
    assert refused == list(tries)


async def test_a_run_that_waits_for_an_ancestor_is_refused() -> None:
    """F1: awaiting the future of an ancestor raises DeadlockError naming everyone between."""
    box: dict[str, Any] = {}

    @task(task_run_name="child")
    async def child() -> None:
        await box["ancestor"]

    @task(task_run_name="middle")
    async def middle() -> None:
        await child()

    @task(task_run_name="ancestor")
    async def ancestor() -> None:
        await middle.submit()

    async def body() -> None:
        box["ancestor"] = ancestor.submit()
        with pytest.raises(DeadlockError, match="ancestor → middle → child → ancestor") as caught:
            await box["ancestor"]
        assert caught.value.chain == ("ancestor", "middle", "child", "ancestor")

    async with asyncio.timeout(20):
        await in_flow(body)


@pytest.mark.parametrize("way", ["await", "argument", "gather", "wait", "as_completed", "called"])
async def test_runs_that_wait_for_each_other_are_refused(way: str) -> None:
    """F1: a cycle of submitted runs is refused by the one that would close it, naming who waits for whom."""
    box: dict[str, Any] = {}

    @task
    async def nested(name: str) -> None:
        await box[name]

    @task(task_run_name="{me}")
    async def waits(me: str, other: str) -> None:
        await gate.open.wait()
        future = box[other]
        ways: dict[str, Callable[[], Any]] = {
            "await": lambda: future,
            "argument": lambda: same({"k": future}),
            "gather": lambda: asyncio.gather(future, same.submit(1)),
            "wait": lambda: wait([future]),
            "as_completed": lambda: anext(aiter(as_completed([future]))),
            "called": lambda: nested(other),
        }
        await ways[way]()

    gate = Gate()

    async def body() -> None:
        for me, other in (("a", "b"), ("b", "c"), ("c", "a")):
            box[me] = waits.submit(me, other)
        gate.open.set()
        states = [await future.wait() for future in box.values()]
        errors = [state.error() for state in states if not state.is_completed()]
        deadlock = next(error for error in errors if isinstance(error, DeadlockError))
        assert {"a", "b", "c"} <= set(deadlock.chain)
        assert deadlock.chain[0] == deadlock.chain[-1]

    async with asyncio.timeout(20):
        await in_flow(body)


async def test_a_caller_that_does_not_wait_may_be_waited_for() -> None:
    """F1: a run may wait for the one that submitted it, which may end without it."""
    box: dict[str, Any] = {}

    @task
    async def follow_up() -> str:
        return f"after {await box['first']}"

    @task
    async def first() -> str:
        box["second"] = follow_up.submit()
        await asyncio.sleep(0)
        return "first"

    async def body() -> Any:
        box["first"] = first.submit()
        await box["first"]
        return await box["second"]

    async with asyncio.timeout(20):
        assert await in_flow(body) == "after first"


async def test_a_wait_that_is_over_is_forgotten() -> None:
    """F1: waits that ended, were cancelled or timed out leave no trace, so two runs may wait in turn."""
    box: dict[str, Any] = {}

    @task
    async def a() -> None:
        waiting = asyncio.ensure_future(box["b"].wait())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert await box["b"].wait(timeout=0) is None
        assert not get_run_context().waits
        gate.open.set()

    @task
    async def b() -> None:
        await gate.open.wait()
        await box["a"]

    gate = Gate()

    async def body() -> None:
        box["a"], box["b"] = a.submit(), b.submit()
        await box["b"]

    async with asyncio.timeout(20):
        await in_flow(body)


async def test_a_long_chain_is_no_deadlock_and_costs_no_walk() -> None:
    """F1: 2 000 runs that each wait for the one before are not walked again for each of them."""

    async def body() -> int:
        future = same.submit(0)
        for _ in range(2_000):
            future = same.submit(future)
        return int(await future)

    async with asyncio.timeout(20):
        assert await in_flow(body) == 0


async def test_a_finished_ancestor_is_no_deadlock() -> None:
    """F1: looking at a run that has ended waits for nobody."""

    async def body() -> Any:
        future = same.submit(1)
        await future
        return await same.submit([future, future])

    assert await in_flow(body) == [1, 1]


@pytest.mark.parametrize("ordered", [True, False])
async def test_a_streamed_run_that_waits_for_its_reader_is_refused(ordered: bool) -> None:
    """F1: what waits for the reader of the stream that it belongs to would wait for ever; the reader is told."""
    box: dict[str, Any] = {}

    @task(name="item")
    async def item(x: int) -> Any:
        await asyncio.sleep(0)
        return await box["reader"]

    @task(name="reader")
    async def reader() -> list[Any]:
        return [value async for value in item.stream([1], ordered=ordered)]

    async def body() -> None:
        box["reader"] = reader.submit()
        with pytest.raises(DeadlockError) as refused:
            async with asyncio.timeout(10):
                await box["reader"]
        assert [name.split("-")[0] for name in refused.value.chain] == ["reader", "item", "reader"]

    await in_flow(body)


async def test_a_generator_that_waits_for_its_reader_is_refused() -> None:
    """F1: so it is with the body of a generator task."""
    box: dict[str, Any] = {}

    @task(name="generator")
    async def generator() -> AsyncIterator[int]:
        yield 1
        yield await box["reader"]

    @task(name="reader")
    async def reader() -> list[int]:
        return await generator()

    async def body() -> None:
        box["reader"] = reader.submit()
        with pytest.raises(DeadlockError) as refused:
            async with asyncio.timeout(10):
                await box["reader"]
        assert [name.split("-")[0] for name in refused.value.chain] == ["reader", "generator", "reader"]

    await in_flow(body)
