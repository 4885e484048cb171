"""Claims: the lock inside the record, for a lock manager that keeps its leases where the records lie.

One object is lock, fence and record: a conditional write turns what is there into a claim, which keeps what was
committed before for READ_COMMITTED readers; the commit replaces the claim by the record, conditionally on the
claim's own version, so that it releases and fences in one request. A miss costs 1 GET and 2 PUTs, a hit 1 GET.

While the body runs the claim is written anew every third of its lease. A waiter measures with its own clock how
long a claim stays unchanged, and takes it over after lease × 1.1 + 0.2 s; nobody compares two machines' clocks.
A holder that was silent for longer may still commit if nobody took its claim over: the version decides, not time.
A holder that fails leaves what was committed before, or a grave, never nothing: conditional deletes are the
least supported request.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from ...locking._clock import now
from ...locking._waiting.acquisition import PATIENCE
from ...storage import ConditionFailedError, ObjectNotFoundError, RecordError, Storage, StorageError
from ...storage._format.envelope import Header, pack, unpack_header
from .._commit.driver import uncancelled
from .._commit.requests import ABSENT
from .._runs.logging import logger

if TYPE_CHECKING:
    from .singleflight import Flight

RENEWALS = 3
"""Renewals per lease, so that two may fail."""
HEADER = 4096
"""Bytes that surely hold the header of a claim, but for its key: a holder and three numbers."""


class Claim:
    """A key that is held by a claim in its record's place. Used as `Held` is."""

    def __init__(
        self, flight: Flight, storage: Storage, holder: str, name: str, lease: float, keys: tuple[bytes, ...]
    ) -> None:
        self.flight = flight
        self._storage = storage
        self._key = flight.where[1]
        self._holder = holder
        self._name = name
        self._lease = lease
        self._signing_keys = keys
        self._before = b""
        self._timer: asyncio.TimerHandle | None = None
        self._renewal: asyncio.Task[None] | None = None
        self._sent = 0.0
        self._is_unsure = False
        self._is_over = True
        self.version = ""
        self.token = 0

    @property
    def lost(self) -> bool:
        """Whether it is certain that somebody else has taken the claim over."""
        return self._is_over

    # --- the beginning

    async def take(self, expect: str, before: bytes, generation: int) -> bool:
        """Write the claim over the version that was seen; whether it was still that one.

        Cancelled, it sees the request to its end, and takes back what it has written.
        """
        self._before, self.token = before, max(generation + 1, time.time_ns() // 1000)
        try:
            await uncancelled(self._take(expect))
        except ConditionFailedError:
            return False
        except asyncio.CancelledError:
            await uncancelled(self.release())
            raise
        self.flight.held = self
        return True

    async def _take(self, expect: str) -> None:
        self._sent = now()
        if expect == ABSENT:
            self.version = await self._storage.write(self._key, self._body(), if_absent=True)
        else:
            self.version = await self._storage.write(self._key, self._body(), if_version=expect)
        self._is_over = False
        self._plan(self._lease / RENEWALS)

    def _body(self) -> list[bytes | bytearray | memoryview]:
        extra = {"lease": self._lease, "holder": self._holder}
        header = Header(key=self._key, serializer="claim", kind="claim", token=self.token, extra=extra)
        return pack(header, [self._before], signing_keys=self._signing_keys)

    # --- the middle

    def _plan(self, after: float) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(after, self._due, loop.time() + after)

    def _due(self, planned: float) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        late = loop.time() - planned
        if late > self._lease * PATIENCE:
            logger.warning(
                "The event loop that renews the claim of %r on %r stood still for %.1f s of its %g s: something "
                "blocks it. Move that work to a thread.", self._name, self._key, late, self._lease,
            )  # fmt: skip
        self._renewal = loop.create_task(self._renew())

    async def _renew(self) -> None:
        sent = now()
        try:
            kept = await self._write_anew(self._body())
        except (StorageError, OSError) as error:
            if not self._is_unsure:
                logger.warning("The claim of %r on %r could not be renewed: %s", self._name, self._key, error)
            self._is_unsure = True  # it may have arrived all the same
            self._plan(self._lease / RENEWALS / 3)
            return
        if kept:
            self._sent = sent
            self._plan(self._lease / RENEWALS)
        else:
            self._is_over = True
            logger.warning(
                "The claim of %r on %r was taken over, or removed: its result will not be published.",
                self._name, self._key,
            )  # fmt: skip

    async def _write_anew(self, body: object) -> bool:
        """Replace the claim; false if it is not there any more."""
        while True:
            if self._is_unsure and not await self._find():
                return False
            try:
                self.version = await self._storage.write(self._key, body, if_version=self.version)  # type: ignore[arg-type]
            except ConditionFailedError:
                self._is_unsure = True  # the answer to an earlier write may have been lost
            else:
                self._is_unsure = False
                return True

    async def _find(self) -> bool:
        """Whether the claim lies there, in which version whatever."""
        try:
            stored = await self._storage.fetch(self._key, 0, HEADER + len(self._key.encode()))
            assert stored is not None  # None answers `unless` only
            header, _ = unpack_header(stored.data, signing_keys=self._signing_keys)
        except (ObjectNotFoundError, RecordError):
            return False
        if (header.token, header.extra.get("holder")) != (self.token, self._holder):
            return False
        self.version = stored.version
        return True

    # --- the end

    async def settle(self, expect: str | None = None) -> str:
        """Stop renewing, and return the version that the commit replaces.

        A renewal under way is awaited, at most for what is left of the lease: cutting it off would leave an
        old version, and fence ourselves.
        """
        if self._timer is not None:
            self._timer.cancel()
        renewal = self._renewal
        if renewal is not None and not renewal.done():
            await asyncio.wait([renewal], timeout=max(0.0, self._sent + self._lease - now()))
            if not renewal.done():
                renewal.cancel()
                self._is_unsure = True
            if self._timer is not None:
                self._timer.cancel()
        if self._is_unsure and not self._is_over and not await self._find():
            self._is_over = True
        return self.version

    async def release(self, *, committed: bool = False) -> None:
        """End the claim. After a commit there is nothing left to do; else what was before is put back."""
        try:
            await self.settle()
            if committed or self._is_over:
                return
            await self._write_anew(self._before or self._grave())
        except (StorageError, OSError) as error:
            logger.warning(
                "The claim of %r on %r could not be ended: %s It ends with its lease.",
                self._name, self._key, error,
            )  # fmt: skip
        finally:
            self._is_over = True

    def _grave(self) -> list[bytes | bytearray | memoryview]:
        grave = Header(key=self._key, serializer="free", kind="free", token=self.token)
        return pack(grave, [b""], signing_keys=self._signing_keys)
