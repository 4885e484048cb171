"""Whether an Arrow stream keeps within its own bounds, looked up before a reader that trusts it gets to see it.

polars' reader ends the process (a failed allocation, an exhausted stack) over lengths that are not true, and
no except clause helps. So the lengths of messages, buffers and arrays, the depth of the types and the absence of
compression are checked here. What else may be wrong, the reader finds itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import unpack_from

from .kinds import Unreadable

_SCHEMA, _DICTIONARY, _BATCH = 1, 2, 3  # the types of messages
_DEPTH = 100


def check_stream(data: memoryview) -> None:
    """Check a whole stream.

    Raises:
        Unreadable: It does not keep within its bounds.
        struct.error: It does not keep within its bounds in another way.
    """
    at = 0
    while True:
        marker, size = unpack_from("<Ii", data, at)
        if marker != 0xFFFFFFFF or size < 0:
            raise Unreadable("it holds an Arrow stream that is torn")
        if size == 0:
            return
        body = _check_message(bytes(data[at + 8 : at + 8 + size]))
        at += 8 + size + body
        if not 0 <= body <= len(data) or at > len(data):
            raise Unreadable("it holds an Arrow stream that is cut off")


def _check_message(data: bytes) -> int:
    """The length of the body that follows it."""
    message = _Table(data, *unpack_from("<I", data))
    kind, inner, body = message.number(1, "<B"), message.table(2), message.number(3, "<q")
    if kind == _SCHEMA:
        for field in inner.tables(1):
            _check_depth(field, _DEPTH)
        return body
    if kind == _DICTIONARY:
        inner = inner.table(1)
    elif kind != _BATCH:
        raise Unreadable("it holds an Arrow stream with a foreign message")
    if inner.field(3):
        raise Unreadable("it holds an Arrow stream that is compressed")
    buffers = [*inner.pairs(2)]
    if any(start < 0 or length < 0 or start + length > body for start, length in buffers):
        raise Unreadable("it holds an Arrow buffer that is longer than its message")
    rows = inner.number(0, "<q")
    if rows < 0 or any(not 0 <= nulls <= length for length, nulls in inner.pairs(1)):
        raise Unreadable("it holds an Arrow array of an impossible length")
    if any(not 0 <= count <= len(buffers) for count in inner.numbers(4)):
        raise Unreadable("it holds an Arrow array with more buffers than there are")
    return body


def _check_depth(field: _Table, left: int) -> None:
    if not left:
        raise Unreadable("it holds an Arrow type that is nested too deeply")
    for child in field.tables(5):
        _check_depth(child, left - 1)


class _Table:
    """A table of a flatbuffer: where its fields lie. Only forward, so that nothing goes in circles."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data, self._at = data, at
        (back,) = unpack_from("<i", data, at)
        self._fields = at - back
        if self._fields < 0:
            raise Unreadable("it holds an Arrow message that is torn")
        (self._size,) = unpack_from("<H", data, self._fields)

    def field(self, which: int) -> int:
        """Where the field lies, 0 for one that is left out."""
        if 6 + 2 * which > self._size:
            return 0
        (offset,) = unpack_from("<H", self._data, self._fields + 4 + 2 * which)
        return self._at + int(offset) if offset else 0

    def number(self, which: int, form: str) -> int:
        at = self.field(which)
        return int(unpack_from(form, self._data, at)[0]) if at else 0

    def table(self, which: int) -> _Table:
        at = self.field(which)
        if not at:
            raise Unreadable("it holds an Arrow message without its content")
        return _Table(self._data, at + unpack_from("<I", self._data, at)[0])

    def tables(self, which: int) -> Iterator[_Table]:
        for at in self._elements(which, 4):
            yield _Table(self._data, at + unpack_from("<I", self._data, at)[0])

    def pairs(self, which: int) -> Iterator[tuple[int, int]]:
        for at in self._elements(which, 16):
            yield unpack_from("<qq", self._data, at)

    def numbers(self, which: int) -> Iterator[int]:
        for at in self._elements(which, 8):
            yield int(unpack_from("<q", self._data, at)[0])

    def _elements(self, which: int, size: int) -> Iterator[int]:
        at = self.field(which)
        if at:
            at += unpack_from("<I", self._data, at)[0]
            (count,) = unpack_from("<I", self._data, at)
            for index in range(count):
                yield at + 4 + index * size
