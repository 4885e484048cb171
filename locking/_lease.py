"""What a holder holds: the right to a key, for as long as the lease is neither released nor lost."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ._clock import now
from ._errors import LeaseLostError

if TYPE_CHECKING:
    from ._manager import LockManager

_RELEASED = "it was released"
NOT_RENEWED = "no renewal reached the lock server in time"
_REMOVED = "its lock file was deleted"
HOLD_OVER = "its hold_timeout is over"


class Lease:
    """A key that is held, with a fencing token that grows with each acquisition of the key.

    A lease saves work, it does not guard writes: a process can be stopped between `check()` and the write that
    follows. Commit by a conditional write as well.

    The manager renews the lease in the background while the loop that acquired it runs. It counts as lost when
    the server says so, when `hold_timeout` is over, and, before anybody else can have the key, when for 80 % of
    its time no renewal got through: measured on this machine's own clock, which runs on through suspend. Once
    lost it stays lost.
    """

    __slots__ = (
        "__weakref__", "_callbacks", "_claim", "_clock", "_deadline", "_hold_until", "_loop", "_manager", "_over",
        "_taken", "_timer", "_users", "_wanted", "holder", "key", "token",
    )  # fmt: skip

    def __init__(
        self,
        key: str,
        holder: str,
        token: int,
        manager: LockManager,
        *,
        deadline: float = math.inf,
        hold_until: float = math.inf,
        clock: Callable[[], float] = now,
    ) -> None:
        self.key, self.holder, self.token = key, holder, token
        self._manager = manager
        self._clock = clock
        self._deadline = deadline
        self._hold_until = hold_until
        self._over: str | None = None
        self._callbacks: list[Callable[[str], object]] = []
        # What the manager that renews it needs: the request it came from, and the timer of the next on its loop.
        self._claim: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        # Acquires that will return it, and whether one did: while none has, a cancellation may leave it to nobody.
        self._wanted, self._taken = 0, False
        self._users = 0  # how many `async with manager.lock()` are inside

    @property
    def _ends(self) -> float:
        """When it is over unless it is renewed, by the manager's clock."""
        return min(self._deadline, self._hold_until)

    @property
    def expires_at(self) -> float | None:
        """When it ends unless it is renewed, as Unix time in seconds; None if only a release ends it.

        For people: the wall clock decides nothing.
        """
        return None if self._ends == math.inf else time.time() + self._ends - self._clock()

    @property
    def lost(self) -> bool:
        """Whether the key may belong to somebody else by now, though it was not released. Costs no request."""
        return self._reason() not in (None, _RELEASED)

    def check(self) -> None:
        """Do nothing while the key is held.

        Raises:
            LeaseLostError: It is lost, or released.
        """
        reason = self._reason()
        if reason is not None:
            raise LeaseLostError(self.key, self.holder, self.token, reason)

    async def wait_lost(self) -> str:
        """The reason, once the lease is lost. Of a lease that was released in good order there is none: cancel.

        Cancelling it leaves nothing behind.
        """
        loop = asyncio.get_running_loop()
        lost: asyncio.Future[str] = loop.create_future()

        def settle(reason: str) -> None:
            if not lost.done():
                lost.set_result(reason)

        def tell(reason: str) -> None:
            try:
                loop.call_soon_threadsafe(settle, reason)
            except RuntimeError:
                pass  # the loop that waited is closed

        self.on_lost(tell)
        try:
            return await lost
        finally:
            if tell in self._callbacks:
                self._callbacks.remove(tell)

    def on_lost(self, callback: Callable[[str], object]) -> None:
        """Call it once with the reason when the lease is lost; at once if it is already.

        It is called on the loop that acquired the lease, or in the thread that noticed, and must not block.
        """
        reason = self._reason()
        if reason is None or reason == _RELEASED:
            self._callbacks.append(callback)
        else:
            callback(reason)

    async def release(self) -> None:
        """Free the key if this lease still holds it; else nothing. Idempotent, never disturbs a later holder.

        Cancelled, it still frees the key before it raises. If the server cannot be reached, the key is free
        when the lease ends.
        """
        await self._manager._release_lease(self)

    def _reason(self) -> str | None:
        if self._over is not None:
            return self._over
        time = self._clock()
        if time >= self._hold_until:
            return HOLD_OVER
        if time >= self._deadline:
            return NOT_RENEWED
        return None if self._manager._is_kept(self) else _REMOVED

    def _end(self, reason: str = _RELEASED) -> bool:
        """Whether it was this call that ended the lease."""
        if self._over is not None:
            return False
        self._over = reason
        self._stop()
        callbacks, self._callbacks = self._callbacks, []
        if reason != _RELEASED:
            for callback in callbacks:
                callback(reason)
        return True

    def _stop(self) -> None:
        """Cancel the timer, from any thread."""
        timer, loop, self._timer = self._timer, self._loop, None
        if timer is None or loop is None:
            return
        if asyncio._get_running_loop() is loop:
            timer.cancel()
            return
        try:
            loop.call_soon_threadsafe(timer.cancel)
        except RuntimeError:
            pass  # the loop is closed, and its timers with it

    def __repr__(self) -> str:
        state = self._reason() or "held"
        return f"Lease(key={self.key!r}, holder={self.holder!r}, token={self.token}, {state})"
