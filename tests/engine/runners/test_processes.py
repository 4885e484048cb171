"""`runner="process"`: CPU-bound bodies in worker processes."""

from __future__ import annotations

import asyncio
import linecache
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from onceflow.engine import INPUTS, TASK_SOURCE, Engine, flow, task
from onceflow.engine._errors import ConfigurationError, ProcessEndedError
from until import until


@task(runner="process")
def pid_and(x: Any) -> tuple[int, Any]:
    return os.getpid(), x


async def test_a_body_runs_in_another_process(engine: Engine) -> None:
    """The body runs elsewhere, its value comes back, and the loop goes on meanwhile."""
    pid, value = await pid_and({"a": [1, 2]})
    assert pid != os.getpid()
    assert value == {"a": [1, 2]}


async def test_processes_are_used_again_and_side_by_side(engine: Engine) -> None:
    """Calls one after another share a process, calls at once have one each, up to one a core."""

    @flow
    async def main() -> None:
        one, _ = await pid_and(1)
        two, _ = await pid_and(2)
        assert one == two
        pids = [pid for pid, _ in await pid_and.map(range(8))]
        assert len(set(pids)) <= (os.cpu_count() or 1)

    await main()


async def test_methods_closures_and_async_bodies(engine: Engine) -> None:
    """What pickles by value runs: methods with their instance, local functions with their closure, async bodies."""
    offset = 10

    class Adder:
        def __init__(self, n: int) -> None:
            self.n = n

        @task(runner="process")
        def add(self, x: int) -> int:
            return self.n + x + offset

    @task(runner="process")
    async def body(x: int) -> int:
        await asyncio.sleep(0)
        return x + offset

    assert await Adder(1).add(2) == 13
    assert await body(1) == 11


async def test_an_exception_comes_back_with_its_traceback(engine: Engine) -> None:
    """The body's own exception is raised, with the lines of the process in a note, and retried as any."""
    attempts: list[Any] = []

    @task(runner="process", retries=1, on_running=[lambda *_: attempts.append(1)])
    def fails() -> None:
        raise KeyError("from afar")

    with pytest.raises(KeyError, match="from afar") as raised:
        await fails()
    assert 'raise KeyError("from afar")' in "".join(raised.value.__notes__)
    assert __file__ in "".join(raised.value.__notes__)
    assert len(attempts) == 2


async def test_a_traceback_shows_lines_that_no_file_holds(engine: Engine) -> None:
    """The lines of a notebook's cell, which only this process knows, are in the note as well."""
    source = "def outer(x):\n    def inner():\n        raise ValueError(x)\n    return inner()\n"
    linecache.cache["<cell 7>"] = (len(source), None, source.splitlines(keepends=True), "<cell 7>")
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, "<cell 7>", "exec"), names)
    state = await task(runner="process")(names["outer"]).run_to_state(1)
    (note,) = state.result(raise_on_failure=False).__notes__
    assert '"<cell 7>", line 4, in outer\n    return inner()\n' in note
    assert '"<cell 7>", line 3, in inner\n    raise ValueError(x)\n' in note


