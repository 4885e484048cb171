"""The managers' common half, above: who waits for a key in this process, and who asks the lock server for it.

Only the first in line of a key ever makes a request for it; the others are one future each.
"""

from __future__ import annotations

import copy
import math

from .._errors import LockError, LockNotHeldError, LockUnavailableError
from .._lease import Lease
from .acquisition import Busy, Claim, check
from .keys import Place, Ticket
from .leases import LeasingLockManager
from .report import Telling
from .shield import start


class QueuedLockManager(LeasingLockManager):
    """A lock manager over any lock server, with one line for each key and process."""

    async def acquire(
        self, key: str, holder: str, timeout: float | None = None, hold_timeout: float | None = None
    ) -> Lease | None:
        """See `LockManager.acquire`."""
        check(key, holder, timeout, hold_timeout)
        ticket = Ticket(holder)
        deadline = math.inf if timeout is None else ticket.loop.time() + timeout
        with self._room.guard:
            lease = self._own_lease(key, holder)
            if lease is not None:
                return lease
            place = self._room.place(key)
            place.line.join(holder, ticket)
        watching = timeout == 0  # a try-lock wants no messages
        telling = Telling(ticket.loop.time())
        try:
            while True:
                ticket.nudged = False
                my_turn, look_at, busy = self._standing(place, ticket)
                if my_turn:
                    await self._prepare()
                    busy = await self._attempt(key, place, ticket, hold_timeout)
                    if busy is not None:
                        if not watching:
                            watching = True
                            if await self._watch(key):
                                continue  # it may have become free in between
                        look_at = ticket.loop.time() + busy.look_again
                if ticket.lease is not None:
                    lease = ticket.lease
                    return lease
                now = ticket.loop.time()
                if now >= deadline:
                    return None
                if busy is not None:  # it is the first in line, and speaks for all
                    telling.tell(now, holder, key, self.url, busy.owner, busy.about)
                    look_at = min(look_at, telling.due)
                await ticket.wait(min(look_at, deadline))
        except LockUnavailableError as error:
            self._check_open()  # closing cuts requests off, which says nothing about the server
            if ticket.error is None:
                self._fail_all(place, error)
            raise
        finally:
            self._leave(key, place, ticket)
            if ticket.lease is not None and self._unwanted(ticket.lease, taken=lease is not None):
                await self._undo(ticket.lease._claim)
                self._vacate(ticket.lease)
                if lease is not None:
                    self._check_open()

    def _standing(self, place: Place, ticket: Ticket) -> tuple[bool, float, Busy | None]:
        """Whether the ticket may make a request now, when it must look again (loop time), and who is before it."""
        with self._room.guard:
            self._check_open()
            if ticket.error is not None:
                raise ticket.error
            if not place.line.leads(ticket):
                return False, math.inf, None
            lease = self._current(place)
            if lease is None:
                return True, math.inf, None
            # The holder's own loop ends a lease, and the first waiter's too: the other may stand still, or be gone.
            left = lease._ends - self._clock()
            return False, ticket.loop.time() + left, Busy(lease.holder, left)

    async def _attempt(
        self, key: str, place: Place, ticket: Ticket, hold_timeout: float | None
    ) -> Busy | None:
        """Ask for the key once; if it is granted, all tickets of the holder have the lease."""
        assert ticket.holder is not None
        sent = self._clock()
        claim = Claim(key, ticket.holder, sent, math.inf if hold_timeout is None else sent + hold_timeout)
        if not self._suspends:
            busy = await self._take(claim)
            if busy is None:
                self._grant(place, claim)
            return busy
        ended = await self._ask(claim)
        if ended.error is None and ended.value is None:
            self._grant(place, claim)
        elif ended.error is not None and (ended.cancelled or not isinstance(ended.error, Exception)):
            # Not awaited: the server that did not answer may not do so now either.
            start(self._undo(claim), self._tasks)
        answer: Busy | None = ended.get()
        return answer

    def _grant(self, place: Place, claim: Claim) -> None:
        lease = self._new_lease(claim)
        with self._room.guard:
            place.lease = lease
            tickets = place.line.serve(claim.holder)
            lease._wanted = len(tickets)
            for ticket in tickets:
                ticket.lease = lease
                ticket.wake()
            if claim.hold_until != math.inf:
                self._room.wake_leaders(place)  # the next one wants to know when to look

    def _unwanted(self, lease: Lease, taken: bool) -> bool:
        """Whether the lease has to be undone, as far as a ticket knows whose acquire returns it, or does not.

        It has to if all who were given it were cancelled meanwhile, or the manager was closed.
        """
        with self._room.guard:
            lease._wanted -= 1
            lease._taken = lease._taken or taken
            if lease._wanted > 0 and not self._closed:
                return False  # the others decide
            return (self._closed or not lease._taken) and lease._end()

    def _leave(self, key: str, place: Place, ticket: Ticket) -> None:
        with self._room.guard:
            if place.line.leave(ticket.holder, ticket) is not None:
                self._room.wake_leaders(place)
            self._tidy(key, place)

    def _fail_all(self, place: Place, error: LockUnavailableError) -> None:
        """The server is gone. That is true for all who wait: none has to find out for itself, in its turn."""
        with self._room.guard:
            for ticket in (*place.line.drain(), *place.watchers.drain()):
                ticket.error = copy.copy(error)
                ticket.wake()

    async def release(self, key: str, holder: str) -> None:
        """See `LockManager.release`."""
        check(key, holder)
        lease = self._own_lease(key, holder)
        if lease is not None:
            await lease.release()
            return
        held = self._lease_of(key)
        if held is not None:
            raise LockNotHeldError(key, holder, self.url, None if held.holder == holder else held.holder)
        if not await self._release_elsewhere(key, holder):
            busy = await self._look(key)
            raise LockNotHeldError(key, holder, self.url, busy and (busy.owner or "somebody else"))

    async def is_locked(self, key: str) -> bool:
        """See `LockManager.is_locked`. One request, unless this process holds it."""
        check(key)
        return self._lease_of(key) is not None or await self._look(key) is not None

    async def is_held_by(self, key: str, holder: str) -> bool:
        """See `LockManager.is_held_by`. One request, unless this process holds it."""
        check(key, holder)
        lease = self._lease_of(key)
        if lease is not None:
            return lease.holder == holder
        busy = await self._look(key)
        return busy is not None and busy.owner == holder

    async def _owner_of(self, key: str) -> str | None:
        try:
            lease = self._lease_of(key)
            busy = await self._look(key) if lease is None else None
        except LockError:
            return None  # it is for a message only
        return lease.holder if lease is not None else busy and busy.owner

    async def wait_until_free(self, key: str, timeout: float | None = None) -> bool:
        """See `LockManager.wait_until_free`. However many wait in a process, one of them looks."""
        check(key, timeout=timeout)
        ticket = Ticket(None)
        deadline = math.inf if timeout is None else ticket.loop.time() + timeout
        with self._room.guard:
            self._check_open()
            place = self._room.place(key)
            place.watchers.join(ticket, ticket)
        try:
            while True:
                ticket.nudged = False
                look_at = await self._watch_for(key, place, ticket, wait=timeout != 0)
                if ticket.served or ticket.loop.time() >= deadline:
                    return ticket.served
                await ticket.wait(min(look_at, deadline))
        except LockUnavailableError as error:
            self._check_open()  # closing cuts requests off, which says nothing about the server
            if ticket.error is None:
                self._fail_all(place, error)
            raise
        finally:
            with self._room.guard:
                if place.watchers.leave(ticket, ticket) is not None:
                    self._room.wake_leaders(place)
                self._tidy(key, place)

    async def _watch_for(self, key: str, place: Place, ticket: Ticket, wait: bool) -> float:
        """One look of a watcher; when it must look again (loop time)."""
        with self._room.guard:
            self._check_open()
            if ticket.error is not None:
                raise ticket.error
            lease = self._current(place) if place.watchers.leads(ticket) else None
            if not place.watchers.leads(ticket):
                return math.inf  # another one looks, or this one was served just now
        if lease is not None:
            return ticket.loop.time() + lease._ends - self._clock()
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
