"""Which engine a run belongs to that starts where no run is: the ambient one."""

from __future__ import annotations

import asyncio
import os

from ...storage._runtime.loop_end import ENGINES, at_loop_end
from .._errors import ConfigurationError, EngineClosedError
from .engine import Engine, current_engine, made_engines, open_engines

stand_in: Engine | None = None
"""What the pytest plugin puts in the place of the engine that would be made from the settings."""


def engines_on(loop: asyncio.AbstractEventLoop) -> list[Engine]:
    """The engines that are open, or closing, on a loop."""
    return list(open_engines.get(loop, ()))


def ambient_now() -> Engine | None:
    """The engine of a root run that starts here, where it is ready: the one entered in this context, else the
    only one open on this loop, else the one that was made from the settings."""
    loop = asyncio.get_running_loop()
    engine = _entered(loop) or _made(loop)
    if engine is not None and engine._is_open and engine.loop is loop and not engine.is_stale():
        return engine
    return None


def _made(loop: asyncio.AbstractEventLoop) -> Engine | None:
    return stand_in or made_engines.get(loop)


def _entered(loop: asyncio.AbstractEventLoop) -> Engine | None:
    """The engine entered in this context, else the only one open on this loop; it may be closing, or closed."""
    engine = current_engine.get()
    if engine is not None and engine.process == os.getpid():  # a forked child has left its parent's engines
        return engine
    made = stand_in, made_engines.get(loop)
    entered = [engine for engine in open_engines.get(loop, ()) if engine not in made]
    if len(entered) > 1:
        entered = [engine for engine in entered if engine._is_open]
    return entered[0] if len(entered) == 1 else None


async def ambient(what: str = "A run") -> Engine:
    """The engine of a root run that starts here; made from the settings where there is none, and closed with the loop.

    Raises:
        EngineClosedError: The one that was entered here is closed: `what` shall not go to another instead.
        ConfigurationError: The one that was entered here is open on another loop.
    """
    engine = ambient_now()
    if engine is not None:
        return engine
    loop = asyncio.get_running_loop()
    engine = _entered(loop)
    if engine is not None and not engine._is_open:
        raise EngineClosedError(what)
    if engine is not None and engine.loop is not loop:
        raise ConfigurationError(
            f"{what} was started on another event loop than that of the engine which was entered here.",
            "Open an engine of its own there: `async with Engine(…):`.",
        )
    engine = engine or _made(loop)
    if engine is not None and engine._is_open and engine.loop is loop:
        await engine.reload()
        return engine
    if engine is None:
        engine = made_engines[loop] = Engine()
    await at_loop_end(engine.close_with_loop, ENGINES)
    return await engine.open()
