"""A SERIALIZABLE holder that has lost its key: what becomes of its result, and of those who wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextvars import Context
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from lock_places import turns
from onceflow.engine import INPUTS, CommitError, Engine, task, transaction
from onceflow.engine._caching.serializable import RETAKES
from onceflow.engine._concurrency.claims import Claim
from onceflow.engine._concurrency.locks import Held
from onceflow.engine._concurrency.singleflight import Flight
from onceflow.locking import Lease, LockUnavailableError, MemoryLockManager, StorageLockManager
from onceflow.storage import MemoryStorage, StorageUnavailableError
from onceflow.storage._format.envelope import unpack_header
from serial_ways import Side, Way

KINDS = ["memory", "claims_memory"]  # a lock apart from the record, and one in the record itself
SERIAL = INPUTS.configure(isolation_level="SERIALIZABLE")
Logged = pytest.LogCaptureFixture


class Stranger:
    """Somebody who takes the key of the run that holds it, as one who has not heard of its holder for a lease."""

    def __init__(self, side: Side) -> None:
        (flight,) = side.engine.flights._flights.values()
        self._locks, self._storage = side.locks, side.storage
        self._where, self._held = flight.where, flight.held
        self._claim: Claim | None = None

    async def take(self) -> None:
        held = self._held
        if isinstance(held, Claim):
            self._claim = Claim(Flight(self._where, None), self._storage, "stranger", "stranger", 30, ())
            assert await self._claim.take(held.version, b"", held.token)
            return
        assert isinstance(held, Held)
        lose(held.lease)
        assert await self._locks.acquire(self._where[1], "stranger", timeout=0)

    async def leave(self) -> None:
        if self._claim is not None:
            await self._claim.release()
        else:
            await self._locks.release(self._where[1], "stranger")


def lose(lease: Lease) -> None:
    lease._manager._expire(lease, "somebody has taken it")  # type: ignore[attr-defined]


def elsewhere(way: Way, call: Any) -> asyncio.Task[Any]:
    """As another process does it: with an engine of its own, and nothing of what is open here."""

    async def there() -> Any:
        async with Side(way):
            return await call(1)

    work: Coroutine[Any, Any, Any] = there()
    return asyncio.create_task(work, context=Context())


async def test_nobody_has_committed(side: Side, caplog: Logged) -> None:
    """8: where nobody has committed meanwhile, the value is published under the key that was taken anew; one run."""
    ran, strangers = 0, list[Stranger]()

    @task(cache_policy=SERIAL)
    async def one(x: int) -> list[int]:
        nonlocal ran
        ran += 1
        stranger = Stranger(side)
        strangers.append(stranger)
        await stranger.take()
        await stranger.leave()
        return [ran]

    assert await asyncio.gather(*(one(1) for _ in range(3))) == [[1]] * 3
    assert await one(1) == [1]
    assert ran == 1
    assert "not published" not in caplog.text
    old = strangers[0]._held
    assert not isinstance(old, Claim) or (old._timer is not None and old._timer.cancelled())
    assert await side.is_free(str(await one.cache_key(1)))


async def test_behind_who_has_it(side: Side) -> None:
    """8: while another holder has the key, nothing is published under it; the value is when that one has gone."""
    strangers: list[Stranger] = []

    @task(cache_policy=SERIAL)
    async def one(x: int) -> int:
        strangers.append(Stranger(side))
        await strangers[-1].take()
        return x

    running = asyncio.create_task(one(1))
    await turns(60)
    key = str(await one.cache_key(1))
    assert not running.done()
    if side.way.claims:
        header, _ = unpack_header(await side.storage.read(key))
        assert (header.kind, header.extra["holder"]) == ("claim", "stranger")
    else:
        assert await side.storage.stat(key) is None
    await strangers[0].leave()
    assert await running == 1
    assert len(strangers) == 1
    assert (await one.run_to_state(1)).name == "Cached"
    assert await side.is_free(key)


async def test_the_others_result_is_everybodys(side: Side, caplog: Logged) -> None:
    """8: where another holder has committed, its result is that of the run and of all who wait for it."""
    ran: list[str] = []

    @task(cache_policy=SERIAL)
    async def one(x: int) -> str:
        ran.append("mine" if not ran else "theirs")
        if ran[-1] == "theirs":
            return "theirs"
        stranger = Stranger(side)
        await stranger.take()
        await stranger.leave()
        assert await elsewhere(side.way, one) == "theirs"
        return "mine"

    assert await asyncio.gather(*(one(1) for _ in range(3))) == ["theirs"] * 3
    assert ran == ["mine", "theirs"]
    assert caplog.text.count("its result is not published") == 1
    assert "The other holder's result is returned" in caplog.text
    assert await side.is_free(str(await one.cache_key(1)))


async def test_a_writer_that_asks_for_no_lock(side: Side) -> None:
    """6: what a READ_COMMITTED run has written under a held key is not overwritten either, and the key is freed."""

    @task(cache_policy=SERIAL)
    async def one(x: int) -> str:
        await elsewhere(side.way, relaxed)
        return "mine"

    @task(cache_policy=INPUTS, refresh_cache=True)
    async def relaxed(x: int) -> str:
        return "theirs"

    assert await one.cache_key(1) == await relaxed.cache_key(1)
    assert await one(1) == "theirs"
    assert await one(1) == "theirs"
    key = str(await one.cache_key(1))
    assert await side.is_free(key)
    assert not await side.locks.is_locked(key)


async def test_what_is_there_by_then_has_expired(side: Side) -> None:
    """8: the value replaces what lies there when the key was taken anew, not what lay there first."""
    ran = 0

    @task(cache_policy=INPUTS, refresh_cache=True, cache_expiration=timedelta(seconds=-1))
    async def brief(x: int) -> str:
        return "theirs"

    @task(cache_policy=SERIAL)
    async def one(x: int) -> str:
        nonlocal ran
        ran += 1
        stranger = Stranger(side)
        await stranger.take()
        await stranger.leave()
        await elsewhere(side.way, brief)
        return "mine"

    assert await one(1) == "mine"
    assert await one(1) == "mine"
    assert ran == 1


async def test_a_refresh_keeps_its_own(side: Side, caplog: Logged) -> None:
    """8: a refresh that was overtaken returns what it has computed itself, which is what was asked for."""
    ran: list[str] = []

    @task(cache_policy=SERIAL, refresh_cache=True)
    async def one(x: int) -> str:
        name = "theirs" if ran else "mine"
        ran.append(name)
        if name == "mine":
            stranger = Stranger(side)
            await stranger.take()
            await stranger.leave()
            assert await elsewhere(side.way, one) == "theirs"
        return name

    assert await one(1) == "mine"
    assert "It is returned all the same" in caplog.text
    assert await one.with_options(refresh_cache=False)(1) == "theirs"


async def test_invalidated_meanwhile(side: Side, caplog: Logged) -> None:
    """A record that is invalidated while a refresh computes it anew does not come back by that."""

    @task(cache_policy=SERIAL)
    async def one(x: int) -> int:
        return x

    async def and_drops(x: int) -> int:
        assert await one.invalidate(1)
        return x

    assert await one(1) == 1
    again = task(cache_policy=SERIAL, refresh_cache=True)(and_drops)
    assert await again.cache_key(1) == await one.cache_key(1)
    assert await again(1) == 1
    assert "It is returned all the same" in caplog.text
    assert await side.storage.stat(str(await one.cache_key(1))) is None


class Losing(MemoryLockManager):
    """Grants leases that are lost at once, as often as it is told to; then none at all, if it is told so."""

    def __init__(self, losses: int, *, breaks: bool = False) -> None:
        super().__init__()
        self.losses, self.breaks, self.granted = losses, breaks, 0

    async def acquire(self, *args: Any, **options: Any) -> Lease | None:
        if self.breaks and self.granted:
            raise LockUnavailableError("acquire", "key", self.url, "it is gone", "Wait.")
        lease = await super().acquire(*args, **options)
        assert lease is not None
        self.granted += 1
        if self.granted <= self.losses:
            lose(lease)
        return lease


class Snatching(MemoryStorage):
    """A storage in which a stranger is always there at once to put a grave over a claim, so many times."""

    def __init__(self, losses: int) -> None:
        super().__init__()
        self.losses, self.granted = losses, 0

    async def write(self, key: str, data: Any, **options: Any) -> str:
        version = await super().write(key, data, **options)
        if key[0] not in ".\0" and unpack_header(await self.read(key))[0].kind == "claim":
            self.granted += 1
            if self.granted <= self.losses:
                stranger = Claim(Flight((self.url, key), None), self, "stranger", "stranger", 30, ())
                await super().write(key, b"".join(stranger._grave()))
        return version


@pytest.mark.parametrize("kind", ["lock", "claim"])
async def test_how_often_it_is_tried(kind: str, caplog: Logged) -> None:
    """8: a key that is lost again and again is taken so many times; then the value is returned without a record."""

    @task(cache_policy=SERIAL)
    async def one(x: int) -> int:
        return x

    for losses in (RETAKES - 1, 99):
        storage = Snatching(losses if kind == "claim" else 0)
        locks = Losing(losses) if kind == "lock" else StorageLockManager(storage)
        caplog.clear()
        async with Engine(storage, locks) as engine:
            assert await one(1) == 1
            assert len(engine.flights) == 0
            assert ("not published" in caplog.text) == (losses == 99)
            granted = locks.granted if isinstance(locks, Losing) else storage.granted
            assert granted == (RETAKES if losses < 99 else RETAKES + 1)
            assert ((await one.run_to_state(1)).name == "Cached") == (losses < 99)
    assert RETAKES == 3


async def test_the_lock_server_is_gone_by_then(caplog: Logged) -> None:
    """8: where the key cannot be had again, the value is returned with a warning, not lost; nobody is left waiting."""

    @task(cache_policy=SERIAL)
    async def one(x: int) -> int:
        return x

    async with Engine(MemoryStorage(), Losing(1, breaks=True)) as engine:
        states = await asyncio.gather(*(one.run_to_state(1) for _ in range(2)))
        assert states[0].result() == 1
        assert isinstance(states[1].error(), LockUnavailableError)
        assert "could not be had again" in caplog.text
        assert len(engine.flights) == 0


async def test_a_record_that_could_not_be_read() -> None:
    """8: a holder that could not see what lay there, and then lost its key, publishes its result all the same."""

    class Blinking(MemoryStorage):
        blind = 2

        async def fetch(self, *args: Any, **options: Any) -> Any:
            if self.blind:
                self.blind -= 1
                raise StorageUnavailableError("read", "key", self.url, "gone", "Wait.")
            return await super().fetch(*args, **options)

    @task(cache_policy=SERIAL)
    async def one(x: int) -> int:
        return x

    async with Engine(Blinking(uuid4().hex), Losing(1)):
        assert await one(1) == 1
        assert (await one.run_to_state(1)).name == "Cached"


class Slow(MemoryLockManager):
    """Gives back when it is allowed to; cut off before, it gives back nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.releasing, self.may, self.asked = asyncio.Event(), asyncio.Event(), 0

    async def acquire(self, *args: Any, **options: Any) -> Lease | None:
        self.asked += 1
        return await super().acquire(*args, **options)

    async def _release_lease(self, lease: Lease) -> None:
        self.releasing.set()
        await self.may.wait()
        await super()._release_lease(lease)


