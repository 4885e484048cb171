"""Single-flight: within one engine, a key has one run that leads and any number of runs that wait for its record.

The room of SERIALIZABLE calls. Only the leader looks the record up and talks to the lock manager; the others
hold one future each, no thread, no slot, no connection. When the leader commits, all are served by its record;
when it fails or is cancelled, the next one in line leads. Nothing here awaits anything but a waiter's own future.

Who waits for whom is known at any moment: each wait is noted with the callers of the waiting run and with the
transactions around it (`blocked_on`), for only those may hold keys of their own. A wait that would close a cycle
is refused when it begins, or, where a key passes to a transaction that itself waits, when that happens.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ...locking import LockTimeoutError
from .._commit.requests import Where
from .._errors import ConfigurationError, DeadlockError, EngineClosedError
from .._runs.logging import logger
from .._runs.run import Run

if TYPE_CHECKING:
    from .._transactions.transaction import transaction
    from .claims import Claim
    from .locks import Held


class Served(NamedTuple):
    """A committed (or, within its transaction, staged) record: each call of `value` gives a value of its own.

    `weight` is the number of bytes that have to be decoded for each; 0 where all share one immutable value.
    """

    value: Callable[[], Any]
    run_id: str
    created: float
    weight: int = 0


class Lead(NamedTuple):
    """It is this run's turn."""

    flight: Flight


class Inside(NamedTuple):
    """The key is led by a caller of the run, or held by a transaction around it: it need not wait for itself."""

    flight: Flight


class Flight:
    """One key that somebody leads. `leader` is a run, or the transaction that keeps the key until its outcome."""

    __slots__ = ("held", "leader", "waiters", "where")

    def __init__(self, where: Where, leader: Any) -> None:
        self.where = where
        self.leader = leader
        self.held: Held | Claim | None = None
        """What the leader has taken for it, outside of this process."""
        # In order of arrival; an OrderedDict, because a cancelled waiter leaves from the middle.
        self.waiters: OrderedDict[asyncio.Future[Any], Run | transaction] = OrderedDict()

    def keep(self, txn: transaction, served: Served | None) -> None:
        """From now on the transaction keeps the key. Who waits inside of it is served by what is staged there.

        The others go on waiting, unless the transaction waits for them: they get a DeadlockError.
        """
        self.leader = txn
        for waiter, node in list(self.waiters.items()):
            above = _above(node)
            if txn in above:
                self._settle(waiter, served or Inside(self))
            elif txn.blocked_on:
                try:
                    refuse_cycle(self, node, above)
                except DeadlockError as error:
                    self._settle(waiter, error)

    def _settle(self, waiter: asyncio.Future[Any], outcome: Any) -> None:
        if waiter.done():
            return
        if isinstance(outcome, Exception):
            waiter.set_exception(outcome)
        else:
            waiter.set_result(outcome)


class Patience:
    """How long a run waits for a key in all, in the room and at the lock manager; for ever without `seconds`."""

    __slots__ = ("_ends", "seconds")

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._ends = None if seconds is None else asyncio.get_running_loop().time() + seconds

    @property
    def left(self) -> float | None:
        """Seconds, 0 at the least."""
        return None if self._ends is None else max(0.0, self._ends - asyncio.get_running_loop().time())


ENDLESS = Patience(None)


