"""Which names a function's code uses, and which of what they stand for it changes, read off its bytecode.

Bytecode, not source, because it is there always, and because it knows what is local. It is gone through once, in
order, with a stack that holds for each value the name that it came from, or nothing: what is taken out of a
container by index or iteration still counts as a part of what the container's name stands for.
"""

from __future__ import annotations

import dis
import sys
from types import CodeType
from typing import NamedTuple
from weakref import WeakKeyDictionary

CHANGING = frozenset(
    {
        *("append", "appendleft", "add", "extend", "extendleft", "insert", "update", "setdefault"),
        *("pop", "popleft", "popitem", "remove", "discard", "clear", "sort", "reverse", "rotate", "subtract"),
        *("move_to_end", "difference_update", "intersection_update", "symmetric_difference_update"),
        *("__setitem__", "__delitem__", "__iadd__"),
    }
)
"""Methods by which the containers of the standard library, and others after their model, are changed."""


class Name(NamedTuple):
    """A use of a name: where it lives (`global`, `free` or `argument`), and the attributes taken from it."""

    scope: str
    root: str
    attributes: tuple[str, ...]


class Import(NamedTuple):
    """An import statement in the body: how many dots, which module, which names from it."""

    level: int
    module: str
    names: tuple[str, ...]


class Call(NamedTuple):
    """A call of what has a name, with those arguments that came from a name, by position or keyword."""

    function: Name
    arguments: tuple[tuple[int | str, Name], ...]


class Names(NamedTuple):
    """What the code of a function, nested code included, uses and changes.

    `rebound` names get another value (`global n; n += 1`), the others stay what they are: `changed` ones are
    changed in place (`hits[url] += 1`), and of those in `assigned` an attribute is set, the last one of the
    chain (`state.n += 1`). `whole` are the arguments that are used otherwise than for an attribute that the
    code names: handed on, called, iterated, looked into.
    """

    used: tuple[Name, ...]
    rebound: frozenset[Name]
    changed: frozenset[Name]
    assigned: frozenset[Name]
    calls: frozenset[Call]
    imports: tuple[Import, ...]
    whole: frozenset[str]


_known: WeakKeyDictionary[CodeType, Names] = WeakKeyDictionary()


def names_in(code: CodeType) -> Names:
    """The names that matter in `code`: globals, free variables, and arguments."""
    known = _known.get(code)
    if known is None:
        scan = _Scan(code)
        scan.read(code, 0)
        known = _known[code] = Names(
            tuple(sorted(scan.used)),
            frozenset(scan.rebound),
            frozenset(scan.changed),
            frozenset(scan.assigned),
            frozenset(scan.calls),
            tuple(sorted(scan.imports)),
            frozenset(scan.whole),
        )
    return known


class _Origin(NamedTuple):
    """Where a value on the stack came from. `part`: out of what the name stands for."""

    name: Name
    part: bool = False


_Stack = list[_Origin | None]
_NULL_LAST = sys.version_info >= (3, 13)  # a call's empty slot lies behind what is called, not before it
_IDLE = frozenset(
    {
        *("CACHE", "EXTENDED_ARG", "NOP", "NOT_TAKEN", "RESUME", "PRECALL", "KW_NAMES", "MAKE_CELL"),
        *("COPY_FREE_VARS", "JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT", "GET_ITER"),
    }
)
_LEAVES = frozenset(
    {"STORE_ATTR", "DELETE_ATTR", "COPY", "RETURN_VALUE", "POP_TOP", "LOAD_SUPER_ATTR", "LOAD_SUPER_METHOD"}
)
"""Instructions that take an object and look at nothing of it: `self.n = 1`, `self.n += 1`, `return self`."""
_ENDS = frozenset(
    {
        *("RETURN_VALUE", "RETURN_CONST", "RAISE_VARARGS", "RERAISE", "JUMP_FORWARD", "JUMP_BACKWARD"),
        "JUMP_BACKWARD_NO_INTERRUPT",
    }
)


class _Scan:
    def __init__(self, code: CodeType) -> None:
        count = code.co_argcount + code.co_kwonlyargcount
        self.arguments = frozenset(code.co_varnames[:count])
        self.free = frozenset(code.co_freevars) - {"__class__"}  # there for super() only
        self.used: set[Name] = set()
        self.rebound: set[Name] = set()
        self.changed: set[Name] = set()
        self.assigned: set[Name] = set()
        self.calls: set[Call] = set()
        self.imports: set[Import] = set()
        self.whole: set[str] = set()

    def read(self, code: CodeType, depth: int) -> None:
        _Reading(self, code, depth).run()
        for const in code.co_consts:
            if isinstance(const, CodeType):
                self.read(const, depth + 1)

    def variable(self, name: str) -> Name | None:
        """Variables of the outermost function: what nested functions take from it goes by the same name."""
        if name in self.arguments:
            return Name("argument", name, ())
        return Name("free", name, ()) if name in self.free else None

    def change(self, origin: _Origin | None) -> None:
        if origin is not None:
            self.changed.add(origin.name)

    def assign(self, origin: _Origin | None, attribute: str) -> None:
        if origin is None:
            return
        if origin.part:
            self.changed.add(origin.name)
        else:
            name = origin.name
            self.assigned.add(name._replace(attributes=(*name.attributes, attribute)))


