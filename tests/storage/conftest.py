"""One store of each kind. A further kind is one more entry of STORES."""

from __future__ import annotations

import pickle
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from uuid import uuid4

import pytest
from onceflow.storage import LocalStorage, MemoryStorage, S3Storage, Storage
from s3_servers import new_prefix, s3_bucket, s3_server

Store = Callable[[pytest.FixtureRequest, Path], AbstractAsyncContextManager[Storage]]


@asynccontextmanager
async def memory(request: pytest.FixtureRequest, folder: Path) -> AsyncIterator[Storage]:
    async with MemoryStorage(f"test-{uuid4().hex}") as storage:
        yield storage


@asynccontextmanager
async def local(request: pytest.FixtureRequest, folder: Path) -> AsyncIterator[Storage]:
    async with LocalStorage(folder / "not" / "yet") as storage:
        yield storage


@asynccontextmanager
async def local_power(request: pytest.FixtureRequest, folder: Path) -> AsyncIterator[Storage]:
    async with LocalStorage(folder, durability="power", threads=2) as storage:
        yield storage


@asynccontextmanager
async def local_by_thread(request: pytest.FixtureRequest, folder: Path) -> AsyncIterator[Storage]:
    """As on systems that cannot read inline, and on file systems that cannot."""
    async with LocalStorage(folder) as storage:
        storage._inline = False
        yield storage


@pytest.fixture
def s3_at(monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """The endpoint and the bucket of the S3 server of this run, with its keys in the environment."""
    server = s3_server()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server.endpoint_url, s3_bucket()


@asynccontextmanager
async def s3(request: pytest.FixtureRequest, folder: Path) -> AsyncIterator[Storage]:
    endpoint_url, bucket = request.getfixturevalue("s3_at")
    async with S3Storage(bucket, new_prefix(), endpoint_url=endpoint_url, part_size=5 * 1024**2) as storage:
        yield storage


STORES: dict[str, Store] = {
    "memory": memory,
    "local": local,
    "local_power": local_power,
    "local_by_thread": local_by_thread,
    "s3": s3,
}
"""Each makes an empty store, given the request (`request.getfixturevalue` starts servers) and a folder."""


@pytest.fixture(params=STORES)
def kind(request: pytest.FixtureRequest) -> str:
    """The name of a store, with its server started: that blocks, so it happens outside of the loop."""
    if request.param == "s3":
        request.getfixturevalue("s3_at")
    return str(request.param)


@pytest.fixture
async def storage(request: pytest.FixtureRequest, kind: str, tmp_path: Path) -> AsyncIterator[Storage]:
    """An empty store of the kind, closed afterwards."""
    async with STORES[kind](request, tmp_path) as one:
        yield one


@pytest.fixture
async def fresh(storage: Storage) -> AsyncIterator[Callable[[], Storage]]:
    """Makes further storages of the same store, as another process would have them: from the pickle."""
    made: list[Storage] = []

    def make() -> Storage:
        one = pickle.loads(pickle.dumps(storage))
        assert isinstance(one, Storage)
        made.append(one)
        return one

    yield make
    for one in made:
        await one.aclose()
