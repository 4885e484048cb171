"""The life of a task run, from its call to its final state."""

from __future__ import annotations

import asyncio
import functools
import threading
from datetime import timedelta
from typing import Any

import pytest
from onceflow.engine import (
    ConfigurationError,
    RunCancelledError,
    RunCrashedError,
    RunTimeoutError,
    State,
    StateType,
    TaskFuture,
    flow,
    get_run_context,
    tags,
    task,
)
from onceflow.engine._runs.run import TaskRun
from until import until

pytestmark = pytest.mark.usefixtures("engine")


class Boom(BaseException):
    """An exception that no `except Exception` catches."""


def names(run: Any) -> list[str]:
    return [state.name for state in run.states]


def recorder() -> tuple[list[TaskRun], Any]:
    """A list, and a hook that keeps every run that it is given there."""
    runs: list[TaskRun] = []

    def keep(_: object, run: TaskRun, __: object) -> None:
        if run not in runs:
            runs.append(run)

    return runs, keep


# --- calls


def everything(a: Any, /, b: Any, *rest: Any, c: Any = "default", **more: Any) -> tuple[Any, ...]:
    return a, b, rest, c, more


async def async_everything(a: Any, /, b: Any, *rest: Any, c: Any = "default", **more: Any) -> tuple[Any, ...]:
    return a, b, rest, c, more


@pytest.mark.parametrize("fn", [everything, async_everything], ids=["sync", "async"])
async def test_arguments_of_every_kind_arrive(fn: Any) -> None:
    """T1: positional, keyword and variadic arguments arrive, sync or async, called or submitted."""
    t = task(fn)
    expected = (1, 2, (3, 4), 5, {"d": 6})
    assert await t(1, 2, 3, 4, c=5, d=6) == expected
    assert await t(1, 2) == (1, 2, (), "default", {})
    assert await t(1, b=2, a=3) == (1, 2, (), "default", {"a": 3})

    @flow
    async def main() -> Any:
        return await t.submit(1, 2, 3, 4, c=5, d=6)

    assert await main() == expected


@pytest.mark.parametrize("fn", [everything, async_everything], ids=["sync", "async"])
async def test_values_pass_uncopied(fn: Any) -> None:
    """T1: arguments and results are the very objects, not copies of them."""
    given = {"list": [1, {2}], "object": object()}
    result = await task(fn)(given, [given], c=given)
    assert result[0] is given
    assert result[1][0] is given
    assert result[3] is given


@pytest.mark.parametrize("fn", [everything, async_everything], ids=["sync", "async"])
@pytest.mark.parametrize("args", [(), (1,)])
async def test_arguments_that_do_not_fit_are_a_type_error(fn: Any, args: tuple[Any, ...]) -> None:
    """T1: a call that does not fit the signature raises TypeError naming what is missing."""
    with pytest.raises(TypeError, match="b"):
        await task(fn)(*args)
    state = await task(fn).run_to_state(*args)
    assert state.is_failed()


async def test_a_failure_is_raised_or_returned_as_a_state() -> None:
    """T2: a call raises the very exception of the body; run_to_state returns it in a Failed state."""
    error = ValueError("no")

    @task
    async def fails() -> None:
        raise error

    with pytest.raises(ValueError) as caught:
        await fails()
    assert caught.value is error
    state = await fails.run_to_state()
    assert (state.name, state.type, state.data) == ("Failed", StateType.FAILED, error)
    assert state.message == "ValueError: no"


async def test_run_to_state_gives_the_value_too() -> None:
    """T2: run_to_state of a run that succeeds gives Completed with the value."""
    state = await task(async_everything).run_to_state(1, 2)
    assert state.name == "Completed"
    assert state.result() == (1, 2, (), "default", {})


async def test_cancellation_propagates_through_run_to_state() -> None:
    """T2: run_to_state does not turn a cancellation into a state for its caller."""
    runs, keep = recorder()
    begun = asyncio.Event()

    @task(on_running=[keep])
    async def waits() -> None:
        begun.set()
        await asyncio.Event().wait()

    work = asyncio.ensure_future(waits.run_to_state())
    await begun.wait()
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert names(runs[0]) == ["Pending", "Running", "Cancelled"]


async def test_a_call_starts_no_asyncio_task() -> None:
    """B21: an awaited async body runs in the caller's asyncio task."""

    @task
    async def which() -> Any:
        return asyncio.current_task()

    assert await which() is asyncio.current_task()


