"""Processes that are killed while they commit, others that read all the time, and what is left of it."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from onceflow.engine import Engine
from onceflow.storage import Storage, storage_from_url
from onceflow.storage._format.envelope import Header, unpack_header
from processes import line, python
from s3_servers import new_prefix, s3_bucket, s3_server
from transaction_worker import Reader, beside, keys_of

SIZES = (1, 2, 5)


@pytest.fixture
def local_url(tmp_path: Path) -> str:
    return f"file://{quote(str(tmp_path / 'records'))}"


@pytest.fixture
def s3_url(monkeypatch: pytest.MonkeyPatch) -> str:
    """Its server is started: that blocks, so it happens outside of the loop."""
    for name, value in s3_server().environment.items():
        monkeypatch.setenv(name, value)
    endpoint = quote(s3_server().endpoint_url, safe="")
    return f"s3://{s3_bucket()}/{new_prefix()}?endpoint_url={endpoint}"


@pytest.fixture(params=["local", "s3"])
def url(request: pytest.FixtureRequest) -> str:
    """The URL of an empty storage."""
    made: str = request.getfixturevalue(f"{request.param}_url")
    return made


@pytest.fixture
async def storage(url: str) -> AsyncIterator[Storage]:
    async with storage_from_url(url) as storage:
        yield storage


async def headers_in(storage: Storage, name: str) -> dict[str, Header]:
    """What lies there when nobody ends a transaction any more; the watching process may still be at it."""
    while True:
        keys = [stat.key async for stat in storage.list() if stat.key.startswith(name)]
        try:
            headers = {key: unpack_header(await storage.read(key))[0] for key in keys}
        except FileNotFoundError:
            continue
        if all(header.kind == "record" for header in headers.values()):
            return headers


async def all_keys(storage: Storage) -> set[str]:
    return {stat.key async for stat in storage.list()}


class Writers:
    """Forks a process for each commit, and says how it ended."""

    def __init__(self, process: Process) -> None:
        self._process = process

    async def commit(
        self, tasks: int, name: str, number: int, at: int, weight: int = 0, way: str = "plain"
    ) -> str:
        """Commit, killed instead of the `at`-th write; 0 rolls back."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{tasks} {name} {number} {at} {weight} {way}\n".encode())
        await self._process.stdin.drain()
        (ended,) = await line(self._process)
        return ended


@pytest.mark.parametrize("tasks", SIZES)
async def test_killed_at_every_write(url: str, storage: Storage, tmp_path: Path, tasks: int) -> None:
    """53, 54, 56, 59: a process killed at any write of a commit of 1, 2 and 5 tasks leaves all or nothing.

    Readers that look all the time see no mixed set, what was committed before stays until it is replaced, and
    once somebody has read the keys there is no intent and no other object left.
    """
    stop = tmp_path / "stop"
    last = 1 if tasks == 1 else 2 * tasks + 1
    async with AsyncExitStack() as stack:
        writers = Writers(await stack.enter_async_context(python("transaction_worker.py", "serve", url)))
        checker = await stack.enter_async_context(
            python("transaction_worker.py", "watch", url, "rising", "watched", str(tasks), str(stop))
        )
        assert await line(writers._process) == ["ready"]
        assert await line(checker) == ["ready"]
        reader = Reader(await stack.enter_async_context(Engine(storage=storage)))
        committed: int | None = 1
        assert await writers.commit(tasks, "watched", 1, at=1_000) == "exit0"
        for at in range(1, last + 2):
            ended = await writers.commit(tasks, "watched", at + 1, at)
            committed = await check(storage, reader, tasks, "watched", at, committed)
            assert ended == ("killed" if at <= last else "exit0")
        assert await writers.commit(tasks, "watched", 1_000, at=0) == "exit0"  # rolled back
        assert await check(storage, reader, tasks, "watched", 0, committed) == committed
        for at in range(1, last + 1):  # where nothing was committed before
            assert await writers.commit(tasks, f"new{at}", at + 1, at) == "killed"
            await check(storage, reader, tasks, f"new{at}", at, None)
        await asyncio.to_thread(stop.touch)
        report = await line(checker)
        assert report[0] == "reads", report
        assert int(report[1]) > 20


async def check(
    storage: Storage, reader: Reader, tasks: int, name: str, at: int, before: int | None
) -> int | None:
    """After a commit of `at + 1` that was killed instead of its `at`-th write: what is committed now, as it must be."""
    decided = at > (1 if tasks == 1 else tasks + 1)
    now = at + 1 if decided else before
    assert {await reader.read(key) for key in keys_of(tasks, name)} == {now}, at
    async with asyncio.timeout(5):
        headers = await headers_in(storage, f"{name}-{tasks}-")
    assert len(headers) == (0 if now is None else tasks)
    return now


