"""Hooks of states: when they run, with what, and what the log says of them."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from onceflow.engine import INPUTS, Engine, flow, get_run_context, task
from onceflow.engine._tasks.task import Task
from onceflow.storage import MemoryStorage

pytestmark = pytest.mark.usefixtures("engine")


class Calls:
    """A hook, sync or async, that notes what it is called with."""

    def __init__(self) -> None:
        self.all: list[tuple[Any, Any, Any]] = []

    def sync(self, definition: Any, run: Any, state: Any) -> None:
        self.all.append((definition, run, state))

    async def asynchronous(self, definition: Any, run: Any, state: Any) -> None:
        await asyncio.sleep(0)
        self.all.append((definition, run, state))

    @property
    def names(self) -> list[str]:
        return [state.name for _, _, state in self.all]


both = pytest.mark.parametrize("kind", ["sync", "asynchronous"])
each = pytest.mark.parametrize("make", [task, flow])


@both
@each
async def test_a_hook_is_given_definition_run_and_state(make: Any, kind: str) -> None:
    """H1: a state hook, sync or async, gets the task or flow, its run, and the state, once."""
    calls = Calls()

    async def body() -> int:
        return 1

    definition = make(on_completion=[getattr(calls, kind)])(body)
    await definition()
    ((given, run, state),) = calls.all
    assert given is definition
    assert run.state is state
    assert (state.name, state.data) == ("Completed", 1)
    assert run.name.startswith("body-")


@both
@each
async def test_on_completion_runs_on_completion_only(make: Any, kind: str) -> None:
    """H4: on_completion runs when the run completes, and not when it fails."""
    calls = Calls()

    async def body(fail: bool) -> None:
        if fail:
            raise ValueError

    definition = make(on_completion=[getattr(calls, kind)])(body)
    await definition.run_to_state(True)
    assert calls.names == []
    await definition(False)
    assert calls.names == ["Completed"]


async def test_on_completion_runs_for_a_hit() -> None:
    """H4: on_completion runs for a run that is served from its record, which is Cached; on_running does not."""
    completed, ran = Calls(), Calls()

    @task(cache_policy=INPUTS, on_completion=[completed.sync], on_running=[ran.sync])
    async def body(x: int) -> int:
        return x

    async with Engine(storage=MemoryStorage()):
        await body(1)
        await body(1)
    assert completed.names == ["Completed", "Cached"]
    assert ran.names == ["Running"]


@both
@each
async def test_on_failure_runs_once_at_the_end(make: Any, kind: str) -> None:
    """H5: on_failure runs when no attempt is left, once, with the final state."""
    failed, completed = Calls(), Calls()

    async def body(successes_from: int) -> None:
        if get_run_context().attempt < successes_from:
            raise ValueError("no")

    definition = make(retries=2, on_failure=[getattr(failed, kind)], on_completion=[completed.sync])(body)
    await definition(3)
    assert (failed.names, completed.names) == ([], ["Completed"])
    await definition.run_to_state(4)
    assert failed.names == ["Failed"]
    assert completed.names == ["Completed"]


async def test_on_failure_runs_for_a_timeout() -> None:
    """H5: a run that timed out has failed."""
    failed = Calls()

    @task(timeout_seconds=0, on_failure=[failed.sync])
    async def body() -> None:
        await asyncio.Event().wait()

    await body.run_to_state()
    assert failed.names == ["TimedOut"]


@both
@each
@pytest.mark.parametrize("delay", [0, 0.001])
async def test_on_running_runs_at_every_attempt(make: Any, kind: str, delay: float) -> None:
    """H6: on_running runs at the start and at every retry, delayed or not, before the body."""
    calls = Calls()
    seen: list[int] = []

    async def body() -> None:
        seen.append(len(calls.all))
        raise ValueError

    definition = make(retries=2, retry_delay_seconds=delay, on_running=[getattr(calls, kind)])(body)
    await definition.run_to_state()
    assert calls.names == ["Running", "Retrying", "Retrying"]
    assert seen == [1, 2, 3]


@each
async def test_hooks_by_decorator(make: Any) -> None:
    """H9: hooks that are registered by decorator run like those of the constructor, after them, and stay functions."""
    order: list[str] = []

    async def body(fail: bool = False) -> None:
        if fail:
            raise ValueError

    def first(*_: Any) -> None:
        order.append("first")

    definition = make(on_completion=[first])(body)
    typed: Task[..., Any] = definition

    @typed.on_completion
    def second(*_: Any) -> None:
        order.append("second")

    @typed.on_running
    async def starts(*_: Any) -> None:
        order.append("starts")

    @typed.on_failure
    def failed(*_: Any) -> None:
        order.append("failed")

    await definition()
    assert order == ["starts", "first", "second"]
    await definition.run_to_state(True)
    assert order[3:] == ["starts", "failed"]
    second()
    assert order[-1] == "second"


async def test_a_hook_is_part_of_its_run() -> None:
    """H1: inside a hook the run's context is the run itself, whichever state it is called for."""
    seen: list[bool] = []

    def look(_: Any, run: Any, __: Any) -> None:
        seen.append(get_run_context() is run)

    @task(on_running=[look], on_completion=[look], on_failure=[look])
    async def body(fail: bool) -> None:
        if fail:
            raise ValueError

    @flow(on_completion=[look])
    async def main() -> None:
        await body(False)
        await body.run_to_state(True)

    await main()
    assert seen == [True] * 5


