"""The caching half of a run: is it wanted, what is the key, is there a record, and the commit."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

from ..locking import LockManager, StorageLockManager
from . import _policies
from ._claims import Claim, claim
from ._commit import uncancelled
from ._context import FlowRun, TaskRun
from ._engine import storage_key
from ._errors import CacheKeyError, CommitError, EngineError, UncacheableInputError
from ._explain import Explanation, explanation, reason_for
from ._flights import Flight, Lead, Served, lineage
from ._locks import Held, hold, isolation_of
from ._logging import INFO, logger
from ._policies import CachePolicy, ComponentPolicy, Components, NonePolicy, key_from
from ._records import SHAREABLE, Facts, Hit, Miss, Place, ago
from ._states import COMPLETED, FAILED
from ._steps import Refused, Where
from ._transaction import Staged

if TYPE_CHECKING:
    from ._definition import Definition

Attempts = Callable[[Any, Any], Awaitable[None]]


class Key(NamedTuple):
    """The key of a call and the components it was made from; no key, and why, where one cannot be had."""

    text: str | None
    components: Components
    why_not: str = ""


def wanted(run: TaskRun | FlowRun, definition: Definition[..., Any]) -> bool:
    """Whether this run may be cached at all; cheap, because every run asks. Notes the reason where not."""
    persist = definition.persist
    if persist is None:
        persist = _persist_above(run)
    if not persist:
        if run.task is not None:
            run.reason = "ran: persistence is off"
        return False
    settings = run.engine.settings
    if settings.tasks_disable_caching:
        run.reason = "ran: caching is disabled by the settings"
        return False
    if run.task is None and definition.cache_policy is None and definition.result_storage_key is None:
        return False
    return True


def _persist_above(run: TaskRun | FlowRun) -> bool:
    """What settings and the enclosing flow say where the definition leaves persistence open."""
    settings = run.engine.settings
    if run.task is None:
        return settings.results_persist_by_default
    if settings.tasks_default_persist_result is not None:
        return settings.tasks_default_persist_result
    if run.flow_run is not None and run.flow_run.flow.persist is not None:
        return run.flow_run.flow.persist
    return settings.results_persist_by_default


def policy_of(run: TaskRun | FlowRun, definition: Definition[..., Any]) -> CachePolicy | None:
    """The policy that applies; None where the record lies under a storage key of the user's own."""
    if not definition.is_policy_stated and run.engine.settings.tasks_default_no_cache:
        return _policies.NONE if definition.result_storage_key is None else None
    return definition.cache_policy


async def perform(run: TaskRun | FlowRun, definition: Definition[..., Any], attempts: Attempts) -> None:
    """Serve the run from its record, or run it and commit."""
    call = await call_for(run, definition, attempts)
    if call is None:
        await attempts(run, definition)
        return
    txn = run.transaction
    if txn is not None and not call.refresh and (staged := txn.staged(call.where)) is not None:
        run.reason = "cached: staged in this transaction"
        run.enter("hit", staged.value())
        return
    exclusive, manager = isolation_of(run, call.policy, txn)
    if manager is not None and exclusive:
        await _exclusively(call, manager)
        return
    miss = await _look_up(call)
    if miss is not None:
        await attempts(run, definition)
        await commit(call, miss.version)


async def call_for(
    run: TaskRun | FlowRun, definition: Definition[..., Any], attempts: Attempts
) -> Call | None:
    """The cached call that this run is; None, with the reason noted, where it has no key."""
    engine = run.engine
    policy = policy_of(run, definition)
    key = await key_of(run, definition, policy)
    run.key = key.text
    if key.text is None:
        run.reason = f"ran: {key.why_not}"
        return None
    try:
        place = engine.place_for(run, policy)
    except CacheKeyError as error:
        _warn(run, definition, str(error))
        run.reason = "ran: there is no usable storage key"
        return None
    where = (place.records.url, key.text)
    return Call(run, definition, attempts, policy, place, key, where, _must_refresh(run, definition))


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


async def look_up_value(call: Call) -> Any:
    """The value of the committed record, without a change of state; None where there is none."""
    run = call.run
    if call.refresh:
        run.reason = "ran: refresh was asked for"
        return None
    assert call.key.text is not None
    found = await run.engine.records.lookup(call.place, call.key.text)
    if isinstance(found, Miss):
        await _note_reason(call, found)
        return None
    run.reason = f"cached: written by run {found.header.run_id}"
    return found.value


async def _note_reason(call: Call, miss: Miss) -> None:
    """Why the run goes on; what changed since the nearest record is looked up only where a line will say so."""
    reason = miss.reason
    if reason == "no record" and logger.isEnabledFor(INFO):
        reason = reason_for(call.policy, await call.run.engine.explainer.changed(call))
    call.run.reason = f"ran: {reason}"


