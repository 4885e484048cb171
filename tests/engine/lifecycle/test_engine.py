"""The engine: what opening and closing it does, and which one a run belongs to."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
from onceflow.engine import (
    INPUTS,
    ConfigurationError,
    Engine,
    EngineClosedError,
    Settings,
    flow,
    get_run_context,
    task,
)
from onceflow.engine._lifecycle import engine as engine_module
from onceflow.locking import MemoryLockManager
from onceflow.storage import MemoryStorage
from until import until


@task
async def where() -> Engine:
    """The engine that this run belongs to."""
    return get_run_context().engine


@task(cache_policy=INPUTS)
async def cached(x: int) -> int:
    return x


class Probe(MemoryStorage):
    """A storage that notes whether it was closed."""

    closed = 0

    async def aclose(self) -> None:
        self.closed += 1
        await super().aclose()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home and a working folder of the test's own: nothing here may touch the real one."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder)
    return folder


async def listing(folder: Path) -> list[str]:
    """What lies in a folder."""
    return await asyncio.to_thread(os.listdir, folder)


async def apart(body: Any) -> Any:
    """Run an async function as a task of its own in which no engine was entered."""
    return await asyncio.create_task(body(), context=contextvars.Context())


# --- making, opening, closing


def test_making_an_engine_opens_nothing(tmp_path: Path) -> None:
    """An engine is cheap to make, without a loop: no file, no folder, no thread, no setting is read."""
    threads = threading.active_count()
    os.environ["ONCEFLOW_NO_SUCH_SETTING"] = "1"
    try:
        engines = [Engine(storage=tmp_path / "store", lock_manager=MemoryLockManager()) for _ in range(1000)]
    finally:
        del os.environ["ONCEFLOW_NO_SUCH_SETTING"]
    assert len(engines) == 1000
    assert not (tmp_path / "store").exists()
    assert threading.active_count() <= threads  # some of earlier tests may end meanwhile


async def test_opening_touches_no_storage(tmp_path: Path, home: Path) -> None:
    """Entering an engine makes no folder; a run without caching makes none either, the first record does."""
    async with Engine(storage=tmp_path / "store"):
        await where()
        assert await listing(tmp_path) == ["home"]
        await cached(1)
        assert await listing(tmp_path / "store") != []
    assert not await asyncio.to_thread((home / ".onceflow" / "storage").exists)


async def test_what_was_opened_is_closed_and_what_was_passed_in_is_not() -> None:
    """Leaving closes the storages that the engine made from URLs, and leaves alone those it was given."""
    mine = Probe()
    async with Engine(storage=mine, key_storage="memory://of-the-engine") as engine:
        await cached(1)
        made = engine.key_storage
        assert made is not None
    assert mine.closed == 0
    await mine.write("still", b"usable")
    async with Engine(storage=mine):
        assert await cached(1) == 1


async def test_an_engine_can_be_entered_again() -> None:
    """After it was left an engine can be entered again, and works as before."""
    engine = Engine(storage=MemoryStorage())
    for _ in range(3):
        async with engine as entered:
            assert entered is engine
            assert await where() is engine
            assert await cached(1) == 1


async def test_an_engine_that_is_entered_twice_is_closed_by_the_last() -> None:
    """Entered while it is open, nested or by another task, an engine stays open until the last has left."""
    engine = Engine(storage=MemoryStorage())
    async with engine:
        async with engine:
            assert await where() is engine
        assert await where() is engine

        inside, leave = asyncio.Event(), asyncio.Event()

        async def other() -> None:
            async with engine:
                inside.set()
                await leave.wait()
                assert await where() is engine

        work = asyncio.ensure_future(other())
        await inside.wait()
    leave.set()
    await work
    with pytest.raises(EngineClosedError):
        engine.check_usable("what comes now")


async def test_an_engine_can_be_left_by_another_task() -> None:
    """An engine that one task enters may be left by another, as lifespans and fixtures do."""
    engine = Engine(storage=MemoryStorage())
    await asyncio.create_task(engine.__aenter__())
    assert await where() is engine
    await asyncio.create_task(engine.__aexit__(None, None, None))
    assert await where() is not engine


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0), (1, 2, 0)])
async def test_engines_can_be_left_in_any_order(order: tuple[int, ...]) -> None:
    """Of the engines entered in a context, the last one that was not left is used; after all of them, none is."""
    engines = [Engine(storage=MemoryStorage()) for _ in range(3)]
    for engine in engines:
        await engine.__aenter__()
    open_ones = list(engines)
    for number in order:
        assert await where() is open_ones[-1]
        await engines[number].__aexit__(None, None, None)
        open_ones.remove(engines[number])
    assert await where() not in engines


async def test_entering_that_is_cancelled_leaves_it_closed() -> None:
    """Who is cancelled while entering leaves no open engine behind, unless somebody else is entering it too."""
    engine = Engine(storage=MemoryStorage())
    entering = asyncio.ensure_future(engine.__aenter__())
    await asyncio.sleep(0)
    entering.cancel()
    await asyncio.gather(entering, return_exceptions=True)
    await until(lambda: engine._opening is None)
    assert await where() is not engine

    first, second = (asyncio.ensure_future(engine.__aenter__()) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    assert await second is engine
    assert await where() is engine
    await engine.__aexit__(None, None, None)
    assert await where() is not engine


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"lock_manager": "redis://localhost"}, "lock_manager_from_url"),
        ({"storage": 5}, "storage"),
        ({"key_storage": b"bytes"}, "key_storage"),
        ({"settings": {"grace": 1}}, "Settings"),
        ({"grace": -1}, "grace"),
        ({"grace": float("nan")}, "grace"),
        ({"grace": "10s"}, "grace"),
        ({"worker_threads": 0}, "worker_threads"),
        ({"worker_threads": 1.5}, "worker_threads"),
    ],
)
def test_arguments_that_cannot_be(options: dict[str, Any], names: str) -> None:
    """What cannot be is refused when the engine is made, and named with its value."""
    with pytest.raises(ConfigurationError, match=names) as caught:
        Engine(**options)
    assert repr(next(iter(options.values()))) in str(caught.value)


async def test_closing_is_idempotent() -> None:
    """aclose may be called before opening, twice, and by several at once."""
    engine = Engine(storage=MemoryStorage())
    await engine.aclose()
    await engine.open()
    await asyncio.gather(engine.aclose(), engine.aclose())
    await engine.aclose()


async def test_opening_by_several_at_once_opens_once() -> None:
    """Tasks that open an engine at the same time share one opening."""
    engine = Engine(storage=MemoryStorage())
    await asyncio.gather(*(engine.open() for _ in range(50)))
    assert engine_module.open_engines[asyncio.get_running_loop()].count(engine) == 1
    await engine.aclose()


async def test_opening_fails_for_bad_settings_and_can_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting that cannot be read fails the opening with its name, and leaves the engine as it was."""
    engine = Engine(storage=MemoryStorage())
    monkeypatch.setenv("ONCEFLOW_WORKER_THREADS", "many")
    with pytest.raises(ConfigurationError, match="ONCEFLOW_WORKER_THREADS"):
        await engine.open()
    monkeypatch.delenv("ONCEFLOW_WORKER_THREADS")
    async with engine:
        assert await where() is engine


