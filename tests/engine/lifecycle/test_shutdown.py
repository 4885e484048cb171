"""How an engine ends: in order, in time, and with every run accounted for. And Ctrl-C in a script."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from onceflow.engine import INPUTS, Engine, Settings, flow, task, transaction
from onceflow.engine._lifecycle import draining
from onceflow.locking import MemoryLockManager
from onceflow.storage import MemoryStorage
from until import until

SERIALIZABLE = INPUTS.configure(isolation_level="SERIALIZABLE")


class Stage:
    """An engine on memory, and flows that wait in the middle of things."""

    def __init__(self, grace: float) -> None:
        self.locks, self.storage = MemoryLockManager(), MemoryStorage()
        self.engine = Engine(self.storage, self.locks, grace=grace)
        self.begun, self.gate = asyncio.Event(), asyncio.Event()
        self.ended: list[str] = []

        @task(cache_policy=SERIALIZABLE)
        async def holds(x: int) -> int:
            self.begun.set()
            try:
                await self.gate.wait()
            finally:
                self.ended.append("holds")
            return x

        @task(cache_policy=INPUTS)
        async def staged(x: int) -> int:
            return x

        @flow
        async def locked(x: int = 1) -> int:
            return await holds(x)

        @flow
        async def transacting() -> None:
            async with transaction():
                await staged(-1)
                await holds(1)

        @flow
        async def submitting() -> None:
            await holds.submit(1)

        self.holds, self.locked, self.transacting, self.submitting = holds, locked, transacting, submitting

    async def keys(self) -> list[str]:
        return [entry.key async for entry in self.storage.list("")]


# --- interrupted runs


@pytest.mark.parametrize("which", ["locked", "transacting", "submitting"])
async def test_what_is_interrupted_says_so_and_leaves_nothing(which: str) -> None:
    """B4: after the grace a run is cancelled, says why, with its children, frees its locks and leaves no record."""
    stage = Stage(grace=0)
    async with stage.engine as engine:
        future = engine.submit(getattr(stage, which))
        await stage.begun.wait()
    assert future.state.name == "Cancelled"
    assert future.state.message == "the engine was closed"
    assert stage.ended == ["holds"]
    assert await stage.keys() == []
    assert len(engine.flights) == 0
    lease = await stage.locks.acquire((await key_of(stage)), "somebody else", timeout=0)
    assert lease is not None
    await lease.release()


async def key_of(stage: Stage) -> str:
    async with Engine(MemoryStorage(), MemoryLockManager()):
        key = await stage.holds.cache_key(1)
    assert key is not None
    return key


async def test_the_children_of_an_interrupted_run_say_why_too() -> None:
    """A task that an interrupted flow had submitted is Cancelled with the same message."""
    stage = Stage(grace=0)
    children: list[Any] = []

    @flow
    async def parent() -> None:
        children.append(stage.holds.submit(1))
        await children[0]

    async with stage.engine as engine:
        engine.submit(parent)
        await stage.begun.wait()
    assert [child.state.message for child in children] == ["the engine was closed"]


async def test_what_has_not_begun_says_why_too() -> None:
    """A flow that was accepted right before the end, and never took a step, is recorded as interrupted."""
    stage = Stage(grace=0)
    async with stage.engine as engine:
        future = engine.submit(stage.locked)
    assert (future.state.name, future.state.message) == ("Cancelled", "the engine was closed")


async def test_what_ends_in_time_is_complete() -> None:
    """Within the grace background flows end as if nothing was, records and all."""
    stage = Stage(grace=30)
    async with stage.engine as engine:
        future = engine.submit(stage.locked)
        await stage.begun.wait()
        asyncio.get_running_loop().call_later(0.005, stage.gate.set)
    assert future.state.name == "Completed"
    assert len([key for key in await stage.keys() if not key.startswith(".")]) == 1


# --- what others await


async def test_a_root_run_that_somebody_awaits_is_waited_for() -> None:
    """Leaving waits for flows and root tasks that other tasks await: what they use is not closed under them."""
    for which in ("locked", "holds"):
        stage = Stage(grace=30)
        async with asyncio.timeout(15), stage.engine:
            work = asyncio.ensure_future(getattr(stage, which)(1))
            await stage.begun.wait()
            asyncio.get_running_loop().call_later(0.005, stage.gate.set)
        assert stage.ended == ["holds"]
        assert await work == 1


async def test_a_root_run_that_does_not_end_is_cancelled() -> None:
    """After the grace it is cancelled like any other, with the task that awaits it."""
    stage = Stage(grace=0.01)
    async with stage.engine:
        work = asyncio.ensure_future(stage.locked(1))
        await stage.begun.wait()
    assert stage.ended == ["holds"]
    with pytest.raises(asyncio.CancelledError):
        await work


async def test_a_task_that_goes_on_after_its_run_is_left_alone() -> None:
    """Leaving waits for the run only, not for what its asyncio task does afterwards."""
    stage = Stage(grace=30)
    stage.gate.set()
    forever = asyncio.Event()

    async def handler() -> str:
        await stage.locked(1)
        await forever.wait()
        return "went on"

    async with asyncio.timeout(15), stage.engine:
        work = asyncio.ensure_future(handler())
        await until(lambda: bool(stage.ended))
    assert not work.done()
    forever.set()
    assert await work == "went on"


async def test_a_run_may_close_its_own_engine() -> None:
    """A flow that closes the engine it runs in does not wait for itself."""
    engine = Engine(MemoryStorage(), grace=30)

    @flow
    async def closes() -> str:
        await engine.aclose()
        return "closed"

    async with asyncio.timeout(5):
        await engine.open()
        assert await closes() == "closed"


# --- bodies that will not end


async def test_a_run_that_swallows_its_cancellation(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A body that does not mind being cancelled holds up the end for a while only; it is named, and Crashed."""
    monkeypatch.setattr(draining, "PATIENCE", 0.05)
    begun, end = asyncio.Event(), asyncio.Event()

    @flow
    async def stubborn() -> None:
        begun.set()
        while not end.is_set():
            try:
                await end.wait()
            except asyncio.CancelledError:
                pass  # as user code does that catches too much

    async with Engine(MemoryStorage(), grace=0) as engine:
        future = engine.submit(stubborn)
        await begun.wait()
    assert future.state.name == "Crashed"
    assert "did not end when it was cancelled" in (future.state.message or "")
    assert any("stubborn" in r.getMessage() and r.levelno == logging.ERROR for r in caplog.records)
    assert dict(engine.runs) == {}
    end.set()
    await until(future.done)


