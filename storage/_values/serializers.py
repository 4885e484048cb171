"""Serializers by name: `default`, `msgpack`, `pickle`, `json`, and `compressed/…` before each of them."""

from __future__ import annotations

import io
import pickle
import zlib
from abc import ABC, abstractmethod
from collections import ChainMap
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, ClassVar, NamedTuple
from urllib.parse import parse_qsl

from .._errors import SerializationError, StorageConfigurationError, StorageError, UnreadableValueError
from .._storage import Buffer
from . import codec, json

_STEP = 1 << 20


class Encoded(NamedTuple):
    """A value's segments, and the concrete serializer that a record has to name to read them back."""

    serializer: str
    segments: Sequence[Buffer]


class Serializer(ABC):
    """How values become bytes. Subclass it for your own, and pass an instance wherever a name goes.

    A serializer either restores a value with its exact type or refuses it; it never returns something close.
    It is used by several threads at once. `name` is written into every record, and a record is only read by
    the serializer whose name it has: give a changed format a new name.
    """

    name: str = ""

    @abstractmethod
    def dumps(self, value: Any) -> Sequence[Buffer]:
        """The value as one or more buffers. Any exception means that the value cannot be carried."""

    @abstractmethod
    def loads(self, segments: Sequence[Buffer]) -> Any:
        """The value again, from equal buffers (of any kind: `bytes`, `bytearray` or `memoryview`)."""

    def encode(self, value: Any) -> Encoded:
        """The value's segments and the name to record.

        Raises:
            SerializationError: The value cannot be carried.
        """
        try:
            return self._encode(value)
        except StorageError:
            raise
        except Exception as error:
            raise SerializationError(self.name, f"{type(error).__name__}: {error}") from error

    def decode(self, recorded: str, segments: Sequence[Buffer], *, imports: bool = False) -> Any:
        """The value of a record that names `recorded`; see `decode`, the function.

        Raises:
            UnreadableValueError: The value cannot be made again.
        """
        try:
            return self._decode(recorded, segments, imports)
        except StorageError:
            raise
        except Exception as error:
            raise UnreadableValueError(recorded, f"{type(error).__name__}: {error}") from error

    def reads(self, recorded: str) -> bool:
        """Whether a record that names `recorded` is this serializer's."""
        return recorded == self.name

    def _encode(self, value: Any) -> Encoded:
        return Encoded(self.name, self.dumps(value))

    def _decode(self, recorded: str, segments: Sequence[Buffer], imports: bool) -> Any:
        return self.loads(segments)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"


@dataclass(frozen=True, repr=False)
class MsgpackSerializer(Serializer):
    """msgpack with exact types; large buffers uncopied. Refuses what it does not know, see `codec`."""

    name = "msgpack"

    def dumps(self, value: Any) -> Sequence[Buffer]:
        return codec.dumps(value)

    def loads(self, segments: Sequence[Buffer]) -> Any:
        return codec.loads(segments)

    def _decode(self, recorded: str, segments: Sequence[Buffer], imports: bool) -> Any:
        return codec.loads(segments, imports=imports)


@dataclass(frozen=True, repr=False)
class JsonSerializer(Serializer):
    """Readable JSON with exact types, see `json`."""

    name = "json"

    def dumps(self, value: Any) -> Sequence[Buffer]:
        return json.dumps(value)

    def loads(self, segments: Sequence[Buffer]) -> Any:
        return json.loads(segments)

    def _decode(self, recorded: str, segments: Sequence[Buffer], imports: bool) -> Any:
        return json.loads(segments, imports=imports)


@dataclass(frozen=True, repr=False)
class PickleSerializer(Serializer):
    """Pickle protocol 5, and cloudpickle for what plain pickle refuses; large buffers (arrays) uncopied.

    Reading runs code of the writer's choosing. pickle holds the GIL for the whole of what is not a buffer.
    """

    name = "pickle"

    def dumps(self, value: Any) -> Sequence[Buffer]:
        try:
            return _pickle(pickle.dumps, value)
        except Exception as error:  # PicklingError, TypeError, AttributeError, RecursionError…
            refusal = error
        try:
            return _pickle(_cloudpickled, value)
        except Exception as error:
            reason = f"a {type(value).__module__}.{type(value).__qualname__}: {refusal}"
            raise SerializationError(self.name, reason) from error

    def loads(self, segments: Sequence[Buffer]) -> Any:
        # A buffer that cannot be written to would make an array that cannot either.
        buffers = [bytearray(part) if memoryview(part).readonly else part for part in segments[1:]]
        return pickle.loads(segments[0], buffers=buffers)


