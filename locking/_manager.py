"""The one interface of every lock manager."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, Self

from ..storage._runtime.random import nonce
from ._errors import LockError, LockNotHeldError, LockTimeoutError
from ._lease import Lease

logger = logging.getLogger("onceflow.locking")


class LockManager(ABC):
    """One holder at a time for a key, among all who use the same lock server, folder or bucket.

    A key is any non-empty text; `/`, `..`, odd characters and any length map to one safe, unique name. A holder
    is any non-empty text: whoever names the same holder is the same holder.

    Managers are cheap to make and open nothing before first use, serve several event loops and threads at once,
    and pickle (their configuration only). Within a process whoever came first for a key gets it first; a waiter
    holds no thread and no connection.

    After a fork the child holds nothing; the parent is not disturbed.
    """

    @property
    @abstractmethod
    def url(self) -> str:
        """The URL that `lock_manager_from_url` makes an equal manager from. Free of credentials."""

    @abstractmethod
    async def acquire(
        self, key: str, holder: str, timeout: float | None = None, hold_timeout: float | None = None
    ) -> Lease | None:
        """Wait for the key and hold it; None if `timeout` seconds passed in vain.

        The holder acquiring again gets the lease that it has, and one release suffices. Cancelled at any point,
        it leaves nothing held: a request that may have arrived is awaited and undone before the cancellation
        goes on.

        Args:
            key: What to hold.
            holder: Who holds it.
            timeout: Seconds to wait; 0 only tries, None waits for ever. A request under way is not cut short,
                it has a deadline of its own.
            hold_timeout: Seconds after which the key is free again without a release; None for never.

        Raises:
            LockUnavailableError: Where the locks are kept does not answer.
        """

    @abstractmethod
    async def release(self, key: str, holder: str) -> None:
        """Free the key and wake who waits for it. Cancelled, it still does so before it raises.

        Raises:
            LockNotHeldError: `holder` does not hold the key. Whoever does is not disturbed.
            LockUnavailableError: No answer; the key is free when the lease ends.
        """

    @abstractmethod
    async def is_locked(self, key: str) -> bool:
        """Whether anybody holds the key now."""

    @abstractmethod
    async def is_held_by(self, key: str, holder: str) -> bool:
        """Whether this very holder holds the key now."""

    @abstractmethod
    async def wait_until_free(self, key: str, timeout: float | None = None) -> bool:
        """Wait until nobody holds the key, without taking it; False if `timeout` seconds passed in vain.

        Cancelling it leaves nothing behind.
        """

    def lock(
        self,
        key: str,
        holder: str | None = None,
        timeout: float | None = None,
        hold_timeout: float | None = None,
    ) -> Locked:
        """`async with manager.lock(key) as lease`: hold the key for the block, whatever ends it.

        Without a holder each block is one of its own, also where several tasks share what this returns. With
        one, blocks may nest and overlap: the last to end frees the key, and none does if the holder had it by
        `acquire`.

        Raises:
            LockTimeoutError: The key was not free within `timeout` seconds; it names who holds it.
        """
        return Locked(self, key, holder, timeout, hold_timeout)

    async def aclose(self) -> None:  # noqa: B027 - a manager without connections has nothing to do
        """Refuse further use, free what is held through this manager, close its connections. Idempotent."""

    def _own_lease(self, key: str, holder: str) -> Lease | None:
        """The holder's lease if this process knows of it, without a request."""
        return None

    def _is_kept(self, lease: Lease) -> bool:
        """Whether the lease still is what others find, where this machine can tell without a request."""
        return True

    async def _owner_of(self, key: str) -> str | None:
        """Who holds the key, for people; None if nobody does or that cannot be told. At most one request."""
        return None

    async def _release_lease(self, lease: Lease) -> None:
        try:
            await self.release(lease.key, lease.holder)
        except LockNotHeldError:
            pass  # the lease is over, which is what was asked for

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"


class Locked:
    """The block of `LockManager.lock`: enters with the lease, leaves without it. May be entered again."""

    __slots__ = ("_arguments", "_inside", "_manager")

    def __init__(
        self,
        manager: LockManager,
        key: str,
        holder: str | None,
        timeout: float | None,
        hold_timeout: float | None,
    ) -> None:
        self._manager = manager
        self._arguments = (key, holder, timeout, hold_timeout)
        # Which lease each task is inside with, and whether leaving it counts.
        self._inside: list[tuple[asyncio.Task[Any] | None, Lease, bool]] = []

    async def __aenter__(self) -> Lease:
        key, holder, timeout, hold_timeout = self._arguments
        if holder is None:
            holder = new_holder()
        had = self._manager._own_lease(key, holder)
        is_counted = had is None or had._users > 0
        lease = await self._manager.acquire(key, holder, timeout, hold_timeout)
        if lease is None:
            owner = await self._manager._owner_of(key)
            raise LockTimeoutError(key, holder, self._manager.url, timeout or 0, owner)
        lease._users += is_counted
        self._inside.append((asyncio.current_task(), lease, is_counted))
        return lease

    async def __aexit__(self, *_: object) -> None:
        here = asyncio.current_task()
        at = next((at for at in reversed(range(len(self._inside))) if self._inside[at][0] is here), -1)
        lease, is_counted = self._inside.pop(at)[1:]
        if not is_counted:
            return
        lease._users -= 1
        if lease._users == 0:
            try:
                await lease.release()
            except LockError as error:
                # What the block did is done; its result or its own error matters more than this.
                logger.warning("%s The key is free when its lease ends.", error)


def new_holder() -> str:
    """A holder that nobody else is."""
    return f"{socket.gethostname()}:{os.getpid()}:{nonce(32)}"
