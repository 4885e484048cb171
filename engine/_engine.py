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

from ..locking import LockManager, lock_manager_from_url
from ..storage import LocalStorage, Storage, storage_from_url
from ..storage._loop_end import ENGINES, at_loop_end
from ..storage._serializers import Serializer, serializer_by_name
from . import _logging
from ._draining import Failures, drain
from ._embedding import Embedding
from ._errors import CacheKeyError, ConfigurationError, EngineClosedError
from ._explain import Explainer
from ._flights import Room
from ._limits import Limits
from ._place import Place
from ._records import Records
from ._settings import Settings, stamp
from ._watchdog import Watchdog

if TYPE_CHECKING:
    import anyio

    from ._context import FlowRun, TaskRun
    from ._futures import RunFuture
    from ._policies import CachePolicy

T = TypeVar("T")
StorageLike = Storage | str | os.PathLike[str]
SerializerLike = Serializer | str

current_engine: ContextVar[Engine | None] = ContextVar("onceflow_engine", default=None)
_outer_engines: ContextVar[tuple[Engine | None, ...]] = ContextVar("onceflow_outer_engines", default=())


class Engine(Embedding):
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
        worker_threads: How many synchronous bodies run at once.
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
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._given = (storage, key_storage, serializer, settings, grace, worker_threads)
        self.lock_manager = lock_manager
        self.clock = clock
        self.sleep = sleep
        self.running: set[RunFuture[Any]] = set()
        self.failed = Failures()
        self.live: set[TaskRun | FlowRun] = set()
        self.ended: asyncio.Future[None] | None = None
        self.interrupted: str | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self._entries = 0
        self._opening: asyncio.Future[None] | None = None
        self._closing: asyncio.Future[None] | None = None
        self._is_open = False
        self._stamp: dict[Any, Any] | None = None
        self._said: Any = None
        self._own: dict[str, Storage] = {}
        self._serializers: dict[str, Serializer] = {}
        self._met: dict[str, Storage] = {}
        self.flights = Room()
        self.limits = Limits(None)
        self.explainer = Explainer()
        self.configuration: object = None
        """Another object with each configuration: what was concluded from an earlier one does not hold."""
        self._own_locks: LockManager | None = None
        self._watchdog: Watchdog | None = None

    log_filter = _logging.RunFilter()
    """A logging filter for handlers: stamps every record, other libraries' too, with flow, run and task."""

    # --- opening and closing

    async def open(self) -> Self:
        """Read the settings and make ready; idempotent, also when several tasks come at once.

        Costs one thread hop (settings may lie in files); no storage is touched before it is used.

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
        await asyncio.shield(self._opening)
        return self

    def _take_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        """Belong to this loop: to one at a time, and no longer to one that was closed without closing this."""
        if self.loop is not None and self.loop is not loop:
            if not self.loop.is_closed() and (self._is_open or self._opening or self._closing):
                raise ConfigurationError(
                    "This engine is open on another event loop.", "Make one for each loop."
                )
            self._is_open, self._opening, self._closing, self._entries = False, None, None, 0
            self._own.clear()  # bound to that loop, and gone with it
            self.running.clear()
            self.live.clear()
        self.loop = loop

    async def _open(self) -> None:
        import anyio

        _, _, _, settings, grace, threads = self._given
        try:
            self._stamp, self._said = _environment(), _said()
            self.settings: Settings = (
                settings if settings is not None else await asyncio.to_thread(Settings.load)
            )
            self.grace = self.settings.grace if grace is None else grace
            self._limiter = anyio.CapacityLimiter(threads or self.settings.worker_threads)
            if self.lock_manager is None and self.settings.locks:
                self.lock_manager = self._own_locks = lock_manager_from_url(self.settings.locks)
            self.limits = Limits(self.settings.tag_limits)
            self.records = Records(self.in_thread, clock=self.clock, storage_at=self._storage_at)
            self._obey(self.settings)
            if self.settings.warn_blocking:
                self._watchdog = Watchdog(self.settings.warn_blocking)
                self._watchdog.start()
            if self.settings.logging_level:
                _logging.show(self.settings.logging_level.upper())
        finally:
            self._opening = None
        self._is_open, self.interrupted = True, None
        _open_engines.setdefault(asyncio.get_running_loop(), []).append(self)

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
                engines = _open_engines.get(asyncio.get_running_loop(), [])
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
        _ambient.pop(asyncio.get_running_loop(), None)
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
        # Left from another task than the one that entered, the variable is not ours to set back.
        if current_engine.get() is self and (outer := _outer_engines.get()):
            current_engine.set(outer[-1])
            _outer_engines.set(outer[:-1])
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

    def storage_for(self, spec: StorageLike) -> Storage:
        """The storage that a path or URL means: one for each, made when first asked for, closed with the engine."""
        if isinstance(spec, Storage):
            return spec
        name = os.fspath(spec)
        if name not in self._own:
            storage = storage_from_url(spec)
            if isinstance(storage, LocalStorage) and "durability=" not in name:
                storage = LocalStorage(
                    storage.path, durability="power" if self.settings.durability == "power" else "process"
                )
            self._own[name] = storage
        return self._own[name]

    def meet(self, storage: Storage) -> Storage:
        self._met.setdefault(storage.url, storage)
        return storage

    def _storage_at(self, url: str) -> Storage:
        """The storage of a URL that a transaction's intent names: one that is in use here, else a new one."""
        for storage in (self.storage, self.key_storage, *self._own.values(), *self._met.values()):
            if storage is not None and storage.url == url:
                return storage
        return self.storage_for(url)

    def serializer_for(self, spec: SerializerLike) -> Serializer:
        if isinstance(spec, Serializer):
            return spec
        if spec not in self._serializers:
            self._serializers[spec] = serializer_by_name(spec)
        return self._serializers[spec]

    def place_for(self, run: TaskRun | FlowRun, policy: CachePolicy | None) -> Place:
        """Where the run's record lies: the task decides, else its flow, else the engine."""
        definition = run.task or run.flow
        assert definition is not None
        above = run.flow_run.flow if run.task is not None and run.flow_run is not None else None
        storage = definition.result_storage or (above and above.result_storage)
        serializer = definition.result_serializer or (above and above.result_serializer)
        keys = policy.key_storage if policy is not None else None
        location = None
        if definition.result_storage_key is not None and policy is not None:
            location = storage_key(definition.result_storage_key, run)
        return Place(
            self.meet(self.storage_for(storage)) if storage else self.storage,
            self.meet(self.storage_for(keys)) if keys is not None else self.key_storage,
            self.serializer_for(serializer) if serializer else self.serializer,
            location,
        )

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


