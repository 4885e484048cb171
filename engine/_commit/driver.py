"""The shell of the transaction protocol: carries out the steps of `protocol` on real storages."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import lru_cache
from typing import Any, TypeVar

from ...storage import ConditionFailedError, ObjectNotFoundError, Storage
from .intents import Keys, Member, Writer
from .protocol import commit
from .requests import (
    ABSENT,
    ANY,
    Ask,
    Conflict,
    Found,
    Put,
    Read,
    Remove,
    Step,
    Steps,
    Together,
    Visible,
    Where,
)

T = TypeVar("T")
LEASE = 30.0
"""Seconds that an undecided transaction is left alone, from when an observer first saw it."""
_PER_MEMBER = 1.0
_PER_MIB = 1.0
"""Seconds more, because all of it is written between the primary's intent and the decision."""

_under_way: set[str] = set()
"""The transactions that this process commits at the moment: others that name it as their writer are abandoned."""


# --- which process


@lru_cache(maxsize=4)
def _process(pid: int) -> tuple[str, str, int, str]:
    status = _status(pid)
    return socket.gethostname(), _pid_space(), pid, status[1] if status is not None else ""


def this_process() -> tuple[str, str, int, str]:
    """Host, space of process ids, process id and start: by these another process sees whether it lives."""
    return _process(os.getpid())


@lru_cache(maxsize=4)
def _pid_space() -> str:
    """Which processes our ids are of: the machine's boot, and the container's namespace; "" for no telling."""
    try:
        space = os.open("/proc/self/ns/pid", os.O_RDONLY)
        try:
            inode = os.fstat(space).st_ino
        finally:
            os.close(space)
        return f"{_content('/proc/sys/kernel/random/boot_id').decode().strip()} {inode}"
    except OSError:
        return ""


def _content(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.pread(fd, 4096, 0)
    finally:
        os.close(fd)


def _status(pid: int) -> tuple[str, str] | None:
    """State and start (in the kernel's ticks) of a process here; None where that cannot be told."""
    try:
        # Fields 3 and 22; the second one, the name in parentheses, may hold blanks.
        fields = _content(f"/proc/{pid}/stat").rpartition(b")")[2].split()
        return fields[0].decode(), fields[19].decode()
    except (OSError, IndexError):
        return None


def is_gone(owner: Sequence[Any]) -> bool:
    """Whether a process is surely no longer there; False for those that cannot be seen from here."""
    host, space, pid, started = owner
    if host != socket.gethostname() or space != _pid_space():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    status = _status(pid)
    if status is None:
        return False
    return status[0] in "ZX" or (bool(started) and status[1] != started)


# --- carrying out


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

    async def commit(self, tx: str, members: Sequence[Member], keys: Keys) -> None:
        """Make several records visible in one step.

        Raises:
            Refused, InDoubt, StorageError: See `_protocol.commit`.
        """
        size = sum(len(member.record) for member in members) + sum(
            len(buffer) for member in members if member.value is not None for buffer in member.value[1]
        )
        lease = LEASE + _PER_MEMBER * len(members) + _PER_MIB * size / 2**20
        _under_way.add(tx)
        try:
            await self.run(commit(Writer(tx, lease, this_process(), keys), members))
        finally:
            _under_way.discard(tx)

    async def run(self, steps: Steps) -> Any:
        """Carry out steps to the end and return what they return; what they raise is raised."""
        answer: Any = None
        error: Exception | None = None
        while True:
            try:
                step: Step = steps.throw(error) if error is not None else steps.send(answer)
            except StopIteration as stop:
                return stop.value
            answer = error = None
            try:
                answer = await self._do(step)
            except ConditionFailedError:
                error = Conflict()
            except Exception as failure:  # the protocol decides what it means
                error = failure

    async def _do(self, step: Step) -> Any:
        match step:
            case Read((url, key), limit):
                try:
                    stored = await self._storage_at(url).fetch(key, 0, limit)
                except ObjectNotFoundError:
                    return None
                assert stored is not None  # None answers `unless` only
                return Found(stored.data, stored.version)
            case Put((url, key), data, expect):
                storage = self._storage_at(url)
                if expect is ANY:
                    return await storage.write(key, data)
                if expect == ABSENT:
                    return await storage.write(key, data, if_absent=True)
                return await storage.write(key, data, if_version=expect)
            case Remove((url, key), expect):
                try:
                    await self._storage_at(url).delete(key, if_version=expect)
                except ConditionFailedError:
                    pass  # somebody has replaced it: there is nothing of ours to remove
            case Ask(where, version, tx, lease, owner, wait):
                if self.is_abandoned(where, version, tx, lease, owner):
                    return True
                if wait:
                    await asyncio.sleep(random.uniform(0.005, 0.05))
                return False
            case Together(ways):
                return await self._together(ways)
            case Visible():
                pass
        return None

    async def _together(self, ways: Sequence[Steps]) -> list[Any]:
        if len(ways) == 1:
            return [await self.run(ways[0])]
        outcomes = await asyncio.gather(*map(self.run, ways), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return outcomes

    def is_abandoned(self, where: Where, version: str, tx: str, lease: float, owner: Sequence[Any]) -> bool:
        """Whether a transaction's writer is dead, has given up, or has been silent for its lease."""
        if tuple(owner) == this_process():
            return tx not in _under_way
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


async def uncancelled(work: Coroutine[Any, Any, T]) -> T:
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
