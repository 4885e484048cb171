"""One conditional request, decided: it took place, or it did not, whatever was answered."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from .._errors import ConditionsUnsupportedError
from .bucket import Bucket, Deadline
from .errors import Answer, Changed, Missing, Unknown, Unsupported
from .version import Version, metadata, new_marks, passed

Send = Callable[[], Awaitable[Any]]


class Refused(Exception):
    """The condition does not hold: `current` is what is there instead."""

    def __init__(self, current: Version | None) -> None:
        self.current = current
        super().__init__(current)


class Contradiction(Exception):
    """The store refused although, asked right afterwards, the condition holds."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        super().__init__(answer)


class Absent:
    """The condition that nothing is there."""

    expected = None

    def __init__(self) -> None:
        self.headers = {"IfNoneMatch": "*"}

    def holds(self, current: Version | None) -> bool:
        return current is None


class Same:
    """The condition that a certain version is there; some stores read entity tags without quotes only."""

    def __init__(self, expected: Version, *, quoted: bool) -> None:
        self.expected = expected
        self.headers = {"IfMatch": f'"{expected.etag}"' if quoted else expected.etag}

    def holds(self, current: Version | None) -> bool:
        return current is not None and current.matches(self.expected)


async def put(
    bucket: Bucket, deadline: Deadline, name: str, body: bytes, condition: Absent | Same | None = None
) -> Version:
    """Write an object in one request. One PUT; after any other answer than success, a HEAD, and maybe again.

    Raises:
        Refused: The condition does not hold, and nothing was written by this call.
        Contradiction: See there.
    """
    marks = new_marks(condition.expected if condition else None)
    params: dict[str, Any] = {"Key": name, "Body": body, "Metadata": metadata(marks)}
    if condition is not None:
        params |= condition.headers

    async def send() -> Any:
        return await bucket.once("put_object", deadline, **params)

    return await decide(bucket, deadline, name, marks, condition, send)


async def decide(
    bucket: Bucket,
    deadline: Deadline,
    name: str,
    marks: tuple[str, ...],
    condition: Absent | Same | None,
    send: Send,
) -> Version:
    """Send a write that carries `marks` until it is known whether it took place.

    412, 404, 409, 5xx, silence and a broken connection all leave it open: the request may have been carried
    out, and a repetition of it, by us or by the HTTP client, refused because of that. The object is asked
    whose it is, and whom it followed. What stays undecidable is that our write took place, its answer was
    lost, and before we asked the object was deleted, replaced without a condition, or replaced more often
    than marks are kept: that is reported as refused, or written again.

    Raises:
        Refused, Contradiction: As `put` does.
        Missing: What the request builds on (an upload) is gone, and the object is not there.
        ConditionsUnsupportedError: The store says that it does not know such conditions.
        StorageUnavailableError: Nothing was decided until the deadline; the write may have taken place.
    """
    while True:
        answer: Answer
        try:
            response = await send()
        except Unsupported as honest:
            raise ConditionsUnsupportedError(bucket.storage, f"it answered {honest.reason}") from honest
        except Unknown as unknown:
            answer = unknown
            if condition is None:
                await deadline.pause(unknown)
                continue
        except (Changed, Missing) as refusal:
            answer = refusal
        else:
            version = Version(Version.of(response).etag, marks)
            if version.etag:
                return version
            # Ceph RGW, asked to complete an upload that it has completed, says yes without an entity tag.
            answer = Unknown("success without an entity tag")
        current = await _current(bucket, deadline, name)
        if current is not None and marks[0] in current.marks:
            return current if marks[0] == current.marks[0] else passed(marks)
        if isinstance(answer, Unknown):
            if condition is not None and not condition.holds(current):
                raise Refused(current) from answer
            await deadline.pause(answer)
        elif condition is None or (isinstance(answer, Missing) and condition.holds(current)):
            raise answer
        elif condition.holds(current):
            raise Contradiction(answer) from answer
        else:
            raise Refused(current) from answer


async def _current(bucket: Bucket, deadline: Deadline, name: str) -> Version | None:
    found = await bucket.head(deadline, name)
    return None if found is None else Version.of(found)
