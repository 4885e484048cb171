"""When a call is served from its record, and when it is not."""

from __future__ import annotations

import asyncio
import logging
import random
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from onceflow.engine import DEFAULT, INPUTS, NONE, RUN_ID, TASK_SOURCE, Engine, StateType, flow, task
from onceflow.storage import LocalStorage, MemoryStorage
from stored_records import Clock, CountingStorage, header_of, keys_in


@task(cache_policy=INPUTS)
async def number(x: int) -> int:
    return random.getrandbits(60)


@task(cache_key_fn=lambda context, parameters: "key")
async def static(x: object) -> object:
    return x


def names(states: Any) -> list[str]:
    return [state.name for state in states]


async def test_a_repeat_in_a_flow_run_is_cached(engine: Engine) -> None:
    """E1: a persisted task that repeats in a flow run ends as Cached, of type COMPLETED, with the same value."""

    @task(persist_result=True)
    async def draw(x: int) -> int:
        return random.getrandbits(60)

    @flow
    async def parent() -> list[Any]:
        return [await draw.run_to_state(1), await draw.run_to_state(1), await draw.run_to_state(2)]

    first, second, other = await parent()
    assert names([first, second, other]) == ["Completed", "Cached", "Completed"]
    assert second.type is StateType.COMPLETED
    assert second.is_completed()
    assert repr(second) == "Cached(type=COMPLETED)"
    assert first.result() == second.result() != other.result()
    assert (await parent())[0].result() != first.result()


async def test_every_repeat_is_cached(engine: Engine) -> None:
    """E2: of many calls only the first runs, however they are made."""

    @flow
    async def parent() -> list[str]:
        states = [await number.run_to_state(1) for _ in range(5)]
        futures = [number.submit(1) for _ in range(5)] + list(number.map([1] * 5))
        for future in futures:
            await future
        return names([*states, *[future.state for future in futures]])

    assert await parent() == ["Completed", *["Cached"] * 14]


async def test_sync_tasks_are_cached(engine: Engine) -> None:
    """E2: a task with a synchronous body is cached like any other."""

    @task(cache_policy=INPUTS)
    def sync(x: int) -> int:
        return random.getrandbits(60)

    assert await sync(1) == await sync(1) != await sync(2)


async def test_a_static_key_lasts_beyond_the_flow_run(engine: Engine) -> None:
    """E3: with a key that does not depend on the run, the next flow run hits."""

    @flow
    async def parent(x: int) -> tuple[str, object]:
        state = await static.run_to_state(x)
        return state.name, state.result()

    assert [await parent(1), await parent(2)] == [("Completed", 1), ("Cached", 1)]


async def test_other_keys_are_no_hits(engine: Engine) -> None:
    """E4: calls with different keys never serve each other."""
    by_x = static.with_options(cache_key_fn=lambda context, parameters: f"key-{parameters['x']}")
    assert [await by_x(x) for x in range(10)] == list(range(10))
    assert names([await by_x.run_to_state(x) for x in range(10)]) == ["Cached"] * 10


async def test_default_reuses_within_one_run_only(engine: Engine) -> None:
    """E4: DEFAULT does not reuse across flow runs, INPUTS + TASK_SOURCE does."""
    for policy, expected in ((DEFAULT, "Completed"), (INPUTS + TASK_SOURCE, "Cached")):
        mine = number.with_options(cache_policy=policy)

        @flow
        async def parent(mine: Any = mine) -> list[str]:
            return names([await mine.run_to_state(1), await mine.run_to_state(1)])

        assert await parent() == ["Completed", "Cached"]
        assert await parent() == [expected, "Cached"]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.mark.parametrize(("seconds", "expected"), [(3600, "Cached"), (0, "Completed"), (-1, "Completed")])
async def test_future_and_past_expirations(
    tmp_path: Path, clock: Clock, seconds: float, expected: str
) -> None:
    """E5: a record that expires later is a hit, one that is expired is run again, and zero is expired at once."""
    fleeting = number.with_options(cache_expiration=timedelta(seconds=seconds))
    async with Engine(storage=tmp_path, clock=clock):
        assert names([await fleeting.run_to_state(1), await fleeting.run_to_state(1)]) == [
            "Completed",
            expected,
        ]