@pytest.mark.parametrize("how", ["refused", "failed", "committed"])
async def test_cancelled_while_the_key_is_given_back(how: str) -> None:
    """30: a run that is cancelled while its key is given back sees that to its end, and the next in line goes on."""
    storage, locks = MemoryStorage(), Slow()
    is_first = True

    @task(cache_policy=INPUTS, refresh_cache=True)
    async def relaxed(x: int) -> str:
        return "theirs"

    async def there() -> None:
        async with Engine(MemoryStorage(storage.name)):
            await relaxed(1)

    @task(cache_policy=SERIAL)
    async def one(x: int) -> str:
        nonlocal is_first
        is_first, first = False, is_first
        if first and how == "refused":
            await asyncio.create_task(there(), context=Context())
        if first and how == "failed":
            raise ValueError
        return "mine"

    async with Engine(storage, locks):
        running, waiting = asyncio.create_task(one(1)), asyncio.create_task(one(1))
        await locks.releasing.wait()
        for _ in range(2):
            running.cancel()
            await turns(3)
        assert not running.done()
        locks.may.set()
        with pytest.raises(asyncio.CancelledError):
            await running
        async with asyncio.timeout(10):
            assert await waiting == ("theirs" if how == "refused" else "mine")
        assert locks.asked == (
            2 if how == "failed" else 1
        )  # the next one is woken when the key is free, not before
        assert not await locks.is_locked(str(await one.cache_key(1)))


