"""The canonical encoding of values: tagged, typed, self-delimiting bytes that go into SHA-256.

Every encoding begins with a tag of one byte. A scalar follows inline, with its length where it has none of
its own. A container, an object, and a text or buffer above 64 KiB is a *node*: its tag and the SHA-256 of the
tag and its members' encodings. So the encoding of a value is short, no buffer is copied, two values that
differ have encodings that differ, and a shared object costs its hash once and equals an unshared copy of
itself.

What has no order (sets, the items of a dict) is sorted by value, or by encoding where values do not compare,
never by hash. Long homogeneous lists have a form of their own that C code writes in one go; which form a list
takes depends on its elements alone. NaN is one value; -0.0 and 0.0 are two.

A cycle is encoded as a distance back on Tarjan's stack of unfinished components (R. Tarjan, "Depth-first
search and linear graph algorithms", 1972): only objects of the same cycle lie between, so the code of a
cyclic object does not depend on where it was met, and an entangled graph takes linear time.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping, Set
from hashlib import sha256
from types import EllipsisType, NotImplementedType
from typing import Any
from weakref import WeakKeyDictionary

from .bulk import BULK, CHUNK, bulk, float_bits
from .names import is_user_class, type_name

INLINE = 64 * 1024
"""Texts and buffers longer than this (in bytes) become nodes."""

ENTANGLED = 20_000
"""How often members of cycles may be walked afresh, because they were met through sets."""

Handler = Callable[["Encoder", Any], bytes]


class RefusedError(Exception):
    """No key for what `trail` (innermost first) leads to. Becomes UncacheableInputError at the surface."""

    def __init__(self, type_name: str) -> None:
        super().__init__(type_name)
        self.type_name = type_name
        self.trail: list[str] = []


# --- scalars: complete in themselves


def framed(data: bytes) -> bytes:
    """`data` behind its length, so that it can be told from what follows."""
    return b"%d:%b" % (len(data), data)


def _int(value: int) -> bytes:
    if -0x8000000000000000 <= value <= 0x7FFFFFFFFFFFFFFF:
        return b"i%d;" % value
    # Not decimal: that is quadratic, and refused above sys.get_int_max_str_digits().
    return b"I" + framed(value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True))


def _str(value: str) -> bytes:
    if len(value) <= INLINE:
        data = value.encode("utf-8", "surrogatepass")
        if len(data) <= INLINE:
            return b"s%d:%b" % (len(data), data)
    node = sha256(b"S%d:" % len(value))
    for start in range(0, len(value), 1 << 20):
        node.update(value[start : start + (1 << 20)].encode("utf-8", "surrogatepass"))
    return b"S" + node.digest()


def buffer(tag: bytes, data: bytes | bytearray | memoryview | array[Any]) -> bytes:
    """The bytes of a contiguous buffer, inline or as a node, under a lower-case tag."""
    size = memoryview(data).nbytes
    if size <= INLINE:
        return tag + framed(bytes(data))
    node = sha256(tag.upper() + b"%d:" % size)
    node.update(data)
    return tag.upper() + node.digest()


SCALARS: dict[type, Callable[[Any], bytes]] = {
    type(None): lambda _: b"N",
    bool: lambda value: b"T" if value else b"F",
    int: _int,
    float: lambda value: b"f" + float_bits(value),
    complex: lambda value: b"c" + float_bits(value.real) + float_bits(value.imag),
    str: _str,
    bytes: lambda value: b"b%d:%b" % (len(value), value) if len(value) <= INLINE else buffer(b"b", value),
    bytearray: lambda value: buffer(b"a", value),
    EllipsisType: lambda _: b"E",
    NotImplementedType: lambda _: b"_",
}


# --- the walk


class Encoder:
    """One walk over one value. Called with a value, it returns its encoding.

    Args:
        on_code: Encodes a function or class of the user's own code (by what it means).
        on_instance: Told the class of every plain object that is met.
        lenient: Encode what has no key by the name of its type, instead of refusing it.
        opaque: Ids of objects to encode by the names of their types only, and pairs of an object's id and the
            name of an attribute to leave out.
    """

    __slots__ = ("_done", "_low", "_open", "_rewalked", "lenient", "on_code", "on_instance", "opaque")

    def __init__(
        self,
        on_code: Callable[[Any], bytes],
        *,
        on_instance: Callable[[type], object] | None = None,
        lenient: bool = False,
        opaque: Set[Any] = frozenset(),
    ) -> None:
        self.on_code, self.on_instance, self.lenient, self.opaque = on_code, on_instance, lenient, opaque
        # Both keep the objects alive: an id must not be given to another one during the walk.
        self._done: dict[int, tuple[object, bytes]] = {}
        self._open: dict[int, tuple[int, object]] = {}
        self._low = 0
        self._rewalked = 0

    def __call__(self, value: object) -> bytes:
        kind = type(value)
        scalar = SCALARS.get(kind)
        if scalar is not None:
            return scalar(value)
        done = self._done.get(id(value))
        if done is not None:
            return done[1]
        met = self._open.get(id(value))
        if met is not None:
            self._low = min(self._low, met[0])
            return b"^%d;" % (len(self._open) - met[0])
        if self.opaque and id(value) in self.opaque:
            return self.by_type(value)
        return self._enter(value, kind)

    def _enter(self, value: object, kind: type) -> bytes:
        handler = _BUILTIN.get(kind) or _handler_for(kind)
        here = len(self._open)
        self._open[id(value)] = here, value
        outer, self._low = self._low, here
        encoded = handler(self, value)
        if self._low < here:  # part of a cycle that began further up: its code is valid in there only
            self._low = min(outer, self._low)
            return encoded
        while len(self._open) > here:
            self._open.popitem()
        self._low = outer
        self._done[id(value)] = value, encoded
        return encoded

    def alone(self, *values: object) -> bytes:
        """The encodings of `values` as if their siblings were not there: for members that have no order."""
        here = len(self._open)
        encoded = b"".join(map(self, values))
        while len(self._open) > here:
            self._open.popitem()
            self._rewalked += 1
            if self._rewalked > ENTANGLED:
                raise RefusedError("graph of sets too entangled to be walked")
        return encoded

    def refuse(self, value: object) -> bytes:
        """What to do with a value that has no key."""
        if self.lenient:
            if is_user_class(type(value)):
                self.met(type(value))
            return self.by_type(value)
        raise RefusedError(type_name(type(value)))

    def met(self, kind: type) -> None:
        """Tell that an object of an own class was met."""
        if self.on_instance is not None:
            self.on_instance(kind)

    def counted(self, value: object, attributes: dict[str, Any]) -> dict[str, Any]:
        """The attributes of an object without the opaque ones."""
        if not self.opaque:
            return attributes
        return {name: item for name, item in attributes.items() if (id(value), name) not in self.opaque}

    def by_type(self, value: object) -> bytes:
        """A value of which only the type counts."""
        return self.named(b"?", type_name(type(value)))

    def named(self, tag: bytes, name: str) -> bytes:
        return tag + framed(name.encode("utf-8", "surrogatepass"))

    def within(self, step: str, value: object) -> bytes:
        """The encoding of a part; a refusal in there says that it came this way."""
        try:
            return self(value)
        except RefusedError as error:
            error.trail.append(step)
            raise

    def node(self, name: str, *parts: tuple[str, object]) -> bytes:
        """An object as its kind's name and its parts, each a pair of (how the path names it, value)."""
        node = sha256(self.named(b"O", name))
        for step, value in parts:
            node.update(self.within(step, value))
        return b"O" + node.digest()

    def state(self, name: str, content: bytes, attributes: Mapping[str, object]) -> bytes:
        """An object as its kind's name, what its builtin base holds (or nothing), and its attributes."""
        node = sha256(self.named(b"P", name) + framed(content))
        for attribute in sorted(attributes):
            node.update(_str(attribute) + self.within("." + attribute, attributes[attribute]))
        return b"P" + node.digest()

    def sequence(self, tag: bytes, values: list[Any] | tuple[Any, ...]) -> bytes:
        """An ordered container."""
        node = sha256(tag)
        _members(self, node, values, "[{}]".format)
        return tag + node.digest()

    def mapping(self, tag: bytes, value: Mapping[Any, Any]) -> bytes:
        """A container of items without an order."""
        node = sha256(tag)
        keys = _sorted(value)
        if keys is not None:
            _members(self, node, keys, str)
            _members(self, node, [value[key] for key in keys], lambda at: f"[{_shown(keys[at])}]")
            return tag + node.digest()
        pairs = []
        for key, item in value.items():
            try:
                pairs.append(self.alone(key, item))
            except RefusedError as error:
                error.trail.append(f"[{_shown(key)}]")
                raise
        pairs.sort()
        node.update(b"~%d;" % len(pairs) + b"".join(pairs))
        return tag + node.digest()

    def set(self, tag: bytes, value: Iterable[Any]) -> bytes:
        """A container of members without an order."""
        node = sha256(tag)
        members = _sorted(value)
        if members is not None:
            _members(self, node, members, str)
            return tag + node.digest()
        try:
            codes = sorted(map(self.alone, value))
        except RefusedError as error:
            error.trail.append("{…}")
            raise
        node.update(b"~%d;" % len(codes) + b"".join(codes))
        return tag + node.digest()


