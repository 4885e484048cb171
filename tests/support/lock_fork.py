"""Forks while it holds a lock, for tests: `python lock_fork.py URL`. Prints what parent and child found.

A process of its own, since the test run has threads, with which one does not fork.
"""

from __future__ import annotations

import asyncio
import os
import sys
import traceback

import pytest
from onceflow.locking import Lease, LeaseLostError, LockManager, LockNotHeldError, lock_manager_from_url


async def child(manager: LockManager, lease: Lease) -> None:
    with pytest.raises(LeaseLostError, match="forked"):
        lease.check()
    await lease.release()
    if "memory://" not in manager.url:  # which the child has its own copy of
        assert await manager.is_locked("key")
        assert await manager.acquire("key", "you", timeout=0) is None
        if not manager.url.startswith("redis"):
            with pytest.raises(LockNotHeldError):
                await manager.release("key", "me")
    async with manager.lock("other"):
        assert await manager.is_locked("other")
    await manager.aclose()


async def parent(manager: LockManager, lease: Lease, url: str) -> None:
    lease.check()
    async with lock_manager_from_url(url) as other:
        assert await other.acquire("key", "you", timeout=1.0) is None  # longer than the lease
        lease.check()
        await manager.release("key", "me")
        assert await other.acquire("key", "you", timeout=1)
    await manager.aclose()


def main(url: str) -> None:
    manager = lock_manager_from_url(url)
    with asyncio.Runner() as runner:
        lease = runner.run(manager.acquire("key", "me"))
        assert lease is not None
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                asyncio.run(child(manager, lease))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        _, status = os.waitpid(pid, 0)
        assert status == 0, "the child failed"
        runner.run(parent(manager, lease, url))
    print("fine", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
