"""Locks in Redis or Valkey: one script a request, woken by pub/sub."""

from __future__ import annotations

import asyncio
import importlib.util
import random
import threading
import uuid
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit
from weakref import WeakKeyDictionary

from ..storage._names import name_of
from . import _scripts as scripts
from ._claim import Busy, Claim, checked_lease, patience
from ._errors import LockAccessError, LockClosedError, LockConfigurationError, LockUnavailableError
from ._link import Link
from ._queued import QueuedLockManager

DEFAULT_LEASE = 30.0
_SCHEMES = {"redis": "redis", "rediss": "rediss", "valkey": "redis", "valkeys": "rediss", "unix": "unix"}
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
        max_connections: int = 16,
        prefix: str = "onceflow",
    ) -> None:
        if importlib.util.find_spec("redis") is None:
            raise LockConfigurationError(
                "RedisLockManager needs redis-py.", "Install it: pip install 'onceflow[redis]'."
            )
        self._address = _address(url)
        self.lease_seconds = checked_lease(lease_seconds)
        if max_connections < 1:
            raise LockConfigurationError(f"max_connections is {max_connections}.", "Give 1 or more.")
        self._max_connections, self._prefix = max_connections, prefix
        super().__init__()
        self._links: WeakKeyDictionary[asyncio.AbstractEventLoop, Link] = WeakKeyDictionary()
        self._links_guard = threading.Lock()
        self._watched: set[str] = set()

    @property
    def url(self) -> str:
        """The server's URL without the password, with the options that are not the default."""
        parts = urlsplit(self._address)
        query = dict(parse_qsl(parts.query))
        query.pop("password", None)
        if self.lease_seconds != DEFAULT_LEASE:
            query["lease_seconds"] = f"{self.lease_seconds:g}"
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=urlencode(query)))

    async def _prepare(self) -> None:
        await self._link()

    async def _take(self, claim: Claim) -> Busy | None:
        claim.nonce = claim.nonce or uuid.uuid4().hex
        keys = (self._name(claim.key), self._tokens)
        token, detail, owner = await self._call(
            "acquire", claim.key, scripts.ACQUIRE, keys, claim.holder, claim.nonce, self._milliseconds(claim)
        )
        if int(token) == 0:
            return _busy(detail, owner)
        claim.token, claim.nonce = int(token), detail.decode()
        return None

    async def _renew(self, claim: Claim) -> bool:
        keys = (self._name(claim.key),)
        return bool(
            await self._call("renew", claim.key, scripts.RENEW, keys, claim.nonce, self._milliseconds(claim))
        )

    async def _give_back(self, claim: Claim) -> None:
        if claim.nonce:
            await self._release_as(claim.key, claim.nonce, claim.holder)

    async def _release_elsewhere(self, key: str, holder: str) -> bool:
        return await self._release_as(key, "", holder)

    async def _release_as(self, key: str, nonce: str, holder: str) -> bool:
        keys = (self._name(key),)
        return bool(
            await self._call("release", key, scripts.RELEASE, keys, nonce, holder, self._channel(key))
        )

    async def _look(self, key: str) -> Busy | None:
        found = await self._call("look at", key, scripts.LOOK, (self._name(key),))
        return _busy(found[0], found[1]) if found else None

    async def _watch(self, key: str) -> bool:
        link = await self._link()
        self._watched.add(key)
        try:
            async with asyncio.timeout(patience(self.lease_seconds)):
                return await link.listen(self._channel(key), key)
        except TimeoutError:
            return True  # the link goes on trying to connect, and wakes the waiters when it has

    def _forget(self, key: str) -> None:
        if key not in self._watched:
            return
        self._watched.discard(key)
        with self._links_guard:
            links = list(self._links.values())
        for link in links:
            link.forget(self._channel(key))

    async def _call(
        self, operation: str, key: str, script: scripts.Script, keys: tuple[str, ...], *args: Any
    ) -> Any:
        """One request, repeated within its deadline while there is no answer; the scripts bear that."""
        link = await self._link()  # also for what its errors mean
        seconds = patience(self.lease_seconds)
        reason: object = f"no answer within {seconds:g} s"
        pause = 0.02
        try:
            async with asyncio.timeout(seconds):
                while True:
                    try:
                        return await (await self._link()).run(script, keys, args)
                    except link.refused:
                        raise
                    except link.transient as error:
                        reason = error
                    await asyncio.sleep(random.uniform(pause / 2, pause))
                    pause = min(2 * pause, 0.5)
        except TimeoutError as error:
            raise LockUnavailableError(
                operation, key, self.url, str(reason), "Look whether the server runs and can be reached."
            ) from error
        except link.refused as error:
            raise LockAccessError(
                operation, key, self.url, str(error), "Check user, password and rights in the URL."
            ) from error
        except link.failed as error:
            raise LockUnavailableError(
                operation, key, self.url, str(error), "The server answers, but cannot do it: see its log."
            ) from error

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
                    self._address, self._max_connections, patience(self.lease_seconds), self._freed
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


def _busy(milliseconds: Any, owner: bytes) -> Busy:
    # A little later than the lease, else the key is still there; and not all processes at once.
    return Busy(owner.decode(), max(0, int(milliseconds)) / 1000 + random.uniform(0.005, 0.05))


def _address(url: str) -> str:
    try:
        parts = urlsplit(url)
        scheme, _ = _SCHEMES[parts.scheme], parts.port
    except KeyError:
        raise LockConfigurationError(
            f"{_public(url)!r} is no URL of a Redis server.", "Give redis://host:port/database."
        ) from None
    except ValueError as error:
        raise LockConfigurationError(
            f"{_public(url)!r} is no URL: {error}.", "Give redis://host:port/database."
        ) from None
    return urlunsplit(parts._replace(scheme=scheme))


def _public(url: str) -> str:
    head, _, tail = str(url).rpartition("@")
    return f"{head.split('//')[0]}//…@{tail}" if head else tail


def _remake(address: str, lease_seconds: float, max_connections: int, prefix: str) -> RedisLockManager:
    return RedisLockManager(
        address, lease_seconds=lease_seconds, max_connections=max_connections, prefix=prefix
    )
