"""Digests of inputs: equal where values are equal, in every process, different wherever they differ."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import datetime as dt
import decimal
import enum
import fractions
import functools
import io
import itertools
import json
import math
import pathlib
import pickle
import random
import re
import socket
import sys
import threading
import types
import uuid
import weakref
import zoneinfo
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import attrs
import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onceflow.engine._errors import UncacheableInputError
from onceflow.engine._keys import encoding, objects
from onceflow.engine._keys.digest import digest, digest_inputs, is_heavy, register
from pythons import PYTHONS, Elsewhere


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Shade(enum.Enum):
    RED = 1


class Number(enum.IntEnum):
    ONE = 1


class Bits(enum.Flag):
    A = 1
    B = 2


@dataclasses.dataclass
class Point:
    x: Any
    y: Any = 0


@dataclasses.dataclass
class Spot:
    x: Any
    y: Any = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    x: Any
    hidden: Any = dataclasses.field(default=0, compare=False, repr=False)


class Pair(NamedTuple):
    x: Any
    y: Any


class Duo(NamedTuple):
    x: Any
    y: Any


@attrs.define
class Attrs:
    x: Any
    y: Any = attrs.field(default=0, eq=False)


@attrs.frozen(slots=False)
class FrozenAttrs:
    x: Any


class Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow", arbitrary_types_allowed=True)
    x: Any
    hidden: Any = pydantic.Field(default=0, exclude=True)
    _private: Any = pydantic.PrivateAttr(default=0)


class Twin(pydantic.BaseModel):
    x: Any


class Own:
    LIMIT = 1

    def __init__(self, x: Any = 0) -> None:
        self.x = x

    def method(self) -> None: ...

    @functools.cached_property
    def expensive(self) -> int:
        return 1


class OwnSlots:
    __slots__ = ("__mangled", "x")

    def __init__(self, x: Any, mangled: Any = 0) -> None:
        self.x, self.__mangled = x, mangled


class OwnDict(dict[Any, Any]):
    pass


class OwnInt(int):
    pass


class Keyed:
    def __init__(self, key: Any) -> None:
        self.key = key
        self.lock = threading.Lock()

    def __cache_key__(self) -> Any:
        return self.key


class OtherKeyed(Keyed):
    pass


class OwnError(Exception):
    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")
NOON = dt.datetime(2024, 7, 1, 12, tzinfo=dt.UTC)


def secret(text: str) -> pydantic.SecretStr:
    return pydantic.SecretStr(text)


def model(x: Any = 0, hidden: Any = 0, private: Any = 0, **extra: Any) -> Model:
    made = Model(x=x, hidden=hidden, **extra)
    made._private = private
    return made


def add(x: int, y: int) -> int:
    return x + y


def constant(value: Any) -> Callable[[], Any]:
    return lambda: value


DISTINCT: list[Callable[[], Any]] = [
    *map(constant, (
        None, True, False, 1, 1.0, "1", b"1", (1,), [1], {1}, frozenset({1}), {1: 0}, {"1": 0}, {1.0: 0},
        {True: 0},
        0, 0.0, -0.0, -1, math.nan, math.inf, -math.inf, 10**400, -(10**400), 2**31, 2**63, 2**64,
        -(2**63) - 1,
        1j, complex(1, -0.0), complex(1, 0.0), "", b"", "\ud800", "é", "e\u0301", ..., NotImplemented,
        (), [], set(), frozenset(), {}, [[]], [()], ([],), [None], [[], []], [[[]]], {"a": 1, "b": 2},
        {"a": 2, "b": 1},
        ["ab", "c"], ["a", "bc"], ["abc"], [b"ab", b"c"], [1, 2], [2, 1], [12], [1, [2]], [[1], 2],
        "None", "[]",
        [1] * 20, [1] * 21, (1,) * 20, [1.0] * 20, [True] * 20, [1] * 19 + [True], [1] * 19 + [1.0],
        ["1"] * 20,
        [2**40] * 20, [2**70] * 20, ["a"] * 20, ["a"] * 18 + ["aa", ""], ["a"] * 18 + ["", "aa"],
        [0.0] * 20, [-0.0] * 20,
        [math.nan] * 20, [None] * 20, [b"a"] * 20, [1] * 19 + [None],
        [1] * 18 + [b"", 1], [1] * 18 + [bytearray(), 1],
        range(3), range(1, 3), slice(3), slice(1, 3), slice(None, None, 2),
        dt.date(2024, 1, 2), dt.datetime(2024, 1, 2), dt.time(1), dt.timedelta(1), dt.timedelta(0, 1), NOON,
        NOON.astimezone(BERLIN), NOON.replace(tzinfo=None), dt.datetime(2024, 10, 27, 2, 30, tzinfo=BERLIN),
        dt.datetime(2024, 10, 27, 2, 30, tzinfo=BERLIN, fold=1), BERLIN, dt.UTC,
        dt.timezone(dt.timedelta(hours=1)),
        dt.timezone(dt.timedelta(hours=1), "CET"), NOON.timetz(),
        uuid.UUID(int=1), uuid.UUID(int=2), decimal.Decimal("1.0"), decimal.Decimal("1.00"),
        decimal.Decimal("NaN"),
        decimal.Decimal("-0"), decimal.Decimal(0), fractions.Fraction(1, 2), fractions.Fraction(2, 3),
        pathlib.Path("a"), pathlib.PurePosixPath("a"), pathlib.PureWindowsPath("a"), pathlib.Path("a/b"),
        re.compile("a"), re.compile("a", re.IGNORECASE), re.compile(b"a"),
        Colour.RED, Colour.BLUE, Shade.RED, Number.ONE, Bits.A, Bits.A | Bits.B, Bits(0),
        Point(1), Point(2), Spot(1), Point(1, 1), Point("1"), Slotted(1), Slotted(1, 1), Pair(1, 2),
        Duo(1, 2), (1, 2),
        Attrs(1), Attrs(1, 1), Attrs(2), FrozenAttrs(1),
        Own(1), Own(2), OwnSlots(1), OwnSlots(1, 1), OwnDict(a=1), OwnDict(a=2), OwnInt(1), OwnInt(2),
        Keyed(1), Keyed("1"), OtherKeyed(1), types.SimpleNamespace(a=1), types.SimpleNamespace(a=2),
        types.MappingProxyType({"a": 1}), collections.OrderedDict(a=1, b=2), collections.OrderedDict(b=2,
        a=1),
        collections.defaultdict(int, a=1), collections.defaultdict(bool, a=1), collections.Counter("ab"),
        collections.deque([1, 2]), collections.deque([1, 2], 2), collections.ChainMap({"a": 1}),
        {1: 0}.keys(), {1: 0}.values(),
        {1: 0}.items(),
        ValueError("a"), ValueError("b"), TypeError("a"), OwnError("a", 1), OwnError("a", 2), OSError(2,
        "x", "f"),
        OSError(2, "x", "g"), ExceptionGroup("g", [ValueError("a")]), ExceptionGroup("g",
        [ValueError("b")]),
        bytearray(b"1"), memoryview(b"1"), memoryview(b"1234"), memoryview(b"1234").cast("H"),
        memoryview(b"1234").cast("B", (2, 2)), memoryview(b"1x2x3x4x")[::2][:3],
        int, float, Own, Point, list[int], list[str], dict[str, int], int | str, int | None,
        len, print, math.sin, "a".join, "b".join, str.join, [].append, [1].append, add, math, re,
        functools.partial(add, 1), functools.partial(add, 2), functools.partial(add, y=1), Own(1).method,
        Own(2).method,
        lambda: 1, lambda: 2, functools.cache(add), "x" * 70_000, "x" * 70_001, b"x" * 70_000,
        bytearray(b"x" * 70_000),
        "é" * 40_000, ["x" * 70_000],
    )),
    lambda: secret("a"), lambda: secret("b"), lambda: pydantic.SecretBytes(b"a"),
    lambda: pydantic.SecretBytes(b"b"),
    lambda: Twin(x=0), lambda: Twin(x=1), model, lambda: model(1), lambda: model(hidden=1),
    lambda: model(private=1),
    lambda: model(extra=1), lambda: model(x=secret("a")), lambda: model(x=secret("b")),
    lambda: pydantic.HttpUrl("http://a/"), lambda: pydantic.HttpUrl("http://b/"),
]  # fmt: skip


def test_distinct() -> None:
    """K1, B16: values that differ in type, content, hidden fields, secrets or key types differ."""
    seen: dict[str, Any] = {}
    for make in DISTINCT:
        value = make()
        key = digest(value)
        assert key not in seen, f"{value!r} and {seen[key]!r}"
        assert re.fullmatch("[0-9a-f]{64}", key)
        assert digest(make()) == key, repr(value)
        seen[key] = value


EQUAL = {
    "dict order": ({"a": 1, "b": [2]}, {"b": [2], "a": 1}),
    "mixed dict order": ({1: "a", "b": 2, None: 3}, {None: 3, "b": 2, 1: "a"}),
    "set order": ({"a", 1, None, (2,)}, {(2,), None, 1, "a"}),
    "nan": (float("nan"), -float("nan")),
    "nans": ([1.0] * 20 + [float("nan")], [1.0] * 20 + [-float("nan")]),
    "nan keys": ({float("nan"): 1}, {float("nan"): 1}),
    "large buffers": (bytes(100_000), bytes(100_000)),
    "shared and not": ([a := [1, {"x": 2}], a, a], [[1, {"x": 2}] for _ in range(3)]),
    "strided view": (memoryview(b"1x2x3x")[::2], memoryview(b"123")),
    "secret": (secret("a"), secret("a")),
}


@pytest.mark.parametrize(("one", "other"), EQUAL.values(), ids=EQUAL)
def test_equal(one: Any, other: Any) -> None:
    """Order of dicts and sets, NaN's bits, and sharing do not matter."""
    assert digest(one) == digest(other)


