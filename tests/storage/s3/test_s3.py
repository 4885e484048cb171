"""What S3Storage does beyond the contract of all storages: requests, large objects, loops, processes."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import hashlib
import json
import os
import pickle
import subprocess
import sys
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from fault_proxy import Fault, FaultProxy
from onceflow.storage import (
    ObjectExistsError,
    ObjectNotFoundError,
    S3Storage,
    StorageClosedError,
    StorageConfigurationError,
    VersionMismatchError,
)
from s3_servers import Server, new_prefix, s3_bucket, s3_server

MIB = 1024 * 1024
PART = 5 * MIB


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    for name, value in s3_server().environment.items():
        monkeypatch.setenv(name, value)
    s3_bucket()  # made here, outside of any loop, because it blocks
    return s3_server()


@pytest.fixture
async def proxy(server: Server) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(server.endpoint_url).running() as running:
        yield running


@pytest.fixture
async def bucket(proxy: FaultProxy) -> AsyncIterator[S3Storage]:
    """A storage behind the proxy, with parts as small as S3 allows."""
    storage = S3Storage(s3_bucket(), new_prefix(), endpoint_url=proxy.url, part_size=PART, concurrency=3)
    async with storage:
        yield storage


async def chunks(data: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


async def uploads(storage: S3Storage) -> list[str]:
    client = (await storage._bucket.clients.get()).client
    found = await client.list_multipart_uploads(Bucket=storage._bucket.name, Prefix=storage._root)
    return [upload["Key"] for upload in found.get("Uploads", ())]


# Requests


async def test_each_small_operation_is_the_fewest_requests(bucket: S3Storage, proxy: FaultProxy) -> None:
    """A write is one PUT, a read one GET, a stat one HEAD, a listing one GET; conditions add nothing."""
    await bucket.ensure_conditional()  # once a process, and not counted here
    proxy.reset_counts()
    version = await bucket.write("key", b"value")
    assert proxy.counts == {"PUT": 1}
    proxy.reset_counts()
    assert await bucket.read("key") == b"value"
    assert proxy.counts == {"GET": 1}
    assert await bucket.fetch("key", unless=version) is None
    assert await bucket.read("key", 1, 3) == b"al"
    assert proxy.counts == {"GET": 3}
    proxy.reset_counts()
    assert (await bucket.stat("key")) is not None
    assert proxy.counts == {"HEAD": 1}
    proxy.reset_counts()
    assert [stat.key async for stat in bucket.list()] == ["key"]
    assert proxy.counts == {"GET": 1}
    proxy.reset_counts()
    await bucket.write("key", b"next", if_version=version)
    await bucket.write("new", b"first", if_absent=True)
    assert proxy.counts == {"PUT": 2}
    proxy.reset_counts()
    with pytest.raises(ObjectNotFoundError):
        await bucket.read("absent")
    assert proxy.counts == {"GET": 1}


async def test_a_small_put_does_not_wait_to_be_invited(bucket: S3Storage, proxy: FaultProxy) -> None:
    """Only large bodies ask `Expect: 100-continue` first: for a small one it is a wasted round trip."""
    await bucket.write("small", b"value")
    await bucket.write("large", bytes(MIB))
    assert ["expect" in request.headers for request in proxy.seen] == [False, True]


async def test_an_empty_object_and_empty_ranges(bucket: S3Storage) -> None:
    """Nothing is a value like any other, and a range behind the end is empty, with version and size."""
    version = await bucket.write("empty", b"")
    stored = await bucket.fetch("empty")
    assert stored == (b"", version, 0)
    assert await bucket.fetch("empty", 0, 10) == (b"", version, 0)
    assert await bucket.fetch("empty", 0, 10, unless=version) is None
    version = await bucket.write("five", b"12345")
    assert await bucket.fetch("five", 7) == (b"", version, 5)
    assert await bucket.fetch("five", 2, 2) == (b"", version, 5)
    assert await bucket.fetch("five", 3, 100) == (b"45", version, 5)
    with pytest.raises(ValueError, match="beginning"):
        await bucket.fetch("five", -1)


async def test_listings_go_over_all_pages(server: Server) -> None:
    """S15: more keys than one page holds are listed, each once, and others' objects are not."""
    prefix = new_prefix()
    async with S3Storage(s3_bucket(), prefix, endpoint_url=server.endpoint_url) as storage:
        keys = {f"{number:04}" for number in range(1050)}
        await asyncio.gather(*(storage.write(key, b"") for key in keys))
        client = (await storage._bucket.clients.get()).client
        await client.put_object(Bucket=s3_bucket(), Key=f"{prefix}/.hidden", Body=b"")
        await client.put_object(Bucket=s3_bucket(), Key=f"{prefix}-sibling/0000", Body=b"")
        listed = [stat.key async for stat in storage.list()]
        assert len(listed) == len(keys)
        assert set(listed) == keys
        assert len([stat async for stat in storage.list("104")]) == 10


