"""Limits: how many bodies run at once, and how often they begin. Suspension, first come first served, no polling.

A limit is entered right before a body runs and left right after it, whatever ends it; hits, look-ups, lock
waits and retry delays take no slot. A run waits for its task's own limit first, then for those of its tags in
alphabetical order, so that no two runs wait for each other, and for the rate last, so that starts keep their
distance.

A body that calls what needs the same limit lends its slot to one of those runs at a time: it would else wait
for itself. So with `n` slots at most `n` bodies are at work, not counting those that wait for another one.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .._errors import ConfigurationError

if TYPE_CHECKING:
    from .._runs.run import Run

_UNITS = {"s": 1.0, "sec": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Slots:
    """At most `size` holders; the others wait in order. Leaving hands the slot over within one scheduling step."""

    __slots__ = ("_free", "_waiters")

    def __init__(self, size: int) -> None:
        self._free = size
        self._waiters: OrderedDict[asyncio.Future[Slots], None] = OrderedDict()

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiters)

    @property
    def free(self) -> int:
        return self._free

    def leave(self) -> None:
        """Give the slot to the first in line, else back."""
        while self._waiters:
            waiter, _ = self._waiters.popitem(last=False)
            if not waiter.done():
                waiter.set_result(self)
                return
        self._free += 1


async def _enter(places: Sequence[Slots]) -> Slots:
    """Wait for a slot in any of these places, and say in which.

    Cancelled, it leaves every line, and hands on a slot that it had just been given.
    """
    for place in places:
        if place._free > 0:
            place._free -= 1
            return place
    waiter: asyncio.Future[Slots] = asyncio.get_running_loop().create_future()
    for place in places:
        place._waiters[waiter] = None
    try:
        return await waiter
    except BaseException:
        if waiter.done() and not waiter.cancelled():
            waiter.result().leave()
        raise
    finally:
        for place in places:
            place._waiters.pop(waiter, None)


class Hold(Slots):
    """A slot in use. While its holder runs it is itself a place of one slot, for the runs that the holder called."""

    __slots__ = ("_is_over", "_origin")

    def __init__(self, origin: Slots) -> None:
        super().__init__(1)
        self._origin = origin
        self._is_over = False

    def leave(self) -> None:
        """The run that had it on loan has ended."""
        if self._is_over:
            self._origin.leave()
        else:
            super().leave()

    def end(self) -> None:
        """The holder has ended: give the slot back, unless it is out on loan; then that run does so at its end."""
        self._is_over = True
        if self._free > 0:
            self._origin.leave()


class Rate:
    """Starts that lie at least `interval` seconds apart. Each caller computes its own moment, and sleeps once.

    A run that is cancelled while it sleeps has used its start up.
    """

    __slots__ = ("_interval", "_next")

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._next = 0.0

    async def enter(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        at = max(now, self._next)
        self._next = at + self._interval
        if at > now:
            await asyncio.sleep(at - now)


class Gate:
    """What one run has to pass before each attempt: slots, then the rate."""

    __slots__ = ("_rate", "_run", "_slots")

    def __init__(self, run: Run, slots: list[Slots], rate: Rate | None) -> None:
        self._run = run
        self._slots = slots
        self._rate = rate

    async def __aenter__(self) -> None:
        holds: dict[Slots, Hold] = {}
        try:
            for slots in self._slots:
                holds[slots] = Hold(await _enter([slots, *_lent(self._run, slots)]))
            if self._rate is not None:
                await self._rate.enter()
        except BaseException:
            _end(holds)
            raise
        self._run.holds = holds

    async def __aexit__(self, *_: object) -> None:
        holds, self._run.holds = self._run.holds, None
        _end(holds or {})


def _end(holds: dict[Slots, Hold]) -> None:
    for hold in reversed(holds.values()):
        hold.end()


def _lent(run: Run, slots: Slots) -> list[Slots]:
    """The slots of this limit that the run's callers hold, and the streams whose values they have in hand: the body
    of such a one waits for its reader."""
    lent: list[Slots] = []
    caller = run.parent
    while caller is not None:
        holders = (caller, *(link.run for link in caller.links)) if caller.links else (caller,)
        lent += [
            each.holds[slots] for each in holders if each is not None and each.holds and slots in each.holds
        ]
        caller = caller.parent
    return lent


class Limits:
    """The limits of one engine. Those of a task belong to the function: `with_options` copies share them by size."""

    def __init__(self, tags: Mapping[str, int] | None) -> None:
        self._tags = {
            tag: Slots(check_size(f"the limit of tag {tag!r}", size)) for tag, size in (tags or {}).items()
        }
        self._own: dict[int, tuple[Any, dict[Any, Any]]] = {}
        self.has_tags = bool(self._tags)
        self._loop: asyncio.AbstractEventLoop | None = None

    def __len__(self) -> int:
        """How many functions have limits of their own here."""
        return len(self._own)

    def gate(
        self, run: Run, fn: Callable[..., Any], concurrency: int | None, interval: float | None
    ) -> Gate | None:
        """What a run has to pass; None for nothing.

        Raises:
            ConfigurationError: The run has a limit, and is on another loop than others that had one.
        """
        slots: list[Slots] = []
        rate: Rate | None = None
        if concurrency is not None:
            slots.append(self._of(fn).setdefault(("concurrency", concurrency), Slots(concurrency)))
        if self.has_tags:
            slots += [self._tags[tag] for tag in sorted(run.tags) if tag in self._tags]
        if interval is not None:
            rate = self._of(fn).setdefault(("rate", interval), Rate(interval))
        if not slots and rate is None:
            return None
        self._check_loop()
        return Gate(run, slots, rate)

    def _check_loop(self) -> None:
        """Who waits on one loop would not hear of a slot that is left on another."""
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise ConfigurationError(
                "A run with a limit was started on another event loop than its engine's.",
                "Open an engine of its own there: `async with Engine(…):`.",
            )

    def _of(self, fn: Callable[..., Any]) -> dict[Any, Any]:
        """The limits of a function, kept as long as it is: functions may be made, and dropped, with each call."""
        number = id(fn)
        if number not in self._own:
            try:
                keeper: Any = weakref.ref(fn, lambda _: self._own.pop(number, None))
            except TypeError:  # an object that takes no weak references
                keeper = fn
            self._own[number] = keeper, {}
        return self._own[number][1]

    def of_tag(self, tag: str) -> Slots:
        """The slots of a tag."""
        return self._tags[tag]


def check_size(what: str, size: Any) -> int:
    """A limit that lets at least one run through.

    Raises:
        ConfigurationError: It would let none through.
    """
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ConfigurationError(
            f"{what} must be a whole number from 1 on, got {size!r}.", "Leave it out for none."
        )
    return size


def parse_rate(name: str, rate: str | None) -> float | None:
    """Seconds between two starts, from `"5/s"`, `"100/min"`.

    Raises:
        ConfigurationError: It is no such text.
    """
    if rate is None:
        return None
    number, _, unit = str(rate).partition("/")
    try:
        count, seconds = float(number), _UNITS[unit.strip() or "?"]
        if count > 0:
            return seconds / count
    except (ValueError, KeyError):
        pass  # said below, as for a rate of zero
    raise ConfigurationError(
        f"The rate of {name!r} must be a number above 0 per time, got {rate!r}.",
        f"Write '5/s' or '100/min'; times are {', '.join(_UNITS)}.",
    )
