"""Locks in this process's memory. Also the contract of `LockManager`, to be read."""

from __future__ import annotations

import itertools
import threading
import uuid
from typing import Any
from urllib.parse import quote
from weakref import WeakValueDictionary

from ._waiting.acquisition import Busy, Claim
from ._waiting.keys import Room
from ._waiting.manager import QueuedLockManager

_ANONYMOUS = "anonymous-"
_rooms: WeakValueDictionary[str, MemoryRoom] = WeakValueDictionary()
_registry = threading.Lock()


class MemoryRoom(Room):
    """A room that hands out tokens too, so that it is all there is to a lock in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = itertools.count(1)


class MemoryLockManager(QueuedLockManager):
    """Locks for the tasks, threads and event loops of one process. Opens nothing, suspends only to wait.

    All managers of one name in a process share their locks, and number their leases on for as long as one of
    them exists; without a name, a manager is alone. A release hands over without a thread or a timer.
    """

    _suspends = False

    def __init__(self, name: str | None = None) -> None:
        self.name = name if name is not None else f"{_ANONYMOUS}{uuid.uuid4().hex}"
        with _registry:
            room = _rooms.get(self.name)
            if room is None:
                room = _rooms[self.name] = MemoryRoom()
        super().__init__(room)
        self._tokens = room.tokens

    @property
    def url(self) -> str:
        """`memory://` and the name."""
        return f"memory://{quote(self.name, safe='')}"

    async def _take(self, claim: Claim) -> Busy | None:
        claim.token = next(self._tokens)  # who is first in line while nobody holds the key has it
        return None

    async def _give_back(self, claim: Claim) -> None:
        pass  # the lease leaves the room, and that is all there is

    async def _look(self, key: str) -> Busy | None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name,)
