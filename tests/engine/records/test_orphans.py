# ruff: noqa: PT012 - a block of a transaction that is left by an exception has more than one statement
"""Values and chunks that no record names: none stays behind, and none that is needed goes."""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import pytest
from onceflow.engine import INPUTS, TASK_SOURCE, Engine, task, transaction
from onceflow.engine._commit.intents import Member, Writer, intent
from onceflow.engine._errors import CommitError
from onceflow.engine._records.chunks import CHUNK
from onceflow.engine._records.orphans import MINUTE, WEEK, Sweep, value_name
from onceflow.engine._records.record import Place
from onceflow.locking import StorageLockManager
from onceflow.storage import MemoryStorage, Stat, Storage, StorageUnavailableError
from onceflow.storage._format.envelope import Header, pack
from stored_records import keys_in
from transacting import Boom, engine, kind, load, nothing_ran, process, storage

__all__ = ["engine", "kind", "nothing_ran", "storage"]


@task(cache_policy=INPUTS + TASK_SOURCE)
async def parts(x: int) -> AsyncIterator[bytes]:
    for number in range(3):
        yield bytes([x, number]) * (CHUNK // 2)


@task(cache_policy=INPUTS + TASK_SOURCE)
async def large(x: int) -> bytes:
    return bytes([x]) * 300_000


async def apart_in(storage: Storage) -> list[str]:
    return [key for key in await keys_in(storage) if key.startswith(("value-", "chunk-"))]


async def replay(x: int) -> str:
    """Read the stream to its end; how it ended."""
    values = parts(x)
    assert [value[:2] async for value in values] == [bytes([x, number]) for number in range(3)]
    assert values.state is not None
    return values.state.name


# --- what goes at once


async def test_a_stream_goes_with_its_block(engine: Engine, storage: Storage) -> None:
    """63: the chunks of streams that are rolled back, with their block or a savepoint in it, are removed."""

    @task
    async def fails(x: int) -> None:
        await replay(x)
        raise Boom

    with pytest.raises(Boom):
        async with transaction():
            await replay(1)
            async with transaction():
                await replay(2)
            raise Boom
    assert await keys_in(storage) == []
    async with transaction():
        with pytest.raises(Boom):
            await fails(3)
        async with transaction() as inner:
            await replay(4)
            inner.rollback()
            await replay(5)
        await replay(6)
        assert await replay(6) == "Cached"
        await parts.with_options(refresh_cache=True)(6)
        await replay(7)
        assert await parts.invalidate(7)
    assert len(await apart_in(storage)) == 3  # of the latest run of 6
    assert await replay(6) == "Cached"


async def test_a_stream_goes_with_its_record(engine: Engine, storage: Storage) -> None:
    """63: the chunks of a record that is replaced, alone or in a block, or invalidated, are removed."""
    anew = parts.with_options(refresh_cache=True)
    await replay(1)
    chunks = await apart_in(storage)
    await anew(1)
    replaced = await apart_in(storage)
    assert len(replaced) == len(chunks) == 3
    assert not {*chunks} & {*replaced}
    async with transaction():
        await anew(1)
        await load(1)
    assert len(await apart_in(storage)) == 3
    assert await replay(1) == "Cached"
    assert await parts.invalidate(1)
    assert await apart_in(storage) == []


async def test_an_answer_that_was_lost(engine: Engine) -> None:
    """B12: a single record whose write was carried out without an answer is committed, and its block says so."""

    class Deaf(MemoryStorage):
        is_deaf = applies = False

        async def write(self, key: str, data: Any, **conditions: Any) -> str:
            if self.is_deaf and not self.applies:
                raise StorageUnavailableError("write", key, self.url, "it is away", "Try later.")
            version = await super().write(key, data, **conditions)
            if self.is_deaf:
                raise StorageUnavailableError("write", key, self.url, "it is away", "Try later.")
            return version

        async def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
            if self.is_deaf and self.applies is None:
                raise StorageUnavailableError("read", key, self.url, "it is away", "Try later.")
            return await super().read(key, start, stop)

    for applies in (True, False):
        deaf = Deaf()
        deaf.is_deaf, deaf.applies = True, applies
        elsewhere = load.with_options(result_storage=deaf)
        try:
            async with transaction() as txn:
                await elsewhere(1)
        except CommitError:
            assert not applies
        assert txn.is_committed() == applies
        deaf.is_deaf = False
        assert bool(await elsewhere.explain(1)) == applies


# --- what a kill leaves


class Killed(BaseException):
    pass


class Mortal(MemoryStorage):
    """Memory that dies with its n-th write: nothing of it is carried out any more until it is revived."""

    left = 0

    async def write(self, key: str, *args: Any, **options: Any) -> str:
        self._live()
        return await super().write(key, *args, **options)

    async def delete(self, key: str, *args: Any, **options: Any) -> bool:
        self._live()
        return await super().delete(key, *args, **options)

    def _live(self) -> None:
        self.left -= 1
        if -1_000 < self.left <= 0:
            raise Killed


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("split", [False, True])
async def test_a_sweep_after_any_write(members: int, split: bool) -> None:
    """63: whichever write a commit dies at, a sweep that reads nothing else before leaves whole records only."""
    at, is_over = 0, False
    while not is_over:
        at += 1
        storage = Mortal(f"test-{uuid4().hex}")
        keys = MemoryStorage() if split else storage
        storage.left = 10_000
        async with Engine(storage=storage, key_storage=keys) as engine:
            await large(1)  # in one object, or two
            storage.left = at
            try:
                async with transaction():
                    await parts(1)
                    for x in range(1, members):
                        await large.with_options(refresh_cache=True)(x)
                is_over = True
            except Killed:
                pass
            storage.left = 10_000
            gc.collect()  # a run that could still commit keeps its chunks
            await engine.records.sweep(keys, storage)
            named = 0
            for call in (parts.explain(1), *(large.explain(x) for x in range(1, max(2, members)))):
                named += bool(await call)
            if bool(await parts.explain(1)):
                assert await replay(1) == "Cached"
            assert await large(1) == bytes([1]) * 300_000
            for _ in range(2):
                records = [key for key in await keys_in(keys) if key not in await apart_in(keys)]
                assert len(records) == named
                await engine.records.sweep(keys, storage)
    assert at > 4


async def test_an_engine_sweeps_when_it_ends(storage: Storage) -> None:
    """63: an engine that has itself written values apart removes, when it ends, what others have left there."""
    place = Place(storage, None, None)  # type: ignore[arg-type]  # no value is written here
    orphans = [value_name(place, "a" * 64), value_name(place, "a key / of any kind")]
    for name in orphans:
        await storage.write(name, b"value")
    async with Engine(storage=storage):
        await load(1)
    assert {*await apart_in(storage)} == {*orphans}
    async with Engine(storage=storage, clock=lambda: time.time() + 2 * MINUTE):
        async with transaction():
            await large(1)
        (kept,) = {*await apart_in(storage)} - {*orphans}
    assert await apart_in(storage) == [kept]
    async with Engine(storage=storage):
        assert (await large.run_to_state(1)).name == "Cached"


async def test_what_cannot_be_listed_is_left(caplog: pytest.LogCaptureFixture) -> None:
    """An engine ends well where it may not list; the sweep is left to others."""

    class Blind(MemoryStorage):
        def list(self, prefix: str = "") -> AsyncIterator[Stat]:
            raise StorageUnavailableError("list", prefix, self.url, "you may not list", "Ask for the right.")

    caplog.set_level("INFO", "onceflow")
    async with Engine(storage=Blind()), transaction():
        await large(1)
    assert "were not looked for" in caplog.text


# --- what stays


async def sweep(storage: Storage, *, keys: Storage | None = None, age: float = 0.0) -> int:
    """Remove what no record names, as seen when it is `age` seconds old."""
    async with Engine(storage=storage, clock=lambda: time.time() + age) as engine:
        return await engine.records.sweep(keys or storage, storage)


async def test_what_a_living_writer_needs_stays(engine: Engine, storage: Storage) -> None:
    """60: a sweep during a block, and while a stream is open, removes nothing of theirs, however old it is."""
    async with transaction():
        await replay(1)
        values = parts(2)
        await anext(values)
        await anext(values)
        assert len(await apart_in(storage)) == 5
        assert await sweep(storage, age=10 * WEEK) == 0
        assert [value async for value in values]
        await large(3)
    assert await sweep(storage, age=10 * WEEK) == 0
    assert [await replay(1), await replay(2)] == ["Cached", "Cached"]
    assert (await large.run_to_state(3)).name == "Cached"


def written_by(name: str, host: str | None = None, pid: int | None = None, started: str | None = None) -> str:
    """The name, as another process would have given it."""
    beginning, _, process = name.rpartition("-")
    old_host, old_pid, old_started = process.split(".")
    return f"{beginning}-{host or old_host}.{pid or old_pid}.{old_started if started is None else started}"


async def test_what_a_living_process_has_written_stays() -> None:
    """60: values of a process of this machine stay while it lives, and go when it is dead, whoever has its id now."""
    storage = MemoryStorage(f"test-{uuid4().hex}")
    name = value_name(Place(storage, None, None), "key")  # type: ignore[arg-type]
    other = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "input()", stdin=asyncio.subprocess.PIPE
    )
    try:
        await storage.write(written_by(name, pid=other.pid, started=""), b"value")
        await storage.write(
            written_by(name, pid=other.pid, started="1"), b"of an earlier process with its id"
        )
        assert await sweep(storage, age=10 * WEEK) == 1
    finally:
        other.kill()
        await other.wait()
    assert await sweep(storage) == 1


