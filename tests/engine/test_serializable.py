"""SERIALIZABLE within one process, the same for every way to lock: one execution, and nobody is forgotten."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextvars import Context
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from onceflow.engine import (
    INPUTS,
    CommitError,
    ConfigurationError,
    DeadlockError,
    Engine,
    EngineClosedError,
    RunTimeoutError,
    Settings,
    flow,
    get_run_context,
    task,
    transaction,
)
from onceflow.locking import LockTimeoutError, MemoryLockManager, StorageLockManager
from onceflow.locking import _telling as telling
from onceflow.storage import MemoryStorage, StorageUnavailableError
from onceflow.storage._envelope import unpack_header
from redis_servers import RedisServer
from serial_ways import WAYS, Side, Way
from until import until

SERIAL = INPUTS.configure(isolation_level="SERIALIZABLE")
Logged = pytest.LogCaptureFixture


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """A server that all tests share, so nobody may kill it."""
    server = RedisServer()
    yield server
    server.kill()


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, tmp_path: Path) -> Way:
    """An empty place of each kind."""
    return WAYS[request.param](request, tmp_path)


@pytest.fixture
async def side(way: Way) -> AsyncIterator[Side]:
    """One engine on it; leaving must find every key free."""
    async with Side(way) as side:
        yield side
        assert len(side.engine.flights) == 0


class Counted:
    """Counts who is inside, and fails if there is ever more than one at a time for a key."""

    def __init__(self) -> None:
        self.runs: Counter[Any] = Counter()
        self.order: list[Any] = []
        self._inside: set[Any] = set()

    async def visit(self, key: Any, name: Any = None, seconds: float = 0.0) -> None:
        assert key not in self._inside, f"two are inside of {key!r}"
        self._inside.add(key)
        self.runs[key] += 1
        self.order.append(name)
        try:
            await asyncio.sleep(seconds)
        finally:
            self._inside.discard(key)


# --- one execution


async def test_three_gathered_runs(side: Side) -> None:
    """L15: three gathered runs of one task: all results are equal, the body ran once, and the key is free."""
    counted = Counted()

    @task(cache_policy=SERIAL)
    async def slow(x: int) -> list[int]:
        await counted.visit(x, seconds=0.01)
        return [x, counted.runs[x]]

    assert await asyncio.gather(*(slow(1) for _ in range(3))) == [[1, 1]] * 3
    assert await slow(1) == [1, 1]
    assert counted.runs == {1: 1}
    assert await side.is_free(str(await slow.cache_key(1)))


async def test_waiters_get_values_of_their_own(side: Side) -> None:
    """Every caller may change what it is given: nobody else sees it, neither waiters nor later hits."""
    counted = Counted()

    @task(cache_policy=SERIAL)
    async def make(x: int) -> dict[str, list[int]]:
        await counted.visit(x, seconds=0.01)
        return {"a": [1]}

    values = await asyncio.gather(*(make(1) for _ in range(4)))
    values.append(await make(1))
    for value in values:
        assert value == {"a": [1]}
        value["a"].append(2)
    assert await make(1) == {"a": [1]}
    assert counted.runs == {1: 1}


async def test_1000_keys(side: Side) -> None:
    """1 000 keys at once, each asked for three times: each runs once, and two of one key are never inside."""
    counted = Counted()
    count = 60 if side.way.kind == "claims_s3" else 200 if side.way.kind != "memory" else 1000

    @task(cache_policy=SERIAL)
    async def one(x: int) -> int:
        await counted.visit(x)
        return x

    wanted = [x % count for x in range(3 * count)]
    assert await asyncio.gather(*map(one, wanted)) == wanted
    assert set(counted.runs.values()) == {1}
    assert len(counted.runs) == count


async def test_two_engines(side: Side) -> None:
    """B7: two engines, each with a storage and a lock manager of its own, execute a key once between them."""
    counted = Counted()

    @task(cache_policy=SERIAL)
    async def one(x: int) -> int:
        await counted.visit(x, seconds=0.02)
        return x

    async def four() -> list[int]:
        return await asyncio.gather(*(one(x) for x in (1, 2, 1, 2)))

    async def in_other() -> list[int]:
        async with Side(side.way):
            return await four()

    async with side.engine:  # this test's task; `in_other` enters its own in a task of its own
        assert [*await asyncio.gather(asyncio.create_task(in_other()), four())] == [[1, 2, 1, 2]] * 2
    assert counted.runs == {1: 1, 2: 1}


async def test_first_come_first_served(side: Side) -> None:
    """B7: within a process those who wait for a key run in the order in which they came; here each one fails."""
    counted = Counted()

    @task(cache_policy=SERIAL - "name")
    async def failing(x: int, name: int) -> None:
        await counted.visit(x, name)
        raise ValueError(name)

    outcomes = await asyncio.gather(*(failing(1, name) for name in range(20)), return_exceptions=True)
    assert counted.order == list(range(20))
    assert [error.args for error in outcomes if isinstance(error, ValueError)] == [(n,) for n in range(20)]


# --- failures, timeouts, cancellation


@pytest.mark.parametrize("failures", [1, 7])
async def test_failures_in_a_row(side: Side, failures: int) -> None:
    """28: of ten runs the first k fail; each passes on to exactly the next; the rest is served by the first success."""
    counted = Counted()

    @task(cache_policy=SERIAL)
    async def moody(x: int) -> int:
        await counted.visit(x, seconds=0.001)
        if counted.runs[x] <= failures:
            raise ValueError(counted.runs[x])
        return counted.runs[x]

    outcomes = await asyncio.gather(*(moody(1) for _ in range(10)), return_exceptions=True)
    assert [str(outcome) for outcome in outcomes] == [str(min(n, failures + 1)) for n in range(1, 11)]
    assert counted.runs[1] == failures + 1


def _finishes(inside: asyncio.Event) -> Any:
    @task(cache_policy=SERIAL)
    async def end(how: str) -> str:
        inside.set()
        return how

    return end


def _fails(inside: asyncio.Event) -> Any:
    @task(cache_policy=SERIAL)
    async def end(how: str) -> str:
        inside.set()
        raise ValueError(how)

    return end


def _times_out(inside: asyncio.Event) -> Any:
    @task(cache_policy=SERIAL, timeout_seconds=0.01)
    async def end(how: str) -> str:
        inside.set()
        await asyncio.Event().wait()
        return how

    return end


def _sync(inside: asyncio.Event) -> Any:
    @task(cache_policy=SERIAL)
    def end(how: str) -> str:
        return how

    return end


@pytest.mark.parametrize("making", [_finishes, _fails, _times_out, _sync])
async def test_the_lock_is_free_when_the_run_has_ended(
    side: Side, making: Callable[[asyncio.Event], Any]
) -> None:
    """B4: when a run has ended, however, its key is free: not soon, but by then."""
    end = making(asyncio.Event())
    await end.run_to_state("so")
    assert await side.is_free(str(await end.cache_key("so")))


async def test_cancelled_holder(side: Side) -> None:
    """B4, 26: a holder that is cancelled frees the key before its cancellation goes on, and the next one runs."""
    inside, counted = asyncio.Event(), Counted()

    @task(cache_policy=SERIAL)
    async def stuck(x: int) -> int:
        inside.set()
        await counted.visit(x, seconds=60 if counted.runs[x] == 0 else 0)
        return x

    first = asyncio.create_task(stuck(1))
    await inside.wait()
    second = asyncio.create_task(stuck(1))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert await second == 1
    assert counted.runs[1] == 2
    assert await side.is_free(str(await stuck.cache_key(1)))


async def test_cancelled_at_every_point(side: Side) -> None:
    """30: cancelled at its n-th step, for every n: nothing stays held, and the record is there whole or not at all."""

    @task(cache_policy=SERIAL)
    async def short(x: int) -> int:
        await asyncio.sleep(0)
        return x

    for steps in range(40):
        running = asyncio.create_task(short(steps))
        for _ in range(steps):
            await asyncio.sleep(0)
        is_done = running.done()
        running.cancel()
        running.cancel()  # a second one cuts through what only shields against the first
        outcome = (await asyncio.gather(running, return_exceptions=True))[0]
        assert outcome == steps if is_done else isinstance(outcome, (int, asyncio.CancelledError))
        assert await side.is_free(str(await short.cache_key(steps)))
        assert await short(steps) == steps


async def test_random_cancellations(side: Side) -> None:
    """26, 27: 60 runs of 4 keys, a third of them cancelled at random moments: the others all end with the value."""
    chosen = random.Random(side.way.kind)
    counted = Counted()

    @task(cache_policy=SERIAL)
    async def one(x: int) -> int:
        await counted.visit(x, seconds=chosen.random() / 200)
        if chosen.random() < 0.5:
            raise ValueError("again")
        return x

    async def until_there(x: int) -> int:
        while True:
            try:
                return await one(x)
            except ValueError:
                pass

    runs = [asyncio.create_task(until_there(n % 4)) for n in range(60)]
    for run in chosen.sample(runs, 20):
        await asyncio.sleep(chosen.random() / 500)
        run.cancel()
    outcomes = await asyncio.gather(*runs, return_exceptions=True)
    for number, outcome in enumerate(outcomes):
        assert isinstance(outcome, asyncio.CancelledError) or outcome == number % 4
    assert sum(isinstance(outcome, int) for outcome in outcomes) >= 40
    for x in range(4):
        assert await side.is_free(str(await one.cache_key(x)))


# --- waiting


async def test_waiting_costs_nothing(side: Side) -> None:
    """B5, 21: 300 waiters use no thread and no request of their own, and other work goes on."""
    go, inside = asyncio.Event(), asyncio.Event()

    @task(cache_policy=SERIAL)
    async def gated(x: int) -> int:
        inside.set()
        await go.wait()
        return x

    leader = asyncio.create_task(gated(1))
    await inside.wait()
    threads = threading.active_count()
    waiters = [asyncio.create_task(gated(1)) for _ in range(300)]
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(next(iter(side.engine.flights._flights.values())).waiters) == 300
    assert threading.active_count() <= threads
    go.set()
    assert await asyncio.gather(leader, *waiters) == [1] * 301


async def test_a_wait_is_visible(side: Side) -> None:
    """B11: who waits is in the state Waiting, and its states tell afterwards that it did; the holder's do not."""
    go, inside = asyncio.Event(), asyncio.Event()

    @task(cache_policy=SERIAL)
    async def gated(x: int) -> int:
        inside.set()
        await go.wait()
        return x

    @flow
    async def both() -> None:
        first = gated.submit(1)
        await inside.wait()
        second = gated.submit(1)
        await until(lambda: second.state.name == "Waiting")
        go.set()
        await first, await second
        assert [state.name for state in first.run.states] == ["Pending", "Running", "Completed"]
        assert [state.name for state in second.run.states] == ["Pending", "Waiting", "Cached"]

    await both()


