"""Futures as arguments: found at any depth, awaited together, and replaced by their values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy as shallow
from dataclasses import fields, is_dataclass
from types import CodeType, FunctionType, ModuleType, NoneType
from typing import TYPE_CHECKING, Any

from .futurelists import FutureList
from .futures import Annotation, RunFuture, allow_failure, unmapped
from .states import COMPLETED
from .waiting import all_done

if TYPE_CHECKING:
    from .run import Run

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


def _walk_of(kind: type) -> Callable[[Any], Sequence[Any]] | None:
    if kind not in _walks:
        _walks[kind] = _members_of(kind)
    return _walks[kind]


class NotReady(Exception):
    """A run that this one depends on did not complete: an instruction to the shell, never seen by users."""

    def __init__(self, upstream: Run) -> None:
        self.upstream = upstream
        super().__init__(upstream)


class Marked:
    """The futures and annotations in a value, and the containers that hold them."""

    __slots__ = ("_forgiven", "_holders", "_seen", "_walked", "parts")

    def __init__(self) -> None:
        self.parts: list[Any] = []
        self._holders: set[int] = set()
        self._seen: set[int] = set()
        self._walked: list[Any] = []
        self._forgiven: list[tuple[allow_failure[Any], Marked]] = []

    def look(self, value: Any) -> bool:
        """Collect what is marked in a value, at any depth; whether there is anything. Touches no iterator.

        A container of leaves costs one pass in C (`set(map(type, …))`), and none is walked twice. However deep it
        is nested, nothing recurs.
        """
        found = len(self.parts)
        walked: list[Any] = []
        ahead = [value]
        while ahead:
            value = ahead.pop()
            kind = type(value)
            if kind in LEAVES:
                continue
            if issubclass(kind, (RunFuture, Annotation, FutureList)):
                self._note(value)
                continue
            members_of = _walk_of(kind)
            if members_of is None or id(value) in self._seen:
                continue
            self._seen.add(id(value))
            members = members_of(value)
            if not set(map(type, members)) <= LEAVES:
                walked.append(value)
                ahead += [member for member in reversed(members) if type(member) not in LEAVES]
        self._walked += walked
        if len(self.parts) > found:
            self._find_holders()
            return True
        return False

    def _find_holders(self) -> None:
        """The containers from which something marked can be reached."""
        above: dict[int, list[int]] = {}
        for value in self._walked:
            members = _walk_of(type(value))
            assert members is not None
            for member in members(value):
                if type(member) not in LEAVES:
                    above.setdefault(id(member), []).append(id(value))
        ahead = [id(part) for part in self.parts]
        while ahead:
            for place in above.get(ahead.pop(), ()):
                if place not in self._holders:
                    self._holders.add(place)
                    ahead.append(place)

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
    """Puts what a `Marked` found in its place: structure is kept, what holds nothing is the same object.

    A container that holds itself does so afterwards, unless it is a tuple or a frozenset: there the cycle ends.
    """

    __slots__ = ("_holders", "_memo", "_settled")

    def __init__(self, settled: Mapping[int, Any], holders: set[int]) -> None:
        self._settled = settled
        self._holders = holders
        self._memo: dict[int, Any] = {}

    def __call__(self, value: Any) -> Any:
        if type(value) in LEAVES:
            return value
        place = id(value)
        if place in self._holders and place not in self._memo:
            self._rebuild(value)
        return self._in_place_of(value)

    def _in_place_of(self, value: Any) -> Any:
        place = id(value)
        return self._settled[place] if place in self._settled else self._memo.get(place, value)

    def _rebuild(self, value: Any) -> None:
        """Make the containers anew that hold something, the inner ones first."""
        ahead, done = [value], set[int]()
        while ahead:
            value = ahead[-1]
            place = id(value)
            if place in self._memo:
                ahead.pop()
                if place not in done:
                    done.add(place)
                    self._fill(value)
                continue
            self._memo[place] = value if isinstance(value, (tuple, frozenset)) else shallow(value)
            members_of = _walk_of(type(value))
            assert members_of is not None
            ahead += [
                each for each in members_of(value) if id(each) in self._holders and id(each) not in self._memo
            ]

    def _fill(self, value: Any) -> None:
        new, of = self._memo[id(value)], self._in_place_of
        if is_dataclass(value):
            for field in fields(value):
                if hasattr(value, field.name):
                    object.__setattr__(new, field.name, of(getattr(value, field.name)))
        elif isinstance(value, dict):
            items = [(of(key), of(item)) for key, item in value.items()]
            new.clear()
            new.update(items)
        elif isinstance(value, list):
            new[:] = map(of, value)
        elif isinstance(value, set):
            parts = [of(part) for part in value]
            new.clear()
            new.update(parts)
        else:
            self._memo[id(value)] = _twin(value, [of(part) for part in value])


def _twin(value: Any, parts: list[Any]) -> Any:
    """A tuple or a frozenset of the same type, a named one for instance, with other members."""
    base: Any = tuple if isinstance(value, tuple) else frozenset
    new: Any = base.__new__(type(value), parts)
    if hasattr(value, "__dict__"):
        new.__dict__.update(value.__dict__)
    return new
