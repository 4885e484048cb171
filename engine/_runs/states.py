"""States: what a run is, or was, at one moment."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Generic, TypeVar, cast

from .._errors import RunCancelledError, RunCrashedError, RunFailedError, UnfinishedRunError

R_co = TypeVar("R_co", covariant=True)


class StateType(StrEnum):
    """The seven kinds of state; several names share a type (Cached is of type COMPLETED)."""

    PENDING = "PENDING"
    SCHEDULED = "SCHEDULED"
    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    CRASHED = "CRASHED"


FINAL = frozenset({StateType.COMPLETED, StateType.FAILED, StateType.CANCELLED, StateType.CRASHED})

_last = 0


def now_us() -> int:
    """Unix time in microseconds, different from and later than every earlier answer in this process."""
    global _last
    now = time.time_ns() // 1000
    _last = now if now > _last else _last + 1
    return _last


class State(Generic[R_co]):
    """One state of a run, never changed once made. A body may return one to decide its final state.

    Args:
        type: Its kind; the text of a `StateType` will do.
        name: As users see it; the type's own (`Completed`) where none is given.
        message: Why, for people.
        data: The value of a completed state, the exception of a failed one.
    """

    __slots__ = ("_moment", "before", "data", "location", "message", "name", "type")

    before: State[Any] | None
    """The state of the run before this one: a chain takes less room than a list."""

    def __init__(
        self,
        type: StateType,
        name: str | None = None,
        message: str | None = None,
        data: Any = None,
    ) -> None:
        self.type = StateType(type)
        self.name = name or self.type.value.capitalize()
        self.message = message
        self.data = data
        self.location: str | None = None
        self.before = None
        self._moment = now_us()

    @property
    def timestamp(self) -> datetime:
        """When the run entered this state; no two states of a process share a timestamp."""
        return datetime.fromtimestamp(self._moment / 1e6, UTC)

    def result(self, raise_on_failure: bool = True) -> R_co:
        """The value of a completed state; the exception of another final one, raised or returned.

        Raises:
            UnfinishedRunError: The run has not ended.
        """
        if self.type is StateType.COMPLETED:
            return cast(R_co, self.data)
        error = self.error()
        if raise_on_failure or isinstance(error, UnfinishedRunError):
            raise error
        return cast(R_co, error)

    def error(self) -> BaseException:
        """The exception that stands for this state where it is not completed."""
        if isinstance(self.data, BaseException):
            return self.data
        if self.type is StateType.FAILED or self.name == "NotReady":
            return RunFailedError(self.name, self.message)
        if self.type is StateType.CANCELLED:
            return RunCancelledError(self.name, self.message)
        if self.type is StateType.CRASHED:
            return RunCrashedError(self.name, self.message)
        return UnfinishedRunError(self.name)

    def is_final(self) -> bool:
        return self.type in FINAL or self.name == "NotReady"

    def is_completed(self) -> bool:
        return self.type is StateType.COMPLETED

    def is_cached(self) -> bool:
        return self.name == "Cached"

    def is_failed(self) -> bool:
        return self.type is StateType.FAILED

    def is_cancelled(self) -> bool:
        return self.type is StateType.CANCELLED

    def is_crashed(self) -> bool:
        return self.type is StateType.CRASHED

    def __repr__(self) -> str:
        inner = [] if self.message is None else [repr(self.message)]
        if self.name.upper() != self.type.value:
            inner.append(f"type={self.type.value}")
        return f"{self.name}({', '.join(inner)})"


def quick(type_: StateType, name: str, data: Any = None, message: str | None = None) -> State[Any]:
    """A state made of checked parts: the engine's own way, without the checks of `State()`."""
    state: State[Any] = State.__new__(State)
    state.type = type_
    state.name = name
    state.message = message
    state.data = data
    state.location = state.before = None
    state._moment = now_us()
    return state


# The names of the engine's own states, as Prefect's, plus Waiting.
COMPLETED, FAILED, CANCELLED, CRASHED = (
    StateType.COMPLETED,
    StateType.FAILED,
    StateType.CANCELLED,
    StateType.CRASHED,
)
PENDING, SCHEDULED, RUNNING = StateType.PENDING, StateType.SCHEDULED, StateType.RUNNING
