"""Cache policies: which facts about a call make its key.

A policy yields *components*: labelled digests, one for each fact (`input url`, `source`, `helper clean()`,
`flow parameter day`, `run id`). The key is the SHA-256 of the sorted components, so that the order of a sum
does not matter, and `explain` can name the component that changed. A policy with nothing to say yields the
component ABSENT; one that cannot say raises, and then there is no key at all, never one from the rest.
"""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping
from copy import copy
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Self

from . import _fingerprint, _source
from ._errors import ConfigurationError

if TYPE_CHECKING:
    from ..locking import LockManager
    from ..storage import Storage
    from ._context import TaskRun

ABSENT = ""
FORMAT = b"onceflow key 1\n"
Components = dict[str, str]


class IsolationLevel(StrEnum):
    """Whether equal calls may run side by side."""

    READ_COMMITTED = "READ_COMMITTED"
    SERIALIZABLE = "SERIALIZABLE"

    @classmethod
    def parse(cls, level: IsolationLevel | str) -> IsolationLevel:
        try:
            return cls(level.upper() if isinstance(level, str) else level)
        except ValueError:
            raise ConfigurationError(
                f"{level!r} is no isolation level.", f"Use one of {', '.join(cls)}."
            ) from None


class CacheKeyError(ConfigurationError):
    """A key function or policy gave no usable key."""


class CachePolicy:
    """What makes the key of a call. Compose policies with `+`, leave an input out with `- "name"`.

    Subclasses override `compute_key`, as `def` or `async def`. Policies are values: equal ones are
    interchangeable, and every operation returns a new one.
    """

    key_storage: Storage | str | os.PathLike[str] | None = None
    isolation_level: IsolationLevel | None = None
    lock_manager: LockManager | None = None
    name: ClassVar[str] = ""

    def compute_key(
        self, task_ctx: Any, inputs: Mapping[str, Any], flow_parameters: Mapping[str, Any] | None, **kwargs: Any
    ) -> str | None | Awaitable[str | None]:
        """The key of this call, or None for "not cached".

        Args:
            task_ctx: The run's context: task, flow run, ids (see `get_run_context`).
            inputs: The bound arguments by name, defaults applied, futures replaced by their values.
            flow_parameters: Those of the enclosing flow run; None outside of one.
            kwargs: For later versions; ignored.
        """
        raise NotImplementedError(f"{type(self).__name__} is not implemented: override compute_key().")

    @staticmethod
    def register(kind: type, key_of: Callable[[Any], Any]) -> None:
        """Give a foreign type a cache key: `key_of(value)` is hashed in place of the value, under the type's name."""
        _fingerprint.register(kind, key_of)

    def configure(
        self,
        key_storage: Storage | str | os.PathLike[str] | None = None,
        isolation_level: IsolationLevel | str | None = None,
        lock_manager: LockManager | None = None,
    ) -> Self:
        """This policy, with its records elsewhere, another isolation level, or its own lock manager."""
        configured = copy(self)
        if key_storage is not None:
            configured.key_storage = key_storage
        if isolation_level is not None:
            configured.isolation_level = IsolationLevel.parse(isolation_level)
        if lock_manager is not None:
            configured.lock_manager = lock_manager
        return configured

    def __add__(self, other: CachePolicy) -> CachePolicy:
        if not isinstance(other, CachePolicy):
            return NotImplemented
        if isinstance(other, NonePolicy):
            return _merged(self, [self, other])
        return CompoundPolicy([self, other])

    def __sub__(self, name: str) -> CachePolicy:
        if not isinstance(name, str):
            raise TypeError(f"A policy takes away an input by its name, not {name!r}: INPUTS - 'debug'.")
        return self

    def parts(self) -> tuple[CachePolicy, ...]:
        """The simple policies that this one consists of."""
        return (self,)

    def _identity(self) -> tuple[Any, ...]:
        return type(self), self.key_storage, self.isolation_level, self.lock_manager

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CachePolicy) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def __repr__(self) -> str:
        return self.name or type(self).__name__


class ComponentPolicy(CachePolicy):
    """A policy of onceflow's own: its key is the digest of its components."""

    def components(
        self, task_ctx: Any, inputs: Mapping[str, Any], flow_parameters: Mapping[str, Any] | None
    ) -> Components:
        """The labelled digests, ABSENT where the policy has nothing to say.

        Raises:
            UncacheableInputError: A value has no key.
        """
        raise NotImplementedError

    def is_heavy(self, run: TaskRun) -> bool:
        """Whether computing the components may read files or hash much, and so must leave the loop."""
        return False

    def compute_key(
        self, task_ctx: Any, inputs: Mapping[str, Any], flow_parameters: Mapping[str, Any] | None, **kwargs: Any
    ) -> str | None:
        return key_from(self.components(task_ctx, inputs, flow_parameters))


