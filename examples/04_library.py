"""Index Python's own library, or the FOLDER given: a module is measured once for its name and content."""

import ast
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from onceflow.engine import INPUTS, TASK_SOURCE, flow, task

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
LOOP = (ast.For, ast.AsyncFor, ast.While, ast.comprehension)
BRANCH = (ast.If, ast.IfExp, ast.ExceptHandler, ast.match_case, *LOOP)


@dataclass(frozen=True)
class Figures:
    module: str
    lines: int
    functions: int
    complexity: int  # McCabe's: one for the module, for each function, and for each branch in them
    imports: frozenset[str]


@task
def read(root: Path) -> dict[str, bytes]:
    tests = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    modules = {path.relative_to(root).with_suffix("").parts: path for path in sorted(root.rglob("*.py"))}
    return {".".join(parts): path.read_bytes() for parts, path in modules.items() if not tests & set(parts)}


@task(cache_policy=INPUTS + TASK_SOURCE, task_run_name="measure {module}")
def measure(module: str, source: bytes) -> Figures:
    nodes = list(ast.walk(ast.parse(source)))
    functions = sum(isinstance(node, FUNCTION) for node in nodes)
    branches = sum(isinstance(node, BRANCH) for node in nodes)
    imports = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    imports |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return Figures(module, source.count(b"\n"), functions, 1 + functions + branches, frozenset(imports))


@task(cache_policy=INPUTS + TASK_SOURCE, task_run_name="fold")
def fold(index: list[Figures]) -> str:
    imported = frozenset[str]().union(*(each.imports for each in index))
    head = (
        f"{len(index)} modules, {sum(each.lines for each in index)} lines, {len(imported)} modules imported"
    )
    rows = [f"{each.complexity:10} {each.functions:10} {each.lines:7}  {each.module}" for each in index]
    return "\n".join([head, "complexity  functions   lines  module", *sorted(rows, reverse=True)[:10]])


@flow
async def library(root: Path) -> str:
    sources = await read(root)  # never cached: the text that it finds makes the keys
    return await fold(await measure.map(list(sources), sources.values()))


if __name__ == "__main__":
    print(library.run(Path(sys.argv[1] if len(sys.argv) > 1 else sysconfig.get_path("stdlib"))))
