"""SERIALIZABLE: one execution at a time for a key, however many want it, in however many processes."""

from __future__ import annotations

from typing import Any, TypeGuard

from ..locking import LockManager, StorageLockManager
from ._claiming import claim
from ._claims import Claim
from ._commit import uncancelled
from ._committing import Call, commit, look_up, serve, serve_value
from ._context import Run
from ._flights import ENDLESS, Flight, Inside, Lead, Patience, Served
from ._locks import Held, hold
from ._logging import logger
from ._lookup import LEAVES_LOOP
from ._place import Hit, Miss, Prepared
from ._steps import ANY


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
    held: Held | Claim | None = None
    written: Prepared | None = None
    try:
        found = await look_up(call)
        if isinstance(found, Miss) and _claims_in_record(manager, call):
            claimed = await claim(call, flight, found, manager.lease_seconds, patience)
            if isinstance(claimed, Claim):
                held = claimed
            else:  # committed by another process in between, or too large to be carried along by a claim
                found = claimed
        if held is None and not isinstance(found, Hit):
            held = await hold(run, flight, manager, patience)
            found = await look_up(call, exclusive=True)
        if isinstance(found, Hit):
            serve(run, found)
            return
        assert found is not None
        await call.attempts(run, call.definition)
        written = await commit(call, found, held)
    finally:
        txn = run.transaction
        if held is not None and written is not None and txn is not None and txn.joins:
            txn.held.append(held)  # until the outcome
            flight.keep(txn, txn.staged(call.where))
        else:
            try:
                if held is not None:
                    await uncancelled(held.release(committed=written is not None))
            finally:
                run.engine.flights.finish(flight, _for_waiters(call, flight, found, written))


def _for_waiters(
    call: Call, flight: Flight, found: Hit | Miss | None, written: Prepared | None
) -> Served | None:
    """What all waiters are served from at once; None where the next in line has to look for itself."""
    if not flight.waiters:
        return None
    records = call.run.engine.records
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
