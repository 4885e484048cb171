"""What is remembered of a task's records, so that a miss can say what has changed since.

Per task and storage a small note keeps the components of the last records, read at most once per engine and only
when a miss has to be explained. It is written in the background: soon after a task's first commit, then at most
every ten seconds, and when the engine closes. So a hit pays nothing, a miss at most one small read, a commit
waits for nothing, and a process that is killed takes with it what it committed in its last seconds only: the
next one then says "no record" where it could have said more. Notes lie in the records' storage, hidden from
listings, so that another machine finds them; those about a local folder lie in `~/.onceflow/explain`, because
that folder is the user's to count.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...storage import LocalStorage, ObjectNotFoundError, Storage
from ...storage._format.envelope import Header, check_payload, pack, split, unpack_header
from ...storage._names import HIDDEN
from ...storage._values import codec
from .._keys.policies import Components
from .._runs.logging import logger

if TYPE_CHECKING:
    from .._caching.turn import Call
    from .._definitions.definition import Definition

KEPT = 256
"""How many records of a task a note remembers: some 10 KB."""
DIGITS = 16
"""Hex digits kept of each digest: enough to tell them apart, not to key by."""
SOON = 0.2
"""Seconds after a task's first commit until its note is written, where that is a file of this machine."""
SOON_SHARED = 5.0
"""The same where it costs a request."""
LATER = 10.0
"""Seconds from then on."""


Entry = frozenset[tuple[str, str]]
"""The components of one record, with shortened digests."""


@dataclass(slots=True)
class _Notes:
    """What is known of one task's records in one storage, the newest last."""

    storage: Storage
    key: str
    entries: dict[Entry, None] = field(default_factory=dict)
    pairs: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)  # each is kept once
    is_loaded: bool = False
    is_changed: bool = False
    is_saved: bool = False

    def add(self, components: Components) -> None:
        entry = _short(components)
        self.entries.pop(entry, None)
        self.entries[frozenset(self.pairs.setdefault(pair, pair) for pair in entry)] = None
        if len(self.entries) > KEPT:
            del self.entries[next(iter(self.entries))]
            if len(self.pairs) > 2 * KEPT * len(entry):
                self.pairs = {pair: pair for each in self.entries for pair in each}

    def add_earlier(self, entries: list[Entry]) -> None:
        """Take in what a note says, as older than what is known."""
        older = [entry for entry in entries if entry not in self.entries]
        del older[: max(0, len(older) + len(self.entries) - KEPT)]
        self.entries = dict.fromkeys([*older, *self.entries])