@pytest.mark.parametrize("weight", [200_000])
async def test_killed_with_large_values(url: str, storage: Storage, weight: int) -> None:
    """63: values that lie apart go with the transaction that was aborted, and with the record that is replaced."""
    async with AsyncExitStack() as stack:
        writers = Writers(await stack.enter_async_context(python("transaction_worker.py", "serve", url)))
        assert await line(writers._process) == ["ready"]
        reader = Reader(await stack.enter_async_context(Engine(storage=storage)))
        keys = keys_of(2, "large")
        assert await writers.commit(2, "large", 1, 1_000, weight) == "exit0"
        committed: int | None = 1
        for at in range(1, 12):
            ended = await writers.commit(2, "large", at + 1, at, weight)
            values = {await reader.read(key) for key in keys}
            decided = at > 5  # two intents, two values, the decision
            assert values == {at + 1 if decided else committed}, at
            committed = at + 1 if decided else committed
            async with asyncio.timeout(5):
                headers = await headers_in(storage, "large-")
            assert len(headers) == 2
            values_there = await all_keys(storage) - set(keys)
            named = {header.location for header in headers.values()}
            assert named == values_there
            if ended == "exit0":
                break
        assert ended == "exit0"


WAYS = {"large": 200_000, "split": 10, "serializable": 0, "claims": 0, "stream": 10, "alone": 10}
"""How they commit, and the bytes of their values."""
TASKS = [pytest.param(1, marks=pytest.mark.chaos), 2, pytest.param(5, marks=pytest.mark.chaos)]


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("way", WAYS)
async def test_killed_at_every_write_whatever_the_way(
    local_url: str, tmp_path: Path, way: str, tasks: int
) -> None:
    """53, 54, 56, 63: as above, with values apart, in two storages, under locks, and with streams."""
    await walk(local_url, tmp_path, way, tasks)


@pytest.mark.chaos
@pytest.mark.parametrize("tasks", SIZES)
@pytest.mark.parametrize("way", WAYS)
async def test_killed_at_every_write_in_a_bucket(s3_url: str, tmp_path: Path, way: str, tasks: int) -> None:
    """53, 54, 56, 63: and the same in a bucket."""
    await walk(s3_url, tmp_path, way, tasks)


async def walk(url: str, tmp_path: Path, way: str, tasks: int) -> None:
    """Kill at the first write, at the second, and so on until it comes through; over records, and over nothing.

    A watching process must never see less than it has seen; what is there is of one commit, at last of the last; and
    a sweep leaves records and what they name, nothing else.
    """
    stop = tmp_path / "stop"
    form, weight = ("plain", WAYS[way]) if way == "large" else (way, WAYS[way])
    keys_url = beside(url) if way in ("split", "alone") else None
    watched = [keys_url] if keys_url is not None else []
    async with AsyncExitStack() as stack:
        writers = Writers(await stack.enter_async_context(python("transaction_worker.py", "serve", url)))
        checker = await stack.enter_async_context(
            python("transaction_worker.py", "watch", url, "rising", "old", str(tasks), str(stop), *watched)
        )
        assert await line(writers._process) == await line(checker) == ["ready"]
        storage = await stack.enter_async_context(storage_from_url(url))
        records = await stack.enter_async_context(storage_from_url(keys_url)) if keys_url else storage
        engine = await stack.enter_async_context(Engine(storage=storage, key_storage=records))
        reader = Reader(engine)
        for name, before in (("old", 1), ("new", None)):
            if before is not None:
                assert await writers.commit(tasks, name, before, 1_000, weight, form) == "exit0"
            ended, at, now = "killed", 0, before
            while ended == "killed":
                at += 1
                ended = await writers.commit(tasks, name, at + 1, at, weight, form)
                values = {await reader.read(key) for key in keys_of(tasks, name)}
                if way == "alone":  # each for itself, as far as it came
                    assert values <= {before, *range(2, at + 2)}, at
                    continue
                assert len(values) == 1, at
                assert values <= {now, at + 1}, at
                (now,) = values
            assert ended == "exit0"
            assert values == {at + 1}
        await asyncio.to_thread(stop.touch)
        report = await line(checker)
        assert report[0] == "reads" or way == "alone", report
        await engine.records.sweep(records, storage)
        await only_what_is_named(records, storage, reader)


