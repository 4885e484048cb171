"""Claims in the record's own place: what they cost, and what becomes of them when answers are lost."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from onceflow.engine import INPUTS, Engine, task, transaction
from onceflow.engine import _claiming as claiming
from onceflow.engine import _claims as claims
from onceflow.engine._claims import Claim
from onceflow.engine._flights import Flight
from onceflow.locking import MemoryLockManager, StorageLockManager
from onceflow.storage import ConditionsUnsupportedError, MemoryStorage, StorageUnavailableError
from onceflow.storage._envelope import unpack_header
from until import until

SERIAL = INPUTS.configure(isolation_level="SERIALIZABLE")
Logged = pytest.LogCaptureFixture


class Watched(MemoryStorage):
    """Counts what is asked for records, and loses what it is told to lose."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: Counter[str] = Counter()
        self.unread = 0
        self.lost_before = 0
        self.lost_after = 0
        self.gate: asyncio.Event | None = None
        self.at_gate = asyncio.Event()
        self.is_careless = False
        self.first: Callable[[], Awaitable[None]] | None = None

    async def ensure_conditional(self) -> None:
        if self.is_careless:
            raise ConditionsUnsupportedError(self.url, "PUT If-None-Match")

    async def fetch(self, key: str, *args: Any, **options: Any) -> Any:
        if key[0] not in ".\0":
            self.requests["GET"] += 1
            self.requests["GET if changed"] += options.get("unless") is not None
            await asyncio.sleep(0)  # as every storage that is further away
            if self.unread:
                self.unread -= 1
                raise StorageUnavailableError("read", key, self.url, "no answer", "Wait.")
        return await super().fetch(key, *args, **options)

    async def write(self, key: str, *args: Any, **options: Any) -> str:
        if key[0] in ".\0":
            return await super().write(key, *args, **options)
        self.requests["PUT"] += 1
        if self.first is not None:
            first, self.first = self.first, None
            await first()
        if self.lost_before:
            self.lost_before -= 1
            raise StorageUnavailableError("write", key, self.url, "no answer", "Wait.")
        version = await super().write(key, *args, **options)
        if self.gate is not None:
            self.at_gate.set()
            await self.gate.wait()
        if self.lost_after:
            self.lost_after -= 1
            raise StorageUnavailableError("write", key, self.url, "the answer was lost", "Wait.")
        return version

    def asked(self) -> dict[str, int]:
        """What was asked since the last time."""
        asked, self.requests = +self.requests, Counter()
        return dict(asked)

    async def kind(self, key: str) -> str:
        """What lies under the key."""
        return unpack_header(await MemoryStorage.read(self, key))[0].kind


@pytest.fixture
def storage() -> Watched:
    return Watched()


@pytest.fixture
async def engine(storage: Watched) -> AsyncIterator[Engine]:
    """An engine whose locks lie in its records' own storage."""
    locks = StorageLockManager(storage, lease_seconds=0.3)
    async with Engine(storage, locks) as engine:
        yield engine


# --- requests


async def test_requests(engine: Engine, storage: Watched) -> None:
    """A miss costs 1 GET and 2 PUTs, a hit 1 GET, however many want either at once; a refresh 1 GET and 2 PUTs."""

    @task(cache_policy=SERIAL)
    async def one(x: int) -> list[int]:
        await asyncio.sleep(0.01)
        return [x]

    await one(1)
    assert storage.asked() == {"GET": 1, "PUT": 2}
    await one(1)
    assert storage.asked() == {"GET": 1}
    await asyncio.gather(*(one(2) for _ in range(50)))
    assert storage.asked() == {"GET": 1, "PUT": 2}
    await asyncio.gather(*(one(2) for _ in range(50)))
    assert storage.asked() == {"GET": 1}
    await one.with_options(refresh_cache=True)(1)
    assert storage.asked() == {"GET": 1, "PUT": 2}
    hooked = one.with_options(on_commit=[lambda txn: None])
    await asyncio.gather(*(hooked(3) for _ in range(50)))
    assert storage.asked() == {"GET": 1, "PUT": 2}


