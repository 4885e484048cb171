"""What a function's code means: its own text and everything of the user's own code that it reaches.

A function means its text (`syntax`), its defaults, what its closure and the globals that it names are
bound to, and the functions, methods and classes of user code among these, each reached one in turn. What they
are bound to counts by content; what has no key (a client, a logger, a lock) counts by the name of its type
only. Two things are state rather than meaning and do not count: a name that the reached code binds anew
(`global n; n += 1`), and an object that it visibly changes (`seen.append(url)`, `hits[url] += 1`, `stats.n +=
1`), of which the type counts.

Not seen is what has no name in the code: what it finds at run time by text (`globals()["x"]`, `sys.modules`,
`__import__`), the environment, and what the objects of libraries hold.

Wrappers of user code count with what they wrap; a library's wrapper counts by its name. A task pinned by
`version=` counts by that version.
"""

from __future__ import annotations

import builtins
import inspect
from collections.abc import Callable, Iterable, Iterator
from hashlib import sha256
from types import FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any, NamedTuple

from ..encoding import SCALARS, Encoder, RefusedError, framed
from ..names import is_user_class, is_user_function, is_user_module, qualified_name, type_name
from .bytecode import Import, Name, names_in
from .memo import Watch, never_changes, recall, remember
from .modules import module_texts
from .parts import (
    attribute_hooks,
    cell_of,
    cells,
    fields_of,
    first_argument,
    functions_of,
    has_methods,
    innermost,
    is_followed,
    is_generated,
    is_machinery,
    is_method_of,
    layers,
    owner_of,
    pinned_version,
    setters,
)
from .state import state_of
from .syntax import class_text, function_text


class Meaning(NamedTuple):
    """Hex SHA-256 digests: of the function itself, and of each helper that it reaches by its label."""

    own: str
    helpers: dict[str, str]


def source_meaning(
    fn: Callable[..., Any] | type,
    *,
    follow_helpers: bool = True,
    owner: type | None = None,
    given: tuple[type, ...] = (),
) -> Meaning:
    """What `fn` means; equal on every machine and Python as long as the code means the same.

    The first call for a function reads the files of what it reaches (`is_warm` tells), later ones compare
    identities, and hash again those constants that are mutable.

    Args:
        fn: A function, method, class, partial or callable object. Wrappers that say what they wrap are followed.
        follow_helpers: Look into the functions and classes that it reaches. Otherwise those count by name.
        owner: For a method: the class that `self` is of. By default the one that it was defined in.
        given: Classes that it reaches through its arguments, see `classes_given`.
    """
    if isinstance(fn, MethodType):
        owner = owner or (fn.__self__ if isinstance(fn.__self__, type) else type(fn.__self__))
        fn = fn.__func__
    asked = follow_helpers, owner, given
    known = recall(fn, asked)
    if known is not None:
        return known
    state: frozenset[Any] = frozenset()
    while True:
        walk = _Walk(follow_helpers, state)
        meaning = walk.meaning(fn, owner, given)
        if walk.state == state:
            remember(fn, asked, meaning, walk.watch)
            return meaning
        state = frozenset(walk.state)


def is_warm(
    fn: Callable[..., Any] | type,
    *,
    follow_helpers: bool = True,
    owner: type | None = None,
    given: tuple[type, ...] = (),
) -> bool:
    """Whether `source_meaning` answers without reading files and without hashing anything large."""
    if isinstance(fn, MethodType):
        owner = owner or (fn.__self__ if isinstance(fn.__self__, type) else type(fn.__self__))
        fn = fn.__func__
    return recall(fn, (follow_helpers, owner, given), light=True) is not None


def classes_given(arguments: Iterable[Any]) -> tuple[type, ...]:
    """The classes with methods of the user's own, of arguments and of the members of lists, tuples, sets, dicts.

    Such an object brings code along that no name in the function leads to. 0.1 µs for a plain argument.
    """
    kinds: set[type] = set()
    for argument in arguments:
        kind = type(argument)
        if kind in (list, tuple, set, frozenset):
            kinds.update(map(type, argument))
        elif kind is dict:
            kinds.update(map(type, argument.values()))
        elif kind not in SCALARS:
            kinds.add(kind)
    given = [kind for kind in kinds if kind not in SCALARS and has_methods(kind)]
    return tuple(sorted(given, key=qualified_name)) if len(given) > 1 else tuple(given)


def code_key(value: Any) -> bytes:
    """How a function or class that is an input is encoded: by name and meaning."""
    meaning = source_meaning(value)
    reached = sha256("".join(label + digest for label, digest in sorted(meaning.helpers.items())).encode())
    return (
        b"F" + framed(qualified_name(value).encode()) + framed(bytes.fromhex(meaning.own)) + reached.digest()
    )


