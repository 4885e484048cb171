"""What a function's code itself binds anew or changes: its state, which says nothing about what it means.

Without this, a function that counts its calls, fills a cache or sets a flag would mean something else after each
run, and never be found again. It is read off the code, so it errs on the side of meaning: what is changed in a way
that does not show here (through an alias, by a function that it is passed to) counts by content.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import FunctionType, ModuleType
from typing import Any

from ._encoding import SCALARS
from ._naming import is_user_class
from ._source_names import Name, Names, names_in
from ._source_parts import cell_of, cells, default_of, first_argument, functions_of, peek

_CHANGING = frozenset(
    {
        *("append", "appendleft", "add", "extend", "extendleft", "insert", "update", "setdefault"),
        *("pop", "popleft", "popitem", "remove", "discard", "clear", "sort", "reverse", "rotate", "subtract"),
        *("move_to_end", "difference_update", "intersection_update", "symmetric_difference_update"),
        *("__setitem__", "__delitem__", "__iadd__"),
    }
)
"""Methods by which the containers of the standard library, and others after their model, are changed."""


def state_of(fn: FunctionType, owner: type | None) -> Iterator[Any]:
    """What `fn` changes: id of an object changed in place, (id of its holder, name) of what is bound anew.

    A holder is a namespace, a cell, a class, or an object of which only that attribute is state.
    """
    names = names_in(fn.__code__)
    for name in names.rebound:
        holder = fn.__globals__ if name.scope == "global" else cell_of(fn, name.root)
        yield id(holder), name.root
    for name in names.changed | names.assigned:
        yield from _changed(_roots(fn, name, owner), name, name in names.assigned)
    for name in names.used:
        if name.attributes:
            yield from _called(_roots(fn, name, owner), name)


def _roots(fn: FunctionType, name: Name, owner: type | None) -> Iterable[Any]:
    """What the first part of a name stands for."""
    if name.scope == "global":
        return [fn.__globals__[name.root]] if name.root in fn.__globals__ else []
    if name.scope == "free":
        return [value for variable, value in cells(fn) if variable == name.root]
    if owner is None or not name.attributes or name.root != first_argument(fn):
        return default_of(fn, name.root)
    # `self.n = 1` leaves the class as it is; `cls.n = 1` and `self.seen[x] = 1` do not.
    return [] if _binds_own(fn, name, owner) else [owner]


def _binds_own(fn: FunctionType, name: Name, owner: type) -> bool:
    """Whether an assignment to an attribute of the first argument is one to an object, not to its class."""
    of_class = any(
        isinstance(member, classmethod) and fn in functions_of(member)
        for base in owner.__mro__
        for member in vars(base).values()
    )
    return not of_class and len(name.attributes) == 1 and name in names_in(fn.__code__).assigned


def _follow(roots: Iterable[Any], attributes: Iterable[str]) -> Iterator[Any]:
    """The objects that a chain of attributes leads to, as far as that needs no code to run."""
    for value in roots:
        for attribute in attributes:
            value = peek(value, attribute)
        if value is not None and type(value) not in SCALARS:
            yield value


def _changed(roots: Iterable[Any], name: Name, assigned: bool) -> Iterator[Any]:
    if not assigned:
        for value in _follow(roots, name.attributes):
            yield id(value)
        return
    *path, attribute = name.attributes
    for value in _follow(roots, path):
        yield id(vars(value) if isinstance(value, ModuleType) else value), attribute


def _called(roots: Iterable[Any], name: Name) -> Iterator[Any]:
    """What a method changes that is taken from a global or free variable: `seen.add(x)`, `stats.hit()`."""
    *path, method = name.attributes
    for value in _follow(roots, path):
        functions = list(functions_of(peek(type(value), method)))
        if not functions and method in _CHANGING and not isinstance(value, type | ModuleType):
            yield id(value)
        elif is_user_class(type(value)):
            for assigned, change in _own_changes(type(value), method, set()):
                yield from _changed([value], change, assigned)


def _own_changes(kind: type, method: str, seen: set[str]) -> Iterator[tuple[bool, Name]]:
    """What a method changes of its object, itself or through the object's other methods."""
    seen.add(method)
    for fn in functions_of(peek(kind, method)):
        names, own = names_in(fn.__code__), first_argument(fn)
        yield from _changes_of(names, own)
        for name in names.used:
            if name.scope == "argument" and name.root == own and name.attributes[0] not in seen:
                yield from _own_changes(kind, name.attributes[0], seen)


def _changes_of(names: Names, own: str | None) -> Iterator[tuple[bool, Name]]:
    for name in names.changed | names.assigned:
        if name.scope == "argument" and name.root == own:
            yield name in names.assigned, name
    for name in names.used:  # self.seen.add(x)
        if name.scope == "argument" and name.root == own and name.attributes[-1] in _CHANGING:
            yield False, name._replace(attributes=name.attributes[:-1])
