"""`log_prints`: what a run prints becomes log lines of that run."""

from __future__ import annotations

import asyncio
import builtins
import io
import logging
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from onceflow.engine import Engine, Settings, flow, task


@pytest.fixture(autouse=True)
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """The log from INFO on; `print` is back where it was after each test."""
    before = builtins.print
    caplog.set_level(logging.INFO, logger="onceflow")
    yield caplog
    assert builtins.print is before


def printed(lines: pytest.LogCaptureFixture) -> list[str]:
    """What was printed by runs, with the task's or flow's name before it."""
    made = [record.getMessage() for record in lines.records if record.module == "test_prints"]
    return [f"{line.split(' - ')[0].split(chr(39))[1][:-4]}: {line.split(' - ', 1)[1]}" for line in made]


@task(log_prints=True)
async def loud(text: str) -> None:
    print(text, 1, sep=", ")


@task(log_prints=True)
def loud_in_thread(text: str) -> None:
    print(text, 1, sep=", ")


@task
async def plain(text: str) -> None:
    print(text)


@pytest.mark.parametrize("work", [loud, loud_in_thread], ids=["async", "sync"])
async def test_prints_become_log_lines(
    engine: Engine, work: Any, lines: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """With `log_prints=True` the text goes to the log, at INFO, from the line that printed it, and nowhere else."""
    await work("hello")
    assert printed(lines) == [f"{work.name}: hello, 1"]
    assert capsys.readouterr().out == ""


async def test_without_it_prints_are_prints(
    engine: Engine, lines: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """By default print() prints, beside runs whose prints are logged, too."""
    await asyncio.gather(plain("a"), loud("b"), plain("c"))
    assert capsys.readouterr().out == "a\nc\n"
    assert printed(lines) == ["loud: b, 1"]


async def test_runs_inside_inherit_it_unless_they_say_otherwise(
    engine: Engine, lines: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """A flow's `log_prints` holds for its tasks, called or submitted; a task's own False prints."""

    @flow(log_prints=True)
    async def main() -> None:
        print("in the flow")
        await plain("called")
        await plain.submit("submitted")
        await plain.with_options(log_prints=False)("not logged")
        print("in the flow again")

    await main()
    assert printed(lines) == [
        "main: in the flow", "plain: called", "plain: submitted", "main: in the flow again",
    ]  # fmt: skip
    assert capsys.readouterr().out == "not logged\n"


async def test_the_setting_holds_for_all_who_say_nothing(
    tmp_path: Path, lines: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the setting on, tasks and flows log their prints; an explicit False does not."""

    @flow(log_prints=False)
    async def quiet() -> None:
        print("not logged")

    async with Engine(storage=tmp_path, settings=Settings(log_prints=True)):
        await plain("logged")
        await quiet()
    assert printed(lines) == ["plain: logged"]
    assert capsys.readouterr().out == "not logged\n"


async def test_prints_into_files_are_left_alone(engine: Engine, lines: pytest.LogCaptureFixture) -> None:
    """What goes to a file of the body's own goes there; stdout and stderr by name are logged."""
    file = io.StringIO()

    @task(log_prints=True)
    async def work() -> None:
        print("into a file", end="!", file=file)
        print("to stdout", file=sys.stdout)
        print("to stderr", file=sys.stderr)

    await work()
    assert file.getvalue() == "into a file!"
    assert printed(lines) == ["work: to stdout", "work: to stderr"]


async def test_with_the_level_off_nothing_is_lost(
    engine: Engine, lines: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where INFO lines go nowhere, print() prints."""
    lines.set_level(logging.WARNING, logger="onceflow")
    await loud("hello")
    assert capsys.readouterr().out == "hello, 1\n"


async def test_generators_log_what_they_print(engine: Engine, lines: pytest.LogCaptureFixture) -> None:
    """A stream's body logs; what its reader prints in between does not become the stream's."""

    @task(log_prints=True)
    async def work() -> AsyncIterator[int]:
        print("first")
        yield 1
        print("second")

    @flow(log_prints=True)
    async def main() -> None:
        async for _ in work():
            print("between")

    await main()
    assert printed(lines) == ["work: first", "main: between", "work: second"]


async def test_a_failure_puts_print_back(engine: Engine) -> None:
    """After a failed, a timed out and a cancelled run print() is the old one (see the fixture)."""

    @task(log_prints=True, timeout_seconds=0.01)
    async def work(seconds: float) -> None:
        await asyncio.sleep(seconds)
        raise ValueError

    await work.run_to_state(0)
    await work.run_to_state(10)
    running = asyncio.ensure_future(work(10))
    await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait([running])