@pytest.mark.parametrize(
    ("at", "outcome", "meanwhile", "then"),
    [
        (1, "committed", None, 7),
        (2, "refused False", None, None),
        (3, "refused False", None, None),
        (4, "committed", 7, 7),
    ],
    ids=["nothing written", "one intent", "two intents", "decided"],
)
async def test_a_writer_that_is_paused_past_its_lease(
    local_url: str, at: int, outcome: str, meanwhile: int | None, then: int | None
) -> None:
    """57: stopped at any write before the decision, and aborted when its lease is over, it is refused when it goes on.

    Stopped after it, it has committed, whatever others do meanwhile.
    """
    keys, passed = keys_of(2, "paused"), 0.0
    async with (
        storage_from_url(local_url) as storage,
        Engine(storage=storage) as engine,
        python("transaction_worker.py", "pause", local_url, "2", "paused", "7", str(at)) as writer,
    ):
        reader = Reader(engine)
        engine.records._carrier._clock = lambda: passed
        assert await line(writer) == ["ready"]
        await asyncio.to_thread(os.waitid, os.P_PID, writer.pid, os.WSTOPPED | os.WNOWAIT)
        for _ in range(3):  # seen, seen for longer than the lease, and ended
            assert {await reader.read(key) for key in keys} == {meanwhile}
            passed += 100
        writer.send_signal(signal.SIGCONT)
        assert await line(writer) == outcome.split()
        assert {await reader.read(key) for key in keys} == {then}
        assert len(await headers_in(storage, "paused")) == (0 if then is None else 2)


@pytest.mark.parametrize("weight", [pytest.param(0, marks=pytest.mark.chaos), 200_000])
@pytest.mark.parametrize("count", [20, pytest.param(50_000, marks=pytest.mark.chaos)])
async def test_killed_at_random(local_url: str, tmp_path: Path, weight: int, count: int) -> None:
    """53, 56, 63: killed at random moments of a commit of 5, 100 000 times: all or nothing, and nothing is left.

    A process that reads all the time never sees less than it has seen.
    """
    stop = tmp_path / "stop"
    async with (
        python("transaction_worker.py", "watch", local_url, "rising", "t", "5", str(stop)) as checker,
        python("transaction_worker.py", "trials", local_url, "5", "t", str(weight), str(count)) as killer,
        storage_from_url(local_url) as storage,
    ):
        outcome = await line(killer, within=60 + count / 5)
        assert outcome[0] == "killed", outcome
        assert int(outcome[1]) > count / 10  # the others had ended before
        await asyncio.to_thread(stop.touch)
        assert await line(checker) == ["ready"]
        report = await line(checker)
        assert report[0] == "reads", report
        async with Engine(storage=storage) as engine:
            await only_what_is_named(storage, storage, Reader(engine))


async def only_what_is_named(records: Storage, storage: Storage, reader: Reader) -> None:
    """Plain records, and the values and chunks that they name: no object more and none less."""
    everything = {(records.url, key) for key in await all_keys(records)}
    everything |= {(storage.url, key) for key in await all_keys(storage)}
    named: set[tuple[str, str]] = set()
    for url, key in everything:
        if url != records.url or key.startswith(("value-", "chunk-")):
            continue
        header = unpack_header(await records.read(key))[0]
        assert header.kind == "record"
        assert await reader.read(key) not in (None, "broken")
        named.add((url, key))
        if header.location is not None:
            named.add((storage.url, header.location))
        if "stream" in header.extra:
            chunks = [key for key in await all_keys(storage) if header.extra["stream"] in key]
            named |= {(storage.url, key) for key in chunks}
    assert everything == named


@pytest.mark.parametrize("seconds", [4, pytest.param(120, marks=pytest.mark.chaos)])
async def test_a_storm(url: str, storage: Storage, tmp_path: Path, seconds: int) -> None:
    """44, 53, 56: several processes commit the same keys and are killed at random moments; readers see whole sets."""
    stop = tmp_path / "stop"
    tasks, name = 5, "storm"

    async def writer() -> int:
        kills = 0
        while not stopped.is_set():
            async with python("transaction_worker.py", "storm", url, str(tasks), name) as process:
                await asyncio.sleep(random.uniform(0.6, 1.6))
                process.kill()
                kills += 1
        return kills

    stopped = asyncio.Event()
    async with AsyncExitStack() as stack:
        checkers: list[Any] = [
            await stack.enter_async_context(
                python("transaction_worker.py", "watch", url, "stable", name, str(tasks), str(stop))
            )
            for _ in range(1 if seconds < 10 else 2)
        ]
        for checker in checkers:
            assert await line(checker) == ["ready"]
        writers = [asyncio.create_task(writer()) for _ in range(2)]
        await asyncio.sleep(seconds)
        stopped.set()
        kills = sum(await asyncio.gather(*writers))
        await asyncio.to_thread(stop.touch)
        for checker in checkers:
            report = await line(checker, within=60)
            assert report[0] == "reads", report
            assert int(report[3]) > 0
        assert kills >= 2
        async with Engine(storage=storage) as engine:
            reader = Reader(engine)
            values = {await reader.read(key) for key in keys_of(tasks, name)}
            assert len(values) == 1
        async with asyncio.timeout(5):
            assert len(await headers_in(storage, name)) in (0, tasks)
