"""How a closing engine ends what is under way in it: wait, cancel, and in the end go without."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from .._runs.logging import logger
from .._runs.run import current_run

if TYPE_CHECKING:
    from .._runs.futures import RunFuture
    from .engine import Engine

PATIENCE = 2.0
"""Seconds that cancelled runs have to clean up. A body that swallows its cancellation must not hold up the exit."""
CLOSED = "the engine was closed"
_LONGEST = 86400.0  # seconds that a timer can be set for, on any loop


class Failures(list["RunFuture[Any]"]):
    """The failures of runs that only an engine owns: an owner's list that stays empty, since none is kept alive.

    That of a submitted task is told in the log at once; that of a background flow when the engine ends or its
    future goes, unless somebody has looked at it by then.
    """

    def __init__(self) -> None:
        super().__init__()
        self._untold: WeakSet[RunFuture[Any]] = WeakSet()

    def append(self, future: RunFuture[Any]) -> None:
        if future.is_told_late:
            self._untold.add(future)
        else:
            future.tell()

    def tell(self) -> None:
        """Log what nobody has looked at."""
        for future in list(self._untold):
            future.tell()
        self._untold.clear()


async def drain(engine: Engine, grace: float) -> None:
    """Wait up to `grace` seconds for the runs that are under way, with all that they start; then cancel them.

    Owned runs and root runs that somebody awaits count alike, because both use what is closed next; only a run
    that closes its own engine is not waited for. Ends within `grace` + `PATIENCE` seconds. Cancelled, it does not
    wait any longer but cancels the runs, and passes the cancellation on when they have ended.
    """
    mine = _ancestry()
    if grace and (late := _late(engine, mine)):
        logger.info("The engine is closing: waiting up to %.3g s for %s", grace, _named(late))
    cancelled: asyncio.CancelledError | None = None
    try:
        await _ended(engine, mine, grace)
    except asyncio.CancelledError as error:
        cancelled = error
    if _late(engine, mine):
        await _interrupt(engine, mine, grace)
    if cancelled is not None:
        raise cancelled


async def _interrupt(engine: Engine, mine: set[Any], grace: float) -> None:
    """Cancel what is left, and give it `PATIENCE` to clean up; what then still runs is recorded as Crashed."""
    late = _late(engine, mine)
    logger.warning(
        "The engine is closing: what did not end within %.3g s is cancelled: %s",
        grace, _named(late),
    )  # fmt: skip
    engine.interrupted = CLOSED
    for work in {*late.values()}:
        work.cancel()
    await _ended(engine, mine, PATIENCE)
    for run in _late(engine, mine):
        logger.error(
            "%r did not end within %.3g s of being cancelled, and is left behind", run.name, PATIENCE
        )
        if not run.is_over:
            run.enter("crash", message=f"{CLOSED}, and the run did not end when it was cancelled")
    engine.running.clear()
    engine.live.clear()


def _named(runs: Iterable[Any]) -> str:
    names = sorted({run.name for run in runs})
    return ", ".join(names[:10]) + (", …" if len(names) > 10 else "")


def _ancestry() -> set[Any]:
    """The run that closes the engine, and those that called it."""
    mine: set[Any] = set()
    run = current_run.get()
    while run is not None:
        mine.add(run)
        run = run.parent
    return mine


def _late(engine: Engine, mine: set[Any]) -> dict[Any, asyncio.Task[Any]]:
    """The runs that are under way, each with the asyncio task that carries it."""
    owned = {future.run: future._work for future in engine.running if not future._work.done()}
    roots = {run: run.carrier for run in engine.live if run.parent is None and run.carrier}
    return {run: work for run, work in (owned | roots).items() if run not in mine}


async def _ended(engine: Engine, mine: set[Any], seconds: float) -> None:
    """Return when nothing is left, or the time is over."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    while (left := deadline - loop.time()) > 0:
        left = min(left, _LONGEST)
        works = {future._work for future in engine.running if future.run not in mine}
        if works:
            await asyncio.wait(works, timeout=left)
            engine.running.difference_update([future for future in engine.running if future._work.done()])
        elif _late(engine, mine):
            # A run that somebody awaits in a task of theirs, which may go on for long after it.
            engine.ended = loop.create_future()
            await asyncio.wait([engine.ended], timeout=left)
        else:
            return
