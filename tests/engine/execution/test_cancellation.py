"""Cancellation: at whatever point it comes, nothing stays behind, and nobody mistakes it for something else."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from onceflow.engine import (
    INPUTS,
    Engine,
    Settings,
    State,
    StateType,
    as_completed,
    flow,
    tags,
    task,
    transaction,
    wait,
)
from onceflow.engine._execution import hooks as ending
from onceflow.engine._runs.observing import Seen
from onceflow.locking import Lease, MemoryLockManager
from onceflow.storage import MemoryStorage
from stepping import Moment, Stepped, stepped
from until import until

Scenario = Callable[["World"], Coroutine[Any, Any, Any]]


class RecordingLocks(MemoryLockManager):
    """A real lock manager that remembers which keys it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: set[str] = set()

    async def acquire(self, key: str, *args: Any, **kwargs: Any) -> Lease | None:
        self.keys.add(key)
        return await super().acquire(key, *args, **kwargs)


def others() -> list[asyncio.Task[Any]]:
    """The asyncio tasks that run beside this one, but for anyio's, which ends its processes with the loop."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    return [each for each in tasks if "process_pool" not in getattr(each.get_coro(), "__qualname__", "")]


class World:
    """An engine with a folder, locks and a tag limit, and what can be left behind in it."""

    def __init__(self, engine: Engine, folder: Path, locks: RecordingLocks) -> None:
        self.engine = engine
        self.folder = folder
        self.locks = locks
        self.policy = INPUTS
        self.exclusive = INPUTS.configure(isolation_level="SERIALIZABLE", lock_manager=locks)
        self._next = 0

    def fresh(self) -> int:
        """An input that no run has had yet."""
        self._next += 1
        return self._next

    async def assert_clean(self) -> None:
        """No asyncio task, run, slot, flight, lock or draft is left."""
        await until(lambda: not others(), seconds=10)
        assert not self.engine.runs
        assert not self.engine.running
        assert not self.engine.failed
        assert len(self.engine.flights) == 0
        slots = self.engine.limits.of_tag("one")
        assert (slots.free, len(slots)) == (1, 0)
        for key in self.locks.keys:
            assert not await self.locks.is_locked(key)
        self.locks.keys.clear()
        objects = await asyncio.to_thread(contents, self.folder)
        assert not [name for name in objects if name.startswith(".")]
        records = b"".join(objects[name] for name in objects if not name.startswith("chunk-"))
        assert not [name for name in objects if name.startswith("chunk-") and name.encode() not in records]


def contents(folder: Path) -> dict[str, bytes]:
    """The objects of a folder: drafts, records, and the chunks that records name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    settings = Settings(tag_limits={"one": 1})
    async with Engine(storage=tmp_path, settings=settings, worker_threads=8) as engine:
        yield World(engine, tmp_path, RecordingLocks())


# --- what is cancelled


async def plain(world: World) -> Any:
    @task
    async def work(x: int) -> int:
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return x

    return await work(world.fresh())


async def cached(world: World) -> Any:
    @task(cache_policy=world.policy)
    async def work(x: int) -> list[int]:
        await asyncio.sleep(0)
        return [x]

    x = world.fresh()
    await work(x)
    return await work(x)


async def large(world: World) -> Any:
    @task(cache_policy=world.policy)
    async def work(x: int) -> bytes:
        return bytes(300_000)

    x = world.fresh()
    await work(x)
    return await work(x)


async def serializable(world: World) -> Any:
    @task(cache_policy=world.exclusive)
    async def work(x: int) -> int:
        await asyncio.sleep(0)
        return x

    return await work(world.fresh())


async def waiting_for_the_key(world: World) -> Any:
    @task(cache_policy=world.exclusive)
    async def work(x: int) -> int:
        for _ in range(10):
            await asyncio.sleep(0)
        return x

    x = world.fresh()
    other = asyncio.ensure_future(work(x))
    third = asyncio.ensure_future(work(x))
    await asyncio.sleep(0)  # they come first
    try:
        return await work(x)
    finally:
        await asyncio.shield(asyncio.gather(other, third))


