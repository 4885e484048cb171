"""numpy arrays, scalars and dtypes. Imported only when numpy is, or when a record holds one of them.

Arrays come back writable, with the same dtype, shape and order of axes in memory; one that lies in memory in
neither C nor Fortran order is copied into C order. Objects, subclasses of ndarray, dtypes of other packages
and dtypes with metadata or titles are refused and left to pickle.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from .kinds import Context, Kind, Raw, Unreadable, Unsupported


def kind_of(value: object) -> Kind | None:
    """The kind that serves a numpy value, None for what is refused by its type."""
    if type(value) is np.ndarray:
        return NDARRAY
    if isinstance(value, np.dtype):
        return DTYPE
    if isinstance(value, np.generic) and type(value).__module__ == "numpy":
        return SCALAR
    return None


def _take_dtype(dtype: Any) -> Any:
    description = _describe(dtype)
    again = _make_dtype(description)
    if again != dtype or type(again) is not type(dtype) or again.isalignedstruct != dtype.isalignedstruct:
        raise Unsupported(f"has the dtype {dtype!r}")
    return description


def _describe(dtype: Any) -> Any:
    """`"<f8"`, or `["sub", base, shape]`, or `["struct", names, formats, offsets, itemsize, aligned]`."""
    if dtype.hasobject or dtype.metadata or dtype.kind not in "biufcmMSUV":
        raise Unsupported(f"has the dtype {dtype!r}")
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return ["sub", _describe(base), list(shape)]
    if dtype.names is None:
        return dtype.str
    fields = [dtype.fields[name] for name in dtype.names]
    if any(len(field) > 2 for field in fields):
        raise Unsupported(f"has the dtype {dtype!r} with titles")
    formats, offsets = [_describe(field[0]) for field in fields], [field[1] for field in fields]
    return ["struct", list(dtype.names), formats, offsets, dtype.itemsize, dtype.isalignedstruct]


def _make_dtype(description: Any) -> Any:
    if type(description) is str:
        dtype = np.dtype(description)
        if dtype.hasobject:
            raise Unreadable("it holds an array of objects")
        return dtype
    if description[0] == "sub":
        return np.dtype((_make_dtype(description[1]), tuple(description[2])))
    _, names, formats, offsets, itemsize, aligned = description
    layout: Any = {
        "names": names,
        "formats": [_make_dtype(item) for item in formats],
        "offsets": offsets,
        "itemsize": itemsize,
    }
    return np.dtype(layout, align=aligned)


def _take_array(array: Any) -> list[Any]:
    order = "C" if array.flags.c_contiguous or not array.flags.f_contiguous else "F"
    return [_take_dtype(array.dtype), list(array.shape), order, Raw(_buffer(array, order))]


def _buffer(array: Any, order: str) -> memoryview:
    if not array.nbytes:
        return memoryview(b"")
    # As bytes first: datetime64 and friends do not offer a buffer of their own.
    flat = np.ascontiguousarray(array if order == "C" else array.T).reshape(-1)
    return memoryview(flat.view(np.uint8).data)


def _make_array(parts: Any, _: Context) -> Any:
    description, shape, order, data = parts
    dtype = _make_dtype(description)
    size = dtype.itemsize * prod(shape)
    if not size:
        return np.empty(shape, dtype, order)
    if memoryview(data).nbytes != size:
        raise Unreadable("it holds an array whose size is not that of its data")
    if memoryview(data).readonly:
        data = bytearray(data)
    return np.ndarray(tuple(shape), dtype, data, order=order)


def _take_scalar(value: Any) -> list[Any]:
    if isinstance(value, np.str_ | np.bytes_) and value[-1:] in ("\0", b"\0"):
        raise Unsupported("is numpy text that ends with NUL, which numpy cuts off")
    array = np.asarray(value)
    return [_take_dtype(array.dtype), Raw(_buffer(array, "C"))]


def _make_scalar(parts: Any, context: Context) -> Any:
    return _make_array([parts[0], [], "C", parts[1]], context)[()]


NDARRAY = Kind(40, "ndarray", _take_array, _make_array)
SCALAR = Kind(41, "scalar", _take_scalar, _make_scalar)
DTYPE = Kind(42, "dtype", _take_dtype, lambda parts, _: _make_dtype(parts))
KINDS = (NDARRAY, SCALAR, DTYPE)
