"""How values that neither msgpack nor JSON know are taken apart into some that they know, and put together.

A *kind* serves one type, exactly that and no subclass, so that nothing ever comes back as its base class. Its
`code` is the msgpack extension type, its `name` the JSON tag; both are on disk for ever: never give one to
another kind. `take` returns *parts*, made of what the codec carries; `make` gets equal parts back.

Kinds of the standard library's values are in the table here; those of user classes are in `classes`, those
of numpy, pandas, polars and pyarrow in the modules that `libraries` names.
"""

from __future__ import annotations

import pathlib
import struct
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from fractions import Fraction
from itertools import islice
from typing import Any, TypeVar
from uuid import UUID
from zoneinfo import ZoneInfo

from .._storage import Buffer

Container = TypeVar("Container")

_SLICE = 4096  # elements moved by one C call, so that other threads get their turn


class Unsupported(Exception):
    """A value that the codec does not carry; `steps` is the path to it, innermost first."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        self.steps: list[str] = []
        super().__init__(reason)

    def __str__(self) -> str:
        steps = self.steps[::-1]
        if len(steps) > 12:
            steps = [*steps[:6], " … ", *steps[-5:]]
        return f"value{''.join(steps)} {self.reason}"


class Unreadable(Exception):
    """Parts that no value can be made from: the class is gone or changed, or the record is not ours."""


class Raw:
    """A buffer among the parts: it travels out of band where it is large, and comes back as any buffer."""

    __slots__ = ("data",)

    def __init__(self, data: Buffer) -> None:
        self.data = data


class Context:
    """What making a value may depend on: `imports` says whether modules may be imported to find a class."""

    __slots__ = ("imports",)

    def __init__(self, *, imports: bool) -> None:
        self.imports = imports


def _as_it_is(_: Any, steps: list[str]) -> list[str]:
    return steps


def _within(_: Any, steps: list[str]) -> list[str]:
    return steps[:-1]  # of parts that hold the content as one of them


@dataclass(frozen=True, slots=True)
class Kind:
    """One type's way out and back."""

    code: int
    name: str
    take: Callable[[Any], Any]
    make: Callable[[Any, Context], Any]
    locate: Callable[[Any, list[str]], list[str]] = _as_it_is
    """From the parts and a path within them, innermost step first, to that path within the value."""


def is_a(value: object) -> Unsupported:
    """The refusal of a value for its type."""
    kind = type(value)
    return Unsupported(f"is a {kind.__module__}.{kind.__qualname__}".replace("builtins.", ""))


# --- numbers and text ---------------------------------------------------------------------------------------


def _take_int(value: int) -> bytes:
    return value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True)


def _make_int(parts: Any, _: Context) -> int:
    return int.from_bytes(parts, "big", signed=True)


def _take_complex(value: complex) -> bytes:
    return struct.pack(">dd", value.real, value.imag)


def _make_complex(parts: Any, _: Context) -> complex:
    return complex(*struct.unpack(">dd", parts))


def _take_text(value: str) -> Raw:
    return Raw(value.encode("utf-8", "surrogatepass"))


def _make_text(parts: Any, _: Context) -> str:
    return str(parts, "utf-8", "surrogatepass")


def _take_fraction(value: Fraction) -> list[int]:
    return [value.numerator, value.denominator]


# --- containers ---------------------------------------------------------------------------------------------


def _grow(empty: Container, grow: Callable[[Iterable[Any]], object], items: Iterable[Any]) -> Container:
    source = iter(items)
    while batch := list(islice(source, _SLICE)):
        grow(batch)
    return empty


def _make_set(parts: Any, _: Context) -> set[Any]:
    values: set[Any] = set()
    return _grow(values, values.update, parts)


def _take_deque(value: deque[Any]) -> list[Any]:
    return [value.maxlen, list(value)]


def _make_deque(parts: Any, _: Context) -> deque[Any]:
    values: deque[Any] = deque(maxlen=parts[0])
    return _grow(values, values.extend, parts[1])


def _take_ordered(value: OrderedDict[Any, Any]) -> dict[Any, Any]:
    if vars(value):
        raise Unsupported("is an OrderedDict with attributes of its own")
    plain: dict[Any, Any] = {}
    return _grow(plain, plain.update, value.items())


def _make_ordered(parts: Any, _: Context) -> OrderedDict[Any, Any]:
    values: OrderedDict[Any, Any] = OrderedDict()
    return _grow(values, values.update, parts.items())


_FACTORIES: dict[str, Any] = {
    kind.__name__: kind for kind in (bool, bytes, dict, float, int, list, set, str, tuple)
}


def _take_default(value: defaultdict[Any, Any]) -> list[Any]:
    factory = value.default_factory
    if factory is not None and _FACTORIES.get(getattr(factory, "__name__", "")) is not factory:
        raise Unsupported(f"is a defaultdict of {factory!r}")
    plain: dict[Any, Any] = {}
    return [factory and factory.__name__, _grow(plain, plain.update, value.items())]


