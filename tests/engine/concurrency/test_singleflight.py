"""The room in which equal SERIALIZABLE calls of a process meet, without a lock manager."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onceflow.engine import ConfigurationError, DeadlockError, EngineClosedError, transaction
from onceflow.engine._concurrency.singleflight import Flight, Inside, Lead, Patience, Room, Served
from onceflow.engine._runs.run import Run
from onceflow.locking import LockTimeoutError

KEY, OTHER, THIRD = ("memory://x", "key"), ("memory://x", "other"), ("memory://x", "third")
RECORD = Served(lambda: 42, "run", 0.0)


class Caller(Run):
    """A run of nothing: only its place among the runs counts."""

    def __init__(self, name: str, parent: Run | None = None, txn: transaction | None = None) -> None:
        self._name = name
        self.parent = parent  # type: ignore[assignment]
        self.transaction = txn
        self.pend()


async def enter(room: Room, caller: Any, where: tuple[str, str] = KEY, timeout: float | None = None) -> Any:
    return await room.enter(where, caller, Patience(timeout))


async def lead(room: Room, caller: Any, where: tuple[str, str] = KEY) -> Flight:
    """The flight that the caller leads from now on."""
    entered = await enter(room, caller, where)
    assert isinstance(entered, Lead)
    return entered.flight


async def waiting(coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """A task that has begun to wait."""
    task = asyncio.create_task(coroutine)
    await asyncio.sleep(0)
    assert not task.done()
    return task


async def turn() -> None:
    """One step of every task that was woken."""
    await asyncio.sleep(0)


# --- the line


async def test_first_come_first_served() -> None:
    """L15, FIFO: whoever came first leads next, and exactly one at a time."""
    room = Room()
    flight = await lead(room, Caller("leader"))
    line = [await waiting(enter(room, Caller(f"{n}"))) for n in range(20)]
    for number, waiter in enumerate(line):
        room.finish(flight, None)
        await turn()
        assert [task.done() for task in line] == [n <= number for n in range(20)]
        assert waiter.result() == Lead(flight)
        assert flight.leader.name == f"{number}"
    room.finish(flight, None)
    assert len(room) == 0


async def test_a_record_serves_all_at_once() -> None:
    """23: when the leader commits, every waiter has the record one step of the loop later."""
    room = Room()
    flight = await lead(room, Caller("leader"))
    line = [await waiting(enter(room, Caller(f"{n}"))) for n in range(100)]
    room.finish(flight, RECORD)
    await turn()
    assert [task.result() for task in line] == [RECORD] * 100
    assert len(room) == 0


async def test_waiters_show_that_they_wait() -> None:
    """B11: a run in line is in the state Waiting; one that leads at once never was."""
    room = Room()
    first, second = Caller("first"), Caller("second")
    flight = await lead(room, first)
    waiter = await waiting(enter(room, second))
    assert first.state.name == "Pending"
    assert second.state.name == "Waiting"
    room.finish(flight, RECORD)
    await waiter


async def test_a_cancelled_waiter_leaves_the_line() -> None:
    """27: whoever is cancelled while it waits is passed over, and the others do not notice."""
    room = Room()
    flight = await lead(room, Caller("leader"))
    line = [await waiting(enter(room, Caller(f"{n}"))) for n in range(5)]
    for index in (0, 3):
        line[index].cancel()
    await turn()
    assert len(flight.waiters) == 3
    room.finish(flight, None)
    await turn()
    assert [task.done() for task in line] == [True, True, False, True, False]
    assert flight.leader.name == "1"
    room.finish(flight, RECORD)
    await asyncio.gather(*line, return_exceptions=True)


@pytest.mark.parametrize("chosen_first", [True, False])
async def test_chosen_and_cancelled_in_one_step(chosen_first: bool) -> None:
    """26: a waiter that is cancelled in the moment in which it is chosen passes the lead on, in either order."""
    room = Room()
    flight = await lead(room, Caller("leader"))
    line = [await waiting(enter(room, Caller(f"{n}"))) for n in range(3)]
    if chosen_first:
        room.finish(flight, None)
        line[0].cancel()
    else:
        line[0].cancel()
        room.finish(flight, None)
    await turn()
    await turn()
    assert line[0].cancelled()
    assert line[1].result() == Lead(flight)
    assert not line[2].done()
    room.finish(flight, None)
    await turn()
    room.finish(flight, None)
    assert len(room) == 0


async def test_cancelled_one_after_the_other() -> None:
    """26: ten waiters in a row that are chosen and cancelled hand the lead to the eleventh."""
    room = Room()
    flight = await lead(room, Caller("leader"))
    line = [await waiting(enter(room, Caller(f"{n}"))) for n in range(11)]
    room.finish(flight, None)
    for task in line[:-1]:
        task.cancel()
    await asyncio.wait(line[:-1])
    assert await line[-1] == Lead(flight)
    room.finish(flight, None)
    assert len(room) == 0


async def test_timeouts() -> None:
    """B11: a wait has its own timeout; the error names the key, who waited and who led. The others go on waiting."""
    room = Room()
    flight = await lead(room, Caller("leader"))
    patient = await waiting(enter(room, Caller("patient"), timeout=60))
    for seconds in (0, 0.01):
        with pytest.raises(LockTimeoutError, match=r"'hasty' waited .* 'key' .* 'leader' holds it") as caught:
            await enter(room, Caller("hasty"), timeout=seconds)
        assert caught.value.timeout == seconds
    assert len(flight.waiters) == 1
    room.finish(flight, RECORD)
    assert await patient == RECORD


async def test_the_lead_comes_before_the_timeout() -> None:
    """A waiter that is chosen in the moment in which its time is over leads all the same, and passes nothing on."""
    room = Room()
    flight = await lead(room, Caller("leader"))
    first = await waiting(enter(room, Caller("first"), timeout=0))
    second = await waiting(enter(room, Caller("second")))
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    room.finish(flight, None)
    assert await first == Lead(flight)
    assert not second.done()
    assert complaints == []
    room.finish(flight, None)
    assert await second == Lead(flight)


Events = st.lists(st.tuples(st.sampled_from("acfsc"), st.integers(0, 9)), max_size=60)


@settings(deadline=None)
@given(Events)
def test_any_order_of_events(events: list[tuple[str, int]]) -> None:
    """Whatever arrives, is cancelled, fails and commits in whatever order: one leads, the next is the oldest that
    still waits, and in the end nothing is left of the key."""
    asyncio.run(_play(events))


async def _play(events: list[tuple[str, int]]) -> None:
    room = Room()
    line: list[asyncio.Task[Any]] = []
    leader: asyncio.Task[Any] | None = None
    flight: Flight | None = None
    for event, number in [*events, *[("f", 0)] * (len(events) + 1)]:
        if event == "a":
            line.append(asyncio.create_task(enter(room, Caller(f"{len(line)}"))))
        elif event == "c" and line:
            line.pop(number % len(line)).cancel()
        elif event in "fs" and leader is not None:
            assert flight is not None
            room.finish(flight, RECORD if event == "s" else None)
            leader = None
        await turn()
        await turn()
        served = [task for task in line if task.done() and isinstance(task.result(), Served)]
        line = [task for task in line if task not in served]
        if leader is None and line:
            leader = line.pop(0)
            assert leader.done(), "the oldest waiter was not chosen"
            flight = leader.result().flight
        assert not any(task.done() for task in line), "two lead at once"
    assert len(room) == 0


# --- the own tree


async def test_the_own_tree_enters() -> None:
    """15: a run below the leader need not wait for its own caller, at whatever depth; others do."""
    room = Room()
    flow = Caller("flow")
    leader = Caller("leader", flow)
    flight = await lead(room, leader)
    child = Caller("child", leader)
    assert await enter(room, child) == Inside(flight)
    assert await enter(room, Caller("grandchild", child)) == Inside(flight)
    sibling = await waiting(enter(room, Caller("sibling", flow)))
    room.finish(flight, RECORD)
    assert await sibling == RECORD


async def test_inside_of_a_transaction_that_keeps_the_key() -> None:
    """Who waited inside the block is served by what is staged; who comes later need not wait; who is outside must."""
    room = Room()
    txn = transaction()
    flight = await lead(room, Caller("leader", None, txn))
    inside = await waiting(enter(room, Caller("inside", None, txn)))
    outside = await waiting(enter(room, Caller("outside")))
    flight.keep(txn, RECORD)
    assert await inside == RECORD
    assert await enter(room, Caller("later", None, txn)) == Inside(flight)
    assert not outside.done()
    room.finish(flight, None)
    assert await outside == Lead(flight)


async def test_a_block_of_a_run_that_leads() -> None:
    """15: a keyed block that a run opens, at whatever depth, is inside of the keys that the run leads."""
    room = Room()
    leader = Caller("leader")
    flight = await lead(room, leader)
    block, inner = transaction(key="key"), transaction(key="key")
    block.run, inner.parent, inner.run = leader, block, leader
    assert await enter(room, block) == Inside(flight)
    assert await enter(room, inner) == Inside(flight)


async def test_a_block_that_joins_the_one_around_it() -> None:
    """A waiter in the outer block, which came while the inner one had the key, goes on when that joins the outer."""
    room = Room()
    outer, inner = transaction(), transaction()
    inner.parent = outer
    flight = await lead(room, Caller("leader", None, inner))
    flight.keep(inner, RECORD)
    beside = await waiting(enter(room, Caller("beside", None, outer)))
    bare = await waiting(enter(room, Caller("bare", None, outer)))
    flight.keep(outer, RECORD)
    assert await beside == RECORD
    assert await bare == RECORD


async def test_settled_and_cancelled_in_one_step() -> None:
    """26: who is cancelled in the moment in which its block keeps the key, or the engine closes, disturbs nobody."""
    room, txn = Room(), transaction()
    flight = await lead(room, Caller("leader", None, txn))
    inside = [await waiting(enter(room, Caller(f"{n}", None, txn))) for n in range(2)]
    outside = [await waiting(enter(room, Caller(f"{n}"))) for n in range(2)]
    inside[0].cancel()
    flight.keep(txn, RECORD)
    inside[1].cancel()  # it has been served, and nobody knows
    outside[0].cancel()
    await room.aclose()
    outside[1].cancel()  # it has been sent away, and nobody knows
    outcomes = await asyncio.gather(*inside, *outside, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [asyncio.CancelledError] * 4
    assert len(room) == 0


# --- cycles


async def test_two_keys_and_two_flows() -> None:
    """15: two flows that wait for each other's key: the wait that would close the cycle is a DeadlockError."""
    room = Room()
    left, right = Caller("left"), Caller("right")
    mine, theirs = await lead(room, left, KEY), await lead(room, right, OTHER)
    first = await waiting(enter(room, Caller("left child", left), OTHER))
    with pytest.raises(DeadlockError) as caught:
        await enter(room, Caller("right child", right), KEY)
    assert caught.value.chain == (
        "right child waits for 'key'", "left waits for 'other'", "held by right",
    )  # fmt: skip
    room.finish(theirs, RECORD)
    assert await first == RECORD
    room.finish(mine, None)
    assert len(room) == 0
    assert not left.blocked_on
    assert not right.blocked_on


