"""Futures of submitted runs, and what stands in for a value: `unmapped`, `allow_failure`, `quote`."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Generator, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from ._deadlocks import begin_waiting
from ._logging import logger
from ._states import CANCELLED, COMPLETED, State

if TYPE_CHECKING:
    from ._context import FlowRun, Run, TaskRun

T = TypeVar("T")
R = TypeVar("R")


class Annotation(Generic[T]):
    """An argument with a note to the engine; the body sees the bare value."""

    __slots__ = ("value",)

    def __init__(self, value: T) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.value!r})"


class unmapped(Annotation[T]):
    """`t.map(xs, unmapped(y))`: every run gets the whole `y`."""


class allow_failure(Annotation[T]):
    """`t.submit(allow_failure(future))`: runs also when the future failed, and is given its exception."""


class quote(Annotation[T]):
    """`t.submit(quote(x))`: `x` is handed on as it is, neither searched for futures nor awaited."""


class _Ended:
    """Stands for the asyncio task of a run that has ended, which would keep its context and its coroutine alive."""

    def done(self) -> bool:
        return True

    def cancel(self) -> bool:
        return False


ENDED = cast("asyncio.Task[Any]", _Ended())


class RunFuture(Generic[R]):
    """A run that is under way on the caller's loop. Await it for its value; what the run raised is raised.

    Awaiting does not own the run: when the awaiting task is cancelled, the run goes on; `cancel()` ends it,
    and so does the end of the flow run or engine that owns it. A future can be awaited by any number of
    tasks of its loop, any number of times.
    """

    __slots__ = ("__weakref__", "_observed", "_work", "owner", "run")

    _work: asyncio.Task[Any]
    owner: Any
    """Who awaits the run and reports its failure: see `_owning`."""
    is_stream = False
    """Whether its values go to a reader; when an owner has nothing else left to await, nobody reads any more."""
    is_told_late = False
    """Whether a failure in an engine's hands may wait to be told until the future goes."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._observed = False

    @property
    def id(self) -> str:
        """The run's id."""
        return self.run.id

    @property
    def name(self) -> str:
        """The run's name."""
        return self.run.name

    @property
    def state(self) -> State[R]:
        """The run's state now. Looking at a final state counts as having noticed a failure."""
        self._settle()
        state = self.run.state
        if state.is_final():
            self._observed = True
        return state

    def done(self) -> bool:
        """Whether the run has ended."""
        return self._work.done()

    def cancel(self) -> bool:
        """Ask the run to end as Cancelled; whether it was still running. What it awaits is cancelled as well."""
        if self.run.state.name == "Pending":  # may never take its first step, and so not sign off
            self._work.add_done_callback(self._sign_off)
        return self._work.cancel()

    def _sign_off(self, _: object) -> None:
        self._settle()
        self.owner.running.discard(self)

    async def wait(self, timeout: float | None = None) -> State[R] | None:
        """Wait for the end of the run, `timeout` seconds at most, and return its final state, else None.

        Never raises for a failed run, and never ends it.
        """
        _check_timeout(timeout)
        if not self._work.done():
            waiting = begin_waiting((self,), for_good=timeout is None)
            try:
                await asyncio.wait([self._work], timeout=timeout)
            finally:
                if waiting is not None:
                    waiting.end()
        return self.state if self._work.done() else None

    async def result(self, timeout: float | None = None, raise_on_failure: bool = True) -> R:
        """The run's value, after `timeout` seconds at most; `raise_on_failure=False` returns an exception instead.

        Raises:
            TimeoutError: The run has not ended by then; it goes on.
        """
        state = await self.wait(timeout)
        if state is None:
            raise TimeoutError(f"Run {self.name!r} has not ended within {timeout:g} s; it goes on.")
        return state.result(raise_on_failure)

    def __await__(self) -> Generator[Any, None, R]:
        if not self._work.done():
            waiting = begin_waiting((self,))
            try:
                yield from _until_done(self._work).__await__()
            finally:
                if waiting is not None:
                    waiting.end()
        self._observed = True  # not before: whoever gives up waiting has not seen the failure
        self._settle()
        state = self.run.state
        if state.type is COMPLETED:
            return cast(R, state.data)
        raise state.error()

    def _settle(self) -> None:
        """A run cancelled before its first step never got to say so itself."""
        if self._work.done() and not self.run.is_over:
            interrupted = getattr(self.owner.engine, "interrupted", None)
            self.run.enter("cancel", message=interrupted or "cancelled before it began")

    def tell(self) -> None:
        """Log a failure that nobody has looked at; once."""
        state = self.run.state
        if self._observed or not state.is_final() or state.type in (COMPLETED, CANCELLED):
            return
        self._observed = True
        error = state.error()
        logger.error("%r, which nobody but the engine owns, failed: %r", self, error, exc_info=error)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} {self.run.state!r}>"