def test_closures_as_inputs() -> None:
    """B15: functions as inputs count by what they mean, cells included."""

    def make(n: int) -> Callable[[], int]:
        return lambda: n

    assert digest(make(1)) == digest(make(1))
    assert digest(make(1)) != digest(make(2))


def test_cycles() -> None:
    """Cyclic values have keys, equal for equal ones wherever they lie, and different for different ones."""

    def ring(*values: Any) -> list[Any]:
        nodes: list[list[Any]] = [[value] for value in values]
        for one, two in itertools.pairwise([*nodes, nodes[0]]):
            one.append(two)
        return nodes[0]

    assert digest(ring(1)) == digest(ring(1))
    assert digest(ring(1, 2, 3)) == digest(ring(1, 2, 3))
    assert (
        len({digest(each) for each in (ring(1), ring(2), ring(1, 2), ring(2, 1), ring(1, 2, 3), [1, [1]])})
        == 6
    )
    shared = [0]
    assert digest([shared, shared, ring(1, 2)]) == digest([[0], [0], ring(1, 2)])
    twice = ring(1, 2)
    assert digest([twice, {"a": twice}]) == digest([ring(1, 2), {"a": ring(1, 2)}])
    own = Own()
    own.x = {"me": own, "list": [own]}
    other = Own()
    other.x = {"list": [other], "me": other}
    assert digest(own) == digest(other)


