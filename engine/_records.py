"""Records and storage: one look-up, one commit, and why a look-up missed.

A record is one object: header and value together, under the key. With a key storage (or a storage key of the
user's own) the record holds the header only, and the value lies in the result storage, at the `location` that
the header names. Whatever cannot be read, whoever wrote it, is a miss with one warning, never a failure.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from ..storage import ObjectNotFoundError, Storage, storage_from_url
from ..storage._envelope import Header, check_payload, header_size, pack, split, unpack_header
from ..storage._errors import (
    ConditionFailedError,
    ConditionsUnsupportedError,
    CorruptRecordError,
    PickleRefusedError,
    StorageError,
)
from ..storage._serializers import Serializer, decode, uses_pickle
from ..storage._storage import Buffer, Stored
from ..storage._weight import is_heavy
from ._commit import LEASE, Carrier, this_process
from ._context import new_id
from ._failures import Failures
from ._flights import Served
from ._intents import (
    ABSENT,
    ANY,
    Found,
    Member,
    Refused,
    Writer,
    clear,
    commit,
    committed_before,
    effective,
    parse,
    replace_one,
)
from ._logging import logger

T = TypeVar("T")
FIRST = 128 * 1024
"""Bytes of the first read: a header and a small value come in one."""
LEAVES_LOOP = 64 * 1024
"""Bytes above which packing, checking and unpacking leave the event loop."""
PAUSES = (0.01, 0.04, 0.16)
"""Seconds before each further read of a value that is not visible yet."""
SETTLED = 60.0
"""Seconds after which a value that is not there is not late, but gone."""
SHAREABLE = frozenset({type(None), bool, int, float, complex, str, bytes})


class Place(NamedTuple):
    """Where the records of a task lie, and how its values are written."""

    storage: Storage
    key_storage: Storage | None
    serializer: Serializer
    location: str | None = None
    """The storage key of the user's own, under which the value lies apart from its record."""

    @property
    def records(self) -> Storage:
        return self.key_storage or self.storage

    @property
    def is_split(self) -> bool:
        return self.key_storage is not None or self.location is not None


class Hit(NamedTuple):
    """A committed record that may be served."""

    value: Any
    header: Header
    version: str


class Miss(NamedTuple):
    """No record that may be served, and why. `version` is what lies there all the same, for a conditional write:
    ABSENT for nothing, CONTENDED for a transaction's intent, ANY where nobody knows."""

    reason: str
    header: Header | None = None
    version: str | None = ANY


CONTENDED = "contended"
"""No object's version: a write that expects it fails, and then waits for the transaction that has the key."""


@dataclass(slots=True)
class Facts:
    """What a record says of the run that wrote it."""

    run_id: str
    task: str
    components: dict[str, str] = field(default_factory=dict)
    expires_at: float | None = None
    token: int | None = None


class Prepared(NamedTuple):
    """A record that is ready to be written: the value first where it lies apart, then the record."""

    key: str
    place: Place
    header: Header
    record: Sequence[Buffer]
    value: Sequence[Buffer] | None
    segments: Sequence[Buffer]
    original: Any


