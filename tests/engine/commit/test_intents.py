"""The transaction protocol without I/O: every crash, every lost answer, and writers and readers in any order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from intent_world import KEYS, LEASE, Actor, Loss, Unavailable, World, member, record
from onceflow.engine._commit.intents import Writer, parse
from onceflow.engine._commit.protocol import commit, plain, read, remove_one, replace_one
from onceflow.engine._commit.requests import (
    ABSENT,
    ANY,
    Conflict,
    Found,
    InDoubt,
    Put,
    Read,
    Refused,
    Remove,
    Steps,
    Where,
)
from onceflow.storage._format.envelope import unpack_header


def look(where: Where) -> Steps:
    """A reader's way: its read, and what it finds."""
    found: Found | None = yield Read(where)
    data = b"" if found is None else (yield from read(where, found, ()))
    return unpack_header(data)[0].run_id if data else None


def seen(world: World, keys: Sequence[Where]) -> list[str | None]:
    """What a reader of all keys finds now."""
    return [Actor(world, look(where)).finish() for where in keys]


def writer(tx: str) -> Writer:
    return Writer(tx, LEASE, (tx,))


def transaction(world: World, tx: str, keys: Sequence[Where], **options: Any) -> Actor:
    members = [member(where, tx, **options) for where in keys]
    world.members[tx] = dict.fromkeys(keys, tx)
    return Actor(world, commit(writer(tx), members), tx)


def before(keys: Sequence[Where], old: bool) -> World:
    world = World()
    if old:
        for where in keys:
            world.lay(where, "old")
    return world


def is_write(step: Any) -> bool:
    return isinstance(step, (Put, Remove))


SIZES = pytest.mark.parametrize("count", [1, 2, 5])
OLD = pytest.mark.parametrize("old", [False, True], ids=["new", "replaced"])


@SIZES
@OLD
def test_the_cost_in_writes(count: int, old: bool) -> None:
    """n members cost n + 1 writes before they are visible, and 2n + 1 in all."""
    world = before(KEYS[:count], old)
    tx = transaction(world, "tx", KEYS[:count], expect=ANY if old else ABSENT)
    reads = 0
    while not tx.visible:
        reads += isinstance(tx.next(), Read)
        tx.do()
    assert world.writes == count + 1
    assert reads == (count if old else 0)
    tx.finish()
    assert world.writes == 2 * count + 1


@SIZES
@OLD
def test_every_crash(count: int, old: bool) -> None:
    """Killed before or after any write: readers see the old set until one write, then the new one; nothing is left."""
    keys = KEYS[:count]
    for last in itertools.count():
        world = before(keys, old)
        tx = transaction(world, "tx", keys)
        sets: list[list[str | None]] = []
        while not tx.is_over and world.writes < last:
            tx.do()
            sets.append(seen_only(world, keys))
        finished = tx.is_over
        tx.crash()
        first, then = [OLD_NAME[old]] * count, ["tx"] * count
        assert [each for each, _ in itertools.groupby(sets)] in ([], [first], [first, then])
        outcome = seen(world, keys)
        assert outcome == ["tx" if "tx" in world.decided else OLD_NAME[old]] * count
        assert world.leftovers() == []
        if finished:
            assert world.decided == {"tx"}
            return


OLD_NAME = {True: "old", False: None}


def seen_only(world: World, keys: Sequence[Where]) -> list[str | None]:
    """As `seen`, by readers that leave everything as it is."""
    twin = World(dict(world.objects), list(world.history), dict(world.members), set(world.decided))
    twin.numbers = itertools.count(1_000_000)
    return seen(twin, keys)


LOSSES = pytest.mark.parametrize(
    "loss", [Loss(False), Loss(True), Loss(False, late=True)], ids=["request", "answer", "late"]
)


