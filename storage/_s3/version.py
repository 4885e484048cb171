"""What a version of an object in a bucket is: its entity tag and the random marks of the writes behind it.

An entity tag is on most stores a hash of the contents: the same bytes written again bring the old one back.
The mark of the write, kept as metadata of the object, makes the text of a version unique, and it tells a
writer whose request was answered by nothing, by an error, or by the refusal of its own repetition, whether
the object there is its own (the HTTP client below repeats a PUT by itself when a kept-alive connection
drops). A conditional write adds the latest marks of what it replaces, so that a writer still finds its own
after others have gone on from there.

Only the entity tag can be part of the store's own decision. A conditional write therefore compares contents:
it also succeeds where others have, since the version was read, written the very same bytes again. No update
is lost by that, for the object is in the state that the writer saw. Who must tell apart two writes of equal
bytes puts a nonce into them, as records and leases do. Reads and deletes compare the mark, too. Listings
know the tag alone, and a version without a mark is accepted everywhere.

Rejected: a HEAD before each conditional write (one more request, and not atomic), and a random trailer in
each object (it would not hold the bytes that were written).
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

MARKS = "onceflow-writes"
"""Name of the metadata (`x-amz-meta-onceflow-writes`)."""

_KEPT = 6
_NEVER = "0" * 32


class Version(NamedTuple):
    """The tag is kept without its quotes, which some stores leave out. The newest mark comes first."""

    etag: str
    marks: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Version:
        etag, _, marks = text.partition("|")
        if not (etag.isascii() and etag.isprintable()):
            etag = _NEVER  # no store made it, and no header can carry it
        return cls(etag, _split(marks))

    @classmethod
    def of(cls, response: dict[str, Any]) -> Version:
        """What a response's headers, or an entry of a listing, tell."""
        etag = str(response.get("ETag", "")).strip('"')
        return cls(etag, _split(response.get("Metadata", {}).get(MARKS, "")))

    def matches(self, other: Version) -> bool:
        """Whether both may be the same write, as far as both are known."""
        return self.etag == other.etag and (
            not self.marks or not other.marks or self.marks[0] == other.marks[0]
        )

    def __str__(self) -> str:
        return f"{self.etag}|{'.'.join(self.marks)}" if self.marks else self.etag


def new_marks(replaced: Version | None = None) -> tuple[str, ...]:
    """The marks of a new write, the first of them its own, after those of what it replaces."""
    return (os.urandom(8).hex(), *(replaced.marks[: _KEPT - 1] if replaced else ()))


def metadata(marks: tuple[str, ...]) -> dict[str, str]:
    return {MARKS: ".".join(marks)}


def passed(marks: tuple[str, ...]) -> Version:
    """The version of a write that took place and was replaced since: no object has it any more."""
    return Version(_NEVER, marks)


def _split(marks: str) -> tuple[str, ...]:
    return tuple(marks.split(".")) if marks else ()
