"""Where a call is: the current run, the tags and the engine, carried by context variables."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from ...storage._runtime.random import random_bits
from .._errors import ConfigurationError, NoActiveRunError
from .machine import Life

if TYPE_CHECKING:
    import asyncio

    from .._concurrency.deadlocks import Waiting
    from .._concurrency.limits import Hold, Slots
    from .._concurrency.singleflight import Flight
    from .._lifecycle.engine import Engine
    from .._records.chunks import ChunkWriter
    from .._tasks.flow import Flow
    from .._tasks.generators import Channel, Link
    from .._tasks.task import Task
    from .._transactions.transaction import transaction
    from .futures import RunFuture

current_run: ContextVar[TaskRun | FlowRun | None] = ContextVar("onceflow_run", default=None)
current_transaction: ContextVar[transaction | None] = ContextVar("onceflow_transaction", default=None)
current_tags: ContextVar[frozenset[str]] = ContextVar("onceflow_tags", default=frozenset())


def new_id() -> str:
    """A UUIDv7 (RFC 9562): sortable by its millisecond, 74 random bits."""
    bits = random_bits(74)
    number = time.time_ns() // 1_000_000 << 80 | 7 << 76 | (bits >> 62) << 64 | 2 << 62 | bits & (1 << 62) - 1
    digits = f"{number:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


class Run(Life):
    """One run of a task or a flow: what hooks, key functions and name templates are given.

    What a run never asks for is never made: its id, its name and its bound parameters come into being when
    they are first read.
    """

    engine: Engine
    parent: TaskRun | FlowRun | None = None
    transaction: transaction | None = None
    """The innermost transaction that the run is part of."""
    tags: frozenset[str] = frozenset()
    reason: str = ""
    is_submitted: bool = False
    """Whether it runs in an asyncio task of its own, so that its owner, and not its caller, awaits it."""
    waits: dict[Waiting, Collection[RunFuture[Any]]] | None = None
    """What the run, and what cannot end without it, waits for."""
    links: Sequence[Link] = ()
    """The streams that the run reads, with the values that it has in hand."""
    chunks: ChunkWriter | None = None
    """What has written the chunks of its stream."""
    holds: dict[Slots, Hold] | None = None
    """The slots that the run's body has."""
    _blocked_on: dict[Flight, int] | None = None
    key: str | None = None
    name_template: str | Callable[..., str] | None = None
    carrier: asyncio.Task[Any] | None = None
    """The asyncio task of a run that an engine knows of."""
    _id: str | None = None
    _name: str | None = None

    if TYPE_CHECKING:
        parameters: dict[str, Any]

        @property
        def flow_run(self) -> FlowRun | None: ...

    def _definition(self) -> Task[..., Any] | Flow[..., Any]:
        raise NotImplementedError

    def begin_waiting(self) -> None:
        """The run waits for another holder of its key."""
        if self.state.name != "Waiting" and not self.is_over:  # over, it only waits to publish its result
            self.enter("wait")

    @property
    def blocked_on(self) -> dict[Flight, int]:
        """The keys that this run, and those that it called, wait for, and how many of them do."""
        if self._blocked_on is None:
            self._blocked_on = {}
        return self._blocked_on

    @property
    def id(self) -> str:
        """This run's id, a UUIDv7."""
        if self._id is None:
            self._id = new_id()
        return self._id

    @property
    def name(self) -> str:
        """The run's name: from its template where it has one, else its task's or flow's name and a short id.

        A template is filled in once, when the run begins: only then its parameters are values, not futures.
        """
        if self._name is not None:
            return self._name
        default = f"{self._definition().name}-{self.id[-3:]}"
        if self.name_template is None:
            self._name = default
        return default

    def settle_name(self) -> None:
        """Fill in the name template; called once, when the arguments are settled.

        Raises:
            ConfigurationError: See `_named`; the run keeps its default name.
        """
        assert self.name_template is not None
        template, self.name_template = self.name_template, None
        default = self.name
        self._name = None
        try:
            self._name = self._named(template)
        finally:
            self._name = self._name or default

    def _named(self, template: str | Callable[..., str]) -> str:
        """The name that a template or a callable gives.

        Raises:
            ConfigurationError: The template names no parameter, or the callable returns no text.
        """
        if callable(template):
            takes_parameters = len(inspect.signature(template).parameters) > 0
            name = template(self.parameters) if takes_parameters else template()
        else:
            fields = {**self.parameters, "parameters": self.parameters}
            try:
                name = template.format(**fields)
            except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
                raise ConfigurationError(
                    f"The run name {template!r} of {self._definition().name!r} cannot be made: {error!r}.",
                    f"It may use {', '.join(self.parameters) or 'no parameters'}.",
                ) from error
        if not isinstance(name, str):
            raise ConfigurationError(
                f"The run name of {self._definition().name!r} must be text, but its callable returned {name!r}.",
                "Return a str.",
            )
        return name

    @property
    def kind(self) -> str:
        """`Task run` or `Flow run`."""
        return self._definition().kind

    @property
    def run_count(self) -> int:
        """Prefect's name for `attempt`."""
        return self.attempt

    @property
    def expected_start_time(self) -> datetime:
        """When the run came into being."""
        return self.states[0].timestamp

    @property
    def start_time(self) -> datetime | None:
        """When the first attempt began; None for a hit and for a run that never began."""
        return next((state.timestamp for state in self.states if state.name == "Running"), None)

    @property
    def end_time(self) -> datetime | None:
        """When the run entered its final state."""
        state = next((state for state in self.states if state.is_final()), None)
        return state.timestamp if state else None

    @property
    def total_run_time(self) -> timedelta:
        """How long the run was in a running state, all attempts together, up to now."""
        total = 0
        states = self.states
        for state, after in zip(states, [*states[1:], None], strict=True):
            if state.name in ("Running", "Retrying"):
                end = after._moment if after else int(datetime.now(UTC).timestamp() * 1e6)
                total += end - state._moment
        return timedelta(microseconds=total)


