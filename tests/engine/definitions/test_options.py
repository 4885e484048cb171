"""What `@task` and `@flow` can be told, and how `with_options` changes it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from onceflow.engine import DEFAULT, INPUTS, NONE, ConfigurationError, flow, get_run_context, task
from onceflow.engine._definitions.options import CommonOptions, FlowOptions, TaskOptions
from onceflow.storage import MemoryStorage

pytestmark = pytest.mark.usefixtures("engine")


async def body(x: int = 1) -> int:
    """What it does."""
    return x


def hook(*_: Any) -> None: ...


def other(*_: Any) -> None: ...


SAMPLES: dict[str, tuple[Any, Any]] = {
    "name": ("one", "two"),
    "description": ("one", "two"),
    "version": ("1", 2),
    "tags": ({"a"}, {"b", "c"}),
    "cache_policy": (INPUTS, DEFAULT),
    "cache_key_fn": (hook, other),
    "cache_expiration": (timedelta(1), timedelta(2)),
    "refresh_cache": (True, False),
    "persist_result": (True, False),
    "result_storage": (MemoryStorage(), MemoryStorage()),
    "result_serializer": ("json", "pickle"),
    "result_storage_key": ("one", "two"),
    "retries": (1, 0),
    "retry_delay_seconds": (1.5, 0),
    "retry_jitter_factor": (0.5, 0),
    "retry_condition_fn": (hook, other),
    "timeout_seconds": (5, 0),
    "log_prints": (True, False),
    "on_running": ([hook], [other]),
    "on_completion": ([hook], [other]),
    "on_failure": ([hook], [other]),
    "on_commit": ([hook], [other]),
    "on_rollback": ([hook], [other]),
    "task_run_name": ("one", other),
    "concurrency": (1, 2),
    "rate": ("5/s", "100/min"),
    "runner": ("process", "process"),
    "flow_run_name": ("one", other),
    "validate_parameters": (True, False),
    "on_cancellation": ([hook], [other]),
    "on_crashed": ([hook], [other]),
}
KINDS: list[tuple[Any, Any]] = [(task, TaskOptions), (flow, FlowOptions)]


def options_of(options: Any) -> list[str]:
    return [*CommonOptions.__annotations__, *options.__annotations__]


EACH = [
    pytest.param(make, name, id=f"{make.__name__}-{name}")
    for make, options in KINDS
    for name in sorted({*options_of(options)})
]


def said(definition: Any, option: str) -> Any:
    """What a definition has for an option, as a user would look."""
    if option.startswith("on_"):
        return definition.hooks.get(option, [])
    if option == "persist_result":
        return definition.persist_result
    return getattr(definition, option)


def same(got: Any, given: Any) -> bool:
    if isinstance(given, list):
        return list(got) == given
    return bool(got == given)


def test_every_option_is_tested() -> None:
    """O1: the samples of this test know every option, and no other."""
    assert set(SAMPLES) == {name for _, options in KINDS for name in options_of(options)}


@pytest.mark.parametrize(("make", "option"), EACH)
def test_with_options_overrides_one_option_and_keeps_the_original(make: Any, option: str) -> None:
    """O1: with_options makes a new task that has the option; the original keeps its own."""
    first, second = SAMPLES[option]
    original = make(**{option: first})(body)
    changed = original.with_options(**{option: second})
    assert changed is not original
    assert type(changed) is type(original)
    if option != "cache_key_fn":  # that one becomes the policy
        assert same(said(original, option), first)
        assert same(said(changed, option), second)
    else:
        assert original.cache_key_fn is first
        assert changed.cache_key_fn is second


@pytest.mark.parametrize(("make", "option"), EACH)
def test_unspecified_options_are_kept(make: Any, option: str) -> None:
    """O1: with_options of something else keeps an option as it was."""
    first, _ = SAMPLES[option]
    original = make(**{option: first})(body)
    changed = original.with_options(**({"name": "else"} if option != "name" else {"description": "else"}))
    assert same(said(changed, option), said(original, option))
    assert changed.cache_policy == original.cache_policy
    assert changed.persist_result == original.persist_result


@pytest.mark.parametrize(("make", "option"), EACH)
def test_none_takes_an_option_back(make: Any, option: str) -> None:
    """O1: with_options(option=None) is as if the option had never been said."""
    first, _ = SAMPLES[option]
    plain = make(body)
    cleared = make(**{option: first})(body).with_options(**{option: None})
    assert same(said(cleared, option), said(plain, option))
    assert cleared.cache_policy == plain.cache_policy
    assert cleared.persist_result == plain.persist_result


@pytest.mark.parametrize(("make", "option"), EACH)
def test_none_to_the_decorator_is_nothing_said(make: Any, option: str) -> None:
    """O1: the decorator takes None for every option, as the default."""
    assert same(said(make(**{option: None})(body), option), said(make(body), option))


@pytest.mark.parametrize("make", [task, flow])
def test_the_decorator_and_with_options_offer_the_same(make: Any) -> None:
    """O5: what one refuses the other refuses, what one takes the other takes; both are typed by the same options."""
    options = TaskOptions if make is task else FlowOptions
    known = options_of(options)
    for name, (first, _) in SAMPLES.items():
        if name in known:
            make(**{name: first})(body)
            make(body).with_options(**{name: first})
        else:
            with pytest.raises(TypeError, match=name):
                make(**{name: first})(body)
            with pytest.raises(TypeError, match=name):
                make(body).with_options(**{name: first})
    annotation = inspect.signature(type(make(body)).with_options).parameters["options"].annotation
    assert options.__name__ in str(annotation)


@pytest.mark.parametrize(
    ("make", "wrong", "right"),
    [
        (task, "retrys", "retries"),
        (task, "cache_policies", "cache_policy"),
        (task, "flow_run_name", "task_run_name"),
        (flow, "task_run_name", "flow_run_name"),
        (flow, "validate_parameter", "validate_parameters"),
    ],
)
def test_an_unknown_option_is_refused_with_a_suggestion(make: Any, wrong: str, right: str) -> None:
    """O5: an unknown option is a TypeError that names it and the nearest known one."""
    message = rf"{wrong!r}.*Did you mean {right!r}"
    with pytest.raises(TypeError, match=message):
        make(**{wrong: 1})(body)
    with pytest.raises(TypeError, match=message):
        make(body).with_options(**{wrong: 1})


@pytest.mark.parametrize("make", [task, flow])
def test_later_changes_of_what_was_given_do_not_matter(make: Any) -> None:
    """O4: when the caller's list of tags or hooks changes later, neither the task nor its copies change."""
    tags, hooks = ["a"], [hook]
    original = make(tags=tags, on_completion=hooks)(body)
    tags.append("late")
    hooks.append(other)
    copy = original.with_options(name="copy")
    tags.append("later")
    assert original.tags == copy.tags == {"a"}
    assert original.hooks["on_completion"] == copy.hooks["on_completion"] == [hook]


