"""What a function's code itself binds anew or changes: its state, which says nothing about what it means.

Without this, a function that counts its calls, fills a cache or sets a flag would mean something else after each
run, and never be found again. It is read off the code, so it errs on the side of meaning: what is changed in a way
that does not show here (by a library, through an alias in another container) counts by content.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import FunctionType, ModuleType
from typing import Any

from ..encoding import SCALARS
from ..names import is_user_class
from .bytecode import CHANGING, Call, Name, Names, names_in
from .parts import cell_of, cells, default_of, first_argument, functions_of, peek


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
    for call in names.calls:
        yield from _passed(fn, call, owner, set())


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
        if not functions and method in CHANGING and not isinstance(value, type | ModuleType):
            yield id(value)
        elif is_user_class(type(value)):
            for assigned, change in _own_changes(type(value), method, set()):
                yield from _changed([value], change, assigned)


def _passed(fn: FunctionType, call: Call, owner: type | None, seen: set[Any]) -> Iterator[Any]:
    """What is changed by a function that it is passed to, and an object by being called."""
    if call.function.scope == "argument":
        return
    for target in _follow(_roots(fn, call.function, owner), call.function.attributes):
        if is_user_class(type(target)):
            for assigned, change in _own_changes(type(target), "__call__", set()):
                yield from _changed([target], change, assigned)
        for label, name in call.arguments if isinstance(target, FunctionType) else ():
            for assigned, change in _changes_of_argument(target, label, seen):
                full = name._replace(attributes=(*name.attributes, *change.attributes))
                yield from _changed(_roots(fn, full, owner), full, assigned)


def _changes_of_argument(fn: FunctionType, label: int | str, seen: set[Any]) -> Iterator[tuple[bool, Name]]:
    """What a function changes of one of its arguments, itself or by passing it on."""
    code = fn.__code__
    own = label if isinstance(label, str) else code.co_varnames[label] if label < code.co_argcount else None
    if own is None or (code, own) in seen:
        return
    seen.add((code, own))
    names = names_in(code)
    yield from _changes_of(names, own)
    for call in names.calls:
        for inner, name in call.arguments:
            if name.scope == "argument" and name.root == own and call.function.scope != "argument":
                for target in _follow(_roots(fn, call.function, None), call.function.attributes):
                    if isinstance(target, FunctionType):
                        for assigned, change in _changes_of_argument(target, inner, seen):
                            attributes = (*name.attributes, *change.attributes)
                            yield assigned, name._replace(attributes=attributes)


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
        if name.scope == "argument" and name.root == own and name.attributes[-1] in CHANGING:
            yield False, name._replace(attributes=name.attributes[:-1])
