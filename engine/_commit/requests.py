"""What the transaction protocol asks its shell to do: one step at a time, each with its answer.

The protocol (`protocol`) is written as generators that yield these and are sent the answers, so that tests can
stop, interleave and lose any step without a storage or an event loop. `driver` carries them out.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

from ...storage._storage import Buffer

Where = tuple[str, str]
"""An object: the URL of its storage, and its key."""

ABSENT = ""
ANY = None


class Read(NamedTuple):
    """Answered by `Found`, or None where there is no object. With a `limit` that many bytes from its start do."""

    where: Where
    limit: int | None = None


class Put(NamedTuple):
    """Answered by the new version. Conflict is thrown in where not `expect` (a version, ABSENT, ANY) is there."""

    where: Where
    data: Buffer | Sequence[Buffer]
    expect: str | None


class Remove(NamedTuple):
    """Remove the object if it still is of this version (ANY: whatever it is). Never a conflict; answered by None."""

    where: Where
    expect: str | None


class Ask(NamedTuple):
    """Answered by whether an undecided transaction is abandoned. With `wait` its shell first gives it a little time."""

    where: Where
    version: str
    tx: str
    lease: float
    owner: tuple[Any, ...]
    wait: bool = False


class Together(NamedTuple):
    """Several ways to go at once. Answered by what they return, in order; if some raise, one error is thrown in
    when all have ended."""

    ways: Sequence[Steps]


class Visible(NamedTuple):
    """The commit has happened; what follows is tidying, and whether it succeeds changes nothing. Answered by None."""


Step = Read | Put | Remove | Ask | Together | Visible
Steps = Generator[Step, Any, Any]


class Found(NamedTuple):
    data: Buffer
    version: str


class Conflict(Exception):
    """The object is another one than expected."""


class Refused(Exception):
    """The transaction cannot commit: somebody aborted it, or holds what it held. Nothing of it is visible."""

    def __init__(self, where: Where, reason: str) -> None:
        self.where, self.reason = where, reason
        super().__init__(where, reason)


class InDoubt(Exception):
    """The decision was sent, and neither its answer nor the object could be had: all of it is visible, or nothing."""

    def __init__(self, where: Where, reason: str) -> None:
        self.where, self.reason = where, reason
        super().__init__(where, reason)