async def yielding(work: Coroutine[Any, Any, Any]) -> Any:
    await asyncio.sleep(0)
    return await work


async def taking_the_lead(world: World) -> Any:
    runs = 0

    @task(cache_policy=world.exclusive)
    async def work(x: int) -> int:
        nonlocal runs
        runs += 1
        await asyncio.sleep(0)
        if runs == 1:
            raise ValueError
        return x

    x = world.fresh()
    failing = asyncio.ensure_future(work.run_to_state(x))
    await asyncio.sleep(0)  # it comes first
    third = asyncio.ensure_future(yielding(work(x)))
    try:
        return await work(x)
    finally:
        await asyncio.shield(asyncio.gather(failing, third))


async def locked_elsewhere(world: World) -> Any:
    @task(cache_policy=world.exclusive)
    async def work(x: int) -> int:
        await asyncio.sleep(0)
        return x

    x = world.fresh()
    key = await work.cache_key(x)
    assert key is not None
    lease = await world.locks.acquire(key, "somebody")
    assert lease is not None
    asyncio.get_running_loop().call_later(0.001, lambda: asyncio.ensure_future(lease.release()))
    try:
        return await work(x)
    finally:
        await lease.release()


async def transactional(world: World) -> Any:
    @task(cache_policy=world.policy)
    async def work(x: int, y: int) -> int:
        await asyncio.sleep(0)
        return x

    x = world.fresh()
    async with transaction():
        await work(x, 1)
        async with transaction():
            await work(x, 2)
        await work(x, 1)


async def serializable_transaction(world: World) -> Any:
    @task(cache_policy=world.policy)
    async def work(x: int, y: int) -> int:
        await asyncio.sleep(0)
        return x

    x = world.fresh()
    async with transaction(isolation_level="SERIALIZABLE", lock_manager=world.locks):
        await work(x, 1)
        await asyncio.gather(work(x, 2), work(x, 2))


async def limited(world: World) -> Any:
    @task(tags=["one"], concurrency=2)
    async def work(x: int) -> int:
        await asyncio.sleep(0)
        return x

    other = asyncio.ensure_future(work(1))
    third = asyncio.ensure_future(work(2))
    await asyncio.sleep(0)  # they come first
    try:
        return await work(3)
    finally:
        await asyncio.shield(asyncio.gather(other, third))


async def limited_in_itself(world: World) -> Any:
    @task
    async def work(depth: int) -> int:
        await asyncio.sleep(0)
        return await work(depth - 1) if depth else 0

    with tags("one"):
        return await asyncio.gather(work(2), work(2))


async def rated(world: World) -> Any:
    @task(rate="1000/s", tags=["one"])
    async def work(x: int) -> int:
        await asyncio.sleep(0)
        return x

    await work(1)
    return await work(2)


async def in_a_thread(world: World) -> Any:
    @task
    async def inner(x: int) -> int:
        await asyncio.sleep(0)
        return x

    @task(tags=["one"])
    def work(x: int) -> int:
        return inner.run(x)

    return await work(1)


async def timed(world: World) -> Any:
    @task(timeout_seconds=60)
    async def inner(x: int) -> int:
        await asyncio.sleep(0)
        return x

    @task(timeout_seconds=60, tags=["one"])
    async def work(x: int) -> int:
        return await inner(x)

    return await work(1)


async def retried(world: World) -> Any:
    attempts = 0

    @task(retries=2, retry_delay_seconds=[0, 0.001], retry_condition_fn=condition, tags=["one"])
    async def work() -> int:
        nonlocal attempts
        attempts += 1
        await asyncio.sleep(0)
        if attempts < 3:
            raise ValueError
        return attempts

    return await work()


async def condition(*_: Any) -> bool:
    await asyncio.sleep(0)
    return True


