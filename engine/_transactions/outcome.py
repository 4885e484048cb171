"""How a transaction ends: its records are written together, or an error names the one that was not; then hooks run."""

from __future__ import annotations

import asyncio
import inspect
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ...storage import StorageError
from .._commit.driver import uncancelled
from .._commit.requests import InDoubt, Refused, Where
from .._errors import CommitError
from .._execution.hooks import HOOK_SECONDS
from .._runs.logging import logger

if TYPE_CHECKING:
    from ...storage._format.envelope import Header
    from .._concurrency.singleflight import Served
    from .._records.record import Prepared
    from .._runs.run import Run
    from .transaction import transaction


class Staged(NamedTuple):
    """A record that waits for the transaction's outcome.

    `expect` is the version that it replaces and `replaces` that one's header, as far as somebody has looked;
    `exclusive` says that the key is held. `run` is the one whose result it is, None for a keyed transaction's.
    """

    prepared: Prepared
    expect: str | None
    exclusive: bool
    served: Served
    run: Run | None = None
    replaces: Header | None = None


Hook = tuple[str, Callable[..., Any], "transaction", str]
"""When, what, with which transaction, and the name of the run whose hook it is."""


async def write(txn: transaction) -> None:
    """Make what is staged visible in one step; one plain write for a single record.

    Raises:
        CommitError: Nothing of it is visible, unless it is in doubt.
    """
    if not txn._staged:
        return
    try:
        await _settle_held(txn)
        await _write(txn)
    except Refused as error:
        raise _failure(txn, error.where, error.reason) from error
    except InDoubt as error:
        raise _failure(txn, error.where, error.reason, in_doubt=True) from error
    except Exception as error:  # a storage of the user's own may raise anything
        raise _failure(txn, _where_of(txn, error), str(error) or repr(error)) from error
    for staged in txn._staged.values():
        if staged.run is not None:
            staged.run.state.location = staged.prepared.key


async def _settle_held(txn: transaction) -> None:
    """What the held keys' commits replace, by the word of those that hold them."""
    for held in txn.held:
        where = held.flight.where
        if held.lost:
            raise Refused(where, "its lease was lost before the commit")
        staged = txn._staged.get(where)
        if staged is not None:
            txn._staged[where] = staged._replace(expect=await held.settle(staged.expect))


async def _write(txn: transaction) -> None:
    records, members = txn.engine.records, list(txn._staged.values())
    if len(members) == 1:
        one = members[0]
        try:
            await records.write(
                one.prepared, expect=one.expect, exclusive=one.exclusive, replaces=one.replaces
            )
        except Refused:
            raise
        except Exception:  # as above
            if not await records.has_written(one.prepared):
                raise
        return
    storages = {staged.prepared.place.records.url: staged.prepared.place.records for staged in members}
    for storage in storages.values():
        await storage.ensure_conditional()
    await records.commit_together(txn.id, members)


def _where_of(txn: transaction, error: Exception) -> Where:
    """The member that a storage's error is about; the first where it does not say."""
    key = getattr(error, "key", None) if isinstance(error, StorageError) else None
    for where, staged in txn._staged.items():
        if key in (where[1], staged.prepared.header.location):
            return where
    return next(iter(txn._staged))


def _failure(txn: transaction, where: Where, reason: str, *, in_doubt: bool = False) -> CommitError:
    staged: Staged | None = txn._staged.get(where)
    name = staged.run.name if staged is not None and staged.run is not None else ""
    return CommitError(where[1], reason, name, in_doubt)


async def call_hooks(hooks: Sequence[Hook], event: str) -> None:
    """Call the hooks of the outcome: commits in order, rollbacks in reverse. One that raises is logged.

    Cancelled, or called on the way out of something cancelled, it gives them `HOOK_SECONDS`, and breaks them off.
    """
    called = [hook for hook in hooks if hook[0] == event]
    if not called:
        return
    pending = deque(called if event == "on_commit" else reversed(called))
    work = asyncio.ensure_future(_call(pending, "commit" if event == "on_commit" else "rollback"))
    if not asyncio.current_task().cancelling():  # type: ignore[union-attr]  # we run in one
        try:
            await asyncio.shield(work)
            return
        except asyncio.CancelledError:
            await _hurry(work, pending)
            raise
    await _hurry(work, pending)


async def _hurry(work: asyncio.Task[None], pending: deque[Hook]) -> None:
    try:
        await uncancelled(asyncio.wait([work], timeout=HOOK_SECONDS))
    finally:
        if not work.done():
            logger.warning(
                "%d hooks of a transaction were broken off after %g s", len(pending) + 1, HOOK_SECONDS
            )
            pending.clear()
            work.cancel()
    if work.done():
        work.result()


async def _call(pending: deque[Hook], verb: str) -> None:
    while pending:
        _, hook, txn, owner = pending.popleft()
        name = getattr(hook, "__name__", repr(hook))
        logger.info("Task run %r - Running %s hook %r", owner, verb, name)
        try:
            outcome = hook(txn)
            if inspect.isawaitable(outcome):
                await outcome
        except (KeyboardInterrupt, SystemExit):
            raise
        except asyncio.CancelledError:
            asyncio.current_task().uncancel()  # type: ignore[union-attr]  # as above
            logger.warning("Task run %r - %s hook %r was cancelled", owner, verb.capitalize(), name)
        except BaseException:
            logger.exception(
                "Task run %r - An error was encountered while running %s hook %r", owner, verb, name
            )
        else:
            logger.info(
                "Task run %r - %s hook %r finished running successfully", owner, verb.capitalize(), name
            )