async def test_a_submitted_body_runs_on_the_callers_loop_and_thread() -> None:
    """B21: a submitted async task runs on the caller's loop, in its thread."""

    @task
    async def where() -> tuple[Any, int]:
        return asyncio.get_running_loop(), threading.get_ident()

    @flow
    async def main() -> Any:
        return await where.submit()

    assert await main() == (asyncio.get_running_loop(), threading.get_ident())


# --- what may be a task


class Counter:
    def __init__(self, start: int) -> None:
        self.start = start

    @task
    async def plus(self, n: int) -> int:
        return self.start + n

    @task
    def sync_plus(self, n: int) -> int:
        return self.start + n

    @task
    @classmethod
    async def of(cls, n: int) -> tuple[str, int]:
        return cls.__name__, n

    @task
    @staticmethod
    async def twice(n: int) -> int:
        return 2 * n

    renamed = plus.with_options(name="renamed")
    of_renamed = of.with_options(name="of renamed")
    twice_renamed = twice.with_options(name="twice renamed")


class Child(Counter):
    pass


async def test_methods_carry_their_instance() -> None:
    """T1: a task that is a method gets its instance, called, submitted, mapped and with other options."""
    one, ten = Counter(1), Counter(10)

    @flow
    async def main() -> list[Any]:
        return [
            await one.plus(1),
            await ten.plus(1),
            await ten.sync_plus(2),
            await ten.plus.submit(3),
            await ten.plus.map([1, 2]),
            await ten.plus.with_options(retries=1)(4),
            await ten.renamed(5),
            await Counter.plus(ten, 6),
        ]

    assert await main() == [2, 11, 12, 13, [11, 12], 14, 15, 16]


async def test_class_and_static_methods() -> None:
    """T1: a classmethod gets the class it is called on, a staticmethod nothing; options keep that."""
    counter: Any = Counter  # a type checker cannot follow @task over @classmethod
    child_class: Any = Child
    child = child_class(0)
    assert await counter.of(1) == ("Counter", 1)
    assert await child_class.of(1) == ("Child", 1)
    assert await child.of(1) == ("Child", 1)
    assert await child_class.of.with_options(retries=1)(1) == ("Child", 1)
    assert await child_class.of_renamed(1) == ("Child", 1)
    assert await counter.twice(2) == 4
    assert await child.twice(2) == 4
    assert await child.twice.with_options(retries=1)(2) == 4
    assert await child.twice_renamed(2) == 4


class Adder:
    def __init__(self, n: int) -> None:
        self.n = n

    def __call__(self, x: int) -> int:
        return x + self.n


class AsyncAdder(Adder):
    async def __call__(self, x: int) -> int:  # type: ignore[override]
        return x + self.n


async def add(n: int, x: int) -> int:
    return n + x


def sync_add(n: int, x: int) -> int:
    return n + x


def decorated(fn: Any) -> Any:
    """A wrapper that is not itself `async def`, as many decorators make."""

    @functools.wraps(fn)
    def wrapper(*args: Any) -> Any:
        return fn(*args)

    return wrapper


@pytest.mark.parametrize(
    ("fn", "name"),
    [
        (Adder(1), "Adder"),
        (AsyncAdder(1), "AsyncAdder"),
        (functools.partial(add, 1), "add"),
        (functools.partial(sync_add, 1), "sync_add"),
        (functools.partial(Adder(1)), "Adder"),
        (functools.partial(AsyncAdder(1)), "AsyncAdder"),
        (lambda x: x + 1, "lambda"),
        (lambda x: add(1, x), "lambda"),
        (decorated(functools.partial(add, 1)), "wrapper"),
    ],
)
async def test_callables_of_every_kind(fn: Any, name: str) -> None:
    """T1: callable objects, partials, lambdas and wrapped async functions are tasks."""
    t = task(fn)
    assert t.name == name
    assert await t(2) == 3


def test_what_cannot_be_called_is_no_task() -> None:
    """T1: making a task of what cannot be called raises TypeError at once."""
    with pytest.raises(TypeError, match="callable"):
        task(42)  # type: ignore[call-overload]


