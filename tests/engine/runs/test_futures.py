"""Submitted runs: looking at them, cancelling them, and waiting for one or many."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from gated import Gate, fails, in_flow, same
from onceflow.engine import (
    ConfigurationError,
    Engine,
    NoActiveRunError,
    RunCancelledError,
    TaskFuture,
    as_completed,
    get_run_context,
    task,
    wait,
)

pytestmark = pytest.mark.usefixtures("engine")


# --- one future


async def test_a_future_is_awaited_for_its_value() -> None:
    """F1: a future gives its value, as often and to as many as ask, and its final state by wait."""

    async def body() -> Any:
        future = same.submit(1)
        assert isinstance(future, TaskFuture)
        assert not future.done()
        values = await asyncio.gather(future, future, asyncio.ensure_future(future.result()))
        assert future.done()
        state = await future.wait()
        assert state is not None
        assert state.is_completed()
        assert future.state is state
        assert future.id == future.task_run_id
        return [*values, await future]

    assert await in_flow(body) == [1, 1, 1, 1]


@pytest.mark.parametrize("timeout", [0, 0.001])
async def test_a_short_timeout(timeout: float) -> None:
    """F1: with a short timeout wait returns None, result a TimeoutError naming the run, which goes on."""
    gate = Gate()

    async def body() -> Any:
        future = gate.task.submit(5)
        assert await future.wait(timeout) is None
        with pytest.raises(TimeoutError, match=r"gated.*goes on"):
            await future.result(timeout)
        gate.open.set()
        return await future.result(timeout=60)

    assert await in_flow(body) == 5


async def test_result_can_return_the_exception() -> None:
    """F1: result raises the run's exception, or returns it where asked; awaiting raises it."""

    async def body() -> None:
        future = fails.submit("no")
        with pytest.raises(ValueError, match="no"):
            await future
        with pytest.raises(ValueError, match="no"):
            await future.result()
        assert isinstance(await future.result(raise_on_failure=False), ValueError)

    await in_flow(body)


@pytest.mark.parametrize("call", ["wait", "result", "wait of many", "as_completed", "wait of a map"])
async def test_negative_timeouts_are_refused(call: str) -> None:
    """F4: a negative timeout is a ValueError, wherever one can be given."""

    async def body() -> None:
        future = same.submit(1)
        mapped = same.map([1])
        if call == "wait":
            await future.wait(-1)
        elif call == "result":
            await future.result(-1)
        elif call == "wait of many":
            await wait([future], timeout=-1)
        elif call == "wait of a map":
            await mapped.wait(-1)
        else:
            async for _ in as_completed([future], timeout=-1):
                pass

    with pytest.raises(ValueError, match="negative"):
        await in_flow(body)


async def test_awaiting_does_not_own_the_run() -> None:
    """F1: when a task that awaits a future is cancelled, the run goes on, for others to await."""
    gate = Gate()

    async def body() -> Any:
        future = gate.task.submit(5)

        async def waits() -> Any:
            return await future

        for waiter in (waits(), future.wait(), future.result()):
            work = asyncio.ensure_future(waiter)
            await gate.begun.wait()
            await asyncio.sleep(0)
            work.cancel()
            with pytest.raises(asyncio.CancelledError):
                await work
        assert not future.done()
        gate.open.set()
        return await future

    assert await in_flow(body) == 5


async def test_a_failure_after_the_awaiter_gave_up_is_still_reported() -> None:
    """F2: who stopped awaiting before the run failed has not seen the failure: it fails the flow."""
    gate = Gate()

    @task
    async def fails_late() -> None:
        await gate.open.wait()
        raise ValueError("late")

    async def body() -> None:
        future = fails_late.submit()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await future
        gate.open.set()

    with pytest.raises(ExceptionGroup) as caught:
        await in_flow(body)
    assert caught.group_contains(ValueError, match="late")


# --- cancelling


async def test_a_future_can_be_cancelled() -> None:
    """F1: cancel ends the run as Cancelled; whoever awaits it gets an error, and nobody else is cancelled."""
    gate = Gate()

    async def body() -> str:
        future = gate.task.submit()
        await gate.begun.wait()
        assert future.cancel()
        with pytest.raises(RunCancelledError):
            await future
        assert not future.cancel()
        assert gate.ended == ["cancelled"]
        return str(future.state.name)

    assert await in_flow(body) == "Cancelled"


