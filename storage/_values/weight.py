"""A quick guess at how much work it is to encode a value."""

from __future__ import annotations

from collections.abc import Sized
from itertools import islice
from typing import Any

_HEAVY = 64 << 10


def is_heavy(value: Any) -> bool:
    """Whether encoding the value may take long enough (about 64 KiB) to leave the event loop for. Costs 1 µs.

    A guess from lengths and a sample of the elements; never wrong about one large buffer, text or array.
    """
    return _weight(value, 3) > _HEAVY


def weigh(value: Any) -> int:
    """Roughly how many bytes the value takes when encoded; the guess of `is_heavy`."""
    return _weight(value, 3)


def _weight(value: Any, depth: int) -> int:
    kind = type(value)
    if kind in (int, float, bool, type(None)):
        return 9
    if kind in (str, bytes, bytearray):
        return len(value)
    if kind in (list, tuple, set, frozenset, dict):
        return _weight_of_container(value, depth) if depth else 64 + 9 * len(value)
    for measure, unit in (("nbytes", 1), ("size", 8)):  # arrays and arrow tables; elements of a DataFrame
        size = getattr(value, measure, None)
        if type(size) is int:
            return size * unit
    if isinstance(value, Sized):
        return 64 + 64 * len(value)
    state = getattr(value, "__dict__", None) or [getattr(value, name, None) for name in _slot_names(kind)]
    return 64 + (_weight(state, depth - 1) if depth else 0)


def _weight_of_container(value: Any, depth: int) -> int:
    count = len(value)
    sample = [*islice(value, 8)]
    if type(value) is dict:
        sample += islice(value.values(), 8)
        count *= 2
    elif count > 8 and type(value) in (list, tuple):
        sample += [value[count // 2], value[-1]]
    if not sample:
        return 1
    weights = [_weight(item, depth - 1) for item in sample]
    return max(sum(weights), sum(weights) * count // len(weights))


def _slot_names(kind: type) -> tuple[str, ...]:
    names = getattr(kind, "__slots__", ())
    return (names,) if isinstance(names, str) else tuple(names)
