"""`task.map`: one run for each element, in order, and what may stand among the arguments."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest
from gated import Gate, fails, in_flow, same
from onceflow.engine import (
    State,
    StateType,
    TaskFuture,
    allow_failure,
    task,
    unmapped,
)
from onceflow.engine._tasks.task import Task

pytestmark = pytest.mark.usefixtures("engine")


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


@pytest.mark.parametrize("was_on", [True, False])
async def test_a_large_map_leaves_the_collector_as_it_was(
    was_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W10: the cycle collector rests while very many runs are made, and is then as it was, also when that fails."""
    seen: set[bool] = set()
    begin = Task.begin

    def watched(self: Any, args: Any, *rest: Any) -> Any:
        seen.add(gc.isenabled())
        if args == (1_500,):
            raise KeyError("in the middle")
        return begin(self, args, *rest)

    monkeypatch.setattr(Task, "begin", watched)

    async def body() -> None:
        assert await same.map(range(1_000)) == list(range(1_000))
        assert gc.isenabled() == was_on
        with pytest.raises(KeyError, match="in the middle"):
            same.map(range(2_000))
        assert gc.isenabled() == was_on
        assert seen == {False}
        await same.map(range(10))
        assert seen == {False, was_on}

    (gc.enable if was_on else gc.disable)()
    try:
        await in_flow(body)
    finally:
        gc.enable()


async def test_a_map_waits_for_any_iterable() -> None:
    """F9: `wait_for` may be an iterator: every run waits for all of it."""
    gate = Gate()

    async def body() -> None:
        first = gate.task.submit()
        futures = same.map([1, 2, 3], wait_for=iter([first]))
        await asyncio.sleep(0.01)
        assert not any(future.done() for future in futures)
        gate.open.set()
        assert await futures == [1, 2, 3]

    await in_flow(body)