_NOTHING: dict[str, Any] = {}
_NO_TAGS: frozenset[str] = frozenset()


class TaskRun(Run):
    """One run of a task.

    What every run sets lies in slots, so that most of them never have a dictionary: 10 000 may be in flight.
    """

    __slots__ = (
        "_id", "_name", "_parameters", "_pended", "_state", "args", "attempt", "engine", "flow_run",
        "is_submitted", "kwargs", "parent", "reason", "tags", "task",
    )  # fmt: skip
    flow_run: FlowRun | None
    wait_for: Iterable[Any] = ()
    channel: Channel | None = None
    """Where the values of a generator task go."""
    _parameters: dict[str, Any] | None

    def __init__(
        self,
        task: Task[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        parent: TaskRun | FlowRun | None,
    ) -> None:
        self.task = task
        self.args = args
        self.kwargs = kwargs or _NOTHING
        self.pend()
        self.attempt = 0
        self.tags = _NO_TAGS
        self.reason = ""
        self.is_submitted = False
        self._id = self._name = self._parameters = None
        self.parent = parent
        if parent is not None:
            self.flow_run = parent.flow_run  # pyright: ignore[reportIncompatibleMethodOverride]  # read-only there
            self.engine = parent.engine
        else:
            self.flow_run = None  # pyright: ignore[reportIncompatibleMethodOverride]

    def _definition(self) -> Task[..., Any]:
        return self.task

    @property
    def task_run(self) -> TaskRun:
        return self

    @property
    def flow_run_id(self) -> str | None:
        """The id of the enclosing flow run, if there is one."""
        return self.flow_run.id if self.flow_run else None

    @property
    def task_run_id(self) -> str:
        return self.id

    @property
    def flow(self) -> Flow[..., Any] | None:
        return self.flow_run.flow if self.flow_run else None

    @property
    def parameters(self) -> dict[str, Any]:  # type: ignore[override]  # bound when first read
        """The bound arguments by name, defaults applied, futures replaced by their values."""
        if self._parameters is None:
            self._parameters = self.task.bind(self.args, self.kwargs)
        return self._parameters


class FlowRun(Run):
    """One run of a flow. It owns what is submitted inside it."""

    def __init__(
        self, flow: Flow[..., Any], parameters: Mapping[str, Any], parent: TaskRun | FlowRun | None
    ) -> None:
        self.flow = flow
        self.parameters = dict(parameters)
        self.pend()
        self.parent = parent
        self.running: set[RunFuture[Any]] = set()
        self.failed: list[RunFuture[Any]] = []

    def _definition(self) -> Flow[..., Any]:
        return self.flow

    @property
    def flow_run(self) -> FlowRun:
        return self

    @property
    def flow_run_id(self) -> str:
        return self.id

    @property
    def task(self) -> None:
        return None


def get_run_context() -> TaskRun | FlowRun:
    """The run that this code is part of: the innermost task or flow run.

    Raises:
        NoActiveRunError: There is none.
    """
    run = current_run.get()
    if run is None:
        raise NoActiveRunError("There is no run here.", "Call get_run_context() inside a flow or a task.")
    return run


@contextmanager
def tags(*names: str) -> Iterator[frozenset[str]]:
    """Add tags to every run that starts inside the block; yields all that apply there."""
    token = current_tags.set(current_tags.get() | frozenset(names))
    try:
        yield current_tags.get()
    finally:
        current_tags.reset(token)