async def hooked(world: World) -> Any:
    @task(on_running=[hook], on_completion=[hook], cache_policy=world.policy, on_commit=[hook])
    async def work(x: int) -> int:
        await asyncio.sleep(0)
        return x

    return await work(world.fresh())


async def hook(*_: Any) -> None:
    await asyncio.sleep(0)


async def nested(world: World) -> Any:
    @task(cache_policy=world.policy, tags=["one"])
    async def leaf(x: int) -> int:
        await asyncio.sleep(0)
        return x

    @task
    async def branch(x: int) -> int:
        return await leaf.submit(x)

    @flow
    async def inner(x: int) -> int:
        return sum(await branch.map([x, x]))

    @flow
    async def outer(x: int) -> Any:
        future = branch.submit(x)
        await inner(x)
        return await branch(future)  # type: ignore[arg-type]  # a future in place of its value

    return await outer(world.fresh())


async def generated(world: World) -> Any:
    @task(cache_policy=world.policy, tags=["one"])
    async def work(x: int) -> AsyncIterator[int]:
        for i in range(3):
            await asyncio.sleep(0)
            yield i

    x = world.fresh()
    await work(x)
    return await work(x)


async def generated_in_a_thread(world: World) -> Any:
    @task(cache_policy=world.policy, tags=["one"], timeout_seconds=60)
    def work(x: int) -> Iterator[int]:
        yield x
        yield x + 1

    return await work(world.fresh())


async def generated_in_a_transaction(world: World) -> Any:
    @task(cache_policy=world.policy)
    async def work(x: int, y: int) -> AsyncIterator[int]:
        yield x
        await asyncio.sleep(0)
        yield y

    x = world.fresh()
    async with transaction():
        await work(x, 1)
        async with transaction() as inner:
            await work(x, 2)
            inner.rollback()


async def generated_exclusively(world: World) -> Any:
    @task(cache_policy=world.exclusive, on_commit=[hook])
    async def work(x: int) -> AsyncIterator[int]:
        await asyncio.sleep(0)
        yield x

    x = world.fresh()
    return await asyncio.gather(work(x)._all(), work(x)._all())


async def submitted_in_a_transaction(world: World) -> Any:
    @task(cache_policy=world.policy, tags=["one"])
    async def work(x: int) -> int:
        await asyncio.sleep(0)
        return x

    x = world.fresh()
    async with transaction():
        first = work.submit(x)
        await work.map([first, x + 1_000_000])
        async for _ in work.stream([x + 2_000_000], ordered=False):
            work.submit(x + 3_000_000)


async def submitted_to_the_engine(world: World) -> Any:
    @task(tags=["one"])
    async def work(x: int) -> int:
        await asyncio.sleep(0)
        return x

    @flow
    async def background() -> int:
        return await work.submit(1)

    async with world.engine:
        future = world.engine.submit(background)
        try:
            values = [value async for value in work.stream([1, 2])]
            return values + await work.map([3, 4]) + [await future]
        finally:
            await asyncio.shield(future.wait())


async def waiting_for_futures(world: World) -> Any:
    @task
    async def work(x: int) -> int:
        await asyncio.sleep(0)
        return x

    @task
    async def numbers() -> list[int]:
        await asyncio.sleep(0)
        return [7, 8]

    @flow
    async def main() -> Any:
        futures = work.map([1, 2, 3])
        await futures[0].wait(60)
        await wait([work.submit(4), *futures])
        async for each in as_completed([work.submit(5), work.submit(6)], timeout=60):
            await each
        return await work.map(numbers.submit()).result(60)

    await main()


