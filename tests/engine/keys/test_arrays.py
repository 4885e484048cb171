"""Arrays, frames and tables are keyed by type, dtype, shape and values, whatever their memory layout is."""

from __future__ import annotations

import datetime as dt
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onceflow.engine._errors import UncacheableInputError
from onceflow.engine._keys.digest import digest, is_heavy

RECORD = np.dtype([("a", "i4"), ("b", "f8")])
ALIGNED = np.dtype([("a", "i1"), ("b", "f8")], align=True)


def frame(**columns: Any) -> pd.DataFrame:
    return pd.DataFrame(columns or {"a": [1, 2], "b": ["x", "y"]})


def attributed(**attrs: Any) -> pd.DataFrame:
    made = frame()
    made.attrs.update(attrs)
    return made


DISTINCT: list[Callable[[], Any]] = [
    # numpy
    lambda: np.array([1, 2]),
    lambda: np.array([2, 1]),
    lambda: np.array([1, 2], "i4"),
    lambda: np.array([1, 2], ">i8"),
    lambda: np.array([1.0, 2.0]),
    lambda: np.array([[1, 2]]),
    lambda: np.array([[1], [2]]),
    lambda: np.array(1),
    lambda: np.array([1]),
    lambda: np.int64(1),
    lambda: np.int32(1),
    lambda: np.float64(1),
    lambda: np.float32(1),
    lambda: np.bool_(True),
    lambda: np.str_("a"),
    lambda: np.bytes_(b"a"),
    lambda: np.array([]),
    lambda: np.zeros((0, 3)),
    lambda: np.zeros((3, 0)),
    lambda: np.array(["a", "b"]),
    lambda: np.array([b"a", b"b"]),
    lambda: np.array(["a", 1], object),
    lambda: np.array(["a", "1"], object),
    lambda: np.array(["a", "b"], np.dtypes.StringDType()),
    lambda: np.array([True, False]),
    lambda: np.array([1j]),
    lambda: np.array([1], "f2"),
    lambda: np.array(["2024-01-01"], "M8[D]"),
    lambda: np.array(["2024-01-01"], "M8[ns]"),
    lambda: np.array([1], "m8[s]"),
    lambda: np.datetime64("2024-01-01"),
    lambda: np.datetime64("NaT", "D"),
    lambda: np.timedelta64(1, "s"),
    lambda: np.array([(1, 2.0)], RECORD),
    lambda: np.array([(1, 3.0)], RECORD),
    lambda: np.array([(1, 2.0)], [("a", "i4"), ("c", "f8")]),
    lambda: np.array([(1, 2.0)], ALIGNED),
    lambda: np.array([(1, 2.0)], RECORD).view(np.recarray),
    lambda: np.array([(1, 2.0)], RECORD)[0],
    lambda: np.ma.array([1, 2], mask=[False, True]),
    lambda: np.ma.array([1, 2], mask=[True, False]),
    lambda: np.ma.array([1, 2]),
    lambda: np.ma.array([1, 2], fill_value=7),
    lambda: np.dtype("i4"),
    lambda: np.dtype("i8"),
    lambda: RECORD,
    lambda: np.add,
    lambda: np.subtract,
    lambda: np.float64,
    lambda: np.array([0.0]),
    lambda: np.array([-0.0]),
    lambda: np.array([np.nan]),
    # pandas
    frame,
    lambda: frame(a=[1, 3], b=["x", "y"]),
    lambda: frame(a=[1, 2], c=["x", "y"]),
    lambda: frame(b=["x", "y"], a=[1, 2]),
    lambda: frame().set_index("a"),
    lambda: frame().set_index(["a", "b"]),
    lambda: frame().rename_axis("n"),
    lambda: frame().rename_axis(columns="n"),
    lambda: frame().astype({"a": "Int64"}),
    lambda: frame().astype({"a": "i4"}),
    lambda: frame().astype({"b": object}),
    lambda: frame().astype({"b": "category"}),
    lambda: frame().astype({"b": pd.CategoricalDtype(["x", "y", "z"])}),
    lambda: frame().astype({"b": pd.CategoricalDtype(["y", "x"])}),
    lambda: frame().astype({"b": pd.CategoricalDtype(["x", "y"], ordered=True)}),
    lambda: frame().astype({"a": "int64[pyarrow]"}),
    lambda: attributed(unit="m"),
    lambda: attributed(unit="km"),
    lambda: frame().set_index(pd.Index([5, 1])),
    lambda: frame().set_index(pd.Index([1, 5])),
    lambda: frame().iloc[:0],
    lambda: pd.DataFrame(),
    lambda: pd.DataFrame([[1, 2]], columns=["a", "a"]),
    lambda: pd.Series([1, 2]),
    lambda: pd.Series([1, 2], name="a"),
    lambda: pd.Series([1, 2], index=["a", "b"]),
    lambda: pd.Series([1, None]),
    lambda: pd.Series([1, None], dtype="Int64"),
    lambda: pd.Series([1, 0], dtype="Int64"),
    lambda: pd.Series([True, None], dtype="boolean"),
    lambda: pd.Series(["a", None]),
    lambda: pd.Series(["a", "None"]),
    lambda: pd.Series(["a", None], dtype="string"),
    lambda: pd.Series(["a", None], dtype=pd.ArrowDtype(pa.string())),
    lambda: pd.Series(["a", None], dtype=object),
    lambda: pd.Series([{"a": 1}, [1]], dtype=object),
    lambda: pd.Series(pd.to_datetime(["2024-01-01"])),
    lambda: pd.Series(pd.to_datetime(["2024-01-01"], utc=True)),
    lambda: pd.Series(pd.to_datetime(["2024-01-01"]).tz_localize("Europe/Berlin")),
    lambda: pd.Series(pd.to_timedelta(["1s"])),
    lambda: pd.Series(pd.period_range("2024-01", periods=2, freq="M")),
    lambda: pd.Series(pd.period_range("2024-01", periods=2, freq="D")),
    lambda: pd.Series(pd.interval_range(0, 2)),
    lambda: pd.Series(pd.interval_range(0, 2, closed="left")),
    lambda: pd.Series(pd.arrays.SparseArray([0, 1])),
    lambda: pd.Index([1, 2]),
    lambda: pd.Index([1, 2], name="a"),
    lambda: pd.RangeIndex(2),
    lambda: pd.RangeIndex(3),
    lambda: pd.MultiIndex.from_tuples([(1, "a"), (1, "b")]),
    lambda: pd.MultiIndex.from_tuples([(1, "a"), (1, "b")], names=["x", "y"]),
    lambda: pd.MultiIndex.from_tuples([(1, "a"), (1, "c")]),
    lambda: pd.date_range("2024", periods=2, freq="D"),
    lambda: pd.DatetimeIndex(["2024-01-01", "2024-01-02"]),
    lambda: pd.CategoricalIndex(["a", "b"]),
    lambda: pd.Categorical(["a", "b"]),
    lambda: pd.array([1, 2]),
    lambda: pd.Timestamp("2024-01-01"),
    lambda: pd.Timestamp("2024-01-01", tz="UTC"),
    lambda: pd.Timestamp("2024-01-01T00:00:00.000000001"),
    lambda: pd.Timedelta("1s"),
    lambda: pd.Period("2024-01"),
    lambda: pd.Period("2024-01-01"),
    lambda: pd.Interval(0, 1),
    lambda: pd.NA,
    lambda: pd.NaT,
    lambda: pd.offsets.MonthEnd(),
    lambda: pd.offsets.MonthEnd(2),
    lambda: pd.CategoricalDtype(["a"]),
    # pyarrow
    lambda: pa.array([1, 2]),
    lambda: pa.array([1, None]),
    lambda: pa.array([1, 0]),
    lambda: pa.array([1, 2], pa.int32()),
    lambda: pa.chunked_array([[1, 2]]),
    lambda: pa.array(["a", "bc"]),
    lambda: pa.array(["ab", "c"]),
    lambda: pa.array(["ab", None, "c"]),
    lambda: pa.array(["ab", "", "c"]),
    lambda: pa.array(["a", "bc"], pa.large_string()),
    lambda: pa.array([b"a", b"bc"]),
    lambda: pa.array([[1], [2, 3]]),
    lambda: pa.array([[1, 2], [3]]),
    lambda: pa.array([[1, 2], None, [3]]),
    lambda: pa.array([[1, 2], [], [3]]),
    lambda: pa.array([{"a": 1}]),
    lambda: pa.array([{"b": 1}]),
    lambda: pa.array([{"a": None}]),
    lambda: pa.array([None], pa.struct([("a", pa.int64())])),
    lambda: pa.array([True, None]),
    lambda: pa.array([True, False]),
    lambda: pa.array([dt.date(2024, 1, 1)]),
    lambda: pa.array([dt.datetime(2024, 1, 1)]),
    lambda: pa.array(["a", "b"]).dictionary_encode(),
    lambda: pa.array([None, None]),
    lambda: pa.array([None]),
    lambda: pa.table({"a": [1, 2]}),
    lambda: pa.table({"b": [1, 2]}),
    lambda: pa.table({"a": [1, 2]}).replace_schema_metadata({"k": "v"}),
    lambda: pa.record_batch({"a": [1, 2]}),
    lambda: pa.schema([("a", pa.int64())]),
    lambda: pa.schema([("a", pa.int32())]),
    lambda: pa.int64(),
    lambda: pa.field("a", pa.int64()),
    lambda: pa.field("a", pa.int64(), nullable=False),
    lambda: pa.scalar(1),
    lambda: pa.py_buffer(b"a"),
    lambda: pa.array([1, 2]).cast(pa.decimal128(20)),
    # polars
    lambda: pl.DataFrame({"a": [1, 2]}),
    lambda: pl.DataFrame({"a": [1, 3]}),
    lambda: pl.DataFrame({"b": [1, 2]}),
    lambda: pl.DataFrame({"a": ["1", "2"]}),
    lambda: pl.DataFrame({"a": [1, None]}),
    lambda: pl.DataFrame({"a": [[1], [2]]}),
    lambda: pl.DataFrame({"a": [{"x": 1}]}),
    lambda: pl.DataFrame({"a": [1, 2], "b": [1, 2]}),
    lambda: pl.DataFrame({"b": [1, 2], "a": [1, 2]}),
    lambda: pl.DataFrame(),
    lambda: pl.DataFrame(height=2),
    lambda: pl.Series("a", [1, 2]),
    lambda: pl.Series("b", [1, 2]),
    lambda: pl.Series("a", ["x", "y"], dtype=pl.Categorical),
    lambda: pl.Series("a", ["x", "y"], dtype=pl.Enum(["x", "y"])),
    lambda: pl.Series("a", ["x", "y"], dtype=pl.Enum(["y", "x"])),
    lambda: pl.Series("a", [dt.datetime(2024, 1, 1)]),
    lambda: pl.Series("a", [dt.datetime(2024, 1, 1)], dtype=pl.Datetime("ms")),
    lambda: pl.Series("a", [(1, 2)], dtype=pl.Object),
    lambda: pl.Int64,
    lambda: pl.Datetime("ms"),
    lambda: pl.Datetime("us"),
]