def _make_default(parts: Any, _: Context) -> defaultdict[Any, Any]:
    name, items = parts
    values: defaultdict[Any, Any] = defaultdict(None if name is None else _FACTORIES[name])
    return _grow(values, values.update, items.items())


# --- dates and times ----------------------------------------------------------------------------------------


def _zone(zone: tzinfo | None) -> tzinfo | None:
    if zone is None or type(zone) is timezone or (type(zone) is ZoneInfo and zone.key):
        return zone
    raise Unsupported(f"has the time zone {zone!r}, a {type(zone).__module__}.{type(zone).__qualname__}")


def _take_zone(value: ZoneInfo) -> str:
    if not value.key:
        raise Unsupported("is a ZoneInfo without a key")
    return value.key


def _take_datetime(value: datetime) -> list[Any]:
    v = value
    return [v.year, v.month, v.day, v.hour, v.minute, v.second, v.microsecond, v.fold, _zone(v.tzinfo)]


def _make_datetime(parts: Any, _: Context) -> datetime:
    year, month, day, hour, minute, second, microsecond, fold, zone = parts
    return datetime(year, month, day, hour, minute, second, microsecond, zone, fold=fold)


def _take_time(value: time) -> list[Any]:
    return [value.hour, value.minute, value.second, value.microsecond, value.fold, _zone(value.tzinfo)]


def _make_time(parts: Any, _: Context) -> time:
    hour, minute, second, microsecond, fold, zone = parts
    return time(hour, minute, second, microsecond, zone, fold=fold)


def _take_timedelta(value: timedelta) -> list[int]:
    return [value.days, value.seconds, value.microseconds]


def _take_timezone(value: timezone) -> list[Any]:
    offset = value.utcoffset(None)
    plain = timezone(offset)
    return [offset] if repr(plain) == repr(value) else [offset, value.tzname(None)]


# --- paths --------------------------------------------------------------------------------------------------

_PATHS = {
    kind.__name__: kind
    for kind in (pathlib.PurePosixPath, pathlib.PureWindowsPath, pathlib.PosixPath, pathlib.WindowsPath)
}


def _take_path(value: pathlib.PurePath) -> list[str]:
    return [type(value).__name__, str(value)]


def _make_path(parts: Any, _: Context) -> pathlib.PurePath:
    return _PATHS[parts[0]](parts[1])


def _plain(make: Callable[..., Any], *, spread: bool = False) -> Callable[[Any, Context], Any]:
    """Make from the parts alone, or from each part as an argument."""
    return (lambda parts, _: make(*parts)) if spread else (lambda parts, _: make(parts))


INT = Kind(1, "int", _take_int, _make_int)
FLOAT = Kind(2, "float", repr, _plain(float))
TEXT = Kind(3, "str", _take_text, _make_text)
BYTES = Kind(4, "bytes", Raw, _plain(bytes))
BYTEARRAY = Kind(5, "bytearray", Raw, _plain(bytearray))
PATH = Kind(22, "path", _take_path, _make_path)

KINDS: dict[type, Kind] = {
    bytearray: BYTEARRAY,
    complex: Kind(6, "complex", _take_complex, _make_complex),
    tuple: Kind(7, "tuple", list, _plain(tuple)),
    set: Kind(8, "set", list, _make_set),
    frozenset: Kind(9, "frozenset", list, lambda parts, context: frozenset(_make_set(parts, context))),
    deque: Kind(10, "deque", _take_deque, _make_deque, _within),
    OrderedDict: Kind(11, "ordereddict", _take_ordered, _make_ordered),
    defaultdict: Kind(12, "defaultdict", _take_default, _make_default, _within),
    datetime: Kind(13, "datetime", _take_datetime, _make_datetime),
    date: Kind(14, "date", lambda value: [value.year, value.month, value.day], _plain(date, spread=True)),
    time: Kind(15, "time", _take_time, _make_time),
    timedelta: Kind(16, "timedelta", _take_timedelta, _plain(timedelta, spread=True)),
    timezone: Kind(17, "timezone", _take_timezone, _plain(timezone, spread=True)),
    ZoneInfo: Kind(18, "zoneinfo", _take_zone, _plain(ZoneInfo)),
    Decimal: Kind(19, "decimal", str, _plain(Decimal)),
    Fraction: Kind(20, "fraction", _take_fraction, _plain(Fraction, spread=True)),
    UUID: Kind(21, "uuid", lambda value: value.bytes, lambda parts, _: UUID(bytes=bytes(parts))),
    **dict.fromkeys(_PATHS.values(), PATH),
    range: Kind(23, "range", lambda r: [r.start, r.stop, r.step], _plain(range, spread=True)),
    slice: Kind(24, "slice", lambda s: [s.start, s.stop, s.step], _plain(slice, spread=True)),
}
