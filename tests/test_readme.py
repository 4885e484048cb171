"""The README promises nothing that does not run. `python tests/test_readme.py` writes its table of settings."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest
from onceflow.engine import Settings

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
TABLE = re.compile(r"(<!-- settings: .*? -->\n)(.*?)(<!-- end of settings -->)", re.DOTALL)

# What each Python block prints when it is run, in the order of the README.
OUTPUTS = ["22\n", "42 42\n", "6\n", "[2, 4, 6, 8]\n"]


def blocks(language: str) -> list[str]:
    return [block for kind, block in BLOCKS if kind == language]


def run(block: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Run a block as the script that a reader would make of it, in an empty home."""
    script = home / "script.py"
    script.write_text(block, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ONCEFLOW_")}
    environment["HOME"] = str(home)
    return subprocess.run(
        [sys.executable, script], env=environment, cwd=home, capture_output=True, text=True, check=False
    )


def settings_table() -> str:
    """The settings as a table: their names in the environment, defaults and docstrings."""
    defaults = {field.name: field.default for field in fields(Settings)}
    rows = [
        f"| `ONCEFLOW_{name.upper()}` | {_shown(defaults[name])} | {text} |"
        for name, text in docstrings().items()
    ]
    return "\n".join(["| setting | default | |", "|---|---|---|", *rows, ""])


def docstrings() -> dict[str, str]:
    """The docstring under each field of `Settings`, which Python itself drops."""
    module = ast.parse((ROOT / "engine" / "_settings.py").read_text(encoding="utf-8"))
    body = next(
        node.body for node in module.body if isinstance(node, ast.ClassDef) and node.name == "Settings"
    )
    texts: dict[str, str] = {}
    for field, text in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            assert isinstance(text, ast.Expr), f"{field.target.id} has no docstring"
            texts[field.target.id] = " ".join(ast.literal_eval(text.value).split())
    return texts


def _shown(default: object) -> str:
    return "" if default is None else f"`{str(default).lower()}`"


def test_every_block_is_of_a_kind_that_is_run() -> None:
    """Each code block is Python, a command, or output that is compared: nothing stands there untested."""
    assert {kind for kind, _ in BLOCKS} == {"python", "sh", "text"}
    assert TEXT.count("```") == 2 * len(BLOCKS)
    assert len(blocks("python")) == len(OUTPUTS)


@pytest.mark.parametrize("number", range(len(OUTPUTS)))
def test_a_python_block_runs_twice_and_prints_what_it_should(number: int, tmp_path: Path) -> None:
    """Run as a script in an empty home, and once more where its records lie, a block prints the same."""
    for _ in range(2):
        done = run(blocks("python")[number], tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout == OUTPUTS[number]
        assert "WARNING" not in done.stderr


def test_the_second_run_logs_the_line_that_is_shown(tmp_path: Path) -> None:
    """The first program's second run ends its task runs with the line in the README, but for times and ids."""
    run(blocks("python")[0], tmp_path)
    logged = run(blocks("python")[0], tmp_path).stderr
    (shown,) = blocks("text")
    assert [_anonymous(line) for line in logged.splitlines() if "length" in line] == [
        _anonymous(shown.strip())
    ] * 3


def _anonymous(line: str) -> str:
    line = re.sub(r"^[\d:.]+ ", "TIME ", line)
    line = re.sub(r"-[0-9a-f]{3}'", "-ID'", line)
    return re.sub(r"run [0-9a-f-]{36} \d+ \w+ ago", "run ID AGE ago", line)


def test_the_fifteen_line_example_has_fifteen_lines_of_code() -> None:
    """The first program is no longer than it says: fifteen lines and the blank ones between them."""
    assert len([line for line in blocks("python")[0].splitlines() if line]) <= 15


@pytest.mark.parametrize("line", [line for block in blocks("sh") for line in block.splitlines()])
def test_each_command_is_one_of_the_makefile(line: str) -> None:
    """The commands are targets that exist; what `make demo` prints is compared in test_examples."""
    command = line.split("#")[0].split()
    assert command[0] == "make"
    done = subprocess.run(
        ["make", "--dry-run", *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_table_of_settings_is_that_of_the_code() -> None:
    """Every setting is listed, with its default and its docstring; `python tests/test_readme.py` writes the table."""
    match = TABLE.search(TEXT)
    assert match is not None
    assert match[2] == settings_table()
    assert list(docstrings()) == [field.name for field in fields(Settings)]


if __name__ == "__main__":
    README.write_text(TABLE.sub(lambda match: match[1] + settings_table() + match[3], TEXT), encoding="utf-8")
