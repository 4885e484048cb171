"""Processes that commit, roll back, die and watch: `python transaction_worker.py <work> <url> <argument>…`."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from onceflow.engine import Engine, task, transaction
from onceflow.engine._errors import CommitError
from onceflow.engine._records.record import Hit, Place
from onceflow.locking import MemoryLockManager, StorageLockManager
from onceflow.storage import LocalStorage, MemoryStorage, S3Storage, Storage, storage_from_url


def keys_of(tasks: int, name: str) -> list[str]:
    return [f"{name}-{tasks}-{number}" for number in range(tasks)]


@task(cache_key_fn=lambda context, parameters: parameters["key"], refresh_cache=True)
async def write(key: str, number: int | str, weight: int = 0) -> Any:
    return [number, bytes(weight)] if weight else number


@task(cache_key_fn=lambda context, parameters: parameters["key"], refresh_cache=True)
async def stream(key: str, number: int, weight: int = 0) -> AsyncIterator[Any]:
    yield [number, bytes(weight)]
    yield [number, "end"]


def dying(base: type[Any]) -> type[Any]:
    """A storage of the kind whose process is killed instead of carrying out its n-th write."""

    class Dying(base):  # type: ignore[misc]
        async def write(self, key: str, *args: Any, **options: Any) -> str:
            async with self._turn(key):
                version: str = await super().write(key, *args, **options)
                return version

        async def delete(self, key: str, *args: Any, **options: Any) -> bool:
            async with self._turn(key):
                there: bool = await super().delete(key, *args, **options)
                return there

        def _turn(self, key: str) -> asyncio.Lock:
            """One write after the other, so that every number of them is a state of its own."""
            if key[0] not in ".\0":  # the engine's own notes do not count
                Countdown.left -= 1
                if Countdown.left == 0:
                    os.kill(os.getpid(), Countdown.signal)
            return Countdown.lock

    return Dying


class Countdown:
    """How many writes are left, in all storages together, and whose turn it is."""

    left = -1
    lock: asyncio.Lock
    signal = signal.SIGKILL


def mortal(url: str) -> Storage:
    storage = storage_from_url(url)
    if isinstance(storage, (LocalStorage, S3Storage)):
        storage.__class__ = dying(type(storage))
    return storage


def beside(url: str) -> str:
    """The URL of another storage, for the records."""
    path, mark, query = url.partition("?")
    return f"{path}-keys{mark}{query}"


class _Rollback(Exception):
    pass


async def commit(url: str, tasks: int, name: str, number: int, at: int, weight: int, way: str) -> None:
    """Commit `number` under all keys, and be killed at the `at`-th write; at 0, roll back at the end.

    The way is `plain`, `split` (records in a storage of their own), `serializable`, `claims` (with locks in the
    records), `stream` (generator tasks) or `alone` (each task for itself, without a block).
    """
    Countdown.left, Countdown.lock = at, asyncio.Lock()
    storage = mortal(url)
    keys = mortal(beside(url)) if way in ("split", "alone") else None
    locks = StorageLockManager(storage, lease_seconds=0.3) if way == "claims" else MemoryLockManager()
    isolation = "SERIALIZABLE" if way in ("serializable", "claims") else None
    one: Any = stream if way == "stream" else write
    async with storage, Engine(storage=storage, key_storage=keys, lock_manager=locks):
        try:
            async with nullcontext() if way == "alone" else transaction(isolation_level=isolation):
                await asyncio.gather(*(one(key, number, weight) for key in keys_of(tasks, name)))
                if at == 0:
                    raise _Rollback
        except _Rollback:
            pass
    if keys is not None:
        await keys.aclose()


async def _probe(url: str) -> None:
    """So that the children know what a bucket can do, and import nothing any more."""
    async with storage_from_url(url) as storage:
        await storage.ensure_conditional()
    async with Engine(storage=MemoryStorage()), transaction():
        await write("warm", 0)
        await write("up", 0)
        async for _ in stream("stream", 0):
            pass


def serve(url: str) -> None:
    """For each line `tasks name number at weight way` fork a process that commits; say how it ended."""
    asyncio.run(_probe(url))
    print("ready", flush=True)
    for line in sys.stdin:
        tasks, name, number, at, weight, way = line.split()
        child = os.fork()
        if child == 0:
            asyncio.run(commit(url, int(tasks), name, int(number), int(at), int(weight), way))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        ended = "killed" if os.WIFSIGNALED(status) else f"exit{os.waitstatus_to_exitcode(status)}"
        print(ended, flush=True)


async def _commit_soon(url: str, keys: list[str], number: int, weight: int, ready: int) -> None:
    async with storage_from_url(url) as storage, Engine(storage=storage), transaction():
        await asyncio.gather(*(write(key, number, weight) for key in keys))
        os.write(ready, b"!")


def trials(url: str, tasks: int, name: str, weight: int, count: int) -> None:
    """Fork a process that commits, and kill it some time after it has begun to, over and over; look after each.

    Says what is wrong, or how many were killed, and how many of these before they had committed.
    """
    asyncio.run(_probe(url))
    keys, window = keys_of(tasks, name), 0.0
    killed = undone = 0
    committed: int | None = None
    with asyncio.Runner() as runner:
        engine = runner.run(Engine(storage=url).open())
        reader = Reader(engine)
        for number in range(1, count + 1):
            read, ready = os.pipe()
            child = os.fork()
            if child == 0:
                asyncio.run(_commit_soon(url, keys, number, weight, ready))
                os._exit(0)
            os.close(ready)
            os.read(read, 1)
            os.close(read)
            begun = time.perf_counter()
            if window:
                time.sleep(random.uniform(0, window))
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if not window:
                window = time.perf_counter() - begun
            else:  # so that both happen often
                window *= 1.05 if os.WIFSIGNALED(status) else 0.9
            values = {runner.run(reader.read(key)) for key in keys}
            if len(values) != 1 or not values <= {committed, number}:
                print(f"mixed: {values} after {committed} in trial {number}", flush=True)
                return
            killed += os.WIFSIGNALED(status)
            undone += values == {committed}
            (committed,) = values
        runner.run(engine.records.sweep(engine.storage, engine.storage))
        runner.run(engine.aclose())
    print(f"killed {killed} undone {undone}", flush=True)


async def pause(url: str, tasks: int, name: str, number: int, at: int) -> None:
    """Commit, stopped instead of the `at`-th write until somebody continues it; say how it ended."""
    Countdown.signal = signal.SIGSTOP
    print("ready", flush=True)
    try:
        await commit(url, tasks, name, number, at, 0, "plain")
    except CommitError as error:
        print(f"refused {error.in_doubt}", flush=True)
    else:
        print("committed", flush=True)


async def storm(url: str, tasks: int, name: str) -> None:
    """Commit for ever, each time under a mark that no other transaction has; some are rolled back."""
    async with storage_from_url(url) as storage, Engine(storage=storage):
        for count in itertools.count():
            mark = f"{os.getpid()}-{count}"
            keys = keys_of(tasks, name)
            try:
                async with transaction():
                    await asyncio.gather(*(write(key, mark) for key in random.sample(keys, tasks)))
                    if random.random() < 0.2:
                        raise _Rollback
            except _Rollback:
                pass


class Reader:
    """Reads as any process does, through an engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._place = Place(engine.storage, engine.key_storage, engine.serializer)
        self.reads = 0

    async def read(self, key: str) -> Any:
        """The committed value, None for a miss."""
        self.reads += 1
        found = await self._engine.records.lookup(self._place, key)
        value = found.value if isinstance(found, Hit) else None
        if isinstance(value, dict):  # a stream's record names its chunks
            chunks = [await self._chunk(name) for name in value["onceflow.stream"]]
            value = chunks[0][0] if all(chunks) else "broken"
        return value[0] if isinstance(value, list) else value

    async def _chunk(self, name: str) -> Any:
        found = await self._engine.records.lookup(self._place._replace(key_storage=None), name)
        return found.value if isinstance(found, Hit) else None