def test_distinct() -> None:
    """Type, dtype, shape, values, names, index, categories, nulls and metadata all count."""
    seen: dict[str, int] = {}
    for number, make in enumerate(DISTINCT):
        key = digest(make())
        assert key not in seen, f"{make()!r} and {DISTINCT[seen[key]]()!r}"
        assert digest(make()) == key, repr(make())
        seen[key] = number


@pytest.mark.parametrize("number", range(len(DISTINCT)))
def test_survives_pickling(number: int) -> None:
    """A copy that went through pickle, with other buffers, blocks and strides, has the same key."""
    value = DISTINCT[number]()
    try:
        copied = pickle.loads(pickle.dumps(value))
    except (pickle.PicklingError, TypeError, pl.exceptions.ComputeError):
        pytest.skip("has no pickle")
    if getattr(copied, "dtype", None) != getattr(value, "dtype", None):
        pytest.skip("numpy's pickles forget the byte order")
    assert digest(copied) == digest(value)


def test_numpy_layout() -> None:
    """Order, strides, offsets and alignment of an array do not matter, nor does what lies in padding."""
    array = np.arange(3_000_000.0).reshape(1000, 3000)
    key = digest(array)
    assert digest(np.asfortranarray(array)) == key
    assert digest(np.repeat(array, 2, axis=1)[:, ::2]) == key
    assert digest(array[::-1][::-1]) == key
    wide = np.arange(3_000_000.0).reshape(2, -1)
    assert digest(np.asfortranarray(wide)) == digest(wide)
    read_only = array.copy()
    read_only.flags.writeable = False
    assert digest(read_only) == key
    one, two = np.zeros(3, ALIGNED), np.frombuffer(b"\xff" * 48, ALIGNED).copy()
    for name in ("a", "b"):
        two[name] = one[name]
    assert one.tobytes() != two.tobytes()
    assert digest(one) == digest(two)
    assert digest(np.broadcast_to(np.int64(1), (5, 5))) == digest(np.ones((5, 5), np.int64))


