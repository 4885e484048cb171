"""The ways to be SERIALIZABLE: where records lie, and who locks. A further way is one more entry of WAYS."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import pytest
from onceflow.engine import Engine
from onceflow.locking import LockManager, RedisLockManager, StorageLockManager, lock_manager_from_url
from onceflow.storage import ObjectNotFoundError, Storage, storage_from_url
from onceflow.storage._format.envelope import unpack_header
from redis_servers import RedisServer
from s3_servers import new_prefix, s3_bucket, s3_server


class Way(NamedTuple):
    """Where records lie and who locks, as URLs; whether other processes reach both, and what ends with a lease."""

    kind: str
    storage: str
    locks: str
    between_processes: bool = True
    leased: bool = False

    @property
    def claims(self) -> bool:
        """Whether the records are their own locks."""
        return self.kind.startswith("claims")

    def with_lease(self, seconds: float) -> str:
        """The URL of the locks, with so short a lease, where there is one."""
        return (
            f"{self.locks}{'&' if '?' in self.locks else '?'}lease_seconds={seconds}"
            if self.leased
            else self.locks
        )


class Side:
    """One engine's side of a way, with a storage and a lock manager of its own, as another process would have."""

    def __init__(
        self, way: Way, lease: float | None = None, storage: Storage | None = None, **options: Any
    ) -> None:
        self.way = way
        self.storage = storage or storage_from_url(way.storage)
        self.locks: LockManager = lock_manager_from_url(way.locks)
        if way.claims:
            self.locks = StorageLockManager(self.storage)
        if lease is not None and isinstance(self.locks, (RedisLockManager, StorageLockManager)):
            self.locks.lease_seconds = lease
        self.engine = Engine(self.storage, self.locks, **options)

    async def is_free(self, key: str) -> bool:
        """Whether nobody holds the key, and nobody in this engine waits for it."""
        if len(self.engine.flights):
            return False
        if not self.way.claims:
            return not await self.locks.is_locked(key)
        try:
            return unpack_header(await self.storage.read(key))[0].kind != "claim"
        except ObjectNotFoundError:
            return True

    async def __aenter__(self) -> Side:
        await self.engine.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self.engine.__aexit__(*error)
        await self.locks.aclose()
        await self.storage.aclose()


def _memory(request: pytest.FixtureRequest, folder: Path) -> Way:
    name = uuid4().hex
    return Way("memory", f"memory://{name}", f"memory://{name}", between_processes=False)


def _file(request: pytest.FixtureRequest, folder: Path) -> Way:
    return Way("file", f"file://{folder}/records", f"file://{folder}/locks")


def _redis(request: pytest.FixtureRequest, folder: Path) -> Way:
    server: RedisServer = request.getfixturevalue("redis_server")
    server.ask(b"FLUSHALL")
    return Way("redis", f"file://{folder}/records", server.url, leased=True)


def _storage(request: pytest.FixtureRequest, folder: Path) -> Way:
    return Way("storage", f"file://{folder}/records", f"storage+file://{folder}/locks", leased=True)


def _claims_memory(request: pytest.FixtureRequest, folder: Path) -> Way:
    url = f"memory://{uuid4().hex}"
    return Way("claims_memory", url, f"storage+{url}", between_processes=False, leased=True)


def _claims_local(request: pytest.FixtureRequest, folder: Path) -> Way:
    url = f"file://{folder}/records"
    return Way("claims_local", url, f"storage+{url}", leased=True)


def _claims_s3(request: pytest.FixtureRequest, folder: Path) -> Way:
    server = s3_server()
    monkeypatch: pytest.MonkeyPatch = request.getfixturevalue("monkeypatch")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    url = f"s3://{s3_bucket()}/{new_prefix()}?endpoint_url={server.endpoint_url}"
    return Way("claims_s3", url, url, leased=True)


WAYS = {
    "memory": _memory,
    "file": _file,
    "redis": _redis,
    "storage": _storage,
    "claims_memory": _claims_memory,
    "claims_local": _claims_local,
    "claims_s3": _claims_s3,
}

SHARED = [kind for kind in WAYS if "memory" not in kind]
"""Those that several processes reach."""
