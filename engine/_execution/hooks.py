"""The end of a run: its line in the log, and its hooks."""

from __future__ import annotations

import asyncio
import inspect
from asyncio import CancelledError
from typing import TYPE_CHECKING, Any

from .._commit.driver import uncancelled
from .._runs.logging import INFO, logger
from .._runs.run import FlowRun, TaskRun, current_run
from .._runs.states import CANCELLED, COMPLETED, CRASHED, FAILED

if TYPE_CHECKING:
    from .._definitions.definition import Definition

HOOK_SECONDS = 10.0
"""How long the hooks of a cancelled or crashed run may take, all together."""
_EVENTS = {
    COMPLETED: "on_completion",
    FAILED: "on_failure",
    CANCELLED: "on_cancellation",
    CRASHED: "on_crashed",
}


async def end(run: TaskRun | FlowRun, definition: Definition[..., Any]) -> None:
    """Log the final state and call its hooks."""
    state = run.state
    if logger.isEnabledFor(INFO):
        reason = f"; {run.reason}" if run.reason else ""
        logger.info("%s %r - Finished in state %r%s", definition.kind, run.name, state, reason)
    event = _EVENTS.get(state.type)
    if event is not None and event in definition.hooks:
        token = current_run.set(run)
        try:
            await call_hooks(run, definition, event)
        finally:
            current_run.reset(token)


async def end_shielded(run: TaskRun | FlowRun, definition: Definition[..., Any]) -> None:
    """As `end`, for a run that is on its way out: no cancellation breaks it off, and no hook holds it up for long."""
    event = _EVENTS.get(run.state.type)
    if event is None or event not in definition.hooks:
        await end(run, definition)  # has nothing to wait for
        return
    try:
        await uncancelled(asyncio.wait_for(end(run, definition), HOOK_SECONDS))
    except TimeoutError:
        logger.warning(
            "%s %r - its %s hooks were broken off after %.3g s",
            definition.kind,
            run.name,
            event,
            HOOK_SECONDS,
        )


async def call_hooks(run: TaskRun | FlowRun, definition: Definition[..., Any], event: str) -> None:
    """Call the hooks of a state, in order; one that raises is logged, and changes nothing."""
    for hook in definition.hooks[event]:
        name = getattr(hook, "__name__", repr(hook))
        state = run.state.name
        logger.info(
            "%s %r - Running hook %r in response to entering state %r", definition.kind, run.name, name, state
        )
        try:
            outcome = hook(definition, run, run.state)
            if inspect.isawaitable(outcome):
                await outcome
        except CancelledError:
            if asyncio.current_task().cancelling():  # type: ignore[union-attr]  # we run in one
                raise
            logger.exception("%s %r - Hook %r was cancelled", definition.kind, run.name, name)
        except Exception:
            logger.exception("%s %r - Hook %r raised", definition.kind, run.name, name)
        else:
            logger.info("%s %r - Hook %r finished successfully", definition.kind, run.name, name)
