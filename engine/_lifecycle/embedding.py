"""The engine inside another program: lifespans, background flows, what is under way, and what hit."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeVar

from .._errors import ConfigurationError, EngineClosedError
from .._runs.observing import Seen, observers, outcome_of

if TYPE_CHECKING:
    from .._runs.futures import FlowFuture
    from .._runs.run import FlowRun, TaskRun
    from .._tasks.flow import Flow

P = ParamSpec("P")
R = TypeVar("R")


class Embedding:
    """What an engine offers to the program around it. No signal handlers, no globals, no task group.

    (A task group belongs to the task that enters it; an engine may be left by another. So the engine keeps its
    runs in a set, and ends them itself.)
    """

    live: set[TaskRun | FlowRun]
    loop: asyncio.AbstractEventLoop | None
    _is_open: bool
    watchers: int = 0
    """How many `observe()` blocks are open: runs report their ends only while there are any."""

    if TYPE_CHECKING:

        async def __aenter__(self) -> Self: ...

        async def __aexit__(
            self,
            kind: type[BaseException] | None,
            error: BaseException | None,
            trace: TracebackType | None,
        ) -> None: ...

    # --- entering and leaving with an app

    @asynccontextmanager
    async def lifespan(self, app: object = None) -> AsyncIterator[None]:
        """An ASGI lifespan: `FastAPI(lifespan=engine.lifespan)`, `Litestar(lifespan=[engine.lifespan])`.

        Open while the app serves. The server calls its end after the last request; then the engine waits up to
        `grace` seconds for background flows, so let the server's own deadline be longer. An app with a lifespan
        of its own writes `async with engine:` there.
        """
        async with self:
            yield

    async def cleanup_ctx(self, app: object = None) -> AsyncIterator[None]:
        """As `lifespan`, for aiohttp: `app.cleanup_ctx.append(engine.cleanup_ctx)`."""
        async with self:
            yield

    # --- background flows

    def submit(self, flow: Flow[P, R], /, *args: P.args, **kwargs: P.kwargs) -> FlowFuture[R]:
        """Start a flow in the background of the app and return its future at once.

        It outlives the request, carries the caller's context variables, and belongs to the engine alone: not to
        the run or the transaction that it is called from. It ends at the latest when the engine does: as
        Cancelled, where it has not ended by itself within `grace` seconds. A failure that nobody has looked at
        is logged when its future goes, or the engine ends. May be called in any thread, such as that of a
        synchronous request handler; only the future's `id`, `name`, `state` and `done()` are for other threads.

        Raises:
            EngineClosedError: The engine is not open, or is closing.
            TypeError: The arguments do not fit, or it is no flow.
        """
        if getattr(flow, "kind", "") != "Flow run":
            raise _no_flow(flow)
        if not self._is_open:
            raise EngineClosedError(f"Flow {flow.name!r}")
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            return self._submit_from_thread(flow, args, kwargs)
        if running is not self.loop:
            raise ConfigurationError(
                f"Flow {flow.name!r} was submitted to an engine that is open on another event loop.",
                "Make one engine for each loop.",
            )
        return flow.start(self, args, kwargs)

    def _submit_from_thread(self, flow: Flow[..., R], args: Any, kwargs: Any) -> FlowFuture[R]:
        loop = self.loop
        if loop is None or not loop.is_running():
            raise EngineClosedError(f"Flow {flow.name!r}")

        async def submit() -> FlowFuture[R]:
            return self.submit(flow, *args, **kwargs)

        return asyncio.run_coroutine_threadsafe(submit(), loop).result()

    @property
    def runs(self) -> Mapping[str, TaskRun | FlowRun]:
        """What is under way, by id: background flows, and flows and root tasks that somebody awaits. As of now."""
        return MappingProxyType({run.id: run for run in self.live})

    # --- what hit

    @contextmanager
    def observe(self) -> Iterator[Seen]:
        """`with engine.observe() as seen:` tells which tasks inside were served from records: `seen.hit`.

        Sees the runs of this context and of the asyncio tasks that it starts, not those of other requests, nor
        background flows. Costs nothing where no such block is open.
        """
        seen = Seen()
        token = observers.set((*observers.get(), seen))
        self.watchers += 1
        try:
            yield seen
        finally:
            self.watchers -= 1
            observers.reset(token)

    def note(self, run: TaskRun | FlowRun) -> None:
        """A run has ended, and somebody is watching."""
        seen = observers.get()
        if seen:
            outcome = outcome_of(run)
            for each in seen:
                each.outcomes.append(outcome)


def _no_flow(given: Any) -> TypeError:
    if inspect.iscoroutine(given):
        given.close()
        remedy = "Pass the flow and its arguments apart: engine.submit(flow, …)."
    elif hasattr(given, "submit"):
        remedy = "Inside `async with engine:` a task has a submit() of its own; or call it in a flow."
    else:
        remedy = "Make a function one with @flow."
    return TypeError(f"engine.submit() takes a flow, got {given!r}. {remedy}")