@pytest.mark.parametrize("decorator", [task, flow])
def test_wait_for_belongs_to_the_engine(decorator: Any) -> None:
    """T14: a parameter named wait_for is refused when the task is declared, with a message."""

    async def fn(x: int, wait_for: int) -> None: ...

    with pytest.raises(ConfigurationError, match="wait_for"):
        decorator(fn)


# --- retries


@pytest.mark.parametrize("kind", ["async", "sync"])
@pytest.mark.parametrize("retries", [0, 1, 3])
async def test_retries_name_their_states(kind: str, retries: int) -> None:
    """T3: n retries are n + 1 attempts of a body that always fails, Retrying in between, the last one Failed."""
    runs, keep = recorder()
    attempts: list[int] = []

    def body() -> None:
        attempts.append(get_run_context().attempt)
        raise ValueError(f"attempt {len(attempts)}")

    async def async_body() -> None:
        body()

    t = task(retries=retries, on_running=[keep])(async_body if kind == "async" else body)
    state = await t.run_to_state()
    assert attempts == list(range(1, retries + 2))
    assert names(runs[0]) == ["Pending", "Running", *["Retrying"] * retries, "Failed"]
    assert state.is_failed()
    assert str(state.result(raise_on_failure=False)) == f"attempt {retries + 1}"


async def test_an_early_success_ends_the_retries() -> None:
    """T3: an attempt that succeeds is the last."""
    runs, keep = recorder()

    @task(retries=5, on_running=[keep])
    async def second_time() -> int:
        if get_run_context().attempt < 2:
            raise ValueError
        return 7

    assert await second_time() == 7
    assert names(runs[0]) == ["Pending", "Running", "Retrying", "Completed"]
    assert runs[0].run_count == 2


async def test_delayed_retries_await() -> None:
    """T3: with a delay the states go through AwaitingRetry, and the delays are those of the list."""
    runs, keep = recorder()

    @task(retries=2, retry_delay_seconds=[0.001, 0.002], on_running=[keep])
    async def fails() -> None:
        raise ValueError("no")

    await fails.run_to_state()
    run = runs[0]
    assert names(run) == [
        "Pending", "Running", "AwaitingRetry", "Retrying", "AwaitingRetry", "Retrying", "Failed",
    ]  # fmt: skip
    waits = [b.timestamp - a.timestamp for a, b in zip(run.states[2::2], run.states[3::2], strict=False)]
    assert waits[0] >= timedelta(milliseconds=1)
    assert waits[1] >= timedelta(milliseconds=2)


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_a_condition_decides_about_retries(kind: str) -> None:
    """T4: the condition gets task, run and failed state; where it is false there is no retry."""
    asked: list[tuple[Any, Any, Any]] = []

    def condition(t: Any, run: Any, state: Any) -> bool:
        asked.append((t, run, state))
        return len(asked) < 2

    async def async_condition(t: Any, run: Any, state: Any) -> bool:
        return condition(t, run, state)

    error = ValueError("no")

    @task(retries=5, retry_condition_fn=condition if kind == "sync" else async_condition)
    async def fails() -> None:
        raise error

    assert (await fails.run_to_state()).data is error
    assert len(asked) == 2
    t, run, state = asked[0]
    assert t is fails
    assert run.task is fails
    assert state.is_failed()
    assert state.data is error


async def test_a_condition_that_raises_ends_the_retries(caplog: pytest.LogCaptureFixture) -> None:
    """T4: a condition that raises means no retry; the run fails with the body's error, and the log tells."""
    attempts = 0

    def condition(*_: Any) -> bool:
        raise RuntimeError("broken condition")

    @task(retries=5, retry_condition_fn=condition)
    async def fails() -> None:
        nonlocal attempts
        attempts += 1
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await fails()
    assert attempts == 1
    assert "broken condition" in caplog.text


async def test_a_returned_failure_is_retried() -> None:
    """T6: a Failed state that the body returns is retried, and final when no attempt is left."""
    attempts = 0

    @task(retries=2)
    async def says_failed() -> State[Any]:
        nonlocal attempts
        attempts += 1
        return State(StateType.FAILED, "Mine", f"attempt {attempts}")

    state = await says_failed.run_to_state()
    assert (attempts, state.name, state.message) == (3, "Mine", "attempt 3")


