"""Flows in the background of an app: `engine.submit`, `engine.runs`, and which tasks hit."""

from __future__ import annotations

import asyncio
import gc
import logging
from contextvars import ContextVar
from typing import Any

import pytest
from onceflow.engine import (
    INPUTS,
    ConfigurationError,
    Engine,
    EngineClosedError,
    FlowFuture,
    flow,
    get_run_context,
    tags,
    task,
    transaction,
)
from onceflow.locking import MemoryLockManager
from onceflow.storage import MemoryStorage
from until import until

user: ContextVar[str] = ContextVar("user", default="nobody")


def new_engine(**options: Any) -> Engine:
    return Engine(storage=MemoryStorage(), lock_manager=MemoryLockManager(), **options)


class Gate:
    """A flow that says when it has begun, and ends when it is let through."""

    def __init__(self) -> None:
        self.begun, self.open = asyncio.Event(), asyncio.Event()

        @flow
        async def gated(x: int = 0) -> int:
            self.begun.set()
            await self.open.wait()
            return x

        self.flow = gated


@task(cache_policy=INPUTS)
async def double(x: int) -> int:
    return 2 * x


@task
async def plain(x: int) -> int:
    return x


@flow
async def fails() -> None:
    raise ValueError("in the background")


# --- submit


async def test_submit_returns_at_once() -> None:
    """A background flow has not begun when its future is there; the future has id, name, state and result."""
    gate = Gate()
    async with new_engine() as engine:
        future = engine.submit(gate.flow, 7)
        assert not gate.begun.is_set()
        assert isinstance(future, FlowFuture)
        assert (future.state.name, future.done()) == ("Pending", False)
        assert future.id == future.flow_run_id
        assert list(engine.runs) == [future.id]
        await gate.begun.wait()
        assert future.state.name == "Running"
        gate.open.set()
        assert await future == 7
        assert (future.state.name, future.done()) == ("Completed", True)
        assert dict(engine.runs) == {}


async def test_it_outlives_the_request() -> None:
    """A background flow goes on when the asyncio task that submitted it is cancelled."""
    gate = Gate()
    futures: list[FlowFuture[int]] = []
    async with new_engine() as engine:

        async def request() -> None:
            futures.append(engine.submit(gate.flow, 1))
            await asyncio.Event().wait()

        work = asyncio.ensure_future(request())
        await gate.begun.wait()
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        gate.open.set()
        assert await futures[0] == 1


async def test_it_carries_the_callers_context() -> None:
    """A background flow sees the context variables and tags of its caller, and its changes stay its own."""

    @flow
    async def who() -> tuple[str, frozenset[str]]:
        name = user.get()
        user.set("changed")
        return name, get_run_context().tags

    async with new_engine() as engine:
        user.set("Ada")
        with tags("web"):
            future = engine.submit(who)
        assert await future == ("Ada", frozenset({"web"}))
        assert user.get() == "Ada"


async def test_it_belongs_to_the_engine_alone() -> None:
    """Submitted inside of a flow, a transaction and an observation, it is part of none of them."""

    @flow
    async def background() -> tuple[Any, Any]:
        await double(1)
        return get_run_context().parent, transaction.current()

    @flow
    async def outer(engine: Any) -> FlowFuture[tuple[Any, Any]]:
        async with transaction():
            futures.append(engine.submit(background))
        raise RuntimeError("the outer flow fails")

    futures: list[FlowFuture[tuple[Any, Any]]] = []
    async with new_engine() as engine:
        with engine.observe() as seen, pytest.raises(RuntimeError):
            await outer(engine)
        assert await futures[0] == (None, None)
        assert seen.outcomes[0].name == "outer"
        assert len(seen.outcomes) == 1
        assert (await double.run_to_state(1)).name == "Cached"


async def test_it_runs_on_the_engine_it_was_submitted_to() -> None:
    """With several engines a background flow, and what it calls, runs on the one that was asked."""

    @flow
    async def where() -> tuple[Engine, Engine]:
        return get_run_context().engine, await task_here()

    @task
    async def task_here() -> Engine:
        return get_run_context().engine

    async with new_engine() as one, new_engine() as two:
        for engine in (one, two):
            assert await engine.submit(where) == (engine, engine)


async def test_it_can_be_cancelled() -> None:
    """cancel() ends a background flow as Cancelled, begun or not; nothing of it stays with the engine."""
    gate = Gate()
    async with new_engine() as engine:
        unbegun, begun = engine.submit(gate.flow), engine.submit(gate.flow)
        unbegun.cancel()
        await gate.begun.wait()
        begun.cancel()
        for future in (unbegun, begun):
            state = await future.wait()
            assert state is not None
            assert state.name == "Cancelled"
        assert dict(engine.runs) == {}
        assert engine.running == set()