async def test_a_ring_of_three() -> None:
    """15: cycles over more than two keys are found, and the chain names each link."""
    room = Room()
    a, b, c = Caller("a"), Caller("b"), Caller("c")
    for run, where in ((a, KEY), (b, OTHER), (c, THIRD)):
        await lead(room, run, where)
    tasks = [
        await waiting(enter(room, Caller("a's", a), OTHER)),
        await waiting(enter(room, Caller("b's", b), THIRD)),
    ]
    with pytest.raises(
        DeadlockError, match="c's waits for 'key' → a waits for 'other' → b waits for 'third' → held by c"
    ):
        await enter(room, Caller("c's", c), KEY)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_waits_that_are_no_cycle() -> None:
    """Many who wait for one, and one whose children wait for several, are no deadlock."""
    room = Room()
    flow = Caller("flow")
    first, second = await lead(room, Caller("first"), KEY), await lead(room, Caller("second"), OTHER)
    tasks = [
        await waiting(enter(room, Caller(f"{n}", flow), where)) for n in range(3) for where in (KEY, OTHER)
    ]
    room.finish(first, RECORD)
    room.finish(second, RECORD)
    assert await asyncio.gather(*tasks) == [RECORD] * 6
    assert not flow.blocked_on


async def test_a_key_that_comes_while_another_child_waits() -> None:
    """A block that gets a key by one child while another child waits elsewhere counts as its holder all the same."""
    room = Room()
    one, two = transaction(), transaction()
    mine = await lead(room, Caller("one's first", None, one), KEY)
    theirs = await lead(room, Caller("two's first", None, two), OTHER)
    first = await waiting(
        enter(room, Caller("one's second", None, one), OTHER)
    )  # while nobody keeps anything
    mine.keep(one, RECORD)
    theirs.keep(two, RECORD)
    with pytest.raises(DeadlockError):
        await enter(room, Caller("two's second", None, two), KEY)
    room.finish(theirs, RECORD)
    assert await first == RECORD