@dataclass(frozen=True, repr=False)
class DefaultSerializer(Serializer):
    """msgpack where it carries the value, else pickle. The record says which of them it was."""

    name = "default"

    def dumps(self, value: Any) -> Sequence[Buffer]:
        return self.encode(value).segments

    def loads(self, segments: Sequence[Buffer]) -> Any:
        raise TypeError("only a record's own serializer, msgpack or pickle, can read it")

    def reads(self, recorded: str) -> bool:
        return recorded in ("msgpack", "pickle")

    def _encode(self, value: Any) -> Encoded:
        try:
            return _MSGPACK.encode(value)
        except SerializationError as refusal:
            reason = refusal.reason
        try:
            return _PICKLE.encode(value)
        except SerializationError as error:
            raise SerializationError(self.name, f"{reason}; nor can pickle carry {error.reason}") from error

    def _decode(self, recorded: str, segments: Sequence[Buffer], imports: bool) -> Any:
        return _CONCRETE[recorded].decode(recorded, segments, imports=imports)


@dataclass(frozen=True, repr=False)
class CompressedSerializer(Serializer):
    """zlib over each segment of another serializer, in steps of 1 MiB, without the GIL.

    Args:
        inner: The other serializer.
        level: From 0 (none) and 1 (fastest) to 9 (smallest).
    """

    inner: Serializer
    level: int = 6

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Serializer):
            raise StorageConfigurationError(
                f"{self.inner!r} is not a Serializer.", "Pass an instance of one."
            )
        if isinstance(self.level, bool) or not isinstance(self.level, int) or not 0 <= self.level <= 9:
            raise StorageConfigurationError(
                f"The compression level {self.level!r} is not a whole number from 0 to 9.",
                "Use 6, or leave it out.",
            )

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"compressed/{self.inner.name}"

    def dumps(self, value: Any) -> Sequence[Buffer]:
        return self.encode(value).segments

    def loads(self, segments: Sequence[Buffer]) -> Any:
        return self.inner.loads([_expand(segment) for segment in segments])

    def reads(self, recorded: str) -> bool:
        return recorded.startswith("compressed/") and self.inner.reads(recorded.removeprefix("compressed/"))

    def _encode(self, value: Any) -> Encoded:
        name, segments = self.inner.encode(value)
        return Encoded(f"compressed/{name}", [_compress(segment, self.level) for segment in segments])

    def _decode(self, recorded: str, segments: Sequence[Buffer], imports: bool) -> Any:
        expanded = [_expand(segment) for segment in segments]
        return self.inner.decode(recorded.removeprefix("compressed/"), expanded, imports=imports)


def serializer_by_name(name: str | Serializer) -> Serializer:
    """The serializer of that name, with options as in `compressed/json?level=9`; an instance as it is.

    Raises:
        StorageConfigurationError: There is no such serializer or option (a ValueError).
        TypeError: Neither a name nor a serializer.
    """
    if isinstance(name, Serializer):
        if not name.name:
            raise StorageConfigurationError(
                f"{type(name).__name__} has no name.", "Set its `name`; records need it."
            )
        return name
    if not isinstance(name, str):
        raise TypeError(f"A serializer is given by name or as a Serializer instance, not as {name!r}.")
    plain, _, query = name.partition("?")
    inner = _BY_NAME.get(plain.removeprefix("compressed/"))
    if inner is None:
        raise StorageConfigurationError(f"There is no serializer {plain!r}.", _suggestion(plain))
    options = _options(name, query)
    if not plain.startswith("compressed/"):
        if options:
            raise StorageConfigurationError(
                f"The serializer {plain!r} has no option {', '.join(map(repr, options))}.", "Leave it out."
            )
        return inner
    if unknown := options.keys() - {"level"}:
        raise StorageConfigurationError(
            f"The serializer {plain!r} has no option {', '.join(map(repr, sorted(unknown)))}.",
            "It has 'level'.",
        )
    level = options.get("level", "6")
    return CompressedSerializer(inner, int(level) if level.isdecimal() else level)  # type: ignore[arg-type]


