"""How long a program waits before its first task: imports, and a first flow in a new process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter

from harness import FLOOR, OURS, Measure, Workload

HELLO = Path(__file__).parents[1] / "examples" / "01_hello.py"


def process(*arguments: str | Path) -> Measure:
    """Milliseconds of a new Python process with these arguments."""

    async def run() -> float:
        with tempfile.TemporaryDirectory() as home:
            environment = {**os.environ, "HOME": home}
            started = perf_counter()
            subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, check=True)
            return (perf_counter() - started) * 1e3

    return run


def importing(module: str) -> Measure | None:
    return process("-c", f"import {module}") if find_spec(module) else None


def workloads() -> Iterator[Workload]:
    empty = process("-c", "pass")
    yield Workload(
        "W8",
        "import, in a new process",
        "python -c pass",
        {
            FLOOR: empty,
            OURS: process("-c", "import onceflow.engine"),
            "joblib": importing("joblib"),
            "cashews": importing("cashews"),
            "dask": importing("dask"),
        },
        extra=150,
        unit="ms",
        rounds=9,
    )
    yield Workload(
        "W8",
        "the hello flow, in a new process",
        "python -c pass",
        {FLOOR: empty, OURS: process(HELLO)},
        extra=300,
        unit="ms",
        rounds=9,
    )
