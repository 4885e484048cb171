"""Which runs persist, and where."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import pytest
from onceflow.engine import DEFAULT, INPUTS, NONE, TASK_SOURCE, Engine, Settings, flow, task
from onceflow.storage import MemoryStorage
from stored_records import header_of, keys_in, names_in


async def body(x: int = 0) -> int:
    return random.getrandbits(60)


work = task(body)


def stored_by(value: Any) -> Any:
    return lambda context, parameters: value


async def test_a_plain_task_decides_nothing(engine: Engine) -> None:
    """P1: a plain task has the policy DEFAULT and leaves persistence open; a new name keeps that."""
    for each in (work, work.with_options(name="other"), work.with_options(retries=3)):
        assert each.cache_policy == DEFAULT
        assert each.persist_result is None


OPTIONS: list[dict[str, Any]] = [
    {"cache_policy": INPUTS},
    {"cache_policy": DEFAULT},
    {"cache_key_fn": stored_by("key")},
    {"result_storage": "memory://p2"},
    {"result_serializer": "json"},
    {"result_storage_key": "name"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=", ".join)
async def test_saying_how_switches_persistence_on(engine: Engine, options: dict[str, Any]) -> None:
    """P2: a policy, key function, storage, serializer or storage key means that results persist."""
    for made in (task(**options)(body), work.with_options(**options)):
        assert made.persist_result is True
    storage = engine.storage_for(options.get("result_storage", engine.storage))
    await work.with_options(**options)(1)
    assert len(await keys_in(storage)) == 1


@pytest.mark.parametrize("options", OPTIONS, ids=", ".join)
def test_false_wins_over_saying_how(options: dict[str, Any]) -> None:
    """P3: persist_result=False means NONE; it warns where a policy was given, and only there."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = task(persist_result=False, **options)(body)
    assert (made.persist_result, made.cache_policy) == (False, NONE)
    assert len(caught) == ("cache_policy" in options)


def test_none_is_no_wish_to_persist() -> None:
    """P2, P3: the policy NONE leaves persistence open, and goes with persist_result=False without a warning."""
    assert task(cache_policy=NONE)(body).persist_result is None
    assert task(cache_policy=NONE, persist_result=False)(body).persist_result is False


def test_none_takes_an_option_back() -> None:
    """P1: None in with_options stands for "as if never said"."""
    said = task(cache_policy=INPUTS)(body)
    assert said.with_options(cache_policy=None).persist_result is None
    assert said.with_options(cache_policy=None).cache_policy == DEFAULT
    assert said.with_options(name="x").cache_policy == INPUTS