def _shown(key: object) -> str:
    if isinstance(key, str | int | float | bytes | tuple):
        text = repr(key)
        return text if len(text) <= 60 else text[:57] + "…"
    return type_name(type(key))


def _sorted(values: Iterable[Any]) -> list[Any] | None:
    """Texts, or integers, in their own order. None for anything else."""
    kinds = set(map(type, values))
    return sorted(values) if kinds in ({str}, {int}) or not kinds else None


def _members(
    encode: Encoder, node: Any, values: list[Any] | tuple[Any, ...], step: Callable[[int], str]
) -> None:
    """Feed the members of an ordered container to `node`: their number, then a bulk form or one by one."""
    count = len(values)
    if count >= BULK and bulk(node, values, count):
        return
    node.update(b"*%d;" % count)
    at = 0
    codes: list[bytes] = []
    try:
        for at, value in enumerate(values):  # noqa: B007  # the path needs it when a member is refused
            codes.append(encode(value))
            if len(codes) == CHUNK:
                node.update(b"".join(codes))
                codes.clear()
    except RefusedError as error:
        error.trail.append(step(at))
        raise
    node.update(b"".join(codes))


# --- handlers: one for each type of compound value

_BUILTIN: dict[type, Handler] = {
    list: lambda encode, value: encode.sequence(b"l", value),
    tuple: lambda encode, value: encode.sequence(b"t", value),
    dict: lambda encode, value: encode.mapping(b"d", value),
    set: lambda encode, value: encode.set(b"h", value),
    frozenset: lambda encode, value: encode.set(b"z", value),
}
_KNOWN: WeakKeyDictionary[type, Handler] = WeakKeyDictionary()
_FINDERS: list[Callable[[type], Handler | None]] = []


def handles(*kinds: type) -> Callable[[Handler], Handler]:
    """The decorated function encodes values of exactly these types."""

    def add(handler: Handler) -> Handler:
        _BUILTIN.update(dict.fromkeys(kinds, handler))
        return handler

    return add


def finds(find: Callable[[type], Handler | None]) -> Callable[[type], Handler | None]:
    """The decorated function finds the handler of a type, or None. The first that knows the type is taken."""
    _FINDERS.append(find)
    return find


def finds_first(find: Callable[[type], Handler | None]) -> Callable[[type], Handler | None]:
    """As `finds`, but asked before those that are there already."""
    _FINDERS.insert(0, find)
    return find


def forget_handlers() -> None:
    """Ask the finders again, because one of them has learned something."""
    _KNOWN.clear()


def _handler_for(kind: type) -> Handler:
    handler = _KNOWN.get(kind)
    if handler is None:
        found = (find(kind) for find in _FINDERS)
        handler = _KNOWN[kind] = next(filter(None, found), Encoder.refuse)
    return handler
