"""Getting a claim: over nothing, over what was committed, or over the claim of a holder that is no longer heard of."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

from ...locking import LockTimeoutError
from ...locking._clock import now
from ...locking._waiting.backoff import Pace
from ...locking._waiting.report import Telling
from ...storage import ObjectNotFoundError, RecordError
from ...storage._format.envelope import unpack_header
from ...storage._storage import Stored
from .._commit.requests import ABSENT
from .._concurrency.claims import HEADER, Claim
from .._concurrency.locks import holder_name
from .._records.reader import FIRST
from .._records.record import Hit, Miss

if TYPE_CHECKING:
    from .._concurrency.singleflight import Flight, Patience
    from .turn import Call

MARGIN, GRACE = 1.1, 0.2
"""A claim counts as abandoned after so many times its lease, and so many seconds more."""
LARGEST = FIRST
"""Bytes of a committed record that a claim carries along, with every renewal anew."""


class _View(NamedTuple):
    """What lies under a key: its version, what is committed there, the last generation; and of a claim its lease."""

    version: str
    before: bytes = b""
    generation: int = 0
    lease: float | None = None
    holder: str = "somebody"

    def left(self, since: float) -> float:
        """Seconds until it may be written over, if it was first seen at `since`."""
        return 0.0 if self.lease is None else since + self.lease * MARGIN + GRACE - now()


async def claim(
    call: Call, flight: Flight, miss: Miss, lease: float, patience: Patience
) -> Claim | Hit | None:
    """Claim the key; a hit where somebody has committed in between.

    None where it cannot be claimed, because the record that is to be replaced is too large to be carried along:
    then an object of its own has to be its lock.

    One reader a key and process (the flight's leader) polls while another process holds it. Costs one write where
    nobody does and the look-up saw all; one read more to replace what it did not see.

    Raises:
        LockTimeoutError: It was not free in time.
        StorageError: The storage does not answer, or does not honour conditions.
    """
    run, storage, key = call.run, call.place.records, flight.where[1]
    await storage.ensure_conditional()
    mine = Claim(flight, storage, holder_name(run), run.name, lease, run.engine.records.signing_keys)
    view = _seen(miss)
    since, pace, telling = now(), Pace(), Telling(now())
    while True:
        if view is not None and (left := view.left(since)) > 0:
            run.begin_waiting()
            if patience.left == 0:
                assert patience.seconds is not None
                raise LockTimeoutError(key, run.name, storage.url, patience.seconds, view.holder)
            telling.tell(now(), run.name, key, storage.url, view.holder)
            pause = pace.next()
            await asyncio.sleep(min(pause, left, patience.left or pause))
        elif view is not None:
            if await mine.take(view.version, view.before, view.generation):
                return mine
            view = None
        seen, found = view, await _look(call, view)
        if not isinstance(found, _View):
            return found
        view = found
        if seen is None or seen.version != view.version:
            since = now()
            if seen is None or seen.generation != view.generation:
                pace.restart()


def _seen(miss: Miss) -> _View | None:
    """What the look-up saw, where it saw all that a claim has to carry along."""
    if miss.version == ABSENT:
        return _View(ABSENT)
    if miss.version is None or miss.header is None:
        return None
    if miss.header.kind == "free":
        return _View(miss.version, b"", miss.header.token or 0)
    if miss.plain is not None:
        return _View(miss.version, bytes(miss.plain), miss.header.token or 0)
    return None


async def _look(call: Call, seen: _View | None) -> _View | Hit | None:
    """Look again, for what `claim` returns or can go on with. Costs one read (S3: 304 while nothing changes)."""
    records, storage, key = call.run.engine.records, call.place.records, call.where[1]
    try:
        stored = await storage.fetch(
            key, 0, HEADER + LARGEST, unless=seen.version if seen is not None else None
        )
    except ObjectNotFoundError:
        return _View(ABSENT)
    if stored is None:
        return seen
    try:
        header, offset = unpack_header(stored.data, signing_keys=records.signing_keys)
    except RecordError:
        return _whole(stored, 0)
    if header.kind == "free":
        return _View(stored.version, b"", header.token or 0)
    if header.kind == "intent":
        await records.wait_for_outcome(call.where)
        return await _look(call, None)
    if not call.refresh:
        # Also behind a claim: what its holder is to replace, and may never do.
        found = await records.lookup(call.place, key, begun=stored)
        if isinstance(found, Hit):
            return found
    if header.kind == "claim":
        before = bytes(memoryview(stored.data)[offset:])
        lease, holder = float(header.extra.get("lease", 30.0)), str(header.extra.get("holder"))
        return _View(stored.version, before, header.token or 0, lease, holder)
    return _whole(stored, header.token or 0)


def _whole(stored: Stored, generation: int) -> _View | None:
    if stored.size > LARGEST:
        return None
    return _View(stored.version, bytes(stored.data), generation)
