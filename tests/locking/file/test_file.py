"""File locks in particular: what lies in the folder, and who may remove it."""

from __future__ import annotations

import asyncio
import fcntl
import json
import math
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from lock_places import turns, until
from onceflow.locking import (
    FileLockManager,
    LeaseLostError,
    LockConfigurationError,
    LockError,
    LockUnavailableError,
)
from onceflow.locking._file import manager as file
from onceflow.locking._file.manager import _sweep
from onceflow.locking._file.mounts import network_file_system
from onceflow.locking._waiting.acquisition import Claim
from onceflow.storage._names import name_of


async def test_missing_folder_and_leftovers(tmp_path: Path) -> None:
    """L17: a missing folder is made, with its parents; no temporary file is ever there, and in the end no file."""
    folder = tmp_path / "not" / "there" / "yet"
    async with FileLockManager(folder) as manager:
        for number in range(20):
            async with manager.lock(f"key-{number}"):
                names = await asyncio.to_thread(os.listdir, folder)
                assert f"key-{number}.lock" in names
                assert all(name.endswith(".lock") for name in names)
    assert await asyncio.to_thread(os.listdir, folder) == []


async def test_files_go_soon_after_the_key_is_free(tmp_path: Path) -> None:
    """Files of free keys are removed while the manager lives on; those of held keys stay."""
    async with FileLockManager(tmp_path) as manager:
        await manager.acquire("held", "me")
        async with manager.lock("free"):
            pass

        async def names() -> bool:
            return await asyncio.to_thread(os.listdir, tmp_path) == ["held.lock"]

        await until(names)
        assert await manager.is_locked("held")


async def test_the_file_names_the_holder(tmp_path: Path) -> None:
    """Whoever looks into the file of a held key reads who holds it, in which process, since when."""
    async with FileLockManager(tmp_path) as manager:
        lease = await manager.acquire("some/key", "me")
        assert lease is not None
        text = await asyncio.to_thread((tmp_path / "some%2Fkey.lock").read_text)
        info = json.loads(text.split("\n")[0])
        assert (info["holder"], info["pid"], info["token"]) == ("me", os.getpid(), lease.token)
        assert info["key"] == "some/key"


async def test_keys_stay_in_the_folder(tmp_path: Path) -> None:
    """B30: a key with dots and slashes makes no file outside of the folder."""
    async with FileLockManager(tmp_path / "locks") as manager:
        for key in ("../../outside", "/etc/onceflow", "..", "a/../../b"):
            async with manager.lock(key):
                pass
    assert await asyncio.to_thread(os.listdir, tmp_path) == ["locks"]


async def test_removal_under_contention(tmp_path: Path) -> None:
    """Files of free keys that are removed all the time, while others try to lock them, never let two in."""
    inside = False

    async def visit(manager: FileLockManager) -> None:
        nonlocal inside
        for _ in range(40):
            async with manager.lock("key"):
                assert not inside
                inside = True
                await turns(1)
                inside = False
            await turns(1)

    stop = threading.Event()

    def remove() -> None:
        while not stop.is_set():
            _sweep({str(tmp_path / "key.lock")})

    async with FileLockManager(tmp_path) as one, FileLockManager(tmp_path) as other:
        removing = asyncio.create_task(asyncio.to_thread(remove))
        try:
            await asyncio.gather(visit(one), visit(other), visit(one))
        finally:
            stop.set()
            await removing


async def test_removed_between_open_and_lock(tmp_path: Path) -> None:
    """A file that is removed after it was opened and before it is locked is nobody's lock: a new one is made."""

    class Unlucky(FileLockManager):
        removals = 2

        async def _open(self, path: str, key: str) -> int:
            fd = await super()._open(path, key)
            if self.removals:
                self.removals -= 1
                await asyncio.to_thread(_sweep, {path})
            return fd

    async with Unlucky(tmp_path) as one, FileLockManager(tmp_path) as other:
        assert await one.acquire("key", "me", timeout=0)
        assert one.removals == 0
        assert await other.acquire("key", "you", timeout=0) is None


