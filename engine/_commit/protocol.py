"""Committing several records together, decided without I/O: generators that yield one step at a time.

The protocol (after Percolator, OSDI 2010, §2.2, without its timestamps and its table):

1. Each member's object becomes an *intent*: one object that holds the new record and what was committed before,
   written conditionally on what was seen. The first member in the order of storages and keys, the *primary*,
   comes first and names all others. Values that lie apart are written then.
2. One conditional write turns the primary's intent into a decided one: that single write is the commit. Whoever
   could abort must do so by a conditional write on the same object, so exactly one of the two happens, and a
   writer that wakes up late is refused.
3. The other intents become plain records, and last of all the primary.

A reader who meets an intent looks at the primary: decided → the new record, undecided → the old one. The
primary forgets the transaction only after every other member has; a reader who finds no word of it there
therefore reads its own key once more: changed → settled in between, unchanged → aborted.

Why not a marker object beside the intents, as first planned: a marker must outlive every writer that might come
late, so aborted markers could never be removed safely. With the decision inside the primary nothing is left
behind, and n members cost n + 1 writes before they are visible and 2n + 1 in all.

Two transactions over the same keys cannot wait for each other: all intents but the primary are laid at once, and
if one of them meets a foreign undecided intent, those after it in the order are taken back, and laid one after
the other. Whoever waits therefore holds nothing behind what it waits for.

An undecided intent is abandoned when its writer's process is gone, or has been silent for the lease's time on
the observer's own monotonic clock. Whoever needs the key then aborts it, and so does a reader in passing. A decided
one that its writer left behind is settled in the same ways.

Above 400 lines, because writers, readers and those who recover only make sense side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...storage._storage import Buffer
from .intents import (
    Intent,
    Keys,
    Member,
    Writer,
    committed,
    grave,
    halves,
    intent,
    is_grave,
    may_be_intent,
    parse,
    value_of,
)
from .requests import (
    ABSENT,
    ANY,
    Ask,
    Conflict,
    Found,
    InDoubt,
    Put,
    Read,
    Refused,
    Remove,
    Steps,
    Together,
    Visible,
    Where,
)

BEGINNING = 16 * 1024
"""Bytes that show whether an object is an intent."""


def commit(writer: Writer, members: Sequence[Member]) -> Steps:
    """The steps of a commit, in order. Returns when all is tidy; after `Visible` it cannot fail any more.

    Raises:
        Refused: Nothing of it is or becomes visible.
        InDoubt: The decision was sent, and then the storage was out of reach.
        Exception: What a storage raised. Nothing is visible; what could not be taken back is nobody's
            obstacle: whoever meets it ends it.
    """
    members = sorted(members, key=lambda member: member.where)
    sent = False
    try:
        yield from _lay(writer, members, 0)
        yield from _lay_others(writer, members)
        values = [member.value for member in members if member.value is not None]
        if values:
            yield Together([_put(where, data) for where, data in values])
        sent = True
        decided = yield from _decide(writer, members)
    except GeneratorExit:
        raise  # the process ends here: what is left is for whoever finds it
    except BaseException as error:
        # An error need not mean that nothing was written: the decision may have arrived, and its answer not.
        decided = yield from _undo(writer, members, error, sent)
    yield Visible()
    try:
        yield from _settle_own(writer, members, decided)
    except Exception:
        return  # whoever meets what is left settles it


def _put(where: Where, data: Sequence[Buffer]) -> Steps:
    yield Put(where, data, ANY)


def _decide(writer: Writer, members: Sequence[Member]) -> Steps:
    primary = members[0]
    try:
        return (yield Put(primary.where, intent(writer, members, 0, decided=True), primary.version))
    except Conflict:
        raise Refused(primary.where, "its writer was silent for longer than its lease") from None


# --- laying intents


def _lay_others(writer: Writer, members: Sequence[Member]) -> Steps:
    """All at once; from the first that must wait for another transaction on, one after the other."""
    others = range(1, len(members))
    if not others:
        return
    laid = yield Together([_lay(writer, members, index, wait=False) for index in others])
    blocked = next((index for index, done in zip(others, laid, strict=True) if not done), None)
    if blocked is None:
        return
    behind = [member for member in members[blocked + 1 :] if member.version is not None]
    if behind:
        yield Together([_take_back(writer, member) for member in behind])
    for index in range(blocked, len(members)):
        yield from _lay(writer, members, index)


def _lay(writer: Writer, members: Sequence[Member], index: int, *, wait: bool = True) -> Steps:
    """Turn a member's object into an intent, over whatever is committed there; whether that was done.

    Not done only where another transaction is undecided there, and `wait` is off.
    """
    member, keys = members[index], writer.signing_keys
    guess = member.expect == ABSENT
    while True:
        found: Found | None = None
        if not guess:
            found = yield Read(member.where)
        guess = False
        if found is not None:
            foreign = parse(member.where, found.data, keys)
            if foreign is not None and foreign.tx == writer.tx:  # our own write, whose answer was lost
                member.version = found.version
                return True
            if foreign is not None:
                if not (yield from clear(member.where, found, foreign, keys, wait=wait)):
                    return False
                continue
        member.old = b"" if found is None else committed(found.data, keys)
        _refuse_other(member, found)
        try:
            member.version = yield Put(
                member.where, intent(writer, members, index), ABSENT if found is None else found.version
            )
            return True
        except Conflict:
            continue


def _refuse_other(member: Member, found: Found | None) -> None:
    """Under a lock, nobody else may have written since the record was looked up."""
    if member.exclusive and member.expect is not ANY:
        here = ABSENT if found is None or not member.old else found.version
        if here != member.expect and (found is None or found.version != member.expect):
            raise Refused(member.where, "another holder has written it")


def _take_back(writer: Writer, member: Member) -> Steps:
    """Restore what was committed before, where our undecided intent still lies."""
    found: Found | None = yield Read(member.where)
    own = parse(member.where, found.data, writer.signing_keys) if found is not None else None
    if found is not None and own is not None and own.tx == writer.tx:
        yield from _restore(member.where, own.old, found.version)
    member.version = None


# --- undoing


def _undo(writer: Writer, members: Sequence[Member], error: BaseException, sent: bool) -> Steps:
    """After an error: the decided primary's version if it has been decided after all, else all is taken back.

    Raises:
        InDoubt: The decision was sent, and its fate cannot be found out.
        BaseException: `error`, or Refused: nothing is visible.
    """
    try:
        decided = yield from _bury_own(writer, members)
        if decided is None and sent and not isinstance(error, Refused):
            decided = yield from _fate(writer, members)
    except GeneratorExit:
        raise
    except Exception as unreachable:
        if sent and not isinstance(error, Refused):
            raise InDoubt(members[0].where, str(error) or str(unreachable)) from error
        raise error from None
    if decided is not None:
        return decided
    try:
        yield Together([_take_back(writer, member) for member in members[1:]])
        yield Together([_remove(member.value[0]) for member in members if member.value is not None])
    except Exception as leftover:  # their primary is buried: whoever meets them takes them back
        error.add_note(f"What it had written could not be taken back at once: {leftover!r}")
    raise error


def _remove(where: Where) -> Steps:
    yield Remove(where, ANY)


def _bury_own(writer: Writer, members: Sequence[Member]) -> Steps:
    """Make the commit impossible, or find that it has happened: then the primary's version.

    None also where the primary says nothing of us: never laid, or ended by somebody else.
    """
    primary, keys = members[0], writer.signing_keys
    while True:
        found: Found | None = yield Read(primary.where)
        own = parse(primary.where, found.data, keys) if found is not None else None
        if found is None or own is None or own.tx != writer.tx:
            return None
        if own.decided:
            return found.version
        try:
            yield from _bury(primary.where, own.old, found.version, keys)
            return None
        except Conflict:
            continue


def _fate(writer: Writer, members: Sequence[Member]) -> Steps:
    """After a decision without an answer, and with a primary that says nothing of it: ABSENT where somebody else has
    settled it, which one of the new records shows; None where somebody has aborted it, which the old one shows.

    Raises:
        InDoubt: Neither is to be seen: others have gone on.
    """
    keys, primary = writer.signing_keys, members[0]
    for member in members:
        current = yield from _committed_at(member.where, keys)
        settled = halves(member.record)[0] if member.moves_to is not None else member.record
        if current in (member.record, settled):
            return ABSENT
        if member is primary and current and current == primary.old:
            return None
    raise InDoubt(primary.where, "the storage did not answer, and others have written it since")


def _committed_at(where: Where, keys: Keys) -> Steps:
    """What is committed there, as far as the object itself tells."""
    found: Found | None = yield Read(where)
    if found is None:
        return b""
    following = parse(where, found.data, keys)
    return following.old if following is not None else committed(found.data, keys)


def _bury(where: Where, old: bytes, version: str, keys: Keys) -> Steps:
    """Undo an undecided primary, so that its writer can never commit.

    Raises:
        Conflict: It is another object by now.
    """
    if old:
        yield Put(where, old, version)
    else:
        yield Remove(where, (yield Put(where, grave(where[1], keys), version)))


def _restore(where: Where, old: bytes, version: str) -> Steps:
    """Undo another member's intent, unless somebody has done so already."""
    if not old:
        yield Remove(where, version)
        return
    try:
        yield Put(where, old, version)
    except Conflict:
        pass