async def test_a_wait_for_another_process_is_visible(side: Side) -> None:
    """B11: the same where the holder is another engine, and the first in line waits for the lock manager."""
    go, inside = asyncio.Event(), asyncio.Event()

    @task(cache_policy=SERIAL)
    async def gated(x: int) -> int:
        inside.set()
        await go.wait()
        return x

    async def elsewhere() -> int:
        async with Side(side.way):
            return await gated(1)

    other = asyncio.create_task(elsewhere())
    await inside.wait()
    async with side.engine:
        mine = gated.submit(1)
        await until(lambda: mine.state.name == "Waiting")
        go.set()
        assert await mine == await other == 1
        assert [state.name for state in mine.run.states][-2:] == ["Waiting", "Cached"]


async def test_a_long_wait_is_told(way: Way, caplog: Logged, monkeypatch: pytest.MonkeyPatch) -> None:
    """B11: who waits for long for another process says so in the log, with the key and the name of its holder."""
    monkeypatch.setattr(telling, "TELL_AFTER", ((0.05, logging.WARNING),))
    go, inside = asyncio.Event(), asyncio.Event()

    @task(cache_policy=SERIAL)
    async def gated(x: int) -> int:
        inside.set()
        await go.wait()
        return x

    async def elsewhere() -> int:
        async with Side(way):
            return await gated(1)

    holder = asyncio.create_task(elsewhere())
    await inside.wait()
    async with Side(way):
        waiting = [asyncio.create_task(gated(1)) for _ in range(5)]
        await until(lambda: "has been waiting" in caplog.text)
        go.set()
        assert await asyncio.gather(holder, *waiting) == [1] * 6
    told = [record.message for record in caplog.records if "has been waiting" in record.message]
    assert len(told) == 1
    assert f"{await gated.cache_key(1)}" in told[0]
    assert "'gated-" in told[0].partition(": ")[2]


