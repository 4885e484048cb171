"""`@flow`: an async (or sync) function that owns the runs submitted inside it."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from functools import partial
from typing import Any, ParamSpec, Self, TypeVar, Unpack, overload

from .._definitions.definition import Definition, F, check_no_wait_for, is_async
from .._definitions.options import FlowOptions
from .._definitions.parameters import Validator
from .._execution.perform import forget, perform, perform_root
from .._keys.policies import CachePolicy
from .._lifecycle.ambient import ambient, ambient_now
from .._lifecycle.engine import Engine, current_engine
from .._runners.threads import in_thread, run_blocking
from .._runs.arguments import Marked
from .._runs.futurelists import FutureList
from .._runs.futures import FlowFuture, RunFuture
from .._runs.observing import observers
from .._runs.owners import cancel_all, finish
from .._runs.run import FlowRun, TaskRun, current_run, current_tags, current_transaction
from .._runs.states import COMPLETED, State
from .generators import parent_for

P = ParamSpec("P")
R = TypeVar("R")


class Flow(Definition[P, R]):
    """A function whose run owns what is submitted inside it. Made by `@flow`.

    Its run ends when its body and all its submitted runs have ended. A body that raises cancels its
    unfinished runs and awaits them; a submitted run whose failure nobody looked at fails the flow.
    """

    kind = "Flow run"
    _options = FlowOptions

    def __init__(self, fn: Callable[..., Any], options: Any) -> None:
        super().__init__(fn, options)
        check_no_wait_for("Flow", self.name, self.signature)
        self.flow_run_name = self._stated.get("flow_run_name")
        self.validate_parameters: bool = self._stated.get("validate_parameters", True)
        self._validator = Validator(fn, self.signature, self.name) if self.validate_parameters else None
        self.is_async = is_async(fn)

    def _default_policy(self) -> CachePolicy | None:
        return None

    def _default_retries(self, run: TaskRun | FlowRun) -> tuple[int, Any]:
        settings = run.engine.settings
        delays = self.retry_delay_seconds
        return (
            settings.flows_default_retries,
            settings.flows_default_retry_delay_seconds if delays is None else delays,
        )

    # --- calls

    async def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FlowRun:
        parent = current_run.get()
        if parent is not None and parent.links:
            parent = parent_for(parent, args, kwargs)
        run = FlowRun(self, self.bind(args, kwargs), parent)
        if parent is None:
            run.engine = ambient_now() or await ambient(f"Flow {self.name!r}")
        elif (entered := current_engine.get()) is not None and entered._is_open:
            run.engine = entered
        else:
            run.engine = parent.engine
            run.engine.check_usable(f"Flow {self.name!r}")
        run.tags = self.tags | current_tags.get()
        run.name_template = self.flow_run_name
        return run

    async def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run in the caller's asyncio task, and return the value; raises what the body raised.

        Raises:
            ParameterError: An argument does not validate against its annotation.
        """
        state = await perform_root(await self._begin(args, kwargs))
        if state.type is COMPLETED:
            return state.data  # type: ignore[no-any-return]
        raise state.error()

    async def run_to_state(self, *args: P.args, **kwargs: P.kwargs) -> State[R]:
        """As a call, but returns the final state, and never raises for a failed run; cancellation propagates."""
        return await perform_root(await self._begin(args, kwargs))

    def run(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run from synchronous code and block until the end: starts a loop in a script, and uses the
        parent's loop in the worker thread of a synchronous body.

        Raises:
            RunningLoopError: An event loop runs in this thread; `await f(…)` there.
        """
        return run_blocking(self.name, self.__call__, args, kwargs)

    def start(self, engine: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FlowFuture[R]:
        """Begin a run in the background of an engine, on its loop: see `Engine.submit`."""
        run = FlowRun(self, self.bind(args, kwargs), None)
        run.engine = engine
        run.tags = self.tags | current_tags.get()
        run.name_template = self.flow_run_name
        run.is_submitted = True
        future: FlowFuture[R] = FlowFuture(run)
        future.owner = engine
        work = asyncio.get_running_loop().create_task(perform(run, future), context=_background(engine))
        work.add_done_callback(partial(_has_ended, run))
        run.carrier = future._work = work
        engine.live.add(run)
        engine.running.add(future)
        return future

    def with_options(self, **options: Unpack[FlowOptions]) -> Self:
        """A new flow with other options; those not named stay, `None` takes one back, zero is a value."""
        return self._with(options)

    # --- hooks

    def on_cancellation(self, hook: F) -> F:
        """Call `hook(flow, run, state)` when a run was cancelled: shielded, for 10 s at most."""
        return self._add_hook("on_cancellation", hook)

    def on_crashed(self, hook: F) -> F:
        """Call `hook(flow, run, state)` when a run was ended by a BaseException such as SystemExit; as above."""
        return self._add_hook("on_crashed", hook)

    # --- the body

    async def prepare(self, run: FlowRun) -> None:
        """Await the futures among the parameters, and validate: before the body, once for all its attempts.

        Raises:
            ParameterError: Names every parameter that does not validate.
        """
        marked = Marked()
        if marked.look(run.parameters):
            run.parameters = (await marked.settle())(run.parameters)
        validator = self._validator
        if validator is not None and not validator.accepts(run.parameters):
            if not validator.is_ready:
                await run.engine.in_thread(validator.make_ready)
            run.parameters = validator.validate(run.parameters)

    async def body(self, run: FlowRun) -> R:
        """Run the function, then see to what it submitted."""
        args, kwargs = _call_form(self.signature, run.parameters)
        token = current_tags.set(run.tags)
        try:
            if self.is_async:
                value = await self.fn(*args, **kwargs)
            else:
                value = await in_thread(run.engine, _call, self.fn, args, kwargs)
                if inspect.iscoroutine(value):  # a plain wrapper around an async function
                    value = await value
            value = await _resolve(value)
            await finish(run, f"flow run {run.name!r}")
        except BaseException:
            await cancel_all(run)
            raise
        finally:
            current_tags.reset(token)
        return value  # type: ignore[no-any-return]


def _background(engine: Engine) -> Context:
    """The caller's context without what ends before a background flow does: its run, transaction and observers."""
    context = copy_context()
    context.run(current_run.set, None)
    context.run(current_transaction.set, None)
    context.run(observers.set, ())
    context.run(current_engine.set, engine)
    return context


def _has_ended(run: FlowRun, _: object) -> None:
    forget(run)


def _call(fn: Callable[..., R], args: tuple[Any, ...], kwargs: dict[str, Any]) -> R:
    return fn(*args, **kwargs)


def _call_form(
    signature: inspect.Signature, parameters: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call from its bound parameters."""
    bound = inspect.BoundArguments(signature, dict(parameters))
    return bound.args, bound.kwargs


async def _resolve(value: Any) -> Any:
    """A flow may return futures: their values are its result."""
    marked = Marked()
    marked.look(value)
    futures = [part for part in marked.parts if isinstance(part, (RunFuture, FutureList))]
    if not futures:
        return value
    for future in futures:
        await future
    return (await marked.settle())(value)


@overload
def flow(fn: Callable[P, Coroutine[Any, Any, R]], /) -> Flow[P, R]: ...
@overload
def flow(fn: Callable[P, R], /) -> Flow[P, R]: ...
@overload
def flow(**options: Unpack[FlowOptions]) -> _Decorator: ...
def flow(fn: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """Make a function a flow: `@flow`, or `@flow(retries=3, …)` with the options of `FlowOptions`."""
    if fn is None:
        return _Decorator(options)
    return Flow(fn, options)


class _Decorator:
    """`@flow(…)`, waiting for its function."""

    def __init__(self, options: Any) -> None:
        self._options = options

    @overload
    def __call__(self, fn: Callable[P, Coroutine[Any, Any, R]], /) -> Flow[P, R]: ...
    @overload
    def __call__(self, fn: Callable[P, R], /) -> Flow[P, R]: ...
    def __call__(self, fn: Callable[..., Any], /) -> Any:
        return Flow(fn, self._options)
