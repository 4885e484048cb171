"""Arrow tables, record batches, arrays and chunked arrays. Imported only when pyarrow is, or a record needs it.

The buffers of columns of numbers, times, text and bytes, and of dictionaries of these, are segments as they
lie in memory, both ways. A column that is nested, or of a type that has yet another layout, is written as an
Arrow stream of its own: copied once, and read without a copy. Slices take their own part only.

Chunks, nullability and the metadata of schemas and fields are kept. Extension types are refused and left to
pickle: to read one runs the code that registered it. What is read is validated in full, because Arrow
follows offsets wherever they point.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from .kinds import Context, Kind, Raw, Unreadable, Unsupported

_EXTENSION = b"ARROW:extension:name"  # the field metadata that makes one, on reading a schema
_FLAT, _DICTIONARY, _STREAM = 0, 1, 2
_types: Any = pa.types
_TEXTS = {
    pa.string(): 4,
    pa.binary(): 4,
    pa.large_string(): 8,
    pa.large_binary(): 8,
}  # the bytes of an offset


def kind_of(value: object) -> Kind | None:
    """The kind that serves an Arrow value, None for what is refused by its type."""
    if type(value) is pa.Table:
        return TABLE
    if type(value) is pa.RecordBatch:
        return BATCH
    if type(value) is pa.ChunkedArray:
        return CHUNKS
    return ARRAY if isinstance(value, pa.Array) else None


# --- schemas ------------------------------------------------------------------------------------------------


def _take_schema(schema: Any) -> Raw:
    data = memoryview(schema.serialize())
    if _EXTENSION in bytes(data):
        raise Unsupported("has an Arrow extension type")
    again = pa.ipc.read_schema(pa.py_buffer(data))
    if not again.equals(schema, check_metadata=True):
        raise Unsupported("has an Arrow schema that does not come back the same")
    return Raw(data)


def _make_schema(data: Any) -> Any:
    if _EXTENSION in bytes(data):
        raise Unreadable("it holds an Arrow extension type")
    return pa.ipc.read_schema(pa.py_buffer(data))


def _schema_of(kind: Any) -> Any:
    return pa.schema([pa.field("", kind)])


# --- the chunks of columns ----------------------------------------------------------------------------------


def _take_chunk(array: Any) -> list[Any]:
    kind = array.type
    if _types.is_dictionary(kind):
        return [_DICTIONARY, _take_chunk(array.indices), _take_chunk(array.dictionary)]
    if array.offset and not _starts_evenly(array):
        array = pa.concat_arrays([array])  # a copy of no more than the slice
        if not _starts_evenly(array):
            return _take_stream(array)
    if width := _width(kind):
        buffers = [_part(array, 1, width)]
    elif kind in _TEXTS:
        buffers = _take_text(array, _TEXTS[kind])
    else:
        return _take_stream(array)
    nulls = array.null_count
    return [_FLAT, len(array), nulls, [_part(array, 0, 1) if nulls else None, *buffers]]


def _width(kind: Any) -> int:
    """The bits that an element takes in the one buffer beside its validity; 0 for other layouts."""
    if _types.is_primitive(kind) or _types.is_decimal(kind) or _types.is_fixed_size_binary(kind):
        return int(kind.bit_width)
    return 0


def _starts_evenly(array: Any) -> bool:
    """Whether it starts with a byte of its bits and, if it is text, with the first byte of all the text."""
    if array.offset % 8:
        return False
    size = _TEXTS.get(array.type)
    return not size or not len(array) or _offset(array, size, 0) == 0


def _part(array: Any, which: int, width: int) -> Raw:
    """What the array's elements take of its buffer."""
    return _slice(array.buffers()[which], array.offset * width // 8, _size(len(array), width))


def _slice(buffer: Any, start: int, size: int) -> Raw:
    return Raw(memoryview(buffer)[start : start + size] if size else b"")


def _size(count: int, width: int) -> int:
    return (count * width + 7) // 8


def _offset(array: Any, size: int, which: int) -> int:
    at = (array.offset + which) * size
    return int.from_bytes(memoryview(array.buffers()[1])[at : at + size], "little")


def _take_text(array: Any, size: int) -> list[Raw]:
    if not len(array):
        return [Raw(b""), Raw(b"")]
    _, offsets, data = array.buffers()
    ends = _slice(offsets, array.offset * size, (len(array) + 1) * size)
    return [ends, _slice(data, 0, _offset(array, size, len(array)))]


def _take_stream(array: Any) -> list[Any]:
    schema, sink = _schema_of(array.type), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.record_batch([array], schema=schema))
    return [_STREAM, Raw(memoryview(sink.getvalue()))]


