"""What is particular to LocalStorage: files, threads, processes, and what a disk can do to them."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import errno
import fcntl
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import storage_worker
from onceflow.storage import (
    LocalStorage,
    ObjectExistsError,
    ObjectNotFoundError,
    StorageAccessError,
    StorageConfigurationError,
    StorageError,
    StorageFullError,
    StorageUnavailableError,
    VersionMismatchError,
)
from onceflow.storage._local import reading as files
from onceflow.storage._local.errors import translated
from onceflow.storage._local.writing import DRAFT, PIECE
from until import until

KEY = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"


@pytest.fixture
async def local(tmp_path: Path) -> AsyncIterator[LocalStorage]:
    async with LocalStorage(tmp_path / "store") as storage:
        yield storage


def folder(storage: LocalStorage) -> Path:
    return Path(storage.path)


def drafts(path: Path) -> list[str]:
    return [name for name in os.listdir(path) if name.startswith(".")]


def start(work: str, storage: LocalStorage, *arguments: object) -> subprocess.Popen[str]:
    """Another process, under way."""
    command = [sys.executable, storage_worker.__file__, work, storage.url, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "under way\n"
    return process


def result(process: subprocess.Popen[str]) -> str:
    # Not communicate(): it reads the pipe itself, and misses what came with the line before and is buffered.
    with process:
        assert process.stdout is not None
        out = process.stdout.read()
    assert process.returncode == 0
    return out.strip()


# -- files ------------------------------------------------------------------------------------------------


async def test_the_file_is_named_by_the_key(local: LocalStorage) -> None:
    """S1: The file that holds an object is named exactly by its key, and holds exactly its bytes."""
    await local.write(KEY, b"content")
    assert (await asyncio.to_thread((folder(local) / KEY).read_bytes)) == b"content"
    assert await asyncio.to_thread(os.listdir, local.path) == [KEY]


async def test_only_the_owner_may_look(tmp_path: Path) -> None:
    """Folders that are made are 0700, files 0600, whatever the umask."""
    before = os.umask(0)
    try:
        async with LocalStorage(tmp_path / "a" / "b") as storage:
            await storage.write("key", b"")
            await storage.write("streamed", _pieces(b"x"))
    finally:
        os.umask(before)

    def modes() -> list[int]:
        paths = [tmp_path / "a", tmp_path / "a/b", tmp_path / "a/b/key", tmp_path / "a/b/streamed"]
        return [stat.S_IMODE(path.stat().st_mode) for path in paths]

    assert await asyncio.to_thread(modes) == [0o700, 0o700, 0o600, 0o600]


async def test_nothing_is_made_before_the_first_write(local: LocalStorage) -> None:
    """Reading, looking, listing and deleting make no folder."""
    assert await local.stat(KEY) is None
    assert await local.delete(KEY) is False
    assert [found async for found in local.list()] == []
    with pytest.raises(ObjectNotFoundError):
        await local.read(KEY)
    assert not await asyncio.to_thread(folder(local).exists)


async def test_the_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """K: Without a path, objects lie in ~/.onceflow/storage."""
    monkeypatch.setenv("HOME", str(tmp_path))
    async with LocalStorage() as storage:
        await storage.write(KEY, b"content")
    assert await asyncio.to_thread((tmp_path / ".onceflow/storage" / KEY).exists)


async def test_foreign_files_are_not_listed(local: LocalStorage) -> None:
    """Drafts, hidden files, folders, links and files with names that no key has are no objects."""
    await local.write("key", b"")

    def litter() -> None:
        for name in (".tmp-0", ".DS_Store", "a%zz", "backup~", "%41"):
            (folder(local) / name).touch()
        (folder(local) / "folder").mkdir()
        (folder(local) / "link").symlink_to("key")

    await asyncio.to_thread(litter)
    assert [found.key async for found in local.list()] == ["key"]


async def test_a_long_listing(local: LocalStorage) -> None:
    """S15: A listing of more entries than one hop takes has them all."""
    written = {f"{number:04}" for number in range(700)}
    await asyncio.gather(*(local.write(key, b"") for key in written))
    listed = [found.key async for found in local.list()]
    assert len(listed) == 700
    assert set(listed) == written


async def test_links_lead_nowhere(local: LocalStorage, tmp_path: Path) -> None:
    """S16: A link in the folder is not followed: reading refuses, writing and deleting take the link away."""
    outside = tmp_path / "outside"

    def plant() -> None:
        outside.write_bytes(b"secret")
        for name in ("one", "two"):
            (folder(local) / name).symlink_to(outside)

    await local.write("key", b"")
    await asyncio.to_thread(plant)
    for attempt in (local.read("one"), local.stat("one"), local.fetch("one", 0, 1)):
        with pytest.raises(StorageAccessError, match="no regular file"):
            await attempt
    await local.write("one", b"new")
    assert await local.read("one") == b"new"
    assert await local.delete("two")
    assert await asyncio.to_thread(outside.read_bytes) == b"secret"


async def test_a_folder_or_a_pipe_in_the_way(local: LocalStorage) -> None:
    """What is no regular file is refused by name, and a pipe without waiting for its writer."""
    await local.write("key", b"")
    await asyncio.to_thread(os.mkdir, folder(local) / "folder")
    await asyncio.to_thread(os.mkfifo, folder(local) / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(StorageAccessError, match=f"'{name}'.*no regular file.*Remove"):
            await local.read(name)
    with pytest.raises(StorageAccessError, match=r"'folder'.*no regular file"):
        await local.write("folder", b"")
    assert await asyncio.to_thread(drafts, folder(local)) == []


@contextlib.asynccontextmanager
async def held(file: Path) -> AsyncIterator[None]:
    """As another process holds an object that it replaces; it may be paused right then."""
    fd = await asyncio.to_thread(os.open, file, os.O_RDONLY)
    await asyncio.to_thread(fcntl.flock, fd, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(fd)


async def test_one_object_holds_up_no_other(local: LocalStorage) -> None:
    """While somebody is paused in the midst of replacing one object, the others are written and deleted."""
    await local.write("held", b"old")
    version = await local.write("other", b"old")
    async with held(folder(local) / "held"):
        blocked = asyncio.create_task(local.write("held", b"new"))
        for _ in range(20):
            version = await local.write("other", b"new", if_version=version)
        assert await local.delete("other", if_version=version)
        assert not blocked.done()
        assert await local.read("held") == b"old"
    await blocked
    assert await local.read("held") == b"new"


async def test_waiting_for_an_object_that_is_replaced(local: LocalStorage) -> None:
    """Who has waited for an object finds the one that took its place, and no condition holds any more."""
    file = folder(local) / "key"
    version = await local.write("key", b"old")
    async with held(file):
        conditional = asyncio.create_task(local.write("key", b"conditional", if_version=version))
        deleting = asyncio.create_task(local.delete("key", if_version=version))
        await asyncio.sleep(0.05)
        assert not conditional.done()
        assert not deleting.done()
        await asyncio.to_thread((folder(local) / "draft").write_bytes, b"theirs")
        await asyncio.to_thread(os.replace, folder(local) / "draft", file)
    for attempt in (conditional, deleting):
        with pytest.raises(VersionMismatchError):
            await attempt
    assert await local.read("key") == b"theirs"
    async with held(file):
        unconditional = asyncio.create_task(local.write("key", b"mine"))
        await asyncio.sleep(0.05)
        assert not unconditional.done()
        await asyncio.to_thread(os.unlink, file)
    await unconditional
    assert await local.read("key") == b"mine"


async def test_nothing_is_overwritten_unseen(local: LocalStorage) -> None:
    """A write without a condition stands, whatever conditional writes and deletes came at the same time."""
    async with LocalStorage(local.path) as other:
        for number in range(300):
            key = f"{number}"
            version = await local.write(key, b"old")
            await asyncio.gather(
                local.write(key, b"conditional", if_version=version),
                other.write(key, b"unconditional"),
                local.delete(key, if_version=version),
                return_exceptions=True,
            )
            assert await local.read(key) == b"unconditional"


async def test_without_hard_links(local: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system without hard links, too, one of many creators wins, and conditions hold."""

    def refused(*names: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refused)
    async with LocalStorage(local.path) as other:
        outcomes = await asyncio.gather(
            *(
                (local, other)[number % 2].write("key", b"%d" % number, if_absent=True)
                for number in range(16)
            ),
            return_exceptions=True,
        )
        assert sum(isinstance(outcome, ObjectExistsError) for outcome in outcomes) == 15
        version = await local.write("key", b"unconditional")
        await other.write("key", b"conditional", if_version=version)
        with pytest.raises(VersionMismatchError):
            await local.write("key", b"late", if_version=version)
        await local.write("another", b"unconditional")
    assert await local.read("key") == b"conditional"
    assert await local.read("another") == b"unconditional"
    assert await asyncio.to_thread(drafts, folder(local)) == []


