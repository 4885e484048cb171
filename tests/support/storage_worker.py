"""Another process at a store, for tests: `python storage_worker.py <work> <url> <argument>…`.

Each work prints a line when it is under way, so that a test can kill it, and its result at the end.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

from onceflow.storage import (
    LocalStorage,
    ObjectExistsError,
    Storage,
    StorageError,
    VersionMismatchError,
    storage_from_url,
)
from until import until

MIB = 1024 * 1024


async def count(storage: Storage, times: str, tasks: str) -> int:
    """Add one to the counter, `times` times in each of `tasks` tasks, by read and write-if-version."""

    async def add() -> None:
        for _ in range(int(times)):
            while True:
                stored = await storage.fetch("counter")
                assert stored is not None
                number = int(bytes(stored.data)) + 1
                try:
                    await storage.write("counter", b"%d" % number, if_version=stored.version)
                    break
                except VersionMismatchError:
                    pass

    await asyncio.gather(*(add() for _ in range(int(tasks))))
    return int(times) * int(tasks)


async def create(storage: Storage, rounds: str) -> list[int]:
    """The rounds in which this process was the one that created the object."""
    won = []
    for turn in range(int(rounds)):
        try:
            await storage.write(f"round{turn}", str(os.getpid()).encode(), if_absent=True)
            won.append(turn)
        except ObjectExistsError:
            pass
    return won


async def replace(storage: Storage, size: str) -> None:
    """Replace one object for ever, each time by another byte: whole, streamed, or after a removal."""

    async def pieces(content: bytes) -> Any:
        for start in range(0, len(content), 700_000):
            yield content[start : start + 700_000]

    turn = os.getpid()
    while True:
        turn += 1
        digit = turn % 10
        content = b"%d" % digit * (int(size) + digit)
        version = await storage.write("object", pieces(content) if turn % 3 == 0 else content)
        if turn % 5 == 0:
            try:
                await storage.delete("object", if_version=version)
            except VersionMismatchError:
                pass


async def check(storage: Storage, size: str) -> int:
    """Read the object until there is one named `stop`; how often it was there, and whole each time."""
    found = 0
    while await storage.stat("stop") is None:
        try:
            content = await storage.read("object")
        except FileNotFoundError:
            continue
        digit = content[:1]
        assert content == digit * (int(size) + int(digit)), "a torn read"
        found += 1
    return found


async def fork(storage: Storage) -> str:
    """Fork while the storage's only thread is at work, and use it in the child."""
    assert isinstance(storage, LocalStorage)
    await storage.write("parent", b"before")
    begun, go = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        go.wait()

    working = asyncio.create_task(storage._hops.run(work))
    await until(begun.is_set)
    child = os.fork()
    if child == 0:
        # The child has the loop's memory but none of its threads: it starts a loop of its own.
        asyncio._set_running_loop(None)
        asyncio.run(storage.write("child", b"written"))
        os._exit(0)
    await until(lambda: os.waitpid(child, os.WNOHANG) != (0, 0))
    go.set()
    await working
    await storage.write("parent", b"after")
    return (await storage.read("child")).decode()


async def limited(storage: Storage, which: str) -> str:
    """What a write says under a limit of the process, and that it works again without."""
    kind = {"size": resource.RLIMIT_FSIZE, "files": resource.RLIMIT_NOFILE}[which]
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    await storage.write("key", b"old")
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, ({"size": 100_000, "files": 3}[which], hard))
    try:
        await storage.write("key", bytes(200_000))
        return "written"
    except StorageError as error:
        resource.setrlimit(kind, (soft, hard))
        assert await storage.read("key") == b"old"
        await storage.write("key", b"new")
        return f"{type(error).__name__}: {error}"


async def streaming(storage: Storage, mebibytes: str, extra: str) -> int:
    """Move an object up as a stream and down in ranges, under a limit of so much more memory; MiB it took."""
    size, piece = int(mebibytes) * MIB, bytes(range(256)) * (MIB // 256)

    async def source(count: int) -> AsyncIterator[bytes]:
        for _ in range(count):
            yield piece

    await storage.write("warm", source(2))  # clients, threads and their stacks are there from now on
    limit = data_in_use() + int(extra) * MIB
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        bytes(2 * int(extra) * MIB)
    except MemoryError:
        pass  # the limit is one
    else:
        raise AssertionError("the limit of memory does not hold")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    version = await storage.write("large", source(size // MIB))
    buffer, seen = bytearray(16 * MIB), 0
    for start in range(0, size, len(buffer)):
        stored = await storage.fetch("large", start, start + len(buffer), if_version=version, into=buffer)
        assert stored is not None
        assert stored.data[:MIB] == stored.data[-MIB:] == piece
        seen += len(stored.data)
        assert stored.size == size
    assert seen == size
    await storage.delete("large")
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024


def data_in_use() -> int:
    """What counts against RLIMIT_DATA, in bytes. Linux only."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))


async def main(work: str, url: str, *arguments: str) -> None:
    async with storage_from_url(url) as storage:
        print("under way", flush=True)
        print(await globals()[work](storage, *arguments), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