async def test_overlapping_prefixes_share_nothing(bucket: S3Storage, proxy: FaultProxy) -> None:
    """B30: storages under `a`, `ab`, `a/b` and their root list, see and delete nothing of each other's.

    What lies deeper in the bucket is not even sent.
    """
    root = bucket._options.prefix
    async with contextlib.AsyncExitStack() as stack:
        storages = {
            name: await stack.enter_async_context(
                S3Storage(s3_bucket(), f"{root}{name}", endpoint_url=proxy.url)
            )
            for name in ("", "/a", "/ab", "/a/b")
        }
        for name, storage in storages.items():
            for key in ("a", "a/b", "b", f"own{name}"):
                await storage.write(key, name.encode())
        client = (await bucket._bucket.clients.get()).client
        for number in range(3):
            await client.put_object(Bucket=s3_bucket(), Key=f"{root}/a/deeper/{number}", Body=b"")
        for name, storage in storages.items():
            assert sorted([stat.key async for stat in storage.list()]) == ["a", "a/b", "b", f"own{name}"]
            assert sorted([stat.key async for stat in storage.list("a")]) == ["a", "a/b"]
            assert await storage.read("a/b") == name.encode()
        page = await client.list_objects_v2(Bucket=s3_bucket(), Prefix=f"{root}/", Delimiter="/")
        assert len(page["Contents"]) == 4
        assert all("delimiter=%2F" in seen.path for seen in proxy.seen if "list-type" in seen.path)
        for key in ("a", "a/b", "b"):
            assert await storages["/a"].delete(key)
        for name in ("", "/ab", "/a/b"):
            assert len([stat async for stat in storages[name].list()]) == 4


# Versions and conditions


async def test_versions_are_unique_and_listed_ones_are_accepted(bucket: S3Storage) -> None:
    """The same bytes written twice have two versions; the shorter version of a listing is good for conditions."""
    first = await bucket.write("key", b"same")
    second = await bucket.write("key", b"same")
    assert first != second
    with pytest.raises(VersionMismatchError):
        await bucket.fetch("key", if_version=first)
    with pytest.raises(VersionMismatchError):
        await bucket.delete("key", if_version=first)
    (listed,) = [stat async for stat in bucket.list()]
    assert (await bucket.fetch("key", if_version=listed.version)) == (b"same", second, 4)
    third = await bucket.write("key", b"other", if_version=listed.version)
    with pytest.raises(VersionMismatchError):
        await bucket.write("key", b"late", if_version=second)
    assert await bucket.delete("key", if_version=third)
    assert not await bucket.delete("key", if_version=third)


async def test_a_foreign_object_can_be_read_and_replaced(bucket: S3Storage) -> None:
    """An object that somebody else put there has a version, too: its entity tag alone."""
    client = (await bucket._bucket.clients.get()).client
    await client.put_object(Bucket=bucket._bucket.name, Key=f"{bucket._root}theirs", Body=b"their bytes")
    stored = await bucket.fetch("theirs")
    assert stored is not None
    assert stored.version == hashlib.md5(b"their bytes", usedforsecurity=False).hexdigest()
    await bucket.write("theirs", b"ours", if_version=stored.version)


async def test_what_is_no_version_matches_nothing(bucket: S3Storage, proxy: FaultProxy) -> None:
    """A text that no store ever gave is another version, in every operation; it gets into no header."""
    await bucket.write("key", b"value")
    proxy.reset_counts()
    for odd in ("", "ü", "a\r\nx-evil: 1", "\0", "|", "\ud800"):
        stored = await bucket.fetch("key", unless=odd)
        assert stored is not None
        assert stored.data == b"value"
        for refused in (
            bucket.fetch("key", if_version=odd),
            bucket.write("key", b"late", if_version=odd),
            bucket.delete("key", if_version=odd),
        ):
            with pytest.raises(VersionMismatchError):
                await refused
    assert await bucket.read("key") == b"value"
    assert not any("x-evil" in request.headers for request in proxy.seen)
    assert proxy.counts["GET"] == 13


