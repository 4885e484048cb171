"""Leases in a storage in particular: what they cost, and what a store can do to them."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import msgpack
import pytest
from lock_places import turns, until
from onceflow.locking import (
    LockAccessError,
    LockConfigurationError,
    LockUnavailableError,
    StorageLockManager,
    lock_manager_from_url,
)
from onceflow.locking import _storage as storage_locks
from onceflow.locking._waiting.acquisition import Claim
from onceflow.storage import (
    ConditionsUnsupportedError,
    MemoryStorage,
    StorageAccessError,
    StorageUnavailableError,
    Stored,
    VersionMismatchError,
)


class Watched(MemoryStorage):
    """Counts requests, and can lose the answer of a write, before or after it happened."""

    def __init__(self, name: str | None = None) -> None:
        super().__init__(name)
        self.counts: Counter[str] = Counter()
        self.lose_before = self.lose_after = 0
        self.broken: Exception | None = None
        self.probes = 0

    async def ensure_conditional(self) -> None:
        self.probes += 1

    async def fetch(self, *args: Any, **options: Any) -> Stored | None:
        self.counts["read"] += 1
        if self.broken is not None:
            raise self.broken
        return await super().fetch(*args, **options)

    async def write(self, *args: Any, **options: Any) -> str:
        self.counts["write"] += 1
        if self.lose_before:
            self.lose_before -= 1
            raise StorageUnavailableError("write", str(args[0]), self.url, "connection reset", "")
        version = await super().write(*args, **options)
        if self.lose_after:
            self.lose_after -= 1
            raise StorageUnavailableError("write", str(args[0]), self.url, "connection reset", "")
        return version

    async def delete(self, *args: Any, **options: Any) -> bool:
        self.counts["delete"] += 1
        return await super().delete(*args, **options)


async def test_requests_without_contention() -> None:
    """2.12: an acquire is 1 read and 1 write, a release 1 write; nothing is ever deleted."""
    storage = Watched()
    async with StorageLockManager(storage) as manager:
        for _ in range(3):
            storage.counts.clear()
            assert await manager.acquire("key", "me")
            assert storage.counts == {"read": 1, "write": 1}
            await manager.release("key", "me")
            assert storage.counts == {"read": 1, "write": 2}
        storage.counts.clear()
        assert not await manager.is_locked("key")
        assert storage.counts == {"read": 1}
        assert storage.probes == 1
        assert manager._seen == {}


@pytest.mark.parametrize("renewals", [0, 10])
async def test_requests_while_many_wait(renewals: int) -> None:
    """22: however many wait in a process, one of them reads, ever more seldom, renewed or not, and nobody writes."""
    storage = Watched()
    async with StorageLockManager(storage) as here, StorageLockManager(storage) as there:
        lease = await here.acquire("key", "me")
        assert lease is not None
        storage.counts.clear()
        tasks = [asyncio.create_task(there.acquire("key", f"{number}")) for number in range(200)]
        tasks += [asyncio.create_task(there.wait_until_free("key")) for number in range(200)]  # type: ignore[arg-type]
        for number in range(10):
            await asyncio.sleep(0.1)
            if number < renewals:
                assert await here._renew(lease._claim)
        assert storage.counts["read"] <= 2 * 6  # after 50, 125, 310, 780 ms, for one of each kind
        assert storage.counts["write"] == renewals
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert there._seen == {}


async def test_local_hand_over_without_waiting() -> None:
    """A release wakes the next in line of this process at once, for 1 read and 1 write."""
    storage = Watched()
    async with StorageLockManager(storage) as manager:
        await manager.acquire("key", "me")
        tasks = [asyncio.create_task(manager.acquire("key", f"{number}")) for number in range(20)]
        await asyncio.sleep(0.01)
        storage.counts.clear()
        for number, task in enumerate(tasks):
            await manager.release("key", "me" if number == 0 else f"{number - 1}")
            async with asyncio.timeout(0.04):  # sooner than any poll
                assert await task
        assert storage.counts == {"read": 20, "write": 40}


@pytest.mark.parametrize("after", [True, False])
async def test_lost_answers(after: bool) -> None:
    """35, 36: when the answer to a write is lost, before or after it happened, reading tells who won."""
    storage = Watched()
    async with StorageLockManager(storage) as manager, StorageLockManager(storage) as other:
        for _ in range(3):
            storage.lose_after, storage.lose_before = (1, 0) if after else (0, 1)
            lease = await manager.acquire("key", "me", timeout=5)  # less than a lease, which is another way
            assert lease is not None
            assert await other.is_held_by("key", "me")
            await asyncio.gather(manager._renew(lease._claim))
            storage.lose_after, storage.lose_before = 0, 0
            await lease.release()
            assert not await other.is_locked("key")


async def test_lost_answer_to_a_renewal() -> None:
    """A renewal that happened, though its answer was lost, is found to be one's own at the next."""
    storage = Watched()
    async with StorageLockManager(storage, lease_seconds=0.6) as manager:
        lease = await manager.acquire("key", "me")
        assert lease is not None
        storage.lose_after = 2
        await asyncio.sleep(0.9)
        lease.check()
        await lease.release()
        assert not await manager.is_locked("key")