async def test_old_drafts_are_swept(local: LocalStorage) -> None:
    """Drafts of writers killed a day ago go with the first write; a younger one may be somebody's."""
    path = folder(local)

    def plant() -> None:
        path.mkdir()
        for name in (".tmp-old", ".tmp-young"):
            (path / name).touch()
        os.utime(path / ".tmp-old", (time.time() - 90_000,) * 2)

    await asyncio.to_thread(plant)
    await local.write("key", b"")
    await until(lambda: asyncio.to_thread(lambda: drafts(path) == [".tmp-young"]))


async def test_a_removed_folder_is_made_again(local: LocalStorage) -> None:
    """A folder that was removed is empty, and made again by the next write."""
    await local.write("key", b"")
    await asyncio.to_thread(shutil.rmtree, folder(local))
    assert await local.stat("key") is None
    await local.write("key", b"again")
    assert await local.read("key") == b"again"


async def test_power_durability(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With durability="power" a write syncs the file and then the folder, without it nothing."""
    synced: list[bool] = []
    fsync = os.fsync

    def counting(fd: int) -> None:
        synced.append(stat.S_ISDIR(os.fstat(fd).st_mode))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", counting)
    async with LocalStorage(tmp_path) as storage:
        await storage.write("key", b"")
        await storage.write("key", _pieces(b""))
        assert synced == []
    async with LocalStorage(tmp_path, durability="power") as storage:
        await storage.write("key", b"")
        assert synced == [False, True]
        await storage.write("new", b"", if_absent=True)
        await storage.write("streamed", _pieces(b""))
        assert synced == [False, True] * 3
        await storage.delete("key")
        assert synced[6:] == [True]


@pytest.mark.parametrize("size", [64 * 1024 * 1024 + 1, 70_000_000])
async def test_large_objects(local: LocalStorage, size: int) -> None:
    """An object too large for one piece is written and read whole, with and without `into`."""
    content = os.urandom(1_000_000) * (size // 1_000_000 + 1)
    view = memoryview(content)[:size]
    await local.write("key", view)
    stored = await local.fetch("key")
    assert stored is not None
    assert stored.data == view
    buffer = bytearray(size)
    assert await local.fetch("key", into=buffer) is not None
    assert buffer == view


# -- on the loop and in threads ---------------------------------------------------------------------------


@pytest.mark.skipif(not files.can_read_inline(), reason="reading without waiting needs Linux")
async def test_warm_reads_and_misses_take_no_thread(local: LocalStorage) -> None:
    """W5: What lies in memory is read on the loop, and so is a miss: no thread is ever started for it."""
    await local.write("small", b"content")
    await local.write("limit", bytes(files.INLINE))
    version = await local.write("large", bytes(2 * files.INLINE))
    async with LocalStorage(local.path) as reader:
        await reader.fetch("small")
        if not reader._inline:
            pytest.skip("this file system cannot read without waiting")
        await reader.read("limit")
        await reader.read("large", 1000, 2000)
        assert await reader.fetch("large", unless=version) is None
        assert await reader.stat("large") is not None
        assert await reader.stat("missing") is None
        with pytest.raises(ObjectNotFoundError):
            await reader.read("missing")
        assert reader._hops._pool is None
        await reader.read("large")
        assert reader._hops._pool is not None


@pytest.mark.skipif(not files.can_read_inline(), reason="reading without waiting needs Linux")
async def test_cold_reads_leave_the_loop(local: LocalStorage) -> None:
    """W5: A file that is not in memory is refused without waiting, and then read in a thread."""
    await local.write("key", b"content" * 1000)
    path = f"{local.path}/key"

    def cool() -> None:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)

    def refused() -> bool:
        cool()
        try:
            files.read(path, 0, None, None, None, None, wait=False)
        except BlockingIOError:
            return True
        return False

    if not await asyncio.to_thread(refused):
        pytest.skip("this file system keeps its files in memory")
    for _ in range(
        100
    ):  # the refused read has made the kernel fetch it, and a page under way cannot be dropped
        await asyncio.to_thread(cool)
        async with LocalStorage(local.path) as reader:
            assert await reader.read("key") == b"content" * 1000
            assert reader._inline
            if reader._hops._pool is not None:
                return
    pytest.fail("no cold read was left to a thread")


async def test_a_thousand_reads_share_few_threads(local: LocalStorage) -> None:
    """Operations that come together queue for few threads: never more than allowed, all answered."""
    await local.write("key", b"content")
    async with LocalStorage(local.path, threads=3) as reader:
        reader._inline = False
        before = threading.active_count()
        found = await asyncio.gather(*(reader.read("key") for _ in range(1000)))
        assert found == [b"content"] * 1000
        assert threading.active_count() - before <= 3


async def test_slow_operations_get_more_threads(tmp_path: Path) -> None:
    """Where threads wait, the next one is woken: three that wait for each other all arrive."""
    async with LocalStorage(tmp_path, threads=3) as storage:
        barrier = threading.Barrier(3)
        await asyncio.wait_for(
            asyncio.gather(*(storage._hops.run(barrier.wait) for _ in range(3))), timeout=30
        )


async def test_what_was_taken_before_the_close_is_done(tmp_path: Path) -> None:
    """Operations that queue when a storage is closed are finished, and no further thread is woken for them."""
    storage = LocalStorage(tmp_path, threads=2)
    begun, go = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        go.wait()

    blocking = asyncio.create_task(storage._hops.run(work))
    await until(begun.is_set)
    writing = asyncio.create_task(storage.write("key", b"content"))
    await asyncio.sleep(0)
    await storage.aclose()
    storage._hops._looked = 0.0
    try:
        assert storage._hops.tick()
    finally:
        go.set()
    await asyncio.wait_for(asyncio.gather(blocking, writing), timeout=30)
    async with LocalStorage(tmp_path) as reader:
        assert await reader.read("key") == b"content"


async def test_a_queued_write_is_withdrawn(tmp_path: Path) -> None:
    """A write cancelled before its turn ends at once, and nothing of it ever happens."""
    async with LocalStorage(tmp_path, threads=1) as storage:
        go = threading.Event()
        blocking = asyncio.create_task(storage._hops.run(go.wait))
        writing = asyncio.create_task(storage.write("key", b"content"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        writing.cancel()
        await asyncio.wait([writing], timeout=10)
        assert writing.cancelled()
        assert not blocking.done()
        go.set()
        await blocking
        assert await storage.stat("key") is None


async def test_a_running_hop_is_awaited(tmp_path: Path) -> None:
    """Cancelled while its thread works, an operation ends after the thread, however often it is cancelled."""
    async with LocalStorage(tmp_path) as storage:
        begun, go, ended = threading.Event(), threading.Event(), threading.Event()

        def work() -> None:
            begun.set()
            go.wait()
            ended.set()

        stopped: list[bool] = []
        task = asyncio.create_task(storage._hops.run(work, on_cancel=lambda: stopped.append(True)))
        await until(begun.is_set)
        for _ in range(5):
            task.cancel()
            await asyncio.sleep(0)
            assert not task.done()
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended.is_set()
        assert stopped == [True]


async def test_a_cancelled_large_write_stops_soon(local: LocalStorage) -> None:
    """A large write that is cancelled while it runs leaves the old object and no draft behind."""
    await local.write("key", b"old")
    content = bytes(4 * PIECE)
    writing = asyncio.create_task(local.write("key", [content] * 20))
    await until(lambda: asyncio.to_thread(lambda: drafts(folder(local)) != []))
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert await asyncio.to_thread(drafts, folder(local)) == []
    assert await local.read("key") == b"old"


@pytest.mark.parametrize("again", [False, True])
async def test_a_stream_cancelled_anywhere(local: LocalStorage, again: bool) -> None:
    """A streamed write cancelled at its n-th step, for every n, once or twice, leaves no draft nor part."""
    chunk = bytes(600_000)
    for steps in range(10_000):
        await local.write("key", b"old")
        writing = asyncio.create_task(local.write("key", _pieces(chunk, chunk, chunk, chunk)))
        for _ in range(steps):
            await asyncio.sleep(0)
        finished = writing.done()
        writing.cancel()
        if again:
            await asyncio.sleep(0)
            writing.cancel()
        await asyncio.wait([writing])
        assert await asyncio.to_thread(drafts, folder(local)) == []
        assert len(await local.read("key")) in (3, 4 * len(chunk))
        if finished or steps > 400:
            break
    assert steps > 5


async def test_closing_finishes_what_runs(tmp_path: Path) -> None:
    """What was asked for before the storage was closed is still done."""
    storage = LocalStorage(tmp_path)
    writing = [asyncio.create_task(storage.write(f"key{number}", b"x")) for number in range(50)]
    await asyncio.sleep(0)
    await storage.aclose()
    await asyncio.gather(*writing)
    assert len(await asyncio.to_thread(os.listdir, tmp_path)) == 50


# -- what a disk can do -----------------------------------------------------------------------------------


async def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    """83: A path that leads through a file is a configuration error that names it, for every method."""
    await asyncio.to_thread((tmp_path / "file").touch)
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        async with LocalStorage(path) as storage:
            for attempt in (
                storage.read("key"),
                storage.write("key", b""),
                storage.write("key", _pieces(b"")),
                storage.stat("key"),
                storage.delete("key"),
                anext(storage.list()),
            ):
                with pytest.raises(StorageConfigurationError, match=r"file.*every part is a folder"):
                    await attempt


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Path]:
    """A mount point, unmounted afterwards. Mounting takes root."""
    point = tmp_path / "mount"
    point.mkdir()
    yield point
    while subprocess.run(["umount", point], capture_output=True).returncode == 0:
        pass


def mounted(point: Path, *options: str) -> None:
    done = subprocess.run(["mount", *options, point], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"NOT TESTED, a file system cannot be mounted here: {done.stderr.strip()}")


@pytest.mark.parametrize("option", ["size=256k", "nr_inodes=5"])
def test_a_full_disk(mount: Path, option: str) -> None:
    """84: Without space or inodes a write says so, the old object stays, no draft does, and room helps."""
    mounted(mount, "-t", "tmpfs", "-o", option, "tmpfs")

    async def scenario() -> None:
        async with LocalStorage(mount) as storage:
            await storage.write("key", b"old")
            await asyncio.to_thread(fill, mount, option)
            for data in (bytes(200_000), _pieces(bytes(200_000))):
                with pytest.raises(StorageFullError, match=r"'key'.*No space left.*Free some") as caught:
                    await storage.write("key", data)
                assert isinstance(caught.value, OSError)
            assert await storage.read("key") == b"old"
            assert await asyncio.to_thread(drafts, mount) == []
            await asyncio.to_thread(drain, mount)
            await storage.write("key", b"new")
            assert await storage.read("key") == b"new"

    asyncio.run(scenario())


def fill(point: Path, option: str) -> None:
    if option.startswith("size"):
        (point / "filler").write_bytes(bytes(100_000))
        return
    for number in range(10):
        try:
            (point / f"filler{number}").touch()
        except OSError:
            return
    pytest.fail("there are more inodes than asked for")


def drain(point: Path) -> None:
    for path in point.glob("filler*"):
        path.unlink()


def test_a_read_only_disk(mount: Path) -> None:
    """83: On a read-only file system reading works, and writing and deleting say what to do."""
    mounted(mount, "-t", "tmpfs", "tmpfs")

    async def prepare() -> None:
        async with LocalStorage(mount) as storage:
            await storage.write("key", b"content")

    async def scenario() -> None:
        async with LocalStorage(mount) as storage:
            assert await storage.read("key") == b"content"
            for attempt in (
                storage.write("key", b""),
                storage.delete("key"),
                storage.write("key", _pieces(b"")),
            ):
                with pytest.raises(StorageAccessError, match=r"Read-only.*another folder") as caught:
                    await attempt
                assert isinstance(caught.value, PermissionError)
            assert await storage.read("key") == b"content"

    asyncio.run(prepare())
    subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("limit", "words"),
    [("size", ["StorageFullError", "File too large"]), ("files", ["StorageUnavailableError", "ulimit -n"])],
)
def test_limits_of_the_process(tmp_path: Path, limit: str, words: list[str]) -> None:
    """84: Out of file size or descriptors a write says so, the old object stays, and it works again after."""
    said = result(start("limited", LocalStorage(tmp_path), limit))
    for word in words:
        assert word in said
    assert drafts(tmp_path) == []


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ENOLCK, errno.EDQUOT, errno.ENAMETOOLONG])
def test_every_error_says_what_to_do(number: int) -> None:
    """Errors of the system are told in storage errors that name the storage, the cause and a remedy."""
    error = translated(OSError(number, os.strerror(number), "/x/file"), "write", "key", "file:///x")
    assert isinstance(error, StorageError)
    assert not isinstance(error, ObjectNotFoundError)
    text = str(error)
    assert "file:///x" in text
    assert os.strerror(number) in text
    assert text.endswith(".")
    assert isinstance(error, StorageUnavailableError) == (number == errno.EIO)


# -- many processes ---------------------------------------------------------------------------------------


def test_processes_lose_no_increment(tmp_path: Path) -> None:
    """S: Four processes of four tasks that count by read and write-if-version lose nothing."""
    storage = LocalStorage(tmp_path)
    asyncio.run(storage.write("counter", b"0"))
    workers = [start("count", storage, 25, 4) for _ in range(4)]
    assert [result(worker) for worker in workers] == ["100"] * 4
    assert asyncio.run(storage.read("counter")) == b"400"
    assert drafts(tmp_path) == []


def test_one_process_creates(tmp_path: Path) -> None:
    """64: Of processes that create the same objects only-if-absent, each object has exactly one creator."""
    storage = LocalStorage(tmp_path)
    workers = [start("create", storage, 300) for _ in range(4)]
    won = [ast.literal_eval(result(worker)) for worker in workers]
    assert sorted(turn for turns in won for turn in turns) == list(range(300))
    for worker, turns in zip(workers, won, strict=True):
        for turn in turns:
            assert asyncio.run(storage.read(f"round{turn}")) == str(worker.pid).encode()


def test_killed_writers_tear_nothing(tmp_path: Path) -> None:
    """B19: Writers killed at any moment leave the old object or the new one; only drafts may lie around."""
    storage = LocalStorage(tmp_path)
    size = 300_000
    reader = start("check", storage, size)
    for turn in range(12):
        writers = [start("replace", storage, size) for _ in range(2)]
        time.sleep(0.01 + 0.007 * turn)  # a moment that differs, nothing is waited for
        for writer in writers:
            writer.kill()
            writer.communicate()
    asyncio.run(storage.write("object", b"3" * (size + 3)))  # the lock of a dead writer is nobody's
    asyncio.run(storage.write("stop", b""))
    assert int(result(reader)) > 0
    assert {name for name in os.listdir(tmp_path) if not name.startswith(DRAFT)} == {"object", "stop"}


def test_a_forked_child_goes_on(tmp_path: Path) -> None:
    """91: A child forked while the threads of the storage live uses it with threads of its own."""
    assert result(start("fork", LocalStorage(tmp_path, threads=1))) == "written"


async def _pieces(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part
