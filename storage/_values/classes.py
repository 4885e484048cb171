"""Enum members, dataclasses and named tuples: by the module and name of their class, and their state.

A class is carried only if it can be found again under its name and if its instances are nothing but their
state: no code of its own for copying or pickling, no base written in C but object. Whatever is unusual is
refused (`Unsupported`) and left to pickle. On the way back `__init__` does not run; a class that is gone, is
another one, or has other fields than when the value was written is `Unreadable`.
"""

from __future__ import annotations

import copyreg
import dataclasses
import enum
import importlib
import sys
import types
from typing import Any

from .kinds import Context, Kind, Unreadable, Unsupported

_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement, not in C
_OWN_COPYING = (
    "__reduce_ex__",
    "__reduce__",
    "__getstate__",
    "__setstate__",
    "__getnewargs__",
    "__getnewargs_ex__",
)
_MISSING = object()


def class_kind(cls: type) -> Kind | None:
    """The kind that serves instances of `cls`, None where there is none.

    Raises:
        Unsupported: It would, but for something unusual about the class.
    """
    if issubclass(cls, enum.Enum):
        _check_findable(cls)
        return ENUM
    if cls.__bases__ == (tuple,) and hasattr(cls, "_fields"):
        kind = NAMEDTUPLE
    elif dataclasses.is_dataclass(cls):
        kind = DATACLASS
        if cls.__new__ is not object.__new__:
            raise Unsupported(f"is a {cls.__qualname__}, a dataclass with a __new__ of its own")
    else:
        return None
    _check_findable(cls)
    _check_plain(cls)
    return kind


def _check_findable(cls: type) -> None:
    try:
        found = _find(cls.__module__, cls.__qualname__, Context(imports=False))
    except Unreadable:
        found = None
    if found is not cls:
        raise Unsupported(
            f"is a {cls.__module__}.{cls.__qualname__}, which cannot be found under that name; "
            "define the class at the top level of a module"
        )


def _check_plain(cls: type) -> None:
    for base in cls.__mro__:
        if base not in (object, tuple) and not base.__flags__ & _HEAP_TYPE:
            raise Unsupported(f"is a {cls.__qualname__}, which derives from {base.__name__}")
    if cls in copyreg.dispatch_table:
        raise Unsupported(f"is a {cls.__qualname__}, which is registered with copyreg")
    for name in _OWN_COPYING:
        method = getattr(cls, name, None)
        if method is getattr(object, name, None) or getattr(method, "__module__", "") == "dataclasses":
            continue  # dataclass(frozen=True, slots=True) brings a plain __getstate__ and __setstate__
        if cls.__bases__ == (tuple,) and name == "__getnewargs__":
            continue  # every named tuple has this one
        raise Unsupported(f"is a {cls.__qualname__}, which has a {name} of its own")


def _find(module: Any, qualname: Any, context: Context) -> type:
    """The class of that name, imported if `context` allows it or if its package is imported already."""
    if type(module) is not str or type(qualname) is not str:
        raise Unreadable("a class has no readable name")
    found: Any = sys.modules.get(module)
    if found is None:
        if not context.imports and module.partition(".")[0] not in sys.modules:
            raise Unreadable(f"it holds a {module}.{qualname}, and {module!r} is not imported")
        try:
            found = importlib.import_module(module)
        except Exception as error:
            raise Unreadable(
                f"it holds a {module}.{qualname}, and importing {module!r} failed: {error}"
            ) from error
    for name in qualname.split("."):
        found = vars(found).get(name) if isinstance(found, type | types.ModuleType) else None
    if not isinstance(found, type):
        raise Unreadable(f"it holds a {module}.{qualname}, which is no longer there")
    return found


# --- Enum ---------------------------------------------------------------------------------------------------


def _take_enum(member: Any) -> list[Any]:
    cls = type(member)
    name = member._name_
    if name is not None and cls.__members__.get(name) is member:
        return [cls.__module__, cls.__qualname__, name]
    value = member._value_
    if isinstance(member, enum.Flag) and type(value) is int and cls(value) is member:
        return [cls.__module__, cls.__qualname__, value]  # several flags at once have no name of their own
    raise Unsupported(f"is {member!r}, no regular member of {cls.__qualname__}")


