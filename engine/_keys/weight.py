"""How much work it is to hash a value, guessed without reading it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import islice
from types import FunctionType, MethodType
from typing import Any

HEAVY = 64 * 1024
"""Bytes from which hashing takes longer than a thread hop."""

_MEMBERS = 1000
_LOOKS = 256


def weighs_much(value: object, reads: Callable[[Any], bool] = lambda _: False) -> bool:
    """Whether hashing `value` is likely to cost more than a thread hop (64 KiB, or 1 000 members).

    A guess: it looks at up to 256 members in all, and for sizes only, never into a stream. `reads` tells of a
    function or class whether its meaning would have to be read from files.
    """
    queue: deque[Any] = deque([value])
    size = members = 0
    for _ in range(_LOOKS):
        if not queue:
            return False
        item = queue.popleft()
        kind = type(item)
        if kind is str or kind is bytes or kind is bytearray:
            size += len(item)
        elif kind in (list, tuple, set, frozenset, dict):
            members += len(item)
            queue.extend(islice(item, _LOOKS))
            if kind is dict:
                queue.extend(islice(item.values(), _LOOKS))
        elif kind is FunctionType or kind is MethodType or isinstance(item, type):
            if reads(item):
                return True
        elif kind is partial:
            queue.extend((item.func, item.args, item.keywords))
        elif kind not in (int, float, bool, type(None)):
            size += _nbytes(item)
            queue.extend(getattr(item, "__dict__", {}).values() if _is_plain(kind) else ())
        if size > HEAVY or members > _MEMBERS:
            return True
    return True


def _is_plain(kind: type) -> bool:
    return kind.__dictoffset__ != 0 and not issubclass(kind, type)


def _nbytes(item: Any) -> int:
    """The size that an array, a table or a frame says it has."""
    root = type(item).__module__.partition(".")[0]
    if root in ("numpy", "pyarrow", "array") or type(item) is memoryview:
        return int(getattr(item, "nbytes", 0))
    if root == "pandas":
        return int(getattr(item, "size", 0)) * 8
    if root == "polars":
        estimate = getattr(item, "estimated_size", None)
        return int(estimate()) if estimate is not None else 0
    return 0
