"""The one container of every object that onceflow writes: fixed part, header, payload.

```
offset  bytes
0       4   magic d1 4f 4e 43
4       1   format version, 1
5       1   flags: bit 0 = signed, the others 0
6       4   length of the header, big-endian
10      8   id of the signing key, zeros in an unsigned record
18      32  tag: HMAC-SHA256 (signed) or SHA-256 (unsigned) over bytes 0-18 and the header
50      n   header: a msgpack array (below)
50+n        payload: the segments one after the other
```

The header holds the payload's sizes and digest (see `digest`), so the tag covers every byte but itself, and
it is verified before anything is decoded. With several segments, the payload and each of its segments begin
at a multiple of 64 bytes, so that arrays read or mapped in place are aligned; the gaps are zeros.

Header fields in order: key, created, expires_at, serializer, segments (sizes), digest, run_id, task,
components, token, nonce, location, kind, extra, frozen, pad. A later minor writer may append fields: they
are carried along in `Header.unknown`. What an old reader must not overlook gets a new format version.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from typing import Any, cast

import msgpack

from .._errors import CorruptRecordError, NewerRecordError, SerializationError, SignatureError
from .._runtime.random import nonce
from .._storage import Buffer
from .digest import payload_digest

MAGIC = b"\xd1ONC"
VERSION = 1
PREFIX_SIZE = 50
MAX_HEADER_SIZE = 16 << 20
ALIGNMENT = 64

_SIGNED = 1
_START = struct.Struct(">4sBBI8s")  # what the tag covers of the fixed part
_FIELDS = 16
_NO_KEY = bytes(8)


@dataclass(slots=True)
class Header:
    """What a record says of itself, readable without its payload.

    `pack` fills in `segments`, `digest`, `nonce`, `frozen` and `signed`; `unpack_header` returns them as they
    were packed.

    Attributes:
        key: The key that the record is of, as the user knows it.
        created: Unix time of the writing, in seconds.
        expires_at: Unix time from which on the record is a miss; None for never.
        serializer: The concrete serializer of the payload, such as `msgpack`.
        segments: Sizes of the payload's segments in bytes; the first is the tree, the others raw buffers.
        digest: The payload's digest, see `digest`.
        run_id: The run that wrote the record.
        task: The task whose result it is.
        components: Digests of the key's labelled components, for `explain`.
        token: Fencing token of the lease under which it was written.
        nonce: Random with each packing, so that a writer recognises its own write.
        location: Where the value lies, if not in this object.
        kind: `record`, or what a protocol calls its own objects: claim, intent, marker, failure, free.
        extra: Plain values of such a protocol; at most some KiB.
        frozen: Which segments came from `bytes`. A reader that reads those as `bytes` and all others into a
            writable buffer spares the serializer every copy.
        signed: Whether the record is signed (and, after unpacking, that the signature holds).
        unknown: Fields of a newer writer, kept for packing again.
    """

    key: str
    created: float = 0.0
    expires_at: float | None = None
    serializer: str = ""
    segments: tuple[int, ...] = ()
    digest: bytes = b""
    run_id: str = ""
    task: str = ""
    components: dict[str, str] = field(default_factory=dict)
    token: int | None = None
    nonce: str = ""
    location: str | None = None
    kind: str = "record"
    extra: dict[str, Any] = field(default_factory=dict)
    frozen: tuple[int, ...] = ()
    signed: bool = False
    unknown: tuple[Any, ...] = ()

    @property
    def payload_size(self) -> int:
        """Bytes from the payload's first to its last, gaps included."""
        return _ends(self.segments)[-1] if self.segments else 0

    def ranges(self) -> list[tuple[int, int]]:
        """Start and end of each segment within the payload."""
        return [(end - size, end) for size, end in zip(self.segments, _ends(self.segments), strict=True)]


