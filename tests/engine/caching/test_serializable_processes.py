"""SERIALIZABLE between processes: many at once, holders that are killed, holders that sleep past their lease."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
from asyncio.subprocess import Process
from collections import Counter, defaultdict
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import FaultProxy
from onceflow.engine import INPUTS, Settings, task
from onceflow.locking import LockTimeoutError
from processes import line, python
from redis_servers import RedisServer
from s3_servers import s3_server
from serial_ways import SHARED, Side, Way
from tcp_proxy import tcp_proxy
from until import until

KINDS = SHARED
LEASE = 0.6
SERIAL = INPUTS.configure(isolation_level="SERIALIZABLE")


ran: list[str] = []
"""The keys of the executions in this process."""


@task(cache_policy=SERIAL)
async def held(key: str) -> int:
    """The same key as the worker's task of this name."""
    ran.append(key)
    return os.getpid()


def worker(way: Way, command: str, *arguments: object, lease: float | None = None) -> Any:
    locks = way.locks if lease is None else way.with_lease(lease)
    return python("serial_worker.py", way.storage, locks, command, *map(str, arguments))


def resume(process: Process) -> None:
    os.kill(process.pid, signal.SIGCONT)


# --- contention


async def _contend(way: Way, log: Path, processes: int, keys: int, calls: int, seed: int) -> None:
    async with worker(way, "contend", log, processes, keys, calls, seed) as contending:
        assert await contending.wait() == 0
    text = await asyncio.to_thread(log.read_text)
    check([entry.split() for entry in text.splitlines()], processes, keys)


def check(entries: list[list[str]], processes: int, keys: int) -> None:
    """Never two at once, never once more after a commit, in order within a process, the same value for everybody."""
    inside: dict[str, str] = {}
    done: dict[str, str] = {}
    last: dict[tuple[str, str], int] = defaultdict(lambda: -1)
    values: dict[str, set[str]] = defaultdict(set)
    for what, pid, key, text in entries:
        if what == "value":
            values[key].add(text)
            continue
        if what == "enter":
            assert key not in inside, f"{pid} enters key {key} while {inside[key]} is inside"
            assert key not in done, f"{pid} enters key {key}, which {done[key]} has finished"
            assert int(text) > last[pid, key], f"{pid} came back to key {key} out of order"
            last[pid, key] = int(text)
            inside[key] = pid
        else:
            assert inside.pop(key) == pid
            if what == "done":
                done[key] = f"{pid}-{key}-{text}"
    assert not inside
    assert len(done) >= keys * 0.9  # a third fails each time
    for key, seen in values.items():
        assert seen == {done[key]}
    assert len({pid for _, pid, _, _ in entries}) > 1 or processes == 1


async def test_contention(way: Way, tmp_path: Path) -> None:
    """B7, 2: 8 processes, 4 calls of each key in each: never two at once, never twice for a committed key, in order."""
    await _contend(way, tmp_path / "log", 8, 4 if way.kind == "claims_s3" else 25, 4, 1)


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(50))
async def test_contention_at_length(way: Way, tmp_path: Path, seed: int) -> None:
    """B7, 2: 8 processes and 200 keys, 50 seeds."""
    await _contend(way, tmp_path / "log", 8, 200, 4, seed)


async def _wait_for_redis(tmp_path: Path, seconds: float) -> Counter[str]:
    """So long 800 runs in 4 processes wait for a key on Redis, then one body has run; what was sent in all."""
    server = await asyncio.to_thread(RedisServer)
    way = Way("redis", f"file://{tmp_path}/records", server.url, leased=True)
    go, inside = asyncio.Event(), asyncio.Event()

    @task(cache_policy=SERIAL)
    async def gated(key: str) -> int:
        inside.set()
        await go.wait()
        return -1

    def subscribed() -> bool:
        return server.commands().get("subscribe", 0) == 4

    try:
        async with Side(way), AsyncExitStack() as stack:
            holder = asyncio.create_task(gated("key"))
            await inside.wait()
            workers = [await stack.enter_async_context(worker(way, "many", "key", 200)) for _ in range(4)]
            for each in workers:
                assert await line(each) == ["waiting"]
            await until(lambda: asyncio.to_thread(subscribed))
            await asyncio.sleep(seconds)
            go.set()
            assert await holder == -1
            for each in workers:
                assert await line(each) == ["-1"]
        counts = await asyncio.to_thread(server.commands)
        return Counter({name: n for name, n in counts.items() if name not in ("ping", "hello", "config|get")})
    finally:
        await asyncio.to_thread(server.kill)


async def test_commands_while_many_wait(tmp_path: Path) -> None:
    """22: while 800 runs in 4 processes wait for a key on Redis, under 50 commands are sent, and one body runs."""
    sent = await _wait_for_redis(tmp_path, 0)
    assert sent.total() < 50, sent


@pytest.mark.chaos
async def test_commands_of_a_minute(tmp_path: Path) -> None:
    """22: a minute of it costs under 100 commands, the holder's renewals with them."""
    sent = await _wait_for_redis(tmp_path, 60)
    assert sent.total() < 100, sent


