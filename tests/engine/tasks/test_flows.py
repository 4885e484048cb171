"""Flows: their parameters, their bodies, their children, and how they end."""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal

import pytest
from onceflow.engine import (
    INPUTS,
    Engine,
    ParameterError,
    State,
    StateType,
    flow,
    get_run_context,
    task,
)
from onceflow.storage import MemoryStorage
from pydantic import BaseModel

pytestmark = pytest.mark.usefixtures("engine")


class Person(BaseModel):
    name: str
    age: int = 0


@dataclass
class Place:
    x: int
    y: int


class Opaque:
    """A class that pydantic knows nothing of."""


# --- parameters


@flow
async def typed(
    a: int,
    b: float = 1.5,
    *,
    day: date | None = None,
    person: Person | None = None,
    place: Place | None = None,
    mode: Literal["fast", "slow"] = "fast",
    more: list[int] = [],  # noqa: B006 - a default that is validated, and never changed
    thing: Opaque | None = None,
    anything: Any = None,
) -> dict[str, Any]:
    return dict(get_run_context().parameters)


any_typed: Any = typed


async def test_parameters_are_coerced_by_their_annotations() -> None:
    """A flow's parameters arrive as their annotations say: numbers, dates, models, dataclasses, containers."""
    thing = Opaque()
    got = await any_typed(
        "1",
        b="2",
        day="2024-02-03",
        person={"name": "Ada", "age": "36"},
        place={"x": "1", "y": 2},
        more=("1", 2),
        thing=thing,
        anything={"untouched": "1"},
    )
    assert got == {
        "a": 1,
        "b": 2.0,
        "day": date(2024, 2, 3),
        "person": Person(name="Ada", age=36),
        "place": Place(1, 2),
        "mode": "fast",
        "more": [1, 2],
        "thing": thing,
        "anything": {"untouched": "1"},
    }
    assert got["thing"] is thing


async def test_the_body_gets_what_the_context_says() -> None:
    """The coerced values are both the body's arguments and the run's parameters."""

    @flow
    async def main(a: int, *rest: int, b: int = 2, **more: int) -> Any:
        return (a, rest, b, more), dict(get_run_context().parameters)

    any_main: Any = main
    body, context = await any_main("1", 3, 4, b="5", c=6)
    assert body == (1, (3, 4), 5, {"c": 6})
    assert context == {"a": 1, "rest": (3, 4), "b": 5, "more": {"c": 6}}


async def test_a_model_that_is_one_already_is_not_copied() -> None:
    """A parameter that is valid as it is arrives as the very object."""
    person = Person(name="Ada")
    assert (await typed(1, person=person))["person"] is person


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"a": "one"}, ["a:", "'one'"]),
        ({"a": 1.5}, ["a:", "1.5"]),
        ({"a": None}, ["a:", "None"]),
        ({"a": 1, "b": "x"}, ["b:", "'x'"]),
        ({"a": 1, "mode": "medium"}, ["mode:", "'fast'"]),
        ({"a": 1, "person": {"age": 3}}, ["person", "name"]),
        ({"a": 1, "more": [1, "x"]}, ["more[1]:", "'x'"]),
        ({"a": 1, "thing": 5}, ["thing", "Opaque"]),
        ({"a": "x", "b": "y"}, ["a:", "b:"]),
    ],
)
async def test_a_bad_parameter_is_named(kwargs: dict[str, Any], named: list[str]) -> None:
    """A bad parameter fails the flow before its body, with a ParameterError that names flow and parameter."""
    state = await any_typed.run_to_state(**kwargs)
    assert state.is_failed()
    with pytest.raises(ParameterError) as caught:
        await any_typed(**kwargs)
    for part in ["typed", *named]:
        assert part in str(caught.value)


async def test_defaults_are_validated_too() -> None:
    """A default that does not fit its annotation fails the flow, one that can be coerced is."""

    @flow
    async def bad(x: int = "many") -> None:  # type: ignore[assignment]
        ...

    @flow
    async def good(x: int = "7") -> Any:  # type: ignore[assignment]
        return x

    with pytest.raises(ParameterError, match="x: "):
        await bad()
    assert await good() == 7


@pytest.mark.parametrize("args", [(), (1, 2, 3)])
async def test_arguments_that_do_not_fit_are_a_type_error(args: tuple[Any, ...]) -> None:
    """A call that does not fit the signature is a TypeError, as with any function."""
    with pytest.raises(TypeError, match="argument"):
        await any_typed(*args)


