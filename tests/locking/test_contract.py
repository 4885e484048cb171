"""What every lock manager does, whatever keeps its locks."""

from __future__ import annotations

import asyncio
import logging
import pickle
import threading
from collections.abc import Callable
from datetime import timedelta

import pytest
from lock_places import Place, turns, until
from onceflow.locking import (
    Lease,
    LeaseLostError,
    LockClosedError,
    LockConfigurationError,
    LockManager,
    LockNotHeldError,
    LockTimeoutError,
    lock_manager_from_url,
)
from onceflow.locking._waiting import report as telling

Make = Callable[..., LockManager]


async def held(manager: LockManager, key: str, holder: str, **options: float) -> Lease:
    lease = await manager.acquire(key, holder, **options)
    assert lease is not None
    return lease


async def test_held_and_free(manager: LockManager) -> None:
    """L1: a free key that is acquired is locked, and free after its release."""
    assert not await manager.is_locked("key")
    lease = await held(manager, "key", "me")
    assert (lease.key, lease.holder, lease.lost) == ("key", "me", False)
    lease.check()
    assert await manager.is_locked("key")
    await manager.release("key", "me")
    assert not await manager.is_locked("key")
    with pytest.raises(LeaseLostError):
        lease.check()


async def test_seen_from_elsewhere(make: Make) -> None:
    """L1, L8: another process sees who holds the key, and that it is free again."""
    here, there = make(), make()
    await held(here, "key", "me")
    assert await there.is_locked("key")
    assert await there.is_held_by("key", "me")
    assert not await there.is_held_by("key", "you")
    assert await there.acquire("key", "you", timeout=0) is None
    await here.release("key", "me")
    assert not await there.is_locked("key")
    assert not await there.is_held_by("key", "me")
    assert await there.acquire("key", "you", timeout=0)


async def test_acquire_again(manager: LockManager) -> None:
    """L2: the holder that acquires again gets its lease, and one release suffices."""
    lease = await held(manager, "key", "me")
    assert await manager.acquire("key", "me") is lease
    await manager.release("key", "me")
    assert not await manager.is_locked("key")


async def test_same_holder_waits_together(manager: LockManager) -> None:
    """L2: two tasks of one holder that wait get one lease, though another stands between them."""
    await held(manager, "key", "other")
    tasks = [asyncio.create_task(manager.acquire("key", holder)) for holder in ("me", "you", "me")]
    await turns(5)
    await manager.release("key", "other")
    first, again = await tasks[0], await tasks[2]
    assert first is again is not None
    assert not tasks[1].done()
    await manager.release("key", "me")
    assert (await tasks[1]) is not None


async def test_acquire_again_while_releasing(make: Make) -> None:
    """L2: a holder that acquires again while its release is under way gets a new lease, not the old one."""
    manager, other = make(), make()
    for number in range(0, 12, 2):
        first = await held(manager, "key", "me")
        releasing = asyncio.create_task(manager.release("key", "me"))
        await turns(number)
        second = await held(manager, "key", "me")
        await releasing
        if second is not first:
            second.check()
            assert await other.is_held_by("key", "me")
            await second.release()
        assert not await other.is_locked("key")


async def test_hold_timeout(make: Make, place: Place) -> None:
    """L3: when the hold timeout is over the key is free without a release, for this process and others."""
    here, there = make(), make()
    for manager in (here, there):  # the first use of a bucket takes its time
        async with manager.lock("other"):
            pass
    lease = await held(here, "key", "me", hold_timeout=1.0 if place.kind == "s3" else 0.2)
    assert lease.expires_at is not None
    assert await there.acquire("key", "you", timeout=0) is None
    assert await asyncio.wait_for(lease.wait_lost(), 10)
    assert lease.lost
    assert await there.acquire("key", "you", timeout=5)
    with pytest.raises(LockNotHeldError):
        await here.release("key", "me")
    await lease.release()
    assert await there.is_held_by("key", "you")


async def test_hold_timeout_of_a_holder_that_stands_still(make: Make, place: Place) -> None:
    """L3: the hold timeout is kept though the holder's event loop is gone."""
    if place.kind == "file":
        pytest.skip("a kernel lock lasts as long as its process, or until somebody in it looks")
    manager = make()
    await asyncio.to_thread(asyncio.run, _hold_and_leave(manager))
    assert await manager.acquire("key", "you", timeout=5)


async def _hold_and_leave(manager: LockManager) -> None:
    await held(manager, "key", "me", hold_timeout=0.2)


