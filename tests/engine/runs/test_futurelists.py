"""The futures of `map` as arguments: a task gets the list of their values."""

from __future__ import annotations

import asyncio
import logging

import pytest
from onceflow.engine import INPUTS, Engine, allow_failure, flow, task
from onceflow.storage import MemoryStorage


@task
async def double(x: int) -> int:
    if x < 0:
        raise ValueError("negative")
    return 2 * x


@task
async def numbers(n: int) -> list[int]:
    return list(range(n))


@task(cache_policy=INPUTS)
async def kind_and_values(values: list[int]) -> tuple[str, list[int]]:
    return type(values).__name__, list(values)


@pytest.mark.parametrize("n", [0, 1, 3])
async def test_the_values_of_a_map_arrive_as_a_plain_list_and_make_a_key(
    n: int, caplog: pytest.LogCaptureFixture
) -> None:
    """F8: the futures of a map become the list of their values, so that the key is that of the values."""

    @flow
    async def main() -> tuple[list[tuple[str, list[int]]], str]:
        first = await kind_and_values(double.map(range(n)))  # type: ignore[arg-type]
        again = kind_and_values.submit([2 * x for x in range(n)])
        return [first, await again], again.state.name

    with caplog.at_level(logging.WARNING):
        async with Engine(storage=MemoryStorage()):
            got, second = await main()
    assert got == [("list", [2 * x for x in range(n)])] * 2
    assert second == "Cached"
    assert not caplog.records


async def test_a_map_over_an_unfinished_future_arrives_too() -> None:
    """F8: a map whose futures do not exist yet is awaited like any other."""

    @flow
    async def main() -> tuple[str, list[int]]:
        return await kind_and_values(double.map(numbers.submit(3)))  # type: ignore[arg-type]

    async with Engine(storage=MemoryStorage()):
        assert await main() == ("list", [0, 2, 4])


async def test_a_failure_in_the_map_is_not_ready_unless_it_is_allowed() -> None:
    """F2: one failed run of a map keeps the task from running; with allow_failure it gets the exception."""

    @flow
    async def main() -> tuple[str, list[type]]:
        futures = double.map([1, -1])
        refused = kind_and_values.submit(futures)  # type: ignore[arg-type]
        await refused.wait()
        forgiven = await types.submit(allow_failure(futures))  # type: ignore[call-overload]
        return refused.state.name, forgiven

    @task
    async def types(values: list[object]) -> list[type]:
        return [type(value) for value in values]

    async with Engine(storage=MemoryStorage()):
        assert await main() == ("NotReady", [int, ValueError])


async def test_a_flow_may_return_its_map() -> None:
    """A flow that returns the futures of a map returns their values."""

    @flow
    async def main() -> object:
        return {"doubled": double.map([1, 2])}

    async with Engine(storage=MemoryStorage()):
        assert await main() == {"doubled": [2, 4]}


async def test_several_maps_are_gathered() -> None:
    """F6: `asyncio.gather` takes maps like any awaitables."""

    @flow
    async def main() -> list[list[int]]:
        one = double.map([1, 2])
        return list(await asyncio.gather(one, double.map([3]), one))

    async with Engine(storage=MemoryStorage()):
        assert await main() == [[2, 4], [6], [2, 4]]
