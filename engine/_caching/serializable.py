"""SERIALIZABLE: one execution at a time for a key, however many want it, in however many processes."""

from __future__ import annotations

from typing import Any, TypeGuard

from ...locking import LockManager, StorageLockManager
from .._commit.driver import uncancelled
from .._commit.requests import ABSENT, ANY, Refused
from .._concurrency.claims import Claim
from .._concurrency.locks import Held, hold
from .._concurrency.singleflight import ENDLESS, Flight, Inside, Lead, Patience, Served
from .._records.reader import LEAVES_LOOP
from .._records.record import Hit, Miss, Prepared
from .._runs.logging import logger
from .._runs.run import Run
from .claiming import claim
from .turn import Call, commit, look_up, serve, serve_value

RETAKES = 3
"""How often a run tries to publish a result whose lease was lost."""


async def exclusively(call: Call, manager: LockManager) -> None:
    """Lead and run, or wait for the leader's record."""
    run = call.run
    timeout = call.policy.lock_timeout if call.policy is not None else None
    if timeout is None:
        timeout = run.engine.settings.lock_timeout
    patience = ENDLESS if timeout is None else Patience(timeout)
    while True:
        entered = await run.engine.flights.enter(call.where, run, patience)
        if isinstance(entered, Lead):
            await _lead(call, manager, entered.flight, patience)
            return
        if isinstance(entered, Inside):
            await _run_inside(call, entered.flight)
            return
        if call.refresh:
            continue
        try:
            if entered.weight > LEAVES_LOOP:
                value: Any = await run.engine.in_thread(entered.value)
            else:
                value = entered.value()
        except Exception as error:  # a serializer of the user's own may raise anything
            logger.warning(
                "%s %r - the result of run %s cannot be read: %r", run.kind, run.name, entered.run_id, error
            )
            continue
        serve_value(run, value, entered.run_id, entered.created)
        return


async def _run_inside(call: Call, flight: Flight) -> None:
    """The key is held by this very tree. A run that leads it commits in its turn; a transaction takes the value."""
    await call.attempts(call.run, call.definition)
    if not isinstance(flight.leader, Run):
        await commit(call, Miss("held by the transaction", None, ANY))


async def _lead(call: Call, manager: LockManager, flight: Flight, patience: Patience) -> None:
    """The leader's way: look up, acquire, look up again, run, commit with the token, release, wake.

    Whatever ends it, the key is given back and somebody else's turn: a waiter that is not woken waits for ever.
    """
    run = call.run
    found: Hit | Miss | None = None
    held: Held | Claim | None
    written: Prepared | None = None
    try:
        found = await look_up(call)
        if isinstance(found, Miss):
            found = await _take(call, manager, flight, found, patience)
        if isinstance(found, Hit):
            serve(run, found)
            return
        held = flight.held
        await call.attempts(run, call.definition)
        written = await _publish(call, manager, flight, held, found, patience)
    finally:
        txn, held = run.transaction, flight.held
        if held is not None and written is not None and txn is not None and txn.joins:
            # Until the outcome. The transaction is the run's own, and about to join the block around.
            txn.held.append(held)
        else:
            try:
                if held is not None:
                    await uncancelled(held.release(committed=written is not None))
            finally:
                run.engine.flights.finish(flight, _for_waiters(call, flight, found, written))


async def _take(
    call: Call, manager: LockManager, flight: Flight, miss: Miss, patience: Patience
) -> Hit | Miss:
    """Hold the key, in `flight.held`, unless another process has committed by then; what lies there."""
    if _claims_in_record(manager, call):
        claimed = await claim(call, flight, miss, manager.lease_seconds, patience)
        if isinstance(claimed, Claim):
            return miss
        if claimed is not None:
            return claimed
        # Too large a record to be carried along by a claim.
    await hold(call.run, flight, manager, patience)
    return await look_up(call, exclusive=True)


async def _publish(
    call: Call,
    manager: LockManager,
    flight: Flight,
    held: Held | Claim | None,
    miss: Miss,
    patience: Patience,
) -> Prepared | None:
    """Commit, or take over what somebody else has committed; None where nothing of this run is published.

    A holder that slept past its lease is refused. It asks for the key again, behind those who have taken it, and
    what it finds then is its result as well as everybody's; where nobody has committed, its own value is published
    under the new lease. So all callers are given the one result that is published, and nothing runs twice for it.
    """
    reason = ""
    for _ in range(RETAKES):
        try:
            return await commit(call, miss, held)
        except Refused as error:
            reason = error.reason
        found = await _take_again(call, manager, flight, held, miss, patience)
        if isinstance(found, Hit):
            await _not_published(call, reason, "The other holder's result is returned.")
            call.run.state.data = found.value
            return None
        if found is None:
            break
        miss, held = found, flight.held
    await _not_published(call, reason, "It is returned all the same.")
    return None


async def _take_again(
    call: Call,
    manager: LockManager,
    flight: Flight,
    held: Held | Claim | None,
    miss: Miss,
    patience: Patience,
) -> Hit | Miss | None:
    """What another holder has committed, or the miss under which to try again; None where that makes no sense."""
    if held is not None:
        await uncancelled(held.release())
    found = await call.run.engine.records.lookup(call.place, call.where[1])
    if isinstance(found, Hit):
        return found if not call.refresh else None
    if found.version == ABSENT and (isinstance(held, Claim) or miss.version not in (ABSENT, ANY)):
        return None  # invalidated since: what was computed before must not come back
    try:
        return await _take(call, manager, flight, found, patience)
    except Exception as error:  # the value is there, and must not be lost for want of a lock
        logger.warning("%s %r - the key could not be had again: %s", call.run.kind, call.run.name, error)
        return None


async def _not_published(call: Call, reason: str, instead: str) -> None:
    run = call.run
    logger.warning("%s %r - its result is not published: %s. %s", run.kind, run.name, reason, instead)
    if run.chunks is not None:
        await run.chunks.discard()


def _for_waiters(
    call: Call, flight: Flight, found: Hit | Miss | None, written: Prepared | None
) -> Served | None:
    """What all waiters are served from at once; None where the next in line has to look for itself."""
    if not flight.waiters:
        return None
    records, ends = call.run.engine.records, written and written.header.expires_at
    if ends is not None and ends <= call.run.engine.clock():
        return None
    if written is not None:
        served: Served = records.served(written)
        return served
    if isinstance(found, Hit):
        again: Served | None = records.served_hit(call.place, found)
        return again
    return None


def _claims_in_record(manager: LockManager, call: Call) -> TypeGuard[StorageLockManager]:
    """Whether the locks lie where the records do, so that one object is lock, fence and record."""
    return isinstance(manager, StorageLockManager) and manager.storage.url == call.place.records.url
