"""`t.stream(items)`: one run an item, a bounded number of them under way, values as they come."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from ._errors import ConfigurationError

if TYPE_CHECKING:
    from ._task import Task

R = TypeVar("R")


async def stream(
    task: Task[..., R], items: Iterable[Any] | AsyncIterable[Any], limit: int, ordered: bool
) -> AsyncIterator[R]:
    """See `Task.stream`."""
    if not isinstance(limit, int) or limit < 1:
        raise ConfigurationError(f"{task.name}.stream() takes a limit from 1 on, got {limit!r}.")
    source = _Source(task.name, items)
    window = _Window(task, ordered)
    try:
        while True:
            while (work := window.take_ended()) is not None:
                yield await work
            if len(window) < limit and not source.is_over:
                if (item := source.take(window.wake)) is not _NOT_YET:
                    window.start(item)
                    continue
            elif not len(window):
                return
            if not source.is_over or len(window):
                await window.wait()
    finally:
        await window.aclose()
        await source.aclose()


_NOT_YET = object()


class _Source:
    """The items, one by one: an async iterable is asked for one item at a time, while runs go on."""

    def __init__(self, name: str, items: Iterable[Any] | AsyncIterable[Any]) -> None:
        self._iterator: Iterator[Any] | None = None
        self._async: AsyncIterator[Any] | None = None
        self._fetch: asyncio.Task[Any] | None = None
        self.is_over = False
        if isinstance(items, AsyncIterable):
            self._async = aiter(items)
        elif isinstance(items, Iterable):
            self._iterator = iter(items)
        else:
            raise TypeError(
                f"{name}.stream() takes an iterable or an async iterable, not {type(items).__name__}."
            )

    def take(self, wake: Any) -> Any:
        """The next item; _NOT_YET where there is none (any more, or so far: `wake` is called when there is)."""
        if self._iterator is not None:
            item = next(self._iterator, _NOT_YET)
            self.is_over = item is _NOT_YET
            return item
        assert self._async is not None
        if self._fetch is None:
            self._fetch = asyncio.ensure_future(_next(self._async))
            self._fetch.add_done_callback(wake)
        if not self._fetch.done():
            return _NOT_YET
        item = self._fetch.result()
        self._fetch = None
        self.is_over = item is _NOT_YET
        return item

    async def aclose(self) -> None:
        if self._fetch is not None:
            self._fetch.cancel()
            await asyncio.gather(self._fetch, return_exceptions=True)
        close = getattr(self._async, "aclose", None)
        if close is not None:
            await close()


async def _next(iterator: AsyncIterator[Any]) -> Any:
    return await anext(iterator, _NOT_YET)


class _Window:
    """The runs under way: a line of them in order, or whichever ends first."""

    def __init__(self, task: Task[..., Any], ordered: bool) -> None:
        self._task = task
        self._ordered = ordered
        # An OrderedDict, because a plain dict looks for its first item through all that were removed before it.
        self._works: OrderedDict[asyncio.Task[Any], None] = OrderedDict()
        self._ended: deque[asyncio.Task[Any]] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return len(self._works)

    def start(self, item: Any) -> None:
        work = asyncio.get_running_loop().create_task(self._task(item))
        self._works[work] = None
        work.add_done_callback(self.wake)

    def wake(self, ended: asyncio.Task[Any]) -> None:
        if not self._ordered and ended in self._works:
            self._ended.append(ended)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        """Until a run ends or an item comes."""
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def take_ended(self) -> asyncio.Task[Any] | None:
        """The run whose value is next, if it has ended."""
        if not self._ordered:
            if not self._ended:
                return None
            work = self._ended.popleft()
        else:
            first = next(iter(self._works), None)
            if first is None or not first.done():
                return None
            work = first
        del self._works[work]
        return work

    async def aclose(self) -> None:
        """Cancel what is still under way, and wait until it has ended."""
        for work in self._works:
            work.cancel()
        if self._works:
            await asyncio.gather(*self._works, return_exceptions=True)
        self._works.clear()
