"""An object, or a range of it, on its way down: small ones in one GET, large ones by ranges side by side."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

from .._errors import ObjectNotFoundError, StorageUnavailableError, VersionMismatchError
from .._runtime.buffers import new_bytes
from .._storage import Buffer, Stored
from .bucket import Bucket, Deadline
from .errors import Missing, OutOfRange, Unknown, Unmodified
from .version import Version

_RESTARTS = 5
_SMALL = 256 * 1024
"""Bytes up to which a body is awaited as a whole, immutable and without a buffer made for it."""


class ChangedMeanwhile(Exception):
    """The object was replaced while its parts were read."""


class Read:
    """One `fetch`.

    Whether an answer belongs to the right version is judged by the entity tag that it carries, before its
    body is read. `If-Match` would say no more, and some stores compare it wrongly.
    """

    def __init__(
        self,
        bucket: Bucket,
        key: str,
        name: str,
        start: int,
        stop: int | None,
        part_size: int,
        concurrency: int,
    ) -> None:
        self._bucket, self._key, self._name = bucket, key, name
        self._start, self._stop = start, stop
        self._part_size, self._concurrency = part_size, concurrency
        self._into: memoryview | None = None
        self._unless: Version | None = None
        self._if_version: Version | None = None

    async def run(
        self, *, unless: str | None, if_version: str | None, into: bytearray | memoryview | None
    ) -> Stored | None:
        """See `Storage.fetch`. An object that changes between the parts is read again from the beginning."""
        self._unless = Version.parse(unless) if unless is not None else None
        self._if_version = Version.parse(if_version) if if_version is not None else None
        if into is not None:
            self._into = memoryview(into).cast("B")
            end = self._start + len(self._into)
            self._stop = end if self._stop is None else min(self._stop, end)
        for _ in range(_RESTARTS):
            try:
                return await self._once()
            except ChangedMeanwhile:
                if if_version is not None:
                    raise VersionMismatchError(self._key, self._bucket.storage, if_version) from None
            except Unmodified:
                return None
            except Missing:
                raise ObjectNotFoundError(self._key, self._bucket.storage) from None
        raise StorageUnavailableError(
            "read", self._key, self._bucket.storage, f"it was replaced {_RESTARTS} times while it was read",
            "Read it in parts with if_version=, or write it less often.",
        )  # fmt: skip

    async def _once(self) -> Stored | None:
        if self._stop is None or self._stop > self._start:
            try:
                return await self._get()
            except OutOfRange:
                pass
        return await self._nothing()

    async def _get(self) -> Stored | None:
        params: dict[str, Any] = {"Key": self._name}
        if self._start or self._stop is not None:
            last = "" if self._stop is None else self._stop - 1
            params["Range"] = f"bytes={self._start}-{last}"
        if self._unless is not None:
            params["IfNoneMatch"] = f'"{self._unless.etag}"'
        deadline = self._bucket.deadline("read", self._key)

        async def take(response: dict[str, Any], timer: asyncio.Timeout) -> Stored | None:
            return await self._take(response, deadline, timer)

        stored: Stored | None = await self._bucket.retried("get_object", deadline, take, **params)
        return stored

    async def _take(
        self, response: dict[str, Any], deadline: Deadline, timer: asyncio.Timeout
    ) -> Stored | None:
        body, version = response["Body"], Version.of(response)
        try:
            if self._if_version is not None and not version.matches(self._if_version):
                raise ChangedMeanwhile
            if self._unless is not None and version.etag == self._unless.etag:
                return None  # a store that does not know If-None-Match sends the object again
            length = int(response["ContentLength"])
            size = _whole_size(response, self._start)
            data = await self._receive(body, length, version, deadline, timer)
        except BaseException:
            body.close()  # an unread body would keep its connection for ever
            raise
        return Stored(data, str(version), size)

    async def _receive(
        self, body: Any, length: int, version: Version, deadline: Deadline, timer: asyncio.Timeout
    ) -> Buffer:
        if self._into is not None:
            await self._pour(body, self._into[:length], version, deadline, timer)
            return self._into[:length]
        if length > _SMALL:
            room = new_bytes(length)
            await self._pour(body, room.getbuffer(), version, deadline, timer)
            return room.getvalue()
        data: bytes = await body.read()
        if len(data) != length:
            raise Unknown(f"{len(data)} bytes instead of {length}")
        return data

    async def _pour(
        self, body: Any, buffer: memoryview, version: Version, deadline: Deadline, timer: asyncio.Timeout
    ) -> None:
        if len(buffer) <= self._part_size:
            await _fill(buffer, body, deadline, timer)
        else:
            timer.reschedule(None)  # from here on each part has a time of its own
            await _Parts(self._bucket, self, buffer, version).run(body)

    async def part(self, start: int, target: memoryview, version: Version) -> None:
        """Fill `target` with the bytes from `start` of what is read. The caller holds a connection slot."""

        deadline = self._bucket.deadline("read", self._key)

        async def take(response: dict[str, Any], timer: asyncio.Timeout) -> None:
            try:
                if not Version.of(response).matches(version):
                    raise ChangedMeanwhile
                if int(response["ContentLength"]) != len(target):
                    raise Unknown(f"a range of {response['ContentLength']} bytes instead of {len(target)}")
                await _fill(target, response["Body"], deadline, timer)
            except BaseException:
                response["Body"].close()
                raise

        first = self._start + start
        wanted = f"bytes={first}-{first + len(target) - 1}"
        try:
            await self._bucket.retried("get_object", deadline, take, slot=False, Key=self._name, Range=wanted)
        except (Missing, OutOfRange):
            raise ChangedMeanwhile from None

    async def _nothing(self) -> Stored | None:
        """An empty range cannot be asked for, so a HEAD tells version and size."""
        found = await self._bucket.head(self._bucket.deadline("read", self._key), self._name)
        if found is None:
            raise ObjectNotFoundError(self._key, self._bucket.storage)
        version, size = Version.of(found), int(found["ContentLength"])
        if self._if_version is not None and not version.matches(self._if_version):
            raise ChangedMeanwhile
        if self._unless is not None and version.etag == self._unless.etag:
            return None
        if self._start < size and (self._stop is None or self._stop > self._start):
            raise ChangedMeanwhile  # it was out of range a moment ago
        return Stored(b"" if self._into is None else self._into[:0], str(version), size)

    def plan(self, length: int) -> deque[tuple[int, int]]:
        """The parts of what is read, as start and end."""
        size = self._part_size
        return deque((start, min(start + size, length)) for start in range(0, length, size))

    @property
    def concurrency(self) -> int:
        return self._concurrency


class _Parts:
    """The first answer goes on delivering from the front, ranged requests from the back, until they meet.

    So that no byte is asked for twice, and a store that serves one stream fastest is read by one stream.
    The front has a connection slot and never waits for another; a helper takes its slot before it takes a
    part. Many large reads on few connections would otherwise wait for each other's slots.
    """

    def __init__(self, bucket: Bucket, read: Read, buffer: memoryview, version: Version) -> None:
        self._bucket, self._read, self._buffer, self._version = bucket, read, buffer, version
        self._todo = read.plan(len(buffer))
        self._waiting: set[asyncio.Task[None]] = set()

    async def run(self, body: Any) -> None:
        helpers = min(self._read.concurrency, len(self._todo)) - 1
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(helpers):
                    self._waiting.add(group.create_task(self._back()))
                await self._front(body)
                for helper in self._waiting:
                    helper.cancel()  # there is nothing left to wait for a slot for
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None

    async def _front(self, body: Any) -> None:
        position = 0
        while self._todo:
            start, end = self._todo.popleft()
            target = self._buffer[start:end]
            try:
                deadline = self._bucket.deadline("read", "")
                async with asyncio.timeout_at(deadline.attempt()) as timer:
                    await _fill_exactly(target, body, deadline, timer)
            except Exception:  # whatever broke the stream: the range is asked for, and tells
                self._todo.appendleft((start, end))
                break
            position = end
        if position == len(self._buffer):
            await body.read()  # the end, which lets the connection go back to the pool
            return
        body.close()
        while self._todo:
            start, end = self._todo.popleft()
            await self._read.part(start, self._buffer[start:end], self._version)

    async def _back(self) -> None:
        own = await self._bucket.clients.get()
        task = asyncio.current_task()
        assert task is not None
        while self._todo:
            self._waiting.add(task)
            async with own.slots:
                self._waiting.discard(task)
                if self._todo:
                    start, end = self._todo.pop()
                    await self._read.part(start, self._buffer[start:end], self._version)
        self._waiting.discard(task)


async def _fill_exactly(target: memoryview, body: Any, deadline: Deadline, timer: asyncio.Timeout) -> None:
    position = 0
    while position < len(target):
        received = await body.readinto(target[position:])
        if not received:
            raise Unknown(f"the body ended after {position} of {len(target)} bytes")
        position += received
        deadline.progress(timer)


async def _fill(target: memoryview, body: Any, deadline: Deadline, timer: asyncio.Timeout) -> None:
    await _fill_exactly(target, body, deadline, timer)
    if await body.read():
        raise Unknown(f"the body has more than {len(target)} bytes")


def _whole_size(response: dict[str, Any], start: int) -> int:
    content_range = response.get("ContentRange")
    if content_range is not None:
        return int(content_range.rpartition("/")[2])
    if start:
        raise Unknown("the store ignored the range")
    return int(response["ContentLength"])