class NonePolicy(CachePolicy):
    """Never caches."""

    name = "NONE"

    def compute_key(
        self, task_ctx: Any, inputs: Mapping[str, Any], flow_parameters: Mapping[str, Any] | None, **kwargs: Any
    ) -> None:
        return None

    def __add__(self, other: CachePolicy) -> CachePolicy:
        if not isinstance(other, CachePolicy):
            return NotImplemented
        return _merged(other, [self, other])


class InputsPolicy(ComponentPolicy):
    """The bound arguments, defaults applied, one component each."""

    name = "INPUTS"

    def __init__(self, exclude: Iterable[str] = ()) -> None:
        self.exclude = frozenset(exclude)

    def components(
        self, task_ctx: Any, inputs: Mapping[str, Any], flow_parameters: Mapping[str, Any] | None
    ) -> Components:
        digests = _fingerprint.digest_inputs(self._kept(inputs))
        if not digests:
            return {"inputs": ABSENT}
        return {f"input {name!r}": digest for name, digest in digests.items()}

    def _kept(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        if not self.exclude:
            return inputs
        return {name: value for name, value in inputs.items() if name not in self.exclude}

    def is_heavy(self, run: TaskRun) -> bool:
        return any(_fingerprint.is_heavy(value) for value in self._kept(run.parameters).values())

    def __sub__(self, name: str) -> CachePolicy:
        super().__sub__(name)
        policy = copy(self)
        policy.exclude = self.exclude | {name}
        return policy

    def _identity(self) -> tuple[Any, ...]:
        return *super()._identity(), self.exclude

    def __repr__(self) -> str:
        return "INPUTS" + "".join(f" - {name!r}" for name in sorted(self.exclude))


class TaskSourcePolicy(ComponentPolicy):
    """What the task's code means: its body, and what it reaches of the user's own code."""

    name = "TASK_SOURCE"
    follow_helpers = True

    def configure(
        self,
        key_storage: Storage | str | os.PathLike[str] | None = None,
        isolation_level: IsolationLevel | str | None = None,
        lock_manager: LockManager | None = None,
        follow_helpers: bool | None = None,
    ) -> Self:
        """As for every policy; `follow_helpers=False` stops at the task's own function."""
        policy = super().configure(key_storage, isolation_level, lock_manager)
        if follow_helpers is not None:
            policy.follow_helpers = follow_helpers
        return policy

    def components(
        self, task_ctx: Any, inputs: Mapping[str, Any], flow_parameters: Mapping[str, Any] | None
    ) -> Components:
        task = None if task_ctx is None else task_ctx.task or task_ctx.flow
        if task is None:
            return {"source": ABSENT}
        if task.version is not None:
            return {"version": _fingerprint.digest(task.version)}
        meaning = _source.source_meaning(task.fn, follow_helpers=self.follow_helpers)
        components = {f"helper {label}": digest for label, digest in meaning.helpers.items()}
        components["source"] = meaning.own
        return components

    def is_heavy(self, run: TaskRun) -> bool:
        return run.task.version is None and not _source.is_warm(run.task.fn)

    def _identity(self) -> tuple[Any, ...]:
        return *super()._identity(), self.follow_helpers


class FlowParametersPolicy(ComponentPolicy):
    """The parameters of the enclosing flow run, one component each."""

    name = "FLOW_PARAMETERS"

    def components(
        self, task_ctx: Any, inputs: Mapping[str, Any], flow_parameters: Mapping[str, Any] | None
    ) -> Components:
        if not flow_parameters:
            return {"flow parameters": ABSENT}
        digests = _fingerprint.digest_inputs(flow_parameters)
        return {f"flow parameter {name!r}": digest for name, digest in digests.items()}

    def is_heavy(self, run: TaskRun) -> bool:
        flow_run = run.flow_run
        return flow_run is not None and any(map(_fingerprint.is_heavy, flow_run.parameters.values()))


class RunIdPolicy(ComponentPolicy):
    """The flow run's id, or the task run's own where there is no flow."""

    name = "RUN_ID"

    def components(
        self, task_ctx: Any, inputs: Mapping[str, Any], flow_parameters: Mapping[str, Any] | None
    ) -> Components:
        if task_ctx is None:
            return {"run id": ABSENT}
        return {"run id": _fingerprint.digest(task_ctx.flow_run_id or task_ctx.id)}


class CacheKeyFnPolicy(CachePolicy):
    """A user's key function: its text is the key, verbatim."""

    def __init__(self, cache_key_fn: Callable[..., Any]) -> None:
        self.cache_key_fn = cache_key_fn

    def compute_key(
        self, task_ctx: Any, inputs: Mapping[str, Any], flow_parameters: Mapping[str, Any] | None, **kwargs: Any
    ) -> Any:
        return self.cache_key_fn(task_ctx, dict(inputs))

    def _identity(self) -> tuple[Any, ...]:
        return *super()._identity(), self.cache_key_fn

    def __repr__(self) -> str:
        return f"cache_key_fn {getattr(self.cache_key_fn, '__qualname__', self.cache_key_fn)}"


class CompoundPolicy(CachePolicy):
    """The sum of simple policies; flat, without NONE, in any order the same key."""

    def __init__(self, policies: Iterable[CachePolicy]) -> None:
        given = list(policies)
        self.policies = tuple(
            part for policy in given for part in policy.parts() if not isinstance(part, NonePolicy)
        )
        for option in ("key_storage", "isolation_level", "lock_manager"):
            setattr(self, option, _agreed(option, given))

    def parts(self) -> tuple[CachePolicy, ...]:
        return self.policies

    def __sub__(self, name: str) -> CachePolicy:
        super().__sub__(name)
        policy = copy(self)
        policy.policies = tuple(part - name for part in self.policies)
        return policy

    def compute_key(
        self, task_ctx: Any, inputs: Mapping[str, Any], flow_parameters: Mapping[str, Any] | None, **kwargs: Any
    ) -> str | None | Awaitable[str | None]:
        found, pending = _gather(self.policies, task_ctx, inputs, flow_parameters)
        if not pending:
            return key_from(found)
        return _finish(found, pending)

    def _identity(self) -> tuple[Any, ...]:
        return *super()._identity(), frozenset(self.policies)

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.policies)) or "NONE"


