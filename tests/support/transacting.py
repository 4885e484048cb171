"""What the tests of transactions share: fixtures over three storages, two tasks, and what lies in a storage.

Import the fixtures by name into a test module.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import pytest
from onceflow.engine import INPUTS, Engine, task
from onceflow.locking import MemoryLockManager
from onceflow.storage import LocalStorage, MemoryStorage, S3Storage, Storage
from onceflow.storage._format.envelope import unpack_header
from s3_servers import new_prefix, s3_bucket, s3_server

KINDS = ("memory", "local", "s3")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A kind of storage, its server started: that blocks, so it happens outside of the loop."""
    if request.param == "s3":
        for name, value in s3_server().environment.items():
            monkeypatch.setenv(name, value)
        s3_bucket()
    return str(request.param)


@pytest.fixture
async def storage(kind: str, tmp_path: Path) -> AsyncIterator[Storage]:
    made: Storage
    if kind == "memory":
        made = MemoryStorage(f"test-{uuid4().hex}")
    elif kind == "local":
        made = LocalStorage(tmp_path)
    else:
        made = S3Storage(s3_bucket(), new_prefix(), endpoint_url=s3_server().endpoint_url)
    async with made:
        yield made


@pytest.fixture
async def engine(storage: Storage) -> AsyncIterator[Engine]:
    async with Engine(storage=storage, lock_manager=MemoryLockManager()) as engine:
        yield engine


@pytest.fixture
async def local_engine(tmp_path: Path) -> AsyncIterator[Engine]:
    """For what does not depend on the storage."""
    async with Engine(storage=LocalStorage(tmp_path), lock_manager=MemoryLockManager()) as engine:
        yield engine


async def records_in(storage: Storage) -> list[str]:
    """The kinds of what lies there; the engine's own notes, and failures kept aside, left out."""
    keys = [stat.key async for stat in storage.list() if stat.key[0] not in ".\0"]
    kinds = [unpack_header(await storage.read(key))[0].kind for key in keys]
    return [kind for kind in kinds if kind != "failure"]


ran: list[str] = []


@pytest.fixture(autouse=True)
def nothing_ran() -> None:
    ran.clear()


@task(cache_policy=INPUTS)
async def load(x: int) -> dict[str, int]:
    ran.append(f"load {x}")
    return {"loaded": x}


@task(cache_policy=INPUTS)
async def process(x: int, fail: bool = False) -> list[int]:
    ran.append(f"process {x}")
    if fail:
        raise ValueError("cannot process")
    return [x] * 3


class Boom(Exception):
    pass


SERIALIZABLE = INPUTS.configure(isolation_level="SERIALIZABLE")
