"""Where the holders and waiters of one process meet: per key a line, the lease, and those who only watch."""

from __future__ import annotations

import asyncio
import math
import threading

from .._lease import Lease
from .line import Line


class Ticket:
    """One waiting coroutine: a place in a line, and a way to wake it from any thread."""

    __slots__ = ("error", "future", "holder", "lease", "loop", "nudged", "served")

    def __init__(self, holder: str | None) -> None:
        self.holder = holder
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[None] | None = None
        self.nudged = False
        self.served = False
        self.lease: Lease | None = None
        self.error: Exception | None = None

    async def wait(self, until: float) -> None:
        """Until somebody nudges, or the loop's clock says `until`. A nudge that came before is not lost."""
        if self.nudged:
            return
        self.future = self.loop.create_future()
        timer = None if until == math.inf else self.loop.call_at(until, self.nudge)
        try:
            await self.future
        finally:
            if timer is not None:
                timer.cancel()

    def nudge(self) -> None:
        """Let it look again. To be called on its own loop."""
        self.nudged = True
        if self.future is not None and not self.future.done():
            self.future.set_result(None)

    def wake(self) -> bool:
        """Nudge from any thread; False if its loop is closed, so that it never looks again."""
        try:
            if asyncio._get_running_loop() is self.loop:
                self.nudge()
            else:
                self.loop.call_soon_threadsafe(self.nudge)
        except RuntimeError:
            return False
        return True


class Place:
    """What the process knows of one key. Guarded by its room."""

    __slots__ = ("lease", "line", "watchers")

    def __init__(self) -> None:
        self.line: Line[Ticket] = Line()
        self.watchers: Line[Ticket] = Line()
        self.lease: Lease | None = None

    @property
    def empty(self) -> bool:
        return self.lease is None and not self.line and not self.watchers


class Room:
    """The places of all keys that are held or waited for, behind one guard that is held for microseconds."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything; in a forked child, where the guard may be held by a thread that is gone."""
        # Re-entrant, since the garbage collector may finish a dropped waiter in the midst of a guarded line.
        self.guard = threading.RLock()
        self.places: dict[str, Place] = {}

    def place(self, key: str) -> Place:
        """The key's place, made if it is new."""
        place = self.places.get(key)
        if place is None:
            place = self.places[key] = Place()
        return place

    def tidy(self, key: str, place: Place) -> bool:
        """Drop the place if nobody needs it any more; whether that is so."""
        if not place.empty or self.places.get(key) is not place:
            return False
        del self.places[key]
        return True

    def wake_leaders(self, place: Place) -> None:
        """Whoever is first may look again. Those whose loop is closed are taken out of the line."""
        for line in (place.line, place.watchers):
            leader = line.leader
            while leader is not None and not leader.wake():
                leader = line.leave(leader.holder or leader, leader)
