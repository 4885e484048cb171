"""`runner="process"`, of a task or an engine: CPU-bound bodies in worker processes of anyio's."""

from __future__ import annotations

import asyncio
import inspect
import io
import linecache
import marshal
import pickle
import traceback
from collections.abc import Callable
from functools import cache
from types import CodeType
from typing import TYPE_CHECKING, Any

from ...storage._values.weight import is_heavy
from .._errors import ConfigurationError, ProcessEndedError

if TYPE_CHECKING:
    from .._lifecycle.engine import Engine

_LEAVES_LOOP = 64 * 1024
"""Bytes from which on pickling leaves the event loop."""


async def run_in_process(
    engine: Engine, name: str, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run the body in a worker process, one for each core at most.

    The body sees its arguments and nothing else: no run, no transaction, no log_prints. Its exception arrives
    with the traceback of the process as a note. Cancelled, the process is killed, and a new one takes its place.

    Costs a process the first time, and pickling both ways, in a thread where that is much.

    Raises:
        ConfigurationError: The function, an argument or the result does not pickle.
        ProcessEndedError: The process was killed, or could not begin.
    """
    from anyio import BrokenWorkerProcess, to_process

    try:
        # By cloudpickle, since the module's name of a decorated function stands for the task, not for it.
        if is_heavy((args, kwargs)):
            call = await engine.in_thread(_pickled_call, fn, args, kwargs)
        else:
            call = _pickled_call(fn, args, kwargs)
    except Exception as error:
        raise ConfigurationError(
            f"{name!r} cannot run in a process, because its function or an argument does not pickle: {error}.",
            "Pass plain data, or run it in a thread: runner='thread'.",
        ) from error
    try:
        succeeded, outcome = await to_process.run_sync(_call, *call, cancellable=True)
    except BrokenWorkerProcess as error:
        raise ProcessEndedError(name, str(error)) from error
    if outcome is None:
        what = "returned" if succeeded else "raised"
        raise ConfigurationError(
            f"What {name!r} {what} in its process does not pickle.",
            "Return plain data." if succeeded else "Raise an exception that pickles.",
        )
    try:
        value = (
            await engine.in_thread(pickle.loads, outcome)
            if len(outcome) > _LEAVES_LOOP
            else pickle.loads(outcome)
        )
    except Exception as error:
        raise ConfigurationError(
            f"What {name!r} brought back from its process cannot be unpickled here: {error!r}.",
            "Return plain data.",
        ) from error
    if succeeded:
        return value
    raise value


def _pickled(value: Any) -> bytes:
    import cloudpickle

    pickled: bytes = cloudpickle.dumps(value)
    return pickled


def _pickled_call(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[bytes, dict[str, Any]]:
    """The call, and the source lines of its code that no file holds, as of notebook cells."""
    buffer = io.BytesIO()
    pickler = _pickler()(buffer)
    pickler.dump((fn, args, kwargs))
    return buffer.getvalue(), pickler.lines


@cache
def _pickler() -> Any:
    """Cloudpickle's, but code travels as it is: cloudpickle replaces the name of its file, and without that no
    traceback in the process shows a line of it."""
    import cloudpickle

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc, unused-ignore]  # untyped
        def __init__(self, file: Any) -> None:
            super().__init__(file)
            self.lines: dict[str, Any] = {}

        def reducer_override(self, obj: Any) -> Any:
            if type(obj) is not CodeType:
                return super().reducer_override(obj)
            entry = linecache.cache.get(obj.co_filename)
            if entry is not None and len(entry) == 4 and entry[1] is None:  # in memory only
                self.lines[obj.co_filename] = entry
            return marshal.loads, (marshal.dumps(obj),)  # the worker is of this very Python

    return Pickler


def _call(call: bytes, lines: dict[str, Any]) -> tuple[bool, bytes | None]:
    """In the worker: run the body, and bring back its value or its exception, pickled; None where that fails."""
    succeeded = False
    linecache.cache.update(lines)
    try:
        fn, args, kwargs = pickle.loads(call)
        value = fn(*args, **kwargs)
        if inspect.iscoroutine(value):
            value = asyncio.run(value)
        succeeded = True
    except Exception as error:
        error.add_note("In the worker process:\n" + traceback.format_exc())
        value = error
    try:
        return succeeded, _pickled(value)
    except Exception:
        return succeeded, None
