"""Composing and configuring policies, and what a policy of the user's own may do."""

from __future__ import annotations

import asyncio
import itertools
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any

import pytest
from onceflow.engine import (
    DEFAULT,
    FLOW_PARAMETERS,
    INPUTS,
    NONE,
    RUN_ID,
    TASK_SOURCE,
    CachePolicy,
    ConfigurationError,
    Engine,
    IsolationLevel,
    flow,
    task,
    transaction,
)
from onceflow.locking import MemoryLockManager
from onceflow.storage import MemoryStorage
from stored_records import header_of, keys_in

pytestmark = pytest.mark.usefixtures("engine")


@task(cache_policy=INPUTS)
async def work(x: int, y: int = 0) -> int:
    return x + y


async def key(policy: CachePolicy, *args: int) -> str | None:
    return await work.with_options(cache_policy=policy).cache_key(*args)


class ByTenant(CachePolicy):
    """A policy of a user's own."""

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant

    def compute_key(
        self,
        task_ctx: Any,
        inputs: Mapping[str, Any],
        flow_parameters: Mapping[str, Any] | None,
        **kwargs: Any,
    ) -> str | None:
        return self.tenant


class Asking(ByTenant):
    """One that has to ask somebody first."""

    async def compute_key(self, *args: Any, **kwargs: Any) -> str | None:  # type: ignore[override]
        await asyncio.sleep(0)
        return self.tenant


@dataclass(frozen=True)
class Dated(CachePolicy):
    """One written as a dataclass, as Prefect's are."""

    day: str

    def compute_key(
        self,
        task_ctx: Any,
        inputs: Mapping[str, Any],
        flow_parameters: Mapping[str, Any] | None,
        **kwargs: Any,
    ) -> str | None:
        return self.day


@pytest.mark.parametrize(
    "policy", [INPUTS, DEFAULT, RUN_ID, INPUTS - "x", ByTenant("a"), Dated("monday"), NONE]
)
def test_none_adds_nothing(policy: CachePolicy) -> None:
    """C1: NONE plus any policy is that policy, from either side."""
    assert NONE + policy == policy
    assert policy + NONE == policy


def test_a_sum_leaves_its_operands_alone() -> None:
    """C2: adding gives a compound, and the operands stay what they were."""
    one, other = INPUTS - "x", TASK_SOURCE
    total = one + other
    assert total not in (one, other)
    assert (one, other) == (INPUTS - "x", TASK_SOURCE)
    assert total - "y" == (INPUTS - "x" - "y") + TASK_SOURCE
    assert total == one + other


async def test_only_none_has_no_key() -> None:
    """C3: a sum of nothing but NONE has no key."""
    assert await key(NONE + NONE + NONE, 1) is None
    assert (NONE + NONE).compute_key(None, {"x": 1}, None) is None


async def test_sums_are_flat_and_in_no_order() -> None:
    """C4: however a sum is nested and ordered, it is the same policy with the same key."""
    parts = [INPUTS, TASK_SOURCE, ByTenant("a"), Asking("b"), Dated("monday")]
    keys = set()
    for one, two, three, four, five in itertools.permutations(parts):
        for total in ((one + two) + (three + (four + five)), one + (two + NONE + three) + four + five):
            assert len(total.parts()) == 5
            assert total == parts[0] + parts[1] + parts[2] + parts[3] + parts[4]
            keys.add(await key(total, 1))
    assert len(keys) == 1
    assert None not in keys


async def test_every_part_of_a_sum_counts() -> None:
    """C4: two policies of one class that say different things both count."""
    sums = [ByTenant("a") + ByTenant("b"), ByTenant("b") + ByTenant("b"), ByTenant("a") + ByTenant("a"),
            ByTenant("a") + ByTenant("c"), ByTenant("ab") + ByTenant("")]  # fmt: skip
    keys = [await key(total, 1) for total in sums]
    assert len(set(keys)) == len(sums)
    assert keys[0] == await key(ByTenant("b") + ByTenant("a"), 1)
    assert ByTenant("a") != ByTenant("b")