async def test_a_run_cancelled_before_its_first_step_is_cancelled() -> None:
    """F1: a run that is cancelled before it began ends as Cancelled, never runs, and is not forgotten by its owner."""
    gate = Gate()

    async def body() -> tuple[str, set[Any]]:
        future = gate.task.submit()
        assert future.cancel()
        state = await future.wait()
        assert state is not None
        done, not_done = await wait([future])
        assert (done, not_done) == ({future}, set())
        return state.name, set(get_run_context().flow_run.running)  # type: ignore[union-attr]

    assert await in_flow(body) == ("Cancelled", set())
    assert not gate.begun.is_set()


async def test_a_cancelled_run_cancels_what_it_awaits() -> None:
    """F1: cancelling a run reaches the runs that it awaits by calling them."""
    gate = Gate()

    @task
    async def outer() -> None:
        await gate.task()

    async def body() -> None:
        future = outer.submit()
        await gate.begun.wait()
        future.cancel()
        await future.wait()

    await in_flow(body)
    assert gate.ended == ["cancelled"]


async def test_a_deliberate_cancellation_does_not_fail_the_flow() -> None:
    """F2: a run that the flow itself cancelled is no failure that nobody looked at."""
    gate = Gate()

    async def body() -> str:
        future = gate.task.submit()
        await gate.begun.wait()
        future.cancel()
        return "fine"

    assert await in_flow(body) == "fine"


async def test_a_cancellation_that_nobody_asked_for_fails_the_flow() -> None:
    """F2: a submitted run that ends by a CancelledError of its body's making does not pass silently."""

    @task
    async def lets_it_out() -> None:
        inner = asyncio.ensure_future(asyncio.Event().wait())
        inner.cancel()
        await inner

    async def body() -> None:
        lets_it_out.submit()

    with pytest.raises(ExceptionGroup) as caught:
        await in_flow(body)
    assert caught.group_contains(RunCancelledError)


# --- waiting for many


async def test_wait_tells_who_is_done() -> None:
    """F4: wait gives (done, not done) when the time is over, and everything as done without a timeout."""
    gate = Gate()

    async def body() -> None:
        quick, slow, failing = same.submit(1), gate.task.submit(), fails.submit()
        await quick
        await failing.wait()
        for timeout in (0, 0.001):
            assert await wait([quick, slow, failing], timeout=timeout) == ({quick, failing}, {slow})
        gate.open.set()
        assert await wait([quick, slow, failing, slow]) == ({quick, slow, failing}, set())
        assert await wait([]) == (set(), set())

    await in_flow(body)


async def test_as_completed_yields_in_the_order_of_finishing() -> None:
    """F5: as_completed yields each future once, in the order in which the runs end, failed ones too."""
    gates = [Gate() for _ in range(3)]

    async def body() -> list[Any]:
        futures = [gate.task.submit(n) for n, gate in enumerate(gates)]
        futures.append(fails.submit())
        order: list[Any] = []
        gates[2].open.set()
        async for future in as_completed([*futures, futures[0]]):
            if len(order) < 2:  # the failure and the second are out, in either order
                gates[0].open.set()
            if len(order) == 2:
                gates[1].open.set()
            order.append(futures.index(future))
            assert future.done()
            await future.result(raise_on_failure=False)
        return order

    order = await in_flow(body)
    assert sorted(order) == [0, 1, 2, 3]
    assert order.index(2) < order.index(0) < order.index(1)


@pytest.mark.parametrize("timeout", [0, 0.001])
async def test_as_completed_times_out(timeout: float) -> None:
    """F5: the finished are yielded also with a timeout of zero; then a TimeoutError says how many are unfinished."""
    gate = Gate()

    async def body() -> list[Any]:
        quick, slow, second = same.submit(1), gate.task.submit(), gate.task.submit()
        await quick
        seen: list[Any] = []

        async def drain() -> None:
            async for future in as_completed([slow, quick, second], timeout=timeout):
                seen.append(await future)  # noqa: PERF401 - what was seen before the error counts

        with pytest.raises(TimeoutError, match="2 of 3"):
            await drain()
        gate.open.set()
        return seen

    assert await in_flow(body) == [1]


async def test_as_completed_can_be_left_early() -> None:
    """F5: whoever leaves the loop early leaves no callback behind, and the runs go on."""
    gate = Gate()

    async def body() -> Any:
        quick, slow = same.submit(1), gate.task.submit(2)
        async for future in as_completed([quick, slow]):
            assert future is quick
            break
        gc.collect()
        gate.open.set()
        return await slow

    assert await in_flow(body) == 2


# --- outside