async def test_bad_arguments_are_told_at_once() -> None:
    """Arguments that do not fit are a TypeError of submit itself; values that do not validate fail the run."""
    gate = Gate()
    async with new_engine() as engine:
        with pytest.raises(TypeError):
            engine.submit(gate.flow, 1, 2)  # type: ignore[call-arg]
        future = engine.submit(gate.flow, "no number")  # type: ignore[arg-type]
        state = await future.wait()
        assert state is not None
        assert state.name == "Failed"


async def test_what_is_no_flow() -> None:
    """A task, a function, a coroutine or nothing is a TypeError that names it and says what to pass."""

    async def function() -> None: ...

    called = flow(function)()
    async with new_engine() as engine:
        for given, remedy in ((double, "submit()"), (function, "@flow"), (called, "apart"), (None, "@flow")):
            with pytest.raises(TypeError, match="takes a flow") as caught:
                engine.submit(given)  # type: ignore[arg-type]
            assert repr(given) in str(caught.value)
            assert remedy in str(caught.value)


async def test_submit_from_another_thread() -> None:
    """A synchronous request handler, in its thread, may submit; the run has its context, on the engine's loop."""

    @flow
    async def who() -> tuple[str, Any]:
        return user.get(), asyncio.get_running_loop()

    async with new_engine() as engine:

        def handler() -> FlowFuture[tuple[str, Any]]:
            user.set("Grace")
            return engine.submit(who)

        future = await asyncio.to_thread(handler)
        assert await future == ("Grace", asyncio.get_running_loop())


async def test_closed_engines_refuse() -> None:
    """An engine that is not open yet, closing, or closed takes no flow, in any thread, and names the flow."""
    gate = Gate()
    engine = new_engine(grace=30)
    with pytest.raises(EngineClosedError, match="gated"):
        engine.submit(gate.flow)
    async with engine:
        engine.submit(gate.flow)
        await gate.begun.wait()
        closing = asyncio.ensure_future(engine.aclose())
        await asyncio.sleep(0)
        with pytest.raises(EngineClosedError, match="gated"):
            engine.submit(gate.flow)
        with pytest.raises(EngineClosedError, match="gated"):
            await asyncio.to_thread(engine.submit, gate.flow)
        gate.open.set()
        await closing
    with pytest.raises(EngineClosedError, match="gated"):
        engine.submit(gate.flow)


async def test_requests_are_refused_while_the_only_engine_closes(tmp_path: Any, monkeypatch: Any) -> None:
    """Who has no engine in the context gets the error of the closing one, not an engine made from the settings."""
    monkeypatch.setenv("HOME", str(tmp_path))
    gate = Gate()
    engine = new_engine(grace=30)
    await asyncio.create_task(engine.open())
    engine.submit(gate.flow)
    await gate.begun.wait()
    closing = asyncio.ensure_future(engine.aclose())
    await asyncio.sleep(0)
    for call in (plain, double, gate.flow):
        with pytest.raises(EngineClosedError):
            await call(1)
    gate.open.set()
    await closing


def test_an_engine_of_another_loop_refuses() -> None:
    """On another loop than the engine's, submit says so."""
    gate_flow = flow(plain.fn)
    engine = new_engine()

    async def inner() -> None:
        with pytest.raises(ConfigurationError, match="another event loop"):
            engine.submit(gate_flow, 1)

    async def main() -> None:
        async with engine:
            await asyncio.to_thread(asyncio.run, inner())

    asyncio.run(main())


# --- failures


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


async def test_a_failure_nobody_looked_at_is_logged_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    """A background failure whose future somebody still holds is told when the engine ends, once."""
    async with new_engine() as engine:
        future = engine.submit(fails)
        await until(future.done)
        assert errors(caplog) == []
    (line,) = errors(caplog)
    assert "fails" in line
    assert "in the background" in line
    assert caplog.records[-1].exc_info is not None
    del future
    gc.collect()
    assert len(errors(caplog)) == 1