class _Reading:
    """One code object, instruction by instruction."""

    def __init__(self, scan: _Scan, code: CodeType, depth: int) -> None:
        self.scan, self.code, self.depth = scan, code, depth
        self.stack: _Stack = []
        self.locals: dict[str, _Origin] = {}  # local variables that hold what came from a name
        self.targets: dict[int, _Stack] = {}  # the stack as it is where a jump goes
        self.constants: list[object] = []
        self.pending: Name | None = None  # used, but perhaps only for an attribute, which comes next

    def run(self) -> None:
        ended = False
        for each in dis.get_instructions(self.code):
            if ended:
                self.stack = self.targets.get(each.offset, [])
            ended = each.opname in _ENDS
            if each.opname in _IDLE and each.opname != "KW_NAMES":
                self.jump(each)
                continue
            if each.opname not in ("LOAD_ATTR", "LOAD_METHOD", "PUSH_NULL"):
                self.settle(each.opname)
            self.step(each)
            self.jump(each)
        self.settle()

    def jump(self, each: dis.Instruction) -> None:
        if each.opcode in dis.hasjrel and isinstance(each.argval, int):
            self.targets.setdefault(each.argval, list(self.stack))

    def settle(self, by: str = "") -> None:
        """The name is used as it stands, attributes taken so far included, by the instruction of this name."""
        name, self.pending = self.pending, None
        if name is None:
            return
        if name.scope != "argument" or name.attributes:
            self.scan.used.add(name)
        elif by not in _LEAVES:
            self.scan.whole.add(name.root)

    def pop(self, count: int = 1) -> _Stack:
        """The topmost values, the last one on top; nothing is known of those below what is known."""
        while len(self.stack) < count:
            self.stack.insert(0, None)
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return taken

    def step(self, each: dis.Instruction) -> None:
        opname = each.opname
        if opname in ("LOAD_ATTR", "LOAD_METHOD"):
            self.attribute(each)
        elif opname.startswith("LOAD_") and opname not in ("LOAD_SUPER_ATTR", "LOAD_FROM_DICT_OR_GLOBALS"):
            self.load(each)
        elif opname.startswith(("STORE_", "DELETE_")):
            self.store(each)
        elif opname == "COPY":
            self.stack.append(self.stack[-each.arg] if each.arg and each.arg <= len(self.stack) else None)
        elif opname == "SWAP":
            taken = self.pop(each.arg or 1)
            taken[0], taken[-1] = taken[-1], taken[0]
            self.stack += taken
        elif opname in ("BINARY_SUBSCR", "BINARY_SLICE") or (opname == "BINARY_OP" and each.argrepr == "[]"):
            container = self.pop(3 if opname == "BINARY_SLICE" else 2)[0]
            # A slice is a copy; what it holds is shared all the same.
            self.stack.append(container and container._replace(part=True))
        elif opname == "FOR_ITER":
            top = self.stack[-1] if self.stack else None
            self.targets.setdefault(each.argval, list(self.stack))
            self.stack.append(top and top._replace(part=True))
        elif opname in ("CALL", "CALL_KW"):
            self.call(each)
        elif opname == "IMPORT_NAME":
            self.import_(each)
        else:
            self.other(each)

    def load(self, each: dis.Instruction) -> None:
        opname, names = each.opname, each.argval
        if opname in ("LOAD_CONST", "LOAD_SMALL_INT"):
            self.constants.append(names)
            self.stack.append(None)
            return
        if opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            null = opname == "LOAD_GLOBAL" and (each.arg or 0) & 1
            self.push(Name("global", names, ()), bool(null))
            return
        for name in names if isinstance(names, tuple) else (names,):
            self.push(self.local(opname, name) if isinstance(name, str) else None)
        if self.is_cell(opname, names):
            self.pending = None  # for a nested function, which tells itself what it does with it

    def is_cell(self, opname: str, name: object) -> bool:
        """Whether the cell of a variable is loaded, and not its value. Python 3.13 has no opcode for that."""
        return opname == "LOAD_CLOSURE" or (
            opname.startswith("LOAD_FAST") and name in (*self.code.co_cellvars, *self.code.co_freevars)
        )

    def local(self, opname: str, name: str) -> Name | None:
        """The variable of the outermost function that is loaded, if it is one."""
        if opname.startswith("LOAD_FAST"):
            known = self.locals.get(name)
            if known is not None:
                self.settle()
                self.stack.append(known)
                return _TAKEN
            return self.scan.variable(name) if self.depth == 0 or name in self.code.co_freevars else None
        if self.depth and name in self.code.co_cellvars:
            return None
        return self.scan.variable(name)

    def push(self, name: Name | None, null: bool = False) -> None:
        if name is _TAKEN:
            return
        self.settle()
        self.pending = name
        origin = _Origin(name) if name is not None else None
        self.stack += ([origin, None] if _NULL_LAST else [None, origin]) if null else [origin]

    def attribute(self, each: dis.Instruction) -> None:
        (owner,) = self.pop()
        taken = None
        if owner is not None and owner.part:
            taken = owner
            if each.argval in CHANGING:
                self.scan.change(owner)
        elif owner is not None:
            taken = _Origin(owner.name._replace(attributes=(*owner.name.attributes, each.argval)))
            if self.pending == owner.name:
                self.pending = taken.name
            elif each.argval in CHANGING:  # through a local variable
                self.scan.change(owner)
        method = each.opname == "LOAD_METHOD" or (sys.version_info >= (3, 12) and (each.arg or 0) & 1)
        self.stack += [taken, None] if method else [taken]

    def store(self, each: dis.Instruction) -> None:
        opname, name = each.opname, each.argval
        if opname in ("STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE"):
            taken = self.pop({"STORE_SUBSCR": 3, "DELETE_SUBSCR": 2, "STORE_SLICE": 4}[opname])
            self.scan.change(taken[0 if opname == "DELETE_SUBSCR" else 1])
        elif opname in ("STORE_ATTR", "DELETE_ATTR"):
            taken = self.pop(2 if opname == "STORE_ATTR" else 1)
            self.scan.assign(taken[-1], name)
        elif opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            self.pop(opname == "STORE_GLOBAL")
            self.scan.rebound.add(Name("global", name, ()))
        elif opname in ("STORE_DEREF", "DELETE_DEREF"):
            self.pop(opname == "STORE_DEREF")
            if name in self.scan.free:
                self.scan.rebound.add(Name("free", name, ()))
        else:
            self.keep(opname, name if isinstance(name, tuple) else (name,))

    def keep(self, opname: str, names: tuple[str, ...]) -> None:
        """Local variables. Some instructions store two, or store one and load another."""
        if opname == "STORE_FAST_LOAD_FAST":
            self.keep("STORE_FAST", names[:1])
            self.push(self.local("LOAD_FAST", names[1]))
            return
        for name in names:
            value = self.pop()[0] if opname.startswith("STORE_") else None
            if value is not None:
                self.locals[name] = value
            else:
                self.locals.pop(name, None)

    def call(self, each: dis.Instruction) -> None:
        keywords: tuple[str, ...] = ()
        if each.opname == "CALL_KW" or self.keywords:
            last = self.constants[-1] if each.opname == "CALL_KW" else self.keywords
            keywords = last if isinstance(last, tuple) else ()
        self.keywords = ()
        if each.opname == "CALL_KW":
            self.pop()
        count = each.arg or 0
        taken = self.pop(count + 2)
        self.stack.append(None)
        function = taken[0] or taken[1]
        if function is None or function.part:
            return
        positional = count - len(keywords)
        labels: list[int | str] = [*range(positional), *keywords]
        arguments = [
            (label, value.name) for label, value in zip(labels, taken[2:], strict=True) if value is not None
        ]
        self.scan.calls.add(Call(function.name, tuple(arguments)))

    keywords: tuple[str, ...] = ()

    def import_(self, each: dis.Instruction) -> None:
        level, names = self.constants[-2:]
        self.pop(2)
        self.stack.append(None)
        taken = tuple(names) if isinstance(names, tuple) else ()
        self.scan.imports.add(Import(level if isinstance(level, int) else 0, each.argval, taken))

    def other(self, each: dis.Instruction) -> None:
        """Anything else: what it leaves on the stack came from no name."""
        if each.opname == "KW_NAMES":
            self.keywords = self.code.co_consts[each.arg or 0]
            return
        effect = dis.stack_effect(
            each.opcode, each.arg if each.opcode >= dis.HAVE_ARGUMENT else None, jump=False
        )
        if effect > 0:
            self.stack += [None] * effect
            return
        self.pop(-effect)
        if not each.opname.startswith(("POP_", "LIST_APPEND", "SET_ADD", "MAP_ADD", "RETURN", "END_")):
            self.pop()
            self.stack.append(None)


_TAKEN = Name("", "", ())
"""Says that a local variable has been pushed already, as what it holds."""