def test_masked_values_do_not_count() -> None:
    """What lies under a mask, or under a null, is not a value."""
    assert digest(np.ma.array([1, 2], mask=[False, True])) == digest(np.ma.array([1, 3], mask=[False, True]))
    one, two = pd.array([1, None], dtype="Int64"), pd.array([1, 5], dtype="Int64")
    two[1] = pd.NA
    assert digest(one) == digest(two)
    buffers = [pa.py_buffer(b"\x01"), pa.py_buffer(np.array([1, 7]).tobytes())]
    assert digest(pa.Array.from_buffers(pa.int64(), 2, buffers)) == digest(pa.array([1, None]))


def test_pandas_layout() -> None:
    """Blocks, consolidation and how an index was made do not matter."""
    one = pd.DataFrame({"a": [1.0, 2.0], "b": [3.0, 4.0]})
    two = pd.DataFrame(np.array([[1.0, 3.0], [2.0, 4.0]]), columns=["a", "b"])
    three = pd.DataFrame({"a": [1.0, 2.0]})
    three["b"] = [3.0, 4.0]
    assert digest(one) == digest(two) == digest(three)
    whole = pd.DataFrame({"a": range(10), "b": list("abcdefghij"), "c": pd.Categorical(list("ababababab"))})
    assert digest(whole.iloc[2:4]) == digest(pickle.loads(pickle.dumps(whole.iloc[2:4])))
    tuples = pd.MultiIndex.from_tuples([(1, "a"), (2, "b")])
    assert digest(tuples) == digest(pd.MultiIndex.from_arrays([[1, 2], ["a", "b"]]))
    cut = pd.MultiIndex.from_tuples([(0, "z"), (1, "a"), (2, "b")])[1:]
    assert digest(cut) == digest(tuples)