async def test_requests_of_what_has_expired(engine: Engine, storage: Watched) -> None:
    """A record that has expired is replaced for 1 GET and 2 PUTs, too; where that fails it is there as it was."""
    fails = False

    @task(cache_policy=SERIAL, cache_expiration=timedelta(hours=1))
    async def one(x: int) -> int:
        if fails:
            raise ValueError
        return x

    await one(1)
    key = str(await one.cache_key(1))
    before = await MemoryStorage.read(storage, key)
    later = engine.clock() + 7200
    engine.records._clock = engine.clock = lambda: later
    fails = True
    storage.asked()
    await one.run_to_state(1)
    assert storage.asked() == {"GET": 1, "PUT": 3}  # the third is the failure, under a key of its own
    assert await MemoryStorage.read(storage, key) == before
    storage.asked()
    fails = False
    await one(1)
    assert storage.asked() == {"GET": 1, "PUT": 2}


async def test_what_cannot_be_read_is_replaced(engine: Engine, storage: Watched) -> None:
    """19: an object that is no record is no obstacle: the run replaces it; one that fails puts it back."""
    fails = True

    @task(cache_policy=SERIAL)
    async def one(x: int) -> int:
        if fails:
            raise ValueError
        return x

    key = str(await one.cache_key(1))
    await MemoryStorage.write(storage, key, b"no record")
    await one.run_to_state(1)
    assert await MemoryStorage.read(storage, key) == b"no record"
    fails = False
    assert await one(1) == 1
    assert (await one.run_to_state(1)).name == "Cached"


async def test_requests_of_a_failure(engine: Engine, storage: Watched) -> None:
    """A run that fails leaves a grave of its claim; the next miss is as cheap as the first."""
    failing = True

    @task(cache_policy=SERIAL)
    async def one(x: int) -> int:
        if failing:
            raise ValueError(x)
        return x

    with pytest.raises(ValueError):
        await one(1)
    key = str(await one.cache_key(1))
    assert await storage.kind(key) == "free"
    storage.asked()
    failing = False
    assert await one(1) == 1
    assert storage.asked() == {"GET": 1, "PUT": 2}


