"""Committing several records together, decided without I/O: generators that yield one step at a time.

The protocol (after Percolator, OSDI 2010, §2.2, without its timestamps and its table):

1. In the order of their storages and keys, each member's object becomes an *intent*: one object that holds the
   new record and what was committed before, names the transaction and all its members, and is written
   conditionally on what was seen. Values that lie apart are written after the intents that name them.
2. The first member is the *primary*. One conditional write turns its intent into a decided one: that single
   write is the commit. Whoever could abort must do so by a conditional write on the same object, so exactly one
   of the two happens, and a writer that wakes up late is refused.
3. The other intents become plain records, and last of all the primary.

A reader who meets an intent looks at the primary: decided → the new record, undecided → the old one. The
primary forgets the transaction only after every other member has; a reader who finds no word of it there
therefore reads its own key once more: changed → settled in between, unchanged → aborted.

Why not a marker object beside the intents, as first planned: a marker must outlive every writer that might come
late, so aborted markers could never be removed safely. With the decision inside the primary nothing is left
behind, and n members cost n + 1 writes before they are visible and 2n + 1 in all. An undecided intent is
abandoned when its writer's process is gone, or its primary has not changed for the lease's time on the
observer's own monotonic clock; whoever needs the key then aborts it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..storage._envelope import Header, pack, split, unpack_header
from ..storage._errors import RecordError
from ..storage._storage import Buffer

Where = tuple[str, str]
"""An object: the URL of its storage, and its key."""


# --- the steps that the shell carries out


class Read(NamedTuple):
    """Answered by `Found`, or None where there is no object."""

    where: Where


class Put(NamedTuple):
    """Answered by the new version. `expect` is a version, ABSENT or ANY; Conflict is thrown in where it does not hold."""

    where: Where
    data: Buffer | Sequence[Buffer]
    expect: str | None


class Remove(NamedTuple):
    """Remove the object if it still is of this version (ANY: whatever it is). Never fails, answered by None."""

    where: Where
    expect: str | None


class Wait(NamedTuple):
    """Wait a little for another transaction's decision; answered by whether it is abandoned."""

    where: Where
    version: str
    lease: float
    owner: tuple[Any, ...]


class Visible(NamedTuple):
    """The commit has happened; what follows is tidying. Answered by None."""


Step = Read | Put | Remove | Wait | Visible
Steps = Generator[Step, Any, Any]
ABSENT = ""
ANY = None


class Found(NamedTuple):
    data: Buffer
    version: str


class Conflict(Exception):
    """The object is another one than expected."""


class Refused(Exception):
    """The transaction cannot commit: somebody aborted it, or holds what it held."""

    def __init__(self, where: Where, reason: str) -> None:
        self.where, self.reason = where, reason
        super().__init__(where, reason)


# --- members and intents


@dataclass(slots=True)
class Member:
    """One record of a transaction.

    Attributes:
        where: Its object.
        record: The new record, whole.
        expect: The version that was seen (ABSENT for none), ANY where nobody looked.
        exclusive: Whether another version than the expected one is fatal (SERIALIZABLE), or is replaced.
        old: The record committed before, whole; empty for none. Filled in when the expectation fails.
        value: An object that must be there with the record: where it lies, and its bytes.
    """

    where: Where
    record: bytes
    expect: str | None = ANY
    exclusive: bool = False
    old: bytes = b""
    value: tuple[Where, Sequence[Buffer]] | None = None


class Intent(NamedTuple):
    """An intent as read."""

    tx: str
    members: list[Where]
    values: list[Where]
    position: int
    decided: bool
    lease: float
    owner: tuple[Any, ...]
    new: bytes
    old: bytes

    @property
    def primary(self) -> Where:
        return self.members[0]


class Writer(NamedTuple):
    """Who commits: the transaction's id, how long its silence is respected, and which process it is."""

    tx: str
    lease: float
    owner: tuple[Any, ...]
    signing_keys: Sequence[bytes] = ()


def parse(data: Buffer, signing_keys: Sequence[bytes] = ()) -> Intent | None:
    """The intent that an object is, None where it is something else."""
    try:
        header, offset = unpack_header(data, signing_keys=signing_keys)
        if header.kind != "intent":
            return None
        new, old = split(header, memoryview(data)[offset:])
        extra = header.extra
        return Intent(
            extra["tx"],
            [tuple(member) for member in extra["members"]],
            [tuple(value) for value in extra["values"]],
            extra["index"],
            extra["decided"],
            extra["lease"],
            tuple(extra["owner"]),
            bytes(new),
            bytes(old),
        )
    except (RecordError, KeyError, TypeError, ValueError):
        return None  # unreadable objects are the reader's business, not the protocol's