# --- settling


def _settle_own(writer: Writer, members: Sequence[Member], decided: str) -> Steps:
    """Make every member plain, the primary last; `decided` is its version, ABSENT where others have settled all."""
    keys = writer.signing_keys
    if len(members) > 1:
        yield Together(
            [
                _finish(m.where, m.record, m.old, m.version, m.moves_to, m.values_at, keys)
                for m in members[1:]
                if m.version is not None
            ]
        )
    if decided != ABSENT:
        m = members[0]
        yield from _finish(m.where, m.record, m.old, decided, m.moves_to, m.values_at, keys)


def settle(first: Intent, primary: Found, keys: Keys) -> Steps:
    """Finish a decided transaction that its writer has not finished: every member plain, the primary last."""
    if len(first.members) > 1:
        yield Together([_settle_member(where, first.tx, keys) for where in first.members[1:]])
    yield from _finish(
        first.primary, first.new, first.old, primary.version, first.moves_to, first.values_at, keys
    )


def _settle_member(where: Where, tx: str, keys: Keys) -> Steps:
    found: Found | None = yield Read(where)
    own = parse(where, found.data, keys) if found is not None else None
    if found is not None and own is not None and own.tx == tx:
        yield from _finish(where, own.new, own.old, found.version, own.moves_to, own.values_at, keys)


