"""Values and chunks that no record names: whose they are, and how they go.

A value that lies apart from its record, and the chunks of a stream, are written before the record that names them.
Nothing can do both in one step, so a writer that is killed in between leaves objects that nobody knows of. Their
names say whose they are, `value-<owner>-<id>-<process>` and `chunk-<owner>-<id>-<process>-<n>`: the key of the
record that may name them, and the process that has written them. So one read tells whether one is needed.

It is removed only if all of this holds, in this order of looking:

1. The listing showed it, and its writer is gone for good: a process of this machine that has died, or this one, and
   the write is over. Of a process elsewhere nothing is known, so a week has to pass; a writer that lives longer than
   that between value and record loses the value, which is a miss. On shared storage a minute is added always: a
   request that a dead process has sent may still arrive.
2. After that, the record of its key is another one, or there is none. Nobody could have made it one that names the
   value meanwhile: only its writer could, or who finds the writer's decided intent, and that names it as well.
   A claim, an undecided intent or what cannot be read there: it stays.

Values that were written for records in another storage than the one looked at stay as well; their names say so.
"""

from __future__ import annotations

import hashlib
import random
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakValueDictionary

from ...storage import ObjectNotFoundError, RecordError, Storage
from ...storage._format.envelope import Header, unpack_header
from ...storage._names import name_of
from ...storage._storage import Stat
from .._commit.driver import Carrier, is_gone, this_process
from .._commit.intents import Intent, Keys, committed, is_grave, may_be_intent, parse
from .._commit.protocol import BEGINNING, read
from .._commit.requests import Found
from .._runs.run import new_id

if TYPE_CHECKING:
    from .chunks import ChunkWriter
    from .record import Place

WEEK = 7 * 24 * 3600.0
"""Seconds that a process elsewhere may take from a value to its record."""
MINUTE = 60.0
"""Seconds that a request of a dead process may be under way to shared storage."""
SAMPLE = 100
"""How many are looked at in passing."""

STREAM = "stream"
"""Names, in the header of a stream's record, the id of its chunks."""

writing: set[str] = set()
"""The ids of values that this process has written, or is about to, and whose record is not there yet."""
streaming: WeakValueDictionary[str, ChunkWriter] = WeakValueDictionary()
"""Those of the streams that it writes, until nobody can commit them any more."""

_NAME = re.compile(
    r"(?:value|chunk)-(?P<owner>(?:[0-9a-f]{64}|k[0-9a-f]{24})(?:@[0-9a-f]{8})?)-(?P<id>[0-9a-f-]{36})"
    r"-(?P<host>[0-9a-f]{8})\.(?P<pid>[0-9]+)\.(?P<started>[0-9]*)(?:-[0-9]+)?"
)
_DIGEST = re.compile(r"[0-9a-f]{64}")


# --- names


def value_name(place: Place, key: str) -> str:
    """A new object for a value of the record under `key`."""
    return f"value-{_owner(place.records, place.storage, key)}-{new_id()}-{_process()}"


def chunk_name(place: Place, key: str, stream: str, number: int) -> str:
    """The object of a stream's chunk; the stream's record lies under `key`."""
    return f"{chunks_of(place, key, stream)}{_process()}-{number}"


def chunks_of(place: Place, key: str, stream: str) -> str:
    """What the names of all chunks of a stream begin with."""
    return f"chunk-{_owner(place.records, place.storage, key)}-{stream}-"


def id_of(name: str | None) -> str | None:
    """The id in a name; None for a name of another kind."""
    match = _NAME.fullmatch(name or "")
    return match["id"] if match is not None else None


def _owner(records: Storage, values: Storage, key: str) -> str:
    """The key, as far as it is a digest itself, else its digest; and in which storage, if that is another one."""
    owner = key if _DIGEST.fullmatch(key) else "k" + hashlib.sha256(name_of(key).encode()).hexdigest()[:24]
    return owner + _where(records, values)


def _where(records: Storage, values: Storage) -> str:
    return "" if records.url == values.url else "@" + hashlib.sha256(records.url.encode()).hexdigest()[:8]


def _host() -> str:
    host, space, _, _ = this_process()
    return hashlib.sha256(f"{host} {space}".encode()).hexdigest()[:8]


def _process() -> str:
    _, _, pid, started = this_process()
    return f"{_host()}.{pid}.{started}"


# --- removing them


class _Orphan(NamedTuple):
    name: str
    owner: str
    id: str