def _make_chunk(parts: Any, kind: Any) -> Any:
    tag, *rest = parts
    if tag == _DICTIONARY:
        indices, words = rest
        index = _make_chunk(indices, kind.index_type)
        made = pa.DictionaryArray.from_arrays(
            index, _make_chunk(words, kind.value_type), ordered=kind.ordered, safe=True
        )
    elif tag == _FLAT:
        made = _make_flat(kind, *rest)
    else:
        made = _make_stream(rest[0], kind)
    if made.type != kind:
        raise Unreadable("it holds an Arrow column of another type")
    made.validate(full=True)
    return made


def _make_stream(data: Any, kind: Any) -> Any:
    buffer = pa.py_buffer(data)
    if _EXTENSION in bytes(pa.ipc.read_message(buffer).metadata):
        raise Unreadable("it holds an Arrow extension type")
    with pa.ipc.open_stream(buffer) as reader:
        [made] = reader.read_next_batch().columns
    return made


def _make_flat(kind: Any, count: int, nulls: int, buffers: list[Any]) -> Any:
    if kind in _TEXTS:
        sizes = [_size(count, 1), (count + 1) * _TEXTS[kind], 0]
    elif width := _width(kind):
        sizes = [_size(count, 1), _size(count, width)]
    else:
        raise Unreadable("it holds an Arrow column that is no row of plain elements")
    if count == 0:
        return pa.array([], kind)
    found = [None if buffer is None else pa.py_buffer(buffer) for buffer in buffers]
    if count < 0 or (found[0] is None) != (nulls == 0):
        raise Unreadable("it holds an Arrow column of impossible counts")
    present = [buffer is None or buffer.size >= size for buffer, size in zip(found, sizes, strict=True)]
    if not all(present) or any(buffer is None for buffer in found[1:]):
        raise Unreadable("it holds an Arrow column that is longer than its buffers")
    return pa.Array.from_buffers(kind, count, found, nulls)


# --- values -------------------------------------------------------------------------------------------------


def _take_array(array: Any) -> list[Any]:
    return [_take_schema(_schema_of(array.type)), _take_chunk(array)]


def _make_array(parts: Any, _: Context) -> Any:
    return _make_chunk(parts[1], _make_schema(parts[0]).field(0).type)


def _take_chunks(array: Any) -> list[Any]:
    return [_take_schema(_schema_of(array.type)), [_take_chunk(chunk) for chunk in array.chunks]]


def _make_chunks(parts: Any, _: Context) -> Any:
    return _chunked(parts[1], _make_schema(parts[0]).field(0).type)


def _chunked(chunks: list[Any], kind: Any) -> Any:
    return pa.chunked_array([_make_chunk(chunk, kind) for chunk in chunks], kind)


def _take_table(table: Any) -> list[Any]:
    schema = _take_schema(table.schema)
    columns = [[_take_chunk(chunk) for chunk in column.chunks] for column in table.columns]
    return [schema, table.num_rows, columns]


def _make_table(parts: Any, _: Context) -> Any:
    schema, rows = _make_schema(parts[0]), parts[1]
    columns = [_chunked(chunks, field.type) for chunks, field in zip(parts[2], schema, strict=True)]
    return _of_rows(pa.Table, columns, schema, rows)


def _take_batch(batch: Any) -> list[Any]:
    return [_take_schema(batch.schema), batch.num_rows, [_take_chunk(column) for column in batch.columns]]


def _make_batch(parts: Any, _: Context) -> Any:
    schema, rows = _make_schema(parts[0]), parts[1]
    columns = [_make_chunk(chunk, field.type) for chunk, field in zip(parts[2], schema, strict=True)]
    return _of_rows(pa.RecordBatch, columns, schema, rows)


def _of_rows(cls: Any, columns: list[Any], schema: Any, rows: int) -> Any:
    if not columns:  # a table that lost its columns still has rows
        return cls.from_arrays([pa.nulls(rows)], names=[""], metadata=schema.metadata).select([])
    made = cls.from_arrays(columns, schema=schema)
    if made.num_rows != rows:
        raise Unreadable("it holds an Arrow table whose columns are of another length")
    made.validate()
    return made


TABLE = Kind(48, "arrowtable", _take_table, _make_table)
BATCH = Kind(49, "arrowbatch", _take_batch, _make_batch)
ARRAY = Kind(50, "arrowarray", _take_array, _make_array)
CHUNKS = Kind(51, "arrowchunks", _take_chunks, _make_chunks)
KINDS = (TABLE, BATCH, ARRAY, CHUNKS)
