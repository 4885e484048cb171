"""Futures of submitted runs, and what stands in for a value: `unmapped`, `allow_failure`, `quote`."""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from .._concurrency.deadlocks import begin_waiting
from .._errors import ConfigurationError
from .logging import logger
from .states import CANCELLED, COMPLETED, State

if TYPE_CHECKING:
    from .run import FlowRun, Run, TaskRun

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
    """Who awaits the run and reports its failure: see `owners`."""
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
        """Ask the run to end as Cancelled; whether it was still running. What it awaits is cancelled as well.

        May be called in any thread, such as that of a synchronous body.
        """
        if self._work.done():
            return False
        loop = self._work.get_loop()
        if not _is_running_here(loop):
            loop.call_soon_threadsafe(self.cancel)
            return True
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
        check_timeout(timeout)
        if not self._work.done():
            check_loop((self,))
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
            check_loop((self,))
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


def _is_running_here(loop: asyncio.AbstractEventLoop) -> bool:
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False


def check_loop(futures: Iterable[RunFuture[Any]]) -> None:
    """Refuse to wait here for runs of another loop: their ends would not wake this one.

    Raises:
        ConfigurationError: Names the first.
    """
    loop = asyncio.get_running_loop()
    for future in futures:
        if not future._work.done() and future._work.get_loop() is not loop:
            raise ConfigurationError(
                f"Run {future.name!r} is under way on another event loop, so it cannot be awaited here.",
                "Await it there, and pass its value on.",
            )


def check_futures(what: str, futures: Iterable[RunFuture[R]]) -> list[RunFuture[R]]:
    """The futures as a list.

    Raises:
        TypeError: Something in it is no future.
    """
    listed = list(futures)
    for each in listed:
        if not isinstance(each, RunFuture):
            raise TypeError(
                f"{what}() takes futures, as submit() and map() return them, not {type(each).__name__}."
            )
    return listed


def check_timeout(timeout: float | None) -> None:
    if timeout is not None and not timeout >= 0:  # nan too
        raise ValueError(f"timeout must not be negative, got {timeout}.")
