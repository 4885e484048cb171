"""The examples of Prefect 3's caching pages, with the import changed and `await` added, do as the pages say.

Tasks are plain functions, as there: they run in worker threads. What a page shows by a printed line is shown
by a printed line here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from onceflow.engine import DEFAULT, INPUTS, NONE, RUN_ID, TASK_SOURCE, CachePolicy, Engine, flow, task
from onceflow.storage import MemoryStorage
from stored_records import Clock, header_of, keys_in, names_in

pytestmark = pytest.mark.usefixtures("engine")


class Lines:
    """What was printed since it was last asked."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self) -> list[str]:
        return self._capsys.readouterr().out.splitlines()


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Lines:
    return Lines(capsys)


async def test_default_is_inputs_code_and_run(engine: Engine, lines: Lines) -> None:
    """E1: with persist_result=True a call repeated in one flow run is served, and the next flow run computes."""

    @task(persist_result=True)
    def add_one(x: int) -> int:
        print(f"adding to {x}")
        return x + 1

    @flow
    async def my_flow() -> None:
        await add_one(1)  # will not be cached
        await add_one(1)  # will be cached
        await add_one(2)  # will not be cached

    assert add_one.cache_policy == DEFAULT == INPUTS + TASK_SOURCE + RUN_ID
    await my_flow()
    assert lines() == ["adding to 1", "adding to 2"]
    await my_flow()
    assert lines() == ["adding to 1", "adding to 2"]