async def rising(reader: Reader, groups: list[list[str]], stop: Path) -> str:
    """For one writer whose numbers grow: once a key has shown a number, none of its group shows a smaller one."""
    latest = [0] * len(groups)
    while not await asyncio.to_thread(stop.exists):
        for index, keys in enumerate(groups):
            for key in random.sample(keys, len(keys)):
                number = await reader.read(key) or 0
                if number < latest[index]:
                    return f"mixed: {key} shows {number} after {latest[index]} was seen"
                latest[index] = number
    return f"reads {reader.reads}"


async def stable(reader: Reader, groups: list[list[str]], stop: Path) -> str:
    """For any writers: what was read twice the same in a row was there at one time, so it is of one transaction."""
    seen, agreed = False, 0
    while not await asyncio.to_thread(stop.exists):
        for keys in groups:
            first = [await reader.read(key) for key in keys]
            if first != [await reader.read(key) for key in keys]:
                continue
            if len(set(first)) != 1 or (seen and first[0] is None):
                return f"mixed: {first}"
            seen = seen or first[0] is not None
            agreed += 1
    return f"reads {reader.reads} agreed {agreed}"


async def watch(url: str, how: str, name: str, sizes: str, stop: str, keys: str | None = None) -> None:
    """Read in a loop until the file `stop` is there."""
    groups = [keys_of(int(size), name) for size in sizes.split(",")]
    async with storage_from_url(url) as storage, Engine(storage=storage, key_storage=keys) as engine:
        print("ready", flush=True)
        print(await {"rising": rising, "stable": stable}[how](Reader(engine), groups, Path(stop)), flush=True)


if __name__ == "__main__":
    _, work, *arguments = sys.argv
    if work == "watch":
        asyncio.run(watch(*arguments))
    elif work == "pause":
        asyncio.run(
            pause(arguments[0], int(arguments[1]), arguments[2], int(arguments[3]), int(arguments[4]))
        )
    elif work == "trials":
        trials(arguments[0], int(arguments[1]), arguments[2], int(arguments[3]), int(arguments[4]))
    elif work == "storm":
        asyncio.run(storm(arguments[0], int(arguments[1]), arguments[2]))
    else:
        serve(*arguments)
