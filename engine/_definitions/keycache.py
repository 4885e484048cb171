"""Keys that a definition remembers: equal plain arguments make the same key, so it is computed once.

Only for policies that look at nothing but the inputs, and for positional arguments of the immutable builtin types,
of which equality and the canonical encoding agree once the types are equal too. Anything else may have changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from .._keys.policies import InputsPolicy
from .._runs.run import TaskRun

if TYPE_CHECKING:
    from .._caching.turn import Key
    from .._commit.requests import Where
    from .._records.record import Place
    from .._runs.run import FlowRun
    from .definition import Definition

PLAIN: frozenset[type] = frozenset({type(None), bool, int, str, bytes})  # no floats: -0.0 == 0.0
LONGEST = 256
"""Characters or bytes of an argument that is remembered."""
MOST = 1000
"""Keys that a definition remembers; then it begins anew."""


class Known(NamedTuple):
    """What is the same for every call with these arguments."""

    key: Key
    place: Place
    where: Where


Mark = tuple[tuple[Any, ...], tuple[type, ...]]


class KnownKeys:
    """The keys of one definition, as of one configuration of one engine."""

    __slots__ = ("_keys", "_of", "_parameters")

    def __init__(self, definition: Definition[..., Any]) -> None:
        self._keys: dict[Mark, Known] = {}
        self._of: object = None
        # Defaults may be mutable: calls that leave arguments out are not remembered.
        self._parameters = -1
        if type(definition.cache_policy) is InputsPolicy and definition.result_storage_key is None:
            self._parameters = len(definition.signature.parameters)

    def mark(self, run: TaskRun | FlowRun) -> Mark | None:
        """By what to remember a run's key; None where it has to be computed."""
        if not isinstance(run, TaskRun) or run.kwargs:
            return None
        args = run.args
        if len(args) != self._parameters:
            return None
        for arg in args:
            kind = type(arg)
            if kind not in PLAIN or ((kind is str or kind is bytes) and len(arg) > LONGEST):
                return None
        above = run.flow_run
        if above is not None and (above.flow.result_storage or above.flow.result_serializer):
            return None
        return args, tuple(map(type, args))

    def get(self, mark: Mark, configuration: object) -> Known | None:
        return self._keys.get(mark) if self._of is configuration else None

    def put(self, mark: Mark, configuration: object, known: Known) -> None:
        if self._of is not configuration or len(self._keys) >= MOST:
            self._keys.clear()
            self._of = configuration
        self._keys[mark] = known
