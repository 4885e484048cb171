"""The pytest plugin: `onceflow_engine`, an engine for tests, in memory and with a clock that the test moves.

Nothing here is autouse. A test that asks for the fixture gets an engine of its own, which every run finds that
enters no other one: in async tests, whatever plugin runs them, and in `asyncio.run` and `f.run()`.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from ..locking import MemoryLockManager
from ..storage import MemoryStorage
from ..storage._runtime.loop_end import forget
from ._lifecycle import ambient
from ._lifecycle.engine import Engine
from ._runs.observing import Outcome, outcome_of
from ._settings import Settings

if TYPE_CHECKING:
    from ._definitions.definition import Definition
    from ._runs.run import FlowRun, TaskRun

__all__ = ["Clock", "EngineForTests", "onceflow_engine"]


class Clock:
    """Unix time that moves when the test says so. Call it for the time.

    Waits before retries do not wait: with `jumps` (the default) they move the clock on, the earliest first; with
    `jumps = False` they wait for `advance`.
    """

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now = now
        self.jumps = True
        self.slept: list[float] = []
        """The waits that were asked for, in seconds."""
        self._sleepers: list[tuple[float, int]] = []
        self._numbers = itertools.count()
        self._wakers: set[Callable[[], object]] = set()

    def __call__(self) -> float:
        return self.now

    def advance(self, by: float | timedelta) -> None:
        """Move on by so many seconds, and wake who has slept for long enough."""
        seconds = by.total_seconds() if isinstance(by, timedelta) else by
        if seconds < 0:
            raise ValueError(f"Time does not run backwards: advance() was given {seconds:g} s.")
        self.now += seconds
        for wake in list(self._wakers):
            wake()

    async def sleep(self, seconds: float) -> None:
        """Sleep on this clock: what the engine does before a retry."""
        self.slept.append(seconds)
        entry = (self.now + seconds, next(self._numbers))
        heapq.heappush(self._sleepers, entry)
        try:
            while self.now < entry[0]:
                if self.jumps:
                    await asyncio.sleep(0)  # let others lie down first
                    if self._sleepers[0] == entry:
                        self.advance(max(0.0, entry[0] - self.now))
                else:
                    await self._moved()
        finally:
            self._sleepers.remove(entry)
            heapq.heapify(self._sleepers)

    async def _moved(self) -> None:
        moved = asyncio.Event()
        self._wakers.add(moved.set)
        try:
            await moved.wait()
        finally:
            self._wakers.discard(moved.set)


class EngineForTests(Engine):
    """An engine on memory storage and locks, with settings of its own, that remembers what ran in it."""

    clock: Clock

    def __init__(self) -> None:
        clock = Clock()
        super().__init__(
            MemoryStorage(), MemoryLockManager(), settings=Settings(grace=1), clock=clock, sleep=clock.sleep
        )
        self.watchers = 1  # every run tells us how it ended
        self.outcomes: list[Outcome] = []
        """How every run ended, tasks and flows, in the order of their ends."""

    def advance(self, by: float | timedelta) -> None:
        """Move the clock on: records expire, and who waits before a retry goes on."""
        self.clock.advance(by)

    def note(self, run: TaskRun | FlowRun) -> None:
        super().note(run)
        self.outcomes.append(outcome_of(run))

    def forget(self) -> None:
        """Forget the runs so far, for the assertions that follow; records stay."""
        self.outcomes.clear()

    def assert_ran(self, definition: Definition[..., Any], times: int | None = None) -> None:
        """The task, or flow, ran its body: at least once, or exactly so many runs (each with all its attempts)."""
        __tracebackhide__ = True
        runs = self._of(definition)
        ran = [run for run in runs if run.attempts > 0]
        if (not ran) if times is None else (len(ran) != times):
            wanted = "at least one run" if times is None else f"{times} run{'' if times == 1 else 's'}"
            raise AssertionError(
                f"{definition.name!r} ran {len(ran)} times, expected {wanted}.{_listed(runs)}"
            )

    def assert_cached(self, definition: Definition[..., Any], times: int | None = None) -> None:
        """The task, or flow, was served from records: all its runs, or exactly so many of them."""
        __tracebackhide__ = True
        runs = self._of(definition)
        hits = [run for run in runs if run.is_hit]
        if (not hits or len(hits) != len(runs)) if times is None else (len(hits) != times):
            wanted = "all of its runs" if times is None else str(times)
            raise AssertionError(
                f"{definition.name!r} was served from records {len(hits)} times in {len(runs)} runs, "
                f"expected {wanted}.{_listed(runs)}"
            )

    def _of(self, definition: Definition[..., Any]) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.definition.fn is definition.fn]


def _listed(runs: list[Outcome]) -> str:
    return "".join(f"\n  {run.run_name}: {run.state}; {run.reason or 'no reason noted'}" for run in runs)


@pytest.fixture
def onceflow_engine() -> Iterator[EngineForTests]:
    """An engine for this test: memory storage and locks, a clock to move, `assert_ran` and `assert_cached`.

    Opened by the first run on each event loop, and closed with the test, or with the loop if that ends before;
    what is stored lasts for the test.
    """
    engine = EngineForTests()
    outer, ambient.stand_in = ambient.stand_in, engine
    try:
        yield engine
    finally:
        ambient.stand_in = outer
        _close(engine)


def _close(engine: Engine) -> None:
    """On a loop that serves many tests, the runs that one left behind end with it, and do not reach the next."""
    loop = engine.loop
    if loop is None or loop.is_closed() or not engine._is_open:
        return
    forget(engine.close_with_loop, loop)
    if loop.is_running():  # in another thread
        asyncio.run_coroutine_threadsafe(engine.aclose(), loop).result()
    else:
        loop.run_until_complete(engine.aclose())
