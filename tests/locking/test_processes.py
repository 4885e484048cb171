"""Several processes: never two inside, killed and paused ones, and tokens that tell late ones."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import defaultdict
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from lock_places import Place, until
from onceflow.locking import LockManager, StorageLockManager
from onceflow.storage import ObjectNotFoundError
from processes import ask, line, python

Make = Callable[..., LockManager]
_LEASE = 0.8


@pytest.fixture
def shared(place: Place) -> Place:
    """A place that several processes reach."""
    if not place.between_processes:
        pytest.skip("one process only")
    return place


def with_lease(place: Place) -> str:
    """The URL of the place, for managers of other processes with a short lease."""
    if not place.leased:
        return place.url
    return f"{place.url}{'&' if '?' in place.url else '?'}lease_seconds={_LEASE}"


async def test_mutual_exclusion(shared: Place, tmp_path: Path) -> None:
    """B7: of tasks of several processes never two are inside, and the tokens of a key grow."""
    await _contend(shared.url, tmp_path, processes=3, tasks=3, keys=1 if shared.kind == "s3" else 4)


async def _contend(url: str, folder: Path, processes: int, tasks: int, keys: int) -> None:
    log = folder / "log"
    async with AsyncExitStack() as stack:
        arguments = ("contend", str(log), str(keys), str(tasks))
        workers = [
            await stack.enter_async_context(python("lock_worker.py", url, *arguments, str(seed)))
            for seed in range(processes)
        ]
        assert [await worker.wait() for worker in workers] == [0] * processes
    tokens: dict[str, list[int]] = defaultdict(list)
    for entry in (await asyncio.to_thread(log.read_text)).splitlines():
        key, token = entry.split()
        tokens[key].append(int(token))
    assert len(tokens) == keys
    for found in tokens.values():
        assert len(found) == processes * tasks
        assert found == sorted(set(found))


async def test_killed_holder(shared: Place, make: Make) -> None:
    """B10: the key of a holder that is killed is a waiter's: at once with files, else after the lease."""
    seconds = 3.0 if shared.kind == "s3" else _LEASE
    manager = make(seconds)
    if isinstance(manager, StorageLockManager):
        with pytest.raises(ObjectNotFoundError):  # a request may take a second, and so may loading the client
            await manager.storage.read("warm")
    async with python("lock_worker.py", shared.url, "hold", "key", str(seconds)) as worker:
        word, token = await line(worker)
        assert word == "held"
        waiting = asyncio.create_task(manager.acquire("key", "me"))
        watching = asyncio.create_task(manager.wait_until_free("other"))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        worker.kill()
        await worker.wait()
        async with asyncio.timeout(1.0 if shared.kind == "file" else 1.3 * seconds + 4):
            lease = await waiting
        assert await watching
    assert lease is not None
    assert lease.token > int(token)
    await lease.release()
    assert not await manager.is_locked("key")


async def test_paused_holder(shared: Place, make: Make) -> None:
    """B10: a holder that is paused past its lease finds it lost; with files the kernel keeps it for it."""
    if shared.kind == "s3":
        pytest.skip("the same code as over the local storage; chaos has it")
    manager = make(_LEASE)
    async with python("lock_worker.py", shared.url, "hold", "key", str(_LEASE)) as worker:
        _, token = await line(worker)
        os.kill(worker.pid, signal.SIGSTOP)
        lease = await manager.acquire("key", "me", timeout=0.3 if shared.kind == "file" else 10)
        os.kill(worker.pid, signal.SIGCONT)
        if shared.kind == "file":
            assert lease is None
            assert await ask(worker) == ["held", token]
            return
        assert lease is not None
        assert lease.token > int(token)
        assert await ask(worker) == ["lost", token]
        assert worker.stdin is not None
        worker.stdin.close()
        assert await line(worker) == ["released"]
        lease.check()
        assert await manager.is_held_by("key", "me")


async def test_fork(place: Place) -> None:
    """91: after a fork the child holds nothing, whatever it does, and the parent's lock is as it was."""
    if place.kind in ("s3", "storage_memory"):
        pytest.skip("whether a storage survives a fork is its own business, and one of them is enough")
    async with python("lock_fork.py", with_lease(place)) as worker:
        assert await line(worker) == ["fine"]


@pytest.mark.chaos
async def test_exclusion_at_length(shared: Place, tmp_path: Path) -> None:
    """B7: 8 processes, 20 keys, 10 tasks each, ten times."""
    for number in range(10):
        folder = tmp_path / f"{number}"
        await asyncio.to_thread(folder.mkdir)
        await _contend(shared.url, folder, processes=8, tasks=10, keys=20)


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(3))
async def test_killed_and_paused_at_random(shared: Place, make: Make, seed: int) -> None:
    """B10: holders killed and paused at random moments, a hundred times: the next always gets the key."""
    chosen = random.Random(seed)
    manager = make(_LEASE)
    last = 0
    for _ in range(33):
        async with python("lock_worker.py", shared.url, "hold", "key", str(_LEASE)) as worker:
            if chosen.random() < 0.5:
                _, token = await line(worker)
                last = max(last, int(token))
            await asyncio.sleep(chosen.random() * _LEASE)
            if chosen.random() < 0.3:
                os.kill(worker.pid, signal.SIGSTOP)
                await asyncio.sleep(chosen.random() * 2 * _LEASE)
                if chosen.random() < 0.5:
                    os.kill(worker.pid, signal.SIGCONT)
            worker.kill()
        lease = await manager.acquire("key", "me", timeout=30)
        assert lease is not None
        assert lease.token > last
        last = lease.token
        await lease.release()
    await until(lambda: not manager._room.places)  # type: ignore[attr-defined]
