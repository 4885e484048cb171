"""`@task`: an async (or sync) function whose runs are named, retried, cached and owned."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
)
from copy import copy
from functools import partial
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, Unpack, cast, overload

from .._caching.call import explain, key_of, policy_of, wanted
from .._caching.explain import Explanation
from .._concurrency.limits import Gate, check_size, parse_rate
from .._definitions.definition import Definition, check_no_wait_for, is_async, unwrapped
from .._definitions.options import TaskOptions, check_runner
from .._errors import ConfigurationError, NoActiveRunError
from .._execution.perform import perform, perform_root, settle_arguments
from .._keys import policies
from .._keys.policies import CachePolicy
from .._lifecycle.ambient import ambient, ambient_now
from .._lifecycle.engine import current_engine
from .._runners.processes import run_in_process
from .._runners.threads import call_on_loop, in_thread, run_blocking
from .._runs.futurelists import FutureList
from .._runs.futures import TaskFuture
from .._runs.owners import Owner, owner_here
from .._runs.run import FlowRun, TaskRun, current_run, current_tags
from .._runs.states import COMPLETED, State
from .._transactions.transaction import enclosing
from .generators import RunStream, parent_for, stream_body
from .mapping import spread
from .streaming import stream

P = ParamSpec("P")
R = TypeVar("R")
Q = ParamSpec("Q")
S = TypeVar("S")
T = TypeVar("T")


class Task(Definition[P, R]):
    """A function whose runs the engine brings to their end. Made by `@task`.

    Calling it returns a coroutine: `await t(x)` runs the body in the caller's asyncio task and gives its
    value, from the record where there is one.
    """

    kind = "Task run"
    _options = TaskOptions
    _prefix: tuple[Any, ...] = ()

    def __init__(self, fn: Callable[..., Any], options: Any) -> None:
        if isinstance(fn, (classmethod, staticmethod)):
            self._descriptor: type | None = type(fn)
            fn = fn.__func__
        else:
            self._descriptor = None
        super().__init__(fn, options)
        check_no_wait_for("Task", self.name, self.signature)
        self.task_run_name = self._stated.get("task_run_name")
        self.concurrency: int | None = self._stated.get("concurrency")
        if self.concurrency is not None:
            check_size(f"The concurrency of {self.name!r}", self.concurrency)
        self.rate: str | None = self._stated.get("rate")
        self._interval = parse_rate(self.name, self.rate)
        self.is_limited = self.concurrency is not None or self._interval is not None
        self.is_bare = self.is_bare and not self.is_limited
        self.runner: str | None = self._stated.get("runner")
        self.is_async = is_async(fn)
        self._choose_body()

    def _choose_body(self) -> None:
        check_runner(f"Task {self.name!r}", self.runner, is_async=self.is_async)
        self.body: Callable[[TaskRun], Awaitable[R]] = self._async_body if self.is_async else self._sync_body
        if self.runner == "process":
            self.body = self._process_body

    def _default_policy(self) -> CachePolicy:
        return policies.DEFAULT

    def _default_retries(self, run: TaskRun | FlowRun) -> tuple[int, Any]:
        settings = run.engine.settings
        delays = self.retry_delay_seconds
        return (
            settings.tasks_default_retries,
            settings.tasks_default_retry_delay_seconds if delays is None else delays,
        )

    def _async_body(self, run: TaskRun) -> Awaitable[R]:
        awaitable: Awaitable[R] = self.fn(*run.args, **run.kwargs)
        return awaitable

    def _process_body(self, run: TaskRun) -> Awaitable[R]:
        return run_in_process(run.engine, self.name, self.fn, run.args, run.kwargs)

    async def _sync_body(self, run: TaskRun) -> R:
        if self.runner is None and run.engine.runner == "process":
            return await self._process_body(run)
        value = await in_thread(run.engine, _call, self.fn, run.args, run.kwargs)
        if inspect.iscoroutine(value):  # a plain wrapper around an async function
            value = await value
        return cast(R, value)

    def gate(self, run: TaskRun | FlowRun) -> Gate | None:
        return run.engine.limits.gate(run, self.fn, self.concurrency, self._interval)

    # --- methods: `self` is an input like any other

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(self: Task[Concatenate[S, Q], R], instance: S, owner: type | None = None) -> Task[Q, R]: ...
    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if self._descriptor is staticmethod or (instance is None and self._descriptor is None):
            return self
        bound = copy(self)
        bound._prefix = (owner if self._descriptor is classmethod else instance,)
        bound.owner = owner if self._descriptor is classmethod else type(instance)
        bound._choose_body()
        return bound

    # --- calls

    def _run(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], parent: TaskRun | FlowRun | None
    ) -> TaskRun:
        if parent is not None and parent.links:
            parent = parent_for(parent, args, kwargs)
        run = TaskRun(self, self._prefix + args if self._prefix else args, kwargs, parent)
        if kwargs and "wait_for" in kwargs:
            run.wait_for = kwargs.pop("wait_for") or ()
        context_tags = current_tags.get()
        if context_tags or self.tags:
            run.tags = self.tags | context_tags
        if self.task_run_name is not None:
            run.name_template = self.task_run_name
        return run

    async def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TaskRun:
        parent = current_run.get()
        run = self._run(args, kwargs, parent)
        if parent is None:
            run.engine = ambient_now() or await ambient(f"Task {self.name!r}")
        elif (entered := current_engine.get()) is not None and entered._is_open:
            run.engine = entered
        else:
            run.engine.check_usable(f"Task {self.name!r}")
        return run

    async def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run in the caller's asyncio task, and return the value; raises what the body raised."""
        run = await self._begin(args, kwargs)
        state = await (perform(run) if run.parent is not None else perform_root(run))
        if state.type is COMPLETED:
            return state.data  # type: ignore[no-any-return]
        raise state.error()

    @overload
    def run_to_state(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, State[R]]: ...
    @overload
    def run_to_state(
        self, *args: Any, wait_for: Iterable[Any], **kwargs: Any
    ) -> Coroutine[Any, Any, State[R]]: ...
    async def run_to_state(  # pyright: ignore[reportInconsistentOverload]  # to it a CoroutineType is no Coroutine
        self, *args: Any, **kwargs: Any
    ) -> State[R]:
        """As a call, but returns the final state, and never raises for a failed run; cancellation propagates."""
        run = await self._begin(args, kwargs)
        return await (perform(run) if run.parent is not None else perform_root(run))

    @overload
    def submit(self, *args: P.args, **kwargs: P.kwargs) -> TaskFuture[R]: ...
    @overload
    def submit(self, *args: Any, wait_for: Iterable[Any], **kwargs: Any) -> TaskFuture[R]: ...
    def submit(self, *args: Any, **kwargs: Any) -> TaskFuture[R]:
        """Start a run on the caller's loop, owned by the enclosing flow run, else by the entered engine.

        `wait_for=[…]` waits for other futures without passing their values.

        To a type checker arguments are what the function takes: Python's types cannot say "each of these, or a
        future of it". A call with a future among its arguments is accepted with a `wait_for`, and be it empty:
        `double.submit(future, wait_for=())`; so are `map` and `run_to_state`. It gives up the check of its arguments.

        Raises:
            NoActiveRunError: There is neither.
        """
        return self._submit(args, kwargs, "submit")

    def owner_for(self, verb: str) -> tuple[Owner, TaskRun | FlowRun | None]:
        """Who will await a run that is submitted here, and the run that it is called from.

        Raises:
            NoActiveRunError: Nobody would.
        """
        here = owner_here()
        if here is None:
            raise NoActiveRunError(
                f"{self.name}.{verb}() was called outside of a flow, so nothing would own the run.",
                f"Call it inside a @flow or `async with Engine():`, or write `await {self.name}(…)`.",
            )
        owner, _ = here
        if isinstance(owner, FlowRun) and owner.is_over:
            raise NoActiveRunError(
                f"{self.name}.{verb}() was called after flow run {owner.name!r} had ended: nothing would own the run.",
                "Await in the flow what goes on submitting, or do it in a flow of its own.",
            )
        return here

    def _submit(self, args: tuple[Any, ...], kwargs: dict[str, Any], verb: str) -> TaskFuture[R]:
        owner, parent = self.owner_for(verb)
        try:
            asyncio.get_running_loop()
        except RuntimeError:  # in the thread of a synchronous body
            return call_on_loop(owner.engine, f"{self.name}.{verb}", lambda: self._submit(args, kwargs, verb))
        return self.begin(args, kwargs, parent, owner)

    def begin(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], parent: TaskRun | FlowRun | None, owner: Owner
    ) -> TaskFuture[R]:
        """Start a run in an asyncio task of its own."""
        run = self._run(args, kwargs, parent)
        if parent is None:
            run.engine = owner.engine
        run.is_submitted = True
        future: TaskFuture[R] = TaskFuture(run)
        future.owner = owner
        future._work = asyncio.get_running_loop().create_task(perform(run, future))
        owner.running.add(future)
        return future

    @overload
    def map(self, *args: P.args, **kwargs: P.kwargs) -> FutureList[R]: ...
    @overload
    def map(self, *args: Any, **kwargs: Any) -> FutureList[R]: ...
    def map(self, *args: Any, **kwargs: Any) -> FutureList[R]:
        """Submit one run per element of the iterables among the arguments, all of one length.

        Text, bytes, dicts and `unmapped(x)` go to every run as they are.

        Raises:
            NoActiveRunError: Outside of a flow run and an entered engine.
            ValueError: No iterable, or different lengths.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:  # in the thread of a synchronous body
            engine = self.owner_for("map")[0].engine
            return call_on_loop(engine, f"{self.name}.map", lambda: spread(self, args, kwargs))
        return spread(self, args, kwargs)

    def stream(
        self, items: Iterable[Any] | AsyncIterable[Any], limit: int = 100, ordered: bool = True
    ) -> AsyncGenerator[R, None]:
        """One run per item of an iterable of any length, sync or async, endless or not; values as they come.

        At most `limit` runs are under way or wait to be taken, so memory stays bounded, and the source is
        asked only for what fits. An async source is read and closed in an asyncio task of its own. A failure
        is raised in its place, and ends the stream: what is under way is cancelled and awaited, as it is when
        the consumer stops (close the iterator to have it at once, else the enclosing flow's end does).
        `ordered=False` gives each value as soon as it is there, and a failure before values that are late.
        """
        return stream(self, items, limit, ordered)

    def run(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run from synchronous code and block until the end: starts a loop in a script, and uses the
        parent's loop in the worker thread of a synchronous task.

        Raises:
            RunningLoopError: An event loop runs in this thread; `await t(…)` there.
        """
        return run_blocking(self.name, self.__call__, args, kwargs)

    # --- options, keys, records

    def with_options(self, **options: Unpack[TaskOptions]) -> Self:
        """A new task with other options; those not named stay, `None` takes one back, zero is a value."""
        made = self._with(options)
        made._prefix = self._prefix
        made._descriptor = self._descriptor
        return made

    async def cache_key(self, *args: P.args, **kwargs: P.kwargs) -> str | None:
        """The key that this call would have here, its futures awaited; None where it would not be cached."""
        run = await self._begin(args, kwargs)
        await settle_arguments(run)
        if not wanted(run, self):
            return None
        return (await key_of(run, self, policy_of(run, self))).text

    async def explain(self, *args: P.args, **kwargs: P.kwargs) -> Explanation:
        """Whether this call would be served from its record here, and if not, which component differs from
        the nearest earlier record of the task. Runs nothing."""
        return await explain(await self._begin(args, kwargs), self)

    async def invalidate(self, *args: P.args, **kwargs: P.kwargs) -> bool:
        """Drop this call's record; whether there was one.

        Done at once, also inside of a transaction, whose outcome does not bring it back. What is staged there under
        the call's key is dropped with it.
        """
        run = await self._begin(args, kwargs)
        await settle_arguments(run)
        policy = policy_of(run, self)
        key = await key_of(run, self, policy)
        if key.text is None:
            return False
        place, txn = run.engine.place_for(run, policy), enclosing()
        was_staged = txn is not None and txn.drop((place.records.url, key.text))
        return await run.engine.records.invalidate(place, key.text) or was_staged


class GeneratorTask(Task[P, T]):
    """A task whose body yields: `async for value in t(x)`, or `await t(x)` for all values in a list.

    A stream that was read to its end is cached, and replayed value by value in bounded memory; one that was
    broken off is not. `timeout_seconds` is for each value. `retries` are for failures before the first value:
    later ones would give the reader the same values again. A limit's slot is taken as long as the stream is open.
    """

    is_timed_whole = False

    def _choose_body(self) -> None:
        if self.runner is not None:
            raise ConfigurationError(
                f"Task {self.name!r} has runner={self.runner!r}, but it is a generator.",
                "Its values come one by one, so it runs here; let it call a task that has the runner.",
            )
        self.is_async = inspect.isasyncgenfunction(unwrapped(self.fn))
        self.body = partial(stream_body, self)

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(
        self: GeneratorTask[Concatenate[S, Q], T], instance: S, owner: type | None = None
    ) -> GeneratorTask[Q, T]: ...
    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return super().__get__(instance, owner)  # pyright: ignore[reportArgumentType]  # None with an instance only

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> RunStream[T]:  # type: ignore[override]
        """The stream. Nothing runs before its first value is asked for."""
        return RunStream(self, args, kwargs)

    def owner_for(self, verb: str) -> tuple[Owner, TaskRun | FlowRun | None]:
        raise ConfigurationError(
            f"{self.name}.{verb}(): a generator task streams its values to whoever iterates over it.",
            f"Write `async for value in {self.name}(…)`, or `await {self.name}(…)` for all of them.",
        )

    def stream(
        self, items: Iterable[Any] | AsyncIterable[Any], limit: int = 100, ordered: bool = True
    ) -> AsyncGenerator[T, None]:
        self.owner_for("stream")
        raise AssertionError("unreachable: streams have no owner")

    async def run_to_state(self, *args: Any, **kwargs: Any) -> State[Any]:
        """Read the stream to its end; the final state, whose result is the list of values."""
        stream = RunStream[T](self, args, kwargs)
        values: list[T] = []
        try:
            values += [value async for value in stream]
        except Exception:
            if stream.run is None or not stream.run.is_over:
                raise
        assert stream.run is not None
        state = stream.run.state
        if state.is_completed():
            state.data = values
        return state

    def run(self, *args: P.args, **kwargs: P.kwargs) -> list[T]:  # type: ignore[override]
        """All values in a list, from synchronous code; see `Task.run`."""

        async def collect() -> list[T]:
            return await RunStream[T](self, args, dict(kwargs))

        return run_blocking(self.name, collect, (), {})


def _make(fn: Callable[..., Any], options: Any) -> Task[..., Any]:
    inner = unwrapped(fn.__func__ if isinstance(fn, (classmethod, staticmethod)) else fn)
    is_generator = inspect.isasyncgenfunction(inner) or inspect.isgeneratorfunction(inner)
    kind = GeneratorTask if is_generator else Task
    return kind(fn, options)  # pyright: ignore[reportArgumentType]  # it narrows to what isinstance has asked for


def _call(fn: Callable[..., R], args: tuple[Any, ...], kwargs: dict[str, Any]) -> R:
    return fn(*args, **kwargs)


@overload
def task(fn: Callable[P, AsyncIterator[T]], /) -> GeneratorTask[P, T]: ...
@overload
def task(fn: Callable[P, Iterator[T]], /) -> GeneratorTask[P, T]: ...
@overload
def task(fn: Callable[P, Coroutine[Any, Any, R]], /) -> Task[P, R]: ...
@overload
def task(fn: Callable[P, R], /) -> Task[P, R]: ...
@overload
def task(**options: Unpack[TaskOptions]) -> _Decorator: ...
def task(fn: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """Make a function a task: `@task`, or `@task(retries=3, …)` with the options of `TaskOptions`."""
    if fn is None:
        return _Decorator(options)
    return _make(fn, options)


class _Decorator:
    """`@task(…)`, waiting for its function."""

    def __init__(self, options: Any) -> None:
        self._options = options

    @overload
    def __call__(self, fn: Callable[P, AsyncIterator[T]], /) -> GeneratorTask[P, T]: ...
    @overload
    def __call__(self, fn: Callable[P, Iterator[T]], /) -> GeneratorTask[P, T]: ...
    @overload
    def __call__(self, fn: Callable[P, Coroutine[Any, Any, R]], /) -> Task[P, R]: ...
    @overload
    def __call__(self, fn: Callable[P, R], /) -> Task[P, R]: ...
    def __call__(self, fn: Callable[..., Any], /) -> Any:
        return _make(fn, self._options)