async def test_taking_away_what_is_not_there() -> None:
    """C6: a policy without inputs stays the same when a name is taken away, and ignores that name."""
    assert TASK_SOURCE - "x" is TASK_SOURCE
    policy = TASK_SOURCE + FLOW_PARAMETERS
    assert policy - "x" == policy
    assert await key(policy - "x", 1) == await key(policy - "x", 2) is not None


async def test_taking_away_from_a_sum() -> None:
    """C6: `- "name"` works on every compound that holds INPUTS, whichever the order."""
    for policy in (
        INPUTS - "y" + TASK_SOURCE,
        (TASK_SOURCE + INPUTS) - "y",
        (NONE + INPUTS + TASK_SOURCE) - "y",
    ):
        assert (
            await key(policy, 1, 1) == await key(policy, 1, 2) == await key((INPUTS + TASK_SOURCE) - "y", 1)
        )
        assert await key(policy, 1) != await key(policy, 2)


@pytest.mark.parametrize("policy", [INPUTS, TASK_SOURCE, DEFAULT, NONE, ByTenant("a")])
@pytest.mark.parametrize("name", [1, None, b"x", INPUTS, ["x"]])
def test_taking_away_something_else_than_a_name(policy: CachePolicy, name: Any) -> None:
    """C8: only a name can be taken away."""
    with pytest.raises(TypeError):
        policy - name


@pytest.mark.parametrize("other", [1, None, "x", len])
def test_adding_something_else_than_a_policy(other: Any) -> None:
    """C8: only policies can be added."""
    for policy in (INPUTS, NONE, DEFAULT):
        with pytest.raises(TypeError):
            policy + other


@pytest.mark.parametrize(
    "policy", [INPUTS, DEFAULT, NONE, INPUTS - "x", ByTenant("a"), Dated("monday"), TASK_SOURCE]
)
def test_configure_makes_a_new_policy(policy: CachePolicy) -> None:
    """C9: configure gives a policy that carries what was said, and the original does not."""
    storage, manager = MemoryStorage(), MemoryLockManager()
    configured = policy.configure(
        key_storage=storage, lock_manager=manager, isolation_level=IsolationLevel.SERIALIZABLE
    )
    said = configured.key_storage, configured.lock_manager, configured.isolation_level
    assert said == (storage, manager, IsolationLevel.SERIALIZABLE)
    assert (policy.key_storage, policy.lock_manager, policy.isolation_level) == (None, None, None)
    assert configured != policy or isinstance(policy, Dated)  # a dataclass brings an equality of its own


@pytest.mark.parametrize(
    "policy", [INPUTS, DEFAULT, NONE, INPUTS - "x", ByTenant("a"), Dated("monday"), TASK_SOURCE]
)
def test_configure_with_nothing(policy: CachePolicy) -> None:
    """C10: configured with nothing, a policy equals itself."""
    assert policy.configure() == policy
    assert hash(policy.configure()) == hash(policy)


async def test_a_sum_carries_the_configuration_of_either(tmp_path: Path) -> None:
    """C11: one configured operand configures the sum, and further sums and subtractions keep it."""
    configured = INPUTS.configure(key_storage=tmp_path / "keys", isolation_level="READ_COMMITTED")
    for total in (configured + TASK_SOURCE, TASK_SOURCE + configured, NONE + configured, configured + NONE,
                  (RUN_ID + configured) - "x", configured + (configured + TASK_SOURCE)):  # fmt: skip
        assert total.key_storage == tmp_path / "keys"
        assert total.isolation_level is IsolationLevel.READ_COMMITTED
    assert (NONE.configure(key_storage="k") + INPUTS).key_storage == "k"


def test_operands_that_disagree(tmp_path: Path) -> None:
    """C11: two different configurations cannot be added, and the error names what and which."""
    one, other = (
        INPUTS.configure(key_storage=tmp_path / "a"),
        TASK_SOURCE.configure(key_storage=tmp_path / "b"),
    )
    with pytest.raises(ValueError, match=r"key_storage.*/a.*/b"):
        one + other
    with pytest.raises(ValueError, match="isolation_level"):
        INPUTS.configure(isolation_level="SERIALIZABLE") + RUN_ID.configure(isolation_level="READ_COMMITTED")
    with pytest.raises(ValueError, match="lock_manager"):
        INPUTS.configure(lock_manager=MemoryLockManager()) + RUN_ID.configure(
            lock_manager=MemoryLockManager()
        )
    with pytest.raises(ValueError, match="key_storage"):
        NONE.configure(key_storage="a") + INPUTS.configure(key_storage="b")
    same = INPUTS.configure(key_storage=str(tmp_path)) + RUN_ID.configure(key_storage=tmp_path)
    assert same.key_storage == str(tmp_path)


