"""Other loops and sessions: uvloop, a notebook's running loop, kernels that restart, loops one after another."""

from __future__ import annotations

import ast
import asyncio
import logging
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
from onceflow.engine import INPUTS, Engine, as_completed, flow, task, transaction
from onceflow.locking import FileLockManager, MemoryLockManager
from onceflow.storage import LocalStorage, MemoryStorage

uvloop = pytest.importorskip("uvloop")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home and a working folder of the test's own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- uvloop


@task(cache_policy=INPUTS.configure(isolation_level="SERIALIZABLE"))
async def slow(x: int) -> int:
    await asyncio.sleep(0.01)
    return 2 * x


@task(cache_policy=INPUTS, retries=1, retry_delay_seconds=0.001)
async def plain(x: str) -> str:
    return x + "!"


@task
def in_thread(x: int) -> int:
    return slow.run(x)


@flow(timeout_seconds=20)
async def everything() -> list[Any]:
    values: list[Any] = list(await asyncio.gather(*[slow(x % 5) for x in range(50)]))
    values += await in_thread.map(range(5))
    async for future in as_completed([plain.submit("a")]):
        values.append(await future)
    async with transaction():
        values.append(await plain("b"))
    return values


EXPECTED = [2 * (x % 5) for x in range(50)] + [0, 2, 4, 6, 8, "a!", "b!"]


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_everything_on_uvloop(home: Path, kind: str) -> None:
    """L15: tasks, threads, locks, records, transactions and background flows work on uvloop, twice in a row."""
    storage = MemoryStorage() if kind == "memory" else LocalStorage(home / "store")
    locks = MemoryLockManager() if kind == "memory" else FileLockManager(home / "locks")

    async def main() -> None:
        assert type(asyncio.get_running_loop()).__module__.startswith("uvloop")
        async with Engine(storage, locks, grace=5) as engine:
            assert await everything() == EXPECTED
            with engine.observe() as seen:
                assert await engine.submit(everything) == EXPECTED
                assert await slow(1) == 2
            assert seen.hit

    for _ in range(2):
        uvloop.run(main())


def test_the_made_engine_on_uvloop(home: Path) -> None:
    """Without an engine, uvloop gets one from the settings as any loop does, and takes it along at its end."""
    for _ in range(2):
        assert uvloop.run(plain("x")) == "x!"
    assert (home / ".onceflow/storage").is_dir()


# --- notebooks


class Notebook:
    """Cells that run one after another on one loop that goes on between them, with `await` at the top level."""

    def __init__(self) -> None:
        self._names: dict[str, Any] = {"__name__": "__main__"}
        self._loop = asyncio.new_event_loop()

    def cell(self, source: str) -> None:
        code: CodeType = compile(source, "<cell>", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)

        async def run() -> None:  # cells without an await run on the loop as well
            if (outcome := eval(code, self._names)) is not None:
                await outcome

        self._loop.run_until_complete(run())

    def __getitem__(self, name: str) -> Any:
        return self._names[name]

    def end(self, politely: bool) -> None:
        """The kernel stops: with the loop closed as a runner does, or just left."""
        if politely:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()


DEFINE = """
from onceflow.engine import Engine, INPUTS, flow, task
calls = []

@task(cache_policy=INPUTS)
async def double(x):
    calls.append(x)
    return 2 * x

@flow
async def main(x):
    return await double(x)
"""


@pytest.mark.parametrize("politely", [True, False])
def test_a_notebook_and_its_restart(politely: bool, caplog: pytest.LogCaptureFixture) -> None:
    """`await flow()` in cells, on a loop that is there already; after a restart the records serve the new kernel."""
    for restart in range(3):
        notebook = Notebook()
        notebook.cell(DEFINE)
        notebook.cell("first = await main(1)")
        notebook.cell("second = await main(1)")
        assert (notebook["first"], notebook["second"]) == (2, 2)
        assert notebook["calls"] == ([1] if restart == 0 else [])
        notebook.end(politely)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_an_engine_over_several_cells() -> None:
    """A notebook opens an engine in one cell, uses it in others, submits, and closes it in the last."""
    notebook = Notebook()
    notebook.cell(DEFINE)
    notebook.cell("engine = await Engine(storage='memory://notebook').open()")
    notebook.cell("future = engine.submit(main, 4)")
    notebook.cell("value = await future; here = (await main.run_to_state(4)).result()")
    assert (notebook["value"], notebook["here"], notebook["calls"]) == (8, 8, [4])
    notebook.cell("await engine.aclose()")
    notebook.end(politely=True)


def test_run_in_a_notebook_says_what_to_write() -> None:
    """`main.run()` in a cell of a running loop says `await main(...)`."""
    notebook = Notebook()
    notebook.cell(DEFINE)
    notebook.cell(
        "import asyncio\nasync def wrong():\n    main.run(1)\n"
        "try:\n    await wrong()\nexcept RuntimeError as error:\n    text = str(error)"
    )
    assert "await main(...)" in notebook["text"]
    notebook.end(politely=True)


def test_a_kernel_that_restarts_with_an_engine_left_open() -> None:
    """An engine that was left open on a loop that is closed can be opened on the next one."""
    notebook = Notebook()
    notebook.cell(DEFINE)
    notebook.cell("engine = await Engine(storage='memory://left-open').open(); await main(1)")
    engine = notebook["engine"]
    notebook.end(politely=False)

    async def again() -> int:
        async with engine:
            result: int = await notebook["main"](1)
            return result

    assert asyncio.run(again()) == 2
