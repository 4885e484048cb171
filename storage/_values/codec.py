"""Values to msgpack and back, every type exactly: what would come back as another type is refused.

Segment 0 is the tree, one msgpack value. Types that msgpack does not know are extension types, see `kinds`,
`classes` and `libraries`. Out of band, each in a segment of its own, lie

- buffers from 32 KiB on: bytes, bytearray, the data of arrays and of columns, text;
- lists and dicts whose encoding is longer than 64 KiB, as a row of msgpack values of about that size. One
  C call so packs or unpacks some 64 KiB, a fraction of a millisecond, before another thread may have the
  GIL; `packb` of a large list would keep the event loop waiting for 150 ms.

msgpack's own strictness is not enough to rely on: it packs bytearray, memoryview and its ExtType as if they
were something else. So only None, bool, int, float and short text ever go through it unseen.
"""

from __future__ import annotations

import reprlib
import struct
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import msgpack

from .._errors import SerializationError, UnreadableValueError
from .._storage import Buffer
from .classes import DATACLASS, ENUM, NAMEDTUPLE, class_kind
from .kinds import BYTES, INT, KINDS, TEXT, Context, Kind, Raw, Unreadable, Unsupported, is_a
from .libraries import library_kind, library_kinds
from .weight import is_heavy as is_heavy

OUT_OF_BAND = 32 << 10
_PIECE = 64 << 10
_BATCH = 1024  # elements a C call
MAX_DEPTH = 100
_ENDLESS = 2_000_000  # containers, of which nearly all were seen before
_SHALLOW = 3  # nested `unpackb` calls take 24 KiB of C stack each, an Unpacker lies on the heap

_RAW, _PIECES = 126, 127  # extension types: a segment; a container in pieces in a segment
_NUMBERS = frozenset({int, float, bool, type(None)})
_PLAIN = _NUMBERS | {str}
_BY_CODE = {kind.code: kind for kind in (INT, TEXT, BYTES, ENUM, NAMEDTUPLE, DATACLASS, *KINDS.values())}


def dumps(value: Any) -> list[Buffer]:
    """The segments of a value: the tree, then what lies out of band, uncopied where it is one memory block.

    2 µs for a small value. Call it in a worker thread if `is_heavy(value)`: it holds the GIL for some
    64 KiB at a time. The segments share the value's memory, so it must not change until they are written.

    Raises:
        SerializationError: Naming the path and the type of what cannot be carried.
    """
    encoder = _Encoder()
    try:
        encoder.segments[0] = encoder.encode(value)
    except Unsupported as error:
        raise SerializationError("msgpack", str(error)) from None
    except RecursionError:
        raise SerializationError("msgpack", "value is nested too deeply") from None
    except RuntimeError as error:  # "dictionary changed size during iteration"
        raise SerializationError("msgpack", f"value changed meanwhile ({error})") from error
    return encoder.segments


def loads(segments: Sequence[Buffer], *, imports: bool = False) -> Any:
    """The value. Runs no code of the record's choosing, but for importing modules if `imports` allows it.

    Arrays are writable and share the memory of their segment if that is writable; `bytes` that have a segment
    of their own are that segment if it is `bytes`; else both are copies.

    Args:
        segments: As `dumps` returned them, in any kind of buffer.
        imports: Whether the module of a dataclass or Enum may be imported if it is not yet. Without, only
            submodules of what is imported already are.

    Raises:
        UnreadableValueError: A class is gone or changed, or the segments were not written by `dumps`.
    """
    return _Decoder(segments, Context(imports=imports)).load()


# --- out ----------------------------------------------------------------------------------------------------


def _large_int(value: Any) -> msgpack.ExtType:
    """What msgpack asks for when an int has more than 64 bits; it meets nothing else unknown."""
    return msgpack.ExtType(INT.code, msgpack.packb(INT.take(value)))