async def test_a_wait_is_not_work(side: Side) -> None:
    """B11: waiting is not counted against timeout_seconds, and holds no slot of a limit."""
    inside = asyncio.Event()

    @task(cache_policy=SERIAL, timeout_seconds=1.1, retries=1, concurrency=1)
    async def slow(x: int) -> int:
        inside.set()
        await asyncio.sleep(0.6)
        if get_run_context().run_count == 1 and x == 1:
            raise ValueError("again")
        return x

    runs = [asyncio.create_task(slow(1)) for _ in range(3)]  # 1.2 s, longer than one may run
    await inside.wait()
    assert await slow(2) == 2  # the one slot was free between the attempts, though two wait for key 1
    assert await asyncio.gather(*runs) == [1, 1, 1]
    with pytest.raises(RunTimeoutError):
        await slow.with_options(timeout_seconds=0.01)(3)


@pytest.mark.parametrize("where", ["policy", "settings"])
async def test_lock_timeout(way: Way, where: str) -> None:
    """B11: a wait has a timeout of its own, from the policy or the settings: the run fails, and the holder goes on."""
    go, inside = asyncio.Event(), asyncio.Event()
    policy = SERIAL.configure(lock_timeout=0.05) if where == "policy" else SERIAL
    settings = Settings() if where == "policy" else Settings(lock_timeout=0.05)

    @task(cache_policy=policy)
    async def gated(x: int) -> int:
        inside.set()
        await go.wait()
        return x

    async def elsewhere() -> int:
        async with Side(way, settings=settings):
            return await gated(1)

    holder = asyncio.create_task(elsewhere())
    await inside.wait()
    async with Side(way, settings=settings) as side:
        states = await asyncio.gather(*(gated.run_to_state(1) for _ in range(3)))
        for state in states:
            error = state.error()
            assert isinstance(error, LockTimeoutError)
            assert error.timeout == 0.05
            assert "gated-" in str(error.owner)
            assert f"{await gated.cache_key(1)}" in str(error)
        assert len(side.engine.flights) == 0
        go.set()
        assert await holder == 1
        assert await gated(1) == 1


async def test_lock_timeout_behind_the_own_process(side: Side) -> None:
    """B11: who waits in line behind a run of the same engine has the same timeout; that run goes on."""
    go, inside = asyncio.Event(), asyncio.Event()

    @task(cache_policy=SERIAL.configure(lock_timeout=0.05))
    async def gated(x: int) -> int:
        inside.set()
        await go.wait()
        return x

    holder = asyncio.create_task(gated(1))
    await inside.wait()
    async with asyncio.timeout(10):
        error = (await gated.run_to_state(1)).error()
    assert isinstance(error, LockTimeoutError)
    go.set()
    assert await holder == 1


async def test_lock_timeout_counts_the_whole_wait(side: Side) -> None:
    """lock_timeout is for all of a wait: in line behind others of this process, and then for the holder elsewhere."""
    inside, go = asyncio.Event(), asyncio.Event()

    @task(cache_policy=SERIAL.configure(lock_timeout=0.3))
    async def gated(x: int) -> int:
        inside.set()
        await go.wait()
        return x

    async def elsewhere() -> int:
        async with Side(side.way):
            return await gated(1)

    holder = asyncio.create_task(elsewhere())
    await inside.wait()
    loop = asyncio.get_running_loop()
    async with side.engine:
        first = asyncio.create_task(gated.run_to_state(1))
        await asyncio.sleep(0.15)
        began = loop.time()
        second = asyncio.create_task(gated.run_to_state(1))
        assert isinstance((await first).error(), LockTimeoutError)
        assert isinstance((await second).error(), LockTimeoutError)
    assert loop.time() - began < 0.6  # not 0.15 s in line and 0.3 s more as the first
    go.set()
    await holder