async def test_acquire_timeout(manager: LockManager) -> None:
    """L4: an acquire that times out returns None, and the lock and the line are as they were."""
    lease = await held(manager, "key", "me")
    assert await manager.acquire("key", "you", timeout=0) is None
    assert await manager.acquire("key", "you", timeout=0.05) is None
    lease.check()
    assert await manager.is_held_by("key", "me")
    await manager.release("key", "me")
    assert await manager.acquire("key", "him", timeout=0)


async def test_acquire_timeout_in_line(manager: LockManager) -> None:
    """B6: who is not the first in line has a timeout too; the others stay where they are."""
    await held(manager, "key", "me")
    first = asyncio.create_task(manager.acquire("key", "you"))
    await turns(5)
    async with asyncio.timeout(5):
        assert await manager.acquire("key", "him", timeout=0.05) is None
    assert not first.done()
    await manager.release("key", "me")
    assert await first is not None


async def test_release_by_a_stranger(make: Make) -> None:
    """L6: a release by one who does not hold the key says so by name, and the holder is not disturbed."""
    here, there = make(), make()
    lease = await held(here, "key", "me")
    for manager in (here, there):
        with pytest.raises(LockNotHeldError, match="'you' does not hold the lock 'key'") as caught:
            await manager.release("key", "you")
        assert isinstance(caught.value, ValueError)
        assert (caught.value.key, caught.value.holder, caught.value.owner) == ("key", "you", "me")
    lease.check()
    assert await there.is_held_by("key", "me")


async def test_release_twice(manager: LockManager) -> None:
    """L6: a second release is an error, also while nobody holds the key; `Lease.release` may be repeated."""
    lease = await held(manager, "key", "me")
    await lease.release()
    await lease.release()
    with pytest.raises(LockNotHeldError, match="nobody holds it"):
        await manager.release("key", "me")
    again = await held(manager, "key", "me")
    await lease.release()
    again.check()
    assert await manager.is_held_by("key", "me")


async def test_wait_until_free(make: Make) -> None:
    """L9: the wait is False while the key is held, True when it is freed or was free, and takes nothing."""
    here, there = make(), make()
    assert await there.wait_until_free("key", timeout=0)
    await held(here, "key", "me")
    for manager in (here, there):
        assert not await manager.wait_until_free("key", timeout=0)
        assert not await manager.wait_until_free("key", timeout=0.05)
    waiting = [asyncio.create_task(m.wait_until_free("key")) for m in (here, there, there, here)]
    await turns(20)
    await here.release("key", "me")
    assert await asyncio.gather(*waiting) == [True] * 4
    assert not await there.is_locked("key")


async def test_one_waiter_proceeds(make: Make) -> None:
    """L10: of the waiting tasks one proceeds at a release, in the order in which they came."""
    manager = make()
    order: list[int] = []

    async def visit(number: int) -> None:
        async with manager.lock("key"):
            order.append(number)
            await turns(3)
            assert order[-1] == number

    await held(manager, "key", "me")
    tasks = []
    for number in range(10):
        tasks.append(asyncio.create_task(visit(number)))
        await turns(2)
    assert order == []
    await manager.release("key", "me")
    await asyncio.gather(*tasks)
    assert order == list(range(10))


async def test_waiters_in_other_threads(manager: LockManager) -> None:
    """L10: waiters on event loops of other threads proceed one after the other."""
    inside = 0
    most = 0

    async def visit() -> None:
        nonlocal inside, most
        async with manager.lock("key"):
            inside += 1
            most = max(most, inside)
            await turns(3)
            inside -= 1

    async def several() -> None:
        await asyncio.gather(*(visit() for _ in range(5)))

    lease = await held(manager, "key", "me")
    threads = [asyncio.to_thread(asyncio.run, several()) for _ in range(3)]
    running = asyncio.gather(*threads)
    await turns(50)
    await lease.release()
    await running
    assert (most, inside) == (1, 0)
    assert not await manager.is_locked("key")


async def test_tokens_grow(make: Make) -> None:
    """Each acquisition of a key has a greater token than all before it, whoever acquires."""
    managers = [make(), make()]
    tokens = []
    for number in range(20):
        async with managers[number % 2].lock("key") as lease:
            tokens.append(lease.token)
    assert tokens == sorted(set(tokens))


