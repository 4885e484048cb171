"""The managers' common half: the line within the process, leases and their renewal, cancellation.

What differs is how one request is made: to a dictionary, a file, Redis, a storage. A manager says so in five
methods (`_take`, `_renew`, `_give_back`, `_look`, `_watch`); only the first in line ever calls them for a key.
"""

from __future__ import annotations

import asyncio
import copy
import math
import os
import random
from abc import abstractmethod
from collections.abc import Coroutine
from typing import Any, NamedTuple
from weakref import WeakSet

from ._clock import now
from ._errors import (
    LockClosedError,
    LockConfigurationError,
    LockNotHeldError,
    LockUnavailableError,
)
from ._lease import _HOLD_OVER, _NOT_RENEWED, Lease
from ._manager import LockManager, logger
from ._owned import Ended, see_through, start
from ._room import Place, Room, Ticket

_RENEWALS = 3
"""Renewals per lease, so that two may fail."""

_TRUST = 0.8
"""The part of a lease in which its holder relies on it; the rest is for clocks that run unevenly."""

_PATIENCE = 1 / 6
"""The part of a lease that one request may take, so that several fit between two renewals."""


class Claim:
    """One acquisition as the lock server knows it, from before the request until it is given back."""

    __slots__ = ("handle", "hold_until", "holder", "key", "nonce", "sent", "token")

    def __init__(self, key: str, holder: str, sent: float, hold_until: float) -> None:
        self.key, self.holder, self.sent, self.hold_until = key, holder, sent, hold_until
        self.nonce = ""  # set by the managers that tell their own writes from others' by it
        self.token = 0
        self.handle: Any = None


class Busy(NamedTuple):
    """Somebody else holds the key; look again after so many seconds at the latest."""

    owner: str | None
    look_again: float