class _Encoder:
    __slots__ = ("_containers", "_depth", "_found", "_pack", "_seen", "segments")

    def __init__(self) -> None:
        self.segments: list[Buffer] = [b""]
        self._pack: Callable[[Any], bytes] = msgpack.Packer(
            strict_types=True, default=_large_int, buf_size=4096
        ).pack
        self._found: dict[type, Kind] = {}
        self._seen: set[int] = set()
        self._containers = 0
        self._depth = 0

    def encode(self, value: Any) -> bytes:
        kind = type(value)
        if kind in _NUMBERS:
            return self._pack(value)
        if kind is str:
            return self._text(value)
        if kind is bytes:
            return self._pack(value) if len(value) < OUT_OF_BAND else _ext(BYTES.code, self._raw(value))
        if kind is Raw:
            return self._raw(value.data)
        self._enter(value)
        if kind is dict:
            encoded = self._dict(value)
        elif kind is list:
            encoded = self._list(value)
        else:
            encoded = self._other(value)
        self._depth -= 1
        return encoded

    def _enter(self, value: Any) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise Unsupported(f"is nested more than {MAX_DEPTH} deep, or contains itself")
        self._seen.add(id(value))
        self._containers += 1
        if self._containers > _ENDLESS and self._containers > 10 * len(self._seen):
            raise Unsupported("refers to the same containers over and over")

    def _text(self, value: str) -> bytes:
        if len(value) < OUT_OF_BAND:
            try:
                return self._pack(value)
            except UnicodeEncodeError:  # lone surrogates
                pass
        return _ext(TEXT.code, self.encode(TEXT.take(value)))

    def _raw(self, data: Buffer) -> bytes:
        if memoryview(data).nbytes < OUT_OF_BAND:
            return self._pack(bytes(data))
        self.segments.append(data)
        return _ext(_RAW, self._pack(len(self.segments) - 1))

    def _other(self, value: Any) -> bytes:
        kind = KINDS.get(type(value)) or self._found.get(type(value)) or self._find(value)
        parts = kind.take(value)
        try:
            return _ext(kind.code, self.encode(parts))
        except Unsupported as error:
            if error.steps:
                error.steps = kind.locate(parts, error.steps)
            raise

    def _find(self, value: Any) -> Kind:
        kind = find_kind(value)
        self._found[type(value)] = kind
        return kind

    def _list(self, values: list[Any]) -> bytes:
        if len(values) <= _BATCH and _is_plain(values):
            try:
                return self._pack(values)
            except UnicodeEncodeError:
                pass
        pieces = _Row()
        for at in range(0, len(values), _BATCH):
            batch = values[at : at + _BATCH]
            if len(values) > _BATCH and _is_plain(batch):
                try:
                    pieces.add(len(batch), self._pack(batch)[1 if len(batch) < 16 else 3 :])
                    continue
                except UnicodeEncodeError:
                    pass
            for index, item in enumerate(batch, at):
                try:
                    pieces.add(1, self.encode(item))
                except Unsupported as error:
                    error.steps.append(f"[{index}]")
                    raise
        return self._finish(pieces, _list_start, is_dict=False)

    def _dict(self, values: dict[Any, Any]) -> bytes:
        if len(values) <= _BATCH and _is_plain(values) and _is_plain(values.values()):
            try:
                return self._pack(values)
            except UnicodeEncodeError:
                pass
        pieces = _Row()
        keys, items = iter(values), iter(values.values())
        while some := [*islice(keys, _BATCH)]:
            batch = [*islice(items, _BATCH)]
            if len(values) > _BATCH and _is_plain(some) and _is_plain(batch):
                try:
                    body = self._pack(dict(zip(some, batch, strict=True)))
                    pieces.add(len(batch), body[1 if len(batch) < 16 else 3 :])
                    continue
                except UnicodeEncodeError:
                    pass
            for key, item in zip(some, batch, strict=True):
                pieces.add(1, self._key(key) + self._item(key, item))
        return self._finish(pieces, _dict_start, is_dict=True)

    def _key(self, key: Any) -> bytes:
        try:
            return self.encode(key)
        except Unsupported as error:
            error.steps.append(f", at its key {reprlib.repr(key)}, ")
            raise

    def _item(self, key: Any, item: Any) -> bytes:
        try:
            return self.encode(item)
        except Unsupported as error:
            error.steps.append(f"[{reprlib.repr(key)}]")
            raise

    def _finish(self, row: _Row, start: Callable[[int], bytes], *, is_dict: bool) -> bytes:
        if row.small:
            return start(row.count) + b"".join(row.parts)
        pieces = [start(count) + body for count, body in row.pieces()]
        # Bodies join on this thread in steps as well: one join of 1 GB would hold the GIL for half a second.
        segment = bytearray()
        for piece in pieces:
            segment += piece
        self.segments.append(segment)
        where = [int(is_dict), len(self.segments) - 1]
        return _ext(_PIECES, self.encode([*where, [len(piece) for piece in pieces]]))


