"""The caching half of a run: is it wanted, what is the key, is there a record, and why not."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

from .._concurrency.locks import isolation_of
from .._definitions.keycache import Known
from .._errors import CacheKeyError, EngineError, UncacheableInputError
from .._keys import policies
from .._keys.policies import CachePolicy, ComponentPolicy, Components, NonePolicy, key_from
from .._records.record import Hit, Miss, ago, storage_key
from .._runs.logging import logger
from .._runs.run import FlowRun, TaskRun
from .._transactions.transaction import enclosing
from .explain import Explanation, explanation, reason_for
from .serializable import exclusively
from .turn import Attempts, Call, Key, commit, look_up, note_reason, serve

if TYPE_CHECKING:
    from .._definitions.definition import Definition


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
    has_place = definition.cache_policy is not None or definition.result_storage_key is not None
    return run.task is not None or has_place


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
        return policies.NONE if definition.result_storage_key is None else None
    return definition.cache_policy


def perform(run: TaskRun | FlowRun, definition: Definition[..., Any], attempts: Attempts) -> Awaitable[None]:
    """Serve the run from its record, or run it and commit.

    Not a coroutine itself: while a run waits for a key, every coroutine that it is inside of stays in memory.
    """
    call = _known_call(run, definition, attempts)
    if call is not None and run.transaction is None:
        exclusive, manager = isolation_of(run, call.policy, None)
        if manager is not None and exclusive:
            return exclusively(call, manager)
    return _perform(run, definition, attempts, call)


async def _perform(
    run: TaskRun | FlowRun, definition: Definition[..., Any], attempts: Attempts, call: Call | None
) -> None:
    if call is None:
        call = await call_for(run, definition, attempts)
    if call is None:
        await attempts(run, definition)
        return
    txn = run.transaction
    if txn is not None and not call.refresh and (staged := txn.staged(call.where)) is not None:
        run.reason = "cached: staged in this transaction"
        run.enter("hit", staged.value())
        txn.add_run(run, {})  # its hooks are those of the run that has staged it
        return
    exclusive, manager = isolation_of(run, call.policy, txn)
    if manager is not None and exclusive:
        await exclusively(call, manager)
        return
    found = await look_up(call)
    if isinstance(found, Hit):
        serve(run, found)
        return
    await attempts(run, definition)
    await commit(call, found)


def _known_call(run: TaskRun | FlowRun, definition: Definition[..., Any], attempts: Attempts) -> Call | None:
    """The call, where the key of an equal one has been computed already."""
    mark = definition.known.mark(run)
    known = definition.known.get(mark, run.engine.configuration) if mark is not None else None
    policy = definition.cache_policy
    if known is None or policy_of(run, definition) is not policy:
        return None
    run.key = known.where[1]
    refresh = _must_refresh(run, definition)
    return Call(run, definition, attempts, policy, known.place, known.key, known.where, refresh)


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
    if policy is definition.cache_policy and (mark := definition.known.mark(run)) is not None:
        definition.known.put(mark, engine.configuration, Known(key, place, where))
    return Call(run, definition, attempts, policy, place, key, where, _must_refresh(run, definition))


async def drop_chunks_unless_committed(run: TaskRun | FlowRun, definition: Definition[..., Any]) -> None:
    """Remove the chunks of a stream that was broken off, unless its record was written after all."""
    assert run.key is not None
    assert run.chunks is not None
    try:
        place = run.engine.place_for(run, policy_of(run, definition))
        found = await run.engine.records.lookup(place, run.key)
    except Exception as error:  # a storage of the user's own may raise anything
        logger.warning("%s %r - what it has stored stays behind: %s", definition.kind, run.name, error)
        return
    if not isinstance(found, Hit) or found.header.run_id != run.id:
        await run.chunks.discard()


async def look_up_value(call: Call) -> Any:
    """The value of the committed record, without a change of state; None where there is none."""
    run = call.run
    if call.refresh:
        run.reason = "ran: refresh was asked for"
        return None
    assert call.key.text is not None
    found = await run.engine.records.lookup(call.place, call.key.text)
    if isinstance(found, Miss):
        await note_reason(call, found)
        return None
    run.reason = f"cached: written by run {found.header.run_id}"
    return found.value


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
    txn = enclosing()
    if txn is not None and txn.staged(call.where) is not None:
        return explanation(call.key, True, "cached: staged in this transaction")
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
        argument = error.path.partition("[")[0].partition(".")[0]
        call = f"{definition.name}({', '.join(run.parameters)})"
        _warn(run, definition, f"{call}: {error}. {_REMEDIES % argument}")
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
    parts = policy.parts()
    for part in parts:
        if isinstance(part, ComponentPolicy):
            seen = policies.seen_by(part, parts, inputs)
            if part.is_heavy(run, seen):
                found = await run.engine.in_thread(part.components, run, seen, flow_parameters)
            else:
                found = part.components(run, seen, flow_parameters)
            policies.merge(components, found)
            continue
        text = part.compute_key(run, inputs, flow_parameters)
        if inspect.isawaitable(text):
            text = await text
        found = policies.custom(part, text)
        if (
            part is policy
        ):  # a key function's text, and that of a policy of the user's own, is the key, verbatim
            return Key(text or None, found, "the key function returned no key")
        policies.merge(components, found)
    return Key(key_from(components), components, "the policy has nothing to make a key of")
