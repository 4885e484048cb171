"""Other Pythons: how a value or a function is keyed in a fresh process, with another seed or version.

The engine's fingerprint needs the standard library only; there, it is loaded without the engine around it,
whose dependencies those interpreters do not have. This file is also what runs on the other side.
"""

from __future__ import annotations

import ast
import importlib
import os
import pickle
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

DEV = Path(__file__).parents[2] / ".dev"


@cache
def _versions() -> tuple[Path, ...]:
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    newest: dict[tuple[int, int], Path] = {}
    for binary in sorted(root.glob("3.*/bin/python")):
        major, minor = binary.parts[-3].split(".")[:2]
        if minor.isdigit() and int(minor) >= 11:
            newest[int(major), int(minor)] = binary
    newest.pop(sys.version_info[:2], None)
    return tuple(newest.values())


PYTHONS = [Path(sys.executable), *_versions()]
"""This one, and the newest of each other version from 3.11 on that pyenv has."""


class Elsewhere:
    """A process of another Python that evaluates expressions over the engine's key modules."""

    def __init__(self, python: Path, seed: int = 1) -> None:
        self.process = subprocess.Popen(
            [python, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"PYTHONHASHSEED": str(seed), "PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"},
        )

    def __call__(self, expression: str, **names: Any) -> Any:
        """The value of `expression`, which sees `digest`, `source_meaning`, `tree_digests` and `names`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        pickle.dump((expression, names), self.process.stdin)
        self.process.stdin.flush()
        failed, answer = pickle.load(self.process.stdout)
        if failed:
            raise AssertionError(answer)
        return answer

    def close(self) -> None:
        """End the process, and wait for it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()

    def __enter__(self) -> Elsewhere:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def bare_engine() -> None:
    """Make `onceflow.engine._…` importable without running `onceflow.engine` itself."""
    sys.path.insert(0, str(DEV))
    package = ModuleType("onceflow.engine")
    package.__path__ = [str(DEV / "onceflow" / "engine")]
    sys.modules["onceflow.engine"] = package


def tree_digests(directory: str, limit: int | None) -> dict[str, str]:
    """The digest of the text of every function and class under a directory, by its place."""
    from onceflow.engine._keys.source.syntax import tree_digest

    found = {}
    for file in sorted(Path(directory).glob("**/*.py"))[:limit]:
        if not {"site-packages", "lib2to3", "test", "tests"}.isdisjoint(file.parts):
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
                name = f"{file.relative_to(directory)}:{node.lineno}:{node.col_offset}"
                found[name] = tree_digest(node, lazy_annotations=False).hex()
    return found


def _serve() -> None:
    bare_engine()
    # Set apart: what the asked code prints must not get between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    space = {
        "digest": importlib.import_module("onceflow.engine._keys.digest").digest,
        "source_meaning": importlib.import_module("onceflow.engine._keys.source.meaning").source_meaning,
        "tree_digests": tree_digests,
        "sys": sys,
    }
    while True:
        try:
            expression, names = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = False, eval(expression, {**space, **names})
        except Exception as error:  # reported by the side that asked
            answer = True, f"{type(error).__name__}: {error}"
        pickle.dump(answer, answers, protocol=4)
        answers.flush()


if __name__ == "__main__":
    _serve()
