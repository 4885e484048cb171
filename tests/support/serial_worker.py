"""Runs SERIALIZABLE tasks, for tests: `python serial_worker.py STORAGE LOCKS COMMAND …`, with onceflow on the path.

contend LOG PROCESSES KEYS CALLS SEED  forks; every process calls every key so often, in an order of its own;
                                       every execution writes a line to LOG when it enters, and one when it ends
hold KEY                               calls one key; its body prints `in`, waits for a line, and returns its pid;
                                       then prints `out` and what the call returned
many KEY CALLS                         calls one key so often at once; prints `waiting`, then what they returned
storm LOG KEYS SEED                    calls every key, five at a time, in an order of its own, again where
                                       there was no answer; LOG as above, with a line for each value
forks                                  calls a key, forks while its body runs, and prints what the child was told
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
import traceback
from collections.abc import Callable

import pytest
from onceflow.engine import INPUTS, ConfigurationError, Engine, task
from onceflow.locking import LockUnavailableError
from onceflow.storage import StorageUnavailableError
from until import until

POLICY = (INPUTS - "number" - "chosen").configure(isolation_level="SERIALIZABLE")
_log = ""


def write(*words: object) -> None:
    """One line, whole, at the end of the log; without the locks of buffered files."""
    fd = os.open(_log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.write(fd, (" ".join(map(str, words)) + "\n").encode())
    os.close(fd)


@task(cache_policy=POLICY)
async def step(key: int, number: int, chosen: random.Random) -> str:
    """`number` is the place in its process's line; a third fails, and then it is the next one's turn."""
    write("enter", os.getpid(), key, number)
    await asyncio.sleep(chosen.random() / 500)
    if chosen.random() < 0.3:
        write("failed", os.getpid(), key, number)
        raise RuntimeError("this time not")
    write("done", os.getpid(), key, number)
    return f"{os.getpid()}-{key}-{number}"


async def contend(engine: Engine, keys: int, calls: int, seed: str) -> None:
    chosen = random.Random(seed)
    order = list(range(keys))
    chosen.shuffle(order)
    some = asyncio.Semaphore(
        100
    )  # so many requests at once as a busy machine answers within a fraction of a lease

    async def one(key: int, number: int) -> str:
        async with some:
            return await step(key, number, chosen)

    async with engine:
        outcomes = await asyncio.gather(
            *(one(key, number) for key in order for number in range(calls)), return_exceptions=True
        )
    for place, outcome in enumerate(outcomes):
        if isinstance(outcome, str):
            write("value", os.getpid(), order[place // calls], outcome)
        elif not (isinstance(outcome, RuntimeError) and str(outcome) == "this time not"):
            raise outcome


def in_children(number: int, work: Callable[[int], None]) -> None:
    """Run it in so many forked processes; a failure of one is a failure of all."""
    pids = []
    for index in range(number):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                work(index)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        pids.append(pid)
    statuses = [os.waitpid(pid, 0)[1] for pid in pids]  # of all of them, whatever the first one's is
    if any(statuses):
        sys.exit("a process failed")


@task(cache_policy=POLICY)
async def held(key: str) -> int:
    print("in", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    return os.getpid()


async def hold(engine: Engine, key: str) -> None:
    async with engine:
        value = await held(key)
    print("out", value, flush=True)


async def many(engine: Engine, key: str, calls: str) -> None:
    async with engine:
        waiting = [asyncio.create_task(held(key)) for _ in range(int(calls))]
        await until(lambda: any(flight.waiters for flight in engine.flights._flights.values()))
        print("waiting", flush=True)
        print(*set(await asyncio.gather(*waiting)), flush=True)


@task(cache_policy=POLICY, name="stormy")
async def stormy(key: int) -> str:
    """Long enough to be killed in."""
    write("enter", os.getpid(), key)
    await asyncio.sleep(random.uniform(0.1, 1))
    write("done", os.getpid(), key)
    return f"{os.getpid()}-{time.monotonic_ns()}"


async def storm(engine: Engine, keys: int, seed: str) -> None:
    order = list(range(keys))
    random.Random(seed).shuffle(order)
    some = asyncio.Semaphore(5)

    async def one(key: int) -> None:
        async with some:
            while True:
                try:
                    value = await stormy(key)
                except (StorageUnavailableError, LockUnavailableError) as error:
                    write("unavailable", os.getpid(), key, type(error).__name__)
                else:
                    return write("value", os.getpid(), key, value)

    async with engine, asyncio.TaskGroup() as group:
        for key in order:
            group.create_task(one(key))


@task(cache_policy=POLICY)
async def forking(key: str) -> str:
    pid = os.fork()
    if pid == 0:
        try:
            asyncio.run(in_child())
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = await asyncio.to_thread(os.waitpid, pid, 0)
    return f"child {status}"


async def in_child() -> None:
    """The child has the parent's engine in its hands, with a key that the parent holds, and one that it does not."""
    for key in ("key", "other"):
        with pytest.raises(ConfigurationError, match="event loop"):
            await forking(key)
    assert os.environ["TEST_STORAGE"]
    async with Engine(os.environ["TEST_STORAGE"]):
        pass  # one of its own works


async def forks(engine: Engine) -> None:
    async with engine:
        print(await forking("key"), flush=True)
        print(await forking("key"), flush=True)


def main(storage: str, locks: str, command: str, *arguments: str) -> None:
    global _log
    os.environ["ONCEFLOW_LOCKS"] = locks
    os.environ["TEST_STORAGE"] = storage
    if command == "contend":
        _log, processes, keys, calls, seed = arguments

        def work(index: int) -> None:
            asyncio.run(contend(Engine(storage), int(keys), int(calls), f"{seed}-{index}"))

        in_children(int(processes), work)
    elif command == "storm":
        _log, keys, seed = arguments
        asyncio.run(storm(Engine(storage), int(keys), seed))
    elif command == "hold":
        asyncio.run(hold(Engine(storage), *arguments))
    elif command == "many":
        asyncio.run(many(Engine(storage), *arguments))
    else:
        asyncio.run(forks(Engine(storage)))


if __name__ == "__main__":
    main(*sys.argv[1:])
