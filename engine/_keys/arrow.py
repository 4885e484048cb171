"""How Arrow arrays and tables and polars frames are encoded, by the same rules as numpy arrays.

Values are hashed as they lie in Arrow's buffers, those of one column in one stream, so that chunks and
offsets do not show; whatever lies under a null is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from typing import Any

from .arrays import node_of, root_in
from .encoding import Encoder, Handler, finds
from .names import type_name


@finds
def _pyarrow(kind: type) -> Handler | None:
    if root_in(kind, "pyarrow") is None:
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
    return node_of(encode, type_name(type(value)), [kind, encode(content)])


def _arrow_alone(encode: Encoder, value: Any) -> bytes:
    chunks = getattr(value, "chunks", [value])
    return node_of(encode, type_name(type(value)), [_arrow(encode, value.type, chunks)])


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
    return node_of(
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
    if root_in(kind, "polars") is None:
        return None
    import polars as pl

    if issubclass(kind, pl.DataFrame):
        return lambda encode, value: node_of(
            encode,
            type_name(kind),
            [encode(value.height), *(_polars_column(encode, column) for column in value.get_columns())],
        )
    if issubclass(kind, pl.Series):
        return lambda encode, value: node_of(encode, type_name(kind), [_polars_column(encode, value)])
    if issubclass(kind, type(pl.Int64())) or issubclass(kind, pl.DataType):
        return lambda encode, value: node_of(encode, type_name(kind), [encode(repr(value))])
    return None  # a lazy frame is a plan over files that may change


def _polars_column(encode: Encoder, series: Any) -> bytes:
    import polars as pl

    head = encode(series.name) + encode(repr(series.dtype)) + encode(len(series))
    if series.dtype == pl.Object:
        return head + encode.sequence(b"l", series.to_list())
    column = series.to_arrow()
    return head + _arrow(encode, column.type, getattr(column, "chunks", [column]))