# --- which engine


async def test_several_engines_in_one_process() -> None:
    """Runs belong to the innermost engine that their context has entered; leaving restores the outer one."""
    first, second = Engine(storage=MemoryStorage()), Engine(storage=MemoryStorage())
    async with first:
        assert await where() is first
        async with second:
            assert await where() is second
        assert await where() is first

        async def in_second() -> Engine:
            async with second:
                await asyncio.sleep(0)
                return await where()

        assert list(await asyncio.gather(in_second(), where())) == [second, first]


async def test_engines_do_not_share_records() -> None:
    """What one engine has stored is no hit for another with another storage."""
    ran: list[int] = []

    @task(cache_policy=INPUTS)
    async def body(x: int) -> None:
        ran.append(x)

    first, second = Engine(storage=MemoryStorage()), Engine(storage=MemoryStorage())
    for engine in (first, second, first):
        async with engine:
            await body(1)
    assert ran == [1, 1]


async def test_the_only_open_engine_is_everybodys() -> None:
    """Where none was entered, the only one open on the loop is used: as in a handler of an app with a lifespan."""
    async with Engine(storage=MemoryStorage()) as engine:
        assert await apart(where) is engine


async def test_of_several_open_engines_none_is_guessed(home: Path) -> None:
    """Where none was entered and several are open, the one from the settings is used."""
    async with Engine(storage=MemoryStorage()) as first, Engine(storage=MemoryStorage()) as second:
        got = await apart(where)
        assert got not in (first, second)
        assert str(home) in got.storage.url


