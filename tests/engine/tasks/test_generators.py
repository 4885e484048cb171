"""Generator tasks: values stream, end, are cached and replayed, and are let go when nobody reads on."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from onceflow.engine import (
    INPUTS,
    TASK_SOURCE,
    Engine,
    Settings,
    State,
    StateType,
    flow,
    get_run_context,
    task,
    transaction,
)
from onceflow.engine._errors import CommitError, ConfigurationError, RunTimeoutError, UpstreamFailedError
from onceflow.engine._records import chunks
from onceflow.locking import MemoryLockManager
from onceflow.storage import MemoryStorage
from until import until


def others() -> set[asyncio.Task[Any]]:
    """The asyncio tasks of this loop that are not the test itself."""
    return {each for each in asyncio.all_tasks() if each is not asyncio.current_task()}


def state_of(stream: Any) -> tuple[str, StateType]:
    """Name and type of the state of a stream that has begun."""
    return stream.state.name, stream.state.type


async def read_into(seen: list[Any], stream: Any) -> None:
    """Read a stream; what came before a failure is seen all the same."""
    async for value in stream:
        seen.append(value)  # noqa: PERF401 - an extend would lose it


async def chunks_in(folder: Path) -> list[str]:
    """The names of the chunks that lie in a folder."""
    names = await asyncio.to_thread(os.listdir, folder)
    return sorted(name for name in names if name.startswith("chunk-"))


CACHED = INPUTS + TASK_SOURCE


class Blob(bytes):
    """Bytes that count how many of them are alive."""

    alive = 0
    most = 0

    def __new__(cls, *args: Any) -> Blob:
        Blob.alive += 1
        Blob.most = max(Blob.most, Blob.alive)
        return super().__new__(cls, *args)

    def __del__(self) -> None:
        Blob.alive -= 1


@task
async def count(n: int) -> AsyncIterator[int]:
    for i in range(n):
        await asyncio.sleep(0)
        yield i


@task
def count_in_thread(n: int) -> Iterator[int]:
    yield from range(n)


BOTH = pytest.mark.parametrize("generator", [count, count_in_thread], ids=["async", "sync"])


# --- G1: values stream


@BOTH
async def test_values_stream_and_the_state_follows(engine: Engine, generator: Any) -> None:
    """G1: values come one by one; the state is Running while the stream is open, Completed at the end."""

    @flow
    async def main() -> None:
        stream = generator(3)
        assert stream.state is None
        seen: list[Any] = []
        async for value in stream:
            seen.append(value)
            assert state_of(stream) == ("Running", StateType.RUNNING)
        assert seen == [0, 1, 2]
        assert state_of(stream) == ("Completed", StateType.COMPLETED)
        assert [state.name for state in stream.run.states] == ["Pending", "Running", "Completed"]

    await main()
    assert not engine.running


@BOTH
async def test_the_body_goes_on_only_when_the_next_value_is_wanted(engine: Engine, generator: Any) -> None:
    """G1: nothing runs before the first value is asked for, and nothing ahead of the reader."""
    produced: list[int] = []

    if generator is count:

        @task
        async def work() -> AsyncIterator[int]:
            for i in range(3):
                produced.append(i)
                yield i
    else:

        @task
        def work() -> Iterator[int]:
            for i in range(3):
                produced.append(i)
                yield i

    stream = work()
    await asyncio.sleep(0.01)
    assert produced == []
    async for value in stream:
        await asyncio.sleep(0.005)
        assert produced == list(range(value + 1))


@BOTH
async def test_a_stream_can_be_awaited_for_all_values(engine: Engine, generator: Any) -> None:
    """G1: `await t(…)` gives the values in a list, and `run_to_state` a state whose result is that list."""
    assert await generator(3) == [0, 1, 2]
    assert await generator(0) == []
    state = await generator.run_to_state(2)
    assert state.is_completed()
    assert state.result() == [0, 1]


def test_a_stream_runs_from_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """G1: `t.run(…)` in synchronous code gives all values."""
    monkeypatch.setenv("ONCEFLOW_STORAGE", str(tmp_path))
    assert count.run(3) == [0, 1, 2]


async def test_the_body_is_part_of_its_run(engine: Engine) -> None:
    """G1: inside the body the run is the generator's, before and after every yield; the reader's is its own."""

    @task
    async def work() -> AsyncIterator[str]:
        yield get_run_context().name
        yield get_run_context().name

    @task
    def in_thread() -> Iterator[str]:
        yield get_run_context().name
        yield get_run_context().name

    @flow
    async def main() -> None:
        for generator in (work, in_thread):
            stream = generator()
            async for name in stream:
                assert name == stream.run.name  # type: ignore[union-attr]
                assert get_run_context().flow_run is get_run_context()

    await main()


async def test_what_a_body_opens_across_yields_stays_in_one_asyncio_task(engine: Engine) -> None:
    """G1: a timeout or task group around a yield works, also when several asyncio tasks read in turn."""

    @task
    async def work() -> AsyncIterator[Any]:
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            first = group.create_task(asyncio.sleep(0, "made inside"))
            yield asyncio.current_task()
            yield asyncio.current_task()
            yield await first

    stream = work()
    one = await asyncio.ensure_future(anext(stream))
    two = await asyncio.ensure_future(anext(stream))
    assert one is two
    assert [value async for value in stream] == ["made inside"]


async def test_two_readers_at_once_are_refused(engine: Engine) -> None:
    """G1: a second reader that asks while the first one waits gets a clear error, and the first its value."""
    go = asyncio.Event()

    @task
    async def work() -> AsyncIterator[int]:
        await go.wait()
        yield 1

    stream = work()
    first = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError):
        await anext(stream)
    go.set()
    assert await first == 1


async def test_a_failure_is_raised_to_the_reader(engine: Engine) -> None:
    """G1: what the body raises arrives after the values before it; the state is Failed, and the flow may go on."""

    @task
    async def work() -> AsyncIterator[int]:
        yield 1
        raise ValueError("broken")

    @flow
    async def main() -> list[int]:
        seen: list[Any] = []
        stream = work()
        with pytest.raises(ValueError, match="broken"):
            await read_into(seen, stream)
        assert state_of(stream) == ("Failed", StateType.FAILED)
        return seen

    assert await main() == [1]


async def test_arguments_are_resolved_and_upstream_failures_cascade(engine: Engine) -> None:
    """F2: futures among the arguments are awaited; a failed one ends the stream as NotReady."""

    @task
    async def number(fail: bool) -> int:
        if fail:
            raise ValueError("no")
        return 2

    @flow
    async def main() -> None:
        counted: Any = count  # a future in place of its value is more than types can say
        assert await counted(number.submit(False)) == [0, 1]
        stream = counted(number.submit(True))
        with pytest.raises(UpstreamFailedError):
            await stream
        assert state_of(stream) == ("NotReady", StateType.PENDING)

    await main()


async def test_methods_stream_too(engine: Engine) -> None:
    """G1: a generator method gets its instance."""

    class Source:
        def __init__(self, n: int) -> None:
            self.n = n

        @task
        async def values(self, factor: int) -> AsyncIterator[int]:
            for i in range(self.n):
                yield i * factor

    assert await Source(3).values(10) == [0, 10, 20]


@pytest.mark.parametrize("verb", ["submit", "map"])
async def test_a_stream_cannot_be_submitted(engine: Engine, verb: str) -> None:
    """G1: submit and map of a generator task are clear errors that say what to write."""

    @flow
    async def main() -> None:
        with pytest.raises(ConfigurationError, match=r"async for value in count"):
            getattr(count, verb)([1])

    await main()


def test_a_generator_takes_no_runner() -> None:
    """G1: a stream cannot come from a process; declaring so is an error."""
    with pytest.raises(ConfigurationError, match="generator"):
        task(runner="process")(count.fn)


# --- hooks, names, limits, prints: as for every run


async def test_hooks_and_names_are_those_of_any_run(engine: Engine) -> None:
    """H4, H6, T9: hooks are called and the name template is filled in."""
    events: list[str] = []

    def note(_: Any, run: Any, state: State[Any]) -> None:
        events.append(f"{run.name} {state.name}")

    @task(task_run_name="count to {n}", on_running=[note], on_completion=[note], on_failure=[note])
    async def work(n: int) -> AsyncIterator[int]:
        for i in range(n):
            yield i
        if n > 2:
            raise ValueError

    await work(2)
    with pytest.raises(ValueError):
        await work(3)
    assert events == [
        "count to 2 Running", "count to 2 Completed", "count to 3 Running", "count to 3 Failed",
    ]  # fmt: skip


async def test_a_slot_is_taken_while_the_stream_is_open(engine: Engine) -> None:
    """N1: with `concurrency=1` a second stream begins when the first is over, or closed."""
    log: list[str] = []

    @task(concurrency=1)
    async def work(name: str) -> AsyncIterator[str]:
        log.append(f"{name} begins")
        yield name
        yield name
        log.append(f"{name} ends")

    async def read(name: str, all_of_it: bool) -> None:
        stream = work(name)
        async for _ in stream:
            await asyncio.sleep(0)
            if not all_of_it:
                break
        await stream.aclose()

    await asyncio.gather(read("a", True), read("b", False), read("c", True))
    assert log == ["a begins", "a ends", "b begins", "c begins", "c ends"]


async def test_a_consumer_under_the_same_limit_does_not_wait_for_the_stream(tmp_path: Path) -> None:
    """N1: a run that is given a value of an open stream gets the stream's slot on loan."""

    @task(tags=["one"])
    async def source() -> AsyncIterator[int]:
        yield 1000
        yield 2000

    @task(tags=["one"])
    async def double(x: int) -> int:
        return x * 2

    @flow
    async def main() -> list[int]:
        return [await double(value) async for value in source()]

    async with Engine(storage=tmp_path, settings=Settings(tag_limits={"one": 1})), asyncio.timeout(10):
        assert await main() == [2000, 4000]


