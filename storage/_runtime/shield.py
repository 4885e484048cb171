"""Work that a cancelled caller still sees to its end."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` as a task of its own and wait until it is done, however often the caller is cancelled.

    A cancellation is raised again afterwards; the task's own result or error is lost to it then. An
    `asyncio.shield` alone would let the caller go at once, and anyio's shielded scope gives way to a second
    `task.cancel()` and to `asyncio.wait_for`. `work` must bring its own deadline.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is None:
        return task.result()
    if not task.cancelled():
        task.exception()  # looked at, so that asyncio does not report it as lost
    raise cancelled