async def test_a_cycle_that_closes_when_a_block_keeps_the_key() -> None:
    """Both wait already when the key passes from a run to its block: the waiter that closes the cycle is told."""
    room = Room()
    one, two = transaction(), transaction()
    mine = await lead(room, Caller("one's first", None, one), KEY)
    theirs = await lead(room, Caller("two's first", None, two), OTHER)
    theirs.keep(two, RECORD)
    first = await waiting(enter(room, Caller("one's second", None, one), OTHER))
    second = await waiting(enter(room, Caller("two's second", None, two), KEY))  # the leader is about to end
    mine.keep(one, RECORD)
    with pytest.raises(DeadlockError, match="'key'"):
        await second
    room.finish(theirs, RECORD)
    assert await first == RECORD
    room.finish(mine, RECORD)
    assert len(room) == 0


async def test_random_waits_end() -> None:
    """15: 30 flows that take 4 of 6 keys in random order all end, each with its keys or a DeadlockError; ten seeds."""
    refused = 0
    for seed in range(10):
        chosen = random.Random(seed)
        room = Room()

        async def take(run: Run, keys: list[int], chosen: random.Random = chosen, room: Room = room) -> None:
            nonlocal refused
            if not keys:
                await asyncio.sleep(chosen.random() / 1000)
                return
            child = Caller(f"{run.name}.{keys[0]}", run)
            try:
                entered = await enter(room, child, ("memory://x", f"{keys[0]}"))
            except DeadlockError:
                refused += 1
                return
            try:
                await take(child, keys[1:])
            finally:
                if isinstance(entered, Lead):
                    room.finish(entered.flight, None)

        async with asyncio.timeout(30):
            await asyncio.gather(*(take(Caller(f"flow{n}"), chosen.sample(range(6), 4)) for n in range(30)))
        assert len(room) == 0
    assert refused > 0