@pytest.mark.parametrize("options", [*OPTIONS, {"persist_result": True}], ids=", ".join)
async def test_the_switch_that_disables_all(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """P5: with caching disabled by the settings nothing is stored and nothing served, whatever a task states."""
    monkeypatch.setenv("ONCEFLOW_TASKS_DISABLE_CACHING", "1")
    off = work.with_options(**options)

    @flow(persist_result=True)
    async def parent() -> list[str]:
        return [(await off.run_to_state(1)).name, (await off.run_to_state(1)).name]

    assert await parent() == ["Completed", "Completed"]
    assert await keys_in(engine.storage) == []


async def run_in(parent_persists: bool | None, made: Any) -> list[str]:
    @flow(persist_result=parent_persists)
    async def parent() -> list[str]:
        return [(await made.run_to_state(1)).name, (await made.run_to_state(1)).name]

    return await parent()


RAN, HIT = ["Completed", "Completed"], ["Completed", "Cached"]


async def test_a_flow_persists_for_its_tasks(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """P6: a task that leaves persistence open does as its flow; an explicit word on task or setting wins."""
    assert await run_in(None, work) == RAN
    assert await run_in(True, work) == HIT
    assert await run_in(False, work) == RAN
    assert await run_in(True, work.with_options(persist_result=False)) == RAN
    assert await run_in(False, work.with_options(persist_result=True)) == HIT
    monkeypatch.setenv("ONCEFLOW_TASKS_DEFAULT_PERSIST_RESULT", "false")
    assert await run_in(True, work) == RAN
    assert await run_in(True, work.with_options(persist_result=True)) == HIT
    monkeypatch.setenv("ONCEFLOW_TASKS_DEFAULT_PERSIST_RESULT", "true")
    assert await run_in(False, work) == HIT
    monkeypatch.delenv("ONCEFLOW_TASKS_DEFAULT_PERSIST_RESULT")
    monkeypatch.setenv("ONCEFLOW_RESULTS_PERSIST_BY_DEFAULT", "true")
    assert await run_in(None, work) == HIT
    assert await run_in(False, work) == RAN
    assert await run_in(None, work.with_options(persist_result=False)) == RAN


async def test_no_cache_by_default(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """P5: a setting gives NONE to tasks that state no policy, and leaves the others alone."""
    monkeypatch.setenv("ONCEFLOW_TASKS_DEFAULT_NO_CACHE", "true")
    assert await run_in(True, work) == RAN
    assert await run_in(None, work.with_options(cache_policy=DEFAULT)) == HIT
    assert await run_in(None, work.with_options(cache_key_fn=stored_by("k"))) == HIT


async def test_a_storage_key_without_a_policy(engine: Engine, tmp_path: Path) -> None:
    """P8: the record lies under the storage key of the user's own, and is found there again."""
    made = task(result_storage_key="report-{x}.bin")(body)
    assert await made(1) == await made(1) != await made(2)
    assert await names_in(tmp_path) == {"report-1.bin", "report-2.bin"}


async def test_a_storage_key_with_a_policy(engine: Engine) -> None:
    """P8: with a policy the record lies under the key, and the value under the storage key."""
    made = task(result_storage_key="value-{x}", cache_policy=INPUTS)(body)
    assert await made(1) == await made(1)
    key = await made.cache_key(1)
    assert key is not None
    assert set(await keys_in(engine.storage)) == {key, "value-1"}
    assert (await header_of(engine.storage, key)).location == "value-1"


async def test_where_a_task_without_storage_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """P9: the task's own storage and serializer come first, then its flow's, the engine's, the settings'."""
    own, flows, engines = MemoryStorage(), MemoryStorage(), MemoryStorage()
    named = work.with_options(cache_policy=INPUTS)
    monkeypatch.setenv("ONCEFLOW_STORAGE", str(tmp_path / "settings"))
    monkeypatch.setenv("ONCEFLOW_RESULTS_DEFAULT_SERIALIZER", "compressed/msgpack")

    @flow(result_storage=flows, result_serializer="json")
    async def parent(made: Any) -> None:
        await made(1)

    @flow
    async def plain(made: Any) -> None:
        await made(1)

    async def serializer_in(storage: Any) -> str:
        [key] = await keys_in(storage)
        return (await header_of(storage, key)).serializer

    async with Engine(storage=engines, serializer="compressed/json"):
        await parent(named.with_options(result_storage=own, result_serializer="pickle"))
        await parent(named)
        await plain(named)
    async with Engine() as made_from_settings:
        await plain(named)
        assert await serializer_in(made_from_settings.storage) == "compressed/msgpack"
    assert len(await names_in(tmp_path / "settings")) == 1
    assert [await serializer_in(each) for each in (own, flows, engines)] == [
        "pickle",
        "json",
        "compressed/json",
    ]


async def test_a_flow_with_a_storage_persists_for_its_tasks(engine: Engine) -> None:
    """P9: a flow that says where results lie says that they persist, for its tasks too."""
    storage = MemoryStorage()

    @flow(result_storage=storage)
    async def parent() -> None:
        await work(1)

    await parent()
    assert len(await keys_in(storage)) == 1


async def test_without_persistence_nothing_is_written(engine: Engine, tmp_path: Path) -> None:
    """P10: without persistence the value is there when the run ends, and no file is."""

    @flow
    async def parent() -> int:
        state = await work.run_to_state(1)
        assert state.location is None
        return state.result()

    assert isinstance(await parent(), int)
    assert isinstance(await work(1), int)
    assert await names_in(tmp_path) == set()


async def test_opening_an_engine_writes_nothing(tmp_path: Path) -> None:
    """P10: an engine that stored nothing leaves no folder behind."""
    async with Engine(storage=tmp_path / "new", settings=Settings()):
        await work(1)
    assert await names_in(tmp_path) == set()


async def test_policies_of_tasks_in_a_persisting_flow(engine: Engine) -> None:
    """P6: a persisting flow does not change the policy of its tasks."""
    assert await run_in(True, work.with_options(cache_policy=NONE)) == RAN
    assert await run_in(True, work.with_options(cache_policy=INPUTS + TASK_SOURCE)) == HIT