class Explainer:
    """The notes of one engine."""

    def __init__(self) -> None:
        self._notes: dict[tuple[str, str], _Notes] = {}
        self._local = LocalStorage("~/.onceflow/explain", threads=1)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._saving: asyncio.Task[None] | None = None

    def note(self, call: Call) -> None:
        """A record was committed: remember its components. No I/O now."""
        if not call.key.components:
            return
        notes = self._of(call)
        notes.add(call.key.components)
        notes.is_changed = True
        soon = SOON if notes.storage is self._local else SOON_SHARED
        self._save_in(LATER if notes.is_saved else soon, call.run.engine.records.signing_keys)

    def _save_in(self, seconds: float, signing_keys: Any) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + seconds
        if self._timer is not None and self._loop is loop:
            if self._timer.when() <= due:
                return
            self._timer.cancel()
        self._loop = loop
        self._timer = loop.call_at(due, self._begin, signing_keys)

    def _begin(self, signing_keys: Any) -> None:
        self._timer = None
        if self._saving is None or self._saving.done():
            self._saving = asyncio.ensure_future(self._save(signing_keys))
        else:  # the storage is slow
            self._save_in(LATER, signing_keys)

    async def _save(self, signing_keys: Any) -> None:
        changed = [notes for notes in self._notes.values() if notes.is_changed]
        await asyncio.gather(*(_write(notes, signing_keys) for notes in changed))

    async def changed(self, call: Call) -> tuple[str, ...]:
        """What differs from the nearest earlier record; nothing where there is none, or none differs."""
        notes = self._of(call)
        if not notes.is_loaded:
            await self._load(notes, call)
        own = _short(call.key.components)
        nearest: Entry | None = None
        for entry in reversed(notes.entries):
            differences = own ^ entry
            if nearest is None or len(differences) < len(nearest):
                nearest = differences
                if len(differences) <= 2:  # one component, then and now
                    break
        return tuple(sorted({label for label, _ in nearest or ()}))

    def _of(self, call: Call) -> _Notes:
        name = identity(call.definition)
        where = (call.place.records.url, name)
        notes = self._notes.get(where)
        if notes is None:
            notes = self._notes[where] = self._new(call.place.records, name)
        return notes

    def _new(self, records: Storage, name: str) -> _Notes:
        if isinstance(records, LocalStorage):
            digest = hashlib.sha256(f"{records.url}\n{name}".encode()).hexdigest()
            return _Notes(self._local, digest)
        digest = hashlib.sha256(name.encode()).hexdigest()[:32]
        return _Notes(records, f"{HIDDEN}explain-{digest}")

    async def _load(self, notes: _Notes, call: Call) -> None:
        """Read the note, once; one that cannot be read is as good as none, since nothing depends on it."""
        notes.is_loaded = True
        keys = call.run.engine.records.signing_keys
        try:
            notes.add_earlier(await _read(notes, keys))
        except ObjectNotFoundError:
            return
        except Exception as error:  # a storage of the user's own may raise anything
            logger.debug("The notes about %s cannot be read: %s", call.definition.name, error)

    async def flush(self, signing_keys: Any = ()) -> None:
        """Write the notes that have changed, all at once; what cannot be written is dropped, with a line."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._saving is not None:
            await asyncio.wait([self._saving])
            self._saving = None
        await self._save(signing_keys)
        await self._local.aclose()
        self._local = LocalStorage("~/.onceflow/explain", threads=1)  # an engine may be opened again
        self._notes.clear()


async def _read(notes: _Notes, signing_keys: Any) -> list[Entry]:
    stored = await notes.storage.fetch(notes.key)
    assert stored is not None  # None answers `unless` only
    header, offset = unpack_header(stored.data, signing_keys=signing_keys)
    segments = split(header, memoryview(stored.data)[offset:])
    check_payload(header, segments)
    pairs, entries = codec.loads(segments)
    return [frozenset((str(pairs[at][0]), str(pairs[at][1])) for at in entry) for entry in entries]


async def _write(notes: _Notes, signing_keys: Any) -> None:
    notes.is_changed, notes.is_saved = False, True
    try:
        if not notes.is_loaded:
            try:
                notes.add_earlier(await _read(notes, signing_keys))
            except (ObjectNotFoundError, ValueError, TypeError, LookupError):
                pass  # none yet, or nothing that could be kept
            notes.is_loaded = True
        header = Header(key=notes.key, kind="note", serializer="msgpack")
        await notes.storage.write(
            notes.key, pack(header, codec.dumps(_packed(notes)), signing_keys=signing_keys)
        )
    except asyncio.CancelledError:
        notes.is_changed = True
        raise
    except Exception as error:
        logger.debug("The notes %r cannot be written: %s", notes.key, error)


def identity(definition: Definition[..., Any]) -> str:
    """By what name a task's records are told from another's."""
    return f"{definition.__module__}.{definition.__qualname__}:{definition.name}"


def _packed(notes: _Notes) -> list[Any]:
    """Every pair of label and digest once, and the entries as indexes of these."""
    pairs = dict.fromkeys(pair for entry in notes.entries for pair in entry)
    index = {pair: at for at, pair in enumerate(pairs)}
    return [
        [list(pair) for pair in pairs],
        [[index[pair] for pair in entry] for entry in notes.entries],
    ]


def _short(components: Components) -> Entry:
    return frozenset((label, digest[:DIGITS]) for label, digest in components.items())
