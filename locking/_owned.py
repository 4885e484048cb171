"""Requests that are seen to their end, whatever happens to the one who asked for them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, NamedTuple, TypeVar

from anyio import CancelScope

T = TypeVar("T")

_running: set[asyncio.Task[Any]] = set()  # asyncio itself holds tasks weakly


class Ended(NamedTuple):
    """What became of the request, and the cancellation that reached the caller meanwhile, if any."""

    value: Any
    error: BaseException | None
    cancelled: asyncio.CancelledError | None

    def get(self) -> Any:
        """The value, unless the caller was cancelled or the request failed."""
        if self.cancelled is not None:
            raise self.cancelled
        if self.error is not None:
            raise self.error
        return self.value


def start(work: Coroutine[Any, Any, T], keep: set[asyncio.Task[Any]] = _running) -> asyncio.Task[T]:
    """Run the work as a task that is kept (in `keep`) until it ends."""
    task = asyncio.get_running_loop().create_task(work)
    keep.add(task)
    task.add_done_callback(keep.discard)
    return task


async def see_through(work: Coroutine[Any, Any, Any]) -> Ended:
    """Run the work as a task of its own and wait for its end, also through cancellations; never raises.

    anyio's shield alone is cut through by a native `task.cancel()` and by `asyncio.wait_for`; a loop that only
    catches `CancelledError` is woken again and again by anyio, which repeats its cancellation at every step.
    So both. The work must have its own deadline.
    """
    task = start(work)
    cancelled: asyncio.CancelledError | None = None
    try:
        await _end_of(task)
    except asyncio.CancelledError as error:
        cancelled = error
        with CancelScope(shield=True):
            while not task.done():
                try:
                    await _end_of(task)
                except asyncio.CancelledError:
                    pass  # told once already, and raised by the caller as soon as the request has ended
    if task.cancelled():  # the loop is shutting down: nobody knows whether the request arrived
        return Ended(None, asyncio.CancelledError("the event loop is closing"), cancelled)
    failure = task.exception()
    return Ended(None if failure else task.result(), failure, cancelled)


async def _end_of(task: asyncio.Task[Any]) -> None:
    # asyncio.wait for one task, at a third of its cost.
    ended = asyncio.get_running_loop().create_future()

    def tell(_: object) -> None:
        if not ended.done():
            ended.set_result(None)

    task.add_done_callback(tell)
    try:
        await ended
    finally:
        task.remove_done_callback(tell)
