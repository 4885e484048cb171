"""When a walk over a function's code may be reused: nothing that it has looked at is bound to something else.

The memo of a function lies on the function, so that it goes when the function goes: kept aside, it would keep
a recursive closure alive for ever, because it holds what the closure refers to, which is the closure.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import pathlib
import re
import uuid
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, ref

from ..encoding import SCALARS, Encoder, RefusedError
from ..weight import weighs_much

if TYPE_CHECKING:
    from collections.abc import Callable

    from .meaning import Meaning

_ATTRIBUTE = "__onceflow_meaning__"
_MISSING = object()
_MOST = 32
"""Ways in which a function is remembered to have been asked for."""
_UNCHANGING = (
    *(kind for kind in SCALARS if kind is not bytearray),
    *(FunctionType, BuiltinFunctionType, ModuleType, type, enum.Enum, re.Pattern),
    *(datetime.date, datetime.time, datetime.timedelta, decimal.Decimal, uuid.UUID, pathlib.PurePath),
)


class Watch:
    """Everything that a walk has looked at, as it was then."""

    __slots__ = ("cells", "classes", "contents", "functions", "modules", "names", "opaque", "refer")

    def __init__(self) -> None:
        self.names: list[tuple[dict[str, Any], str, Any]] = []
        self.cells: list[tuple[CellType, Any]] = []
        self.functions: list[tuple[FunctionType, CodeType, Any, dict[str, Any] | None]] = []
        self.classes: dict[type, tuple[int, dict[str, Any]]] = {}
        self.contents: list[tuple[Any, bytes]] = []
        self.modules: dict[str, bytes] = {}
        self.opaque: frozenset[Any] = frozenset()
        self.refer: Callable[[Any], bytes] | None = None

    def name(self, namespace: dict[str, Any], name: str) -> None:
        self.names.append((namespace, name, namespace.get(name, _MISSING)))

    def cell(self, cell: CellType, value: Any) -> None:
        self.cells.append((cell, value))

    def function(self, fn: FunctionType) -> None:
        keywords = fn.__kwdefaults__
        self.functions.append((fn, fn.__code__, fn.__defaults__, dict(keywords) if keywords else None))

    def class_(self, kind: type, state: frozenset[Any]) -> None:
        count = len(vars(kind))
        self.classes[kind] = (
            count,
            {name: value for name, value in vars(kind).items() if (id(kind), name) not in state},
        )

    def content(self, value: Any, encoded: bytes, opaque: frozenset[Any]) -> None:
        """Mutable content has to be encoded again to know whether it is what it was."""
        self.opaque = opaque
        if not never_changes(value) and id(value) not in opaque:
            self.contents.append((value, encoded))

    def holds(self) -> bool:
        """Whether all is as it was."""
        for fn, code, defaults, keywords in self.functions:
            if fn.__code__ is not code or fn.__defaults__ is not defaults:
                return False
            now = fn.__kwdefaults__
            if (now or keywords) and (len(now or ()) != len(keywords or ()) or not _includes(now, keywords)):
                return False
        for namespace, name, value in self.names:
            if namespace.get(name, _MISSING) is not value:
                return False
        for cell, value in self.cells:
            try:
                if cell.cell_contents is not value:
                    return False
            except ValueError:  # emptied since
                return False
        for kind, (count, members) in self.classes.items():
            if len(vars(kind)) != count or not _includes(vars(kind), members):
                return False
        return not self.contents or self.same_contents()

    def same_contents(self) -> bool:
        assert self.refer is not None
        encode = Encoder(self.refer, on_instance=self.refer, lenient=True, opaque=self.opaque)
        try:
            return all(encode(value) == encoded for value, encoded in self.contents)
        except RefusedError:
            return False

    def is_light(self) -> bool:
        return not any(weighs_much(value) for value, _ in self.contents)


def _includes(now: Any, then: Any) -> bool:
    return all(now.get(name, _MISSING) is value for name, value in then.items())


def never_changes(value: Any) -> bool:
    """Whether the value stays what it is; functions and classes are watched on their own."""
    if type(value) in (tuple, frozenset):
        return all(map(never_changes, value))
    return isinstance(value, _UNCHANGING)


class _Memo:
    """What walks over one function have found, by how they were asked."""

    __slots__ = ("found", "function")

    def __init__(self, function: Any) -> None:
        # functools.wraps copies attributes to the wrapper, which is another function.
        self.function: ReferenceType[Any] = ref(function)
        self.found: dict[Any, tuple[Meaning, Watch]] = {}

    def __reduce__(self) -> Any:
        return type(None), ()  # a function that is pickled by value leaves this behind


def recall(fn: Any, asked: Any, *, light: bool = False) -> Meaning | None:
    """What is known of a function and still true. `light`: and can be told at once."""
    memo = getattr(fn, _ATTRIBUTE, None) if type(fn) is FunctionType else None
    if memo is None or memo.function() is not fn:
        return None
    meaning, watch = memo.found.get(asked, (None, None))
    if watch is None or (light and not watch.is_light()) or not watch.holds():
        return None
    return meaning  # type: ignore[no-any-return]


def remember(fn: Any, asked: Any, meaning: Meaning, watch: Watch) -> None:
    """Keep what a walk has found, on the function."""
    if type(fn) is not FunctionType:
        return
    memo = getattr(fn, _ATTRIBUTE, None)
    if memo is None or memo.function() is not fn:
        memo = _Memo(fn)
        setattr(fn, _ATTRIBUTE, memo)
    if len(memo.found) >= _MOST:  # it was given ever new classes
        memo.found.clear()
    memo.found[asked] = meaning, watch