async def outside(body: Callable[[], Any]) -> Any:
    """Run an async function where no engine was entered."""
    return await asyncio.create_task(body(), context=contextvars.Context())


@pytest.mark.parametrize("verb", ["submit", "map"])
async def test_outside_of_a_flow_submit_says_what_to_do(verb: str) -> None:
    """F11: submit and map where nobody would own the run raise an error that names the remedies."""

    async def body() -> None:
        with pytest.raises(NoActiveRunError, match=rf"_same\.{verb}\(\).*@flow.*Engine.*await _same"):
            getattr(same, verb)([1])

    await outside(body)


async def test_an_autonomous_task_owns_nobody() -> None:
    """F11: a task that runs outside of a flow cannot submit either."""

    @task
    async def alone() -> None:
        same.submit(1)

    async def body() -> None:
        with pytest.raises(NoActiveRunError, match="submit"):
            await alone()

    await outside(body)


async def test_finished_runs_are_let_go() -> None:
    """F1: a flow run keeps no finished run that it need not report: memory does not grow with their number."""

    async def body() -> int:
        seen = []
        for n in range(50):
            future = same.submit(n)
            await future
            seen.append(weakref.ref(future.run))
        del future
        gc.collect()
        return sum(ref() is not None for ref in seen)

    assert await in_flow(body) <= 1


async def test_an_ended_run_keeps_no_asyncio_task() -> None:
    """W2m: who keeps a future keeps the value, not the asyncio task, its context and its coroutine."""

    async def body() -> None:
        futures = [same.submit(x) for x in range(20)]
        works = [weakref.ref(future._work) for future in futures]
        assert await asyncio.gather(*futures) == list(range(20))
        await asyncio.sleep(0)
        assert [work() for work in works] == [None] * 20
        assert all(future.done() and not future.cancel() for future in futures)
        assert await futures[0].wait() is futures[0].state

    await in_flow(body)


# --- what cannot be waited for


@pytest.mark.parametrize("bad", [[1], ["text"], "text", [None]])
async def test_what_is_no_future_is_refused(bad: Any) -> None:
    """F4, F5: wait and as_completed say what they take where they are given something else."""
    with pytest.raises(TypeError, match=r"wait\(\) takes futures.*not (int|str|NoneType)"):
        await wait(bad)
    with pytest.raises(TypeError, match=r"as_completed\(\) takes futures"):
        await anext(aiter(as_completed(bad)))


async def test_a_timeout_that_is_no_number_is_refused() -> None:
    """F4: nan is no time to wait for."""

    async def body() -> None:
        future = same.submit(1)
        for call in (wait([future], timeout=math.nan), future.wait(math.nan), future.result(math.nan)):
            with pytest.raises(ValueError, match="negative, got nan"):
                await call
        await future

    await in_flow(body)


async def test_a_future_of_another_loop_is_refused() -> None:
    """F1: waiting for a run of another loop, which could not wake this one, is an error that names the run."""
    gate = Gate()
    refused: list[str] = []

    async def body() -> None:
        future, many = gate.task.submit(1), gate.task.map([1, 2])
        tries: dict[str, Callable[[], Any]] = {
            "await": lambda: future,
            "wait": lambda: future.wait(),
            "result": lambda: future.result(),
            "wait of many": lambda: wait([future]),
            "as_completed": lambda: anext(aiter(as_completed([future]))),
            "map": lambda: many,
            "argument": lambda: same(future),
        }

        async def try_all() -> None:
            async with Engine(storage="memory://another"), asyncio.timeout(10):
                for name, make in tries.items():
                    with pytest.raises(ConfigurationError, match="another event loop"):
                        await make()
                    refused.append(name)

        await asyncio.to_thread(asyncio.run, try_all())
        assert refused == list(tries)
        gate.open.set()
        await future
        assert await many == [1, 2]
        await asyncio.to_thread(asyncio.run, awaited(future))  # an ended one may be looked at anywhere

    await in_flow(body)


async def awaited(future: Any) -> Any:
    return await future


async def test_a_future_is_cancelled_from_a_thread() -> None:
    """F1: cancel() in the thread of a synchronous body reaches the run on its loop, which is woken for it."""
    gate = Gate()
    future: Any = None

    @task
    def cancels() -> bool:
        return bool(future.cancel())

    async def body() -> None:
        nonlocal future
        future = gate.task.submit(1)
        assert await cancels()
        state = await future.wait(10)
        assert state.name == "Cancelled"
        assert not await cancels()  # it has ended

    await in_flow(body)
