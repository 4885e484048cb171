"""A storage of records that is watched, and loses what it is told to lose; and claims on it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from onceflow.engine._concurrency.claims import Claim
from onceflow.engine._concurrency.singleflight import Flight
from onceflow.storage import ConditionsUnsupportedError, MemoryStorage, StorageUnavailableError
from onceflow.storage._format.envelope import unpack_header


class Watched(MemoryStorage):
    """Counts what is asked for records, and loses what it is told to lose."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: Counter[str] = Counter()
        self.unread = 0
        self.lost_before = 0
        self.lost_after = 0
        self.gate: asyncio.Event | None = None
        self.at_gate = asyncio.Event()
        self.is_careless = False
        self.first: Callable[[], Awaitable[None]] | None = None

    async def ensure_conditional(self) -> None:
        if self.is_careless:
            raise ConditionsUnsupportedError(self.url, "PUT If-None-Match")

    async def fetch(self, key: str, *args: Any, **options: Any) -> Any:
        if key[0] not in ".\0":
            self.requests["GET"] += 1
            self.requests["GET if changed"] += options.get("unless") is not None
            await asyncio.sleep(0)  # as every storage that is further away
            if self.unread:
                self.unread -= 1
                raise StorageUnavailableError("read", key, self.url, "no answer", "Wait.")
        return await super().fetch(key, *args, **options)

    async def write(self, key: str, *args: Any, **options: Any) -> str:
        if key[0] in ".\0":
            return await super().write(key, *args, **options)
        self.requests["PUT"] += 1
        if self.first is not None:
            first, self.first = self.first, None
            await first()
        if self.lost_before:
            self.lost_before -= 1
            raise StorageUnavailableError("write", key, self.url, "no answer", "Wait.")
        version = await super().write(key, *args, **options)
        if self.gate is not None:
            self.at_gate.set()
            await self.gate.wait()
        if self.lost_after:
            self.lost_after -= 1
            raise StorageUnavailableError("write", key, self.url, "the answer was lost", "Wait.")
        return version

    def asked(self) -> dict[str, int]:
        """What was asked since the last time."""
        asked, self.requests = +self.requests, Counter()
        return dict(asked)

    async def kind(self, key: str) -> str:
        """What lies under the key."""
        return unpack_header(await MemoryStorage.read(self, key))[0].kind


def claim_on(storage: Watched, name: str, lease: float = 0.3, key: str = "key") -> Claim:
    """A claim that somebody of this name would take on it."""
    return Claim(Flight((storage.url, key), None), storage, name, name, lease, ())