async def flow_of_all_kinds(world: World) -> Any:
    """A cached flow that is validated, named, retried and hooked, and whose first attempt leaves children behind."""
    attempts = 0

    @task(cache_policy=world.exclusive, retries=1, tags=["one"])
    async def child(x: int) -> int:
        await asyncio.sleep(0)
        if attempts == 1:
            raise ValueError
        return x

    @flow(
        cache_policy=world.policy, flow_run_name="all of {x}", retries=1, retry_delay_seconds=0.001,
        timeout_seconds=60, on_running=[hook], on_completion=[hook], on_cancellation=[hook],
    )  # fmt: skip
    async def main(x: int | str) -> int:
        nonlocal attempts
        attempts += 1
        child.submit(-1)
        return await child(int(x))

    return await main(world.fresh())


async def flow_in_a_thread(world: World) -> Any:
    @task(tags=["one"], cache_policy=world.policy)
    def work(x: int) -> int:
        return x

    @flow(log_prints=True)
    def main(x: int) -> int:
        futures = [work.submit(x), *work.map([x + 1_000_000])]
        return total.run(futures)

    @task
    async def total(values: Any) -> int:
        return sum(values)

    return await main(world.fresh())


async def in_a_process(world: World) -> Any:
    @task(runner="process", cache_policy=world.policy, tags=["one"], retries=1, timeout_seconds=60)
    def work(x: int) -> int:
        return x

    return await work(world.fresh())


async def streamed(world: World) -> Any:
    @task(tags=["one"])
    async def work(x: int) -> int:
        await asyncio.sleep(0)
        return x

    async def items() -> AsyncIterator[int]:
        for i in range(4):
            await asyncio.sleep(0)
            yield i

    @flow
    async def main() -> list[int]:
        return [value async for value in work.stream(items(), limit=2)]

    return await main()


SCENARIOS: list[Scenario] = [
    plain, cached, large, serializable, waiting_for_the_key, taking_the_lead, locked_elsewhere, transactional,
    serializable_transaction, limited, limited_in_itself, rated, in_a_thread, timed, retried, hooked, nested,
    generated, streamed, generated_in_a_thread, generated_in_a_transaction, generated_exclusively,
    submitted_in_a_transaction, submitted_to_the_engine, waiting_for_futures, flow_of_all_kinds, flow_in_a_thread,
]  # fmt: skip


@pytest.mark.parametrize("moment", ["asleep", "woken"])
@pytest.mark.parametrize(
    "scenario",
    [*SCENARIOS, pytest.param(in_a_process, marks=pytest.mark.chaos)],
    ids=lambda scenario: scenario.__name__,
)
async def test_cancelled_at_every_point_nothing_is_left_behind(
    world: World, scenario: Scenario, moment: Moment
) -> None:
    """Walk all suspension points of a run, cancel it at each: it ends as cancelled, and leaves nothing."""
    whole = Stepped(scenario(world))
    await asyncio.ensure_future(stepped(whole))
    await world.assert_clean()
    assert whole.count > 0
    at = 0
    while True:
        at += 1
        steps = Stepped(scenario(world), at, moment)
        work = asyncio.ensure_future(stepped(steps))
        async with asyncio.timeout(20):
            with world.engine.observe() as seen:
                await asyncio.wait([work])
        if not steps.was_cancelled:
            break  # it has fewer points than that
        assert work.cancelled(), f"cancelled at {at} of {whole.count}, it ended with {work}"
        if scenario is not taking_the_lead:  # whose first run fails
            assert_cancelled_properly(seen)
        await world.assert_clean()
    work.result()  # and the world still works
    assert at > whole.count // 2
    await world.assert_clean()


def assert_cancelled_properly(seen: Seen) -> None:
    """No run counts as timed out or failed; the retried scenario's failed attempts are no failed runs."""
    assert {outcome.state for outcome in seen.outcomes} <= {"Completed", "Cached", "Cancelled", "RolledBack"}