ARROW = [
    ([1, None, 3, 4], pa.int64()),
    ([1.5, None, 2.5, 0.0], pa.float32()),
    (["a", None, "", "bcd"], pa.string()),
    ([b"a", None, b"", b"bcd"], pa.large_binary()),
    ([True, None, False, True], pa.bool_()),
    ([[1], None, [], [2, None]], pa.list_(pa.int64())),
    ([["a"], None, [], ["b", None]], pa.large_list(pa.string())),
    ([{"a": 1}, None, {"a": None}, {"a": 4}], pa.struct([("a", pa.int64())])),
    ([dt.date(2024, 1, 1), None, None, dt.date(1960, 1, 1)], pa.date32()),
    ([dt.datetime(2024, 1, 1), None, None, dt.datetime(1960, 1, 1)], pa.timestamp("us")),
    ([dt.timedelta(1), None, None, dt.timedelta(2)], pa.duration("ms")),
    ([dt.time(1), None, None, dt.time(2)], pa.time32("s")),
    ([None] * 4, pa.null()),
    ([b"ab", None, b"cd", b"ef"], pa.binary(2)),
    (["a", None, "a", "b"], pa.dictionary(pa.int32(), pa.string())),
]


@pytest.mark.parametrize(
    ("items", "kind"), ARROW, ids=lambda each: str(each) if isinstance(each, pa.DataType) else ""
)
def test_arrow_layout(items: list[Any], kind: pa.DataType) -> None:
    """Chunks, offsets and slices of Arrow arrays and tables do not matter."""
    whole = pa.array(items, kind)
    sliced = pa.array([items[3], items[3], *items, items[0]], kind).slice(2, 4)
    assert digest(sliced) == digest(whole)
    key = digest(pa.chunked_array([whole], kind))
    assert digest(pa.chunked_array([whole.slice(0, 1), whole.slice(1), whole.slice(4)], kind)) == key
    assert digest(pa.table({"a": pa.chunked_array([whole.slice(0, 3), whole.slice(3)])})) == digest(
        pa.table({"a": whole})
    )
    for at in range(4):
        changed = [*items[:at], items[0] if items[at] is None else None, *items[at + 1 :]]
        if kind != pa.null():
            assert digest(pa.array(changed, kind)) != digest(whole)


