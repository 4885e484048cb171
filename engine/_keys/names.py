"""What types and functions are called in keys, and which of them are the user's own code.

User code is what lies neither in the standard library nor in site-packages nor in onceflow: scripts,
notebooks, packages beside them, also those installed editable. It changes without a version number, so keys
look into it.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from types import FunctionType, ModuleType
from typing import Any

_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement, or by an extension at run time
_MOVED = {"pathlib._local": "pathlib", "pathlib._abc": "pathlib", "__mp_main__": "__main__"}
_INSTALLED = frozenset({"site-packages", "dist-packages"})
_LIBRARY = tuple(
    {os.path.join(sysconfig.get_path(name), "") for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)
_OURS = __name__.partition(".")[0]


def module_name(thing: Any) -> str:
    """The module that a class or function says it is from, the same on every Python."""
    name = getattr(thing, "__module__", None)
    return _MOVED.get(name, name) if isinstance(name, str) else ""


def qualified_name(thing: Any) -> str:
    """`module.qualname`, with nothing before a builtin's name."""
    name = (
        getattr(thing, "__qualname__", None) or getattr(thing, "__name__", None) or type(thing).__qualname__
    )
    module = module_name(thing)
    return name if module in ("builtins", "") else f"{module}.{name}"


def type_name(kind: type) -> str:
    """What a type is called, in keys and in messages."""
    return qualified_name(kind)


@lru_cache(4096)
def is_user_file(filename: str) -> bool:
    """Whether code from `filename` is the user's. Cells, `python -c` and exec have `<names>`."""
    if filename.startswith("<"):
        return not filename.startswith("<frozen")
    # Not abspath: it counts as a blocking call, and this is asked on the loop.
    here = "" if os.path.isabs(filename) else os.fsdecode(os.getcwdb())
    path = os.path.normpath(os.path.join(here, filename))
    return not (
        path.startswith(_LIBRARY)
        or path.endswith(tuple(EXTENSION_SUFFIXES))
        or not _INSTALLED.isdisjoint(path.split(os.sep))
    )


@lru_cache(4096)
def is_user_module_name(name: str) -> bool:
    """Whether the module of this name is the user's. One that is not imported, or has no file, is."""
    if name.partition(".")[0] == _OURS or name in sys.builtin_module_names:
        return False
    module = sys.modules.get(name)
    return module is None or _is_user_module(module)


def _is_user_module(module: ModuleType) -> bool:
    filename = getattr(module, "__file__", None)
    if isinstance(filename, str):
        return is_user_file(filename)
    spec = getattr(module, "__spec__", None)
    if spec is not None and spec.origin in ("built-in", "frozen"):
        return False
    return all(is_user_file(os.path.join(path, "_")) for path in getattr(module, "__path__", ()))


def is_user_module(module: ModuleType) -> bool:
    """Whether the functions of this module are to be looked into."""
    return is_user_module_name(module.__name__)


def is_heap_type(kind: type) -> bool:
    """Whether a type was made at run time, as every class statement's is, and can carry Python state."""
    return bool(kind.__flags__ & _HEAP_TYPE)


def is_user_class(kind: type) -> bool:
    """Whether a class is from a class statement in user code."""
    return is_heap_type(kind) and is_user_module_name(module_name(kind))


def is_user_function(function: FunctionType) -> bool:
    """Whether a function was written in user code."""
    filename = function.__code__.co_filename
    module = function.__globals__.get("__name__", "")
    if filename.startswith("<"):
        return is_user_file(filename) and is_user_module_name(module)
    return is_user_file(filename) and module.partition(".")[0] != _OURS
