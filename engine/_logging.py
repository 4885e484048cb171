"""The logger `onceflow`, and its handler for scripts that configure no logging themselves."""

from __future__ import annotations

import logging
from typing import Any

from ._context import current_run

logger = logging.getLogger("onceflow")
INFO = logging.INFO


class _Formatter(logging.Formatter):
    """`11:27:21.031 | INFO    | Task run 'fetch-3f2' - Finished in state Completed()`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03d | %(levelname)-7s | %(message)s", datefmt="%H:%M:%S")


class _Handler(logging.StreamHandler[Any]):
    """Writes to stderr; its type tells it from the program's own handlers."""


def show(level: str | int | None = None) -> None:
    """Print onceflow's lines to stderr from `level` on, unless the program has set up logging itself."""
    if not logger.hasHandlers():
        handler = _Handler()
        handler.setFormatter(_Formatter())
        logger.addHandler(handler)
        logger.setLevel(level or INFO)
    elif level is not None and any(isinstance(handler, _Handler) for handler in logger.handlers):
        logger.setLevel(level)  # run() shows the lines before the engine has read the settings


def get_run_logger() -> logging.LoggerAdapter[logging.Logger]:
    """A logger whose lines name the current run, as `Task run 'x' - …`.

    Raises:
        NoActiveRunError: There is no run here.
    """
    from ._context import get_run_context

    run = get_run_context()
    kind = "Flow run" if run.task is None else "Task run"
    return _RunLogger(logger, {"kind": kind, "run": run})


class _RunLogger(logging.LoggerAdapter[logging.Logger]):
    def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
        assert self.extra is not None
        return f"{self.extra['kind']} {self.extra['run'].name!r} - {msg}", kwargs  # type: ignore[attr-defined]


__all__ = ["INFO", "current_run", "get_run_logger", "logger", "show"]
