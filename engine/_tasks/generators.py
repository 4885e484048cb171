"""Generator tasks: values stream while the body runs, and a stream that was read to its end can be replayed.

The body of a generator task is a run like any other, in an asyncio task of its own: it iterates over the user's
generator, and hands each value over when the consumer asks for it. So retries, limits, hooks, transactions and
SERIALIZABLE mean what they mean for every run, and what the generator opens across a `yield` (a timeout, a task
group) stays in one asyncio task, which a bare async generator cannot promise.

A cached stream lies in chunks (`_records/chunks`); its record, the run's result, names them.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from contextlib import aclosing
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from .._commit.driver import uncancelled
from .._concurrency.deadlocks import begin_waiting
from .._errors import RunTimeoutError
from .._execution.perform import BodyTimeout, forget, perform
from .._records.chunks import ChunkReader, ChunkWriter
from .._runners.threads import in_thread
from .._runs.futures import TaskFuture
from .._runs.machine import Retry
from .._runs.owners import owner_here
from .._runs.run import FlowRun, TaskRun
from .._runs.states import State

if TYPE_CHECKING:
    from .._lifecycle.engine import Engine
    from .task import GeneratorTask

T = TypeVar("T")
_END = object()
_NO_RETRY = Retry()


class RunStream(Generic[T]):
    """The run of a generator task: `async for value in t(x)`, or `await t(x)` for all values in a list.

    Nothing runs before the first value is asked for, and the body goes on only when the next one is. The state
    is Running while the stream is open, Completed or Cached at its end, Cancelled where it was closed early or
    its reader was cancelled. A reader that leaves its loop closes the stream by dropping it, at the latest the
    enclosing flow run closes it when it ends; `aclose()` does at once, and waits for the body's clean-up.

    A task or flow that is called with the value just read, by whoever reads, has the stream's run as its parent.
    """

    def __init__(self, task: GeneratorTask[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._link = Link()
        # It does not know this object, so that dropping that one closes it.
        self._values = _read(self._link, task, args, kwargs)

    @property
    def run(self) -> TaskRun | None:
        """The run; None before the first value was asked for."""
        return self._link.run

    @property
    def state(self) -> State[Any] | None:
        """The run's state; None before the first value was asked for."""
        return self.run.state if self.run is not None else None

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        value: T = await self._values.__anext__()
        return value

    async def aclose(self) -> None:
        """Close the stream: the body ends at its current yield, and what it stored of the values is removed."""
        await self._values.aclose()

    def __await__(self) -> Generator[Any, None, list[T]]:
        return self._all().__await__()

    async def _all(self) -> list[T]:
        return [value async for value in self]


class Link:
    """The run of a stream, and the value that its reader has in hand: how consumers find their parent."""

    __slots__ = ("reader", "run", "value")

    def __init__(self) -> None:
        self.reader: TaskRun | FlowRun | None = None
        self.run: TaskRun | None = None
        self.value: Any = _END

    def show(self, value: Any) -> None:
        """The reader has this value now."""
        self.value = value
        if self.reader is None and self.run is not None and self.run.parent is not None:
            self.reader = self.run.parent
            self.reader.links = [*self.reader.links, self]

    def hide(self) -> None:
        """The reader asks for the next value, or for no more."""
        self.value = _END
        if self.reader is not None:
            self.reader.links = [link for link in self.reader.links if link is not self]
            self.reader = None


