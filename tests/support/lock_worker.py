"""A process that locks, for tests: `python lock_worker.py URL COMMAND …`, with onceflow on the path.

hold KEY LEASE              acquires, prints `held TOKEN`, and at each line of input prints whether it still holds
contend LOG KEYS TASKS SEED each task enters each key once; what is entered twice at a time is written to LOG
wait KEY TASKS              so many tasks wait for one key, each holds it for a moment; prints `ready`, then `done`
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from onceflow.locking import LockManager, RedisLockManager, StorageLockManager, lock_manager_from_url


async def hold(manager: LockManager, key: str, lease_seconds: str) -> None:
    if isinstance(manager, (RedisLockManager, StorageLockManager)):
        manager.lease_seconds = float(lease_seconds)
    lease = await manager.acquire(key, f"worker-{os.getpid()}")
    assert lease is not None
    print("held", lease.token, flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        print("lost" if lease.lost else "held", lease.token, flush=True)
    await lease.release()
    print("released", flush=True)


async def contend(manager: LockManager, log: str, keys: str, tasks: str, seed: str) -> None:
    async def visit(number: int) -> None:
        chosen = random.Random(f"{seed}-{number}")
        order = [f"key-{key}" for key in range(int(keys))]
        chosen.shuffle(order)
        for key in order:
            async with manager.lock(key) as lease:
                with enter(log, key, lease.token):
                    await asyncio.sleep(chosen.random() / 2000)

    await asyncio.gather(*(visit(number) for number in range(int(tasks))))


class enter:
    """Fails if anybody else is inside, by a file that only one can make; logs the token."""

    def __init__(self, log: str, key: str, token: int) -> None:
        self._guard, self._log, self._line = f"{log}.{key}", log, f"{key} {token}\n"

    def __enter__(self) -> None:
        os.close(os.open(self._guard, os.O_CREAT | os.O_EXCL))
        fd = os.open(self._log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.write(fd, self._line.encode())
        os.close(fd)

    def __exit__(self, *_: object) -> None:
        os.unlink(self._guard)


async def wait(manager: LockManager, key: str, tasks: str) -> None:
    async def one() -> None:
        assert await manager.wait_until_free(key)

    waiting = [asyncio.create_task(one()) for _ in range(int(tasks))]
    await asyncio.sleep(0)
    print("ready", flush=True)
    await asyncio.gather(*waiting)
    print("done", flush=True)


COMMANDS: dict[str, Callable[..., Coroutine[Any, Any, None]]] = {
    "hold": hold,
    "contend": contend,
    "wait": wait,
}


async def main(url: str, command: str, *arguments: str) -> None:
    async with lock_manager_from_url(url) as manager:
        await COMMANDS[command](manager, *arguments)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
