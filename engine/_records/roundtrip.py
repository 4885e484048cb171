"""What comes back is what went: a value that its serializer would change is not stored, and its writer is told.

onceflow's own encodings restore every type or refuse it, which is tested for each. A serializer of the user's
own, and a class that says itself how it is pickled, promise nothing of the kind. So what these write is read
back once, before it is committed, and compared by type and content. Small pickles only: to read a large table
twice would double the price of every miss, and its class is one that small ones have too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...storage._errors import SerializationError
from ...storage._values.serializers import Encoded, Serializer, is_builtin, uses_pickle
from .._keys.encoding import Encoder
from .._keys.names import qualified_name, type_name

SMALL = 64 * 1024
"""Bytes up to which a pickle is read back."""


def encode_exactly(serializer: Serializer, value: Any) -> Encoded:
    """The encoded value, which decodes to an equal one of the same type.

    Raises:
        SerializationError: It cannot be carried, or would come back changed; names what, and as what.
    """
    encoded = serializer.encode(value)
    if _is_checked(serializer, encoded):
        again = serializer.decode(encoded.serializer, encoded.segments, imports=True)
        check_same(encoded.serializer, value, again)
    return encoded


def check_same(serializer: str, value: Any, again: Any) -> None:
    """Compare a value with what was decoded of it.

    Raises:
        SerializationError: They differ.
    """
    try:
        if _is_equal(value, again):
            return
        change = next(_changes("value", value, again), None)
    except RecursionError:  # too deep for a look at all of it
        return
    if change is not None:
        remedy = "mend how it is pickled" if uses_pickle(serializer) else "use the default serializer"
        raise SerializationError(serializer, f"{change}. Return that, or {remedy}")


def _is_checked(serializer: Serializer, encoded: Encoded) -> bool:
    if not is_builtin(serializer):
        return True
    size = sum(memoryview(segment).nbytes for segment in encoded.segments)
    return uses_pickle(encoded.serializer) and size <= SMALL


def _changes(path: str, value: Any, again: Any) -> Iterator[str]:
    """Where the two differ: by type, by length, in a member, or in what can be told of the content."""
    kind = type_name(type(value))
    if kind != type_name(type(again)):
        yield f"{path} is a {kind}, and would come back as a {type_name(type(again))}"
    elif type(value) in (list, tuple):
        if len(value) != len(again):
            yield f"{path} would come back with another length"
        for at, (one, other) in enumerate(zip(value, again, strict=False)):
            yield from _changes(f"{path}[{at}]", one, other)
    elif type(value) is dict and len(value) == len(again):
        for (key, one), (other_key, other) in zip(value.items(), again.items(), strict=True):
            yield from _changes(f"the key {key!r} of {path}", key, other_key)
            yield from _changes(f"{path}[{key!r}]", one, other)
    elif _is_equal(value, again) is False:
        yield f"{path}, a {kind}, would come back with another content"


def _is_equal(value: Any, again: Any) -> bool | None:
    """None where the content of either cannot be told. Code counts by name: pickle takes it apart."""
    try:
        return Encoder(_by_name)(value) == Encoder(_by_name)(again)
    except Exception:  # refused, too deep, or a __cache_key__ of the user's own that raises
        return None


def _by_name(code: Any) -> bytes:
    return qualified_name(code).encode()