def pack(header: Header, segments: Sequence[Buffer], *, signing_keys: Sequence[bytes] = ()) -> list[Buffer]:
    """The buffers of one record: fixed part with header first, then the segments themselves, uncopied.

    Fills in what only the packing knows (see `Header`). Digests the payload on the calling thread (4 µs in
    all for 100 bytes, 0.1-1 ms a MiB): large payloads belong in a worker thread.

    Args:
        header: Changed in place.
        segments: The payload; contiguous.
        signing_keys: The first one signs. Without any the record is unsigned.

    Raises:
        SerializationError: `header.extra` or `components` hold something that is no plain value.
    """
    views = [_flat(segment) for segment in segments]
    header.segments = tuple(map(len, views))
    header.frozen = tuple([index for index, view in enumerate(views) if index and type(view) is bytes])
    header.signed = bool(signing_keys)
    header.nonce = nonce(24)
    header.digest = payload_digest(views, signed=header.signed)
    body = _pack_fields(header, align=len(views) > 1)
    if len(body) > MAX_HEADER_SIZE:
        raise SerializationError("record header", f"its {len(body)} bytes are more than {MAX_HEADER_SIZE}")
    if signing_keys:
        key = signing_keys[0]
        start = _START.pack(MAGIC, VERSION, _SIGNED, len(body), _key_id(key))
        tag = hmac.digest(key, start + body, "sha256")
    else:
        start = _START.pack(MAGIC, VERSION, 0, len(body), _NO_KEY)
        tag = sha256(start + body).digest()
    return [start + tag + body, *(views if len(views) < 2 else _with_gaps(views))]


def header_size(data: Buffer) -> int:
    """How many bytes from the object's start `unpack_header` needs; judged from as few as ten.

    Raises:
        CorruptRecordError: `data` is not the beginning of a record.
        NewerRecordError: It is one of a newer format.
    """
    if len(data) < PREFIX_SIZE:
        if not MAGIC.startswith(bytes(data[:4])):
            raise CorruptRecordError("it does not begin like one")
        return PREFIX_SIZE
    return PREFIX_SIZE + _read_start(bytes(data[:18]))[1]


def unpack_header(
    data: Buffer, *, signing_keys: Sequence[bytes] = (), require_signature: bool = False
) -> tuple[Header, int]:
    """The verified header, and the offset at which the payload begins. `data` may end anywhere after it.

    Nothing is decoded before the tag, or the signature, holds.

    Raises:
        CorruptRecordError: Torn, changed, or not a record.
        NewerRecordError: A record of a newer format.
        SignatureError: Signed by none of `signing_keys`, or unsigned though `require_signature`.
    """
    prefix = bytes(data[:PREFIX_SIZE])
    if len(prefix) < PREFIX_SIZE:
        raise CorruptRecordError(
            f"it has {len(prefix)} bytes, fewer than any record" if prefix else "it is empty"
        )
    flags, size, key_id = _read_start(prefix)
    end = PREFIX_SIZE + size
    body = bytes(data[PREFIX_SIZE:end])
    if len(body) < size:
        raise CorruptRecordError(f"it ends within its header, at byte {PREFIX_SIZE + len(body)} of {end}")
    covered = prefix[:18] + body
    if flags & _SIGNED:
        _verify_signature(covered, prefix[18:], key_id, signing_keys)
    elif sha256(covered).digest() != prefix[18:]:
        raise CorruptRecordError("its header does not match its checksum")
    elif require_signature:
        raise SignatureError("it is not signed")
    if flags & ~_SIGNED or (key_id != _NO_KEY and not flags):
        raise CorruptRecordError(f"unknown flags {flags:#04x}")
    header = _unpack_fields(body)
    header.signed = bool(flags)
    return header, end


def split(header: Header, payload: Buffer) -> list[memoryview]:
    """The payload's segments as views, uncopied. `payload` is all that follows the header.

    Raises:
        CorruptRecordError: The payload is longer or shorter than the header says, or its gaps are not empty.
    """
    view = memoryview(payload)
    sizes = header.segments
    if len(sizes) == 1 and len(view) == sizes[0]:
        return [view]
    if len(view) != header.payload_size:
        raise CorruptRecordError(f"its payload has {len(view)} bytes instead of {header.payload_size}")
    segments, before = [], 0
    for start, end in header.ranges():
        if any(view[before:start]):
            raise CorruptRecordError(f"the gap before byte {start} of its payload is not empty")
        segments.append(view[start:end])
        before = end
    return segments


def check_payload(header: Header, segments: Sequence[Buffer]) -> None:
    """Return if the segments are those that were packed.

    Digests them, on the calling thread; see `digest` for its cost.

    Raises:
        CorruptRecordError: A size or the digest differs.
    """
    if tuple(map(len, segments)) != header.segments:
        raise CorruptRecordError("the sizes of its payload's segments differ from its header")
    if payload_digest(segments, signed=header.signed) != header.digest:
        raise CorruptRecordError("its payload does not match its checksum")


def _flat(segment: Buffer) -> Buffer:
    if type(segment) is memoryview and (segment.ndim != 1 or segment.itemsize != 1):
        return segment.cast("B") if segment.nbytes else b""
    return segment