def _make_enum(parts: Any, context: Context) -> enum.Enum:
    module, qualname, which = parts
    cls = _find(module, qualname, context)
    if not issubclass(cls, enum.Enum):
        raise Unreadable(f"{module}.{qualname} is no longer an Enum")
    try:
        return cls[which] if type(which) is str else cls(which)
    except (KeyError, ValueError) as error:
        raise Unreadable(f"{module}.{qualname} no longer has the member {which!r}") from error


# --- named tuples -------------------------------------------------------------------------------------------


def _take_namedtuple(value: Any) -> list[Any]:
    cls = type(value)
    if getattr(value, "__dict__", None):
        raise Unsupported(f"is a {cls.__qualname__} with attributes of its own")
    return [cls.__module__, cls.__qualname__, list(cls._fields), list(tuple.__iter__(value))]


def _make_namedtuple(parts: Any, context: Context) -> Any:
    module, qualname, names, items = parts
    cls: Any = _find(module, qualname, context)
    if not (issubclass(cls, tuple) and cls.__bases__ == (tuple,) and hasattr(cls, "_fields")):
        raise Unreadable(f"{module}.{qualname} is no longer a named tuple")
    if list(cls._fields) != names or len(items) != len(names):  # pyright: ignore[reportAttributeAccessIssue]
        raise Unreadable(f"{module}.{qualname} no longer has the fields {', '.join(map(str, names))}")
    return tuple.__new__(cls, items)


# --- dataclasses --------------------------------------------------------------------------------------------


def _take_dataclass(value: Any) -> list[Any]:
    cls = type(value)
    state = _state(value)
    names = [field.name for field in dataclasses.fields(cls)]
    values = [state.pop(name, _MISSING) for name in names]
    unset = [index for index, item in enumerate(values) if item is _MISSING]
    for index in unset:
        values[index] = None
    # What no field declares (set in __post_init__, a cached property) is part of the value all the same.
    return [cls.__module__, cls.__qualname__, names, values, unset, state]


def _state(value: Any) -> dict[str, Any]:
    state: dict[str, Any] = dict(getattr(value, "__dict__", {}))
    for name in _slots(type(value)):
        item = getattr(value, name, _MISSING)
        if item is not _MISSING:
            state[name] = item
    return state


def _slots(cls: type) -> list[str]:
    return [
        name
        for base in cls.__mro__
        for name, member in vars(base).items()
        if isinstance(member, types.MemberDescriptorType) and getattr(cls, name, None) is member
    ]


def _make_dataclass(parts: Any, context: Context) -> Any:
    module, qualname, names, values, unset, extra = parts
    cls = _find(module, qualname, context)
    if not dataclasses.is_dataclass(cls):
        raise Unreadable(f"{module}.{qualname} is no longer a dataclass")
    if class_kind(cls) is not DATACLASS or [field.name for field in dataclasses.fields(cls)] != names:
        raise Unreadable(f"{module}.{qualname} no longer has the fields {', '.join(map(str, names))}")
    state = dict(zip(names, values, strict=True))
    for index in unset:
        del state[names[index]]
    state.update(extra)
    made: Any = object.__new__(cls)
    for name in _slots(cls):
        if name in state:
            object.__setattr__(made, name, state.pop(name))
    if state:
        made.__dict__.update(state)
    return made


def _locate(parts: Any, steps: list[str]) -> list[str]:
    """`.name` for the values of the fields, the name alone for what stands beside them."""
    *inner, which, _ = steps
    if _ == "[3]":
        return [*inner, f".{parts[2][int(which.strip('[]'))]}"]
    return [*inner, f".{which[2:-2]}"]


ENUM = Kind(32, "enum", _take_enum, _make_enum)
NAMEDTUPLE = Kind(33, "namedtuple", _take_namedtuple, _make_namedtuple, _locate)
DATACLASS = Kind(34, "dataclass", _take_dataclass, _make_dataclass, _locate)
