"""pandas frames, series, indexes, arrays and scalars, by their parts. Imported only when pandas is, or a record
needs it.

A frame goes by its blocks, so that all columns of one dtype are one buffer however many they are; dates are
numbers, categories are codes and an index, text is Arrow's (see `arrow`) or a list, and columns of objects are
lists whose elements the codec carries or refuses. Subclasses, sparse arrays, arrays and frequencies of other
packages, and time zones that are neither `timezone` nor `ZoneInfo` are refused and left to pickle.

Nothing of what was read is trusted: every part is given to a constructor that checks it, or checked here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from pandas.api import internals
from pandas.tseries.frequencies import to_offset

from .kinds import Context, Kind, Unreadable, Unsupported, is_a

_ext: Any = pd.arrays
_MASKED = {cls.__name__: cls for cls in (_ext.IntegerArray, _ext.FloatingArray, _ext.BooleanArray)}
_TIMES: dict[str, Any] = {cls.__name__: cls for cls in (pd.DatetimeIndex, pd.TimedeltaIndex)}
_INDEXES: dict[str, Any] = {
    cls.__name__: cls for cls in (pd.Index, pd.PeriodIndex, pd.CategoricalIndex, pd.IntervalIndex)
}
_assemble: Any = getattr(internals, "create_dataframe_from_blocks", None)  # since pandas 3


def kind_of(value: object) -> Kind | None:
    """The kind that serves a pandas value, None for what is refused by its type."""
    cls = type(value)
    if cls is pd.DataFrame:
        return FRAME
    if cls is pd.Series:
        return SERIES
    if cls in (pd.RangeIndex, pd.MultiIndex, *_TIMES.values(), *_INDEXES.values()):
        return INDEX
    if isinstance(value, pd.api.extensions.ExtensionArray):
        return ARRAY
    return SCALAR if cls in _SCALARS or value is pd.NA or value is pd.NaT else None


# --- arrays -------------------------------------------------------------------------------------------------


def _take_values(values: Any) -> list[Any]:
    """The parts of an array: the first says which they are."""
    cls = type(values)
    if cls is _ext.NumpyExtensionArray:
        values, cls = values.to_numpy(), np.ndarray
    if cls is np.ndarray:
        if values.dtype == object:
            return ["object", list(values.shape), values.ravel().tolist()]
        return ["numpy", values]
    if cls is _ext.DatetimeArray:
        return ["datetime", values._ndarray, getattr(values.dtype, "tz", None)]
    if cls is _ext.TimedeltaArray:
        return ["timedelta", values._ndarray]
    if cls is pd.Categorical:
        return ["categorical", values.codes, values.categories, values.ordered]
    if _MASKED.get(cls.__name__) is cls:
        return ["masked", cls.__name__, values._data, values._mask]
    if cls is _ext.PeriodArray:
        return ["period", values.asi8, _period(values.freq, values.freqstr)]
    if cls is _ext.IntervalArray:
        return ["interval", values.left, values.right, values.closed]
    if cls is _ext.ArrowExtensionArray:
        return ["arrow", values._pa_array]
    if isinstance(values.dtype, pd.StringDtype) and cls is values.dtype.construct_array_type():
        return _take_text(values, values.dtype)
    raise is_a(values)


def _take_text(values: Any, dtype: Any) -> list[Any]:
    missing = getattr(dtype, "na_value", pd.NA) is not pd.NA
    if dtype.storage == "python":
        return ["text", "python", missing, values.to_numpy(object).tolist()]
    return ["text", dtype.storage, missing, values._pa_array]


def _freq(offset: Any) -> str:
    text = offset.freqstr
    try:
        again = to_offset(text)
    except ValueError:
        again = None
    if again != offset or type(again) is not type(offset):
        raise Unsupported(f"has the frequency {offset!r}")
    return str(text)


def _period(offset: Any, text: str) -> str:
    again = pd.PeriodDtype(text).freq  # the same letters mean another offset here
    if again != offset or type(again) is not type(offset):
        raise Unsupported(f"has the period {offset!r}")
    return text


def _objects(items: list[Any], shape: list[int]) -> Any:
    return np.fromiter(items, object, len(items)).reshape(shape)


def _make_values(parts: Any) -> Any:
    tag, *rest = parts
    return _MAKERS[tag](*rest)


def _make_datetimes(naive: Any, zone: Any) -> Any:
    if zone is None:
        return pd.DatetimeIndex(naive, copy=False).array
    return pd.DatetimeIndex(naive, copy=False).tz_localize("UTC").tz_convert(zone).array


def _make_categorical(codes: Any, categories: Any, ordered: bool) -> Any:
    return pd.Categorical.from_codes(codes, dtype=pd.CategoricalDtype(categories, ordered))


def _make_text(storage: str, missing: bool, content: Any) -> Any:
    # A pandas before 2.3 knows only the one missing value, and its own names for the storage.
    dtype: Any = pd.StringDtype(storage, na_value=np.nan) if missing else pd.StringDtype(storage)
    if storage != "python":
        return dtype.__from_arrow__(content)
    return dtype.construct_array_type()._from_sequence(_objects(content, [len(content)]), dtype=dtype)


_MAKERS: dict[str, Any] = {
    "object": lambda shape, items: _objects(items, shape),
    "numpy": lambda values: values,
    "datetime": _make_datetimes,
    "timedelta": lambda values: pd.TimedeltaIndex(values, copy=False).array,
    "categorical": _make_categorical,
    "masked": lambda name, data, mask: _MASKED[name](data, mask),
    "period": lambda ordinals, freq: pd.PeriodIndex.from_ordinals(ordinals, freq=freq).array,
    "interval": lambda left, right, closed: _ext.IntervalArray.from_arrays(left, right, closed),
    "arrow": lambda content: _ext.ArrowExtensionArray(content),
    "text": _make_text,
}


def _take_array(array: Any) -> list[Any]:
    if type(array) is _ext.NumpyExtensionArray or getattr(array, "ndim", 1) != 1:
        raise is_a(array)
    if type(array) in (_ext.DatetimeArray, _ext.TimedeltaArray) and getattr(array, "freq", None) is not None:
        raise Unsupported(f"is a {type(array).__name__} with a frequency")
    return _take_values(array)


# --- indexes ------------------------------------------------------------------------------------------------


def _take_index(index: Any) -> list[Any]:
    name = type(index).__name__
    if type(index) is pd.RangeIndex:
        return [name, index.name, index.start, index.stop, index.step]
    if type(index) is pd.MultiIndex:
        codes = [np.asarray(each) for each in index.codes]
        return [name, list(index.names), list(index.levels), codes, index.sortorder]
    parts = _take_values(index.array)
    if name in _TIMES:
        return [name, index.name, parts, index.freq if index.freq is None else _freq(index.freq)]
    return [name, index.name, parts]


def _make_index(parts: Any, _: Context) -> Any:
    kind, name, *rest = parts
    if kind == "RangeIndex":
        return pd.RangeIndex(*rest, name=name)
    if kind == "MultiIndex":
        levels, codes, sortorder = rest
        return pd.MultiIndex(levels, codes, sortorder, names=name)
    values = _make_values(rest[0])
    if kind in _TIMES:
        made = _TIMES[kind](values, name=name, freq=rest[1], copy=False)
    elif kind == "Index":
        made = pd.Index(values, dtype=values.dtype, name=name, copy=False, tupleize_cols=False)
    else:
        made = _INDEXES[kind](values, name=name, copy=False)
    if type(made).__name__ != kind:
        raise Unreadable(f"it holds a {kind} that has become a {type(made).__name__}")
    return made


# --- frames and series --------------------------------------------------------------------------------------


def _take_series(series: Any) -> list[Any]:
    return [series.name, _take_values(series.array), series.index, *_beside(series)]


def _make_series(parts: Any, _: Context) -> Any:
    name, values, index, *beside = parts
    made = _make_values(values)
    return _put_beside(pd.Series(made, index, made.dtype, name, copy=False), *beside)


def _beside(value: Any) -> list[Any]:
    return [value.attrs, value.flags.allows_duplicate_labels]


def _put_beside(made: Any, attrs: dict[Any, Any], duplicates: bool) -> Any:
    if attrs:
        made.attrs = attrs
    if not duplicates:
        made.flags.allows_duplicate_labels = False
    return made


def _take_frame(frame: Any) -> list[Any]:
    blocks: list[Any] = []
    for block in getattr(frame, "_mgr").blocks:  # noqa: B009 - there is no public way to the blocks
        places, values = block.mgr_locs.as_array, block.values
        if values.ndim == 2 and type(values) is not np.ndarray:
            blocks += [[places[at : at + 1], _take_values(values[at])] for at in range(len(places))]
        else:
            blocks.append([places, _take_values(values)])
    return [frame.columns, frame.index, blocks, *_beside(frame)]


def _make_frame(parts: Any, _: Context) -> Any:
    columns, index, blocks, *beside = parts
    made = [(_make_values(values), places) for places, values in blocks]
    taken = np.concatenate([places for _, places in made]) if made else np.arange(0)
    if not np.array_equal(np.sort(taken), np.arange(len(columns))):
        raise Unreadable("it holds a frame whose blocks are not those of its columns")
    for values, places in made:
        shape = (len(places), len(index)) if type(values) is np.ndarray else (len(index),)
        if values.shape != shape or (len(shape) == 1 and len(places) != 1):
            raise Unreadable("it holds a frame with a block of another shape")
    frame = _assemble(made, index, columns) if _assemble else _from_columns(made, index, columns)
    return _put_beside(frame, *beside)


def _from_columns(blocks: list[Any], index: Any, columns: Any) -> Any:
    """The same frame, with a block for each column: by what older versions of pandas have."""
    found: dict[int, Any] = {}
    for values, places in blocks:
        for at, place in enumerate(places.tolist()):
            found[place] = values[at] if type(values) is np.ndarray else values
    content: Any = {
        at: pd.Series(found[at], index, found[at].dtype, copy=False) for at in range(len(columns))
    }
    frame = pd.DataFrame(content, index=index, copy=False)
    frame.columns = columns
    return frame


# --- scalars ------------------------------------------------------------------------------------------------


def _take_scalar(value: Any) -> list[Any]:
    cls = type(value)
    if cls is pd.Timestamp:
        if value.fold and value.tz is None:
            raise Unsupported("is a Timestamp with a fold and no time zone")
        return ["Timestamp", value.asm8, value.tz]
    if cls is pd.Timedelta:
        return ["Timedelta", value.asm8]
    if cls is pd.Period:
        return ["Period", value.ordinal, _period(value.freq, value.freqstr)]
    if cls is pd.Interval:
        return ["Interval", value.left, value.right, value.closed]
    return ["NaT"] if value is pd.NaT else ["NA"]


def _make_scalar(parts: Any, _: Context) -> Any:
    cls, *rest = parts
    if cls == "Timestamp":
        when = pd.Timestamp(rest[0])
        return when if rest[1] is None else when.tz_localize("UTC").tz_convert(rest[1])
    if cls == "Timedelta":
        return pd.Timedelta(rest[0])
    if cls == "Period":
        return pd.Period(ordinal=rest[0], freq=rest[1])
    if cls == "Interval":
        return pd.Interval(*rest)
    return {"NaT": pd.NaT, "NA": pd.NA}[cls]


def _locate(_: Any, steps: list[str]) -> list[str]:
    return [" (an element of it)"]  # the path within the parts would say nothing


_SCALARS = (pd.Timestamp, pd.Timedelta, pd.Period, pd.Interval)
FRAME = Kind(64, "frame", _take_frame, _make_frame, _locate)
SERIES = Kind(65, "series", _take_series, _make_series, _locate)
INDEX = Kind(66, "index", _take_index, _make_index, _locate)
ARRAY = Kind(67, "pandasarray", _take_array, lambda parts, _: _make_values(parts), _locate)
SCALAR = Kind(68, "pandasscalar", _take_scalar, _make_scalar)
KINDS = (FRAME, SERIES, INDEX, ARRAY, SCALAR)