async def explain(run: TaskRun | FlowRun, definition: Definition[..., Any]) -> Explanation:
    """Whether this call would hit, and if not, what differs from the nearest earlier record of the task.

    Costs the look-up (one read), and on a miss the note about the task's records, read once per engine.
    """
    if not wanted(run, definition):
        return explanation(Key(None, {}), False, run.reason or "ran: the flow has no cache policy")
    call = await call_for(run, definition, _never)
    if call is None:
        return explanation(Key(None, {}), False, run.reason)
    assert call.key.text is not None
    if call.refresh:
        return explanation(call.key, False, "ran: refresh was asked for")
    found = await run.engine.records.lookup(call.place, call.key.text)
    if isinstance(found, Hit):
        age = ago(max(0.0, run.engine.clock() - found.header.created))
        return explanation(call.key, True, f"cached: written by run {found.header.run_id} {age} ago")
    if found.reason != "no record":
        return explanation(call.key, False, f"ran: {found.reason}")
    changed = await run.engine.explainer.changed(call)
    return explanation(call.key, False, f"ran: {reason_for(call.policy, changed)}", changed)


async def _never(run: Any, definition: Any) -> None:
    raise AssertionError("an explanation runs nothing")


async def _look_up(call: Call, *, exclusive: bool = False) -> Miss | None:
    """Serve the run from its record; the miss where there is none. `exclusive` says that the run holds the key."""
    run = call.run
    assert call.key.text is not None
    if call.refresh and not exclusive:
        run.reason = "ran: refresh was asked for"
        return Miss("refresh was asked for")
    found = await run.engine.records.lookup(call.place, call.key.text, exclusive=exclusive)
    if call.refresh:  # under the lock the commit insists on what is to be replaced
        return Miss("refresh was asked for", found.header, found.version)
    if isinstance(found, Miss):
        await _note_reason(call, found)
        return found
    _serve(run, found.value, found.header.run_id, found.header.created)
    return None


def _serve(run: TaskRun | FlowRun, value: Any, writer: str, created: float) -> None:
    if logger.isEnabledFor(INFO):
        run.reason = f"cached: written by run {writer} {ago(max(0.0, run.engine.clock() - created))} ago"
    run.enter("hit", value)


# --- SERIALIZABLE


async def _exclusively(call: Call, manager: LockManager) -> None:
    """One execution at a time: lead and run, or wait for the leader's record."""
    run = call.run
    flights = run.engine.flights
    timeout = call.policy.lock_timeout if call.policy is not None else None
    if timeout is None:
        timeout = run.engine.settings.lock_timeout
    while True:
        entered = await flights.enter(call.where, run, timeout)
        if isinstance(entered, Served):
            if call.refresh:
                continue
            _serve(run, entered.value(), entered.run_id, entered.created)
            return
        if isinstance(entered, Lead):
            await _lead(call, manager, entered.flight, timeout)
            return
        await call.attempts(run, call.definition)  # held by an ancestor, which commits in its turn
        return


async def _lead(call: Call, manager: LockManager, flight: Flight, timeout: float | None) -> None:
    """The leader's way: look up, acquire, look up again, run, commit with the token, release, wake."""
    run = call.run
    served: Served | None = None
    held: Held | Claim | None = None
    run.leads += 1
    try:
        miss = await _look_up(call)
        if miss is not None and _claims_in_record(manager, call):
            held = await claim(call, flight, miss, manager.lease_seconds, timeout)
            if held is None:  # committed by another process in between
                miss = await _look_up(call)
        elif miss is not None:
            held = await hold(run, flight, manager, timeout)
            miss = await _look_up(call, exclusive=True)
        if miss is None:
            served = _as_served(call)
            return
        await call.attempts(run, call.definition)
        served = await commit(call, miss.version, held)
    finally:
        run.leads -= 1
        if held is not None and run.transaction is not None and served is not None:
            _keep_for_outcome(run, flight, held, served)
        else:
            if held is not None:
                await uncancelled(held.release(committed=served is not None))
            run.engine.flights.finish(flight, served)


def _claims_in_record(manager: LockManager, call: Call) -> TypeGuard[StorageLockManager]:
    """Whether the locks lie where the records do, so that one object is lock, fence and record."""
    return isinstance(manager, StorageLockManager) and manager.storage.url == call.place.records.url


def _keep_for_outcome(run: TaskRun | FlowRun, flight: Flight, held: Held | Claim, served: Served) -> None:
    """In a transaction the key stays held until the outcome; who waits inside the block is served by what is staged."""
    txn = run.transaction
    assert txn is not None
    flight.leader = txn
    txn.leads += 1
    txn.held.append(held)
    outermost = txn
    while outermost.parent is not None and not outermost.independent:
        outermost = outermost.parent
    run.engine.flights.serve(
        flight, served, lambda waiter: any(each is outermost for each in lineage(waiter))
    )


def _as_served(call: Call) -> Served | None:
    """A hit of the leader's serves those who waited for its look-up: at once where the value may be shared."""
    value = call.run.states[-1].data
    if type(value) in SHAREABLE:
        return Served(lambda: value, call.run.reason, call.run.engine.clock())
    return None


def _must_refresh(run: TaskRun | FlowRun, definition: Definition[..., Any]) -> bool:
    if definition.refresh_cache is not None:
        return definition.refresh_cache
    return run.engine.settings.tasks_refresh_cache


