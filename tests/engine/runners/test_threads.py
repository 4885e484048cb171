"""Synchronous code: `run()` from scripts and threads, synchronous bodies, and a loop that keeps beating."""

from __future__ import annotations

import asyncio
import contextvars
import subprocess
import sys
import threading
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
from onceflow.engine import (
    Engine,
    NoActiveRunError,
    RunningLoopError,
    Settings,
    flow,
    get_run_context,
    task,
)
from until import until


@task
async def double(x: int) -> int:
    return 2 * x


@task
def sync_double(x: int) -> int:
    return 2 * x


@task
async def fails() -> None:
    raise ValueError("no")


@flow
async def main_flow(x: int) -> int:
    return await double(x) + sum(await double.map([1, 2]))


# --- from a script: no loop in this thread


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home and a working folder of the test's own, since run() makes an engine from the settings."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("home")
def test_run_from_a_script() -> None:
    """run() starts a loop where there is none, for tasks and flows, sync and async, as often as it is called."""
    assert double.run(1) == 2
    assert sync_double.run(x=2) == 4
    assert main_flow.run(1) == 8
    assert main_flow.run(2) == 10


@pytest.mark.usefixtures("home")
def test_run_raises_what_the_run_raised() -> None:
    """run() raises the very exception of the body."""
    with pytest.raises(ValueError, match="no"):
        fails.run()


def test_run_touches_nothing_without_caching(home: Path) -> None:
    """run() of what is not persisted leaves no file and no folder behind."""
    main_flow.run(1)
    assert list(home.iterdir()) == []


