"""The forms of long lists of one scalar type, written by C code in one go."""

from __future__ import annotations

import marshal
import struct
from array import array
from math import isnan
from typing import Any

BULK = 16
"""Lists shorter than this have no bulk form: looking for one would cost more than it saves."""

CHUNK = 1 << 16
"""Members that are written at once."""

_NAN = struct.pack("<d", float("nan"))
_double = struct.Struct("<d").pack


def float_bits(value: float) -> bytes:
    """Eight bytes; of NaN always the same ones."""
    return _double(value) if value == value else _NAN


def bulk(node: Any, values: list[Any] | tuple[Any, ...], count: int) -> bool:
    """The form of a long list of one scalar type, written by C code. False, and nothing fed, without one."""
    kind = type(values[0])
    if kind is int:
        return _strided(node, values, count, b"i", 5) or _wide(node, values, count)
    if kind is float:
        return _strided(node, values, count, b"g", 9)
    if kind is str and list(map(type, values)).count(str) == count:
        node.update(b"u%d;" % count)
        for start in range(0, count, CHUNK):
            part = values[start : start + CHUNK]
            node.update(_little(array("Q", map(len, part))))
            node.update("".join(part).encode("utf-8", "surrogatepass"))
        return True
    return False


def _strided(node: Any, values: list[Any] | tuple[Any, ...], count: int, tag: bytes, width: int) -> bool:
    """Floats, or integers of 32 bits.

    Marshal's version 2 writes such an int as `i` and four bytes, a float as `g` and eight, each of exactly
    that type, on every Python. So where every fifth (ninth) byte is the tag, every element was such a number,
    and the types need not be looked at one by one.
    """
    parts = []
    for start in range(0, count, CHUNK):
        part = values[start : start + CHUNK]
        if type(part[-1]) is not type(values[0]):
            return False
        try:
            data = memoryview(marshal.dumps(part, 2))[5:]
        except ValueError:  # something that marshal does not know
            return False
        if len(data) != width * len(part) or data[::width] != tag * len(part):
            return False
        if tag == b"g" and isnan(sum(part)):  # the bits of a NaN differ between machines
            data = memoryview(b"".join([b"g" + float_bits(value) for value in part]))
        parts.append(data)
    node.update(tag + b"%d;" % count)
    for data in parts:
        node.update(data)
    return True


def _wide(node: Any, values: list[Any] | tuple[Any, ...], count: int) -> bool:
    """Integers of which at least one needs 64 bits."""
    if list(map(type, values)).count(int) != count:
        return False
    try:
        numbers = array("q", values)
    except OverflowError:
        return False
    node.update(b"q%d;" % count)
    node.update(_little(numbers))
    return True


def _little(numbers: array[Any]) -> array[Any]:
    if struct.pack("=H", 1) != struct.pack("<H", 1):
        numbers.byteswap()
    return numbers