def test_entangled_graphs() -> None:
    """A graph with many cycles costs what its size costs; through sets it is refused, not walked for ever."""
    nodes = [Own() for _ in range(60)]
    for node in nodes:
        node.x = list(nodes)
    assert digest(nodes[0]) == digest(pickle.loads(pickle.dumps(nodes[0])))
    for node in nodes:
        node.x = set(nodes)
    with pytest.raises(UncacheableInputError, match="entangled"):
        digest(nodes[0])


def test_shared_objects_cost_once() -> None:
    """A value that shares its parts 2⁶⁰-fold is walked once."""
    value: Any = ["x"]
    for _ in range(60):
        value = [value, value]
    assert digest(value) == digest(value)


def test_too_deep() -> None:
    """A value nested too deeply is refused by name."""
    value: Any = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(UncacheableInputError, match="nested too deeply"):
        digest(value, path="tree")


def test_cached_property_is_no_state() -> None:
    """What a cached property left on an object does not change its key."""
    own = Own(1)
    before = digest(own)
    assert own.expensive == 1
    assert digest(own) == before


async def coroutine() -> None: ...


async def agenerator() -> Any:
    yield


def refused() -> Iterator[tuple[Any, str]]:
    yield iter([1]), "list_iterator"
    yield (each for each in [1]), "generator"
    yield map(str, [1]), "map"
    yield zip([1], strict=True), "zip"
    yield itertools.count(), "itertools.count"
    yield agenerator(), "async_generator"
    yield io.BytesIO(b"a"), "_io.BytesIO"
    yield io.StringIO("a"), "_io.StringIO"
    yield threading.Lock(), "_thread.lock"
    yield threading.Event(), "threading.Event"
    yield asyncio.Event(), "asyncio.locks.Event"
    yield weakref.ref(Own), "weakref.ReferenceType"
    yield object(), "object"
    yield random.Random(1), "random.Random"
    yield sys._getframe(), "frame"
    yield compile("1", "", "eval"), "code"