CREATORS = """
import asyncio, json, sys
from onceflow.storage import ObjectExistsError, S3Storage

async def main():
    url, bucket, prefix, rounds, tasks = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
    async with S3Storage(bucket, prefix, endpoint_url=url, max_connections=tasks) as storage:
        async def create(number, task):
            try:
                await storage.write(f"round-{number}", f"{sys.argv[6]}-{task}".encode(), if_absent=True)
            except ObjectExistsError:
                return 0
            return 1
        await asyncio.gather(*(storage.stat(f"warm-{task}") for task in range(tasks)))
        won = []
        for number in range(rounds):
            print("ready", flush=True)
            await asyncio.to_thread(sys.stdin.readline)
            won.append(sum(await asyncio.gather(*(create(number, task) for task in range(tasks)))))
        print(json.dumps(won))

asyncio.run(main())
"""


@pytest.mark.parametrize("rounds", [5, pytest.param(50, marks=pytest.mark.chaos)])
def test_of_64_creators_in_four_processes_one_wins(server: Server, tmp_path: Path, rounds: int) -> None:
    """64 only-if-absent writes of one key, from four processes at once: exactly one wins, each time."""
    script = tmp_path / "creators.py"
    script.write_text(CREATORS)
    arguments = [
        sys.executable,
        str(script),
        server.endpoint_url,
        s3_bucket(),
        new_prefix(),
        str(rounds),
        "16",
    ]
    processes = [
        subprocess.Popen(
            [*arguments, str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_environment(),
        )
        for number in range(4)
    ]
    try:
        for _ in range(rounds):
            assert [process.stdout.readline() for process in processes if process.stdout] == ["ready\n"] * 4
            for process in processes:
                assert process.stdin is not None
                process.stdin.write("go\n")
                process.stdin.flush()
        won = [json.loads(process.communicate(timeout=60)[0]) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [sum(wins) for wins in zip(*won, strict=True)] == [1] * rounds


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[3] / ".dev")}


# Large objects