def _ends(sizes: Sequence[int]) -> list[int]:
    ends, end = [], 0
    for size in sizes:
        end += -end % ALIGNMENT + size
        ends.append(end)
    return ends


def _with_gaps(views: list[Buffer]) -> list[Buffer]:
    parts: list[Buffer] = []
    end = 0
    for view in views:
        if end % ALIGNMENT:
            parts.append(bytes(-end % ALIGNMENT))
            end += -end % ALIGNMENT
        parts.append(view)
        end += len(view)
    return parts


def _read_start(prefix: bytes) -> tuple[int, int, bytes]:
    magic, version, flags, size, key_id = _START.unpack_from(prefix)
    if magic != MAGIC:
        raise CorruptRecordError("it does not begin like one")
    if version != VERSION:
        if version > VERSION:
            raise NewerRecordError(version, VERSION)
        raise CorruptRecordError(f"there is no format version {version}")
    if size > MAX_HEADER_SIZE:
        raise CorruptRecordError(f"a header of {size} bytes is more than any record has")
    return flags, size, key_id


def _pack_fields(header: Header, *, align: bool) -> bytes:
    fields = [
        header.key,
        float(header.created),
        header.expires_at,
        header.serializer,
        header.segments,
        header.digest,
        header.run_id,
        header.task,
        header.components,
        header.token,
        header.nonce,
        header.location,
        header.kind,
        header.extra,
        header.frozen,
        b"",
        *header.unknown,
    ]
    body = _pack_plain(fields)
    if align and (gap := -(PREFIX_SIZE + len(body)) % ALIGNMENT):
        fields[_FIELDS - 1] = bytes(gap)  # lengthens the body by exactly `gap`: both are bin8
        body = _pack_plain(fields)
    return body


def _pack_plain(fields: list[Any]) -> bytes:
    try:
        return cast(bytes, msgpack.packb(fields))
    except UnicodeEncodeError:  # any text may be a key, also one with lone surrogates
        return cast(bytes, msgpack.packb(fields, unicode_errors="surrogatepass"))
    except (TypeError, ValueError, OverflowError) as error:
        raise SerializationError(
            "record header", f"{error}; its extra fields take plain values only"
        ) from error


def _unpack_fields(body: bytes) -> Header:
    try:
        try:
            fields = msgpack.unpackb(body, strict_map_key=False)
        except UnicodeDecodeError:
            fields = msgpack.unpackb(body, strict_map_key=False, unicode_errors="surrogatepass")
        (
            key,
            created,
            expires,
            name,
            sizes,
            digest,
            run,
            task,
            parts,
            token,
            nonce,
            place,
            kind,
            extra,
            *rest,
        ) = fields
        frozen, _, *unknown = rest
    except (ValueError, TypeError, RecursionError) as error:  # msgpack's errors are ValueErrors
        raise CorruptRecordError(f"its header cannot be decoded ({type(error).__name__})") from error
    if not (
        type(key) is type(name) is type(run) is type(task) is type(nonce) is type(kind) is str
        and type(created) is float
        and (expires is None or type(expires) in (float, int))
        and type(digest) is bytes
        and type(parts) is type(extra) is dict
        and (token is None or type(token) is int)
        and (place is None or type(place) is str)
        and type(sizes) is type(frozen) is list
        and _all_sizes(sizes)
        and _all_sizes(frozen)
    ):
        raise CorruptRecordError("its header's fields have other types than a record's")
    return Header(
        key,
        created,
        expires,
        name,
        tuple(sizes),
        digest,
        run,
        task,
        parts,
        token,
        nonce,
        place,
        kind,
        extra,
        tuple(frozen),
        False,
        tuple(unknown),
    )


def _all_sizes(numbers: list[Any]) -> bool:
    return all(type(number) is int and number >= 0 for number in numbers)


@lru_cache(maxsize=64)
def _key_id(key: bytes) -> bytes:
    if not key:
        raise ValueError("A signing key must not be empty.")
    return hmac.digest(key, b"onceflow key id", "sha256")[:8]


def _verify_signature(covered: bytes, tag: bytes, key_id: bytes, keys: Sequence[bytes]) -> None:
    if not keys:
        raise SignatureError("it is signed, and no signing key is set to verify it with")
    for key in keys:
        if _key_id(key) == key_id:
            if hmac.compare_digest(hmac.digest(key, covered, "sha256"), tag):
                return
            raise SignatureError("the record was changed after it was signed")
    raise SignatureError(f"none of the {len(keys)} configured keys made it")