@pytest.mark.parametrize(
    ("value", "name"), list(refused()), ids=lambda each: each if isinstance(each, str) else ""
)
def test_refused(value: Any, name: str) -> None:
    """K20: what has no key is refused with the path to it and its type, however deep it lies."""
    with pytest.raises(UncacheableInputError, match="which has no cache key") as error:
        digest_inputs({"url": "a", "config": {"deep": [0, Point(1, y=(value,))]}})
    assert (error.value.path, error.value.type_name) == ("config['deep'][1].y[0]", name)
    assert isinstance(error.value, TypeError)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_refused_coroutine_and_socket() -> None:
    """Coroutines and sockets are refused, and stay usable."""
    waiting = coroutine()
    with pytest.raises(UncacheableInputError, match=r"^value is a coroutine, which has no cache key$"):
        digest(waiting)
    waiting.close()
    with socket.socket() as open_, pytest.raises(UncacheableInputError, match="socket"):
        digest(open_)


def test_iterators_are_not_consumed(tmp_path: pathlib.Path) -> None:
    """B1: a generator, an iterator, a file and a stream that were refused still have all their items."""
    path = tmp_path / "file"
    path.write_text("all")
    with path.open() as file:
        for value, content in (
            ((each for each in "all"), "all"),
            (iter("all"), "all"),
            (map(str, "all"), "all"),
            (file, "all"),
            (io.StringIO("all"), "all"),
        ):
            with pytest.raises(UncacheableInputError):
                digest([value])
            assert "".join(value) == content


def test_own_iterators_are_refused() -> None:
    """Objects of an own class that is an iterator, native, or hides its state, are refused."""

    class Own_:
        def __iter__(self) -> Any: ...

    class Iterating(Own_):
        def __next__(self) -> Any: ...

    class Hiding(Own_):
        def __getstate__(self) -> Any: ...

    class Reducing(Own_):
        def __reduce__(self) -> Any: ...

    class Native(threading.local):
        pass

    class Client(io.BytesIO):
        pass

    class Unkeyed(Keyed):
        __cache_key__ = None  # type: ignore[assignment]

    digest(Own_())
    for kind in (Iterating, Hiding, Reducing, Native, Client):
        with pytest.raises(UncacheableInputError):
            digest(kind())
    with pytest.raises(UncacheableInputError):
        digest(Unkeyed(1))


def test_secrets_are_not_told() -> None:
    """An error that leads past a secret does not contain it."""
    with pytest.raises(UncacheableInputError) as error:
        digest(model(x=[secret("hunter2"), iter(())]), path="config")
    assert "hunter2" not in str(error.value)
    assert error.value.path == "config.x[1]"


def test_private_attributes_are_found() -> None:
    """A client in a private attribute of a model is refused by its path."""
    with pytest.raises(UncacheableInputError) as error:
        digest(model(private=iter(())), path="config")
    assert error.value.path == "config._private"


def test_register() -> None:
    """K4: a registered type is keyed by what the function returns; other types are unaffected."""

    class Client:
        def __init__(self, url: str) -> None:
            self.url, self.lock = url, threading.Lock()

    class Special(Client):
        pass

    class Other:
        def __init__(self, url: str) -> None:
            self.url, self.lock = url, threading.Lock()

    with pytest.raises(UncacheableInputError):
        digest(Client("a"))
    register(Client, lambda client: client.url.lower())
    try:
        assert digest(Client("A")) == digest(Client("a")) != digest(Client("b"))
        assert digest(Special("a")) != digest(Client("a"))
        with pytest.raises(UncacheableInputError, match=r"value\.lock is a _thread\.lock"):
            digest(Other("a"))
    finally:
        del objects._registered[Client]
        encoding.forget_handlers()


def test_cache_key_refusals() -> None:
    """A key that is the object itself, or has no key, is refused with a path that says so."""
    itself = Keyed(None)
    itself.key = itself
    with pytest.raises(UncacheableInputError, match="itself"):
        digest(itself)
    with pytest.raises(UncacheableInputError) as error:
        digest([Keyed(iter(()))])
    assert error.value.path == "value[0].__cache_key__()"


def test_self_is_an_input() -> None:
    """K17, K24: objects of own classes are keyed by their whole state, bytes included, not by identity."""
    assert digest(Own(b"\x00\xff")) == digest(Own(b"\x00\xff"))
    assert digest(Own(b"\x00\xff")) != digest(Own(b"\x00\xfe"))


def test_inputs_are_digested_alone() -> None:
    """K1: each argument has a digest of its own, whatever the others are."""
    assert digest_inputs({"a": 1, "b": 2}) == {"a": digest(1), "b": digest(2)}
    assert digest_inputs({}) == {}