async def test_what_an_unknown_process_has_written_stays_a_week() -> None:
    """60: of a process elsewhere nothing is known, so its values stay for a week."""
    storage = MemoryStorage(f"test-{uuid4().hex}")
    name = value_name(Place(storage, None, None), "key")  # type: ignore[arg-type]
    await storage.write(written_by(name, host="01234567"), b"value")
    assert await sweep(storage, age=WEEK - 10) == 0
    assert await sweep(storage, age=WEEK + 10) == 1


async def test_on_shared_storage_a_request_may_be_on_its_way() -> None:
    """60: on shared storage a value stays for a minute, since its writer's last request may still arrive."""

    class Shared(MemoryStorage):
        shared = True

    storage = Shared(f"test-{uuid4().hex}")
    await storage.write(value_name(Place(storage, None, None), "key"), b"value")  # type: ignore[arg-type]
    assert await sweep(storage, age=MINUTE - 10) == 0
    assert await sweep(storage, age=MINUTE + 10) == 1


async def test_what_may_be_named_stays() -> None:
    """60: where a claim or what cannot be read lies under its key, and if its records lie elsewhere, a value stays."""
    storage, keys = MemoryStorage(f"test-{uuid4().hex}"), MemoryStorage(f"test-{uuid4().hex}")
    here = Place(storage, None, None)  # type: ignore[arg-type]
    for number, data in enumerate(
        (b"torn", b"".join(pack(Header("k", kind="claim", serializer="claim"), [b""])))
    ):
        key = f"{number}" * 64
        await storage.write(value_name(here, key), b"value")
        await storage.write(key, data)
    await storage.write(value_name(here._replace(key_storage=keys), "k"), b"value")
    await storage.write("value-of-the-user", b"mine")
    assert await sweep(storage) == 0
    assert await sweep(storage, keys=keys) == 1
    assert len(await apart_in(storage)) == 3


