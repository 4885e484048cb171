"""Keys that a definition remembers: always the ones that it would compute."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onceflow.engine import INPUTS, Engine, flow, task
from onceflow.engine._keys.digest import digest
from onceflow.storage import MemoryStorage


@task(cache_policy=INPUTS)
async def pair(a: Any, b: Any = 0) -> Any:
    return a, b


ARGUMENTS: list[Any] = [
    1, True, 0, False, None, "1", b"1", "", b"", 1.0, 0.0, -0.0, "x" * 300, (1,), (True,), "True", -1, 2**70,
]  # fmt: skip


async def test_each_argument_keeps_its_key(engine: Engine) -> None:
    """K: what compares equal and is not the same (True and 1, 0.0 and -0.0, (1,) and (True,)) has a key of its own."""
    first = [await pair.cache_key(a, b) for a in ARGUMENTS for b in ARGUMENTS]
    for a in ARGUMENTS:
        for b in ARGUMENTS:
            await pair(a, b)
    again = [await pair.cache_key(a, b) for a in ARGUMENTS for b in ARGUMENTS]
    assert first == again
    assert len(set(first)) == len(ARGUMENTS) ** 2
    for a in ARGUMENTS:
        for b in ARGUMENTS:
            got = await pair(a, b)
            assert [digest(value) for value in got] == [digest(a), digest(b)]


@settings(deadline=None)
@given(st.lists(st.one_of(st.integers(-2, 2), st.booleans(), st.none(), st.text(max_size=2)), max_size=9))
def test_served_as_computed(values: list[Any]) -> None:
    """K: in whatever order arguments come, a hit is the value of these arguments."""

    async def calls() -> None:
        async with Engine(MemoryStorage()):
            for value in [*values, *values]:
                got = await pair(value, value)
                assert (type(got[0]), got) == (type(value), (value, value))

    asyncio.run(calls())


async def test_a_default_that_changes(engine: Engine) -> None:
    """K: an argument that was left out is the default of this very moment."""
    default = [1]

    @task(cache_policy=INPUTS)
    async def grown(x: int, more: list[int] = default) -> int:
        return x + len(more)

    assert [await grown(1), await grown(1)] == [2, 2]
    default.append(2)
    assert await grown(1) == 3


async def test_another_engine(tmp_path: Path) -> None:
    """A key is looked up where the engine of the moment keeps its records, not where the one before did."""
    ran: list[int] = []

    @task(cache_policy=INPUTS)
    async def one(x: int) -> int:
        ran.append(x)
        return x

    for folder in ("a", "b", "a"):
        async with Engine(tmp_path / folder):
            await one(1)
            await one(1)
    assert ran == [1, 1]


async def test_a_flow_with_a_storage_of_its_own(engine: Engine, tmp_path: Path) -> None:
    """Inside of a flow with another result storage the same call has another place."""
    ran: list[int] = []

    @task(cache_policy=INPUTS)
    async def one(x: int) -> int:
        ran.append(x)
        return x

    @flow(result_storage=tmp_path / "other")
    async def elsewhere() -> int:
        return await one(1)

    for _ in range(2):
        await one(1)
        await elsewhere()
    assert ran == [1, 1]


async def test_settings_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a key was remembered for holds only as long as the settings do."""
    ran: list[int] = []

    @task(cache_policy=INPUTS)
    async def one(x: int) -> int:
        ran.append(x)
        return x

    async with Engine() as engine:
        for folder in ("a", "b", "a"):
            monkeypatch.setenv("ONCEFLOW_STORAGE", str(tmp_path / folder))
            await engine.reload()
            await one(1)
            await one(1)
    assert ran == [1, 1]


async def test_no_more_than_so_many(engine: Engine) -> None:
    """A definition that is called with ever new arguments remembers a thousand of them."""

    @task(cache_policy=INPUTS)
    async def one(x: int) -> int:
        return x

    for x in range(1_500):
        await one.cache_key(x)
    for x in range(1_200):
        await one(x)
    assert len(one.known._keys) <= 1000
    assert await one(3) == 3
