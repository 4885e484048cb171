"""Generator tasks: values stream while the body runs, and a stream that was read to its end can be replayed.

A cached stream lies in chunks of up to 1 MiB, each an object of its own, written while the stream is read; the
record names them, and is committed when the body has ended. So both ways need memory for one chunk only. A
stream that is broken off, or fails, leaves no record, and its chunks are removed.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
from collections.abc import AsyncIterator, Callable, Generator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from . import _caching
from ._chunks import ChunkReader, ChunkWriter
from ._commit import uncancelled
from ._context import TaskRun, current_run
from ._errors import RunTimeoutError
from ._run import attempts, end, marked_in, resolve
from ._states import State

if TYPE_CHECKING:
    from ._task import Task

T = TypeVar("T")
_END = object()


class RunStream(Generic[T]):
    """The run of a generator task: `async for value in t(x)`, or `await t(x)` for all values in a list.

    The state is Running while the stream is open, Completed at its end, Cancelled where it is closed early.
    """

    def __init__(self, task: Task[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._task = task
        self._arguments = (args, kwargs)
        self.run: TaskRun | None = None
        self._values = self._stream()

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
        """Close the stream: the body ends at its current yield."""
        await self._values.aclose()

    def __await__(self) -> Generator[Any, None, list[T]]:
        return self._all().__await__()

    async def _all(self) -> list[T]:
        return [value async for value in self]

    async def _stream(self) -> Any:
        """One run, from its call to its final state, with a stop at every value."""
        run = self.run = await self._task._begin(*self._arguments)
        task = self._task
        if marked := marked_in(run):
            await resolve(run, marked)
        writer: ChunkWriter | None = None
        skip = 0
        if _caching.wanted(run, task):
            call = await _caching.call_for(run, task, attempts)
            if call is not None:
                stored = await ChunkReader.open(call)
                if stored is not None:
                    async for value in stored:
                        yield value
                    if stored.is_whole:
                        run.enter("hit")
                        await end(run, task)
                        return
                    run.reason = "ran: a part of the stored stream is gone"
                    skip = stored.count
                writer = ChunkWriter(call)
        run.start()
        body = _Body(task, run)
        try:
            while (value := await body.next_value()) is not _END:
                if writer is not None:
                    await writer.add(value)
                if skip:
                    skip -= 1  # the consumer has it from the part of the record that could be read
                    continue
                yield value
        except GeneratorExit:
            run.enter("cancel", message="the stream was closed before its end")
            await self._break_off(body, writer)
            raise
        except asyncio.CancelledError:
            run.enter("cancel", message="cancelled while it ran")
            await self._break_off(body, writer)
            raise
        except Exception as error:
            run.timed_out(error) if isinstance(error, RunTimeoutError) else run.raised(error)
            await self._break_off(body, writer)
            raise
        run.enter("complete")
        if writer is not None:
            await writer.commit()
        await end(run, task)

    async def _break_off(self, body: _Body, writer: ChunkWriter | None) -> None:
        async def clean_up() -> None:
            await body.aclose()
            if writer is not None:
                await writer.discard()
            assert self.run is not None
            await end(self.run, self._task)

        await uncancelled(clean_up())


class _Body:
    """The user's generator, asked for one value at a time, in the context of its run."""

    def __init__(self, task: Task[..., Any], run: TaskRun) -> None:
        self._task = task
        self._run = run
        self._context = contextvars.copy_context()
        self._context.run(current_run.set, run)
        self._generator = self._context.run(task.fn, *run.args, **run.kwargs)
        self._is_async = inspect.isasyncgen(self._generator)

    async def next_value(self) -> Any:
        """The next value, within the task's timeout; _END after the last."""
        seconds = self._task.timeout_seconds
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                if self._is_async:
                    return await self._in_context(_anext, self._generator)
                return await self._run.engine.in_thread(self._context.run, _next, self._generator)
        except TimeoutError as error:
            if limit.expired() and seconds is not None:
                raise RunTimeoutError(f"{self._task.kind} {self._run.name!r}", seconds) from error
            raise

    async def _in_context(self, fn: Callable[[Any], Any], generator: Any) -> Any:
        token = current_run.set(self._run)
        try:
            return await fn(generator)
        finally:
            current_run.reset(token)

    async def aclose(self) -> None:
        if self._is_async:
            await self._in_context(_close_async, self._generator)
        else:
            await self._run.engine.in_thread(self._context.run, self._generator.close)


async def _anext(generator: Any) -> Any:
    return await anext(generator, _END)


async def _close_async(generator: Any) -> None:
    await generator.aclose()


def _next(generator: Any) -> Any:
    return next(generator, _END)
