"""What the managers' common half makes of each answer: shown by a manager whose answers are written down."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from lock_places import turns
from onceflow.locking import Lease, LockClosedError, LockNotHeldError, LockUnavailableError, MemoryLockManager
from onceflow.locking._waiting.acquisition import Busy, Claim, patience
from onceflow.locking._waiting.manager import QueuedLockManager

FAR = 60.0
"""Seconds after which a test has failed long ago: whoever waits for so long was forgotten."""
Answer = Callable[[], Awaitable[Busy | None]]


async def free() -> Busy | None:
    return None


async def busy() -> Busy | None:
    return Busy("somebody", FAR)


async def gone() -> Busy | None:
    raise LockUnavailableError("acquire", "key", "written://down", "it is gone", "Wait.")


class Written(QueuedLockManager):
    """Answers requests as it was told, one after the other; the last answer for good. Notes what is asked."""

    def __init__(
        self, *takes: Answer, looks: tuple[Answer, ...] = (), watches: tuple[bool, ...] = ()
    ) -> None:
        super().__init__()
        self.takes, self.looks, self.watches = list(takes), list(looks), list(watches)
        self.renews: list[Answer] = []
        self.asked: list[str] = []
        self.held: set[str] = set()
        self.gate: asyncio.Event | None = None
        self.is_gone = False

    @property
    def url(self) -> str:
        return "written://down"

    async def _take(self, claim: Claim) -> Busy | None:
        self.asked.append("take")
        answer = await (self.takes.pop(0) if len(self.takes) > 1 else self.takes[0])()
        if answer is None:
            assert claim.key not in self.held, "granted before it was given back"
            claim.token = len(self.asked)
            self.held.add(claim.key)
        return answer

    async def _give_back(self, claim: Claim) -> None:
        self.asked.append("give back")
        if self.gate is not None:
            await self.gate.wait()
        if self.is_gone:
            raise LockUnavailableError("release", claim.key, self.url, "it is gone", "Wait.")
        await turns(3)  # as any request takes a while
        self.held.discard(claim.key)

    async def _renew(self, claim: Claim) -> bool:
        self.asked.append("renew")
        await self.renews.pop(0)()
        return claim.key in self.held

    async def _look(self, key: str) -> Busy | None:
        self.asked.append("look")
        return await (self.looks.pop(0) if len(self.looks) > 1 else self.looks[0])()

    async def _watch(self, key: str) -> bool:
        self.asked.append("watch")
        return self.watches.pop(0) if self.watches else False


# --- waiting


async def test_a_message_during_the_request() -> None:
    """13: that the key may be free, said while the request that finds it held is under way, is not lost."""

    async def busy_but_told() -> Busy | None:
        manager._freed("key")
        return await busy()

    manager = Written(busy_but_told, free)
    async with manager, asyncio.timeout(5):
        assert await manager.acquire("key", "me")
    assert manager.asked == ["take", "watch", "take", "give back"]


async def test_a_message_before_it_is_listened_to() -> None:
    """13: who has just begun to listen asks once more, since what was said before was not heard; and once only."""
    manager = Written(busy, busy, free, watches=(True,))
    async with manager:
        waiting = asyncio.create_task(manager.acquire("key", "me"))
        await turns(10)
        assert manager.asked == ["take", "watch", "take"]
        manager._freed("key")
        assert await waiting
    assert manager.asked == ["take", "watch", "take", "take", "give back"]


async def test_a_watcher_listens_before_it_looks_again() -> None:
    """13: the same of who only watches: free by the second look, it need not wait for a message."""
    manager = Written(free, looks=(busy, free), watches=(True,))
    async with manager, asyncio.timeout(5):
        assert await manager.wait_until_free("key")
    assert manager.asked == ["look", "watch", "look"]


async def test_a_try_listens_to_nothing() -> None:
    """A try, and a look whether a key is free at once, are one request each, and want no messages."""
    manager = Written(busy, looks=(busy,))
    async with manager:
        assert await manager.acquire("key", "me", timeout=0) is None
        assert not await manager.wait_until_free("key", timeout=0)
        assert manager._room.places == {}
    assert manager.asked == ["take", "look"]


async def test_the_first_watcher_goes() -> None:
    """27: when the one that looks for all watchers is cancelled, the next one looks."""
    manager = Written(free, looks=(busy,))
    async with manager:
        first = asyncio.create_task(manager.wait_until_free("key"))
        await turns(3)
        second = asyncio.create_task(manager.wait_until_free("key"))
        third = asyncio.create_task(manager.wait_until_free("key"))
        await turns(3)
        assert manager.asked == ["look", "watch"]
        first.cancel()
        await turns(3)
        assert manager.asked == ["look", "watch"] * 2
        manager.looks = [free]
        second.cancel()
        async with asyncio.timeout(5):
            assert await third
        assert manager.asked == ["look", "watch"] * 2 + ["look"]


async def test_a_watcher_stays_when_a_waiter_goes() -> None:
    """27: who watches a key is reached by a message also when the last one who wanted to hold it has gone."""
    manager = Written(busy, looks=(busy, free))
    async with manager:
        watching = asyncio.create_task(manager.wait_until_free("key"))
        await turns(3)
        assert await manager.acquire("key", "me", timeout=0) is None
        manager._freed("key")
        async with asyncio.timeout(5):
            assert await watching


async def test_a_watcher_is_served_between_two_holders() -> None:
    """Who watches a key is told that it was free, though the next holder of this process had it in the same step."""
    async with MemoryLockManager() as manager:
        await manager.acquire("key", "me")
        next_one = asyncio.create_task(manager.acquire("key", "you"))
        watching = asyncio.create_task(manager.wait_until_free("key"))
        await turns(3)
        await manager.release("key", "me")
        assert await next_one
        async with asyncio.timeout(5):
            assert await watching
        assert await manager.is_held_by("key", "you")


async def test_nothing_of_a_wait_stays() -> None:
    """A wait that ended leaves no timer behind that would keep its lease alive until it fires."""
    async with MemoryLockManager() as manager:
        await manager.acquire("key", "me")
        waiting = asyncio.create_task(manager.acquire("key", "you", timeout=FAR))
        await turns(3)
        await manager.release("key", "me")
        lease = await waiting
        assert lease is not None
        await lease.release()
        kept = weakref.ref(lease)
        del lease, waiting
        await turns(3)
        gc.collect()
        assert kept() is None


# --- holding


async def test_a_lease_counts_from_before_the_request() -> None:
    """8: four fifths of a lease begin when its request, or that of its renewal, was sent, not when it was answered."""
    time = 0.0

    def passes(seconds: float) -> Answer:
        async def answer() -> Busy | None:
            nonlocal time
            time += seconds
            return None

        return answer

    manager = Written(passes(20))
    manager.lease_seconds, manager._clock = 30.0, lambda: time
    async with manager:
        lease = await manager.acquire("key", "me")
        assert lease is not None
        time = 23.9
        lease.check()
        manager.renews = [passes(10)]
        await manager._keep(lease)
        time = 23.9 + 23.9
        lease.check()
        time = 23.9 + 24.1
        assert lease.lost
    manager = Written(passes(20))
    manager.lease_seconds, manager._clock, time = 30.0, lambda: time, 0.0
    async with manager:
        lease = await manager.acquire("key", "me")
        assert lease is not None
        time = 24.1
        assert lease.lost


async def test_a_release_that_is_cut_off() -> None:
    """30: a release that is cancelled on its way is sent once more, to its end, before the cancellation goes on."""
    manager = Written(free)
    async with manager:
        lease = await manager.acquire("key", "me")
        assert lease is not None
        manager.gate = asyncio.Event()
        releasing = asyncio.create_task(lease.release())
        await turns(3)
        for _ in range(3):
            releasing.cancel()
            await turns(3)
        assert not releasing.done()
        assert not manager._room.places["key"].empty
        manager.gate.set()
        with pytest.raises(asyncio.CancelledError):
            await releasing
        assert manager.asked == ["take", "give back", "give back"]
        assert manager.held == set()
        assert manager._room.places == {}


async def test_a_release_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    """41: a release that cannot be sent is an error, after a block or a close a warning; the next in line asks."""
    manager = Written(free)
    lease = await manager.acquire("key", "me")
    assert lease is not None
    waiting = asyncio.create_task(manager.acquire("key", "you"))
    await turns(3)
    manager.is_gone = True
    manager.held.clear()  # as when its lease ends
    with pytest.raises(LockUnavailableError):
        await lease.release()
    async with asyncio.timeout(5):
        assert await waiting
    async with manager.lock("other"):
        pass
    assert caplog.text.count("free when its lease ends") == 1
    await manager.aclose()
    assert caplog.text.count("free when its lease ends") == 2


async def test_a_hold_timeout_that_its_loop_does_not_end() -> None:
    """B10: who is next, or watches, sees for itself that a hold_timeout is over, if the holder's loop stands still."""
    async with MemoryLockManager() as manager:
        told: list[str] = []
        await manager.acquire("key", "me")
        first = asyncio.create_task(manager.acquire("key", "you", hold_timeout=0.05))
        second = asyncio.create_task(manager.acquire("key", "him", hold_timeout=0.05))
        await turns(3)
        await manager.release("key", "me")
        async with asyncio.timeout(5):
            for waiting in (first, second):
                lease = await waiting
                assert lease is not None
                lease.on_lost(told.append)
                lease._stop()  # the timer of its loop
            assert await manager.wait_until_free("key")
        assert len(told) == 2


