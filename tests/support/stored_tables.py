"""Tables, columns and indexes of pandas, polars and pyarrow, and equalities that tell everything apart."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
from stored_values import same

ZONE = ZoneInfo("Europe/Berlin")
_words = pa.array(["a", None, "bcd", "", "ü"] * 20)
_nested = pa.array([{"a": [1, 2], "b": None}, None, {"a": [], "b": "x"}])
_meta = pa.schema(
    [pa.field("a", pa.int64(), nullable=False, metadata={"unit": "m"}), pa.field("b", pa.string())],
    metadata={"k": "v"},
)

ARROW: list[Any] = [
    pa.array([1, 2, None]), pa.array([1, 2]), pa.array([], pa.int8()), pa.array([True, None, False] * 9),
    pa.array([True] * 30)[3:20], pa.array([1, None] * 30)[5:], pa.array([1, None] * 30)[16:40],
    pa.array([1.5, None], pa.float16()), pa.array([Decimal("1.10"), None]), pa.array([None, None]),
    _words, _words[:7], _words[8:16], _words[9:90], _words[3:3], _words.cast(pa.large_string())[8:],
    _words.cast(pa.binary())[24:33], _words.cast(pa.string_view())[1:], pa.array(["", ""]),
    pa.array([b"ab", None], pa.binary(2)), pa.array([b""], pa.binary(0)), pa.array([None], pa.string()),
    pa.array([dt.date(2024, 1, 1), None]), pa.array([dt.time(1, 2)]), pa.array([dt.timedelta(1)]),
    pa.array([dt.datetime(2024, 1, 1)], pa.timestamp("ns", "Europe/Berlin")),
    pa.array([pa.scalar((1, 2, 3), pa.month_day_nano_interval())]),
    pa.array(["a", "b", None, "a"]).dictionary_encode(), pa.array(["a", "b", "a"]).dictionary_encode()[1:],
    pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int8()), pa.array([7, 8]), ordered=True),
    pa.DictionaryArray.from_arrays(pa.array([0, None]), _nested),
    _nested, _nested[1:], pa.array([[1], None, [2, 3]]), pa.array([[1, 2]], pa.list_(pa.int8(), 2)),
    pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())), pa.array([["x"], None], pa.list_(_words.type)),
    pa.UnionArray.from_dense(pa.array([0, 1], pa.int8()), pa.array([0, 0], pa.int32()), [pa.array([1]), _words]),
    pa.RunEndEncodedArray.from_arrays(pa.array([2, 5], pa.int32()), pa.array(["x", "y"])),
    pa.chunked_array([[1, 2], [], [3]]), pa.chunked_array([], pa.string()), pa.chunked_array([_words, _words[8:]]),
    pa.table({}), pa.table({"a": [1, 2]}).select([]), pa.table({"a": [1, 2], "b": ["x", None]}),
    pa.table([[1, 2], ["x", None]], schema=_meta), pa.table([[], []], schema=_meta),
    pa.table([pa.array([1]), pa.array([2])], names=["a", "a"]),
    pa.table({"a": pa.chunked_array([[1], [2, 3]]), "n": _nested, "d": _words[:3].dictionary_encode()}),
    pa.table({"a": np.arange(50_000), "b": [f"text {at}" for at in range(50_000)]})[100:40_000],
    pa.record_batch({"a": [1, 2], "n": [[1], None]}), pa.record_batch([[1], ["x"]], schema=_meta),
    pa.record_batch({"a": [1, 2]}).select([]),
]  # fmt: skip

_SERIES: list[Any] = [
    ([1, 2], pl.UInt8), ([2**100], pl.Int128), ([1.5, float("nan")], pl.Float32), ([b"a"], pl.Binary),
    ([Decimal("1.10")], pl.Decimal(20, 3)), (["x", None, "y", "x"], pl.Categorical),
    (["x", "y"], pl.Enum(["y", "x"])), ([], pl.Enum([])), ([None], pl.Null), ([[1, 2]], pl.Array(pl.Int8, 2)),
    ([["x"], ["y", "x"]], pl.List(pl.Categorical)), ([dt.date(2024, 1, 1)], pl.Date), ([], pl.List(pl.Null)),
    ([dt.datetime(2024, 1, 1)], pl.Datetime("ns", "Europe/Berlin")), ([dt.time(1)], pl.Time),
    ([dt.timedelta(1)], pl.Duration("ms")), ([{}], pl.Struct({})),
]  # fmt: skip

POLARS: list[Any] = [
    pl.DataFrame(), pl.DataFrame(height=2), pl.DataFrame({"a": [1, None], "b": ["x", "ü"]}),
    pl.DataFrame({"a": []}, schema={"a": pl.Int8}), pl.DataFrame({"": [True], " ": [None]}),
    pl.DataFrame({"a": range(9)})[2:5], pl.DataFrame({"a": np.arange(50_000.0), "b": ["text"] * 50_000}),
    pl.concat([pl.DataFrame({"a": [1, 2]}), pl.DataFrame({"a": [3]})], rechunk=False),
    pl.DataFrame({"a": [[1], None], "s": [{"x": [1], "y": "b"}, None]}),
    *[pl.Series("a", *parts) for parts in _SERIES],
]  # fmt: skip

_dates = pd.date_range("2024-03-30", periods=4, freq="D", tz=ZONE)
_pairs = pd.MultiIndex.from_tuples([(1, "a"), (1, "b"), (2, "a")], names=["x", None])
_frame = pd.DataFrame(
    {
        "i": [1, 2, 3], "f": [1.5, np.nan, -0.0], "j": [4, 5, 6], "b": [True, False, True], "t": ["x", None, "ü"],
        "o": [None, (1, [2]), {"a": np.nan}], "d": pd.to_datetime(["2024-01-01", None, "2024-01-02"]),
        "z": _dates[:3], "c": pd.Categorical(["x", None, "y"], ["y", "x", "z"], ordered=True), "y": _dates[1:],
        "I": pd.array([1, None, 3], "Int32"), "F": pd.array([1.5, None, 3], "Float64"),
        "B": pd.array([True, None, False], "boolean"), "S": pd.array(["a", None, "b"], "string"),
        "P": pd.array(["a", None, "b"], "string[python]"), "p": pd.period_range("2024-01", periods=3, freq="M"),
        "v": pd.interval_range(0, 3, closed="left"), "l": pd.to_timedelta(["1s", None, "2D"]),
        "A": pd.array([[1], None, [2, 3]], pd.ArrowDtype(pa.list_(pa.int64()))), "m": np.array([1, 2, 3], "i2"),
    },
    index=_pairs,
)  # fmt: skip
_attributed = pd.DataFrame({"a": [1]}).set_flags(allows_duplicate_labels=False)
_attributed.attrs = {"unit": ("m", {1: 2})}

FRAMES: list[Any] = [
    _frame, _frame.iloc[::2], _frame[["i", "o"]].iloc[1:], _frame.reset_index(), _frame.iloc[:0], _attributed,
    pd.DataFrame(), pd.DataFrame(index=[1, 2]), pd.DataFrame(columns=["a", "b"]),
    pd.DataFrame([[1, 2.5]], columns=["a", "a"]),
    pd.DataFrame(np.arange(12).reshape(4, 3)), pd.DataFrame(np.asfortranarray(np.ones((300, 30)))),
    pd.DataFrame({1: [1], "1": [2], (1, 2): [3], None: [4]}), pd.DataFrame({"a": [1, 2]}, index=_dates[:2]),
    pd.DataFrame([[1, 2, 3]], columns=_pairs), pd.DataFrame({"a": [1j], "h": np.array([1], "f2")}),
    pd.DataFrame({"a": [1]}).rename_axis(index="n", columns=[("x", 1)]),
    pd.DataFrame({f"c{at}": np.full(20, at, ["i8", "f4", bool][at % 3]) for at in range(300)}),
    pd.DataFrame({"a": np.arange(50_000), "b": ["text"] * 50_000, "c": np.arange(50_000.0)}),
    pd.DataFrame({"a": [1, 2]}).astype({"a": "category"}), pd.DataFrame({"a": [pd.NA, pd.NaT, np.float32(1)]}),
    pd.DataFrame({"a": ["x", np.nan, None]}, dtype=object), pd.DataFrame({"a": np.array(["2024"], "M8[s]")}),
    *[_frame[name] for name in _frame], *[_frame[name].array for name in _frame if name not in "ifjboAm"],
    pd.Series([1, 2]), pd.Series([], dtype=object), pd.Series([1], name=("a", 1)),
    pd.Series(["a", "b"], index=["x", "y"]),
    pd.Series(_dates), pd.Series([1.0]).set_flags(allows_duplicate_labels=False), pd.Series(pd.Timestamp("2024")),
    pd.Series([pd.Timestamp("2024-01-01"), Decimal("1.1"), pd.Interval(0, 1), pd.Period("2024", "Y"),
    pd.Timedelta("1s")], dtype=object),
    pd.Series(pd.Categorical([1.5, None])), pd.Series(pd.Categorical(_dates)), pd.array([1, 2]), pd.array([], "string"),
]  # fmt: skip

INDEXES: list[Any] = [
    pd.RangeIndex(3), pd.RangeIndex(9, 0, -2, name="n"), pd.Index([1, 5]), pd.Index([1.5], name=("a",)), pd.Index([]),
    pd.Index(["a", "b"]), pd.Index(["a", None], dtype=object), pd.Index([(1, 2), (3,)], tupleize_cols=False),
    pd.Index([True, False]), pd.Index([1, 2], dtype="u1"), pd.Index([1, None], dtype="Int64"), pd.Index([1, "a", None]),
    pd.Index(["a", "b"], dtype="string"), pd.Index(["a"], dtype="string[python]"),
    pd.Index([1], dtype="int64[pyarrow]"),
    _dates, _dates[[0, 2]], _dates[::2], pd.date_range("2024", periods=3, freq="MS", name="m"), pd.DatetimeIndex([]),
    pd.date_range("2024", periods=0, freq="h"), pd.date_range("2024", periods=5, freq="B"),
    pd.DatetimeIndex(["2024", None]),
    pd.date_range("2024", periods=3, freq="15min", unit="s"), pd.date_range("2024", periods=3, freq="W-MON", tz="UTC"),
    pd.DatetimeIndex(["2024-10-27 02:30"] * 2).tz_localize(ZONE, ambiguous=np.array([True, False])),
    pd.timedelta_range("1s", periods=3, freq="2s"), pd.to_timedelta(["1s", None]),
    pd.period_range("2024", periods=3, freq="Q"),
    pd.interval_range(0, 3), pd.IntervalIndex.from_tuples([(0.0, 1.5), None], closed="both"),
    pd.interval_range(pd.Timestamp("2024"), periods=2),
    pd.CategoricalIndex(["a", "b", "a"], ["b", "a"], ordered=True, name="c"), pd.CategoricalIndex([]),
    _pairs, _pairs[:0], _pairs[[0, 2]], _pairs.set_names([None, None]),
    pd.MultiIndex.from_arrays([[1, None], _dates[:2]]),
    pd.MultiIndex.from_product([_dates, ["a"]]), pd.MultiIndex.from_arrays([pd.CategoricalIndex(["a"]), [1]]),
]  # fmt: skip

PANDAS_SCALARS: list[Any] = [
    pd.NA, pd.NaT, pd.Timestamp("2024"), pd.Timestamp("2024-10-26 02:30", tz=ZONE),
    pd.Timestamp(2**62, unit="ns", tz="UTC"),
    pd.Timestamp("2024-10-27 00:30", tz="UTC").tz_convert(ZONE),
    pd.Timestamp("2024-10-27 01:30", tz="UTC").tz_convert(ZONE),
    pd.Timestamp("2024").as_unit("s"), pd.Timedelta("1s"), pd.Timedelta(5, "ns"), pd.Timedelta("1D").as_unit("ms"),
    pd.Period("2024-01", "M"), pd.Period("2024", "W-TUE"), pd.Interval(0, 1.5, "neither"),
    pd.Interval(pd.Timestamp("2024"), pd.Timestamp("2025")),
]  # fmt: skip


def same_arrow(a: Any, b: Any) -> bool:
    """Whether two Arrow values are of one type, metadata included, and equal chunk for chunk."""
    if type(a) is not type(b):
        return False
    if isinstance(a, pa.Table | pa.RecordBatch):
        if not a.schema.equals(b.schema, check_metadata=True) or a.num_rows != b.num_rows:
            return False
        return all(map(same_arrow, a.columns, b.columns))
    if isinstance(a, pa.ChunkedArray):
        return bool(a.type == b.type) and [*map(len, a.chunks)] == [*map(len, b.chunks)] and _equal(a, b)
    return bool(a.type == b.type) and _equal(a, b)


def _equal(a: Any, b: Any) -> bool:
    return bool(a.equals(b)) or a.to_pylist() == b.to_pylist()  # NaN, and unions with nulls


def same_polars(a: Any, b: Any) -> bool:
    """Whether two polars values have the same schema, names and elements."""
    if type(a) is not type(b):
        return False
    if isinstance(a, pl.Series):
        return (
            a.name == b.name
            and a.dtype == b.dtype
            and repr(a.dtype) == repr(b.dtype)
            and a.equals(b, check_dtypes=True)
        )
    return repr(a.schema) == repr(b.schema) and a.shape == b.shape and a.equals(b)


def same_pandas(a: Any, b: Any) -> bool:
    """Whether two pandas values are the same in all that shows, down to the types of elements."""
    if type(a) is not type(b):
        return False
    if isinstance(a, pd.DataFrame):
        if not (_same_beside(a, b) and same_pandas(a.index, b.index) and same_pandas(a.columns, b.columns)):
            return False
        return all(same_pandas(a.iloc[:, at].array, b.iloc[:, at].array) for at in range(a.shape[1]))
    if isinstance(a, pd.Series):
        return (
            _same_beside(a, b) and same(a.name, b.name)
            and same_pandas(a.index, b.index) and same_pandas(a.array, b.array)
        )  # fmt: skip
    if isinstance(a, pd.MultiIndex):
        return (
            same([*a.names], [*b.names]) and a.sortorder == b.sortorder
            and all(map(same_pandas, a.levels, b.levels))
            and same([np.asarray(each) for each in a.codes], [np.asarray(each) for each in b.codes])
        )  # fmt: skip
    if isinstance(a, pd.Index):
        return (
            same(a.name, b.name) and same_pandas(a.array, b.array)
            and repr(getattr(a, "freq", None)) == repr(getattr(b, "freq", None))
            and (not isinstance(a, pd.RangeIndex) or (a.start, a.stop, a.step) == (b.start, b.stop, b.step))
        )  # fmt: skip
    if isinstance(a, pd.api.extensions.ExtensionArray):
        return _same_array(a, b)
    if a is pd.NA or a is pd.NaT:
        return a is b
    parts = ("tz", "unit", "fold", "freq", "closed")
    return bool(a == b) and all(repr(getattr(a, name, 0)) == repr(getattr(b, name, 0)) for name in parts)


def _same_beside(a: Any, b: Any) -> bool:
    return same(a.attrs, b.attrs) and a.flags.allows_duplicate_labels == b.flags.allows_duplicate_labels


def _same_array(a: Any, b: Any) -> bool:
    if a.dtype != b.dtype or repr(a.dtype) != repr(b.dtype) or len(a) != len(b):
        return False
    if isinstance(a, pd.Categorical):
        return same_pandas(a.categories, b.categories) and same(np.asarray(a.codes), np.asarray(b.codes))
    if a.dtype == object:
        return all(map(_same_element, a, b))
    plain: Any = getattr(a.dtype, "kind", "O") in "biufcmM" and isinstance(a.dtype, np.dtype)
    if plain:
        return same(np.asarray(a), np.asarray(b))
    return all(map(_same_element, a.astype(object), b.astype(object)))


def _same_element(a: Any, b: Any) -> bool:
    return same_pandas(a, b) if type(a).__module__.startswith("pandas") else same(a, b)