def _intent(writer: Writer, members: Sequence[Member], index: int, *, decided: bool) -> list[Buffer]:
    member = members[index]
    header = Header(
        key=member.where[1],
        serializer="intent",
        kind="intent",
        extra={
            "tx": writer.tx,
            "members": [list(other.where) for other in members],
            "values": [list(other.value[0]) for other in members if other.value is not None],
            "index": index,
            "decided": decided,
            "lease": writer.lease,
            "owner": list(writer.owner),
        },
    )
    return pack(header, [member.record, member.old], signing_keys=writer.signing_keys)


# --- committing


def commit(writer: Writer, members: Sequence[Member]) -> Steps:
    """The steps of a commit, in order. Returns when all is tidy; after `Visible` it cannot fail any more.

    Raises:
        Refused: Nothing of it is or becomes visible; what was laid is taken back.
    """
    members = sorted(members, key=lambda member: member.where)
    versions: list[str] = []
    try:
        for index in range(len(members)):
            versions.append((yield from _lay(writer, members, index)))
        for member in members:
            if member.value is not None:
                yield Put(member.value[0], member.value[1], ANY)
        try:
            decided = yield Put(members[0].where, _intent(writer, members, 0, decided=True), versions[0])
        except Conflict:
            raise Refused(members[0].where, "its writer was silent for longer than its lease") from None
    except GeneratorExit:
        raise  # the process dies here: what is left is for whoever finds it
    except BaseException:
        # An error need not mean that nothing was written: the decision may have arrived, and its answer not.
        decided = yield from _withdraw(writer, members, versions)
        if decided is None:
            raise
    yield Visible()
    for member, version in zip(members[1:], versions[1:], strict=True):
        yield from _replace(member.where, member.record, version)
    if decided is not None:
        yield from _replace(members[0].where, members[0].record, decided)


def _lay(writer: Writer, members: Sequence[Member], index: int) -> Steps:
    """Turn a member's object into an intent, over whatever is committed there."""
    member = members[index]
    while True:
        if member.expect is not ANY:
            try:
                return (
                    yield Put(member.where, _intent(writer, members, index, decided=False), member.expect)
                )
            except Conflict:
                if member.exclusive:
                    raise Refused(member.where, "another holder has written it") from None
        found: Found | None = yield Read(member.where)
        if found is None:
            member.expect, member.old = ABSENT, b""
            continue
        foreign = parse(found.data, writer.signing_keys)
        if foreign is None:
            member.expect, member.old = found.version, committed_before(found.data, writer.signing_keys)
        elif foreign.tx == writer.tx:  # our own write, whose answer was lost
            return found.version
        else:
            yield from clear(member.where, found, foreign, writer.signing_keys)


def committed_before(data: Buffer, signing_keys: Sequence[bytes] = ()) -> bytes:
    """What an object that is no intent stands for: the record itself, or what a claim keeps of the one before."""
    try:
        header, offset = unpack_header(data, signing_keys=signing_keys)
    except RecordError:
        return bytes(data)
    if header.kind == "claim":
        return bytes(memoryview(data)[offset:])
    return b"" if header.kind == "free" else bytes(data)


def _withdraw(writer: Writer, members: Sequence[Member], versions: Sequence[str]) -> Steps:
    """Take back what was laid, the primary first; None, or the primary's version if it is decided after all.

    What cannot be reached stays for whoever finds it: it is undecided, or decided as a whole.
    """
    primary = members[0]
    found: Found | None = yield Read(primary.where)
    own = parse(found.data, writer.signing_keys) if found is not None else None
    while found is not None and own is not None and own.tx == writer.tx:
        if own.decided:
            return found.version
        try:
            yield from _bury(primary, found.version, writer.signing_keys)
            break
        except Conflict:
            found = yield Read(primary.where)
            own = parse(found.data, writer.signing_keys) if found is not None else None
    for member in members[1 : len(versions) + 1]:  # the one after the last may have been written as well
        found = yield Read(member.where)
        own = parse(found.data, writer.signing_keys) if found is not None else None
        if found is not None and own is not None and own.tx == writer.tx:
            yield from _restore(member.where, member.old, found.version)
    for member in members:
        if member.value is not None:
            yield Remove(member.value[0], ANY)
    return None


