"""From synchronous code into the engine: `run()`, and calls from the threads of synchronous bodies."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

from .._errors import NoActiveRunError, RunningLoopError
from .._lifecycle.engine import current_engine
from .._runs import logging
from .._runs.run import current_run
from .script import run_script

if TYPE_CHECKING:
    from .._lifecycle.engine import Engine

R = TypeVar("R")


class Calls:
    """What one attempt of a synchronous body has under way on the loop."""

    __slots__ = ("futures", "is_over", "is_running")

    def __init__(self) -> None:
        self.futures: set[Future[Any]] = set()
        self.is_running = False
        self.is_over = False

    def run(self, fn: Callable[..., R], args: tuple[Any, ...]) -> R:
        """In the thread."""
        self.is_running = True
        try:
            return fn(*args)
        finally:
            self.is_running = False

    def end(self) -> None:
        """The attempt is over. If its thread was abandoned, cancel what it waits for, and refuse more."""
        self.is_over = True
        for future in list(self.futures):
            future.cancel()


_calls: ContextVar[Calls | None] = ContextVar("onceflow_calls", default=None)


async def in_thread(engine: Engine, fn: Callable[..., R], *args: Any) -> R:
    """Run a synchronous body in a thread of the engine.

    Cancelled, it abandons the thread and says so, ends the thread's calls, and goes on at once.
    """
    calls = Calls()
    token = _calls.set(calls)
    try:
        return await engine.in_thread(calls.run, fn, args)
    finally:
        calls.end()
        if calls.is_running and (run := current_run.get()) is not None:
            logging.logger.warning(
                "%s %r - its synchronous body goes on in its thread, which nothing can stop, and what it returns "
                "is dropped", run.kind, run.name,
            )  # fmt: skip
        _calls.reset(token)


def run_blocking(
    name: str, call: Callable[..., Coroutine[Any, Any, R]], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> R:
    """Block until the call is over: on a new loop, or on that of the engine whose thread, or whose context, this is."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass  # no loop in this thread: what run() is for
    else:
        raise RunningLoopError(name)

    async def main() -> R:
        return await call(*args, **kwargs)

    run = current_run.get()
    engine = run.engine if run is not None else current_engine.get()
    # In a forked child the parent's loop seems to run, and answers nobody.
    if engine is not None and engine.process == os.getpid() and (run is not None or _is_running(engine)):
        return _on_loop_of(engine, f"{name}.run", main)
    logging.show()
    return run_script(name, main())


def _is_running(engine: Engine) -> bool:
    return engine._is_open and engine.loop is not None and engine.loop.is_running()


def call_on_loop(engine: Engine, name: str, fn: Callable[[], R]) -> R:
    """Call a function on the engine's loop from another thread, with this thread's context variables."""

    async def main() -> R:
        return fn()

    return _on_loop_of(engine, name, main)


def _on_loop_of(engine: Engine, name: str, main: Callable[[], Coroutine[Any, Any, R]]) -> R:
    """Block this thread until a coroutine on the engine's loop is over. It ends at the latest with its caller.

    Raises:
        NoActiveRunError: The run that this thread works for has ended (a timeout or a cancellation abandons it).
    """
    run, loop = current_run.get(), engine.loop
    calls = _calls.get() or Calls()
    if calls.is_over or (run is not None and run.is_over) or loop is None or not loop.is_running():
        raise NoActiveRunError(
            f"{name}() was called in a thread whose run has ended, so nothing would own it.",
            "Nothing can stop a thread: in long synchronous bodies look at get_run_context().end_time.",
        )
    future = asyncio.run_coroutine_threadsafe(_in_place_of(engine, main), loop)
    calls.futures.add(future)
    if calls.is_over:  # since we looked
        future.cancel()
    try:
        return future.result()
    finally:
        calls.futures.discard(future)


async def _in_place_of(engine: Engine, main: Callable[[], Coroutine[Any, Any, R]]) -> R:
    """While a thread of the engine waits for the loop another one may run: what it waits for may need one."""
    if _calls.get() is None:
        return await main()  # a thread of the user's own
    with engine.one_more_thread():
        return await main()