GOLDEN = {
    "None": "5caed47834532079",
    "True": "a1e854d3f76cb769",
    "1": "98695b387a100fd6",
    "-1": "b453379b254f921e",
    "2**70": "197f51a14d235836",
    "1.5": "9c67a9deac433f99",
    "nan": "462820b03074d735",
    "'é\\ud800'": "708079ac4a46e751",
    "b'\\x00'": "4d578a31798d79fc",
    "'x' * 70_000": "2b84d23416d55647",
    "b'x' * 70_000": "a35a043c9aff15cc",
    "[1, 'a', None]": "7a15361035076bfb",
    "(1, 'a', None)": "8abb10983f54f757",
    "[1] * 20": "6101722c9e481a11",
    "[2**40] * 20": "3f70fbc459d18480",
    "[0.5] * 20": "fa13b46903fc1a4d",
    "['ab'] * 20": "abea2758940db3e4",
    "{'b': 1, 'a': 2}": "2602099c9ffccc8b",
    "{1: 'a', 'b': 2}": "34e462c67e15628a",
    "{'b', 'a'}": "4a5491eac099a801",
    "{1, 'a'}": "97968419507a1bb4",
    "frozenset({1})": "1d2a3e5ff4502b89",
    "[[1], [1]]": "af6f61ab9142db8a",
    "bytearray(b'a')": "510facc0a2e5f512",
    "memoryview(b'a')": "0a0f58bacb8712dc",
    "1j": "4849ae367997087c",
    "...": "047eca47daf11bf7",
    "range(3)": "bde8767c08337e6d",
    "dt.datetime(2024, 7, 1, 12, tzinfo=dt.UTC)": "8cda1c45f9d3009b",
    "dt.timedelta(1, 2, 3)": "1b3b8ce9c2acb028",
    "decimal.Decimal('1.50')": "7309dbed37700abf",
    "uuid.UUID(int=1)": "bcb5730f125d0316",
    "pathlib.PurePosixPath('a/b')": "92f1bf8dc2cbabf2",
    "re.compile('a+')": "845b82b50b552d30",
    "collections.OrderedDict(a=1)": "6fd68f84fb6fc48e",
    "len": "5b8c7695c8151d7d",
    "int": "e4748cbf91dd9f15",
    "ValueError('a')": "ca4e7af8d16770e6",
}


@pytest.mark.parametrize("expression", GOLDEN)
def test_golden(expression: str) -> None:
    """Digests stay what they are: whoever changes one has to change FORMAT, and these, on purpose."""
    assert digest(eval(expression, {**globals(), "nan": math.nan})).startswith(GOLDEN[expression])


def test_is_heavy() -> None:
    """Large texts, buffers and containers are heavy; small ones and streams are not."""
    for light in (
        1,
        "a",
        b"a" * 1000,
        [1, 2],
        {"a": [1]},
        Point(1),
        iter(range(10**9)),
        range(10**9),
        None,
        Own("a"),
    ):
        assert not is_heavy(light)
    for heavy in (
        "a" * 70_000,
        b"a" * 70_000,
        list(range(2000)),
        {"a": [bytes(70_000)]},
        Point(bytes(70_000)),
    ):
        assert is_heavy(heavy)


def test_functions_are_heavy_until_read() -> None:
    """A function as input belongs off the loop until its file has been read, which hashing it does."""

    def fresh() -> None: ...

    assert is_heavy([fresh])
    assert is_heavy(functools.partial(fresh))
    digest(fresh)
    assert not is_heavy([fresh])
    assert is_heavy(Own)
    assert not is_heavy([len, int, json.dumps])


async def test_warm_functions_do_not_block() -> None:
    """Once read (in a thread), a function is hashed on the loop without touching a file."""

    def fresh() -> None: ...

    before = await asyncio.to_thread(digest, fresh)
    assert not is_heavy(fresh)
    assert digest(fresh) == before


# --- generated values

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | st.text(st.characters(exclude_categories=()))
    | st.binary()
    | st.decimals()
    | st.fractions()
    | st.uuids()
    | st.datetimes(timezones=st.none() | st.just(dt.UTC) | st.just(BERLIN))
    | st.dates()
    | st.timedeltas()
    | st.just(...)
)
keys = (
    st.none() | st.booleans() | st.integers() | st.text() | st.binary() | st.tuples(st.integers(), st.text())
)
values = st.recursive(
    scalars
    | st.lists(st.integers(), min_size=14, max_size=40)
    | st.lists(st.floats(), min_size=14, max_size=40)
    | st.lists(st.text(st.characters(exclude_categories=())), min_size=14, max_size=40),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(keys, inner)
        | st.sets(keys)
        | st.frozensets(keys)
        | st.lists(inner, max_size=4).map(collections.deque)
    ),
    max_leaves=20,
)


