"""The floors of everything that ends in a file: plain file calls, in one thread hop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from time import perf_counter
from typing import Any


def micros(started: float, count: int) -> float:
    return (perf_counter() - started) / count * 1e6


def write_renamed(path: str, value: bytes | memoryview, sync: bool = False) -> None:
    with open(path + ".tmp", "wb", buffering=0) as file:
        file.write(value)
        if sync:
            os.fsync(file.fileno())
    os.replace(path + ".tmp", path)


def read_whole(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()


async def hop(fn: Callable[..., Any], *args: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(None, fn, *args)
