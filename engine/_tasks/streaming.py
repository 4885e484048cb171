"""`t.stream(items)`: one run an item, a bounded number of them under way, values as they come.

One asyncio task feeds a stream: it reads the source, and starts a run for each item while there is room. The runs
belong to the stream, and the stream to the enclosing flow run, transaction or engine: when that ends, what is left
of the stream is cancelled and awaited, also where the consumer has just walked away.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, AsyncIterable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from .._commit.driver import uncancelled
from .._concurrency.deadlocks import begin_waiting
from .._errors import ConfigurationError, RunCancelledError
from .._lifecycle.ambient import ambient, ambient_now
from .._lifecycle.engine import Engine
from .._runs.futures import RunFuture, TaskFuture
from .._runs.machine import Life
from .._runs.owners import Owner, cancel_all, owner_here
from .._runs.run import FlowRun, TaskRun, current_run

if TYPE_CHECKING:
    from .task import Task

R = TypeVar("R")
_END = object()


async def stream(
    task: Task[..., R], items: Iterable[Any] | AsyncIterable[Any], limit: int, ordered: bool
) -> AsyncGenerator[R, None]:
    """See `Task.stream`."""
    if not isinstance(limit, int) or limit < 1:
        raise ConfigurationError(f"{task.name}.stream() takes a limit from 1 on, got {limit!r}.")
    if not isinstance(items, (Iterable, AsyncIterable)):
        kind = type(items).__name__
        raise TypeError(f"{task.name}.stream() takes an iterable or an async iterable, not {kind}.")
    owner = task.owner_for("stream")[0] if owner_here() is not None else None
    engine = ambient_now() or await ambient(f"{task.name}.stream()") if owner is None else owner.engine
    window = _Window(task, engine, limit, ordered)
    feeder = asyncio.get_running_loop().create_task(window.feed(items))
    if owner is not None:
        _make_known(task.name, feeder, owner)
    try:
        while not window.is_over():
            if (future := window.take()) is not None:
                yield await future
            else:
                await window.wait()
    finally:
        feeder.cancel()
        await uncancelled(_until_over(feeder))


async def _until_over(work: asyncio.Task[None]) -> None:
    await asyncio.wait([work])


class _StreamOfRuns(RunFuture[None]):
    """The stream as its owner knows it: something under way, which ends when it is cancelled."""

    __slots__ = ()
    is_stream = True


def _make_known(name: str, feeder: asyncio.Task[None], owner: Owner) -> None:
    life = Life()
    life.name = f"{name}.stream"  # type: ignore[attr-defined]  # as much of a run as an owner needs
    life.pend()
    future = _StreamOfRuns(life)  # type: ignore[arg-type]  # see above
    future.owner = owner
    future._work = feeder
    owner.running.add(future)
    feeder.add_done_callback(lambda _: owner.running.discard(future))


class _Window:
    """The runs under way, and their owner: a line of them in order, or whichever ends first."""

    def __init__(self, task: Task[..., Any], engine: Engine, limit: int, ordered: bool) -> None:
        self._task = task
        self._limit = limit
        self._ordered = ordered
        self.engine = engine
        self.running: set[RunFuture[Any]] = set()
        self.failed: list[RunFuture[Any]] = []
        # An OrderedDict, because a plain dict looks for its first item through all that were removed before it.
        self._futures: OrderedDict[asyncio.Task[None], TaskFuture[Any]] = OrderedDict()
        self._ended: deque[asyncio.Task[None]] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._feeder: asyncio.Future[None] | None = None
        self._is_fed = False
        self._is_closed = False
        self._error: BaseException | None = None

    # --- in

    async def feed(self, items: Iterable[Any] | AsyncIterable[Any]) -> None:
        """Start a run for each item while there is room. Ends by being cancelled, with all runs.

        An async source is read and closed in this asyncio task alone, so that what it opens across a yield, as a
        timeout, works. A plain iterator stays the caller's, who may go on with it.
        """
        try:
            try:
                await (self._feed_async(items) if isinstance(items, AsyncIterable) else self._feed(items))
            except asyncio.CancelledError:
                if asyncio.current_task().cancelling():  # type: ignore[union-attr]  # we run in one
                    raise
                self._error = RunCancelledError("Cancelled", f"the source of {self._task.name}.stream() was")
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # raised to the reader, in its place
                self._error = error
            self._is_fed = True
            self._wake()
            await asyncio.get_running_loop().create_future()  # until it is cancelled
        finally:
            self._is_closed = True
            self._wake()
            await cancel_all(self)

    async def _feed(self, items: Iterable[Any]) -> None:
        iterator = iter(items)
        await self._room()
        while (item := next(iterator, _END)) is not _END:
            self._start(item)
            await self._room()

    async def _feed_async(self, items: AsyncIterable[Any]) -> None:
        iterator = aiter(items)
        try:
            await self._room()
            while (item := await anext(iterator, _END)) is not _END:
                self._start(item)
                await self._room()
        finally:
            if (close := getattr(iterator, "aclose", None)) is not None:
                await close()

    async def _room(self) -> None:
        """Until one more run may be under way: the source is asked only then."""
        while len(self._futures) >= self._limit:
            self._feeder = asyncio.get_running_loop().create_future()
            await self._feeder

    def _start(self, item: Any) -> None:
        parent: TaskRun | FlowRun | None = current_run.get()
        future = self._task.begin((item,), {}, parent, self)
        self._futures[future._work] = future
        future._work.add_done_callback(self._has_ended)

    def _has_ended(self, work: asyncio.Task[None]) -> None:
        if not self._ordered:
            self._ended.append(work)
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    # --- out

    def is_over(self) -> bool:
        """Whether all values are out.

        Raises:
            RunCancelledError: The stream's owner has ended, and the stream with it.
            BaseException: What the source raised.
        """
        if self._is_closed:
            raise RunCancelledError("Cancelled", f"{self._task.name}.stream() ended with its owner")
        if self._error is not None and not (self._ordered and self._futures):
            raise self._error
        return self._is_fed and not self._futures

    def take(self) -> TaskFuture[Any] | None:
        """The run whose value is next, if it has ended."""
        if not self._ordered:
            work = self._ended.popleft() if self._ended else None
        else:
            work = next(iter(self._futures), None)
            if work is not None and not work.done():
                work = None
        if work is None:
            return None
        if self._feeder is not None and not self._feeder.done():
            self._feeder.set_result(None)
        return self._futures.pop(work)

    async def wait(self) -> None:
        """Until a run ends, or the source, or the stream."""
        self._reader = asyncio.get_running_loop().create_future()
        waiting = begin_waiting(self._futures.values())  # as they will be: runs may start meanwhile
        try:
            await self._reader
        finally:
            if waiting is not None:
                waiting.end()
