"""Objects in this process's memory. Also the contract of `Storage`, to be read."""

from __future__ import annotations

import itertools
import threading
import time
import uuid
from collections.abc import AsyncIterable, AsyncIterator
from functools import cached_property
from typing import Any, NamedTuple
from urllib.parse import quote
from weakref import WeakValueDictionary

from ._errors import ObjectExistsError, ObjectNotFoundError, StorageClosedError, VersionMismatchError
from ._names import key_of, name_of
from ._runtime.buffers import buffers_of, clip
from ._storage import Data, Stat, Storage, Stored


class _Object(NamedTuple):
    data: bytes
    version: str
    modified: float


class _Store:
    """What all storages of one name share: the objects, and the lock under which conditions are decided."""

    def __init__(self) -> None:
        self.objects: dict[str, _Object] = {}
        self.lock = threading.Lock()
        self.versions = (f"{number:x}" for number in itertools.count(1))


_ANONYMOUS = "anonymous-"
_stores: WeakValueDictionary[str, _Store] = WeakValueDictionary()
_kept: dict[str, _Store] = {}  # by names that were given: their objects stay when the last storage is dropped
_registry = threading.Lock()


class MemoryStorage(Storage):
    """Objects in a dictionary: for tests, for one process, and as the readable specification of `Storage`.

    All storages of one name in a process are one store, which lives as long as the process; without a name,
    a store of its own, which lives as long as this object. What is written is copied in, so that the caller
    may change the buffers, and what is read is immutable. No operation suspends, but for streamed data.
    """

    def __init__(self, name: str | None = None) -> None:
        self.name = name if name is not None else f"{_ANONYMOUS}{uuid.uuid4().hex}"
        with _registry:
            self._store = _stores.setdefault(self.name, _Store())
            if not self.name.startswith(_ANONYMOUS):
                _kept[self.name] = self._store
        self._closed = False

    @cached_property
    def url(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]  # it never changes
        """`memory://` and the name."""
        return f"memory://{quote(self.name, safe='')}"

    async def fetch(
        self,
        key: str,
        start: int = 0,
        stop: int | None = None,
        *,
        unless: str | None = None,
        if_version: str | None = None,
        into: bytearray | memoryview | None = None,
    ) -> Stored | None:
        """See `Storage.fetch`. A whole object is handed out without a copy, for it is immutable."""
        found = self._objects().get(name_of(key))
        if found is None:
            raise ObjectNotFoundError(key, self.url)
        if if_version is not None and found.version != if_version:
            raise VersionMismatchError(key, self.url, if_version)
        if unless == found.version:
            return None
        size = len(found.data)
        start, stop = clip(start, stop, size)
        if into is None:
            return Stored(found.data[start:stop], found.version, size)
        target = memoryview(into).cast("B")
        target = target[: stop - start]
        target[:] = found.data[start : start + len(target)]
        return Stored(target, found.version, size)

    async def write(
        self, key: str, data: Data, *, if_absent: bool = False, if_version: str | None = None
    ) -> str:
        """See `Storage.write`. Buffers are copied once."""
        name = name_of(key)
        if if_absent and if_version is not None:
            raise ValueError("A write is only-if-absent or only-if-version, never both. Leave one out.")
        objects = self._objects()
        if isinstance(data, AsyncIterable):
            # Each piece is copied before the next is asked for: sources reuse their buffers.
            content = b"".join([bytes(view) async for piece in data for view in buffers_of(piece)])
        else:
            content = b"".join(buffers_of(data))
        with self._store.lock:
            current = objects.get(name)
            if if_absent and current is not None:
                raise ObjectExistsError(key, self.url)
            if if_version is not None and (current is None or current.version != if_version):
                raise VersionMismatchError(key, self.url, if_version)
            version = next(self._store.versions)
            objects[name] = _Object(content, version, time.time())
        return version

    async def stat(self, key: str) -> Stat | None:
        """See `Storage.stat`."""
        name = name_of(key)
        found = self._objects().get(name)
        return None if found is None else _stat(name, found)

    async def delete(self, key: str, *, if_version: str | None = None) -> bool:
        """See `Storage.delete`."""
        name, objects = name_of(key), self._objects()
        with self._store.lock:
            current = objects.get(name)
            if current is None:
                return False
            if if_version is not None and current.version != if_version:
                raise VersionMismatchError(key, self.url, if_version)
            del objects[name]
        return True

    async def list(self, prefix: str = "") -> AsyncIterator[Stat]:
        """See `Storage.list`. The objects of the moment in which the listing begins."""
        with self._store.lock:
            snapshot = sorted(self._objects().items())
        for name, found in snapshot:
            if name.startswith("."):
                continue  # a note of onceflow's own
            stat = _stat(name, found)
            if stat.key.startswith(prefix):
                yield stat

    async def aclose(self) -> None:
        """Refuse further use of this object. The store and its other storages stay."""
        self._closed = True

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name,)

    def _objects(self) -> dict[str, _Object]:
        if self._closed:
            raise StorageClosedError(self.url)
        return self._store.objects


def _stat(name: str, found: _Object) -> Stat:
    return Stat(key_of(name), len(found.data), found.version, found.modified)
