"""`t.stream(items)`: iterables of any length in bounded memory."""

from __future__ import annotations

import asyncio
import gc
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from onceflow.engine import Engine, flow, get_run_context, task, transaction
from onceflow.engine._errors import ConfigurationError, RunCancelledError
from onceflow.engine._runs.run import TaskRun
from until import until


@task
async def double(x: int) -> int:
    await asyncio.sleep(0)
    return 2 * x


def others() -> set[asyncio.Task[Any]]:
    """The asyncio tasks of this loop that are not the test itself."""
    return {each for each in asyncio.all_tasks() if each is not asyncio.current_task()}


async def numbers(asked: list[int] | None = None) -> AsyncIterator[int]:
    """All numbers, and which of them were asked for."""
    for i in itertools.count():
        await asyncio.sleep(0)
        if asked is not None:
            asked.append(i)
        yield i


async def up_to(n: int) -> AsyncIterator[int]:
    for i in range(n):
        yield i


SOURCES: dict[str, Callable[[int], Any]] = {
    "list": lambda n: list(range(n)),
    "generator": lambda n: (i for i in range(n)),
    "async generator": up_to,
}


# --- values


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("limit", [1, 3, 100])
async def test_ordered_values_come_in_the_order_of_the_items(engine: Engine, source: str, limit: int) -> None:
    """Every item is run once, and its value comes in its place, whichever ends first."""

    @task
    async def work(x: int) -> int:
        for _ in range(x % 7):
            await asyncio.sleep(0)
        return x

    @flow
    async def main() -> list[int]:
        return [value async for value in work.stream(SOURCES[source](50), limit=limit)]

    assert await main() == list(range(50))
    assert not others()


@pytest.mark.parametrize("source", SOURCES)
async def test_unordered_values_come_as_they_are_ready(engine: Engine, source: str) -> None:
    """With `ordered=False` a slow run holds nobody up; all values come, each once."""
    slow = asyncio.Event()

    @task
    async def work(x: int) -> int:
        if x == 0:
            await slow.wait()
        return x

    @flow
    async def main() -> list[int]:
        seen = []
        async for value in work.stream(SOURCES[source](20), limit=3, ordered=False):
            seen.append(value)
            if len(seen) == 19:
                slow.set()
        return seen

    seen = await main()
    assert seen[-1] == 0
    assert Counter(seen) == Counter(range(20))


async def test_an_empty_stream_ends(engine: Engine) -> None:
    """No items, no values."""
    sources: list[Any] = [[], up_to(0)]
    for items in sources:
        assert [value async for value in double.stream(items)] == []


async def test_a_stream_works_outside_of_a_flow(engine: Engine) -> None:
    """Without a flow the stream's consumer is its owner; leaving it leaves nothing."""
    async for value in double.stream(numbers()):
        if value > 20:
            break
    await until(lambda: not others())


async def test_sync_bodies_and_methods_stream(engine: Engine) -> None:
    """Bodies in threads and bound methods stream as any."""

    class Adder:
        @task
        def add(self, x: int) -> int:
            return x + 1

    @flow
    async def main() -> list[int]:
        return [value async for value in Adder().add.stream(range(10), limit=4)]

    assert await main() == list(range(1, 11))


@pytest.mark.parametrize("limit", [0, -1, 1.5, "many"])
async def test_a_limit_below_one_is_refused(engine: Engine, limit: Any) -> None:
    """A limit that lets nothing through is an error that names it."""
    with pytest.raises(ConfigurationError, match="limit from 1 on"):
        await anext(double.stream([1], limit=limit))


async def test_what_is_no_iterable_is_refused(engine: Engine) -> None:
    """A thing that cannot be iterated over is a TypeError that names its type."""
    items: Any = 42
    with pytest.raises(TypeError, match="not int"):
        await anext(double.stream(items))


async def test_a_generator_task_cannot_be_streamed(engine: Engine) -> None:
    """A task that streams by itself has no `stream`, and says what to write."""

    @task
    async def gen(x: int) -> AsyncIterator[int]:
        yield x

    @flow
    async def main() -> None:
        with pytest.raises(ConfigurationError, match="async for value in gen"):
            gen.stream([1])

    await main()


# --- back-pressure and memory


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("limit", [1, 10])
async def test_an_endless_source_is_asked_for_what_fits(engine: Engine, limit: int, ordered: bool) -> None:
    """Back-pressure: never more than `limit` items are taken and not given out, however slow the consumer is."""
    asked: list[int] = []
    most = 0

    @flow
    async def main() -> None:
        nonlocal most
        given = 0
        async with aclosing(double.stream(numbers(asked), limit=limit, ordered=ordered)) as values:
            async for _ in values:
                for _ in range(5):
                    await asyncio.sleep(0)
                most = max(most, len(asked) - given)
                given += 1
                if given == 100:
                    break

    await main()
    assert 0 < most <= limit + 1  # the one in the consumer's hand included
    assert not others()