async def test_unavailable_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """41: a storage that never answers is an error that names key and storage; nothing is held afterwards."""
    monkeypatch.setattr(storage_locks, "_ASK_SECONDS", 0.5)
    storage = Watched()
    async with StorageLockManager(storage, lease_seconds=1) as manager:
        storage.broken = StorageUnavailableError("read", "key", storage.url, "503", "Wait.")
        with pytest.raises(LockUnavailableError, match=r"'key'.*503") as caught:
            await manager.acquire("key", "me")
        assert isinstance(caught.value, ConnectionError)
        storage.broken = StorageAccessError("read", "key", storage.url, "denied", "Allow it.")
        with pytest.raises(LockAccessError, match="Allow it"):
            await manager.acquire("key", "me")
        storage.broken = None
        assert await manager.acquire("key", "you", timeout=0)


async def test_who_is_never_the_first_waits_his_turn() -> None:
    """B7: a try that others are always faster than ends as one for a held key, not as one on a store out of reach."""

    class Raced(MemoryStorage):
        losses = tries = 0

        async def write(self, key: str, data: Any, **options: Any) -> str:
            self.tries += 1
            if self.losses:
                self.losses -= 1
                raise VersionMismatchError(key, self.url, "theirs")
            return await super().write(key, data, **options)

    storage = Raced()
    async with StorageLockManager(storage) as manager:
        async with manager.lock("key"):
            pass
        storage.losses, storage.tries = 1000, 0
        assert await manager.acquire("key", "me", timeout=0) is None
        assert storage.tries == 3
        storage.losses = 4
        assert await manager.acquire("key", "me") is not None


async def test_a_slow_store_and_a_short_lease() -> None:
    """Asking for a key may take longer than its lease lasts, which begins with the write that takes the key."""

    class Slow(Watched):
        async def fetch(self, *args: Any, **options: Any) -> Stored | None:
            await asyncio.sleep(0.6)
            return await super().fetch(*args, **options)

    async with StorageLockManager(Slow(), lease_seconds=0.5) as manager:
        async with manager.lock("key") as lease:
            lease.check()
        assert manager._has_answered
        second = await manager.acquire("key", "me")
        assert second is not None
        second.check()


async def test_a_hanging_store_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """37: a store that hangs is given up after the deadline of a request."""
    monkeypatch.setattr(storage_locks, "_ASK_SECONDS", 0.2)

    class Hanging(Watched):
        async def write(self, *args: Any, **options: Any) -> str:
            await asyncio.Event().wait()
            raise AssertionError

    async with StorageLockManager(Hanging(), lease_seconds=0.4) as manager:
        with pytest.raises(LockUnavailableError, match=r"no answer within 0\.2 s"):
            await manager.acquire("key", "me")


async def test_store_without_conditions() -> None:
    """49: a store that ignores conditions is refused before the first lock is written."""

    class Careless(Watched):
        async def ensure_conditional(self) -> None:
            raise ConditionsUnsupportedError(self.url, "PUT If-None-Match")

    storage = Careless()
    async with StorageLockManager(storage) as manager:
        with pytest.raises(LockConfigurationError, match="If-None-Match"):
            await manager.acquire("key", "me")
        assert storage.counts["write"] == 0


NEWER = msgpack.packb([2, False, 1, "", b"", 0.1, "newer"])


@pytest.mark.parametrize(
    "body",
    [b"", b"\xc1", b"half a lo", msgpack.packb([2, "newer"]), NEWER, msgpack.packb({"a": 1}), b"\x97" * 50],
)
async def test_unreadable_object(body: bytes) -> None:
    """19: an object that cannot be read is a held lock, and free when it stays so for a lease."""
    storage = Watched()
    await storage.write(".locks/key", body)
    async with StorageLockManager(storage, lease_seconds=0.1) as manager:
        assert await manager.is_locked("key")
        assert await manager.acquire("key", "me", timeout=0) is None
        lease = await manager.acquire("key", "me", timeout=5)
        assert lease is not None
        await lease.release()


async def test_no_object_comes_back() -> None:
    """2.1: two writes of one claim differ, so that where a version is a hash of the content none comes back."""
    storage = Watched()
    async with StorageLockManager(storage) as manager:
        lease = await manager.acquire("key", "me")
        assert lease is not None
        bodies = {await storage.read(".locks/key")}
        for _ in range(3):
            manager._lease_of_claim = lambda claim: 30.0  # type: ignore[method-assign]  # to the last digit
            assert await manager._renew(lease._claim)
            bodies.add(await storage.read(".locks/key"))
        assert len(bodies) == 4