# --- loops, and the end


async def test_another_loop_is_refused() -> None:
    """A room serves one loop; a run of another is refused, instead of waiting for what never reaches its loop."""
    room = Room()
    await lead(room, Caller("here"))

    def elsewhere() -> None:
        with pytest.raises(ConfigurationError, match="another event loop"):
            asyncio.run(enter(room, Caller("there")))

    await asyncio.to_thread(elsewhere)


def test_a_second_run_of_asyncio() -> None:
    """`asyncio.run` twice: what the first loop left unfinished is gone, and the room serves the second."""
    room = Room()

    async def leave() -> None:
        await lead(room, Caller("first"))

    asyncio.run(leave())
    asyncio.run(leave())


class Held:
    released = 0

    async def release(self, *, committed: bool = False) -> None:
        assert not committed
        self.released += 1


async def test_closing() -> None:
    """Closing frees what is held, sends waiters away by a typed error, and leaves an empty room."""
    room = Room()
    flight = await lead(room, Caller("leader"))
    flight.held = held = Held()  # type: ignore[assignment]
    line = [await waiting(enter(room, Caller(f"{n}"))) for n in range(3)]
    await room.aclose()
    for task in line:
        with pytest.raises(EngineClosedError):
            await task
    assert held.released == 1
    room.finish(flight, RECORD)  # the leader ends later
    assert len(room) == 0