async def test_an_endless_sync_source_is_taken_lazily(engine: Engine) -> None:
    """Back-pressure holds for plain iterators too, and what was not taken is still there."""
    items = iter(itertools.count())

    async with aclosing(double.stream(items, limit=5)) as values:
        assert [await anext(values) for _ in range(10)] == list(range(0, 20, 2))
    assert next(items) <= 16


@pytest.mark.parametrize("number", [100_000, pytest.param(1_000_000, marks=pytest.mark.chaos)])
async def test_memory_is_bounded_by_the_limit(tmp_path: Path, number: int) -> None:
    """W10: over 100 000 and 1 000 000 items, with 100 under way, no more runs, items and tasks are alive than that."""

    class Item:
        alive = 0

        def __init__(self) -> None:
            Item.alive += 1

        def __del__(self) -> None:
            Item.alive -= 1

    async def items() -> AsyncIterator[Item]:
        for _ in range(number):
            yield Item()

    @task
    async def work(item: Item) -> int:
        return Item.alive

    most = Counter[str]()
    count = 0

    @flow
    async def main() -> None:
        nonlocal count
        async for alive in work.stream(items(), limit=100):
            count += 1
            most["items"] = max(most["items"], alive)
            if count % 10_000 == 0:
                gc.collect()
                kinds = Counter(type(each).__name__ for each in gc.get_objects())
                most["runs"] = max(most["runs"], kinds["TaskRun"])
                most["tasks"] = max(most["tasks"], len(asyncio.all_tasks()))

    async with Engine(storage=tmp_path):
        gc.disable()  # nothing may depend on the collector
        try:
            await main()
        finally:
            gc.enable()
    assert count == number
    assert most["items"] <= 102
    assert most["runs"] <= 102
    assert most["tasks"] <= 105


# --- ends


@pytest.mark.parametrize("ordered", [True, False])
async def test_a_failure_ends_the_stream(engine: Engine, ordered: bool) -> None:
    """A failure is raised in its place; what is under way is cancelled and awaited before it arrives."""
    ended: list[int] = []
    begun = 0

    @task
    async def work(x: int) -> int:
        nonlocal begun
        begun += 1
        if x == 2:
            raise ValueError("broken")
        if x > 2:
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                ended.append(x)
        return x

    seen: list[int] = []

    async def read() -> None:
        async for value in work.stream(numbers(), limit=6, ordered=ordered):
            seen.append(value)  # noqa: PERF401 - an extend would lose it

    @flow
    async def main() -> None:
        with pytest.raises(ValueError, match="broken"):
            await read()
        assert len(ended) == sum(run > 2 for run in range(begun))
        assert not get_run_context().running  # type: ignore[union-attr]  # the flow's

    await main()
    assert sorted(seen) == [0, 1]
    assert not others()


async def broken_async() -> AsyncIterator[int]:
    yield 1
    yield 2
    raise OSError("source is gone")


def broken_sync() -> Iterator[int]:
    yield 1
    yield 2
    raise OSError("source is gone")


@pytest.mark.parametrize("source", [broken_async, broken_sync])
async def test_a_failing_source_is_raised_in_its_place(engine: Engine, source: Any) -> None:
    """What the source raises comes after the values of the items before it."""
    seen: list[int] = []

    async def read() -> None:
        async for value in double.stream(source()):
            seen.append(value)  # noqa: PERF401 - an extend would lose it

    with pytest.raises(OSError, match="source is gone"):
        await read()
    assert seen == [2, 4]
    assert not others()


@pytest.mark.parametrize("source", [broken_async, broken_sync])
async def test_unordered_a_failing_source_waits_for_nobody(engine: Engine, source: Any) -> None:
    """With `ordered=False` a failing source cancels what is under way and is raised at once."""

    @task
    async def work(x: int) -> None:
        await asyncio.Event().wait()

    with pytest.raises(OSError, match="source is gone"):
        await anext(work.stream(source(), ordered=False))
    assert not others()