class QueuedLockManager(LockManager):
    """A lock manager over any lock server: see the module."""

    lease_seconds: float | None = None
    """How long the server keeps a key for a holder that is no longer heard of; None where it knows."""

    _suspends = True
    """Whether requests suspend, and so need to be seen through cancellations."""

    def __init__(self, room: Room | None = None) -> None:
        self._room = room or Room()
        self._clock = now
        self._closed = False
        self._tasks: set[asyncio.Task[Any]] = set()  # renewals, and what nobody waits for
        _managers.add(self)

    # What a request is

    @abstractmethod
    async def _take(self, claim: Claim) -> Busy | None:
        """Hold the key for the claim and set its token, or say who does. Repeating it does no harm."""

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

    # Acquire

    async def acquire(
        self, key: str, holder: str, timeout: float | None = None, hold_timeout: float | None = None
    ) -> Lease | None:
        """See `LockManager.acquire`."""
        _check(key, holder, timeout, hold_timeout)
        ticket = Ticket(holder)
        deadline = None if timeout is None else ticket.loop.time() + timeout
        room = self._room
        with room.guard:
            lease = self._own_lease(key, holder)
            if lease is not None:
                return lease
            place = room.place(key)
            place.line.join(holder, ticket)
        watched = False
        try:
            while True:
                ticket.nudged = False
                lease, my_turn, look_at = self._standing(key, place, ticket)
                if lease is not None:
                    return lease
                if my_turn:
                    outcome = await self._attempt(place, ticket, key, hold_timeout)
                    if isinstance(outcome, Lease):
                        return outcome
                    if not watched and timeout != 0:
                        watched = True
                        if await self._watch(key):
                            continue  # it may have become free in between
                    look_at = ticket.loop.time() + outcome.look_again
                if deadline is not None:
                    if ticket.loop.time() >= deadline:
                        return None
                    look_at = min(look_at, deadline)
                await ticket.wait(None if look_at == math.inf else look_at)
        except LockUnavailableError as error:
            self._fail_all(place, error, but=ticket)
            raise
        finally:
            self._leave(key, place, ticket)

    def _standing(self, key: str, place: Place, ticket: Ticket) -> tuple[Lease | None, bool, float]:
        """The ticket's lease, whether it may make a request, and when it must look again (loop time)."""
        with self._room.guard:
            if ticket.lease is not None:
                return ticket.lease, False, 0
            if self._closed:
                raise LockClosedError(self.url)
            if ticket.error is not None:
                raise ticket.error
            if not place.line.leads(ticket):
                return None, False, math.inf
            lease = self._current(place)
            if lease is None:
                return None, True, math.inf
            # The holder's own loop ends a hold_timeout; that of the first waiter too, should the other stand still.
            return None, False, ticket.loop.time() + lease._hold_until - self._clock()

    async def _attempt(
        self, place: Place, ticket: Ticket, key: str, hold_timeout: float | None
    ) -> Lease | Busy:
        sent = self._clock()
        assert ticket.holder is not None
        claim = Claim(key, ticket.holder, sent, math.inf if hold_timeout is None else sent + hold_timeout)
        if not self._suspends:
            busy = await self._take(claim)
            return busy or self._granted(place, ticket, claim)
        ended = await see_through(self._take(claim))
        if ended.error is None and ended.value is None:
            lease = self._granted(place, ticket, claim)
            if ended.cancelled is not None and not ticket.served and lease._end():
                await self._undo(claim)
                self._vacate(lease)
        elif ended.error is not None and (ended.cancelled or not isinstance(ended.error, Exception)):
            start(
                self._undo(claim), self._tasks
            )  # not awaited: the server that did not answer may not do so now either
        result: Busy | None = ended.get()
        return result or lease

    async def _undo(self, claim: Claim) -> None:
        """The request may have arrived, and nobody wants its fruit."""
        ended = await see_through(self._give_back(claim))
        if ended.error is not None:
            logger.warning(
                "The lock %r in %s may be held by nobody until its lease ends: %s",
                claim.key,
                self.url,
                ended.error,
            )

    def _granted(self, place: Place, ticket: Ticket, claim: Claim) -> Lease:
        seconds = self.lease_seconds
        lease = Lease(
            claim.key,
            claim.holder,
            claim.token,
            self,
            deadline=math.inf if seconds is None else claim.sent + _TRUST * seconds,
            hold_until=claim.hold_until,
            clock=self._clock,
        )
        lease._claim, lease._loop = claim, ticket.loop
        self._plan(lease)
        with self._room.guard:
            place.lease = lease
            for other in place.line.serve(claim.holder):
                other.lease = lease
                if other is not ticket and other.wake():
                    ticket.served = (
                        True  # by this request, others too: a cancellation of the one leaves it to them
                    )
            if claim.hold_until != math.inf:
                self._room.wake_leaders(place)  # the next one wants to know when to look
        return lease

    def _leave(self, key: str, place: Place, ticket: Ticket) -> None:
        with self._room.guard:
            if place.line.leave(ticket.holder, ticket) is not None:
                self._room.wake_leaders(place)
            self._tidy(key, place)

    def _fail_all(self, place: Place, error: LockUnavailableError, but: Ticket) -> None:
        """The server is gone: that is true for all who wait, so that none has to find out for itself in turn."""
        with self._room.guard:
            for ticket in (*place.line.drain(), *place.watchers.drain()):
                if ticket is not but:
                    ticket.error = copy.copy(error)
                    ticket.wake()

    # Release

    async def release(self, key: str, holder: str) -> None:
        """See `LockManager.release`."""
        _check(key, holder)
        lease = self._own_lease(key, holder)
        if lease is not None and lease._end():
            await self._release(lease)
            return
        held = lease or self._lease_of(key)
        if held is None:
            if (await self._request(self._release_elsewhere(key, holder))).get():
                return
            busy = await self._look(key)
            raise LockNotHeldError(key, holder, self.url, busy and (busy.owner or "somebody else"))
        raise LockNotHeldError(key, holder, self.url, None if held is lease else held.holder)

    async def _release_lease(self, lease: Lease) -> None:
        if lease._end():
            await self._release(lease)

    async def _release(self, lease: Lease) -> None:
        """Give the key back to the server, then let the next one in line ask for it."""
        try:
            (await self._request(self._give_back(lease._claim))).get()
        finally:
            self._vacate(lease)

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

    async def _request(self, work: Coroutine[Any, Any, Any]) -> Ended:
        if self._suspends:
            return await see_through(work)
        try:
            return Ended(await work, None, None)
        except Exception as error:  # noqa: BLE001 - raised by Ended.get
            return Ended(None, error, None)

    # Look

    async def is_locked(self, key: str) -> bool:
        """See `LockManager.is_locked`. One request, unless this process holds it."""
        _check(key)
        return self._lease_of(key) is not None or await self._look(key) is not None

    async def is_held_by(self, key: str, holder: str) -> bool:
        """See `LockManager.is_held_by`. One request, unless this process holds it."""
        _check(key, holder)
        lease = self._lease_of(key)
        if lease is not None:
            return lease.holder == holder
        busy = await self._look(key)
        return busy is not None and busy.owner == holder

    async def wait_until_free(self, key: str, timeout: float | None = None) -> bool:
        """See `LockManager.wait_until_free`. However many wait in a process, one of them looks."""
        _check(key, timeout=timeout)
        ticket = Ticket(None)
        deadline = None if timeout is None else ticket.loop.time() + timeout
        with self._room.guard:
            place = self._room.place(key)
            place.watchers.join(ticket, ticket)
        try:
            while not ticket.served:
                ticket.nudged = False
                look_at = await self._watch_for(key, place, ticket, wait=timeout != 0)
                if deadline is not None:
                    if ticket.loop.time() >= deadline:
                        break
                    look_at = min(look_at, deadline)
                if not ticket.served:
                    await ticket.wait(None if look_at == math.inf else look_at)
            return ticket.served
        finally:
            with self._room.guard:
                if place.watchers.leave(ticket, ticket) is not None:
                    self._room.wake_leaders(place)
                self._tidy(key, place)

    async def _watch_for(self, key: str, place: Place, ticket: Ticket, wait: bool) -> float:
        """One look of a watcher; when it must look again (loop time)."""
        with self._room.guard:
            if self._closed:
                raise LockClosedError(self.url)
            if ticket.error is not None:
                raise ticket.error
            if not place.watchers.leads(ticket):
                return math.inf
            lease = self._current(place)
        if ticket.served:
            return math.inf
        if lease is not None:
            return ticket.loop.time() + lease._hold_until - self._clock()
        busy = await self._look(key)
        if busy is not None and wait and await self._watch(key):
            busy = await self._look(key)
        if busy is not None:
            return ticket.loop.time() + busy.look_again
        with self._room.guard:
            for watcher in place.watchers.drain():
                watcher.served = True
                if watcher is not ticket:
                    watcher.wake()
        return math.inf

    def _freed(self, key: str) -> None:
        """The lock server says that the key may be free: let the first in line look. From any thread."""
        with self._room.guard:
            place = self._room.places.get(key)
            if place is not None:
                self._room.wake_leaders(place)

    # The lease that this process holds

    def _lease_of(self, key: str) -> Lease | None:
        with self._room.guard:
            if self._closed:
                raise LockClosedError(self.url)
            place = self._room.places.get(key)
            return None if place is None else self._current(place)

    def _own_lease(self, key: str, holder: str) -> Lease | None:
        lease = self._lease_of(key)
        return lease if lease is not None and lease.holder == holder else None

    def _current(self, place: Place) -> Lease | None:
        """The place's lease, unless its time is over. Guarded by the caller."""
        if self._closed:
            raise LockClosedError(self.url)
        lease = place.lease
        if lease is not None and lease.lost:
            self._expire(lease)
            return place.lease
        return lease

    def _plan(self, lease: Lease) -> None:
        """Set the timer for what comes next: a renewal, or the end of the hold_timeout."""
        after = lease._hold_until - self._clock()
        if self.lease_seconds is not None:
            after = min(after, self.lease_seconds / _RENEWALS)
        loop = lease._loop
        if after != math.inf and loop is not None:
            lease._timer = loop.call_later(after, self._due, lease, loop, loop.time() + after)

    def _due(self, lease: Lease, loop: asyncio.AbstractEventLoop, planned: float) -> None:
        late = loop.time() - planned
        if self.lease_seconds is not None and late > self.lease_seconds * _PATIENCE:
            logger.warning(
                "The event loop that renews the lock %r for %r stood still for %.1f s of its %g s: something "
                "blocks it. Move that work to a thread.", lease.key, lease.holder, late, self.lease_seconds,
            )  # fmt: skip
        if lease.lost:
            self._expire(lease)
        elif self._clock() >= lease._hold_until - 0.001:  # timers may fire a moment early
            self._expire(lease, _HOLD_OVER)
        elif lease._over is None:
            start(self._keep(lease), self._tasks)

    async def _keep(self, lease: Lease) -> None:
        """Renew once, however many requests that takes, and plan the next time; or notice that it is over."""
        failures = 0
        while lease._reason() is None:
            sent = self._clock()
            try:
                async with asyncio.timeout(lease._deadline - sent):
                    kept = await self._renew(lease._claim)
            except (LockUnavailableError, TimeoutError) as error:
                failures += 1
                if failures == 1:
                    logger.warning(
                        "The lock %r of %r could not be renewed yet: %s", lease.key, lease.holder, error
                    )
                left = lease._deadline - self._clock()
                await asyncio.sleep(
                    max(0, min(left, random.uniform(0.1, 0.3) * (self.lease_seconds or 1) / _RENEWALS))
                )
                continue
            if not kept:
                self._expire(lease, "the key was taken over, or removed from the lock server")
            elif lease._over is None and self.lease_seconds is not None:  # not released meanwhile
                lease._deadline = sent + _TRUST * self.lease_seconds
                self._plan(lease)
            return
        self._expire(lease)

    def _expire(self, lease: Lease, reason: str | None = None) -> None:
        """The lease is over without a release: tell its holder, let the next one try, clean up behind it."""
        reason = reason or lease._reason() or _NOT_RENEWED
        if not lease._end(reason):
            return
        if reason != _HOLD_OVER:
            logger.warning(
                "%r lost the lock %r (token %d): %s.", lease.holder, lease.key, lease.token, reason
            )
        if not self._suspends:
            self._give_back_now(lease._claim)
        self._vacate(lease)
        if self._suspends:
            self._undo_on(asyncio._get_running_loop() or lease._loop, lease._claim)

    def _give_back_now(self, claim: Claim) -> None:
        """`_give_back` of a manager whose requests do not suspend, where nothing can be awaited."""
        try:
            self._give_back(claim).send(None)
        except StopIteration:
            pass

    # Ends

    async def aclose(self) -> None:
        """See `LockManager.aclose`. Who waits gets a LockClosedError."""
        if self._closed:
            return
        with self._room.guard:
            self._closed = True
            for place in list(self._room.places.values()):
                for ticket in (*place.line.drain(), *place.watchers.drain()):
                    ticket.wake()
            leases = [place.lease for place in self._room.places.values() if place.lease is not None]
        for lease in leases:
            if lease._manager is not self:
                continue  # of another manager that shares the room
            try:
                await self._release_lease(lease)
            except LockUnavailableError as error:
                logger.warning("%s The key is free when its lease ends.", error)
        here = asyncio.get_running_loop()
        if tasks := [task for task in self._tasks if task.get_loop() is here]:
            await asyncio.wait(tasks)  # they have deadlines
        await self._close_connections()

    def _undo_on(self, loop: asyncio.AbstractEventLoop | None, claim: Claim) -> None:
        """Undo on a loop, from any thread; if it is closed, the end of the lease does it."""
        if loop is not None and asyncio._get_running_loop() is loop:
            start(self._undo(claim), self._tasks)
        elif loop is not None:
            try:
                loop.call_soon_threadsafe(lambda: start(self._undo(claim), self._tasks))
            except RuntimeError:
                pass

    def _tidy(self, key: str, place: Place) -> None:
        if self._room.tidy(key, place):
            self._forget(key)

    def _after_fork(self) -> None:
        """In a forked child: nothing here is its own."""
        for place in self._room.places.values():
            if place.lease is not None:
                place.lease._over = "it belongs to the process that this one was forked from"
        self._room.reset()