def _agreed(option: str, policies: Iterable[CachePolicy]) -> Any:
    """The one value that the policies have for an option, if any."""
    values: list[Any] = []
    for policy in policies:
        value = getattr(policy, option)
        if value is not None and value not in values:
            values.append(value)
    if len(values) > 1:
        raise ConfigurationError(
            f"These policies disagree about {option}: {' and '.join(map(repr, values))}.",
            "Configure one of them, or both alike.",
        )
    return values[0] if values else None


def _merged(policy: CachePolicy, pair: list[CachePolicy]) -> CachePolicy:
    """`policy` with what the two together configure: NONE adds no part, but may carry a configuration."""
    return policy.configure(*(_agreed(option, pair) for option in ("key_storage", "isolation_level", "lock_manager")))


def _gather(
    parts: Iterable[CachePolicy],
    context: Any,
    inputs: Mapping[str, Any],
    flow_parameters: Mapping[str, Any] | None,
) -> tuple[Components, dict[str, Awaitable[Any]]]:
    """The components of simple policies, and the keys of users' policies that must be awaited."""
    found: Components = {}
    pending: dict[str, Awaitable[Any]] = {}
    for part in parts:
        if isinstance(part, ComponentPolicy):
            found.update(part.components(context, inputs, flow_parameters))
        elif not isinstance(part, NonePolicy):
            label = f"policy {part!r}"
            key = part.compute_key(context, inputs, flow_parameters)
            if inspect.isawaitable(key):
                pending[label] = key
            else:
                found[label] = _custom(part, key)
    return found, pending


async def _finish(found: Components, pending: dict[str, Awaitable[Any]]) -> str | None:
    return key_from(await settled(found, pending))


async def settled(found: Components, pending: dict[str, Awaitable[Any]]) -> Components:
    for label, key in pending.items():
        found[label] = _custom(label, await key)
    return found


def _custom(part: object, key: object) -> str:
    """A user's key as a component."""
    if key is None:
        return ABSENT
    if not isinstance(key, str):
        raise CacheKeyError(f"{part!r} returned {key!r} ({type(key).__name__}) as a cache key.", "Return text or None.")
    return _fingerprint.digest(key)


def key_from(components: Components) -> str | None:
    """The key of these components; None where every one of them is absent."""
    if not any(components.values()):
        return None
    text = "".join(f"{len(label)}:{label}={digest}\n" for label, digest in sorted(components.items()))
    return hashlib.sha256(FORMAT + text.encode("utf-8", "surrogatepass")).hexdigest()


NONE = NonePolicy()
INPUTS = InputsPolicy()
TASK_SOURCE = TaskSourcePolicy()
FLOW_PARAMETERS = FlowParametersPolicy()
RUN_ID = RunIdPolicy()
DEFAULT = INPUTS + TASK_SOURCE + RUN_ID
