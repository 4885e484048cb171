"""Which runs of a piece of code were served from records: `with engine.observe() as seen:`."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from .run import FlowRun, TaskRun

observers: ContextVar[tuple[Seen, ...]] = ContextVar("onceflow_observers", default=())


class Outcome(NamedTuple):
    """How one run ended. Holds no value, so that observing keeps none alive."""

    definition: Any
    """The task or flow; copies made by `with_options` are others."""
    name: str
    """The task's or flow's own name."""
    run_name: str
    state: str
    """The name of the final state."""
    reason: str
    """Why it ran, or why it did not; empty where nothing was to say."""
    attempts: int
    is_task: bool

    @property
    def is_hit(self) -> bool:
        """Whether it was served from a record, or from a run that led the same key."""
        return self.state == "Cached"


def outcome_of(run: TaskRun | FlowRun) -> Outcome:
    definition = run.task or run.flow
    assert definition is not None
    is_task = run.task is not None
    return Outcome(definition, definition.name, run.name, run.state.name, run.reason, run.attempt, is_task)


class Seen:
    """The runs that ended inside of an `observe()` block, in the order of their ends."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []

    @property
    def hits(self) -> list[str]:
        """The names of the tasks, and of the cached flows, that were served from records."""
        return [outcome.name for outcome in self.outcomes if outcome.is_hit]

    @property
    def ran(self) -> list[str]:
        """The names of the tasks that were not: they ran, failed, or never began."""
        return [outcome.name for outcome in self.outcomes if outcome.is_task and not outcome.is_hit]

    @property
    def hit(self) -> bool:
        """Whether something was served from a record, and no task ran."""
        return bool(self.hits) and not self.ran

    def __repr__(self) -> str:
        return f"<Seen hits={self.hits} ran={self.ran}>"
