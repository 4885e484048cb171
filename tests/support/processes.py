"""Starting Python processes that have onceflow on their path, and talking with them line by line."""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_SUPPORT = str(Path(__file__).parent)


@asynccontextmanager
async def python(script: str, *arguments: str) -> AsyncIterator[Process]:
    """A process that runs a script of tests/support; killed in the end if it still runs, also when stopped."""
    path = os.pathsep.join((str(_ROOT / ".dev"), _SUPPORT))
    process = await asyncio.create_subprocess_exec(
        sys.executable, f"{_SUPPORT}/{script}", *arguments,
        stdin=PIPE, stdout=PIPE, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def line(process: Process, within: float = 60) -> list[str]:
    """The words of the process's next line of output."""
    assert process.stdout is not None
    async with asyncio.timeout(within):
        return (await process.stdout.readline()).decode().split()


async def ask(process: Process) -> list[str]:
    """Send an empty line, and return the words of the answer."""
    assert process.stdin is not None
    process.stdin.write(b"\n")
    await process.stdin.drain()
    return await line(process)
