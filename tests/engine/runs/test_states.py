"""States: values that tell how far a run is."""

from __future__ import annotations

import pickle
from datetime import UTC, datetime
from typing import Any

import pytest
from onceflow.engine import (
    RunCancelledError,
    RunCrashedError,
    RunFailedError,
    State,
    StateType,
    UnfinishedRunError,
)

UNFINISHED = [StateType.PENDING, StateType.SCHEDULED, StateType.RUNNING]
FINAL = [StateType.COMPLETED, StateType.FAILED, StateType.CANCELLED, StateType.CRASHED]


@pytest.mark.parametrize("type_", StateType)
def test_a_state_is_named_by_its_type_unless_it_is_named(type_: StateType) -> None:
    """A state without a name has that of its type; the type may be given as text."""
    assert State[Any](type_).name == type_.value.capitalize()
    assert State[Any](type_, "Mine").name == "Mine"
    assert State[Any](type_.value).type is type_  # type: ignore[arg-type]


def test_an_unknown_type_is_refused() -> None:
    """A state of an unknown type is refused when it is made, by name."""
    with pytest.raises(ValueError, match="SLEEPING"):
        State("SLEEPING")  # type: ignore[arg-type]


@pytest.mark.parametrize("type_", UNFINISHED)
@pytest.mark.parametrize("raise_on_failure", [True, False])
def test_the_result_of_an_unfinished_state_is_an_error(type_: StateType, raise_on_failure: bool) -> None:
    """R8: the result of an unfinished state raises, whatever `raise_on_failure` says."""
    with pytest.raises(UnfinishedRunError, match=type_.value.capitalize()):
        State[Any](type_).result(raise_on_failure)


@pytest.mark.parametrize(
    ("type_", "error"),
    [
        (StateType.FAILED, RunFailedError),
        (StateType.CANCELLED, RunCancelledError),
        (StateType.CRASHED, RunCrashedError),
    ],
)
def test_a_failed_state_raises_unless_told_not_to(type_: StateType, error: type[Exception]) -> None:
    """R8: a failed state's result is raised, or returned where asked; its message is named."""
    state = State[Any](type_, message="the reason")
    with pytest.raises(error, match="the reason"):
        state.result()
    assert type(state.result(raise_on_failure=False)) is error


def test_a_failed_state_raises_the_exception_that_it_carries() -> None:
    """R8: the exception of a failed state is raised, or returned, as it is."""
    error = ValueError("no")
    state = State[Any](StateType.FAILED, data=error)
    with pytest.raises(ValueError) as caught:
        state.result()
    assert caught.value is error
    assert state.result(raise_on_failure=False) is error


def test_a_completed_state_gives_its_value_even_where_that_is_an_exception() -> None:
    """R8: an exception that a run returned is a value: it is not raised."""
    value = ValueError("a value")
    assert State[Any](StateType.COMPLETED, data=value).result() is value


@pytest.mark.parametrize("type_", StateType)
def test_what_a_state_says_of_itself(type_: StateType) -> None:
    """Each question about a state is answered by its type."""
    state = State[Any](type_)
    assert state.is_final() == (type_ in FINAL)
    assert state.is_completed() == (type_ is StateType.COMPLETED)
    assert state.is_failed() == (type_ is StateType.FAILED)
    assert state.is_cancelled() == (type_ is StateType.CANCELLED)
    assert state.is_crashed() == (type_ is StateType.CRASHED)
    assert not state.is_cached()


def test_timestamps_differ_and_increase() -> None:
    """T10: no two states share a timestamp, and a later one is later; they are in UTC."""
    before = datetime.now(UTC)
    moments = [State[Any](StateType.RUNNING).timestamp for _ in range(10_000)]
    assert moments == sorted(set(moments))
    assert moments[0].tzinfo is UTC
    assert abs((moments[0] - before).total_seconds()) < 60


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (State[Any](StateType.COMPLETED), "Completed()"),
        (State[Any](StateType.COMPLETED, "Cached"), "Cached(type=COMPLETED)"),
        (State[Any](StateType.FAILED, message="no"), "Failed('no')"),
        (State[Any](StateType.FAILED, "TimedOut", "late"), "TimedOut('late', type=FAILED)"),
    ],
)
def test_a_state_reads_as_in_the_log(state: State[Any], text: str) -> None:
    """A state's repr is what a log line shows."""
    assert repr(state) == text


def test_a_state_pickles() -> None:
    """A state survives pickling with all that it says."""
    state = State[Any](StateType.FAILED, "Mine", "because", ValueError("no"))
    twin = pickle.loads(pickle.dumps(state))
    assert (twin.type, twin.name, twin.message, repr(twin.data)) == (
        state.type,
        "Mine",
        "because",
        repr(state.data),
    )
    assert twin.timestamp == state.timestamp
