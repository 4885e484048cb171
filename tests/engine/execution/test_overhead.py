"""What a task without caching may cost: counts only, times are the benchmarks' (W1)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import asyncio, sys, threading

from onceflow.engine import flow, task

happened = []

def watch(event, args):
    if event in ("open", "import") or event.startswith(("socket.", "_thread.", "os.", "subprocess.", "shutil.")):
        happened.append((event, str(args)[:200]))

@task
async def one(x):
    return x

@flow
async def many(count):
    asyncio_tasks = len(asyncio.all_tasks())
    total = 0
    for x in range(count):
        total += await one(x)
    assert len(asyncio.all_tasks()) == asyncio_tasks
    return total

async def main():
    await many(10)  # what is used first is imported first
    threads = threading.active_count()
    sys.addaudithook(watch)
    assert await many(10_000) == sum(range(10_000))
    print(happened, threading.active_count() - threads)

asyncio.run(main())
"""


def test_ten_thousand_trivial_tasks(tmp_path: Path, home: Path) -> None:
    """B24: 10 000 awaited tasks start no thread or asyncio task, open no file or connection, import nothing."""
    (tmp_path / "script.py").write_text(SCRIPT)
    ran = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert ran.stdout == "[] 0\n"
    assert [*home.rglob("*")] == []