def checked_lease(seconds: float) -> float:
    """The lease, if one can work with it.

    Raises:
        LockConfigurationError: It is not a positive number of seconds.
    """
    if not 0 < seconds < math.inf:
        raise LockConfigurationError(f"A lease of {seconds!r} s cannot work.", "Give 5 or more seconds.")
    return float(seconds)


def patience(lease_seconds: float) -> float:
    """Seconds for one request: several must fit into a lease, and a short lease must still allow one."""
    return min(max(_PATIENCE * lease_seconds, 1.0), lease_seconds / 2)


def _check(
    key: str, holder: str | None = "-", timeout: float | None = None, hold_timeout: float | None = None
) -> None:
    for name, text in (("key", key), ("holder", holder)):
        if not isinstance(text, str):
            raise TypeError(f"The {name} of a lock must be a str, not {type(text).__name__} ({text!r}).")
        if not text:
            raise LockConfigurationError(
                f"The {name} of a lock is empty.", "Give it a name, such as 'report'."
            )
    if timeout is not None and not timeout >= 0:
        raise LockConfigurationError(
            f"timeout is {timeout!r} s.", "Give 0 to try once, None to wait for ever."
        )
    if hold_timeout is not None and not hold_timeout > 0:
        raise LockConfigurationError(
            f"hold_timeout is {hold_timeout!r} s.", "Give None to hold until released."
        )


_managers: WeakSet[QueuedLockManager] = WeakSet()


def _after_fork() -> None:
    for manager in list(_managers):
        manager._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
