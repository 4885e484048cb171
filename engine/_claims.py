"""Claims: the lock inside the record, for a lock manager that keeps its leases where the records lie.

One object is lock, fence and record: a conditional write turns what is there into a claim, which keeps what was
committed before for READ_COMMITTED readers; the commit replaces the claim by the record, conditionally on the
claim's own version, so that it releases and fences in one request. A miss costs 1 GET and 2 PUTs, a hit 1 GET.

While the body runs the claim is written anew every third of its lease. A waiter measures with its own clock how
long a claim stays unchanged, and takes it over after lease × 1.1 + 0.2 s; nobody compares two machines' clocks.
A holder that was silent for 80 % of its lease counts itself as having lost it. A holder that fails leaves what
was committed before, or a tombstone, never nothing: conditional deletes are the least supported request.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, NamedTuple

from ..locking import LockTimeoutError
from ..locking._clock import now
from ..storage import ConditionFailedError, ObjectNotFoundError, RecordError, Storage, StorageError
from ..storage._envelope import Header, pack, unpack_header
from ._logging import logger
from ._records import Hit, Miss
from ._steps import ABSENT, ANY

if TYPE_CHECKING:
    from ._caching import Call
    from ._flights import Flight

SHORTEST, LONGEST = 0.05, 2.0
"""Seconds between two looks of a waiter: decorrelated jitter (M. Brooker, "Exponential Backoff And Jitter")."""


class Claim:
    """A key that is held by a claim in its record's place. Used as `Held` is."""

    def __init__(
        self, flight: Flight, storage: Storage, key: str, holder: str, lease: float, keys: tuple[bytes, ...]
    ) -> None:
        self.flight = flight
        self._storage = storage
        self._key = key
        self._holder = holder
        self._lease = lease
        self._signing_keys = keys
        self._before = b""
        self._heartbeat: asyncio.Task[None] | None = None
        self._deadline = 0.0
        self._is_over = False
        self.version = ""
        self.token = 0

    @property
    def lost(self) -> bool:
        """Whether somebody else may have taken the claim over by now."""
        return self._is_over or now() >= self._deadline

    async def take(self, expect: str, before: bytes, generation: int) -> bool:
        """Write the claim over the version that was seen; whether it was still that one."""
        self._before, self.token = before, generation
        sent = now()
        try:
            if expect == ABSENT:
                self.version = await self._storage.write(self._key, self._body(), if_absent=True)
            else:
                self.version = await self._storage.write(self._key, self._body(), if_version=expect)
        except ConditionFailedError:
            return False
        self._deadline = sent + self._lease * 0.8
        self._heartbeat = asyncio.ensure_future(self._beat())
        return True

    def _body(self) -> list[bytes | bytearray | memoryview]:
        extra = {"lease": self._lease, "holder": self._holder}
        header = Header(key=self._key, serializer="claim", kind="claim", token=self.token, extra=extra)
        return pack(header, [self._before], signing_keys=self._signing_keys)

    async def _beat(self) -> None:
        while not self._is_over:
            await asyncio.sleep(self._lease / 3)
            sent = now()
            try:
                self.version = await self._storage.write(self._key, self._body(), if_version=self.version)
            except ConditionFailedError:
                self._is_over = True
                logger.warning(
                    "The claim on %r was taken over: its holder was silent for too long.", self._key
                )
                return
            except (StorageError, OSError) as error:
                logger.warning("The claim on %r could not be renewed: %s", self._key, error)
                continue
            self._deadline = sent + self._lease * 0.8

    async def settle(self, expect: str | None = None) -> str:
        """Stop renewing, and return the version that the commit replaces.

        A renewal under way is awaited: cutting it off would leave an old version, and fence ourselves.
        """
        beat, self._heartbeat = self._heartbeat, None
        if beat is not None:
            beat.cancel()
            await asyncio.wait([beat])
        return self.version

    async def release(self, *, committed: bool = False) -> None:
        """End the claim. After a commit there is nothing left to do; else what was before is put back."""
        version = await self.settle()
        if committed or self._is_over:
            return
        self._is_over = True
        grave = Header(key=self._key, serializer="free", kind="free", token=self.token)
        data = [self._before] if self._before else pack(grave, [b""], signing_keys=self._signing_keys)
        try:
            await self._storage.write(self._key, data, if_version=version)
        except ConditionFailedError:
            pass  # taken over, or committed
        except (StorageError, OSError) as error:
            logger.warning(
                "The claim on %r could not be ended: %s. It ends with its lease.", self._key, error
            )


class _View(NamedTuple):
    """What lies under a key: its version, what is committed there, the last generation, and the lease of whoever
    holds it (None for nobody)."""

    version: str
    before: bytes = b""
    generation: int = 0
    lease: float | None = None


async def claim(call: Call, flight: Flight, miss: Miss, lease: float, timeout: float | None) -> Claim | None:
    """Claim the key; None where a record that may be served has come in between.

    One reader a key and process (the flight's leader) polls while another process holds it. Costs one write
    where nobody does.

    Raises:
        LockTimeoutError: It was not free within `timeout` seconds.
        StorageError: The storage does not answer, or does not honour conditions.
    """
    run, storage, key = call.run, call.place.records, flight.where[1]
    await storage.ensure_conditional()
    mine = Claim(flight, storage, key, run.id, lease, run.engine.records.signing_keys)
    view: _View | None = None
    if miss.version is not ANY:
        view = _View(miss.version, b"", (miss.header.token or 0) if miss.header is not None else 0)
    ends = None if timeout is None else now() + timeout
    since, pause = now(), SHORTEST
    while True:
        if view is not None and (view.lease is None or now() - since > view.lease * 1.1 + 0.2):
            if await mine.take(view.version, view.before, view.generation + 1):
                return mine
            view = None
        elif view is not None:
            run.begin_waiting()
            if ends is not None and now() >= ends:
                assert timeout is not None
                raise LockTimeoutError(key, run.name, storage.url, timeout)
            pause = min(LONGEST, random.uniform(SHORTEST, pause * 3))
            await asyncio.sleep(pause if ends is None else min(pause, max(0.001, ends - now())))
        seen, view = view, await _look(call, view)
        if view is None:
            return None
        if seen is None or seen.version != view.version:
            since = now()


async def _look(call: Call, seen: _View | None) -> _View | None:
    """Look again; None where there is a record that may be served. Costs one read (S3: 304 while nothing changes)."""
    records, storage, key = call.run.engine.records, call.place.records, call.where[1]
    try:
        stored = await storage.fetch(key, unless=seen.version if seen is not None else None)
    except ObjectNotFoundError:
        return _View(ABSENT)
    if stored is None:
        return seen
    try:
        header, offset = unpack_header(stored.data, signing_keys=records.signing_keys)
    except RecordError:
        return _View(stored.version)
    generation = header.token or 0
    if header.kind == "claim":
        before = bytes(memoryview(stored.data)[offset:])
        return _View(stored.version, before, generation, float(header.extra.get("lease", 30.0)))
    if header.kind == "free":
        return _View(stored.version, b"", generation)
    if header.kind == "intent":
        await records.wait_for_outcome(call.where)
        return await _look(call, None)
    if not call.refresh and isinstance(await records.lookup(call.place, key), Hit):
        return None
    return _View(stored.version, bytes(stored.data) if call.refresh else b"", generation)
