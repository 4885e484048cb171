"""One event loop's connections to a Redis server: a pool for requests, one connection for messages.

redis-py's plain pool raises when it is exhausted, so this is its blocking one. The link is closed with its
loop (see storage/_loop_end.py): `asyncio.run`, pytest-asyncio and uvicorn call
`loop.shutdown_asyncgens()` before they close a loop, which is the only hook there is.
"""

from __future__ import annotations

import asyncio
import importlib.util
import random
import sys
from collections.abc import Callable
from typing import Any

from ..storage._loop_end import CLIENTS, at_loop_end, forget
from ._owned import start
from ._scripts import Script

_LINGER = 1.0
"""Seconds for which a subscription outlasts its last waiter, since the next one often follows."""

_SLOWEST = 1.0
"""Seconds between two attempts to get the messages' connection back, at most."""


class Link:
    """The client of one loop. Opens nothing before its first request."""

    def __init__(
        self, address: str, max_connections: int, seconds: float, freed: Callable[[str], None]
    ) -> None:
        from redis import asyncio as redis
        from redis import exceptions
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        pool = redis.BlockingConnectionPool.from_url(
            address,
            max_connections=max_connections + 1,  # one for the messages
            timeout=None,  # every request has a deadline of its own
            socket_timeout=seconds,
            socket_connect_timeout=seconds,
            socket_keepalive=True,
            retry=Retry(NoBackoff(), 0),
            **_anonymous(),
        )
        self._client: Any = redis.Redis.from_pool(pool)
        self._loop = asyncio.get_running_loop()
        self._freed = freed
        self._channels: dict[str, tuple[str, asyncio.Event]] = {}
        self._unwanted: set[str] = set()
        self._told: set[str] = set()
        self._messages: Any = None
        self._updater: asyncio.Task[None] | None = None
        self._listener: asyncio.Task[None] | None = None
        self._is_attached = False
        self.closed = False
        self.refused: tuple[type[Exception], ...] = (
            exceptions.AuthenticationError,
            exceptions.AuthorizationError,
            exceptions.NoPermissionError,
        )
        self.failed: tuple[type[Exception], ...] = (exceptions.RedisError,)
        self._broken: tuple[type[Exception], ...] = (exceptions.RedisError, OSError)
        # A wrong password is a ConnectionError to redis-py: ask for `refused` first.
        self.transient: tuple[type[Exception], ...] = (
            exceptions.ConnectionError,
            exceptions.TimeoutError,
            exceptions.ReadOnlyError,
            OSError,
        )
        self._unknown_script = exceptions.NoScriptError

    @staticmethod
    async def load() -> None:
        """Import redis-py, which takes a tenth of a second, without holding up the loop."""
        if "redis.asyncio" not in sys.modules:
            await asyncio.to_thread(importlib.import_module, "redis.asyncio")

    async def attach(self) -> None:
        """Have the link closed with its loop."""
        if not self._is_attached:
            self._is_attached = True
            await at_loop_end(self.close, CLIENTS)

    async def close(self) -> None:
        """End the subscriptions and close the connections; once, whoever asks. On the link's own loop."""
        if self.closed:
            return
        self.closed = True
        forget(self.close, asyncio.get_running_loop())
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.wait([self._listener])
        await self._client.aclose()

    async def run(self, script: Script, keys: tuple[str, ...], arguments: tuple[Any, ...]) -> Any:
        """One command; two where the server does not know the script yet."""
        try:
            return await self._client.evalsha(script.digest, len(keys), *keys, *arguments)
        except self._unknown_script:
            return await self._client.eval(script.text, len(keys), *keys, *arguments)

    # Messages

    async def listen(self, channel: str, key: str) -> bool:
        """Have `freed(key)` called for each message; True if that is so only from now on.

        Returns when the server has confirmed it. After a lost connection `freed(key)` is called too, for what
        was said meanwhile is lost.
        """
        self._unwanted.discard(channel)
        known = self._channels.get(channel)
        if known is not None and known[1].is_set():
            return False
        if known is None:
            known = self._channels[channel] = (key, asyncio.Event())
            if self._listener is None or self._listener.done():
                self._listener = start(self._listen())
            else:
                self._update()
        await known[1].wait()
        return True

    def forget(self, channel: str) -> None:
        """Nobody waits for the channel's messages any more. From any thread."""
        try:
            self._loop.call_soon_threadsafe(self._linger, channel)
        except RuntimeError:
            pass  # the loop is closed, and the connection with it

    def _linger(self, channel: str) -> None:
        if channel in self._channels and channel not in self._unwanted:
            self._unwanted.add(channel)
            self._loop.call_later(_LINGER, self._drop, channel)

    def _drop(self, channel: str) -> None:
        if channel in self._unwanted:
            self._unwanted.discard(channel)
            self._channels.pop(channel, None)
            self._update()

    def _update(self) -> None:
        """Tell the server which channels are wanted now. By one task, so that nothing overtakes anything."""
        if self._messages is not None and (self._updater is None or self._updater.done()):
            self._updater = start(self._subscribe(self._messages))

    async def _subscribe(self, messages: Any) -> None:
        try:
            while self._told != self._channels.keys():
                new, old = self._channels.keys() - self._told, self._told - self._channels.keys()
                self._told = set(self._channels)
                if new:
                    await messages.subscribe(*new)
                if old:
                    await messages.unsubscribe(*old)
        except self._broken:
            pass  # the listener meets the same error, connects again, and subscribes to all there is

    async def _listen(self) -> None:
        pause = 0.05
        while self._channels:
            failed = False
            messages = self._client.pubsub()
            try:
                self._told = set(self._channels)
                await messages.subscribe(*self._told)
                self._messages = messages
                self._update()
                while self._channels:
                    await self._hear(messages)
                    pause = 0.05
            except self._broken:
                failed = True  # the server is away; those who ask it for something say so
            finally:
                self._messages = None
                if self._updater is not None:
                    self._updater.cancel()
                await messages.aclose()
            for _, confirmed in self._channels.values():
                confirmed.clear()
            if failed:
                await asyncio.sleep(random.uniform(pause / 2, pause))
                pause = min(2 * pause, _SLOWEST)

    async def _hear(self, messages: Any) -> None:
        message = await messages.get_message(timeout=None)
        known = message and self._channels.get(message["channel"].decode())
        if not known:
            return
        key, confirmed = known
        if message["type"] == "subscribe":
            confirmed.set()
        if message["type"] in ("subscribe", "message"):
            self._freed(key)


def _anonymous() -> dict[str, Any]:
    """Options that keep redis-py from reading its own version from disk, on the loop, to tell it the server."""
    if importlib.util.find_spec("redis.driver_info") is None:
        return {"lib_name": None, "lib_version": None}  # before redis-py 7.2
    return {"driver_info": None}
