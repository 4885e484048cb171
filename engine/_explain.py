"""Why a call ran, or did not: its key's components beside those of the nearest earlier record of the task.

Per task and storage a small note keeps the components of the last records, read at most once per engine and only
when a miss has to be explained, written when the engine closes. So a hit pays nothing, a miss at most one small
read, and no commit an extra write; a process that is killed leaves no note, and the next one says "no record"
where it could have said more. Notes lie in the records' storage, hidden from listings, so that another machine
finds them; those about a local folder lie in `~/.onceflow/explain`, because that folder is the user's to count.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..storage import LocalStorage, ObjectNotFoundError, Storage
from ..storage import _codec as codec
from ..storage._envelope import Header, check_payload, pack, split, unpack_header
from ..storage._names import HIDDEN
from ._logging import logger
from ._policies import DEFAULT, CachePolicy, Components

if TYPE_CHECKING:
    from ._committing import Call, Key
    from ._definition import Definition

KEPT = 8
"""How many records of a task a note remembers."""
DIGITS = 16
"""Hex digits kept of each digest: enough to tell them apart, not to key by."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """Whether a call would hit, and why.

    Attributes:
        would_hit: Whether it would be served from its record.
        reason: One line, as it stands in the log.
        key: The key of the call; None where it has none.
        changed: The components that differ from the nearest earlier record of the task.
        components: The call's own labelled digests.
    """

    would_hit: bool
    reason: str
    key: str | None
    changed: tuple[str, ...]
    components: dict[str, str]

    def __bool__(self) -> bool:
        return self.would_hit

    def __str__(self) -> str:
        return self.reason


@dataclass(slots=True)
class _Notes:
    """What is known of one task's records in one storage."""

    storage: Storage
    key: str
    entries: deque[Components]
    is_loaded: bool = False
    is_changed: bool = False


class Explainer:
    """The notes of one engine."""

    def __init__(self) -> None:
        self._notes: dict[tuple[str, str], _Notes] = {}
        self._local = LocalStorage("~/.onceflow/explain", threads=1)

    def note(self, call: Call) -> None:
        """A record was committed: remember its components. No I/O."""
        if not call.key.components:
            return
        notes = self._of(call)
        entry = _short(call.key.components)
        if entry in notes.entries:
            notes.entries.remove(entry)
        notes.entries.appendleft(entry)
        notes.is_changed = True

    async def changed(self, call: Call) -> tuple[str, ...]:
        """What differs from the nearest earlier record; nothing where there is none, or none differs."""
        notes = self._of(call)
        if not notes.is_loaded:
            await self._load(notes, call)
        own = _short(call.key.components)
        nearest: tuple[str, ...] | None = None
        for entry in notes.entries:
            differences = _differences(entry, own)
            if nearest is None or len(differences) < len(nearest):
                nearest = differences
        return nearest or ()

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
            return _Notes(self._local, digest, deque(maxlen=KEPT))
        digest = hashlib.sha256(name.encode()).hexdigest()[:32]
        return _Notes(records, f"{HIDDEN}explain-{digest}", deque(maxlen=KEPT))

    async def _load(self, notes: _Notes, call: Call) -> None:
        """Read the note, once; one that cannot be read is as good as none, since nothing depends on it."""
        notes.is_loaded = True
        keys = call.run.engine.records.signing_keys
        try:
            entries = await _read(notes, keys)
        except ObjectNotFoundError:
            return
        except Exception as error:  # a storage of the user's own may raise anything
            logger.debug("The notes about %s cannot be read: %s", call.definition.name, error)
            return
        for entry in entries:
            if entry not in notes.entries and len(notes.entries) < KEPT:
                notes.entries.append(entry)

    async def flush(self, signing_keys: Any = ()) -> None:
        """Write the notes that have changed, all at once; what cannot be written is dropped, with a line."""
        changed = [notes for notes in self._notes.values() if notes.is_changed]
        if changed:
            await asyncio.gather(*(_write(notes, signing_keys) for notes in changed))
        await self._local.aclose()
        self._local = LocalStorage("~/.onceflow/explain", threads=1)  # an engine may be opened again
        self._notes.clear()


async def _read(notes: _Notes, signing_keys: Any) -> list[Components]:
    stored = await notes.storage.fetch(notes.key)
    assert stored is not None  # None answers `unless` only
    header, offset = unpack_header(stored.data, signing_keys=signing_keys)
    segments = split(header, memoryview(stored.data)[offset:])
    check_payload(header, segments)
    entries: list[Components] = codec.loads(segments)
    return entries


async def _write(notes: _Notes, signing_keys: Any) -> None:
    notes.is_changed = False
    try:
        if not notes.is_loaded:
            try:
                entries = await _read(notes, signing_keys)
            except (ObjectNotFoundError, ValueError):
                entries = []  # none yet, or nothing that could be kept
            notes.entries.extend(entry for entry in entries if entry not in notes.entries)
        kept = list(notes.entries)[:KEPT]
        header = Header(key=notes.key, kind="note", serializer="msgpack")
        await notes.storage.write(notes.key, pack(header, codec.dumps(kept), signing_keys=signing_keys))
    except Exception as error:
        logger.debug("The notes %r cannot be written: %s", notes.key, error)


def identity(definition: Definition[..., Any]) -> str:
    """By what name a task's records are told from another's."""
    return f"{definition.__module__}.{definition.__qualname__}:{definition.name}"


def _short(components: Components) -> Components:
    return {label: digest[:DIGITS] for label, digest in components.items()}


def _differences(earlier: Components, own: Components) -> tuple[str, ...]:
    return tuple(
        label for label in sorted(earlier.keys() | own.keys()) if earlier.get(label) != own.get(label)
    )


def reason_for(policy: CachePolicy | None, changed: tuple[str, ...]) -> str:
    """The differing components as one line: `input 'day' changed`, `helper clean() changed`."""
    if not changed:
        return "no record"
    others = [label for label in changed if label != "run id"]
    if not others:
        return f"{'DEFAULT' if policy == DEFAULT else repr(policy)} includes the run id"
    shown = [f"{label} changed" for label in others[:3]]
    if len(others) > 3:
        shown.append(f"and {len(others) - 3} more")
    return ", ".join(shown)


def explanation(call_key: Key, would_hit: bool, reason: str, changed: tuple[str, ...] = ()) -> Explanation:
    """An `Explanation` of a call with this key."""
    return Explanation(would_hit, reason, call_key.text, changed, dict(call_key.components))
