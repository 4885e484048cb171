"""Values to readable JSON and back, every type exactly.

What JSON knows is written as plain JSON. Anything else is an object with one key: `{"$tuple": [1, 2]}`,
`{"$bytes": "aGk="}`, with the names and parts of `kinds`, `classes` and `libraries`. A dict that JSON cannot
hold (keys that are no text) or that looks like such a tag is written as `{"$dict": [[key, value], …]}`.
"""

from __future__ import annotations

import json
import reprlib
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from .._errors import SerializationError, UnreadableValueError
from .._storage import Buffer
from .codec import MAX_DEPTH, find_kind, kind_of_code
from .kinds import FLOAT, INT, KINDS, TEXT, Context, Kind, Raw, Unreadable, Unsupported
from .libraries import CODES

_BATCH = 256
_PARTS = 4096
_LONGEST_INT = 2000  # bits; Python refuses to read or write long decimal numbers
_WRITTEN_AS_IT_IS = frozenset({int, float, bool, type(None), str})
_to_text: Callable[[Any], str] = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
_KINDS_BY_NAME = {kind.name: kind for kind in (INT, FLOAT, TEXT, *KINDS.values())}
_CODES = {"enum": 32, "namedtuple": 33, "dataclass": 34, **CODES}


def dumps(value: Any) -> list[Buffer]:
    """One segment, the JSON text in UTF-8. Holds the GIL for a batch of elements at a time.

    Raises:
        SerializationError: Naming the path and the type of what cannot be carried.
    """
    writer = _Writer()
    try:
        writer.write(value)
    except Unsupported as error:
        raise SerializationError("json", str(error)) from None
    except RecursionError:
        raise SerializationError("json", "value is nested too deeply") from None
    except RuntimeError as error:  # "dictionary changed size during iteration"
        raise SerializationError("json", f"value changed meanwhile ({error})") from error
    return [writer.text()]


def loads(segments: Sequence[Buffer], *, imports: bool = False) -> Any:
    """The value. Holds the GIL while the text is parsed (8 ms a MB): large results had better be msgpack.

    Raises:
        UnreadableValueError: A class is gone or changed, or the text was not written by `dumps`.
    """
    try:
        text = str(segments[0], "utf-8")
        return json.loads(text, object_hook=partial(_read_object, Context(imports=imports)))
    except Unreadable as error:
        raise UnreadableValueError("json", str(error)) from error.__cause__
    except Exception as error:  # whatever a constructor says of foreign parts
        raise UnreadableValueError("json", f"{type(error).__name__}: {error}") from error


class _Writer:
    __slots__ = ("_depth", "_done", "_found", "out")

    def __init__(self) -> None:
        self.out: list[bytes] = []
        self._done = bytearray()
        self._depth = 0
        self._found: dict[type, Kind] = {}

    def text(self) -> Buffer:
        """All that was written."""
        if not self._done:
            return b"".join(self.out)
        self._join()
        return self._done

    def _join(self) -> None:
        """Put together what there is: joining millions of parts at the end would hold the GIL for 0.5 s."""
        self._done += b"".join(self.out)
        self.out.clear()

    def write(self, value: Any) -> None:
        if type(value) in _WRITTEN_AS_IT_IS:
            self._scalar(value)
            return
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise Unsupported(f"is nested more than {MAX_DEPTH} deep, or contains itself")
        if type(value) is list:
            self._list(value)
        elif type(value) is dict:
            self._dict(value)
        elif type(value) is bytes:
            self._tag("bytes", b64encode(value).decode())
        elif type(value) is Raw:
            self._tag("bytes", b64encode(value.data).decode())
        else:
            self._other(value)
        self._depth -= 1

    def _scalar(self, value: Any) -> None:
        if not (type(value) is int and value.bit_length() > _LONGEST_INT):
            try:
                self.out.append(_to_text(value).encode())
                return
            except ValueError:  # a lone surrogate, an infinity, no number
                pass
        kind = {int: INT, float: FLOAT, str: TEXT}[type(value)]
        self._tag(kind.name, kind.take(value))

    def _tag(self, name: str, parts: Any) -> None:
        self.out.append(b'{"$%s": ' % name.encode())
        self.write(parts)
        self.out.append(b"}")

    def _other(self, value: Any) -> None:
        kind = KINDS.get(type(value)) or self._found.get(type(value))
        if kind is None:
            kind = self._found[type(value)] = find_kind(value)
        parts = kind.take(value)
        try:
            self._tag(kind.name, parts)
        except Unsupported as error:
            if error.steps:
                error.steps = kind.locate(parts, error.steps)
            raise

    def _list(self, values: list[Any]) -> None:
        self.out.append(b"[")
        for at in range(0, len(values), _BATCH):
            batch = values[at : at + _BATCH]
            if at:
                self.out.append(b", ")
            if not self._as_it_is(batch, batch):
                self._items(batch, at)
        self.out.append(b"]")

    def _as_it_is(self, parts: Iterable[Any], batch: Any) -> bool:
        """Write a batch in one C call, without its brackets, if JSON knows everything in it."""
        if not _WRITTEN_AS_IT_IS.issuperset(map(type, parts)):
            return False
        try:
            self.out.append(_to_text(batch)[1:-1].encode())
        except ValueError:
            return False
        return True

    def _items(self, values: list[Any], first: int) -> None:
        for index, value in enumerate(values):
            if index:
                self.out.append(b", ")
            if len(self.out) > _PARTS:
                self._join()
            try:
                self.write(value)
            except Unsupported as error:
                error.steps.append(f"[{first + index}]")
                raise

    def _dict(self, values: dict[Any, Any]) -> None:
        if not all(type(key) is str and _is_utf8(key) for key in values) or _looks_like_tag(values):
            self._pairs(values)
            return
        if len(values) <= _BATCH and values:
            self.out.append(b"{")
            if self._as_it_is(values.values(), values):
                self.out.append(b"}")
                return
            self.out.pop()
        separator = b"{"
        for key, value in values.items():
            self.out.append(separator + _to_text(key).encode() + b": ")
            separator = b", "
            self._value(key, value)
        self.out.append(b"}" if values else b"{}")

    def _pairs(self, values: dict[Any, Any]) -> None:
        separator = b'{"$dict": ['
        for key, value in values.items():
            self.out.append(separator + b"[")
            separator = b", "
            try:
                self.write(key)
            except Unsupported as error:
                error.steps.append(f", at its key {reprlib.repr(key)}, ")
                raise
            self.out.append(b", ")
            self._value(key, value)
            self.out.append(b"]")
        self.out.append(b"]}")

    def _value(self, key: Any, value: Any) -> None:
        if len(self.out) > _PARTS:
            self._join()
        try:
            self.write(value)
        except Unsupported as error:
            error.steps.append(f"[{reprlib.repr(key)}]")
            raise


def _is_utf8(text: str) -> bool:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return False
    return True


def _looks_like_tag(values: dict[str, Any]) -> bool:
    return len(values) == 1 and next(iter(values)).startswith("$")


def _read_object(context: Context, found: dict[str, Any]) -> Any:
    if not (len(found) == 1 and _looks_like_tag(found)):
        return found
    ((tag, parts),) = found.items()
    name = tag[1:]
    if name == "dict":
        return dict(parts)
    if name == "bytes":
        return b64decode(parts)
    kind = _KINDS_BY_NAME.get(name) or kind_of_code(_CODES.get(name, 0))
    if kind is None:
        raise Unreadable(f"it holds values of a type {name!r} that this onceflow does not know")
    return kind.make(parts, context)
