"""A transaction's own record, under the key that it was given: opened, staged and read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._commit.driver import uncancelled
from .._concurrency.locks import hold
from .._concurrency.singleflight import Lead, Patience
from .._errors import CommitError, ConfigurationError, NoValueError
from .._keys.policies import IsolationLevel
from .._records.record import Facts, Hit, Place
from .outcome import Staged

if TYPE_CHECKING:
    from .._commit.requests import Where
    from .transaction import transaction


def place_of(txn: transaction) -> Place:
    """Where the record lies."""
    engine, given = txn.engine, txn.storage
    storage = engine.storage if given is None else engine.meet(engine.storage_for(given))
    return Place(storage, engine.key_storage, engine.serializer)


def _where(txn: transaction, place: Place) -> Where:
    if txn.key is None:
        raise ConfigurationError(
            f"{txn.name} has no key for a record of its own.", "Write transaction(key=…)."
        )
    return place.records.url, txn.key


def is_own(txn: transaction, where: Where) -> bool:
    """Whether it is the transaction's own record that lies under an object's name."""
    return txn.key == where[1] and _where(txn, place_of(txn)) == where


def stage(txn: transaction, value: Any) -> None:
    """See `transaction.stage`."""
    if txn.key is None:
        raise ConfigurationError(
            f"{txn.name} has no key to stage a value under.", "Write transaction(key=…)."
        )
    txn.check_open("Stage")
    if txn.has_record:
        return
    records, place, facts = txn.engine.records, place_of(txn), Facts(txn.id, txn.name)
    try:
        prepared = records.prepare_now(place, txn.key, value, facts).snapshot()
    except Exception as error:  # a serializer of the user's own may raise anything
        txn.break_with(CommitError(txn.key, str(error), txn.name))
        return
    served = records.served(prepared, is_snapshot=True)
    txn.add_record(_where(txn, place), Staged(prepared, *txn.expectation, served))


async def read(txn: transaction) -> Any:
    """See `transaction.read`."""
    place = place_of(txn)
    where = _where(txn, place)
    staged = txn.staged(where)
    if staged is not None:
        return staged.value()
    found = await txn.engine.records.lookup(place, where[1])
    if isinstance(found, Hit):
        return found.value
    raise NoValueError(txn.name, f"record ({found.reason})", "Stage a value first.")


async def open_keyed(txn: transaction) -> None:
    """Look the record up, and hold its key where the transaction is SERIALIZABLE. Cancelled, it holds nothing."""
    try:
        await _open(txn)
    except BaseException:
        await uncancelled(txn.release(committed=False))
        raise


async def _open(txn: transaction) -> None:
    records, place = txn.engine.records, place_of(txn)
    where = _where(txn, place)
    if not txn.overwrite and txn.staged(where) is not None:
        txn.has_record = True
        return
    found = None if txn.overwrite else await records.lookup(place, where[1])
    if not isinstance(found, Hit) and txn.isolation_level is IsolationLevel.SERIALIZABLE:
        await _hold(txn, where, Patience(txn.lock_timeout))
        found = await records.lookup(place, where[1], exclusive=True)
    if isinstance(found, Hit) and not txn.overwrite:
        txn.has_record = True
        await txn.release(committed=False)
    elif found is not None:
        txn.expectation = (found.version, bool(txn.held))


async def _hold(txn: transaction, where: Where, patience: Patience) -> None:
    """Take the key, in the same room and of the same manager as runs do."""
    engine = txn.engine
    assert txn.lock_manager is not None
    entered = await engine.flights.enter(where, txn, patience)
    if not isinstance(entered, Lead):
        return  # served by another's commit, or held by this very tree
    try:
        txn.held.append(await hold(txn, entered.flight, txn.lock_manager, patience))
    except BaseException:
        engine.flights.finish(entered.flight, None)
        raise