# --- G3: timeouts and retries


@BOTH
async def test_a_timeout_is_for_each_value(engine: Engine, generator: Any) -> None:
    """G3: a value that takes too long raises RunTimeoutError to the reader; the state is TimedOut."""
    gate = threading.Event()
    if generator is count:

        @task(timeout_seconds=0.5)
        async def work() -> AsyncIterator[int]:
            for i in range(5):
                await asyncio.sleep(0.15)
                yield i
            await asyncio.Event().wait()
    else:

        @task(timeout_seconds=0.5)
        def work() -> Iterator[int]:
            yield from range(5)
            gate.wait(10)

    seen: list[Any] = []
    stream = work()
    try:
        with pytest.raises(RunTimeoutError, match=r"0\.5 s"):
            await read_into(seen, stream)
    finally:
        gate.set()
    assert seen == [0, 1, 2, 3, 4]
    assert state_of(stream) == ("TimedOut", StateType.FAILED)


async def test_the_readers_time_does_not_count(engine: Engine) -> None:
    """G3: the clock runs while the body works on a value, not while the reader does."""

    @task(timeout_seconds=0.2)
    async def work() -> AsyncIterator[int]:
        yield 1
        yield 2

    seen: list[Any] = []
    async for value in work():
        await asyncio.sleep(0.3)
        seen.append(value)
    assert seen == [1, 2]