async def test_closing_cancelled_by_the_end_of_the_loop() -> None:
    """Where the loop ends while an engine waits for its runs, they are cancelled, and the rest is closed."""
    stage = Stage(grace=30)
    await stage.engine.open()
    future = stage.engine.submit(stage.locked)
    await stage.begun.wait()
    closing = asyncio.ensure_future(stage.engine.aclose())
    for _ in range(3):
        await asyncio.sleep(0)
    assert stage.engine._closing is not None
    stage.engine._closing.cancel()  # as asyncio.run does with everything at its end
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert (future.state.name, future.state.message) == ("Cancelled", "the engine was closed")
    assert stage.engine._closing is None


async def test_a_storage_that_does_not_close_hides_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Every client is closed, also where one of them fails to; what failed is raised in the end."""
    closed: list[str] = []

    class Own(MemoryStorage):
        async def aclose(self) -> None:
            closed.append(self.url)
            raise OSError("no")

    async def leave() -> None:
        async with Engine("memory://one", key_storage="memory://two", settings=Settings()) as engine:
            engine._own = {"one": Own(), "two": Own()}

    with pytest.raises(ExceptionGroup, match="closing"):
        await leave()
    assert len(closed) == 2


# --- Ctrl-C in a script

SCRIPT = """
import asyncio, sys
from onceflow.engine import INPUTS, flow, task, get_run_context

@task(cache_policy=INPUTS.configure(isolation_level="SERIALIZABLE"))
async def nap(seconds):
    print("begun", flush=True)
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        print("cancelled", flush=True)
        while "stubborn" in sys.argv:
            try: await asyncio.sleep(60)
            except asyncio.CancelledError: pass
        raise
    print("ended", flush=True)

@flow
async def main(seconds):
    if "blocked" in sys.argv:
        print("begun", flush=True)
        import time; time.sleep(60)
    await nap(seconds)

@main.on_cancellation
def say(flow, run, state): print(state.message, flush=True)

