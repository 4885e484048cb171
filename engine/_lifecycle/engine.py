"""The engine: settings, storages and threads that runs share, on one event loop at a time."""

from __future__ import annotations

import asyncio
import functools
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar
from weakref import WeakKeyDictionary

from ...locking import LockManager, lock_manager_from_url
from ...storage import Storage
from .._concurrency.limits import Limits
from .._concurrency.singleflight import Room
from .._definitions.options import check_locking, check_runner
from .._errors import ConfigurationError, EngineClosedError
from .._records.history import Explainer
from .._records.stores import SerializerLike, StorageLike, Stores
from .._records.writer import Records
from .._runs import logging
from .._settings import Settings, stamp
from .draining import Failures, drain
from .embedding import Embedding
from .watchdog import Watchdog

if TYPE_CHECKING:
    import anyio

    from .._runs.futures import RunFuture
    from .._runs.run import FlowRun, TaskRun

T = TypeVar("T")

current_engine: ContextVar[Engine | None] = ContextVar("onceflow_engine", default=None)
_outer_engines: ContextVar[tuple[Engine | None, ...]] = ContextVar("onceflow_outer_engines", default=())
"""Those that were entered before it, from the outside in."""


class Engine(Embedding, Stores):
    """What runs share: where records lie, who locks, which threads synchronous bodies get.

    Making one opens nothing. `async with engine:` opens it, makes it the engine of every run that starts
    inside, and on leaving refuses new work, waits up to `grace` seconds for the runs it owns, cancels the
    rest, and closes what it opened (storages that were passed in as objects stay open). It may be entered
    and left from different tasks, and again after it was left.

    Args:
        storage: Where results lie: a path, a URL or a storage. `~/.onceflow/storage` without a setting.
        lock_manager: Who locks SERIALIZABLE keys, for policies that name nobody.
        key_storage: Where records lie when they lie apart from results.
        serializer: For tasks and flows that name none.
        settings: In place of those of the environment.
        grace: Seconds that leaving waits for runs before it cancels them.
        worker_threads: How many synchronous bodies run at once in threads.
        runner: Where the bodies of synchronous tasks run that name no runner: `"thread"`, which is the default, or
            `"process"`, in worker processes, one for each core, where they see their arguments and nothing else.
            Async bodies, generators and flows run here whatever it says, and so do look-ups, locks and commits.
        clock: Unix time in seconds, for expiry.
        sleep: Waits before retries, in seconds.
    """

    def __init__(
        self,
        storage: StorageLike | None = None,
        lock_manager: LockManager | None = None,
        *,
        key_storage: StorageLike | None = None,
        serializer: SerializerLike | None = None,
        settings: Settings | None = None,
        grace: float | None = None,
        worker_threads: int | None = None,
        runner: str | None = None,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        _check(storage, key_storage, lock_manager, settings, grace, worker_threads)
        self._given = (storage, key_storage, serializer, settings, grace, worker_threads)
        check_runner("The engine", runner)
        self.runner = runner
        self.lock_manager = lock_manager
        self.clock = clock
        self.sleep = sleep
        self.running: set[RunFuture[Any]] = set()
        self.failed = Failures()
        self.live: set[TaskRun | FlowRun] = set()
        self.ended: asyncio.Future[None] | None = None
        self.interrupted: str | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self.process = os.getpid()
        """Where it was opened: a forked child finds it open, on a loop that runs elsewhere."""
        self._entries = 0
        self._opening: asyncio.Future[None] | None = None
        self._awaited = 0
        self._closing: asyncio.Future[None] | None = None
        self._is_open = False
        self._stamp: dict[Any, Any] | None = None
        self._said: Any = None
        Stores.__init__(self)
        self.flights = Room()
        self.limits = Limits(None)
        self.explainer = Explainer()
        self.configuration: object = None
        """Another object with each configuration: what was concluded from an earlier one does not hold."""
        self._own_locks: LockManager | None = None
        self._watchdog: Watchdog | None = None

    log_filter = logging.RunFilter()
    """A logging filter for handlers: stamps every record, other libraries' too, with flow, run and task."""

    # --- opening and closing

    async def open(self) -> Self:
        """Read the settings and make ready; idempotent, also when several tasks come at once.

        Costs one thread hop (settings may lie in files); no storage is touched before it is used. Cancelled, it
        leaves the engine closed, unless somebody else waits for it too.

        Raises:
            ConfigurationError: It is open on another loop.
        """
        self._take_loop(asyncio.get_running_loop())
        if self._is_open:
            return self
        if self._closing is not None:
            await asyncio.shield(self._closing)
        if self._opening is None:
            self._opening = asyncio.ensure_future(self._open())
        self._awaited += 1
        try:
            await asyncio.shield(self._opening)
        finally:
            self._awaited -= 1
            if self._opening is not None and not self._awaited:
                self._opening.cancel()
        return self

    def _take_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        """Belong to this loop: to one at a time, and no longer to one that was closed without closing this."""
        if self.loop is not None and self.loop is not loop:
            if not self.loop.is_closed() and (self._is_open or self._opening or self._closing):
                raise ConfigurationError(
                    "This engine is open on another event loop.", "Make one for each loop."
                )
            self._is_open, self._opening, self._closing, self._entries = False, None, None, 0
            self._awaited = 0
            self._own.clear()  # bound to that loop, and gone with it
            self.running.clear()
            self.live.clear()
        self.loop, self.process = loop, os.getpid()

    async def _open(self) -> None:
        import anyio

        _, _, _, settings, grace, threads = self._given
        try:
            await self.flights.free_abandoned()
            self._stamp, self._said = _environment(), _said()
            self.settings: Settings = (
                settings if settings is not None else await asyncio.to_thread(Settings.load)
            )
            self.grace = self.settings.grace if grace is None else grace
            self._limiter = anyio.CapacityLimiter(threads or self.settings.worker_threads)
            if self.lock_manager is None and self.settings.locks:
                # A path may be relative, and a client slow to import.
                self._own_locks = await asyncio.to_thread(lock_manager_from_url, self.settings.locks)
                self.lock_manager = self._own_locks
            self.limits = Limits(self.settings.tag_limits)
            self.records = Records(self.in_thread, clock=self.clock, storage_at=self._storage_at)
            self._obey(self.settings)
            if self.settings.warn_blocking:
                self._watchdog = Watchdog(self.settings.warn_blocking)
                self._watchdog.start()
            if self.settings.logging_level:
                logging.show(self.settings.logging_level.upper())
        finally:
            self._opening = None
        self._is_open, self.interrupted = True, None
        open_engines.setdefault(asyncio.get_running_loop(), []).append(self)

    def _obey(self, settings: Settings) -> None:
        """Take over what may change while the engine is open."""
        storage, key_storage, *_ = self._given
        self.settings = settings
        self.configuration = object()
        self.storage = self.storage_for(
            storage or settings.storage or os.path.expanduser("~/.onceflow/storage")
        )
        spec = key_storage or settings.key_storage
        self.key_storage = self.storage_for(spec) if spec else None
        self.serializer = self.serializer_for(self._given[2] or settings.results_default_serializer)
        keys = [
            key.strip().encode() for key in (settings.results_signing_key or "").split(",") if key.strip()
        ]
        self.records.trust(keys, settings.results_allow_pickle, settings.results_memory_bytes)

    async def reload(self) -> None:
        """Read the settings again. What was given to the engine stays, and so do its locks and threads.

        Costs one thread hop.
        """
        stamp, said = _environment(), _said()
        self._obey(await asyncio.to_thread(Settings.load))
        self._stamp, self._said = stamp, said

    async def aclose(self) -> None:
        """Refuse new work, wait `grace` seconds for owned runs, cancel the rest, close what was opened. Idempotent.

        Cancelled, it goes on closing by itself.
        """
        if self._is_open:
            self._is_open = False
            self._closing = asyncio.ensure_future(self._close())
        if self._closing is not None:
            await asyncio.shield(self._closing)

    async def _close(self) -> None:
        try:
            await drain(self, self.grace)
        finally:
            self.failed.tell()
            try:
                await self._close_own()
            finally:
                self._closing = None
                engines = open_engines.get(asyncio.get_running_loop(), [])
                if self in engines:
                    engines.remove(self)

    async def _close_own(self) -> None:
        await self.flights.aclose()
        if self._watchdog is not None:
            watchdog, self._watchdog = self._watchdog, None
            await watchdog.stop()
        closings: list[Callable[[], Awaitable[None]]] = [
            functools.partial(self.explainer.flush, self.records.signing_keys)
        ]
        closings.append(self.records.sweep_some)
        closings += [storage.aclose for storage in self._own.values()]
        if self._own_locks is not None:
            closings.append(self._own_locks.aclose)
            self.lock_manager = self._own_locks = None
        self._own.clear()
        errors: list[Exception] = []
        for closing in closings:
            try:
                await closing()
            except Exception as error:
                errors.append(error)  # the others are closed all the same
        if errors:
            raise ExceptionGroup("closing the engine", errors)

    async def close_with_loop(self) -> None:
        """The end of an engine that nobody entered: with its loop, which is forgotten."""
        made_engines.pop(asyncio.get_running_loop(), None)
        await self.aclose()

    async def __aenter__(self) -> Self:
        await self.open()
        self._entries += 1
        _outer_engines.set((*_outer_engines.get(), current_engine.get()))
        current_engine.set(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Not always the last that was entered; and left from another task than the one that entered, it is not
        # among those of this context at all.
        entered = [*_outer_engines.get(), current_engine.get()]
        if self in entered:
            del entered[len(entered) - 1 - entered[::-1].index(self)]
            current_engine.set(entered.pop())
            _outer_engines.set(tuple(entered))
        self._entries -= 1
        if self._entries <= 0:  # entered by several, it is closed by the last
            await self.aclose()

    def is_stale(self) -> bool:
        """Whether the environment has changed since the settings were read from it."""
        if self._stamp is None or self._given[3] is not None or self._stamp == _environment_view():
            return False
        if self._said != _said():
            return True
        self._stamp = _environment()  # something else has changed, which is no business of ours
        return False

    @property
    def engine(self) -> Self:
        """Itself, as the owner of runs that are submitted where no run is."""
        return self

    def check_usable(self, what: str) -> None:
        """Runs that are under way may go on while the engine closes, but not after.

        Raises:
            EngineClosedError: It is closed.
        """
        if not self._is_open and self._closing is None:
            raise EngineClosedError(what)

    # --- what runs ask for

    async def in_thread(self, fn: Callable[..., T], *args: Any) -> T:
        """Run a function in a worker thread of the engine's own, with the caller's context variables.

        Cancelled, the caller goes on at once, and the thread finishes by itself.
        """
        from anyio.to_thread import run_sync

        return await run_sync(functools.partial(fn, *args), abandon_on_cancel=True, limiter=self._limiter)

    @contextmanager
    def one_more_thread(self) -> Iterator[None]:
        """A worker thread waits here for a run: let that have one in its place, or both might wait for ever."""
        limiter = self._limiter
        limiter.total_tokens += 1
        try:
            yield
        finally:
            limiter.total_tokens -= 1

    _limiter: anyio.CapacityLimiter


def _check(
    storage: Any, key_storage: Any, lock_manager: Any, settings: Any, grace: Any, worker_threads: Any
) -> None:
    """What can be told at once of the arguments of an engine, which opens nothing yet.

    Raises:
        ConfigurationError: Names the argument, and what it may be.
    """
    kinds: dict[str, tuple[Any, Any, str]] = {
        "storage": (storage, (Storage, str, os.PathLike), "Give a path, a URL or a Storage."),
        "key_storage": (key_storage, (Storage, str, os.PathLike), "Give a path, a URL or a Storage."),
        "settings": (settings, Settings, "Write settings=Settings(…)."),
    }  # fmt: skip
    for name, (value, types, remedy) in kinds.items():
        if value is not None and not isinstance(value, types):
            raise ConfigurationError(f"{name} of an engine cannot be {value!r}.", remedy)
    check_locking("an engine", lock_manager)
    if grace is not None and (not isinstance(grace, (int, float)) or not grace >= 0):
        raise ConfigurationError(f"grace must be seconds from 0 on, got {grace!r}.", "Leave it out for 10.")
    if worker_threads is not None and (not isinstance(worker_threads, int) or worker_threads < 1):
        raise ConfigurationError(
            f"worker_threads must be a whole number from 1 on, got {worker_threads!r}.",
            "Leave it out for 40.",
        )


# --- what lies beside engines: see `ambient`

open_engines: WeakKeyDictionary[asyncio.AbstractEventLoop, list[Engine]] = WeakKeyDictionary()
made_engines: WeakKeyDictionary[asyncio.AbstractEventLoop, Engine] = WeakKeyDictionary()
"""The engines that were made from the settings, because nobody had entered one."""


def _environment_view() -> Any:
    # The raw mapping of os.environ compares in C, in under a microsecond; where it is missing, a copy does.
    return getattr(os.environ, "_data", None) or dict(os.environ)


def _environment() -> dict[Any, Any]:
    return dict(_environment_view())


def _said() -> Any:
    """What of the environment an engine depends on."""
    return stamp(), os.environ.get("HOME")