@pytest.mark.parametrize("make", [task, flow])
def test_hooks_added_later_stay_with_whom_they_were_added_to(make: Any) -> None:
    """O4: a hook that is added to a copy is not the original's, and the other way round."""
    original = make(on_completion=[hook])(body)
    copy = original.with_options(name="copy")
    copy.on_completion(other)
    assert original.hooks["on_completion"] == [hook]
    assert copy.hooks["on_completion"] == [hook, other]
    original.on_failure(hook)
    assert "on_failure" not in copy.hooks
    assert original.with_options(name="third").hooks["on_failure"] == [hook]


async def test_zero_is_honoured() -> None:
    """O1: retries=0 over three retries means none, and timeout_seconds=0 means no time at all."""
    attempts = 0

    @task(retries=3)
    async def fails() -> None:
        nonlocal attempts
        attempts += 1
        raise ValueError

    await fails.with_options(retries=0).run_to_state()
    assert attempts == 1
    attempts = 0
    await fails.with_options(retries=None).run_to_state()
    assert attempts == 1
    await fails.run_to_state()
    assert attempts == 5


async def test_options_are_what_a_run_obeys() -> None:
    """O1: a run of the changed task obeys the changed options, one of the original its own."""

    @task(task_run_name="original", tags={"a"})
    async def seen() -> tuple[str, frozenset[str]]:
        run = get_run_context()
        return run.name, run.tags

    assert await seen.with_options(task_run_name="changed", tags={"b"})() == ("changed", frozenset({"b"}))
    assert await seen() == ("original", frozenset({"a"}))


def test_a_task_says_what_it_is() -> None:
    """O1: name, description, docstring and module of the function are the task's where nothing else is said."""
    plain = task(body)
    assert (plain.name, plain.description, plain.__doc__) == ("body", "What it does.", "What it does.")
    assert plain.__module__ == body.__module__
    assert plain.__wrapped__ is body
    assert "body" in repr(plain)
    named = task(name="other", description="Else.")(body)
    assert (named.name, named.description) == ("other", "Else.")
    assert inspect.signature(plain) == inspect.signature(body)


@pytest.mark.parametrize("make", [task, flow])
@pytest.mark.parametrize(
    ("option", "bad", "error"),
    [
        ("retries", -1, ConfigurationError),
        ("retries", 1.5, ConfigurationError),
        ("retries", "3", ConfigurationError),
        ("retry_delay_seconds", -1, ConfigurationError),
        ("retry_delay_seconds", [1, -1], ConfigurationError),
        ("retry_delay_seconds", "1", ConfigurationError),
        ("retry_delay_seconds", lambda _: [1, -1], ConfigurationError),
        ("retry_delay_seconds", lambda _: "soon", ConfigurationError),
        ("retry_jitter_factor", -0.5, ConfigurationError),
        ("retry_jitter_factor", "much", ConfigurationError),
        ("retry_condition_fn", 5, TypeError),
        ("cache_key_fn", 5, TypeError),
        ("cache_policy", "INPUTS", TypeError),
        ("cache_expiration", 60, ConfigurationError),
        ("timeout_seconds", -1, ConfigurationError),
        ("timeout_seconds", timedelta(seconds=-1), ConfigurationError),
    ],
)
def test_bad_values_are_refused_by_name(make: Any, option: str, bad: Any, error: type[Exception]) -> None:
    """O1: a value that cannot be obeyed is refused when the task is declared, naming the option."""
    with pytest.raises(error, match=option):
        make(**{"retries": 2, option: bad})(body)
    with pytest.raises(error, match=option):
        make(body).with_options(**{"retries": 2, option: bad})


async def test_a_callable_may_give_one_delay_for_all() -> None:
    """O1: retry_delay_seconds may compute a list, a tuple, or one number."""
    delays: list[Callable[[int], Any]] = [lambda _: [0.001], lambda n: tuple([0.001] * n), lambda _: 0.001]
    for compute in delays:
        states: list[str] = []

        @task(
            retries=1,
            retry_delay_seconds=compute,
            on_failure=[lambda t, run, s: states.extend(x.name for x in run.states)],
        )
        async def fails() -> None:
            raise ValueError

        await fails.run_to_state()
        assert "AwaitingRetry" in states


def test_none_is_a_policy_and_no_option() -> None:
    """O1: cache_policy=NONE is something said, other than cache_policy=None."""
    assert task(cache_policy=NONE)(body).cache_policy is NONE
    assert task(cache_policy=None)(body).cache_policy == DEFAULT
