"""Values of pandas, polars and pyarrow to segments and back: exactly or refused, in place, and without pickle."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from onceflow.storage._errors import SerializationError, UnreadableValueError
from onceflow.storage._values import arrow as _arrow
from onceflow.storage._values import pandas as _pandas
from onceflow.storage._values import polars as _polars
from onceflow.storage._values.codec import OUT_OF_BAND, dumps, loads
from onceflow.storage._values.kinds import Context, Raw, Unreadable
from onceflow.storage._values.serializers import DefaultSerializer, decode, serializer_by_name
from pandas.tseries.offsets import CustomBusinessDay
from stored_tables import (
    ARROW,
    FRAMES,
    INDEXES,
    PANDAS_SCALARS,
    POLARS,
    same_arrow,
    same_pandas,
    same_polars,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "values-v1-tables.bin"
TABLES = [
    *[(value, same_arrow) for value in ARROW],
    *[(value, same_polars) for value in POLARS],
    *[(value, same_pandas) for value in (*FRAMES, *INDEXES, *PANDAS_SCALARS)],
]


@pytest.mark.parametrize("name", ["msgpack", "json", "compressed/msgpack"])
def test_tables_come_back_exactly(name: str) -> None:
    """S7: types, dtypes, names, indexes, frequencies, chunks, metadata, attrs and flags are those that went."""
    for value, same in TABLES:
        recorded, segments = serializer_by_name(name).encode({"a": (value,)})
        ((back,),) = decode(recorded, [bytes(segment) for segment in segments]).values()
        assert same(value, back), (type(value), value, back)


def test_an_equality_that_tells_everything_apart() -> None:
    """The equality of these tests is not satisfied by what is nearly the same."""
    assert not same_arrow(pa.chunked_array([[1], [2]]), pa.chunked_array([[1, 2]]))
    assert not same_polars(pl.Series("a", ["x"]), pl.Series("a", ["x"], pl.Categorical))
    for one, two in [
        (pd.Index([1], name="a"), pd.Index([1])),
        (pd.date_range("2024", periods=2), pd.date_range("2024", periods=2)._with_freq(None)),
        (pd.Series([1], dtype="i4"), pd.Series([1])),
        (pd.Series([None], dtype=object), pd.Series([np.nan], dtype=object)),
        (pd.RangeIndex(2), pd.Index([0, 1])), (pd.Series(["a"]), pd.Series(["a"], dtype="string")),
    ]:  # fmt: skip
        assert not same_pandas(one, two)


class SubFrame(pd.DataFrame):  # type: ignore[misc]
    pass


class SubPolars(pl.DataFrame):
    pass


class Metres(pa.ExtensionType):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(pa.int64(), "onceflow.test.metres")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: Any, serialized: Any) -> Any:
        raise AssertionError("code of the record's choosing ran")


METRES = pa.ExtensionArray.from_storage(Metres(), pa.array([1]))
HOLIDAYS = pd.date_range("2024", periods=3, freq=CustomBusinessDay(holidays=["2024-01-02"]))

REFUSED = [
    SubFrame({"a": [1]}), SubPolars({"a": [1]}), METRES, pa.table({"a": METRES}), pa.chunked_array([METRES]),
    pa.table({"a": [1]}).cast(pa.schema([pa.field("a", pa.int64(), metadata={"ARROW:extension:name": "x"})])),
    pl.Series([[1], object()], dtype=pl.Object), pl.DataFrame({"a": [[]]}, schema={"a": pl.Array(pl.Int8, 0)}),
    pd.Series(pd.arrays.SparseArray([0, 1])), pd.DataFrame({"a": pd.arrays.SparseArray([0, 1])}), HOLIDAYS,
    pd.DataFrame({"a": [1]}, index=HOLIDAYS[:1]), pd.Series([1], name=HOLIDAYS.freq), pd.offsets.MonthEnd(),
    pd.Series([object()]), pd.Index([abs]), pd.DataFrame({"a": [1, abs]}), pd.CategoricalIndex([abs]),
    pd.Timestamp("2024", tz="dateutil/Europe/Berlin"), pd.DatetimeIndex(["2024"]).tz_localize("dateutil/Europe/Berlin"),
    pd.CategoricalDtype(["a"]), pa.int64(), pl.Int64, pl.LazyFrame({"a": [1]}), pd.DataFrame,
    pd.arrays.NumpyExtensionArray(np.arange(2)),
]  # fmt: skip


@pytest.mark.parametrize("value", REFUSED, ids=lambda value: type(value).__name__)
def test_what_would_not_come_back_exactly_is_refused(value: Any) -> None:
    """S7: subclasses, extension types, sparse arrays, odd frequencies and zones, and objects are left to pickle."""
    for name in ("msgpack", "json"):
        with pytest.raises(SerializationError, match=r"value\['a'\]"):
            serializer_by_name(name).encode({"a": value})


def test_what_is_refused_is_pickled() -> None:
    """S7: a frame that only pickle carries is carried by pickle."""
    frame = pd.DataFrame({"a": pd.arrays.SparseArray([0, 1])})
    recorded, segments = DefaultSerializer().encode(frame)
    assert recorded == "pickle"
    assert same_pandas(decode(recorded, segments), frame)


def shared(segments: Any, *arrays: Any) -> bool:
    """Whether each array's memory is a segment, as it is."""
    large = [np.frombuffer(segment, "u1") for segment in segments[1:]]
    return all(any(np.shares_memory(part, array) for part in large) for array in arrays)


