"""The shell around the kernel: one run from its call to its final state.

`perform` awaits futures among the arguments, looks the record up, runs the body as often as the kernel says,
commits, calls hooks and logs. It never raises for a failed run; cancellation and crashes propagate.
"""

from __future__ import annotations

import asyncio
import inspect
from asyncio import CancelledError
from contextvars import Token
from typing import TYPE_CHECKING, Any

from .._caching import call as caching
from .._commit.driver import uncancelled
from .._errors import RunTimeoutError, UpstreamFailedError
from .._lifecycle.watchdog import carriers
from .._runs.arguments import LEAVES, Marked, NotReady
from .._runs.futures import ENDED
from .._runs.logging import INFO, logger
from .._runs.machine import Do
from .._runs.run import FlowRun, Run, TaskRun, current_run, current_transaction
from .._runs.states import CANCELLED, COMPLETED, State
from .._transactions.transaction import enclosing, transaction
from .hooks import call_hooks, end, end_shielded
from .prints import logged

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from .._concurrency.limits import Gate
    from .._definitions.definition import Definition
    from .._runs.futures import RunFuture


async def perform(run: TaskRun | FlowRun, future: RunFuture[Any] | None = None) -> State[Any]:
    """Bring a run to its final state, in the caller's asyncio task.

    With its future it is the asyncio task of a submitted run: then its outcome is the state alone, and nothing is
    raised but what ends the loop. (One coroutine for both, since 10 000 of them may be in flight.)
    """
    definition: Definition[..., Any] = run.task or run.flow  # type: ignore[assignment]
    token: Token[Any] | None = current_run.set(run)
    if future is not None:
        token = None  # the context is the run's own, and ends with it
    try:
        try:
            if isinstance(run, FlowRun):
                await run.flow.prepare(run)
            elif marked := marked_in(run):
                await resolve(run, marked)
            if run.name_template is not None:
                run.settle_name()
            outer = enclosing() if current_transaction.get() is not None else None
            if (outer is not None and outer.joins) or (definition.hooks and _has_outcome_hooks(definition)):
                await _within(outer, run, definition)
            elif caching.wanted(run, definition):
                await caching.perform(run, definition, attempts)
            elif _is_short(run, definition):
                run.start()
                try:
                    value = await definition.body(run)
                except Exception as error:
                    run.raised(error)
                else:
                    run.returned(value)
            else:
                await attempts(run, definition)
        except NotReady as error:
            _not_ready(run, error.upstream)
        except Exception as error:  # what the engine itself could not do: a configuration error, for one
            _failed_around(run, definition, error)
        except BaseException as error:
            await _interrupted(run, definition, error)
            if isinstance(error, GeneratorExit):
                token = None  # whoever drops the coroutine does so in a context of theirs
            raise
        finally:
            if token is not None:
                current_run.reset(token)
            if run.engine.watchers:
                run.engine.note(run)
        if definition.hooks or logger.isEnabledFor(INFO):
            await end(run, definition)
    except BaseException as error:
        if future is None or isinstance(error, _LOOP_ENDERS):
            raise
        # Of a hook, after the run's end.
        if run.state.data is not error and not isinstance(error, CancelledError):
            logger.exception("%s %r - %r after its end", definition.kind, run.name, error)
    finally:
        _sign_off(run, future)
    return run.state


_LOOP_ENDERS = (KeyboardInterrupt, SystemExit, GeneratorExit)


def _failed_around(run: TaskRun | FlowRun, definition: Definition[..., Any], error: Exception) -> None:
    if run.is_over:  # the body's outcome stands
        logger.exception("%s %r - %r after its end", definition.kind, run.name, error)
    else:
        run.enter("fail", error, f"{type(error).__name__}: {error}")


async def _interrupted(
    run: TaskRun | FlowRun, definition: Definition[..., Any], error: BaseException
) -> None:
    """A cancellation or a crash ends the run; one that comes during its commit leaves it completed."""
    if not run.is_over:
        if isinstance(error, CancelledError):
            run.enter("cancel", message=run.engine.interrupted or "cancelled while it ran")
        else:
            run.enter("crash", error, f"{type(error).__name__}: {error}")
    if isinstance(error, GeneratorExit):  # the coroutine was dropped, and may not await any more
        return
    try:
        await end_shielded(run, definition)
    finally:
        if run.chunks is not None and run.chunks.are_there:
            await uncancelled(caching.drop_chunks_unless_committed(run, definition))


