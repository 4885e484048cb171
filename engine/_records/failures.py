"""The exceptions of failed runs, kept to be raised again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from ...storage import CorruptRecordError, PickleRefusedError, Storage, StorageError
from ...storage._format.envelope import Header, check_payload, pack, split, unpack_header
from ...storage._storage import Buffer
from ...storage._values.serializers import Encoded, PickleSerializer
from .._errors import RunFailedError
from .._runs.run import new_id

if TYPE_CHECKING:
    from .record import Facts

_PICKLE = PickleSerializer()


class Failures:
    """The part of `Records` that keeps exceptions. They are pickled, and refused like any other pickle."""

    _offload: Callable[..., Awaitable[Any]]
    _clock: Callable[[], float]
    signing_keys: tuple[bytes, ...]
    _allow_pickle: bool

    async def keep_failure(self, storage: Storage, error: BaseException, facts: Facts) -> str:
        """Store the exception of a failed run under a random key, never a cache key, and return that key.

        What cannot be pickled and made again is stored as a RunFailedError with its text. Costs one thread hop
        and one write; cancelled, it leaves the whole object or nothing.

        Raises:
            PickleRefusedError: The storage is shared, and nothing vouches for pickled values there.
            StorageError: The storage could not take it.
        """
        location = new_id()
        buffers: list[Buffer] = await self._offload(self._pack_failure, storage, location, error, facts)
        await storage.write(location, buffers)
        return location

    def _pack_failure(self, storage: Storage, key: str, error: BaseException, facts: Facts) -> list[Buffer]:
        self._check_failure(storage, type(error).__qualname__, bool(self.signing_keys))
        encoded = _encode(error)
        header = Header(
            key=key,
            created=self._clock(),
            serializer=encoded.serializer,
            run_id=facts.run_id,
            task=facts.task,
            components=facts.components,
            kind="failure",
        )
        return pack(header, encoded.segments, signing_keys=self.signing_keys)

    async def failure(self, storage: Storage, location: str) -> BaseException:
        """The exception that a failed run left at `location` (that of its state), to be raised again.

        Costs one read and one thread hop.

        Raises:
            ObjectNotFoundError: There is none.
            RecordError: What lies there is no failure, or is damaged.
            PickleRefusedError: It is unsigned, and the storage is shared.
            UnreadableValueError: Its class is not there any more.
        """
        data = await storage.read(location)
        error: BaseException = await self._offload(self._unpack_failure, storage, data)
        return error

    def _unpack_failure(self, storage: Storage, data: Buffer) -> BaseException:
        header, offset = unpack_header(data, signing_keys=self.signing_keys)
        if header.kind != "failure":
            raise CorruptRecordError(f"it is a {header.kind}, not a failure")
        self._check_failure(storage, f"failure of {header.task!r}", header.signed)
        segments = split(header, memoryview(data)[offset:])
        check_payload(header, segments)
        error = _PICKLE.decode(header.serializer, segments)
        if not isinstance(error, BaseException):
            raise CorruptRecordError(f"it holds {error!r}, not an exception")
        return error

    def _check_failure(self, storage: Storage, what: str, signed: bool) -> None:
        if storage.shared and not signed and not self._allow_pickle:
            raise PickleRefusedError(storage.url, what)


def _encode(error: BaseException) -> Encoded:
    """The exception, or its text where it does not come back: many pickle, but cannot be made of what they kept."""
    try:
        encoded = _PICKLE.encode(error)
        _PICKLE.decode(encoded.serializer, encoded.segments)
    except StorageError:
        return _PICKLE.encode(RunFailedError("Failed", f"{type(error).__name__}: {error}"))
    return encoded