async def test_blocks_that_overlap() -> None:
    """L2: of two blocks of one holder the last to end frees the key, also where that began last."""
    async with MemoryLockManager() as manager:
        first, second = manager.lock("key", "me"), manager.lock("key", "me")
        await first.__aenter__()
        await second.__aenter__()
        await first.__aexit__()
        assert await manager.is_held_by("key", "me")
        await second.__aexit__()
        assert not await manager.is_locked("key")


async def test_who_is_told_of_a_loss() -> None:
    """Nobody is told of a lease that was released; who is cancelled while it waits for a loss leaves nothing behind."""
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    manager = Written(free)
    async with manager:
        told: list[str] = []
        lease = await manager.acquire("key", "me")
        assert lease is not None
        waiting = [asyncio.create_task(lease.wait_lost()) for _ in range(2)]
        await turns(2)
        waiting[0].cancel()
        await turns(2)
        assert len(lease._callbacks) == 1
        manager._expire(lease, "so it is")
        waiting[1].cancel()
        await turns(5)
        assert all(task.cancelled() for task in waiting)
        second = await manager.acquire("key", "me")
        assert second is not None
        await second.release()
        second.on_lost(told.append)
        assert told == []
    assert complaints == []


async def test_acquired_again_while_it_goes_back() -> None:
    """L2: a lease on its way back to the server is not given to its holder again; the new one comes after it."""
    manager = Written(free)
    manager.gate = asyncio.Event()
    async with manager:
        first = await manager.acquire("key", "me")
        assert first is not None
        releasing = asyncio.create_task(first.release())
        await turns(3)
        again = asyncio.create_task(manager.acquire("key", "me"))
        await turns(3)
        assert not again.done()
        with pytest.raises(LockNotHeldError, match="nobody"):
            await manager.release("key", "me")
        manager.gate.set()
        second = await again
        await releasing
        assert second is not None
        assert second is not first
        second.check()
    assert manager.asked == ["take", "give back", "take", "give back"]


