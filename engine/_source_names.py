"""Which names a function's code uses, and which of what they stand for it changes, read off its bytecode.

Bytecode, not source, because it is there always, and because it knows what is local. A small window over the
instructions is enough: a load, the attributes taken from it, and what is done with that.
"""

from __future__ import annotations

import dis
from types import CodeType
from typing import NamedTuple
from weakref import WeakKeyDictionary


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


class Names(NamedTuple):
    """What the code of a function, nested code included, uses and changes.

    `rebound` names get another value (`global n; n += 1`), the others stay what they are: `changed` ones are
    changed in place (`hits[url] += 1`), and of those in `assigned` an attribute is set, the
    last one of the chain (`state.n += 1`).
    """

    used: tuple[Name, ...]
    rebound: frozenset[Name]
    changed: frozenset[Name]
    assigned: frozenset[Name]
    imports: tuple[Import, ...]


_known: WeakKeyDictionary[CodeType, Names] = WeakKeyDictionary()


def names_in(code: CodeType) -> Names:
    """The names that matter in `code`: globals, free variables, and arguments."""
    known = _known.get(code)
    if known is None:
        known = _known[code] = _collect(code)
    return known


def _collect(code: CodeType) -> Names:
    scan = _Scan(code)
    scan.read(code)
    return Names(
        tuple(sorted(scan.used)),
        frozenset(scan.rebound),
        frozenset(scan.changed),
        frozenset(scan.assigned),
        tuple(sorted(scan.imports)),
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
        self.imports: set[Import] = set()

    def read(self, code: CodeType, depth: int = 0) -> None:
        instructions = [each for each in dis.get_instructions(code) if each.opname not in _NOISE]
        at = 0
        while at < len(instructions):
            name = self.load(code, instructions[at], depth)
            at += 1
            if name is None:
                self.other(instructions, at - 1)
                continue
            while at < len(instructions) and instructions[at].opname in ("LOAD_ATTR", "LOAD_METHOD"):
                name = name._replace(attributes=(*name.attributes, instructions[at].argval))
                at += 1
            self.use(name, instructions[at : at + 3])
        for const in code.co_consts:
            if isinstance(const, CodeType):
                self.read(const, depth + 1)

    def load(self, code: CodeType, instruction: dis.Instruction, depth: int) -> Name | None:
        opname, name = instruction.opname, instruction.argval
        if opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"):
            return Name("global", name, ())
        if opname in ("LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF", "LOAD_CLOSURE"):
            return None if depth and name in code.co_cellvars else self.variable(name)
        if opname.startswith("LOAD_FAST") or opname == "STORE_FAST_LOAD_FAST":
            # Some do two things at once: what follows is done to what is loaded last.
            name = name[-1] if isinstance(name, tuple) else name
            return self.variable(name) if depth == 0 or name in code.co_freevars else None
        return None

    def variable(self, name: str) -> Name | None:
        """Variables of the outermost function: what nested functions take from it goes by the same name."""
        if name in self.arguments:
            return Name("argument", name, ())
        return Name("free", name, ()) if name in self.free else None

    def use(self, name: Name, following: list[dis.Instruction]) -> None:
        if name.scope != "argument" or name.attributes:
            self.used.add(name)
        match [each.opname for each in following]:
            case ["STORE_ATTR" | "DELETE_ATTR", *_]:
                self.assigned.add(name._replace(attributes=(*name.attributes, following[0].argval)))
            case ["COPY", "LOAD_ATTR", *_]:
                self.assigned.add(name._replace(attributes=(*name.attributes, following[1].argval)))
            case [key, "STORE_SUBSCR" | "DELETE_SUBSCR", *_] if key.startswith("LOAD_"):
                self.changed.add(name)
            case [key, "COPY", *_] if key.startswith("LOAD_") and following[1].arg == 2:  # hits[url] += 1
                self.changed.add(name)

    def other(self, instructions: list[dis.Instruction], at: int) -> None:
        instruction = instructions[at]
        if instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            self.rebound.add(Name("global", instruction.argval, ()))
        elif instruction.opname in ("STORE_DEREF", "DELETE_DEREF") and instruction.argval in self.free:
            self.rebound.add(Name("free", instruction.argval, ()))
        elif instruction.opname == "IMPORT_NAME":
            level, names = instructions[at - 2].argval, instructions[at - 1].argval
            self.imports.add(Import(level, instruction.argval, tuple(names or ())))


_NOISE = frozenset({"PUSH_NULL", "CACHE", "EXTENDED_ARG", "NOP", "NOT_TAKEN", "RESUME"})
