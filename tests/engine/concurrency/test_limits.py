"""Limits: how many bodies run at once, how often they begin, and who gets a slot next."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from onceflow.engine import INPUTS, Engine, Settings, StateType, flow, tags, task
from onceflow.engine._concurrency.limits import Limits, Slots
from onceflow.engine._errors import ConfigurationError
from until import until


class Bodies:
    """Bodies that count themselves, and end when they are told to."""

    def __init__(self) -> None:
        self.inside = 0
        self.most = 0
        self.order: list[Any] = []
        self.go = asyncio.Event()

    async def enter(self, name: Any) -> Any:
        self.order.append(name)
        self.inside += 1
        self.most = max(self.most, self.inside)
        try:
            await self.go.wait()
        finally:
            self.inside -= 1
        return name


def timers() -> int:
    """How many timers wait on this loop."""
    loop: Any = asyncio.get_running_loop()
    return sum(not timer.cancelled() for timer in loop._scheduled)


@pytest.fixture
async def limited(tmp_path: Path) -> AsyncIterator[Engine]:
    """An engine with one slot for `one` and two for `two`."""
    async with Engine(storage=tmp_path, settings=Settings(tag_limits={"one": 1, "two": 2})) as engine:
        yield engine


# --- N1: at most n at once


@pytest.mark.parametrize("size", [1, 2, 5])
async def test_at_most_n_bodies_of_a_task_run_at_once(engine: Engine, size: int) -> None:
    """N1: with `concurrency=n`, n of many bodies run, the others wait and start in the order of their calls."""
    bodies = Bodies()

    @task(concurrency=size)
    async def work(x: int) -> Any:
        return await bodies.enter(x)

    @flow
    async def main() -> list[Any]:
        futures = work.map(range(20))
        await until(lambda: bodies.inside == size)
        bodies.go.set()
        return await futures

    assert await main() == list(range(20))
    assert bodies.most == size
    assert bodies.order == list(range(20))


async def test_tag_limits_hold_over_tasks(limited: Engine) -> None:
    """N1: a tag limit of the settings counts the bodies of all tasks that carry the tag, by task or by context."""
    bodies = Bodies()

    @task(tags=["two"])
    async def first(x: int) -> Any:
        return await bodies.enter(x)

    @task
    async def second(x: int) -> Any:
        return await bodies.enter(x)

    @flow
    async def main() -> None:
        futures = [*first.map(range(5))]
        with tags("two"):
            futures += second.map(range(5))
        await until(lambda: bodies.inside == 2)
        bodies.go.set()
        await asyncio.gather(*futures)

    await main()
    assert bodies.most == 2


async def test_several_limits_apply_together(limited: Engine) -> None:
    """N1: a run passes its task's limit and those of all its tags, and holds them together."""
    bodies = Bodies()

    @task(concurrency=5, tags=["two", "one"])
    async def work(x: int) -> Any:
        return await bodies.enter(x)

    @flow
    async def main() -> None:
        futures = work.map(range(6))
        await until(lambda: bodies.inside == 1)
        bodies.go.set()
        await futures

    await main()
    assert bodies.most == 1
    assert (limited.limits.of_tag("one").free, limited.limits.of_tag("two").free) == (1, 2)


async def test_copies_of_a_task_share_its_limit(engine: Engine) -> None:
    """N1: `with_options` copies and methods of several instances count together, since they are one function."""
    bodies = Bodies()

    class Service:
        @task(concurrency=1)
        async def work(self, x: int) -> Any:
            return await bodies.enter(x)

    @flow
    async def main() -> None:
        a, b = Service(), Service()
        futures = [a.work.submit(1), b.work.submit(2), a.work.with_options(name="other").submit(3)]
        await until(lambda: bodies.inside == 1)
        bodies.go.set()
        await asyncio.gather(*futures)

    await main()
    assert bodies.most == 1


async def _succeed() -> None:
    pass


async def _fail() -> None:
    raise ValueError("no")


async def _hang() -> None:
    await asyncio.Event().wait()


async def _crash() -> None:
    raise BaseExceptionGroup("crash", [SystemError()])