async def test_a_failure_nobody_can_look_at_any_more_is_logged_at_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A background flow that was fired and forgotten is told of when it fails, and not kept."""
    async with new_engine() as engine:
        run_id = engine.submit(fails).id
        await until(lambda: run_id not in engine.runs)
        await asyncio.sleep(0)
        gc.collect()
        assert len(errors(caplog)) == 1
        assert engine.failed == []
    assert len(errors(caplog)) == 1


@pytest.mark.parametrize("looks", ["awaits", "reads the state", "cancels"])
async def test_a_failure_somebody_looked_at_is_not_logged(
    caplog: pytest.LogCaptureFixture, looks: str
) -> None:
    """Who awaits a background flow, reads its final state or cancels it has noticed."""
    async with new_engine() as engine:
        future = engine.submit(fails)
        if looks == "awaits":
            with pytest.raises(ValueError, match="in the background"):
                await future
        elif looks == "cancels":
            future.cancel()
        else:
            await until(future.done)
            assert future.state.name == "Failed"
    assert errors(caplog) == []


# --- what is under way


async def test_runs_lists_what_is_under_way() -> None:
    """Background flows, awaited flows and root tasks are listed until they end, subflows too; not their tasks."""
    seen: list[set[str]] = []

    @task
    async def look() -> None:
        seen.append({run.name.rpartition("-")[0] for run in engine.runs.values()})

    @flow
    async def inner() -> None:
        await look()

    @flow
    async def outer() -> None:
        await inner()

    async with new_engine() as engine:
        await look()
        await outer()
        await engine.submit(outer)
        assert dict(engine.runs) == {}
        with pytest.raises(TypeError):
            engine.runs["x"] = None  # type: ignore[index]
    assert seen == [{"look"}, {"outer", "inner"}, {"outer", "inner"}]


async def test_what_has_ended_is_not_listed() -> None:
    """Whoever awaits many background flows finds none of them listed any more, though they ended together."""

    @flow
    def synchronous(x: int) -> int:
        return x

    async with new_engine() as engine:
        for background in (flow(plain.fn), synchronous, fails):
            futures = (
                [engine.submit(background, number) for number in range(100)]
                if background is not fails
                else [engine.submit(fails) for _ in range(100)]
            )
            for future in futures:
                await future.wait()
                assert future.id not in engine.runs
            assert dict(engine.runs) == {}
            assert (len(engine.running), len(engine.live)) == (0, 0)


async def test_ended_runs_are_not_kept() -> None:
    """Thousands of background flows, awaited or forgotten, leave no object behind."""

    @flow
    async def background(x: bytes) -> bytes:
        await plain(1)
        return x

    async def some(count: int) -> None:
        futures = [engine.submit(background, bytes(1000)) for _ in range(count)]
        for future in futures[::2]:
            await future
        del futures, future
        await until(lambda: not engine.runs)
        gc.collect()

    async with new_engine() as engine:
        await some(100)
        before = len(gc.get_objects())
        await some(3000)
        assert len(gc.get_objects()) - before < 100


async def test_runs_forgets_what_fails() -> None:
    """A run that fails, or is cancelled, is not listed any more."""
    gate = Gate()
    async with new_engine() as engine:
        with pytest.raises(ValueError, match="background"):
            await fails()
        work = asyncio.ensure_future(gate.flow())
        await gate.begun.wait()
        assert len(engine.runs) == 1
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        assert dict(engine.runs) == {}


# --- what hit


async def test_observe_tells_what_hit() -> None:
    """E1: `observe` tells hits from runs: a hit is when something was served and no task ran."""
    async with new_engine() as engine:
        with engine.observe() as first:
            await double(1)
        with engine.observe() as second:
            await double(1)
        with engine.observe() as third:
            await double(1)
            await plain(1)
        with engine.observe() as nothing:
            pass
        await double(1)
    assert (first.hits, first.ran, first.hit) == ([], ["double"], False)
    assert (second.hits, second.ran, second.hit) == (["double"], [], True)
    assert (third.hits, third.ran, third.hit) == (["double"], ["plain"], False)
    assert (nothing.hits, nothing.ran, nothing.hit) == ([], [], False)
    assert engine.watchers == 0


async def test_observe_sees_its_own_context_only() -> None:
    """Two requests at once see what they did themselves, with what they submitted; flows are no misses."""

    @flow
    async def report(numbers: list[int]) -> list[int]:
        return await double.map(numbers)

    async with new_engine() as engine:
        await double(1)

        async def request(numbers: list[int]) -> Any:
            with engine.observe() as outer, engine.observe() as seen:
                await report(numbers)
            assert outer.hits == seen.hits
            return sorted(seen.hits), sorted(seen.ran), seen.hit

        one, two = await asyncio.gather(request([1, 2]), request([1]))
    assert one == (["double"], ["double"], False)
    assert two == (["double"], [], True)


async def test_observe_tells_of_failures_too() -> None:
    """Every way a run may end is seen: Failed, NotReady and Cancelled are in the outcomes."""
    gate = Gate()

    @task
    async def broken() -> None:
        raise ValueError("broken")

    async with new_engine() as engine:
        with engine.observe() as seen:
            await broken.run_to_state()
            work = asyncio.ensure_future(gate.flow())
            await gate.begun.wait()
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
    assert [outcome.state for outcome in seen.outcomes] == ["Failed", "Cancelled"]
