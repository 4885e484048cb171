"""Both type checkers accept what is right, and report what is wrong on purpose."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
REPO = HERE.parent.parent
FILES = sorted(path.name for path in HERE.glob("*.py") if not path.name.startswith("test_"))


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """The files without the comments that keep the checkers quiet about planted errors."""
    for name in FILES:
        text = (HERE / name).read_text()
        (tmp_path / name).write_text(re.sub(r"  # type: ignore\[[\w, -]+\]", "", text))
    return tmp_path


def planted() -> set[tuple[str, int]]:
    """Where the planted errors are."""
    return {
        (name, number)
        for name in FILES
        for number, line in enumerate((HERE / name).read_text().splitlines(), 1)
        if "# error: " in line
    }


def test_errors_are_planted() -> None:
    """There is something for the checkers to find."""
    assert len(planted()) > 25


def test_mypy_reports_the_planted_errors_and_no_others(bare: Path) -> None:
    """mypy strict reports each planted error in its line, and nothing else."""
    call = [sys.executable, "-m", "mypy", "--config-file", str(REPO / "pyproject.toml"), "--output", "json"]
    result = subprocess.run([*call, str(bare)], cwd=REPO, capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert {(Path(each["file"]).name, each["line"]) for each in found if each["severity"] == "error"} == (
        planted()
    ), result.stdout + result.stderr


def test_pyright_reports_the_planted_errors_and_no_others(bare: Path) -> None:
    """pyright reports each planted error in its line, and nothing else."""
    config = {
        "include": [str(bare)],
        "extraPaths": [str(REPO / ".dev")],
        "pythonVersion": "3.11",
        "typeCheckingMode": "standard",
    }
    (bare / "pyrightconfig.json").write_text(json.dumps(config))
    call = [sys.executable, "-m", "pyright", "--outputjson", "-p", str(bare), "--pythonpath", sys.executable]
    result = subprocess.run(call, cwd=bare, capture_output=True, text=True, check=False)
    found = json.loads(result.stdout)["generalDiagnostics"]
    assert {
        (Path(each["file"]).name, each["range"]["start"]["line"] + 1)
        for each in found
        if each["severity"] == "error"
    } == planted(), result.stdout
