"""What has to happen before an event loop is closed, in order: engines first, then the clients that they use.

A loop has one hook for its end: `loop.shutdown_asyncgens()`, which `asyncio.run`, pytest-asyncio and uvicorn call
before they close it, closes every asynchronous generator that is still suspended. It closes all at once, so one
generator per loop is parked here, and goes through what was registered in its order.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from weakref import WeakKeyDictionary

Closing = Callable[[], Awaitable[None]]
ENGINES, CLIENTS = 0, 1
"""When: engines drain while the clients are still there."""


class _End:
    """What is left to do on one loop."""

    def __init__(self) -> None:
        self.closings: dict[Closing, int] = {}
        self.generator: AsyncGenerator[None, None] | None = None

    async def park(self) -> None:
        self.generator = self._parked()
        await anext(self.generator)

    async def _parked(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            self.generator = None  # it knows its loop, and would keep the key of `_ends` alive
            errors: list[Exception] = []
            while self.closings:
                closing = min(self.closings, key=self.closings.__getitem__)
                del self.closings[closing]
                try:
                    await closing()
                except Exception as error:
                    errors.append(error)  # the others are closed all the same
            if errors:
                raise ExceptionGroup("closing with the event loop", errors)


_ends: WeakKeyDictionary[asyncio.AbstractEventLoop, _End] = WeakKeyDictionary()


async def at_loop_end(closing: Closing, when: int) -> None:
    """Await `closing()` before the running loop is closed, unless it is forgotten before."""
    loop = asyncio.get_running_loop()
    end = _ends.get(loop)
    if end is None:
        end = _ends[loop] = _End()
        end.closings[closing] = when
        await end.park()
        return
    end.closings[closing] = when


def forget(closing: Closing, loop: asyncio.AbstractEventLoop) -> None:
    """It has been closed by other means."""
    end = _ends.get(loop)
    if end is not None:
        end.closings.pop(closing, None)
