"""What the log says, and who said it."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from onceflow.engine import INPUTS, Engine, NoActiveRunError, State, StateType, flow, get_run_logger, task
from onceflow.storage import MemoryStorage

pytestmark = pytest.mark.usefixtures("engine")

LINE = re.compile(r"^\d\d:\d\d:\d\d\.\d{3} \| (INFO   |WARNING|ERROR  ) \| .+$")


def run_script(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process and a home of its own."""
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
        env={
            "HOME": str(folder),
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(Path(__file__).parents[3] / ".dev"),
            **environment,
        },
    )


@task
async def body(x: int) -> int:
    return x


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line for line in caplog.messages if "Finished in state" in line]


async def test_every_run_ends_with_a_line(caplog: pytest.LogCaptureFixture) -> None:
    """A line ends every run, task or flow: its kind, its name, its final state, and why it ran."""

    @flow
    async def main() -> None:
        await body(1)

    with caplog.at_level(logging.INFO, logger="onceflow"):
        await main()
    task_line, flow_line = lines_of(caplog)
    assert re.fullmatch(r"Task run 'body-\w+' - Finished in state Completed\(\); ran: .+", task_line)
    assert re.match(r"Flow run 'main-\w+' - Finished in state Completed\(\)", flow_line)


async def test_a_hit_says_that_it_is_one(caplog: pytest.LogCaptureFixture) -> None:
    """A run that was served from its record ends as Cached(type=COMPLETED), and says who wrote the record, and when."""
    cached = body.with_options(cache_policy=INPUTS)
    with caplog.at_level(logging.INFO, logger="onceflow"):
        async with Engine(storage=MemoryStorage()):
            await cached(1)
            await cached(1)
    first, second = lines_of(caplog)
    assert "ran: no record" in first
    assert re.search(r"Finished in state Cached\(type=COMPLETED\); cached: written by run .+ ago$", second)


@pytest.mark.parametrize(
    ("outcome", "text"),
    [
        (ValueError("no"), "Failed('ValueError: no')"),
        (State[Any](StateType.COMPLETED, "Mine", "so"), "Mine('so', type=COMPLETED)"),
        (State[Any](StateType.CANCELLED), "Cancelled()"),
    ],
)
async def test_a_line_shows_the_state(outcome: Any, text: str, caplog: pytest.LogCaptureFixture) -> None:
    """The line that ends a run shows its state with name, message and type."""

    @task
    async def ends() -> Any:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    with caplog.at_level(logging.INFO, logger="onceflow"):
        await ends.run_to_state()
    assert f"Finished in state {text}" in lines_of(caplog)[0]


async def test_a_delayed_retry_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """T3: before a delayed retry the log has the error, the delay, and which attempt comes."""

    @task(retries=1, retry_delay_seconds=0.001)
    async def fails() -> None:
        raise ValueError("no")

    with caplog.at_level(logging.INFO, logger="onceflow"):
        await fails.run_to_state()
    assert any("ValueError: no; trying again in 0.001 s (attempt 2 of 2)" in line for line in caplog.messages)


async def test_a_level_that_is_off_costs_no_name(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is formatted for a level that is off: a run whose name nobody reads has none."""
    seen: list[Any] = []

    @task(on_completion=[lambda t, run, state: seen.append(run._name)])
    async def quiet() -> None: ...

    with caplog.at_level(logging.CRITICAL, logger="onceflow"):
        await quiet.with_options(on_completion=None)()
        run = quiet.with_options(on_completion=None)
        assert (await run.run_to_state()).is_completed()
    assert caplog.messages == []


async def test_the_run_logger_names_its_run(caplog: pytest.LogCaptureFixture) -> None:
    """get_run_logger gives a logger whose lines name the task or flow run, in async and sync bodies."""

    @task(task_run_name="the task")
    async def speaks() -> None:
        get_run_logger().info("hello %s", "you")

    @task(task_run_name="the sync task")
    def speaks_too() -> None:
        get_run_logger().warning("from a thread")

    @flow(flow_run_name="the flow")
    async def main() -> None:
        get_run_logger().error("from the flow")
        await speaks()
        await speaks_too()

    with caplog.at_level(logging.INFO, logger="onceflow"):
        await main()
    assert [line for line in caplog.messages if "Finished" not in line] == [
        "Flow run 'the flow' - from the flow",
        "Task run 'the task' - hello you",
        "Task run 'the sync task' - from a thread",
    ]


async def test_outside_of_a_run_there_is_no_run_logger() -> None:
    """get_run_logger where no run is raises, and says where to call it."""
    with pytest.raises(NoActiveRunError, match="inside a flow or a task"):
        get_run_logger()


async def test_the_filter_stamps_records_of_other_libraries(caplog: pytest.LogCaptureFixture) -> None:
    """A handler with the engine's filter knows flow and task of every record, also of other loggers, and drops none."""
    other = logging.getLogger("some.library")

    @task(name="mine", task_run_name="task run")
    async def inside() -> None:
        other.info("inside")

    @flow(name="main", flow_run_name="flow run")
    async def main() -> None:
        other.info("in the flow")
        await inside()

    caplog.handler.addFilter(Engine.log_filter)
    try:
        with caplog.at_level(logging.INFO, logger="some.library"):
            other.info("outside")
            await main()
    finally:
        caplog.handler.removeFilter(Engine.log_filter)
    stamps = {
        record.getMessage(): (
            record.__dict__["flow_run"],
            record.__dict__["task_run"],
            record.__dict__["task"],
        )
        for record in caplog.records
        if record.name == "some.library"
    }
    assert stamps == {
        "outside": ("-", "-", "-"),
        "in the flow": ("flow run", "-", "-"),
        "inside": ("flow run", "task run", "mine"),
    }


SCRIPT = """
from onceflow.engine import flow, task
@task
async def hello(): return 1
@flow
async def main(): return await hello()
main.run(); main.run()
"""


def test_a_script_shows_its_lines(tmp_path: Path) -> None:
    """run() in a script that configures no logging prints each line once, with time and level, to stderr."""
    done = run_script(SCRIPT, tmp_path)
    lines = done.stderr.splitlines()
    assert len(lines) == 4
    assert all(LINE.match(line) for line in lines), lines
    assert done.stdout == ""


def test_a_script_that_configures_logging_is_left_alone(tmp_path: Path) -> None:
    """Where the program has set up logging itself, onceflow adds no handler."""
    setup = "import logging; logging.basicConfig(level=logging.INFO, format='MINE %(message)s')\n"
    lines = run_script(setup + SCRIPT, tmp_path).stderr.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("MINE ") for line in lines)


def test_importing_and_embedding_touch_no_logging(tmp_path: Path) -> None:
    """Importing onceflow, and awaiting runs in a program of one's own, adds no handler and sets no level."""
    script = """
import asyncio, logging
from onceflow.engine import Engine, task
@task
async def hello(): return 1
async def main():
    async with Engine(): await hello()
asyncio.run(main())
assert logging.getLogger("onceflow").handlers == [] and logging.getLogger("onceflow").level == 0
assert logging.getLogger().handlers == []
"""
    assert run_script(script, tmp_path).stderr == ""
