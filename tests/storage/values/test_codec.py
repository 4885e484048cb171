"""Values to msgpack and back: exact types or a refusal."""

from __future__ import annotations

import array
import collections
import copyreg
import enum
import functools
import io
import math
import re
import socket
import subprocess
import sys
import threading
from collections import OrderedDict
from dataclasses import dataclass, make_dataclass
from datetime import datetime, time
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import msgpack
import numpy as np
import pytest
import stored_values
from hypothesis import given, settings
from onceflow.storage._errors import SerializationError, UnreadableValueError
from onceflow.storage._values.codec import OUT_OF_BAND, dumps, is_heavy, loads
from stored_values import ARRAYS, EXAMPLES, Colour, Frozen, Plain, Point, Slotted, same, values


def there_and_back(value: Any) -> Any:
    """Through bytes, as from a file: nothing of the original's memory is left."""
    return loads([bytes(segment) for segment in dumps(value)])


@pytest.mark.parametrize("value", EXAMPLES, ids=lambda value: type(value).__name__)
def test_every_supported_type_comes_back_exactly(value: Any) -> None:
    """S7, R4: a value of every type comes back equal and of the same type, alone and inside containers."""
    assert same(there_and_back(value), value)
    assert same(there_and_back([value, {"k": (value,)}]), [value, {"k": (value,)}])


@settings(max_examples=400, deadline=None)
@given(values)
def test_any_nesting_comes_back_exactly(value: Any) -> None:
    """S7: equality and types hold at any depth."""
    assert same(there_and_back(value), value)


@pytest.mark.parametrize("value", ARRAYS, ids=lambda value: type(value).__name__)
def test_numpy_comes_back_exactly_and_writable(value: Any) -> None:
    """S7: arrays, scalars and dtypes keep dtype, shape and order; arrays may be written to."""
    back = there_and_back(value)
    assert same(back, value)
    assert same(there_and_back({"a": [value]}), {"a": [value]})
    if isinstance(back, np.ndarray):
        assert back.flags.writeable
        assert back.flags.aligned == value.flags.aligned


class TextSubclass(str):
    __slots__ = ()


class IntSubclass(int):
    pass


class ListSubclass(list):  # type: ignore[type-arg]
    pass


class PointSubclass(Point):
    pass


class ArraySubclass(np.ndarray):
    pass


@dataclass
class Copied:
    a: int

    def __reduce__(self) -> Any:
        return Copied, (self.a,)


@dataclass
class FromDict(dict):  # type: ignore[type-arg]
    a: int = 0


@dataclass
class Registered:
    a: int


copyreg.pickle(Registered, lambda value: (Registered, (value.a,)))


def a_local_member() -> enum.Enum:
    class Local(enum.Enum):
        A = 1

    return Local.A


KEYLESS = ZoneInfo.from_file(io.BytesIO(b"TZif" + bytes(35) + b"\1" + bytes(3) + b"\4" + bytes(6) + b"UTC\0"))

UNSUPPORTED = [
    object(), TextSubclass("a"), IntSubclass(1), ListSubclass(), PointSubclass(1), Copied(1), FromDict(),
    Registered(1), memoryview(b"a"), msgpack.ExtType(5, b""), msgpack.Timestamp(1, 2), array.array("i"),
    collections.Counter("a"), collections.defaultdict(lambda: 1), ValueError("a"), Colour, int, len, ...,
    re.compile("a"), np.float64, np.array([object()]), np.arange(3).view(ArraySubclass), np.ma.array([1]),
    np.rec.array([(1,)], dtype=[("a", "i4")]), np.str_("a\0"),
    np.dtype("i4", metadata={"a": 1}), np.zeros(1, [(("title", "name"), "i4")]), (_ for _ in "a"),
    threading.Lock(),
    datetime(2024, 1, 1, tzinfo=KEYLESS), time(1, tzinfo=KEYLESS), KEYLESS,
    make_dataclass("Local", ["a"])(1), a_local_member(),
]  # fmt: skip


@pytest.mark.parametrize("value", UNSUPPORTED, ids=lambda value: type(value).__name__)
def test_what_would_come_back_as_something_else_is_refused(value: Any) -> None:
    """Subclasses, memoryviews, msgpack's own types, local classes and the like never degrade silently."""
    for holder in (value, [value], {"a": value}, (1, value), Plain(value), [1, "a", value] * 2000):
        with pytest.raises(SerializationError):
            dumps(holder)


