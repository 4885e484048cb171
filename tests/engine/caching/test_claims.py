"""Claims in the record's own place, as an engine makes them: what they cost, and what it makes of what lies there."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from onceflow.engine import INPUTS, Engine, task, transaction
from onceflow.engine._caching import claiming
from onceflow.engine._concurrency.claims import Claim
from onceflow.engine._concurrency.singleflight import Flight
from onceflow.locking import MemoryLockManager, StorageLockManager
from onceflow.storage import ConditionsUnsupportedError, MemoryStorage, StorageUnavailableError
from onceflow.storage._format.envelope import unpack_header
from until import until
from watched_records import Watched, claim_on

SERIAL = INPUTS.configure(isolation_level="SERIALIZABLE")
Logged = pytest.LogCaptureFixture


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
    """Who wants a key that a transaction is about to commit waits for its outcome, and is served by it."""

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
        await until(lambda: waiter.done() or storage.requests["GET"] >= 10)
        assert not waiter.done()
        storage.go.set()
        assert await waiter == "theirs"
    await committing


# --- answers that are lost, and what lies there


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