def _finish(
    where: Where,
    record: bytes,
    old: bytes,
    version: str,
    moves_to: Where | None,
    values_at: str,
    keys: Keys,
) -> Steps:
    """Settle one intent; another writer having done it, or having replaced it since, is as good.

    The value that only the replaced record names goes first: nobody knows of it any more afterwards.
    """
    replaced = value_of(old, values_at, keys) if old else None
    if replaced is not None:
        yield Remove(replaced, ANY)
    if moves_to is not None:
        record, value = halves(record)
        yield Put(moves_to, value, ANY)
    try:
        yield Put(where, record, version)
    except Conflict:
        pass


# --- reading and recovering


def _first_of(where: Where, found: Found, own: Intent, keys: Keys) -> Steps:
    """The primary of an intent, and what it says of the transaction: None where it says nothing (any more)."""
    if own.is_primary:
        return found, own
    primary: Found | None = yield Read(own.primary)
    first = parse(own.primary, primary.data, keys) if primary is not None else None
    return primary, (first if first is not None and first.tx == own.tx and first.is_primary else None)


def read(where: Where, found: Found, keys: Keys) -> Steps:
    """What a reader must serve for an object: the record's bytes, empty for none.

    Costs nothing more on a primary, one read on another member, and a third in the rare case that the
    transaction was settled between the two. In passing it ends what an abandoned transaction left there; where
    it cannot, because it may not write or the storage is out of reach, that is left to others.
    """
    own = parse(where, found.data, keys)
    if own is None:
        if is_grave(found.data, keys):
            yield from _in_passing(_remove_grave(where, found))
        return committed(found.data, keys)
    primary, first = yield from _first_of(where, found, own, keys)
    if first is not None:
        if (yield Ask(own.primary, primary.version, own.tx, own.lease, own.owner)):
            yield from _in_passing(
                settle(first, primary, keys) if first.decided else abort(first, primary, keys)
            )
        return own.new if first.decided else own.old
    again: Found | None = yield Read(where)
    if again is None:
        return b""
    if again.version != found.version:
        return (yield from read(where, again, keys))
    if (yield Ask(where, found.version, own.tx, own.lease, own.owner)):
        yield from _in_passing(_restore(where, own.old, found.version))
    return own.old