async def test_without_an_engine_one_is_made_from_the_settings(home: Path) -> None:
    """Where no engine is open one is made, once for the loop, with its storage in ~/.onceflow/storage."""

    async def two() -> list[Engine]:
        return list(await asyncio.gather(where(), where()))

    first, second = await apart(two)
    assert first is second
    assert await apart(where) is first
    assert str(home / ".onceflow" / "storage") in first.storage.url


async def test_an_open_engine_takes_over_from_the_made_one() -> None:
    """An engine that is opened after one was made from the settings is used: it is the only one that was opened."""
    made = await apart(where)
    async with Engine(storage=MemoryStorage()) as engine:
        assert await apart(where) is engine
    assert await apart(where) is made


async def test_a_child_run_stays_with_its_parents_engine() -> None:
    """Runs inside a run belong to its engine, also when others are open by then."""

    @flow
    async def main() -> Any:
        mine = get_run_context().engine
        other = Engine(storage=MemoryStorage())
        await apart(other.open)
        values = await where(), await where.submit(), mine
        await other.aclose()
        return values

    called, submitted, mine = await main()
    assert called is submitted is mine


# --- loops


def test_the_made_engine_is_closed_with_its_loop() -> None:
    """The engine made from the settings is closed when asyncio.run ends, and the next loop gets another."""
    first, second = asyncio.run(apart(where)), asyncio.run(apart(where))
    assert first is not second
    assert not first._is_open
    assert not second._is_open


def test_a_loop_that_ended_is_forgotten() -> None:
    """Neither a loop nor its engine is kept alive after asyncio.run: a thousand runs leave nothing."""
    loops: list[Any] = []

    async def look() -> None:
        await where()
        loops.append(weakref.ref(asyncio.get_running_loop()))
        loops.append(weakref.ref(get_engine()))

    def get_engine() -> Engine:
        return engine_module.made_engines[asyncio.get_running_loop()]

    for _ in range(3):
        asyncio.run(look())
    gc.collect()
    assert [ref() for ref in loops] == [None] * 6


def test_one_engine_on_loops_one_after_another() -> None:
    """An engine object may serve a loop after another, closed in between or not."""
    engine = Engine(storage=MemoryStorage())

    async def proper() -> bool:
        async with engine:
            return await where() is engine

    async def careless() -> bool:
        await engine.__aenter__()  # never left
        return await where() is engine

    assert asyncio.run(proper())
    assert asyncio.run(careless())
    assert asyncio.run(careless())
    assert asyncio.run(proper())


def test_one_engine_on_two_loops_at_once_is_refused() -> None:
    """An engine that is open on one loop cannot be opened on another: the error says to make one for each."""
    engine = Engine(storage=MemoryStorage())
    opened, done = threading.Event(), threading.Event()

    async def hold() -> None:
        async with engine:
            opened.set()
            await asyncio.to_thread(done.wait, 30)

    thread = threading.Thread(target=lambda: asyncio.run(hold()))
    thread.start()
    try:
        assert opened.wait(30)
        with pytest.raises(ConfigurationError, match="another event loop"):
            asyncio.run(engine.open())
    finally:
        done.set()
        thread.join()


async def test_an_engine_entered_here_is_not_used_on_another_loop(home: Path) -> None:
    """A thread that took the context along to a loop of its own is refused; `run()` there uses the engine's loop."""

    @flow
    async def here() -> Any:
        await limited()
        return get_run_context().engine, asyncio.get_running_loop()

    @task(concurrency=1)
    async def limited() -> None:
        await asyncio.sleep(0)

    async with Engine(storage=MemoryStorage()) as engine:
        for call in (where, where.run_to_state, here):
            with pytest.raises(ConfigurationError, match="another event loop"):
                await asyncio.to_thread(asyncio.run, call())
        loop = asyncio.get_running_loop()
        assert await asyncio.gather(*[asyncio.to_thread(here.run) for _ in range(3)]) == [(engine, loop)] * 3
    assert await listing(home) == []


