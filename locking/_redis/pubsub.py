"""One event loop's subscriptions at a Redis server: one connection, which only listens."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

from .._waiting.shield import start

_LINGER = 1.0
"""Seconds for which a subscription outlasts its last waiter, since the next one often follows."""

_SLOWEST = 1.0
"""Seconds between two attempts to get the connection back, at most."""


class _Channel:
    __slots__ = ("confirmed", "key", "refusal")

    def __init__(self, key: str) -> None:
        self.key = key
        self.confirmed = asyncio.Event()
        self.refusal: Any = None


class Messages:
    """Who in this loop is to be told of which channel. Opens nothing before its first channel."""

    def __init__(
        self,
        pool: Any,
        seconds: float,
        broken: tuple[type[Exception], ...],
        refused: Callable[[Exception], Any],
        freed: Callable[[str], None],
    ) -> None:
        from redis.asyncio import Redis

        self._client: Any = Redis(connection_pool=pool)
        self._seconds = seconds
        self._broken, self._refused, self._freed = broken, refused, freed
        self._loop = asyncio.get_running_loop()
        self._channels: dict[str, _Channel] = {}
        self._unwanted: set[str] = set()
        self._told: set[str] = set()
        self._pubsub: Any = None
        self._updater: asyncio.Task[None] | None = None
        self._listener: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """End the subscriptions, and close the connection."""
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.wait([self._listener])

    async def listen(self, channel: str, key: str) -> bool:
        """Have `freed(key)` called for each message; True if that is so only from now on.

        Returns when the server has confirmed it. After a lost connection `freed(key)` is called too, for what
        was said meanwhile is lost.

        Raises:
            Refusal: The server does not allow it.
        """
        self._unwanted.discard(channel)
        known = self._channels.get(channel)
        if known is not None and known.confirmed.is_set():
            return False
        if known is None:
            known = self._channels[channel] = _Channel(key)
            if self._listener is None or self._listener.done():
                self._listener = start(self._listen())
            else:
                self._update()
        await known.confirmed.wait()
        if known.refusal is not None:
            raise known.refusal.again()
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
        if self._pubsub is not None and (self._updater is None or self._updater.done()):
            self._updater = start(self._subscribe(self._pubsub))

    async def _subscribe(self, pubsub: Any) -> None:
        try:
            while self._told != self._channels.keys():
                new, old = self._channels.keys() - self._told, self._told - self._channels.keys()
                self._told = set(self._channels)
                if new:
                    await pubsub.subscribe(*new)
                if old:
                    await pubsub.unsubscribe(*old)
        except self._broken:
            pass  # the listener meets the same error, connects again, and subscribes to all there is

    async def _listen(self) -> None:
        pause = 0.05
        while self._channels:
            failure: Exception | None = None
            pubsub = self._client.pubsub()
            try:
                self._told = set(self._channels)
                async with asyncio.timeout(self._seconds):
                    await pubsub.subscribe(*self._told)
                self._pubsub = pubsub
                self._update()
                while self._channels:
                    await self._hear(pubsub)
                    pause = 0.05
            except self._broken as error:
                failure = error  # the server is away; those who ask it for something say so
            finally:
                self._pubsub = None
                if self._updater is not None:
                    self._updater.cancel()
                await pubsub.aclose()
            for channel in self._channels.values():
                channel.confirmed.clear()
            if failure is not None and not self._give_up(failure):
                await asyncio.sleep(random.uniform(pause / 2, pause))
                pause = min(2 * pause, _SLOWEST)

    def _give_up(self, failure: Exception) -> bool:
        """Whether trying again is in vain: then those who would listen are told, who waits looks again."""
        refusal = self._refused(failure)
        if refusal.meaning.passes:
            return False
        channels, self._channels = list(self._channels.values()), {}
        for channel in channels:
            channel.refusal = refusal
            channel.confirmed.set()
            self._freed(channel.key)
        return True

    async def _hear(self, pubsub: Any) -> None:
        message = await pubsub.get_message(timeout=None)
        channel = message and self._channels.get(message["channel"].decode())
        if not channel:
            return
        if message["type"] == "subscribe":
            channel.confirmed.set()
        if message["type"] in ("subscribe", "message"):
            self._freed(channel.key)
