"""Requests that are seen to their end, whatever happens to the one who asked for them."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from typing import Any, NamedTuple, TypeVar

from anyio import CancelScope

T = TypeVar("T")

_EAGER: dict[str, Any] = {"eager_start": True} if sys.version_info >= (3, 12) else {}
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
    """Run the work as a task that is kept (in `keep`) until it ends; from Python 3.12 it begins at once."""
    loop = asyncio.get_running_loop()
    task = asyncio.Task(work, loop=loop, **_EAGER)
    keep.add(task)
    task.add_done_callback(keep.discard)
    return task


async def see_through(work: Coroutine[Any, Any, Any]) -> Ended:
    """Run the work as a task of its own and wait for its end, also through cancellations; never raises.

    anyio's shield alone is cut through by a native `task.cancel()` and by `asyncio.wait_for`; a loop that
    only catches `CancelledError` is woken again and again by anyio, which repeats its cancellation at every
    step. So both. The work must have its own deadline.
    """
    signal: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    task = start(_signalled(work, signal))
    task.add_done_callback(lambda _: _tell(signal))  # also if it is cancelled before it begins
    cancelled: asyncio.CancelledError | None = None
    try:
        await signal
    except asyncio.CancelledError as error:
        cancelled = error
        with CancelScope(shield=True):
            while not task.done():
                try:
                    await asyncio.wait((task,))
                except asyncio.CancelledError:
                    pass  # told once already, and raised by the caller as soon as the request has ended
    if task.cancelled():  # the loop is shutting down: nobody knows whether the request arrived
        return Ended(None, asyncio.CancelledError("the event loop is closing"), cancelled)
    failure = task.exception()
    return Ended(None if failure else task.result(), failure, cancelled)


async def _signalled(work: Coroutine[Any, Any, T], signal: asyncio.Future[None]) -> T:
    # Waiting for the task itself would pass a cancellation on to it, and a callback of it is one turn of the
    # loop later, which is a tenth of a request to a near server.
    try:
        return await work
    finally:
        _tell(signal)


def _tell(signal: asyncio.Future[None]) -> None:
    if not signal.done():
        signal.set_result(None)
