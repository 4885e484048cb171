"""Where records lie, what they are made of, and what a look-up answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from ...storage import Storage
from ...storage._format.envelope import Header
from ...storage._storage import Buffer
from ...storage._values.serializers import Serializer
from .._commit.requests import ANY
from .._errors import CacheKeyError
from .memory import MISSING

if TYPE_CHECKING:
    from .._runs.run import FlowRun, TaskRun

SHAREABLE = frozenset({type(None), bool, int, float, complex, str, bytes})


class Place(NamedTuple):
    """Where the records of a task lie, and how its values are written."""

    storage: Storage
    key_storage: Storage | None
    serializer: Serializer
    location: str | None = None
    """The storage key of the user's own, under which the value lies apart from its record."""

    @property
    def records(self) -> Storage:
        return self.key_storage or self.storage

    @property
    def is_split(self) -> bool:
        return self.key_storage is not None or self.location is not None


class Hit(NamedTuple):
    """A committed record that may be served."""

    value: Any
    header: Header
    version: str


class Miss(NamedTuple):
    """No record that may be served, and why. `version` is what lies there all the same, for a conditional write:
    ABSENT for nothing, ANY where nobody knows, as behind a transaction's intent."""

    reason: str
    header: Header | None = None
    version: str | None = ANY
    plain: Buffer | None = None
    """All of the object, where it is a record that the first read had whole."""


@dataclass(slots=True)
class Facts:
    """What a record says of the run that wrote it."""

    run_id: str
    task: str
    components: dict[str, str] = field(default_factory=dict)
    expires_at: float | None = None
    token: int | None = None
    stream: str | None = None


class Prepared(NamedTuple):
    """A record that is ready to be written: the value first where it lies apart, then the record."""

    key: str
    place: Place
    header: Header
    record: Sequence[Buffer]
    value: Sequence[Buffer] | None
    segments: Sequence[Buffer]
    original: Any

    def snapshot(self) -> Prepared:
        """The same with buffers of its own: those of the encoding may be views of what the caller goes on to change."""
        if all(type(buffer) is bytes for buffer in (*self.record, *(self.value or ()), *self.segments)):
            return self
        head = bytes(self.record[0])
        payload = memoryview(b"".join(self.record[1:] if self.value is None else self.value))
        segments = [payload[start:end] for start, end in self.header.ranges()]
        if self.value is None:
            return self._replace(record=[head, payload], segments=segments)
        return self._replace(record=[head], value=[payload], segments=segments)


def ago(seconds: float) -> str:
    """A duration for people: `3 min`, `2 h`, `5 d`."""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds)} s"


def shareable(value: Any) -> Any:
    """The value where nobody can change it, so that one object serves all; else MISSING."""
    return value if type(value) in SHAREABLE else MISSING


def storage_key(template: str, run: TaskRun | FlowRun) -> str:
    """A result storage key from its template: `{parameters[x]}`, `{x}`, `{task_run.name}`, `{flow_run.id}`.

    Raises:
        CacheKeyError: The template asks for what is not there, or makes an empty key.
    """
    fields: dict[str, Any] = dict(run.parameters)
    fields["parameters"] = run.parameters
    fields["flow_run"] = run.flow_run
    if run.task is not None:
        fields["task_run"] = run
    try:
        key = template.format(**fields)
    except (LookupError, AttributeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
    else:
        if key:
            return key
        reason = "it is empty"
    raise CacheKeyError(
        f"The result storage key {template!r} cannot be made: {reason}.",
        f"It may use {', '.join(f'{{{name}}}' for name in fields)}, and flow_run only inside of a flow.",
    )
