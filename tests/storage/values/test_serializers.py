"""Serializers by name: each restores the exact value or refuses it, and the record says which it was."""

from __future__ import annotations

import json
import pickle
import random
import re
import sys
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import UUID

import numpy as np
import pytest
import stored_values
from hypothesis import given, settings
from onceflow.storage._errors import (
    RecordError,
    SerializationError,
    StorageConfigurationError,
    UnreadableValueError,
)
from onceflow.storage._format.envelope import Header, check_payload, pack, split, unpack_header
from onceflow.storage._storage import Buffer
from onceflow.storage._values.serializers import (
    CompressedSerializer,
    JsonSerializer,
    PickleSerializer,
    Serializer,
    decode,
    serializer_by_name,
    uses_pickle,
)
from stored_values import ARRAYS, EXAMPLES, Bits, Colour, Frozen, Plain, Point, Slotted, same, values

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ["default", "msgpack", "pickle", "json"]
NAMES += [f"compressed/{name}" for name in NAMES]


def stored(value: Any, serializer: Serializer, **options: Any) -> tuple[Any, Header]:
    """The value through a whole record, as the engine writes and reads it."""
    encoded = serializer.encode(value)
    record = b"".join(pack(Header("k", serializer=encoded.serializer), encoded.segments))
    return read(record, **options)


def read(record: bytes, **options: Any) -> tuple[Any, Header]:
    """Value and header of a record."""
    head, offset = unpack_header(record)
    segments = split(head, memoryview(record)[offset:])
    check_payload(head, segments)
    return decode(head.serializer, segments, **options), head


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", EXAMPLES, ids=lambda value: type(value).__name__)
def test_every_serializer_restores_every_type(name: str, value: Any) -> None:
    """R1, R4, S7: by any name a value comes back exactly, and its record names a concrete serializer."""
    back, head = stored(value, serializer_by_name(name))
    assert same(back, value)
    assert head.serializer == name.replace("default", "msgpack")


