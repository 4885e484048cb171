"""The watchdog names the run and the line that block the loop, and is not there when it is off."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from blockbuster import BlockBuster
from onceflow.engine import Engine, Settings, flow, task
from onceflow.storage import MemoryStorage
from until import until

SECONDS = 0.05


@pytest.fixture(autouse=True)
def may_block(no_blocking_calls: BlockBuster) -> Iterator[None]:
    """To block the loop is what these tests are about."""
    no_blocking_calls.deactivate()
    yield
    no_blocking_calls.activate()


def watched(seconds: float | None = SECONDS) -> Engine:
    return Engine(storage=MemoryStorage(), settings=Settings(warn_blocking=seconds))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def slow_helper(seconds: float) -> None:
    time.sleep(seconds)


@task
async def blocks(seconds: float) -> None:
    slow_helper(seconds)


@flow
async def outer(seconds: float) -> None:
    await blocks(seconds)


async def test_it_names_the_task_and_the_line(caplog: pytest.LogCaptureFixture) -> None:
    """A task that blocks the loop is named, innermost run first, with file, line and text; then for how long."""
    async with watched():
        await outer(3 * SECONDS)
        await until(lambda: len(warnings(caplog)) == 2)
    first, second = warnings(caplog)
    assert "Task run 'blocks-" in first
    assert "more than 0.05 s" in first
    assert f"{Path(__file__).name}:" in first
    assert "in slow_helper: time.sleep(seconds)" in first
    assert "Task run 'blocks-" in second
    assert "in all" in second


async def test_it_names_the_run_that_blocks_and_not_one_that_waits(caplog: pytest.LogCaptureFixture) -> None:
    """With other runs suspended, the one that holds the loop is named."""

    @task
    async def waits() -> None:
        await asyncio.sleep(4 * SECONDS)

    @flow
    async def main() -> None:
        waiting = waits.submit()
        await asyncio.sleep(0)
        await blocks(3 * SECONDS)
        await waiting

    async with watched():
        await main()
    assert all("blocks-" in line for line in warnings(caplog))
    assert warnings(caplog)


async def test_code_outside_of_runs(caplog: pytest.LogCaptureFixture) -> None:
    """What blocks the loop and is no run is told with its line as well."""
    async with watched():
        await asyncio.sleep(0)
        slow_helper(3 * SECONDS)
        await until(lambda: len(warnings(caplog)) == 2)
    assert "no run" in warnings(caplog)[0]
    assert "slow_helper" in warnings(caplog)[0]


async def test_the_log_record_is_stamped_with_the_run(caplog: pytest.LogCaptureFixture) -> None:
    """Filters that stamp records with the run find the one that blocks, though another thread logs."""
    caplog.handler.addFilter(Engine.log_filter)
    try:
        async with watched():
            await blocks(3 * SECONDS)
    finally:
        caplog.handler.removeFilter(Engine.log_filter)
    record = next(record for record in caplog.records if record.levelno == logging.WARNING)
    assert record.task == "blocks"  # type: ignore[attr-defined]


@task
async def searches() -> bool:
    return re.match(r"(a+)+$", "a" * 22 + "b") is not None


async def test_code_that_keeps_the_gil(caplog: pytest.LogCaptureFixture) -> None:
    """A call into C that lets no other thread run is told right after it, with its task and line.

    Not each, where other work kept the watchdog's thread from running until the loop had gone on.
    """

    async def told() -> bool:
        await searches()
        await asyncio.sleep(SECONDS)
        return len(warnings(caplog)) >= 2

    async with watched():
        await until(told)
    first, second, *_ = warnings(caplog)
    assert "Task run 'searches-" in first
    assert 're.match(r"(a+)+$"' in first
    assert "Task run 'searches-" in second
    assert "in all" in second


async def test_a_process_that_was_stopped_is_not_told(tmp_path: Path) -> None:
    """A process that Ctrl-Z or a debugger stops for a while has blocked nothing."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", STOPPED),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=os.environ | {"HOME": str(tmp_path)},
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"idle\n"
    process.send_signal(signal.SIGSTOP)
    await asyncio.sleep(0.5)
    process.send_signal(signal.SIGCONT)
    out, _ = await process.communicate(b"\n")
    assert out == b"done\n"


STOPPED = """
import asyncio, sys
from onceflow.engine import Engine, Settings

async def main():
    async with Engine("memory://x", settings=Settings(warn_blocking=0.1, logging_level="WARNING")):
        print("idle", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        await asyncio.sleep(0.2)
    print("done", flush=True)

asyncio.run(main())
"""


async def test_short_work_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    """A loop that keeps beating is left in peace: suspended and threaded bodies do not block it."""

    @task
    def in_a_thread() -> None:
        time.sleep(3 * SECONDS)

    async with watched(1.0):
        await in_a_thread()
        await asyncio.sleep(2 * SECONDS)
    assert warnings(caplog) == []


async def test_off_it_costs_no_thread() -> None:
    """Without the setting there is no thread; with it there is one an engine, gone after the engine."""

    def count() -> int:
        return sum(thread.name == "onceflow watchdog" for thread in threading.enumerate())

    async with watched(None):
        assert count() == 0
    async with watched(), watched():
        assert count() == 2
    await until(lambda: count() == 0)


async def test_the_setting_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONCEFLOW_WARN_BLOCKING=100ms switches it on."""
    monkeypatch.setenv("ONCEFLOW_WARN_BLOCKING", "100ms")
    async with Engine(storage=MemoryStorage()) as engine:
        assert engine._watchdog is not None
        assert engine._watchdog._seconds == pytest.approx(0.1)