def _remove_grave(where: Where, found: Found) -> Steps:
    yield Remove(where, found.version)


def _in_passing(steps: Steps) -> Steps:
    try:
        yield from steps
    except Exception:
        return  # the reader has what it came for


def clear(where: Where, found: Found, own: Intent, keys: Keys, *, wait: bool = True) -> Steps:
    """Get a foreign intent out of the way: settle it, abort it where it is abandoned, else wait a little.

    Returns whether it is worth another look; false where it is undecided, and `wait` is off.
    """
    primary, first = yield from _first_of(where, found, own, keys)
    if first is None:
        again: Found | None = yield Read(where)
        if again is not None and again.version == found.version:
            yield from _restore(where, own.old, found.version)
        return True
    if first.decided:
        yield from settle(first, primary, keys)
        return True
    if (yield Ask(own.primary, primary.version, own.tx, own.lease, own.owner, wait)):
        yield from abort(first, primary, keys)
        return True
    return wait


def abort(first: Intent, primary: Found, keys: Keys) -> Steps:
    """End an abandoned transaction: its primary first, so that its writer can never commit, then the rest."""
    try:
        yield from _bury(first.primary, first.old, primary.version, keys)
    except Conflict:
        return  # decided or aborted by somebody else just now
    if len(first.members) > 1:
        yield Together([_abort_member(where, first.tx, keys) for where in first.members[1:]])
    if first.values:
        yield Together([_remove(value) for value in first.values])


def _abort_member(where: Where, tx: str, keys: Keys) -> Steps:
    found: Found | None = yield Read(where)
    own = parse(where, found.data, keys) if found is not None else None
    if found is not None and own is not None and own.tx == tx:
        yield from _restore(where, own.old, found.version)


# --- single records


def replace_one(where: Where, record: Sequence[Buffer], keys: Keys) -> Steps:
    """Write a single record over whatever is committed there, after the transactions that are about to commit.

    Returns the new version, and the beginning of what was replaced (None for nothing).
    """
    while True:
        found = yield from plain(where, keys)
        try:
            version = yield Put(where, record, ABSENT if found is None else found.version)
        except Conflict:
            continue
        return version, (None if found is None else found.data)


def remove_one(where: Where, values_at: str, keys: Keys) -> Steps:
    """Remove what is committed there, and the value it names; returns the record's beginning, empty for none."""
    while True:
        found: Found | None = yield from plain(where, keys)
        if found is None:
            return b""
        try:
            yield from _bury(where, b"", found.version, keys)
            break
        except Conflict:
            continue
    record = committed(found.data, keys)
    value = value_of(record, values_at, keys)
    if value is not None:
        yield Remove(value, ANY)
    return record


def plain(where: Where, keys: Keys) -> Steps:
    """The beginning of an object, None for none; intents that are in the way are waited for, and cleared."""
    limit: int | None = BEGINNING
    while True:
        found: Found | None = yield Read(where, limit)
        if found is None or not may_be_intent(found.data, keys):
            return found
        if limit is not None and len(found.data) >= limit:
            limit = None  # it goes on: an intent is judged whole
            continue
        foreign = parse(where, found.data, keys)
        if foreign is None:
            return found
        yield from clear(where, found, foreign, keys)
