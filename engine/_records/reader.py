"""Looking records up: one read, what may be served, and why not.

Whatever cannot be read, whoever wrote it, is a miss with one warning, never a failure.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from io import BytesIO
from typing import Any

from ...storage import ObjectNotFoundError, Storage, storage_from_url
from ...storage._errors import (
    ConditionFailedError,
    CorruptRecordError,
    PickleRefusedError,
    SignatureError,
    StorageError,
    VersionMismatchError,
)
from ...storage._format.envelope import Header, check_payload, header_size, split, unpack_header
from ...storage._storage import Buffer, Stored
from ...storage._values.serializers import decode, is_known, uses_pickle
from .._commit.driver import Carrier
from .._commit.protocol import plain, read
from .._commit.requests import ABSENT, ANY, Found, Where
from .._runs.logging import logger
from .failures import Failures
from .memory import MISSING, Copies, Copy
from .record import Hit, Miss, Place, ago, shareable

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


class Lookup(Failures):
    """The reading half of `Records`, whose arguments it takes."""

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
        self._apart: dict[tuple[str, str], tuple[Storage, Storage]] = {}
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
            return Miss("record unreadable", None, ABSENT)

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
                    self._copies.put(where, Copy(stored.version, header, segments, shareable(value)))
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
        if self.signing_keys and not (header.signed or self._allow_pickle) and place.records.shared:
            raise SignatureError("it is not signed, and a signing key is set")
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
        stored = await storage.fetch(header.key, start, end, if_version=first.version)
        assert stored is not None
        if index in header.frozen:
            return bytes(stored.data)  # no copy where it is bytes already
        # BytesIO lends out, to be written to, the very bytes that it was given, if nobody else has them. To read into
        # a bytearray would fill it with zeros first, which held the interpreter for 2 s a GiB.
        room = BytesIO(stored.data)
        del stored
        return room.getbuffer()

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


def _expected(header: Header, version: str) -> str | None:
    """What a commit may insist on that follows a look at an intent, a claim or a grave."""
    if header.kind == "intent":
        return ANY  # it will be another one by then
    if header.kind == "free" and header.serializer == "intent":
        return ABSENT  # a transaction's grave is removed by who meets it; those of claims stay
    return version
