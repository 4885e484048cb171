"""The watchdog: names the run and the line that block the event loop. Off unless `warn_blocking` is set.

One thread per engine asks the loop to answer, and looks at the stack of the loop's thread when no answer comes in
time. Runs pay nothing for it: which run is under way is read from the frame of `perform` on that very stack.
"""

from __future__ import annotations

import asyncio
import linecache
import sys
import sysconfig
import threading
import time
from types import CodeType, FrameType
from typing import TYPE_CHECKING

from .._runs.logging import logger
from .._runs.run import current_run

if TYPE_CHECKING:
    from .._runs.run import FlowRun, TaskRun

_PACKAGE = __file__.rsplit("/", 2)[0]
_INSTALLED = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
_NOT_USERS = (_PACKAGE, *_INSTALLED, "<frozen")
# Set by `_execution/perform`, which this module cannot import: the code of the frames that hold the run under way
# in `run`.
carriers: set[CodeType] = set()


class Watchdog:
    """Watches one loop from a thread of its own, between `start` and `stop`.

    Reports every block of 1.25 × `seconds` and more once, while it lasts, and how long it was when it is over.
    Costs the loop one callback each quarter of `seconds`. Code in C that keeps the GIL is reported right after
    it ended, because no thread can look meanwhile; not where the machine was too busy to let this one look before
    the loop went on.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Watch the running loop, which runs in this thread."""
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._thread = threading.Thread(target=self._watch, name="onceflow watchdog", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """Stop watching; nothing is logged after it."""
        self._stopped.set()
        assert self._thread is not None
        await asyncio.to_thread(self._thread.join)

    def _watch(self) -> None:
        answer = threading.Event()
        while not self._stopped.is_set():
            began, worked = time.monotonic(), _work_of(self._loop_thread)
            if self._stopped.wait(self._seconds / 4):
                return
            if self._was_kept(began + self._seconds / 4, worked):
                continue
            answer.clear()
            asked, worked = time.monotonic(), _work_of(self._loop_thread)
            try:
                self._loop.call_soon_threadsafe(answer.set)
            except RuntimeError:  # the loop is closed
                return
            if self._was_kept(asked, worked):  # to ask lets go of the GIL, too
                continue
            if answer.wait(self._seconds):
                continue
            run = self._report()
            while not answer.wait(self._seconds):
                if self._stopped.is_set() or self._loop.is_closed():
                    return
            _log(run, "%s blocked the event loop for %.3g s in all.", time.monotonic() - asked)

    def _was_kept(self, since: float, worked: float) -> bool:
        """Say so if the loop's thread kept the GIL from this one for too long; what did it is still on the stack.

        The thread's own work tells it from a machine that was busy, or a process that slept.
        """
        late = time.monotonic() - since
        if late <= self._seconds or _work_of(self._loop_thread) - worked <= self._seconds:
            return False
        _log(self._report(), "%s blocked the event loop for %.3g s in all.", late)
        return True

    def _report(self) -> TaskRun | FlowRun | None:
        """Say who blocks the loop, and where."""
        frame = sys._current_frames().get(self._loop_thread)
        run, line = _blame(frame)
        _log(run, "%s has blocked the event loop for more than %.3g s, at %s", self._seconds, line)
        return run


def _work_of(thread: int) -> float:
    """The seconds of a processor that a thread has used; where the system does not tell, those of all threads."""
    clock = getattr(time, "pthread_getcpuclockid", None)
    return time.clock_gettime(clock(thread)) if clock is not None else time.process_time()


def _log(run: TaskRun | FlowRun | None, text: str, *values: object) -> None:
    who = "Something that is no run" if run is None else f"{run.kind} {run.name!r}"
    token = current_run.set(run)  # for the filters that stamp log records
    try:
        logger.warning(text, who, *values)
    finally:
        current_run.reset(token)


def _blame(frame: FrameType | None) -> tuple[TaskRun | FlowRun | None, str]:
    """The innermost run on a stack, and the innermost line inside of it that is the user's own."""
    innermost, users = frame, None
    while frame is not None:
        if frame.f_code in carriers:
            return frame.f_locals.get("run"), _line(users or innermost)
        if users is None and not frame.f_code.co_filename.startswith(_NOT_USERS):
            users = frame
        frame = frame.f_back
    return None, _line(users or innermost)


def _line(frame: FrameType | None) -> str:
    if frame is None:
        return "a line that was not seen"
    name, number = frame.f_code.co_filename, frame.f_lineno
    text = linecache.getline(name, number).strip()
    return f"{name}:{number} in {frame.f_code.co_qualname}" + (f": {text}" if text else "")