def parent_for(caller: TaskRun | FlowRun, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TaskRun | FlowRun:
    """The parent of a call: the stream whose value the caller has just read and passes on, else the caller."""
    for link in reversed(caller.links):
        if any(value is link.value for value in (*args, *kwargs.values())):
            assert link.run is not None
            return link.run
    return caller


class StreamFuture(TaskFuture[T]):
    """The future of an open stream, as its owner sees it: closed, not awaited, when all else has ended."""

    __slots__ = ()
    is_stream = True

    def __init__(self, run: TaskRun) -> None:
        super().__init__(run)
        self._observed = True  # whatever happens is raised to the reader, if there still is one


class _NoOwner:
    """Stands for the owner of a stream that is read outside of a flow, a transaction and an engine's block."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.running: set[Any] = set()
        self.failed: list[Any] = []


class _Reading(Generic[T]):
    """The reader's end of a run that is under way."""

    def __init__(self, run: TaskRun, link: Link) -> None:
        self.run = link.run = run
        self._link = link
        self._channel = run.channel = Channel()
        here = owner_here()
        owner: Any = here[0] if here is not None else _NoOwner(run.engine)
        self._future: StreamFuture[T] = StreamFuture(run)
        self._future.owner = owner
        self._work = asyncio.get_running_loop().create_task(perform(run, self._future))
        self._future._work = run.carrier = self._work
        owner.running.add(self._future)
        self._work.add_done_callback(self._ended)
        if run.parent is None:
            run.engine.live.add(run)

    def _ended(self, _: object) -> None:
        self._channel.end()
        self._future.owner.running.discard(self._future)
        forget(self.run)

    async def values(self) -> AsyncGenerator[T, None]:
        """The values as the body yields them; the body's failure is raised, and ends with the run all told."""
        try:
            while (value := await self._next()) is not _END:
                self._link.show(value)
                yield value
                self._link.hide()
        except asyncio.CancelledError:
            self._work.cancel()
            raise
        finally:
            self._link.hide()
            self._channel.close()
            await uncancelled(_until_over(self._work))
        state = self._future.state
        if not state.is_completed():
            raise state.error()

    async def _next(self) -> Any:
        waiting = begin_waiting((self._future,))  # refused where the body waits for its reader
        try:
            return await self._channel.ask()
        finally:
            if waiting is not None:
                waiting.end()


async def _until_over(work: asyncio.Task[Any]) -> None:
    await asyncio.wait([work])


async def _read(
    link: Link, task: GeneratorTask[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> AsyncGenerator[Any, None]:
    """All values of a stream: from its body, or its record; from another run of the body where that is not whole."""
    run = await task._begin(args, dict(kwargs))
    async with aclosing(_Reading[Any](run, link).values()) as values:
        async for value in values:
            yield value
    if not run.state.is_cached():
        run.state.data = None  # the names of the chunks are no business of anybody else
        return
    stored = ChunkReader(run)
    try:
        async with aclosing(stored.values()) as values:
            async for value in values:
                link.show(value)
                yield value
                link.hide()
    finally:
        link.hide()
        run.state.data = None
    if stored.is_whole:
        return
    run = await task.with_options(refresh_cache=True)._begin(args, dict(kwargs))
    count = stored.count
    async with aclosing(_Reading[Any](run, link).values()) as values:
        async for value in values:
            if count > 0:
                count -= 1  # the reader has it from the part of the record that could be read
            else:
                yield value
    run.state.data = None


class Channel:
    """Hands one value at a time from the body to the reader, each when it is asked for."""

    __slots__ = ("_answer", "_is_closed", "_question")

    def __init__(self) -> None:
        self._question: asyncio.Future[None] | None = None
        self._answer: asyncio.Future[Any] | None = None
        self._is_closed = False

    async def ask(self) -> Any:
        """The reader wants the next value; _END when the run is over."""
        if self._is_closed:
            return _END
        if self._answer is not None:
            raise RuntimeError("This stream is being read by another asyncio task. Give each its own.")
        self._answer = asyncio.get_running_loop().create_future()
        if self._question is not None and not self._question.done():
            self._question.set_result(None)
        try:
            return await self._answer
        finally:
            self._answer = None

    async def give(self, value: Any) -> bool:
        """The body has a value; returns when the next one is wanted, False when no more are."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(value)
        if not self._is_closed:
            self._question = asyncio.get_running_loop().create_future()
            await self._question
        return not self._is_closed

    def close(self) -> None:
        """The reader wants no more."""
        self._is_closed = True
        if self._question is not None and not self._question.done():
            self._question.set_result(None)

    def end(self) -> None:
        """There are no more."""
        self._is_closed = True
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(_END)


# --- the body


async def stream_body(task: GeneratorTask[..., Any], run: TaskRun) -> Any:
    """Iterate over the user's generator, and hand its values over; returns what the stream's record shall say.

    Once the reader has a value, a failure is final: another attempt would give it the same values again.
    """
    assert run.channel is not None
    writer = ChunkWriter.of(run)
    body: _Body = _AsyncBody(task, run) if task.is_async else _SyncBody(task, run)
    try:
        while (value := await _next_value(body, task, run)) is not _END:
            if writer is not None:
                await writer.add(value)
            run.rule = _NO_RETRY
            if not await run.channel.give(value):
                run.enter("cancel", message="the stream was closed before its end")
                raise asyncio.CancelledError
        return await writer.finish() if writer is not None else None
    except BaseException:
        await uncancelled(_clean_up(body, writer))
        raise


async def _next_value(body: _Body, task: GeneratorTask[..., Any], run: TaskRun) -> Any:
    """The next value, within the task's timeout."""
    seconds = task.timeout_seconds
    if seconds is None:
        return await body.next()
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            return await body.next()
    except TimeoutError as error:
        if not limit.expired():
            raise
        timeout = RunTimeoutError(f"{task.kind} {run.name!r}", seconds)
        timeout.__cause__ = error
        raise BodyTimeout(timeout) from error


async def _clean_up(body: _Body, writer: ChunkWriter | None) -> None:
    try:
        await body.aclose()
    finally:
        if writer is not None:
            await writer.discard()


class _Body:
    """The user's generator, asked for one value at a time."""

    def __init__(self, task: GeneratorTask[..., Any], run: TaskRun) -> None:
        self._run = run
        self._generator = task.fn(*run.args, **run.kwargs)

    async def next(self) -> Any:
        """The next value; _END after the last."""
        raise NotImplementedError

    async def aclose(self) -> None:
        """End it at its current yield."""
        raise NotImplementedError


class _AsyncBody(_Body):
    async def next(self) -> Any:
        return await anext(self._generator, _END)

    async def aclose(self) -> None:
        await self._generator.aclose()


class _SyncBody(_Body):
    """Each step in a thread of the engine's, all of them in one context."""

    def __init__(self, task: GeneratorTask[..., Any], run: TaskRun) -> None:
        super().__init__(task, run)
        self._context = copy_context()
        self._lock = threading.Lock()
        self._is_busy = False
        self._is_closed = False

    async def next(self) -> Any:
        self._is_busy = True
        return await in_thread(self._run.engine, self._step)

    def _step(self) -> Any:
        try:
            return self._context.run(next, self._generator, _END)
        finally:
            with self._lock:
                self._is_busy = False
                is_abandoned = self._is_closed
            if is_abandoned:
                self._context.run(self._generator.close)

    async def aclose(self) -> None:
        """As above; a step that is still under way in its thread closes the generator when it has ended."""
        with self._lock:
            self._is_closed = True
            if self._is_busy:
                return
        await in_thread(self._run.engine, self._context.run, self._generator.close)
