"""The pytest plugin, as its users run it: in a process of their own, in every mode, with nothing autouse."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

MODULE = """
import asyncio
from datetime import timedelta

import pytest
from onceflow.engine import INPUTS, IsolationLevel, flow, task
from onceflow.engine import _engine

attempts = []

@task(cache_policy=INPUTS.configure(isolation_level="SERIALIZABLE"), cache_expiration=timedelta(hours=1))
async def double(x): return 2 * x

@task(retries=3, retry_delay_seconds=[60, 600, 6000])
async def flaky():
    attempts.append(1)
    if len(attempts) < 4: raise ValueError(len(attempts))
    return len(attempts)

@flow
async def both(): return await double(1), await flaky()

async def check(engine):
    attempts.clear()
    began = engine.clock()
    assert await both() == (2, 4)
    engine.assert_ran(double, times=1)
    engine.assert_ran(flaky)
    engine.assert_ran(both)
    assert engine.clock() - began == 6660
    assert engine.clock.slept == [60, 600, 6000]
    engine.forget()
    await double(5)
    engine.advance(1800)
    engine.forget()
    await double(5)
    engine.assert_cached(double)
    engine.assert_cached(double, times=1)
    with pytest.raises(AssertionError, match="'double' ran 0 times, expected at least one run"):
        engine.assert_ran(double)
    engine.advance(timedelta(hours=1))
    await double(5)
    engine.assert_ran(double, times=1)
    with pytest.raises(AssertionError, match="served from records 1 times in 2 runs"):
        engine.assert_cached(double)
"""

ASYNC = """
@pytest.mark.asyncio
async def test_marked(onceflow_engine): await check(onceflow_engine)

@pytest.mark.asyncio
async def test_every_test_has_its_own(onceflow_engine):
    onceflow_engine.assert_ran(double, times=0)
    assert (await double.run_to_state(1)).name == "Completed"

@pytest.mark.asyncio
async def test_entered(onceflow_engine):
    async with onceflow_engine: await check(onceflow_engine)
    assert await double(5) == 10

@pytest.mark.asyncio
async def test_held_clock(onceflow_engine):
    attempts.clear()
    onceflow_engine.clock.jumps = False
    async with onceflow_engine:
        future = flaky.submit()
        for seconds in (60, 600, 6000):
            while len(onceflow_engine.clock.slept) < [60, 600, 6000].index(seconds) + 1: await asyncio.sleep(0)
            onceflow_engine.advance(seconds - 1)
            for _ in range(5): await asyncio.sleep(0)
            assert future.state.name == "AwaitingRetry"
            onceflow_engine.advance(1)
        assert await future == 4

@pytest.mark.asyncio
async def test_waits_that_overlap(onceflow_engine):
    @task(retries=1)
    async def retried(): raise ValueError
    begin = onceflow_engine.clock()
    waits = [retried.with_options(retry_delay_seconds=seconds).run_to_state() for seconds in (50, 10, 30)]
    await asyncio.gather(*waits)
    assert onceflow_engine.clock() - begin == 50
"""

AUTO = """
async def test_unmarked(onceflow_engine): await check(onceflow_engine)
"""

PLAIN = """
def test_asyncio_run(onceflow_engine): asyncio.run(check(onceflow_engine))

def test_run(onceflow_engine):
    attempts.clear()
    assert both.run() == (2, 4)
    attempts.clear()
    assert both.run() == (2, 4)
    onceflow_engine.assert_ran(double, times=2)  # the waits between moved the clock past its expiry
    onceflow_engine.assert_ran(flaky, times=2)

def test_not_autouse():
    assert _engine.stand_in is None

def test_time_does_not_run_backwards(onceflow_engine):
    with pytest.raises(ValueError, match="backwards"): onceflow_engine.advance(-1)
"""


def run(folder: Path, module: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a test module in a process of its own, in an empty home."""
    (folder / "test_module.py").write_text(module)
    if "no:asyncio" not in options:
        options = (*options, "-o", "asyncio_default_fixture_loop_scope=function")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", *options],
        cwd=folder,
        env={"HOME": str(folder), "PYTHONPATH": str(ROOT / ".dev"), "ONCEFLOW_STORAGE": "/nonexistent/x"},
        capture_output=True,
        text=True,
        check=False,
    )


def outcomes(done: subprocess.CompletedProcess[str]) -> str:
    return re.sub(r" in .*", "", done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize(
    ("module", "options", "expected"),
    [
        (MODULE + ASYNC + PLAIN, ("-o", "asyncio_mode=strict"), "9 passed"),
        (MODULE + ASYNC + AUTO + PLAIN, ("-o", "asyncio_mode=auto"), "10 passed"),
        (MODULE + PLAIN, ("-p", "no:asyncio"), "4 passed"),
    ],
    ids=["strict", "auto", "without a plugin for async tests"],
)
def test_every_mode(tmp_path: Path, module: str, options: tuple[str, ...], expected: str) -> None:
    """The fixture works in both modes of pytest-asyncio and with asyncio.run, with warnings as errors, and no files."""
    done = run(tmp_path, module, *options)
    assert outcomes(done) == expected, done.stdout + done.stderr
    assert [
        path.name for path in tmp_path.iterdir() if path.name not in ("test_module.py", "__pycache__")
    ] == []


def test_it_is_found_without_being_named(tmp_path: Path) -> None:
    """The entry point makes the fixture known where onceflow is installed; nothing of it is autouse."""
    done = run(tmp_path, MODULE + PLAIN, "--fixtures")
    assert "onceflow_engine" in done.stdout
    assert "An engine for this test" in done.stdout


def test_a_test_costs_little(tmp_path: Path) -> None:
    """A thousand tests that open an engine, run and hit take less than 5 ms of work each, pytest's share included."""
    many = """
@pytest.mark.parametrize("number", range(1000))
def test_many(onceflow_engine, number):
    async def main(): return await double(number), await double(number)
    asyncio.run(main())
    onceflow_engine.assert_ran(double, times=1)
"""
    before = os.times()
    done = run(tmp_path, MODULE + many)
    after = os.times()
    assert "1000 passed" in done.stdout
    # Its own work, as a busy machine would lengthen the time by the clock.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 5
