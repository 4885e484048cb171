"""Flows, tasks, cache policies, and the engine that runs them."""

from ._context import get_run_context, tags
from ._engine import Engine
from ._errors import *  # noqa: F403
from ._flow import flow
from ._futures import FlowFuture, TaskFuture, allow_failure, as_completed, quote, unmapped, wait
from ._logging import get_run_logger
from ._policies import (
    DEFAULT,
    FLOW_PARAMETERS,
    INPUTS,
    NONE,
    RUN_ID,
    TASK_SOURCE,
    CachePolicy,
    IsolationLevel,
)
from ._settings import Settings
from ._states import State, StateType
from ._task import task