@pytest.mark.parametrize("seed", range(15))
async def test_a_crowd_of_runs_cancelled_at_random(world: World, seed: int) -> None:
    """Twenty runs of all kinds at once, half of them cancelled at random points: the others end, nothing is left."""
    random = Random(seed)
    crowd = []
    for _ in range(20):
        at = random.choice([None, random.randint(1, 30)])
        moment: Moment = random.choice(["asleep", "woken"])
        steps = Stepped(random.choice(SCENARIOS)(world), at, moment)
        crowd.append((steps, asyncio.ensure_future(stepped(steps))))
    async with asyncio.timeout(60):
        await asyncio.wait([work for _, work in crowd])
    for steps, work in crowd:
        assert work.cancelled() == steps.was_cancelled
        if not steps.was_cancelled:
            work.result()
    await world.assert_clean()


# --- how it looks


async def hang(entered: asyncio.Event) -> None:
    entered.set()
    await asyncio.Event().wait()


@pytest.mark.parametrize("how", ["cancel", "wait_for", "scope", "twice"])
async def test_the_state_says_cancelled(engine: Engine, how: str) -> None:
    """Whoever cancels, and however, the states of the run and its caller are Cancelled, never TimedOut."""
    import anyio

    states: list[State[Any]] = []
    entered = asyncio.Event()

    @task(timeout_seconds=60)
    async def work() -> None:
        await hang(entered)

    futures = []

    @flow(timeout_seconds=60, on_cancellation=[lambda flow, run, state: states.append(state)])
    async def main() -> None:
        futures.append(work.submit())
        await work()

    async def run() -> None:
        await main()

    if how == "scope":
        async with anyio.create_task_group() as group:
            group.start_soon(run)
            await entered.wait()
            group.cancel_scope.cancel()
    elif how == "wait_for":
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(main(), 0.05)
    else:
        running = asyncio.ensure_future(main())
        await entered.wait()
        running.cancel()
        if how == "twice":
            for _ in range(5):
                await asyncio.sleep(0)
                running.cancel()
        await asyncio.wait([running])
        assert running.cancelled()
    states += [future.state for future in futures]
    assert len(states) == 2
    assert {(state.name, state.type) for state in states} == {("Cancelled", StateType.CANCELLED)}


async def test_a_cancelled_flow_cancels_and_awaits_its_whole_tree(engine: Engine) -> None:
    """Children, their children, subflows and threads' calls have ended, cleaned up, when the cancelled flow has."""
    inside: set[str] = set()
    cleaned: set[str] = set()

    async def body(name: str) -> None:
        inside.add(name)
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.001)
            cleaned.add(name)

    @task
    async def leaf(name: str) -> None:
        await body(name)

    @task
    async def branch() -> None:
        leaf.submit("leaf of a branch")
        await leaf("called by a branch")

    @task
    def thread() -> None:
        leaf.run("called in a thread")

    @flow
    async def sub() -> None:
        leaf.submit("submitted in a subflow")
        await leaf("called in a subflow")

    @flow
    async def main() -> None:
        branch.submit()
        thread.submit()
        await asyncio.gather(sub(), leaf("called"))

    running = asyncio.ensure_future(main())
    await until(lambda: len(inside) == 6)
    running.cancel()
    await asyncio.wait([running])
    assert running.cancelled()
    assert cleaned >= inside - {"called in a thread"}
    await until(lambda: cleaned == inside)


async def test_limits_are_free_one_step_after_the_cancellation(world: World) -> None:
    """B4: a cancelled holder's slot and key are free when its body has ended, hooks still to come."""
    entered = asyncio.Event()
    go = asyncio.Event()

    @flow(on_cancellation=[lambda *_: go.wait()])
    async def main() -> None:
        @task(tags=["one"], cache_policy=world.exclusive)
        async def work(x: int) -> None:
            await hang(entered)

        await work(world.fresh())

    running = asyncio.ensure_future(main())
    await entered.wait()
    running.cancel()
    await until(lambda: world.engine.limits.of_tag("one").free == 1)
    await until(lambda: len(world.engine.flights) == 0)
    for key in world.locks.keys:
        assert not await world.locks.is_locked(key)
    assert not running.done()
    go.set()
    await asyncio.wait([running])