async def test_the_chunks_of_a_stream_that_is_not_published(side: Side) -> None:
    """8: of a stream whose record is not published nothing stays: its chunks are removed."""
    is_first = True

    @task(cache_policy=SERIAL)
    async def stream(x: int) -> AsyncIterator[int]:
        nonlocal is_first
        is_first, first = False, is_first
        for number in range(3):
            yield number
        if first:
            stranger = Stranger(side)
            await stranger.take()
            await stranger.leave()
            assert await elsewhere(side.way, stream) == [0, 1, 2]

    assert await stream(1) == [0, 1, 2]
    assert not is_first
    kept = [stat.key async for stat in side.storage.list("") if stat.key[0] != "."]
    assert len(kept) == 2  # the other's record, and its one chunk


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("how", ["lost", "written"])
async def test_a_block_that_lost_a_key(side: Side, members: int, how: str) -> None:
    """8, 6: a block is refused as a whole where one of its keys was lost, or written by somebody else meanwhile."""

    @task(cache_policy=INPUTS, refresh_cache=True)
    async def relaxed(x: int) -> str:
        return "theirs"

    @task(cache_policy=SERIAL)
    async def one(x: int) -> str:
        return "mine"

    async def block() -> None:
        async with transaction():
            await one(1)
            if how == "lost":
                stranger = Stranger(side)
                await stranger.take()
                await stranger.leave()
            else:
                await elsewhere(side.way, relaxed)
            if members == 2:
                await one(2)

    with pytest.raises(CommitError, match=str(await one.cache_key(1))):
        await block()
    assert await side.storage.stat(str(await one.cache_key(2))) is None or side.way.claims
    assert await one(1) == ("mine" if how == "lost" else "theirs")