@pytest.mark.parametrize("body", [_succeed, _fail, _hang, _crash], ids=lambda body: body.__name__)
async def test_a_slot_is_free_when_the_body_has_ended(
    limited: Engine, body: Callable[[], Awaitable[None]]
) -> None:
    """N1: success, failure, timeout and crash give the slot back before the call returns."""

    @task(tags=["one"], timeout_seconds=0.01, retries=1)
    async def work() -> None:
        await body()

    try:
        await work()
    except Exception:
        assert body is not _succeed
    assert limited.limits.of_tag("one").free == 1


async def test_a_cancelled_run_gives_its_slot_to_the_next_at_once(limited: Engine) -> None:
    """N1: one scheduling step after a holder was cancelled the next one in line runs."""
    bodies = Bodies()

    @task(tags=["one"])
    async def work(x: int) -> Any:
        return await bodies.enter(x)

    @flow
    async def main() -> None:
        first, second = work.submit(1), work.submit(2)
        await until(lambda: bodies.order == [1])
        first.cancel()
        await asyncio.sleep(0)  # the body is cancelled, and gives its slot to the second's future
        await asyncio.sleep(0)  # which wakes the second
        assert bodies.order == [1, 2]
        bodies.go.set()
        await second

    await main()
    assert limited.limits.of_tag("one").free == 1


async def test_a_sync_body_gives_its_slot_back_when_it_is_abandoned(limited: Engine) -> None:
    """N1: the slot of a synchronous body that outlives its timeout is free at once."""
    import threading

    gate = threading.Event()

    @task(tags=["one"], timeout_seconds=0.01)
    def work() -> None:
        gate.wait(10)

    try:
        state = await work.run_to_state()
        assert state.name == "TimedOut"
        assert limited.limits.of_tag("one").free == 1
    finally:
        gate.set()


# --- waiting in line


async def test_who_is_cancelled_in_line_leaves_it(limited: Engine) -> None:
    """N1: a run that is cancelled while it waits never runs, and the others move up."""
    bodies = Bodies()

    @task(tags=["one"])
    async def work(x: int) -> Any:
        return await bodies.enter(x)

    @flow
    async def main() -> None:
        futures = work.map(range(4))
        await until(lambda: bodies.order == [0])
        futures[1].cancel()
        futures[2].cancel()
        await futures[2].wait()
        bodies.go.set()
        assert await futures[3] == 3
        assert futures[1].state.type is StateType.CANCELLED

    await main()
    assert bodies.order == [0, 3]
    assert limited.limits.of_tag("one").free == 1
    assert len(limited.limits.of_tag("one")) == 0


async def test_a_slot_given_to_a_cancelled_run_is_handed_on(limited: Engine) -> None:
    """N1: a run that is cancelled in the very step in which it is given a slot hands it on."""
    bodies = Bodies()
    gates = [asyncio.Event() for _ in range(3)]

    @task(tags=["one"])
    async def work(x: int) -> None:
        bodies.order.append(x)
        await gates[x].wait()

    @flow
    async def main() -> None:
        futures = work.map(range(3))
        await until(lambda: len(limited.limits.of_tag("one")) == 2)
        slots = limited.limits.of_tag("one")
        gates[0].set()
        await until(lambda: len(slots) == 1)  # the second has been given the slot, and has not run yet
        futures[1].cancel()
        gates[2].set()
        await futures[2]

    await main()
    assert bodies.order in ([0, 2], [0, 1, 2])
    assert limited.limits.of_tag("one").free == 1


async def test_slots_pass_on_at_the_step_of_the_gift() -> None:
    """N1: given and cancelled at once, without any step in between, a slot still arrives at the next in line."""
    from onceflow.engine._concurrency.limits import _enter

    slots = Slots(1)
    assert await _enter([slots]) is slots
    waiters = [asyncio.ensure_future(_enter([slots])) for _ in range(3)]
    await asyncio.sleep(0)
    slots.leave()
    waiters[0].cancel()
    assert await waiters[1] is slots
    assert waiters[0].cancelled()
    waiters[2].cancel()
    await asyncio.wait([waiters[2]])
    slots.leave()
    assert (slots.free, len(slots)) == (1, 0)