def test_columns_are_written_where_they_lie() -> None:
    """S7: the buffers of pandas and Arrow columns from 32 KiB on are segments that share the value's memory."""
    numbers, texts = np.arange(10_000.0), [f"a text {at}" for at in range(10_000)]
    frame = pd.DataFrame(
        {"a": numbers, "t": texts, "n": pd.array(range(10_000), "Int64")}, index=numbers[::-1].copy()
    )
    segments = dumps(frame)
    masked: Any = frame["n"].array
    assert shared(segments, frame["a"].to_numpy(), frame.index.to_numpy(), masked._data)
    assert len(segments) == 6
    table = pa.table({"a": numbers, "t": texts, "d": pa.array(texts).dictionary_encode()})
    segments = dumps(table[:9000])
    parts = [table["a"].chunk(0).buffers()[1], *table["t"].chunk(0).buffers()[1:]]
    assert shared(segments, *[np.frombuffer(part, "u1") for part in parts])
    assert sum(memoryview(segment).nbytes for segment in segments[1:4]) == 9000 * 8 + 9001 * 4 + len(
        "".join(texts[:9000])
    )
    assert len(segments[0]) < 5000
    [tree, column] = map(len, dumps(pl.DataFrame({"a": numbers})))
    assert column >= numbers.nbytes > OUT_OF_BAND > tree


def test_columns_are_read_where_they_lie() -> None:
    """S7: what is read shares the memory of the segments, of pandas and of Arrow."""
    numbers = np.arange(10_000.0)
    own: Any = [
        *map(bytearray, dumps([pd.DataFrame({"a": numbers, "b": numbers}), pa.table({"a": numbers})]))
    ]
    frame, table = loads(own)
    assert shared(own, frame["a"].to_numpy(), frame["b"].to_numpy(), table["a"].chunk(0).to_numpy())


def test_a_wide_frame_is_few_segments() -> None:
    """S7: the columns of one dtype are one buffer, however many they are."""
    wide = pd.DataFrame({f"c{at}": np.full(50, at, ["i8", "f8"][at % 2]) for at in range(500)})
    assert len(dumps(wide)) <= 4
    assert len(dumps(pl.DataFrame({"a": [1]}))) == len(dumps(pa.table({"a": [1]}))) == 1


def test_what_comes_back_is_writable_and_nobody_elses() -> None:
    """E1: every column of a frame may be changed, and neither the record nor another reading changes with it."""
    frame: Any = FRAMES[0].reset_index(drop=True)
    parts = [bytes(segment) for segment in dumps(frame)]
    makers: list[Any] = [bytes, bytearray]
    for make in makers:
        segments: Any = [make(part) for part in parts]
        back = loads(segments)
        for name in back:
            back.iloc[[0, 1], back.columns.get_loc(name)] = back[name].iloc[[1, 0]].array
            column = loads([make(part) for part in parts])[name]
            column.iloc[[0]] = column.iloc[[2]].array
            assert same_pandas(column.iloc[[0]].array, frame[name].iloc[[2]].array)
        assert same_pandas(loads(parts), frame)
        assert not same_pandas(back, frame)
    polars: Any = loads(dumps(pl.DataFrame({"a": [1, 2]})))
    polars[0, "a"] = 5
    assert polars["a"].to_list() == [5, 2]


def test_older_pandas_makes_the_same_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """S7: where pandas cannot be given blocks, the frame is made of its columns and is the same."""
    monkeypatch.setattr(_pandas, "_assemble", None)
    for frame in FRAMES:
        if type(frame) is pd.DataFrame:
            assert same_pandas(loads(dumps(frame)), frame)


@pytest.mark.parametrize(
    "values", [ARROW, POLARS, [*FRAMES, *INDEXES, *PANDAS_SCALARS]], ids=["arrow", "polars", "pandas"]
)
def test_mutated_tables_are_values_or_errors(values: list[Any]) -> None:
    """B19: with its digest forged, a table makes a value that can be used, or an error; the process lives on."""
    dice = random.Random(1)
    small = [segments for segments in map(dumps, values) if len(segments) == 1]
    for _ in range(1500):
        data = bytearray(dice.choice(small)[0])
        for _ in range(dice.randint(1, 3)):
            data[dice.randrange(len(data))] = dice.choice([0, 1, 127, 128, 255, dice.randrange(256)])
        try:
            value = loads([data])
        except SerializationError:
            continue
        if type(value).__module__.startswith("polars"):
            assert value.equals(value) in (True, False)
        elif type(value).__module__.startswith("pyarrow"):
            value.validate(full=True)


def plain(parts: Any) -> Any:
    """The parts as a reader gets them."""
    if isinstance(parts, list):
        return [plain(part) for part in parts]
    return bytes(parts.data) if isinstance(parts, Raw) else parts


