"""Futures as arguments: found at any depth, awaited together, and replaced by their values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy as shallow
from dataclasses import fields, is_dataclass
from types import CodeType, FunctionType, ModuleType, NoneType
from typing import TYPE_CHECKING, Any

from ._awaiting import all_done
from ._future_lists import FutureList
from ._futures import Annotation, RunFuture, allow_failure, unmapped
from ._states import COMPLETED

if TYPE_CHECKING:
    from ._context import Run

LEAVES: frozenset[type] = frozenset(
    {NoneType, bool, int, float, complex, str, bytes, bytearray, type, range, slice}
    | {FunctionType, ModuleType, CodeType}
)
"""Types that hold no future: whatever else an argument is made of is looked into."""

_walks: dict[type, Callable[[Any], Sequence[Any]] | None] = {
    list: list,
    tuple: list,
    set: list,
    frozenset: list,
    dict: lambda mapping: [*mapping.keys(), *mapping.values()],
}


def _members_of(kind: type) -> Callable[[Any], Sequence[Any]] | None:
    """How to get at what a value of this type holds; None where it holds no future."""
    if is_dataclass(kind):
        names = [field.name for field in fields(kind)]
        return lambda value: [getattr(value, name, None) for name in names]
    for container in (dict, list, tuple, set, frozenset):
        if issubclass(kind, container):
            return _walks[container]
    return None


class NotReady(Exception):
    """A run that this one depends on did not complete: an instruction to the shell, never seen by users."""

    def __init__(self, upstream: Run) -> None:
        self.upstream = upstream
        super().__init__(upstream)


class Marked:
    """The futures and annotations in a value, and the containers that hold them."""

    __slots__ = ("_forgiven", "_holders", "_seen", "parts")

    def __init__(self) -> None:
        self.parts: list[Any] = []
        self._holders: set[int] = set()
        self._seen: set[int] = set()
        self._forgiven: list[tuple[allow_failure[Any], Marked]] = []

    def look(self, value: Any) -> bool:
        """Collect what is marked in a value, at any depth; whether there is anything. Touches no iterator.

        A container of leaves costs one pass in C (`set(map(type, …))`), and none is walked twice.
        """
        kind = type(value)
        if kind in LEAVES:
            return False
        if issubclass(kind, (RunFuture, Annotation, FutureList)):
            self._note(value)
            return True
        if kind not in _walks:
            _walks[kind] = _members_of(kind)
        members_of = _walks[kind]
        if members_of is None:
            return False
        if id(value) not in self._seen:
            self._seen.add(id(value))
            members = members_of(value)
            if not set(map(type, members)) <= LEAVES:
                held = [self.look(member) for member in members if type(member) not in LEAVES]
                if any(held):
                    self._holders.add(id(value))
        return id(value) in self._holders

    def _note(self, part: Any) -> None:
        self.parts.append(part)
        if isinstance(part, allow_failure):
            inner = Marked()
            inner.look(part.value)
            self._forgiven.append((part, inner))
        elif isinstance(part, unmapped):
            self.look(part.value)

    async def settle(self) -> Replacement:
        """Await what was found, and say what stands for each.

        Raises:
            NotReady: A future that is not under `allow_failure` did not complete.
        """
        await all_done([each._filling for each in self._lists() if each._filling], stop_on_failure=False)
        await all_done(list(self._futures()), stop_on_failure=False)
        return self._replacement(forgive=False)

    def _lists(self) -> list[FutureList[Any]]:
        own = [part for part in self.parts if isinstance(part, FutureList)]
        return own + [each for _, inner in self._forgiven for each in inner._lists()]

    def _futures(self) -> Iterable[RunFuture[Any]]:
        for part in self.parts:
            if isinstance(part, RunFuture):
                yield part
            elif isinstance(part, FutureList) and part.is_filled():
                yield from part
        for _, inner in self._forgiven:
            yield from inner._futures()

    def _replacement(self, forgive: bool) -> Replacement:
        settled: dict[int, Any] = {}
        new = Replacement(settled, self._holders)
        for part in self.parts:
            if isinstance(part, RunFuture):
                settled[id(part)] = _value_of(part, forgive)
            elif isinstance(part, FutureList):
                settled[id(part)] = _values_of(part, forgive)
            elif not isinstance(part, (allow_failure, unmapped)):
                settled[id(part)] = part.value
        for part, inner in self._forgiven:
            settled[id(part)] = inner._replacement(forgive=True)(part.value)
        for part in reversed(self.parts):
            if isinstance(part, unmapped):
                settled[id(part)] = new(part.value)
        return new


def _value_of(future: RunFuture[Any], forgive: bool) -> Any:
    state = future.state
    if state.type is COMPLETED:
        return state.data
    if forgive:
        return state.error()
    raise NotReady(future.run)


def _values_of(futures: FutureList[Any], forgive: bool) -> Any:
    if not futures.is_filled():  # the future that was to be mapped over failed
        assert futures._filling is not None
        return _value_of(futures._filling, forgive)
    return [_value_of(future, forgive) for future in futures]


class Replacement:
    """Puts what a `Marked` found in its place: structure is kept, what holds nothing is the same object."""

    __slots__ = ("_holders", "_memo", "_settled")

    def __init__(self, settled: Mapping[int, Any], holders: set[int]) -> None:
        self._settled = settled
        self._holders = holders
        self._memo: dict[int, Any] = {}

    def __call__(self, value: Any) -> Any:
        if type(value) in LEAVES:
            return value
        place = id(value)
        if place in self._settled:
            return self._settled[place]
        if place not in self._holders:
            return value
        if place not in self._memo:
            self._memo[place] = value  # a cycle ends here
            self._memo[place] = self._rebuilt(value)
        return self._memo[place]

    def _rebuilt(self, value: Any) -> Any:
        kind = type(value)
        if isinstance(value, dict):
            items = [(self(key), self(item)) for key, item in value.items()]
            copy = value.copy()  # keeps what a subclass carries, as a defaultdict its factory
            copy.clear()
            copy.update(items)
            return copy
        if isinstance(value, (list, tuple, set, frozenset)):
            parts = [self(part) for part in value]
            return kind(*parts) if hasattr(kind, "_fields") else kind(parts)
        twin = shallow(value)
        for field in fields(value):
            if hasattr(value, field.name):
                object.__setattr__(twin, field.name, self(getattr(value, field.name)))
        return twin