async def test_where_records_lie_does_not_change_the_key(tmp_path: Path) -> None:
    """C9: configuration is not part of the key."""
    assert await key(INPUTS.configure(key_storage=tmp_path / "k"), 1) == await key(INPUTS, 1)


def test_a_key_function_beats_a_policy() -> None:
    """C13: given both, the function wins, and a warning says so."""
    with pytest.warns(UserWarning, match=r"'f'.*cache_key_fn.*function wins") as caught:

        @task(cache_policy=INPUTS, cache_key_fn=lambda context, parameters: "mine")
        async def f(x: int) -> int:
            return x

    assert caught[0].filename == __file__


async def test_with_options_overrides_either() -> None:
    """B26: a policy given later displaces a key function, and the other way round, without a warning."""
    by_function = work.with_options(cache_key_fn=lambda context, parameters: "mine")
    assert await by_function.cache_key(1) == "mine"
    assert await by_function.with_options(cache_policy=INPUTS).cache_key(1) == await work.cache_key(1)
    assert await by_function.with_options(cache_policy=NONE).cache_key(1) is None
    assert await by_function.with_options(name="other").cache_key(1) == "mine"
    with pytest.warns(UserWarning, match="persist_result=False"):
        off = work.with_options(persist_result=False)
    assert await off.with_options(cache_policy=INPUTS).cache_key(1) == await work.cache_key(1)


@pytest.mark.parametrize(
    "level", [IsolationLevel.SERIALIZABLE, "SERIALIZABLE", "serializable", "Serializable"]
)
def test_isolation_levels(level: Any) -> None:
    """C14: a level is given as the enum or as text."""
    assert INPUTS.configure(isolation_level=level).isolation_level is IsolationLevel.SERIALIZABLE


@pytest.mark.parametrize("level", ["SNAPSHOT", "", 1])
def test_unknown_isolation_levels(level: Any) -> None:
    """C14: an unknown level is a ValueError at once, and says which there are."""
    with pytest.raises(ValueError, match=r"READ_COMMITTED.*SERIALIZABLE"):
        INPUTS.configure(isolation_level=level)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lock_manager", "redis://localhost"),
        ("lock_timeout", -1),
        ("lock_timeout", "5"),
        ("lock_timeout", nan),
    ],
)
def test_what_cannot_lock(option: str, value: Any) -> None:
    """C9: a lock manager that is none, and a timeout that is no time, are refused at once, by name and value."""
    for configure in (INPUTS.configure, TASK_SOURCE.configure, transaction):
        with pytest.raises(ConfigurationError, match=f"{option} of a .* {re.escape(repr(value))}"):
            configure(**{option: value})


@pytest.mark.parametrize("policy", [ByTenant("my key"), Asking("my key"), Dated("my key")])
async def test_a_policy_of_ones_own_says_the_key(engine: Engine, policy: CachePolicy) -> None:
    """K15: alone, a user's policy, sync or async, gives the key verbatim; in a sum it is one part of it."""
    mine = work.with_options(cache_policy=policy)
    assert [(await mine.run_to_state(x)).result() for x in (1, 2)] == [1, 1]
    assert await keys_in(engine.storage) == ["my key"]
    assert await key(policy + INPUTS, 1) not in (
        await key(policy + INPUTS, 2),
        await key(INPUTS, 1),
        "my key",
    )


async def test_async_key_functions() -> None:
    """K15: a key function may await something."""

    async def slowly(context: object, parameters: dict[str, Any]) -> str:
        await asyncio.sleep(0)
        return f"slow-{parameters['x'] % 2}"

    slow = work.with_options(cache_key_fn=slowly)
    assert [await slow(1), await slow(3), await slow(2)] == [1, 1, 2]