async def test_time_passes_an_expiration(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """E6: when its time is over a record is recomputed, and the new one lasts as long again."""
    fleeting = number.with_options(cache_expiration=timedelta(minutes=10))
    async with Engine(storage=tmp_path, clock=clock) as engine:
        first = await fleeting(1)
        key = await fleeting.cache_key(1)
        assert key is not None
        assert (await header_of(engine.storage, key)).expires_at == clock.now + 600
        clock.move(599.9)
        assert await fleeting(1) == first
        clock.move(180.1)
        with caplog.at_level(logging.INFO, "onceflow"):
            second = await fleeting(1)
        assert second != first
        assert "ran: expired 3 min ago" in caplog.text
        assert (await header_of(engine.storage, key)).expires_at == clock.now + 600
        clock.move(599)
        assert await fleeting(1) == second


async def test_every_reader_obeys_the_stored_expiry(tmp_path: Path, clock: Clock) -> None:
    """E6: a task without an expiration of its own, in another engine, obeys that of the record."""
    async with Engine(storage=tmp_path, clock=clock):
        await number.with_options(cache_expiration=timedelta(seconds=10))(1)
    async with Engine(storage=tmp_path, clock=clock):
        assert (await number.run_to_state(1)).name == "Cached"
        clock.move(10)
        assert names([await number.run_to_state(1), await number.run_to_state(1)]) == ["Completed", "Cached"]
        clock.move(10**9)
        assert (await number.run_to_state(1)).name == "Cached"


async def test_the_expiry_counts_from_the_commit(tmp_path: Path, clock: Clock) -> None:
    """E6: a long run's record lasts for its whole time."""

    @task(cache_policy=INPUTS, cache_expiration=timedelta(seconds=10))
    async def slow(x: int) -> int:
        clock.move(100)
        return x

    async with Engine(storage=tmp_path, clock=clock):
        assert names([await slow.run_to_state(1), await slow.run_to_state(1)]) == ["Completed", "Cached"]


async def test_an_expired_value_is_not_read(clock: Clock) -> None:
    """B18: metadata alone decides that a record has expired, also where the value lies apart."""
    keys, values = CountingStorage(), CountingStorage()
    fleeting = number.with_options(
        cache_policy=INPUTS.configure(key_storage=keys),
        result_storage=values,
        cache_expiration=timedelta(seconds=10),
    )
    async with Engine(storage=MemoryStorage(), clock=clock):
        await fleeting(1)
        clock.move(11)
        await fleeting(1)
    assert values.fetched == []


async def test_refresh_runs_again_and_replaces(engine: Engine) -> None:
    """E7: refresh_cache=True re-runs every time, and later readers see the newest value."""
    fresh = static.with_options(refresh_cache=True)
    assert [await fresh(1), await fresh(2)] == [1, 2]
    assert await static(3) == 2
    assert await fresh.with_options(refresh_cache=None)(4) == 2


async def test_a_refresh_in_a_running_flow(engine: Engine) -> None:
    """E7: the refresh is seen by readers in the same flow run and in the next."""

    @flow
    async def parent(x: int) -> list[object]:
        return [await static(x), await static.with_options(refresh_cache=True)(x + 1), await static(x + 2)]

    assert [await parent(1), await parent(10)] == [[1, 2, 2], [2, 11, 11]]


async def test_the_refresh_setting(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """E9: the setting refreshes every task that leaves refresh_cache open; the task's own word wins."""
    await static(1)
    monkeypatch.setenv("ONCEFLOW_TASKS_REFRESH_CACHE", "true")
    assert await static(2) == 2
    assert await static.with_options(refresh_cache=False)(3) == 2
    monkeypatch.setenv("ONCEFLOW_TASKS_REFRESH_CACHE", "false")
    assert await static(4) == 2
    assert await static.with_options(refresh_cache=True)(5) == 5


async def test_none_is_a_value(engine: Engine) -> None:
    """E11: None comes from the cache like anything else."""
    assert names([await static.run_to_state(None), await static.run_to_state(None)]) == [
        "Completed",
        "Cached",
    ]
    assert await static("other") is None


async def test_a_changed_storage_key(engine: Engine) -> None:
    """E12: under another storage key the old record is not used, with a policy and without one."""
    for options in ({"cache_policy": INPUTS}, {}):
        mine = task(static.fn).with_options(**options)
        before, after = (mine.with_options(result_storage_key=f"{len(options)}-{name}") for name in "ab")
        assert names([await before.run_to_state(1), await before.run_to_state(1)]) == ["Completed", "Cached"]
        assert names([await after.run_to_state(1), await after.run_to_state(1)]) == ["Completed", "Cached"]


async def test_a_record_deleted_behind_our_back(engine: Engine, tmp_path: Path) -> None:
    """E13: when the file is gone the task runs again and writes it again."""
    await static(1)
    await asyncio.to_thread((tmp_path / "key").unlink)
    assert await static(2) == 2
    assert await asyncio.to_thread((tmp_path / "key").is_file)
    assert await static(3) == 2


async def test_a_folder_deleted_behind_our_back(tmp_path: Path) -> None:
    """E13: when the whole folder is gone it is made again."""
    import shutil

    async with Engine(storage=tmp_path / "deep" / "folder"):
        await static(1)
        await asyncio.to_thread(shutil.rmtree, tmp_path / "deep")
        assert [await static(2), await static(3)] == [2, 2]


async def test_a_flow_retry_runs_only_what_failed(engine: Engine) -> None:
    """E15: when a flow is tried again its completed tasks are hits, and only the failed one runs."""
    ran: list[str] = []

    @task(persist_result=True)
    async def good(x: int) -> int:
        ran.append(f"good {x}")
        return x

    @task(persist_result=True)
    async def flaky() -> str:
        ran.append("flaky")
        if ran.count("flaky") < 3:
            raise ConnectionError("not yet")
        return "done"

    @flow(retries=2)
    async def parent() -> str:
        await good(1)
        await good.submit(2)
        return await flaky()

    assert await parent() == "done"
    assert ran == ["good 1", "good 2", "flaky", "flaky", "flaky"]


async def test_nested_tasks_commit_when_they_complete(engine: Engine) -> None:
    """E16: an inner task that repeats inside its outer one is Cached, also when the outer fails later."""
    seen: list[str] = []

    @task(cache_policy=INPUTS)
    async def outer(x: int) -> None:
        seen.extend(names([await static.run_to_state(1), await static.run_to_state(2)]))
        raise ValueError("too late")

    assert (await outer.run_to_state(1)).name == "Failed"
    assert seen == ["Completed", "Cached"]
    assert (await static.run_to_state(3)).name == "Cached"


async def test_failures_are_never_hits(engine: Engine) -> None:
    """E13: a failed run leaves no record, so that the next call runs."""
    ran: list[int] = []

    @task(cache_policy=INPUTS)
    async def flaky(x: int) -> int:
        ran.append(x)
        if len(ran) == 1:
            raise ConnectionError
        return x

    assert names([await flaky.run_to_state(1) for _ in range(3)]) == ["Failed", "Completed", "Cached"]


async def test_a_retry_that_succeeds_is_cached(engine: Engine) -> None:
    """E1: a run that completes at its second attempt is a record like any other."""
    ran: list[int] = []

    @task(cache_policy=INPUTS, retries=1)
    async def flaky(x: int) -> int:
        ran.append(x)
        if len(ran) == 1:
            raise ConnectionError
        return x

    assert names([await flaky.run_to_state(1) for _ in range(2)]) == ["Completed", "Cached"]


async def test_a_hit_reads_once_and_writes_nothing() -> None:
    """B18: a hit costs one read; a miss and a refresh one read and one write; an uncached call nothing."""
    storage = CountingStorage()
    async with Engine(storage=storage):
        await number(1)
        assert (len(storage.fetched), len(storage.written)) == (1, 1)
        await number(1)
        assert (len(storage.fetched), len(storage.written)) == (2, 1)
        await number.with_options(cache_policy=NONE)(1)
        await number.with_options(refresh_cache=True)(1)  # reads, so as not to cover a transaction's intent
        assert (len(storage.fetched), len(storage.written)) == (3, 2)


async def test_a_hit_with_key_storage_reads_each_once() -> None:
    """B18: where the value lies apart a hit reads the record once and the value once."""
    keys, values = CountingStorage(), CountingStorage()
    split = number.with_options(cache_policy=INPUTS.configure(key_storage=keys), result_storage=values)
    async with Engine(storage=MemoryStorage()):
        await split(1)
        assert (len(keys.fetched), len(values.fetched)) == (1, 0)
        await split(1)
        assert (len(keys.fetched), len(values.fetched)) == (2, 1)


async def test_a_hit_does_not_start_the_body(engine: Engine) -> None:
    """E1: on a hit neither the body nor its on_running hooks are called, and on_completion is."""
    called: list[str] = []

    @task(
        cache_policy=INPUTS,
        on_running=[lambda task, run, state: called.append("running")],
        on_completion=[lambda task, run, state: called.append(state.name)],
    )
    async def watched(x: int) -> int:
        called.append("body")
        return x

    await watched(1)
    await watched(1)
    assert called == ["running", "body", "Completed", "Cached"]


async def test_another_writer_is_seen_at_once(tmp_path: Path) -> None:
    """B13: when somebody else commits a new value, this engine's next call sees it."""
    async with Engine(storage=tmp_path) as here:
        assert [await static(1), await static(2)] == [1, 1]
        async with Engine(storage=LocalStorage(tmp_path)):
            await static.with_options(refresh_cache=True)("theirs")
        record = await here.storage.read("key")
        assert await static(3) == "theirs"
        await static.with_options(refresh_cache=True)("mine")
        await here.storage.write("key", record)
        assert await static(4) == "theirs"


async def test_hits_say_who_wrote_them(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """E1: the line that ends a run says why it ran, or by whom and when its record was written."""
    with caplog.at_level(logging.INFO, "onceflow"):
        async with Engine(storage=tmp_path, clock=clock) as engine:
            await static(1)
            clock.move(2 * 3600)
            await static(1)
            await static.with_options(refresh_cache=True)(1)
            await static.with_options(persist_result=False)(1)
            writer = (await header_of(engine.storage, "key")).run_id
    first, second, third, fourth = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(r"Task run 'static-...' - Finished in state Completed\(\); ran: no record", first)
    assert re.fullmatch(
        r"Task run 'static-...' - Finished in state Cached\(type=COMPLETED\); "
        r"cached: written by run [0-9a-f-]{36} 2 h ago",
        second,
    )
    assert third.endswith("ran: refresh was asked for")
    assert fourth.endswith("ran: persistence is off")
    assert writer not in second  # the refresh has replaced it


async def test_a_whole_flow_can_be_cached(engine: Engine) -> None:
    """E1: a flow with a policy is served from its record, submitted runs and all."""
    ran: list[int] = []

    @flow(cache_policy=INPUTS)
    async def cached(x: int) -> int:
        ran.append(x)
        return await number.with_options(cache_policy=RUN_ID)(x)

    assert await cached(1) == await cached(1) != await cached(2)
    assert ran == [1, 2]
    assert names([await cached.run_to_state(1)]) == ["Cached"]


async def test_equal_calls_side_by_side(engine: Engine) -> None:
    """E2: under READ_COMMITTED equal calls may run side by side, and the record is whole afterwards."""
    values = await asyncio.gather(*(number(1) for _ in range(20)))
    state = await number.run_to_state(1)
    assert state.name == "Cached"
    assert state.result() in values
    assert len(await keys_in(engine.storage)) == 1
