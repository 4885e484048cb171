"""What one function's or class's text means: its syntax tree without what does not matter, as bytes.

Comments, layout, docstrings, `pass`, the decorators of the function asked for, annotations of local
variables, and under `from __future__ import annotations` all annotations of functions, do not matter. The
tree is encoded field by field, not through `ast.unparse` or `ast.dump`, whose output changes between Pythons;
fields that are empty are left out, so that those which newer Pythons add make no difference.

The file may have changed since it was imported. So what is found there is compiled again, and taken only if
it gives the running function's code; otherwise, and where there is no source at all, the bytecode itself is
encoded, under another tag. Bytecode differs between Pythons, comments still do not matter in it.

Known to parse to different trees on Pythons 3.11 to 3.13, so that their digests differ: nothing in the
standard library (tests/engine/keys/test_source.py looks).
"""

from __future__ import annotations

import ast
import linecache
import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache
from hashlib import sha256
from types import CodeType, FunctionType
from typing import Any, NamedTuple
from weakref import ref

from ..encoding import SCALARS, Encoder, framed

_FUTURE_ANNOTATIONS = 0x1000000  # CO_FUTURE_ANNOTATIONS
_IGNORED = frozenset({"ctx", "kind", "type_comment", "type_ignores"})
_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Scope = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda

# --- the tree as bytes


def tree_digest(node: ast.AST, *, lazy_annotations: bool, decorators: bool = False) -> bytes:
    """SHA-256 of what a definition means.

    Args:
        node: A definition, a lambda, or a module.
        lazy_annotations: Annotations of functions are not evaluated, so they do not matter.
        decorators: The decorators of `node` itself matter too.
    """
    parts: list[bytes] = []
    _Tree(parts, lazy_annotations).definition(node, decorators)
    return sha256(b"".join(parts)).digest()