async def test_a_hit_takes_no_slot(side: Side) -> None:
    """B29: a hit, and a waiter that is served, do not wait for a limit that is used up."""
    go, inside = asyncio.Event(), asyncio.Event()

    @task(cache_policy=SERIAL, concurrency=1)
    async def limited(x: int) -> int:
        if x == 2:
            inside.set()
            await go.wait()
        return x

    await limited(1)
    busy = asyncio.create_task(limited(2))
    await inside.wait()
    async with asyncio.timeout(10):
        assert await limited(1) == 1
    go.set()
    assert await busy == 2


# --- what lies there


async def test_refresh(side: Side) -> None:
    """A refresh runs though there is a record, one at a time, and replaces it only when it succeeds."""
    counted = Counted()

    @task(cache_policy=SERIAL)
    async def one(x: int) -> list[int]:
        await counted.visit(x, seconds=0.005)
        if counted.runs[x] == 2:
            raise ValueError("not this time")
        return [counted.runs[x]]

    again = one.with_options(refresh_cache=True)
    assert await one(1) == [1]
    with pytest.raises(ValueError):
        await again(1)
    assert await one(1) == [1]
    assert sorted(await asyncio.gather(again(1), again(1), again(1))) == [[3], [4], [5]]
    assert await one(1) == [5]


async def test_a_refresh_is_read_past(side: Side) -> None:
    """Readers that are READ_COMMITTED see the old record while a SERIALIZABLE refresh is under way."""
    go, inside = asyncio.Event(), asyncio.Event()

    @task(cache_policy=SERIAL)
    async def one(x: int) -> str:
        if inside.is_set():
            return "new"
        return "old"

    @task(cache_policy=SERIAL, refresh_cache=True)
    async def gate(x: int) -> str:
        return ""

    assert await one(1) == "old"

    async def new(x: int) -> str:
        inside.set()
        await go.wait()
        return "new"

    again = task(cache_policy=SERIAL, refresh_cache=True)(new)
    relaxed = one.with_options(cache_policy=INPUTS.configure(isolation_level="READ_COMMITTED"))
    assert await again.cache_key(1) == await one.cache_key(1)
    refreshing = asyncio.create_task(again(1))
    await inside.wait()
    assert await relaxed(1) == "old"
    go.set()
    assert await refreshing == "new"
    assert await relaxed(1) == "new"


async def test_expired_records(side: Side) -> None:
    """An expired record is replaced by one execution, whoever asks at once; one that fails leaves no lock."""
    counted = Counted()

    @task(cache_policy=SERIAL, cache_expiration=timedelta(hours=1))
    async def one(x: int) -> int:
        await counted.visit(x, seconds=0.005)
        if counted.runs[x] == 2:
            raise ValueError("not this time")
        return counted.runs[x]

    assert await one(1) == 1
    later = side.engine.clock() + 7200
    side.engine.records._clock = side.engine.clock = lambda: later
    outcomes = await asyncio.gather(*(one(1) for _ in range(4)), return_exceptions=True)
    assert isinstance(outcomes[0], ValueError)
    assert outcomes[1:] == [3, 3, 3]
    assert await one(1) == 3
    assert await side.is_free(str(await one.cache_key(1)))


async def test_a_result_that_cannot_be_stored(side: Side, caplog: Logged) -> None:
    """R5: it is returned all the same with a warning; every waiter then runs for itself, one after the other."""
    counted = Counted()

    @task(cache_policy=SERIAL)
    async def locks(x: int) -> Any:
        await counted.visit(x, seconds=0.001)
        return threading.Lock()

    values = await asyncio.gather(*(locks(1) for _ in range(3)))
    assert len({id(value) for value in values}) == 3
    assert counted.runs[1] == 3
    assert caplog.text.count("could not be stored") == 3
    assert await side.is_free(str(await locks.cache_key(1)))


class Shy:
    """A value that cannot be unpickled the second time, and can otherwise; the first is before it is stored."""

    times = 0

    def __setstate__(self, state: object) -> None:
        Shy.times += 1
        if Shy.times == 2:
            raise ValueError("not now")

    def __getstate__(self) -> object:
        return "state"


async def test_a_waiter_that_cannot_read_what_it_is_served(caplog: Logged) -> None:
    """R5: it says so, and looks for itself when it is its turn; the others are served."""
    ran = 0

    @task(cache_policy=SERIAL, result_serializer="pickle")
    async def shy(x: int) -> Shy:
        nonlocal ran
        ran += 1
        await asyncio.sleep(0)
        return Shy()

    Shy.times = 0
    async with Engine(MemoryStorage(), MemoryLockManager()):
        values = await asyncio.gather(*(shy(1) for _ in range(3)))
    assert all(isinstance(value, Shy) for value in values)
    assert caplog.text.count("cannot be read") == 2  # once by the log, once by the error in it
    assert ran == 1


async def test_commit_hooks_hold_no_key(side: Side) -> None:
    """B8: the key of a run outside of any block is free when its record is committed, not after its hooks."""
    served = asyncio.Event()

    async def waits(txn: transaction) -> None:
        async with asyncio.timeout(10):
            await served.wait()

    @task(cache_policy=SERIAL, on_commit=[waits])
    async def one(x: int) -> int:
        await asyncio.sleep(0.001)
        return x

    first, second = asyncio.create_task(one(1)), asyncio.create_task(one(1))
    assert await second == 1
    assert await side.is_free(str(await one.cache_key(1)))
    served.set()
    assert await first == 1


