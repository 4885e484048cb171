"""The caching half of a run: is it wanted, what is the key, is there a record, and the commit."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from ..storage import StorageError
from . import _policies
from ._context import FlowRun, TaskRun, new_id
from ._errors import CacheKeyError, EngineError, UncacheableInputError
from ._logging import INFO, logger
from ._policies import CachePolicy, ComponentPolicy, Components, NonePolicy, key_from
from ._records import Facts, Hit, Place, ago
from ._states import COMPLETED, FAILED

if TYPE_CHECKING:
    from ._definition import Definition

Attempts = Callable[[Any, Any], Awaitable[None]]


class Key(NamedTuple):
    """The key of a call and the components it was made from; no key, and why, where one cannot be had."""

    text: str | None
    components: Components
    why_not: str = ""


def wanted(run: TaskRun | FlowRun, definition: Definition) -> bool:
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


def policy_of(run: TaskRun | FlowRun, definition: Definition) -> CachePolicy | None:
    """The policy that applies; None where the record lies under a storage key of the user's own."""
    if not definition.is_policy_stated and run.engine.settings.tasks_default_no_cache:
        return _policies.NONE if definition.result_storage_key is None else None
    return definition.cache_policy


async def perform(run: TaskRun | FlowRun, definition: Definition, attempts: Attempts) -> None:
    """Serve the run from its record, or run it and commit."""
    engine = run.engine
    policy = policy_of(run, definition)
    place = engine.place_for(run, policy)
    key = await key_of(run, definition, policy)
    run.key = key.text
    if key.text is None:
        run.reason = f"ran: {key.why_not}"
        await attempts(run, definition)
        return
    if _must_refresh(run, definition):
        run.reason = "ran: refresh was asked for"
    else:
        found = await engine.records.lookup(place, key.text)
        if isinstance(found, Hit):
            _serve(run, found)
            return
        run.reason = f"ran: {found.reason}"
    await attempts(run, definition)
    await commit(run, definition, place, key)


def _serve(run: TaskRun | FlowRun, hit: Hit) -> None:
    if logger.isEnabledFor(INFO):
        age = ago(max(0.0, run.engine.clock() - hit.header.created))
        run.reason = f"cached: written by run {hit.header.run_id} {age} ago"
    run.enter("hit", hit.value)


def _must_refresh(run: TaskRun | FlowRun, definition: Definition) -> bool:
    if definition.refresh_cache is not None:
        return definition.refresh_cache
    return run.engine.settings.tasks_refresh_cache


# --- the key


async def key_of(run: TaskRun | FlowRun, definition: Definition, policy: CachePolicy | None) -> Key:
    """The key of this call. A part that cannot be computed means no key, and one warning that says what to do."""
    if policy is None:
        from ._engine import storage_key

        assert definition.result_storage_key is not None
        return Key(storage_key(definition.result_storage_key, run), {})
    if isinstance(policy, NonePolicy):
        return Key(None, {}, "the policy is NONE")
    try:
        return await _key_of(run, policy)
    except UncacheableInputError as error:
        why = f"{error.path} has no cache key"
        _warn(run, definition, f"{definition.name}({', '.join(run.parameters)}): {error}. {_REMEDIES % error.path.partition('[')[0].partition('.')[0]}")
    except CacheKeyError as error:
        why = "the key function gave no key"
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


def _warn(run: TaskRun | FlowRun, definition: Definition, text: str) -> None:
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
        if part is policy:  # a key function's text, and that of a policy of the user's own, is the key, verbatim
            return Key(text or None, found, "the key function returned no key")
        _policies.merge(components, found)
    return Key(key_from(components), components, "the policy has nothing to make a key of")


# --- the commit


async def commit(run: TaskRun | FlowRun, definition: Definition, place: Place, key: Key) -> None:
    """Write the record of a completed run. What goes wrong is a warning: the task's value is never lost by it."""
    state = run.states[-1]
    if state.type is FAILED:
        await _keep_failure(run, definition, place, key)
        return
    if state.type is not COMPLETED:
        return
    assert key.text is not None
    expiration = definition.cache_expiration
    facts = Facts(
        run.id,
        definition.name,
        key.components,
        None if expiration is None else run.engine.clock() + expiration.total_seconds(),
    )
    records = run.engine.records
    try:
        await records.write(await records.prepare(place, key.text, state.data, facts))
    except Exception as error:  # noqa: BLE001 - a storage of the user's own may raise anything
        logger.warning(
            "%s %r - its result could not be stored, and is not cached: %s", definition.kind, run.name, error
        )
        return
    state.location = key.text


async def _keep_failure(run: TaskRun | FlowRun, definition: Definition, place: Place, key: Key) -> None:
    """Keep the exception of a failed run under a random key, never under its cache key."""
    state = run.states[-1]
    facts = Facts(run.id, definition.name, key.components)
    try:
        state.location = await run.engine.records.keep_failure(place.storage, state.error(), facts)
    except Exception as error:  # noqa: BLE001 - a storage of the user's own may raise anything
        logger.warning("%s %r - its failure could not be stored: %s", definition.kind, run.name, error)


__all__ = ["commit", "key_of", "new_id", "perform", "wanted"]
