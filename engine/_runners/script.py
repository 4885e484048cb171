"""Ctrl-C in a script: the first lets the run end, the second cancels it, the third is Python's own.

Only `run()` comes here, because only there the loop, and with it the signal, is ours. What an app embeds touches
no signal.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Coroutine
from types import FrameType
from typing import Any, TypeVar

from .._lifecycle.ambient import engines_on
from .._runs.logging import logger

R = TypeVar("R")
_GRACE = 10.0


def run_script(name: str, main: Coroutine[Any, Any, R]) -> R:
    """Run a coroutine on a new loop, to its end.

    Raises:
        KeyboardInterrupt: After a first Ctrl-C, when the run has ended, within `grace` seconds, or was cancelled; what
            it had completed by then is committed. Not swallowed, so that a script with many runs ends as well.
    """
    if threading.current_thread() is not threading.main_thread() or (
        signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        return asyncio.run(main)  # the signal is somebody else's
    guard = _Guard(name)
    try:
        with asyncio.Runner() as runner:
            result = runner.run(guard.over(main))
    except (asyncio.CancelledError, Exception) as error:
        if guard.presses:
            raise KeyboardInterrupt from (None if isinstance(error, asyncio.CancelledError) else error)
        raise
    if guard.presses:
        raise KeyboardInterrupt
    return result


class _Guard:
    """What Ctrl-C does to one run of a script."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.presses = 0
        self._is_heard = False

    async def over(self, main: Coroutine[Any, Any, R]) -> R:
        self._loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        previous = signal.signal(signal.SIGINT, self._on_signal)
        try:
            return await main
        finally:
            signal.signal(signal.SIGINT, previous)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Runs between any two instructions of the main thread, so it leaves all work to the loop."""
        self.presses += 1
        if self.presses > 2 or (self.presses == 2 and not self._is_heard):
            raise KeyboardInterrupt  # the loop is blocked, or the run does not mind being cancelled
        self._loop.call_soon_threadsafe(self._drain if self.presses == 1 else self._cancel)

    def _drain(self) -> None:
        self._is_heard = True
        grace = max((engine.grace for engine in engines_on(self._loop)), default=_GRACE)
        logger.warning(
            "Ctrl-C: waiting up to %.3g s for %r to end. Press it again to cancel.", grace, self._name
        )
        self._loop.call_later(grace, self._cancel)

    def _cancel(self) -> None:
        if not self._task.done():
            logger.warning("Ctrl-C: cancelling %r.", self._name)
            for engine in engines_on(self._loop):
                engine.interrupted = "interrupted by Ctrl-C"
            self._task.cancel()
