"""Futures as arguments: what arrives in their place, and what becomes of a failed one."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
from gated import Gate, fails, in_flow, same
from onceflow.engine import (
    NoActiveRunError,
    RunCancelledError,
    State,
    StateType,
    UpstreamFailedError,
    allow_failure,
    flow,
    quote,
    task,
    wait,
)

pytestmark = pytest.mark.usefixtures("engine")


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
        assert got[1] is got
        ring: dict[str, Any] = {"box": Box([same.submit(3)])}
        ring["box"].other = (ring,)
        got = await same.submit(ring)
        assert got["box"].content == [3]
        assert got["box"].other[0] is got
        knot: tuple[Any, ...] = ([], same.submit(4))
        knot[0].append(knot)
        assert (await same.submit(knot))[1] == 4

    await in_flow(body)


async def test_depth_does_not_matter() -> None:
    """F8: a value that is nested deeper than Python recurs is walked, and a future at its bottom found."""

    async def body() -> None:
        for bottom, expected in ((same.submit(1), 1), (2, 2)):
            given: Any = bottom
            for _ in range(5000):
                given = [given]
            got = await same.submit(given)
            assert (got is given) == (bottom == 2)
            while isinstance(got, list):
                (got,) = got
            assert got == expected

    await in_flow(body)


class Tagged(list[Any]):
    def __init__(self, one: Any, *, tag: str) -> None:
        super().__init__([one])
        self.tag = tag


class Needy(dict[str, Any]):
    def __init__(self, need: int) -> None:
        super().__init__()
        self.need = need


class Pair(tuple[Any, ...]):
    def __new__(cls, one: Any, two: Any) -> Pair:
        return super().__new__(cls, (one, two))


async def test_containers_of_the_users_own_keep_what_they_carry() -> None:
    """F8: a subclass of a container with a constructor and attributes of its own arrives as one, attributes and all."""

    async def body() -> None:
        future = same.submit(1)
        tagged = await same.submit(Tagged(future, tag="x"))
        assert (type(tagged), tagged, tagged.tag) == (Tagged, [1], "x")
        needy = Needy(5)
        needy["a"] = future
        got = await same.submit(needy)
        assert (type(got), got, got.need) == (Needy, {"a": 1}, 5)
        assert needy["a"] is future
        pair = await same.submit(Pair(future, 2))
        assert (type(pair), pair) == (Pair, (1, 2))

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


async def test_the_message_of_a_long_chain_stays_short() -> None:
    """F2: each run of a chain names the one before it, and only the first what failed; the causes tell the rest."""

    async def body() -> list[Any]:
        futures = [fails.submit("x")]
        for _ in range(50):
            futures.append(same.submit(futures[-1]))
        await wait(futures)
        return [future.state for future in futures]

    states = await in_flow(body)
    assert states[1].message.endswith("ended in state Failed('ValueError: x')")
    assert all(state.message.endswith("ended in state NotReady") for state in states[2:])
    error = states[-1].error()
    for _ in range(50):
        error = error.__cause__
    assert repr(error) == "ValueError('x')"