@pytest.mark.parametrize("size", [10, 1_000_000], ids=["small", "large"])
async def test_values_of_every_size(engine: Engine, size: int) -> None:
    """Large arguments and results are pickled in a thread, small ones on the loop; both arrive whole."""
    _, value = await pid_and([b"x" * size, list(range(size // 100))])
    assert value == [b"x" * size, list(range(size // 100))]


async def test_what_does_not_pickle_is_a_clear_error(engine: Engine) -> None:
    """A ConfigurationError says whether the argument, the result or the exception does not pickle, and what to do."""

    @task(runner="process")
    def returns_lock() -> Any:
        return threading.Lock()

    class Odd(Exception):
        def __reduce__(self) -> Any:
            raise TypeError("not me")

    @task(runner="process")
    def raises_odd() -> None:
        raise Odd

    with pytest.raises(ConfigurationError, match=r"'pid_and'.*an argument does not pickle.*runner='thread'"):
        await pid_and(threading.Lock())
    with pytest.raises(ConfigurationError, match="returned in its process does not pickle"):
        await returns_lock()
    with pytest.raises(ConfigurationError, match="raised in its process does not pickle"):
        await raises_odd()


def test_an_unknown_runner_is_refused() -> None:
    """A runner that does not exist is an error at declaration, of a task or an engine; so is a thread for async."""

    async def body() -> None: ...

    with pytest.raises(ConfigurationError, match="'procces'"):
        task(runner="procces")(pid_and.fn)
    with pytest.raises(ConfigurationError, match="'procces'"):
        Engine(runner="procces")
    with pytest.raises(ConfigurationError, match="its body is async"):
        task(runner="thread")(body)
    task(runner="process")(body)


async def test_a_killed_process_fails_the_run(engine: Engine) -> None:
    """A process that is killed from outside fails its run with a clear error; the next call has a new process."""

    @task(runner="process")
    def kills_itself() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ProcessEndedError, match="kills_itself"):
        await kills_itself()
    assert (await pid_and(1))[1] == 1


@pytest.mark.parametrize("how", ["cancel", "timeout"])
async def test_a_cancelled_body_is_killed(engine: Engine, tmp_path: Path, how: str) -> None:
    """Cancelled or out of time, the process is killed: a body cannot go on in it."""
    await pid_and(1)  # the time is not for the start of the process
    started = tmp_path / "started"

    @task(runner="process", timeout_seconds=2 if how == "timeout" else None)
    def spins(path: str) -> None:
        with open(path, "w") as file:
            file.write(str(os.getpid()))
        time.sleep(60)

    async def pid() -> int:
        text = await asyncio.to_thread(lambda: started.read_text() if started.exists() else "")
        return int(text or 0)

    running = asyncio.ensure_future(spins.run_to_state(str(started)))
    await until(pid)  # type: ignore[arg-type]  # zero is no pid
    if how == "cancel":
        running.cancel()
    await asyncio.wait([running])
    if how == "cancel":
        assert running.cancelled()
    else:
        assert running.result().name == "TimedOut"
    killed = await pid()

    def is_gone() -> bool:
        try:
            os.kill(killed, 0)
        except ProcessLookupError:
            return True
        return False

    await until(is_gone)


async def test_a_hit_starts_no_process(engine: Engine) -> None:
    """The look-up comes first: a hit never leaves this process."""

    @task(runner="process", cache_policy=INPUTS + TASK_SOURCE)
    def work(x: int) -> int:
        return os.getpid()

    first = await work(1)
    assert first != os.getpid()
    state = await work.run_to_state(1)
    assert (state.name, state.result()) == ("Cached", first)


async def test_an_engine_chooses_where_synchronous_bodies_run(tmp_path: Path) -> None:
    """With `Engine(runner="process")` the plain bodies of tasks that name no runner leave, and only those; look-ups
    and commits stay."""

    @task(cache_policy=INPUTS + TASK_SOURCE)
    def plain(x: int) -> int:
        return os.getpid()

    @task(runner="thread")
    def threaded() -> int:
        return os.getpid()

    @task
    async def on_the_loop() -> int:
        return os.getpid()

    @task
    def generated() -> Iterator[int]:
        yield os.getpid()

    @flow
    def main() -> tuple[int, int]:
        return os.getpid(), plain.run(2)

    here = os.getpid()
    async with Engine(storage=tmp_path, runner="process"):
        first = await plain(1)
        assert first != here
        state = await plain.run_to_state(1)
        assert (state.name, state.result()) == ("Cached", first)
        assert await threaded() == await on_the_loop() == here
        assert await generated() == [here]
        of_the_flow, of_its_task = await main()
        assert of_the_flow == here != of_its_task
    async with Engine(storage=tmp_path / "another"):
        assert await plain(1) == here
