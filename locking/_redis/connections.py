"""One event loop's connections to a Redis server for requests, and the line of those who wait for one.

redis-py's connections, without its pool and client: those cost more than the request itself, count the time in
the line as the server's, and cut a request off when its caller is cancelled. The link is closed with its loop
(see storage/_loop_end.py): `asyncio.run`, pytest-asyncio and uvicorn call `loop.shutdown_asyncgens()` before they
close a loop, which is the only hook there is.
"""

from __future__ import annotations

import asyncio
import importlib.util
import random
import sys
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from ...storage._runtime.loop_end import CLIENTS, at_loop_end, forget
from .._errors import LockConfigurationError
from .._waiting.shield import Ended, see_through
from .errors import Meaning, meaning, reason_of
from .pubsub import Messages
from .scripts import Script

_STALL, _STALLS = 0.1, 3
"""Seconds by which a deadline is late when it was this loop that stood still; how often that is an excuse."""

Words = Callable[[], tuple[str | int, ...]]
"""A request's keys and arguments, asked for when it is sent: they tell the time that is left."""


class Refusal(Exception):
    """A request that came to nothing: why, and what that means."""

    def __init__(self, reason: str, meaning: Meaning) -> None:
        super().__init__(reason)
        self.reason, self.meaning = reason, meaning

    def again(self) -> Refusal:
        """The same, for another one who asked."""
        return Refusal(self.reason, self.meaning)


class LinkClosed(Exception):
    """The link was closed before the request was answered."""


