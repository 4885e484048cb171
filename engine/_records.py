"""Records and storage: one look-up, one commit, and why a look-up missed.

A record is one object: header and value together, under the key. With a key storage (or a storage key of the
user's own) the record holds the header only, and the value lies in the result storage, at the `location` that
the header names. Whatever cannot be read, whoever wrote it, is a miss with one warning, never a failure.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from ..storage import ObjectNotFoundError, Storage
from ..storage._envelope import Header, check_payload, header_size, pack, split, unpack_header
from ..storage._errors import (
    CorruptRecordError,
    PickleRefusedError,
    StorageError,
)
from ..storage._serializers import Serializer, decode, uses_pickle
from ..storage._storage import Buffer, Stored
from ..storage._weight import is_heavy
from ._context import new_id
from ._logging import logger

T = TypeVar("T")
FIRST = 128 * 1024
"""Bytes of the first read: a header and a small value come in one."""
LEAVES_LOOP = 64 * 1024
"""Bytes above which packing, checking and unpacking leave the event loop."""


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
    """No record that may be served, and why. `version` is what lies there all the same, for a conditional write."""

    reason: str
    header: Header | None = None
    version: str | None = None


@dataclass(slots=True)
class Facts:
    """What a record says of the run that wrote it."""

    run_id: str
    task: str
    components: dict[str, str] = field(default_factory=dict)
    expires_at: float | None = None


class Prepared(NamedTuple):
    """A record that is ready to be written: the value first where it lies apart, then the record."""

    key: str
    place: Place
    header: Header
    record: Sequence[Buffer]
    value: Sequence[Buffer] | None


class Records:
    """Looks records up and commits them.

    Args:
        offload: Runs a function in a worker thread of the engine.
        clock: Unix time in seconds.
        signing_keys: The first signs, all verify.
        allow_pickle: Whether unsigned pickled values may travel over shared storage.
    """

    def __init__(
        self,
        offload: Callable[..., Awaitable[Any]],
        clock: Callable[[], float] = time.time,
        signing_keys: Sequence[bytes] = (),
        allow_pickle: bool = False,
    ) -> None:
        self._offload = offload
        self._clock = clock
        self._signing_keys = tuple(signing_keys)
        self._allow_pickle = allow_pickle
        self._warned: set[tuple[str, str, str]] = set()

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
            return Miss("no record")
        except StorageError as error:
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

    async def _read_payload(
        self, place: Place, header: Header, stored: Stored, offset: int
    ) -> Any:
        """The value behind the header: from the first read where it holds all, else segment by segment."""
        if len(stored.data) >= stored.size:
            payload = memoryview(stored.data)[offset:]
            if len(payload) <= LEAVES_LOOP:
                return self._decode_payload(place, header, payload)
            return await self._offload(self._decode_payload, place, header, payload)
        segments: list[Buffer] = []
        for index, (start, end) in enumerate(header.ranges()):
            segments.append(await self._read_segment(place.records, header, stored, index, offset + start, offset + end))
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
        assert header.location is not None
        try:
            stored = await place.storage.fetch(header.location)
        except ObjectNotFoundError as error:
            raise CorruptRecordError(f"its value {header.location!r} is gone from {place.storage.url}") from error
        assert stored is not None
        if stored.size <= LEAVES_LOOP:
            return self._decode_payload(place, header, stored.data)
        return await self._offload(self._decode_payload, place, header, stored.data)

    def _decode_payload(self, place: Place, header: Header, payload: Buffer) -> Any:
        return self._decode(place, header, split(header, payload))

    def _decode(self, place: Place, header: Header, segments: Sequence[Buffer]) -> Any:
        check_payload(header, segments)
        trusted = header.signed or not place.storage.shared
        return decode(header.serializer, segments, using=place.serializer, imports=trusted)

    def _warn(self, storage: Storage, key: str, error: StorageError) -> None:
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
        )
        if place.is_split:
            header.location = place.location or new_id()
        record = pack(header, encoded.segments, signing_keys=self._signing_keys)
        if place.is_split:
            return Prepared(key, place, header, record[:1], record[1:])
        return Prepared(key, place, header, record, None)

    async def write(self, prepared: Prepared, *, if_absent: bool = False, if_version: str | None = None) -> str:
        """Make a prepared record visible; its new version.

        Costs one write, two where the value lies apart. Cancelled, it leaves the old record or the new one,
        and at worst an unreferenced value.

        Raises:
            ConditionFailedError: Another record came in between; nothing was written.
            StorageError: The storage could not take it; the old record is untouched.
        """
        place = prepared.place
        if prepared.value is not None:
            assert prepared.header.location is not None
            await place.storage.write(prepared.header.location, prepared.value)
        return await place.records.write(
            prepared.key, prepared.record, if_absent=if_absent, if_version=if_version
        )

    async def invalidate(self, place: Place, key: str) -> bool:
        """Drop the record under `key` and the value it names; whether there was a record."""
        location = None
        if place.is_split:
            try:
                header, _ = unpack_header(await place.records.read(key, 0, FIRST), signing_keys=self._signing_keys)
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