async def test_leftover_of_a_killed_process(tmp_path: Path) -> None:
    """A file that a killed holder left behind is a free key, and tokens go on from it."""
    token = 2**53 - 10
    text = json.dumps({"token": token, "holder": "dead", "pid": 1})
    await asyncio.to_thread((tmp_path / "key.lock").write_text, text + "\n")
    async with FileLockManager(tmp_path) as manager:
        assert not await manager.is_locked("key")
        lease = await manager.acquire("key", "me", timeout=0)
        assert lease is not None
        assert lease.token == token + 1


async def test_half_written_file(tmp_path: Path) -> None:
    """19: a held file that says nothing, or half of it, is a held lock of somebody unknown."""
    for text in (b"", b'{"token": 1, "hol', b"\xff\xfe", b"[1]\n", b'{"token": "x"}\n'):
        path = tmp_path / "key.lock"
        await asyncio.to_thread(path.write_bytes, text)
        fd = os.open(path, os.O_RDWR)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            async with FileLockManager(tmp_path) as manager:
                assert await manager.is_locked("key")
                assert not await manager.is_held_by("key", "me")
                assert await manager.acquire("key", "me", timeout=0.05) is None
                fcntl.flock(fd, fcntl.LOCK_UN)
                lease = await manager.acquire("key", "me", timeout=1)
                assert lease is not None
        finally:
            os.close(fd)


async def test_a_look_does_not_fail_a_try(tmp_path: Path) -> None:
    """A try-lock is not refused because somebody is just looking at the lock."""
    path = tmp_path / "key.lock"
    await asyncio.to_thread(path.write_text, '{"token": 1}\n')
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        asyncio.get_running_loop().call_later(0.005, fcntl.flock, fd, fcntl.LOCK_UN)
        async with FileLockManager(tmp_path) as manager:
            assert await manager.acquire("key", "me", timeout=0)
    finally:
        os.close(fd)


async def test_deleted_while_held(tmp_path: Path) -> None:
    """A holder whose lock file is deleted, as with its folder, learns that it is lost, and disturbs nobody."""
    async with FileLockManager(tmp_path / "locks") as here, FileLockManager(tmp_path / "locks") as there:
        lease = await here.acquire("key", "me")
        assert lease is not None
        await asyncio.to_thread(shutil.rmtree, tmp_path / "locks")
        second = await there.acquire("key", "you", timeout=0)
        assert second is not None
        assert lease.lost
        with pytest.raises(LeaseLostError, match="deleted"):
            lease.check()
        await lease.release()
        second.check()
        assert await here.acquire("key", "me", timeout=0) is None


async def test_what_is_no_file(tmp_path: Path) -> None:
    """A pipe, a folder or a link in a lock's place neither stops the loop nor leads out of the folder."""
    await asyncio.to_thread(os.mkfifo, tmp_path / "pipe.lock")
    await asyncio.to_thread(os.mkdir, tmp_path / "folder.lock")
    await asyncio.to_thread(os.symlink, tmp_path / "elsewhere", tmp_path / "link.lock")
    async with FileLockManager(tmp_path) as manager:
        for key in ("pipe", "folder", "link"):
            with pytest.raises(LockError, match=key):
                await manager.acquire(key, "me", timeout=0)
        assert not await manager.is_locked("pipe")
        with pytest.raises(LockError, match="link"):
            await manager.is_locked("link")
    assert not await asyncio.to_thread((tmp_path / "elsewhere").exists)


async def test_folder_that_is_a_file(tmp_path: Path) -> None:
    """83: a path that is a file, or lies below one, is an error that names it."""
    await asyncio.to_thread((tmp_path / "file").write_text, "")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        async with FileLockManager(path) as manager:
            with pytest.raises(LockError, match="file"):
                await manager.acquire("key", "me")