class Link:
    """The requests of one loop. Opens nothing before the first."""

    def __init__(
        self, address: str, prefix: str, max_connections: int, seconds: float, freed: Callable[[str], None]
    ) -> None:
        from redis import asyncio as redis
        from redis import exceptions
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        scheme = address.partition(":")[0]
        pools: Any = redis.ConnectionPool
        try:
            self._pool: Any = pools.from_url(
                address,
                socket_timeout=None,  # every request has a deadline of its own
                socket_connect_timeout=seconds,
                retry=Retry(NoBackoff(), 0),
                **({} if scheme == "unix" else {"socket_keepalive": True}),
                **_anonymous(),
            )
            self._connections: list[Any] = [
                self._pool.make_connection()
            ]  # which says what is wrong with the URL
        except (TypeError, ValueError, exceptions.RedisError) as error:
            raise LockConfigurationError(
                f"The URL of the Redis server cannot work: {reason_of(error)}.", "Correct the option."
            ) from error
        self._seconds, self._max_connections = seconds, max_connections
        self._loop = asyncio.get_running_loop()
        self._idle = list(self._connections)
        self._turns: tuple[deque[asyncio.Future[Any]], ...] = (
            deque(),
            deque(),
        )  # who goes first, and the others
        self._heard = 0.0
        self._is_attached = False
        self.closed = False
        self._answered: type[Exception] = exceptions.ResponseError
        self._unknown_script: type[Exception] = exceptions.NoScriptError
        self._broken: tuple[type[Exception], ...] = (exceptions.RedisError, OSError)
        self._meaning = partial(
            meaning,
            prefix=prefix,
            scheme=scheme,
            answered=(exceptions.ResponseError, exceptions.InvalidResponse),
        )
        self.messages = Messages(self._pool, seconds, self._broken, self._refused, freed)

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
        self._dismiss(LinkClosed)
        await self.messages.close()
        # One that is cut off cannot say goodbye in time, which matters to nobody.
        goodbyes = (connection.disconnect() for connection in self._connections)
        await asyncio.gather(*goodbyes, self._pool.aclose(), return_exceptions=True)

    # One request

    async def ask(self, script: Script, words: Words, *, first: bool = False, whole: bool = False) -> Ended:
        """Run a script, again and again within the deadline while there is no answer; scripts bear that.

        The deadline begins when there is a connection for it. While others wait for one, those who are `first`
        get it first. Cancelled, a request is cut off, unless it is to be `whole`: then what has been sent is
        awaited, and the cancellation is returned with the answer.

        Raises:
            Refusal: It came to nothing.
            LinkClosed: Ask another link.
        """
        connection = self._idle.pop() if self._idle else await self._turn(first)
        refusals: list[Refusal] = []
        began = 0.0
        try:
            for _ in range(_STALLS):
                began = self._loop.time()
                try:
                    async with asyncio.timeout(self._seconds) as limit:
                        return await self._attempts(
                            connection, script, words, limit if whole else None, refusals
                        )
                except TimeoutError:
                    if self._loop.time() - began < self._seconds + _STALL:
                        break
                # This loop stood still: the answer may have been there for long.
            refusals = refusals or [self._refused(TimeoutError(f"no answer within {self._seconds:g} s"))]
            if self._heard < began:  # by nobody: it is silent for all who wait, too
                self._dismiss(refusals[-1].again)
            raise refusals[-1]
        finally:
            if self.closed:
                await connection.disconnect(nowait=True)
            self._hand_on(connection)

    async def _attempts(
        self,
        connection: Any,
        script: Script,
        words: Words,
        limit: asyncio.Timeout | None,
        refusals: list[Refusal],
    ) -> Ended:
        pause = 0.0  # the first failure may only tell that the connection was closed while nobody used it
        while not self.closed:
            used = connection.is_connected
            try:
                return await self._exchange(connection, script, words, limit)
            except self._broken as error:
                refusal = self._refused(error)
            if not refusal.meaning.passes:
                raise refusal
            refusals.append(refusal)
            if used and not pause:
                await self._close_idle()
            else:
                await asyncio.sleep(random.uniform(pause / 2, pause))
            pause = min(2 * pause, 0.5) or 0.02
        raise LinkClosed()

    async def _exchange(
        self, connection: Any, script: Script, words: Words, limit: asyncio.Timeout | None
    ) -> Ended:
        in_step = False
        try:
            if not connection.is_connected:
                await connection.connect()
            try:
                await connection.send_packed_command(script.request(words()), check_health=False)
                ended = await self._answer(connection, limit)
            except self._unknown_script:
                whole = script.request(words(), whole=True)
                await connection.send_packed_command(whole, check_health=False)
                ended = await self._answer(connection, limit)
            in_step = ended.error is None
            return ended
        except self._answered:
            in_step = True
            raise
        finally:
            if in_step:
                self._heard = self._loop.time()
            else:  # an answer to come would be taken for that to the next request
                await connection.disconnect(nowait=True)

    async def _answer(self, connection: Any, limit: asyncio.Timeout | None) -> Ended:
        # Read by the caller's own task: another would cost two turns of the loop, a tenth of the request.
        try:
            return Ended(await connection.read_response(disconnect_on_error=False), None, None)
        except asyncio.CancelledError as cancelled:
            if limit is None or limit.expired():
                raise
            when = limit.when()
            limit.reschedule(None)
            ended = await see_through(_late_answer(connection, when))
            return ended._replace(cancelled=cancelled)

    def _refused(self, error: Exception) -> Refusal:
        refusal = Refusal(reason_of(error), self._meaning(error))
        refusal.__cause__ = error
        return refusal

    # Who has a connection

    async def _turn(self, first: bool) -> Any:
        if self.closed:
            raise LinkClosed()
        if len(self._connections) < self._max_connections:
            self._connections.append(self._pool.make_connection())
            return self._connections[-1]
        turn: asyncio.Future[Any] = self._loop.create_future()
        self._turns[0 if first else 1].append(turn)
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._hand_on(turn.result())  # it was its turn in that very moment
            raise

    def _hand_on(self, connection: Any) -> None:
        for line in self._turns:
            while line:
                turn = line.popleft()
                if not turn.done():
                    turn.set_result(connection)
                    return
        self._idle.append(connection)

    def _dismiss(self, reason: Callable[[], Exception]) -> None:
        """Tell all who wait for a connection that there will be none."""
        for line in self._turns:
            while line:
                turn = line.popleft()
                if not turn.done():
                    turn.set_exception(reason())

    async def _close_idle(self) -> None:
        """The server closed one while nobody used it; so it did the others, most likely."""
        for connection in list(self._idle):
            await connection.disconnect(nowait=True)


async def _late_answer(connection: Any, when: float | None) -> Any:
    async with asyncio.timeout_at(when):
        return await connection.read_response(disconnect_on_error=False)


def _anonymous() -> dict[str, Any]:
    """Options that keep redis-py from reading its own version from disk, on the loop, to tell it the server."""
    if importlib.util.find_spec("redis.driver_info") is None:
        return {"lib_name": None, "lib_version": None}  # before redis-py 7.2
    return {"driver_info": None}