def storage_key(template: str, run: TaskRun | FlowRun) -> str:
    """A result storage key from its template: `{parameters[x]}`, `{x}`, `{task_run.name}`, `{flow_run.id}`.

    Raises:
        CacheKeyError: The template asks for what is not there, or makes an empty key.
    """
    fields: dict[str, Any] = dict(run.parameters)
    fields["parameters"] = run.parameters
    fields["flow_run"] = run.flow_run
    if run.task is not None:
        fields["task_run"] = run
    try:
        key = template.format(**fields)
    except (LookupError, AttributeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
    else:
        if key:
            return key
        reason = "it is empty"
    raise CacheKeyError(
        f"The result storage key {template!r} cannot be made: {reason}.",
        f"It may use {', '.join(f'{{{name}}}' for name in fields)}, and flow_run only inside of a flow.",
    )


# --- which engine

_open_engines: WeakKeyDictionary[asyncio.AbstractEventLoop, list[Engine]] = WeakKeyDictionary()
_ambient: WeakKeyDictionary[asyncio.AbstractEventLoop, Engine] = WeakKeyDictionary()


stand_in: Engine | None = None
"""What the pytest plugin puts in the place of the engine that would be made from the settings."""


def _environment_view() -> Any:
    # The raw mapping of os.environ compares in C, in under a microsecond; where it is missing, a copy does.
    return getattr(os.environ, "_data", None) or dict(os.environ)


def _environment() -> dict[Any, Any]:
    return dict(_environment_view())


def _said() -> Any:
    """What of the environment an engine depends on."""
    return stamp(), os.environ.get("HOME")


def engines_on(loop: asyncio.AbstractEventLoop) -> list[Engine]:
    """The engines that are open, or closing, on a loop."""
    return list(_open_engines.get(loop, ()))


def ambient_now() -> Engine | None:
    """The engine of a root run that starts here, where it is ready: the one entered in this context, else the
    only one open on this loop, else the one that was made from the settings."""
    engine = _entered() or _ambient.get(asyncio.get_running_loop())
    if engine is not None and engine._is_open and not engine.is_stale():
        return engine
    return None


def _entered() -> Engine | None:
    """The engine entered in this context, else the only one open on this loop; it may be closing, or closed."""
    engine = current_engine.get()
    if engine is not None:
        return engine
    loop = asyncio.get_running_loop()
    ambient = _ambient.get(loop)
    entered = [engine for engine in _open_engines.get(loop, ()) if engine is not ambient]
    if len(entered) > 1:
        entered = [engine for engine in entered if engine._is_open]
    return entered[0] if len(entered) == 1 else None


async def ambient(what: str = "A run") -> Engine:
    """The engine of a root run that starts here; made from the settings where there is none, and closed with the loop.

    Raises:
        EngineClosedError: The one that was entered here is closed: `what` shall not go to another instead.
    """
    engine = ambient_now()
    if engine is not None:
        return engine
    loop = asyncio.get_running_loop()
    engine = _entered()
    if engine is not None and not engine._is_open:
        raise EngineClosedError(what)
    engine = engine or _ambient.get(loop)
    if engine is not None and engine._is_open:
        await engine.reload()
        return engine
    if engine is None:
        engine = _ambient[loop] = stand_in or Engine()
        await at_loop_end(engine.close_with_loop, ENGINES)
    return await engine.open()