async def test_no_descriptors_left(tmp_path: Path) -> None:
    """84: without file descriptors an acquire is an error that says so, and works again when there are some."""
    import resource

    async with FileLockManager(tmp_path) as manager:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        spare = os.dup(0)
        resource.setrlimit(resource.RLIMIT_NOFILE, (spare, hard))
        os.close(spare)
        filler: list[int] = []
        try:
            filler = _all_descriptors()
            with pytest.raises(LockUnavailableError, match="'key'"):
                await manager.acquire("key", "me")
        finally:
            for fd in filler:
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert await manager.acquire("key", "me", timeout=0)


async def test_descriptors_are_closed(tmp_path: Path) -> None:
    """No descriptor stays open after releases, failed tries and looks."""
    async with FileLockManager(tmp_path) as one, FileLockManager(tmp_path) as other:
        async with one.lock("warm"):
            pass
        before = await asyncio.to_thread(_descriptors)
        for _ in range(10):
            await one.acquire("key", "me")
            assert await other.acquire("key", "you", timeout=0.01) is None
            assert await other.is_locked("key")
            await one.release("key", "me")
        assert await asyncio.to_thread(_descriptors) <= before


def _all_descriptors() -> list[int]:
    taken = []
    while True:
        try:
            taken.append(os.dup(0))
        except OSError:
            return taken


def _descriptors() -> int:
    return len(os.listdir("/dev/fd"))


def test_a_local_file_is_local(tmp_path: Path) -> None:
    """A folder of this machine is not taken for one of the network."""
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        assert network_file_system(fd) is None
    finally:
        os.close(fd)


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path is taken from the folder of the moment, `~` is the home; nothing is made yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert FileLockManager("locks").path == str(tmp_path / "locks")
    assert FileLockManager("~/locks").path == str(tmp_path / "home" / "locks")
    assert os.listdir(tmp_path) == []
    for path in ("", "a\0b"):
        with pytest.raises(LockConfigurationError):
            FileLockManager(path)


async def test_tokens_whatever_the_clock_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2.2: tokens go on from the file, or from this process where the file is gone, and else from the clock."""
    name = str(tmp_path / f"{name_of('key')}.lock")
    async with FileLockManager(tmp_path) as one, FileLockManager(tmp_path) as other:
        first = await one.acquire(
            "key", "a holder with a name that is longer than what a release leaves behind"
        )
        assert first is not None
        await first.release()
        monkeypatch.setattr(time, "time_ns", lambda: 0)
        second = await other.acquire("key", "me")
        assert second is not None
        assert second.token == first.token + 1
        await second.release()
        await asyncio.to_thread(_sweep, {name})
        assert await asyncio.to_thread(os.path.exists, name)  # its token is ahead of the clock
        monkeypatch.undo()
        await asyncio.to_thread(_sweep, {name})
        assert not await asyncio.to_thread(os.path.exists, name)
        monkeypatch.setattr(time, "time_ns", lambda: 0)
        third = await other.acquire("key", "me")
        assert third is not None
        assert third.token == second.token + 1
        await third.release()
        monkeypatch.undo()
    async with FileLockManager(tmp_path / "elsewhere") as one, one.lock("key") as fourth:
        assert fourth.token > third.token


async def test_a_file_that_is_another_by_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """46: what removes the files of free keys leaves one alone that was made anew since it was opened."""
    name = str(tmp_path / f"{name_of('key')}.lock")
    async with FileLockManager(tmp_path) as one, FileLockManager(tmp_path) as other:
        async with one.lock("key"):
            pass
        works, leases = file._try_lock, list[Claim]()

        def later(fd: int, kind: int | None = None) -> bool:
            monkeypatch.setattr(file, "_try_lock", works)
            os.unlink(name)
            try:
                other._take(claim).send(None)  # another process has made it anew
            except StopIteration:
                leases.append(claim)
            return works(fd, kind)

        claim = Claim("key", "you", 0.0, math.inf)
        monkeypatch.setattr(file, "_try_lock", later)
        await asyncio.to_thread(_sweep, {name})
        assert leases
        assert await asyncio.to_thread(os.path.exists, name)
        await other._give_back(claim)
