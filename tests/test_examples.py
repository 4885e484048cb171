"""Every example does what it shows: run as a user runs it, its output compared."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

HELLO = """\
Hello, Ada!
Hello, Grace!
"""

CACHE_FIRST = """\
DEFAULT                2  Completed
DEFAULT, again         2  Cached
INPUTS + TASK_SOURCE   2  Completed
  again                2  Cached
  another input        1  Completed
"""

CACHE_SECOND = """\
DEFAULT                2  Completed
DEFAULT, again         2  Cached
INPUTS + TASK_SOURCE   2  Cached
  again                2  Cached
  another input        1  Cached
"""

MAP = """\
in input order: [10, 20, 30]
a thousand at once: 999000
as an argument: list [10, 20, 30]
as they finish: slept 0.1 s
as they finish: slept 0.2 s
a failure allowed: ValueError no luck today
not allowed: NotReady
"""

KEYS_FIRST = """\
Completed 12
Cached 12
Completed Emma, page 7
Completed ('c', 'e', 'f', 'l', 'n', 'o', 'w')
Completed 2
page's key: page 7 of Emma
records apart: 1
"""

KEYS_SECOND = """\
Cached 12
Cached 12
Cached Emma, page 7
Cached ('c', 'e', 'f', 'l', 'n', 'o', 'w')
Completed 2
page's key: page 7 of Emma
records apart: 1
"""

RETRIES = """\
  flaky completed after 3 attempt(s)
returned 3
  broken failed for good after 1 attempt(s): Failed
state: Failed
  slow failed for good after 1 attempt(s): TimedOut
state: TimedOut
"""

TRANSACTIONS_CACHED = """\
run
  load: Cached
  process: Cached
  sorted: [1, 2, 3]
"""

TRANSACTIONS_FIRST = (
    """\
run
  load: Completed
  process: Failed
  rolled back: numbers.txt is removed
  failed: no power
run
  load: Completed
  process: Completed
  sorted: [1, 2, 3]
  committed: numbers.txt is kept
"""
    + TRANSACTIONS_CACHED
)

LIBRARY = """\
3 modules, 9 lines, 2 modules imported
complexity  functions   lines  module
         4          1       5  package.branches
         2          1       3  functions
         1          0       1  package.__init__
