"""Single-flight: within one engine, a key has one run that leads and any number of runs that wait for its record.

The room of SERIALIZABLE calls. Only the leader looks the record up and talks to the lock manager; the others
hold one future each, no thread, no slot, no connection. When the leader commits, all are served by its record;
when it fails or is cancelled, the next one in line leads. Nothing here awaits anything but a waiter's own future.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from ..locking import LockTimeoutError
from ._context import Run
from ._errors import DeadlockError
from ._steps import Where

if TYPE_CHECKING:
    from ._transaction import transaction


class Served(NamedTuple):
    """A committed (or, within its transaction, staged) record: each call of `value` gives a value of its own."""

    value: Callable[[], Any]
    run_id: str
    created: float


class Lead(NamedTuple):
    """It is this run's turn."""

    flight: Flight


REENTRANT = object()
"""The key is led by an ancestor of the run, or held by its transaction: it need not wait for itself."""


class Flight:
    """One key that somebody leads. `leader` is a run, or the transaction that keeps the key until its outcome."""

    __slots__ = ("leader", "manager", "waiters", "where")

    def __init__(self, where: Where, leader: Any) -> None:
        self.where = where
        self.leader = leader
        # In order of arrival; an OrderedDict, because a cancelled waiter leaves from the middle.
        self.waiters: OrderedDict[asyncio.Future[Any], Run | transaction] = OrderedDict()


class Room:
    """All flights of an engine."""

    def __init__(self) -> None:
        self._flights: dict[Where, Flight] = {}

    def __len__(self) -> int:
        return len(self._flights)

    async def enter(
        self, where: Where, run: Run | transaction, timeout: float | None
    ) -> Lead | Served | object:
        """Lead at once, or wait in line: `Lead`, the leader's record, or REENTRANT.

        Cancelled, it leaves the line, and passes the lead on if it had just been chosen.

        Raises:
            DeadlockError: The leader waits, directly or through others, for this run.
            LockTimeoutError: Nobody was done within `timeout` seconds.
        """
        flight = self._flights.get(where)
        if flight is None:
            flight = self._flights[where] = Flight(where, run)
            return Lead(flight)
        line = list(lineage(run))
        if any(each is flight.leader for each in line):
            return REENTRANT
        refuse_cycle(flight, line)
        return await self._wait(flight, run, line, timeout)

    async def _wait(
        self, flight: Flight, run: Run | transaction, line: list[Any], timeout: float | None
    ) -> Lead | Served:
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[Lead | Served | None] = loop.create_future()
        flight.waiters[waiter] = run
        run.begin_waiting()
        leading = [each for each in line if each.leads]
        for each in leading:
            each.blocked_on.append(flight)
        timer = None if timeout is None else loop.call_later(timeout, _expire, waiter)
        try:
            outcome = await waiter
        except BaseException:
            if waiter.done() and not waiter.cancelled() and isinstance(waiter.result(), Lead):
                self.finish(flight, None)  # chosen and cancelled in one step: the next one's turn
            raise
        finally:
            flight.waiters.pop(waiter, None)
            for each in leading:
                each.blocked_on.remove(flight)
            if timer is not None:
                timer.cancel()
        if outcome is None:
            assert timeout is not None
            raise LockTimeoutError(flight.where[1], run.name, flight.where[0], timeout)
        return outcome

    def serve(self, flight: Flight, served: Served, whom: Callable[[Any], bool] | None = None) -> None:
        """Give the record to all waiters, or to those within the transaction that staged it."""
        for waiter, run in list(flight.waiters.items()):
            if whom is None or whom(run):
                flight.waiters.pop(waiter, None)
                if not waiter.done():
                    waiter.set_result(served)

    def finish(self, flight: Flight, served: Served | None) -> None:
        """The leader is done: serve everybody, or let the next one in line lead."""
        if served is not None:
            self.serve(flight, served)
        while flight.waiters:
            waiter, run = flight.waiters.popitem(last=False)
            if not waiter.done():
                flight.leader = run
                waiter.set_result(Lead(flight))
                return
        if self._flights.get(flight.where) is flight:
            del self._flights[flight.where]


def _expire(waiter: asyncio.Future[Any]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def lineage(node: Run | transaction | None) -> Iterator[Any]:
    """The run, its transaction and that one's parents, the run that called it, and so on up to the root."""
    while node is not None:
        if isinstance(node, Run):
            yield node
            yield from _blocks(node.transaction)
            node = node.parent
        else:
            yield from _blocks(node)
            node = node.run


def _blocks(txn: transaction | None) -> Iterator[transaction]:
    while txn is not None:
        yield txn
        txn = txn.parent


def refuse_cycle(flight: Flight, line: list[Any]) -> None:
    """Refuse to wait for a leader that waits, directly or through others, for somebody in `line`.

    Raises:
        DeadlockError: Names who waits for whom.
    """
    seen: set[int] = set()

    def search(at: Flight, chain: list[str]) -> None:
        if id(at) in seen:
            return
        seen.add(id(at))
        for next_flight in at.leader.blocked_on:
            link = [*chain, f"{at.leader.name} waits for {next_flight.where[1]!r}"]
            if any(each is next_flight.leader for each in line):
                raise DeadlockError([*link, f"held by {next_flight.leader.name}"])
            search(next_flight, link)

    search(flight, [f"{line[0].name} waits for {flight.where[1]!r}"])
