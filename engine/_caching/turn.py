"""What every cached call needs, however it is isolated: the look-up, being served, and the commit."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from .._commit.requests import Refused, Where
from .._concurrency.claims import Claim
from .._concurrency.locks import Held
from .._errors import CommitError
from .._keys.policies import CachePolicy, Components
from .._records.record import Facts, Hit, Miss, Place, Prepared, ago
from .._records.writer import LARGE
from .._runs.logging import INFO, logger
from .._runs.run import FlowRun, TaskRun
from .._runs.states import COMPLETED, FAILED
from .._transactions.outcome import Staged
from .explain import reason_for

if TYPE_CHECKING:
    from .._definitions.definition import Definition

Attempts = Callable[[Any, Any], Awaitable[None]]


class Key(NamedTuple):
    """The key of a call and the components it was made from; no key, and why, where one cannot be had."""

    text: str | None
    components: Components
    why_not: str = ""


class Call(NamedTuple):
    """One cached call on its way: what every step of it needs."""

    run: Any
    definition: Any
    attempts: Attempts
    policy: CachePolicy | None
    place: Place
    key: Key
    where: Where
    refresh: bool


async def look_up(call: Call, *, exclusive: bool = False) -> Hit | Miss:
    """The committed record, or why there is none to serve. `exclusive` says that the run holds the key."""
    run = call.run
    assert call.key.text is not None
    if call.refresh and not exclusive:
        run.reason = "ran: refresh was asked for"
        return Miss("refresh was asked for")
    found: Hit | Miss = await run.engine.records.lookup(call.place, call.key.text, exclusive=exclusive)
    if call.refresh:  # under the lock the commit insists on what is to be replaced
        return Miss("refresh was asked for", found.header, found.version)
    if isinstance(found, Miss):
        await note_reason(call, found)
    return found


def serve(run: TaskRun | FlowRun, hit: Hit) -> None:
    """End a run with the value of a committed record."""
    serve_value(run, hit.value, hit.header.run_id, hit.header.created)


def serve_value(run: TaskRun | FlowRun, value: Any, writer: str, created: float) -> None:
    """End a run with the value that the run `writer` has computed."""
    if logger.isEnabledFor(INFO):
        run.reason = f"cached: written by run {writer} {ago(max(0.0, run.engine.clock() - created))} ago"
    run.enter("hit", value)


async def note_reason(call: Call, miss: Miss) -> None:
    """Why the run goes on; what changed since the nearest record is looked up only where a line will say so."""
    reason = miss.reason
    if reason == "no record" and logger.isEnabledFor(INFO):
        reason = reason_for(call.policy, await call.run.engine.explainer.changed(call))
    call.run.reason = f"ran: {reason}"


async def commit(call: Call, miss: Miss, held: Held | Claim | None = None) -> Prepared | None:
    """Write the record of a completed run in place of what was seen, or stage it in the open transaction.

    What goes wrong is a warning: the task's value is never lost by it. In a transaction it breaks the block.

    Raises:
        Refused: The key was not `held` any more, or somebody has written there all the same.
    """
    run, definition, place, key = call.run, call.definition, call.place, call.key
    state = run.state
    if state.type is FAILED:
        await _keep_failure(run, definition, place, key)
        return None
    if state.type is not COMPLETED:
        return None
    assert key.text is not None
    expiration = definition.cache_expiration
    facts = Facts(
        run.id,
        definition.name,
        key.components,
        None if expiration is None else run.engine.clock() + expiration.total_seconds(),
        held.token if held is not None else None,
        run.chunks.stream if run.chunks is not None else None,
    )
    records = run.engine.records
    txn = run.transaction
    try:
        if txn is not None and txn.joins:
            large = await records.prepare(place, key.text, state.data, facts, apart_from=LARGE)
            prepared: Prepared = large.snapshot()  # the caller may change the value before the block ends
            run.engine.explainer.note(call)
            served = records.served(prepared, is_snapshot=True)
            txn.add_record(
                call.where, Staged(prepared, miss.version, held is not None, served, run, miss.header)
            )
            return prepared
        prepared = await records.prepare(place, key.text, state.data, facts)
        if held is not None and held.lost:
            raise Refused(call.where, "its lease was lost")
        expect = miss.version if held is None else await held.settle(miss.version)
        await records.write(prepared, expect=expect, exclusive=held is not None, replaces=miss.header)
    except Refused:
        raise
    except Exception as error:  # a storage of the user's own may raise anything
        if txn is not None:
            txn.break_with(CommitError(key.text, str(error), run.name))
        logger.warning(
            "%s %r - its result could not be stored, and is not cached: %s", definition.kind, run.name, error
        )
        if run.chunks is not None:
            await run.chunks.discard()
        return None
    state.location = key.text
    run.engine.explainer.note(call)
    return prepared


async def _keep_failure(
    run: TaskRun | FlowRun, definition: Definition[..., Any], place: Place, key: Key
) -> None:
    """Keep the exception of a failed run under a random key, never under its cache key."""
    state = run.state
    facts = Facts(run.id, definition.name, key.components)
    try:
        state.location = await run.engine.records.keep_failure(place.storage, state.error(), facts)
    except Exception as error:  # a storage of the user's own may raise anything
        logger.warning("%s %r - its failure could not be stored: %s", definition.kind, run.name, error)