async def test_a_renewal_and_a_release_at_once() -> None:
    """A lease that was released while its renewal was under way is renewed no more, and is not called lost."""
    gate = asyncio.Event()

    async def slow() -> Busy | None:
        await gate.wait()
        return None

    told: list[str] = []
    manager = Written(free)
    manager.lease_seconds, manager.renews = 30.0, [slow]
    async with manager:
        lease = await manager.acquire("key", "me")
        assert lease is not None
        lease.on_lost(told.append)
        renewing = asyncio.create_task(manager._keep(lease))
        await turns(3)
        await lease.release()
        gate.set()
        await renewing
        assert lease._timer is None
        assert told == []
        assert not lease.lost


async def test_lost_once_and_released_once(caplog: pytest.LogCaptureFixture) -> None:
    """8: whoever finds that a lease is over, its loss is told once, and once given back; so is a release."""
    time, told = 0.0, list[str]()
    manager = Written(free)
    manager.lease_seconds, manager._clock = 30.0, lambda: time
    async with manager:
        lease = await manager.acquire("key", "me")
        assert lease is not None
        lease.on_lost(told.append)
        time = 25.0
        manager.looks = [free]
        assert not await manager.is_locked("key")
        await manager._keep(lease)
        await lease.release()
        await turns(5)
        assert sorted(manager.asked) == ["give back", "look", "take"]
        assert len(told) == caplog.text.count("lost the lock") == 1
        second = await manager.acquire("key", "me")
        assert second is not None
        await asyncio.gather(second.release(), second.release())
        await second.release()
        assert manager.asked[3:] == ["take", "give back"]