@settings(max_examples=300, deadline=None)
@given(values)
def test_json_restores_any_nesting(value: Any) -> None:
    """S7: the tagged JSON keeps equality and types at any depth."""
    assert same(stored(value, serializer_by_name("json"))[0], value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", ARRAYS, ids=lambda value: type(value).__name__)
def test_every_serializer_restores_numpy_writable(name: str, value: Any) -> None:
    """R1, S7: arrays of any dtype and layout, and they may be written to."""
    back, _ = stored({"a": value}, serializer_by_name(name))
    assert same(back["a"], value) or ("pickle" in name and np.array_equal(back["a"], value))
    assert not isinstance(value, np.ndarray) or back["a"].flags.writeable


def test_plain_values_are_plain_json() -> None:
    """R1: what JSON knows is written as anybody would write it."""
    value = {"name": "ünï", "n": [1, 2.5, None, True], "deep": {"a": {"b": []}}, "empty": {}}
    (text,) = serializer_by_name("json").dumps(value)
    assert bytes(text).decode() == json.dumps(value, ensure_ascii=False)
    assert bytes(serializer_by_name("json").dumps((1, b"hi"))[0]) == b'{"$tuple": [1, {"$bytes": "aGk="}]}'
    long = {"rows": [{"i": i, "s": "x"} for i in range(1000)]}
    assert json.loads(bytes(serializer_by_name("json").dumps(long)[0])) == long


def test_default_falls_back_to_pickle_and_says_so() -> None:
    """R1: the record of a value that msgpack does not carry names pickle."""
    value = {"e": re.compile("a+"), "t": (1,)}
    for name, recorded in [("default", "pickle"), ("compressed/default", "compressed/pickle")]:
        back, head = stored(value, serializer_by_name(name))
        assert back == value
        assert head.serializer == recorded
        assert uses_pickle(head.serializer)
    assert not any(map(uses_pickle, ["msgpack", "json", "compressed/json", "unknown", "own"]))


def test_pickle_carries_what_only_cloudpickle_does() -> None:
    """Values with functions or classes of a local scope are stored as well."""
    step = 5

    class Local:
        def value(self) -> int:
            return step

    back, _ = stored([lambda x: x + step, Local()], serializer_by_name("pickle"))
    assert back[0](1) == 6
    assert back[1].value() == 5


def test_refusals_say_what_and_where() -> None:
    """R3: a value that cannot be stored is a SerializationError naming path and type, by every serializer."""
    value = {"a": [1, threading.Lock()]}
    for name in NAMES:
        with pytest.raises(SerializationError) as caught:
            serializer_by_name(name).encode(value)
        if "pickle" not in name:
            assert "value['a'][1] is a _thread.lock" in str(caught.value)
        assert "lock" in str(caught.value)
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(SerializationError, match="contains itself"):
        serializer_by_name("json").encode(cycle)
    assert stored(cycle, serializer_by_name("default"))[1].serializer == "pickle"


@pytest.mark.parametrize("module", ["pandas", "polars", "pyarrow"])
def test_tables_travel_as_buffers(module: str) -> None:
    """S7: DataFrames and Arrow tables come back equal, their columns out of band and without pickle."""
    library = pytest.importorskip(module)
    columns = {"a": np.arange(50_000.0), "b": np.arange(50_000)}
    table = library.table(columns) if module == "pyarrow" else library.DataFrame(columns)
    encoded = serializer_by_name("default").encode([table])
    assert encoded.serializer == "msgpack"
    back = decode(encoded.serializer, [bytes(segment) for segment in encoded.segments])[0]
    assert type(back) is type(table)
    assert back.equals(table)
    assert len(encoded.segments) > 1
    assert len(encoded.segments[0]) < 5000


def test_pickle_is_read_without_a_copy() -> None:
    """W7: a value pickled with out-of-band arrays shares the buffers that were read."""
    array = np.arange(50_000.0)
    segments = PickleSerializer().dumps([array, object])
    own: list[Buffer] = [segments[0], bytearray(segments[1])]
    back = PickleSerializer().loads(own)[0]
    assert np.shares_memory(back, np.frombuffer(own[1], "u1"))
    assert np.array_equal(back, array)


def test_compression() -> None:
    """R1: what compresses gets smaller, more so at a higher level; large buffers go segment by segment."""
    value = {"text": "abc" * 50_000, "data": bytes(3 << 20)}
    sizes = [
        sum(map(len, serializer_by_name(f"compressed/msgpack?level={level}").encode(value).segments))
        for level in (0, 1, 9)
    ]
    assert sizes[0] > 3 << 20 > sizes[1] > sizes[2]
    assert stored(value, CompressedSerializer(JsonSerializer(), level=1))[0] == value
    segments = serializer_by_name("compressed/msgpack").encode(value).segments
    for broken in ([segments[0][:-5], *segments[1:]], [b"", *segments[1:]], [*segments[:-1], b"junk"]):
        with pytest.raises(UnreadableValueError):
            decode("compressed/msgpack", broken)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("jsn", "Did you mean 'json'?"),
        ("compressed/jsn", "Did you mean 'compressed/json'?"),
        ("nothing like it", "Known are default, msgpack, pickle, json, compressed/default"),
        ("compressed", "There is no serializer 'compressed'"),
        ("compressed/compressed/json", "There is no serializer"),
        ("", "There is no serializer ''"),
        ("json?level=6", "'json' has no option 'level'"),
        ("compressed/json?level=11", "'11' is not|11 is not"),
        ("compressed/json?level=best", "'best' is not a whole number"),
        ("compressed/json?level=", "'' is not a whole number"),
        ("compressed/json?levle=6", "no option 'levle'"),
        ("compressed/json?level", "cannot be read"),
    ],
)
def test_unknown_names_and_invalid_options_are_errors(name: str, message: str) -> None:
    """S9: a name or option that cannot work is a ValueError at once, naming it and the remedy."""
    with pytest.raises(StorageConfigurationError, match=re.escape(message).replace(r"\|", "|")) as caught:
        serializer_by_name(name)
    assert isinstance(caught.value, ValueError)


