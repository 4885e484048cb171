"""`transaction()`: several tasks' records become visible together, or not at all."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from contextvars import Token
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from ..locking import LockManager
from ..storage import Storage, StorageError
from ._commit import uncancelled
from ._context import Run, current_run, current_transaction, new_id
from ._engine import Engine, ambient, ambient_now, current_engine
from ._errors import CommitError, ConfigurationError
from ._flights import Flight, Served
from ._claims import Claim
from ._locks import Held, open_keyed
from ._logging import logger
from ._owning import cancel_all, finish
from ._policies import IsolationLevel
from ._records import Facts, Hit, Place, Prepared
from ._steps import ANY, Refused, Where

if TYPE_CHECKING:
    import os
    from types import TracebackType

    from ._futures import RunFuture

_MISSING = object()


class Staged(NamedTuple):
    """A record that waits for the transaction's outcome."""

    prepared: Prepared
    expect: str | None
    exclusive: bool
    served: Served
    run: Run | None


class transaction:
    """`async with transaction() as txn:`: what tasks inside store becomes visible together, or not at all.

    Guarantees: to every reader in every process, all records of the outermost block appear in one step when
    it ends, also when this process is killed at any point; what was committed before stays readable until
    then. Inside the block its own staged values are visible. An exception that leaves the block, or a value
    that cannot be written, rolls everything back before any commit hook has run. A task failure that is
    caught inside drops that task's staging only. Blocks nest: an inner one joins the outer, unless it is
    `independent`.

    Cancelled inside the block, it rolls back. Cancelled while it commits, it finishes the commit first.

    Costs n + 1 conditional writes before n > 1 records are visible and n more to tidy up; one plain write for
    a single record. Storages must honour conditional writes.

    Args:
        key: A record of the transaction's own, written from what is `stage`d.
        isolation_level: SERIALIZABLE holds every key until the outcome; inherited by blocks and tasks inside.
        lock_manager: Who holds those keys; inherited.
        overwrite: Ignore an existing record under `key`.
        independent: Stand alone: commit at the own end, whatever the enclosing block does.
        storage: Where the record under `key` lies.
        lock_timeout: How long to wait for another holder of `key`, in seconds.
    """

    def __init__(
        self,
        key: str | None = None,
        *,
        isolation_level: IsolationLevel | str | None = None,
        lock_manager: LockManager | None = None,
        overwrite: bool = False,
        independent: bool = False,
        storage: Storage | str | os.PathLike[str] | None = None,
        lock_timeout: float | None = None,
    ) -> None:
        self.id = new_id()
        self.key = key
        self.isolation_level = None if isolation_level is None else IsolationLevel.parse(isolation_level)
        self.lock_manager = lock_manager
        self.overwrite = overwrite
        self.independent = independent
        self.parent: transaction | None = None
        self.state = "PENDING"
        self.run: Run | None = None
        self.running: set[RunFuture[Any]] = set()
        self.failed: list[RunFuture[Any]] = []
        self.held: list[Held | Claim] = []
        self.joins = True
        """Whether tasks inside stage their records here; a task's own transaction only carries its hooks."""
        self.is_savepoint = False
        """Whether it is a task run's own, and not a block of the user's."""
        self.blocked_on: dict[Flight, int] = {}
        self._storage = storage
        self._lock_timeout = lock_timeout
        self._values: dict[str, Any] = {}
        self._staged: dict[Where, Staged] = {}
        self._runs: list[Run] = []
        self._hooks: list[tuple[str, Callable[..., Any], transaction, str]] = []
        self._keyed: list[transaction] = []
        self._inner: list[transaction] = []
        self._broken: CommitError | None = None
        self._value: Any = _MISSING
        self._is_rolled_back = False

    def begin_waiting(self) -> None:
        """As of a run; a transaction has no state to show it by."""

    # --- for users

    @property
    def name(self) -> str:
        return f"transaction {self.key or self.id[-6:]!r}"

    @property
    def engine(self) -> Engine:
        """The engine that commits it."""
        return self._engine

    @staticmethod
    def current() -> transaction | None:
        """The innermost transaction here."""
        return current_transaction.get()

    def set(self, name: str, value: Any) -> None:
        """Keep a value for hooks and inner blocks; inner blocks may override it for themselves."""
        self._values[name] = value

    def get(self, name: str, default: Any = _MISSING) -> Any:
        """The value of the innermost block that has one.

        Raises:
            KeyError: Nobody set it, and there is no default.
        """
        at: transaction | None = self
        while at is not None:
            if name in at._values:
                return at._values[name]
            at = at.parent
        if default is _MISSING:
            raise KeyError(f"No value {name!r} was set in {self.name}. Set it first, or give a default.")
        return default

    def stage(self, value: Any) -> None:
        """The value of the transaction's own record, written when the outermost block ends.

        Raises:
            ConfigurationError: The transaction has no key.
        """
        if self.key is None:
            raise ConfigurationError(
                f"{self.name} has no key to stage a value under.", "Write transaction(key=…)."
            )
        self._value = value

    async def read(self) -> Any:
        """The value of the transaction's own record: staged here, else committed.

        Raises:
            LookupError: There is neither.
        """
        if self._value is not _MISSING:
            return self._value
        found = await self._engine.records.lookup(self._place(), self._own_key())
        if isinstance(found, Hit):
            return found.value
        raise LookupError(f"{self.name} has no record: {found.reason}. Stage a value first.")

    def rollback(self) -> None:
        """Drop what this block has staged and set; its hooks run at the block's end. An outer block goes on."""
        self._is_rolled_back = True

    def is_committed(self) -> bool:
        return self.state == "COMMITTED"

    def is_rolled_back(self) -> bool:
        return self.state == "ROLLED_BACK" or self._is_rolled_back

    # --- the block

    async def __aenter__(self) -> Self:
        outer = current_transaction.get()
        self.run = current_run.get()
        entered = current_engine.get()
        if entered is not None and entered._is_open:
            self._engine = entered
        elif self.run is not None:
            self._engine = self.run.engine
        else:
            self._engine = ambient_now() or await ambient()
        self.attach(outer)
        if self.isolation_level is IsolationLevel.SERIALIZABLE and self.lock_manager is None:
            self.lock_manager = self._engine.lock_manager
            if self.lock_manager is None:
                raise ConfigurationError(
                    f"{self.name} is SERIALIZABLE, but there is no lock manager.",
                    "Pass lock_manager=… to it or to the engine, or set ONCEFLOW_LOCKS.",
                )
        if self.key is not None:
            await self._open_key()
        self._token: Token[transaction | None] = current_transaction.set(self)
        return self

    def attach(self, outer: transaction | None, engine: Engine | None = None) -> None:
        """Take the place inside `outer`: isolation and lock manager are inherited together."""
        self.parent = outer
        if engine is not None:
            self._engine = engine
        if self.state == "PENDING":
            self.state = "ACTIVE"
        if outer is not None and self.isolation_level is None:
            self.isolation_level = outer.isolation_level
            self.lock_manager = self.lock_manager or outer.lock_manager
        elif outer is not None and self.lock_manager is None:
            self.lock_manager = outer.lock_manager
        if self.isolation_level is None:
            self.isolation_level = IsolationLevel.READ_COMMITTED

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            current_transaction.reset(self._token)
        except ValueError:
            pass  # left in another context than it was entered in: there is nothing of ours to set back
        if error is not None:
            await uncancelled(self._abandon())
            return
        try:
            await self._end_submitted()
        except BaseException:
            await uncancelled(self._abandon())
            raise
        if self._is_rolled_back:
            await uncancelled(self.roll_back())
        elif self.parent is not None and not self.independent:
            self.join_parent()
        else:
            await uncancelled(self.commit())

    async def _end_submitted(self) -> None:
        """Wait for what was submitted in the block; a failure that nobody looked at rolls it back."""
        await finish(self, self.name)

    async def _abandon(self) -> None:
        await cancel_all(self)
        await self.roll_back()

    # --- staging

    def staged(self, where: Where) -> Served | None:
        """What this transaction, or one around it, has staged under an object's name."""
        at: transaction | None = self
        while at is not None:
            if where in at._staged:
                return at._staged[where].served
            at = None if at.independent else at.parent
        return None

    def add_record(self, where: Where, staged: Staged) -> None:
        earlier = self._staged.get(where)
        if earlier is not None:  # the later value goes, on what the earlier one expected to find
            staged = staged._replace(expect=earlier.expect, exclusive=earlier.exclusive)
        self._staged[where] = staged

    def add_run(self, run: Run, hooks: dict[str, list[Callable[..., Any]]]) -> None:
        """A completed run takes part in the outcome: its hooks, and its state RolledBack."""
        self._runs.append(run)
        for event in ("on_commit", "on_rollback"):
            for hook in hooks.get(event, ()):
                self._hooks.append((event, hook, self, run.name))

    def break_with(self, error: CommitError) -> None:
        """A member could not be prepared: the block can only be rolled back."""
        self._broken = self._broken or error

    @property
    def is_broken(self) -> bool:
        return self._broken is not None

    def join_parent(self) -> None:
        """Hand everything to the enclosing block, whose outcome decides."""
        parent = self.parent
        assert parent is not None
        if self._value is not _MISSING:
            parent._keyed.append(self)
        for where, staged in self._staged.items():
            parent.add_record(where, staged)
        parent._runs += self._runs
        parent._hooks += self._hooks
        parent._keyed += self._keyed
        parent._broken = parent._broken or self._broken
        for held in self.held:
            parent.held.append(held)
            held.flight.keep(parent, parent.staged(held.flight.where))
        self.held = []
        self.state = "STAGED" if self.state == "ACTIVE" else self.state
        parent._inner.append(self)

    # --- the outcome

    async def commit(self) -> None:
        """Make everything visible in one step.

        Raises:
            CommitError: Nothing of it is visible; names the member that could not be written.
        """
        try:
            if self._broken is not None:
                raise self._broken
            await self._prepare_keyed()
            await self._write()
        except CommitError:
            await self.roll_back()
            raise
        self._settle("COMMITTED")
        await self._release(committed=True)
        await self._call("on_commit")

    async def _prepare_keyed(self) -> None:
        """Encode the values that keyed transactions have staged."""
        for keyed in [*self._keyed, self]:
            if keyed._value is _MISSING or keyed.state == "COMMITTED":
                continue
            key = keyed._own_key()
            place = keyed._place()
            facts = Facts(self.id, keyed.name)
            try:
                prepared = await self._engine.records.prepare(place, key, keyed._value, facts)
            except StorageError as error:
                raise CommitError(key, str(error)) from error
            served = self._engine.records.served(prepared)
            version, exclusive = keyed._expectation
            self.add_record((place.records.url, key), Staged(prepared, version, exclusive, served, None))

    async def _write(self) -> None:
        records = self._engine.records
        if not self._staged:
            return
        for held in self.held:
            if held.lost:
                raise CommitError(held.flight.where[1], "its lease was lost before the commit")
        for held in self.held:
            if (mine := self._staged.get(held.flight.where)) is not None:
                self._staged[held.flight.where] = mine._replace(expect=await held.settle(mine.expect))
        storages = {
            staged.prepared.place.records.url: staged.prepared.place.records
            for staged in self._staged.values()
        }
        where = next(iter(self._staged))
        try:
            if len(self._staged) == 1:
                (staged,) = self._staged.values()
                await records.write(staged.prepared, expect=staged.expect, exclusive=staged.exclusive)
                return
            for storage in storages.values():
                await storage.ensure_conditional()
            members = [
                records.member(staged.prepared, staged.expect, staged.exclusive)
                for staged in self._staged.values()
            ]
            await records.commit_together(self.id, members)
        except Refused as error:
            raise CommitError(error.where[1], error.reason) from error
        except (StorageError, OSError) as error:
            raise CommitError(getattr(error, "key", None) or where[1], str(error)) from error

    async def roll_back(self) -> None:
        """Drop everything, run the rollback hooks in reverse order, free the keys."""
        if self.state == "ROLLED_BACK":
            return
        self._staged.clear()
        self._settle("ROLLED_BACK")
        for run in reversed(self._runs):
            if run.state.is_completed():
                run.enter("roll_back", run.state.data, "rolled back with its transaction")
        await self._release(committed=False)
        await self._call("on_rollback")

    def _settle(self, state: str) -> None:
        self.state = state
        for inner in self._inner:
            inner._settle(state)

    async def _release(self, *, committed: bool) -> None:
        """Free the keys in the order they were taken; waiters are served by the records, or go on."""
        held, self.held = self.held, []
        for each in held:
            staged = self._staged.get(each.flight.where) if committed else None
            try:
                await each.release(committed=staged is not None)
            finally:  # a waiter that is not woken waits for ever
                self._engine.flights.finish(each.flight, staged.served if staged is not None else None)

    async def _call(self, event: str) -> None:
        """Call the hooks of the outcome: commits in order, rollbacks in reverse. One that raises is logged."""
        hooks = [hook for hook in self._hooks if hook[0] == event]
        for _, hook, inner, owner in hooks if event == "on_commit" else reversed(hooks):
            name = getattr(hook, "__name__", repr(hook))
            verb = "commit" if event == "on_commit" else "rollback"
            logger.info("Task run %r - Running %s hook %r", owner, verb, name)
            try:
                outcome = hook(inner)
                if inspect.isawaitable(outcome):
                    await outcome
            except asyncio.CancelledError:
                raise
            except Exception:
                logger.exception(
                    "Task run %r - An error was encountered while running %s hook %r", owner, verb, name
                )
            else:
                logger.info(
                    "Task run %r - %s hook %r finished running successfully", owner, verb.capitalize(), name
                )

    # --- the transaction's own record

    _expectation: tuple[str | None, bool] = (ANY, False)

    def _own_key(self) -> str:
        assert self.key is not None
        return self.key

    def _place(self) -> Place:
        engine = self._engine
        storage = engine.storage_for(self._storage) if self._storage is not None else engine.storage
        return Place(storage, engine.key_storage, engine.serializer)

    async def _open_key(self) -> None:
        """Take the key where the block is SERIALIZABLE, and see whether it is committed already."""
        await open_keyed(self, self._lock_timeout)