def test_a_refusal_names_the_path_and_the_type() -> None:
    """R3: the error says where in the value the culprit is, and what it is."""
    with socket.socket() as culprit:
        for value, message in [
            ({"a": [1, 2, 3, culprit]}, "value['a'][3] is a socket.socket"),
            (culprit, "value is a socket.socket"),
            ((0, Plain([culprit])), "value[1].a[0] is a socket.socket"),
            (Point(1, culprit), "value.y is a socket.socket"),
            ({(1, culprit): 1}, "at its key"),
            (collections.deque([1, culprit]), "value[1] is a socket.socket"),
            (OrderedDict(x={"y": culprit}), "value['x']['y'] is a socket.socket"),
            (["a"] * 5000 + [culprit], "value[5000] is a socket.socket"),
        ]:
            with pytest.raises(SerializationError, match=re.escape(message)):
                dumps(value)
    plain = Plain(1)
    plain.beside = object()  # type: ignore[assignment]
    with pytest.raises(SerializationError, match=re.escape("value.beside is a object")):
        dumps(plain)


def test_cycles_and_bombs_are_refused() -> None:
    """A cyclic or too deep value is a SerializationError, never a crash or an endless loop."""
    cycle: list[Any] = []
    cycle.append(cycle)
    wide: list[Any] = []
    wide.extend([wide, wide, {"a": wide}])
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    for value in (cycle, wide, deep, {"a": (cycle,)}):
        with pytest.raises(SerializationError, match=r"nested|itself"):
            dumps(value)
    while deep:  # taken apart by hand, so that its deallocation does not recurse
        deep = deep.pop()


def test_a_deep_record_is_refused() -> None:
    """A record with any depth of nesting is an error, never a crash of the interpreter."""
    bomb = b"\xc0"
    for _ in range(5000):
        bomb = b"\xc9" + len(bomb).to_bytes(4, "big") + b"\x07" + bomb
    lists = b"\x91" * 5000 + b"\xc0"
    for tree in (bomb, lists):
        with pytest.raises(UnreadableValueError):
            loads([tree])


def test_large_buffers_travel_without_a_copy() -> None:
    """S7: from 32 KiB on bytes and array data are segments that share the value's memory, both ways."""
    data, floats = bytes(OUT_OF_BAND), np.arange(OUT_OF_BAND, dtype=float).reshape(64, -1)
    segments = dumps({"data": data, "c": floats, "f": floats.T, "small": b"x" * 100})
    assert segments[1] is data
    assert all(np.shares_memory(np.frombuffer(segment, "u1"), floats) for segment in segments[2:])
    own: list[Any] = [segments[0], segments[1], bytearray(segments[2]), bytearray(segments[3])]
    back = loads(own)
    assert back["data"] is data
    assert np.shares_memory(back["c"], np.frombuffer(own[2], "u1"))
    assert back["f"].flags.f_contiguous
    back["c"][0, 0] = 7.0
    assert np.frombuffer(own[2])[0] == 7.0
    assert loads([segments[0], memoryview(data), *own[2:]])["data"] is data


def test_bytes_come_back_as_bytes_from_any_buffer() -> None:
    """A `bytes` value is `bytes` also when it was read into a bytearray."""
    for kind in (bytes, bytearray, memoryview):
        back = loads([kind(segment) for segment in dumps([b"x" * 50_000, bytearray(50_000)])])
        assert [type(item) for item in back] == [bytes, bytearray]


def test_large_containers_are_cut_into_pieces() -> None:
    """No C call packs or unpacks much more than 64 KiB, so that no thread keeps the GIL for long."""
    for value in (
        list(range(300_000)),
        dict.fromkeys(range(20_000), "x" * 50),
        [("ab", i) for i in range(20_000)],
        [[i] * 500 for i in range(500)],
    ):
        segments = dumps(value)
        assert len(segments) == 2
        _, index, sizes = msgpack.unpackb(msgpack.unpackb(segments[0]).data)
        assert index == 1
        assert sum(sizes) == len(segments[1])
        assert max(sizes) <= 2 * 64 * 1024
        assert same(loads(segments), value)