class _Row:
    """The encoded elements of one container, joined to pieces as they come."""

    __slots__ = ("_done", "_size", "count", "parts")

    def __init__(self) -> None:
        self._done: list[tuple[int, bytes]] = []
        self._size = 0
        self.parts: list[bytes] = []
        self.count = 0

    @property
    def small(self) -> bool:
        return not self._done

    def add(self, count: int, body: bytes) -> None:
        self.parts.append(body)
        self._size += len(body)
        self.count += count
        if self._size > _PIECE:
            self._cut()

    def _cut(self) -> None:
        self._done.append((self.count, b"".join(self.parts)))
        self.parts, self._size, self.count = [], 0, 0

    def pieces(self) -> list[tuple[int, bytes]]:
        if self.parts:
            self._cut()
        return self._done


def find_kind(value: Any) -> Kind:
    """The kind of a type that is in no table.

    Raises:
        Unsupported: There is none.
    """
    if kind := library_kind(value):
        return kind
    if kind := class_kind(type(value)):
        return kind
    raise is_a(value)


def kind_of_code(code: int) -> Kind | None:
    """The kind with this extension type."""
    if code not in _BY_CODE:
        _BY_CODE.update(library_kinds(code))
    return _BY_CODE.get(code)


def _is_plain(values: Any) -> bool:
    """Whether msgpack carries all of it as it is, in one short call."""
    if _NUMBERS.issuperset(map(type, values)):
        return True
    if not _PLAIN.issuperset(map(type, values)):
        return False
    return sum([len(item) for item in values if type(item) is str]) <= _PIECE


def _ext(code: int, data: bytes) -> bytes:
    size = len(data)
    if size < 256:
        return bytes((0xC7, size, code)) + data
    if size < 65536:
        return struct.pack(">BHB", 0xC8, size, code) + data
    return struct.pack(">BIB", 0xC9, size, code) + data


def _list_start(count: int) -> bytes:
    if count < 16:
        return bytes((0x90 | count,))
    return struct.pack(">BH", 0xDC, count) if count < 65536 else struct.pack(">BI", 0xDD, count)


def _dict_start(count: int) -> bytes:
    if count < 16:
        return bytes((0x80 | count,))
    return struct.pack(">BH", 0xDE, count) if count < 65536 else struct.pack(">BI", 0xDF, count)


# --- in -----------------------------------------------------------------------------------------------------


class _Decoder:
    __slots__ = ("_context", "_depth", "_segments")

    def __init__(self, segments: Sequence[Buffer], context: Context) -> None:
        self._segments = segments
        self._context = context
        self._depth = 0

    def load(self) -> Any:
        try:
            return msgpack.unpackb(self._segments[0], ext_hook=self._extension, strict_map_key=False)
        except Unreadable as error:
            raise UnreadableValueError("msgpack", str(error)) from error.__cause__
        except Exception as error:  # whatever a constructor says of foreign parts
            raise UnreadableValueError("msgpack", f"{type(error).__name__}: {error}") from error

    def _extension(self, code: int, data: bytes) -> Any:
        self._depth += 1
        if self._depth > MAX_DEPTH + 8:
            raise Unreadable("it is nested too deeply")
        parts = self._unpack(data)
        if code == _RAW:
            made = self._segment(parts)
        elif code == _PIECES:
            made = self._joined(*parts)
        elif kind := kind_of_code(code):
            made = kind.make(parts, self._context)
        else:
            raise Unreadable(f"it holds values of a type {code} that this onceflow does not know")
        self._depth -= 1
        return made

    def _unpack(self, data: Buffer) -> Any:
        if self._depth <= _SHALLOW:
            return msgpack.unpackb(data, ext_hook=self._extension, strict_map_key=False)
        unpacker = msgpack.Unpacker(
            ext_hook=self._extension, strict_map_key=False, max_buffer_size=max(len(data), 16)
        )
        unpacker.feed(data)
        return unpacker.unpack()

    def _segment(self, index: int) -> Buffer:
        segment = self._segments[index]
        if type(segment) is memoryview and type(segment.obj) is bytes and len(segment.obj) == len(segment):
            return segment.obj
        return segment

    def _joined(self, is_dict: int, index: int, sizes: list[int]) -> Any:
        segment, at = memoryview(self._segments[index]), 0
        values: Any = {} if is_dict else []
        grow = values.update if is_dict else values.extend
        for size in sizes:
            grow(self._unpack(segment[at : at + size]))
            at += size
        return values