def test_lengths_that_are_not_true_are_found() -> None:
    """B19: what polars, pandas or Arrow would follow out of their memory is an error before they see it."""
    here = Context(imports=False)
    length, [tag, _, nulls, buffers] = plain(_arrow.ARRAY.take(pa.array([1, 2])))
    for column in (
        [tag, 3, nulls, buffers],
        [tag, -1, nulls, buffers],
        [tag, 2, 1, buffers],
        [tag, 2, 0, [None, None]],
    ):
        with pytest.raises(Unreadable):
            _arrow.ARRAY.make([length, column], here)
    columns, index, [[places, values]], *beside = _pandas.FRAME.take(pd.DataFrame({"a": [1], "b": [2]}))
    for blocks in (
        [[np.array([0, 0]), values]],
        [[np.array([0, 2]), values]],
        [],
        [[places, ["numpy", values[1][:, :0]]]],
    ):
        with pytest.raises(Unreadable, match=r"blocks|shape"):
            _pandas.FRAME.make([columns, index, blocks, *beside], here)
    height, stream = plain(_polars.SERIES.take(pl.Series([1, 2, 3])))
    assert _polars.SERIES.make([height, stream], here).to_list() == [1, 2, 3]
    data = struct.pack("<qq", 0, 24)
    assert data in stream
    for other in (stream.replace(data, struct.pack("<qq", 0, 1 << 50)), stream[:-20], b"x" * 8 + stream):
        with pytest.raises((Unreadable, struct.error)):
            _polars.SERIES.make([height, other], here)
    with pytest.raises(Unreadable, match="height"):
        _polars.SERIES.make([4, stream], here)
    out = io.BytesIO()
    pl.DataFrame({"a": [1] * 10_000}).write_ipc_stream(out, compression="zstd")
    with pytest.raises(Unreadable, match="compressed"):
        _polars.FRAME.make([10_000, out.getvalue()], here)


def test_extension_types_of_others_are_not_read() -> None:
    """R3: a record that names a registered Arrow type is an error, and the type's code does not run."""
    pa.register_extension_type(Metres())
    try:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, pa.schema([("", pa.list_(Metres()))])):
            pass
        data: Any = sink.getvalue().to_pybytes()
        schema = pa.schema([("a", Metres())]).serialize().to_pybytes()
        with pytest.raises(UnreadableValueError, match="extension type"):
            loads([dumps_with(48, [schema, 0, [[]]])])
        with pytest.raises(UnreadableValueError, match="extension type"):
            loads(
                [
                    dumps_with(
                        50, [pa.schema([("", pa.list_(pa.int64()))]).serialize().to_pybytes(), [2, data]]
                    )
                ]
            )
    finally:
        pa.unregister_extension_type("onceflow.test.metres")


def dumps_with(code: int, parts: Any) -> bytes:
    """A record that somebody else has put together."""
    import msgpack

    packed: bytes = msgpack.packb(msgpack.ExtType(code, msgpack.packb(parts)))
    return packed


def test_a_missing_library_is_named() -> None:
    """R3: a record of a library that is not installed is an error that names the library."""
    records = [dumps(value)[0] for value in (pd.Series([1]), pl.Series([1]), pa.array([1]))]
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['pandas', 'polars', 'pyarrow']))\n"
        "from onceflow.storage._values.codec import loads\n"
        f"for record in {records!r}:\n"
        "    try: loads([record])\n"
        "    except Exception as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    for name, line in zip(("pandas", "polars", "pyarrow"), lines, strict=True):
        assert f"it holds {name} values, and {name} is not installed" in line


def golden_value() -> list[Any]:
    """What every version of these libraries makes the same."""
    return [
        pd.DataFrame(
            {"a": [1, 2], "b": [1.5, np.nan], "o": pd.Series(["x", (1, None)], dtype=object)},
            index=pd.date_range("2024-01-01", periods=2, freq="D", tz="Europe/Berlin", unit="ns", name="when"),
        ).assign(c=pd.Categorical(["x", None]), m=pd.array([1, None], "Int64"),
        s=pd.array(["y", None], "string[python]")),
        pd.Series([1, 2], pd.MultiIndex.from_tuples([(1, 2), (3, 4)], names=["k", None]), name="n"),
        pl.DataFrame({"a": [1, None], "b": ["x", "y"], "c": [[1], None]}),
        pl.Series("e", ["x", "y"], pl.Enum(["y", "x"])),
        pa.table({"a": [1, None], "t": ["x", "yz"], "n": [[1], None]}).replace_schema_metadata({"k": "v"}),
        pa.array(["a", "b", "a"]).dictionary_encode(),
    ]  # fmt: skip


def test_tables_written_by_the_first_version_are_read() -> None:
    """S7: a table once stored is readable for ever: this file is never written again."""
    back = loads([GOLDEN.read_bytes()])
    equalities = [same_pandas, same_pandas, same_polars, same_polars, same_arrow, same_arrow]
    assert all(same(*pair) for same, *pair in zip(equalities, back, golden_value(), strict=True))
