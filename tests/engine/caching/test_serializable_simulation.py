"""SERIALIZABLE on a bucket alone, simulated: machines that freeze and die, requests that are slow and get lost."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any
from uuid import uuid4

import pytest
from onceflow.engine import INPUTS, Engine, Settings, task
from onceflow.engine._caching import claiming
from onceflow.engine._concurrency import claims
from onceflow.locking import LockUnavailableError, StorageLockManager
from onceflow.locking._waiting import leases
from onceflow.storage import StorageUnavailableError
from simulation import Bucket, History, Machine, VirtualLoop

LEASE = 3.0
LONG = 600.0
"""Seconds of the simulation's own time after which whoever waits waits for ever."""

here: ContextVar[tuple[Machine, Bucket, History, bool]] = ContextVar("here")


@pytest.fixture(autouse=True)
def one_clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leases are measured in the loop's own time, and nothing happens in a thread, which would take another."""

    async def at_once(engine: Engine, work: Callable[..., Any], *arguments: Any) -> Any:
        return work(*arguments)

    for module in (claiming, claims, leases):
        monkeypatch.setattr(module, "now", lambda: asyncio.get_running_loop().time())
    monkeypatch.setattr(Engine, "in_thread", at_once)
    logging.getLogger("onceflow").setLevel(logging.CRITICAL)
    yield
    logging.getLogger("onceflow").setLevel(logging.NOTSET)


@task(cache_policy=INPUTS.configure(isolation_level="SERIALIZABLE"))
async def step(key: int) -> str:
    machine, bucket, history, refresh = here.get()
    name = str(await step.cache_key(key))
    value = f"{'refresh' if refresh else 'value'}-{machine.number}-{machine.chosen.getrandbits(128):032x}"
    history.entered(machine, name, value, bucket.committed(name))
    try:
        await machine.sleep(machine.chosen.random() ** 3 * 3 * LEASE)
        if machine.chosen.random() < 0.2:
            raise RuntimeError("this time not")
        return f"<{value}>"
    finally:
        history.left(machine, name, value)


