"""Objects as files in one folder."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterable, AsyncIterator
from functools import cached_property, partial
from typing import Any, Literal
from urllib.parse import quote

from .._errors import StorageClosedError, StorageConfigurationError, StorageError, VersionMismatchError
from .._names import key_of, name_of, name_prefix
from .._runtime.buffers import buffers_of
from .._runtime.threads import Hops
from .._storage import Buffer, Data, Stat, Storage, Stored
from . import reading as files
from .errors import edge, translated
from .locking import SUPPORTED, remove
from .streaming import Pouring
from .writing import Draft, sweep

DEFAULT_PATH = "~/.onceflow/storage"
DEFAULT_THREADS = 8
_SCAN = 256  # entries for one hop of a listing: a millisecond

_swept: set[str] = set()  # folders whose old drafts this process has removed


class LocalStorage(Storage):
    """One file for an object in one flat folder; the file's name is the key where the key is safe as a name.

    A write is a draft, renamed when it is whole: readers and a kill at any moment meet the old object or the
    new one. Conditions hold between tasks, threads and processes of one machine. With `durability="process"`
    what was written survives the process, killed or not; with `"power"` it survives the machine, for two
    fsyncs a write. Entries that are not regular files are refused: a link never leads outside.

    Cost: a read of up to 256 KiB that lies in memory happens on the loop (Linux; some 10 µs, the file's data
    are never waited for), and so does a miss; any other operation is one thread hop, and operations that come
    together share hops. A listing takes one hop for 256 entries, streamed data one for a MiB.

    A cancelled write is awaited until its thread is out, at most for one piece of 16 MiB, and leaves the old
    object or the new one and no draft.

    Args:
        path: The folder; made at the first write, for this user only. `~` is looked up at first use.
        durability: What a finished write survives.
        threads: At most so many work for this storage, all loops together.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        durability: Literal["process", "power"] = "process",
        threads: int = DEFAULT_THREADS,
    ) -> None:
        if not SUPPORTED:
            raise StorageConfigurationError(
                "LocalStorage needs the file locks of Linux or macOS.",
                "Use S3Storage, MemoryStorage, or WSL.",
            )
        if durability not in ("process", "power"):
            raise StorageConfigurationError(
                f"Unknown durability {durability!r}.", "Known are 'process' (default) and 'power'."
            )
        if threads < 1:
            raise StorageConfigurationError(
                f"A LocalStorage with {threads} threads cannot work.", "Give threads=1 or more."
            )
        self._path = _checked_path(DEFAULT_PATH if path is None else path)
        self._durability: Literal["process", "power"] = durability
        self._durable = durability == "power"
        self._threads = threads
        self._hops = Hops(threads, "onceflow-storage")
        self._inline = files.can_read_inline()
        self._closed = False

    @cached_property
    def path(self) -> str:
        """The folder, absolute."""
        path = os.path.expanduser(self._path)
        if not os.path.isabs(path):
            raise StorageConfigurationError(
                f"The home folder in {self._path!r} is unknown.", "Set HOME, or give an absolute path."
            )
        return os.path.normpath(path)

    @cached_property
    def url(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]  # it never changes
        """`file://` and the absolute path, with the options that are not the default as a query."""
        options = ["durability=power"] if self._durability == "power" else []
        if self._threads != DEFAULT_THREADS:
            options.append(f"threads={self._threads}")
        return f"file://{quote(self.path)}" + ("?" + "&".join(options) if options else "")

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
        """See `Storage.fetch`. Inline if the bytes are in memory and at most 256 KiB, else one hop."""
        path = self._file(key)
        try:
            if self._inline:
                try:
                    return files.read(path, start, stop, unless, if_version, into, wait=False)
                except BlockingIOError:
                    pass
                except OSError as error:
                    if error.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP):
                        raise
                    self._inline = (
                        False  # network and user-space file systems: not even an open is cheap there
                    )
            return await self._hops.run(files.read, path, start, stop, unless, if_version, into)
        except (OSError, files.Mismatch) as error:
            raise self._translated(error, "read", key, if_version) from error

    async def write(
        self, key: str, data: Data, *, if_absent: bool = False, if_version: str | None = None
    ) -> str:
        """See `Storage.write`. One hop; streamed data, one for each MiB and three more."""
        if if_absent and if_version is not None:
            raise ValueError("A write is only-if-absent or only-if-version, never both. Leave one out.")
        target = self._file(key)
        draft = Draft(self.path, self._durable)
        if isinstance(data, AsyncIterable):
            version = await self._write_stream(key, draft, target, data, if_absent, if_version)
        else:
            buffers = buffers_of(data)
            try:
                version = await self._hops.run(
                    draft.write_object, target, buffers, if_absent, if_version, on_cancel=draft.stop
                )
            except (OSError, files.Mismatch) as error:
                raise self._translated(error, "write", key, if_version) from error
        if self.path not in _swept:
            _swept.add(self.path)
            self._hops.later(partial(sweep, self.path))
        return version

    async def _write_stream(
        self,
        key: str,
        draft: Draft,
        target: str,
        stream: AsyncIterable[Buffer],
        if_absent: bool,
        if_version: str | None,
    ) -> str:
        """The one write of many hops, hence an aiofiles file. What fails or is cancelled leaves no draft."""
        pouring = Pouring(draft, self._hops.executor())
        try:
            async for chunk in stream:  # its errors are its own
                with edge("write", key, self.url):
                    await pouring.add(chunk)
            try:
                await pouring.finish()
                return await self._hops.run(
                    draft.publish, target, if_absent, if_version, on_cancel=draft.stop
                )
            except (OSError, files.Mismatch) as error:
                raise self._translated(error, "write", key, if_version) from error
        except BaseException:
            await pouring.discard()
            raise

    async def stat(self, key: str) -> Stat | None:
        """See `Storage.stat`. Inline where reads are, else one hop."""
        path = self._file(key)
        try:
            info = files.look(path) if self._inline else await self._hops.run(files.look, path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._translated(error, "look at", key) from error
        return _stat(key_of(name_of(key)), info)

    async def delete(self, key: str, *, if_version: str | None = None) -> bool:
        """See `Storage.delete`. One hop."""
        target = self._file(key)
        try:
            return await self._hops.run(remove, target, if_version, self._durable)
        except (OSError, files.Mismatch) as error:
            raise self._translated(error, "delete", key, if_version) from error

    async def list(self, prefix: str = "") -> AsyncIterator[Stat]:
        """See `Storage.list`. One hop for 256 entries; what is written meanwhile may be listed or not."""
        self._file("any")  # refuses a closed storage
        beginning = name_prefix(prefix)
        scan = files.Scan(self.path)
        try:
            while True:
                with edge("list", prefix, self.url):
                    batch = await self._hops.run(scan.batch, beginning, _SCAN)
                if not batch:
                    break
                for name, info in batch:
                    try:
                        key = key_of(name)
                    except ValueError:
                        continue  # not ours
                    if key.startswith(prefix):
                        yield _stat(key, info)
        finally:
            scan.close()

    async def aclose(self) -> None:
        """See `Storage.aclose`. What runs is finished; idle threads end at once."""
        self._closed = True
        self._hops.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), durability=self._durability, threads=self._threads), (self._path,)

    def _file(self, key: str) -> str:
        if self._closed:
            raise StorageClosedError(self.url)
        return f"{self.path}/{name_of(key)}"

    def _translated(
        self, error: OSError | files.Mismatch, operation: str, key: str, expected: str | None = None
    ) -> StorageError:
        if isinstance(error, files.Mismatch):
            assert expected is not None
            return VersionMismatchError(key, self.url, expected)
        return translated(error, operation, key, self.url)


def _stat(key: str, info: os.stat_result) -> Stat:
    return Stat(key, info.st_size, files.version_of(info), info.st_mtime)


def _checked_path(path: str | os.PathLike[str]) -> str:
    given = os.fspath(path)
    if not isinstance(given, str) or not given or "\0" in given:
        raise StorageConfigurationError(
            f"{given!r} is not the path of a folder.", "Give one, such as './results'."
        )
    if given.startswith("~"):
        return given
    # A relative path is that of now: the working folder may be another later, and is in another process.
    # getcwdb asks the kernel and no disk; getcwd is taken for blocking where blocking calls are watched for.
    return os.path.normpath(given if os.path.isabs(given) else os.path.join(os.fsdecode(os.getcwdb()), given))