def decode(
    recorded: str, segments: Sequence[Buffer], *, using: Serializer | None = None, imports: bool = False
) -> Any:
    """The value of a record that names the serializer `recorded`.

    The caller decides beforehand whether pickle may be read, see `uses_pickle`.

    Args:
        recorded: The concrete name, as in `Encoded.serializer`.
        segments: As written. Nothing is copied if those in `Header.frozen` are `bytes` and the others are
            writable.
        using: The task's own serializer, which comes first where it knows the name.
        imports: Whether modules may be imported to find the classes of dataclasses and Enums: yes where
            the writer is trusted (a local folder, a verified signature). Without, only classes of packages
            that are imported already are found. Pickle imports what it likes.

    Raises:
        UnreadableValueError: No serializer of this name, or it cannot make the value again.
    """
    if using is not None and using.reads(recorded):
        return using.decode(recorded, segments, imports=imports)
    serializer = _CONCRETE.get(recorded)
    if serializer is None:
        raise UnreadableValueError(
            recorded,
            f"no serializer has this name. {_suggestion(recorded)} If it is your own, pass the instance",
        )
    return serializer.decode(recorded, segments, imports=imports)


def is_known(recorded: str, using: Serializer) -> bool:
    """Whether `decode` finds a serializer for records that name `recorded`."""
    return using.reads(recorded) or recorded in _CONCRETE


def is_builtin(serializer: Serializer) -> bool:
    """Whether it is one of those here, which restore a value exactly or refuse it."""
    while isinstance(serializer, CompressedSerializer):
        serializer = serializer.inner
    return type(serializer) in _BUILTIN


def uses_pickle(recorded: str) -> bool:
    """Whether reading a record of this serializer runs pickle, and so code of the writer's choosing."""
    return recorded.rpartition("/")[2] == "pickle"


def _options(name: str, query: str) -> dict[str, str]:
    try:
        return dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    except ValueError as error:
        raise StorageConfigurationError(
            f"The options of the serializer {name!r} cannot be read.", "Write them as '?level=6'."
        ) from error


def _suggestion(name: str) -> str:
    known = [*_BY_NAME, *(f"compressed/{each}" for each in _BY_NAME)]
    close = get_close_matches(name, known, 1)
    return (f"Did you mean {close[0]!r}? " if close else "") + f"Known are {', '.join(known)}."


def _pickle(dump: Any, value: Any) -> list[Buffer]:
    segments: list[Buffer] = [b""]

    def keep(buffer: pickle.PickleBuffer) -> bool:
        try:
            raw = buffer.raw()
        except BufferError:  # not one block of memory: pickle copies it
            return True
        if raw.nbytes < codec.OUT_OF_BAND:
            return True
        segments.append(raw)
        return False

    segments[0] = dump(value, protocol=5, buffer_callback=keep)
    return segments


def _cloudpickled(value: Any, **options: Any) -> bytes:
    """As cloudpickle.dumps, but for what that turns into something close: a memoryview or a file."""
    import cloudpickle  # imported for the few values that need it

    class Exact(cloudpickle.Pickler):  # type: ignore[misc]
        dispatch_table: ClassVar[Any] = ChainMap(
            {memoryview: _refuse, io.TextIOWrapper: _refuse},
            cloudpickle.Pickler.dispatch_table,  # pyright: ignore[reportArgumentType]  # it is only read
        )

    out = io.BytesIO()
    Exact(out, **options).dump(value)
    return out.getvalue()


def _refuse(value: Any) -> Any:
    raise TypeError(f"a {type(value).__qualname__} does not come back as one")


def _compress(segment: Buffer, level: int) -> Buffer:
    view, packer, out = memoryview(segment).cast("B"), zlib.compressobj(level), bytearray()
    for at in range(0, len(view), _STEP):
        out += packer.compress(view[at : at + _STEP])
    out += packer.flush()
    return out


def _expand(segment: Buffer) -> Buffer:
    unpacker, out = zlib.decompressobj(), bytearray()
    data: Buffer = segment
    while not unpacker.eof:
        step = unpacker.decompress(data, _STEP)
        if not step and not unpacker.unconsumed_tail:
            break
        out += step
        data = unpacker.unconsumed_tail
    if not unpacker.eof or unpacker.unused_data:
        raise ValueError("its compressed data ends too early or too late")
    return out


_MSGPACK, _PICKLE, _JSON, _DEFAULT = (
    MsgpackSerializer(),
    PickleSerializer(),
    JsonSerializer(),
    DefaultSerializer(),
)
_BUILTIN = frozenset(map(type, (_MSGPACK, _PICKLE, _JSON, _DEFAULT)))
_BY_NAME: dict[str, Serializer] = {each.name: each for each in (_DEFAULT, _MSGPACK, _PICKLE, _JSON)}
_CONCRETE: dict[str, Serializer] = {
    each.name: each for plain in (_MSGPACK, _PICKLE, _JSON) for each in (plain, CompressedSerializer(plain))
}