async def test_validation_can_be_switched_off() -> None:
    """With validate_parameters=False values arrive as they are given."""

    @flow(validate_parameters=False)
    async def main(x: int, y: int = "default") -> Any:  # type: ignore[assignment]
        return x, y

    any_main: Any = main
    assert await any_main("1") == ("1", "default")


async def test_a_bad_parameter_is_a_failed_run_with_hooks(caplog: pytest.LogCaptureFixture) -> None:
    """A flow that was called with a bad parameter has failed like any other: hooks, log line, no retry."""
    failed: list[Any] = []

    @flow(retries=3, on_failure=[lambda f, run, state: failed.append(state.name)])
    async def main(x: int) -> None: ...

    any_main: Any = main
    with caplog.at_level(logging.INFO, logger="onceflow"), pytest.raises(ParameterError):
        await any_main("x")
    assert failed == ["Failed"]
    assert "Finished in state Failed" in caplog.text


# --- bodies


async def test_a_sync_flow_runs_in_a_thread_with_the_context() -> None:
    """A sync flow function runs in a worker thread, knows its run, and calls, submits and maps on the parent's loop."""
    loop_thread = threading.get_ident()

    @task
    async def double(x: int) -> tuple[int, int]:
        return 2 * x, threading.get_ident()

    @flow
    def main(x: int) -> Any:
        here = get_run_context()
        value, thread = double.run(x)
        submitted = double.submit(5)
        mapped = double.map([1, 2])
        return here.name, threading.get_ident(), value, thread, submitted, mapped

    name, body_thread, value, task_thread, submitted, mapped = await main(3)
    assert name.startswith("main-")
    assert body_thread != loop_thread
    assert (value, task_thread) == (6, loop_thread)
    assert submitted == (10, loop_thread)
    assert [double for double, _ in mapped] == [2, 4]


async def test_a_failed_run_that_a_sync_flow_submitted_fails_it() -> None:
    """A sync flow owns what it submits: failures that nobody looked at are raised at its end."""

    @task
    async def fails() -> None:
        raise ValueError("unseen")

    @flow
    def main() -> None:
        fails.submit()

    with pytest.raises(ExceptionGroup) as caught:
        await main()
    assert caught.group_contains(ValueError, match="unseen")


async def test_subflows_nest() -> None:
    """A flow called in a flow is a run of its own, with its parent, its parameters, and its children."""

    @flow
    async def sub(x: int) -> Any:
        run = get_run_context()
        assert run.parent is not None
        return run.flow.name, run.parent.name, run.id, x + 1  # type: ignore[union-attr]

    @flow(flow_run_name="the outer one")
    async def main() -> Any:
        first, second = await sub(1), await sub(2)
        assert first[2] != second[2]
        return first[:2], first[3], second[3]

    assert await main() == (("sub", "the outer one"), 2, 3)


async def test_a_failing_subflow_can_be_caught() -> None:
    """A subflow's failure is its caller's to handle, as an exception or as a state."""

    @flow
    async def sub() -> None:
        raise ValueError("inner")

    @flow
    async def main() -> str:
        with pytest.raises(ValueError, match="inner"):
            await sub()
        return (await sub.run_to_state()).name

    assert await main() == "Failed"


async def test_a_flow_in_a_task_in_a_flow() -> None:
    """What is submitted in a subflow is awaited by the subflow, not only by the outer flow."""
    order: list[str] = []

    @task
    async def child() -> None:
        await asyncio.sleep(0.001)
        order.append("child")

    @flow
    async def sub() -> None:
        child.submit()

    @flow
    async def main() -> None:
        await sub()
        order.append("after sub")

    await main()
    assert order == ["child", "after sub"]


# --- names and tags


@pytest.mark.parametrize(
    ("template", "name"),
    [("run {x}", "run 1"), (lambda: "made", "made"), (lambda parameters: f"x={parameters['x']}", "x=1")],
)
async def test_a_flow_run_name_comes_from_a_template_or_callable(template: Any, name: str) -> None:
    """T9: a flow run is named by its template, over the validated parameters, or its callable."""

    @flow(flow_run_name=template)
    async def main(x: int) -> str:
        return get_run_context().name

    any_main: Any = main
    assert await any_main("1") == name


async def test_a_bad_flow_run_name_is_refused() -> None:
    """T9: a flow run's name must be text."""

    @flow(flow_run_name=lambda: 5)  # type: ignore[arg-type,return-value]
    async def main() -> None: ...

    state = await main.run_to_state()
    assert state.is_failed()
    assert "run name" in str(state.message)


