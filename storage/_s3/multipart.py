"""A large object on its way up: parts side by side, few of them in memory, nothing visible before the end.

An upload that fails or is cancelled is aborted. What a killed process leaves is invisible, but takes room
and is paid for: give the bucket a lifecycle rule that aborts incomplete multipart uploads.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from typing import Any

from .._runtime.buffers import buffers_of
from .._runtime.shield import to_the_end
from .._storage import Buffer
from .bucket import Bucket
from .put import Absent, Same, decide
from .version import Version, metadata, new_marks

_MOST_PARTS = 10_000


def part_size_for(size: int, part_size: int) -> int:
    """The part size that lets an object of `size` bytes fit in the number of parts that S3 allows."""
    return max(part_size, -(-size // _MOST_PARTS))


async def cut(buffers: Sequence[memoryview], part_size: int) -> AsyncIterator[bytes]:
    """The buffers' bytes in parts; each is copied when it is asked for."""
    part = bytearray()
    for buffer in buffers:
        for start in range(0, len(buffer), part_size):
            piece = buffer[start : start + part_size]
            if not part and len(piece) == part_size:
                yield bytes(piece)
                continue
            part += piece
            if len(part) >= part_size:
                yield bytes(part[:part_size])
                del part[:part_size]
    if part:
        yield bytes(part)


async def gather(stream: AsyncIterable[Buffer], part_size: int) -> AsyncIterator[bytes]:
    """A stream's bytes in parts, at least one, which grow after each thousandth so that 400 GiB fit."""
    part, count = bytearray(), 0
    async for piece in stream:
        # Each piece is copied before the next is asked for: sources reuse their buffers.
        for view in buffers_of(piece):
            part += view
        while len(part) >= (wanted := part_size * (1 + count // 1000)):
            yield bytes(part[:wanted])
            del part[:wanted]
            count += 1
    if part or not count:
        yield bytes(part)


class Upload:
    """One multipart upload of one object."""

    def __init__(
        self, bucket: Bucket, key: str, name: str, concurrency: int, condition: Absent | Same | None
    ) -> None:
        self._bucket, self._key = bucket, key
        self._target: dict[str, Any] = {"Key": name}
        self._condition = condition
        self._marks = new_marks(condition.expected if condition else None)
        self._slots = asyncio.Semaphore(concurrency)
        self._parts: list[dict[str, Any]] = []

    async def run(self, parts: AsyncIterator[bytes]) -> Version:
        """Upload and complete; one request for each part and two more.

        Raises:
            Refused, Contradiction: As `decide` does; the upload is aborted.
            Missing: The upload was gone when it was to be completed: it has to be made again.
        """
        try:
            await to_the_end(self._begin())
            await self._send_all(parts)
            return await self._complete()
        except BaseException:
            if "UploadId" in self._target:
                await to_the_end(self._bucket.quietly("abort_multipart_upload", **self._target))
            raise

    async def _begin(self) -> None:
        deadline = self._bucket.deadline("write", self._key)
        begun = await self._bucket.retried(
            "create_multipart_upload", deadline, Metadata=metadata(self._marks), **self._target
        )
        self._target["UploadId"] = begun["UploadId"]

    async def _send_all(self, parts: AsyncIterator[bytes]) -> None:
        number = 0
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    await self._slots.acquire()  # before the part is made: that bounds the memory
                    part = await anext(parts, None)
                    if part is None:
                        break
                    number += 1
                    group.create_task(self._send(number, part))
                    del part
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None

    async def _send(self, number: int, part: bytes) -> None:
        try:
            deadline = self._bucket.deadline("write", self._key)
            sent = await self._bucket.retried(
                "upload_part", deadline, PartNumber=number, Body=part, **self._target
            )
            self._parts.append({"PartNumber": number, "ETag": sent["ETag"]})
        finally:
            self._slots.release()

    async def _complete(self) -> Version:
        self._parts.sort(key=lambda part: int(part["PartNumber"]))
        deadline = self._bucket.deadline("write", self._key)
        params: dict[str, Any] = {"MultipartUpload": {"Parts": self._parts}, **self._target}
        if self._condition is not None:
            params |= self._condition.headers

        async def send() -> Any:
            return await self._bucket.once("complete_multipart_upload", deadline, **params)

        return await decide(self._bucket, deadline, self._target["Key"], self._marks, self._condition, send)