class Records(Failures):
    """Looks records up and commits them.

    Args:
        offload: Runs a function in a worker thread of the engine.
        clock: Unix time in seconds.
        signing_keys: The first signs, all verify.
        allow_pickle: Whether unsigned pickled values may travel over shared storage.
        storage_at: The storage of a URL that an intent names.
    """

    def __init__(
        self,
        offload: Callable[..., Awaitable[Any]],
        clock: Callable[[], float] = time.time,
        signing_keys: Sequence[bytes] = (),
        allow_pickle: bool = False,
        storage_at: Callable[[str], Storage] = storage_from_url,
    ) -> None:
        self._offload = offload
        self._carrier = Carrier(storage_at)
        self._clock = clock
        self._signing_keys = tuple(signing_keys)
        self._allow_pickle = allow_pickle
        self._warned: set[tuple[str, str, str]] = set()

    def trust(self, signing_keys: Sequence[bytes], allow_pickle: bool) -> None:
        """From now on sign with the first key, verify with all, and let pickled values travel or not."""
        self._signing_keys = tuple(signing_keys)
        self._allow_pickle = allow_pickle

    # --- look-up

    async def lookup(self, place: Place, key: str) -> Hit | Miss:
        """The committed record under `key`, or why there is none to serve.

        Costs one read of the record's storage, and one more of the result storage where the value lies apart
        or the record is larger than 128 KiB; a miss is decided by the header alone. Never raises for what it
        reads: a record that cannot be used is a miss with one warning.
        """
        try:
            return await self._read(place, key)
        except ObjectNotFoundError:
            return Miss("no record", None, ABSENT)
        except Exception as error:  # a storage of the user's own may raise anything
            self._warn(place.records, key, error)
            return Miss("record unreadable")

    async def _read(self, place: Place, key: str) -> Hit | Miss:
        records = place.records
        stored = await records.fetch(key, 0, FIRST)
        assert stored is not None  # None answers `unless` only
        version = stored.version
        try:
            if header_size(stored.data) > len(stored.data) < stored.size:
                whole = await records.fetch(key, 0, header_size(stored.data), if_version=version)
                assert whole is not None
                stored = whole
            header, offset = unpack_header(stored.data, signing_keys=self._signing_keys)
            if header.kind in ("intent", "claim"):
                stored = await self._behind(records, key, stored)
                version = CONTENDED if header.kind == "intent" else version
                if not stored.data:
                    return Miss("no record", None, version)
                header, offset = unpack_header(stored.data, signing_keys=self._signing_keys)
            if header.key != key:
                raise CorruptRecordError(f"it belongs to the key {header.key!r}")
            refusal = self._refusal(place, header)
            if refusal is not None:
                return Miss(refusal, header, version)
            if header.location is not None:
                value = await self._read_apart(place, header)
            else:
                value = await self._read_payload(place, header, stored, offset)
        except StorageError as error:
            self._warn(records, key, error)
            return Miss("record unreadable", None, version)
        return Hit(value, header, version)

    async def _behind(self, storage: Storage, key: str, stored: Stored) -> Stored:
        """What an intent or a claim stands for: the record that readers are to see, whole; no bytes for none."""
        if len(stored.data) < stored.size:
            whole = await storage.fetch(key, if_version=stored.version)
            assert whole is not None
            stored = whole
        where = (storage.url, key)
        intent = parse(stored.data, self._signing_keys)
        if intent is None:
            data = committed_before(stored.data, self._signing_keys)
        else:
            found = Found(stored.data, stored.version)
            data = await self._carrier.run(effective(where, found, intent, self._signing_keys))
            if self._carrier.is_abandoned(where, stored.version, intent.lease, intent.owner):
                await self._carrier.run(clear(where, found, intent, self._signing_keys))
        return Stored(data, stored.version, len(data))

    def _refusal(self, place: Place, header: Header) -> str | None:
        """Why a sound record may not be served."""
        if header.kind != "record":
            return "no record"
        if header.expires_at is not None and (late := self._clock() - header.expires_at) >= 0:
            return f"expired {ago(late)} ago"
        if place.location is not None and header.location != place.location:
            return "the result storage key changed"
        if uses_pickle(header.serializer):
            self._check_pickle(place, f"value of {header.task!r}", header.signed)
        return None

    def _check_pickle(self, place: Place, what: str, signed: bool) -> None:
        """Refuse pickled values where others can write, unless a signature vouches for them."""
        if not signed and not self._allow_pickle and (place.storage.shared or place.records.shared):
            raise PickleRefusedError(place.storage.url, what)

    async def _read_payload(self, place: Place, header: Header, stored: Stored, offset: int) -> Any:
        """The value behind the header: from the first read where it holds all, else segment by segment."""
        if len(stored.data) >= stored.size:
            payload = memoryview(stored.data)[offset:]
            if len(payload) <= LEAVES_LOOP:
                return self._decode_payload(place, header, payload)
            return await self._offload(self._decode_payload, place, header, payload)
        if stored.size != offset + header.payload_size:
            raise CorruptRecordError(f"it has {stored.size} bytes instead of {offset + header.payload_size}")
        segments: list[Buffer] = []
        for index, (start, end) in enumerate(header.ranges()):
            segments.append(
                await self._read_segment(place.records, header, stored, index, offset + start, offset + end)
            )
        return await self._offload(self._decode, place, header, segments)

    async def _read_segment(
        self, storage: Storage, header: Header, first: Stored, index: int, start: int, end: int
    ) -> Buffer:
        """One segment, into the kind of buffer from which its value is made without a copy."""
        if end <= len(first.data):
            return memoryview(first.data)[start:end]
        if index in header.frozen:
            stored = await storage.fetch(header.key, start, end, if_version=first.version)
            assert stored is not None
            return bytes(stored.data)  # no copy where it is bytes already
        segment = bytearray(end - start)
        await storage.fetch(header.key, start, end, if_version=first.version, into=segment)
        return segment

    async def _read_apart(self, place: Place, header: Header) -> Any:
        """The value at the location that the record names."""
        stored = await self._fetch_value(place.storage, header)
        if stored.size <= LEAVES_LOOP:
            return self._decode_payload(place, header, stored.data)
        return await self._offload(self._decode_payload, place, header, stored.data)

    async def _fetch_value(self, storage: Storage, header: Header) -> Stored:
        """The object at the record's location. A young one that is not visible yet is asked for again, thrice."""
        assert header.location is not None
        for pause in (*PAUSES, None):
            try:
                stored = await storage.fetch(header.location)
            except ObjectNotFoundError as error:
                if pause is None or self._clock() - header.created > SETTLED:
                    raise CorruptRecordError(
                        f"its value {header.location!r} is gone from {storage.url}"
                    ) from error
                await asyncio.sleep(pause)
            else:
                assert stored is not None
                return stored
        raise AssertionError("unreachable: the last read returns or raises")

    def _decode_payload(self, place: Place, header: Header, payload: Buffer) -> Any:
        return self._decode(place, header, split(header, payload))

    def _decode(self, place: Place, header: Header, segments: Sequence[Buffer]) -> Any:
        check_payload(header, segments)
        trusted = header.signed or not place.storage.shared
        return decode(header.serializer, segments, using=place.serializer, imports=trusted)

    def _warn(self, storage: Storage, key: str, error: Exception) -> None:
        """One warning for an object and a cause; the same again says nothing."""
        mark = (storage.url, key, type(error).__name__)
        if mark not in self._warned:
            if len(self._warned) >= 10_000:
                self._warned.clear()
            self._warned.add(mark)
            logger.warning("Record %r in %s is treated as a miss: %s", key, storage.url, error)

    # --- commit

    async def prepare(self, place: Place, key: str, value: Any, facts: Facts) -> Prepared:
        """The record for a value, encoded and packed, not written yet.

        Raises:
            SerializationError: The serializer cannot carry the value.
            PickleRefusedError: It would have to be pickled, and the storage is shared.
        """
        if is_heavy(value):
            prepared: Prepared = await self._offload(self._prepare, place, key, value, facts)
            return prepared
        return self._prepare(place, key, value, facts)

    def _prepare(self, place: Place, key: str, value: Any, facts: Facts) -> Prepared:
        encoded = place.serializer.encode(value)
        if uses_pickle(encoded.serializer):
            self._check_pickle(place, type(value).__qualname__, bool(self._signing_keys))
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
        if place.is_split:
            header.location = place.location or new_id()
        record = pack(header, encoded.segments, signing_keys=self._signing_keys)
        if place.is_split:
            return Prepared(key, place, header, record[:1], record[1:], encoded.segments, value)
        return Prepared(key, place, header, record, None, encoded.segments, value)

    async def write(self, prepared: Prepared, *, expect: str | None = ANY, exclusive: bool = False) -> str:
        """Make one prepared record visible; its new version.

        Written conditionally on what the look-up saw, so that it never covers a transaction that is about to
        commit. Meeting another record it replaces that one (the last commit wins), meeting an intent it waits
        for the outcome. `exclusive` refuses instead: somebody else has held the key.

        Costs one write, two where the value lies apart; two reads more in the rare conflict. Cancelled, it
        leaves the old record or the new one, and at worst an unreferenced value.

        Raises:
            Refused: `exclusive`, and the object is not what was seen.
            StorageError: The storage could not take it; the old record is untouched.
        """
        storage = prepared.place.records
        if prepared.value is not None:
            assert prepared.header.location is not None
            await prepared.place.storage.write(prepared.header.location, prepared.value)
        try:
            if expect is ANY:
                return await storage.write(prepared.key, prepared.record)
            if expect == ABSENT:
                return await storage.write(prepared.key, prepared.record, if_absent=True)
            return await storage.write(prepared.key, prepared.record, if_version=expect)
        except ConditionsUnsupportedError:
            if exclusive:
                raise
            return await storage.write(prepared.key, prepared.record)  # a store for READ_COMMITTED alone
        except ConditionFailedError:
            where = (storage.url, prepared.key)
            if exclusive:
                raise Refused(where, "another holder has written it") from None
        version: str = await self._carrier.run(replace_one(where, prepared.record, self._signing_keys))
        return version

    def member(self, prepared: Prepared, expect: str | None, exclusive: bool) -> Member:
        """A prepared record as a member of a transaction."""
        place = prepared.place
        value = None
        if prepared.value is not None:
            assert prepared.header.location is not None
            value = ((place.storage.url, prepared.header.location), prepared.value)
        where = (place.records.url, prepared.key)
        return Member(where, b"".join(prepared.record), expect, exclusive, value=value)

    async def commit_together(self, tx: str, members: Sequence[Member]) -> None:
        """Make several records visible in one step; see `_intents` for the protocol and its guarantees.

        Raises:
            Refused: Nothing is visible, and nothing is left behind.
            StorageError: The same, unless the storage is out of reach: then whoever meets what is left ends it.
        """
        writer = Writer(tx, LEASE, this_process(), self._signing_keys)
        await self._carrier.run(commit(writer, members))

    def served(self, prepared: Prepared) -> Served:
        """The record for others to be served from, each with a value of its own."""
        header = prepared.header
        if type(prepared.original) in SHAREABLE:
            value: Any = prepared.original
            return Served(lambda: value, header.run_id, header.created)
        # Buffers may be views of an array that the first caller goes on to change.
        segments = [bytes(segment) for segment in prepared.segments]
        serializer = prepared.place.serializer
        return Served(
            lambda: decode(header.serializer, segments, using=serializer, imports=True),
            header.run_id,
            header.created,
        )

    async def invalidate(self, place: Place, key: str) -> bool:
        """Drop the record under `key` and the value it names; whether there was a record."""
        location = None
        if place.is_split:
            try:
                header, _ = unpack_header(
                    await place.records.read(key, 0, FIRST), signing_keys=self._signing_keys
                )
                location = header.location
            except StorageError:
                location = None  # an unreadable record names no value; the record itself goes below
        dropped = await place.records.delete(key)
        if location is not None:
            await place.storage.delete(location)
        return dropped


def ago(seconds: float) -> str:
    """A duration for people: `3 min`, `2 h`, `5 d`."""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds)} s"
