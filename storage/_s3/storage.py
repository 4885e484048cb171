"""Objects in an S3 bucket, or in anything that speaks like one."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Sequence
from typing import Any, cast

from .._errors import (
    ConditionsUnsupportedError,
    ObjectExistsError,
    StorageConfigurationError,
    VersionMismatchError,
)
from .._names import key_of, name_of, name_prefix
from .._runtime.buffers import buffers_of, clip
from .._storage import Buffer, Data, Stat, Storage, Stored
from .bucket import Bucket
from .client import Clients, Endpoint
from .errors import Answer, Changed, Missing, Unsupported
from .multipart import Upload, cut, gather, part_size_for
from .options import DEFAULT, Options
from .probe import Conditions, Place
from .put import Absent, Contradiction, Refused, Same, put
from .read import Read
from .version import Version

Buffers = Buffer | Sequence[Buffer]

_TRIES = 3


class S3Storage(Storage):
    """Objects under a prefix of a bucket. Nothing outside of the prefix is ever read, written or listed.

    Credentials come from botocore's usual chain (`AWS_ACCESS_KEY_ID`, `AWS_PROFILE`, the machine's role) and
    are never part of the URL, the repr or the pickle. Each event loop gets a pooled client of its own on
    first use, made in a worker thread and closed by `aclose` or with the loop.

    Every request is repeated with growing, random pauses until it is decided or its time is over; then a
    typed error says what was wrong. A write whose answer was lost is decided by reading back. A *version* is
    the entity tag and a random mark; conditional writes compare contents, for a store can compare the tag
    alone: see `version`. Locks and transactions call `ensure_conditional` first.

    Args:
        bucket: The bucket's name. It must exist.
        prefix: What every object's name begins with, such as `team/a`; empty for the whole bucket.
        endpoint_url: Another store than AWS, such as `https://s3.example.org`.
        region_name: The bucket's region; without it what the environment or the profile says.
        max_connections: Connections, and so requests under way at once, for each event loop.
        part_size: Bytes from which an object is moved in parts of this size. At least 5 MiB.
        concurrency: Parts of one object under way at once. A streamed object takes
            `(concurrency + 2) * part_size` bytes of memory at most, for up to 1000 parts.
        checksums: `when_supported` or `when_required`, as botocore means it. Without it the first for AWS,
            the second for other stores, some of which do not know the headers.
        addressing_style: `path`, `virtual` or `auto`. Without it `path` where there is an endpoint_url.
        timeout: Seconds that one request may take, with all its repetitions, without getting anywhere: each
            piece of a body that goes through begins them anew.

    Raises:
        StorageConfigurationError: One of the options cannot work.
    """

    shared = True

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        endpoint_url: str | None = None,
        region_name: str | None = None,
        max_connections: int = DEFAULT.max_connections,
        part_size: int = DEFAULT.part_size,
        concurrency: int = DEFAULT.concurrency,
        checksums: str | None = None,
        addressing_style: str | None = None,
        timeout: float = DEFAULT.timeout,
    ) -> None:
        self._options = options = Options(
            bucket, prefix, endpoint_url, region_name, max_connections, part_size, concurrency,
            checksums, addressing_style, timeout,
        ).checked()  # fmt: skip
        self._url = options.url
        self._root = f"{options.prefix}/" if options.prefix else ""
        endpoint = Endpoint(
            endpoint_url, region_name, addressing_style, checksums, max_connections,
            connect_timeout=min(3.0, timeout / 3), read_timeout=timeout / 3,
        )  # fmt: skip
        where = endpoint_url or "AWS S3"
        self._bucket = Bucket(bucket, self._url, Clients(endpoint, self._url), float(timeout), where)
        self._conditions = Conditions(self._bucket, Place(endpoint_url, bucket, options.prefix))

    @property
    def url(self) -> str:
        """`s3://bucket/prefix?endpoint_url=…&region=…`."""
        return self._url

    async def fetch(
        self,
        key: str,
        start: int = 0,
        stop: int | None = None,
        *,
        unless: str | None = None,
        if_version: str | None = None,
        into: bytearray | memoryview | None = None,
    ) -> Stored | None:
        """See `Storage.fetch`. One GET up to `part_size` bytes, above that one more for each further part.

        The parts of a large object are of one version: replaced meanwhile, it is read again from the
        beginning. Without `into` a large one comes as a memoryview, and is held once. Cancelled, it leaves
        in `into` whatever had come.
        """
        clip(start, stop, 0)  # refuses negative bounds
        read = Read(
            self._bucket,
            key,
            self._name(key),
            start,
            stop,
            self._options.part_size,
            self._options.concurrency,
        )
        try:
            return await read.run(unless=unless, if_version=if_version, into=into)
        except Answer as answer:
            raise self._odd("read", key, answer) from answer

    async def write(
        self, key: str, data: Data, *, if_absent: bool = False, if_version: str | None = None
    ) -> str:
        """See `Storage.write`. One PUT up to `part_size` bytes, above that one request a part and two more.

        A cancelled large write waits until its upload is aborted. An answer other than success to a
        conditional write costs a HEAD, which decides what it meant. On a store that honours conditions for a
        PUT only, a large conditional write of buffers is one PUT, and a streamed one is refused.

        Raises:
            ConditionsUnsupportedError: The store does not know such a condition.
        """
        name = self._name(key)
        if if_absent and if_version is not None:
            raise ValueError("A write is only-if-absent or only-if-version, never both. Leave one out.")
        parts: AsyncIterator[bytes] | None = None
        if isinstance(data, AsyncIterable):
            parts = gather(data, self._options.part_size)
            first = await anext(parts)
            if len(first) < self._options.part_size:
                data, parts = first, None  # a small one is a buffer like any other, and can be sent again
            else:
                parts = _after(first, parts)
            del first
        answer: Answer | None = None
        for _ in range(_TRIES):
            condition = self._condition(if_absent, if_version)
            try:
                if parts is not None:
                    return str(await self._write_stream(key, name, parts, condition))
                return str(await self._write_buffers(key, name, cast("Buffers", data), condition))
            except Refused:
                if if_version is not None:
                    raise VersionMismatchError(key, self._url, if_version) from None
                raise ObjectExistsError(key, self._url) from None
            except Contradiction as contradiction:
                # Another writer came and went, or the store wants entity tags in another form.
                answer = contradiction.answer
                await self._conditions.ensure()
            except Missing as missing:
                answer = missing  # a finished or aborted upload is made again
            except Answer as odd:
                raise self._odd("write", key, odd) from odd
            if parts is not None:
                break  # it cannot be read twice
        assert answer is not None
        raise self._odd("write", key, answer) from answer

    async def _write_buffers(
        self, key: str, name: str, data: Buffers, condition: Absent | Same | None
    ) -> Version:
        buffers, part_size = buffers_of(data), self._options.part_size
        size = sum(map(len, buffers))
        if size <= part_size or (condition is not None and not await self._conditions.multipart_honoured()):
            body = data if isinstance(data, bytes) else b"".join(buffers)
            return await put(self._bucket, self._bucket.deadline("write", key), name, body, condition)
        return await self._write_parts(key, name, cut(buffers, part_size_for(size, part_size)), condition)

    async def _write_stream(
        self, key: str, name: str, parts: AsyncIterator[bytes], condition: Absent | Same | None
    ) -> Version:
        if condition is not None and not await self._conditions.multipart_honoured():
            request = "CompleteMultipartUpload with a condition; a streamed object needs it, buffers do not"
            raise ConditionsUnsupportedError(self._url, request)
        return await self._write_parts(key, name, parts, condition)

    async def _write_parts(
        self, key: str, name: str, parts: AsyncIterator[bytes], condition: Absent | Same | None
    ) -> Version:
        if condition is not None:
            # A condition is judged when all parts are there. One HEAD may save them all.
            found = await self._bucket.head(self._bucket.deadline("write", key), name)
            current = None if found is None else Version.of(found)
            if not condition.holds(current):
                raise Refused(current)
        return await Upload(self._bucket, key, name, self._options.concurrency, condition).run(parts)

    async def stat(self, key: str) -> Stat | None:
        """See `Storage.stat`. One HEAD."""
        try:
            found = await self._bucket.head(self._bucket.deadline("stat", key), self._name(key))
        except Answer as answer:
            raise self._odd("stat", key, answer) from answer
        if found is None:
            return None
        name = self._name(key).removeprefix(self._root)
        modified = found["LastModified"].timestamp()
        return Stat(key_of(name), int(found["ContentLength"]), str(Version.of(found)), modified)

    async def delete(self, key: str, *, if_version: str | None = None) -> bool:
        """See `Storage.delete`. One HEAD, and one DELETE if there is something to remove.

        The version is compared after the HEAD and sent along, but not every store heeds it then: an object
        that is replaced between the two requests may be removed. What must not be lost is replaced by a
        conditional write instead.
        """
        name = self._name(key)
        deadline = self._bucket.deadline("delete", key)
        try:
            found = await self._bucket.head(deadline, name)
            if found is None:
                return False
            return await self._delete(deadline, key, name, Version.of(found), if_version)
        except Answer as answer:
            raise self._odd("delete", key, answer) from answer

    async def _delete(
        self, deadline: Any, key: str, name: str, current: Version, if_version: str | None
    ) -> bool:
        if if_version is None:
            await self._bucket.retried("delete_object", deadline, Key=name)
            return True
        expected = Version.parse(if_version)
        if not current.matches(expected):
            raise VersionMismatchError(key, self._url, if_version)
        tag: dict[str, Any] = {**Same(expected, quoted=self._conditions.quoted).headers}
        try:
            await self._bucket.retried("delete_object", deadline, Key=name, **tag)
        except Unsupported:
            await self._bucket.retried("delete_object", deadline, Key=name)
        except Missing:
            pass  # a repetition of our own request, or somebody was faster: it is gone
        except Changed:
            found = await self._bucket.head(deadline, name)
            if found is None:
                return True
            if Version.of(found).matches(expected) and self._conditions.quoted:
                await self._conditions.ensure()
                if not self._conditions.quoted:
                    return await self._delete(deadline, key, name, current, if_version)
            raise VersionMismatchError(key, self._url, if_version) from None
        return True

    async def list(self, prefix: str = "") -> AsyncIterator[Stat]:
        """See `Storage.list`. One request for each thousand objects; their versions are entity tags alone."""
        # No name of ours holds a slash: whatever lies deeper is others' and is rolled up by the store.
        params: dict[str, Any] = {"Prefix": self._root + name_prefix(prefix), "Delimiter": "/"}
        while True:
            try:
                page = await self._bucket.retried(
                    "list_objects_v2", self._bucket.deadline("list", prefix), **params
                )
            except Answer as answer:
                raise self._odd("list", prefix, answer) from answer
            for found in page.get("Contents", ()):
                try:
                    key = key_of(found["Key"].removeprefix(self._root))
                except ValueError:
                    continue  # not ours, or the object of a probe
                if key.startswith(prefix):
                    modified = found["LastModified"].timestamp() // 1  # as a HEAD has it
                    yield Stat(key, int(found["Size"]), str(Version.of(found)), modified)
            if not page.get("IsTruncated"):
                return
            params["ContinuationToken"] = page["NextContinuationToken"]

    async def ensure_conditional(self) -> None:
        """See `Storage.ensure_conditional`. About 20 small requests under the prefix, once a process."""
        await self._conditions.ensure()

    async def aclose(self) -> None:
        """See `Storage.aclose`."""
        await self._bucket.clients.aclose()

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), self._options)

    def _name(self, key: str) -> str:
        return self._root + name_of(key)

    def _condition(self, if_absent: bool, if_version: str | None) -> Absent | Same | None:
        if if_version is not None:
            return Same(Version.parse(if_version), quoted=self._conditions.quoted)
        return Absent() if if_absent else None

    def _odd(self, operation: str, key: str, answer: Answer) -> StorageConfigurationError:
        return StorageConfigurationError(
            f"Cannot {operation} {key!r} in {self._url}: the store answered {answer.reason}.",
            "Check bucket, prefix, endpoint_url and options, and whether the store can do this at all.",
        )


async def _after(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for part in rest:
        yield part


def _restore(cls: type[S3Storage], options: Options) -> S3Storage:
    return cls(**options._asdict())
