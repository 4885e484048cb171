"""Submitted runs: waiting for them, passing them on, mapping, and what becomes of failures."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
from onceflow.engine import (
    DeadlockError,
    NoActiveRunError,
    RunCancelledError,
    State,
    StateType,
    TaskFuture,
    UpstreamFailedError,
    allow_failure,
    as_completed,
    flow,
    get_run_context,
    quote,
    task,
    unmapped,
    wait,
)

pytestmark = pytest.mark.usefixtures("engine")


class Gate:
    """A task body that waits until it is let through, and tells that it has begun."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.open = asyncio.Event()
        self.ended: list[str] = []

    @property
    def task(self) -> Any:
        return task(name="gated")(self.body)

    async def body(self, value: Any = None) -> Any:
        self.begun.set()
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise
        self.ended.append("finished")
        return value


# Typed as Any where they are given futures in place of values, which no signature can say.
@task
async def _same(x: Any) -> Any:
    return x


@task
async def _fails(x: Any = None) -> Any:
    raise ValueError(x)


same: Any = _same
fails: Any = _fails


async def in_flow(body: Callable[[], Any], **options: Any) -> Any:
    """Run an async function as a flow."""
    return await flow(**options)(body)()


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


# --- futures as arguments


class Point(NamedTuple):
    x: Any
    y: Any


@dataclass
class Box:
    content: Any
    other: Any = "other"
    made: Any = field(default=None, init=False)


@dataclass(frozen=True, slots=True)
class Frozen:
    content: Any


class Words(list[Any]):
    pass


def containers(one: Any, two: Any) -> list[Any]:
    """The same structures around any two values."""
    counted: defaultdict[str, Any] = defaultdict(list)
    counted["a"] = one
    return [
        one,
        [one, two],
        (one, two),
        {one, two},
        frozenset({one, "x"}),
        {"a": one, "b": [two]},
        {one: "key", "k": two},
        OrderedDict(b=one, a=two),
        counted,
        Point(one, y=two),
        Box(one),
        Box([Box(two)], other={"deep": (one, [{two}])}),
        Frozen(Frozen(two)),
        Words([one]),
        [[[[[one]]]]],
    ]


@pytest.mark.parametrize("index", range(len(containers(1, 2))))
async def test_futures_in_containers_are_replaced_and_the_structure_is_kept(index: int) -> None:
    """F8: futures nested in any container arrive as values, in a container of the same type and order."""

    async def body() -> Any:
        given = containers(same.submit(1), same.submit(2))[index]
        return await same.submit(given), await same(given)

    expected = containers(1, 2)[index]
    for got in await in_flow(body):
        assert got == expected
        assert type(got) is type(expected)
        if isinstance(got, dict):
            assert list(got) == list(expected)
        if isinstance(got, defaultdict):
            assert got.default_factory is list


@pytest.mark.parametrize("index", range(1, len(containers(1, 2))))
async def test_what_holds_no_future_is_the_same_object(index: int) -> None:
    """F8: an argument without futures arrives as the very object, also beside one that holds some."""
    given = containers(1, 2)[index]

    async def body() -> Any:
        first = await same.submit(given)
        second = await same.submit([given, same.submit(3)])
        return first, second

    first, second = await in_flow(body)
    assert first is given
    assert second[0] is given
    assert second[1] == 3


async def test_the_callers_own_container_is_not_changed() -> None:
    """F8: replacing futures makes new containers; the caller's keep their futures."""

    async def body() -> None:
        future = same.submit(1)
        box, mine = Box(future), [future]
        await same.submit({"box": box, "mine": mine})
        assert box.content is future
        assert mine == [future]

    await in_flow(body)


async def test_a_shared_part_stays_shared_and_a_cycle_ends() -> None:
    """F8: what is one object before is one object after; a container that holds itself does not hang."""

    async def body() -> None:
        shared = [same.submit(1)]
        first, second = await same.submit((shared, shared))
        assert first == [1]
        assert first is second
        endless: list[Any] = [same.submit(2)]
        endless.append(endless)
        got = await same.submit(endless)
        assert got[0] == 2

    await in_flow(body)


class Counting(list[Any]):
    """A list that counts how often it is walked."""

    walks = 0

    def __iter__(self) -> Any:
        Counting.walks += 1
        return super().__iter__()


async def test_what_holds_no_future_is_not_walked_twice() -> None:
    """F8: a container without futures is walked once, also when there are futures beside it."""
    leaves = Counting(range(1000))

    async def body() -> None:
        Counting.walks = 0
        await same.submit(leaves)
        assert Counting.walks <= 1
        Counting.walks = 0
        await same.submit([leaves, same.submit(1)])
        assert Counting.walks <= 1

    await in_flow(body)


