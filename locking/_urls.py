"""Which lock manager a URL or a path means."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

from ..storage import storage_from_url
from ._errors import LockConfigurationError
from ._file.manager import FileLockManager
from ._manager import LockManager
from ._memory import MemoryLockManager
from ._redis.manager import RedisLockManager
from ._storage import StorageLockManager

_FORMS = (
    "a path, file:///path, memory://name, redis://host:port/database (rediss, valkey, valkeys, unix), "
    "s3://bucket/prefix, or storage+ and a storage's URL"
)
_EXAMPLES = {"lease_seconds": 30, "max_connections": 16}
_REDIS = ("redis", "rediss", "valkey", "valkeys", "unix")


def lock_manager_from_url(url: str | os.PathLike[str] | LockManager) -> LockManager:
    """The lock manager that a URL, a path, or a lock manager itself stands for. Opens nothing.

    A path and `file:///path` are a `FileLockManager`; `storage+file:///path`, `s3://bucket/prefix?…` and
    `storage+s3://…` a `StorageLockManager`, which closes its storage. `lease_seconds` is an option of all that
    take it, `max_connections` and `prefix` are of Redis; other options go to redis-py or to the storage.

    Raises:
        LockConfigurationError: Unknown scheme or option, or one that cannot work; it names what is known.
        StorageConfigurationError: The storage in the URL cannot work.
    """
    if isinstance(url, LockManager):
        return url
    if not isinstance(url, str) or "://" not in url:
        return FileLockManager(url)
    scheme = url.partition("://")[0]
    if scheme == "memory":
        return _memory(url)
    if scheme == "file":
        return _file(url)
    if scheme in _REDIS:
        plain, options = _split(url, lease_seconds=float, max_connections=int, prefix=str)
        return RedisLockManager(plain, **options)
    if scheme == "s3" or scheme.startswith("storage+"):
        plain, options = _split(url.removeprefix("storage+"), lease_seconds=float)
        manager = StorageLockManager(storage_from_url(plain), **options)
        manager.owns_storage = True
        return manager
    raise LockConfigurationError(f"Unknown scheme {scheme!r} in a lock manager's URL.", f"Give {_FORMS}.")


def _memory(url: str) -> LockManager:
    parts = urlsplit(url)
    name = unquote(parts.netloc + parts.path)
    if not name or parts.query:
        raise LockConfigurationError(
            f"{url!r} is not memory:// and a name.", "Write memory://name, or use MemoryLockManager()."
        )
    return MemoryLockManager(name)


def _file(url: str) -> LockManager:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/") or parts.query:
        raise LockConfigurationError(
            f"{url!r} names no folder.", "Write file:///absolute/path, or a path alone."
        )
    return FileLockManager(unquote(parts.path))


def _split(url: str, **kinds: Callable[[str], Any]) -> tuple[str, dict[str, Any]]:
    """The URL without the options that are the lock manager's own, and their values."""
    parts = urlsplit(url)
    query = parse_qsl(parts.query, keep_blank_values=True)
    options: dict[str, Any] = {}
    for name, value in query:
        if name not in kinds:
            continue
        try:
            options[name] = kinds[name](value)
        except ValueError:
            raise LockConfigurationError(
                f"{name}={value!r} is no number.", f"Write {name}={_EXAMPLES[name]}."
            ) from None
    if not options:
        return url, options
    rest = urlencode([(name, value) for name, value in query if name not in kinds])
    plain = urlunsplit(parts._replace(query=rest))
    return plain if "://" in plain else plain.replace(":", "://", 1), options  # unix:///path has no host
