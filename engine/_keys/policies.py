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
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from copy import copy
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Self

from .._definitions.options import check_locking
from .._errors import CacheKeyError, ConfigurationError
from . import digest
from .source import meaning as code

if TYPE_CHECKING:
    from ...locking import LockManager
    from ...storage import Storage
    from .._runs.run import FlowRun, TaskRun

ABSENT = ""
FORMAT = b"onceflow key 1\n"
_CONFIGURED = ("key_storage", "isolation_level", "lock_manager", "lock_timeout")
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


class CachePolicy:
    """What makes the key of a call. Compose policies with `+`, leave an input out with `- "name"`.

    Subclasses override `compute_key`, as `def` or `async def`. Policies are values: equal ones are
    interchangeable, and every operation returns a new one.
    """

    key_storage: Storage | str | os.PathLike[str] | None = None
    isolation_level: IsolationLevel | None = None
    lock_manager: LockManager | None = None
    lock_timeout: float | None = None
    name: ClassVar[str] = ""

    def compute_key(
        self,
        task_ctx: Any,
        inputs: Mapping[str, Any],
        flow_parameters: Mapping[str, Any] | None,
        **kwargs: Any,
    ) -> str | Awaitable[str | None] | None:
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
        digest.register(kind, key_of)

    def configure(
        self,
        key_storage: Storage | str | os.PathLike[str] | None = None,
        isolation_level: IsolationLevel | str | None = None,
        lock_manager: LockManager | None = None,
        lock_timeout: float | None = None,
    ) -> Self:
        """This policy, with its records elsewhere, another isolation level, or its own lock manager.

        Raises:
            ValueError: There is no such isolation level.
            ConfigurationError: The lock manager, or the timeout in seconds, cannot be one.
        """
        check_locking("a policy", lock_manager, lock_timeout)
        configured = copy(self)
        level = None if isolation_level is None else IsolationLevel.parse(isolation_level)
        said = (key_storage, level, lock_manager, lock_timeout)
        for option, value in zip(_CONFIGURED, said, strict=True):
            if value is not None:
                object.__setattr__(configured, option, value)  # a user's policy may be a frozen dataclass
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

    def _configuration(self) -> tuple[Any, ...]:
        return self.key_storage, self.isolation_level, self.lock_manager, self.lock_timeout

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CachePolicy) or type(self) is not type(other):
            return False
        return self._configuration() == other._configuration() and _own(self) == _own(other)

    def __hash__(self) -> int:
        return hash((type(self), *self._configuration()))

    def __repr__(self) -> str:
        return self.name or type(self).__name__


def _own(policy: CachePolicy) -> dict[str, Any]:
    """What a policy was made of, its configuration apart."""
    options = ("key_storage", "isolation_level", "lock_manager", "lock_timeout")
    return {name: value for name, value in vars(policy).items() if name not in options}


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

    def is_heavy(self, run: TaskRun | FlowRun, inputs: Mapping[str, Any]) -> bool:
        """Whether computing the components may read files or hash much, and so must leave the loop."""
        return False

    def compute_key(
        self,
        task_ctx: Any,
        inputs: Mapping[str, Any],
        flow_parameters: Mapping[str, Any] | None,
        **kwargs: Any,
    ) -> str | None:
        return key_from(self.components(task_ctx, inputs, flow_parameters))


