"""`run()`: from synchronous code into the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from . import _logging
from ._context import current_run
from ._errors import RunningLoopError

R = TypeVar("R")


def run_blocking(
    name: str, call: Callable[..., Coroutine[Any, Any, R]], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> R:
    """Block until the call is over: on a new loop, or on the parent's from a worker thread of a synchronous body."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass  # no loop in this thread: what run() is for
    else:
        raise RunningLoopError(name)
    if current_run.get() is not None:
        from anyio.from_thread import run

        return run(partial(call, *args, **kwargs))
    _logging.show()

    async def main() -> R:
        return await call(*args, **kwargs)

    return asyncio.run(main())
