"""Intents: the objects that stand in a record's place while a transaction commits.

An intent holds the record that is to be and the one that was, whole, so that each reader can be served from it.
The first member's intent, the *primary*, carries the decision and the list of all members; the others name the
primary only, so that a transaction of n members writes O(n) bytes.

Members that lie in the intent's own storage are named without its URL: the same folder may be mounted elsewhere,
and the same bucket be reached by another endpoint, where the intent is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ...storage._errors import RecordError
from ...storage._format.envelope import Header, header_size, pack, split, unpack_header
from ...storage._storage import Buffer
from .requests import ANY, Where

Keys = Sequence[bytes]
"""Signing keys: the first signs, all verify."""


class Writer(NamedTuple):
    """Who commits: the transaction's id, how long its silence is respected, and which process it is."""

    tx: str
    lease: float
    owner: tuple[Any, ...]
    signing_keys: Keys = ()


@dataclass(slots=True)
class Member:
    """One record of a transaction.

    Attributes:
        where: Its object.
        record: The new record, whole.
        expect: The version that was seen (ABSENT for none), ANY where nobody looked.
        exclusive: Whether another version than the expected one is fatal (SERIALIZABLE), or is replaced.
        value: An object that must be there before the record is visible: where it lies, and its bytes.
        moves_to: Where the value lies that is at first part of the record: a place that other records name
            too, so that it must not change before the commit. Once settled, the record is its header only.
        values_at: The URL of the storage in which values of such records lie apart.
        old: The record committed before, whole; empty for none. Filled in by the protocol.
        version: Of its intent, once laid.
    """

    where: Where
    record: bytes
    expect: str | None = ANY
    exclusive: bool = False
    value: tuple[Where, Sequence[Buffer]] | None = None
    moves_to: Where | None = None
    values_at: str = ""
    old: bytes = field(default=b"", init=False)
    version: str | None = field(default=None, init=False)


class Intent(NamedTuple):
    """An intent as it was read, all places as they are called here."""

    tx: str
    members: list[Where]
    values: list[Where]
    is_primary: bool
    decided: bool
    lease: float
    owner: tuple[Any, ...]
    moves_to: Where | None
    values_at: str
    new: bytes
    old: bytes

    @property
    def primary(self) -> Where:
        return self.members[0]


def intent(writer: Writer, members: Sequence[Member], index: int, *, decided: bool = False) -> list[Buffer]:
    """The intent of a member, packed."""
    member = members[index]
    home = member.where[0]

    def names(places: Sequence[Where]) -> list[list[str]]:
        return [["" if url == home else url, key] for url, key in places]

    named = members if index == 0 else members[:1]
    header = Header(
        key=member.where[1],
        serializer="intent",
        kind="intent",
        extra={
            "tx": writer.tx,
            "members": names([other.where for other in named]),
            "values": names([other.value[0] for other in named if other.value is not None]),
            "primary": index == 0,
            "decided": decided,
            "lease": writer.lease,
            "owner": list(writer.owner),
            "moves_to": names([member.moves_to])[0] if member.moves_to is not None else None,
            "values_at": "" if member.values_at == home else member.values_at,
        },
    )
    return pack(header, [member.record, member.old], signing_keys=writer.signing_keys)


def parse(where: Where, data: Buffer, keys: Keys) -> Intent | None:
    """The intent that lies at `where`; None if it is something else, or unreadable, which is the reader's business."""
    home = where[0]

    def place(named: Sequence[str]) -> Where:
        url, key = named
        return (url or home, key)

    try:
        header, offset = unpack_header(data, signing_keys=keys)
        if header.kind != "intent":
            return None
        new, old = split(header, memoryview(data)[offset:])
        extra = header.extra
        return Intent(
            extra["tx"],
            [place(member) for member in extra["members"]],
            [place(value) for value in extra["values"]],
            extra["primary"],
            extra["decided"],
            extra["lease"],
            tuple(extra["owner"]),
            place(extra["moves_to"]) if extra["moves_to"] is not None else None,
            extra["values_at"] or home,
            bytes(new),
            bytes(old),
        )
    except (RecordError, KeyError, TypeError, ValueError):
        return None


def may_be_intent(beginning: Buffer, keys: Keys) -> bool:
    """Judged from an object's first bytes; true also where they are too few to tell."""
    try:
        if header_size(beginning) > len(beginning):
            return True
        return unpack_header(beginning, signing_keys=keys)[0].kind == "intent"
    except RecordError:
        return False


def committed(data: Buffer, keys: Keys) -> bytes:
    """What an object that is no intent stands for: itself, what a claim keeps of the one before, or nothing."""
    try:
        header, offset = unpack_header(data, signing_keys=keys)
    except RecordError:
        return bytes(data)
    if header.kind == "claim":
        return bytes(memoryview(data)[offset:])
    return b"" if header.kind == "free" else bytes(data)


# --- graves


def grave(key: str, keys: Keys) -> list[Buffer]:
    """What an aborted primary is replaced by before it is removed.

    Only a conditional write is sure to refuse a decision that is still on its way: not every store heeds the
    condition of a removal.
    """
    return pack(Header(key=key, kind="free", serializer="intent"), [b""], signing_keys=keys)


def is_grave(data: Buffer, keys: Keys) -> bool:
    """Whether it is one of these; those of claims carry a generation on, and stay."""
    try:
        header, _ = unpack_header(data, signing_keys=keys)
    except RecordError:
        return False
    return header.kind == "free" and header.serializer == "intent"


# --- values that lie apart

OWN = "own"
"""Marks, in a record's header, a value that lies apart under a name of its own, which no other record names."""


def value_of(record: Buffer, values_at: str, keys: Keys) -> Where | None:
    """The object that holds a record's value and nothing but it: to be removed when the record is replaced."""
    try:
        header, _ = unpack_header(record, signing_keys=keys)
    except RecordError:
        return None
    if header.location is None or OWN not in header.extra:
        return None
    return values_at, header.location


def halves(record: bytes) -> tuple[bytes, bytes]:
    """Header and value of a record that was packed as one."""
    size = header_size(record)
    return record[:size], record[size:]