async def _until_done(work: asyncio.Task[None]) -> None:
    """Wait for a task without owning it: `asyncio.shield` without its second future."""
    waiter = asyncio.get_running_loop().create_future()
    wake = partial(_wake, waiter)
    work.add_done_callback(wake)
    try:
        await waiter
    except BaseException:
        work.remove_done_callback(wake)
        raise


def _wake(waiter: asyncio.Future[None], _: object) -> None:
    if not waiter.done():
        waiter.set_result(None)


class TaskFuture(RunFuture[R]):
    """The future of a submitted task run."""

    __slots__ = ()

    run: TaskRun

    @property
    def task_run_id(self) -> str:
        """The task run's id."""
        return self.run.id


class FlowFuture(RunFuture[R]):
    """The future of a flow that runs in the background of an engine. Dropping it does not end the run."""

    __slots__ = ()
    is_told_late = True

    run: FlowRun

    @property
    def flow_run_id(self) -> str:
        """The flow run's id."""
        return self.run.id

    def __del__(self) -> None:
        self.tell()


class FutureList(list["TaskFuture[R]"]):
    """The futures of `map`, in input order. Await it for the list of values; the first failure is raised at once.

    As an argument of a task it stands for that list of values.
    """

    def __await__(self) -> Generator[Any, None, list[R]]:
        return self.result().__await__()

    _filling: RunFuture[None] | None = None

    def is_filled(self) -> bool:
        """Whether the futures exist."""
        return True

    async def wait(self, timeout: float | None = None) -> list[State[R]]:
        """Wait for all, `timeout` seconds at most, and return the states then."""
        await wait(self, timeout)
        return [future.state for future in self]

    async def result(self, timeout: float | None = None, raise_on_failure: bool = True) -> list[R]:
        """The values in input order; `raise_on_failure=False` returns exceptions in their places.

        Raises:
            TimeoutError: Some have not ended by then; they go on.
        """
        _check_timeout(timeout)
        try:
            async with asyncio.timeout(timeout):
                await all_done(self, stop_on_failure=raise_on_failure)
        except TimeoutError:
            left = sum(not future.done() for future in self)
            raise TimeoutError(
                f"{left} of {len(self)} runs have not ended within {timeout:g} s; they go on."
            ) from None
        for future in self:
            future._observed = True
        if raise_on_failure:
            for future in self:
                if future._work.done() and (state := future.state).type is not COMPLETED:
                    raise state.error()
        return [future.state.result(raise_on_failure=False) for future in self]


class PendingFutureList(FutureList[R]):
    """The futures of a `map` over a future that was not done yet: there are none before it is awaited."""

    _filling: RunFuture[None]

    def __init__(self, filling: RunFuture[None]) -> None:
        super().__init__()
        self._filling = filling  # pyright: ignore[reportIncompatibleVariableOverride]  #  always set

    async def wait(self, timeout: float | None = None) -> list[State[R]]:
        left = await self._fill(timeout)
        return await super().wait(left)

    async def result(self, timeout: float | None = None, raise_on_failure: bool = True) -> list[R]:
        left = await self._fill(timeout)
        return await super().result(left, raise_on_failure)

    async def _fill(self, timeout: float | None) -> float | None:
        """Wait until the futures exist, and say how much of the time is left."""
        began = time.monotonic()
        await self._filling.result(timeout)
        return None if timeout is None else max(0.0, timeout - (time.monotonic() - began))

    def is_filled(self) -> bool:
        return self._filling.run.state.type is COMPLETED

    def _check_filled(self) -> None:
        if not self._filling.done():
            raise RuntimeError(
                "This map waits for a future among its arguments, so its own futures do not exist yet. "
                "Await the list first, or map over `await future`."
            )
        self._filling.state.result()  # raises what kept the futures from coming into being

    def __iter__(self) -> Iterator[TaskFuture[R]]:
        self._check_filled()
        return super().__iter__()

    def __len__(self) -> int:
        self._check_filled()
        return super().__len__()

    def __getitem__(self, index: Any) -> Any:
        self._check_filled()
        return super().__getitem__(index)