async def test_ten_thousand_wait_without_a_timer(engine: Engine) -> None:
    """N1: waiting runs are suspended on one future each: nothing polls, and no thread starts."""
    import threading

    bodies = Bodies()

    @task(concurrency=1)
    async def work(x: int) -> Any:
        return await bodies.enter(x)

    @flow
    async def main() -> None:
        threads = threading.active_count()
        futures = work.map(range(10_000))
        await until(lambda: bodies.inside == 1)
        loop: Any = asyncio.get_running_loop()
        assert timers() == 0
        assert len(loop._ready) == 0
        assert threading.active_count() == threads
        bodies.go.set()
        await futures

    await main()
    assert bodies.most == 1


async def test_a_waiting_run_says_pending_and_its_timeout_does_not_run(limited: Engine) -> None:
    """B11: time in line counts neither as running nor against the timeout."""
    bodies = Bodies()

    @task(tags=["one"])
    async def holder() -> Any:
        return await bodies.enter("holder")

    @task(tags=["one"], timeout_seconds=0.01)
    async def quick() -> str:
        return "in time"

    @flow
    async def main() -> str:
        first = holder.submit()
        await until(lambda: bodies.inside == 1)
        second = quick.submit()
        await asyncio.sleep(0.05)
        assert second.state.name == "Pending"
        bodies.go.set()
        await first
        return await second

    assert await main() == "in time"


async def test_retry_delays_hold_no_slot(limited: Engine) -> None:
    """N1: between two attempts a run has no slot, so another one may go in between."""
    order: list[str] = []

    @task(tags=["one"], retries=1, retry_delay_seconds=0.05)
    async def twice() -> None:
        order.append("twice")
        if len(order) == 1:
            raise ValueError("once more")

    @task(tags=["one"])
    async def other() -> None:
        order.append("other")

    @flow
    async def main() -> None:
        futures = [twice.submit(), other.submit()]
        await asyncio.gather(*futures)

    await main()
    assert order == ["twice", "other", "twice"]


# --- runs inside of runs


@pytest.mark.parametrize("way", ["call", "submit"])
async def test_a_body_lends_its_slot_to_what_it_waits_for(limited: Engine, way: str) -> None:
    """N1: a run inside of one that holds the only slot of their tag gets it on loan, instead of a deadlock."""
    inside = 0
    most = 0

    @task
    async def inner(depth: int) -> int:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        await asyncio.sleep(0)
        inside -= 1
        if depth == 0:
            return 0
        return await inner(depth - 1) + 1

    @task
    async def outer() -> list[int]:
        if way == "submit":
            return list(await inner.map([2, 2, 2]))
        return list(await asyncio.gather(*[inner(2) for _ in range(3)]))

    @flow
    async def main() -> Any:
        with tags("one"):
            return await asyncio.gather(outer.submit(), outer.submit())

    async with asyncio.timeout(10):
        assert await main() == [[2, 2, 2], [2, 2, 2]]
    assert most == 1
    assert limited.limits.of_tag("one").free == 1


async def test_a_loan_outlives_the_lender(limited: Engine) -> None:
    """N1: a run that goes on after its caller has ended keeps the caller's slot, so there are never n + 1."""
    bodies = Bodies()

    @task(tags=["one"])
    async def inner() -> Any:
        return await bodies.enter("inner")

    @task(tags=["one"])
    async def outer() -> None:
        inner.submit()
        await until(lambda: bodies.inside == 1)

    @task(tags=["one"])
    async def later() -> Any:
        return await bodies.enter("later")

    @flow
    async def main() -> None:
        await outer()
        future = later.submit()
        await asyncio.sleep(0.01)
        assert bodies.order == ["inner"]
        bodies.go.set()
        await future

    await main()
    assert bodies.most == 1
    assert limited.limits.of_tag("one").free == 1


async def test_a_recursive_task_with_one_slot_ends(engine: Engine) -> None:
    """N1: a task that calls itself under its own limit of one does not wait for itself."""

    @task(concurrency=1)
    async def fibonacci(n: int) -> int:
        if n < 2:
            return n
        return sum(await asyncio.gather(fibonacci(n - 1), fibonacci(n - 2)))

    async with asyncio.timeout(10):
        assert await fibonacci(7) == 13