async def test_a_limit_holds_on_one_loop() -> None:
    """N1: a body that starts a loop of its own may call tasks there, but none with a limit: it would wait for ever."""

    @task(concurrency=1)
    async def limited() -> str:
        return "limited"

    @task
    def elsewhere(call: Any) -> Any:
        return asyncio.run(call())

    async with Engine(storage=MemoryStorage()) as engine:
        assert await elsewhere(where) is engine
        assert await limited() == "limited"
        with pytest.raises(ConfigurationError, match="another event loop"):
            await elsewhere(limited)


def test_a_loop_that_is_closed_under_a_run(caplog: pytest.LogCaptureFixture) -> None:
    """34: keys that runs held when their loop was closed are free on the next one, with a warning."""
    engine = Engine(MemoryStorage(), MemoryLockManager())
    begun: list[asyncio.Task[int]] = []

    @task(cache_policy=INPUTS.configure(isolation_level="SERIALIZABLE"))
    async def holds(x: int) -> int:
        if not begun:
            begun.append(asyncio.current_task())  # type: ignore[arg-type]
            await asyncio.Event().wait()
        return x

    async def abandon() -> None:
        await engine.open()
        works.extend(asyncio.ensure_future(holds(1)) for _ in range(3))
        await until(lambda: bool(begun))

    async def again() -> list[int]:
        async with engine, asyncio.timeout(10):
            return [await holds(1), await holds(2)]

    works: list[asyncio.Task[int]] = []
    loop = asyncio.new_event_loop()
    loop.run_until_complete(abandon())
    loop.close()
    assert asyncio.run(again()) == [1, 2]
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "closed under runs that held keys" in warning
    for work in (*works, *begun):
        work._log_destroy_pending = False  # type: ignore[attr-defined]  # the test abandons them on purpose
        work.get_coro().close()


FORKS = """
import asyncio, os
from onceflow.engine import Engine, task

@task
async def double(x):
    return 2 * x

def forked(x):
    pid = os.fork()
    if pid == 0:
        os._exit(double.run(x))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

@task
def in_a_thread():
    return forked(1)

@task
async def on_the_loop():
    return forked(2)

async def main():
    async with Engine(storage="memory://parent"):
        print(await in_a_thread(), await on_the_loop(), forked(3))

asyncio.run(main())
"""


