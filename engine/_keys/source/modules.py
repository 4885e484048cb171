"""What a module means that a function imports in its body.

The import may never have run yet, and must not run for the sake of a key: it may be slow, or do things. So
the module is found as the import system would find it, but not executed, and its text stands for it, with the
texts of the user's modules that it imports in turn. That is more than the function uses, and the same in a
process where the import has run and in one where it has not.
"""

from __future__ import annotations

import ast
import os
import sys
import tokenize
from collections.abc import Iterable, Iterator
from importlib.machinery import ModuleSpec
from importlib.util import resolve_name

from ..names import is_user_file
from .bytecode import Import
from .syntax import tree_digest


def module_texts(imports: Iterable[Import], package: str) -> dict[str, bytes]:
    """The SHA-256 of each user module that the import statements reach, by its name. Reads their files."""
    texts: dict[str, bytes] = {}
    queue = [name for each in imports for name in _targets(each, package)]
    while queue:
        name = queue.pop()
        if name in texts or name.partition(".")[0] in _LIBRARY:
            continue
        spec = _find(name)
        if spec is None or not spec.has_location or not spec.origin or not spec.origin.endswith(".py"):
            continue
        if not is_user_file(spec.origin):
            continue
        tree = _tree(spec.origin)
        if tree is None:
            continue
        texts[name] = tree_digest(tree, lazy_annotations=False, decorators=True)
        own = name if spec.submodule_search_locations is not None else name.rpartition(".")[0]
        queue += [target for each in _statements(tree) for target in _targets(each, own)]
    return texts


_LIBRARY = sys.stdlib_module_names | {__name__.partition(".")[0]}


def _targets(statement: Import, package: str) -> Iterator[str]:
    """The module, and what may be modules among the names taken from it."""
    try:
        base = resolve_name("." * statement.level + statement.module, package)
    except ImportError:  # beyond the top-level package: the import itself will fail
        return
    if base:
        yield base
    for name in statement.names:
        if name != "*":
            yield f"{base}.{name}" if base else name


def _find(name: str) -> ModuleSpec | None:
    loaded = sys.modules.get(name)
    if loaded is not None:
        return loaded.__spec__
    path = None
    parent = name.rpartition(".")[0]
    if parent:
        found = _find(parent)
        path = found.submodule_search_locations if found is not None else None
        if path is None:
            return None
    for finder in sys.meta_path:
        spec = finder.find_spec(name, path)
        if spec is not None:
            return spec
    return None


def _tree(filename: str) -> ast.Module | None:
    try:
        with tokenize.open(os.fspath(filename)) as file:
            return ast.parse(file.read(), filename)
    except (OSError, SyntaxError, ValueError):  # gone, or not for this Python: the import itself will fail
        return None


def _statements(tree: ast.Module) -> Iterator[Import]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(0, alias.name, ())
        elif isinstance(node, ast.ImportFrom):
            yield Import(node.level, node.module or "", tuple(alias.name for alias in node.names))
