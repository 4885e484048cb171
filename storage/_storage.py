"""The one interface of every storage: objects under text keys, each write atomic, some conditional."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from types import TracebackType
from typing import NamedTuple, Self

Buffer = bytes | bytearray | memoryview
Data = Buffer | Sequence[Buffer] | AsyncIterable[Buffer]


class Stat(NamedTuple):
    """What is known of an object without reading it. `modified` is Unix time in seconds, `size` in bytes."""

    key: str
    size: int
    version: str
    modified: float


class Stored(NamedTuple):
    """An object, or the asked range of it: its bytes, its version, its whole size in bytes."""

    data: Buffer
    version: str
    size: int


class Storage(ABC):
    """Objects under text keys, in memory, in a folder or in a bucket.

    Any non-empty text is a key: `/`, `..`, odd characters and any length map to one safe, unique name,
    and nothing ever lies outside the storage. The name is the key itself where the key allows it.

    Every write is atomic: a reader sees the old object or the new one, whole, never a part, also when the
    writer is killed or cancelled. A *version* is an opaque text that changes with every write of a key and
    never comes back. Conditions (`if_absent`, `if_version`) are decided by the store in one step with the
    write, also between processes.

    Storages are cheap to make and open nothing before first use, serve several event loops and threads at
    once, and pickle (their configuration only; `MemoryStorage` by its name).
    """

    shared: bool = False
    """Whether others can write here, so that pickled values are refused unless they are signed."""

    @property
    @abstractmethod
    def url(self) -> str:
        """The URL that `storage_from_url` makes an equal storage from. Free of credentials."""

    async def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        """The object's bytes, or those of `[start, stop)`, which may be shorter at the object's end.

        Raises:
            ObjectNotFoundError: Nothing is stored under `key`.
        """
        stored = await self.fetch(key, start, stop)
        assert stored is not None  # None answers `unless` only
        return bytes(stored.data)

    @abstractmethod
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
        """Bytes and version in one read (S3: one GET; local: inline when the file is in memory, else one hop).

        Args:
            key: Which object.
            start: First byte of the range.
            stop: End of the range, exclusive; beyond the object's end is no error.
            unless: Answer None instead of bytes when this is still the object's version (S3: 304).
            if_version: Refuse with VersionMismatchError unless this is the object's version, so that the
                parts of a large object can be read one by one.
            into: Fill this buffer instead of making a new one; it becomes `data` (cut to what was read).

        Raises:
            ObjectNotFoundError: Nothing is stored under `key`.
        """

    @abstractmethod
    async def write(
        self, key: str, data: Data, *, if_absent: bool = False, if_version: str | None = None
    ) -> str:
        """Store an object whole and return its new version.

        `data` is one buffer, several to be joined (without a copy), or an async iterable of buffers, which
        is streamed in bounded memory. A cancelled write leaves the old object or the new one, and nothing else.

        Raises:
            ObjectExistsError: `if_absent`, and the key is taken.
            VersionMismatchError: `if_version`, and the object is another one or gone.
        """

    @abstractmethod
    async def stat(self, key: str) -> Stat | None:
        """What is known of the object without reading it; None where there is none."""

    @abstractmethod
    async def delete(self, key: str, *, if_version: str | None = None) -> bool:
        """Remove the object; whether there was one.

        Raises:
            VersionMismatchError: `if_version`, and the object is another one. Nothing is removed.
        """

    @abstractmethod
    def list(self, prefix: str = "") -> AsyncIterator[Stat]:
        """Every object whose key begins with `prefix`, in no promised order, as a stream of any length.

        A key too long to be a name is listed by its alias `~<sha256>`, which every method accepts for it.
        A listed version serves every condition; on S3 it is shorter than the one that `stat` tells, because
        a listing does not have the metadata.
        """

    async def ensure_conditional(self) -> None:  # noqa: B027 - where conditions always hold there is nothing to do
        """Return if the conditions of this storage's writes are honoured; locks and transactions ask first.

        Memory and local storage always honour them. A bucket is tried out, once for each process.

        Raises:
            ConditionsUnsupportedError: They are not honoured, so that no lock can be built on them.
        """

    async def aclose(self) -> None:  # noqa: B027 - nothing to close is a way of closing
        """Give back clients and threads of every loop. Idempotent; what is stored stays."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"