async def test_closing_early_cancels_what_is_under_way(engine: Engine) -> None:
    """`aclose()` returns when every run and the source have ended."""
    ended: list[str] = []

    @task
    async def work(x: int) -> int:
        if x == 0:
            return x
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("run")
        return x

    async def source() -> AsyncIterator[int]:
        try:
            async for i in numbers():
                yield i
        finally:
            ended.append("source")

    values = work.stream(source(), limit=4)
    assert await anext(values) == 0
    await until(lambda: len(others()) >= 5)
    await values.aclose()
    assert Counter(ended) == Counter({"run": 4, "source": 1})
    assert not others()


async def test_a_dropped_stream_ends(engine: Engine) -> None:
    """A consumer that breaks off and lets go leaves nothing under way, at the latest when its flow ends."""

    @flow
    async def main() -> int:
        async for value in double.stream(numbers()):
            return value
        raise AssertionError

    assert await main() == 0
    await until(lambda: not others())


async def test_a_raising_flow_ends_its_streams(engine: Engine) -> None:
    """When the flow body raises inside the loop, every run of the stream has ended before the flow has."""
    inside = 0

    @task
    async def work(x: int) -> int:
        nonlocal inside
        if x == 0:
            return x
        inside += 1
        try:
            await asyncio.Event().wait()
        finally:
            inside -= 1
        return x

    @flow
    async def main() -> None:
        async for _ in work.stream(numbers(), limit=10):
            await until(lambda: inside > 5)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken") as raised:
        await main()
    assert inside == 0
    assert raised.traceback  # which keeps the iterator alive
    del raised
    await until(lambda: not others())


async def test_a_cancelled_consumer_cancels_the_runs(engine: Engine) -> None:
    """Cancelling the flow's asyncio task cancels all runs of its streams, and awaits them."""
    inside = 0

    @task
    async def work(x: int) -> None:
        nonlocal inside
        inside += 1
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            inside -= 1

    @flow
    async def main() -> None:
        async for _ in work.stream(numbers(), limit=10):
            pass

    running = asyncio.ensure_future(main())
    await until(lambda: inside == 10)
    running.cancel()
    await asyncio.wait([running])
    assert running.cancelled()
    assert inside == 0
    assert not others()


async def test_the_block_of_a_transaction_ends_its_streams(engine: Engine) -> None:
    """A stream that is left open in a transaction's block ends with the block."""
    async with transaction():
        values = double.stream(numbers(), limit=10)
        await anext(values)
    with pytest.raises(RunCancelledError, match=r"double\.stream\(\) ended with its owner"):
        await anext(values)
    await until(lambda: not others())


async def test_a_closing_engine_ends_streams(tmp_path: Path) -> None:
    """A stream that is open when its engine closes ends with it."""
    async with Engine(storage=tmp_path, grace=0):
        values = double.stream(numbers(), limit=10)
        await anext(values)
    await until(lambda: not others())


# --- who is who


async def test_an_async_source_is_read_in_one_asyncio_task(engine: Engine) -> None:
    """What a source opens across a yield works, since one asyncio task reads and closes it."""
    readers = set()

    async def source() -> AsyncIterator[int]:
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            for i in range(5):
                await group.create_task(asyncio.sleep(0))
                readers.add(asyncio.current_task())
                yield i

    assert [value async for value in double.stream(source(), limit=2)] == [0, 2, 4, 6, 8]
    assert len(readers) == 1


async def test_parents_and_sources_that_are_streams(engine: Engine) -> None:
    """T12, G5: the runs' parent is the consumer; over the values of a generator task it is that one's run."""

    @task
    async def source() -> AsyncIterator[int]:
        for i in range(1000, 1010):
            yield i

    @task
    async def parent_of(x: int) -> Any:
        return get_run_context().parent

    @flow
    async def main() -> None:
        me = get_run_context()
        async for parent in parent_of.stream([1, 2]):
            assert parent is me
        stream = source()
        async for parent in parent_of.stream(stream):
            assert isinstance(parent, TaskRun)
            assert parent is stream.run

    await main()


class Odd(BaseException):
    pass


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize(
    ("error", "raised"), [(Odd, Odd), (asyncio.CancelledError, RunCancelledError), (ValueError, ValueError)]
)
async def test_whatever_a_source_raises_reaches_the_reader(
    tmp_path: Path, error: type[BaseException], raised: type[BaseException], ordered: bool
) -> None:
    """Back-pressure aside, no error of the source is lost: neither a BaseException nor a stray cancellation."""

    @task
    async def same(x: int) -> int:
        return x

    async def items() -> AsyncIterator[int]:
        yield 1
        raise error("of the source")

    @flow
    async def main() -> None:
        with pytest.raises(raised) as caught:
            async for _ in same.stream(items(), ordered=ordered):
                pass
        assert "source" in str(caught.value)

    async with Engine(storage=tmp_path):
        await main()