async def test_two_engines_cannot_store_the_result(way: Way) -> None:
    """R5: where no holder's record can be written, the waiters of every process go on, one after the other."""
    counted = Counted()

    @task(cache_policy=SERIAL)
    async def locks(x: int) -> Any:
        await counted.visit(x, seconds=0.001)
        return threading.Lock()

    async def elsewhere() -> None:
        async with Side(way) as side:
            values = await asyncio.gather(*(locks(1) for _ in range(3)))
            assert len({id(value) for value in values}) == 3
            assert len(side.engine.flights) == 0

    async with asyncio.timeout(20):
        await asyncio.gather(elsewhere(), elsewhere())
    assert counted.runs[1] == 6


async def test_a_record_that_is_over_at_once(side: Side) -> None:
    """E5: who waits is not served by a record that has expired when it is written, but runs in its turn."""
    counted = Counted()

    @task(cache_policy=SERIAL, cache_expiration=timedelta(seconds=-1))
    async def brief(x: int) -> int:
        await counted.visit(x, seconds=0.001)
        return counted.runs[x]

    async def in_a_block() -> int:
        async with transaction():
            return await brief(2)

    assert await asyncio.gather(*(brief(1) for _ in range(3))) == [1, 2, 3]
    assert await asyncio.gather(*(in_a_block() for _ in range(3))) == [1, 2, 3]


async def test_a_large_record_is_refreshed(side: Side) -> None:
    """A record that is too large to be carried along by a claim is refreshed once, and kept until then."""
    counted = Counted()

    @task(cache_policy=SERIAL)
    async def large(x: int) -> bytes:
        await counted.visit(x, seconds=0.005)
        return bytes([counted.runs[x]]) * 300_000

    assert (await large(1))[:1] == b"\1"
    again = large.with_options(refresh_cache=True)
    assert sorted(value[0] for value in await asyncio.gather(again(1), again(1))) == [2, 3]
    assert (await large(1))[:1] == b"\3"
    assert await side.is_free(str(await large.cache_key(1)))


# --- trees, flows, transactions


async def test_two_tasks_of_one_flow(side: Side) -> None:
    """Two tasks with the same inputs share a key: the second gets the first's result; two flows may do so at once."""
    counted = Counted()

    @task(cache_policy=SERIAL)
    async def left(x: int) -> int:
        await counted.visit(x, seconds=0.005)
        return x

    right = left.with_options(name="right")

    @flow
    async def both(x: int) -> list[int]:
        return [*(await asyncio.gather(left(x), right(x))), await left(x)]

    assert [*await asyncio.gather(both(1), both(1))] == [[1, 1, 1]] * 2
    assert counted.runs == {1: 1}


async def test_the_own_tree(side: Side) -> None:
    """15: the same key again inside its own tree, also through other tasks, does not wait for itself."""

    @task(cache_policy=SERIAL)
    async def outer(x: int) -> int:
        if x > 0 and get_run_context().parent is None:
            return 1 + await between(x)
        return 10

    @task
    async def between(x: int) -> int:
        return await outer(x)

    async with asyncio.timeout(10):
        assert await outer(1) == 11
    assert await outer(1) == 11


async def test_the_same_key_of_another_storage(side: Side) -> None:
    """15: a run may call one whose record has the same key in another storage: its own lock is no obstacle."""
    other = MemoryStorage()

    @task(cache_policy=SERIAL, result_storage=other)
    async def inner(x: int) -> int:
        return x

    @task(cache_policy=SERIAL)
    async def outer(x: int) -> int:
        value = await inner(x) + 1
        assert side.way.claims or await side.locks.is_locked(
            str(await outer.cache_key(1))
        )  # it is still ours
        return value

    async with asyncio.timeout(10):
        assert await outer(1) == 2
    assert await inner.cache_key(1) == await outer.cache_key(1)
    assert await side.is_free(str(await outer.cache_key(1)))
    assert not await side.locks.is_locked(str(await outer.cache_key(1)))


async def test_the_same_key_of_another_lock_manager() -> None:
    """15: a lock is lent to a run below only by the lock manager that has granted it."""
    others = MemoryLockManager()
    policy = SERIAL.configure(lock_manager=others, lock_timeout=0.05)

    @task(cache_policy=policy, result_storage=MemoryStorage())
    async def inner(x: int) -> int:
        return x

    @task(cache_policy=SERIAL)
    async def outer(x: int) -> int:
        return await inner(x)

    async with Engine(MemoryStorage(), MemoryLockManager()):
        assert await others.acquire(str(await inner.cache_key(1)), "stranger")
        with pytest.raises(LockTimeoutError, match="stranger"):
            await outer(1)


async def test_the_lock_of_another_key_is_not_lent() -> None:
    """15: a run that holds one key waits for another one like everybody."""
    locks = MemoryLockManager()

    @task(cache_policy=SERIAL.configure(lock_timeout=0.05))
    async def inner(x: int) -> int:
        return x

    @task(cache_policy=SERIAL)
    async def outer(x: int) -> int:
        return await inner(x + 1)

    async with Engine(MemoryStorage(), locks):
        assert await locks.acquire(str(await inner.cache_key(2)), "stranger")
        with pytest.raises(LockTimeoutError, match="stranger"):
            await outer(1)