"""

OUTPUTS = {
    "01_hello.py": [HELLO],
    "02_cache.py": [CACHE_FIRST, CACHE_SECOND],
    "03_map.py": [MAP],
    "04_library.py": [LIBRARY, LIBRARY],
    "05_keys.py": [KEYS_FIRST, KEYS_SECOND],
    "06_retries.py": [RETRIES],
    "07_transactions.py": [TRANSACTIONS_FIRST, TRANSACTIONS_CACHED * 3],
}
# Examples that need a server.
OWN_TESTS = {"10_bucket.py": "test_bucket_example.py", "11_web.py": "engine/lifecycle/test_web.py"}


def run(example: str, home: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run an example in a home of its own, with records where they lie by default."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ONCEFLOW_")}
    environment["HOME"] = str(home)
    return subprocess.run(
        [sys.executable, EXAMPLES / example, *arguments],
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    """A small library of three modules, with tests that do not count."""
    folder = tmp_path / "library"
    (folder / "package" / "tests").mkdir(parents=True)
    (folder / "functions.py").write_text("import ast\ndef f():\n    return 1\n")
    (folder / "package" / "__init__.py").write_text("from os import path\n")
    (folder / "package" / "branches.py").write_text(
        "def f(x):\n    for y in x:\n        if y:\n            return 2\n\n"
    )
    (folder / "package" / "tests" / "test_it.py").write_text("import json\n")
    return folder


def test_every_example_is_listed_and_short() -> None:
    """Each numbered example is run below or in a test of its own, and fits on a page: under 60 lines."""
    examples = sorted(EXAMPLES.glob("[0-9]*.py"))
    assert [path.name for path in examples] == sorted({*OUTPUTS, *OWN_TESTS})
    assert all((Path(__file__).parent / test).is_file() for test in OWN_TESTS.values())
    assert {
        path.name: lines for path in examples if (lines := len(path.read_text().splitlines())) >= 60
    } == {}


@pytest.mark.parametrize("example", OUTPUTS)
def test_an_example_prints_what_it_promises(example: str, tmp_path: Path, modules: Path) -> None:
    """Run in an empty home, an example prints this the first time, and that the second time."""
    arguments = [modules] if example == "04_library.py" else []
    for expected in OUTPUTS[example]:
        done = run(example, tmp_path, *arguments)
        assert done.returncode == 0, done.stderr
        assert done.stdout == expected
        assert "WARNING" not in done.stderr


def test_records_lie_in_the_home_unless_told_otherwise(tmp_path: Path) -> None:
    """A script writes one file for each key into `~/.onceflow/storage`, and beside it the notes of `explain`."""
    run("02_cache.py", tmp_path)
    lines = run("02_cache.py", tmp_path).stderr
    assert [path.name for path in tmp_path.iterdir() if path.name != "library"] == [".onceflow"]
    assert {path.name for path in (tmp_path / ".onceflow").iterdir()} <= {"storage", "explain"}
    # DEFAULT leaves one for each of two runs, INPUTS + TASK_SOURCE one for each of two inputs
    records = [
        path for path in (tmp_path / ".onceflow" / "storage").iterdir() if not path.name.startswith(".")
    ]
    assert len(records) == 4
    assert lines.count("Finished in state Cached(type=COMPLETED); cached: written by run") == 4


def test_the_library_is_measured_again_only_where_it_changed(tmp_path: Path, modules: Path) -> None:
    """Moving the folder runs nothing, editing one module runs that module and the fold."""
    run("04_library.py", tmp_path, modules)
    moved = modules.rename(tmp_path / "elsewhere")
    assert _executed(run("04_library.py", tmp_path, moved)) == []
    with (moved / "functions.py").open("a") as text:
        text.write("g = lambda: 2\n")
    assert _executed(run("04_library.py", tmp_path, moved)) == ["fold", "measure functions"]


def _executed(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The runs of cacheable tasks that were not served from a record."""
    lines = [line for line in done.stderr.splitlines() if "Finished in state Completed" in line]
    names = [line.split("'")[1] for line in lines if "Task run" in line]
    return sorted(name for name in names if not name.startswith("read-"))


def test_the_demo_shows_all_executed_then_all_cached(tmp_path: Path, modules: Path) -> None:
    """`make demo` executes all, then nothing, then what one edit asks for; the next time it finds all."""
    shutil.copy(modules / "functions.py", modules / "last.py")
    first = run("demo.py", tmp_path, modules, tmp_path / "records")
    assert first.returncode == 0, first.stderr + first.stdout
    assert _counts(first.stdout) == [
        "run 1 4 modules: 4 executed, 0 cached; fold executed",
        "run 2 4 modules: 0 executed, 4 cached; fold cached",
        "before 4 modules: 4 executed, 0 cached; fold executed",
        "after 4 modules: 1 executed, 3 cached; fold executed",
    ]
    assert "The report of run 2 is identical to that of run 1:" in first.stdout
    second = run("demo.py", tmp_path, modules, tmp_path / "records")
    assert second.returncode == 0, second.stderr + second.stdout
    assert _counts(second.stdout)[0] == "run 1 4 modules: 0 executed, 4 cached; fold cached"
    assert "Run 1 found the records of an earlier `make demo`" in second.stdout


def _counts(text: str) -> list[str]:
    """The lines with counts, without their times."""
    rows = [line.split() for line in text.splitlines() if "modules: " in line]
    return [" ".join(row).replace(f"{row[row.index('s') - 1]} s ", "") for row in rows]