async def test_a_renewal_that_hangs() -> None:
    """8: a renewal that is never answered is given up when the lease counts as lost, and the holder is told."""

    async def for_ever() -> Busy | None:
        await asyncio.Event().wait()
        return None

    manager = Written(free)
    manager.lease_seconds, manager.renews = 0.3, [for_ever]
    async with manager:
        lease = await manager.acquire("key", "me")
        assert lease is not None
        async with asyncio.timeout(5):
            assert "in time" in await lease.wait_lost()
        await turns(5)
        assert manager.asked == ["take", "renew", "give back"]


async def test_a_renewal_that_fails_at_the_last_moment() -> None:
    """8: between two tries to renew nobody sleeps beyond the moment at which the lease counts as lost."""
    time = 0.0

    def breaks_at(moment: float) -> Answer:
        async def answer() -> Busy | None:
            nonlocal time
            time = moment
            raise LockUnavailableError("renew", "key", "written://down", "it is gone", "Wait.")

        return answer

    manager = Written(free)
    manager.lease_seconds, manager._clock = 300.0, lambda: time
    manager.renews = [breaks_at(239.99), breaks_at(240.0)]
    async with manager:
        lease = await manager.acquire("key", "me")
        assert lease is not None
        async with asyncio.timeout(5):  # a pause between other tries is 10 s at least
            await manager._keep(lease)
        assert lease.lost
        await turns(5)
        assert manager.asked == ["take", "renew", "renew", "give back"]


# --- cancellation, errors, the end


async def test_granted_to_nobody() -> None:
    """30: a request that is granted while the one who asked is cancelled, natively and twice, is given back by then."""
    gate, asked = asyncio.Event(), asyncio.Event()

    async def slow() -> Busy | None:
        asked.set()
        await gate.wait()
        return None

    manager = Written(slow, free)
    async with manager:
        first = asyncio.create_task(manager.acquire("key", "me"))
        await asked.wait()
        second = asyncio.create_task(manager.acquire("key", "you"))
        for _ in range(2):
            first.cancel()
            await turns(3)
        assert not first.done()
        manager.gate = asyncio.Event()
        gate.set()
        await turns(5)
        assert manager.asked == ["take", "give back"]
        first.cancel()  # once more, while it is given back
        await turns(3)
        assert not first.done()
        manager.gate.set()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert manager.asked[:2] == ["take", "give back"]
        lease = await second
        assert lease is not None
        assert manager.held == {"key"}
        assert manager._room.places["key"].lease is lease


async def test_granted_to_the_other_task_of_its_holder() -> None:
    """30: of two tasks of one holder the one that asks is cancelled; the lease is the other's, whoever looks first."""
    gate, asked = asyncio.Event(), asyncio.Event()

    async def slow() -> Busy | None:
        asked.set()
        await gate.wait()
        return None

    for asks in (True, False):
        manager = Written(slow)
        async with manager:
            first = asyncio.create_task(manager.acquire("key", "me"))
            await asked.wait()
            second = asyncio.create_task(manager.acquire("key", "me"))
            await turns(2)
            if asks:
                first.cancel()
            gate.set()
            await turns(1)
            if not asks:
                second.cancel()
            lease = await (second if asks else first)
            assert lease is not None
            await turns(5)
            lease.check()
            assert manager.asked == ["take"]
            asked.clear()
            gate.clear()
            await asyncio.wait([first, second])


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
async def test_a_request_that_never_begins() -> None:
    """30: a request whose own task is cancelled before it begins leaves nobody waiting."""
    manager = Written(free)
    async with manager:
        before = asyncio.all_tasks()
        running = asyncio.create_task(manager.acquire("key", "me"))
        await turns(1)
        for task in asyncio.all_tasks() - before - {running}:
            task.cancel()
        async with asyncio.timeout(5):
            outcome = (await asyncio.gather(running, return_exceptions=True))[0]
        assert isinstance(outcome, (asyncio.CancelledError, Lease))  # from Python 3.12 it begins at once


