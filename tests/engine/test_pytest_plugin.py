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
from onceflow.engine import INPUTS, Engine, IsolationLevel, flow, get_run_context, task
from onceflow.engine._lifecycle import ambient

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

# One loop for all the tests: what one leaves behind does not reach the next.
ONE_LOOP = """
pytestmark = pytest.mark.asyncio(loop_scope="session")
left = []

@flow
async def forever(): await asyncio.Event().wait()

@task
async def where(): return get_run_context().engine

async def test_first(onceflow_engine): await check(onceflow_engine)

async def test_second(onceflow_engine): await check(onceflow_engine)

async def test_leaves_runs_behind(onceflow_engine):
    onceflow_engine.grace = 0
    await double(1)
    onceflow_engine.grace = 0
    left.append(onceflow_engine.submit(forever))
    left.append(asyncio.ensure_future(forever()))
    await asyncio.sleep(0)
    assert len(onceflow_engine.runs) == 2

async def test_they_have_ended(onceflow_engine):
    assert left[0].state.name == "Cancelled"
    assert left[1].done()
    assert await where() is onceflow_engine
    await check(onceflow_engine)

async def test_without_it():
    assert type(await where()) is Engine
"""

ANYIO = """
pytestmark = pytest.mark.anyio

@pytest.fixture
def anyio_backend(): return "asyncio"

@pytest.fixture
async def opened(onceflow_engine):
    async with onceflow_engine as engine: yield engine

async def test_first(onceflow_engine): await check(onceflow_engine)

async def test_second(onceflow_engine): await check(onceflow_engine)

async def test_entered_by_a_fixture(opened): await check(opened)
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
    assert ambient.stand_in is None

def test_time_does_not_run_backwards(onceflow_engine):
    with pytest.raises(ValueError, match="backwards"): onceflow_engine.advance(-1)
"""


def run(folder: Path, module: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a test module in a process of its own, in an empty home."""
    (folder / "test_module.py").write_text(module)
    if not any("no:asyncio" in option or "loop_scope" in option for option in options):
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
        (MODULE + ONE_LOOP, ("-o", "asyncio_default_fixture_loop_scope=session"), "5 passed"),
        (MODULE + ANYIO, ("-p", "no:asyncio"), "3 passed"),
        (MODULE + ANYIO, (), "3 passed"),
        (MODULE + ASYNC + PLAIN, ("-n", "2"), "9 passed"),
    ],
    ids=["strict", "auto", "asyncio.run", "one loop", "anyio", "anyio beside pytest-asyncio", "xdist"],
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


def work_of(folder: Path, module: str) -> float:
    """The processor's seconds for a module of tests: a busy machine lengthens the time by the clock."""
    before = os.times()
    done = run(folder, module)
    after = os.times()
    assert outcomes(done) == "300 passed", done.stdout + done.stderr
    return after.children_user + after.children_system - before.children_user - before.children_system


def test_a_test_costs_little(tmp_path: Path) -> None:
    """To open an engine, run, hit and assert costs a test less than 5 ms, beside what pytest and asyncio cost it."""
    many = """
@pytest.mark.parametrize("number", range(300))
def test_many({fixture}, number):
    async def main(): return await {call}, await {call}
    asyncio.run(main())
    {check}
"""
    bare = many.format(fixture="request", call="asyncio.sleep(0)", check="pass")
    ours = many.format(
        fixture="onceflow_engine", call="double(number)", check="onceflow_engine.assert_ran(double, times=1)"
    )
    assert work_of(tmp_path, MODULE + ours) - work_of(tmp_path, MODULE + bare) < 300 * 0.005
