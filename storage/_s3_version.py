"""What a version of an object in a bucket is: its entity tag, and the random mark of the write that made it.

An entity tag is on most stores a hash of the contents: the same bytes written again bring the old one back.
The mark, kept as metadata of the object, makes the text of a version unique, and it tells a writer whose
request was answered by nothing, by an error, or by the refusal of its own repetition, whether the object
there is its own (the HTTP client below repeats a PUT by itself when a kept-alive connection drops).

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

MARK = "onceflow-write"
"""Name of the metadata (`x-amz-meta-onceflow-write`)."""


class Version(NamedTuple):
    """The tag is kept without its quotes, which some stores leave out."""

    etag: str
    mark: str = ""

    @classmethod
    def parse(cls, text: str) -> Version:
        etag, _, mark = text.partition("|")
        return cls(etag, mark)

    @classmethod
    def of(cls, response: dict[str, Any]) -> Version:
        return cls(str(response.get("ETag", "")).strip('"'), response.get("Metadata", {}).get(MARK, ""))

    def matches(self, other: Version) -> bool:
        """Whether both may be the same write, as far as both are known."""
        return self.etag == other.etag and (not self.mark or not other.mark or self.mark == other.mark)

    def __str__(self) -> str:
        return f"{self.etag}|{self.mark}" if self.mark else self.etag


def new_mark() -> str:
    return os.urandom(12).hex()
