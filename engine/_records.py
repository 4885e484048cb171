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
from functools import partial
from math import inf
from typing import Any, NamedTuple, TypeVar

from ..storage import ObjectNotFoundError, Storage, storage_from_url
from ..storage._envelope import Header, check_payload, header_size, pack, split, unpack_header
from ..storage._errors import (
    ConditionFailedError,
    ConditionsUnsupportedError,
    CorruptRecordError,
    PickleRefusedError,
    StorageError,
    VersionMismatchError,
)
from ..storage._serializers import Serializer, decode, is_known, uses_pickle
from ..storage._storage import Buffer, Stored
from ..storage._weight import is_heavy
from ._commit import Carrier
from ._context import new_id
from ._copies import MISSING, Copies, Copy
from ._failures import Failures
from ._flights import Served
from ._intents import OWN, Member, value_of
from ._logging import logger
from ._protocol import plain, read, remove_one, replace_one
from ._steps import ABSENT, ANY, Found, Refused, Where

T = TypeVar("T")
FIRST = 128 * 1024
"""Bytes of the first read: a header and a small value come in one."""
LEAVES_LOOP = 64 * 1024
"""Bytes above which packing, checking and unpacking leave the event loop."""
PAUSES = (0.01, 0.04, 0.16)
"""Seconds before each further read of a value that is not visible yet."""
SETTLED = 60.0
"""Seconds after which a value that is not there is not late, but gone."""
RACES = 20
"""How often a record may be replaced while it is read, until it counts as unreadable."""
LARGE = 128 * 1024
"""Bytes from which on a transaction lets a value lie apart, so that intents stay small; a hit then costs the two
reads that it costs anyway."""
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
    ABSENT for nothing, ANY where nobody knows, as behind a transaction's intent."""

    reason: str
    header: Header | None = None
    version: str | None = ANY
    plain: Buffer | None = None
    """All of the object, where it is a record that the first read had whole."""


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

    def snapshot(self) -> Prepared:
        """The same with buffers of its own: those of the encoding may be views of what the caller goes on to change."""
        head = bytes(self.record[0])
        payload = memoryview(b"".join(self.record[1:] if self.value is None else self.value))
        segments = [payload[start:end] for start, end in self.header.ranges()]
        if self.value is None:
            return self._replace(record=[head, payload], segments=segments)
        return self._replace(record=[head], value=[payload], segments=segments)


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
        self.signing_keys = tuple(signing_keys)
        self._allow_pickle = allow_pickle
        self._warned: set[tuple[str, str, str]] = set()
        self._copies = Copies(0)

    def trust(self, signing_keys: Sequence[bytes], allow_pickle: bool, memory_bytes: int = 0) -> None:
        """From now on sign with the first key, verify with all, let pickled values travel or not, and keep copies
        of as many bytes."""
        if tuple(signing_keys) != self.signing_keys:
            self._copies = Copies(memory_bytes)  # they were verified with other keys
        self._copies.resize(memory_bytes)
        self.signing_keys = tuple(signing_keys)
        self._allow_pickle = allow_pickle

    # --- look-up

    async def lookup(
        self, place: Place, key: str, *, exclusive: bool = False, begun: Stored | None = None
    ) -> Hit | Miss:
        """The committed record under `key`, or why there is none to serve.

        Costs one read of the record's storage, and one more of the result storage where the value lies apart
        or the record is larger than 128 KiB; a miss is decided by the header alone. Never raises for what it
        reads: a record that cannot be used is a miss with one warning.

        Args:
            place: Where it lies.
            key: Which.
            exclusive: The caller holds the key: a transaction that is about to commit it is waited for, so
                that the version of a miss is one that the caller's own commit may insist on.
            begun: What the caller has read of the object already, from its start.
        """
        try:
            for _ in range(RACES):
                try:
                    return await self._read(place, key, exclusive, begun)
                except ConditionFailedError:
                    begun = None  # replaced between two reads: somebody has committed
            return await self._read(place, key, exclusive)
        except ObjectNotFoundError:
            self._copies.drop((place.records.url, key))
            return Miss("no record", None, ABSENT)
        except Exception as error:  # a storage of the user's own may raise anything
            self._warn(place.records, key, error)
            # To write it if it is absent is worth a try: where that is wrong, the commit finds out.
            return Miss("record unreadable", None, ANY if exclusive else ABSENT)

    async def _read(
        self, place: Place, key: str, exclusive: bool, stored: Stored | None = None
    ) -> Hit | Miss:
        records = place.records
        where = (records.url, key)
        copy = self._copies.get(where) if stored is None else None
        if stored is None:
            stored = await records.fetch(key, 0, FIRST, unless=copy.version if copy is not None else None)
        if stored is None:
            assert copy is not None
            return await self._from_copy(place, where, copy)
        version: str | None = stored.version
        try:
            beginning = await self._whole_header(records, key, stored)
            header, offset = unpack_header(beginning, signing_keys=self.signing_keys)
            is_hidden = header.kind in ("intent", "claim", "free")
            if is_hidden:
                if exclusive and header.kind == "intent":
                    await self.wait_for_outcome((records.url, key))
                    return await self._read(place, key, exclusive)
                stored = await self._behind(records, key, stored)
                version = _expected(header, stored.version)
                if not stored.data:
                    return Miss("no record", header, version)
                header, offset = unpack_header(stored.data, signing_keys=self.signing_keys)
            if header.key != key:
                raise CorruptRecordError(f"it belongs to the key {header.key!r}")
            refusal = self._refusal(place, header)
            if refusal is not None:
                is_whole = stored.version == version and len(stored.data) == stored.size
                return Miss(refusal, header, version, stored.data if is_whole and not is_hidden else None)
            if header.location is not None and stored.size == offset:
                value = await self._read_apart(place, header, key, stored.version)
            else:
                value = await self._read_payload(place, header, stored, offset)
                if version == stored.version and len(stored.data) == stored.size:
                    # Bytes of its own: a value may be made from the buffer that was read, and then be changed.
                    segments = split(header, bytes(memoryview(stored.data)[offset:]))
                    self._copies.put(where, Copy(stored.version, header, segments, _shareable(value)))
        except ConditionFailedError:
            raise
        except StorageError as error:
            self._warn(records, key, error)
            return Miss("record unreadable", None, version)
        return Hit(value, header, stored.version)

    async def _from_copy(self, place: Place, where: Where, copy: Copy) -> Hit | Miss:
        """What a fresh read would have given, for a copy that is still the record of its key."""
        header = copy.header
        refusal = self._refusal(place, header)
        if refusal is not None:
            self._copies.drop(where)
            return Miss(refusal, header, copy.version)
        if copy.original is not MISSING and is_known(header.serializer, place.serializer):
            return Hit(copy.original, header, copy.version)
        if header.payload_size <= LEAVES_LOOP:
            return Hit(self._decode(place, header, copy.segments, check=False), header, copy.version)
        value = await self._offload(partial(self._decode, place, header, copy.segments, check=False))
        return Hit(value, header, copy.version)

    async def _whole_header(self, storage: Storage, key: str, stored: Stored) -> Buffer:
        """The object's beginning, at least up to the end of its header."""
        size = header_size(stored.data)
        if size <= len(stored.data) or len(stored.data) >= stored.size:
            return stored.data
        whole = await storage.fetch(key, 0, size, if_version=stored.version)
        assert whole is not None
        return whole.data

    async def _behind(self, storage: Storage, key: str, stored: Stored) -> Stored:
        """The record that readers are to see in place of an intent, a claim or a grave, whole; no bytes for none."""
        if len(stored.data) < stored.size:
            whole = await storage.fetch(key, if_version=stored.version)
            assert whole is not None
            stored = whole
        found = Found(stored.data, stored.version)
        data = await self._carrier.run(read((storage.url, key), found, self.signing_keys))
        return Stored(data, stored.version, len(data))

    async def wait_for_outcome(self, where: Where) -> None:
        """Return when no transaction is about to commit this object; an abandoned one is ended."""
        await self._carrier.run(plain(where, self.signing_keys))

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

    async def _read_apart(self, place: Place, header: Header, key: str, version: str) -> Any:
        """The value at the location that the record names.

        Raises:
            VersionMismatchError: It is not the record's, because the record has been replaced since.
        """
        try:
            stored = await self._fetch_value(place.storage, header)
            if stored.size <= LEAVES_LOOP:
                return self._decode_payload(place, header, stored.data)
            return await self._offload(self._decode_payload, place, header, stored.data)
        except CorruptRecordError:
            current = await place.records.stat(key)
            if current is not None and current.version != version:
                raise VersionMismatchError(key, place.records.url, version) from None
            raise

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

    def _decode(self, place: Place, header: Header, segments: Sequence[Buffer], *, check: bool = True) -> Any:
        if check:
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

    async def prepare(
        self, place: Place, key: str, value: Any, facts: Facts, *, apart_from: float = inf
    ) -> Prepared:
        """The record for a value, encoded and packed, not written yet.

        Values of `apart_from` bytes and more lie apart from their record, wherever that lies.

        Raises:
            SerializationError: The serializer cannot carry the value.
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
        encoded = place.serializer.encode(value)
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
        value = _shareable(prepared.original)
        if value is not MISSING:
            return Served(lambda: value, header.run_id, header.created)
        segments = prepared.segments
        if not is_snapshot:  # buffers may be views of an array that the first caller goes on to change
            segments = [bytes(segment) for segment in segments]
        return _served(header, header.serializer, segments, prepared.place.serializer)

    def served_hit(self, place: Place, hit: Hit) -> Served | None:
        """What was read, for others to be served from; None where that would take longer than to read it again."""
        value, header = _shareable(hit.value), hit.header
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


def _expected(header: Header, version: str) -> str | None:
    """What a commit may insist on that follows a look at an intent, a claim or a grave."""
    if header.kind == "intent":
        return ANY  # it will be another one by then
    if header.kind == "free" and header.serializer == "intent":
        return ABSENT  # a transaction's grave is removed by who meets it; those of claims stay
    return version


def ago(seconds: float) -> str:
    """A duration for people: `3 min`, `2 h`, `5 d`."""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds)} s"


def _shareable(value: Any) -> Any:
    """The value where nobody can change it, so that one object serves all; else MISSING."""
    return value if type(value) in SHAREABLE else MISSING
