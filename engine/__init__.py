"""Flows, tasks, cache policies, and the engine that runs them."""

from __future__ import annotations  # noqa: I001 - several names a line keep the face short

from ._runs.run import get_run_context, tags
from ._lifecycle.engine import Engine
from ._errors import (
    CacheKeyError, CommitError, ConfigurationError, DeadlockError, EngineClosedError, EngineError,
    NoActiveRunError, NoValueError, ParameterError, ProcessEndedError, RunCancelledError, RunCrashedError,
    RunFailedError, RunningLoopError, RunTimeoutError, SettingsError, UncacheableInputError,
    UnfinishedRunError, UpstreamFailedError,
)  # fmt: skip
from ._tasks.flow import flow
from ._runs.waiting import as_completed, wait
from ._runs.futures import FlowFuture, TaskFuture, allow_failure, quote, unmapped
from ._runs.logging import get_run_logger
from ._keys.policies import (
    DEFAULT, FLOW_PARAMETERS, INPUTS, NONE, RUN_ID, TASK_SOURCE, CachePolicy, IsolationLevel,
)  # fmt: skip
from ._settings import Settings
from ._runs.states import State, StateType
from ._tasks.task import task
from ._transactions.transaction import transaction

__all__ = [
    "DEFAULT", "FLOW_PARAMETERS", "INPUTS", "NONE", "RUN_ID", "TASK_SOURCE", "CacheKeyError",
    "CachePolicy", "CommitError", "ConfigurationError", "DeadlockError", "Engine", "EngineClosedError",
    "EngineError", "FlowFuture", "IsolationLevel", "NoActiveRunError", "NoValueError", "ParameterError",
    "ProcessEndedError", "RunCancelledError", "RunCrashedError", "RunFailedError", "RunTimeoutError",
    "RunningLoopError", "Settings", "SettingsError", "State", "StateType", "TaskFuture",
    "UncacheableInputError", "UnfinishedRunError", "UpstreamFailedError", "allow_failure",
    "as_completed", "flow", "get_run_context", "get_run_logger", "quote", "tags", "task", "transaction",
    "unmapped", "wait",
]  # fmt: skip

for _name in __all__:
    if not isinstance(_public := globals()[_name], CachePolicy):  # the policies are values, not definitions
        _public.__module__ = __name__  # reprs, tracebacks and pickles carry the public path
