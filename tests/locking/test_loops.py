"""Event loops that come and go, and several at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest
from lock_places import Place, turns
from onceflow.locking import LockManager, lock_manager_from_url

Make = Callable[..., LockManager]


def test_one_run_after_the_other(place: Place) -> None:
    """90: a manager serves one `asyncio.run` after the other, with a lock held from the one to the next."""
    manager = lock_manager_from_url(place.url)

    async def first() -> None:
        async with manager.lock("key"):
            pass
        assert await manager.acquire("held", "me")

    async def second() -> None:
        assert await manager.is_held_by("held", "me")
        assert await manager.acquire("held", "you", timeout=0.05) is None
        await manager.release("held", "me")
        assert await manager.acquire("held", "you", timeout=1)
        async with manager.lock("key"):
            pass
        await manager.aclose()

    asyncio.run(first())
    asyncio.run(second())


def test_two_loops_in_two_threads(place: Place) -> None:
    """90: two loops in two threads share a manager: one holds at a time, releases wake the other's waiters."""
    manager = lock_manager_from_url(place.url)
    inside = []
    failures: list[BaseException] = []
    barrier = threading.Barrier(2)

    async def work(name: str) -> None:
        for _ in range(15):
            async with asyncio.timeout(20), manager.lock("key"):
                inside.append(name)
                await turns(2)
                assert inside == [name]
                inside.remove(name)

    def run(name: str) -> None:
        barrier.wait()
        try:
            asyncio.run(work(name))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    asyncio.run(manager.aclose())
    assert failures == []


async def test_a_waiter_whose_loop_is_gone(manager: LockManager) -> None:
    """A waiter of a loop that was closed in the midst of it does not stand in the way of the others."""
    await manager.acquire("key", "me")
    loop = asyncio.new_event_loop()
    task: list[asyncio.Task[object]] = []

    def wait_and_go() -> None:
        asyncio.set_event_loop(loop)
        task.append(loop.create_task(manager.acquire("key", "you")))
        loop.run_until_complete(turns(50))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()

    await asyncio.to_thread(wait_and_go)
    third = asyncio.create_task(manager.acquire("key", "him"))
    await turns(20)
    await manager.release("key", "me")
    async with asyncio.timeout(10):
        assert await third
    task[0]._log_destroy_pending = False  # type: ignore[attr-defined]
    task[0].get_coro().close()


async def test_a_holder_whose_loop_is_gone(make: Make, place: Place) -> None:
    """Waiters go on when the lease is over of a holder whose loop was closed: nothing else would tell them."""
    if not place.leased:
        pytest.skip("a lock without a lease lasts as long as its process")
    if place.kind == "s3":
        pytest.skip("the same code as over the storage in memory, so one kind is enough")
    manager = make(1)
    loop = asyncio.new_event_loop()

    def hold_and_go() -> None:
        asyncio.set_event_loop(loop)
        assert loop.run_until_complete(manager.acquire("key", "me"))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()

    await asyncio.to_thread(hold_and_go)
    watching = asyncio.create_task(manager.wait_until_free("key"))
    async with asyncio.timeout(4):
        assert await manager.acquire("key", "you")
        assert await watching


@pytest.mark.parametrize("name", ["uvloop"])
async def test_other_loops(place: Place, name: str) -> None:
    """Locks work on uvloop as they do on asyncio's own loop."""
    if place.kind == "s3":
        pytest.skip("the storage's business")
    uvloop = pytest.importorskip(name)

    async def main() -> None:
        async with lock_manager_from_url(place.url) as one, lock_manager_from_url(place.url) as other:
            await one.acquire("key", "me")
            waiting = asyncio.create_task(other.acquire("key", "you"))
            await asyncio.sleep(0.02)
            await one.release("key", "me")
            assert await waiting
            await other.release("key", "you")

    def run() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())

    await asyncio.to_thread(run)


async def test_many_waiters(make: Make, place: Place) -> None:
    """21: thousands of waiters in a process hold no thread, and are served to the last."""
    if place.kind not in ("memory", "file"):
        pytest.skip("each acquisition would be a request")
    manager = make()
    number = 10_000 if place.kind == "memory" else 1_000
    served = 0

    async def visit() -> None:
        nonlocal served
        async with manager.lock("key", f"{served}-{id(asyncio.current_task())}"):
            served += 1

    await manager.acquire("key", "me")
    before = threading.active_count()
    tasks = [asyncio.create_task(visit()) for _ in range(number)]
    await turns(2)
    assert threading.active_count() == before
    await manager.release("key", "me")
    await asyncio.gather(*tasks)
    assert served == number