class Sweep:
    """One look at the values and chunks of a storage.

    Args:
        carrier: Carries out what ends abandoned transactions.
        signing_keys: For the records.
        records: Where records lie.
        values: Where their values lie: the same storage, or another one.
        clock: Unix time in seconds, as the storage has it.
    """

    def __init__(
        self,
        carrier: Carrier,
        signing_keys: Keys,
        records: Storage,
        values: Storage,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._carrier, self._keys = carrier, signing_keys
        self._records, self._values = records, values
        self._clock = clock

    async def some(self) -> int:
        """As `all`, for `SAMPLE` at the most, and without a look at records that are not asked after.

        Costs a listing of values and chunks, and for those whose writer is gone a read of each one's record; a
        listing of all keys only where keys are no digests.
        """
        found = await self._abandoned()
        return await self._remove(random.sample(found, min(SAMPLE, len(found))))

    async def all(self) -> int:
        """End what abandoned transactions have left, and remove the values and chunks that nobody needs; how many.

        Costs a listing, and a read of the beginning of every object.
        """
        found = await self._abandoned()
        async for stat in self._records.list():
            if _NAME.fullmatch(stat.key) is None:
                await self._named_by(stat.key)
        return await self._remove(found)

    async def _abandoned(self) -> list[_Orphan]:
        """Those whose writer is gone."""
        here, host = _where(self._records, self._values), _host()
        found = []
        for prefix in ("value-", "chunk-"):
            async for stat in self._values.list(prefix):
                match = _NAME.fullmatch(stat.key)
                if (
                    match is None
                    or not match["owner"].endswith(here)
                    or ("@" in match["owner"]) != bool(here)
                ):
                    continue
                if self._is_abandoned(stat, match, host):
                    found.append(_Orphan(stat.key, match["owner"].removesuffix(here), match["id"]))
        return found

    def _is_abandoned(self, stat: Stat, match: re.Match[str], host: str) -> bool:
        age = self._clock() - stat.modified
        if self._values.shared and age < MINUTE:
            return False
        if match["host"] != host:
            return age > WEEK
        if match["id"] in writing or match["id"] in streaming:
            return False
        here = this_process()
        process = (*here[:2], int(match["pid"]), match["started"])
        return process == here or is_gone(process)

    async def _remove(self, found: list[_Orphan]) -> int:
        keys = await self._keys_of({orphan.owner for orphan in found})
        count = 0
        for owner, owned in keys.items():
            named = [await self._named_by(key) for key in owned]
            for orphan in found:
                if orphan.owner == owner and not any(ids is None or orphan.id in ids for ids in named):
                    count += await self._values.delete(orphan.name)
        return count

    async def _keys_of(self, owners: set[str]) -> dict[str, list[str]]:
        """The keys that owners stand for; none for those whose record is not there."""
        keys: dict[str, list[str]] = {owner: [owner] if _DIGEST.fullmatch(owner) else [] for owner in owners}
        if not all(keys.values()):
            async for stat in self._records.list():
                owner = _owner(self._records, self._records, stat.key)
                if owner in keys and stat.key not in keys[owner]:
                    keys[owner].append(stat.key)
        return keys

    async def _named_by(self, key: str) -> set[str] | None:
        """The ids that the object under a key names; None where that is not certain, or not settled."""
        where = (self._records.url, key)
        try:
            beginning = await self._fetch(key, BEGINNING)
            if not may_be_intent(beginning.data, self._keys):
                header, _ = unpack_header(beginning.data, signing_keys=self._keys)
                if not is_grave(beginning.data, self._keys):
                    return _of(header) if header.kind != "claim" else None
            whole = await self._fetch(key)
            await self._carrier.run(read(where, whole, self._keys))  # ends it where it is abandoned
            whole = await self._fetch(key)
            own = parse(where, whole.data, self._keys)
            if own is not None:
                return _of_intent(own, self._keys)
            header, _ = unpack_header(whole.data, signing_keys=self._keys)
        except ObjectNotFoundError:
            return set()
        except RecordError:
            return None
        return _of(header) if header.kind != "claim" else None

    async def _fetch(self, key: str, limit: int | None = None) -> Found:
        stored = await self._records.fetch(key, 0, limit)
        assert stored is not None  # None answers `unless` only
        return Found(stored.data, stored.version)


def _of(header: Header) -> set[str]:
    return {name for name in (id_of(header.location), header.extra.get(STREAM)) if name is not None}


def _of_intent(own: Intent, keys: Keys) -> set[str] | None:
    """Its writer lives, or has decided it: what it names in either half is needed."""
    named: set[str] = {id_ for _, name in own.values if (id_ := id_of(name)) is not None}
    try:
        for record in (own.new, committed(own.old, keys)):
            if record:
                named |= _of(unpack_header(record, signing_keys=keys)[0])
    except RecordError:
        return None
    return named
