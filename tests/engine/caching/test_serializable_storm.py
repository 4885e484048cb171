"""SERIALIZABLE while everything goes wrong: workers are killed and paused, requests fail, for every way to lock."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from asyncio.subprocess import Process
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import Fault, FaultProxy, Request
from onceflow.engine import INPUTS, task
from processes import python
from s3_servers import s3_server
from serial_ways import SHARED, Side, Way

KINDS = SHARED
LEASE = 3.0
WORKERS = 4


@task(cache_policy=INPUTS.configure(isolation_level="SERIALIZABLE"))
async def stormy(key: int) -> str:
    """The same key as the worker's task of this name."""
    return "nobody's"


class Log:
    """What the workers wrote, with what was done to them in between."""

    def __init__(self, path: Path) -> None:
        self.path = path

    async def write(self, *words: object) -> None:
        def append() -> None:
            with self.path.open("a") as file:
                file.write(" ".join(map(str, words)) + "\n")

        await asyncio.to_thread(append)

    def entries(self) -> Iterator[list[str]]:
        for text in self.path.read_text().splitlines():
            yield text.split()

    def check(self, keys: int) -> dict[int, str]:
        """One value for each key, and each execution more explained by a holder that was killed or paused."""
        values: dict[int, set[str]] = defaultdict(set)
        executions: dict[int, int] = defaultdict(int)
        hit: dict[int, int] = defaultdict(int)
        open_at: dict[str, set[int]] = defaultdict(set)  # what each process has begun and not yet published
        for what, pid, *rest in self.entries():
            if what in ("killed", "paused"):
                for key in open_at[pid]:
                    hit[key] += 1
                if what == "killed":
                    open_at.pop(pid)
                continue
            key = int(rest[0])
            if what == "enter":
                executions[key] += 1
                open_at[pid].add(key)
            elif what in ("value", "unavailable"):
                open_at[pid].discard(key)
                if what == "value":
                    values[key].add(rest[1])
                elif executions[key]:
                    hit[key] += 1  # a commit whose fate its holder could not learn
        assert [len(values[key]) for key in range(keys)] == [1] * keys
        unexplained = {
            key: (executions[key], hit[key]) for key in range(keys) if executions[key] > 1 + hit[key]
        }
        assert unexplained == {}
        return {key: value for key, (value,) in values.items()}


def some_fail(seed: int, share: float) -> Any:
    """A rule for the proxy by which so large a share of all requests meets one of seven faults."""
    chosen = random.Random(seed)

    def rule(request: Request) -> Fault | None:
        if chosen.random() >= share:
            return None
        return chosen.choice((
            Fault(status=503, code="SlowDown"), Fault(status=500), Fault(status=500, applied=True), Fault(lost=True),
            Fault(lost=True, applied=True), Fault(cut=1), Fault(delay=0.5),
        ))  # fmt: skip

    return rule


async def _storm(way: Way, log: Log, keys: int, events: int, seed: int) -> None:
    """`events` times a worker is killed and replaced, or paused for up to two leases; then all may finish."""
    chosen = random.Random(seed)
    async with AsyncExitStack() as stack:

        async def start(number: int) -> Process:
            arguments = ("storm", str(log.path), str(keys), f"{seed}-{number}")
            return await stack.enter_async_context(
                python("serial_worker.py", way.storage, way.with_lease(LEASE), *arguments)
            )

        workers = [await start(number) for number in range(WORKERS)]
        resuming: set[asyncio.Task[None]] = set()
        paused: set[int] = set()

        async def resume(process: Process) -> None:
            await asyncio.sleep(chosen.random() * 2 * LEASE)
            paused.discard(process.pid)
            if process.returncode is None:
                with suppress(ProcessLookupError):  # it was faster, and has ended
                    os.kill(process.pid, signal.SIGCONT)

        for number in range(events):
            await asyncio.sleep(chosen.random() * 0.6)
            index = chosen.randrange(WORKERS)
            process = workers[index]
            if process.returncode is not None:
                assert process.returncode == 0
                continue
            if chosen.random() < 0.5 or process.pid in paused:
                process.kill()
                await process.wait()
                await log.write("killed", process.pid)
                workers[index] = await start(WORKERS + number)
            else:
                os.kill(process.pid, signal.SIGSTOP)
                await log.write("paused", process.pid)
                paused.add(process.pid)
                resuming.add(asyncio.create_task(resume(process)))
        async with asyncio.timeout(300):
            await asyncio.gather(*resuming)
            assert [await worker.wait() for worker in workers] == [0] * WORKERS
    values = await asyncio.to_thread(log.check, keys)
    async with Side(way) as fresh:
        for key in range(keys):
            assert await stormy(key) == values[key]
            name = str(await stormy.cache_key(key))
            if not await fresh.is_free(name):  # of one that was killed between its commit and its release
                assert not way.claims
                assert await fresh.locks.wait_until_free(name, timeout=3 * LEASE)


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(4))
async def test_storm(way: Way, tmp_path: Path, seed: int) -> None:
    """44: 1 000 keys, 4 workers, 100 times one is killed or paused; in a bucket 5 % of all requests fail as well.

    All keys are committed, each once: nobody ever gets another value for it. No lock is left.
    """
    log = Log(tmp_path / "log")
    if way.kind != "claims_s3":
        await _storm(way, log, 1000, 100, seed)
        return
    proxy = FaultProxy(s3_server().endpoint_url)
    proxy.rule = some_fail(seed, 0.05)
    async with proxy.running():
        await _storm(
            way._replace(
                storage=way.storage.replace(s3_server().endpoint_url, proxy.url),
                locks=way.locks.replace(s3_server().endpoint_url, proxy.url),
            ),
            log, 1000, 100, seed,
        )  # fmt: skip