async def test_runs_of_one_name(side: Side) -> None:
    """B7: two runs that are called the same, in two engines of one process, are two holders all the same."""
    counted = Counted()

    @task(cache_policy=SERIAL, task_run_name="same")
    async def one(x: int) -> int:
        await counted.visit(x, seconds=0.02)
        raise ValueError

    async def in_other() -> None:
        async with Side(side.way):
            await one.run_to_state(1)

    async with side.engine:
        await asyncio.gather(_alone(in_other()), one.run_to_state(1))
    assert counted.runs == {1: 2}


async def test_a_release_that_fails(caplog: Logged) -> None:
    """41: a key that cannot be given back is a warning; the result is returned, and the next in line goes on."""

    class Stuck(MemoryLockManager):
        async def _release_lease(self, lease: Any) -> None:
            await super()._release_lease(lease)
            raise RuntimeError("no answer.")

    @task(cache_policy=SERIAL)
    async def one(x: int) -> int:
        await asyncio.sleep(0)
        return x

    async with Engine(MemoryStorage(), Stuck()):
        assert [*await asyncio.gather(one(1), one(1))] == [1, 1]
    assert "no answer. The key is free when its lease ends." in caplog.text


async def test_the_record_names_its_token(side: Side) -> None:
    """4: a record carries the token under which it was written, and tokens grow."""

    @task(cache_policy=SERIAL, refresh_cache=True)
    async def one(x: int) -> int:
        return x

    tokens = []
    for _ in range(3):
        await one(1)
        header, _ = unpack_header(await side.storage.read(str(await one.cache_key(1))))
        tokens.append(header.token or 0)
    assert 0 < tokens[0] < tokens[1] < tokens[2]


async def test_two_flows_in_opposite_order(side: Side) -> None:
    """15: two runs that each hold a key and want the other's: one is refused with the chain, the other goes on."""
    both = asyncio.Barrier(2)

    @task(cache_policy=SERIAL)
    async def outer(x: int) -> int:
        if get_run_context().parent is None or get_run_context().parent is get_run_context().flow_run:
            await both.wait()
            return await outer(1 - x)
        return x

    @flow
    async def run(x: int) -> int:
        return await outer(x)

    async with asyncio.timeout(10):
        outcomes = await asyncio.gather(run(0), run(1), return_exceptions=True)
    refused = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert len(refused) == 1
    assert isinstance(refused[0], DeadlockError)
    assert len(refused[0].chain) == 3
    assert any("waits for" in link for link in refused[0].chain)


async def test_a_transaction_keeps_its_keys(side: Side) -> None:
    """The keys of a SERIALIZABLE block are held until its outcome: others wait, and then are served by its records."""
    counted = Counted()
    go, staged = asyncio.Event(), asyncio.Event()

    @task(cache_policy=SERIAL)
    async def one(x: int) -> list[int]:
        await counted.visit(x)
        return [x]

    async def block() -> None:
        async with transaction():
            assert [*await asyncio.gather(one(1), one(1))] == [[1], [1]]
            assert await one(2) == [2]
            staged.set()
            await go.wait()

    held = asyncio.create_task(block())
    await staged.wait()
    outside = asyncio.create_task(one(1))
    await until(lambda: any(flight.waiters for flight in side.engine.flights._flights.values()))
    go.set()
    await held
    assert await outside == [1]
    assert counted.runs == {1: 1, 2: 1}
    for x in (1, 2):
        assert await side.is_free(str(await one.cache_key(x)))


async def test_a_transaction_that_rolls_back(side: Side) -> None:
    """B8: after a roll-back no key is held, neither of a miss nor of a hit, and the next one runs."""
    counted = Counted()

    @task(cache_policy=SERIAL)
    async def one(x: int) -> int:
        await counted.visit(x)
        return x

    assert await one(1) == 1

    async def block() -> None:
        async with transaction(isolation_level="SERIALIZABLE"):
            await one(1)
            await one(2)
            raise KeyError

    with pytest.raises(KeyError):
        await block()
    for x in (1, 2):
        assert await side.is_free(str(await one.cache_key(x)))
        assert await one(x) == x
    assert counted.runs == {1: 1, 2: 2}


async def test_a_block_keeps_no_key_of_what_it_cannot_store(side: Side) -> None:
    """R5, B8: where a value cannot be staged the block is broken, and its key another's, though it is still open."""

    @task(cache_policy=SERIAL)
    async def locks(x: int) -> Any:
        await asyncio.sleep(0)
        return threading.Lock()

    async def outside() -> None:
        async with side.engine, asyncio.timeout(10):
            await locks(1)

    async def block() -> None:
        async with side.engine, transaction():
            await locks(1)
            await _alone(outside())

    with pytest.raises(CommitError):
        await _alone(block())


async def test_blocks_side_by_side_in_one_block(side: Side) -> None:
    """Two inner blocks that want one key: the second is served when the first has joined the outer one."""
    counted = Counted()

    @task(cache_policy=SERIAL)
    async def one(x: int) -> list[int]:
        await counted.visit(x, seconds=0.01)
        return [x]

    async def inner(seconds: float) -> None:
        await asyncio.sleep(seconds)
        async with transaction():
            assert await one(1) == [1]
            await asyncio.sleep(0.03)

    async with asyncio.timeout(10), transaction():
        await asyncio.gather(inner(0), inner(0), inner(0.02))
    assert counted.runs == {1: 1}
    assert await one(1) == [1]