@SIZES
@OLD
@LOSSES
def test_every_lost_message(count: int, old: bool, loss: Loss) -> None:
    """A request or an answer lost at any step: the outcome that is told is true, whenever the request arrives."""
    keys = KEYS[:count]
    for at in itertools.count():
        world = before(keys, old)
        tx = transaction(world, "tx", keys)
        for _ in range(at):
            if not tx.is_over:
                tx.do()
        if tx.is_over:
            return
        tx.do(loss=loss)
        check_outcome(world, tx)
        check_quiet(world, keys, OLD_NAME[old], lost_value=False)


@OLD
@LOSSES
def test_a_store_that_fails_for_good(old: bool, loss: Loss) -> None:
    """From any step on the store answers nothing more: an error, or in doubt once the decision was sent."""
    keys = KEYS[:3]
    for at in itertools.count():
        world = before(keys, old)
        tx = transaction(world, "tx", keys)
        for _ in range(at):
            if not tx.is_over:
                tx.do()
        if tx.is_over:
            return
        was_visible = tx.visible
        while not tx.is_over:
            tx.do(loss=loss)
        if was_visible:
            tx.result()
        else:
            with pytest.raises((Unavailable, InDoubt)) as told:
                tx.result()
            if "tx" in world.decided:
                assert isinstance(told.value, InDoubt)
        check_quiet(world, keys, OLD_NAME[old], lost_value=False)


def check_outcome(world: World, tx: Actor) -> None:
    """What a commit told is what happened, and stays so when late requests arrive."""
    try:
        tx.finish()
    except (Refused, Unavailable):
        assert tx.name not in world.decided
        deliver(world)
        assert tx.name not in world.decided
    except InDoubt:
        pass
    else:
        assert tx.name in world.decided


def deliver(world: World) -> None:
    for step in world.late:
        try:
            world.put(step) if isinstance(step, Put) else world.remove(step)
        except Conflict:
            pass
    world.late.clear()


def check_quiet(world: World, keys: Sequence[Where], old: str | None, *, lost_value: bool) -> None:
    """When everybody has ended, one pass of readers leaves the committed records and nothing else."""
    deliver(world)
    world.gone |= set(world.members)
    assert seen(world, keys) == [world.committed.get(where) for where in keys]
    assert set(seen(world, keys)) in ({"tx"}, {old})
    if not lost_value:
        assert world.leftovers() == []


@SIZES
def test_values_apart(count: int) -> None:
    """S2: values are there before their records are visible; aborted ones go, and those of replaced records."""
    keys = KEYS[:count]
    for last in itertools.count():
        world = World()
        members = [member(where, "old", location=f"old-{where}") for where in keys]
        world.members["old"] = dict.fromkeys(keys, "old")
        Actor(world, commit(writer("old"), members), "old").finish()
        members = [member(where, "tx", location=f"tx-{where}") for where in keys]
        world.members["tx"] = dict.fromkeys(keys, "tx")
        start = world.writes
        tx = Actor(world, commit(writer("tx"), members), "tx")
        while not tx.is_over and world.writes < start + last:
            tx.do()
            if "tx" in world.decided:
                assert all(("values", f"tx-{where}") in world.objects for where in keys)
        finished = tx.is_over
        tx.crash()
        outcome = set(seen(world, keys))
        assert outcome == ({"tx"} if "tx" in world.decided else {"old"})
        assert all(("values", header.location) in world.objects for header in world.headers())
        assert world.leftovers() == []
        if finished:
            return


def test_a_value_moves_after_the_commit() -> None:
    """A value under a fixed name is not touched before the commit, and is there when its record names it."""
    where, fixed = KEYS[0], ("values", "report")
    world = World()
    world.objects[fixed] = Found(b"old report", "v0")
    tx = transaction(world, "tx", [where], moves_to=fixed)
    while not tx.visible:
        assert world.objects[fixed].data == b"old report"
        tx.do()
    tx.finish()
    assert world.objects[fixed].data == b"tx"
    assert unpack_header(world.objects[where].data)[1] == len(world.objects[where].data)


