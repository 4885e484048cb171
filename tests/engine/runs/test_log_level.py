"""The level of the lines that a script shows, set from outside."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
from onceflow.engine import task

@task
async def hello():
    return "hello"

print(hello.run())
"""


@pytest.mark.parametrize(("level", "lines"), [(None, 1), ("info", 1), ("WARNING", 0)])
def test_the_setting_decides_which_lines_a_script_shows(
    level: str | None, lines: int, tmp_path: Path
) -> None:
    """`run()` shows the lines from INFO on, and ONCEFLOW_LOGGING_LEVEL says otherwise."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ONCEFLOW_")}
    environment["HOME"] = str(tmp_path)
    if level is not None:
        environment["ONCEFLOW_LOGGING_LEVEL"] = level
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "hello\n"
    assert done.stderr.count("Finished in state Completed()") == lines