async def test_a_nested_timeout_is_a_failure_of_the_reader(engine: Engine) -> None:
    """G3: a flow that lets a stream's timeout out has Failed; it did not time out itself."""

    @task(timeout_seconds=0.01)
    async def slow() -> AsyncIterator[int]:
        await asyncio.Event().wait()
        yield 1

    @flow
    async def main() -> Any:
        return await slow()

    state = await main.run_to_state()
    assert state.name == "Failed"
    assert isinstance(state.result(raise_on_failure=False), RunTimeoutError)


@pytest.mark.parametrize("fails_after", [0, 1])
async def test_retries_are_for_failures_before_the_first_value(engine: Engine, fails_after: int) -> None:
    """T3: before a value has gone out a failed attempt is tried again; after it the failure is final."""
    attempts = 0

    @task(retries=2)
    async def work() -> AsyncIterator[str]:
        nonlocal attempts
        attempts += 1
        for _ in range(fails_after):
            yield "first"
        if attempts < 3:
            raise ValueError("not yet")
        yield "last"

    if fails_after == 0:
        assert await work() == ["last"]
        assert attempts == 3
    else:
        with pytest.raises(ValueError, match="not yet"):
            await work()
        assert attempts == 1


# --- G4: nobody reads on


@BOTH
async def test_a_dropped_stream_ends(engine: Engine, generator: Any) -> None:
    """G4: a reader that breaks off, and lets the stream go, leaves no asyncio task; the body is closed at its yield."""
    closed = threading.Event()
    if generator is count:

        @task
        async def work() -> AsyncIterator[int]:
            try:
                while True:
                    yield 1
            finally:
                closed.set()
    else:

        @task
        def work() -> Iterator[int]:
            try:
                while True:
                    yield 1
            finally:
                closed.set()

    async for _ in work():
        break
    await until(closed.is_set)
    await until(lambda: not others())
    assert not engine.runs


