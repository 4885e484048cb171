"""Small questions about functions and classes: what they wrap, close over, belong to, and consist of."""

from __future__ import annotations

import enum
import functools
import inspect
from collections.abc import Iterator
from types import CellType, FunctionType, MemberDescriptorType
from typing import Any
from weakref import WeakKeyDictionary

from ..names import is_user_class, is_user_function, module_name

_DEEPEST = 100
_MAKERS = ("__dataclass_fields__", "__attrs_attrs__", "_fields")


def layers(target: Any) -> Iterator[Any]:
    """A callable and what it wraps, and so on inwards."""
    seen: set[int] = set()
    # Some proxies have any attribute that is asked for, so there may be no innermost one.
    while callable(target) and id(target) not in seen and len(seen) < _DEEPEST:
        seen.add(id(target))
        yield target
        if isinstance(target, type):
            return
        target = getattr(target, "__wrapped__", None)


def innermost(target: Any) -> Any:
    """What is wrapped in the end."""
    last = target
    for layer in layers(target):
        last = layer
    return last


def pinned_version(layer: Any) -> Any:
    """The version by which a task or flow pins its code."""
    ours = module_name(type(layer)).partition(".")[0] == __name__.partition(".")[0]
    return getattr(layer, "version", None) if ours else None


def is_followed(target: Any) -> bool:
    """Whether there is user code in a callable."""
    for layer in layers(target):
        if isinstance(layer, type):
            return is_user_class(layer)
        # A library's closure may hold user code, and has no name of its own that would stand for it.
        if isinstance(layer, FunctionType) and (
            layer.__closure__ or "<" in layer.__qualname__ or is_user_function(layer)
        ):
            return True
    return False


def cell_of(fn: FunctionType, name: str) -> CellType:
    """The cell of a free variable."""
    return (fn.__closure__ or ())[fn.__code__.co_freevars.index(name)]


def cells(fn: FunctionType) -> Iterator[tuple[str, Any]]:
    """The free variables that have a value, with it."""
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not assigned yet
            pass


def first_argument(fn: FunctionType) -> str | None:
    """What a method calls its object."""
    return fn.__code__.co_varnames[0] if fn.__code__.co_argcount else None


def default_of(fn: FunctionType, name: str) -> Iterator[Any]:
    """The default of an argument, if it has one."""
    code = fn.__code__
    defaults = fn.__defaults__ or ()
    optional = code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount]
    if name in optional:
        yield defaults[optional.index(name)]
    elif fn.__kwdefaults__ and name in fn.__kwdefaults__:
        yield fn.__kwdefaults__[name]


def owner_of(fn: FunctionType) -> type | None:
    """The class whose body a method was defined in."""
    if "__class__" in fn.__code__.co_freevars:
        return next((value for name, value in cells(fn) if name == "__class__"), None)
    path = fn.__code__.co_qualname.split(".")[:-1]
    if not path or "<locals>" in path:
        return None
    value: Any = fn.__globals__.get(path[0])
    for name in path[1:]:
        value = inspect.getattr_static(value, name, None)
    return value if isinstance(value, type) else None


def functions_of(value: Any) -> Iterator[FunctionType]:
    """The functions in a class attribute: itself, or those in the descriptors around them."""
    if isinstance(value, FunctionType):
        yield value
    elif isinstance(value, staticmethod | classmethod):
        yield from functions_of(value.__func__)
    elif isinstance(value, property):
        for each in (value.fget, value.fset, value.fdel):
            yield from functions_of(each)
    elif isinstance(
        value, functools.cached_property | functools.partialmethod | functools.singledispatchmethod
    ):
        yield from functions_of(getattr(value, "func", None))
    elif hasattr(type(value), "__get__") and not isinstance(value, type):
        yield from functions_of(getattr(value, "wrapped", None))  # pydantic's validators


def attribute_hooks(kind: type, found: Any) -> Iterator[FunctionType]:
    """What a class of the user's own does when an attribute is taken; `found` is what is there already."""
    for name in ("__getattribute__", "__getattr__") if found is None else ("__getattribute__",):
        for each in functions_of(inspect.getattr_static(kind, name, None)):
            if is_user_function(each):
                yield each


def setters(kind: type, name: str) -> Iterator[FunctionType]:
    """What a class of the user's own does when an attribute is set: that of a property, and __setattr__."""
    for found in (
        inspect.getattr_static(kind, name, None),
        inspect.getattr_static(kind, "__setattr__", None),
    ):
        if isinstance(found, property | FunctionType):
            for each in functions_of(found):
                if is_user_function(each):
                    yield each


def peek(value: Any, name: str) -> Any:
    """An attribute, found without running any code; None where there is none."""
    found = inspect.getattr_static(value, name, None)
    if isinstance(found, MemberDescriptorType) and not isinstance(value, type):
        try:
            return found.__get__(value)
        except AttributeError:  # a slot that is not set
            return None
    return found


def is_generated(kind: type, name: str, fn: FunctionType) -> bool:
    """Whether dataclass, attrs or namedtuple wrote a method, from what the class statement says."""
    written = is_user_function(fn) and not fn.__code__.co_filename.startswith(
        ("<string>", "<attrs generated")
    )
    return not written and name.startswith("__") and any(hasattr(kind, maker) for maker in _MAKERS)


_with_methods: WeakKeyDictionary[type, bool] = WeakKeyDictionary()


def has_methods(kind: type) -> bool:
    """Whether the class statement, or that of a base of the user's own, holds functions."""
    known = _with_methods.get(kind)
    if known is None:
        known = _with_methods[kind] = any(
            not is_generated(base, name, each)
            for base in kind.__mro__
            if is_user_class(base)
            for name, value in vars(base).items()
            for each in functions_of(value)
            if is_user_function(each)
        )
    return known


def is_method_of(fn: FunctionType, kind: type) -> bool:
    """Whether a function was written in the body of this class."""
    return fn.__qualname__.startswith(kind.__qualname__ + ".") and is_user_function(fn)


def is_machinery(kind: type, name: str, value: Any) -> bool:
    """Attributes that Python and libraries add to a class, on top of what its statement says."""
    if name.startswith("__") and name.endswith("__"):
        return True
    if issubclass(kind, enum.Enum) and name.startswith("_"):
        return True
    return name in ("_abc_impl", "_is_protocol", "_is_runtime_protocol") or inspect.isdatadescriptor(value)


def fields_of(kind: type) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The annotations of a class, and what dataclass, attrs and pydantic made of them, by name.

    Its statement does not tell: it may not be found, and an annotation may name a model that matters as much.
    """
    own = vars(kind)
    for name, annotation in own.get("__annotations__", {}).items():
        yield name, (annotation,)
    for name, field in own.get("__dataclass_fields__", {}).items():
        yield name, (_value(field.default), _value(field.default_factory), field.init, field.kw_only)
    for name, field in own.get("__pydantic_fields__", {}).items():
        default = None if type(field.default).__name__ == "PydanticUndefinedType" else field.default
        yield name, (field.annotation, default, field.default_factory, list(field.metadata))
    for field in own.get("__attrs_attrs__", ()):
        default = getattr(field.default, "factory", field.default)
        yield field.name, (_value(default), field.converter, field.validator, field.init, field.kw_only)


def _value(default: Any) -> Any:
    """A default; nothing where a library's marker says that there is none."""
    return None if type(default).__name__ in ("_MISSING_TYPE", "_Nothing") else default