class _Walk:
    """One pass over everything that a function reaches.

    `state` holds what does not count (see `state_of`). It is complete only after the pass, so a pass that
    finds some has to be repeated with it.
    """

    def __init__(self, follow: bool, state: frozenset[Any]) -> None:
        self.follow = follow
        self.known_state = state
        self.state: set[Any] = set(state)
        self.watch = Watch()
        self.labels: dict[int, str] = {}
        self.taken: dict[str, int] = {}
        self.queue: list[tuple[str, Any, type | None]] = []
        self.encode = self.encoder()
        self.watch.refer = self.refer_again

    def encoder(self) -> Encoder:
        return Encoder(self.refer, on_instance=self.refer, lenient=True, opaque=self.known_state)

    def meaning(self, root: Any, owner: type | None, given: tuple[type, ...]) -> Meaning:
        for layer in layers(root):
            self.labels[id(layer)] = "self"
        own = self.definition(root, owner).hex()
        for kind in given:
            self.refer(kind)
        helpers: dict[str, str] = {}
        while self.queue:
            label, helper, helper_owner = self.queue.pop()
            helpers[label] = self.definition(helper, helper_owner).hex()
        helpers.update({f"{name} (module)": text.hex() for name, text in self.watch.modules.items()})
        return Meaning(own, dict(sorted(helpers.items())))

    # --- references

    def refer(self, target: Any, owner: type | None = None) -> bytes:
        """A function or class, by its label; queued to be looked into if it is new."""
        label = self.label_of(target)
        if label is None:
            if not self.follow or not is_followed(target):
                return self.encode.named(b"@", qualified_name(target))
            label = self.new_label(target)
            for layer in layers(target):
                self.labels.setdefault(id(layer), label)
            self.queue.append((label, target, owner))
        return self.encode.named(b"h", label)

    def refer_again(self, target: Any) -> bytes:
        """What `refer` has answered, when content is encoded again. Refuses what was not there."""
        label = self.label_of(target)
        if label is not None:
            return self.encode.named(b"h", label)
        if self.follow and is_followed(target):
            raise RefusedError(qualified_name(target))
        return self.encode.named(b"@", qualified_name(target))

    def label_of(self, target: Any) -> str | None:
        return next((self.labels[id(layer)] for layer in layers(target) if id(layer) in self.labels), None)

    def new_label(self, target: Any) -> str:
        inner = innermost(target)
        label = qualified_name(inner) + ("" if isinstance(inner, type) else "()")
        count = self.taken[label] = self.taken.get(label, 0) + 1
        return label if count == 1 else f"{label} #{count}"

    def content(self, value: Any) -> bytes:
        """What a name is bound to, by content."""
        try:
            encoded = self.encode(value)
        except (RefusedError, RecursionError):  # an object graph too deep or too entangled for a key
            self.encode = self.encoder()
            return self.encode.by_type(value)
        self.watch.content(value, encoded, self.known_state)
        return encoded

    # --- definitions

    def definition(self, target: Any, owner: type | None) -> bytes:
        """SHA-256 of a function, class or other callable, and of the layers around it."""
        digest = sha256()
        for layer in layers(target):
            version = pinned_version(layer)
            if version is not None and layer is not innermost(target):
                digest.update(b"version" + self.content(version))
                return digest.digest()
            if isinstance(layer, FunctionType):
                digest.update(b"".join(self.function(layer, owner)))
            elif isinstance(layer, type):
                digest.update(b"".join(self.class_(layer)))
            elif not hasattr(layer, "__wrapped__"):
                digest.update(self.content(layer))
            else:
                digest.update(self.encode.named(b"w", type_name(type(layer))))
        return digest.digest()

    def function(self, fn: FunctionType, owner: type | None) -> Iterator[bytes]:
        """The function's own text, and everything that a name in it stands for."""
        self.watch.function(fn)
        if not is_user_function(fn):  # a library's wrapper: user code may hang in its closure
            yield self.encode.named(b"@", f"{fn.__module__}.{fn.__code__.co_qualname}")
            for variable, value in cells(fn):
                self.watch.cell(cell_of(fn, variable), value)
                yield framed(variable.encode()) + self.in_library(value)
            yield self.in_library(getattr(fn, "registry", None))  # functools.singledispatch
            return
        yield function_text(fn)
        names = names_in(fn.__code__)
        owner = owner or owner_of(fn)
        self.state.update(state_of(fn, owner))
        yield self.defaults(fn)
        if "__class__" in fn.__code__.co_freevars and owner is not None:  # super()
            yield b"".join(self.encode(base) for base in owner.__bases__)
        if owner is not None and first_argument(fn) in names.whole:
            yield self.class_of_self(owner)
        for name in sorted(names.assigned):
            if owner is not None and name.root == first_argument(fn) and len(name.attributes) == 1:
                yield b"".join(self.refer(each, owner) for each in setters(owner, name.attributes[0]))
        for name in names.used:
            if name.scope == "argument" and (owner is None or name.root != first_argument(fn)):
                continue  # a value of the call, not of the code
            yield b"".join([framed(part.encode()) for part in (name.scope, name.root, *name.attributes)])
            yield self.bound(fn, name, owner)
        if names.imports and self.follow:
            package = fn.__globals__.get("__package__") or ""
            self.watch.modules.update(module_texts(names.imports, package))

    def in_library(self, value: Any) -> bytes:
        """What a library keeps in its wrapper: code and constants count, what may be its state does not."""
        if isinstance(value, MappingProxyType) or never_changes(value):
            return self.content(value)
        return self.encode.by_type(value)

    def defaults(self, fn: FunctionType) -> bytes:
        keywords = fn.__kwdefaults__ or {}
        return self.content(fn.__defaults__) + b"".join(
            framed(name.encode()) + self.content(keywords[name]) for name in sorted(keywords)
        )

    def bound(self, fn: FunctionType, name: Name, owner: type | None) -> bytes:
        """What a name in a function stands for now."""
        if name.scope == "argument":
            return self.member(fn, name, owner)
        if name.scope == "free":
            return self.cell(fn, name.root)
        return self.global_(fn.__globals__, name)

    def cell(self, fn: FunctionType, name: str) -> bytes:
        cell = cell_of(fn, name)
        if (id(cell), name) in self.state:
            return b"state"
        try:
            value = cell.cell_contents
        except ValueError:  # not assigned yet
            return b"unbound"
        self.watch.cell(cell, value)
        return self.module(value) if isinstance(value, ModuleType) else self.content(value)

    def module(self, module: ModuleType) -> bytes:
        """A module that is used as a whole: handed on, or kept in a variable. All of the user's own counts."""
        if self.follow and is_user_module(module):
            self.watch.modules.update(module_texts([Import(0, module.__name__, ())], ""))
        return self.encode(module)

    def global_(self, namespace: dict[str, Any], name: Name) -> bytes:
        """A global, or what `module.name` stands for where the module is the user's."""
        root, *attributes = name.root, *name.attributes
        while True:
            if (id(namespace), root) in self.state:
                return b"state"
            if root not in namespace:
                self.watch.name(namespace, root)
                return b"builtin" if hasattr(builtins, root) else b"unbound"
            self.watch.name(namespace, root)
            value = namespace[root]
            if not isinstance(value, ModuleType):
                return self.content(value)
            if not attributes or not is_user_module(value):
                return self.module(value)
            namespace, root = vars(value), attributes.pop(0)

    def member(self, fn: FunctionType, name: Name, owner: type | None) -> bytes:
        """What `self.name` stands for where the class says so: a method, a property, a constant."""
        if owner is None or not name.attributes or name.root != first_argument(fn):
            return b""
        if name.attributes[0] == "__class__":
            return self.class_of_self(owner)
        value = inspect.getattr_static(owner, name.attributes[0], None)
        if not is_user_class(owner) or (id(owner), name.attributes[0]) in self.state:
            return b""
        self.watch.class_(owner, self.known_state)
        functions = [*functions_of(value), *attribute_hooks(owner, value)]
        if functions:
            return b"".join(self.refer(each, owner) for each in functions)
        return b"" if value is None or inspect.isdatadescriptor(value) else self.content(value)

    def class_of_self(self, owner: type) -> bytes:
        """All of a method's class, where more is done with `self` than taking attributes by name."""
        return self.refer(owner) if is_user_class(owner) else b""

    def class_(self, kind: type) -> Iterator[bytes]:
        """The class statement, its bases, and what its attributes are now."""
        self.watch.class_(kind, self.known_state)
        if not is_user_class(kind):
            yield self.encode.named(b"@", qualified_name(kind))
            return
        yield framed(qualified_name(kind).encode())
        for base in (*kind.__bases__, type(kind)):
            yield self.encode(base)
        members = {
            name: (value, [each for each in functions_of(value) if not is_generated(kind, name, each)])
            for name, value in sorted(vars(kind).items())
        }
        for _, functions in members.values():
            for each in functions:
                self.state.update(state_of(each, kind))
        methods = [
            each
            for _, functions in members.values()
            for each in functions
            if each.__module__ == kind.__module__
        ]
        yield framed(class_text([each for each in methods if is_method_of(each, kind)], kind))
        for name, parts in fields_of(kind):
            yield framed(name.encode()) + b"".join(map(self.content, parts))
        for name, (value, functions) in members.items():
            if (id(kind), name) in self.state or id(value) in self.state:
                continue
            for each in functions:
                if is_method_of(each, kind):
                    self.labels.setdefault(id(each), self.labels.get(id(kind), "self"))
                    yield framed(name.encode()) + b"".join(self.function(each, kind))
                else:
                    yield framed(name.encode()) + self.refer(each, kind)
            if not functions and not is_machinery(kind, name, value):
                yield framed(name.encode()) + self.content(value)
