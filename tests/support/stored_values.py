"""Values of every type that records carry, strategies for them, and an equality that tells types apart."""

from __future__ import annotations

import enum
import math
from collections import OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import PurePath, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple
from uuid import UUID
from zoneinfo import ZoneInfo

import numpy as np
from hypothesis import strategies as st


class Colour(enum.Enum):
    RED = 1
    GREEN = "green"
    CRIMSON = 1  # noqa: PIE796 - an alias


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Word(enum.StrEnum):
    YES = "yes"


class Right(enum.Flag):
    READ = 1
    WRITE = 2


class Bits(enum.IntFlag):
    A = 1
    B = 2


class Point(NamedTuple):
    x: Any
    y: Any = 0


Pair = namedtuple("Pair", "left right")


@dataclass
class Plain:
    a: Any
    b: Any = None
    later: Any = field(init=False)

    def __post_init__(self) -> None:
        self.beside = "not a field"


@dataclass(frozen=True)
class Frozen:
    a: Any
    b: Any = ()


@dataclass(slots=True)
class Slotted:
    a: Any
    unset: Any = field(init=False)


@dataclass(frozen=True, slots=True)
class FrozenSlotted:
    a: Any


@dataclass
class Child(Plain):
    c: Any = 1


class Outer:
    @dataclass
    class Inner:
        a: Any


ZONES = [
    None,
    UTC,
    timezone(timedelta(hours=-3)),
    timezone(timedelta(hours=1), "x"),
    ZoneInfo("Europe/Berlin"),
]

EXAMPLES: list[Any] = [
    None, True, False, 0, 1, -1, 2**63 - 1, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 10**5000, -(10**400),
    0.0, -0.0, 1.5, math.inf, -math.inf, math.nan, 5e-324, 1j, complex(math.nan, -0.0),
    "", "text", "\0", "ünï", "\ud800", "\ud83d\ude00", "😀", "x" * 40_000, "\udcff" * 40_000,
    b"", b"bytes", b"b" * 40_000, bytearray(), bytearray(b"array"), bytearray(40_000),
    [], (), {}, set(), frozenset(), [[]], ((),), [()], {"": {}}, {(): []}, {frozenset(): ()},
    [1, "a", None, (1, [2, (3,)])], {1: "a", "1": "b", (1, 2): "c", None: "d", b"1": "e", 1.5: "f"},
    {"b": 1, "a": 2}, {True: 1}, {0: 0}, {"\ud800": 1}, {1, "a", (2, 3)}, frozenset({frozenset({1})}),
    deque(), deque([1, 2], 2), OrderedDict(b=1, a=2), defaultdict(list, a=[1]), defaultdict(None, a=1),
    datetime(2024, 2, 29, 23, 59, 59, 999999), datetime.min, datetime.max,
    *[datetime(2024, 10, 27, 2, 30, tzinfo=zone, fold=1) for zone in ZONES],
    date(2024, 2, 29), time(1, 2, 3, 4), *[time(2, 30, tzinfo=zone, fold=1) for zone in ZONES],
    timedelta(0), timedelta(-1, 1, 1), timedelta.max, *ZONES,
    Decimal("1.10"), Decimal("NaN"), Decimal("-Infinity"), Decimal("sNaN123"), Decimal("1E+999999"),
    Fraction(1, 3), Fraction(10**40, 7), UUID(int=5), PurePath("a/b"), PurePosixPath("/a/../b"),
    PureWindowsPath("c:\\a"), range(3), range(10**30, 0, -7), slice(None), slice(1, "a", 2.5),
    Colour.RED, Colour.GREEN, Colour.CRIMSON, Level.HIGH, Word.YES, Right.READ, Right.READ | Right.WRITE,
    Right(0), Bits.A | Bits.B, Bits(0), {Level.LOW: Word.YES},
    Point(1, (2,)), Pair(1, 2), Plain(1, [2]), Frozen(1), {Frozen(1): Frozen((2,))}, Slotted([1]),
    FrozenSlotted({1}), Child(1, c=(2,)), Outer.Inner(1), [Plain(Frozen(Slotted(Point(1, Colour.RED))))],
    {"$tuple": [1]}, {"$dict": [[1, 2]]}, {"$": 1}, {"$bytes": "aGk="}, {"$x": 1, "y": 2}, {"$$tuple": []},
    {"kind": "record", "sha256": b"", "segments": [1]}, [["$tuple", [1]]],
    list(range(5000)), tuple(range(5000)), set(range(5000)), {i: str(i) for i in range(5000)},
    [str(i) * 20 for i in range(5000)], {str(i): (i,) for i in range(5000)}, deque(range(20_000)),
    [(i, [i]) for i in range(20_000)], {i: i for i in range(40_000)}, OrderedDict.fromkeys(range(30_000)),
    frozenset(map(str, range(20_000))), [list(range(300)) for _ in range(300)], ["a" * 30_000] * 20,
]  # fmt: skip

_record = np.zeros(3, [("a", "<i4"), ("b", "<U5"), ("c", [("d", ">f8", (2, 2))])])
_record["b"] = "xy"

