"""What a write takes, what a read fills and what a range means, the same for every storage."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

from .._storage import Buffer


def buffers_of(data: Buffer | Sequence[Buffer]) -> list[memoryview]:
    """One buffer or several as flat views of bytes; nothing is copied.

    Raises:
        TypeError: Something is no buffer, or its bytes do not lie in one row.
    """
    if isinstance(data, (bytes, bytearray, memoryview)):
        return [_flat(data)]  # pyright: ignore[reportArgumentType]  # memoryview is invariant
    if isinstance(data, str):
        raise TypeError("A storage holds bytes, not text. Write text.encode().")
    return [_flat(one) for one in data]


def _flat(buffer: Buffer) -> memoryview:
    try:
        view = memoryview(buffer)
    except TypeError:
        raise TypeError(
            f"A storage holds bytes, and {type(buffer).__name__} is none. Give bytes, a bytearray, "
            "a memoryview, a sequence of them, or an async iterable of them."
        ) from None
    if view.format == "B" and view.ndim == 1 and view.contiguous:
        return view
    if not view.c_contiguous:
        raise TypeError("The memoryview's bytes do not lie in one row. Write its .tobytes().")
    return view.cast("B")


def new_bytes(length: int) -> BytesIO:
    """Room for `bytes` that are about to be read: fill `getbuffer()`, and take `getvalue()` when it is full.

    CPython hands out the very object that was filled. To copy a buffer into bytes holds the interpreter, and
    takes twice the room: 512 MiB took seconds on the loop.
    """
    return BytesIO(bytes(length))


def clip(start: int, stop: int | None, size: int) -> tuple[int, int]:
    """The range `[start, stop)` cut to an object of `size` bytes; its end is never before its start.

    Raises:
        ValueError: A bound is negative: bytes are counted from the object's beginning.
    """
    if start < 0 or (stop is not None and stop < 0):
        raise ValueError(
            f"A byte range counts from the object's beginning, got [{start}, {stop}). Use stat().size."
        )
    start = min(start, size)
    return start, max(start, size if stop is None else min(stop, size))
