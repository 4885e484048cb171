"""The errors of onceflow.engine.

EngineError
├── ConfigurationError (ValueError)            options that cannot work together, or a missing lock manager
│   ├── CacheKeyError                          a key function or policy gave no usable key
│   └── SettingsError                          a setting that is unknown or cannot be read
├── UncacheableInputError (TypeError)          an argument that has no cache key
├── ParameterError (ValueError)                a flow was called with a parameter that does not validate
├── NoActiveRunError (RuntimeError)            submit or map outside of a flow run and an engine
├── RunningLoopError (RuntimeError)            run() where an event loop is already running
├── EngineClosedError (RuntimeError)           new work for an engine that is closed or closing
├── UnfinishedRunError (RuntimeError)          the result of a run that has not ended
├── RunFailedError (RuntimeError)              a run that failed without an exception of its own
│   ├── RunCancelledError                      … because it was cancelled
│   ├── RunCrashedError                        … because something outside its body broke
│   └── UpstreamFailedError                    … because a run that it depends on failed (state NotReady)
├── RunTimeoutError (TimeoutError)             the body was still running after timeout_seconds
├── ProcessEndedError (RuntimeError)           the worker process of a body was killed, or could not begin
├── DeadlockError (RuntimeError)               a run waits for itself, directly or through others
├── CommitError (RuntimeError)                 a transaction that could not be committed
└── NoValueError (KeyError, ValueError)        a transaction was asked for what nobody set or staged

Every error keeps what it was built from as attributes, builds its own message, and pickles.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any


def closest(name: str, known: Sequence[str]) -> str:
    """` Did you mean 'x'?`, or nothing where no known name is near."""
    near = get_close_matches(name, known, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


class EngineError(Exception):
    """Base of everything that onceflow.engine raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        # The arguments are kept as attributes; rebuilding from the message would lose them.
        return _rebuild, (type(self), dict(self.__dict__), self.args)


def _rebuild(cls: type[EngineError], attributes: dict[str, Any], args: tuple[Any, ...]) -> EngineError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(attributes)
    return error


class ConfigurationError(EngineError, ValueError):
    """What was configured cannot work; nothing has run."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        self.problem, self.remedy = problem, remedy
        super().__init__(f"{problem} {remedy}".rstrip())


class CacheKeyError(ConfigurationError):
    """A key function or policy gave no usable key."""


class SettingsError(ConfigurationError):
    """A setting is unknown, or its value cannot be read."""

    def __init__(self, name: str, problem: str, remedy: str = "") -> None:
        self.name = name
        super().__init__(f"{name} {problem}", remedy)
        self.problem = problem


# --- keys


class UncacheableInputError(EngineError, TypeError):
    """The value at `path` has no cache key."""

    def __init__(self, path: str, type_name: str) -> None:
        self.path, self.type_name = path, type_name
        super().__init__(f"{path} is {article(type_name)} {type_name}, which has no cache key")


def article(noun: str) -> str:
    return "an" if noun[:1].lower() in "aeiou" else "a"


# --- calls


class ParameterError(EngineError, ValueError):
    """A flow parameter does not validate against its annotation."""

    def __init__(self, flow: str, problems: Sequence[str]) -> None:
        self.flow, self.problems = flow, tuple(problems)
        super().__init__(
            f"Flow {flow!r} was called with parameters that do not validate: {'; '.join(problems)}."
        )


class NoActiveRunError(EngineError, RuntimeError):
    """There is no run here, and what was asked for needs one."""

    def __init__(self, problem: str, remedy: str) -> None:
        self.problem, self.remedy = problem, remedy
        super().__init__(f"{problem} {remedy}")


class RunningLoopError(EngineError, RuntimeError):
    """run() blocks, and here it would block the event loop that it needs."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(
            f"{name}.run() blocks, and an event loop is already running here. "
            f"Write `await {name}(...)` instead."
        )


class EngineClosedError(EngineError, RuntimeError):
    """The engine takes no new work."""

    def __init__(self, what: str) -> None:
        self.what = what
        super().__init__(
            f"{what} was started on an engine that is closed or closing. Enter it with `async with engine:`."
        )


# --- results


class UnfinishedRunError(EngineError, RuntimeError):
    """The run has not ended, so it has no result yet."""

    def __init__(self, state: str) -> None:
        self.state = state
        super().__init__(f"The run is unfinished (state {state}), so it has no result yet. Await it first.")


class RunFailedError(EngineError, RuntimeError):
    """The run ended in a failed state that carries no exception of its own."""

    def __init__(self, state: str, message: str | None = None) -> None:
        self.state, self.message = state, message
        super().__init__(f"The run ended in state {state}" + (f": {message}" if message else "."))


class RunCancelledError(RunFailedError):
    """The run was cancelled."""


class RunCrashedError(RunFailedError):
    """The run crashed: what broke lies outside of its body."""


class UpstreamFailedError(RunFailedError):
    """The run never started, because a run that it depends on did not complete (state NotReady)."""

    def __init__(self, upstream: str, upstream_state: str) -> None:
        self.upstream, self.upstream_state = upstream, upstream_state
        super().__init__("NotReady", f"upstream run {upstream!r} ended in state {upstream_state}")


class RunTimeoutError(EngineError, TimeoutError):
    """The body was still running after `seconds`."""

    def __init__(self, name: str, seconds: float) -> None:
        self.name, self.seconds = name, seconds
        super().__init__(f"{name} exceeded its timeout of {seconds:g} s")

    __str__ = Exception.__str__


class ProcessEndedError(EngineError, RuntimeError):
    """The worker process of a body with `runner="process"` ended before the body did."""

    def __init__(self, task: str, reason: str) -> None:
        self.task, self.reason = task, reason
        super().__init__(
            f"The worker process of {task!r} ended before its body did, as when it is killed for want of memory, "
            f"or cannot import the script: {reason} A script that uses runner='process' starts its work "
            "under `if __name__ == '__main__':`."
        )


class DeadlockError(EngineError, RuntimeError):
    """A run waits for itself. `chain` names who waits for whom, first and last the same."""

    def __init__(self, chain: Sequence[str]) -> None:
        self.chain = tuple(chain)
        super().__init__("This would wait for ever: " + " → ".join(chain) + ". Break the cycle.")


class CommitError(EngineError, RuntimeError):
    """A transaction could not be committed; nothing of it is visible, and no commit hook has run.

    `in_doubt`: the storage fell silent in the very moment of the commit, so that all of it may be visible.
    """

    def __init__(self, key: str, reason: str, run: str = "", in_doubt: bool = False) -> None:
        self.key, self.reason, self.run, self.in_doubt = key, reason, run, in_doubt
        member = f"the result of {run!r} under {key!r}" if run else f"its member {key!r}"
        if in_doubt:
            super().__init__(
                f"The transaction's commit was sent, and {member} could not be read back: {reason} Either all of it "
                "is visible or nothing; look at one of its records before you repeat it."
            )
        else:
            super().__init__(f"The transaction was rolled back: {member} could not be written: {reason}")


class NoValueError(EngineError, KeyError, ValueError):
    """A transaction was asked for what nobody has set or staged."""

    def __init__(self, owner: str, what: str, remedy: str) -> None:
        self.owner, self.what, self.remedy = owner, what, remedy
        super().__init__(f"There is no {what} in {owner}. {remedy}")

    __str__ = Exception.__str__
