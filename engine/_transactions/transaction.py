"""`transaction()`: several tasks' records become visible together, or not at all.

A record of its own is the business of `keyed`, how it ends that of `outcome`, and how records are written together
that of `_commit/protocol`. What is left is a little above 400 lines, because it is one class with a long public face.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

from ...locking import LockManager
from ...storage import Storage
from .._commit.driver import uncancelled
from .._commit.requests import ANY, Where
from .._concurrency.claims import Claim
from .._concurrency.locks import Held
from .._concurrency.singleflight import Flight, Served
from .._definitions.options import check_locking
from .._errors import CommitError, ConfigurationError, NoValueError
from .._keys.policies import IsolationLevel
from .._lifecycle.ambient import ambient, ambient_now
from .._lifecycle.engine import Engine, current_engine
from .._runs.owners import cancel_all, finish
from .._runs.run import Run, current_run, current_transaction, new_id
from .keyed import is_own, open_keyed, read, stage
from .outcome import Staged, call_hooks, write

if TYPE_CHECKING:
    import os
    from types import TracebackType

    from .._records.chunks import ChunkWriter
    from .._runs.futures import RunFuture

_MISSING = object()


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
        check_locking("a transaction", lock_manager, lock_timeout)
        self._id: str | None = None
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
        """Whether tasks inside stage their records here. That of a run outside of any block only carries its
        values and hooks: tasks inside commit for themselves."""
        self.is_savepoint = False
        """Whether it is a run's own, and not a block of the user's."""
        self.expectation: tuple[str | None, bool] = (ANY, False)
        """The version of a keyed one's record that its opening saw, and whether the key is held."""
        self.has_record = False
        """Whether a keyed one's record was there when it was opened, committed or staged around it."""
        self.blocked_on: dict[Flight, int] = {}
        self.storage = storage
        self.lock_timeout = lock_timeout
        self._values: dict[str, Any] = {}
        self._staged: dict[Where, Staged] = {}
        self._wasted: list[ChunkWriter] = []
        self._runs: list[Run] = []
        self._hooks: list[tuple[str, Callable[..., Any], transaction, str]] = []
        self._inner: list[transaction] = []
        self._broken: CommitError | None = None
        self._is_rolled_back = False
        self._is_over = False

    def begin_waiting(self) -> None:
        """As of a run; a transaction has no state to show it by."""

    # --- for users

    @property
    def id(self) -> str:
        """A UUIDv7, made when it is first asked for."""
        if self._id is None:
            self._id = new_id()
        return self._id

    @property
    def name(self) -> str:
        return f"transaction {self.key or self.id[-6:]!r}"

    @property
    def engine(self) -> Engine:
        """The engine that commits it."""
        return self._engine

    @property
    def is_block(self) -> bool:
        """Whether it is a block of the user's that has not come to its end: it owns what is submitted inside."""
        return not self.is_savepoint and not self._is_over and self.state != "STAGED"

    @staticmethod
    def current() -> transaction | None:
        """The innermost transaction here that has not had its outcome."""
        return enclosing()

    def set(self, name: str, value: Any) -> None:
        """Keep a value for hooks and inner blocks; inner blocks may override it for themselves."""
        self._values[name] = value

    def get(self, name: str, default: Any = _MISSING) -> Any:
        """The value of the innermost block that has one.

        Raises:
            NoValueError: Nobody set it, and there is no default.
        """
        at: transaction | None = self
        while at is not None:
            if name in at._values:
                return at._values[name]
            at = at.parent
        if default is _MISSING:
            raise NoValueError(self.name, f"value {name!r}", "Set it first, or give a default.")
        return default

    def stage(self, value: Any) -> None:
        """The value of the transaction's own record, written when the outermost block ends.

        Taken as it is now: encoded at once, on the calling thread. A value that cannot be stored rolls the
        block back at its end. Where the record was committed before the block began, nothing is written.

        Raises:
            ConfigurationError: The transaction has no key, or its block is not open.
        """
        stage(self, value)

    async def read(self) -> Any:
        """The value of the transaction's own record: staged here or around, else committed.

        Raises:
            NoValueError: There is neither.
            ConfigurationError: The transaction has no key.
        """
        return await read(self)

    def rollback(self) -> None:
        """Drop what this block has staged, now and until its end; then its hooks run. An outer block goes on.

        Raises:
            ConfigurationError: The block is not open: its outcome stands, or is that of the block around it.
        """
        if self.is_rolled_back():
            return
        self.check_open("Roll it back")
        self._is_rolled_back = True
        self._waste_all()

    def check_open(self, verb: str) -> None:
        if self.state not in ("ACTIVE", "COMMITTED") or self._is_over:
            raise ConfigurationError(f"{self.name} is not open.", f"{verb} inside of its `async with` block.")

    def is_committed(self) -> bool:
        """Whether what it has staged is there for all to see, or, of a keyed one, its record was from the beginning."""
        return self.state == "COMMITTED" or (self.has_record and self.state != "ROLLED_BACK")

    def is_rolled_back(self) -> bool:
        return self.state == "ROLLED_BACK" or self._is_rolled_back

    # --- the block

    async def __aenter__(self) -> Self:
        if self.state != "PENDING":
            raise ConfigurationError(
                f"{self.name} was entered before.", "Make a new transaction() for each block."
            )
        outer = enclosing()
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
            await open_keyed(self)
        current_transaction.set(self)
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
        # Of blocks that overlap, as in two open generators, and of those left elsewhere than they were entered, others
        # may be the current one here: that one stays.
        if current_transaction.get() is self:
            current_transaction.set(self.parent)
        if error is not None:
            await self._abandon()
            return
        try:
            await finish(self, self.name)  # a failure that nobody looked at rolls the block back
        except BaseException:
            await self._abandon()
            raise
        await self.end()

    async def _abandon(self) -> None:
        try:
            await cancel_all(self)
        finally:
            await self.roll_back()

    async def end(self) -> None:
        """The block, or the run, has come to its end without an error: join what is around, or decide.

        Raises:
            CommitError: See `commit`.
        """
        around = self._around()
        if self._is_rolled_back or (around is not None and around.state == "ROLLED_BACK"):
            await self.roll_back()
        elif around is None or around._is_over:
            await self.commit()
        else:
            self._join(around)

    def _around(self) -> transaction | None:
        """Whose outcome decides: the next one around that has not joined another itself; None for our own."""
        at = None if self.independent else self.parent
        while at is not None and at.state == "STAGED":
            at = at.parent
        return at if at is not None and at.joins else None

    # --- staging

    def staged(self, where: Where) -> Served | None:
        """What this transaction, or one around it, has staged under an object's name and has not expired."""
        at: transaction | None = self
        while at is not None:
            if where in at._staged:
                staged = at._staged[where]
                expires_at = staged.prepared.header.expires_at
                return staged.served if expires_at is None or expires_at > self._engine.clock() else None
            at = None if at.independent else at.parent
        return None

    def add_record(self, where: Where, staged: Staged) -> None:
        """Take a record in; nothing is kept of a block that is to be rolled back."""
        if self._is_rolled_back:
            self._waste(staged)
            return
        earlier = self._staged.get(where)
        if earlier is not None:
            self._waste(earlier)
        if earlier is not None and (earlier.exclusive or not staged.exclusive):
            # The later value goes, on what the earlier one expected to find; what was seen under a lock holds.
            staged = staged._replace(
                expect=earlier.expect, exclusive=earlier.exclusive, replaces=earlier.replaces
            )
        elif earlier is None and self._insists(where):  # a task's, whose key this block holds as its own
            staged = staged._replace(expect=self.expectation[0], exclusive=True)
        self._staged[where] = staged

    def _insists(self, where: Where) -> bool:
        """Whether it is the own record, and its key held, so that the commit replaces what was seen or nothing."""
        return self.expectation[1] and is_own(self, where)

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

    def _join(self, around: transaction) -> None:
        """Hand everything to the enclosing block, whose outcome decides."""
        for where, staged in self._staged.items():
            around.add_record(where, staged)
        around._wasted += self._wasted
        around._runs += self._runs
        around._hooks += self._hooks
        around._broken = around._broken or self._broken
        for held in self.held:
            around.held.append(held)
            held.flight.keep(around, around.staged(held.flight.where))
        self.held = []
        self.state = "STAGED"
        around._inner.append(self)

    def drop(self, where: Where) -> bool:
        """Forget what is staged under an object's name, here and around; whether there was something."""
        dropped = False
        at: transaction | None = self
        while at is not None:
            if (staged := at._staged.pop(where, None)) is not None:
                at._waste(staged)
                dropped = True
            if at._insists(where):
                at.expectation = (ANY, False)  # what was seen is about to be removed
            at = None if at.independent else at.parent
        return dropped

    def _waste(self, staged: Staged) -> None:
        """The record will never be there: the chunks of its stream go with the outcome."""
        if staged.run is not None and staged.run.chunks is not None:
            self._wasted.append(staged.run.chunks)

    def _waste_all(self) -> None:
        for staged in self._staged.values():
            self._waste(staged)
        self._staged.clear()

    # --- the outcome

    async def commit(self) -> None:
        """Make everything visible in one step, free the keys, call the hooks.

        Cancelled, it goes on to its end, and passes the cancellation on; hooks are then given 10 s.

        Raises:
            CommitError: Nothing of it is visible; names the member that could not be written.
        """
        try:
            await uncancelled(self._commit())
        finally:
            await call_hooks(self._hooks, "on_commit" if self.state == "COMMITTED" else "on_rollback")

    async def _commit(self) -> None:
        try:
            if self._broken is not None:
                raise self._broken
            await write(self)
        except BaseException as error:
            if isinstance(error, CommitError) and error.in_doubt:
                self._staged.clear()  # without a word of what they name: it may be needed
            await self._drop()
            raise
        self._settle("COMMITTED")
        if self.independent:
            self._tell_around()
        await self.release(committed=True)
        await self._discard()

    def _tell_around(self) -> None:
        """Blocks around that hold a key which was written here must not take that for the work of a stranger."""
        at = self.parent
        while at is not None:
            for where in self._staged.keys() & at._staged.keys():
                at._staged[where] = at._staged[where]._replace(expect=ANY, exclusive=False)
            if any(map(at._insists, self._staged)):
                at.expectation = (ANY, False)
            at = at.parent

    async def roll_back(self) -> None:
        """Drop everything, free the keys, run the rollback hooks in reverse order. Cancelled, as `commit`."""
        if self._is_over:
            return
        try:
            await uncancelled(self._drop())
        finally:
            await call_hooks(self._hooks, "on_rollback")

    async def _drop(self) -> None:
        self._waste_all()
        self._settle("ROLLED_BACK")
        for run in reversed(self._runs):
            if run.state.is_completed() and run.state.name != "RolledBack":
                run.enter("roll_back", run.state.data, "rolled back with its transaction")
        await self.release(committed=False)
        await self._discard()

    async def _discard(self) -> None:
        wasted, self._wasted = self._wasted, []
        for chunks in wasted:
            await chunks.discard()

    def _settle(self, state: str) -> None:
        self.state = state
        self._is_over = True
        for inner in self._inner:
            inner._settle(state)

    async def release(self, *, committed: bool) -> None:
        """Free the keys in the order they were taken; waiters are served by the records, or go on."""
        held, self.held = self.held, []
        for each in held:
            staged = self._staged.get(each.flight.where) if committed else None
            try:
                await each.release(committed=staged is not None)
            finally:  # a waiter that is not woken waits for ever
                ends = staged and staged.prepared.header.expires_at
                is_over = ends is not None and ends <= self._engine.clock()
                self._engine.flights.finish(each.flight, staged.served if staged and not is_over else None)


def enclosing() -> transaction | None:
    """The innermost transaction here that has not had its outcome: a task may outlive the block it was started in."""
    txn = current_transaction.get()
    while txn is not None and txn._is_over:
        txn = txn.parent
    return txn