@pytest.mark.parametrize("is_there", [True, False])
async def test_only_one_of_many(is_there: bool) -> None:
    """6: of ten that have read the same object, or none, one gets the lock."""

    class Slow(Watched):
        async def write(self, *args: Any, **options: Any) -> str:
            await turns(20)
            return await super().write(*args, **options)

    storage = Slow()
    ten = [StorageLockManager(storage) for _ in range(10)]
    if is_there:
        async with ten[0].lock("key"):
            pass
    leases = await asyncio.gather(*(one.acquire("key", "me", timeout=0) for one in ten))
    assert sum(lease is not None for lease in leases) == 1
    for one in ten:
        await one.aclose()


async def test_the_same_holder_elsewhere_waits() -> None:
    """The lock of another manager is not taken for one's own, though the names of their holders are the same."""
    storage = Watched()
    async with StorageLockManager(storage) as manager, StorageLockManager(storage) as other:
        assert await manager.acquire("key", "me")
        assert await other.acquire("key", "me", timeout=0) is None


async def test_what_is_not_ones_own_is_left_alone() -> None:
    """9: neither a renewal nor a release, sent late, touches a lock that is another's, free, or not to be read."""
    storage = Watched()
    released = None
    async with StorageLockManager(storage) as manager, StorageLockManager(storage) as other:

        async def send_late(claim: Claim) -> None:
            before = await storage.read(".locks/key")
            for handle in {claim.handle, None} - {released}:  # None: it does not know its last version
                claim.handle = handle
                await manager._give_back(claim)
                claim.handle = handle
                assert not claim.nonce or not await manager._renew(claim)
            assert await storage.read(".locks/key") == before

        first = await manager.acquire("key", "me")
        assert first is not None
        before = first._claim.handle
        await first.release()
        released, first._claim.handle = first._claim.handle, before
        await send_late(first._claim)
        assert await other.acquire("key", "you")
        await send_late(first._claim)
        await storage.write(".locks/key", b"written by a newer version")
        await send_late(first._claim)
        await send_late(Claim("key", "me", 0.0, 1.0))  # cut off before its request began
        await storage.delete(".locks/key")
        assert not await manager._renew(first._claim)


async def test_when_a_lease_counts_as_abandoned() -> None:
    """B10: after 1.1 times the lease that its holder has named and 0.2 s, by the waiter's clock; and not before."""
    storage = Watched()
    here, there = StorageLockManager(storage, lease_seconds=30), StorageLockManager(storage, lease_seconds=5)
    async with here, there:
        time = 1000.0
        there._clock = lambda: time
        assert await here.acquire("key", "me")
        storage.counts.clear()
        waiting = asyncio.create_task(there.acquire("key", "you"))
        for seconds in (0.0, 33.19):
            time += seconds
            seen = storage.counts["read"]
            await until(lambda seen=seen: storage.counts["read"] >= seen + 2)  # type: ignore[misc]
            assert not waiting.done()
        time += 0.02
        async with asyncio.timeout(5):
            assert await waiting


async def test_a_token_outlives_a_lost_answer() -> None:
    """2.2: a claim of which nobody knows whether it arrived is given back with the token that it has there."""
    storage = Watched()
    async with StorageLockManager(storage) as manager:
        lease = await manager.acquire("key", "me")
        assert lease is not None
        lease._claim.handle, lease._claim.token = None, 0  # as if its answer had been lost for good
        await lease.release()
        held, token = msgpack.unpackb(await storage.read(".locks/key"))[1:3]
        assert not held
        assert token == lease.token


async def test_deleted_objects() -> None:
    """20: deleting the object of a free key does no harm; of a held one, the holder learns that it lost it."""
    storage = Watched()
    async with StorageLockManager(storage, lease_seconds=0.6) as manager:
        async with manager.lock("key") as first:
            pass
        await storage.delete(".locks/key")
        second = await manager.acquire("key", "me")
        assert second is not None
        assert second.token > first.token
        await storage.delete(".locks/key")
        await asyncio.wait_for(second.wait_lost(), 5)
        third = await manager.acquire("key", "you", timeout=1)
        assert third is not None
        await second.release()
        third.check()
        await third.release()


async def test_owner_of_the_storage(tmp_path: object) -> None:
    """A manager made from a URL closes its storage; one that was given a storage leaves it open."""
    storage = Watched()
    async with StorageLockManager(storage) as manager, manager.lock("key"):
        pass
    await storage.stat("key")
    made = lock_manager_from_url("storage+memory://owned")
    assert isinstance(made, StorageLockManager)
    async with made, made.lock("key"):
        pass
    with pytest.raises(RuntimeError, match="closed"):
        await made.storage.stat("key")


def test_not_a_storage() -> None:
    """A path instead of a storage is refused with what to use instead."""
    with pytest.raises(LockConfigurationError, match="lock_manager_from_url"):
        StorageLockManager("/tmp")  # type: ignore[arg-type]