def _bury(primary: Member, version: str, signing_keys: Sequence[bytes]) -> Steps:
    """Undo an undecided primary, so that its writer can never commit.

    Where nothing was committed before, it becomes a tombstone rather than being removed at once: only a
    conditional write is sure to refuse a decision that is still on its way.

    Raises:
        Conflict: It is another object by now.
    """
    if primary.old:
        yield Put(primary.where, primary.old, version)
        return
    grave = pack(
        Header(key=primary.where[1], kind="free", serializer="free"), [b""], signing_keys=signing_keys
    )
    yield Remove(primary.where, (yield Put(primary.where, grave, version)))


def _replace(where: Where, record: bytes, version: str) -> Steps:
    """Settle an intent; another writer having done it, or having replaced it since, is as good."""
    try:
        yield Put(where, record, version)
    except Conflict:
        pass


def _restore(where: Where, old: bytes, version: str) -> Steps:
    if old:
        yield from _replace(where, old, version)
    else:
        yield Remove(where, version)


def replace_one(where: Where, record: Sequence[Buffer], signing_keys: Sequence[bytes] = ()) -> Steps:
    """Write a single record over whatever is committed there, after the transactions that are about to commit."""
    while True:
        found: Found | None = yield Read(where)
        if found is not None and (foreign := parse(found.data, signing_keys)) is not None:
            yield from clear(where, found, foreign, signing_keys)
            continue
        try:
            return (yield Put(where, record, ABSENT if found is None else found.version))
        except Conflict:
            continue


# --- reading and recovering


def effective(where: Where, found: Found, intent: Intent, signing_keys: Sequence[bytes] = ()) -> Steps:
    """What a reader must serve for an object that is an intent: the record's bytes, empty for none.

    Costs nothing more on the primary, one read on another member, and a third in the rare case that the
    transaction was settled between the two.
    """
    while intent.position != 0:
        primary: Found | None = yield Read(intent.primary)
        first = parse(primary.data, signing_keys) if primary is not None else None
        if first is not None and first.tx == intent.tx:
            return intent.new if first.decided else intent.old
        again: Found | None = yield Read(where)
        if again is None:
            return b""
        if again.version == found.version:
            return intent.old
        found, following = again, parse(again.data, signing_keys)
        if following is None:
            return committed_before(again.data, signing_keys)
        intent = following
    return intent.new if intent.decided else intent.old


def clear(where: Where, found: Found, intent: Intent, signing_keys: Sequence[bytes] = ()) -> Steps:
    """Get a foreign intent out of the way: wait for its decision, abort it where it is abandoned, settle it."""
    primary: Found | None = found if intent.position == 0 else (yield Read(intent.primary))
    first = parse(primary.data, signing_keys) if primary is not None else None
    if primary is None or first is None or first.tx != intent.tx:
        # The primary says nothing of it (any more): settled in between, or aborted.
        again: Found | None = yield Read(where)
        if again is not None and again.version == found.version:
            yield from _restore(where, intent.old, found.version)
        return
    if not first.decided:
        abandoned = yield Wait(intent.primary, primary.version, first.lease, first.owner)
        if abandoned:
            yield from abort(primary, first, signing_keys)
        return
    yield from settle(first, primary, signing_keys)


def abort(primary: Found, intent: Intent, signing_keys: Sequence[bytes] = ()) -> Steps:
    """End an abandoned transaction: its primary first, so that its writer can never commit, then the rest."""
    try:
        yield from _bury(Member(intent.primary, b"", old=intent.old), primary.version, signing_keys)
    except Conflict:
        return  # decided or aborted by somebody else just now
    for where in intent.members[1:]:
        found: Found | None = yield Read(where)
        own = parse(found.data, signing_keys) if found is not None else None
        if found is not None and own is not None and own.tx == intent.tx:
            yield from _restore(where, own.old, found.version)
    for value in intent.values:
        yield Remove(value, ANY)


def settle(intent: Intent, primary: Found, signing_keys: Sequence[bytes] = ()) -> Steps:
    """Finish a decided transaction that its writer has not finished: every member plain, the primary last."""
    for where in intent.members[1:]:
        found: Found | None = yield Read(where)
        own = parse(found.data, signing_keys) if found is not None else None
        if found is not None and own is not None and own.tx == intent.tx:
            yield from _replace(where, own.new, found.version)
    yield from _replace(intent.primary, intent.new, primary.version)
