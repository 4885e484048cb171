"""What is particular to MemoryStorage; the rest is the contract."""

from __future__ import annotations

import gc
import pickle
from uuid import uuid4

import pytest
from onceflow.storage import MemoryStorage, ObjectNotFoundError, StorageClosedError, storage_from_url


async def test_one_store_for_a_name() -> None:
    """Storages of one name are one store for the whole process, also when all of them were dropped."""
    name = f"results of {uuid4()}/äöü"
    await MemoryStorage(name).write("key", b"content")
    gc.collect()
    assert await MemoryStorage(name).read("key") == b"content"
    assert await storage_from_url(MemoryStorage(name).url).read("key") == b"content"


async def test_anonymous_stores_are_apart() -> None:
    """Without a name each storage has its own store, found by its URL and pickle while it lives."""
    one, other = MemoryStorage(), MemoryStorage()
    await one.write("key", b"content")
    with pytest.raises(ObjectNotFoundError):
        await other.read("key")
    assert await storage_from_url(one.url).read("key") == b"content"
    assert await pickle.loads(pickle.dumps(one)).read("key") == b"content"


async def test_an_anonymous_store_goes_with_its_storage() -> None:
    """What nobody can reach any more takes no memory."""
    storage = MemoryStorage()
    url = storage.url
    await storage.write("key", b"content")
    del storage
    gc.collect()
    assert await storage_from_url(url).stat("key") is None


async def test_closing_closes_the_storage_not_the_store() -> None:
    """A closed storage refuses use; another of the same name goes on."""
    name = uuid4().hex
    async with MemoryStorage(name) as one:
        await one.write("key", b"content")
    with pytest.raises(StorageClosedError, match="Make a new storage"):
        await one.read("key")
    assert await MemoryStorage(name).read("key") == b"content"


async def test_reading_makes_no_copy() -> None:
    """A whole object is handed out as the very bytes that are kept, for nobody can change them."""
    storage = MemoryStorage()
    content = bytes(1000)
    await storage.write("key", content)
    first, second = await storage.fetch("key"), await storage.fetch("key")
    assert first is not None
    assert second is not None
    assert first.data is second.data


def test_it_is_not_shared() -> None:
    """Nobody else writes into this process, so pickled values are as safe as the process."""
    assert MemoryStorage.shared is False
