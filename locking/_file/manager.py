"""Locks between the processes of one machine: the kernel's own file locks, freed at once when a holder dies."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import socket
import time
from typing import Any
from urllib.parse import quote

try:
    import fcntl as _fcntl
except ImportError:  # Windows
    _fcntl = None  # type: ignore[assignment]

from ...storage._names import name_of
from ...storage._runtime.threads import Hops
from .._errors import LockAccessError, LockClosedError, LockConfigurationError, LockUnavailableError
from .._lease import Lease
from .._manager import logger
from .._waiting.acquisition import Busy, Claim
from .._waiting.manager import QueuedLockManager
from .mounts import network_file_system

fcntl: Any = _fcntl

_SAFELY = os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
"""Never through a link out of the folder, and never waiting for the other end of a pipe that lies there."""

_SHORTEST, _LONGEST = 0.005, 0.05
"""Seconds between two tries, doubling, with jitter. A try that fails costs 10 µs."""

_SWEEP_AFTER = 0.5
"""Seconds after which the files of freed keys are removed, many in one hop."""

_GLANCES = 20
"""How often a try-lock looks again, a millisecond apart, at a lock that seems to be somebody's passing look."""


class FileLockManager(QueuedLockManager):
    """Locks for the processes of one machine: one `flock`ed file for a key that is held, in one folder.

    A key whose holder ends, killed or not, is free at once, so there is no lease to renew. It is lost only where
    somebody deletes its file: others then lock a new one, and `Lease.lost` says so when it is asked. The
    file names the holder for people who look; it is removed soon after the key is free. Tokens count
    microseconds, and always up from the last one in the file and in this process.

    A waiter tries every 5 to 50 ms, and only the first in line of a process does. Acquire and release cost five
    and two system calls on the loop, 30 µs together, none of which waits for a disk that is in order; one hop
    to a thread makes the folder, one removes files.

    A holder here is a holder of this manager: the same name elsewhere waits. On a network file system
    these locks are as good as its server's; the log warns once, and a `StorageLockManager` is the better choice.

    Args:
        path: The folder; made when it is missing, for this user only.
    """

    _suspends = False

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if fcntl is None:
            raise LockConfigurationError(
                "FileLockManager needs the file locks of Linux or macOS.", "Use a RedisLockManager, or WSL."
            )
        text = os.fspath(path)
        if not isinstance(text, str) or not text or "\0" in text:
            raise LockConfigurationError(
                f"{path!r} is no folder for locks.", "Give a path, such as '~/locks'."
            )
        text = os.path.expanduser(text)
        self.path = os.path.normpath(text if os.path.isabs(text) else os.path.join(os.getcwd(), text))
        super().__init__()
        self._hops = Hops(1, "onceflow-locks")
        self._held: set[int] = set()  # descriptors, for a forked child to close
        self._last_token = 0
        self._tries: dict[str, int] = {}  # of the first in line for a key
        self._idle: set[str] = set()
        self._checked = False

    @property
    def url(self) -> str:
        """`file://` and the absolute path."""
        return f"file://{quote(self.path)}"

    async def _take(self, claim: Claim) -> Busy | None:
        path = self._file(claim.key)
        info: dict[str, Any] = {}
        for glance in range(_GLANCES):
            fd = await self._open(path, claim.key)
            try:
                if _try_lock(fd):
                    if (
                        os.fstat(fd).st_nlink == 0
                    ):  # removed between our open and our lock: nobody else finds it
                        continue
                    self._sign(fd, claim)
                    self._held.add(fd)
                    claim.handle, fd = fd, -1
                    self._tries.pop(claim.key, None)
                    return None
                info = _read_info(fd)
            except OSError as error:
                raise self._translated("acquire", claim.key, error) from error
            finally:
                if fd >= 0:
                    os.close(fd)
            if "holder" in info or claim.key in self._tries:
                break
            # Whoever holds the lock has not signed: a process that looks, sweeps, or is just about to sign.
            if glance:
                await asyncio.sleep(0.001)
        return self._busy(claim.key, info)

    async def _give_back(self, claim: Claim) -> None:
        fd, claim.handle = claim.handle, None
        if fd is None or fd not in self._held:
            return
        self._held.discard(fd)
        try:
            _write_info(fd, {"token": claim.token})
        finally:
            os.close(fd)
        self._sweep_later(claim.key)

    def _is_kept(self, lease: Lease) -> bool:
        fd = lease._claim.handle
        try:
            return fd is None or os.fstat(fd).st_nlink > 0
        except OSError:
            return True  # closed by its release, in another thread

    async def _look(self, key: str) -> Busy | None:
        try:
            fd = os.open(self._file(key), os.O_RDONLY | _SAFELY)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._translated("look at", key, error) from error
        try:
            if _try_lock(fd, fcntl.LOCK_SH):
                return None
            return self._busy(key, _read_info(fd))
        finally:
            os.close(fd)

    def _forget(self, key: str) -> None:
        self._tries.pop(key, None)

    async def _close_connections(self) -> None:
        idle, self._idle = self._idle, set()
        if idle:
            await self._hops.run(_sweep, idle)
        self._hops.close()

    def _after_fork(self) -> None:
        # The lock belongs to the open file, which parent and child share: the child's copy would keep it alive.
        for fd in self._held:
            os.close(fd)
        self._held.clear()
        self._idle.clear()
        self._tries.clear()
        super()._after_fork()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,)

    def _file(self, key: str) -> str:
        return os.path.join(self.path, f"{name_of(key)}.lock")

    async def _open(self, path: str, key: str) -> int:
        if self._closed:
            raise LockClosedError(self.url)
        flags = os.O_RDWR | os.O_CREAT | _SAFELY
        try:
            try:
                fd = os.open(path, flags, 0o600)
            except FileNotFoundError:
                await self._hops.run(os.makedirs, self.path, 0o700, True)
                fd = os.open(path, flags, 0o600)
        except OSError as error:
            raise self._translated("acquire", key, error) from error
        if not self._checked:
            self._checked = True
            kind = network_file_system(fd)
            if kind is not None:
                logger.warning(
                    "%s lies on a network file system (%s): its locks hold between machines only if the server "
                    "keeps them. StorageLockManager(LocalStorage(path)) or a RedisLockManager is safer.",
                    self.path,
                    kind,
                )
        return fd

    def _sign(self, fd: int, claim: Claim) -> None:
        """Number the lease, and write down who holds it. Microseconds go on where a removed file leaves off."""
        last = _read_info(fd).get("token", 0)
        last = last if isinstance(last, int) else 0
        claim.token = self._last_token = max(last + 1, self._last_token + 1, time.time_ns() // 1000)
        _write_info(
            fd,
            {
                "token": claim.token,
                "holder": claim.holder,
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "since": round(time.time(), 3),
                "key": claim.key[:200],
            },
        )

    def _busy(self, key: str, info: dict[str, Any]) -> Busy:
        tries = self._tries[key] = self._tries.get(key, 0) + 1
        pause = min(_LONGEST, _SHORTEST * 2 ** min(tries, 8))
        holder = info.get("holder")
        if not isinstance(holder, str):
            return Busy(None, pause * random.uniform(0.5, 1))
        about = f"process {info.get('pid')} on {info.get('host')}"
        return Busy(holder, pause * random.uniform(0.5, 1), about)

    def _sweep_later(self, key: str) -> None:
        if not self._idle:
            loop = asyncio._get_running_loop()
            if loop is not None:
                loop.call_later(_SWEEP_AFTER, self._sweep)
        self._idle.add(self._file(key))

    def _sweep(self) -> None:
        idle, self._idle = self._idle, set()
        if idle and not self._closed:
            self._hops.later(lambda: _sweep(idle))

    def _translated(self, operation: str, key: str, error: OSError) -> Exception:
        where, reason = self.url, error.strerror or str(error)
        if isinstance(error, PermissionError) or error.errno in (errno.EROFS, errno.ELOOP):
            return LockAccessError(operation, key, where, reason, "Give this user the right to write there.")
        if isinstance(error, (NotADirectoryError, FileExistsError)):
            return LockConfigurationError(f"{self.path!r} is no folder ({reason}).", "Give another path.")
        remedy = "Close files or raise the limit." if error.errno == errno.EMFILE else "Look at the disk."
        return LockUnavailableError(operation, key, where, reason, remedy)


def _try_lock(fd: int, kind: int | None = None) -> bool:
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if kind is None else kind) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read_info(fd: int) -> dict[str, Any]:
    """What the last holder wrote; nothing if it had no time to."""
    try:
        info = json.loads(os.pread(fd, 4096, 0).split(b"\n", 1)[0])
    except ValueError:
        return {}
    return info if isinstance(info, dict) else {}


def _write_info(fd: int, info: dict[str, Any]) -> None:
    # The line end is the end: what an earlier, longer line left behind it does not matter.
    os.pwrite(fd, json.dumps(info).encode() + b"\n", 0)


def _sweep(paths: set[str]) -> None:
    """Remove the files of keys that nobody holds. For a thread."""
    for path in paths:
        try:
            fd = os.open(path, os.O_RDWR | _SAFELY)
        except OSError:
            continue  # gone, or not ours to remove
        try:
            # Removed under the lock: whoever opened it before finds that it has no name any more, and opens again.
            if _try_lock(fd) and os.path.samestat(os.fstat(fd), os.stat(path)):
                token = _read_info(fd).get("token", 0)
                # A token ahead of the clock (which was set back) has to be remembered.
                if isinstance(token, int) and token < time.time_ns() // 1000:
                    os.unlink(path)
        except OSError:
            pass  # it stays, which does no harm
        finally:
            os.close(fd)