async def test_values_of_a_transaction_that_others_have_not_settled(engine: Engine) -> None:
    """60: what a decided intent names in its new record is needed; so it is in the old one of an undecided one."""
    storage = Mortal(f"test-{uuid4().hex}")
    storage.left = 10_000
    here = large.with_options(result_storage=storage)
    async with transaction():
        await here(1)
        await here(2)
    for at in range(1, 12):
        storage.left = at
        try:
            async with transaction():
                await here.with_options(refresh_cache=True)(1)
                await here.with_options(refresh_cache=True)(2)
        except Killed:
            pass
        storage.left = 10_000
        await Sweep(engine.records._carrier, (), storage, storage).some()
        assert len(await apart_in(storage)) == 2
        assert [(await here.run_to_state(x)).name for x in (1, 2)] == ["Cached", "Cached"], at


async def test_values_of_a_transaction_that_is_under_way_elsewhere() -> None:
    """60: what the intent of somebody who may be alive names, in either half, stays."""
    storage = MemoryStorage(f"test-{uuid4().hex}")
    names = [value_name(Place(storage, None, None), "k") for _ in range(2)]  # type: ignore[arg-type]
    new, old = (
        b"".join(pack(Header("k", location=name, extra={"own": True}), [b"value"])[:1]) for name in names
    )
    member = Member((storage.url, "k"), new)
    member.old = old
    for name in names:
        await storage.write(name, b"value")
    await storage.write("k", intent(Writer("tx", 30.0, ("elsewhere", "", 1, "")), [member], 0))
    assert await sweep(storage, age=10 * WEEK) == 0
    await storage.write("k", new)
    assert await sweep(storage) == 1
    assert await apart_in(storage) == names[:1]


async def test_a_claimed_key_of_a_stream(storage: Storage) -> None:
    """60: a stream that runs under a claim keeps its chunks, and names them when it is committed."""
    policy = (INPUTS + TASK_SOURCE).configure(
        isolation_level="SERIALIZABLE", lock_manager=StorageLockManager(storage)
    )
    held = parts.with_options(cache_policy=policy)
    async with Engine(storage=storage):
        values = held(1)
        await anext(values)
        await anext(values)
        assert await sweep(storage, age=10 * WEEK) == 0
        assert len([value async for value in values]) == 1
        assert len(await held(1)) == 3
        assert (await process.run_to_state(1)).name == "Completed"