main.run(float(sys.argv[1]))
print("after", flush=True)
"""


class Script:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    async def line(self) -> str:
        assert self.process.stdout is not None
        async with asyncio.timeout(20):
            return (await self.process.stdout.readline()).decode().strip()

    async def says(self, text: str) -> None:
        """Wait for it on stderr."""
        assert self.process.stderr is not None
        async with asyncio.timeout(20):
            while text not in (line := (await self.process.stderr.readline()).decode()):
                assert line, f"it never said {text!r}"

    async def rest(self) -> tuple[str, str]:
        async with asyncio.timeout(20):
            out, err = await self.process.communicate()
        return out.decode(), err.decode()


@asynccontextmanager
async def script(folder: Path, *arguments: str, grace: str = "20") -> AsyncIterator[Script]:
    """A script that has begun its run."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SCRIPT, *arguments),
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("ONCEFLOW_")},
            "HOME": str(folder),
            "PYTHONPATH": str(Path(__file__).parents[3] / ".dev"),
            "ONCEFLOW_LOCKS": f"file://{folder}/locks",
            "ONCEFLOW_GRACE": grace,
        },
        cwd=folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        running = Script(process)
        assert await running.line() == "begun"
        yield running
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_the_first_ctrl_c_drains(tmp_path: Path) -> None:
    """The first Ctrl-C says what it does and lets the run end; its record is there, and the script ends."""
    async with script(tmp_path, "0.5") as running:
        running.interrupt()
        await running.says("waiting up to 20 s for 'main' to end. Press it again to cancel.")
        out, err = await running.rest()
    assert out == "ended\n"
    assert "Finished in state Completed" in err
    assert err.rstrip().endswith("KeyboardInterrupt")
    names = await asyncio.to_thread(os.listdir, tmp_path / ".onceflow/storage")
    assert len([name for name in names if name[0] != "."]) == 1


async def test_the_second_ctrl_c_cancels(tmp_path: Path) -> None:
    """The second Ctrl-C cancels the run, which says why; nothing of it is stored and its lock is free."""
    async with script(tmp_path, "60") as running:
        running.interrupt()
        await running.says("Ctrl-C")
        running.interrupt()
        out, err = await running.rest()
    assert out == "cancelled\ninterrupted by Ctrl-C\n"
    assert err.rstrip().endswith("KeyboardInterrupt")
    async with script(tmp_path, "0.01") as again:
        out, err = await again.rest()
    assert out == "ended\nafter\n"
    assert "Waiting" not in err


async def test_after_the_grace_one_ctrl_c_is_enough(tmp_path: Path) -> None:
    """A run that does not end within the grace is cancelled without a second Ctrl-C."""
    async with script(tmp_path, "60", grace="0.05") as running:
        running.interrupt()
        out, _ = await running.rest()
    assert out == "cancelled\ninterrupted by Ctrl-C\n"


@pytest.mark.parametrize("how", ["blocked", "stubborn"])
async def test_the_last_ctrl_c_is_pythons(tmp_path: Path, how: str) -> None:
    """A loop that is blocked, or a run that will not be cancelled, is left by KeyboardInterrupt as ever."""
    async with script(tmp_path, "60", how) as running:
        running.interrupt()
        if how == "stubborn":
            await running.says("Press it again")
        else:
            await asyncio.sleep(0.3)
        running.interrupt()
        if how == "stubborn":
            assert await running.line() == "cancelled"
            running.interrupt()  # out of the loop, which cancels what is left once more
            await asyncio.sleep(0.3)
            with contextlib.suppress(ProcessLookupError):  # it may have ended by then
                running.interrupt()  # and out of that
        _, err = await running.rest()
    assert "KeyboardInterrupt" in err


def test_handlers_of_others_are_left_alone() -> None:
    """Where the program handles SIGINT itself, or off the main thread, run() touches no signal; else it puts back."""
    seen: list[Any] = []

    @flow
    async def look() -> None:
        seen.append(signal.getsignal(signal.SIGINT))

    ours = signal.getsignal(signal.SIGINT)
    look.run()
    assert signal.getsignal(signal.SIGINT) is ours

    def theirs(number: int, frame: Any) -> None: ...

    signal.signal(signal.SIGINT, theirs)
    try:
        look.run()
    finally:
        signal.signal(signal.SIGINT, ours)
    assert seen[0] is not ours
    assert seen[1] is theirs


async def test_an_embedded_engine_touches_no_signal() -> None:
    """Entering an engine and running flows in an app changes no signal handler."""
    watched = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in watched]
    stage = Stage(grace=1)
    stage.gate.set()
    async with stage.engine as engine:
        await engine.submit(stage.locked)
        await stage.locked(2)
        assert [signal.getsignal(number) for number in watched] == before
