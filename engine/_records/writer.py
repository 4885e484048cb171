"""Records and storage: one look-up, one commit, and why a look-up missed.

A record is one object: header and value together, under the key. With a key storage (or a storage key of the
user's own) the record holds the header only, and the value lies in the result storage, at the `location` that
the header names. Whatever cannot be read, whoever wrote it, is a miss with one warning, never a failure.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import inf
from typing import TYPE_CHECKING, Any

from ...storage import ObjectNotFoundError, Storage
from ...storage._errors import (
    ConditionFailedError,
    ConditionsUnsupportedError,
    RecordError,
    StorageError,
)
from ...storage._format.envelope import Header, pack, unpack_header
from ...storage._storage import Buffer
from ...storage._values.serializers import Serializer, decode, uses_pickle
from ...storage._values.weight import is_heavy
from .._commit.intents import OWN, Member
from .._commit.protocol import remove_one, replace_one
from .._commit.requests import ABSENT, ANY, InDoubt, Refused
from .._concurrency.singleflight import Served
from .._runs.logging import logger
from .memory import MISSING
from .orphans import STREAM, Sweep, chunks_of, id_of, value_name, writing
from .reader import FIRST, Lookup
from .record import Facts, Hit, Place, Prepared, shareable
from .roundtrip import encode_exactly

if TYPE_CHECKING:
    from .._transactions.outcome import Staged

SWEEP_SECONDS = 5.0
"""How long the end of an engine looks for values that no record names."""
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
            header.location = place.location or value_name(place, key)
            header.extra = {} if place.location is not None else {OWN: True}
        if facts.stream is not None:
            header.extra = {**header.extra, STREAM: facts.stream}
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
        with self._under_way([prepared]):
            if prepared.value is not None:
                assert prepared.header.location is not None
                await prepared.place.storage.write(prepared.header.location, prepared.value)
            version, replaced = await self._write(prepared, expect, exclusive, replaces)
        if replaced is not None:
            await self.forget(prepared.place, prepared.key, replaced)
        return version

    async def _write(
        self, prepared: Prepared, expect: str | None, exclusive: bool, replaces: Header | None
    ) -> tuple[str, Header | None]:
        """As above, without the value; the record's version, and the header of the one that it has replaced."""
        storage, key, record = prepared.place.records, prepared.key, prepared.record
        try:
            if expect is ANY:
                return await self._replace(prepared)
            if expect == ABSENT:
                return await storage.write(key, record, if_absent=True), replaces
            return await storage.write(key, record, if_version=expect), replaces
        except ConditionsUnsupportedError:
            if exclusive:
                raise
            return await storage.write(key, record), None  # a store for READ_COMMITTED alone
        except ConditionFailedError:
            if exclusive:
                raise Refused((storage.url, key), "another holder has written it") from None
            return await self._replace(prepared)

    async def _replace(self, prepared: Prepared) -> tuple[str, Header | None]:
        """Write a record over whatever is committed; its version, and the header of the replaced one."""
        where = (prepared.place.records.url, prepared.key)
        version, beginning = await self._carrier.run(replace_one(where, prepared.record, self.signing_keys))
        return version, self._header_of(beginning)

    def _header_of(self, beginning: Buffer | None) -> Header | None:
        if not beginning:
            return None
        try:
            return unpack_header(beginning, signing_keys=self.signing_keys)[0]
        except RecordError:
            return None

    @contextmanager
    def _under_way(self, committing: Iterable[Prepared]) -> Iterator[None]:
        """What is written apart inside of this is no orphan, and there may be some where it is written."""
        ids = []
        for prepared in committing:
            if (made := id_of(prepared.header.location)) is not None:
                ids.append(made)
            if made is not None or STREAM in prepared.header.extra:
                place = prepared.place
                self._apart[place.records.url, place.storage.url] = place.records, place.storage
        writing.update(ids)
        try:
            yield
        finally:
            writing.difference_update(ids)

    async def forget(self, place: Place, key: str, replaced: Header) -> None:
        """Remove what only a record that is not there any more has named: its value, or the chunks of its stream."""
        names = [replaced.location] if replaced.location is not None and OWN in replaced.extra else []
        storage = place.storage
        try:
            if STREAM in replaced.extra:
                prefix = chunks_of(place, key, replaced.extra[STREAM])
                names += [stat.key async for stat in storage.list(prefix)]
            for name in names:
                await storage.delete(name)
        except (StorageError, OSError) as error:
            logger.warning("What a replaced record %r named stays in %s: %s", key, storage.url, error)

    async def sweep(self, records: Storage, values: Storage) -> int:
        """End what abandoned transactions left, and remove values that no record names; how many. See `orphans`."""
        return await self._sweep(records, values).all()

    def _sweep(self, records: Storage, values: Storage) -> Sweep:
        return Sweep(self._carrier, self.signing_keys, records, values, self._clock)

    async def sweep_some(self) -> None:
        """The same in small, where this engine has written values apart; what fails is left to the next one."""
        apart, self._apart = self._apart, {}
        for records, values in apart.values():
            try:
                async with asyncio.timeout(SWEEP_SECONDS):
                    await self._sweep(records, values).some()
            except Exception as error:  # a storage of the user's own may raise anything
                logger.info("Values that no record names were not looked for in %s: %r", values.url, error)

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

    async def has_written(self, prepared: Prepared) -> bool:
        """Whether a record is there after a write that failed: its answer may have been lost.

        Raises:
            InDoubt: The storage does not answer.
        """
        storage = prepared.place.records
        try:
            return await storage.read(prepared.key) == b"".join(prepared.record)
        except ObjectNotFoundError:
            return False
        except Exception as error:  # a storage of the user's own may raise anything
            raise InDoubt((storage.url, prepared.key), str(error) or repr(error)) from error

    async def commit_together(self, tx: str, staged: Sequence[Staged]) -> None:
        """Make several records visible in one step; see `_commit/protocol` for how, and what it guarantees.

        Raises:
            Refused: Nothing is visible.
            InDoubt: All of it is visible or nothing, and the storage is out of reach.
            StorageError: Nothing is visible. What is left is ended by whoever meets it.
        """
        members = [self.member(each.prepared, each.expect, each.exclusive) for each in staged]
        with self._under_way([each.prepared for each in staged]):
            await self._carrier.commit(tx, members, self.signing_keys)
        for each, member in zip(staged, members, strict=True):  # their values are the protocol's business
            replaced = self._header_of(member.old)
            if replaced is not None and STREAM in replaced.extra:
                await self.forget(each.prepared.place, each.prepared.key, replaced)

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
            removed = await self._carrier.run(remove_one(where, place.storage.url, self.signing_keys))
            dropped = bool(removed)
            header_of_it = self._header_of(removed)
            if header_of_it is not None and STREAM in header_of_it.extra:
                await self.forget(place, key, header_of_it)
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