async def test_a_stream_that_was_never_read_is_nothing(engine: Engine) -> None:
    """G4: without a first value no run comes into being."""
    stream = count(3)
    del stream
    gc.collect()
    assert not others()


async def test_closing_early_cancels(engine: Engine) -> None:
    """G4: `aclose()` ends the body at its yield and waits for its clean-up; the state is Cancelled."""
    log: list[str] = []

    @task
    async def work() -> AsyncIterator[int]:
        try:
            yield 1
            yield 2
        finally:
            await asyncio.sleep(0)
            log.append("cleaned up")

    stream = work()
    assert await anext(stream) == 1
    await stream.aclose()
    assert log == ["cleaned up"]
    assert state_of(stream) == ("Cancelled", StateType.CANCELLED)
    assert stream.run is not None
    assert "closed before its end" in str(stream.run.state.message)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    assert not others()


@BOTH
async def test_a_cancelled_reader_cancels_the_body(engine: Engine, generator: Any) -> None:
    """G4: cancelled while it waits for a value, the reader ends the run as Cancelled, not as a timeout."""
    gate = threading.Event()
    inside = threading.Event()
    if generator is count:

        @task(timeout_seconds=60)
        async def work() -> AsyncIterator[int]:
            inside.set()
            await asyncio.Event().wait()
            yield 1
    else:

        @task(timeout_seconds=60)
        def work() -> Iterator[int]:
            inside.set()
            gate.wait(10)
            yield 1

    stream = work()
    reader = asyncio.ensure_future(anext(stream))
    await until(inside.is_set)
    reader.cancel()
    await asyncio.wait([reader])
    gate.set()
    assert reader.cancelled()
    assert state_of(stream) == ("Cancelled", StateType.CANCELLED)
    assert not others()


async def test_the_end_of_a_flow_closes_its_open_streams(engine: Engine) -> None:
    """G4: a stream that a flow leaves open is closed when the flow ends, and does not fail it."""
    streams = []

    @flow
    async def main() -> int:
        stream = count(5)
        streams.append(stream)
        return await anext(stream)

    async with asyncio.timeout(10):
        assert await main() == 0
    assert state_of(streams[0]) == ("Cancelled", StateType.CANCELLED)
    await until(lambda: not others())


async def test_a_raising_flow_closes_its_open_streams(engine: Engine) -> None:
    """G4: a flow that raises while it reads cancels the stream and awaits it, although the traceback keeps it."""
    log: list[str] = []

    @task
    async def work() -> AsyncIterator[int]:
        try:
            while True:
                yield 1
        finally:
            log.append("cleaned up")

    @flow
    async def main() -> None:
        async for _ in work():
            raise ValueError("broken")

    state = await main.run_to_state()
    assert state.name == "Failed"
    assert log == ["cleaned up"]
    await until(lambda: not others())


