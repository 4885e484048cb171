"""Who owns submitted runs, and how an owner ends: a flow run, a transaction's block, or an entered engine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, Protocol

from .._commit.driver import uncancelled
from .._errors import EngineClosedError
from .._lifecycle.engine import Engine, current_engine
from .futures import RunFuture
from .run import FlowRun, TaskRun, current_run, current_transaction


class Owner(Protocol):
    """Has runs under way, and keeps those that failed until somebody has noticed."""

    running: set[RunFuture[Any]]

    @property
    def failed(self) -> list[RunFuture[Any]]: ...

    @property
    def engine(self) -> Engine: ...


def owner_here() -> tuple[Owner, TaskRun | FlowRun | None] | None:
    """Who would own a run submitted here, and the run it would be called from.

    The innermost of the open transaction and the enclosing flow run, else the engine entered in this context.

    Raises:
        EngineClosedError: That engine is closed.
    """
    run = current_run.get()
    flow_run = run.flow_run if run is not None else None
    txn = current_transaction.get()
    while txn is not None and not txn.is_block:
        txn = txn.parent
    if txn is not None and (flow_run is None or (txn.run is not None and txn.run.flow_run is flow_run)):
        return txn, run
    if flow_run is not None:
        return flow_run, run
    engine = current_engine.get()
    if engine is None:
        return None
    if not engine._is_open:
        raise EngineClosedError("A submitted run")
    return engine, run


async def finish(owner: Owner, name: str) -> None:
    """Wait for what was submitted; a failure that nobody looked at fails the owner.

    Raises:
        ExceptionGroup: The failures, each once; a BaseExceptionGroup where one is a crash.
    """
    while owner.running:
        works = {future._work for future in owner.running if not future.is_stream}
        if not works:
            await _cancel(owner)  # streams that were left open
            break
        await asyncio.wait(works)
        owner.running.difference_update([future for future in owner.running if future._work.done()])
    errors = unnoticed(owner.failed)
    owner.failed.clear()
    if errors:
        runs = f"{len(errors)} submitted run{'s' if len(errors) > 1 else ''}"
        raise BaseExceptionGroup(f"{runs} of {name} failed, and nobody looked", errors)


def unnoticed(failed: Iterable[RunFuture[Any]]) -> list[BaseException]:
    """The errors of failed runs that nobody awaited or looked at."""
    errors = [future.run.state.error() for future in failed if not future._observed]
    return list({id(error): error for error in errors}.values())


async def cancel_all(owner: Owner) -> None:
    """Cancel the unfinished runs of an owner and wait until they have ended, those too that they start meanwhile.

    Cancelled itself, it waits all the same, and passes the cancellation on.
    """
    if owner.running:
        await uncancelled(_cancel(owner))
    owner.failed.clear()


async def _cancel(owner: Owner) -> None:
    while owner.running:
        works = {future._work for future in owner.running}
        for work in works:
            work.cancel()
        await asyncio.wait(works)
        owner.running.difference_update([future for future in owner.running if future._work.done()])
