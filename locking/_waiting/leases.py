"""The managers' common half, below: a lease from the moment that it is granted until nothing is left of it.

What differs between managers is how one request is made: to a dictionary, a file, Redis, a storage. A manager
says so in five methods (`_take`, `_renew`, `_give_back`, `_look`, `_watch`).
"""

from __future__ import annotations

import asyncio
import math
import os
import random
from abc import abstractmethod
from typing import Any
from weakref import WeakSet

from .._clock import now
from .._errors import LockClosedError, LockError
from .._lease import HOLD_OVER, NOT_RENEWED, Lease
from .._manager import LockManager, logger
from .acquisition import PATIENCE, Busy, Claim, check_loop
from .keys import Place, Room
from .shield import Ended, see_through, start

_RENEWALS = 3
"""Renewals per lease, so that two may fail."""

_TRUST = 0.8
"""The part of a lease in which its holder relies on it; the rest is for clocks that run unevenly."""


class LeasingLockManager(LockManager):
    """Grants, renews, ends and cleans up leases. Who gets one is decided above, in `QueuedLockManager`."""

    lease_seconds: float = math.inf
    """How long the server keeps a key for a holder that is no longer heard of; endless where it would know."""

    _suspends = True
    """Whether requests suspend, and so need to be seen through cancellations."""

    def __init__(self, room: Room | None = None) -> None:
        self._room = room or Room()
        self._clock = now
        self._closed = False
        self._tasks: set[asyncio.Task[Any]] = set()  # renewals, and what nobody waits for
        _managers.add(self)

    # What a request is

    async def _prepare(self) -> None:
        """What the first request needs, before the time of the lease begins to run."""

    @abstractmethod
    async def _take(self, claim: Claim) -> Busy | None:
        """Hold the key for the claim and set its token, or say who does. Repeating it does no harm."""

    async def _ask(self, claim: Claim) -> Ended:
        """`_take`, seen through cancellations."""
        return await see_through(self._take(claim))

    async def _renew(self, claim: Claim) -> bool:
        """Extend the lease; False if it is certain that the key belongs to the claim no longer."""
        return True

    @abstractmethod
    async def _give_back(self, claim: Claim) -> None:
        """Free the key if the claim still holds it, or may. Repeating it does no harm."""

    @abstractmethod
    async def _look(self, key: str) -> Busy | None:
        """Who holds the key; None if it is free."""

    async def _release_elsewhere(self, key: str, holder: str) -> bool:
        """Free a key that this holder acquired through another manager, where the server can tell."""
        return False

    async def _watch(self, key: str) -> bool:
        """Have `_freed(key)` called when the key may be free; True if that is so only from now on."""
        return False

    def _forget(self, key: str) -> None:
        """Nobody in this process wants the key any more."""

    async def _close_connections(self) -> None:
        pass

    # Which leases there are

    def _current(self, place: Place) -> Lease | None:
        """The place's lease, unless its time is over. Guarded by the caller."""
        lease = place.lease
        if lease is not None and lease.lost:
            self._expire(lease)
            return place.lease
        return lease

    def _lease_of(self, key: str) -> Lease | None:
        with self._room.guard:
            self._check_open()
            place = self._room.places.get(key)
            return None if place is None else self._current(place)

    def _own_lease(self, key: str, holder: str) -> Lease | None:
        lease = self._lease_of(key)
        # One that is on its way back to the server is no longer the holder's.
        return lease if lease is not None and lease.holder == holder and lease._over is None else None

    def _check_open(self) -> None:
        if self._closed:
            raise LockClosedError(self.url)

    # The beginning

    def _new_lease(self, claim: Claim) -> Lease:
        lease = Lease(
            claim.key,
            claim.holder,
            claim.token,
            self,
            deadline=claim.sent + _TRUST * self.lease_seconds,
            hold_until=claim.hold_until,
            clock=self._clock,
        )
        lease._claim, lease._loop = claim, asyncio.get_running_loop()
        self._plan(lease)
        return lease

    # The middle

    def _plan(self, lease: Lease) -> None:
        """Set the timer for what comes next: a renewal, or the end of the hold_timeout."""
        after = min(lease._hold_until - self._clock(), self.lease_seconds / _RENEWALS)
        loop = lease._loop
        if after != math.inf and loop is not None:
            lease._timer = loop.call_later(after, self._due, lease, loop, loop.time() + after)

    def _due(self, lease: Lease, loop: asyncio.AbstractEventLoop, planned: float) -> None:
        late = loop.time() - planned
        if late > self.lease_seconds * PATIENCE:
            logger.warning(
                "The event loop that renews the lock %r for %r stood still for %.1f s of its %g s: something "
                "blocks it. Move that work to a thread.", lease.key, lease.holder, late, self.lease_seconds,
            )  # fmt: skip
        start(self._keep(lease), self._tasks)

    async def _keep(self, lease: Lease) -> None:
        """Renew once, however many requests that takes, and plan the next time; or notice that it is over."""
        failures = 0
        while lease._reason() is None:
            sent = self._clock()
            try:
                async with asyncio.timeout(lease._deadline - sent):
                    kept = await self._renew(lease._claim)
            except (LockError, TimeoutError) as error:
                failures += 1
                if failures == 1:
                    logger.warning(
                        "The lock %r of %r could not be renewed yet: %s",
                        lease.key, lease.holder, error if isinstance(error, LockError) else NOT_RENEWED,
                    )  # fmt: skip
                left = lease._deadline - self._clock()
                await asyncio.sleep(
                    max(0, min(left, random.uniform(0.1, 0.3) * self.lease_seconds / _RENEWALS))
                )
                continue
            if not kept:
                self._expire(lease, "the key was taken over, or removed from the lock server")
            elif lease._over is None:  # not released meanwhile
                lease._deadline = sent + _TRUST * self.lease_seconds
                self._plan(lease)
            return
        self._expire(lease)

    def _expire(self, lease: Lease, reason: str | None = None) -> None:
        """The lease is over without a release: tell its holder, let the next one try, clean up behind it."""
        reason = reason or lease._reason() or NOT_RENEWED
        if not lease._end(reason):
            return
        if reason != HOLD_OVER:
            logger.warning(
                "%r lost the lock %r (token %d): %s.", lease.holder, lease.key, lease.token, reason
            )
        if not self._suspends:
            self._give_back_now(lease._claim)
        self._vacate(lease)
        if self._suspends:
            start(self._undo(lease._claim), self._tasks)

    def _give_back_now(self, claim: Claim) -> None:
        """`_give_back` of a manager whose requests do not suspend, where nothing can be awaited."""
        try:
            self._give_back(claim).send(None)
        except StopIteration:
            pass

    # The end

    async def _release_lease(self, lease: Lease) -> None:
        """Give the key back to the server, then let the next one in line ask for it."""
        if not lease._end():
            return
        try:
            await self._give_back_surely(lease._claim)
        finally:
            self._vacate(lease)

    async def _give_back_surely(self, claim: Claim) -> None:
        """Unlike an acquire, a release may simply be sent again when the first was cut off on its way."""
        try:
            await self._give_back(claim)
        except asyncio.CancelledError as cancelled:
            ended = await see_through(self._give_back(claim))
            if ended.error is not None:
                logger.warning("%s The key is free when its lease ends.", ended.error)
            raise cancelled

    async def _undo(self, claim: Claim) -> None:
        """The request may have arrived, and nobody wants its fruit."""
        ended = await see_through(self._give_back(claim))
        if ended.error is not None:
            logger.warning("%s Nobody may hold it until its lease ends.", ended.error)

    def _vacate(self, lease: Lease) -> None:
        with self._room.guard:
            place = self._room.places.get(lease.key)
            if place is None or place.lease is not lease:
                return
            place.lease = None
            for watcher in place.watchers.drain():
                watcher.served = True
                watcher.wake()
            self._room.wake_leaders(place)
            self._tidy(lease.key, place)

    def _tidy(self, key: str, place: Place) -> None:
        if self._room.tidy(key, place):
            self._forget(key)

    async def aclose(self) -> None:
        """See `LockManager.aclose`. Who waits gets a LockClosedError."""
        if self._closed:
            return
        check_loop()
        with self._room.guard:
            self._closed = True
            places = list(self._room.places.values())
            for place in places:
                for ticket in (*place.line, *place.watchers):
                    ticket.wake()  # who waits by another manager, which shares the room, only looks again
        for lease in [place.lease for place in places if place.lease is not None]:
            if lease._manager is not self:
                continue  # of another manager that shares the room
            try:
                await self._release_lease(lease)
            except LockError as error:
                logger.warning("%s The key is free when its lease ends.", error)
        here = asyncio.get_running_loop()
        if tasks := [task for task in self._tasks if task.get_loop() is here]:
            await asyncio.wait(tasks)  # they have deadlines
        await self._close_connections()

    def _after_fork(self) -> None:
        """In a forked child: nothing here is its own."""
        for place in self._room.places.values():
            if place.lease is not None:
                place.lease._over = "it belongs to the process that this one was forked from"
        self._room.reset()


_managers: WeakSet[LeasingLockManager] = WeakSet()


def _after_fork() -> None:
    for manager in list(_managers):
        manager._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