@each
async def test_start_and_success_are_logged_by_name(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    """H2: for every hook the log has its start and its success, by the hook's name."""

    def notify_them(*_: Any) -> None: ...

    async def body() -> None: ...

    with caplog.at_level(logging.INFO, logger="onceflow"):
        await make(name="mine", on_completion=[notify_them])(body)()
    lines = [line for line in caplog.messages if "notify_them" in line]
    assert len(lines) == 2
    assert "Running hook 'notify_them' in response to entering state 'Completed'" in lines[0]
    assert "Hook 'notify_them' finished successfully" in lines[1]
    assert all("run 'mine-" in line for line in lines)


@both
async def test_an_error_in_a_hook_is_logged_and_changes_nothing(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """H2: a hook that raises is logged with its traceback; the later hooks run, and the run's outcome stands."""
    calls = Calls()

    def breaks(*_: Any) -> None:
        raise RuntimeError("broken hook")

    async def breaks_async(*_: Any) -> None:
        raise RuntimeError("broken hook")

    broken = breaks if kind == "sync" else breaks_async

    @task(on_running=[broken, calls.sync], on_completion=[broken, calls.sync])
    async def body() -> int:
        return 1

    assert await body() == 1
    assert calls.names == ["Running", "Completed"]
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 2
    for record in errors:
        assert broken.__name__ in record.getMessage()
        assert record.exc_info is not None
        assert "broken hook" in str(record.exc_info[1])


async def test_without_hooks_nothing_is_logged_of_hooks(caplog: pytest.LogCaptureFixture) -> None:
    """H3: where a user registered no hooks, the log has no line about any."""

    @task
    async def body() -> None: ...

    with caplog.at_level(logging.DEBUG, logger="onceflow"):
        await body()
    assert not [line for line in caplog.messages if "hook" in line.lower()]


EVENTS = {
    task: ["on_running", "on_completion", "on_failure", "on_commit", "on_rollback"],
    flow: ["on_running", "on_completion", "on_failure", "on_cancellation", "on_crashed"],
}
CASES = [
    pytest.param(make, event, id=f"{make.__name__}-{event}")
    for make, events in EVENTS.items()
    for event in events
]


@pytest.mark.parametrize(("make", "event"), CASES)
@pytest.mark.parametrize("bad", [5, "hook", print, {"a": 1}, [5], [print, "hook"], [None]])
def test_what_is_no_list_of_callables_is_refused(make: Any, event: str, bad: Any) -> None:
    """H8: hooks that are no iterable, or hold what cannot be called, are a TypeError naming the option."""

    async def body() -> None: ...

    with pytest.raises(TypeError, match=event):
        make(**{event: bad})(body)
    with pytest.raises(TypeError, match=event):
        make(body).with_options(**{event: bad})


@pytest.mark.parametrize(("make", "event"), CASES)
def test_the_decorator_form_refuses_what_cannot_be_called(make: Any, event: str) -> None:
    """H8: registering what cannot be called by decorator is a TypeError naming the event."""

    async def body() -> None: ...

    with pytest.raises(TypeError, match=event):
        getattr(make(body), event)(5)


@pytest.mark.parametrize(("make", "event"), CASES)
def test_any_iterable_of_hooks_will_do(make: Any, event: str) -> None:
    """H8: hooks may come as list, tuple, set or generator."""

    async def body() -> None: ...

    for given in ([print], (print,), {print}, (hook for hook in [print])):
        definition = make(**{event: given})(body)
        assert definition.hooks[event] == [print]
        assert definition.with_options(name="copy").hooks[event] == [print]


# --- flows that end otherwise


@both
async def test_on_cancellation_runs_when_a_flow_is_cancelled(kind: str) -> None:
    """H1: on_cancellation runs, to its end, when the flow's run is cancelled; the other hooks do not."""
    calls, others = Calls(), Calls()
    begun = asyncio.Event()

    @flow(on_completion=[others.sync], on_failure=[others.sync], on_crashed=[others.sync])
    async def main() -> None:
        begun.set()
        await asyncio.Event().wait()

    main.on_cancellation(getattr(calls, kind))
    work = asyncio.ensure_future(main())
    await begun.wait()
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert calls.names == ["Cancelled"]
    assert others.names == []


async def test_a_second_cancellation_does_not_break_off_the_hooks() -> None:
    """H1: clean-up in on_cancellation is shielded: cancelling again lets it finish."""
    begun, cleaning, finish = asyncio.Event(), asyncio.Event(), asyncio.Event()
    done: list[str] = []

    async def clean_up(*_: Any) -> None:
        cleaning.set()
        await finish.wait()
        done.append("clean")

    @flow(on_cancellation=[clean_up])
    async def main() -> None:
        begun.set()
        await asyncio.Event().wait()

    work = asyncio.ensure_future(main())
    await begun.wait()
    work.cancel()
    await cleaning.wait()
    work.cancel()
    await asyncio.sleep(0)
    assert not work.done()
    finish.set()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert done == ["clean"]


@both
async def test_on_crashed_runs_when_a_flow_crashes(kind: str) -> None:
    """H1: on_crashed runs when a BaseException ends the flow."""
    calls = Calls()

    class Boom(BaseException):
        pass

    @flow
    async def main() -> None:
        raise Boom

    main.on_crashed(getattr(calls, kind))
    with pytest.raises(Boom):
        await main()
    assert calls.names == ["Crashed"]


@each
async def test_a_hook_that_lets_a_cancellation_out_cancels_nobody(
    make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """H2: a CancelledError of a hook's own making is logged like any error; the run's outcome stands."""

    async def breaks(*_: Any) -> None:
        raise asyncio.CancelledError

    async def body() -> int:
        return 1

    assert await make(on_running=[breaks], on_completion=[breaks])(body)() == 1
    assert caplog.text.count("Hook 'breaks' was cancelled") == 2


async def test_a_hook_that_is_cancelled_for_good_ends_with_its_run() -> None:
    """H1: cancelled while its hook runs, a call is cancelled."""
    entered = asyncio.Event()

    async def hangs(*_: Any) -> None:
        entered.set()
        await asyncio.Event().wait()

    @task(on_running=[hangs])
    async def body() -> int:
        return 1

    running = asyncio.ensure_future(body())
    await entered.wait()
    running.cancel()
    await asyncio.wait([running])
    assert running.cancelled()


async def test_a_base_exception_of_a_late_hook_does_not_pass_silently(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """H2: raised by a hook of the end, it reaches whoever awaits the call; of a submitted run it is in the log."""

    class Odd(BaseException):
        pass

    def breaks(*_: Any) -> None:
        raise Odd("from the hook")

    @task(on_completion=[breaks])
    async def body() -> int:
        return 1

    @flow
    async def main() -> int:
        return await body.submit()

    with pytest.raises(Odd):
        await body()
    assert await main() == 1
    assert "Odd('from the hook') after its end" in caplog.text
