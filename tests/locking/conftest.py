"""One place of each kind where locks are kept. A further kind is one more entry of PLACES."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from lock_places import Place
from onceflow.locking import LockManager, RedisLockManager, StorageLockManager, lock_manager_from_url
from redis_servers import RedisServer
from s3_servers import new_prefix, s3_bucket, s3_server
from tcp_proxy import TcpProxy, tcp_proxy


def _memory(request: pytest.FixtureRequest, folder: Path) -> Place:
    return Place("memory", f"memory://test-{uuid4().hex}", between_processes=False)


def _file(request: pytest.FixtureRequest, folder: Path) -> Place:
    return Place("file", f"file://{folder}/not/yet")


def _redis(request: pytest.FixtureRequest, folder: Path) -> Place:
    server: RedisServer = request.getfixturevalue("redis_server")
    server.ask(b"FLUSHALL")
    return Place("redis", server.url, leased=True)


def _storage_memory(request: pytest.FixtureRequest, folder: Path) -> Place:
    url = f"storage+memory://test-{uuid4().hex}"
    return Place("storage_memory", url, between_processes=False, leased=True)


def _storage_local(request: pytest.FixtureRequest, folder: Path) -> Place:
    return Place("storage_local", f"storage+file://{folder}/store", leased=True)


def _s3(request: pytest.FixtureRequest, folder: Path) -> Place:
    server = s3_server()
    monkeypatch: pytest.MonkeyPatch = request.getfixturevalue("monkeypatch")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    url = f"s3://{s3_bucket()}/{new_prefix()}?endpoint_url={server.endpoint_url}"
    return Place("s3", url, leased=True)


PLACES = {
    "memory": _memory,
    "file": _file,
    "redis": _redis,
    "storage_memory": _storage_memory,
    "storage_local": _storage_local,
    "s3": _s3,
}


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """A server for one test, which may do with it what it likes."""
    server = RedisServer()
    yield server
    server.kill()


@pytest.fixture
async def proxy(redis_server: RedisServer) -> AsyncIterator[TcpProxy]:
    """The network before the server that all share."""
    await asyncio.to_thread(redis_server.ask, b"FLUSHALL")
    async with tcp_proxy(redis_server.port) as one:
        yield one


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty place of each kind."""
    return PLACES[request.param](request, tmp_path)


@pytest.fixture
async def make(place: Place) -> AsyncIterator[Callable[..., LockManager]]:
    """Makes managers of the place, as so many processes would have them; all are closed afterwards."""
    made: list[LockManager] = []

    def one(lease_seconds: float | None = None) -> LockManager:
        manager = lock_manager_from_url(place.url)
        if lease_seconds is not None and isinstance(manager, (RedisLockManager, StorageLockManager)):
            manager.lease_seconds = lease_seconds
        made.append(manager)
        return manager

    yield one
    for manager in made:
        await manager.aclose()


@pytest.fixture
def manager(make: Callable[..., LockManager]) -> LockManager:
    """One manager of the place."""
    return make()