@pytest.mark.parametrize(
    ("given", "final"),
    [
        (State[Any](StateType.COMPLETED, "Done", "as wished", 5), ("Done", "as wished", 5)),
        (State[Any](StateType.FAILED, "Odd", "as wished"), ("Odd", "as wished", None)),
        (State[Any](StateType.CANCELLED, message="as wished"), ("Cancelled", "as wished", None)),
    ],
)
async def test_a_returned_state_is_final(given: State[Any], final: tuple[Any, ...]) -> None:
    """T15: a state that the body returns is the final one, with its name and message."""

    @task
    async def says() -> State[Any]:
        return given

    state = await says.run_to_state()
    assert (state.name, state.message, state.data) == final
    assert state.type is given.type


async def test_the_value_of_a_returned_completed_state_is_the_tasks() -> None:
    """T15: a call whose body returns a Completed state gives the state's value; a Cancelled one raises."""

    @task
    async def done() -> Any:
        return State(StateType.COMPLETED, data=3)

    @task
    async def cancelled() -> Any:
        return State(StateType.CANCELLED)

    @task
    async def crashed() -> Any:
        return State(StateType.CRASHED)

    assert await done() == 3
    with pytest.raises(RunCancelledError):
        await cancelled()
    with pytest.raises(RunCrashedError):
        await crashed()


# --- timeouts


@pytest.mark.parametrize("seconds", [0.01, timedelta(milliseconds=10), 0])
async def test_an_async_body_is_cancelled_when_its_time_is_over(seconds: Any) -> None:
    """T3: an async body that takes too long is cancelled; the run ends as TimedOut, of type FAILED."""
    ended: list[str] = []

    @task(timeout_seconds=seconds)
    async def slow() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    state = await slow.run_to_state()
    assert (state.name, state.type) == ("TimedOut", StateType.FAILED)
    assert ended == ["cancelled"]
    with pytest.raises(RunTimeoutError, match="slow") as caught:
        await slow()
    assert isinstance(caught.value, TimeoutError)


async def test_a_timeout_of_the_bodys_own_is_no_timeout_of_the_run() -> None:
    """T3: a TimeoutError that the body itself raises is a failure like any other."""

    @task(timeout_seconds=60)
    async def raises() -> None:
        raise TimeoutError("my own")

    state = await raises.run_to_state()
    assert state.name == "Failed"
    assert str(state.data) == "my own"


async def test_a_sync_body_is_abandoned_when_its_time_is_over() -> None:
    """T3: a sync body that takes too long is reported at once as TimedOut; its thread ends by itself."""
    begun, release, ended = threading.Event(), threading.Event(), threading.Event()

    @task(timeout_seconds=0.01)
    def slow() -> None:
        begun.set()
        release.wait(30)
        ended.set()

    state = await slow.run_to_state()
    assert state.name == "TimedOut"
    assert not ended.is_set()
    release.set()
    await until(lambda: ended.is_set() or not begun.is_set())  # on a busy machine it may never have begun


async def test_each_attempt_has_its_own_time() -> None:
    """T3: a timeout counts for one attempt, and is retried like a failure."""
    runs, keep = recorder()

    @task(timeout_seconds=0.01, retries=1, on_running=[keep])
    async def slow_once() -> int:
        if get_run_context().attempt == 1:
            await asyncio.Event().wait()
        return 1

    assert await slow_once() == 1
    assert names(runs[0]) == ["Pending", "Running", "Retrying", "Completed"]


async def test_a_cancellation_is_never_reported_as_a_timeout() -> None:
    """T3: a run with a timeout that is cancelled from outside ends as Cancelled."""
    runs, keep = recorder()
    begun = asyncio.Event()

    @task(timeout_seconds=60, on_running=[keep])
    async def waits() -> None:
        begun.set()
        await asyncio.Event().wait()

    work = asyncio.ensure_future(waits())
    await begun.wait()
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert runs[0].state.name == "Cancelled"


@pytest.mark.parametrize("bad", [-1, "5", True, float("nan"), object()])
def test_a_timeout_that_is_no_time_is_refused(bad: Any) -> None:
    """T3: a timeout that is negative or no number is refused when the task is declared, by name."""
    with pytest.raises((ConfigurationError, TypeError), match="timeout_seconds"):
        task(timeout_seconds=bad)(add)


