"""Cancelled at any point, of whatever kind the cancellation is, nothing stays held and nobody is forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import anyio
import pytest
from lock_places import Place, turns
from onceflow.locking import Lease, LockManager

Make = Callable[..., LockManager]
Cancel = Callable[[Coroutine[Any, Any, Any], int], Coroutine[Any, Any, Any]]


async def natively(work: Coroutine[Any, Any, Any], steps: int) -> Any:
    task = asyncio.create_task(work)
    await turns(steps)
    task.cancel()
    return (await asyncio.gather(task, return_exceptions=True))[0]


async def twice(work: Coroutine[Any, Any, Any], steps: int) -> Any:
    task = asyncio.create_task(work)
    await turns(steps)
    task.cancel()
    for _ in range(3):
        await asyncio.sleep(0)
        task.cancel()
    return (await asyncio.gather(task, return_exceptions=True))[0]


async def by_scope(work: Coroutine[Any, Any, Any], steps: int) -> Any:
    result = None
    async with anyio.create_task_group() as group:

        async def run() -> None:
            nonlocal result
            result = await work

        group.start_soon(run)
        await turns(steps)
        group.cancel_scope.cancel()
    return result


async def by_wait_for(work: Coroutine[Any, Any, Any], steps: int) -> Any:
    try:
        return await asyncio.wait_for(work, steps * 0.0002)
    except TimeoutError:
        return None


CANCELS = {"natively": natively, "twice": twice, "by_scope": by_scope, "by_wait_for": by_wait_for}


@pytest.fixture(params=CANCELS)
def cancel(request: pytest.FixtureRequest, place: Place) -> Cancel:
    """Starts the work, cancels it after so many turns of the loop, and waits for its end."""
    if place.kind in ("s3", "storage_local") and request.param != "twice":
        pytest.skip("the same code as over the storage in memory, so one kind is enough")
    return CANCELS[request.param]


@pytest.fixture
def steps(place: Place) -> range:
    """Enough turns of the loop for an acquire and a release to end before the cancellation comes."""
    return {"memory": range(6), "file": range(12), "s3": range(0, 60, 6)}.get(place.kind, range(0, 40, 2))


async def test_acquire(make: Make, cancel: Cancel, steps: range) -> None:
    """B4: an acquire that is cancelled at point n, for all n, holds nothing; a lease that it returned is held."""
    manager, other = make(), make()
    for number in steps:
        outcome = await cancel(manager.acquire("key", "me"), number)
        if isinstance(outcome, Lease):
            outcome.check()
            await manager.release("key", "me")
        assert await other.acquire("key", "you", timeout=0), f"held after a cancellation at step {number}"
        await other.release("key", "you")


async def test_block(make: Make, cancel: Cancel, steps: range) -> None:
    """B4: a block that is cancelled at point n, for all n, while it enters, runs or leaves, frees the key."""
    manager, other = make(), make()

    async def block() -> None:
        async with manager.lock("key"):
            await turns(2)

    for number in steps:
        await cancel(block(), number)
        assert await other.acquire("key", "you", timeout=0), f"held after a cancellation at step {number}"
        await other.release("key", "you")


async def test_chosen_then_cancelled(make: Make, cancel: Cancel, steps: range) -> None:
    """B4: a waiter cancelled around the moment in which the key becomes its own passes it on to the next."""
    manager = make()
    for number in steps:
        await manager.acquire("key", "me")
        cancelled = asyncio.create_task(cancel(manager.acquire("key", "you"), number + 2))
        await turns(2)
        third = asyncio.create_task(manager.acquire("key", "him"))
        await turns(2)
        await manager.release("key", "me")
        outcome = await cancelled
        if isinstance(outcome, Lease):
            await manager.release("key", "you")
        async with asyncio.timeout(10):
            assert await third
        await manager.release("key", "him")
    assert manager._room.places == {}  # type: ignore[attr-defined]


async def test_all_of_one_holder(make: Make, cancel: Cancel, steps: range) -> None:
    """B4: when all waiting tasks of one holder are cancelled around the moment of the grant, nothing is held."""
    manager, other = make(), make()
    for number in steps:
        work = [
            asyncio.create_task(cancel(manager.acquire("key", "me"), n)) for n in (number, number, number + 1)
        ]
        outcomes = await asyncio.gather(*work)
        if any(isinstance(outcome, Lease) for outcome in outcomes):
            await manager.release("key", "me")
        assert await other.acquire("key", "you", timeout=0), f"held after a cancellation at step {number}"
        await other.release("key", "you")


async def test_watcher(make: Make, cancel: Cancel) -> None:
    """A cancelled watcher leaves the others to learn that the key is free."""
    manager, other = make(), make()
    for number in (0, 4, 20):
        await manager.acquire("key", "me")
        watching = [asyncio.create_task(cancel(m.wait_until_free("key"), number)) for m in (manager, other)]
        await turns(2)  # it is the first ones, who look for all, that are cancelled
        staying = [asyncio.create_task(m.wait_until_free("key")) for m in (manager, other)]
        await asyncio.gather(*watching)
        await manager.release("key", "me")
        async with asyncio.timeout(10):
            assert await asyncio.gather(*staying) == [True, True]


async def test_many_waiters_at_random(manager: LockManager, place: Place) -> None:
    """Of a hundred waiters of which every second is cancelled, the others get the key in their order."""
    order: list[int] = []

    async def visit(number: int) -> None:
        async with manager.lock("key"):
            order.append(number)

    await manager.acquire("key", "me")
    tasks = []
    for number in range(30 if place.kind == "s3" else 100):
        tasks.append(asyncio.create_task(visit(number)))
        await turns(1)
    for task in tasks[::2]:
        task.cancel()
    await manager.release("key", "me")
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order == list(range(1, len(tasks), 2))