def _check_timeout(timeout: float | None) -> None:
    if timeout is not None and timeout < 0:
        raise ValueError(f"timeout must not be negative, got {timeout}.")


MANY = 16
"""From how many futures on it pays to give them a turn of the loop before anything else."""


async def all_done(futures: Iterable[RunFuture[Any]], stop_on_failure: bool) -> None:
    """Return when all are done, or one has failed: one callback a future and one waiter for all."""
    futures = list(futures)
    if len(futures) > MANY:
        await asyncio.sleep(0)  # those that end in their first step, mostly all, need no callback then
    pending = {future._work: future for future in futures if not future._work.done()}
    if not pending or (stop_on_failure and any(_has_failed(f) for f in futures if f._work not in pending)):
        return
    waiting = begin_waiting(pending.values())
    waiter = asyncio.get_running_loop().create_future()

    def ended(work: asyncio.Task[None]) -> None:
        future = pending.pop(work)  # lets the asyncio task go
        if not waiter.done() and (not pending or (stop_on_failure and _has_failed(future))):
            waiter.set_result(None)

    for work in pending:
        work.add_done_callback(ended)
    try:
        await waiter
    finally:
        if waiting is not None:
            waiting.end()
        for work in pending:
            work.remove_done_callback(ended)


def _has_failed(future: RunFuture[Any]) -> bool:
    future._settle()
    return future.run.state.type is not COMPLETED


async def wait(
    futures: Iterable[RunFuture[R]], timeout: float | None = None
) -> tuple[set[RunFuture[R]], set[RunFuture[R]]]:
    """Wait for all futures, `timeout` seconds at most: `(done, not_done)`. Never raises for a failed run."""
    _check_timeout(timeout)
    futures = list(futures)
    works = {future._work for future in futures if not future._work.done()}
    waiting = begin_waiting(futures, for_good=timeout is None)
    try:
        if works:
            await asyncio.wait(works, timeout=timeout)
    finally:
        if waiting is not None:
            waiting.end()
    done = {future for future in futures if future._work.done()}
    for future in done:
        future._settle()
    return done, set(futures) - done


async def as_completed(
    futures: Iterable[RunFuture[R]], timeout: float | None = None
) -> AsyncIterator[RunFuture[R]]:
    """Yield each future when its run ends, the first to finish first.

    Raises:
        TimeoutError: After `timeout` seconds in all, saying how many are unfinished. With a timeout of zero
            those that are already done are still yielded.
    """
    _check_timeout(timeout)
    futures = list(dict.fromkeys(futures))
    loop = asyncio.get_running_loop()
    finished: deque[RunFuture[R]] = deque(future for future in futures if future._work.done())
    pending = {future._work: future for future in futures if not future._work.done()}
    deadline = None if timeout is None else loop.time() + timeout
    waiter: asyncio.Future[None] | None = None

    def ended(work: asyncio.Task[None]) -> None:
        finished.append(pending.pop(work))
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    for work in list(pending):
        work.add_done_callback(ended)
    try:
        while finished or pending:
            while finished:
                yield finished.popleft()
            if pending:
                waiter = loop.create_future()
                left = None if deadline is None else max(0.0, deadline - loop.time())
                waiting = begin_waiting([*pending.values()], for_good=left is None)
                try:
                    await asyncio.wait([waiter], timeout=left)
                finally:
                    if waiting is not None:
                        waiting.end()
                if not waiter.done():
                    waiter.cancel()
                    raise TimeoutError(
                        f"{len(pending)} of {len(futures)} futures are unfinished after {timeout:g} s."
                    )
    finally:
        for work in pending:
            work.remove_done_callback(ended)
