"""Limits: how many bodies run at once, and how often they begin. Suspension, first come first served, no polling.

A limit is entered right before a body runs and left right after it, whatever ends it; hits, look-ups, lock
waits and retry delays take no slot. A run waits for its task's own limit first, then for those of its tags in
alphabetical order, so that no two runs wait for each other.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ._errors import ConfigurationError

_UNITS = {"s": 1.0, "sec": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Slots:
    """At most `size` holders; the others wait in order. Leaving hands the slot over within one scheduling step."""

    __slots__ = ("_free", "_waiters")

    def __init__(self, size: int) -> None:
        self._free = size
        self._waiters: OrderedDict[asyncio.Future[None], None] = OrderedDict()

    async def enter(self) -> None:
        """Wait for a slot. Cancelled, it leaves the line, and hands on a slot that it had just been given."""
        if self._free > 0:
            self._free -= 1
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiters[waiter] = None
        try:
            await waiter
        except BaseException:
            self._waiters.pop(waiter, None)
            if waiter.done() and not waiter.cancelled():
                self.leave()
            raise

    def leave(self) -> None:
        """Give the slot to the first in line, else back."""
        while self._waiters:
            waiter, _ = self._waiters.popitem(last=False)
            if not waiter.done():
                waiter.set_result(None)
                return
        self._free += 1


class Rate:
    """Starts that lie at least `interval` seconds apart. Each caller computes its own moment, and sleeps once."""

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

    def leave(self) -> None:
        """A start is spent, there is nothing to give back."""


class Gate:
    """The limits that one run has to pass."""

    __slots__ = ("_limits",)

    def __init__(self, limits: list[Slots | Rate]) -> None:
        self._limits = limits

    async def __aenter__(self) -> None:
        entered: list[Slots | Rate] = []
        try:
            for limit in self._limits:
                await limit.enter()
                entered.append(limit)
        except BaseException:
            for limit in reversed(entered):
                limit.leave()
            raise

    async def __aexit__(self, *_: object) -> None:
        for limit in reversed(self._limits):
            limit.leave()


class Limits:
    """The limits of one engine. Those of a task belong to the function: `with_options` copies share them by size."""

    def __init__(self, tags: Mapping[str, int] | None) -> None:
        self._tags = {
            tag: Slots(check_size(f"the limit of tag {tag!r}", size)) for tag, size in (tags or {}).items()
        }
        self._own: dict[Any, Slots | Rate] = {}
        self.has_tags = bool(self._tags)

    def gate(
        self, fn: Callable[..., Any], concurrency: int | None, interval: float | None, tags: Iterable[str]
    ) -> Gate | None:
        """What a run has to pass; None for nothing."""
        limits: list[Slots | Rate] = []
        if concurrency is not None:
            limits.append(self._own.setdefault((fn, "concurrency", concurrency), Slots(concurrency)))
        if self.has_tags:
            limits += [self._tags[tag] for tag in sorted(tags) if tag in self._tags]
        if interval is not None:
            limits.append(self._own.setdefault((fn, "rate", interval), Rate(interval)))
        return Gate(limits) if limits else None


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