async def _wait_for_a_bucket(way: Way, seconds: float, most: int) -> None:
    """So long 250 runs in each of 4 processes wait for a key of a bucket, with so many requests of each at most."""
    server, go, inside = s3_server(), asyncio.Event(), asyncio.Event()

    @task(cache_policy=SERIAL)
    async def gated(key: str) -> int:
        inside.set()
        await go.wait()
        return -1

    async with (
        FaultProxy(server.endpoint_url).running() as proxy,
        Side(way),
        AsyncExitStack() as stack,
    ):
        holder = asyncio.create_task(gated("key"))
        await inside.wait()
        seen = way._replace(
            storage=way.storage.replace(server.endpoint_url, proxy.url),
            locks=way.locks.replace(server.endpoint_url, proxy.url),
        )
        workers = [await stack.enter_async_context(worker(seen, "many", "key", 250)) for _ in range(4)]
        for each in workers:
            assert await line(each) == ["waiting"]
        key = str(await gated.cache_key("key"))

        def sent() -> Counter[str]:
            return Counter(request.method for request in proxy.seen if key in request.path)

        await until(lambda: sent()["GET"] >= 2 * 4)
        proxy.reset_counts()
        await asyncio.sleep(seconds)
        looks = sent()
        go.set()
        assert await holder == -1
        for each in workers:
            assert await line(each) == ["-1"]
    assert looks.keys() <= {"GET"}
    assert looks["GET"] <= 4 * most


@pytest.mark.parametrize("way", ["claims_s3"], indirect=True)
async def test_requests_while_many_wait(way: Way) -> None:
    """22: while 1 000 runs in 4 processes wait for a key of a bucket, each process looks a few times, and only that."""
    await _wait_for_a_bucket(way, 1.0, 5)


@pytest.mark.chaos
@pytest.mark.parametrize("way", ["claims_s3"], indirect=True)
async def test_requests_of_a_minute(way: Way) -> None:
    """22: a minute in which 1 000 runs in 4 processes wait for a key of a bucket costs under 40 GETs a process."""
    await _wait_for_a_bucket(way, 60.0, 39)


# --- the dead, and those who sleep


async def test_killed_holder(way: Way) -> None:
    """B10, 4: when a holder is killed, a waiter goes on when its lease ends (files: at once), and no lock is left."""
    async with worker(way, "hold", "key", lease=LEASE) as holder, Side(way, LEASE) as side:
        assert await line(holder) == ["in"]
        waiters = [asyncio.create_task(held("key")) for _ in range(5)]
        await asyncio.sleep(0.1)
        assert not any(task.done() for task in waiters)
        holder.kill()
        await holder.wait()
        async with asyncio.timeout(1.0 if way.kind == "file" else LEASE * 1.3 + 4):
            assert [*await asyncio.gather(*waiters)] == [os.getpid()] * 5
        assert await side.is_free(str(await held.cache_key("key")))


async def test_paused_holder(way: Way, caplog: pytest.LogCaptureFixture) -> None:
    """B10, 5: a holder that sleeps past its lease publishes nothing; its caller gets what the other one published.

    A file lock is kept by the kernel for a sleeping holder: there the waiter waits for it.
    """
    if way.kind == "file":
        await _paused_holder_of_a_file(way)
        return
    async with worker(way, "hold", "key", lease=LEASE) as holder:
        assert await line(holder) == ["in"]
        os.kill(holder.pid, signal.SIGSTOP)
        async with Side(way, LEASE):
            async with asyncio.timeout(20):
                assert await held("key") == os.getpid()
            resume(holder)
            assert holder.stdin is not None
            holder.stdin.write(b"\n")
            assert await line(holder) == ["out", str(os.getpid())]
        async with Side(way) as fresh:
            assert await held("key") == os.getpid()
            assert await fresh.is_free(str(await held.cache_key("key")))


async def _paused_holder_of_a_file(way: Way) -> None:
    async with worker(way, "hold", "key") as holder:
        assert await line(holder) == ["in"]
        os.kill(holder.pid, signal.SIGSTOP)
        async with Side(way, settings=Settings(lock_timeout=0.3)):
            assert isinstance((await held.run_to_state("key")).error(), LockTimeoutError)
        async with Side(way):
            waiting = asyncio.create_task(held("key"))
            resume(holder)
            assert holder.stdin is not None
            holder.stdin.write(b"\n")
            assert await line(holder) == ["out", str(holder.pid)]
            assert await waiting == holder.pid