# --- the key


async def key_of(run: TaskRun | FlowRun, definition: Definition[..., Any], policy: CachePolicy | None) -> Key:
    """The key of this call. A part that cannot be computed means no key, and one warning that says what to do."""
    if isinstance(policy, NonePolicy):
        return Key(None, {}, "the policy is NONE")
    try:
        if policy is None:
            assert definition.result_storage_key is not None
            return Key(storage_key(definition.result_storage_key, run), {})
        return await _key_of(run, policy)
    except UncacheableInputError as error:
        why = f"{error.path} has no cache key"
        _warn(
            run,
            definition,
            f"{definition.name}({', '.join(run.parameters)}): {error}. {_REMEDIES % error.path.partition('[')[0].partition('.')[0]}",
        )
    except CacheKeyError as error:
        why = "there is no usable key"
        _warn(run, definition, str(error))
    except EngineError:
        raise
    except Exception as error:
        why = f"the cache key could not be computed ({type(error).__name__})"
        logger.warning(
            "%s %r - %r raised, so this run is not cached: %r. Mend it, or return None for \"not cached\".",
            definition.kind, run.name, policy, error, exc_info=error,
        )  # fmt: skip
    return Key(None, {}, why)


_REMEDIES = "Leave it out with INPUTS - '%s', give it __cache_key__, or use NONE."


def _warn(run: TaskRun | FlowRun, definition: Definition[..., Any], text: str) -> None:
    logger.warning("%s %r - not cached: %s", definition.kind, run.name, text)


async def _key_of(run: TaskRun | FlowRun, policy: CachePolicy) -> Key:
    inputs = run.parameters
    above = run.flow_run if run.task is not None else getattr(run.parent, "flow_run", None)
    flow_parameters = above.parameters if above is not None else None
    components: Components = {}
    for part in policy.parts():
        if isinstance(part, ComponentPolicy):
            if part.is_heavy(run):
                found = await run.engine.in_thread(part.components, run, inputs, flow_parameters)
            else:
                found = part.components(run, inputs, flow_parameters)
            _policies.merge(components, found)
            continue
        text = part.compute_key(run, inputs, flow_parameters)
        if inspect.isawaitable(text):
            text = await text
        found = _policies.custom(part, text)
        if (
            part is policy
        ):  # a key function's text, and that of a policy of the user's own, is the key, verbatim
            return Key(text or None, found, "the key function returned no key")
        _policies.merge(components, found)
    return Key(key_from(components), components, "the policy has nothing to make a key of")


# --- the commit


async def commit(call: Call, expect: str | None, held: Held | Claim | None = None) -> Served | None:
    """Write the record of a completed run, or stage it in the open transaction; what others may be served from.

    What goes wrong is a warning: the task's value is never lost by it. In a transaction it breaks the block.
    """
    run, definition, place, key = call.run, call.definition, call.place, call.key
    state = run.states[-1]
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
    )
    records = run.engine.records
    txn = run.transaction
    try:
        prepared = await records.prepare(place, key.text, state.data, facts)
        if txn is not None and txn.joins:
            served: Served = records.served(prepared)
            run.engine.explainer.note(call)
            txn.add_record(call.where, Staged(prepared, expect, held is not None, served, run))
            return served
        if held is not None and held.lost:
            raise Refused(call.where, "its lease was lost")
        if held is not None:
            expect = await held.settle(expect)
        await records.write(prepared, expect=expect, exclusive=held is not None)
    except Refused as error:
        await _yield_to_winner(call, error)
        return None
    except Exception as error:  # a storage of the user's own may raise anything
        if txn is not None:
            txn.break_with(CommitError(key.text, str(error)))
        logger.warning(
            "%s %r - its result could not be stored, and is not cached: %s", definition.kind, run.name, error
        )
        return None
    state.location = key.text
    run.engine.explainer.note(call)
    return records.served(prepared) if held is not None else None


async def _yield_to_winner(call: Call, error: Refused) -> None:
    """The key was somebody else's by the time of the commit: theirs is the result, where they have one."""
    run = call.run
    assert call.key.text is not None
    found = await run.engine.records.lookup(call.place, call.key.text)
    logger.warning(
        "%s %r - its result is not published: %s. %s", call.definition.kind, run.name, error.reason,
        "The other holder's result is returned." if isinstance(found, Hit) else "It is returned all the same.",
    )  # fmt: skip
    if isinstance(found, Hit):
        run.states[-1].data = found.value


async def _keep_failure(
    run: TaskRun | FlowRun, definition: Definition[..., Any], place: Place, key: Key
) -> None:
    """Keep the exception of a failed run under a random key, never under its cache key."""
    state = run.states[-1]
    facts = Facts(run.id, definition.name, key.components)
    try:
        state.location = await run.engine.records.keep_failure(place.storage, state.error(), facts)
    except Exception as error:  # a storage of the user's own may raise anything
        logger.warning("%s %r - its failure could not be stored: %s", definition.kind, run.name, error)