def test_the_last_commit_wins_whole() -> None:
    """READ_COMMITTED: of two transactions over the same keys in opposite order both commit, one after the other."""
    for pattern in itertools.product([0, 1], repeat=6):
        world = before(KEYS, True)
        both = [transaction(world, "one", KEYS), transaction(world, "two", KEYS[::-1])]
        for which in pattern:
            if both[which].ready:
                both[which].do(at=which)
        run_all(both)
        for each in both:
            each.result()
        assert set(seen(world, KEYS)) in ({"one"}, {"two"})
        assert world.leftovers() == []


def run_all(actors: Sequence[Actor], most: int = 20_000) -> None:
    """Everybody in turn, to the end: nobody waits for ever."""
    for turn in range(most):
        under_way = [actor for actor in actors if actor.ready]
        if not under_way:
            return
        for actor in under_way:
            actor.do(at=turn)
    raise AssertionError("they wait for each other")


def paces(slow: int, fast: int, most: int = 3_000) -> list[tuple[int, ...]]:
    """Before each of the slow one's steps, how many the fast one has made: all ways, or a sample of them."""
    every = itertools.combinations_with_replacement(range(fast + 1), slow)
    count = math.comb(fast + slow, slow)
    return [pace for number, pace in enumerate(every) if number % (count // most + 1) == 0]


def interleave(slow: Actor, fast: Actor, pace: Sequence[int]) -> None:
    """Carry out both to the end, the slow one's steps at these moments of the fast one's."""
    made = 0
    for before in pace:
        while made < before and fast.ready:
            fast.do(at=made)
            made += 1
        if slow.ready:
            slow.do()
    for actor in (fast, slow):
        while actor.ready:
            actor.do()


@OLD
@pytest.mark.parametrize("where", KEYS[:3])
def test_a_reader_at_every_pace(where: Where, old: bool) -> None:
    """However slow a reader is, it sees what was committed at some moment between its first step and its last."""
    for pace in paces(3, 12):
        world = before(KEYS[:3], old)
        world.gone.add("nobody")
        tx = transaction(world, "tx", KEYS[:3])
        made, reader = 0, Actor(world, look(where), "reader")
        first = None
        for moment in pace:
            while made < moment and tx.ready:
                tx.do()
                made += 1
            first = len(world.history) - 1 if first is None else first
            if reader.ready:
                reader.do()
        found = reader.finish()
        assert found in [state.get(where) for state in world.history[first:]], pace
        tx.finish()


@OLD
@pytest.mark.parametrize("killed_after", [1, 2, 3, 4])
def test_whoever_recovers_may_be_slow(old: bool, killed_after: int) -> None:
    """While one slowly ends what a killed writer has left, another does so and commits anew: nothing is lost."""
    for where, pace in itertools.product(KEYS[:3], paces(6, 14, 400)):
        world = before(KEYS[:3], old)
        tx = transaction(world, "killed", KEYS[:3])
        while world.writes < killed_after:
            tx.do()
        tx.crash()
        slow = Actor(world, plain(where, ()), "slow")
        fast = transaction(world, "tx", KEYS[:3])
        interleave(slow, fast, pace)
        fast.result()
        assert seen(world, KEYS[:3]) == ["tx"] * 3
        assert world.leftovers() == []


def test_who_waits_holds_nothing_behind() -> None:
    """Two transactions that have laid what the other needs next give way, in the order of the keys."""
    a, b, c, d, e = KEYS
    for other in (None, 1):
        world = before(KEYS, True)
        one, two = transaction(world, "one", [a, b, c, d]), transaction(world, "two", [b, c, d, e])
        while not isinstance(one.next(), Read) or one.next().where == a:
            one.do()
        for _ in range(2 + (other or 0)):
            two.do()
        for _ in range(20):
            for actor in (one, two):
                if actor.ready:
                    actor.do(at=-1)  # the last of what it does at once
        run_all([one, two])
        one.result(), two.result()
        assert set(seen(world, [b, c, d])) in ({"one"}, {"two"})


@OLD
@pytest.mark.parametrize("overwritten", [False, True])
def test_a_decision_that_others_have_settled(old: bool, overwritten: bool) -> None:
    """The decision's answer was lost, and before its writer asks others have settled it: committed, not refused.

    When they have committed anew as well, nobody can tell: in doubt.
    """
    world = before(KEYS[:2], old)
    tx = transaction(world, "tx", KEYS[:2])
    while world.writes < 2:
        tx.do()
    tx.do(loss=Loss(applied=True))
    assert world.decided == {"tx"}
    clearing = Actor(world, plain(KEYS[0], ()))
    while clearing.ready:
        clearing.do(abandoned=True)
    if overwritten:
        transaction(world, "next", KEYS[:2]).finish()
        with pytest.raises(InDoubt):
            tx.finish()
    else:
        tx.finish()
        assert tx.visible


def test_a_writer_that_wakes_up_late_is_refused() -> None:
    """57: aborted while it was silent, at whatever step, a writer cannot commit."""
    for at in itertools.count():
        world = before(KEYS[:3], True)
        tx = transaction(world, "tx", KEYS[:3])
        while tx.ready and not tx.visible and at > 0:
            tx.do()
            at -= 1
        if tx.visible:
            return
        waiting = Actor(world, plain(KEYS[0], ()))
        while not waiting.is_over:
            waiting.do(abandoned=True)
        check_outcome(world, tx)


def test_under_a_lock_another_writer_is_fatal() -> None:
    """With an exclusive expectation nothing is replaced that was not seen; the others are taken back."""
    world = before(KEYS[:2], True)
    expect = world.objects[KEYS[1]].version
    Actor(world, single(world, KEYS[1], "other")).finish()
    world.members["tx"] = dict.fromkeys(KEYS[:2], "tx")
    members = [member(KEYS[0], "tx"), member(KEYS[1], "tx", expect=expect, exclusive=True)]
    with pytest.raises(Refused) as refused:
        Actor(world, commit(writer("tx"), members), "tx").finish()
    assert refused.value.where == KEYS[1]
    assert seen(world, KEYS[:2]) == ["old", "other"]
    assert world.leftovers() == []


def single(world: World, where: Where, name: str) -> Steps:
    world.singles.add(name)
    return replace_one(where, [record(where, name)], ())


def test_members_are_named_as_the_reader_knows_their_storage() -> None:
    """The same folder under another path: a reader there finds the primary beside the intent."""
    world = before(KEYS[:2], True)
    tx = transaction(world, "tx", KEYS[:2])
    while not tx.visible:
        tx.do()
    elsewhere = World({("mounted", key): found for (_, key), found in world.objects.items()})
    elsewhere.history.append({("mounted", key): "tx" for _, key in KEYS[:2]})
    assert seen_only(elsewhere, [("mounted", "a"), ("mounted", "b")]) == ["tx", "tx"]


def test_intents_do_not_grow_with_the_square_of_their_number() -> None:
    """Only the primary names all members."""
    keys = [("s1", f"{number:064}") for number in range(200)]
    world = World()
    tx = transaction(world, "tx", keys, expect=ABSENT)
    sizes = []
    while not tx.visible:
        step = tx.next()
        tx.do()
        if isinstance(step, Put):
            sizes.append(len(world.objects[step.where].data))
    assert max(sizes[1:-1]) < 1500


class Anything(RuleBasedStateMachine):
    """Writers, readers, crashes, lost answers, late requests and wrong suspicions, interleaved step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.actors: list[Actor] = []
        self.readers: dict[Actor, Where] = {}
        self.numbers = itertools.count()

    def _new(self, kind: str) -> str:
        return f"{kind}{next(self.numbers)}"

    @precondition(lambda self: len(self.actors) < 5)
    @rule(keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=4, unique=True), data=st.data())
    def begin(self, keys: list[Where], data: st.DataObject) -> None:
        tx = self._new("tx")
        self.world.members[tx] = dict.fromkeys(keys, tx)
        members = []
        for where in keys:
            here = self.world.objects.get(where)
            sight = data.draw(st.sampled_from([ANY, ABSENT, here.version if here is not None else ABSENT]))
            exclusive = data.draw(st.booleans()) if sight is not ANY else False
            location = f"{tx}-{where}" if data.draw(st.booleans()) else None
            members.append(member(where, tx, expect=sight, exclusive=exclusive, location=location))
        self.actors.append(Actor(self.world, commit(writer(tx), members), tx))

    @precondition(lambda self: len(self.actors) < 5)
    @rule(where=st.sampled_from(KEYS))
    def begin_single(self, where: Where) -> None:
        name = self._new("single")
        self.actors.append(Actor(self.world, single(self.world, where, name), name))

    @precondition(lambda self: len(self.actors) < 5)
    @rule(where=st.sampled_from(KEYS))
    def begin_removal(self, where: Where) -> None:
        self.actors.append(Actor(self.world, remove_one(where, "values", ()), self._new("removal")))

    @precondition(lambda self: len(self.readers) < 3)
    @rule(where=st.sampled_from(KEYS))
    def begin_reading(self, where: Where) -> None:
        reader = Actor(self.world, look(where), self._new("reader"))
        self.actors.append(reader)
        self.readers[reader] = where

    @precondition(lambda self: self.actors)
    @rule(data=st.data(), count=st.integers(1, 12))
    def work(self, data: st.DataObject, count: int) -> None:
        actor = data.draw(st.sampled_from(self.actors))
        for _ in range(count):
            if actor.ready:
                loss = data.draw(
                    st.sampled_from([None] * 12 + [Loss(False), Loss(True), Loss(False, late=True)])
                )
                suspicion = data.draw(st.sampled_from([False] * 5 + [True]))
                actor.do(data.draw(st.integers(0, 4)), loss, suspicion)
        self._look_after(actor)

    @precondition(lambda self: self.actors)
    @rule(data=st.data())
    def crash(self, data: st.DataObject) -> None:
        actor = data.draw(st.sampled_from(self.actors))
        actor.crash()
        self.actors.remove(actor)
        self.readers.pop(actor, None)

    @precondition(lambda self: self.world.late)
    @rule()
    def arrive(self) -> None:
        deliver(self.world)

    def _look_after(self, actor: Actor) -> None:
        if not actor.is_over:
            return
        self.actors.remove(actor)
        self.world.gone.add(actor.name)
        where = self.readers.pop(actor, None)
        if where is not None:
            try:
                name = actor.result()
            except Unavailable:
                return
            states = self.world.history[actor.began :]
            assert name in [state.get(where) for state in states], (
                "a reader saw what was not committed meanwhile"
            )
        elif actor.name.startswith("tx"):
            self._check_told(actor)

    def _check_told(self, actor: Actor) -> None:
        try:
            actor.result()
        except (Refused, Unavailable):
            assert actor.name not in self.world.decided
            self.world.members.pop(actor.name)  # its decision would be a KeyError from now on
        except InDoubt:
            pass
        else:
            assert actor.name in self.world.decided

    @invariant()
    def what_is_committed_can_be_read(self) -> None:
        twin = World(
            dict(self.world.objects),
            list(self.world.history),
            dict(self.world.members),
            set(self.world.decided),
        )
        twin.numbers = itertools.count(1_000_000)
        assert seen(twin, KEYS) == [self.world.committed.get(where) for where in KEYS]

    def teardown(self) -> None:
        run_all(self.actors)
        for actor in list(self.actors):
            self._look_after(actor)
        deliver(self.world)
        assert seen(self.world, KEYS) == [self.world.committed.get(where) for where in KEYS]
        for where in KEYS:
            found = self.world.objects.get(where)
            assert found is None or parse(where, found.data, ()) is None
            assert (found is not None) == (where in self.world.committed)


@pytest.mark.parametrize("examples", [150, pytest.param(5_000, marks=pytest.mark.chaos)])
def test_anything_may_happen_in_any_order(examples: int) -> None:
    """Against a trivial model: readers see committed states only, and outcomes that are told are true."""
    run_state_machine_as_test(
        Anything,
        settings=settings(
            max_examples=examples,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking takes minutes
        ),
    )
