"""polars frames and series. Imported only when polars is, or when a record needs it.

They travel as the Arrow stream that polars itself writes; each column that it hands out in one buffer is a
segment. polars has no way to lend its memory, so it is copied once out, and joined and copied in. A frame whose
schema does not come back the same from such a stream (Python objects) is refused and left to pickle.
"""

from __future__ import annotations

import io
from typing import Any

import polars as pl
from polars.exceptions import PanicException

from .ipc import check_stream
from .kinds import Context, Kind, Raw, Unreadable, Unsupported

_LARGE = 32 << 10  # as in `codec`: buffers from here on are segments

_SURE = frozenset(
    {pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.UInt16, pl.UInt32, pl.UInt64, pl.Float32, pl.Float64}
    | {pl.Boolean, pl.String, pl.Binary, pl.Date, pl.Time}
)


def kind_of(value: object) -> Kind | None:
    """The kind that serves a polars value, None for what is refused by its type."""
    if type(value) is pl.DataFrame:
        return FRAME
    return SERIES if type(value) is pl.Series else None


class _Pieces:
    """A file to write to: what comes in large pieces is kept as it came, what lies between is joined."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self._small: list[bytes] = []

    def write(self, data: bytes) -> int:
        if len(data) >= _LARGE:
            self.flush()
            self.pieces.append(data)
        else:
            self._small.append(data)
        return len(data)

    def flush(self) -> None:
        if self._small:
            self.pieces.append(b"".join(self._small))
            self._small = []


def _write(frame: Any) -> list[bytes]:
    out: Any = _Pieces()
    frame.write_ipc_stream(out)
    out.flush()
    return list(out.pieces)


def _read(pieces: list[Any]) -> Any:
    file = io.BytesIO(b"".join(pieces))  # that has the bytes to itself: else polars would copy them once more
    with file.getbuffer() as data:
        check_stream(data)
    return pl.read_ipc_stream(file)


def _take_frame(frame: Any) -> list[Any]:
    try:
        if not _SURE.issuperset(frame.dtypes):
            again = _read(_write(frame.clear())).schema
            if again != frame.schema or repr(again) != repr(frame.schema):
                raise Unsupported(f"has the schema {frame.schema!r}, which polars reads back as another")
        return [frame.height, *map(Raw, _write(frame))]
    except (pl.exceptions.PolarsError, PanicException, Unreadable, OSError, ValueError, TypeError) as error:
        raise Unsupported(f"is a polars value that polars cannot write: {error}") from error


def _make_frame(parts: Any, _: Context) -> Any:
    height, *pieces = parts
    try:
        frame = _read(pieces)
    except PanicException as error:  # no Exception: polars would have the program end
        raise Unreadable(f"polars cannot read it: {error}") from error
    if frame.height != height:
        raise Unreadable("it holds a polars frame of another height")
    return frame


def _take_series(series: Any) -> list[Any]:
    return _take_frame(series.to_frame())


def _make_series(parts: Any, context: Context) -> Any:
    return _make_frame(parts, context).to_series()


FRAME = Kind(56, "polarsframe", _take_frame, _make_frame)
SERIES = Kind(57, "polarsseries", _take_series, _make_series)
KINDS = (FRAME, SERIES)
