"""`log_prints`: print() inside a run becomes a log line of that run."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from ._context import current_run
from ._logging import logger

_is_logged: ContextVar[bool] = ContextVar("onceflow_prints", default=False)
_active = 0
_original = builtins.print


def _print(
    *values: Any, sep: str | None = None, end: str | None = None, file: Any = None, flush: bool = False
) -> None:
    run = current_run.get() if _is_logged.get() and file is None else None
    if run is None:
        _original(*values, sep=sep, end=end, file=file, flush=flush)
        return
    logger.info("%s %r - %s", run.kind, run.name, (" " if sep is None else sep).join(map(str, values)))


@contextmanager
def logged(wanted: bool) -> Iterator[None]:
    """Log what the runs inside print, or let it through again.

    `print` is replaced while any such run is under way, and does its old work everywhere else.
    """
    global _active, _original
    if _active == 0:
        _original = builtins.print
        builtins.print = _print
    _active += 1
    token = _is_logged.set(wanted)
    try:
        yield
    finally:
        _is_logged.reset(token)
        _active -= 1
        if _active == 0 and builtins.print is _print:
            builtins.print = _original