async def test_refreshed_twice_in_a_block(side: Side) -> None:
    """What a block refreshes twice is committed as it was last, though the block holds the key already."""
    counted = Counted()

    @task(cache_policy=SERIAL, refresh_cache=True)
    async def one(x: int) -> int:
        await counted.visit(x)
        return counted.runs[x]

    async with transaction():
        assert await one(1) == 1
        assert await one(1) == 2
    assert await one.with_options(refresh_cache=False)(1) == 2


async def test_a_keyed_transaction_waits_for_another_process(way: Way) -> None:
    """4: a keyed block looks again when it has the key: what another has committed is there, and no key is held."""
    inside, go = asyncio.Event(), asyncio.Event()

    async def elsewhere() -> None:
        async with Side(way), transaction(key="own", isolation_level="SERIALIZABLE") as txn:
            inside.set()
            await go.wait()
            txn.stage("theirs")

    other = _alone(elsewhere())
    await inside.wait()
    async with Side(way) as side:
        with pytest.raises(LockTimeoutError):
            async with transaction(key="own", isolation_level="SERIALIZABLE", lock_timeout=0.05):
                pass
        asyncio.get_running_loop().call_later(0.02, go.set)
        async with transaction(key="own", isolation_level="SERIALIZABLE") as txn:
            assert txn.is_committed()
            assert await txn.read() == "theirs"
            assert len(side.engine.flights) == 0
            assert not await side.locks.is_locked("own")
        await other
        assert await side.locks.acquire("own", "stranger")
        async with (
            asyncio.timeout(10),
            transaction(key="own", isolation_level="SERIALIZABLE") as txn,
        ):
            assert txn.is_committed()  # a hit takes no lock
        await side.locks.release("own", "stranger")


async def test_a_keyed_transaction_that_is_cancelled(side: Side) -> None:
    """30: a keyed block that is cancelled while it opens holds nothing, at whatever step that was."""

    async def block() -> None:
        async with transaction(key="own", isolation_level="SERIALIZABLE") as txn:
            txn.stage(1)
            raise KeyError

    for steps in range(12):
        running = asyncio.create_task(block())
        for _ in range(steps):
            await asyncio.sleep(0)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert len(side.engine.flights) == 0
        assert not await side.locks.is_locked("own")