def _sign_off(run: TaskRun | FlowRun, future: RunFuture[Any] | None) -> None:
    """A run has ended: the engine need not know of it any more, nor its owner wait for it, if it was submitted.

    The owner keeps what somebody has to look at. A cancellation that nobody asked for counts: the body let somebody
    else's out, and that must not pass unnoticed.
    """
    if run.carrier is not None:
        forget(run)  # now, so that it is not listed any more when who awaits it goes on
    if future is None:
        return
    owner, state = future.owner, run.state
    asked_for = state.type is CANCELLED and asyncio.current_task().cancelling()  # type: ignore[union-attr]  # in one
    if state.type is not COMPLETED and not asked_for:
        owner.failed.append(future)
    owner.running.discard(future)
    future._work = ENDED


carriers.add(perform.__code__)


def _is_short(run: TaskRun | FlowRun, definition: Definition[..., Any]) -> bool:
    """Whether nothing is asked of the run but its body, once: most runs, and worth two coroutines less."""
    engine = run.engine
    return (
        definition.is_bare
        and not definition.hooks
        and not engine.limits.has_tags
        and definition.rule_for(run) is None
        and (run.parent is not None or not engine.settings.log_prints)
    )


def perform_root(run: TaskRun | FlowRun) -> Coroutine[Any, Any, State[Any]]:
    """As `perform`, for flows, and for tasks outside of any: the engine knows of them until they end.

    Not a coroutine of its own, which every waiter would keep in memory. To be awaited at once.
    """
    run.engine.live.add(run)
    run.carrier = asyncio.current_task()
    return perform(run)


def forget(run: TaskRun | FlowRun) -> None:
    """A run that the engine knew of has ended."""
    engine = run.engine
    engine.live.discard(run)
    if engine.ended is not None and not engine.ended.done():
        engine.ended.set_result(None)


def _has_outcome_hooks(definition: Definition[..., Any]) -> bool:
    return "on_commit" in definition.hooks or "on_rollback" in definition.hooks


async def _within(
    outer: transaction | None, run: TaskRun | FlowRun, definition: Definition[..., Any]
) -> None:
    """Run as a part of the open transaction: a savepoint of its own, so that a failure drops what it staged.

    Outside of one a run with commit or rollback hooks gets a transaction that carries them, and commits alone.
    """
    txn = transaction()
    txn.run = run
    txn.is_savepoint = True
    txn.joins = outer is not None and outer.joins
    txn.attach(outer, run.engine)
    run.transaction = txn
    token = current_transaction.set(txn)
    try:
        if caching.wanted(run, definition):
            await caching.perform(run, definition, attempts)
        else:
            await attempts(run, definition)
    except BaseException:
        await txn.roll_back()
        raise
    finally:
        current_transaction.reset(token)
    if run.state.type is not COMPLETED:
        await txn.roll_back()
        return
    if not run.state.is_cached():  # what was committed before is not rolled back
        txn.add_run(run, definition.hooks)
    if txn.is_broken and not txn.joins:
        await txn.roll_back()  # outside of a block it is no error, and a warning has been given
    else:
        await txn.end()


def marked_in(run: TaskRun) -> Marked | None:
    """The futures and annotations among the arguments, at any depth; None where there are none."""
    marked: Marked | None = None
    for value in run.args:
        if type(value) not in LEAVES:
            marked = marked or Marked()
            marked.look(value)
    if run.kwargs:
        marked = marked or Marked()
        marked.look(run.kwargs)
    if run.wait_for:
        marked = marked or Marked()
        marked.look(list(run.wait_for))
    return marked if marked is not None and marked.parts else None


async def resolve(run: TaskRun, marked: Marked) -> None:
    """Await the futures among the arguments, and put their values in their places."""
    new = await marked.settle()
    run.args = tuple([new(value) for value in run.args])
    run.kwargs = {name: new(value) for name, value in run.kwargs.items()}
    run._parameters = None  # whoever read them before, as of a future's run, saw futures


async def settle_arguments(run: TaskRun) -> None:
    """Put values in the places of futures, for a run that is only asked about.

    Raises:
        UpstreamFailedError: A future did not complete.
    """
    if marked := marked_in(run):
        try:
            await resolve(run, marked)
        except NotReady as error:
            raise _upstream_error(error.upstream) from error