async def test_closing_waits_for_what_nobody_waits_for() -> None:
    """A manager is closed when what it undoes by itself is undone."""
    manager = Written(free)
    lease = await manager.acquire("key", "me")
    assert lease is not None
    manager.gate = asyncio.Event()
    manager._expire(lease, "so it is")
    closing = asyncio.create_task(manager.aclose())
    await turns(5)
    assert not closing.done()
    manager.gate.set()
    await closing
    assert manager.held == set()


async def test_a_request_that_is_cut_off() -> None:
    """30: a request whose own task is cancelled, as when a loop shuts down, may have arrived: it is undone."""
    asked = asyncio.Event()

    async def for_ever() -> Busy | None:
        asked.set()
        await asyncio.Event().wait()
        return None

    manager = Written(for_ever)
    async with manager:
        before = asyncio.all_tasks()
        running = asyncio.create_task(manager.acquire("key", "me"))
        await asked.wait()
        for task in asyncio.all_tasks() - before - {running}:
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await turns(5)
        assert manager.asked == ["take", "give back"]


@pytest.mark.parametrize("is_cancelled", [True, False])
async def test_a_request_that_failed_after_it_was_cancelled(is_cancelled: bool) -> None:
    """36: a request that fails may have arrived: it is undone where the one who asked does not go on asking."""
    gate, asked = asyncio.Event(), asyncio.Event()

    async def breaks() -> Busy | None:
        asked.set()
        await gate.wait()
        raise LockUnavailableError("acquire", "key", "written://down", "it is gone", "Wait.")

    manager = Written(breaks)
    async with manager:
        running = asyncio.create_task(manager.acquire("key", "me"))
        await asked.wait()
        if is_cancelled:
            running.cancel()
            await turns(2)
        gate.set()
        with pytest.raises(asyncio.CancelledError if is_cancelled else LockUnavailableError):
            await running
        await turns(3)
        assert manager.asked == ["take", "give back"][: 1 + is_cancelled]


async def test_a_server_that_is_gone_is_gone_for_all() -> None:
    """41: one request finds it out for all who wait, holders and watchers, each with an error of its own."""
    gate = asyncio.Event()

    async def breaks() -> Busy | None:
        await gate.wait()
        raise LockUnavailableError("acquire", "key", "written://down", "it is gone", "Wait.")

    manager = Written(breaks, looks=(busy,))
    async with manager:
        waiting: list[asyncio.Task[Any]] = [
            asyncio.create_task(manager.acquire("key", f"{number}")) for number in range(3)
        ]
        waiting += [asyncio.create_task(manager.wait_until_free("key")) for _ in range(2)]
        await turns(5)
        gate.set()
        async with asyncio.timeout(5):
            errors = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(error, LockUnavailableError) for error in errors)
        assert len({id(error) for error in errors}) == 5
        assert sorted(manager.asked) == ["look", "take", "watch"]
        assert manager._room.places == {}


async def test_closing_during_a_request() -> None:
    """A manager that is closed while a request is under way says so to who asked, whatever the request ends with."""
    for ends in (free, busy, gone):
        gate, asked = asyncio.Event(), asyncio.Event()

        async def slow(gate: asyncio.Event = gate, asked: asyncio.Event = asked, ends: Answer = ends) -> Any:
            asked.set()
            await gate.wait()
            return await ends()

        for is_watching in (False, True):
            manager = Written(slow, looks=(slow,))
            asked.clear()
            gate.clear()
            running = [
                asyncio.ensure_future(
                    manager.wait_until_free("key") if is_watching else manager.acquire("key", "me")
                )
                for _ in range(2)
            ]
            await asked.wait()
            closing = asyncio.create_task(manager.aclose())
            await turns(3)
            gate.set()
            async with asyncio.timeout(5):
                await closing
                outcomes = await asyncio.gather(*running, return_exceptions=True)
            assert all(isinstance(outcome, LockClosedError) or outcome is True for outcome in outcomes)
            assert is_watching or True not in outcomes
            assert manager.held == set()
            assert manager.asked.count("give back") <= 1
            assert manager._room.places == {}


def test_patience() -> None:
    """A request may take a sixth of a lease, but a second at least, and never more than half of it."""
    assert [patience(lease) for lease in (600, 30, 6, 4, 1)] == [100, 5, 1, 1, 0.5]