async def test_hooks_of_a_cancelled_flow_are_bounded(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A hook that never returns is broken off, with a warning, and the cancellation goes on."""
    monkeypatch.setattr(ending, "HOOK_SECONDS", 0.05)
    entered = asyncio.Event()

    @flow(on_cancellation=[lambda *_: asyncio.Event().wait()])
    async def main() -> None:
        await hang(entered)

    running = asyncio.ensure_future(main())
    await entered.wait()
    running.cancel()
    async with asyncio.timeout(10):
        await asyncio.wait([running])
    assert running.cancelled()
    assert "broken off after 0.05 s" in caplog.text


async def test_a_dropped_coroutine_calls_no_hooks(engine: Engine) -> None:
    """A run whose coroutine is thrown away mid-way has Crashed; it may not await hooks, and does not try to."""
    called: list[Any] = []

    async def hook(*args: Any) -> None:
        called.append(args)
        await asyncio.sleep(0)

    @flow(on_crashed=[hook])
    async def main() -> None:
        await asyncio.sleep(3600)

    coroutine = main()
    coroutine.send(None)
    coroutine.close()
    assert called == []
    assert not engine.runs


async def test_a_disconnected_request_leaves_others_alone(world: World) -> None:
    """One of two callers of the same SERIALIZABLE key is cancelled: the other runs the body if it must."""
    runs = 0
    entered = asyncio.Event()
    go = asyncio.Event()

    @task(cache_policy=world.exclusive)
    async def work(x: int) -> int:
        nonlocal runs
        runs += 1
        entered.set()
        await go.wait()
        return x

    x = world.fresh()
    first = asyncio.ensure_future(work(x))
    await entered.wait()
    second = asyncio.ensure_future(work(x))
    await asyncio.sleep(0)
    first.cancel()
    go.set()
    assert await second == x
    assert runs == 2
    await world.assert_clean()


async def test_a_completed_run_is_not_lost_by_a_late_cancellation(world: World) -> None:
    """Cancelled while its record is written, a run is not torn: the next call hits or runs."""

    @task(cache_policy=world.policy)
    async def work(x: int) -> bytes:
        return bytes(300_000)

    for at in range(1, 6):
        x = world.fresh()
        steps = Stepped(work.run_to_state(x), at)
        running = asyncio.ensure_future(stepped(steps))
        await asyncio.wait([running])
        assert await work(x) == bytes(300_000)
    await world.assert_clean()


# --- the loop keeps beating


async def test_a_heartbeat_goes_on(engine: Engine) -> None:
    """B23: while sync bodies, large values and 10 000 tasks run, a coroutine beats in every turn of the loop.

    Counted, not timed: between two beats at most one batch of ready callbacks runs, so no body holds the loop.
    """
    beats = 0
    turns = 0
    loop: Any = asyncio.get_running_loop()
    stop = asyncio.Event()
    gate = threading.Event()

    async def beat() -> None:
        nonlocal beats
        while not stop.is_set():
            beats += 1
            await asyncio.sleep(0)

    original = loop._run_once

    def counted() -> None:
        nonlocal turns
        turns += 1
        original()

    @task
    def blocks(x: int) -> int:
        gate.wait(10)
        return x

    @task(cache_policy=INPUTS, result_storage=MemoryStorage())
    async def large(x: int) -> bytes:
        return bytes(2_000_000)

    @task
    async def trivial(x: int) -> int:
        return x

    @flow
    async def main() -> None:
        blocked = blocks.map(range(10))
        await large.map(range(5))
        await trivial.map(range(10_000))
        before = beats
        await until(lambda: beats > before + 10)  # ten bodies block ten threads meanwhile
        gate.set()
        await blocked

    heart = asyncio.ensure_future(beat())
    await asyncio.sleep(0)
    loop._run_once = counted
    begun = beats
    try:
        await main()
    finally:
        del loop._run_once
    stop.set()
    await heart
    assert turns > 20
    assert abs((beats - begun) - turns) <= 2
