"""Holding a key: the in-process room first, then the lock manager, and the version that a commit must replace."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..locking import Lease, LockManager, LockTimeoutError, LockUnavailableError
from ._errors import ConfigurationError
from ._flights import Flight, Lead
from ._logging import logger
from ._policies import IsolationLevel
from ._records import Hit

if TYPE_CHECKING:
    from ._context import FlowRun, TaskRun
    from ._policies import CachePolicy
    from ._transaction import transaction


class Held:
    """A key that a run, or the transaction that it belongs to, holds until the outcome."""

    __slots__ = ("_lease", "flight")

    def __init__(self, flight: Flight, lease: Lease) -> None:
        self.flight = flight
        self._lease = lease

    @property
    def lost(self) -> bool:
        return self._lease.lost

    @property
    def token(self) -> int | None:
        return self._lease.token

    async def settle(self, expect: str | None) -> str | None:
        """The version that the commit replaces: what was seen when the key was looked up under the lock."""
        return expect

    async def release(self, *, committed: bool = False) -> None:
        """Free the key; where the lock server cannot be reached, its lease ends by itself."""
        try:
            await self._lease.release()
        except LockUnavailableError as error:
            logger.warning("%s The key is free when its lease ends.", error)


def isolation_of(
    run: TaskRun | FlowRun, policy: CachePolicy | None, txn: transaction | None
) -> tuple[bool, LockManager | None]:
    """Whether the run is SERIALIZABLE, and the lock manager: the policy's, else the open transaction's, else the engine's.

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


async def hold(
    holder: TaskRun | FlowRun | transaction, flight: Flight, manager: LockManager, timeout: float | None
) -> Held:
    """Take the key from the lock manager; a run says Waiting where it is not free at once.

    Raises:
        LockTimeoutError: It was not free within `timeout` seconds.
        LockUnavailableError: The lock server does not answer.
    """
    key = flight.where[1]
    lease = await manager.acquire(key, holder.id, timeout=0)
    if lease is None:
        holder.begin_waiting()
        lease = await manager.acquire(key, holder.id, timeout=timeout)
    if lease is None:
        assert timeout is not None
        raise LockTimeoutError(key, holder.name, manager.url, timeout)
    return Held(flight, lease)


async def open_keyed(txn: transaction, timeout: float | None) -> None:
    """The opening of a keyed transaction: hold its key where it is SERIALIZABLE, and look its record up."""
    engine = txn._engine
    place = txn._place()
    key = txn._own_key()
    if txn.isolation_level is IsolationLevel.SERIALIZABLE and not any(
        held.flight.where[1] == key for held in txn.held
    ):
        assert txn.lock_manager is not None
        found = None if txn.overwrite else await engine.records.lookup(place, key)
        if not isinstance(found, Hit):
            await _hold_for(txn, timeout)
    found = None if txn.overwrite else await engine.records.lookup(place, key)
    if isinstance(found, Hit):
        txn.state = "COMMITTED"
        await txn._release(committed=False)
    elif found is not None:
        txn._expectation = (found.version, bool(txn.held))


async def _hold_for(txn: transaction, timeout: float | None) -> None:
    """Take a keyed transaction's key, in the same room and of the same manager as runs do."""
    engine = txn._engine
    assert txn.lock_manager is not None
    entered = await engine.flights.enter((txn._place().records.url, txn._own_key()), txn, timeout)
    if not isinstance(entered, Lead):
        return  # served by another's commit, or held by this very tree
    try:
        held = await hold(txn, entered.flight, txn.lock_manager, timeout)
    except BaseException:
        engine.flights.finish(entered.flight, None)
        raise
    txn.leads += 1
    txn.held.append(held)
