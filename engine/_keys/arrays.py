"""How numpy arrays and pandas frames are encoded. The libraries are imported only if a value is theirs.

By type, dtype, shape and values, never by memory layout: order, strides, offsets, chunks, blocks and what
lies under a mask or in padding do not count. Names, indexes, categories and `attrs` do. Numbers count bit for
bit.

Buffers are hashed in place where they are contiguous, otherwise copied piece by piece.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

from .encoding import Encoder, Handler, finds
from .names import module_name, type_name

_PIECE = 1 << 20


def root_in(kind: type, library: str) -> type | None:
    """The first class in the ancestry of `kind` that the library itself defines."""
    if library not in sys.modules:
        return None
    return next((base for base in kind.__mro__ if module_name(base).partition(".")[0] == library), None)


def node_of(encode: Encoder, name: str, parts: list[bytes]) -> bytes:
    """A node that is all content: encodings, one after the other."""
    return encode.state(name, b"".join(parts), {})


# --- numpy


@finds
def _numpy(kind: type) -> Handler | None:
    if root_in(kind, "numpy") is None:
        return None
    import numpy as np

    if issubclass(kind, np.ma.MaskedArray):
        return _masked
    if issubclass(kind, np.ndarray):
        return _array
    if issubclass(kind, np.generic):
        return _numpy_scalar
    if issubclass(kind, np.dtype):
        return lambda encode, value: node_of(encode, "numpy.dtype", [_dtype(encode, value)])
    if kind is np.ufunc:
        return lambda encode, value: encode.named(b"@", f"numpy.{value.__name__}")
    return None


def _dtype(encode: Encoder, dtype: Any) -> bytes:
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return _dtype(encode, base) + encode(shape)
    if dtype.names is None:
        name = dtype.str if dtype.kind != "T" else str(dtype)
        return encode(name) + encode(dict(dtype.metadata) if dtype.metadata else None)
    fields = [
        encode(name) + encode(dtype.fields[name][1]) + _dtype(encode, dtype.fields[name][0])
        for name in dtype.names
    ]
    return encode((dtype.itemsize, len(fields))) + b"".join(fields)


def _array(encode: Encoder, value: Any) -> bytes:
    import numpy as np

    plain = np.asarray(value)
    extra = vars(value) if type(value) is not np.ndarray and hasattr(value, "__dict__") else {}
    head = _dtype(encode, plain.dtype) + encode(plain.shape)
    return encode.state(type_name(type(value)), head + _values(encode, plain), extra)


def _values(encode: Encoder, array: Any) -> bytes:
    """The elements in C order."""
    if array.dtype.names is not None:  # field by field: what lies between them is not a value
        return b"".join(_values(encode, array[name]) for name in array.dtype.names)
    if array.dtype.hasobject or array.dtype.kind == "T":
        return encode.sequence(b"l", array.ravel().tolist())
    node = sha256()
    for piece in _pieces(array):
        node.update(piece)
    return node.digest()


def _pieces(array: Any) -> Iterator[Any]:
    """The array as contiguous buffers, without a copy of the whole."""
    import numpy as np

    if array.size == 0:
        return
    if array.flags.c_contiguous or array.nbytes <= _PIECE or array.ndim == 0:
        # As bytes: datetimes, texts and half-precision floats have no buffer format that hashlib takes.
        yield np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        return
    row = array.nbytes // len(array)
    if row > _PIECE:
        for part in array:
            yield from _pieces(part)
        return
    step = max(1, _PIECE // max(1, row))
    for start in range(0, len(array), step):
        yield np.ascontiguousarray(array[start : start + step]).reshape(-1).view(np.uint8)


def _masked(encode: Encoder, value: Any) -> bytes:
    import numpy as np

    mask = np.ma.getmaskarray(value)
    shown = np.array(value.data, copy=True)
    shown[mask] = np.zeros((), shown.dtype)
    return node_of(
        encode,
        type_name(type(value)),
        [encode(shown), encode(mask), encode.within(".fill_value", value.fill_value)],
    )


def _numpy_scalar(encode: Encoder, value: Any) -> bytes:
    import numpy as np

    array = np.asarray(value)
    return node_of(encode, type_name(type(value)), [_dtype(encode, array.dtype), _values(encode, array)])


# --- pandas


@finds
def _pandas(kind: type) -> Handler | None:
    if root_in(kind, "pandas") is None:
        return None
    import pandas as pd

    for base, handler in (
        (pd.DataFrame, _frame),
        (pd.Series, _series),
        (pd.MultiIndex, _multi_index),
        (pd.RangeIndex, _range_index),
        (pd.Index, _index),
        (pd.api.extensions.ExtensionArray, _column_alone),
        ((pd.api.extensions.ExtensionDtype, pd.offsets.BaseOffset), _by_repr),
        ((pd.Timestamp, pd.Timedelta), _instant),
        (pd.Period, lambda encode, value: encode.node("pandas.Period", ("", (value.ordinal, value.freqstr)))),
        (pd.Interval, _interval),
        (type(pd.NA), lambda encode, value: encode.named(b"@", "pandas.NA")),
        (type(pd.NaT), lambda encode, value: encode.named(b"@", "pandas.NaT")),
    ):
        if issubclass(kind, base):
            return handler
    return None


def _by_repr(encode: Encoder, value: Any) -> bytes:
    return node_of(encode, type_name(type(value)), [encode(repr(value))])


def _interval(encode: Encoder, value: Any) -> bytes:
    return encode.node("pandas.Interval", (".left", value.left), (".right", value.right), ("", value.closed))


def _instant(encode: Encoder, value: Any) -> bytes:
    zone = encode.within(".tzinfo", getattr(value, "tzinfo", None))
    return node_of(encode, type_name(type(value)), [encode(value._value), encode(value.unit), zone])


def _extras(value: Any) -> dict[str, Any]:
    """What a subclass of a frame or series says it carries along."""
    names = getattr(type(value), "_metadata", [])
    return {name: getattr(value, name, None) for name in names if name not in ("_name", "name")}


def _frame(encode: Encoder, value: Any) -> bytes:
    parts = [
        encode(dict(value.attrs)),
        encode.within(".columns", value.columns),
        encode.within(".index", value.index),
    ]
    for at in range(value.shape[1]):
        column = value._ixs(at, axis=1) if hasattr(value, "_ixs") else value.iloc[:, at]
        parts.append(_member(encode, f"[{value.columns[at]!r}]", column.array))
    return encode.state(type_name(type(value)), b"".join(parts), _extras(value))


def _series(encode: Encoder, value: Any) -> bytes:
    parts = [
        encode(dict(value.attrs)),
        encode.within(".name", value.name),
        encode.within(".index", value.index),
        _member(encode, "", value.array),
    ]
    return encode.state(type_name(type(value)), b"".join(parts), _extras(value))


def _member(encode: Encoder, step: str, array: Any) -> bytes:
    from .encoding import RefusedError

    try:
        return _column(encode, array)
    except RefusedError as error:
        error.trail.append(step)
        raise


def _multi_index(encode: Encoder, value: Any) -> bytes:
    levels = [_column(encode, value.get_level_values(at).array) for at in range(value.nlevels)]
    return node_of(encode, type_name(type(value)), [encode(list(value.names)), encode(len(value)), *levels])


def _range_index(encode: Encoder, value: Any) -> bytes:
    return node_of(
        encode, type_name(type(value)), [encode((value.start, value.stop, value.step)), encode(value.name)]
    )


def _index(encode: Encoder, value: Any) -> bytes:
    return node_of(
        encode,
        type_name(type(value)),
        [encode(value.name), encode(getattr(value, "freqstr", None)), _column(encode, value.array)],
    )


def _column_alone(encode: Encoder, array: Any) -> bytes:
    return node_of(encode, type_name(type(array)), [_column(encode, array)])


def _column(encode: Encoder, array: Any) -> bytes:
    """The values of a pandas array, with its dtype."""
    import numpy as np
    import pandas as pd

    kind, dtype = type(array).__name__, encode(repr(array.dtype)) + encode(len(array))
    if isinstance(array, pd.Categorical):
        return dtype + encode(array.categories) + encode(array.ordered) + encode(np.asarray(array.codes))
    if hasattr(array, "_pa_array") or "Arrow" in kind:
        return dtype + encode(array.__arrow_array__())
    if kind in ("NumpyExtensionArray", "PandasArray"):
        return dtype + encode(array.to_numpy())
    if hasattr(array, "_mask") and hasattr(array, "_data"):
        data = array._data.copy()
        data[array._mask] = np.zeros((), data.dtype)
        return dtype + encode(data) + encode(array._mask)
    if hasattr(array, "asi8"):  # datetimes, with and without a zone, timedeltas, periods
        return dtype + encode(array.asi8)
    if isinstance(array, pd.arrays.IntervalArray):
        return dtype + encode(array.left) + encode(array.right)
    if isinstance(array, pd.arrays.SparseArray):
        return dtype + encode(array.to_dense())
    return dtype + encode.sequence(b"l", list(array))  # element by element: an extension's own objects