ARRAYS: list[Any] = [
    np.arange(10), np.arange(12.0).reshape(3, 4), np.asfortranarray(np.arange(12).reshape(3, 4)),
    np.arange(24).reshape(2, 3, 4).transpose(1, 2, 0), np.arange(10)[::2], np.arange(10)[::-1],
    np.array(5), np.zeros((0, 3)), np.zeros((3, 0), order="F"), np.array([True, False]), np.array([1j]),
    np.array(["2024-01-01", "NaT"], "datetime64[D]"), np.array([1, 2], "timedelta64[ns]"),
    np.array(["a", "bcd"]), np.array([b"a", b"bc"]), np.arange(3, dtype=">i2"), np.array([1, np.nan], "f2"),
    _record, _record[0], np.zeros(2, np.dtype([("a", "i1"), ("b", "f8")], align=True)),
    np.float64(1.5), np.float32(-0.0), np.int8(5), np.bool_(True), np.str_("ab"), np.bytes_(b"ab"),
    np.datetime64("2024-01-01T00:00", "ns"), np.timedelta64(5, "s"), np.complex64(1j), np.longdouble(1) / 3,
    np.dtype("f8"), np.dtype([("a", "i4"), ("b", "U3")]), np.dtype(("i4", (2, 3))), np.dtype("M8[us]"),
    np.arange(100_000), np.asfortranarray(np.ones((200, 300))), np.ones((300, 300))[::2, ::3],
    np.zeros(3, "V7"), np.zeros(3, "<U0"),
]  # fmt: skip


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal, of the same types at every depth, in the same order; NaN equals NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return (
            a.dtype == b.dtype and a.shape == b.shape and a.tobytes("C") == b.tobytes("C")
            and (a.ndim < 2 or a.flags.f_contiguous == b.flags.f_contiguous or not a.flags.forc)
        )  # fmt: skip
    if isinstance(a, np.generic):
        # Equal or, for NaN and NaT, of the same bytes: a longdouble has padding, which may differ.
        return bool(a.dtype == b.dtype and (a.tobytes() == b.tobytes() or a == b))
    if isinstance(a, float | complex):
        return repr(a) == repr(b)
    if isinstance(a, Decimal):
        return str(a) == str(b)
    if isinstance(a, dict):
        facts = (getattr(a, "default_factory", None), getattr(b, "default_factory", None))
        return facts[0] is facts[1] and _same_row([*a.items()], [*b.items()])
    if isinstance(a, deque):
        return a.maxlen == b.maxlen and _same_row([*a], [*b])
    if isinstance(a, list | tuple):
        return _same_row(a, b)
    if isinstance(a, set | frozenset):
        return _same_row(sorted(a, key=_order), sorted(b, key=_order))
    if isinstance(a, datetime | time):
        return (
            a.replace(tzinfo=None) == b.replace(tzinfo=None) and a.fold == b.fold and same(a.tzinfo, b.tzinfo)
        )
    if isinstance(a, timezone):
        return repr(a) == repr(b)
    if isinstance(a, ZoneInfo):
        return bool(a.key == b.key)
    if isinstance(a, enum.Enum):
        return a is b
    if hasattr(a, "__dataclass_fields__"):
        return _same_row(_state(a), _state(b))
    return bool(a == b)


def _same_row(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(map(same, a, b))


def _order(value: Any) -> str:
    """A text that tells values apart and does not depend on the order within sets."""
    if isinstance(value, set | frozenset):
        return f"{type(value)} {sorted(map(_order, value))}"
    if isinstance(value, tuple):
        return f"{type(value)} {[*map(_order, value)]}"
    if hasattr(value, "__dataclass_fields__"):
        return f"{type(value)} {[*map(_order, _state(value))]}"
    return f"{type(value)} {value!r}"


def _state(value: Any) -> list[Any]:
    names = [*getattr(value, "__dict__", {}), *value.__dataclass_fields__]
    return [(name, getattr(value, name)) for name in sorted(set(names)) if hasattr(value, name)]


_leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(10**60), 10**60), st.floats(),
    st.complex_numbers(),
    st.text(st.characters(codec=None, exclude_categories=()), max_size=20), st.binary(max_size=20),
    st.datetimes(timezones=st.sampled_from(ZONES)), st.dates(), st.times(), st.timedeltas(),
    st.fractions(), st.uuids(), st.decimals().filter(lambda number: not number.is_snan()),
    st.sampled_from(list(Colour)), st.sampled_from([*Bits, *Level]),
    st.builds(lambda start, stop: range(start, stop), st.integers(), st.integers()),
    st.text("abc/.", max_size=9).map(PurePosixPath),
)  # fmt: skip


def _hashable_containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.lists(inner, max_size=4).map(tuple), st.frozensets(inner, max_size=4),
        st.builds(Frozen, inner, inner), st.builds(Point, inner, inner),
    )  # fmt: skip


@st.composite
def _leaf(draw: st.DrawFn) -> Any:
    return draw(_leaves)  # composite strategies have short names in hypothesis's reports


_hashable_values = st.recursive(_leaf(), _hashable_containers, max_leaves=8)


@st.composite
def _hashable(draw: st.DrawFn) -> Any:
    return draw(_hashable_values)


def _containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.lists(inner, max_size=5), st.lists(inner, max_size=5).map(tuple), st.sets(_hashable(), max_size=4),
        st.dictionaries(_hashable(), inner, max_size=5),
        st.dictionaries(st.text("$abtuple"), inner, max_size=3),
        st.dictionaries(st.text("$a"), inner, max_size=4).map(OrderedDict), st.binary().map(bytearray),
        st.lists(inner, max_size=4).map(deque), st.builds(Plain, inner, inner), st.builds(Slotted, inner),
        st.builds(FrozenSlotted, inner), st.builds(Pair, inner, inner),
    )  # fmt: skip


values: st.SearchStrategy[Any] = st.recursive(_leaf() | _hashable(), _containers, max_leaves=25)