@pytest.mark.parametrize("size", [PART - 1, PART, PART + 1, 3 * PART, 3 * PART + 17])
async def test_sizes_around_the_part_size_come_back(bucket: S3Storage, size: int) -> None:
    """An object of any size comes back byte by byte, whether it went up as buffers or as a stream."""
    data = os.urandom(size)
    half = memoryview(data)[: size // 2]
    await bucket.write("buffers", [half, data[size // 2 :]])
    await bucket.write("stream", chunks(data, 700_001))
    for key in ("buffers", "stream"):
        stored = await bucket.fetch(key)
        assert stored is not None
        assert stored.size == size
        assert stored.data == data
        assert await bucket.read(key, 10, size - 10) == data[10 : size - 10]
    assert await uploads(bucket) == []


async def test_a_large_object_is_asked_for_once(bucket: S3Storage, proxy: FaultProxy) -> None:
    """The first answer reads on from the front and ranges fill from the back: no part is requested twice."""
    data = os.urandom(4 * PART)
    await bucket.write("large", data)
    assert proxy.counts.pop("HEAD", 0) <= 1  # Ceph RGW completes without telling the entity tag
    assert proxy.counts == {"POST": 2, "PUT": 4}
    proxy.reset_counts()
    target = bytearray(len(data) + 5)
    stored = await bucket.fetch("large", into=target)
    assert stored is not None
    assert stored.data == data
    assert target[: len(data)] == data
    assert set(proxy.counts) == {"GET"}
    assert proxy.counts["GET"] <= 4
    ranges = [request.headers.get("range") for request in proxy.seen]
    assert len(set(ranges)) == len(ranges)


async def test_into_takes_what_fits(bucket: S3Storage) -> None:
    """A smaller buffer is filled, and the object's whole size told; a larger one is cut to what was read."""
    await bucket.write("key", b"0123456789")
    small, large = bytearray(4), bytearray(20)
    stored = await bucket.fetch("key", 2, into=small)
    assert stored is not None
    assert bytes(stored.data) == bytes(small) == b"2345"
    assert stored.size == 10
    stored = await bucket.fetch("key", into=memoryview(large))
    assert stored is not None
    assert bytes(stored.data) == b"0123456789"


async def test_large_conditional_writes(bucket: S3Storage) -> None:
    """Conditions hold for parts as for a single PUT: what is there is untouched, and nothing is left over."""
    old, new = os.urandom(2 * PART), os.urandom(2 * PART)
    version = await bucket.write("key", old, if_absent=True)
    with pytest.raises(ObjectExistsError):
        await bucket.write("key", new, if_absent=True)
    # Some stores, such as Ceph RGW 16, judge conditions of a PUT only: there a stream would be refused.
    in_parts = await bucket._conditions.multipart_honoured()
    with pytest.raises(VersionMismatchError):
        await bucket.write("key", chunks(new, MIB) if in_parts else new, if_version="0" * 32)
    assert await bucket.read("key") == old
    await bucket.write("key", chunks(new, MIB) if in_parts else new, if_version=version)
    assert await bucket.read("key") == new
    assert await uploads(bucket) == []


async def test_large_writers_race_and_one_wins(bucket: S3Storage) -> None:
    """Of several large only-if-absent writes at once, which all saw nothing there, one is stored, whole."""
    await bucket._conditions.multipart_honoured()
    values = [bytes([number]) * (PART + 1) for number in range(4)]
    results = await asyncio.gather(
        *(bucket.write("key", value, if_absent=True) for value in values), return_exceptions=True
    )
    winners = [value for value, result in zip(values, results, strict=True) if isinstance(result, str)]
    assert len(winners) == 1
    assert all(isinstance(result, str | ObjectExistsError) for result in results)
    assert await bucket.read("key") == winners[0]
    assert await uploads(bucket) == []


async def test_a_failing_source_leaves_nothing(bucket: S3Storage) -> None:
    """A stream that breaks off fails the write with its own error; the old object stays, the upload is aborted."""

    async def breaking() -> AsyncIterator[bytes]:
        yield bytes(2 * PART)
        raise LookupError("the source broke")

    await bucket.write("key", b"old")
    with pytest.raises(LookupError):
        await bucket.write("key", breaking())
    assert await bucket.read("key") == b"old"
    assert await uploads(bucket) == []


async def test_a_write_cancelled_anywhere_leaves_old_or_new(bucket: S3Storage, proxy: FaultProxy) -> None:
    """B19: cancelled when its nth request has been sent, for every n, a large write leaves old or new, no upload."""
    old, new = b"old", os.urandom(3 * PART)
    for nth in range(1, 7):
        await bucket.write("key", old)
        proxy.reset_counts()
        reached = asyncio.Event()
        proxy.rule = lambda _, nth=nth, reached=reached: (  # type: ignore[misc]
            reached.set() if sum(proxy.counts.values()) >= nth else None
        )
        writing = asyncio.create_task(bucket.write("key", new))
        waiting = asyncio.create_task(reached.wait())
        await asyncio.wait([writing, waiting], return_when=asyncio.FIRST_COMPLETED)
        writing.cancel()
        await asyncio.wait([writing])
        waiting.cancel()
        assert await bucket.read("key") in (old, new)
        assert await uploads(bucket) == []


@pytest.mark.parametrize("condition", [False, True])
async def test_a_large_read_is_of_one_version(bucket: S3Storage, proxy: FaultProxy, condition: bool) -> None:
    """Replaced while its parts are read, an object is read again; with a version asked for, that is refused."""
    before, after = bytes([1]) * (4 * PART), bytes([2]) * (4 * PART)
    version = await bucket.write("key", before)
    reached, until = asyncio.Event(), asyncio.Event()
    proxy.next("GET", Fault(), Fault(reached=reached, until=until))
    reading = asyncio.create_task(bucket.fetch("key", if_version=version if condition else None))
    await reached.wait()  # the range of a part is asked for, and the first answer is under way
    plain = S3Storage(s3_bucket(), bucket._options.prefix, endpoint_url=s3_server().endpoint_url)
    async with plain:
        await plain.write("key", after)
    until.set()
    if condition:
        with pytest.raises(VersionMismatchError):
            await reading
    else:
        stored = await reading
        assert stored is not None
        assert stored.data == after


async def test_a_large_read_holds_the_value_once(server: Server) -> None:
    """A large object is received into the buffer that is returned: beside it there is less than a part."""
    async with S3Storage(
        s3_bucket(), new_prefix(), endpoint_url=server.endpoint_url, part_size=PART
    ) as storage:
        await storage.write("large", bytes(6 * PART))
        target = bytearray(6 * PART)
        tracemalloc.start()
        try:
            await storage.fetch("large", into=target)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < PART


# Loops, threads, processes


def test_one_storage_serves_loops_one_after_the_other(server: Server) -> None:
    """Each asyncio.run gets a client of its own, closed with the loop: nothing is left 'unclosed'."""
    storage = S3Storage(s3_bucket(), new_prefix(), endpoint_url=server.endpoint_url)

    async def use(number: int) -> bytes:
        await storage.write("key", b"%d" % number)
        return await storage.read("key")

    for number in range(3):
        assert asyncio.run(use(number)) == b"%d" % number
    gc.collect()  # an unclosed session would warn now, and warnings are errors
    assert all(entry.client is None for entry in storage._bucket.clients._by_loop.values())


def test_one_storage_serves_loops_in_threads(server: Server) -> None:
    """Four loops in four threads use one storage at once, and closing it from one closes all clients."""
    storage = S3Storage(s3_bucket(), new_prefix(), endpoint_url=server.endpoint_url)

    async def use(number: int) -> list[bytes]:
        keys = [f"{number}-{index}" for index in range(10)]
        await asyncio.gather(*(storage.write(key, key.encode()) for key in keys))
        return await asyncio.gather(*(storage.read(key) for key in keys))

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda number: asyncio.run(use(number)), range(4)))
    assert results == [[f"{number}-{index}".encode() for index in range(10)] for number in range(4)]


async def test_closing_closes_the_clients_of_other_loops(server: Server) -> None:
    """aclose gives back the clients of every loop that runs, and is idempotent."""
    storage = S3Storage(s3_bucket(), new_prefix(), endpoint_url=server.endpoint_url)
    here = asyncio.get_running_loop()
    used, finish = asyncio.Event(), asyncio.Event()
    other: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def use() -> object:
        await storage.write("key", b"value")
        entry = await storage._bucket.clients.get()
        done = asyncio.Event()
        other.append((asyncio.get_running_loop(), done))
        here.call_soon_threadsafe(used.set)
        await done.wait()
        return entry.client

    thread = asyncio.create_task(asyncio.to_thread(asyncio.run, use()))
    await used.wait()
    await storage.aclose()
    await storage.aclose()
    loop, done = other[0]
    loop.call_soon_threadsafe(done.set)
    assert await thread is None
    finish.set()
    with pytest.raises(StorageClosedError):
        await storage.read("key")
    fresh = pickle.loads(pickle.dumps(storage))
    async with fresh:
        assert await fresh.read("key") == b"value"


async def test_cancelling_the_first_user_does_not_disturb_the_others(server: Server) -> None:
    """The client is opened by a task of its own: who waits for it may be cancelled, and the rest go on."""
    async with S3Storage(s3_bucket(), new_prefix(), endpoint_url=server.endpoint_url) as storage:
        first, second = (asyncio.create_task(storage.write(key, b"")) for key in "ab")
        await asyncio.sleep(0)
        first.cancel()
        assert await second


def test_a_forked_child_makes_its_own_client(server: Server) -> None:
    """A child forked while its parent had a client makes another one, and the parent's still works."""
    script = f"""
import asyncio, os, warnings
from onceflow.storage import S3Storage
storage = S3Storage({s3_bucket()!r}, {new_prefix()!r}, endpoint_url={server.endpoint_url!r})

async def parent():
    await storage.write("key", b"parent")
    warnings.simplefilter("ignore", DeprecationWarning)
    pid = os.fork()
    if not pid:
        try:
            asyncio._set_running_loop(None)
            asyncio.run(storage.write("key", b"child"))
        finally:
            os._exit(0)
    await asyncio.to_thread(os.waitpid, pid, 0)
    print((await storage.read("key")).decode())

asyncio.run(parent())
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=_environment(),
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("child\n", "")


async def test_more_tasks_than_connections_wait_their_turn(server: Server) -> None:
    """48: with two connections, 100 reads at once and four large ones end well: no queue takes their time."""
    storage = S3Storage(
        s3_bucket(), new_prefix(), endpoint_url=server.endpoint_url, max_connections=2, part_size=PART
    )
    async with storage:
        data = os.urandom(2 * PART)
        await storage.write("small", b"value")
        await storage.write("large", data)
        small = [storage.read("small") for _ in range(100)]
        large = [storage.read("large") for _ in range(4)]
        assert await asyncio.gather(*small, *large) == [b"value"] * 100 + [data] * 4


async def test_cancelled_requests_leave_the_pool_whole(server: Server) -> None:
    """R: 100 operations cancelled at odd moments do not use up connections or slots."""
    storage = S3Storage(s3_bucket(), new_prefix(), endpoint_url=server.endpoint_url, max_connections=3)
    async with storage:
        await storage.write("key", bytes(300_000))
        for number in range(100):
            task = asyncio.create_task(storage.read("key"))
            for _ in range(number % 25):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
        assert await asyncio.gather(*(storage.read("key") for _ in range(6))) == [bytes(300_000)] * 6


def test_without_asyncio_it_says_so() -> None:
    """88: where no asyncio runs, as under trio, each operation says what is needed, also at the end of a block."""

    async def use(act: Callable[[S3Storage], Awaitable[object]]) -> None:
        async with S3Storage("bucket", endpoint_url="http://127.0.0.1:1") as storage:
            await act(storage)

    acts: list[Callable[[S3Storage], Awaitable[object]]] = [
        lambda storage: storage.read("key"),
        lambda storage: storage.write("key", b"", if_absent=True),
        lambda storage: storage.stat("key"),
        lambda storage: storage.delete("key"),
        lambda storage: anext(storage.list()),
        lambda storage: storage.ensure_conditional(),
    ]
    for act in acts:
        with pytest.raises(StorageConfigurationError, match=r"s3://bucket.*asyncio.*trio"):
            use(act).send(None)  # as any other kernel of coroutines would begin it


def test_the_import_is_light() -> None:
    """Importing the package and making a storage loads neither aiobotocore nor aiohttp."""
    script = (
        "import sys; from onceflow.storage import S3Storage; S3Storage('bucket');"
        "print([name for name in ('aiobotocore', 'botocore', 'aiohttp') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=_environment())
    assert done.stdout == "[]\n", done.stderr


# Configuration


@pytest.mark.parametrize(
    "bucket", ["", "ab", "Upper", "under_score", "a..b", "10.0.0.1", "-x-", "x" * 64, "a/b"]
)
def test_bad_buckets_are_refused(bucket: str) -> None:
    """89: a bucket name that cannot be is refused at construction, and named."""
    with pytest.raises(StorageConfigurationError) as caught:
        S3Storage(bucket)
    assert repr(bucket) in str(caught.value)


@pytest.mark.parametrize("prefix", ["../other", "a/../b", "a//b", "./a", "a\nb", "x" * 600, "\ud800"])
def test_bad_prefixes_are_refused(prefix: str) -> None:
    """B30: a prefix that leads elsewhere, or could be read as such, is refused at construction."""
    with pytest.raises(StorageConfigurationError):
        S3Storage("bucket", prefix)


@pytest.mark.parametrize(
    "options",
    [
        {"endpoint_url": "127.0.0.1:9000"},
        {"endpoint_url": "ftp://host"},
        {"endpoint_url": "http://user:secret@host"},
        {"endpoint_url": "http://host:99999"},
        {"region_name": "eu central"},
        {"max_connections": 0},
        {"part_size": 1024},
        {"concurrency": 0},
        {"checksums": "always"},
        {"addressing_style": "none"},
        {"timeout": 0},
        {"timeout": float("nan")},
    ],
)
def test_bad_options_are_refused(options: dict[str, object]) -> None:
    """89: an option that cannot work is refused at construction, without showing a secret."""
    with pytest.raises(StorageConfigurationError) as caught:
        S3Storage("bucket", **options)  # type: ignore[arg-type]
    assert "secret" not in str(caught.value)


def test_the_url_and_the_pickle_make_an_equal_storage() -> None:
    """The URL and the pickle carry the whole configuration, and no credentials."""
    from onceflow.storage import storage_from_url

    storage = S3Storage(
        "bucket", "/team/ä b/", endpoint_url="https://s3.example.org:9000", region_name="eu-central-1",
        max_connections=7, part_size=PART, concurrency=3, checksums="when_required",
        addressing_style="virtual", timeout=2.5,
    )  # fmt: skip
    for copy in (storage_from_url(storage.url), pickle.loads(pickle.dumps(storage))):
        assert isinstance(copy, S3Storage)
        assert copy._options == storage._options
    assert S3Storage("bucket", "a").url == "s3://bucket/a"
    assert repr(S3Storage("bucket")) == "S3Storage('s3://bucket')"
    assert S3Storage.shared