async def test_iterators_are_never_touched() -> None:
    """F8: a generator among the arguments reaches the body with all its items."""

    async def body() -> Any:
        return list(await same.submit(n for n in range(3)))

    assert await in_flow(body) == [0, 1, 2]


async def test_a_future_is_awaited_by_that_task_alone() -> None:
    """F8: submitting a task with an unfinished future as argument does not wait for it."""
    gate = Gate()

    async def body() -> Any:
        downstream = same.submit([gate.task.submit(1)])
        assert not downstream.done()
        assert downstream.state.name == "Pending"
        other = await same.submit(2)
        gate.open.set()
        return other, await downstream

    assert await in_flow(body) == (2, [1])


async def test_wait_for_waits_without_passing() -> None:
    """F2: wait_for=[…] delays the run until the others have ended; its body never sees them."""
    gate = Gate()
    order: list[str] = []

    @task
    async def note(name: str) -> None:
        order.append(name)

    async def body() -> None:
        first = gate.task.submit()
        after = note.submit("after", wait_for=[first])
        deep = note.submit("deep", wait_for=[{"nested": [first]}])
        await note.submit("before")
        gate.open.set()
        await wait([after, deep])
        assert (await note.run_to_state("state", wait_for=[first])).is_completed()

    await in_flow(body)
    assert order[0] == "before"
    assert set(order[1:]) == {"after", "deep", "state"}


async def test_quote_hands_on_unresolved() -> None:
    """F12: quote(x) reaches the body as x itself, unwalked, with the futures in it."""

    async def body() -> None:
        future = same.submit(1)
        given = [future]
        assert await same.submit(quote(given)) is given
        assert await same.submit(quote(future)) is future
        inside = await same.submit({"quoted": quote(future), "plain": future})
        assert inside == {"quoted": future, "plain": 1}

    await in_flow(body)


async def test_a_state_is_no_future() -> None:
    """F8: a State among the arguments is a value like any other."""

    async def body() -> None:
        state = State[int](StateType.COMPLETED, data=1)
        assert await same.submit([state]) == [state]

    await in_flow(body)


async def test_a_subflow_is_given_the_values_of_futures() -> None:
    """F8: futures among a flow's parameters are awaited before they are validated."""

    @flow
    async def sub(x: int, more: list[int]) -> int:
        return x + sum(more)

    any_sub: Any = sub

    async def body() -> Any:
        return await any_sub(same.submit("1"), [same.submit(2)])

    assert await in_flow(body) == 3


# --- failed upstreams


async def test_a_failed_upstream_makes_the_downstream_not_ready() -> None:
    """F2: where an upstream failed, in arguments or wait_for, the downstream ends as NotReady, unrun; so on down."""
    ran: list[str] = []

    @task
    async def notes(_: Any = None) -> None:
        ran.append("ran")

    async def body() -> None:
        upstream = fails.submit("root")
        for future in (
            notes.submit(upstream),
            notes.submit([{"deep": upstream}]),
            notes.submit(wait_for=[upstream]),
            notes.submit(notes.submit(upstream)),
        ):
            state = await future.wait()
            assert state is not None
            assert (state.name, state.type) == ("NotReady", StateType.PENDING)
            assert future.done()
            with pytest.raises(UpstreamFailedError, match="ended in state"):
                await future

    await in_flow(body)
    assert ran == []


async def test_not_ready_keeps_the_root_of_the_failure() -> None:
    """F2: the error of a NotReady run leads by its causes to what failed first."""

    async def body() -> None:
        state = await same.submit(same.submit(fails.submit("root"))).wait()
        error: BaseException | None = state.error()
        kinds = []
        while error is not None:
            kinds.append(type(error))
            error = error.__cause__
        assert kinds == [UpstreamFailedError, UpstreamFailedError, ValueError]

    await in_flow(body)


async def test_a_called_task_with_a_failed_upstream_raises() -> None:
    """F2: awaiting a call whose argument failed raises that the upstream failed."""

    async def body() -> None:
        with pytest.raises(UpstreamFailedError):
            await same(fails.submit())

    await in_flow(body)