class World:
    """Some machines, what befalls them, and those who call on them."""

    def __init__(self, seed: int, *, apart: bool, faults: float, freezes: bool) -> None:
        random.seed(seed)  # of the pauses between looks
        self.chosen = random.Random(seed)
        self.name = uuid4().hex
        self.apart, self.faults, self.freezes = apart, faults, freezes
        self.keys = self.chosen.randint(1, 3)
        self.history = History(LEASE, asyncio.get_running_loop().time)
        self.machines: list[Machine] = []
        self.dead: list[Machine] = []
        self.lives: dict[Machine, asyncio.Task[None]] = {}
        self.unpublished: list[str] = []

    def start(self, calls: int) -> None:
        """A machine more, with so many who call on it."""
        machine = Machine(len(self.machines), random.Random(self.chosen.random()), self.faults, 0.02)
        self.machines.append(machine)
        self.lives[machine] = asyncio.create_task(self._live(machine, calls))

    async def _live(self, machine: Machine, calls: int) -> None:
        bucket = Bucket(self.name, machine, self.history.wrote)
        locks = Bucket(f"{self.name}-locks", machine, self.history.wrote) if self.apart else bucket
        async with (
            StorageLockManager(locks, lease_seconds=LEASE) as manager,
            Engine(bucket, manager, settings=Settings()) as engine,
        ):
            await asyncio.gather(*(self._call(machine, bucket) for _ in range(calls)))
            assert len(engine.flights) == 0

    async def _call(self, machine: Machine, bucket: Bucket) -> None:
        """One call, somewhen; it may be cancelled, its body and its requests may fail."""
        chosen = machine.chosen
        await asyncio.sleep(chosen.random() * 4 * LEASE)
        refresh, key = chosen.random() < 0.15, chosen.randrange(self.keys)
        here.set((machine, bucket, self.history, refresh))
        calling = asyncio.create_task(step.with_options(refresh_cache=refresh)(key))
        if chosen.random() < 0.1:
            asyncio.get_running_loop().call_later(chosen.random() * 2 * LEASE, calling.cancel)
        try:
            value = (await calling)[1:-1]
        except (StorageUnavailableError, LockUnavailableError, RuntimeError, asyncio.CancelledError):
            return
        if value not in self.history.published[str(await step.cache_key(key))]:
            self.unpublished.append(value)  # it was returned all the same, with a warning

    async def befall(self) -> None:
        """Machines freeze, for up to three leases or for ever; for those a new one is started."""
        for _ in range(self.chosen.randint(1, 8)):
            await asyncio.sleep(self.chosen.random() * LEASE)
            machine = self.chosen.choice(self.machines)
            if not machine.thawed.is_set():
                continue
            machine.thawed.clear()
            if self.chosen.random() < 0.3:
                self.dead.append(machine)
                self.start(self.chosen.randint(1, 4))
            else:
                asyncio.get_running_loop().call_later(self.chosen.random() * 3 * LEASE, machine.thawed.set)

    async def run(self) -> None:
        """All of it. In the end every key is to be had, also when the dead arise and go on where they were."""
        for _ in range(self.chosen.randint(2, 4)):
            self.start(self.chosen.randint(1, 8))
        if self.freezes:
            await self.befall()
        async with asyncio.timeout(LONG):
            await asyncio.gather(*(life for machine, life in self.lives.items() if machine not in self.dead))
        await self._ask_for_all()
        for machine in self.dead:
            machine.thawed.set()
        async with asyncio.timeout(LONG):
            await asyncio.gather(*self.lives.values())
        await self._ask_for_all()
        assert self.history.violations == []

    async def _ask_for_all(self) -> None:
        """A machine on which nothing goes wrong gets what is published, and every lock, in time."""
        machine = Machine(len(self.machines), random.Random(0), 0.0, 0.0)
        bucket = Bucket(self.name, machine, self.history.wrote)
        locks = Bucket(f"{self.name}-locks", machine, self.history.wrote) if self.apart else bucket
        here.set((machine, bucket, self.history, False))
        async with (
            asyncio.timeout(LONG),
            StorageLockManager(locks, lease_seconds=LEASE) as manager,
            Engine(bucket, manager, settings=Settings()),
        ):
            for key in range(self.keys):
                name = str(await step.cache_key(key))
                while not (state := await step.run_to_state(key)).is_completed():
                    assert isinstance(state.error(), RuntimeError)
                assert state.result()[1:-1] == self.history.published[name][-1] == bucket.committed(name)
                async with asyncio.timeout(2 * LEASE), manager.lock(name):
                    assert state.result()[1:-1] == bucket.committed(name)


def simulate(seed: int, **world: Any) -> World:
    """One schedule; a failure says how to have it again."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:

        async def main() -> World:
            made = World(seed, **world)
            await made.run()
            return made

        try:
            return runner.run(main())
        except BaseException as error:
            error.add_note(f"simulate({seed}, {world})")
            raise


WORLDS = [
    pytest.param({"apart": apart, "faults": faults, "freezes": freezes}, id=f"{name}-{faults}-{freezes}")
    for name, apart in (("claims", False), ("locks", True))
    for faults, freezes in ((0.0, False), (0.05, False), (0.0, True), (0.05, True))
]


@pytest.mark.parametrize("world", WORLDS)
def test_schedules(world: dict[str, Any]) -> None:
    """97: whatever freezes, dies and gets lost: one result a key, none beside a living holder, none replaced unseen."""
    for seed in range(25):
        simulate(seed, **world)


@pytest.mark.chaos
@pytest.mark.parametrize("world", WORLDS)
def test_many_schedules(world: dict[str, Any]) -> None:
    """97: the same for 3 000 schedules more of each world."""
    for seed in range(100, 3100):
        simulate(seed, **world)