async def test_the_flows_tags_reach_its_children() -> None:
    """T17: the tags of a flow apply to the runs inside it, and to nothing after it."""

    @task(tags={"own"})
    async def child() -> frozenset[str]:
        return get_run_context().tags

    @flow(tags={"flow"})
    async def main() -> Any:
        return [get_run_context().tags, await child(), await child.submit()]

    assert await main() == [{"flow"}, {"own", "flow"}, {"own", "flow"}]
    assert await child() == frozenset({"own"})


# --- ends


async def test_a_flow_ends_in_the_state_that_it_returns() -> None:
    """T15: a state that a flow's body returns is its final one."""

    @flow
    async def main() -> Any:
        return State(StateType.COMPLETED, "Half done", "as far as it goes", 1)

    state = await main.run_to_state()
    assert (state.name, state.message, state.data) == ("Half done", "as far as it goes", 1)


async def test_a_flow_timeout_cancels_the_body_and_its_children() -> None:
    """T3: a flow that takes too long ends as TimedOut, and its children are cancelled."""
    ended: list[str] = []

    @task
    async def child() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append("child")
            raise

    @flow(timeout_seconds=0.01)
    async def main() -> None:
        child.submit()
        await asyncio.Event().wait()

    state = await main.run_to_state()
    assert state.name == "TimedOut"
    assert ended == ["child"]


async def test_a_flow_retry_reuses_the_run_and_the_finished_tasks_hit() -> None:
    """E15: a retry of a flow keeps the run's id, so that its finished tasks are hits and only the failed ones run."""
    ran: list[str] = []
    ids: set[str] = set()

    @task
    async def sound() -> str:
        ran.append("sound")
        return "sound"

    @task
    async def shaky() -> str:
        ran.append("shaky")
        if ran.count("shaky") < 3:
            raise ValueError("not yet")
        return "shaky"

    @flow(retries=3, persist_result=True)
    async def main() -> Any:
        ids.add(get_run_context().id)
        return [await sound(), await shaky()]

    async with Engine(storage=MemoryStorage()):
        assert await main() == ["sound", "shaky"]
    assert ran == ["sound", "shaky", "shaky", "shaky"]
    assert len(ids) == 1


async def test_each_attempt_starts_with_no_children() -> None:
    """T3: children of a failed attempt are ended before the next begins, and their failures are not carried over."""
    under_way = 0

    @task
    async def child() -> None:
        nonlocal under_way
        under_way += 1
        try:
            await asyncio.Event().wait()
        finally:
            under_way -= 1

    @task
    async def fails() -> None:
        raise KeyError("child")

    @flow(retries=1)
    async def main() -> str:
        assert under_way == 0
        if get_run_context().attempt == 1:
            child.submit()
            await fails.submit().wait()
            fails.submit()
            await asyncio.sleep(0.001)
            raise ValueError("first attempt")
        return "second"

    assert await main() == "second"


async def test_a_whole_flow_can_be_cached() -> None:
    """E1: a flow with a cache policy is served from its record like a task."""
    ran: list[int] = []

    @flow(cache_policy=INPUTS)
    async def main(x: int) -> int:
        ran.append(x)
        return x + 1

    async with Engine(storage=MemoryStorage()):
        assert (await main.run_to_state(1)).name == "Completed"
        state = await main.run_to_state(1)
        assert (state.name, state.data) == ("Cached", 2)
        any_main: Any = main
        assert (await any_main.run_to_state("1")).name == "Cached"
        assert (await main.run_to_state(2)).name == "Completed"
    assert ran == [1, 2]


async def test_a_failing_flow_persists_no_result_under_its_key() -> None:
    """R5: a flow that fails leaves no record that a later run could hit."""
    attempts = 0

    @flow(cache_policy=INPUTS, persist_result=True)
    async def main(x: int) -> int:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            raise ValueError("first")
        return x

    async with Engine(storage=MemoryStorage()):
        assert (await main.run_to_state(1)).is_failed()
        assert (await main.run_to_state(1)).name == "Completed"
        assert (await main.run_to_state(1)).name == "Cached"


class Asynchronous:
    async def __call__(self, x: int) -> int:
        return x


@pytest.mark.parametrize(
    "fn", [Asynchronous(), functools.partial(Asynchronous(), 3), lambda x=3: Asynchronous()(x)]
)
async def test_flows_of_callables_of_every_kind(fn: Any) -> None:
    """An object with an async `__call__`, a partial of it, and a plain wrapper around it are flows: awaited, not
    given back as coroutines."""
    made: Any = flow(fn)
    assert await (made(3) if isinstance(fn, Asynchronous) else made()) == 3