async def test_allow_failure_hands_on_the_exception() -> None:
    """F2: under allow_failure the downstream runs and is given the exception, alone or inside collections."""

    async def body() -> None:
        bad, good = fails.submit("no"), same.submit(1)
        error = await same.submit(allow_failure(bad))
        assert isinstance(error, ValueError)
        mixed = await same.submit(allow_failure([bad, {"k": good}]))
        assert isinstance(mixed[0], ValueError)
        assert mixed[1] == {"k": 1}
        inside = await same.submit([allow_failure(bad), good])
        assert (type(inside[0]), inside[1]) == (ValueError, 1)
        assert await same.submit(1, wait_for=[allow_failure(bad)]) == 1
        not_ready = await same.submit(allow_failure(same.submit(bad)))
        assert isinstance(not_ready, UpstreamFailedError)
        cancelled = same.submit(2)
        cancelled.cancel()
        assert isinstance(await same.submit(allow_failure(cancelled)), RunCancelledError)
        assert await same.submit(allow_failure("no future at all")) == "no future at all"

    await in_flow(body)


async def test_allow_failure_forgives_only_where_it_stands() -> None:
    """F2: a failed future under allow_failure still stops a task that is given it bare as well."""

    async def body() -> None:
        bad = fails.submit()
        state = await same.submit([allow_failure(bad), bad]).wait()
        assert state.name == "NotReady"

    await in_flow(body)


async def test_failures_that_nobody_looked_at_fail_the_flow() -> None:
    """F2: at the flow's end the unobserved failures are raised together, each once; the looked-at are not."""

    async def body() -> str:
        fails.submit("first")
        looked = fails.submit("looked at")
        await looked.wait()
        second = fails.submit("second")
        same.submit(second)
        same.submit(1)
        return "value"

    with pytest.raises(ExceptionGroup) as caught:
        await in_flow(body, name="careless")
    assert "careless" in str(caught.value)
    assert [type(error) for error in caught.value.exceptions] == [ValueError, UpstreamFailedError]
    assert str(caught.value.exceptions[0]) == "first"
    assert str(caught.value.exceptions[1].__cause__) == "second"


@pytest.mark.parametrize("look", ["await", "wait", "result", "state", "argument", "map"])
async def test_ways_of_looking(look: str) -> None:
    """F2: a failure is looked at by awaiting, wait, result, the state, or passing it on with allow_failure."""

    async def body() -> str:
        future = fails.submit()
        if look == "await":
            with pytest.raises(ValueError):
                await future
        elif look == "wait":
            await future.wait()
        elif look == "result":
            await future.result(raise_on_failure=False)
        elif look == "state":
            await wait([future])
            assert future.state.is_failed()
        elif look == "map":
            with pytest.raises(ValueError):
                await fails.map([1, 2])
            await future.wait()
        else:
            await same.submit(allow_failure(future))
        return "fine"

    assert await in_flow(body) == "fine"


async def test_the_flow_awaits_what_it_submitted() -> None:
    """F1: a flow ends when its submitted runs have ended, those too that were submitted by them."""
    ended: list[str] = []

    @task
    async def inner() -> None:
        await asyncio.sleep(0.002)
        ended.append("inner")

    @task
    async def outer() -> None:
        inner.submit()
        ended.append("outer")

    async def body() -> None:
        outer.submit()

    await in_flow(body)
    assert ended == ["outer", "inner"]


async def test_a_raising_flow_cancels_and_awaits_its_children() -> None:
    """F2: when the flow body raises, unfinished children are cancelled and have ended before the flow ends."""
    gate, late = Gate(), Gate()

    @task
    async def cleans_up() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.002)
            gate.ended.append("cleaned up")
            late.task.submit()  # even what a child starts now is cancelled

    async def body() -> None:
        gate.task.submit()
        cleans_up.submit()
        fails.submit("of no interest now")
        await gate.begun.wait()
        raise KeyError("the body")

    with pytest.raises(KeyError, match="the body"):
        await in_flow(body)
    assert sorted(gate.ended) == ["cancelled", "cleaned up"]
    assert late.ended in ([], ["cancelled"])
    assert not any("gated" in work.get_name() for work in asyncio.all_tasks())
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_cancelled_flow_cancels_its_children() -> None:
    """F2: cancelling the asyncio task that runs a flow cancels the flow's submitted runs, and awaits them."""
    gate = Gate()

    async def body() -> None:
        gate.task.submit()
        await asyncio.Event().wait()

    work = asyncio.ensure_future(in_flow(body))
    await gate.begun.wait()
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert gate.ended == ["cancelled"]


async def test_an_ended_flow_takes_no_more_runs() -> None:
    """F11: what outlives its flow cannot submit to it: nobody would await or report that run."""
    gate = Gate()
    outcome: list[Any] = []

    async def lingers() -> None:
        await gate.open.wait()
        try:
            outcome.append(same.submit(1))
        except NoActiveRunError as error:
            outcome.append(error)

    async def body() -> Any:
        return quote(asyncio.ensure_future(lingers()))

    quoted = await in_flow(body)
    gate.open.set()
    await getattr(quoted, "value", quoted)
    assert isinstance(outcome[0], NoActiveRunError)
    assert "ended" in str(outcome[0])