class Room:
    """All flights of an engine."""

    def __init__(self) -> None:
        self._flights: dict[Where, Flight] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def __len__(self) -> int:
        """How many keys somebody leads."""
        return len(self._flights)

    async def enter(self, where: Where, run: Run | transaction, patience: Patience) -> Lead | Served | Inside:
        """Lead at once, or wait in line for the lead or the leader's record.

        Cancelled, it leaves the line, and passes the lead on if it had just been chosen.

        Raises:
            DeadlockError: The leader waits, directly or through others, for this run.
            LockTimeoutError: The leader was not done in time.
            EngineClosedError: The engine was closed meanwhile.
        """
        self._check_loop()
        flight = self._flights.get(where)
        if flight is None:
            flight = self._flights[where] = Flight(where, run)
            return Lead(flight)
        above = _above(run)
        if flight.leader in above:
            return Inside(flight)
        if flight.leader.blocked_on:
            refuse_cycle(flight, run, above)
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[Lead | Served | Inside | None] = loop.create_future()
        left = patience.left
        timer = None if left is None else loop.call_later(left, _expire, waiter)
        flight.waiters[waiter] = run
        run.begin_waiting()
        for each in above:
            each.blocked_on[flight] = each.blocked_on.get(flight, 0) + 1
        try:
            outcome = await waiter
        except BaseException:
            self._pass_on(waiter)
            raise
        finally:
            flight.waiters.pop(waiter, None)
            for each in above:
                _unblock(each.blocked_on, flight)
            if timer is not None:
                timer.cancel()
        if outcome is None:
            assert patience.seconds is not None
            raise LockTimeoutError(where[1], run.name, where[0], patience.seconds, flight.leader.name)
        return outcome

    def _pass_on(self, waiter: asyncio.Future[Any]) -> None:
        """Chosen and cancelled in one step: it is the next one's turn."""
        if waiter.done() and not waiter.cancelled() and not waiter.exception():
            outcome = waiter.result()
            if isinstance(outcome, Lead):
                self.finish(outcome.flight, None)

    def _check_loop(self) -> None:
        """Futures of one loop must not be settled on another, where a copied context or a fork has led a run."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._loop is not None and not self._loop.is_closed():
                raise ConfigurationError(
                    "A SERIALIZABLE run was started on another event loop than its engine's.",
                    "Open an engine of its own there: `async with Engine(…):`.",
                )
            self._flights.clear()  # of a loop that ended without its runs
            self._loop = loop

    def finish(self, flight: Flight, served: Served | None) -> None:
        """The leader is done: serve everybody, or let the next one in line lead."""
        flight.held = None
        if served is not None:
            waiters, flight.waiters = flight.waiters, OrderedDict()
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(served)
        while flight.waiters:
            waiter, run = flight.waiters.popitem(last=False)
            if not waiter.done():
                flight.leader = run
                waiter.set_result(Lead(flight))
                return
        if self._flights.get(flight.where) is flight:
            del self._flights[flight.where]

    def held_above(self, flight: Flight, node: Run | transaction) -> list[Held | Claim]:
        """What callers of a run, or transactions around it, hold under the same key of other storages."""
        above = _above(node)
        return [
            other.held
            for other in self._flights.values()
            if other.where[1] == flight.where[1] and other.held is not None and other.leader in above
        ]

    async def free_abandoned(self) -> None:
        """Free what runs of a loop left behind that was closed under them: they never end, nor do their waiters."""
        if self._flights and self._loop is not None and self._loop.is_closed():
            names = sorted({flight.leader.name for flight in self._flights.values()})
            logger.warning(
                "An event loop was closed under runs that held keys; these are free now: %s", ", ".join(names)
            )
            for flight in self._flights.values():
                flight.waiters.clear()
            await self.aclose()

    async def aclose(self) -> None:
        """Free the keys of runs that outlive their engine, and send away who waits for them."""
        flights, self._flights, self._loop = list(self._flights.values()), {}, None
        for flight in flights:
            for waiter, run in list(flight.waiters.items()):
                flight._settle(waiter, EngineClosedError(run.name))
            held, flight.held = flight.held, None
            if held is not None:
                await held.release()


def _expire(waiter: asyncio.Future[Any]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _unblock(blocked_on: dict[Flight, int], flight: Flight) -> None:
    left = blocked_on[flight] - 1
    if left:
        blocked_on[flight] = left
    else:
        del blocked_on[flight]


def lineage(node: Run | transaction | None) -> Iterator[Any]:
    """Itself, its transaction and that one's parents, the run that called it, and so on up to the root."""
    while node is not None:
        if isinstance(node, Run):
            yield node
            yield from _blocks(node.transaction)
            node = node.parent
        else:
            yield from _blocks(node)
            node = node.run


def _above(node: Run | transaction) -> tuple[Any, ...]:
    """All of the lineage but itself."""
    if isinstance(node, Run) and node.parent is None and node.transaction is None:
        return ()
    return tuple(lineage(node))[1:]


def _blocks(txn: transaction | None) -> Iterator[transaction]:
    while txn is not None:
        yield txn
        txn = txn.parent


def refuse_cycle(flight: Flight, node: Run | transaction, above: Sequence[Any]) -> None:
    """Refuse `node` to wait for a leader that waits, directly or through others, for one of those above it.

    Raises:
        DeadlockError: Names who waits for whom.
    """
    seen: set[int] = set()

    def search(at: Flight, chain: list[str]) -> None:
        if id(at) in seen:
            return
        seen.add(id(at))
        for after in at.leader.blocked_on:
            link = [*chain, f"{at.leader.name} waits for {after.where[1]!r}"]
            if after.leader in above:
                raise DeadlockError([*link, f"held by {after.leader.name}"])
            search(after, link)

    search(flight, [f"{node.name} waits for {flight.where[1]!r}"])
