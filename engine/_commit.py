"""The shell of the transaction protocol: carries out the steps of `_intents` on real storages."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from ..storage import ConditionFailedError, ObjectNotFoundError, Storage
from ._intents import ABSENT, ANY, Conflict, Found, Put, Read, Remove, Step, Steps, Visible, Wait, Where

LEASE = 30.0
"""Seconds that an undecided transaction is left alone, from when an observer first saw it."""


@lru_cache(maxsize=1)
def _this_process(pid: int) -> tuple[str, int, str]:
    return socket.gethostname(), pid, _started(pid) or ""


def this_process() -> tuple[str, int, str]:
    """Host, process id and start of the process, by which another process of this host sees whether it lives."""
    return _this_process(os.getpid())


def _started(pid: int) -> str | None:
    """When a process of this host started, in the kernel's ticks; None where that cannot be told."""
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY)
    except OSError:
        return None
    try:
        # Field 22; the second one, the name in parentheses, may hold blanks.
        return os.pread(fd, 4096, 0).rpartition(b")")[2].split()[19].decode()
    finally:
        os.close(fd)


def is_gone(owner: tuple[Any, ...]) -> bool:
    """Whether a process is surely no longer there; False for another host's."""
    host, pid, started = owner
    if host != socket.gethostname():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return bool(started) and _started(pid) not in (started, None)


class Carrier:
    """Carries out the steps of the protocol on storages.

    Args:
        storage_at: The storage of a URL.
        clock: Monotonic seconds.
    """

    def __init__(
        self, storage_at: Callable[[str], Storage], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._storage_at = storage_at
        self._clock = clock
        self._seen: dict[Where, tuple[str, float]] = {}

    async def run(self, steps: Steps, visible: Callable[[], None] | None = None) -> Any:
        """Carry out steps to the end and return what they return; what they raise is raised."""
        answer: Any = None
        error: Exception | None = None
        while True:
            try:
                step: Step = steps.throw(error) if error is not None else steps.send(answer)
            except StopIteration as stop:
                return stop.value
            answer = error = None
            if isinstance(step, Visible):
                if visible is not None:
                    visible()
                continue
            try:
                answer = await self._do(step)
            except ConditionFailedError:
                error = Conflict()
            except Exception as failure:  # the protocol decides what it means
                error = failure

    async def _do(self, step: Step) -> Any:
        storage = self._storage_at(step.where[0])  # type: ignore[union-attr]
        match step:
            case Read((_, key)):
                try:
                    stored = await storage.fetch(key)
                except ObjectNotFoundError:
                    return None
                assert stored is not None
                return Found(stored.data, stored.version)
            case Put((_, key), data, expect):
                if expect is ANY:
                    return await storage.write(key, data)
                if expect == ABSENT:
                    return await storage.write(key, data, if_absent=True)
                return await storage.write(key, data, if_version=expect)
            case Remove((_, key), expect):
                try:
                    await storage.delete(key, if_version=expect)
                except ConditionFailedError:
                    pass  # somebody has replaced it: there is nothing of ours to remove
                return None
            case Wait():
                return await self._wait(step)
        raise AssertionError(step)

    async def _wait(self, step: Wait) -> bool:
        if self.is_abandoned(step.where, step.version, step.lease, step.owner):
            return True
        await asyncio.sleep(random.uniform(0.005, 0.05))
        return False

    def is_abandoned(self, where: Where, version: str, lease: float, owner: tuple[Any, ...]) -> bool:
        """Whether an undecided transaction's writer is dead, or has been silent for its lease."""
        if is_gone(owner):
            return True
        seen, since = self._seen.get(where, ("", 0.0))
        now = self._clock()
        if seen != version:
            if len(self._seen) >= 10_000:
                self._seen.clear()
            self._seen[where] = version, now
            return False
        return now - since > lease * 1.1 + 0.2


async def uncancelled(work: Any) -> Any:
    """Run a coroutine as a task of its own to its end, whatever is cancelled meanwhile; then pass the cancellation on.

    anyio's shield is cut through by a second native cancel and by `asyncio.wait_for`; an owned task is not.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            if task.cancelled():
                raise
            cancelled = error
        except BaseException:
            break
    if cancelled is not None:
        if not task.cancelled() and task.exception() is not None:
            raise cancelled from task.exception()
        raise cancelled
    return task.result()