@pytest.mark.parametrize("way", ["redis"], indirect=True)
async def test_holder_that_is_cut_off(way: Way, redis_server: RedisServer) -> None:
    """B10: a holder that Redis hears no more of publishes nothing, though it reaches the records; others go on."""
    async with tcp_proxy(redis_server.port) as proxy:
        through = way._replace(locks=f"redis://127.0.0.1:{proxy.port}/0")
        async with worker(through, "hold", "key", lease=LEASE) as holder, Side(way, LEASE) as side:
            assert await line(holder) == ["in"]
            proxy.requests.clear()
            proxy.replies.clear()
            async with asyncio.timeout(10):
                assert await held("key") == os.getpid()
            proxy.requests.set()
            proxy.replies.set()
            assert holder.stdin is not None
            holder.stdin.write(b"\n")
            assert await line(holder) == ["out", str(os.getpid())]
            assert await side.is_free(str(await held.cache_key("key")))
    async with Side(way):
        assert await held("key") == os.getpid()


async def test_a_holder_that_sleeps_while_nobody_comes(way: Way) -> None:
    """A holder that has slept past its lease asks for the key again, and publishes what it has computed."""
    if way.kind == "file":
        pytest.skip("no lease")
    async with worker(way, "hold", "key", lease=LEASE) as holder:
        assert await line(holder) == ["in"]
        os.kill(holder.pid, signal.SIGSTOP)
        await asyncio.sleep(2 * LEASE)
        resume(holder)
        assert holder.stdin is not None
        holder.stdin.write(b"\n")
        assert await line(holder) == ["out", str(holder.pid)]
    async with Side(way):
        assert await held("key") == holder.pid


async def test_fork(way: Way) -> None:
    """91: a child forked inside a body is refused its parent's engine; the parent goes on, and is cached."""
    async with worker(way, "forks") as forking:
        assert await line(forking) == ["child", "0"]
        assert await line(forking) == ["child", "0"]
        assert await forking.wait() == 0


async def _struggle(way: Way, seed: int, rounds: int) -> None:
    """Holders are killed and paused at random moments; whoever waits goes on, and one value is published.

    Every execution is accounted for: the holder's, and one more where it was killed, or paused for too long.
    """
    chosen = random.Random(seed)
    for number in range(rounds):
        key = f"{seed}-{number}"
        ran.clear()
        async with AsyncExitStack() as stack:
            holder = await stack.enter_async_context(worker(way, "hold", key, lease=LEASE))
            assert await line(holder) == ["in"]
            await asyncio.sleep(chosen.random() * LEASE)
            killed = chosen.random() < 0.5
            os.kill(holder.pid, signal.SIGKILL if killed else signal.SIGSTOP)
            await stack.enter_async_context(Side(way, LEASE))
            calls = asyncio.gather(*(held(key) for _ in range(3)))
            if not killed:
                await asyncio.sleep(chosen.random() * 2 * LEASE)
                assert holder.stdin is not None
                holder.stdin.write(b"\n")
                resume(holder)
            async with asyncio.timeout(LEASE * 1.3 + 10):
                values = await calls
                assert values == [values[0]] * 3
                if not killed:
                    word, value = await line(holder)
                    assert word == "out"
        async with Side(way) as fresh:
            published = await held(key)
            assert published == values[0]
            assert killed or published == int(value)
            more = len(ran)
            assert more == (published == os.getpid())
            assert more == 1 if killed else way.leased or more == 0
            assert await fresh.is_free(str(await held.cache_key(key)))


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(10))
async def test_struggle(way: Way, seed: int) -> None:
    """B10, 4, 5: 10 × 20 holders killed or paused at random moments, for each way to lock."""
    await _struggle(way, seed, 20)


async def test_short_struggle(way: Way) -> None:
    """B10, 4, 5: two holders, one killed and one paused, at random moments."""
    await _struggle(way, 9, 2)


# --- the loop that renews


async def test_renewals_keep_a_claim(way: Way) -> None:
    """7: a body that takes four leases keeps its key, though another engine wants it all the time."""
    if way.kind == "file":
        pytest.skip("no lease")
    lease, inside = 0.3, asyncio.Event()

    @task(cache_policy=SERIAL)
    async def long(x: int) -> str:
        inside.set()
        await asyncio.sleep(4 * lease)
        return "first"

    @task(cache_policy=SERIAL, name="long")
    async def other(x: int) -> str:
        return "second"

    async def elsewhere() -> str:
        async with Side(way, lease):
            return await long(1)

    holder = asyncio.create_task(elsewhere())
    await inside.wait()
    async with Side(way, lease):
        assert await other(1) == "first"
    assert await holder == "first"


async def test_a_blocked_loop_is_told(way: Way, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    """10: a body that blocks the loop for longer than its lease is named in a warning; one result is published."""
    if way.kind == "file":
        pytest.skip("no lease")
    caplog.set_level(logging.WARNING, "onceflow")
    loop = asyncio.get_running_loop()
    shift = 0.0
    own_time = loop.time
    monkeypatch.setattr(loop, "time", lambda: own_time() + shift)

    @task(cache_policy=SERIAL, name="blocker")
    async def blocker(x: int) -> int:
        nonlocal shift
        shift = LEASE  # as if everything had stood still for so long
        await asyncio.sleep(0.05)
        return x

    async with Side(way, LEASE) as side:
        assert await blocker(1) == 1
        assert await side.is_free(str(await blocker.cache_key(1)))
    assert "stood still" in caplog.text
