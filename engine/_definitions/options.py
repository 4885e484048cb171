"""The options of tasks and flows, and the checks they share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypedDict

from ...locking import LockManager
from .._errors import ConfigurationError, closest

if TYPE_CHECKING:
    from ...storage import Storage
    from ...storage._values.serializers import Serializer
    from .._keys.policies import CachePolicy

Hook = Callable[..., Any]
Delays = float | Sequence[float] | Callable[[int], float | Sequence[float]]


class CommonOptions(TypedDict, total=False):
    """What tasks and flows can both be told. `None` stands for "as if never said"."""

    name: str | None
    """The function's name."""
    description: str | None
    """The function's docstring."""
    version: str | int | None
    """Pins TASK_SOURCE by hand: the code may change, the key does not."""
    tags: Iterable[str] | None
    cache_policy: CachePolicy | None
    cache_key_fn: Callable[..., Any] | None
    """`(context, parameters)` to the key itself, or None for "not cached"; sync or async."""
    cache_expiration: timedelta | None
    """How long a record is served, counted from its commit."""
    refresh_cache: bool | None
    persist_result: bool | None
    result_storage: Storage | str | os.PathLike[str] | None
    result_serializer: Serializer | str | None
    result_storage_key: str | None
    """A template: `{parameters[x]}`, `{task_run.name}`, `{flow_run.id}`."""
    retries: int | None
    retry_delay_seconds: Delays | None
    """Seconds: one number, one a retry, or a callable of the number of retries."""
    retry_jitter_factor: float | None
    """Lengthens each delay by up to this share of it."""
    retry_condition_fn: Callable[..., Any] | None
    """`(task, run, failed state)` to whether to try again; sync or async."""
    timeout_seconds: float | timedelta | None
    log_prints: bool | None
    on_running: Iterable[Hook] | None
    on_completion: Iterable[Hook] | None
    on_failure: Iterable[Hook] | None
    on_commit: Iterable[Hook] | None
    on_rollback: Iterable[Hook] | None


class TaskOptions(CommonOptions, total=False):
    """The options of `@task` and `Task.with_options`."""

    task_run_name: str | Callable[..., str] | None
    """A template over the parameters (`"fetch {url}"`), or a callable."""
    concurrency: int | None
    """How many runs of this task may execute at once."""
    rate: str | None
    """How many may begin in a time: `"5/s"`, `"100/min"`."""
    runner: str | None
    """Where the body runs: `"process"` for CPU-bound work, `"thread"` for a synchronous body in a thread of the
    engine's. By default on the loop if it is async, else where the engine says: in a thread, unless that says
    `Engine(runner="process")`."""


class FlowOptions(CommonOptions, total=False):
    """The options of `@flow` and `Flow.with_options`."""

    flow_run_name: str | Callable[..., str] | None
    validate_parameters: bool | None
    on_cancellation: Iterable[Hook] | None
    on_crashed: Iterable[Hook] | None


HOOKS = (
    "on_running",
    "on_completion",
    "on_failure",
    "on_commit",
    "on_rollback",
    "on_cancellation",
    "on_crashed",
)


RUNNERS = ("thread", "process")


def check_runner(what: str, runner: Any, *, is_async: bool = False) -> None:
    """Refuse a place where no body can run.

    Raises:
        ConfigurationError: There is no such runner, or it is a thread for an async body.
    """
    if runner is not None and runner not in RUNNERS:
        raise ConfigurationError(
            f"{what} has runner={runner!r}.", "It may be 'thread' or 'process', or left out."
        )
    if runner == "thread" and is_async:
        raise ConfigurationError(
            f"{what} has runner='thread', but its body is async.",
            "Leave it out, and it runs on the loop; or make the body a plain function.",
        )


def check_known(kind: str, options: Mapping[str, Any], known: type) -> None:
    names = sorted(known.__annotations__ | CommonOptions.__annotations__)
    for option in options:
        if option not in names:
            raise TypeError(
                f"@{kind} has no option {option!r}.{closest(option, names)} It takes {', '.join(names)}."
            )


def hooks_of(options: Mapping[str, Any]) -> dict[str, list[Hook]]:
    """The hooks by event, each checked.

    Raises:
        TypeError: Not an iterable, or something in it cannot be called; names the option.
    """
    hooks: dict[str, list[Hook]] = {}
    for event in HOOKS:
        given = options.get(event)
        if given is None:
            continue
        if not isinstance(given, Iterable) or isinstance(given, str):
            raise TypeError(
                f"{event} takes a list of hooks, not {type(given).__name__}: {event}=[first_hook, second_hook]."
            )
        hooks[event] = list(given)
        for hook in hooks[event]:
            if not callable(hook):
                raise TypeError(f"{event} takes callables, but {hook!r} cannot be called.")
    return hooks


def seconds_of(timeout: float | timedelta | None) -> float | None:
    """The option `timeout_seconds` in seconds.

    Raises:
        ConfigurationError: It is negative, or no time at all.
    """
    if timeout is None:
        return None
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds >= 0:  # nan too
        raise ConfigurationError(
            f"timeout_seconds must be a number of seconds from 0 on or a timedelta, got {timeout!r}.",
            "Leave it out for none.",
        )
    return seconds


def check_delays(kind: str, name: str, delays: Any) -> None:
    """Refuse what is neither a number of seconds nor a sequence of them."""
    several = isinstance(delays, Sequence) and not isinstance(delays, (bytes, bytearray))
    for delay in [] if delays is None else delays if several else [delays]:
        if not isinstance(delay, (int, float)) or not delay >= 0:
            raise ConfigurationError(
                f"{kind} {name!r}: retry_delay_seconds must be 0 or more, got {delay!r}."
            )


def check_retries(kind: str, name: str, options: Mapping[str, Any]) -> None:
    """Refuse numbers that no run could follow."""
    retries = options.get("retries")
    if retries is not None and (not isinstance(retries, int) or retries < 0):
        raise ConfigurationError(
            f"{kind} {name!r}: retries must be a whole number from 0 on, got {retries!r}."
        )
    delays = options.get("retry_delay_seconds")
    if not callable(delays):
        check_delays(kind, name, delays)
    jitter = options.get("retry_jitter_factor")
    if jitter is not None and not (isinstance(jitter, (int, float)) and jitter >= 0):
        raise ConfigurationError(f"{kind} {name!r}: retry_jitter_factor must be 0 or more, got {jitter!r}.")
    expiration = options.get("cache_expiration")
    if expiration is not None and not isinstance(expiration, timedelta):
        raise ConfigurationError(
            f"{kind} {name!r}: cache_expiration must be a timedelta, got {expiration!r}.",
            "Write timedelta(minutes=5).",
        )


def check_locking(what: str, lock_manager: Any, lock_timeout: Any = None) -> None:
    """Refuse what cannot lock, or wait.

    Raises:
        ConfigurationError: Names the argument, and what it may be.
    """
    if lock_manager is not None and not isinstance(lock_manager, LockManager):
        raise ConfigurationError(
            f"lock_manager of {what} cannot be {lock_manager!r}.",
            "lock_manager_from_url(…) makes one of a URL, and so does ONCEFLOW_LOCKS.",
        )
    if lock_timeout is not None and not (isinstance(lock_timeout, (int, float)) and lock_timeout >= 0):
        raise ConfigurationError(
            f"lock_timeout of {what} must be seconds from 0 on, got {lock_timeout!r}.",
            "Leave it out to wait for ever.",
        )