async def test_a_stream_is_read_to_its_end_by_who_it_was_handed_to(engine: Engine) -> None:
    """G4: the flow closes open streams only when nothing else of it is under way that may still read them."""

    @task
    async def read(stream: Any) -> list[int]:
        values = []
        async for value in stream:
            await asyncio.sleep(0.001)
            values.append(value)
        return values

    futures = []

    @flow
    async def main() -> None:
        futures.append(read.submit(count(20)))

    await main()
    assert await futures[0] == list(range(20))


async def test_a_closing_engine_ends_open_streams(tmp_path: Path) -> None:
    """G4: an engine that closes cancels the streams that are open in it."""
    async with Engine(storage=tmp_path, grace=0.01):
        stream = count(5)
        assert await anext(stream) == 0
    assert state_of(stream) == ("Cancelled", StateType.CANCELLED)
    assert not others()


# --- G5: parents


async def test_the_generator_is_the_parent_of_its_consumers(engine: Engine) -> None:
    """G5: a run that is called or submitted with the value just read has the stream's run as its parent."""

    @task
    async def consume(x: object) -> Any:
        return get_run_context().parent

    @flow
    async def subflow(x: int) -> Any:
        return get_run_context().parent

    @task
    async def unrelated() -> Any:
        return get_run_context().parent

    @flow
    async def main() -> None:
        me = get_run_context()
        stream = count(3)
        async for value in stream:
            assert await consume(value) is stream.run
            assert await consume(x=value) is stream.run
            assert await consume.submit(value) is stream.run
            assert await subflow(value) is stream.run
            assert await unrelated() is me
            assert await consume(object()) is me
        assert stream.run is not None
        assert stream.run.parent is me
        assert await consume(2) is me  # the stream is over
        assert not me.links

    await main()


@BOTH
async def test_nested_streams_have_the_right_parents(engine: Engine, generator: Any) -> None:
    """G5: with two streams open, a value belongs to the one that gave it; the flow run of all is the flow."""
    parents = set()

    @task
    async def consume(x: object) -> Any:
        context = get_run_context()
        assert context.flow_run is not None
        parents.add(context.parent)
        return context.flow_run

    @task
    async def objects() -> AsyncIterator[object]:
        yield object()

    @flow
    async def main() -> None:
        inner, outer = generator(1), objects()
        async for a in outer:
            async for b in inner:
                assert await consume(a) is get_run_context()
                assert parents == {outer.run}
                await consume(b)
                assert parents == {outer.run, inner.run}

    await main()


# --- caching


async def test_a_stream_that_was_read_to_its_end_is_replayed(engine: Engine) -> None:
    """E1: the second time the values come from the record, the state is Cached, and the body does not run."""
    runs = 0

    @task(cache_policy=CACHED)
    async def work(n: int) -> AsyncIterator[dict[str, int]]:
        nonlocal runs
        runs += 1
        for i in range(n):
            yield {"i": i}

    expected = [{"i": i} for i in range(5)]
    assert await work(5) == expected
    stream = work(5)
    assert [value async for value in stream] == expected
    assert runs == 1
    assert state_of(stream) == ("Cached", StateType.COMPLETED)
    assert await work(0) == []
    assert await work(0) == []
    assert runs == 2
    assert (await work.run_to_state(5)).result() == expected


@pytest.mark.parametrize("serializer", ["default", "json", "pickle", "compressed/msgpack"])
async def test_streams_take_any_serializer(engine: Engine, serializer: str) -> None:
    """R1: chunks are written by the task's serializer."""

    @task(cache_policy=CACHED, result_serializer=serializer)
    async def work() -> AsyncIterator[list[int]]:
        yield [1, 2]
        yield [3]

    assert await work() == [[1, 2], [3]]
    state = await work.run_to_state()
    assert (state.name, state.result()) == ("Cached", [[1, 2], [3]])


async def test_changing_a_value_changes_no_later_hit(engine: Engine) -> None:
    """E1: a reader may change what it was given: the record has the value as the body yielded it."""

    @task(cache_policy=CACHED)
    async def work() -> AsyncIterator[list[int]]:
        for i in range(3):
            yield [i]

    for _ in range(3):
        seen: list[Any] = []
        async for value in work():
            seen.append(list(value))
            value.append(99)
        assert seen == [[0], [1], [2]]


