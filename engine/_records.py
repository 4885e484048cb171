"""Records and storage: one look-up, one commit, and why a look-up missed.

A record is one object: header and value together, under the key. With a key storage (or a storage key of the
user's own) the record holds the header only, and the value lies in the result storage, at the `location` that
the header names. Whatever cannot be read, whoever wrote it, is a miss with one warning, never a failure.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

from ..storage import Storage
from ..storage._envelope import Header, pack, unpack_header
from ..storage._errors import (
    ConditionFailedError,
    ConditionsUnsupportedError,
    StorageError,
)
from ..storage._serializers import Serializer, decode, uses_pickle
from ..storage._storage import Buffer
from ..storage._weight import is_heavy
from ._context import new_id
from ._copies import MISSING
from ._exact import encode_exactly
from ._flights import Served
from ._intents import OWN, Member, value_of
from ._logging import logger
from ._lookup import FIRST, Lookup
from ._place import Facts, Hit, Place, Prepared, shareable
from ._protocol import remove_one, replace_one
from ._steps import ABSENT, ANY, Refused

LARGE = 128 * 1024
"""Bytes from which on a transaction lets a value lie apart, so that intents stay small; a hit then costs the two
reads that it costs anyway."""


class Records(Lookup):
    """Looks records up and commits them.

    Args:
        offload: Runs a function in a worker thread of the engine.
        clock: Unix time in seconds.
        signing_keys: The first signs, all verify.
        allow_pickle: Whether unsigned pickled values may travel over shared storage.
        storage_at: The storage of a URL that an intent names.
    """

    async def prepare(
        self, place: Place, key: str, value: Any, facts: Facts, *, apart_from: float = inf
    ) -> Prepared:
        """The record for a value, encoded and packed, not written yet.

        Values of `apart_from` bytes and more lie apart from their record, wherever that lies.

        Raises:
            SerializationError: The serializer cannot carry the value, or would change it.
            PickleRefusedError: It would have to be pickled, and the storage is shared.
        """
        if is_heavy(value):
            prepared: Prepared = await self._offload(self.prepare_now, place, key, value, facts, apart_from)
            return prepared
        return self.prepare_now(place, key, value, facts, apart_from)

    def prepare_now(
        self, place: Place, key: str, value: Any, facts: Facts, apart_from: float = inf
    ) -> Prepared:
        """As `prepare`, on the calling thread, whatever the value weighs."""
        encoded = encode_exactly(place.serializer, value)
        if uses_pickle(encoded.serializer):
            self._check_pickle(place, type(value).__qualname__, bool(self.signing_keys))
        header = Header(
            key=key,
            created=self._clock(),
            expires_at=facts.expires_at,
            serializer=encoded.serializer,
            run_id=facts.run_id,
            task=facts.task,
            components=facts.components,
            token=facts.token,
        )
        size = sum(memoryview(segment).nbytes for segment in encoded.segments)
        is_apart = place.is_split or size >= apart_from
        if is_apart:
            header.location = place.location or new_id()
            header.extra = {} if place.location is not None else {OWN: True}
        record = pack(header, encoded.segments, signing_keys=self.signing_keys)
        if is_apart:
            return Prepared(key, place, header, record[:1], record[1:], encoded.segments, value)
        return Prepared(key, place, header, record, None, encoded.segments, value)

    async def write(
        self,
        prepared: Prepared,
        *,
        expect: str | None = ANY,
        exclusive: bool = False,
        replaces: Header | None = None,
    ) -> str:
        """Make one prepared record visible; its new version.

        Written conditionally on what the look-up saw, so that it never covers a transaction that is about to
        commit. Meeting another record it replaces that one (the last commit wins), meeting an intent it waits
        for the outcome. `exclusive` refuses instead: somebody else has held the key. A value that lies apart
        and belongs to the replaced record is removed.

        Costs one write, two where the value lies apart; one read more where nobody has looked, and two in the
        rare conflict. Cancelled, it leaves the old record or the new one, and at worst an unreferenced value.

        Args:
            prepared: From `prepare`.
            expect: The version that the look-up saw, ABSENT for none; ANY where nobody has looked.
            exclusive: Whether the caller holds the key.
            replaces: The header that the look-up saw.

        Raises:
            Refused: `exclusive`, and the object is not what was seen.
            StorageError: The storage could not take it; the old record is untouched.
        """
        storage, key, record = prepared.place.records, prepared.key, prepared.record
        if prepared.value is not None:
            assert prepared.header.location is not None
            await prepared.place.storage.write(prepared.header.location, prepared.value)
        replaced = replaces.location if replaces is not None and OWN in replaces.extra else None
        try:
            if expect is ANY:
                version, replaced = await self._replace(prepared)
            elif expect == ABSENT:
                version = await storage.write(key, record, if_absent=True)
            else:
                version = await storage.write(key, record, if_version=expect)
        except ConditionsUnsupportedError:
            if exclusive:
                raise
            return await storage.write(key, record)  # a store for READ_COMMITTED alone
        except ConditionFailedError:
            if exclusive:
                raise Refused((storage.url, key), "another holder has written it") from None
            version, replaced = await self._replace(prepared)
        if replaced is not None:
            await self._drop_value(prepared.place.storage, replaced)
        return version

    async def _replace(self, prepared: Prepared) -> tuple[str, str | None]:
        """Write a record over whatever is committed; its version, and where the replaced one's value lies."""
        place = prepared.place
        where = (place.records.url, prepared.key)
        version, beginning = await self._carrier.run(replace_one(where, prepared.record, self.signing_keys))
        value = value_of(beginning, "", self.signing_keys) if beginning is not None else None
        return version, value[1] if value is not None else None

    async def _drop_value(self, storage: Storage, location: str) -> None:
        try:
            await storage.delete(location)
        except (StorageError, OSError) as error:
            logger.warning("The value %r of a replaced record stays in %s: %s", location, storage.url, error)

    def member(self, prepared: Prepared, expect: str | None, exclusive: bool) -> Member:
        """A prepared record as a member of a transaction."""
        place, header = prepared.place, prepared.header
        where = (place.records.url, prepared.key)
        record, value, moves_to = prepared.record, None, None
        if prepared.value is not None:
            assert header.location is not None
            apart = (place.storage.url, header.location)
            if OWN in header.extra:
                value = (apart, prepared.value)
            else:
                record, moves_to = [*record, *prepared.value], apart
        return Member(where, b"".join(record), expect, exclusive, value, moves_to, place.storage.url)

    async def commit_together(self, tx: str, members: Sequence[Member]) -> None:
        """Make several records visible in one step; see `_protocol` for how, and what it guarantees.

        Raises:
            Refused: Nothing is visible.
            InDoubt: All of it is visible or nothing, and the storage is out of reach.
            StorageError: Nothing is visible. What is left is ended by whoever meets it.
        """
        await self._carrier.commit(tx, members, self.signing_keys)

    def served(self, prepared: Prepared, *, is_snapshot: bool = False) -> Served:
        """The record for others to be served from, each with a value of its own."""
        header = prepared.header
        value = shareable(prepared.original)
        if value is not MISSING:
            return Served(lambda: value, header.run_id, header.created)
        segments = prepared.segments
        if not is_snapshot:  # buffers may be views of an array that the first caller goes on to change
            segments = [bytes(segment) for segment in segments]
        return _served(header, header.serializer, segments, prepared.place.serializer)

    def served_hit(self, place: Place, hit: Hit) -> Served | None:
        """What was read, for others to be served from; None where that would take longer than to read it again."""
        value, header = shareable(hit.value), hit.header
        if value is not MISSING:
            return Served(lambda: value, header.run_id, header.created)
        if is_heavy(hit.value):
            return None
        try:
            encoded = place.serializer.encode(hit.value)
        except StorageError:  # it came from another serializer, which this one does not cover
            return None
        segments = [bytes(segment) for segment in encoded.segments]
        return _served(header, encoded.serializer, segments, place.serializer)

    async def invalidate(self, place: Place, key: str) -> bool:
        """Drop the record under `key` and the value it names; whether there was a record.

        A transaction that is about to commit it is waited for, and dropped in turn. Costs one read, one write
        and one delete, and another delete where the value lies apart.
        """
        where = (place.records.url, key)
        fixed = None
        try:
            if place.location is not None:
                header, _ = unpack_header(
                    await place.records.read(key, 0, FIRST), signing_keys=self.signing_keys
                )
                fixed = header.location
        except StorageError:
            pass  # an unreadable record names no value; the record itself goes below
        try:
            dropped: bool = await self._carrier.run(remove_one(where, place.storage.url, self.signing_keys))
        except ConditionsUnsupportedError:
            dropped = await place.records.delete(key)
        if fixed is not None:
            await place.storage.delete(fixed)
        return dropped


def _served(header: Header, name: str, segments: Sequence[Buffer], serializer: Serializer) -> Served:
    return Served(
        lambda: decode(name, segments, using=serializer, imports=True),
        header.run_id,
        header.created,
        sum(map(len, segments)),
    )