def test_polars_layout() -> None:
    """Chunks of polars columns do not matter."""
    one = pl.DataFrame({"a": [1, 2, None], "b": ["x", None, "z"]})
    two = pl.concat([one[:1], one[1:]], rechunk=False)
    assert two.n_chunks() == 2
    assert digest(one) == digest(two)


def test_refusals_have_a_path() -> None:
    """K20: what has no key in a column or an object array is refused with the path to it."""
    with pytest.raises(UncacheableInputError) as error:
        digest({"df": pd.DataFrame({"a": [1], "b": [iter(())]})}, path="x")
    assert (error.value.path, error.value.type_name) == ("x['df']['b'][0]", "tuple_iterator")
    with pytest.raises(UncacheableInputError) as error:
        digest(np.array([1, iter(())], object), path="x")
    assert error.value.path == "x[1]"
    with pytest.raises(UncacheableInputError, match="LazyFrame"):
        digest(pl.LazyFrame({"a": [1]}))
    with pytest.raises(UncacheableInputError, match="Generator"):
        digest(np.random.default_rng())


def test_own_key_comes_first() -> None:
    """A subclass of an array with a key of its own is keyed by that."""

    class Keyed(np.ndarray[Any, Any]):
        def __cache_key__(self) -> str:
            return "same"

    assert digest(np.zeros(2).view(Keyed)) == digest(np.ones(2).view(Keyed))


def test_heavy() -> None:
    """Large arrays and frames are heavy, small ones are not."""
    big = np.zeros(100_000)
    for heavy in (big, [big], pd.DataFrame({"a": big}), pd.Series(big), pa.array(big), pl.Series(big)):
        assert is_heavy(heavy)
    for light in (np.zeros(3), frame(), pa.array([1]), pl.Series([1]), np.float64(1), pd.Timestamp("2024")):
        assert not is_heavy(light)


arrays = hnp.arrays(
    hnp.scalar_dtypes() | hnp.array_dtypes(),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5),
)


@given(arrays, st.data())
def test_generated_arrays(array: np.ndarray[Any, Any], data: st.DataObject) -> None:
    """Copies in other layouts have equal keys; another dtype, shape or element gives another key."""
    key = digest(array)
    assert digest(np.asfortranarray(array) if array.ndim else array.copy()) == key
    assert digest(np.array(array, order="C", copy=True)) == key
    assert digest(array[np.newaxis]) != key
    if array.size and array.dtype.names is None and array.dtype.kind in "iu":
        changed = array.copy()
        changed[np.unravel_index(data.draw(st.integers(0, array.size - 1)), array.shape)] ^= 1
        assert digest(changed) != key