async def test_a_flow_returns_the_values_of_futures() -> None:
    """F1: futures in what a flow returns are awaited; a failed one is the flow's failure."""

    async def body() -> Any:
        return {"a": same.submit(1), "b": [same.submit(2), 3]}

    async def failing() -> Any:
        return [fails.submit("no")]

    assert await in_flow(body) == {"a": 1, "b": [2, 3]}
    with pytest.raises(ValueError, match="no"):
        await in_flow(failing)


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


# --- map


@task
async def _pair(a: Any, b: Any = "default", *rest: Any, **more: Any) -> Any:
    return (a, b, *rest, *sorted(more.items()))


pair: Any = _pair


def doubled(xs: list[Any]) -> list[Any]:
    return [(x, "default") for x in xs]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([1, 2], [1, 2]),
        ((1, 2), [1, 2]),
        (range(2), [0, 1]),
        ((n for n in (1, 2)), [1, 2]),
        ([1, 1, 1], [1, 1, 1]),
        ([], []),
        (State[Any](StateType.COMPLETED, data=[1, 2]), [1, 2]),
        ({"a": 1}.keys(), ["a"]),
        ([[1], [2]], [[1], [2]]),
        (["ab", "cd"], ["ab", "cd"]),
    ],
)
async def test_map_runs_once_for_each_element(given: Any, expected: list[Any]) -> None:
    """F9: map makes one run per element of any iterable or state, and gives the values in input order."""

    async def body() -> Any:
        futures = pair.map(given)
        assert all(isinstance(future, TaskFuture) for future in futures)
        return len(futures), await futures

    assert await in_flow(body) == (len(expected), doubled(expected))


async def test_map_over_a_future() -> None:
    """F9: map over a future, done or not, makes one run per element of its value."""

    async def body() -> Any:
        done = same.submit([1, 2])
        await done
        return [
            await pair.map(done),
            await pair.map(same.submit([3, 4])),
            await pair.map([same.submit(5), same.submit(6)]),
            await pair.map(same.map([7, 8])),
            await pair.map(pair.map(same.submit([9]))),
        ]

    assert await in_flow(body) == [
        doubled([1, 2]), doubled([3, 4]), doubled([5, 6]), doubled([7, 8]), [((9, "default"), "default")],
    ]  # fmt: skip


async def test_map_constants() -> None:
    """F9: text, bytes, dicts, numbers and unmapped iterables go to every run; defaults and keywords are handled."""

    async def body() -> Any:
        return [
            await pair.map([1, 2], "ab"),
            await pair.map([1, 2], b"ab"),
            await pair.map([1, 2], {"k": [1, 2, 3]}),
            await pair.map([1, 2], 5),
            await pair.map([1, 2], None),
            await pair.map([1, 2], unmapped([7, 8, 9])),
            await pair.map([1, 2], b=[3, 4]),
            await pair.map([1, 2], [3, 4], [5, 6]),
            await pair.map([1, 2], extra=[3, 4], const=5),
            await pair.map(unmapped([0]), [1, 2]),
            await pair.map([1, 2], unmapped(same.submit([7, 8, 9]))),
        ]

    assert await in_flow(body) == [
        [(1, "ab"), (2, "ab")],
        [(1, b"ab"), (2, b"ab")],
        [(1, {"k": [1, 2, 3]}), (2, {"k": [1, 2, 3]})],
        [(1, 5), (2, 5)],
        [(1, None), (2, None)],
        [(1, [7, 8, 9]), (2, [7, 8, 9])],
        [(1, 3), (2, 4)],
        [(1, 3, 5), (2, 4, 6)],
        [(1, "default", ("const", 5), ("extra", 3)), (2, "default", ("const", 5), ("extra", 4))],
        [([0], 1), ([0], 2)],
        [(1, [7, 8, 9]), (2, [7, 8, 9])],
    ]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (([1, 2], [1, 2, 3]), "a: 2, b: 3"),
        ((1, 2), "nothing to map over"),
        (("text", {"k": 1}), "nothing to map over"),
        ((unmapped([1, 2]),), "nothing to map over"),
        ((), "nothing to map over"),
    ],
)
async def test_map_refuses_what_it_cannot_spread(args: tuple[Any, ...], message: str) -> None:
    """F9: without an iterable, or with different lengths, map raises a ValueError that says which."""

    async def body() -> None:
        with pytest.raises(ValueError, match=message):
            pair.map(*args)

    await in_flow(body)