@pytest.mark.parametrize("answer", [None, ""])
async def test_a_key_function_may_decline(engine: Engine, answer: str | None) -> None:
    """K15: None from a key function means "not cached", without a warning."""
    declining = work.with_options(cache_key_fn=lambda context, parameters: answer)
    assert [(await declining.run_to_state(1)).name for _ in range(2)] == ["Completed", "Completed"]
    assert await keys_in(engine.storage) == []


@pytest.mark.parametrize("answer", [1, b"bytes", ["list"], True, object()])
async def test_a_key_that_is_no_text(
    engine: Engine, caplog: pytest.LogCaptureFixture, answer: object
) -> None:
    """K20: a key function that returns something else is a warning; the task completes uncached."""
    wrong = work.with_options(cache_key_fn=lambda context, parameters: answer)
    assert [(await wrong.run_to_state(1)).name for _ in range(2)] == ["Completed", "Completed"]
    assert await keys_in(engine.storage) == []
    assert {record.levelname for record in caplog.records if "text" in record.getMessage()} == {"WARNING"}
    assert type(answer).__name__ in caplog.text


class Wrong(CachePolicy):
    def compute_key(self, *args: Any, **kwargs: Any) -> Any:
        return 42


async def test_a_policy_part_that_is_no_text(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """K21: a policy that returns something else spoils the whole sum, not the run."""
    assert await key(INPUTS + Wrong(), 1) is None
    assert "42" in caplog.text


async def test_a_key_function_that_raises(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """K21: a key function that raises is a warning with its error; the task completes uncached."""

    def broken(context: object, parameters: dict[str, Any]) -> str:
        return str(parameters["no such thing"])

    state = await work.with_options(cache_key_fn=broken).run_to_state(1)
    assert (state.name, state.result()) == ("Completed", 1)
    assert await keys_in(engine.storage) == []
    assert "KeyError" in caplog.text
    assert "broken" in caplog.text


# fmt: off
KEYS = [
    "a/b", "../../outside", "..", ".", "/absolute", "a" * 300, "a\\b", "nul", "a b", "ümläut/☃", "%2F", "\n", "~",
    "a.b", "a:b", "s3://bucket/x", "-", "a\x00b", "\udc80",
]
# fmt: on


async def test_any_text_is_a_key(tmp_path: Path) -> None:
    """B30: keys of odd characters and any length are told apart, and stay inside the storage."""
    mine = work.with_options(cache_key_fn=lambda context, parameters: KEYS[parameters["x"]])
    folder = tmp_path / "a" / "b"
    async with Engine(storage=folder) as engine:
        for x in range(len(KEYS)):
            assert (await mine.run_to_state(x)).name == "Completed"
        for x in range(len(KEYS)):
            state = await mine.run_to_state(x)
            assert (state.name, state.result()) == ("Cached", x)
        assert len(await keys_in(engine.storage)) == len(KEYS)

    def everything() -> set[Path]:
        return {path.parent for path in tmp_path.rglob("*") if path.is_file()}

    assert await asyncio.to_thread(everything) == {folder}


async def test_the_file_is_named_by_the_key(engine: Engine) -> None:
    """K1: the key of a composed policy is a hex digest; the record of that name has its components."""

    @flow
    async def parent(day: str) -> str | None:
        mine = work.with_options(cache_policy=INPUTS - "y" + TASK_SOURCE + FLOW_PARAMETERS + RUN_ID)
        await mine(1)
        return await mine.cache_key(1)

    name = await parent("monday")
    assert name is not None
    assert len(name) == 64
    assert set(name) <= set("0123456789abcdef")
    assert await keys_in(engine.storage) == [name]
    header = await header_of(engine.storage, name)
    assert (header.key, header.task) == (name, "work")
    assert set(header.components) >= {"input 'x'", "source", "flow parameter 'day'", "run id"}
    assert "input 'y'" not in header.components


async def test_no_key_is_computed_without_persistence() -> None:
    """P10: with persistence off a key function is never called."""
    called: list[int] = []

    class Counting(CachePolicy):
        def compute_key(self, *args: Any, **kwargs: Any) -> str:
            called.append(1)
            return "key"

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        off = work.with_options(cache_policy=Counting(), persist_result=False)
    assert await off(1) == 1
    assert await off.cache_key(1) is None
    assert called == []