async def test_large_streams_need_memory_for_a_chunk_or_two(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E1: written and replayed in chunks, a stream never has more than two chunks of values alive at once."""
    monkeypatch.setattr(chunks, "CHUNK", 10_000)

    @task(cache_policy=CACHED, result_serializer="pickle")
    async def work() -> AsyncIterator[Blob]:
        for _ in range(300):
            yield Blob(1000)

    for name in ("Completed", "Cached"):
        gc.collect()
        Blob.most = Blob.alive
        before = Blob.alive
        stream = work()
        async for value in stream:
            assert len(value) == 1000
            del value
        assert state_of(stream)[0] == name
        assert 10 <= Blob.most - before <= 40
    assert len(await chunks_in(tmp_path)) >= 25


@pytest.mark.parametrize("end", ["closed", "dropped", "failed", "cancelled"])
async def test_a_broken_off_stream_leaves_nothing(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """G4: closed, dropped, failed or cancelled, a stream is not cached, and its chunks are removed."""
    monkeypatch.setattr(chunks, "CHUNK", 100)
    runs = 0

    @task(cache_policy=CACHED)
    async def work() -> AsyncIterator[str]:
        nonlocal runs
        runs += 1
        for i in range(50):
            yield str(i) * 20
        if end == "failed" and runs == 1:
            raise ValueError
        if end == "cancelled" and runs == 1:
            await asyncio.Event().wait()

    async def read() -> None:
        stream = work()
        async for value in stream:
            if value.startswith("4040") and end in ("closed", "dropped"):
                assert await chunks_in(tmp_path)
                break
        if end == "closed":
            await stream.aclose()

    reader = asyncio.ensure_future(read())
    if end == "cancelled":

        async def is_under_way() -> bool:
            return len(await chunks_in(tmp_path)) > 10

        await until(is_under_way)
        reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    await until(lambda: not others())
    assert await chunks_in(tmp_path) == []
    assert len(await work()) == 50
    assert runs == 2


@pytest.mark.parametrize("lost", ["first", "middle", "last"])
async def test_a_lost_chunk_is_a_miss_for_the_rest(
    engine: Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    lost: str,
) -> None:
    """E13: with a chunk gone the body runs again, and the reader gets every value once; then all is whole again."""
    monkeypatch.setattr(chunks, "CHUNK", 100)
    runs = 0

    @task(cache_policy=CACHED)
    async def work() -> AsyncIterator[str]:
        nonlocal runs
        runs += 1
        for i in range(30):
            yield str(i) * 20

    expected = await work()
    names = await chunks_in(tmp_path)
    assert len(names) > 5
    name = {"first": names[0], "middle": names[len(names) // 2], "last": names[-1]}[lost]
    await asyncio.to_thread(os.unlink, tmp_path / name)
    assert await work() == expected
    assert runs == 2
    assert "a part of its stored stream is gone" in caplog.text
    assert (await work.run_to_state()).name == "Cached"
    assert runs == 2


async def test_a_record_that_is_no_stream_is_a_miss(engine: Engine) -> None:
    """E13: what a plain task stored under the same key is not taken for a stream."""

    @task(cache_policy=INPUTS)
    async def plain(x: int) -> list[str]:
        return ["not", "chunks"]

    @task(cache_policy=INPUTS)
    async def work(x: int) -> AsyncIterator[int]:
        yield x

    await plain(1)
    assert await work(1) == [1]
    assert (await work.run_to_state(1)).name == "Cached"


async def test_values_that_cannot_be_stored_stream_all_the_same(
    engine: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """R3: a value that no serializer carries means one warning, no record and no chunks; all values arrive."""

    @task(cache_policy=CACHED)
    async def work() -> AsyncIterator[Any]:
        yield "x" * 2_000_000
        yield threading.Lock()
        yield 3

    values = await work()
    assert (len(values), values[2]) == (3, 3)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "could not be stored" in warnings[0]
    assert await chunks_in(tmp_path) == []


async def test_replay_can_be_broken_off(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G4: a reader that leaves a replay leaves nothing under way, and the record stays."""
    monkeypatch.setattr(chunks, "CHUNK", 100)

    @task(cache_policy=CACHED)
    async def work() -> AsyncIterator[str]:
        for i in range(30):
            yield str(i) * 20

    await work()
    stream = work()
    await anext(stream)
    await stream.aclose()
    assert not others()
    state = await work.run_to_state()
    assert (state.name, len(state.result())) == ("Cached", 30)


async def test_in_a_transaction_a_stream_is_visible_at_the_end(tmp_path: Path) -> None:
    """X3: its record is committed with the block, and dropped with it; then its chunks are removed as well."""
    runs = 0

    @task(cache_policy=CACHED)
    async def work(n: int) -> AsyncIterator[int]:
        nonlocal runs
        runs += 1
        for i in range(n):
            yield i

    async with Engine(storage=tmp_path):
        try:
            async with transaction():
                async with transaction():
                    await work(2)
                assert (await work.run_to_state(2)).name == "Cached"
                assert await chunks_in(tmp_path)
                raise ValueError
        except ValueError:
            pass  # rolled back
        assert await chunks_in(tmp_path) == []
        async with transaction():
            assert await work(2) == [0, 1]
        assert runs == 2
        assert (await work.run_to_state(2)).name == "Cached"


async def test_serializable_streams_run_once(tmp_path: Path) -> None:
    """B11: under SERIALIZABLE equal streams read at once have one body; the others are served by its record."""
    runs = 0
    policy = CACHED.configure(isolation_level="SERIALIZABLE", lock_manager=MemoryLockManager())

    @task(cache_policy=policy)
    async def work(n: int) -> AsyncIterator[int]:
        nonlocal runs
        runs += 1
        for i in range(n):
            await asyncio.sleep(0)
            yield i

    async def read() -> list[int]:
        return await work(5)

    async with Engine(storage=MemoryStorage()) as engine:
        assert await asyncio.gather(*[read() for _ in range(20)]) == [list(range(5))] * 20
        assert runs == 1
        assert len(engine.flights) == 0


async def test_a_closed_stream_frees_its_key(tmp_path: Path) -> None:
    """B4: closing a SERIALIZABLE stream early lets the next reader run."""
    policy = CACHED.configure(isolation_level="SERIALIZABLE", lock_manager=MemoryLockManager())

    @task(cache_policy=policy)
    async def work() -> AsyncIterator[int]:
        yield 1
        yield 2

    async with Engine(storage=MemoryStorage()) as engine:
        stream = work()
        await anext(stream)
        other = asyncio.ensure_future(anext(work()))
        await asyncio.sleep(0.01)
        assert not other.done()
        await stream.aclose()
        assert await other == 1
        await until(lambda: len(engine.flights) == 0)


class WithoutRecords(MemoryStorage):
    """Memory that takes chunks, and refuses records."""

    async def write(self, key: str, data: Any, **conditions: Any) -> str:
        if not key.startswith("chunk-"):
            raise OSError("full")
        return await super().write(key, data, **conditions)


@pytest.mark.parametrize("inside", ["nothing", "hooks", "transaction", "serializable"])
async def test_chunks_go_where_the_record_cannot_be_written(inside: str) -> None:
    """R3, B12: where the record of a stream that was read to its end is not committed, its chunks are removed."""
    storage = WithoutRecords(f"test-{inside}")
    policy = CACHED.configure(isolation_level="SERIALIZABLE") if inside == "serializable" else CACHED

    @task(cache_policy=policy, on_commit=[print] if inside == "hooks" else None)
    async def work() -> AsyncIterator[int]:
        yield 1

    async with Engine(storage=storage, lock_manager=MemoryLockManager()):
        if inside == "transaction":
            with pytest.raises(CommitError):
                async with transaction():
                    assert await work() == [1]
        else:
            assert await work() == [1]
        assert [key async for key in storage.list("")] == []