def test_instances_with_invalid_options_are_errors() -> None:
    """S9: the same for instances; and what is no serializer at all is a TypeError."""
    for level in (-1, 10, "6", True, None):
        with pytest.raises(StorageConfigurationError, match="compression level"):
            CompressedSerializer(JsonSerializer(), level=level)  # type: ignore[arg-type]
    with pytest.raises(StorageConfigurationError, match="not a Serializer"):
        CompressedSerializer("json")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="by name or as a Serializer instance"):
        serializer_by_name(5)  # type: ignore[arg-type]
    with pytest.raises(StorageConfigurationError, match="has no name"):
        serializer_by_name(Nameless())


class Nameless(Serializer):
    def dumps(self, value: Any) -> Sequence[Buffer]:
        return [b""]

    def loads(self, segments: Sequence[Buffer]) -> Any:
        return None


class Reversed(Serializer):
    """A user's own: text, backwards."""

    name = "reversed"

    def dumps(self, value: Any) -> Sequence[Buffer]:
        return [value[::-1].encode()]

    def loads(self, segments: Sequence[Buffer]) -> Any:
        return str(segments[0], "utf-8")[::-1]


def test_a_serializer_of_the_users_own() -> None:
    """R1: an instance works where a name does, alone and compressed; its failures are ours to translate."""
    for own in (Reversed(), CompressedSerializer(Reversed())):
        back, head = stored("text", serializer_by_name(own), using=own)
        assert back == "text"
        assert head.serializer == own.name
        with pytest.raises(UnreadableValueError, match=own.name):
            decode(own.name, [b"x"])
        with pytest.raises(UnreadableValueError):
            decode(own.name, [b"\xff"], using=own)
    with pytest.raises(SerializationError, match=r"'reversed'.*TypeError"):
        Reversed().encode(5)
    assert stored(1, serializer_by_name("json"), using=Reversed())[0] == 1


def test_serializers_are_values() -> None:
    """O1: equal serializers compare equal and pickle, so that tasks that hold them do."""
    for name in [*NAMES, "compressed/json?level=1"]:
        serializer = serializer_by_name(name)
        assert pickle.loads(pickle.dumps(serializer)) == serializer == serializer_by_name(name)
        assert serializer_by_name(serializer) is serializer
    assert serializer_by_name("compressed/json?level=1") != serializer_by_name("compressed/json")


def test_an_unknown_recorded_serializer_is_opaque_until_used() -> None:
    """S8: metadata of a record with an unknown serializer parses; using the value fails by its name."""
    record = b"".join(pack(Header("k", serializer="parquet/v9"), [b"data"]))
    head, offset = unpack_header(record)
    assert head.serializer == "parquet/v9"
    with pytest.raises(UnreadableValueError, match=r"'parquet/v9'.*no serializer has this name"):
        decode(head.serializer, split(head, memoryview(record)[offset:]))
    with pytest.raises(UnreadableValueError, match="'default'"):
        decode("default", [b"\xc0"])


def test_json_of_foreign_hands_is_an_error() -> None:
    """A text that no serializer of ours wrote is an UnreadableValueError, whatever it holds."""
    for text in (
        b"",
        b"{",
        b"\xff",
        b"[" * 100_000,
        b'{"$tuple": 5}',
        b'{"$nothing": 1}',
        b'{"$dataclass": ["os", "system", [], [], [], {}]}',
        b'{"$ndarray": ["<f8", [1000000000000], "C", {"$bytes": ""}]}',
    ):
        with pytest.raises(UnreadableValueError):
            decode("json", [text])


class Canary:
    """Unpickling it is noticed."""

    sang = False

    def __reduce__(self) -> Any:
        return _sing, ()


def _sing() -> Canary:
    Canary.sang = True
    return Canary()


