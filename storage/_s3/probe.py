"""Does this store honour conditions? Asked once for each bucket, prefix and process, by trying.

Of six S3 servers that were tried, two accept every condition and ignore it without a word, three ignore
some, and one compares entity tags only if they come without quotes. A lock on such a store is none. What a
probe cannot show is that check and write are one step; it finds every other fault.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, TypeVar

from .._errors import ConditionsUnsupportedError
from .._runtime.shield import to_the_end
from .bucket import Bucket, Deadline
from .errors import Changed, Missing, Unknown, Unsupported
from .put import Absent, Contradiction, Refused, Same, put
from .version import Version

T = TypeVar("T")

_RACERS = 8


class _Flaw(Exception):
    """What the store did that it must not."""


class Place(NamedTuple):
    """What a finding holds for."""

    endpoint_url: str | None
    bucket: str
    prefix: str


class Finding(NamedTuple):
    """`flaw` says which request was not honoured; without one, entity tags are sent as `quoted` says."""

    quoted: bool = True
    flaw: str | None = None


_findings: dict[Place, Finding] = {}
_multipart: dict[Place, bool] = {}


class Conditions:
    """What is known of one storage's conditions, and the way to find out."""

    def __init__(self, bucket: Bucket, place: Place) -> None:
        self._bucket, self._place = bucket, place

    @property
    def quoted(self) -> bool:
        """How entity tags are sent; as the standard has it until a probe knows better."""
        return _findings.get(self._place, Finding()).quoted

    async def ensure(self) -> None:
        """Return if conditional PUTs are honoured. The first time about 20 small requests, then none.

        Cancelled, it leaves the question open and removes its objects, but for one that arrives later still;
        listings do not show them.

        Raises:
            ConditionsUnsupportedError: They are not; it names the request.
        """
        finding = _findings.get(self._place)
        if finding is None:
            finding = await self._once(_findings, self._probe)
        if finding.flaw is not None:
            raise ConditionsUnsupportedError(self._bucket.storage, finding.flaw)

    async def multipart_honoured(self) -> bool:
        """Whether CompleteMultipartUpload honours conditions, too, which some do not that honour a PUT's."""
        await self.ensure()
        known = _multipart.get(self._place)
        return await self._once(_multipart, self._probe_multipart) if known is None else known

    async def _once(self, known: dict[Place, T], probe: Callable[[], Awaitable[T]]) -> T:
        own = await self._bucket.clients.get()
        async with own.probing:  # whoever waited here finds the answer
            if self._place not in known:
                known[self._place] = await probe()
            return known[self._place]

    def _name(self, what: str) -> str:
        # No key's name begins with a dot, so that listings tell these apart.
        name = f".probe-{what}-{os.urandom(8).hex()}"
        return f"{self._place.prefix}/{name}" if self._place.prefix else name

    def _deadline(self) -> Deadline:
        return self._bucket.deadline("probe conditional writes of", self._place.prefix)

    async def _probe(self) -> Finding:
        name, raced = self._name("one"), self._name("race")
        try:
            await self._creation(name)
            quoted = await self._replacement(name)
            await self._race(raced)
        except ConditionsUnsupportedError as error:
            return Finding(flaw=error.request)
        except _Flaw as flaw:
            return Finding(flaw=str(flaw))
        finally:
            await to_the_end(self._remove(name, raced))
        return Finding(quoted)

    async def _creation(self, name: str) -> None:
        if not await self._put(name, b"1", Absent()):
            raise _Flaw("PUT with If-None-Match: * refused to make a new object")
        if await self._put(name, b"2", Absent()):
            raise _Flaw("PUT with If-None-Match: * replaced an existing object")

    async def _replacement(self, name: str) -> bool:
        """Whether entity tags are wanted in quotes."""
        first = await self._look(name)
        wrong = Version("0" * 32)
        for quoted in (True, False):
            if await self._put(name, b"3", Same(wrong, quoted=quoted)):
                raise _Flaw("PUT with If-Match replaced an object with another entity tag")
            if await self._put(name, b"4", Same(first, quoted=quoted)):
                break
        else:
            raise _Flaw("PUT with If-Match never matched the object's entity tag")
        if await self._put(name, b"5", Same(first, quoted=quoted)):
            raise _Flaw("PUT with If-Match replaced an object that had changed")
        return quoted

    async def _race(self, name: str) -> None:
        wins = await asyncio.gather(*(self._put(name, b"%d" % racer, Absent()) for racer in range(_RACERS)))
        if sum(wins) != 1:
            raise _Flaw(f"PUT with If-None-Match: * had {sum(wins)} winners of {_RACERS}")

    async def _put(self, name: str, body: bytes, condition: Absent | Same) -> bool:
        try:
            await put(self._bucket, self._deadline(), name, body, condition)
        except (Refused, Contradiction):
            return False
        return True

    async def _look(self, name: str) -> Version:
        found = await self._bucket.head(self._deadline(), name)
        if found is None:
            raise _Flaw("an object just written was not there")
        version = Version.of(found)
        if not version.marks:
            raise _Flaw("the metadata of an object was not kept")
        return version

    async def _probe_multipart(self) -> bool:
        name, deadline = self._name("multipart"), self._deadline()
        target: dict[str, Any] = {"Key": name}
        upload: dict[str, Any] = {}
        try:
            await put(self._bucket, deadline, name, b"1")
            upload = await self._bucket.retried("create_multipart_upload", deadline, **target)
            target["UploadId"] = upload["UploadId"]
            part = await self._bucket.retried("upload_part", deadline, PartNumber=1, Body=b"2", **target)
            parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
            await self._bucket.once(
                "complete_multipart_upload", deadline, MultipartUpload=parts, IfNoneMatch="*", **target
            )
        except (Changed, Unsupported, Missing) as answer:
            return isinstance(answer, Changed)
        except Unknown as unknown:
            deadline.give_up(unknown)
        finally:
            await to_the_end(self._remove(name))
            if upload:
                await to_the_end(self._bucket.quietly("abort_multipart_upload", **target))
        return False

    async def _remove(self, *names: str) -> None:
        for name in names:
            await self._bucket.quietly("delete_object", Key=name)