async def test_requests_of_a_wait(engine: Engine, storage: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """22: however many wait for another process's claim, one of them looks, less and less often, renewals or not."""
    go, inside = asyncio.Event(), asyncio.Event()
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(min(seconds, 0.03))

    @task(cache_policy=SERIAL)
    async def gated(x: int) -> int:
        inside.set()
        await go.wait()
        return x

    async def elsewhere() -> int:
        async with Engine(storage, StorageLockManager(storage, lease_seconds=0.3)):
            return await gated(1)

    other = asyncio.create_task(elsewhere())
    await inside.wait()
    monkeypatch.setattr(claiming, "asyncio", SimpleNamespace(sleep=noted))
    storage.asked()
    waiters = [asyncio.create_task(gated(1)) for _ in range(200)]
    await until(lambda: len(pauses) >= 12)
    looks = storage.asked()
    go.set()
    assert [*await asyncio.gather(other, *waiters)] == [1] * 201
    assert looks["GET"] <= len(pauses) + 3
    assert looks["GET if changed"] >= looks["GET"] - 3  # an S3 store answers 304, without a body
    assert looks["PUT"] >= 2  # renewals, all this while: they are no reason to look more often
    assert all(after >= min(1.8 * before, 0.3) for before, after in pairwise(pauses))
    assert not [stat async for stat in storage.list(".locks/")]  # what was found needs no lock of its own


async def test_a_wait_for_one_after_the_other(
    engine: Engine, storage: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has waited long for one holder looks as often for the next one as if it had just come."""
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(0.001)

    @task(cache_policy=SERIAL)
    async def one(x: int) -> int:
        return x

    key = str(await one.cache_key(1))
    first, second = claim_on(storage, "first", 30.0, key), claim_on(storage, "second", 30.0, key)
    assert await first.take("", b"", 0)
    monkeypatch.setattr(claiming, "asyncio", SimpleNamespace(sleep=noted))
    waiter = asyncio.create_task(one(1))
    await until(lambda: bool(pauses) and pauses[-1] > 1)
    looked = len(pauses)
    assert await second.take(first.version, b"", first.token)
    await until(lambda: len(pauses) > looked + 3)
    assert min(pauses[looked:]) < 0.2
    await second.release()
    assert await waiter == 1
    await first.release()


async def test_a_transaction_that_is_about_to_commit() -> None:
    """Who wants a key that a transaction is about to commit looks now and then for its outcome, and is served by it."""

    class Held(Watched):
        decided, go = asyncio.Event(), asyncio.Event()

        async def write(self, key: str, *args: Any, **options: Any) -> str:
            if key[0] not in ".\0" and self.requests["PUT"] == 2:  # after two intents
                self.decided.set()
                await self.go.wait()
            return await super().write(key, *args, **options)

    @task(cache_policy=INPUTS)
    async def theirs(x: int) -> str:
        return "theirs"

    @task(cache_policy=SERIAL)
    async def ours(x: int) -> str:
        return "ours"

    storage = Held()

    async def commit() -> None:
        async with Engine(storage), transaction():
            await asyncio.gather(theirs(1), theirs(2))

    committing = asyncio.create_task(commit())
    await storage.decided.wait()
    async with Engine(storage, StorageLockManager(storage)):
        storage.asked()
        waiter = asyncio.create_task(ours(1))
        await asyncio.sleep(0.3)
        assert not waiter.done()
        assert storage.asked()["GET"] <= 40
        storage.go.set()
        assert await waiter == "theirs"
    await committing


# --- a claim by itself


def claim_on(storage: Watched, name: str, lease: float = 0.3, key: str = "key") -> Claim:
    return Claim(Flight((storage.url, key), None), storage, name, name, lease, ())


def due_within(claim: Claim, seconds: float) -> bool:
    """Whether the claim is written anew so soon."""
    assert claim._timer is not None
    return claim._timer.when() <= asyncio.get_running_loop().time() + seconds


async def test_renewed_while_held(storage: Watched) -> None:
    """7: a claim is written anew every third of its lease, and each time is another version."""
    claim = claim_on(storage, "one")
    assert await claim.take("", b"", 0)
    versions = {claim.version}
    assert due_within(claim, 0.1)
    for _ in range(3):
        await until(lambda: claim.version not in versions)
        versions.add(claim.version)
    await claim.release()
    assert await storage.kind("key") == "free"
    assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]


async def test_a_renewal_without_an_answer(storage: Watched, caplog: Logged) -> None:
    """8: a renewal that arrived, though its answer was lost, or did not arrive, takes the claim from nobody."""
    for lost in ("lost_before", "lost_after"):
        claim = claim_on(storage, "one")
        stat = await storage.stat("key")
        assert await claim.take("" if stat is None else stat.version, b"", 0)
        caplog.clear()
        setattr(storage, lost, 2)
        await until(lambda lost=lost: not getattr(storage, lost))  # type: ignore[misc]
        assert due_within(claim, 0.3 / 9)  # a second try comes before the lease is half over
        version = claim.version
        await until(lambda claim=claim, version=version: claim.version != version)  # type: ignore[misc]
        assert not claim.lost
        assert caplog.text.count("could not be renewed") == 1
        storage.asked()
        assert await claim.settle() == (await storage.stat("key") or stat).version  # type: ignore[union-attr]
        assert storage.asked() == {}  # it is sure again
        await claim.release()
        assert await storage.kind("key") == "free"


async def test_commit_after_a_lost_answer(engine: Engine, storage: Watched) -> None:
    """35: a commit whose last renewal has arrived without an answer finds its own claim, and is published."""
    ran = 0

    @task(cache_policy=SERIAL)
    async def one(x: int) -> int:
        nonlocal ran
        ran += 1
        storage.lost_after = 1
        await until(lambda: storage.lost_after == 0)
        return x

    assert await one(1) == 1
    assert await one(1) == 1
    assert ran == 1


async def test_commit_during_a_renewal(engine: Engine, storage: Watched) -> None:
    """A renewal that is under way when the body ends is waited for: its version is the one to replace."""
    ran = 0

    @task(cache_policy=SERIAL)
    async def one(x: int) -> int:
        nonlocal ran
        ran += 1
        storage.gate = asyncio.Event()
        await storage.at_gate.wait()  # the renewal has arrived, and its answer is on its way
        asyncio.get_running_loop().call_later(0.05, storage.gate.set)
        return x

    assert await one(1) == 1
    assert storage.asked() == {"GET": 1, "PUT": 3}  # and no look whether it has arrived
    storage.gate = None
    assert await one(1) == 1
    assert ran == 1


async def test_taken_over(storage: Watched, caplog: Logged) -> None:
    """9: a claim that somebody else has taken over is lost with one warning; releasing it disturbs nobody."""
    claim, other = claim_on(storage, "one"), claim_on(storage, "two", lease=30)
    assert await claim.take("", b"", 0)
    assert await other.take(claim.version, b"", claim.token)
    assert other.token > claim.token
    await until(lambda: claim.lost)
    storage.asked()
    await claim.release()
    assert storage.asked() == {}
    assert caplog.text.count("was taken over") == 1
    assert not other.lost
    assert await storage.kind("key") == "claim"
    await other.release()


async def test_only_one_takes_it(storage: Watched) -> None:
    """Of ten that have seen the same version one gets the claim."""
    ten = [claim_on(storage, f"{number}") for number in range(10)]
    taken = await asyncio.gather(*(claim.take("", b"", 0) for claim in ten))
    assert sum(taken) == 1
    for claim in ten:
        await claim.release()
    assert await storage.kind("key") == "free"
    stat = await storage.stat("key")
    assert stat is not None
    taken = await asyncio.gather(*(claim.take(stat.version, b"", 0) for claim in ten))
    assert sum(taken) == 1
    for claim in ten:
        await claim.release()


async def test_cancelled_while_it_is_taken(storage: Watched) -> None:
    """32: a claim whose request was on its way when its run was cancelled is undone before the cancellation goes on."""
    storage.gate = asyncio.Event()
    claim = claim_on(storage, "one")
    taking = asyncio.create_task(claim.take("", b"", 0))
    await storage.at_gate.wait()
    taking.cancel()
    await asyncio.sleep(0)
    taking.cancel()
    gate, storage.gate = storage.gate, None
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await taking
    assert await storage.kind("key") == "free"


@pytest.mark.parametrize("is_there", [True, False])
async def test_cancelled_at_every_step(is_there: bool) -> None:
    """32: cancelled at its n-th step, and at every one after it: what was there before is there again, or a grave."""

    class Slow(Watched):
        async def write(self, key: str, *args: Any, **options: Any) -> str:
            for _ in range(3):
                await asyncio.sleep(0)
            return await super().write(key, *args, **options)

    for steps in range(12):
        storage = Slow()
        version = await storage.write("key", b"before") if is_there else ""
        claim = claim_on(storage, "one")
        taking = asyncio.create_task(claim.take(version, b"before" if is_there else b"", 0))
        for _ in range(steps):
            await asyncio.sleep(0)
        was_done = taking.done()
        while not taking.done():
            taking.cancel()
            await asyncio.sleep(0)
        if was_done:
            await claim.release()
        else:
            assert taking.cancelled()
        stat = await storage.stat("key")
        if is_there:
            assert await storage.read("key") == b"before"
        elif stat is not None:
            assert await storage.kind("key") == "free"
        assert claim.lost
        assert claim._timer is None or claim._timer.cancelled()


async def test_tokens_grow_whatever_the_clock_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim's token is above that of what it replaces, also where the wall clock was set back."""
    storage = Watched()
    first, second = claim_on(storage, "one"), claim_on(storage, "two")
    assert await first.take("", b"", 0)
    monkeypatch.setattr(time, "time_ns", lambda: 0)
    assert await second.take(first.version, b"", first.token)
    assert second.token == first.token + 1
    await first.release()
    await second.release()
    header, _ = unpack_header(await storage.read("key"))
    assert header.token == second.token
    monkeypatch.undo()
    await MemoryStorage.delete(storage, "key")
    third = claim_on(storage, "three")
    assert await third.take("", b"", 0)
    assert third.token > second.token  # though nothing is there that says how far they were
    await third.release()


async def test_released_during_a_renewal(storage: Watched) -> None:
    """A claim that is released while it is renewed is not renewed any more: no timer stays."""
    claim = claim_on(storage, "one")
    assert await claim.take("", b"", 0)
    storage.gate = asyncio.Event()
    await storage.at_gate.wait()
    releasing = asyncio.create_task(claim.release())
    await asyncio.sleep(0)
    gate, storage.gate = storage.gate, None
    gate.set()
    await releasing
    assert await storage.kind("key") == "free"
    assert claim._timer is not None
    assert claim._timer.cancelled()


async def test_tokens_of_the_engine(
    engine: Engine, storage: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens go on from graves, records and what has expired, though the wall clock stands still."""
    monkeypatch.setattr(time, "time_ns", lambda: 0)
    fails = True

    @task(cache_policy=SERIAL, cache_expiration=timedelta(hours=1))
    async def one(x: int) -> int:
        if fails:
            raise ValueError
        return x

    async def token() -> int | None:
        return unpack_header(await MemoryStorage.read(storage, str(await one.cache_key(1))))[0].token

    await one.run_to_state(1)
    assert await token() == 1
    fails = False
    await one(1)
    assert await token() == 2
    later = engine.clock() + 7200
    engine.records._clock = engine.clock = lambda: later
    await one(1)
    assert await token() == 3
    await one.with_options(refresh_cache=True)(1)
    assert await token() == 4


async def test_a_slow_renewal_counts_from_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    """8: what is left of a lease is counted from before the renewal was sent: nobody waits for the next any longer."""
    storage, clock = Watched(), 0.0
    monkeypatch.setattr(claims, "now", lambda: clock)
    claim = claim_on(storage, "one")
    assert await claim.take("", b"", 0)
    clock = 5.0
    storage.gate = asyncio.Event()
    await storage.at_gate.wait()  # the renewal has arrived
    clock = 5.2
    storage.gate.set()
    await until(lambda: claim._timer is not None)
    assert claim._sent == 5.0
    storage.gate, storage.at_gate = asyncio.Event(), asyncio.Event()  # and the next one never ends
    await storage.at_gate.wait()
    clock = 5.31
    async with asyncio.timeout(5):
        assert await claim.settle() == (await MemoryStorage.stat(storage, "key")).version  # type: ignore[union-attr]
    assert not claim.lost
    storage.gate = None
    await claim.release()


async def test_what_was_there_is_put_back(storage: Watched) -> None:
    """A claim that ends without a commit leaves what was committed before, byte for byte."""
    before = os.urandom(100)
    version = await storage.write("key", before)
    claim = claim_on(storage, "one")
    assert await claim.take(version, before, 0)
    assert await storage.kind("key") == "claim"
    await claim.release()
    assert await storage.read("key") == before


async def test_a_storage_that_is_gone(engine: Engine, storage: Watched, caplog: Logged) -> None:
    """41: where the claim cannot be written the run fails, with the storage's error, and nobody is left waiting."""

    @task(cache_policy=SERIAL)
    async def one(x: int) -> int:
        return x

    storage.lost_before = 3
    states = await asyncio.gather(*(one.run_to_state(1) for _ in range(5)))
    errors = [state.error() for state in states[:3]]
    assert all(isinstance(error, StorageUnavailableError) for error in errors)
    assert [state.result() for state in states[3:]] == [1, 1]
    assert len(engine.flights) == 0


async def test_what_a_dead_refresh_was_to_replace(engine: Engine, storage: Watched) -> None:
    """Who could not read at first, and then finds the claim of a refresh that died, is served what is committed."""
    ran = 0

    @task(cache_policy=SERIAL)
    async def one(x: int) -> int:
        nonlocal ran
        ran += 1
        return x

    assert await one(1) == 1
    key = str(await one.cache_key(1))
    stored = await storage.fetch(key)
    dead = claim_on(storage, "dead", key=key)
    assert await dead.take(stored.version, bytes(stored.data), 0)
    dead._timer.cancel()  # type: ignore[union-attr]  # it renews no more
    storage.unread = 1
    assert await one(1) == 1
    assert ran == 1


async def test_nothing_is_replaced_unread(storage: Watched) -> None:
    """Where the record cannot be read, even by who holds the key, it stays as it is, and is everybody's result."""
    numbers = itertools.count()

    @task(cache_policy=SERIAL)
    async def one(x: int) -> int:
        return next(numbers)

    for locks, looks in (
        (StorageLockManager(storage), 1),
        (MemoryLockManager(), 2),
    ):  # one more under the lock
        async with Engine(storage, locks):
            first = await one(looks)
            storage.unread = looks
            assert await one(looks) == first
            assert storage.unread == 0
            assert await one(looks) == first


async def test_a_claim_that_cannot_be_ended(storage: Watched, caplog: Logged) -> None:
    """41: where the end of a claim cannot be written that is a warning, and the claim ends with its lease."""
    claim = claim_on(storage, "one")
    assert await claim.take("", b"", 0)
    storage.lost_before = 1
    await claim.release()
    assert "It ends with its lease" in caplog.text
    assert claim.lost
    assert await storage.kind("key") == "claim"


async def test_what_lies_there_is_another(storage: Watched) -> None:
    """9: a claim of the same number by another holder, or what cannot be read, is not taken for one's own."""
    for number, holder in ((0, "two"), (1, "one")):
        claim, other = claim_on(storage, "one"), claim_on(storage, holder, lease=30)
        assert await claim.take("", b"", 0)
        await MemoryStorage.delete(storage, "key")
        assert await other.take("", b"", claim.token + 10**12)
        other.token = claim.token + number
        storage.requests.clear()
        assert await other._write_anew(other._body())
        claim._is_unsure = True
        await claim.settle()
        assert claim.lost
        await other.release()
        await MemoryStorage.delete(storage, "key")
    claim = claim_on(storage, "one")
    assert await claim.take("", b"", 0)
    await MemoryStorage.delete(storage, "key")
    await until(lambda: claim.lost)
    claim = claim_on(storage, "one")
    assert await claim.take("", b"", 0)
    await storage.write("key", b"not to be read")
    await until(lambda: claim.lost)
    await claim.release()
    assert await storage.read("key") == b"not to be read"


async def test_a_store_without_conditions(engine: Engine, storage: Watched) -> None:
    """49: a store that ignores conditions is refused before the first claim is written."""
    storage.is_careless = True

    @task(cache_policy=SERIAL)
    async def one(x: int) -> int:
        return x

    with pytest.raises(ConditionsUnsupportedError, match="If-None-Match"):
        await one(1)
    assert storage.asked() == {"GET": 1}


async def test_when_a_claim_counts_as_abandoned(
    engine: Engine, storage: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B10: after 1.1 times the lease that it names and 0.2 s without a renewal, by the waiter's clock; not before.

    Of two who wait for that the second begins to wait anew. What the dead holder had put aside is there again when
    the next one fails, and tokens go on though the wall clock stands still.
    """
    clock, fails = 1000.0, False
    monkeypatch.setattr(claiming, "now", lambda: clock)
    monkeypatch.setattr(time, "time_ns", lambda: 0)

    @task(cache_policy=SERIAL)
    async def one(x: int) -> str:
        if fails:
            raise ValueError
        return "first"

    async def token() -> int | None:
        return unpack_header(await MemoryStorage.read(storage, key))[0].token

    again = one.with_options(refresh_cache=True)
    key = str(await one.cache_key(1))
    assert await one(1) == "first"
    assert await again(1) == "first"
    assert await token() == 2
    stat = await storage.stat(key)
    assert stat is not None
    dead = Claim(Flight((storage.url, key), None), storage, "dead", "dead", 40, ())
    assert await dead.take(stat.version, await MemoryStorage.read(storage, key), 2)
    assert dead._timer is not None
    dead._timer.cancel()
    fails = True
    storage.asked()
    waiting = asyncio.create_task(again.run_to_state(1))
    for seconds in (0.0, 30.0, 44.19):
        clock += seconds
        if seconds == 30.0:
            assert await dead._write_anew(dead._body())  # it is alive: all of the lease begins anew
        seen = storage.requests["GET"]
        await until(lambda seen=seen: storage.requests["GET"] >= seen + 2)  # type: ignore[misc]
        assert not waiting.done()
    other = Claim(Flight((storage.url, key), None), storage, "other", "other", 40, ())

    async def is_faster() -> None:
        assert await other.take(dead.version, dead._before, dead.token)
        assert other._timer is not None
        other._timer.cancel()

    storage.first = is_faster
    clock += 0.02
    await until(lambda: other.version != "")
    seen = storage.requests["GET"]
    await until(lambda: storage.requests["GET"] >= seen + 3)
    assert not waiting.done()  # it was not the first, and the lease of who was has just begun
    clock += 44.21
    async with asyncio.timeout(5):
        assert isinstance((await waiting).error(), ValueError)
    fails = False
    assert (await one.run_to_state(1)).name == "Cached"
    dead = Claim(Flight((storage.url, key), None), storage, "dead", "dead", 30, ())
    stat = await storage.stat(key)
    assert stat is not None
    assert await dead.take(stat.version, b"", 7)
    assert dead._timer is not None
    dead._timer.cancel()
    storage.asked()
    waiting = asyncio.create_task(one.run_to_state(1))
    await until(lambda: storage.requests["GET"] >= 3)
    clock += 40
    async with asyncio.timeout(5):
        assert (await waiting).name == "Completed"
    assert await token() == 9


async def test_invalidated_while_it_runs(engine: Engine, storage: Watched, caplog: Logged) -> None:
    """A record that is invalidated while it is computed is not published by the run that began before."""
    caplog.set_level(logging.WARNING, "onceflow")
    inside, go = asyncio.Event(), asyncio.Event()

    @task(cache_policy=SERIAL)
    async def one(x: int) -> int:
        inside.set()
        await go.wait()
        return x

    running = asyncio.create_task(one(1))
    await inside.wait()
    assert not await one.invalidate(1)  # there is no record yet
    go.set()
    assert await running == 1
    assert "its result is not published" in caplog.text
    assert await storage.stat(str(await one.cache_key(1))) is None


async def test_a_lock_that_lies_elsewhere(storage: Watched) -> None:
    """A lock manager over another storage than the records' keeps its locks there: nothing is claimed in a record."""
    elsewhere = MemoryStorage()

    @task(cache_policy=SERIAL)
    async def one(x: int) -> int:
        key = str(await one.cache_key(1))
        assert await storage.stat(key) is None
        assert await elsewhere.stat(f".locks/{key}") is not None
        return x

    async with Engine(storage, StorageLockManager(elsewhere)):
        assert await one(1) == 1


async def test_key_functions_are_exclusive_too(storage: Watched) -> None:
    """A key function takes over the isolation and the lock manager of the policy that it displaces."""
    ran = 0
    policy = SERIAL.configure(lock_manager=StorageLockManager(storage))

    with pytest.warns(UserWarning, match="the function wins"):

        @task(cache_policy=policy, cache_key_fn=lambda context, parameters: f"key-{parameters['x']}")
        async def one(x: int) -> int:
            nonlocal ran
            ran += 1
            await asyncio.sleep(0.01)
            return x

    async with Engine(storage):
        assert [*await asyncio.gather(one(1), one(1))] == [1, 1]
    assert ran == 1
    assert await storage.kind("key-1") == "record"
