"""Holding a key: the in-process room first, then the lock manager, and the version that a commit must replace."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

from ...locking import Lease, LockManager, LockTimeoutError
from .._errors import ConfigurationError
from .._keys.policies import IsolationLevel
from .._runs.logging import logger
from .singleflight import Flight, Patience

if TYPE_CHECKING:
    from .._keys.policies import CachePolicy
    from .._runs.run import FlowRun, TaskRun
    from .._transactions.transaction import transaction


class Held:
    """A key that a run, or the transaction that it belongs to, holds until the outcome."""

    __slots__ = ("_is_lent", "flight", "lease", "locks")

    def __init__(self, flight: Flight, lease: Lease, locks: str, *, is_lent: bool = False) -> None:
        self.flight = flight
        flight.held = self
        self.lease = lease
        self.locks = locks
        self._is_lent = is_lent

    @property
    def lost(self) -> bool:
        return self.lease.lost

    @property
    def token(self) -> int | None:
        return self.lease.token

    async def settle(self, expect: str | None) -> str | None:
        """The version that the commit replaces: what was seen when the key was looked up under the lock."""
        return expect

    async def release(self, *, committed: bool = False) -> None:
        """Free the key; where the lock server cannot be reached, its lease ends by itself."""
        if self._is_lent:
            return
        try:
            await self.lease.release()
        except Exception as error:  # a lock manager of the user's own may raise anything
            logger.warning("%s The key is free when its lease ends.", error)


def isolation_of(
    run: TaskRun | FlowRun, policy: CachePolicy | None, txn: transaction | None
) -> tuple[bool, LockManager | None]:
    """Whether the run is SERIALIZABLE, and the lock manager: the policy's, else the transaction's, else the engine's.

    Raises:
        ConfigurationError: SERIALIZABLE, and nobody locks.
    """
    level = policy.isolation_level if policy is not None else None
    if level is None and txn is not None:
        level = txn.isolation_level
    if level is not IsolationLevel.SERIALIZABLE:
        return False, None
    manager = (policy.lock_manager if policy is not None else None) or (
        txn.lock_manager if txn is not None else None
    )
    manager = manager or run.engine.lock_manager
    if manager is None:
        raise ConfigurationError(
            f"{run.name!r} is SERIALIZABLE, but there is no lock manager.",
            "Configure one: policy.configure(lock_manager=…), transaction(lock_manager=…), Engine(lock_manager=…) "
            "or ONCEFLOW_LOCKS.",
        )
    return True, manager


def holder_name(holder: TaskRun | FlowRun | transaction) -> str:
    """What others read who wait for it; no two runs share one."""
    text = f"{holder.name[:100]} in process {os.getpid()} on {socket.gethostname()}, {holder.id}"
    return text.encode(errors="replace").decode()


async def hold(
    holder: TaskRun | FlowRun | transaction, flight: Flight, manager: LockManager, patience: Patience
) -> Held:
    """Take the key from the lock manager; a run says Waiting where it is not free at once.

    Locks are named by the key alone, since one storage may have several URLs. Where a caller holds the same key of
    another storage, the lock is lent by it: it would wait for itself.

    Raises:
        LockTimeoutError: It was not free in time.
        LockUnavailableError: The lock server does not answer.
    """
    key, name = flight.where[1], holder_name(holder)
    lease = await manager.acquire(key, name, timeout=0)
    if lease is None:
        for held in holder.engine.flights.held_above(flight, holder):
            if isinstance(held, Held) and held.locks == manager.url:
                return Held(flight, held.lease, held.locks, is_lent=True)
        holder.begin_waiting()
        lease = await manager.acquire(key, name, timeout=patience.left)
    if lease is None:
        assert patience.seconds is not None
        owner = await manager._owner_of(key)
        raise LockTimeoutError(key, holder.name, manager.url, patience.seconds, owner)
    return Held(flight, lease, manager.url)