class NonePolicy(CachePolicy):
    """Never caches."""

    name = "NONE"

    def compute_key(
        self,
        task_ctx: Any,
        inputs: Mapping[str, Any],
        flow_parameters: Mapping[str, Any] | None,
        **kwargs: Any,
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
        digests = digest.digest_inputs(self.kept(inputs))
        if not digests:
            return {"inputs": ABSENT}
        return {f"input {name!r}": digest for name, digest in digests.items()}

    def kept(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The arguments that count."""
        if not self.exclude:
            return inputs
        return {name: value for name, value in inputs.items() if name not in self.exclude}

    def is_heavy(self, run: TaskRun | FlowRun, inputs: Mapping[str, Any]) -> bool:
        return any(digest.is_heavy(value) for value in self.kept(inputs).values())

    def __sub__(self, name: str) -> CachePolicy:
        super().__sub__(name)
        policy = copy(self)
        policy.exclude = self.exclude | {name}
        return policy

    def __repr__(self) -> str:
        return "INPUTS" + "".join(f" - {name!r}" for name in sorted(self.exclude))


class TaskSourcePolicy(ComponentPolicy):
    """What the task's code means: its body, and what it reaches of the user's own code.

    Beside INPUTS, the classes of the arguments count as reached, if they have methods of their own.
    """

    name = "TASK_SOURCE"
    follow_helpers = True

    def configure(
        self,
        key_storage: Storage | str | os.PathLike[str] | None = None,
        isolation_level: IsolationLevel | str | None = None,
        lock_manager: LockManager | None = None,
        lock_timeout: float | None = None,
        follow_helpers: bool | None = None,
    ) -> Self:
        """As for every policy; `follow_helpers=False` stops at the task's own function."""
        policy = super().configure(key_storage, isolation_level, lock_manager, lock_timeout)
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
            return {"version": digest.digest(task.version)}
        given = self._given(task, inputs)
        meaning = code.source_meaning(
            task.fn, follow_helpers=self.follow_helpers, owner=task.owner, given=given
        )
        components = {f"helper {label}": digest for label, digest in meaning.helpers.items()}
        components["source"] = meaning.own
        return components

    def _given(self, task: Any, inputs: Mapping[str, Any]) -> tuple[type, ...]:
        given = code.classes_given(inputs.values()) if self.follow_helpers and inputs else ()
        # Of `self` the method says itself what it uses.
        return given if task.owner is None else tuple(each for each in given if each is not task.owner)

    def compute_key(
        self,
        task_ctx: Any,
        inputs: Mapping[str, Any],
        flow_parameters: Mapping[str, Any] | None,
        **kwargs: Any,
    ) -> str | None:
        return super().compute_key(task_ctx, {}, flow_parameters)

    def is_heavy(self, run: TaskRun | FlowRun, inputs: Mapping[str, Any]) -> bool:
        task = run.task or run.flow
        if task is None or task.version is not None:
            return False
        given = self._given(task, inputs)
        return not code.is_warm(task.fn, follow_helpers=self.follow_helpers, owner=task.owner, given=given)


class FlowParametersPolicy(ComponentPolicy):
    """The parameters of the enclosing flow run, one component each."""

    name = "FLOW_PARAMETERS"

    def components(
        self, task_ctx: Any, inputs: Mapping[str, Any], flow_parameters: Mapping[str, Any] | None
    ) -> Components:
        if not flow_parameters:
            return {"flow parameters": ABSENT}
        digests = digest.digest_inputs(flow_parameters)
        return {f"flow parameter {name!r}": digest for name, digest in digests.items()}

    def is_heavy(self, run: TaskRun | FlowRun, inputs: Mapping[str, Any]) -> bool:
        flow_run = run.flow_run
        return flow_run is not None and any(map(digest.is_heavy, flow_run.parameters.values()))


class RunIdPolicy(ComponentPolicy):
    """The flow run's id, or the task run's own where there is no flow."""

    name = "RUN_ID"

    def components(
        self, task_ctx: Any, inputs: Mapping[str, Any], flow_parameters: Mapping[str, Any] | None
    ) -> Components:
        if task_ctx is None:
            return {"run id": ABSENT}
        return {"run id": digest.digest(task_ctx.flow_run_id or task_ctx.id)}


class CacheKeyFnPolicy(CachePolicy):
    """A user's key function: its text is the key, verbatim."""

    def __init__(self, cache_key_fn: Callable[..., Any]) -> None:
        self.cache_key_fn = cache_key_fn

    def compute_key(
        self,
        task_ctx: Any,
        inputs: Mapping[str, Any],
        flow_parameters: Mapping[str, Any] | None,
        **kwargs: Any,
    ) -> Any:
        return self.cache_key_fn(task_ctx, dict(inputs))

    def __repr__(self) -> str:
        return f"cache_key_fn {getattr(self.cache_key_fn, '__qualname__', self.cache_key_fn)}"


class CompoundPolicy(CachePolicy):
    """The sum of simple policies; flat, without NONE, in any order the same key."""

    def __init__(self, policies: Iterable[CachePolicy]) -> None:
        given = list(policies)
        self.policies = tuple(
            part for policy in given for part in policy.parts() if not isinstance(part, NonePolicy)
        )
        for option in _CONFIGURED:
            setattr(self, option, _agreed(option, given))

    def parts(self) -> tuple[CachePolicy, ...]:
        return self.policies

    def __sub__(self, name: str) -> CachePolicy:
        super().__sub__(name)
        policies = tuple(part - name for part in self.policies)
        if all(part is before for part, before in zip(policies, self.policies, strict=True)):
            return self
        policy = copy(self)
        policy.policies = policies
        return policy

    def compute_key(
        self,
        task_ctx: Any,
        inputs: Mapping[str, Any],
        flow_parameters: Mapping[str, Any] | None,
        **kwargs: Any,
    ) -> str | Awaitable[str | None] | None:
        found, pending = _gather(self.policies, task_ctx, inputs, flow_parameters)
        if not pending:
            return key_from(found)
        return _finish(found, pending)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CompoundPolicy) or self._configuration() != other._configuration():
            return False
        return all(part in other.policies for part in self.policies) and all(
            part in self.policies for part in other.policies
        )

    __hash__ = CachePolicy.__hash__

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.policies)) or "NONE"