# --- crashes


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, Boom])
@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_a_base_exception_crashes_the_run_and_is_raised(error: type[BaseException], kind: str) -> None:
    """T8: an interrupt or BaseException of the body ends the run as Crashed, without a retry, and is re-raised."""
    runs, keep = recorder()

    def body() -> None:
        raise error

    async def async_body() -> None:
        raise error

    t = task(retries=3, on_running=[keep])(body if kind == "sync" else async_body)
    with pytest.raises(error):
        await t.run_to_state()
    assert names(runs[0]) == ["Pending", "Running", "Crashed"]


async def test_a_base_exception_in_orchestration_crashes_the_run() -> None:
    """T8: a BaseException outside of the body, here in a key function, ends the run as Crashed, and is re-raised."""
    seen: list[Any] = []

    def key(context: Any, _: Any) -> str:
        seen.append(context)
        raise Boom

    t = task(cache_key_fn=key)(add)
    with pytest.raises(Boom):
        await t(1, 2)
    assert names(seen[0]) == ["Pending", "Crashed"]


async def test_a_crash_of_a_submitted_run_reaches_the_flow() -> None:
    """T8: a BaseException in a submitted run is not lost: whoever awaits it gets it, and else the flow's end."""

    @task
    async def crashes() -> None:
        raise Boom

    @flow
    async def looks() -> None:
        await crashes.submit()

    @flow
    async def does_not_look() -> None:
        crashes.submit()

    with pytest.raises(Boom):
        await looks()
    with pytest.raises(BaseExceptionGroup) as caught:
        await does_not_look()
    assert caught.group_contains(Boom)


async def test_an_engine_error_is_a_failed_run() -> None:
    """T2: what the engine cannot do for a run, here reach an unknown storage, fails it before its body runs."""
    ran = False

    @task(result_storage="ftp://nobody/has/this")
    async def body() -> None:
        nonlocal ran
        ran = True

    state = await body.run_to_state()
    assert state.is_failed()
    assert "ftp" in str(state.message)
    assert not ran


# --- names


class Named:
    label = "the instance"

    @task(task_run_name="{self.label} gets {x}")
    async def method(self, x: int) -> str:
        return get_run_context().name


async def name_of(x: int, y: int = 2) -> str:
    return get_run_context().name


async def test_a_run_is_named_after_its_task() -> None:
    """T9: without a template a run's name is the task's, with a short id."""
    name = await task(name_of)(1)
    assert name.startswith("name_of-")
    assert name != await task(name_of)(1)


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("x is {x}", "x is 1"),
        ("{y} by default", "2 by default"),
        ("{parameters[x]}", "1"),
        (lambda: "made", "made"),
        (lambda parameters: f"{parameters['x']} and {parameters['y']}", "1 and 2"),
        (lambda: get_run_context().task.name, "name_of"),  # type: ignore[union-attr]
    ],
)
async def test_a_run_name_comes_from_a_template_or_callable(template: Any, name: str) -> None:
    """T9: a name template or callable sees the parameters, defaults too, and the run's context."""
    assert await task(task_run_name=template)(name_of)(1) == name


async def test_a_run_name_sees_self() -> None:
    """T9: the template of a method sees `self`."""
    assert await Named().method(3) == "the instance gets 3"


async def test_a_name_is_made_once_per_run() -> None:
    """T9: a callable makes a run's name once, however often the run tries and is asked for it."""
    made: list[str] = []
    names_seen: set[str] = set()

    def make() -> str:
        made.append("x")
        return f"name {len(made)}"

    @task(task_run_name=make, retries=2)
    async def fails() -> None:
        names_seen.add(get_run_context().name)
        raise ValueError

    await fails.run_to_state()
    assert made == ["x"]
    assert names_seen == {"name 1"}


@pytest.mark.parametrize(
    ("template", "named"),
    [(lambda: 5, "5"), (lambda: None, "None"), ("{nobody}", "nobody"), ("{x.y}", "{x.y}"), ("{", "{")],
)
async def test_a_name_that_cannot_be_made_is_refused(template: Any, named: str) -> None:
    """T9: a callable that returns no text, or a template over unknown names, fails the run and says so."""
    ran = False

    @task(task_run_name=template)
    async def body(x: int) -> None:
        nonlocal ran
        ran = True

    state = await body.run_to_state(1)
    assert state.is_failed()
    assert isinstance(state.data, ConfigurationError)
    assert named in str(state.data)
    assert "body" in str(state.data)
    assert not ran


