"""Memory copies of records: validated before they are served, bounded in bytes, never shared."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from onceflow.engine import INPUTS, Engine, Settings, task
from onceflow.engine._records.memory import OVERHEAD
from onceflow.storage import MemoryStorage, Stored


class Watched(MemoryStorage):
    """Counts how often a look-up was answered without the object's bytes."""

    def __init__(self, name: str | None = None) -> None:
        super().__init__(name)
        self.unchanged = 0
        self.sent = 0

    async def fetch(self, *args: Any, **kwargs: Any) -> Stored | None:
        stored = await super().fetch(*args, **kwargs)
        if stored is None:
            self.unchanged += 1
        else:
            self.sent += 1
        return stored


@task(cache_policy=INPUTS)
async def numbers(n: int) -> list[int]:
    return list(range(n))


async def test_a_repeated_hit_is_served_from_memory() -> None:
    """B18: once read, an unchanged record is asked for by its version only."""
    storage = Watched()
    async with Engine(storage=storage):
        for _ in range(4):
            assert await numbers(3) == [0, 1, 2]
    assert (storage.sent, storage.unchanged) == (1, 2)  # the first call missed


@pytest.mark.parametrize("kind", ["memory", "local"])
async def test_another_writer_is_seen_at_once(kind: str, tmp_path: Path) -> None:
    """B13: given another engine commits, when this one reads, then it sees the new value."""
    place = MemoryStorage() if kind == "memory" else tmp_path
    value = 1

    @task(cache_policy=INPUTS, refresh_cache=False)
    async def current() -> int:
        return value

    read = current.with_options(cache_key_fn=lambda context, parameters: "current")
    write = read.with_options(refresh_cache=True)
    async with Engine(storage=place) as here, Engine(storage=place) as there:
        assert here is not there
        assert [await read(), await read()] == [1, 1]
        for value in range(2, 50):
            await write()
            assert await read() == value


async def test_a_served_value_is_the_callers_own() -> None:
    """A value that was served from memory and changed by its caller changes no later hit."""
    async with Engine(storage=Watched()):
        for _ in range(4):
            value = await numbers(2)
            assert value == [0, 1]
            value.append(7)


async def test_an_expired_copy_is_evicted(tmp_path: Path) -> None:
    """S11: when a record expires its copy goes, and the storage is read again."""
    now = 1000.0
    storage = Watched()
    async with Engine(storage=storage, clock=lambda: now) as engine:
        brief = numbers.with_options(cache_expiration=timedelta(seconds=10))
        await brief(1)
        await brief(1)
        assert len(engine.records._copies) == 1
        now += 11
        assert (await brief.run_to_state(1)).name == "Completed"
        assert len(engine.records._copies) == 0
        assert (await brief.run_to_state(1)).name == "Cached"


async def test_a_record_deleted_behind_our_back_is_a_miss() -> None:
    """E13: a copy does not outlive its record."""
    storage = Watched()
    async with Engine(storage=storage) as engine:
        await numbers(1)
        await numbers(1)
        key = await numbers.cache_key(1)
        assert key is not None
        await storage.delete(key)
        assert (await numbers.run_to_state(1)).name == "Completed"
        assert len(engine.records._copies) == 0


async def test_switched_off_nothing_is_kept() -> None:
    """S12: with ONCEFLOW_RESULTS_MEMORY_BYTES=0 every hit reads its record."""
    storage = Watched()
    async with Engine(storage=storage, settings=Settings(results_memory_bytes=0)) as engine:
        for _ in range(3):
            await numbers(3)
        assert len(engine.records._copies) == 0
    assert (storage.sent, storage.unchanged) == (2, 0)


async def test_copies_keep_to_their_budget() -> None:
    """B25: memory is bounded by the budget in bytes, whatever is cached; the last used stay."""
    budget = 100 * OVERHEAD
    async with Engine(storage=Watched(), settings=Settings(results_memory_bytes=budget)) as engine:
        for n in range(300):
            await numbers(n)
            await numbers(n)
        copies = engine.records._copies
        assert 0 < copies._size <= budget
        assert copies._size == sum(
            OVERHEAD + sum(map(len, copy.segments)) for copy in copies._copies.values()
        )
        kept = {key for _, key in copies._copies}
        assert await numbers.cache_key(299) in kept
        assert await numbers.cache_key(0) not in kept


async def test_a_large_record_is_not_kept() -> None:
    """B25: what would take more than a quarter of the budget is read each time."""
    async with Engine(storage=Watched(), settings=Settings(results_memory_bytes=8 * OVERHEAD)) as engine:
        await numbers(5000)
        await numbers(5000)
        assert len(engine.records._copies) == 0
