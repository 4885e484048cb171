"""How arrays, frames and tables are encoded: numpy, pandas, polars, pyarrow. Imported only if a value is one.

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

from ._encoding import Encoder, Handler, finds
from ._naming import module_name, type_name

_PIECE = 1 << 20


def _root(kind: type, library: str) -> type | None:
    """The first class in the ancestry of `kind` that the library itself defines."""
    if library not in sys.modules:
        return None
    return next((base for base in kind.__mro__ if module_name(base).partition(".")[0] == library), None)


def _node(encode: Encoder, name: str, parts: list[bytes]) -> bytes:
    return encode.state(name, b"".join(parts), {})


# --- numpy


@finds
def _numpy(kind: type) -> Handler | None:
    if _root(kind, "numpy") is None:
        return None
    import numpy as np

    if issubclass(kind, np.ma.MaskedArray):
        return _masked
    if issubclass(kind, np.ndarray):
        return _array
    if issubclass(kind, np.generic):
        return _numpy_scalar
    if issubclass(kind, np.dtype):
        return lambda encode, value: _node(encode, "numpy.dtype", [_dtype(encode, value)])
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
    return _node(
        encode,
        type_name(type(value)),
        [encode(shown), encode(mask), encode.within(".fill_value", value.fill_value)],
    )


def _numpy_scalar(encode: Encoder, value: Any) -> bytes:
    import numpy as np

    array = np.asarray(value)
    return _node(encode, type_name(type(value)), [_dtype(encode, array.dtype), _values(encode, array)])


# --- pandas


@finds
def _pandas(kind: type) -> Handler | None:
    if _root(kind, "pandas") is None:
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
    return _node(encode, type_name(type(value)), [encode(repr(value))])


def _interval(encode: Encoder, value: Any) -> bytes:
    return encode.node("pandas.Interval", (".left", value.left), (".right", value.right), ("", value.closed))


def _instant(encode: Encoder, value: Any) -> bytes:
    zone = encode.within(".tzinfo", getattr(value, "tzinfo", None))
    return _node(encode, type_name(type(value)), [encode(value._value), encode(value.unit), zone])


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
    from ._encoding import RefusedError

    try:
        return _column(encode, array)
    except RefusedError as error:
        error.trail.append(step)
        raise


def _multi_index(encode: Encoder, value: Any) -> bytes:
    levels = [_column(encode, value.get_level_values(at).array) for at in range(value.nlevels)]
    return _node(encode, type_name(type(value)), [encode(list(value.names)), encode(len(value)), *levels])


def _range_index(encode: Encoder, value: Any) -> bytes:
    return _node(
        encode, type_name(type(value)), [encode((value.start, value.stop, value.step)), encode(value.name)]
    )


def _index(encode: Encoder, value: Any) -> bytes:
    return _node(
        encode,
        type_name(type(value)),
        [encode(value.name), encode(getattr(value, "freqstr", None)), _column(encode, value.array)],
    )


def _column_alone(encode: Encoder, array: Any) -> bytes:
    return _node(encode, type_name(type(array)), [_column(encode, array)])


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


# --- pyarrow and polars


@finds
def _pyarrow(kind: type) -> Handler | None:
    if _root(kind, "pyarrow") is None:
        return None
    import pyarrow as pa

    for base, handler in (
        ((pa.Table, pa.RecordBatch), _table),
        ((pa.Array, pa.ChunkedArray), _arrow_alone),
        (
            (pa.Scalar,),
            lambda encode, value: _arrow_part(encode, value, _type(encode, value.type), value.as_py()),
        ),
        ((pa.DataType,), lambda encode, value: _arrow_part(encode, value, _type(encode, value))),
        ((pa.Schema,), lambda encode, value: _arrow_part(encode, value, _schema(encode, value))),
        ((pa.Field,), lambda encode, value: _arrow_part(encode, value, _field(encode, value))),
        ((pa.Buffer,), lambda encode, value: _arrow_part(encode, value, b"", memoryview(value))),
    ):
        if issubclass(kind, base):
            return handler
    return None


def _arrow_part(encode: Encoder, value: Any, kind: bytes, content: object = None) -> bytes:
    return _node(encode, type_name(type(value)), [kind, encode(content)])


def _arrow_alone(encode: Encoder, value: Any) -> bytes:
    chunks = getattr(value, "chunks", [value])
    return _node(encode, type_name(type(value)), [_arrow(encode, value.type, chunks)])


def _type(encode: Encoder, kind: Any) -> bytes:
    """An Arrow type; nested fields with their names, nullability and metadata."""
    return encode(str(kind)) + encode([_field(encode, kind.field(at)) for at in range(kind.num_fields)])


def _field(encode: Encoder, field: Any) -> bytes:
    return (
        encode(field.name)
        + encode(field.nullable)
        + encode(dict(field.metadata or {}))
        + _type(encode, field.type)
    )


def _schema(encode: Encoder, schema: Any) -> bytes:
    return b"".join(_field(encode, field) for field in schema) + encode(dict(schema.metadata or {}))


def _table(encode: Encoder, value: Any) -> bytes:
    columns = [_arrow(encode, column.type, getattr(column, "chunks", [column])) for column in value.columns]
    return _node(
        encode, type_name(type(value)), [_schema(encode, value.schema), encode(value.num_rows), *columns]
    )


def _arrow(encode: Encoder, kind: Any, chunks: list[Any]) -> bytes:
    """The values of a chunked array, whatever its chunks and their offsets are."""
    import pyarrow as pa

    head = _type(encode, kind) + encode(sum(map(len, chunks)))
    if pa.types.is_struct(kind):
        members = [
            _arrow(encode, kind.field(at).type, [chunk.flatten()[at] for chunk in chunks])
            for at in range(kind.num_fields)
        ]
        return head + _nulls(encode, chunks) + b"".join(members)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        lengths = [_without_nulls(chunk.value_lengths()) for chunk in chunks]
        return (
            head
            + _nulls(encode, chunks)
            + _stream(_buffer(chunk) for chunk in lengths)
            + _arrow(encode, kind.value_type, [chunk.flatten() for chunk in chunks])
        )
    if pa.types.is_dictionary(kind):
        return head + _arrow(encode, kind.value_type, [chunk.dictionary_decode() for chunk in chunks])
    if any(
        is_(kind)
        for is_ in (
            pa.types.is_string,
            pa.types.is_large_string,
            pa.types.is_binary,
            pa.types.is_large_binary,
        )
    ):
        return head + _nulls(encode, chunks) + _texts(chunks)
    fixed = pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating, pa.types.is_temporal
    if any(is_(kind) for is_ in fixed) and not pa.types.is_interval(kind):
        return head + _nulls(encode, chunks) + _stream(_buffer(_without_nulls(chunk)) for chunk in chunks)
    return head + encode.sequence(b"l", [item for chunk in chunks for item in chunk.to_pylist()])


def _stream(pieces: Iterator[Any]) -> bytes:
    node = sha256()
    for piece in pieces:
        node.update(piece)
    return node.digest()


def _nulls(encode: Encoder, chunks: list[Any]) -> bytes:
    import numpy as np

    if not any(chunk.null_count for chunk in chunks):
        return b"0"
    return b"1" + _stream(chunk.is_null().to_numpy(zero_copy_only=False).view(np.uint8) for chunk in chunks)


def _without_nulls(chunk: Any) -> Any:
    """Whatever lies in the buffer under a null is not a value."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not chunk.null_count:
        return chunk
    kind = chunk.type
    if pa.types.is_temporal(kind):
        chunk = chunk.view(pa.int32() if kind.bit_width == 32 else pa.int64())
    return pc.fill_null(chunk, pa.scalar(0).cast(chunk.type) if not pa.types.is_boolean(kind) else False)


