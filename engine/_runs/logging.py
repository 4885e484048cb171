"""The logger `onceflow`, and its handler for scripts that configure no logging themselves."""

from __future__ import annotations

import logging
from typing import Any

from .run import TaskRun, current_run, get_run_context

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
        handler.addFilter(RunFilter())
        logger.addHandler(handler)
        logger.setLevel(level or INFO)
    elif level is not None and any(isinstance(handler, _Handler) for handler in logger.handlers):
        logger.setLevel(level)  # run() shows the lines before the engine has read the settings


class RunFilter(logging.Filter):
    """Stamps every record that passes with the run it was logged in, also records of other libraries.

    Sets `flow`, `flow_run`, `flow_run_id`, `task`, `task_run`, `task_run_id` (names and ids; "-" where there is
    none), for use in formats as `%(task_run)s`. Put it on a handler: filters of loggers see only what is logged
    on that very logger. Drops nothing.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        run = current_run.get()
        task_run = run if isinstance(run, TaskRun) else None
        flow_run = run.flow_run if run is not None else None
        record.flow = flow_run.flow.name if flow_run else "-"
        record.flow_run = flow_run.name if flow_run else "-"
        record.flow_run_id = flow_run.id if flow_run else "-"
        record.task = task_run.task.name if task_run else "-"
        record.task_run = task_run.name if task_run else "-"
        record.task_run_id = task_run.id if task_run else "-"
        return True


def get_run_logger() -> logging.LoggerAdapter[logging.Logger]:
    """A logger whose lines name the current run, as `Task run 'x' - …`.

    Raises:
        NoActiveRunError: There is no run here.
    """
    return _RunLogger(logger, {"run": get_run_context()})


class _RunLogger(logging.LoggerAdapter[logging.Logger]):
    def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
        run: Any = (self.extra or {})["run"]
        return f"{run.kind} {run.name!r} - {msg}", kwargs
