"""Retries, timeouts and hooks: what a run does when its body fails."""

import asyncio
from typing import Any

from onceflow.engine import State, flow, get_run_context, task


def on_failure(task: Any, run: Any, state: State[Any]) -> None:
    print(f"  {run.task.name} failed for good after {run.attempt} attempt(s): {state.name}")


def worth_another_try(task: Any, run: Any, state: State[Any]) -> bool:
    return isinstance(state.result(raise_on_failure=False), ConnectionError)


@task(retries=3, retry_delay_seconds=[0.01, 0.02, 0.04], retry_jitter_factor=0.5)
async def flaky() -> int:
    attempt = get_run_context().attempt
    if attempt < 3:
        raise ConnectionError("the line is dead")
    return attempt


@task(retries=3, retry_condition_fn=worth_another_try, on_failure=[on_failure])
async def broken() -> None:
    raise ValueError("wrong for ever")


@task(timeout_seconds=0.05, on_failure=[on_failure])
async def slow() -> None:
    await asyncio.sleep(60)


@flaky.on_completion
async def celebrate(task: Any, run: Any, state: State[int]) -> None:
    print(f"  {run.task.name} completed after {run.attempt} attempt(s)")


@flow
async def work() -> None:
    print("returned", await flaky())
    print("state:", (await broken.run_to_state()).name)
    print("state:", (await slow.run_to_state()).name)


if __name__ == "__main__":
    work.run()
