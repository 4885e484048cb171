"""`runner="process"`: CPU-bound bodies in worker processes of anyio's."""

from __future__ import annotations

import asyncio
import inspect
import pickle
from collections.abc import Callable
from typing import Any

from ._errors import ConfigurationError


async def run_in_process(
    name: str, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run the body in a worker process. A cancelled caller's process is killed.

    Costs a process the first time (reused later), and pickling both ways on the event loop.

    Raises:
        ConfigurationError: The function, an argument or the result does not pickle.
    """
    import cloudpickle
    from anyio import BrokenWorkerProcess, to_process

    try:
        # By cloudpickle, since the module's name of a decorated function stands for the task, not for it.
        call = cloudpickle.dumps((fn, args, kwargs))
    except Exception as error:
        raise ConfigurationError(
            f"{name!r} cannot run in a process, because its function or an argument does not pickle: {error}.",
            "Pass plain data, or leave runner out to run it in a thread.",
        ) from error
    try:
        succeeded, outcome = await to_process.run_sync(_call, call, cancellable=True)
    except BrokenWorkerProcess as error:
        raise ConfigurationError(
            f"The worker process of {name!r} ended: {error}. It may have been killed, or could not import the script.",
            "A script that uses runner='process' starts its work under `if __name__ == '__main__':`.",
        ) from error
    if outcome is None:
        raise ConfigurationError(
            f"What {name!r} returned or raised in its process does not pickle.", "Return plain data."
        )
    value = pickle.loads(outcome)
    if succeeded:
        return value
    raise value


def _call(call: bytes) -> tuple[bool, bytes | None]:
    """In the worker: run the body, and bring back its value or its exception, pickled; None where that fails."""
    import cloudpickle

    fn, args, kwargs = pickle.loads(call)
    try:
        value = fn(*args, **kwargs)
        if inspect.iscoroutine(value):
            value = asyncio.run(value)
        succeeded = True
    except Exception as error:
        value, succeeded = error, False
    try:
        return succeeded, cloudpickle.dumps(value)
    except Exception:
        return False, None