@pytest.mark.usefixtures("home")
def test_run_in_a_plain_thread() -> None:
    """run() works in any thread without a loop, and two threads do not disturb each other."""
    results: list[int] = []
    threads = [threading.Thread(target=lambda n=n: results.append(main_flow.run(n))) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [6, 8, 10, 12]


@pytest.mark.parametrize("definition", [double, sync_double, main_flow], ids=["task", "sync task", "flow"])
async def test_run_on_a_running_loop_is_refused(definition: Any) -> None:
    """run() where a loop is running says what to write instead, and starts nothing."""
    with pytest.raises(RunningLoopError, match=rf"await {definition.name}\("):
        definition.run(1)


@pytest.mark.usefixtures("engine")
async def test_run_inside_an_async_task_is_refused() -> None:
    """run() inside an async body would block the loop that it needs: it is refused there too."""

    @task
    async def body() -> int:
        return double.run(1)

    with pytest.raises(RunningLoopError):
        await body()


def test_ctrl_c_in_a_script_ends_it(tmp_path: Path) -> None:
    """T8: an interrupt in a body, awaited or submitted, ends the script with KeyboardInterrupt, and hangs nowhere."""
    script = """
from onceflow.engine import flow, task
@task
async def interrupted(): raise KeyboardInterrupt
@flow
async def awaits(): await interrupted()
@flow
async def submits(): await interrupted.submit()
for main in (awaits, submits):
    try:
        main.run()
    except KeyboardInterrupt:
        print("interrupted")
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env={
            "HOME": str(tmp_path),
            "PYTHONPATH": str(Path(__file__).parents[3] / ".dev"),
            "ONCEFLOW_LOGGING_LEVEL": "ERROR",
        },
    )
    assert done.stdout.split() == ["interrupted"] * 2, done.stderr


# --- from the thread of a synchronous body


@pytest.mark.usefixtures("engine")
async def test_run_in_a_sync_body_uses_the_parents_loop() -> None:
    """run() in the thread of a sync body runs on the parent's loop, as a child of the run that calls."""
    loop = asyncio.get_running_loop()

    @task
    async def child() -> tuple[Any, Any]:
        return asyncio.get_running_loop(), get_run_context().parent

    @flow
    async def sub() -> Any:
        return await child()

    @task
    def body() -> Any:
        here = get_run_context()
        where, parent = child.run()
        assert parent is here
        assert sub.run()[0] is where
        assert sync_double.run(4) == 8
        with pytest.raises(ValueError, match="no"):
            fails.run()
        return where

    assert await body() is loop


async def test_sync_tasks_nest_deeper_than_there_are_threads(tmp_path: Path) -> None:
    """A sync body that waits in run() for another sync body lets it have a thread, so two threads do for any depth."""

    @task
    def nested(depth: int) -> int:
        return nested.run(depth - 1) + 1 if depth else 0

    @flow
    async def main() -> list[int]:
        return await nested.map([5] * 8)

    async with Engine(storage=tmp_path, worker_threads=2) as engine, asyncio.timeout(20):
        assert await main() == [5] * 8
        assert engine._limiter.total_tokens == 2


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("how", ["timeout", "cancel"])
async def test_an_abandoned_body_is_reported(how: str, caplog: pytest.LogCaptureFixture) -> None:
    """A body that goes on in its thread after its run has ended is told of, once, by name; one that ended is not."""
    begun, gate = threading.Event(), threading.Event()

    @task(timeout_seconds=0.2 if how == "timeout" else None)
    def work() -> None:
        begun.set()
        gate.wait(10)

    running = asyncio.ensure_future(work.run_to_state())
    await until(begun.is_set)
    if how == "cancel":
        running.cancel()
    await asyncio.wait([running])
    gate.set()
    await work()
    told = [
        record.getMessage() for record in caplog.records if "goes on in its thread" in record.getMessage()
    ]
    assert len(told) == 1
    assert "Task run 'work-" in told[0]


@pytest.mark.usefixtures("engine")
async def test_an_abandoned_body_cannot_go_on_calling() -> None:
    """When a sync body is abandoned, what it has under way on the loop is cancelled, and new calls are refused."""
    begun, ended = asyncio.Event(), threading.Event()
    seen: list[Any] = []
    child_ended: list[str] = []

    @task
    async def child() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            child_ended.append("child")

    @task
    def body() -> None:
        for _ in range(2):
            try:
                child.run()
            except (CancelledError, NoActiveRunError) as error:
                seen.append(error)
        ended.set()

    work = asyncio.ensure_future(body())
    await begun.wait()
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    # The thread goes on at once, the child is cancelled on the loop: either may be the first.
    await until(lambda: ended.is_set() and bool(child_ended))
    assert child_ended == ["child"]
    assert [type(error) for error in seen] == [CancelledError, NoActiveRunError]
    assert "ended" in str(seen[1])


@pytest.mark.usefixtures("engine")
async def test_context_variables_reach_a_sync_body_and_what_it_calls() -> None:
    """A sync body sees the caller's context variables, so do the runs that it starts, and it cannot change them."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="default")

    @task
    async def child() -> str:
        return variable.get()

    @task
    def body() -> tuple[str, str, str]:
        before = variable.get()
        variable.set("the body's")
        return before, variable.get(), child.run()

    variable.set("the caller's")
    assert await body() == ("the caller's", "the body's", "the body's")
    assert variable.get() == "the caller's"


@pytest.mark.usefixtures("engine")
async def test_run_in_a_thread_of_the_users_own() -> None:
    """run() in a thread that asyncio.to_thread started inside a run uses that run's loop as well."""
    loop = asyncio.get_running_loop()

    @task
    async def where() -> Any:
        return asyncio.get_running_loop()

    @flow
    async def main() -> Any:
        return await asyncio.to_thread(where.run)

    assert await main() is loop


@pytest.mark.usefixtures("engine")
async def test_submit_from_a_thread() -> None:
    """submit and map in the thread of a sync body start their runs on the parent's loop."""

    @task
    def body() -> Any:
        future = double.submit(1)
        return [future, double.map([2, 3])]

    @flow
    async def main() -> Any:
        future, mapped = await body()
        return await future, await mapped

    assert await main() == (2, [4, 6])


# --- the loop keeps beating


@pytest.mark.usefixtures("engine")
async def test_the_loop_keeps_beating() -> None:
    """B23: while a sync body blocks its thread, other tasks of the loop go on: a thousand end before it does."""
    begun, release = threading.Event(), threading.Event()

    @task
    def blocks() -> str:
        begun.set()
        assert release.wait(60)
        return "done"

    @flow
    async def main() -> tuple[Any, bool]:
        future = blocks.submit()
        await until(begun.is_set)
        values = await double.map(range(1000))
        blocked = not future.done()
        release.set()
        await future
        return sum(values), blocked

    assert await main() == (999_000, True)


@pytest.mark.usefixtures("engine")
async def test_a_sync_body_does_not_run_on_the_loops_thread() -> None:
    """B23: the body of a sync task, and of a sync flow, is neither on the loop's thread nor in the loop's executor."""
    here = threading.get_ident()

    @task
    def body() -> tuple[int, str]:
        return threading.get_ident(), threading.current_thread().name

    @flow
    def main() -> tuple[int, str]:
        return threading.get_ident(), threading.current_thread().name

    for thread, name in (await body(), await main()):
        assert thread != here
        assert not name.startswith("asyncio_")


async def test_no_more_threads_than_allowed(tmp_path: Path) -> None:
    """B23: at most `worker_threads` sync bodies run at once; the others wait as coroutines."""
    running, most = 0, 0
    lock = threading.Lock()

    @task
    def body(_: int) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        threading.Event().wait(0.001)
        with lock:
            running -= 1

    @flow
    async def main() -> None:
        await body.map(range(30))

    async with Engine(storage=tmp_path, settings=Settings(worker_threads=2)):
        await main()
    assert most == 2


@pytest.mark.usefixtures("engine")
async def test_async_tasks_start_no_thread() -> None:
    """B21: a thousand async runs, submitted at once, start no thread."""
    before = threading.active_count()

    @flow
    async def main() -> int:
        futures = double.map(range(1000))
        assert threading.active_count() <= before
        return sum(await futures)

    assert await main() == 999_000
    assert threading.active_count() <= before
