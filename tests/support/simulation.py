"""Several machines and a bucket in one process, in a time of their own: nothing is waited for, so hours take seconds.

A machine is an engine of its own whose requests take a while, get lost, or arrive without an answer; it can be
frozen, as by SIGSTOP or a partition, and thawed, or never. What happens follows from a seed.
"""

from __future__ import annotations

import asyncio
import random
import re
import selectors
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import msgpack
from onceflow.locking._storage import PREFIX
from onceflow.storage import MemoryStorage, StorageUnavailableError
from onceflow.storage._format.envelope import unpack_header
from onceflow.storage._names import name_of


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop whose time leaps to the next timer when nothing else is to be done."""

    def __init__(self) -> None:
        self.elapsed = 0.0
        super().__init__(_Leaping(self))

    def time(self) -> float:
        return self.elapsed


class _Leaping(selectors.DefaultSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready and timeout is None:
            raise RuntimeError("everybody waits, and nothing will ever happen")
        if not ready and timeout:
            self._loop.elapsed += timeout
        return ready


class Machine:
    """Where an engine runs: how its requests fare."""

    def __init__(self, number: int, chosen: random.Random, faults: float, spikes: float) -> None:
        self.number, self.chosen, self.faults, self.spikes = number, chosen, faults, spikes
        self.thawed = asyncio.Event()
        self.thawed.set()
        self.contact: dict[str, float] = {}
        """When its last claim on each key, or renewal, was sent that was answered."""
        self.blind: dict[str, float] = {}
        """When it could last not be read what lies under a key: a record that cannot be read counts as none."""

    async def way(self) -> None:
        """One way of a request, or of its answer."""
        spike = self.chosen.random() < self.spikes
        await asyncio.sleep(self.chosen.random() * (3 if spike else 0.05))
        await self.thawed.wait()

    def loses(self) -> bool:
        return self.chosen.random() < self.faults

    async def sleep(self, seconds: float) -> None:
        """As a body that works for so long, not counting the time in which the machine is frozen."""
        await asyncio.sleep(seconds)
        await self.thawed.wait()


Watch = Callable[[Machine, str, bytes | None, bytes], None]


class Bucket(MemoryStorage):
    """One machine's way to the bucket. `watch` is told of each write as it is applied: key, before, after."""

    def __init__(self, name: str, machine: Machine, watch: Watch) -> None:
        super().__init__(name)
        self._machine, self._watch = machine, watch

    async def _sent(self, operation: str, key: str) -> None:
        await self._machine.way()
        if self._machine.loses():
            raise StorageUnavailableError(operation, key, self.url, "the request was lost", "Wait.")

    async def _answered(self, operation: str, key: str) -> None:
        await self._machine.way()
        if self._machine.loses():
            raise StorageUnavailableError(operation, key, self.url, "the answer was lost", "Wait.")

    async def fetch(self, key: str, *args: Any, **options: Any) -> Any:
        try:
            await self._sent("read", key)
            try:
                return await super().fetch(key, *args, **options)
            finally:
                await self._answered("read", key)
        except StorageUnavailableError:
            self._machine.blind[key] = asyncio.get_running_loop().time()
            raise

    async def write(self, key: str, *args: Any, **options: Any) -> str:
        began = asyncio.get_running_loop().time()
        await self._sent("write", key)
        objects, name = self._store.objects, name_of(key)
        before = objects.get(name)
        try:
            version = await super().write(key, *args, **options)
            after = objects[name].data
            self._watch(self._machine, key, before and before.data, after)
        finally:
            await self._answered("write", key)
        if holds(key, after):
            self._machine.contact[key] = began
        return version

    def committed(self, key: str) -> str | None:
        """The value that a reader of this moment would find."""
        found = self._store.objects.get(name_of(key))
        return None if found is None else value_in(found.data)


def holds(key: str, data: bytes) -> bool:
    """Whether an object says that somebody holds the key."""
    if key.startswith(PREFIX):
        return bool(msgpack.unpackb(data)[1])
    return unpack_header(data)[0].kind == "claim"


def value_in(data: bytes) -> str | None:
    """The value of a record; of a claim, the one that was committed before."""
    header, offset = unpack_header(data)
    if header.kind == "claim":
        return value_in(data[offset:]) if len(data) > offset else None
    if header.kind != "record":
        return None
    (value,) = re.findall(rb"<((?:value|refresh)-\d+-[0-9a-f]{32})>", data)
    return str(value, "ascii")


class History:
    """What must hold of the executions and commits of all machines, checked as they happen."""

    def __init__(self, lease: float, clock: Callable[[], float]) -> None:
        self.lease, self.clock = lease, clock
        self.inside: dict[str, list[tuple[Machine, str]]] = defaultdict(list)
        self.published: dict[str, list[str]] = defaultdict(list)
        self.violations: list[str] = []

    def must(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.violations.append(otherwise)  # raised here, it might be taken for a failing body or storage

    def entered(self, machine: Machine, key: str, value: str, committed: str | None) -> None:
        """Nobody is inside, and nothing is committed that could be read, unless a lease has run out."""
        if committed is not None and not value.startswith("refresh"):
            is_blind = self.clock() - machine.blind.get(key, -self.lease) < self.lease
            self.must(is_blind or self._silent(machine, key), f"{value} runs though {committed} is committed")
        for other, theirs in self.inside[key]:
            self.must(
                self._silent(other, key) or self._silent(machine, key), f"{value} enters beside {theirs}"
            )
        self.inside[key].append((machine, value))

    def _silent(self, machine: Machine, key: str) -> bool:
        last = max(machine.contact.get(key, 0.0), machine.contact.get(PREFIX + key, 0.0))
        return self.clock() - last >= self.lease * 0.799

    def left(self, machine: Machine, key: str, value: str) -> None:
        self.inside[key].remove((machine, value))

    def wrote(self, machine: Machine, key: str, before: bytes | None, after: bytes) -> None:
        """A committed value is replaced by a refresh only, and none is published twice, or lost."""
        if key.startswith((".", "\0")):
            return
        old, new = value_in(before) if before is not None else None, value_in(after)
        if old == new:
            return
        self.must(new is not None, f"{old} was lost")
        if new is not None:
            self.must(old is None or new.startswith("refresh"), f"{new} replaced {old}")
            self.must(new not in self.published[key], f"{new} came back")
            self.published[key].append(new)