async def test_lock_block(manager: LockManager) -> None:
    """B4: a block frees the key when it ends, fails, times out or is cancelled."""
    async with manager.lock("key", "me") as lease:
        assert lease.holder == "me"
        with pytest.raises(LockTimeoutError, match=r"'key'.* 'me' holds it") as caught:
            async with manager.lock("key", "you", timeout=0.02):
                pytest.fail("two inside")
        assert isinstance(caught.value, TimeoutError)
        assert caught.value.owner == "me"
    assert not await manager.is_locked("key")
    with pytest.raises(RuntimeError, match="broken"):
        async with manager.lock("key"):
            raise RuntimeError("broken")
    assert not await manager.is_locked("key")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02), manager.lock("key"):
            await asyncio.Event().wait()
    assert not await manager.is_locked("key")


async def test_blocks_of_one_holder_nest(manager: LockManager) -> None:
    """Blocks of one holder nest: the outermost frees the key, or nobody if it was acquired before."""
    async with manager.lock("key", "me") as outer:
        async with manager.lock("key", "me") as inner:
            assert inner is outer
        assert await manager.is_held_by("key", "me")
    assert not await manager.is_locked("key")
    await held(manager, "key", "me")
    async with manager.lock("key", "me"):
        pass
    assert await manager.is_held_by("key", "me")


async def test_one_block_for_several_tasks(manager: LockManager) -> None:
    """B7: tasks that share what `lock()` returned are inside one at a time; with a holder they are inside together."""
    shared, inside = manager.lock("key"), 0

    async def visit() -> None:
        nonlocal inside
        async with shared:
            inside += 1
            assert inside == 1
            await turns(3)
            inside -= 1

    await asyncio.gather(*(visit() for _ in range(5)))
    assert not await manager.is_locked("key")
    named = manager.lock("key", "me")
    async with named:
        async with named:
            assert await manager.is_held_by("key", "me")
        assert await manager.is_held_by("key", "me")
    assert not await manager.is_locked("key")


