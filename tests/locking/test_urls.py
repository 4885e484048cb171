"""Which lock manager a URL means."""

from __future__ import annotations

from pathlib import Path

import pytest
from onceflow.locking import (
    FileLockManager,
    LockConfigurationError,
    MemoryLockManager,
    RedisLockManager,
    StorageLockManager,
    lock_manager_from_url,
)
from onceflow.storage import LocalStorage, S3Storage


def test_kinds(tmp_path: Path) -> None:
    """Every kind of URL makes its manager, and the manager's URL makes an equal one."""
    kinds = {
        "memory://some%2Fname": MemoryLockManager,
        f"file://{tmp_path}/a%20b": FileLockManager,
        "redis://localhost:6379/3": RedisLockManager,
        "rediss://host:1234/0": RedisLockManager,
        "s3://bucket/prefix?endpoint_url=http://127.0.0.1:9": StorageLockManager,
        f"storage+file://{tmp_path}": StorageLockManager,
        "storage+memory://store": StorageLockManager,
    }
    for url, kind in kinds.items():
        manager = lock_manager_from_url(url)
        assert type(manager) is kind
        assert lock_manager_from_url(manager.url).url == manager.url
        assert type(lock_manager_from_url(manager.url)) is kind
        assert repr(manager) == f"{kind.__name__}({manager.url!r})"
        assert lock_manager_from_url(manager) is manager


def test_paths(tmp_path: Path) -> None:
    """A path is a folder of lock files."""
    for path in (tmp_path, str(tmp_path)):
        manager = lock_manager_from_url(path)
        assert isinstance(manager, FileLockManager)
        assert manager.path == str(tmp_path)
    encoded = lock_manager_from_url(f"file://{tmp_path}/a%20b")
    assert isinstance(encoded, FileLockManager)
    assert encoded.path == f"{tmp_path}/a b"


def test_storages(tmp_path: Path) -> None:
    """A bucket is a storage with leases; so is anything behind `storage+`."""
    bucket = lock_manager_from_url("s3://bucket/prefix")
    assert isinstance(bucket, StorageLockManager)
    assert isinstance(bucket.storage, S3Storage)
    folder = lock_manager_from_url(f"storage+file://{tmp_path}?durability=power&lease_seconds=7")
    assert isinstance(folder, StorageLockManager)
    assert isinstance(folder.storage, LocalStorage)
    assert folder.lease_seconds == 7
    assert folder.url == f"storage+file://{tmp_path}?durability=power&lease_seconds=7"


def test_redis() -> None:
    """Valkey's schemes are Redis's; the password is never shown."""
    manager = lock_manager_from_url("valkeys://user:secret@host:1/2?lease_seconds=12")
    assert isinstance(manager, RedisLockManager)
    assert manager.lease_seconds == 12
    assert manager.url == "rediss://host:1/2?lease_seconds=12"
    assert "secret" not in repr(manager)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host",
        "memory://",
        "file://host/path",
        "file://",
        "redis://h?lease_seconds=x",
        "redis://h?lease_seconds=0",
    ],
)
def test_refused(url: str) -> None:
    """What cannot work is refused at once, with what would."""
    with pytest.raises(LockConfigurationError):
        lock_manager_from_url(url)


def test_memory_by_name() -> None:
    """Memory managers of one name share their locks' room; without a name each is alone."""
    one, same = lock_manager_from_url("memory://shared"), MemoryLockManager("shared")
    assert one._room is same._room  # type: ignore[attr-defined]
    assert MemoryLockManager()._room is not MemoryLockManager()._room