def mutations(data: bytes, count: int, dice: random.Random) -> Any:
    """Copies of `data` with bits flipped, bytes cut out, doubled, replaced, and the end cut off."""
    for _ in range(count):
        changed = bytearray(data)
        for _ in range(dice.choice([1, 1, 1, 2, 5])):
            at, size = dice.randrange(len(data)), dice.randrange(1, 9)
            match dice.randrange(5):
                case 0 if at < len(changed):
                    changed[at] ^= 1 << dice.randrange(8)
                case 1:
                    del changed[at : at + size]
                case 2:
                    changed[at:at] = changed[at : at + size]
                case 3:
                    changed[at : at + size] = dice.randbytes(size)
                case _:
                    del changed[dice.randrange(len(changed) + 1) :]
        if changed != data:
            yield bytes(changed)


def test_mutated_records_are_errors_and_run_nothing() -> None:
    """B19: of 10 000 mutated records none is read, none raises anything else, and no pickle runs."""
    encoded = serializer_by_name("default").encode([Canary(), b"x" * 300])
    assert encoded.serializer == "pickle"
    record = b"".join(pack(Header("k", serializer="pickle", extra={"a": [1]}), encoded.segments))
    for changed in mutations(record, 10_000, random.Random(1)):
        with pytest.raises((RecordError, SerializationError)):
            read(changed)
    assert not Canary.sang
    decode("pickle", encoded.segments)
    assert Canary.sang


@pytest.mark.parametrize("name", ["msgpack", "json", "compressed/msgpack"])
def test_mutated_payloads_are_values_or_errors(name: str) -> None:
    """B19: even with its digest forged, a payload makes a value or a SerializationError, nothing else."""
    value = [{**GOLDEN_VALUE, "long": 0}, np.arange(5), np.zeros(2, [("a", "i4")]), "\ud800", list(range(40))]
    segments = serializer_by_name(name).encode(value).segments
    for changed in mutations(bytes(segments[0]), 5_000, random.Random(2)):
        try:
            decode(name, [changed, *segments[1:]])
        except SerializationError:
            pass


GOLDEN_VALUE: dict[Any, Any] = {
    "plain": [None, True, 1, -1, 1.5, "text", "ünï", {"a": {}}],
    "numbers": [2**70, -(2**63) - 1, 1 + 2j, Decimal("1.10")],
    "bytes": [b"b", bytearray(b"ba"), b"x" * 33_000],
    "containers": [(1, (2,)), {3}, frozenset({4}), {(1, "k"): 1, 2: 3}, {"$tuple": [1]}],
    "times": [datetime(2024, 2, 29, 1, 2, 3, 4, UTC), *stored_values.ZONES],
    "names": [UUID(int=5), PurePosixPath("/a/b"), range(1, 9, 2), slice(1, None)],
    "classes": [Colour.GREEN, Bits.A | Bits.B, Point(1, 2), Frozen((1,)), Slotted(1), Plain(b=2, a=1)],
    "arrays": [np.arange(6, dtype="<i4").reshape(2, 3), np.float32(1.5), np.datetime64("2024-01-01", "D")],
    "long": list(range(25_000)),
}


@pytest.mark.parametrize("name", ["msgpack", "json"])
def test_values_written_by_the_first_version_are_read(name: str) -> None:
    """S7: a value once stored is readable for ever: these files are never written again."""
    value, _ = read((GOLDEN / f"values-v1-{name}.bin").read_bytes())
    assert same(value, GOLDEN_VALUE)


def test_no_optional_library_is_imported() -> None:
    """W8: serializers load numpy, pandas and cloudpickle only when a value needs them."""
    import subprocess

    code = (
        "import sys; from onceflow.storage._values.serializers import *; s = serializer_by_name('default');"
        "decode('msgpack', s.encode({'a': (1,)}).segments);"
        "print([m for m in ('numpy', 'pandas', 'cloudpickle', 'pyarrow', 'polars') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
