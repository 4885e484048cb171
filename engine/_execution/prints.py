"""`log_prints`: print() inside a run becomes a log line of that run."""

from __future__ import annotations

import builtins
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from .._runs.logging import INFO, logger
from .._runs.run import current_run

_is_logged: ContextVar[bool] = ContextVar("onceflow_prints", default=False)
_lock = threading.Lock()  # several loops may run in several threads
_active = 0
_original = builtins.print


def _print(
    *values: Any, sep: str | None = None, end: str | None = None, file: Any = None, flush: bool = False
) -> None:
    run = current_run.get() if _is_logged.get() else None
    # Where the level is off, what is printed would be lost; what goes to a file is no business of ours.
    if run is None or file not in (None, sys.stdout, sys.stderr) or not logger.isEnabledFor(INFO):
        _original(*values, sep=sep, end=end, file=file, flush=flush)
        return
    text = (" " if sep is None else sep).join(map(str, values))
    logger.info("%s %r - %s", run.kind, run.name, text, stacklevel=2)


@contextmanager
def logged(wanted: bool) -> Iterator[None]:
    """Log what the runs inside print, or let it through again.

    `print` is replaced while any such run is under way, and does its old work everywhere else. Runs inside
    inherit what is wanted, in worker threads too; not those in processes.
    """
    token = _is_logged.set(wanted)
    _replace(1)
    try:
        yield
    finally:
        _replace(-1)
        _is_logged.reset(token)


def _replace(more: int) -> None:
    global _active, _original
    with _lock:
        _active += more
        if _active == 1 and more == 1:
            _original = builtins.print
            builtins.print = _print
        elif _active == 0 and builtins.print is _print:
            builtins.print = _original