def _upstream_error(upstream: Run) -> UpstreamFailedError:
    state = upstream.state
    # What came from further up is told by the causes: each quoting the one before would double with every run.
    told = isinstance(state.data, UpstreamFailedError)
    error = UpstreamFailedError(upstream.name, state.name if told else repr(state))
    error.__cause__ = state.error()
    return error


def _not_ready(run: TaskRun | FlowRun, upstream: Run) -> None:
    error = _upstream_error(upstream)
    run.enter("not_ready", error, error.message)
    run.reason = "did not run: upstream failed"


async def attempts(run: TaskRun | FlowRun, definition: Definition[..., Any]) -> None:
    """Run the body as often as the kernel says. Ends in a final state, or raises a cancellation or a crash."""
    if (rule := definition.rule_for(run)) is not None:
        run.rule = rule
    gate = definition.gate(run) if definition.is_limited or run.engine.limits.has_tags else None
    if gate is not None:
        await _limited_attempts(run, definition, gate)
        return
    run.start()
    do = await _attempt(run, definition)
    while do is not Do.FINISH:
        await _prepare_next(run, definition, do)
        do = await _attempt(run, definition) if not run.is_over else Do.FINISH


async def _limited_attempts(run: TaskRun | FlowRun, definition: Definition[..., Any], gate: Gate) -> None:
    """As `attempts`, with a slot for each attempt: waiting for the next one holds none."""
    async with gate:
        run.start()
        do = await _attempt(run, definition)
    while do is not Do.FINISH:
        await _prepare_next(run, definition, do)
        if run.is_over:
            return
        async with gate:
            do = await _attempt(run, definition)


async def _prepare_next(run: TaskRun | FlowRun, definition: Definition[..., Any], do: Do) -> None:
    """What the kernel wants done before the next attempt, if there is one."""
    if do is Do.ASK:
        do = run.decide(await _condition(run, definition))
    if do is Do.SLEEP:
        logger.info(
            "%s %r - %s; trying again in %.3g s (attempt %d of %d)",
            definition.kind, run.name, run.state.message, run.delay, run.attempt + 1, run.rule.times + 1,
        )  # fmt: skip
        await run.engine.sleep(run.delay)
        run.again()


async def _attempt(run: TaskRun | FlowRun, definition: Definition[..., Any]) -> Do:
    """Run the body once and tell the kernel how it ended."""
    if definition.hooks and "on_running" in definition.hooks:
        await call_hooks(run, definition, "on_running")
    prints = definition.log_prints
    if prints is not None or (run.parent is None and run.engine.settings.log_prints):
        with logged(prints is not False):
            return await _attempt_within(run, definition)
    if definition.timeout_seconds is not None:
        return await _attempt_within(run, definition)
    try:
        value = await definition.body(run)
    except Exception as error:
        return _raised(run, error)
    return run.returned(value)


class BodyTimeout(Exception):
    """The body itself found that its time was over. A signal to the shell, never seen by users."""

    def __init__(self, error: RunTimeoutError) -> None:
        self.error = error


def _raised(run: TaskRun | FlowRun, error: Exception) -> Do:
    return run.timed_out(error.error) if isinstance(error, BodyTimeout) else run.raised(error)


async def _attempt_within(run: TaskRun | FlowRun, definition: Definition[..., Any]) -> Do:
    """Run the body once, within its timeout if it has one, and tell the kernel how it ended."""
    seconds = definition.timeout_seconds if definition.is_timed_whole else None
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            value = await definition.body(run)
    except Exception as error:
        if seconds is not None and limit.expired() and isinstance(error, TimeoutError):
            timeout = RunTimeoutError(f"{definition.kind} {run.name!r}", seconds)
            timeout.__cause__ = error
            return run.timed_out(timeout)
        return _raised(run, error)
    return run.returned(value)


async def _condition(run: TaskRun | FlowRun, definition: Definition[..., Any]) -> bool:
    """Whether the user's condition wants another attempt; one that raises does not, and says so."""
    assert definition.retry_condition_fn is not None
    try:
        again = definition.retry_condition_fn(definition, run, run.proposed)
        return bool(await again if inspect.isawaitable(again) else again)
    except Exception:
        logger.exception("%s %r - the retry condition raised; not trying again", definition.kind, run.name)
        return False