def _alone(work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """As a process of its own would do it: with nothing of what is entered or open here."""
    return asyncio.create_task(work, context=Context())


@pytest.mark.parametrize("inner", [True, False])
async def test_a_keyed_block_commits_on_what_it_saw(way: Way, inner: bool) -> None:
    """6: the record of a keyed block never covers one that was written meanwhile, whoever staged it in the block."""

    @task(cache_key_fn=lambda context, parameters: "own")
    async def one(value: str) -> str:
        return value

    async def elsewhere() -> None:
        async with Side(way):
            await one("theirs")  # READ_COMMITTED: it asks for no lock

    async def block() -> None:
        async with transaction(key="own", isolation_level="SERIALIZABLE") as txn:
            if inner:
                assert await one("mine") == "mine"
            else:
                txn.stage("mine")
            await _alone(elsewhere())

    async with Side(way) as side:
        with pytest.raises(CommitError, match="'own'"):
            await block()
        assert await one("again") == "theirs"
        assert not await side.locks.is_locked("own")


@pytest.mark.parametrize("inner", [True, False])
async def test_a_keyed_block_that_replaces_its_own_work(inner: bool) -> None:
    """6: what a block itself, or an independent one inside, has written or removed under its key is no stranger's."""

    @task(cache_key_fn=lambda context, parameters: "own", refresh_cache=True)
    async def one(value: str) -> str:
        return value

    async def again(txn: transaction, value: str) -> None:
        if inner:
            await one(value)
        else:
            txn.stage(value)

    async with Engine(MemoryStorage(), MemoryLockManager()):
        await one("first")
        async with transaction(key="own", isolation_level="SERIALIZABLE", overwrite=True) as txn:
            await one.invalidate("")
            await again(txn, "second")
        assert await one.with_options(refresh_cache=False)("") == "second"
        async with transaction(key="own", isolation_level="SERIALIZABLE", overwrite=True) as txn:
            async with transaction(independent=True):
                await one("third")
            await again(txn, "fourth")
        assert await one.with_options(refresh_cache=False)("") == "fourth"


# --- configuration, loops, the end


async def test_no_lock_manager(tmp_path: Path) -> None:
    """87: SERIALIZABLE without a lock manager is a configuration error that says where to name one."""

    @task(cache_policy=SERIAL)
    async def one(x: int) -> int:
        return x

    async with Engine(tmp_path):
        with pytest.raises(ConfigurationError, match=r"no lock manager.*ONCEFLOW_LOCKS"):
            await one(1)


async def test_the_nearest_lock_manager() -> None:
    """The lock manager is the policy's, else the transaction's, else the engine's."""
    managers = [MemoryLockManager(name) for name in ("policy", "block", "engine")]
    used: list[str] = []

    @task
    async def one(x: int) -> None:
        await asyncio.sleep(0)

    class Named(MemoryLockManager):
        async def acquire(self, *args: Any, **kwargs: Any) -> Any:
            used.append(self.name)
            return await super().acquire(*args, **kwargs)

    named = [Named(manager.name) for manager in managers]
    async with Engine(MemoryStorage(), named[2]):
        plain = one.with_options(cache_policy=SERIAL)
        await one.with_options(cache_policy=SERIAL.configure(lock_manager=named[0]))(1)
        async with transaction(lock_manager=named[1]):
            await plain(2)
        async with transaction(isolation_level="SERIALIZABLE", lock_manager=named[1]):
            await one.with_options(cache_policy=INPUTS)(3)
        await plain(4)
        async with transaction(lock_manager=named[1]):
            await one.with_options(cache_policy=SERIAL.configure(lock_manager=named[0]))(5)
    assert used == ["policy", "block", "block", "engine", "policy"]


@pytest.mark.parametrize("ends", ["commit", "roll back", "cancel"])
async def test_keys_are_freed_in_order(ends: str) -> None:
    """B8: a block frees its keys in the order in which it took them, each once, however it ends."""
    freed: list[str] = []

    class Noting(MemoryLockManager):
        async def _release_lease(self, lease: Any) -> None:
            freed.append(lease.key)
            await super()._release_lease(lease)

    @task(cache_policy=SERIAL)
    async def one(x: int) -> int:
        return x

    async with Engine(MemoryStorage(), Noting()):
        inside = asyncio.Event()

        async def block() -> None:
            async with transaction():
                async with transaction():
                    await one(1)
                    await one(2)
                await one(3)
                if ends == "roll back":
                    raise KeyError
                if ends == "cancel":
                    inside.set()
                    await asyncio.Event().wait()

        running = asyncio.create_task(block())
        if ends == "cancel":
            await inside.wait()
            running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert freed == [await one.cache_key(x) for x in (1, 2, 3)]


async def test_a_read_that_fails(caplog: Logged) -> None:
    """B8: where the record cannot be read, the run fails or goes on, but no lock remains."""

    class Broken(MemoryStorage):
        async def fetch(self, *args: Any, **kwargs: Any) -> Any:
            raise StorageUnavailableError("read", "key", self.url, "gone", "Wait.")

    @task(cache_policy=SERIAL)
    async def one(x: int) -> int:
        return x

    for locks in (MemoryLockManager(), None):
        storage = Broken()
        manager = locks or StorageLockManager(storage)
        async with Engine(storage, manager) as engine:
            await asyncio.gather(*(one.run_to_state(1) for _ in range(3)))
            assert len(engine.flights) == 0
            if locks is not None:
                assert not await locks.is_locked(str(await one.cache_key(1)))


def test_asyncio_run_twice(way: Way) -> None:
    """90: two loops one after the other, each with the same engine object: the second finds the first's record."""
    side = Side(way)
    ran: list[int] = []

    @task(cache_policy=SERIAL)
    async def one(x: int) -> int:
        ran.append(x)
        return x

    async def main() -> None:
        async with side.engine:
            assert [*await asyncio.gather(one(1), one(1))] == [1, 1]

    async def last() -> None:
        async with side:
            assert await one(1) == 1

    asyncio.run(main())
    asyncio.run(main())
    asyncio.run(last())
    assert ran == [1]


async def test_two_loops_in_two_threads(way: Way) -> None:
    """90, B7: four loops in four threads, an engine in each: of one key never two are inside, and it runs once."""
    ran: list[int] = []
    ready = threading.Barrier(4)

    @task(cache_policy=SERIAL)
    async def one(x: int) -> int:
        ran.append(x)
        await asyncio.sleep(0.005)
        return x

    async def main() -> None:
        async with Side(way):
            await asyncio.to_thread(ready.wait)
            wanted = [x for x in range(5) for _ in range(3)]
            assert await asyncio.gather(*map(one, wanted)) == wanted

    async def in_thread() -> None:
        await asyncio.to_thread(asyncio.run, main())

    await asyncio.gather(*(in_thread() for _ in range(4)))
    assert sorted(ran) == [0, 1, 2, 3, 4]


async def test_closing_with_a_holder_and_waiters(way: Way) -> None:
    """Closing an engine ends its runs and frees what they hold; a new engine can have it at once."""
    inside = asyncio.Event()

    @task(cache_policy=SERIAL)
    async def stuck(x: int) -> int:
        inside.set()
        await asyncio.Event().wait()
        return x

    side = Side(way, grace=0.0)
    async with side:
        futures = [stuck.submit(1) for _ in range(3)]
        await inside.wait()
    for future in futures:
        assert future.state.is_final()
    async with Side(way) as other:
        assert await other.is_free(str(await stuck.cache_key(1)))
        with pytest.raises((EngineClosedError, asyncio.CancelledError, RuntimeError)):
            await futures[0]


async def test_no_waiter_is_kept(side: Side) -> None:
    """Nothing of the waiters of a key stays in the engine when it is done."""

    @task(cache_policy=SERIAL)
    async def one(x: int) -> int:
        await asyncio.sleep(0.001)
        return x

    await asyncio.gather(*(one(x % 7) for x in range(100)))
    gc.collect()
    assert len(side.engine.flights) == 0
    assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]


async def test_what_the_log_says(side: Side, caplog: Logged) -> None:
    """A run that was served says by whose record, once and in whole sentences, whoever read it first."""
    caplog.set_level(logging.INFO, "onceflow")

    @task(cache_policy=SERIAL)
    async def one(x: int) -> int:
        await asyncio.sleep(0.001)
        return x

    await asyncio.gather(*(one(1) for _ in range(3)))
    await asyncio.gather(*(one(1) for _ in range(3)))
    lines = [
        record.getMessage() for record in caplog.records if "cached: written by run" in record.getMessage()
    ]
    assert len(lines) == 5
    writers = {line.partition("written by run ")[2].split()[0] for line in lines}
    assert len(writers) == 1
    assert all(line.count("written by run") == 1 for line in lines)