async def test_a_name_sees_the_values_of_futures() -> None:
    """T9: a template over an argument that is a future sees its value, also when the name is asked for early."""

    @task
    async def seven() -> int:
        return 7

    @flow
    async def main() -> str:
        named: Any = task(task_run_name="x is {x}")(name_of)
        future: TaskFuture[str] = named.submit(seven.submit())
        repr(future)
        assert isinstance(future.name, str)
        return await future

    assert await main() == "x is 7"


# --- times, parents, tags


async def test_a_runs_times() -> None:
    """T10: start, end, expected start and total run time are set; states' times are unique and increase."""
    runs, keep = recorder()

    @task(retries=1, retry_delay_seconds=0.001, on_running=[keep])
    async def second_time() -> None:
        assert get_run_context().end_time is None
        if get_run_context().attempt == 1:
            raise ValueError

    await second_time()
    run = runs[0]
    times = [state.timestamp for state in run.states]
    assert times == sorted(set(times))
    assert run.start_time is not None
    assert run.end_time is not None
    assert run.expected_start_time <= run.start_time < run.end_time
    assert timedelta(0) < run.total_run_time <= run.end_time - run.start_time - timedelta(milliseconds=1)


async def test_a_nested_task_lists_its_parent() -> None:
    """T12: a run's parent is the run that called it, sync or async, submitted or awaited."""

    @task
    async def inner() -> Any:
        return get_run_context().parent

    @task
    def sync_inner() -> Any:
        return get_run_context().parent

    @task
    async def outer() -> None:
        here = get_run_context()
        assert await inner() is here
        assert await inner.submit() is here
        assert await sync_inner() is here

    @flow
    async def main() -> None:
        here = get_run_context()
        assert await inner() is here
        await outer()

    await main()
    assert await inner() is None


async def test_a_task_in_a_subflow_belongs_to_the_subflow() -> None:
    """T12: the parent of a task in a subflow is the subflow's run, whose parent is the outer run."""

    @task
    async def leaf() -> Any:
        return get_run_context()

    @flow
    async def sub() -> Any:
        return await leaf()

    @task
    async def between() -> Any:
        return await sub()

    @flow
    async def main() -> tuple[Any, Any]:
        return get_run_context(), await between()

    outer, run = await main()
    assert run.parent.flow is sub
    assert run.flow_run is run.parent
    assert run.parent.parent.task is between
    assert run.parent.parent.parent is outer


async def test_tags_of_task_and_contexts_unite() -> None:
    """T17: a run has the tags of its task and of every context around the call; outside they are gone."""

    @task(tags={"own"})
    async def mine() -> frozenset[str]:
        return get_run_context().tags

    @task
    def sync_mine() -> frozenset[str]:
        return get_run_context().tags

    @flow(tags=["flow"])
    async def main() -> list[frozenset[str]]:
        with tags("a", "b"), tags("b", "c") as inside_tags:
            assert inside_tags == {"flow", "a", "b", "c"}
            inside = mine.submit()
        return [await inside, await mine(), await sync_mine()]

    assert await main() == [{"own", "flow", "a", "b", "c"}, {"own", "flow"}, {"flow"}]
    assert await mine() == {"own"}
    with tags("x"):
        assert await mine() == {"own", "x"}
    assert await mine() == {"own"}


async def test_tags_leave_with_an_exception() -> None:
    """T17: an exception that leaves the block takes its tags along."""

    @task
    async def mine() -> frozenset[str]:
        return get_run_context().tags

    with pytest.raises(ValueError), tags("x"):
        raise ValueError
    assert await mine() == frozenset()


@pytest.mark.parametrize("decorator", [task, flow])
@pytest.mark.parametrize("bad", ["database", 5, [1, 2]])
def test_tags_that_are_no_list_of_texts_are_refused(decorator: Any, bad: Any) -> None:
    """T17: tags="database" would be eight tags of one letter: it is refused, by name."""
    with pytest.raises(TypeError, match="tags"):
        decorator(tags=bad)(add)


async def test_a_callable_that_tells_nothing_of_its_parameters_is_a_task() -> None:
    """T1: types and builtins without a signature take what they are given."""
    kinds: list[Any] = [int, max, dict]
    tasks: list[Any] = [task(kind) for kind in kinds]
    number, least, made = tasks
    assert await number("3") == 3
    assert await least(1, 5, key=lambda x: -x) == 1
    assert await made(a=1) == {"a": 1}