async def test_caching_needs_persistence(lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    """P1: persistence is off by default, and a setting turns it on for all tasks."""

    @task
    def say(x: int) -> int:
        print("saying")
        return x

    @flow
    async def my_flow() -> None:
        await say(1)
        await say(1)

    await my_flow()
    assert lines() == ["saying", "saying"]
    monkeypatch.setenv("ONCEFLOW_RESULTS_PERSIST_BY_DEFAULT", "true")
    await my_flow()
    assert lines() == ["saying"]


async def test_filenames_are_cache_keys(tmp_path: Path) -> None:
    """S1: the names of the files correspond exactly to the keys."""

    @task(cache_policy=INPUTS)
    def work(x: int) -> int:
        return x

    for x in range(3):
        await work(x)
    assert await names_in(tmp_path) == {await work.cache_key(x) for x in range(3)}


async def test_source_runs_once_until_the_code_changes(lines: Lines) -> None:
    """K6: with TASK_SOURCE a task runs once, whoever calls it, and again when its code was altered."""

    def before() -> Any:
        @task(cache_policy=TASK_SOURCE)
        def my_stateful_task() -> int:
            print("sleeping")
            return 42

        return my_stateful_task

    def after() -> Any:
        @task(cache_policy=TASK_SOURCE)
        def my_stateful_task() -> int:
            print("sleeping")

            # change the return value, for example
            return 43

        return my_stateful_task

    @flow
    async def one() -> int:
        return await before()()  # type: ignore[no-any-return]

    @flow
    async def other() -> int:
        return await before()()  # type: ignore[no-any-return]

    assert [await before()(), await before()(), await one(), await other()] == [42] * 4
    assert lines() == ["sleeping"]
    assert [await after()(), await after()()] == [43, 43]
    assert lines() == ["sleeping"]


async def test_source_alone_ignores_inputs(lines: Lines) -> None:
    """K6: with TASK_SOURCE alone the inputs do not matter."""

    @task(cache_policy=TASK_SOURCE)
    def my_cached_task(x: int) -> int:
        print("running")
        return x + 42

    assert [await my_cached_task(1), await my_cached_task(2)] == [43, 43]
    assert lines() == ["running"]


async def test_inputs_and_source(lines: Lines) -> None:
    """K25: TASK_SOURCE + INPUTS reruns for new values of x and for new code, across flow runs."""

    def before() -> Any:
        @task(cache_policy=TASK_SOURCE + INPUTS)
        def my_cached_task(x: int) -> int:
            print("running")
            return x + 42

        return my_cached_task

    def after() -> Any:
        @task(cache_policy=INPUTS + TASK_SOURCE)
        def my_cached_task(x: int) -> int:
            print("running")
            return x + 43

        return my_cached_task

    @flow
    async def my_flow(x: int) -> int:
        return await before()(x)  # type: ignore[no-any-return]

    assert [await my_flow(1), await my_flow(1), await before()(1), await my_flow(2)] == [43, 43, 43, 44]
    assert lines() == ["running"] * 2
    assert await after()(1) == 44
    assert lines() == ["running"]


async def test_inputs_without_debug(lines: Lines) -> None:
    """K3: a subtracted input is ignored."""
    my_custom_policy = INPUTS - "debug"

    @task(cache_policy=my_custom_policy)
    def my_cached_task(x: int, debug: bool = False) -> int:
        print("running...")
        return x + 42

    await my_cached_task(1)
    await my_cached_task(1, debug=True)  # still uses the cache
    assert lines() == ["running..."]
    await my_cached_task(2, debug=True)
    assert lines() == ["running..."]


async def test_a_static_cache_key(engine: Engine) -> None:
    """K15: a key function may return a constant, and the constant is the key."""

    def static_cache_key(context: Any, parameters: dict[str, Any]) -> str:
        # return a constant
        return "static cache key"

    @task(cache_key_fn=static_cache_key)
    def my_cached_task(x: int) -> int:
        return x + 1

    assert [await my_cached_task(1), await my_cached_task(100)] == [2, 2]
    assert await keys_in(engine.storage) == ["static cache key"]


async def test_a_key_from_the_context() -> None:
    """K15: the context has task_run_id, flow_run_id and task, and the second argument the inputs by name."""
    seen = []

    def by_context(context: Any, parameters: dict[str, Any]) -> str:
        seen.append((context.task_run_id, context.flow_run_id, context.task.name, parameters))
        return f"{context.task.name}-{context.task_run.flow_run_id}-{parameters['x'] % 2}"

    @task(cache_key_fn=by_context)
    def my_cached_task(x: int, y: int, z: int = 3) -> int:
        return x

    @flow
    async def my_flow() -> list[int]:
        return [await my_cached_task(1, 1), await my_cached_task(3, y=1), await my_cached_task(2, 1)]

    assert [await my_flow(), await my_flow()] == [[1, 1, 2]] * 2
    assert len({task_run for task_run, _, _, _ in seen}) == 6
    assert len({flow_run for _, flow_run, _, _ in seen}) == 2
    assert [parameters for _, _, _, parameters in seen[:2]] == [
        {"x": 1, "y": 1, "z": 3},
        {"x": 3, "y": 1, "z": 3},
    ]


async def test_key_storage_as_a_path(engine: Engine, tmp_path: Path) -> None:
    """S1, S2: with a key storage the records lie there, results hold the value only, and either may go."""
    cache_policy = (TASK_SOURCE + INPUTS).configure(key_storage=str(tmp_path / "cache" / "storage"))

    @task(cache_policy=cache_policy, result_storage=tmp_path / "results")
    def my_cached_task(x: int) -> int:
        return x + 42

    await my_cached_task(1)
    assert await names_in(tmp_path / "cache" / "storage") == {await my_cached_task.cache_key(1)}
    assert len(await names_in(tmp_path / "results")) == 1
    assert (await my_cached_task.run_to_state(1)).name == "Cached"


async def test_key_storage_as_a_storage() -> None:
    """S1: what is a storage block there is a storage here."""
    bucket = MemoryStorage()

    @task(cache_policy=(TASK_SOURCE + INPUTS).configure(key_storage=bucket))
    def my_cached_task(x: int) -> int:
        return x + 42

    await my_cached_task(1)
    assert await keys_in(bucket) == [await my_cached_task.cache_key(1)]


async def test_equal_calls_may_run_side_by_side(lines: Lines) -> None:
    """E2: under READ_COMMITTED two tasks with one key both run when they start together."""

    @task(cache_policy=INPUTS)
    def my_task_version_1(x: int) -> int:
        print("my_task_version_1 running")
        return x + 42

    @task(cache_policy=INPUTS)
    def my_task_version_2(x: int) -> int:
        print("my_task_version_2 running")
        return x + 43

    @flow
    async def both() -> set[int]:
        return {await future for future in (my_task_version_1.submit(1), my_task_version_2.submit(1))}

    assert await both() == {43, 44}
    assert sorted(lines()) == ["my_task_version_1 running", "my_task_version_2 running"]
    assert await my_task_version_1(1) == await my_task_version_2(1)


async def test_expiration_is_for_all_who_share_the_key(tmp_path: Path, lines: Lines) -> None:
    """E6: until the expiration the cached value is returned; it is stored beside the record, for every task."""

    @task(cache_policy=INPUTS, cache_expiration=timedelta(days=1))
    def hello_task(name_input: str) -> str:
        print("Saying hello")
        return "hello " + name_input

    @task(cache_policy=INPUTS)
    def other_task(name_input: str) -> str:
        print("Saying other")
        return "other " + name_input

    @flow
    async def hello_flow(name_input: str) -> None:
        await hello_task(name_input)
        await hello_task(name_input)  # does not rerun

    clock = Clock()
    async with Engine(storage=tmp_path / "results", clock=clock) as engine:
        await hello_flow("world")
        await hello_flow("world")
        assert lines() == ["Saying hello"]
        await hello_flow("you")
        assert lines() == ["Saying hello"]
        key = await hello_task.cache_key("world")
        assert key is not None
        assert (await header_of(engine.storage, key)).expires_at == clock.now + 86_400
        assert await other_task("world") == "hello world"
        clock.move(86_400)
        assert await other_task("world") == "other world"
        assert lines() == ["Saying other"]


async def test_inputs_and_run_id(lines: Lines) -> None:
    """E4: INPUTS + RUN_ID reruns each time the flow is run, and caches within the run."""

    @task(cache_policy=INPUTS + RUN_ID, cache_expiration=timedelta(days=1))
    def hello_task(name_input: str) -> str:
        print("Saying hello")
        return "hello " + name_input

    @flow
    async def hello_flow(name_input: str) -> None:
        # reruns each time the flow is run
        await hello_task(name_input)
        # but the same call within the same flow run is Cached
        await hello_task(name_input)

    for _ in range(2):
        await hello_flow("world")
        assert lines() == ["Saying hello"]


def caching_task(refresh: bool | None) -> Any:
    def static_cache_key(context: Any, parameters: dict[str, Any]) -> str:
        return "refreshed"

    @task(cache_key_fn=static_cache_key, refresh_cache=refresh)
    def my_cached_task(x: int) -> int:
        return x

    return my_cached_task


async def test_refresh_cache_ignores_and_replaces() -> None:
    """E7: refresh_cache=True never uses the cache and always updates it."""
    always = caching_task(True)
    assert [await always(1), await always(2)] == [1, 2]
    assert await caching_task(None)(3) == 2


async def test_the_refresh_setting_and_those_who_do_not_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    """E9: a setting refreshes all tasks, and refresh_cache=False never does."""
    never = caching_task(False)
    assert await never(1) == 1
    monkeypatch.setenv("ONCEFLOW_TASKS_REFRESH_CACHE", "true")
    assert await never(2) == 1
    assert await caching_task(None)(3) == 3
    assert await never(4) == 3


class NotSerializable:
    def __getstate__(self) -> Any:
        raise TypeError("NooOoOo! I will not be serialized!")


async def test_inputs_that_cannot_be_serialized(caplog: pytest.LogCaptureFixture, lines: Lines) -> None:
    """K20: a task with such an input completes, is not cached, and is told how to be."""

    @task(cache_policy=INPUTS)
    def work(x: int, client: NotSerializable) -> int:
        print("working")
        return x

    for _ in range(2):
        assert await work(1, NotSerializable()) == 1
    assert lines() == ["working"] * 2
    assert "INPUTS - 'client'" in caplog.text
    caplog.clear()
    left_out = work.with_options(cache_policy=INPUTS - "client")
    by_hand = work.with_options(cache_key_fn=lambda context, parameters: f"by hand {parameters['x']}")
    for cached in (left_out, by_hand):
        for _ in range(2):
            assert await cached(1, NotSerializable()) == 1
        assert lines() == ["working"]
    without = work.with_options(cache_policy=NONE)
    for _ in range(2):
        assert await without(1, NotSerializable()) == 1
    assert lines() == ["working"] * 2
    assert caplog.text == ""


@dataclass
class IgnoringClients(CachePolicy):
    """A policy class of one's own, in the way that the page writes it."""

    ignored: list[str] = field(default_factory=list)

    def compute_key(
        self,
        task_ctx: Any,
        inputs: Mapping[str, Any],
        flow_parameters: Mapping[str, Any] | None,
        **kwargs: Any,
    ) -> str | None:
        kept = {name: value for name, value in inputs.items() if name not in self.ignored}
        if not kept:
            return None
        return " ".join(f"{name}-{value}" for name, value in sorted(kept.items()))


async def test_a_policy_class_of_ones_own(engine: Engine, lines: Lines) -> None:
    """C2: a subclass of CachePolicy with compute_key() works alone, in sums and configured."""

    @task(cache_policy=IgnoringClients(ignored=["client"]))
    def work(x: int, client: NotSerializable) -> int:
        print("working")
        return x

    for _ in range(2):
        assert await work(1, NotSerializable()) == 1
    assert lines() == ["working"]
    assert await keys_in(engine.storage) == ["x-1"]
    keys = MemoryStorage()
    summed = work.with_options(
        cache_policy=(IgnoringClients(ignored=["client"]) + TASK_SOURCE).configure(key_storage=keys)
    )
    for _ in range(2):
        assert await summed(1, NotSerializable()) == 1
    assert lines() == ["working"]
    assert len(await keys_in(keys)) == 1