def _buffer(chunk: Any) -> Any:
    """The values of a chunk of fixed width, as bytes, in place."""
    import numpy as np
    import pyarrow as pa

    if pa.types.is_boolean(chunk.type):
        return chunk.to_numpy(zero_copy_only=False).view(np.uint8)
    width = chunk.type.bit_width // 8
    data = chunk.buffers()[1]
    if data is None:
        return b""
    return memoryview(data).cast("B")[chunk.offset * width : (chunk.offset + len(chunk)) * width]


def _texts(chunks: list[Any]) -> bytes:
    """Texts and byte strings: their lengths, then all of them in one piece."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    lengths, content = sha256(), sha256()
    for chunk in chunks:
        if chunk.null_count:
            chunk = pc.fill_null(chunk, pa.scalar("" if "string" in str(chunk.type) else b"", chunk.type))
        if not len(chunk):
            continue
        _, offsets, data = chunk.buffers()
        wide = "large" in str(chunk.type)
        ends = np.frombuffer(offsets, np.int64 if wide else np.int32)[
            chunk.offset : chunk.offset + len(chunk) + 1
        ]
        lengths.update(np.diff(ends).astype("<i8").tobytes())
        if data is not None:
            content.update(memoryview(data).cast("B")[int(ends[0]) : int(ends[-1])])
    return lengths.digest() + content.digest()


@finds
def _polars(kind: type) -> Handler | None:
    if _root(kind, "polars") is None:
        return None
    import polars as pl

    if issubclass(kind, pl.DataFrame):
        return lambda encode, value: _node(
            encode,
            type_name(kind),
            [encode(value.height), *(_polars_column(encode, column) for column in value.get_columns())],
        )
    if issubclass(kind, pl.Series):
        return lambda encode, value: _node(encode, type_name(kind), [_polars_column(encode, value)])
    if issubclass(kind, type(pl.Int64())) or issubclass(kind, pl.DataType):
        return lambda encode, value: _node(encode, type_name(kind), [encode(repr(value))])
    return None  # a lazy frame is a plan over files that may change


def _polars_column(encode: Encoder, series: Any) -> bytes:
    import polars as pl

    head = encode(series.name) + encode(repr(series.dtype)) + encode(len(series))
    if series.dtype == pl.Object:
        return head + encode.sequence(b"l", series.to_list())
    column = series.to_arrow()
    return head + _arrow(encode, column.type, getattr(column, "chunks", [column]))