# --- hits and no limits


async def test_a_hit_takes_no_slot(limited: Engine) -> None:
    """B29: a hit is served although every slot of its task and tag is taken."""
    bodies = Bodies()

    @task(tags=["one"], concurrency=1, rate="1/h", cache_policy=INPUTS)
    async def work(x: int) -> int:
        return x

    @task(tags=["one"])
    async def holder() -> Any:
        return await bodies.enter("holder")

    @flow
    async def main() -> None:
        assert await work(1) == 1
        future = holder.submit()
        await until(lambda: bodies.inside == 1)
        async with asyncio.timeout(10):
            assert (await work.run_to_state(1)).name == "Cached"
        bodies.go.set()
        await future

    await main()


async def test_without_limits_nothing_is_made(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """N2: a run without limits makes no gate, and asks for none."""
    asked = 0

    def count(*_: Any) -> None:
        nonlocal asked
        asked += 1

    monkeypatch.setattr(Limits, "gate", count)

    @task(tags=["unlimited"])
    async def work() -> None:
        pass

    await work()
    assert asked == 0
    assert len(engine.limits) == 0


async def test_limits_go_with_their_functions(engine: Engine) -> None:
    """N2: functions that are made anew for each call leave no limits behind."""
    import gc

    async def once() -> None:
        @task(concurrency=1, rate="1000/s")
        async def local() -> None:
            pass

        await local()

    for _ in range(5):
        await once()
    gc.collect()
    assert len(engine.limits) == 0


# --- N3: rates


async def test_starts_are_spaced_and_waiting_runs_suspend(engine: Engine) -> None:
    """N3: with a rate of 100 a second, the n-th start lies n × 10 ms after the first, and one timer a run waits."""
    starts: list[float] = []

    @task(rate="100/s")
    async def work(x: int) -> None:
        starts.append(asyncio.get_running_loop().time())

    @flow
    async def main() -> None:
        futures = work.map(range(10))
        await asyncio.sleep(0)
        assert timers() == 9
        await futures

    await main()
    # A timer may fire early by the resolution of the clock; each start was due 10 ms after the one before.
    assert all(start - starts[0] >= 0.0099 * n for n, start in enumerate(starts))


async def test_a_rate_that_rested_starts_at_once(engine: Engine) -> None:
    """N3: nothing is saved up and nothing is owed: the first start after a pause does not wait."""

    @task(rate="50/s")
    async def work() -> float:
        return asyncio.get_running_loop().time()

    @flow
    async def main() -> None:
        await work()
        await asyncio.sleep(0.05)
        future = work.submit()
        await asyncio.sleep(0)
        assert timers() == 0
        await future

    await main()


@pytest.mark.parametrize("rate", ["5", "0/s", "-1/s", "five/s", "5/fortnight", "", "/s", "5/"])
def test_a_rate_that_is_none_is_refused(rate: str) -> None:
    """N3: what is no rate is an error at declaration that names the task and shows how to write one."""
    with pytest.raises(ConfigurationError, match=r"work.*'5/s'"):

        @task(rate=rate)
        async def work() -> None:
            pass


@pytest.mark.parametrize("size", [0, -1, True, 1.5, "two"])
def test_a_limit_that_lets_nobody_through_is_refused(size: Any) -> None:
    """N1: a limit below one is an error at declaration."""
    with pytest.raises(ConfigurationError, match="whole number from 1 on"):

        @task(concurrency=size)
        async def work() -> None:
            pass


async def test_a_reader_gets_the_slot_of_the_stream_that_it_reads(engine: Engine) -> None:
    """N1: who calls for the limit of a stream whose value it has in hand does not wait for itself."""

    @task(concurrency=1)
    async def numbers(n: int) -> AsyncIterator[int]:
        for i in range(n):
            yield i

    @flow
    async def main() -> list[Any]:
        return [(x, await numbers(2)) async for x in numbers(2)]

    async with asyncio.timeout(10):
        assert await main() == [(0, [0, 1]), (1, [0, 1])]