async def test_map_of_a_method_names_its_parameters() -> None:
    """F9: the message about lengths names the method's own parameters, not `self`."""

    class Thing:
        @task
        async def method(self, first: Any, second: Any) -> None: ...

    async def body() -> None:
        with pytest.raises(ValueError, match="first: 1, second: 2"):
            Thing().method.map([1], [1, 2])

    await in_flow(body)


async def test_the_results_of_a_map() -> None:
    """F6: awaited as a whole, a map gives values in input order, raises the first failure, or returns exceptions."""

    @task
    async def picky(x: int) -> int:
        if x < 0:
            raise ValueError(x)
        return x

    async def body() -> None:
        assert await picky.map([3, 1, 2, 1]) == [3, 1, 2, 1]
        with pytest.raises(ValueError, match="-1"):
            await picky.map([1, -1, 2, -2])
        mixed = await picky.map([1, -1, 2]).result(raise_on_failure=False)
        assert mixed[::2] == [1, 2]
        assert isinstance(mixed[1], ValueError)
        states = await picky.map([1, -1]).wait()
        assert [state.name for state in states] == ["Completed", "Failed"]

    await in_flow(body)


async def test_the_first_failure_of_a_map_is_raised_at_once() -> None:
    """F6: the failure of one run is raised while others are still under way."""
    gate = Gate()

    @task
    async def fails_or_waits(x: int) -> None:
        if x == 1:
            raise ValueError("at once")
        await gate.open.wait()

    async def body() -> None:
        futures = fails_or_waits.map([0, 1, 2])
        with pytest.raises(ValueError, match="at once"):
            await futures
        assert not futures[0].done()
        gate.open.set()

    await in_flow(body)


async def test_the_timeout_of_a_map_says_how_many_are_unfinished() -> None:
    """F6: result with a timeout raises a TimeoutError that says how many runs go on."""
    gate = Gate()

    async def body() -> None:
        futures = gate.task.map([1, 2, 3])
        with pytest.raises(TimeoutError, match="3 of 3"):
            await futures.result(timeout=0.001)
        gate.open.set()

    await in_flow(body)


async def test_allow_failure_in_a_map() -> None:
    """F2: with allow_failure around the mapped list, or around an element, runs are given exceptions."""

    async def body() -> Any:
        bad, good = fails.submit("no"), same.submit(1)
        around = await same.map(allow_failure([bad, good]))
        inside = await same.map([allow_failure(bad), good])
        constant = await pair.map([1], unmapped(allow_failure(bad)))
        return [type(around[0]), around[1], type(inside[0]), inside[1], type(constant[0][1])]

    assert await in_flow(body) == [ValueError, 1, ValueError, 1, ValueError]


async def test_a_map_over_a_future_belongs_to_the_flow() -> None:
    """F9: a map that still waits for its column is awaited by the flow like every other submitted run."""
    ran: list[Any] = []
    gate = Gate()

    @task
    async def notes(x: Any) -> None:
        ran.append(x)

    async def body() -> None:
        notes.map(gate.task.submit([1, 2]))
        asyncio.get_running_loop().call_later(0.002, gate.open.set)

    await in_flow(body)
    assert sorted(ran) == [1, 2]


async def test_a_map_over_a_failed_future_is_not_silent() -> None:
    """F9: a map whose column failed raises when awaited, and fails the flow when it is not."""

    async def awaited() -> None:
        with pytest.raises(ValueError, match="column"):
            await pair.map(fails.submit("column"))

    async def dropped() -> None:
        pair.map(fails.submit("column"))

    await in_flow(awaited)
    with pytest.raises(ExceptionGroup) as caught:
        await in_flow(dropped)
    assert caught.group_contains(ValueError, match="column")


async def test_a_raising_flow_cancels_a_map_that_waits_for_its_column() -> None:
    """F9: when the flow body raises, a map that has no runs yet gets none."""
    gate = Gate()
    ran: list[Any] = []

    @task
    async def notes(x: Any) -> None:
        ran.append(x)

    async def body() -> None:
        notes.map(gate.task.submit([1]))
        raise KeyError("the body")

    with pytest.raises(KeyError):
        await in_flow(body)
    assert ran == []
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_giving_up_on_a_map_does_not_end_it() -> None:
    """F1: cancelling who awaits a map over an unfinished future leaves the map alone."""
    gate = Gate()

    async def body() -> Any:
        futures = pair.map(gate.task.submit([1]))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await futures
        with pytest.raises(TimeoutError):
            await futures.result(timeout=0.001)
        gate.open.set()
        return await futures

    assert await in_flow(body) == [(1, "default")]


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