class _Tree:
    def __init__(self, parts: list[bytes], lazy: bool) -> None:
        self.add = parts.append
        self.lazy = lazy
        self.local = False  # whether annotations here are those of a function's local variables

    def definition(self, node: ast.AST, decorators: bool) -> None:
        outer, self.local = self.local, self.local
        ignored = set() if decorators else {"decorator_list"}
        if isinstance(node, _Function):
            self.local = True
            if self.lazy:
                ignored.add("returns")
        elif isinstance(node, ast.ClassDef | ast.Module):
            self.local = False
        self.fields(node, ignored)
        self.local = outer

    def fields(self, node: ast.AST, ignored: Iterable[str] = ()) -> None:
        self.add(type(node).__name__.encode() + b"(")
        for name in node._fields:
            value = getattr(node, name, None)
            if name in _IGNORED or name in ignored:
                continue
            if name == "body" and isinstance(value, list):
                value = list(_without_docstring(node, value))
            elif name == "values" and isinstance(node, ast.JoinedStr):
                value = [each for each in node.values if not _is_empty_text(each)]  # Python 3.12 leaves some
            if (value is None or value == []) and not isinstance(node, ast.Constant):
                continue
            self.add(name.encode() + b"=")
            self.value(value)
        self.add(b")")

    def value(self, value: Any) -> None:
        if isinstance(value, list):
            self.add(b"[%d]" % len(value))
            for item in value:
                self.value(item)
        elif not isinstance(value, ast.AST):
            self.add(SCALARS[type(value)](value))
        elif isinstance(value, _Function | ast.ClassDef):
            self.definition(value, True)
        elif isinstance(value, ast.AnnAssign) and self.local:
            self.assignment(value)
        else:
            self.fields(value, ("annotation",) if self.lazy and isinstance(value, ast.arg) else ())

    def assignment(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.fields(ast.Assign(targets=[node.target], value=node.value))
        else:  # makes the name a local one
            self.fields(node, ("annotation",))


def _without_docstring(node: ast.AST, body: list[ast.stmt]) -> Iterator[ast.stmt]:
    documented = isinstance(node, _Function | ast.ClassDef | ast.Module)
    for at, statement in enumerate(body):
        match statement:
            case ast.Pass():
                continue
            case ast.Expr(value=ast.Constant(value=str())) if at == 0 and documented:
                continue
        yield statement


def _is_empty_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value == ""


# --- finding it


class _File(NamedTuple):
    """A source file: its definitions and the code that they compile to."""

    functions: dict[tuple[str, int], _Function]  # by name and first line, decorators included
    lambdas: list[ast.Lambda]
    classes: dict[str, list[ast.ClassDef]]  # by qualified name
    codes: dict[str, list[CodeType]]  # by qualified name


@lru_cache(16)
def _parsed(filename: str, text: str) -> _File | None:
    try:
        tree = ast.parse(text, filename)
        module = compile(text, filename, "exec", dont_inherit=True)
    except (
        SyntaxError,
        ValueError,
        RecursionError,
    ):  # a cell with magics, a template, another version's file
        return None
    file = _File({}, [], {}, {})
    for node in ast.walk(tree):
        if isinstance(node, _Function):
            first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
            file.functions[node.name, first] = node
        elif isinstance(node, ast.Lambda):
            file.lambdas.append(node)
    _index_classes(file.classes, tree, "")
    for code in codes_within(module):
        file.codes.setdefault(code.co_qualname, []).append(code)
    return file


def _index_classes(classes: dict[str, list[ast.ClassDef]], node: ast.AST, prefix: str) -> None:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            classes.setdefault(prefix + child.name, []).append(child)
            _index_classes(classes, child, f"{prefix}{child.name}.")
        elif isinstance(child, _Function):
            _index_classes(classes, child, f"{prefix}{child.name}.<locals>.")
        else:
            _index_classes(classes, child, prefix)


def codes_within(code: CodeType) -> Iterator[CodeType]:
    """The code and all those nested in it, outermost first."""
    yield code
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from codes_within(const)


def _file(filename: str, module_globals: dict[str, Any]) -> _File | None:
    linecache.checkcache(filename)
    text = "".join(linecache.getlines(filename, module_globals))
    return _parsed(filename, text) if text else None


def _compiled(code: CodeType, file: _File) -> CodeType | None:
    """What the file compiles to at the place of `code`, if it is the same."""
    candidates = file.codes.get(code.co_qualname, ())
    for candidate in candidates:
        if candidate == code:  # positions included
            return candidate
    moved = [candidate for candidate in candidates if _same(candidate, code)]
    if code.co_name == "<lambda>" and len(moved) > 1:
        return None
    return min(moved, key=lambda each: abs(each.co_firstlineno - code.co_firstlineno), default=None)


def _same(one: CodeType, other: CodeType) -> bool:
    return _bytecode(one) == _bytecode(other)


def _lambda(code: CodeType, file: _File) -> ast.Lambda | None:
    """The lambda whose body spans every position of the code, and no smaller one."""
    spans = {
        span
        for span in code.co_positions()
        if None not in span and span[:2] + span[2:] != (code.co_firstlineno, code.co_firstlineno, 0, 0)
    }
    spans = {span for span in spans if (span[0], span[2]) != (span[1], span[3])}
    if not spans:  # python -X no_debug_ranges
        here = [node for node in file.lambdas if node.lineno == code.co_firstlineno]
        return here[0] if len(here) == 1 else None
    start = min((line or 0, column or 0) for line, _, column, _ in spans)
    end = max((line or 0, column or 0) for _, line, _, column in spans)
    around = [node for node in file.lambdas if _start(node.body) <= start and end <= _end(node.body)]
    return max(around, key=lambda node: _start(node.body), default=None)


def _start(node: ast.expr) -> tuple[int, int]:
    return node.lineno, node.col_offset


def _end(node: ast.expr) -> tuple[int, int]:
    return node.end_lineno or 0, node.end_col_offset or 0


# --- functions and classes

# By identity: two definitions may compile to equal code and differ in their annotations.
_known: dict[int, tuple[ref[CodeType], bytes]] = {}


def function_text(function: FunctionType) -> bytes:
    """What the function's own text means, without what it refers to. Reads its file the first time."""
    code = function.__code__
    known = _known.get(id(code))
    if known is not None:
        return known[1]
    node = _find(function)
    text = (
        b"ast" + tree_digest(node, lazy_annotations=bool(code.co_flags & _FUTURE_ANNOTATIONS))
        if node is not None
        else b"bytecode" + sha256(_bytecode(code)).digest()
    )
    key = id(code)
    _known[key] = ref(code, lambda _: _known.pop(key, None)), text
    return text


def _find(function: FunctionType) -> _Scope | None:
    code = function.__code__
    file = _file(code.co_filename, function.__globals__)
    compiled = _compiled(code, file) if file is not None else None
    if file is None or compiled is None:
        return None
    if code.co_name == "<lambda>":
        return _lambda(compiled, file)
    return file.functions.get((code.co_name, compiled.co_firstlineno))


def class_text(methods: list[FunctionType], kind: type) -> bytes:
    """What a class statement means, decorators included; nothing where it cannot be found for sure.

    Its methods tell that the file still holds it, and which of several statements of this name was executed.
    """
    file = _file(methods[0].__code__.co_filename, methods[0].__globals__) if methods else None
    if file is None:
        return b""
    nodes = [
        node
        for node in file.classes.get(kind.__qualname__, ())
        if all(_holds(node, method, file) for method in methods)
    ]
    lazy = any(method.__code__.co_flags & _FUTURE_ANNOTATIONS for method in methods)
    return tree_digest(nodes[0], lazy_annotations=lazy, decorators=True) if len(nodes) == 1 else b""


def _holds(node: ast.ClassDef, method: FunctionType, file: _File) -> bool:
    compiled = _compiled(method.__code__, file)
    return compiled is not None and node.lineno <= compiled.co_firstlineno <= (node.end_lineno or 0)


# --- bytecode, where there is no source


def _no_code(_: object) -> bytes:
    raise AssertionError("constants hold no functions")


def _bytecode(code: CodeType) -> bytes:
    consts = list(code.co_consts)
    # The docstring is the first constant. 3.14 says so by a flag; before, a text there is taken for one.
    if consts and isinstance(consts[0], str) and not code.co_name.startswith("<"):
        consts[0] = None
    encode = Encoder(_no_code)
    parts = [
        encode(sys.version_info[:2]),
        encode(code.co_name),
        encode(code.co_code),
        encode(code.co_names),
        encode(code.co_varnames),
        encode(code.co_cellvars),
        encode(code.co_freevars),
        encode((code.co_flags, code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount)),
        framed(code.co_exceptiontable),
        *(framed(_bytecode(const)) if isinstance(const, CodeType) else encode(const) for const in consts),
    ]
    return b"".join(parts)