def told_apart(value: Any) -> Any:
    """Equal for values that are the same in type and content, by another way than the encoding."""
    if isinstance(value, dict):
        return "dict", sorted((repr(told_apart(key)), repr(told_apart(item))) for key, item in value.items())
    if isinstance(value, set | frozenset):
        return type(value).__name__, sorted(repr(told_apart(each)) for each in value)
    if isinstance(value, list | tuple | collections.deque):
        return type(value).__name__, [told_apart(each) for each in value]
    if isinstance(value, dt.datetime):
        return "datetime", value.isoformat(), value.fold, repr(value.tzinfo)
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    if isinstance(value, complex):
        return "complex", told_apart(value.real), told_apart(value.imag)
    return type(value).__name__, repr(value)


@given(values, values)
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
def test_generated_values(one: Any, other: Any) -> None:
    """Digests are equal exactly where type and content are, over nested values."""
    assert (digest(one) == digest(other)) == (told_apart(one) == told_apart(other))
    assert digest(one) == digest(pickle.loads(pickle.dumps(one)))


@given(st.lists(values, min_size=2, max_size=4))
def test_no_container_mimics_another(parts: list[Any]) -> None:
    """However values are grouped, other groups of the same values differ."""
    groups = [
        parts,
        [parts],
        [parts[:1], parts[1:]],
        [*parts[:-1], parts[-1:]],
        (*parts,),
        [tuple(parts)],
        dict(enumerate(parts)),
    ]
    told = {repr(told_apart(each)) for each in groups}
    assert len({digest(each) for each in groups}) == len(told)


@given(st.data())
def test_no_value_mimics_an_encoding(data: st.DataObject) -> None:
    """Bytes and texts that hold another value's encoding do not collide with it, or with one another."""
    value = data.draw(values)
    encoded = encoding.Encoder(lambda _: b"")(value)
    mimics = [encoded, encoded.decode("latin-1"), [encoded], (encoded,), {"a": encoded}, bytearray(encoded)]
    assert len({digest(each) for each in (value, *mimics)}) == len(mimics) + (value not in mimics)


@pytest.mark.parametrize("python", PYTHONS, ids=str)
@pytest.mark.parametrize("seed", [1, 2])
def test_generated_values_elsewhere(python: pathlib.Path, seed: int) -> None:
    """B16: another process, hash seed and Python give equal values equal digests, sets of texts included."""
    with Elsewhere(python, seed) as ask:

        @given(st.lists(values, max_size=10))
        @settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
        def compare(each: list[Any]) -> None:
            assert ask("[digest(one) for one in each]", each=each) == [digest(one) for one in each]

        compare()


@pytest.mark.parametrize("python", PYTHONS, ids=str)
def test_constructed_values_elsewhere(python: pathlib.Path) -> None:
    """Standard library objects, whose modules move between Pythons, keep their digests."""
    expressions = [
        "__import__('pathlib').Path('a/b')",
        "__import__('pathlib').PureWindowsPath('a/b')",
        "__import__('re').compile('a', 2)",
        "__import__('collections').OrderedDict(a=1)",
        "__import__('collections').deque([1], 3)",
        "__import__('functools').partial(print, 1, sep='')",
        "__import__('ipaddress').ip_network('10.0.0.0/8')",
        "__import__('types').SimpleNamespace(a={'x', 'y', 'z'})",
        "__import__('operator').itemgetter(1, 'a')",
        "__import__('operator').methodcaller('a', 1, b=2)",
        "__import__('zoneinfo').ZoneInfo('Europe/Berlin')",
        "__import__('http').HTTPStatus.OK",
        "[len, str.join, ''.join, int, __import__('math').sin, __import__('json').dumps]",
        "[list[int], int | None, __import__('typing').Optional[int], __import__('typing').Literal['a']]",
        "OSError(2, 'a', 'b')",
        "ExceptionGroup('a', [ValueError(1)])",
        "{('a', 1), 'b', None, 3.5, frozenset('xyz')}",
    ]
    with Elsewhere(python) as ask:
        for expression in expressions:
            assert ask(f"digest({expression})") == digest(eval(expression)), expression