def _agreed(option: str, policies: Iterable[CachePolicy]) -> Any:
    """The one value that the policies have for an option, if any."""
    values: list[Any] = []
    for policy in policies:
        value = getattr(policy, option)
        if value is not None and not any(_same(value, other) for other in values):
            values.append(value)
    if len(values) > 1:
        raise ConfigurationError(
            f"These policies disagree about {option}: {' and '.join(map(repr, values))}.",
            "Configure one of them, or both alike.",
        )
    return values[0] if values else None


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, (str, os.PathLike)) and isinstance(other, (str, os.PathLike)):
        return os.fspath(one) == os.fspath(other)
    return bool(one == other)


def _merged(policy: CachePolicy, pair: list[CachePolicy]) -> CachePolicy:
    """`policy` with what the two together configure: NONE adds no part, but may carry a configuration."""
    return policy.configure(*(_agreed(option, pair) for option in _CONFIGURED))


def seen_by(part: CachePolicy, parts: Sequence[CachePolicy], inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments that a part of a sum looks at: TASK_SOURCE at those that INPUTS counts beside it."""
    if not isinstance(part, TaskSourcePolicy):
        return inputs
    kept = [other.kept(inputs) for other in parts if isinstance(other, InputsPolicy)]
    return kept[0] if len(kept) == 1 else {name: each[name] for each in kept for name in each}


def _gather(
    parts: Sequence[CachePolicy],
    context: Any,
    inputs: Mapping[str, Any],
    flow_parameters: Mapping[str, Any] | None,
) -> tuple[Components, list[tuple[CachePolicy, Awaitable[Any]]]]:
    """The components of simple policies, and the keys of users' policies that must be awaited."""
    found: Components = {}
    pending: list[tuple[CachePolicy, Awaitable[Any]]] = []
    for part in parts:
        if isinstance(part, ComponentPolicy):
            merge(found, part.components(context, seen_by(part, parts, inputs), flow_parameters))
        elif not isinstance(part, NonePolicy):
            key = part.compute_key(context, inputs, flow_parameters)
            if inspect.isawaitable(key):
                pending.append((part, key))
            else:
                merge(found, custom(part, key))
    return found, pending


async def _finish(found: Components, pending: list[tuple[CachePolicy, Awaitable[Any]]]) -> str | None:
    for part, key in pending:
        merge(found, custom(part, await key))
    return key_from(found)


def merge(found: Components, more: Components) -> None:
    """Add components. Where two policies say different things under one label, both count, in no order."""
    if found.keys().isdisjoint(more):
        found.update(more)
        return
    for label, value in more.items():
        same = {found[name] for name in found if name == label or name.startswith(f"{label} #")}
        for number, each in enumerate(sorted({*same, value}), 1):
            found[label if number == 1 else f"{label} #{number}"] = each


def custom(part: CachePolicy, key: object) -> Components:
    """The key that a user's policy gave, as a component."""
    label = f"policy {part!r}"
    if key is None:
        return {label: ABSENT}
    if not isinstance(key, str):
        raise CacheKeyError(
            f"{part!r} returned {key!r} ({type(key).__name__}) where a cache key must be text or None.",
            'Return str(…), or None for "not cached".',
        )
    return {label: digest.digest(key)}


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