def test_is_heavy_tells_large_from_small() -> None:
    """Whether to leave the loop is judged from lengths and a sample, right in clear cases."""
    pandas = pytest.importorskip("pandas")
    heavy = [
        b"x" * 100_000, "x" * 100_000, bytearray(100_000), np.zeros(10_000), list(range(20_000)),
        {i: i for i in range(20_000)}, ["x" * 5000] * 50, {"a": b"x" * 100_000}, (1, (2, "x" * 100_000)),
        [[1] * 1000] * 1000, Plain(np.zeros(10_000)), Slotted(b"x" * 100_000),
        pandas.DataFrame({"a": range(20_000)}), pandas.Series(range(20_000)), {1} | set(range(20_000)),
    ]  # fmt: skip
    light = [
        None,
        1,
        "x",
        b"x" * 1000,
        [],
        {},
        list(range(100)),
        {"a": [1, 2]},
        np.zeros(10),
        Plain(1),
        object(),
    ]
    assert [type(v) for v in heavy if not is_heavy(v)] == []
    assert [v for v in light if is_heavy(v)] == []


def test_init_does_not_run_on_the_way_back() -> None:
    """A dataclass gets its state, not a second __init__; unset fields stay unset, others' attributes stay."""
    value = Plain(1)
    value.beside = "changed"
    back = there_and_back(value)
    assert back.beside == "changed"
    assert not hasattr(back, "later")
    assert not hasattr(there_and_back(Slotted(1)), "unset")


def _renamed(monkeypatch: pytest.MonkeyPatch, name: str, new: Any) -> None:
    if new is None:
        monkeypatch.delattr(stored_values, name)
    else:
        new.__qualname__, new.__module__ = name, "stored_values"
        monkeypatch.setattr(stored_values, name, new)


def test_a_class_that_is_gone_or_changed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """R3: the record of a class that was renamed, or has other fields, cannot be read: a miss."""
    for name, value, new in [
        ("Frozen", Frozen(1), None),
        ("Frozen", Frozen(1), make_dataclass("Frozen", ["a", "other"])),
        ("Frozen", Frozen(1), type("Frozen", (), {})),
        ("Colour", Colour.GREEN, enum.Enum("Colour", "RED")),
        ("Colour", Colour.GREEN, type("Colour", (), {})),
        ("Point", Point(1), collections.namedtuple("Point", "x z")),
        ("Point", Point(1), type("Point", (tuple,), {})),
    ]:
        segments = dumps([value])
        with monkeypatch.context() as patch:
            _renamed(patch, name, new)
            with pytest.raises(UnreadableValueError, match=name):
                loads(segments)


def test_a_record_imports_nothing_unless_it_may(tmp_path: Path) -> None:
    """Reading a record imports no module that the program has not, except where the writer is trusted."""
    (tmp_path / "fresh_shapes.py").write_text(
        "from dataclasses import dataclass\n@dataclass\nclass Square:\n    side: int\n"
    )
    write = "from fresh_shapes import Square; print(dumps(Square(3))[0].hex())"
    start = "import sys; from onceflow.storage._values.codec import dumps, loads; "
    run = functools.partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True, check=False)
    tree = run([sys.executable, "-c", start + write]).stdout.strip()
    read = start + f"value = loads([bytes.fromhex({tree!r})], imports=%s); print(value)"
    trusted, careful = (run([sys.executable, "-c", read % flag]) for flag in (True, False))
    assert trusted.stdout.strip() == "Square(side=3)"
    assert "UnreadableValueError" in careful.stderr
    assert "'fresh_shapes' is not imported" in careful.stderr


def test_only_data_classes_are_made() -> None:
    """A record cannot name any other class, or a function, to be called."""

    def forged(code: int, parts: list[Any]) -> list[Any]:
        return [msgpack.packb(msgpack.ExtType(code, msgpack.packb(parts)))]

    forgeries: list[tuple[int, list[Any]]] = [
        (34, ["subprocess", "Popen", ["args"], ["true"], [], {}]),
        (34, ["os", "system", [], [], [], {}]),
        (33, ["subprocess", "Popen", ["args"], ["true"]]),
        (32, ["builtins", "eval", "1"]),
        (32, ["builtins", "int", 5]),
        (99, [1]),
        (126, [9]),
        (127, [0, 5, [9]]),
    ]
    for code, parts in forgeries:
        with pytest.raises(UnreadableValueError):
            loads(forged(code, parts))


def test_nan_keys_and_order_survive() -> None:
    """Dicts keep their order, and NaN may be a key."""
    back = there_and_back({"z": 1, math.nan: 2, "a": 3})
    assert [*back.values()] == [1, 2, 3]
