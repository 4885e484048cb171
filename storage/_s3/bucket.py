"""Requests to one bucket: each with a deadline, retries with jitter, and errors that say what to do."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeVar

from .._errors import StorageError, StorageUnavailableError
from .client import Clients
from .errors import Answer, Bodyless, Missing, Translator, Unknown

T = TypeVar("T")
Consume = Callable[[Any, asyncio.Timeout], Awaitable[T]]

_log = logging.getLogger("onceflow.storage")

_NO_SLOT = contextlib.nullcontext()
_NO_BODY = io.BytesIO()
_TAGGED = ("get_object", "head_object")
"""Requests that every S3 store answers with an entity tag."""

_MOST_ATTEMPTS = 12
_TIDYING = 5.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0


class Deadline:
    """The time that one request may take, with all its further attempts, without getting anywhere.

    It begins with the first attempt, not while the request waits for a free connection, and again with every
    piece of a body that goes through: on a slow line a large part takes long, and nothing is wrong. A single
    attempt is given a third of it, so that one silent connection does not use up everything.
    """

    def __init__(self, bucket: Bucket, operation: str, key: str) -> None:
        self._bucket = bucket
        self.operation, self.key = operation, key
        self._began: float | None = None
        self._attempts = 0

    def attempt(self) -> float:
        """When the attempt that begins now must be over, in the loop's time."""
        now = asyncio.get_running_loop().time()
        if self._began is None:
            self._began = now
        self._attempts += 1
        return min(self._began + self._bucket.timeout, now + self._bucket.timeout / 3)

    def progress(self, timer: asyncio.Timeout) -> None:
        """Begin anew: a piece of a body went through."""
        now = self._began = asyncio.get_running_loop().time()
        if not timer.expired():
            timer.reschedule(now + self._bucket.timeout / 3)

    async def pause(self, unknown: Unknown) -> None:
        """Wait before the next attempt: twice as long each time, less a random half.

        Raises:
            StorageUnavailableError: There is no time for another one.
        """
        assert self._began is not None
        spent = asyncio.get_running_loop().time() - self._began
        pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (self._attempts - 1)) * random.uniform(0.5, 1.0)
        left = min(self._bucket.timeout, unknown.patience) - spent
        if pause >= left or self._attempts >= _MOST_ATTEMPTS:
            self.give_up(unknown)
        await asyncio.sleep(pause)

    def give_up(self, unknown: Answer) -> NoReturn:
        """Raise StorageUnavailableError for the last answer."""
        began = self._began or 0.0
        spent = asyncio.get_running_loop().time() - began
        bucket = self._bucket
        raise StorageUnavailableError(
            self.operation, self.key, bucket.storage,
            f"{unknown.reason} ({self._attempts} attempts in {spent:.1f} s)",
            f"Check that {bucket.where} is up and reachable, or raise timeout= ({bucket.timeout:g} s).",
        ) from unknown  # fmt: skip


class Bucket:
    """One bucket as every loop sees it. Requests go out through `once`, or through `retried`."""

    def __init__(self, name: str, storage: str, clients: Clients, timeout: float, where: str) -> None:
        self.name, self.storage, self.timeout, self.where = name, storage, timeout, where
        self.clients = clients
        self._translator = Translator(name, storage)
        self._seen = False

    def deadline(self, operation: str, key: str) -> Deadline:
        return Deadline(self, operation, key)

    async def once(
        self,
        method: str,
        deadline: Deadline,
        consume: Consume[T] | None = None,
        *,
        slot: bool = True,
        **params: Any,
    ) -> T | Any:
        """Send one request and return what `consume` makes of the response, or the response itself.

        `consume` runs while the request holds its connection slot and its time; it may reschedule the time.
        Without `slot` the caller holds one already.

        Raises:
            Answer: The server answered something that the caller decides about, or nothing usable.
            StorageError: What no further attempt will mend.
        """
        try:
            own = await self.clients.get()
            async with own.slots if slot else _NO_SLOT, asyncio.timeout_at(deadline.attempt()) as timer:
                if "Body" in params:
                    params["Body"] = _Watched(params["Body"], deadline, timer)
                response = await getattr(own.client, method)(Bucket=self.name, **params)
                if method in _TAGGED and not response.get("ETag"):
                    response.get("Body", _NO_BODY).close()
                    raise self._translator.no_store(deadline.operation, deadline.key)
                result = response if consume is None else await consume(response, timer)
            self._seen = True
            return result
        except (Answer, StorageError):
            raise
        except Exception as error:
            meaning = self._translator.translate(error, deadline.operation, deadline.key, method)
            if meaning is error:
                raise
            # A GET that is told "no such key" has found the bucket; a HEAD cannot tell.
            self._seen |= isinstance(meaning, Missing) and method == "get_object"
            raise meaning from error

    async def retried(
        self,
        method: str,
        deadline: Deadline,
        consume: Consume[T] | None = None,
        *,
        slot: bool = True,
        **params: Any,
    ) -> T | Any:
        """`once`, again while the answer is `Unknown` and there is time: for what may be repeated."""
        while True:
            try:
                return await self.once(method, deadline, consume, slot=slot, **params)
            except Unknown as unknown:
                await deadline.pause(unknown)

    async def head(self, deadline: Deadline, name: str) -> dict[str, Any] | None:
        """The headers of an object; None where there is none. One HEAD.

        A refused HEAD has no body, so it cannot say whether the object or the bucket is missing, or what is
        wrong with the credentials. Where that is not known yet, a GET asks again.
        """
        try:
            found: dict[str, Any] = await self.retried("head_object", deadline, Key=name)
            return found
        except Missing:
            if self._seen:
                return None
        except Bodyless:
            pass
        try:
            await self.retried("get_object", deadline, _close, Key=name)
        except Missing:
            return None
        found = await self.retried("head_object", deadline, Key=name)
        return dict(found)

    async def quietly(self, method: str, **params: Any) -> None:
        """Clean up in a few seconds. A failure leaves litter, which does no harm, and a line in the log."""
        deadline = self.deadline("clean up after", params.get("Key", ""))
        try:
            async with asyncio.timeout(_TIDYING):
                await self.retried(method, deadline, **params)
        except Missing:
            pass  # nothing was left
        except (Answer, StorageError, TimeoutError) as error:
            _log.warning("%s could not be cleaned up in %s: %s", params.get("Key"), self.storage, error)


class _Watched(io.BytesIO):
    """A body on its way up. What is read from it goes into the socket, as far as the other side takes it."""

    def __init__(self, body: bytes, deadline: Deadline, timer: asyncio.Timeout) -> None:
        super().__init__(body)  # shares the bytes
        self._deadline, self._timer = deadline, timer

    def read(self, size: int | None = -1) -> bytes:
        self._deadline.progress(self._timer)
        return super().read(size)


async def _close(response: Any, _: asyncio.Timeout) -> None:
    response["Body"].close()
