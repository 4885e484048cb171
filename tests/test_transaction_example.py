"""The example of transactions, run against a bucket as it is run on a folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from s3_servers import new_prefix, s3_bucket, s3_server

EXAMPLE = Path(__file__).parents[1] / "examples" / "07_transactions.py"


def test_a_bucket_has_all_or_nothing(tmp_path: Path) -> None:
    """X22: after the run that fails both tasks execute again; then both are Cached, also for another process."""
    server = s3_server()
    url = f"s3://{s3_bucket()}/{new_prefix()}?endpoint_url={server.endpoint_url}"
    environment = {**os.environ, **server.environment, "ONCEFLOW_STORAGE": url, "HOME": str(tmp_path)}
    states = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-W", "error", EXAMPLE],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        states += [
            line.split()[1] for line in done.stdout.splitlines() if line.startswith(("  load", "  process"))
        ]
    assert states == ["Completed", "Failed", "Completed", "Completed", *["Cached"] * 8]
