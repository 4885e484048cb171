"""Leases: renewed while their holder lives, noticed when they are lost, never longer than the others think."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import pytest
from lock_places import Place, until
from onceflow.locking import Lease, LeaseLostError, LockManager, StorageLockManager
from onceflow.storage import LocalStorage

Make = Callable[..., LockManager]
_SHORT = 0.5


@pytest.fixture
def leased(place: Place) -> Place:
    """A place whose locks are leases."""
    if place.kind not in ("redis", "storage_memory"):
        pytest.skip("no leases here, or the same code as over the other storage")
    return place


async def held(manager: LockManager, key: str, holder: str) -> Lease:
    lease = await manager.acquire(key, holder)
    assert lease is not None
    return lease


async def test_renewed_while_the_holder_lives(leased: Place, make: Make) -> None:
    """A lease that is held for three of its lengths is never anybody else's."""
    here, there = make(_SHORT), make(_SHORT)
    lease = await held(here, "key", "me")
    first = lease.expires_at
    assert first is not None
    assert await there.acquire("key", "you", timeout=3 * _SHORT) is None
    assert lease.expires_at is not None
    assert lease.expires_at > first + _SHORT
    lease.check()
    await lease.release()


async def test_no_renewal_after_release(leased: Place, make: Make) -> None:
    """A lease that was released is renewed no more: the key stays free."""
    here, there = make(_SHORT), make(_SHORT)
    lease = await held(here, "key", "me")
    await asyncio.sleep(_SHORT / 2)
    await lease.release()
    await asyncio.sleep(_SHORT / 2)
    assert not await there.is_locked("key")


async def test_a_loop_that_stands_still(leased: Place, make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """A holder whose loop stands still for longer than its lease finds it lost; the waiter has it by then."""
    here, there = make(_SHORT), make(_SHORT)
    lease = await held(here, "key", "me")

    async def other() -> int:
        second = await there.acquire("key", "you", timeout=20)
        assert second is not None
        return second.token

    def stand_still() -> int:
        return asyncio.run(other())  # in a thread, while this loop is blocked

    waiting = asyncio.to_thread(stand_still)
    task = asyncio.create_task(waiting)
    await asyncio.sleep(0.02)
    _block(3 * _SHORT)
    assert lease.lost
    with pytest.raises(LeaseLostError, match="'key'") as caught:
        lease.check()
    assert caught.value.token == lease.token
    token = await task
    assert token > lease.token
    await lease.release()
    assert "stood still" in caplog.text


def _block(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.monotonic()
        _rest(0.01)


_rest = time.sleep  # before blockbuster watches it: this test is about a loop that is blocked


async def test_loss_is_told(leased: Place, make: Make) -> None:
    """A lease that cannot be renewed is told lost, by waiting and by callback, before anybody else can have it."""
    manager = make(_SHORT)
    lease = await held(manager, "key", "me")
    told: list[str] = []
    lease.on_lost(told.append)
    manager._renew = _unavailable(manager)  # type: ignore[attr-defined]
    other = asyncio.ensure_future(make(_SHORT).acquire("key", "you", timeout=30))
    reason = await asyncio.wait_for(lease.wait_lost(), 10)
    assert not other.done()
    assert told == [reason]
    assert lease.lost
    late: list[str] = []
    lease.on_lost(late.append)
    assert late == [reason]
    assert await other is not None


async def test_a_renewal_that_fails_for_a_while(
    leased: Place, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """Renewals that fail for a part of the lease, and then work, cost one warning and nothing else."""
    here, there = make(1.2), make(1.2)
    lease = await held(here, "key", "me")
    works = here._renew  # type: ignore[attr-defined]
    asked: list[float] = []
    fails = _unavailable(here, asked)
    here._renew = fails  # type: ignore[attr-defined]
    await until(lambda: len(asked) >= 2)
    here._renew = works  # type: ignore[attr-defined]
    first = lease.expires_at
    assert first is not None
    await until(lambda: (lease.expires_at or 0) > first)
    lease.check()
    assert await there.is_locked("key")
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    await lease.release()


def _unavailable(manager: LockManager, asked: list[float] | None = None) -> Callable[[object], object]:
    from onceflow.locking import LockUnavailableError

    async def renew(claim: object) -> bool:
        if asked is not None:
            asked.append(0)
        raise LockUnavailableError("renew", "key", manager.url, "the network is gone", "")

    return renew


async def test_suspend(leased: Place, make: Make) -> None:
    """After a suspend, which only the boot-time clock counts, the holder finds its lease lost."""
    manager = make()
    asleep = 0.0
    clock = manager._clock  # type: ignore[attr-defined]
    manager._clock = lambda: clock() + asleep  # type: ignore[attr-defined]
    lease = await held(manager, "key", "me")
    lease.check()
    asleep = 29.0
    assert lease.lost
    with pytest.raises(LeaseLostError):
        lease.check()
    await lease.release()


async def test_wall_clock_does_not_matter(leased: Place, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wall clock that is a day off, either way, changes nothing but the numbers that people read."""
    here, there = make(_SHORT), make(_SHORT)
    lease = await held(here, "key", "me")
    real, real_ns = time.time, time.time_ns
    for offset in (86400, -86400):
        monkeypatch.setattr(time, "time", lambda offset=offset: real() + offset)
        monkeypatch.setattr(time, "time_ns", lambda offset=offset: real_ns() + offset * 10**9)
        assert await there.acquire("key", "you", timeout=_SHORT) is None
        lease.check()
    await lease.release()
    second = await held(there, "key", "you")
    assert second.token > lease.token


async def test_abandoned_lease_is_taken_over(leased: Place, make: Make) -> None:
    """B10: the key of a holder that is no longer heard of is the waiter's within 1.3 leases and one look."""
    here, there = make(_SHORT), make(_SHORT)
    lease = await held(here, "key", "me")
    lease._stop()  # as if its process had been killed
    began = time.monotonic()
    second = await there.acquire("key", "you", timeout=10)
    assert second is not None
    assert second.token > lease.token
    assert time.monotonic() - began > _SHORT * 0.8  # not before: others may only wait
    assert lease.lost
    await lease.release()
    second.check()
    assert await there.is_held_by("key", "you")


async def test_an_abandoned_lease_is_free(leased: Place, make: Make) -> None:
    """B10: who only watches a key finds it free, too, when its holder is no longer heard of."""
    here, there = make(_SHORT), make(_SHORT)
    lease = await held(here, "key", "me")
    lease._stop()  # as if its process had been killed
    assert await there.wait_until_free("key", timeout=10)


async def test_expiry_as_text() -> None:
    """A lease shows itself with its key, holder, token and state."""
    from onceflow.storage import MemoryStorage

    async with StorageLockManager(MemoryStorage()) as manager:
        lease = await held(manager, "key", "me")
        assert f"key='key', holder='me', token={lease.token}, held" in repr(lease)
        await lease.release()
        assert "released" in repr(lease)


def test_lease_lengths_that_cannot_work(tmp_path: object) -> None:
    """A lease of no or endless length is refused when the manager is made."""
    from onceflow.locking import LockConfigurationError, RedisLockManager

    for seconds in (0, -1, float("inf"), float("nan")):
        with pytest.raises(LockConfigurationError, match="lease"):
            StorageLockManager(LocalStorage(str(tmp_path)), lease_seconds=seconds)
        with pytest.raises(LockConfigurationError, match="lease"):
            RedisLockManager(lease_seconds=seconds)
