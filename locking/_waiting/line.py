"""Who is next for a key within one process: decides, never waits, never talks to anybody.

trio's ParkingLot and asyncio.Lock keep a deque of waiters and hand the lock to the first; a waiter that is
cancelled after it was chosen must then remember to pass it on, which both got wrong once. Here being chosen is
no message that can be lost but a place: whoever stands first leads, and leaving, for whatever reason, makes the
next one the first. The caller only nudges those whom these methods return.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class Line(Generic[T]):
    """First come, first served. Tickets of one holder stand together, where the first of them came.

    Not thread-safe: the owner guards it. Every method costs O(1), but for tickets that share a holder.
    """

    __slots__ = ("_parties",)

    def __init__(self) -> None:
        # An OrderedDict, since a plain dict looks for its first item through all that were removed before it.
        self._parties: OrderedDict[Hashable, list[T]] = OrderedDict()

    def join(self, holder: Hashable, ticket: T) -> bool:
        """Stand in line; whether the ticket leads, which it does if nobody is there."""
        party = self._parties.get(holder)
        if party is not None:
            party.append(ticket)
            return False
        self._parties[holder] = [ticket]
        return len(self._parties) == 1

    def leave(self, holder: Hashable, ticket: T) -> T | None:
        """Go away: served, cancelled, failed or out of time. Returns who leads now, if that is news.

        Leaving twice, or without having joined, does nothing.
        """
        party = self._parties.get(holder)
        if party is None or ticket not in party:
            return None
        led = self.leads(ticket)
        party.remove(ticket)
        if not party:
            del self._parties[holder]
        return self.leader if led else None

    def serve(self, holder: Hashable) -> list[T]:
        """Take all tickets of the holder out of the line: it has what they wait for."""
        return self._parties.pop(holder, [])

    def drain(self) -> list[T]:
        """Take everybody out of the line, in order."""
        tickets = list(self)
        self._parties.clear()
        return tickets

    def __iter__(self) -> Iterator[T]:
        """Everybody, in order."""
        return iter([ticket for party in self._parties.values() for ticket in party])

    def leads(self, ticket: T) -> bool:
        """Whether it is this ticket's turn."""
        return self.leader is ticket

    @property
    def leader(self) -> T | None:
        """Whose turn it is; None if nobody stands here."""
        for party in self._parties.values():
            return party[0]
        return None

    def __len__(self) -> int:
        """Holders in line."""
        return len(self._parties)