def test_a_forked_child_has_left_its_parents_engine(home: Path) -> None:
    """91: `run()` in a child that was forked inside of a body works there, and does not wait for the parent's loop."""
    done = subprocess.run(
        [sys.executable, "-c", FORKS], cwd=home, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "2 4 6\n"


def test_two_loops_in_two_threads() -> None:
    """Two loops in two threads work at the same time, each with its own engine, over one folder."""
    ran: list[int] = []
    together = threading.Barrier(2)

    @task(cache_policy=INPUTS)
    async def body(x: int) -> int:
        ran.append(x)
        return x

    @flow
    async def main() -> Any:
        await asyncio.to_thread(together.wait, 30)
        return get_run_context().engine, await body.map(range(20))

    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.append(main.run())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (first, values), (second, same_values) = results
    assert first is not second
    assert values == same_values == list(range(20))
    assert 20 <= len(ran) <= 40


# --- shutdown


@task
async def waits(begun: asyncio.Event, gate: asyncio.Event, ended: list[str]) -> str:
    begun.set()
    try:
        await gate.wait()
    except asyncio.CancelledError:
        ended.append("cancelled")
        raise
    ended.append("finished")
    return "value"


async def test_leaving_waits_for_what_the_engine_owns() -> None:
    """Leaving waits, within `grace`, for the runs that were submitted to the engine, and for what they start."""
    begun, gate, ended = asyncio.Event(), asyncio.Event(), []  # type: ignore[var-annotated]

    @task
    async def starts_another() -> None:
        await waits.submit(begun, gate, ended)

    async with Engine(storage=MemoryStorage(), grace=30):
        future = waits.submit(begun, gate, ended)
        await begun.wait()
        asyncio.get_running_loop().call_later(0.002, gate.set)
    assert ended == ["finished"]
    assert await future == "value"


async def test_leaving_cancels_what_does_not_end_in_time() -> None:
    """After `grace` seconds what still runs is cancelled, and has ended when the engine is left."""
    begun, gate, ended = asyncio.Event(), asyncio.Event(), []  # type: ignore[var-annotated]
    async with Engine(storage=MemoryStorage(), grace=0) as engine:
        future = waits.submit(begun, gate, ended)
        await begun.wait()
    assert ended == ["cancelled"]
    assert future.state.name == "Cancelled"
    assert engine.running == set()


async def test_new_work_on_a_closed_engine_is_refused(home: Path) -> None:
    """What still holds a closed engine in its context gets EngineClosedError, and not another engine unasked."""
    closed = asyncio.Event()

    async def late(call: Any) -> Any:
        await closed.wait()
        return await call()

    async def submits() -> Any:
        return where.submit()

    async def flows() -> Any:
        return await flow(where.fn)()

    async with Engine(storage=MemoryStorage()):
        works = [asyncio.ensure_future(late(call)) for call in (where, where.run_to_state, flows, submits)]
    closed.set()
    for outcome in await asyncio.gather(*works, return_exceptions=True):
        assert isinstance(outcome, EngineClosedError)
        assert "closed" in str(outcome)
    assert await listing(home) == []


async def test_new_root_work_while_closing_is_refused_and_children_are_not() -> None:
    """While an engine waits for its runs these may start their own, and nobody else may start any."""
    begun, gate, ended = asyncio.Event(), asyncio.Event(), []  # type: ignore[var-annotated]
    closing = asyncio.Event()
    children: list[Any] = []

    @task
    async def parent() -> None:
        await closing.wait()
        children.append(await where())
        gate.set()

    async def intruder() -> Any:
        await closing.wait()
        return await where()

    engine = Engine(storage=MemoryStorage(), grace=30)
    async with engine:
        parent.submit()
        waits.submit(begun, gate, ended)
        work = asyncio.ensure_future(intruder())
        await begun.wait()
        asyncio.get_running_loop().call_later(0.002, closing.set)
    assert children == [engine]
    assert ended == ["finished"]
    with pytest.raises(EngineClosedError):
        await work


async def test_a_cancelled_close_goes_on() -> None:
    """Cancelling who leaves an engine does not leave it half closed."""
    begun, gate, ended = asyncio.Event(), asyncio.Event(), []  # type: ignore[var-annotated]
    engine = Engine(storage=MemoryStorage(), grace=30)
    await engine.__aenter__()
    waits.submit(begun, gate, ended)
    await begun.wait()
    work = asyncio.ensure_future(engine.aclose())
    await asyncio.sleep(0)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    gate.set()
    await engine.aclose()
    assert ended == ["finished"]
    assert engine._closing is None
    await engine.__aexit__(None, None, None)


async def test_an_engine_can_be_opened_while_it_closes() -> None:
    """Opening an engine that is closing waits for the close, and opens it anew."""
    begun, gate, ended = asyncio.Event(), asyncio.Event(), []  # type: ignore[var-annotated]
    engine = Engine(storage="memory://reopened", grace=30)
    async with engine:
        waits.submit(begun, gate, ended)
        await begun.wait()
        closing = asyncio.ensure_future(engine.aclose())
        await asyncio.sleep(0)
        opening = asyncio.ensure_future(engine.open())
        gate.set()
        await opening
        assert closing.done()
        assert await cached(1) == 1


async def test_a_failure_that_only_the_engine_owns_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """F2: a submitted run outside of a flow that fails is told in the log at once, and not kept for ever."""

    @task
    async def fails() -> None:
        raise ValueError("in the background")

    async with Engine(storage=MemoryStorage()) as engine:
        future = fails.submit()
        await future.wait()
        assert engine.failed == []
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    assert "in the background" in errors[0].getMessage()


async def test_an_engine_forgets_what_has_ended() -> None:
    """Runs that have ended, also those cancelled before their first step, are not kept by the engine."""
    async with Engine(storage=MemoryStorage()) as engine:
        future = where.submit()
        await future
        cancelled = where.submit()
        cancelled.cancel()
        await cancelled.wait()
        assert engine.running == set()


async def test_the_settings_of_the_engine_win() -> None:
    """An engine that was given settings does not read the environment's."""
    settings = Settings(worker_threads=3, grace=1.5)
    async with Engine(storage=MemoryStorage(), settings=settings) as engine:
        assert engine.settings is settings
        assert engine.grace == 1.5
    async with Engine(storage=MemoryStorage(), settings=settings, grace=7) as engine:
        assert engine.grace == 7