@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "elsewhere"])
async def test_a_long_wait_is_told(
    make: Make, elsewhere: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B11: of many who wait for long the first in line says so, twice: for which key, and who holds it."""
    monkeypatch.setattr(telling, "TELL_AFTER", ((0.02, logging.INFO), (0.04, logging.WARNING)))
    caplog.set_level(logging.INFO, "onceflow")
    manager = make()
    await held(make() if elsewhere else manager, "key", "the holder")
    waiting = [asyncio.create_task(manager.acquire("key", f"waiter {number}")) for number in range(10)]
    await until(lambda: len(caplog.records) == 2)
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    for record in caplog.records:
        assert "'waiter 0'" in record.message
        assert "'key'" in record.message
        assert "'the holder' holds it" in record.message
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)


async def test_waiting_needs_no_thread(make: Make) -> None:
    """B5: waiters hold no thread: unrelated work proceeds, and none is started for them."""
    here, there = make(), make()
    lease = await held(here, "key", "me")
    assert await there.acquire("key", "you", timeout=0) is None
    before = threading.active_count()
    tasks = [asyncio.create_task(m.acquire("key", f"{n}")) for n in range(200) for m in (here, there)]
    await asyncio.sleep(0.1)
    assert threading.active_count() <= before
    assert await asyncio.to_thread(lambda: "done") == "done"
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await lease.release()
    assert await there.acquire("key", "you", timeout=0)


@pytest.mark.parametrize(
    "key",
    [
        "a/b",
        "../../outside",
        "..",
        ".",
        "v1.0",
        "v1.1",
        "con",
        "Grüße 🎉",
        "x" * 300,
        "a\nb",
        "a\0b",
        " ",
        "K",
        "k",
    ],
)
async def test_odd_keys(make: Make, key: str) -> None:
    """B30: any text is a key, with one safe name that no other key has."""
    manager, other = make(), make()
    others = ["a%2Fb", "outside", "%2E", "v1", "x" * 299, "x" * 301, "ab", key + "x"]
    lease = await held(manager, key, "me\n/ü")
    assert lease.key == key
    assert await other.is_held_by(key, "me\n/ü")
    for different in others:
        assert not await other.is_locked(different)
    await lease.release()
    assert not await other.is_locked(key)


async def test_bad_requests(manager: LockManager) -> None:
    """An empty key or holder and a negative time are refused at once, by name."""
    with pytest.raises(LockConfigurationError, match="key"):
        await manager.acquire("", "me")
    with pytest.raises(LockConfigurationError, match="holder"):
        await manager.acquire("key", "")
    with pytest.raises(LockConfigurationError, match="timeout"):
        await manager.acquire("key", "me", timeout=-1)
    with pytest.raises(LockConfigurationError, match="timeout"):
        await manager.acquire("key", "me", timeout=float("nan"))
    with pytest.raises(LockConfigurationError, match="hold_timeout"):
        await manager.acquire("key", "me", hold_timeout=0)
    with pytest.raises(LockConfigurationError, match="holder"):
        await manager.acquire("key", "m\ud800")
    with pytest.raises(TypeError, match="key"):
        await manager.acquire(b"key", "me")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="timeout"):
        await manager.acquire("key", "me", timeout=timedelta(seconds=1))  # type: ignore[arg-type]
    assert not await manager.is_locked("key")


def test_without_asyncio(place: Place) -> None:
    """88: where asyncio's loop does not run, as under trio, every method says what is needed."""
    manager = lock_manager_from_url(place.url)
    for work in (
        manager.acquire("key", "me"),
        manager.release("key", "me"),
        manager.is_locked("key"),
        manager.wait_until_free("key"),
        manager.lock("key").__aenter__(),
        manager.aclose(),
    ):
        with pytest.raises(LockConfigurationError, match="asyncio"):
            work.send(None)


async def test_pickles(make: Make) -> None:
    """A manager that is pickled, as for another process, keeps the same locks."""
    manager = make()
    other = pickle.loads(pickle.dumps(manager))
    try:
        assert (type(other), other.url) == (type(manager), manager.url)
        async with manager.lock("key", "me"):
            assert await other.is_held_by("key", "me")
    finally:
        await other.aclose()


async def test_close(make: Make) -> None:
    """Closing frees what the manager holds, fails those who wait, and refuses further use."""
    manager, other = make(), make()
    lease = await held(manager, "key", "me")
    waiting = asyncio.create_task(manager.acquire("key", "you"))
    watching = asyncio.create_task(manager.wait_until_free("key"))
    await turns(20)
    await manager.aclose()
    await manager.aclose()
    for task in (waiting, watching):
        with pytest.raises(LockClosedError):
            await task
    with pytest.raises(LockClosedError):
        await manager.acquire("other", "me")
    with pytest.raises(LockClosedError):
        await manager.is_locked("key")
    with pytest.raises(LeaseLostError):
        lease.check()
    assert not await other.is_locked("key")


async def test_nothing_is_kept(make: Make) -> None:
    """A manager remembers nothing of keys that nobody holds or waits for."""
    manager = make()
    for number in range(20):
        async with manager.lock(f"key-{number}"):
            assert not await manager.wait_until_free(f"key-{number}", timeout=0.001)
    assert manager._room.places == {}  # type: ignore[attr-defined]


async def test_mutual_exclusion(make: Make, place: Place) -> None:
    """B7: of many contenders over tasks, managers and threads there are never two inside."""
    managers = [make(), make()]
    inside: set[str] = set()
    entered = 0

    async def visit(manager: LockManager, key: str) -> None:
        nonlocal entered
        async with manager.lock(key):
            assert key not in inside
            inside.add(key)
            await turns(2)
            inside.remove(key)
            entered += 1

    async def visits(number: int) -> None:
        await asyncio.gather(*(visit(m, f"key-{n % 3}") for n in range(number) for m in managers))

    number = {"memory": 150, "redis": 40}.get(place.kind, 8)
    await asyncio.gather(visits(number), asyncio.to_thread(asyncio.run, visits(number)))
    assert entered == 4 * number
    await until(lambda: all(not m._room.places for m in managers))  # type: ignore[attr-defined]


async def test_closing_leaves_others_in_line(make: Make) -> None:
    """A manager that is closed ends its own waits, not those of another one in the same process."""
    holder, other, closed = make(), make(), make()
    lease = await holder.acquire("key", "me")
    assert lease is not None
    theirs = asyncio.create_task(closed.acquire("key", "closed"))
    waiting = asyncio.create_task(other.acquire("key", "you"))
    watching = asyncio.create_task(other.wait_until_free("key"))
    await asyncio.sleep(0.02)
    await closed.aclose()
    with pytest.raises(LockClosedError):
        await theirs
    lease.check()
    assert await holder.is_held_by("key", "me")
    await lease.release()
    async with asyncio.timeout(10):
        assert await waiting is not None
    watching.cancel()
    await asyncio.wait([watching])
