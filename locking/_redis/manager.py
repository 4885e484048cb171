"""Locks in Redis or Valkey: one script a request, woken by pub/sub."""

from __future__ import annotations

import asyncio
import importlib.util
import random
import threading
from typing import Any
from weakref import WeakKeyDictionary

from ...storage._names import name_of
from ...storage._runtime.random import nonce
from .._errors import LockClosedError, LockConfigurationError, LockError
from .._waiting.acquisition import Busy, Claim, checked_lease, patience
from .._waiting.manager import QueuedLockManager
from .._waiting.shield import Ended, see_through
from . import scripts
from .address import checked, shown
from .connections import Link, LinkClosed, Refusal, Words

DEFAULT_LEASE = 30.0
DEFAULT_CONNECTIONS = 16
DEFAULT_PREFIX = "onceflow"
_ENDLESS = 1.0
"""Seconds until a lock without an end is looked at again."""
_LONG = 10_000
"""Characters of a holder from which on sending it might have to wait for the network."""
_left_behind: list[Link] = []  # connections that a fork copied here: closing them would disturb the parent


class RedisLockManager(QueuedLockManager):
    """Locks for all processes and machines that reach one Redis (6 or later) or Valkey server.

    A key whose holder is killed is free after `lease_seconds` at the latest. The server alone measures that
    time, so clocks do not matter. Tokens are the server's microseconds, and always above the last one, also
    after it lost its data.

    A server that fails over, or restarts empty, can let two holders in; the one that was first learns at its
    next renewal. Redlock would not change that. Commit by a conditional write, which only one of them wins.

    Acquire, release and renewal are one command each. Waiting costs one subscription a key and process,
    whatever the number of waiters, and one command when the lease of the other holder could be over. Every
    request has a deadline of a sixth of the lease (between one second and half of the lease) in which it is
    retried. A process keeps one connection a loop for messages and up to `max_connections` for requests.

    Redis Cluster and Sentinel are not supported.

    Args:
        url: `redis://[[user]:password@]host[:port][/database]`; `rediss`, `valkey`, `valkeys` and `unix` too.
        lease_seconds: How long a holder that is no longer heard of keeps a key.
        max_connections: For requests, for each event loop.
        prefix: What the names of all keys in Redis begin with.
    """

    def __init__(
        self,
        url: str = "redis://localhost:6379/0",
        *,
        lease_seconds: float = DEFAULT_LEASE,
        max_connections: int = DEFAULT_CONNECTIONS,
        prefix: str = DEFAULT_PREFIX,
    ) -> None:
        if importlib.util.find_spec("redis") is None:
            raise LockConfigurationError(
                "RedisLockManager needs redis-py.", "Install it: pip install 'onceflow[redis]'."
            )
        self._address = checked(url)
        self.lease_seconds = checked_lease(lease_seconds)
        if not isinstance(max_connections, int) or max_connections < 1:
            raise LockConfigurationError(f"max_connections is {max_connections!r}.", "Give 1 or more.")
        self._max_connections, self._prefix = max_connections, prefix
        super().__init__()
        self._links: WeakKeyDictionary[asyncio.AbstractEventLoop, Link] = WeakKeyDictionary()
        self._links_guard = threading.Lock()
        self._watched: set[str] = set()

    @property
    def url(self) -> str:
        """The server's URL without user and password, with the options that are not the default."""
        options = {}
        if self.lease_seconds != DEFAULT_LEASE:
            options["lease_seconds"] = f"{self.lease_seconds:g}"
        if self._max_connections != DEFAULT_CONNECTIONS:
            options["max_connections"] = str(self._max_connections)
        if self._prefix != DEFAULT_PREFIX:
            options["prefix"] = self._prefix
        return shown(self._address, **options)

    async def _prepare(self) -> None:
        await self._link()

    async def _ask(self, claim: Claim) -> Ended:
        if len(claim.holder) > _LONG:
            return await see_through(self._take(claim))
        try:
            return await self._acquire(claim, whole=True)
        except asyncio.CancelledError as cancelled:
            # It stood in line, was connecting, or between two attempts, of which the last may have arrived.
            return Ended(None, cancelled, cancelled)
        except Exception as error:
            return Ended(None, error, None)

    async def _take(self, claim: Claim) -> Busy | None:
        busy: Busy | None = (await self._acquire(claim)).get()
        return busy

    async def _acquire(self, claim: Claim, whole: bool = False) -> Ended:
        names = self._name(claim.key), self._tokens

        def words() -> tuple[str | int, ...]:
            claim.nonce = claim.nonce or nonce(32)
            claim.sent = self._clock()
            return (*names, claim.holder, claim.nonce, self._milliseconds(claim))

        ended = await self._call("acquire", claim.key, scripts.ACQUIRE, words, whole=whole)
        if ended.error is not None:
            return ended
        token, detail, owner = ended.value.split(b" ", 2)
        if token == b"0":
            return ended._replace(value=_busy(detail, owner))
        claim.token, claim.nonce = int(token), detail.decode()
        return ended._replace(value=None)

    async def _renew(self, claim: Claim) -> bool:
        name = self._name(claim.key)
        ended = await self._call(
            "renew", claim.key, scripts.RENEW,
            lambda: (name, claim.nonce, self._milliseconds(claim)), first=True,
        )  # fmt: skip
        return bool(ended.value)

    async def _give_back(self, claim: Claim) -> None:
        if claim.nonce:
            await self._release_as(claim.key, claim.nonce, "")

    async def _release_elsewhere(self, key: str, holder: str) -> bool:
        return await self._release_as(key, "", holder)

    async def _release_as(self, key: str, given: str, holder: str) -> bool:
        words = self._name(key), given, holder, self._channel(key)
        return bool((await self._call("release", key, scripts.RELEASE, lambda: words, first=True)).value)

    async def _look(self, key: str) -> Busy | None:
        name = self._name(key)
        found = (await self._call("look at", key, scripts.LOOK, lambda: (name,))).value
        return _busy(*found.split(b" ", 2)[1:]) if found else None

    async def _watch(self, key: str) -> bool:
        link = await self._link()
        self._watched.add(key)
        try:
            async with asyncio.timeout(patience(self.lease_seconds)):
                return await link.messages.listen(self._channel(key), key)
        except TimeoutError:
            return True  # the link goes on trying to connect, and wakes the waiters when it has
        except Refusal as refusal:
            raise self._error("wait for", key, refusal) from refusal.__cause__

    def _forget(self, key: str) -> None:
        if key not in self._watched:
            return
        self._watched.discard(key)
        with self._links_guard:
            links = list(self._links.values())
        for link in links:
            link.messages.forget(self._channel(key))

    async def _call(
        self,
        operation: str,
        key: str,
        script: scripts.Script,
        words: Words,
        *,
        first: bool = False,
        whole: bool = False,
    ) -> Ended:
        """One request; see `Link.ask`."""
        while True:
            link = await self._link()
            try:
                return await link.ask(script, words, first=first, whole=whole)
            except LinkClosed:
                continue  # with its loop, say; if it was the manager, the next line tells
            except Refusal as refusal:
                raise self._error(operation, key, refusal) from refusal.__cause__

    def _error(self, operation: str, key: str, refusal: Refusal) -> LockError:
        return refusal.meaning.told(operation, key, self.url, refusal.reason)

    async def _link(self) -> Link:
        """The running loop's connections."""
        loop = asyncio.get_running_loop()
        link = self._links.get(loop)
        if link is not None and not link.closed:
            return link
        if self._closed and link is not None:
            raise LockClosedError(self.url)
        await Link.load()
        with self._links_guard:
            link = self._links.get(loop)
            if link is None or link.closed:
                for other in [other for other in self._links if other.is_closed()]:
                    del self._links[other]
                link = self._links[loop] = Link(
                    self._address,
                    self._prefix,
                    self._max_connections,
                    patience(self.lease_seconds),
                    self._freed,
                )
        await link.attach()
        return link

    async def _close_connections(self) -> None:
        with self._links_guard:
            links = list(self._links.items())
        here = asyncio.get_running_loop()
        for loop, link in links:
            if loop is here:
                await link.close()
            elif loop.is_running():
                await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(link.close(), loop))
            else:
                _left_behind.append(link)  # its loop's shutdown_asyncgens() is what closes it

    def _after_fork(self) -> None:
        _left_behind.extend(self._links.values())
        self._links = WeakKeyDictionary()
        self._links_guard = threading.Lock()
        super()._after_fork()

    def __reduce__(self) -> tuple[Any, ...]:
        return _remake, (self._address, self.lease_seconds, self._max_connections, self._prefix)

    # All keys in one slot, so that a script may use two of them.

    def _name(self, key: str) -> str:
        return f"{{{self._prefix}}}:lock:{name_of(key)}"

    def _channel(self, key: str) -> str:
        return f"{{{self._prefix}}}:free:{name_of(key)}"

    @property
    def _tokens(self) -> str:
        return f"{{{self._prefix}}}:token"

    def _milliseconds(self, claim: Claim) -> int:
        left = claim.hold_until - self._clock()
        return max(1, round(1000 * min(self.lease_seconds, left)))


def _busy(milliseconds: bytes, owner: bytes) -> Busy:
    # A little later than the lease, else the key is still there; and not all processes at once. A lock that
    # somebody made last for ever is looked at now and then.
    left = int(milliseconds)
    seconds = left / 1000 if left >= 0 else _ENDLESS
    return Busy(owner.decode(errors="replace"), seconds + random.uniform(0.005, 0.05))


def _remake(address: str, lease_seconds: float, max_connections: int, prefix: str) -> RedisLockManager:
    return RedisLockManager(
        address, lease_seconds=lease_seconds, max_connections=max_connections, prefix=prefix
    )
