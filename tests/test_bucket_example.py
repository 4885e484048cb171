"""The bucket example, run as two machines would run it: in two processes, against one bucket."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from s3_servers import new_prefix, s3_bucket, s3_server

EXAMPLE = Path(__file__).parents[1] / "examples" / "10_bucket.py"


def _environment() -> dict[str, str]:
    server = s3_server()
    url = f"s3://{s3_bucket()}/{new_prefix()}?endpoint_url={server.endpoint_url}"
    own = {"ONCEFLOW_STORAGE": url, "ONCEFLOW_LOCKS": url, "ONCEFLOW_LOGGING_LEVEL": "WARNING"}
    return {**os.environ, "AWS_DEFAULT_REGION": "us-east-1", **server.environment, **own}


def _start(environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", str(EXAMPLE)]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def _end(process: subprocess.Popen[str]) -> list[list[str]]:
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    return [line.split(maxsplit=2) for line in out.splitlines()]


def test_a_later_process_reads_what_an_earlier_one_wrote() -> None:
    """B13: the second process runs nothing, and prints the same values."""
    environment = _environment()
    first, second = _end(_start(environment)), _end(_start(environment))
    assert [name for _, name, _ in first] == ["Completed"] * 3
    assert [name for _, name, _ in second] == ["Cached"] * 3
    assert [value for *_, value in first] == [value for *_, value in second]


def test_two_processes_at_once_run_each_task_once() -> None:
    """L15: started together, they share the work: each station is measured by one of them."""
    environment = _environment()
    both = [_start(environment), _start(environment)]
    lines = [line for process in both for line in _end(process)]
    for station in ("Aachen", "Bremen", "Cottbus"):
        assert sorted(name for at, name, _ in lines if at == station) == ["Cached", "Completed"]
