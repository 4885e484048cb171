"""The life of a run, driven by its table without an event loop."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from onceflow.engine import State, StateType
from onceflow.engine._runs import machine as kernel
from onceflow.engine._runs.machine import TABLE, Do, IllegalTransitionError, Life, Retry, retry_rule

PATHS: dict[str, list[str]] = {
    "Pending": [],
    "Waiting": ["wait"],
    "Running": ["start"],
    "Retrying": ["start", "retry"],
    "AwaitingRetry": ["start", "put_off"],
    "NotReady": ["not_ready"],
    "Cached": ["hit"],
    "Completed": ["start", "complete"],
    "Failed": ["start", "fail"],
    "TimedOut": ["start", "time_out"],
    "Cancelled": ["cancel"],
    "Crashed": ["crash"],
    "RolledBack": ["hit", "roll_back"],
}
"""How a run comes into each state: the events after `pend`."""

EVENTS = [event for event in TABLE if event != "pend"]
LEGAL = [(source, event) for event in EVENTS for source in TABLE[event][0]]
ILLEGAL = [(source, event) for event in EVENTS for source in PATHS if source not in TABLE[event][0]]
FINAL = ("NotReady", "Cached", "Completed", "Failed", "TimedOut", "Cancelled", "Crashed", "RolledBack")


def life_in(name: str, **retry: Any) -> Life:
    """A life in the state of that name."""
    life = Life()
    life.rule = Retry(**retry)
    life.pend()
    for event in PATHS[name]:
        life.enter(event)
    life.attempt = 1
    assert life.state.name == name
    return life


def running(**retry: Any) -> Life:
    """A life in its first attempt."""
    life = Life()
    life.rule = Retry(**retry)
    life.pend()
    life.start()
    return life


def names(life: Life) -> list[str]:
    return [state.name for state in life.states]


# --- the table


def test_every_state_of_the_table_can_be_reached() -> None:
    """The paths of this test know every state that the table knows, and no other."""
    assert {name for _, name, _ in TABLE.values()} == set(PATHS)


def test_the_table_of_the_docstring_is_the_table() -> None:
    """What the kernel's docstring tells people, row by row, is what it does."""
    assert kernel.__doc__ is not None
    rows = [line.split("  ") for line in kernel.__doc__.splitlines() if line.startswith("    ")]
    told = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert told[0] == ["event", "from", "to", "type"]
    sources = {("",): "(new)", kernel._OPEN: "any that is not final"}
    ends = [state for state in PATHS if state in FINAL]
    assert told[1:] == [
        [
            event,
            sources.get(given, ", ".join(given)),
            name,
            f"{type_.value}, final" if name in ends else type_.value,
        ]
        for event, (given, name, type_) in TABLE.items()
    ]


@pytest.mark.parametrize(("source", "event"), LEGAL)
def test_every_arrow_of_the_table_leads_where_it_says(source: str, event: str) -> None:
    """An event from one of its sources enters the state and type of the table, with data and message."""
    life = life_in(source)
    before = list(life.states)
    state = life.enter(event, "data", "message")
    _, name, type_ = TABLE[event]
    assert (state.name, state.type, state.data, state.message) == (name, type_, "data", "message")
    assert life.states == [*before, state]
    assert life.state is state


@pytest.mark.parametrize(("source", "event"), ILLEGAL)
def test_every_other_transition_is_refused(source: str, event: str) -> None:
    """An event from a state that is not among its sources is refused, and changes nothing."""
    life = life_in(source)
    before = list(life.states)
    with pytest.raises(IllegalTransitionError, match=source):
        life.enter(event)
    assert life.states == before


@pytest.mark.parametrize("name", PATHS)
def test_final_states_are_final(name: str) -> None:
    """A run is over in exactly the final states; from there it can be rolled back at most."""
    life = life_in(name)
    assert life.is_over == (name in FINAL)
    if life.is_over:
        ways_out = {event for source, event in LEGAL if source == name}
        assert ways_out == ({"roll_back"} if name in ("Completed", "Cached") else set())


@pytest.mark.parametrize("name", [name for name in PATHS if name not in ("Running", "Retrying")])
@pytest.mark.parametrize("outcome", ["value", "state", "error", "time"])
def test_a_body_that_does_not_run_cannot_end(name: str, outcome: str) -> None:
    """The outcome of a body is refused where none is running: no state comes after a final one."""
    life = life_in(name, times=5)
    before = list(life.states)
    ends: dict[str, Callable[[], Do]] = {
        "value": lambda: life.returned(1),
        "state": lambda: life.returned(State(StateType.COMPLETED, name="Mine")),
        "error": lambda: life.raised(ValueError()),
        "time": lambda: life.timed_out(TimeoutError()),
    }
    with pytest.raises(IllegalTransitionError):
        ends[outcome]()
    assert life.states == before


# --- the end of a body


def test_a_value_completes() -> None:
    """A body's value is the data of Completed."""
    life = running()
    assert life.returned(41) is Do.FINISH
    assert names(life) == ["Pending", "Running", "Completed"]
    assert life.state.data == 41


def test_an_exception_fails() -> None:
    """A body's exception is the data of Failed, and its type and text the message."""
    life = running()
    error = ValueError("no")
    assert life.raised(error) is Do.FINISH
    assert names(life) == ["Pending", "Running", "Failed"]
    assert life.state.data is error
    assert life.state.message == "ValueError: no"


def test_a_timeout_is_named_so() -> None:
    """A body that took too long ends as TimedOut, of type FAILED."""
    life = running()
    error = TimeoutError("too long")
    assert life.timed_out(error) is Do.FINISH
    assert (life.state.name, life.state.type, life.state.data) == ("TimedOut", StateType.FAILED, error)


@pytest.mark.parametrize("type_", ["COMPLETED", "FAILED", "CANCELLED", "CRASHED"])
def test_a_returned_state_is_final(type_: str) -> None:
    """T15: the name, message and data of a state that the body returns are those of the run's final state."""
    life = running()
    assert life.returned(State(StateType(type_), "Mine", "because", "data")) is Do.FINISH
    state = life.state
    assert (state.type, state.name, state.message, state.data) == (
        StateType(type_),
        "Mine",
        "because",
        "data",
    )


@pytest.mark.parametrize("type_", ["COMPLETED", "FAILED"])
def test_a_state_that_was_made_before_the_run_ends_after_it_began(type_: str) -> None:
    """T10: a body may return a state made long ago, even one shared by runs: times still increase."""
    shared: State[Any] = State(StateType(type_), "Mine")
    for _ in range(2):
        life = running()
        life.returned(shared)
        times = [state.timestamp for state in life.states]
        assert times == sorted(set(times))


@pytest.mark.parametrize("type_", ["PENDING", "SCHEDULED", "RUNNING"])
def test_a_returned_state_that_is_not_final_fails_the_run(type_: str) -> None:
    """T15: a body that returns an unfinished state has failed, and the message says so."""
    life = running()
    assert life.returned(State(StateType(type_))) is Do.FINISH
    assert life.state.type is StateType.FAILED
    assert "unfinished" in str(life.state.message)


# --- retries


@pytest.mark.parametrize("times", [0, 1, 3])
def test_n_retries_are_n_plus_one_attempts(times: int) -> None:
    """T3: a body that always fails is tried n + 1 times, Retrying in between, and ends as Failed."""
    life = running(times=times)
    for _ in range(times):
        assert life.raised(ValueError()) is Do.RUN
    assert life.raised(ValueError("last")) is Do.FINISH
    assert names(life) == ["Pending", "Running", *["Retrying"] * times, "Failed"]
    assert life.attempt == times + 1
    assert str(life.state.data) == "last"


def test_with_a_delay_each_retry_is_awaited_first() -> None:
    """T3: with a delay, AwaitingRetry and Retrying alternate."""
    life = running(times=2, delays=(5.0,))
    for _ in range(2):
        assert life.raised(ValueError("no")) is Do.SLEEP
        assert life.state.type is StateType.SCHEDULED
        assert life.delay == 5
        life.again()
    life.raised(ValueError())
    assert names(life) == [
        "Pending", "Running", "AwaitingRetry", "Retrying", "AwaitingRetry", "Retrying", "Failed",
    ]  # fmt: skip


def test_an_early_success_ends_the_attempts() -> None:
    """T3: when an attempt succeeds there are no more."""
    life = running(times=9)
    life.raised(ValueError())
    assert life.returned(1) is Do.FINISH
    assert life.attempt == 2


def test_a_returned_failure_is_retried() -> None:
    """T6: a Failed state that the body returns is tried again while attempts are left, then it is final."""
    life = running(times=1)
    assert life.returned(State(StateType.FAILED, "Mine")) is Do.RUN
    assert life.returned(State(StateType.FAILED, "Mine")) is Do.FINISH
    assert names(life) == ["Pending", "Running", "Retrying", "Mine"]


def test_a_timeout_is_retried() -> None:
    """T3: an attempt that timed out counts like one that failed."""
    life = running(times=1)
    assert life.timed_out(TimeoutError()) is Do.RUN
    assert life.timed_out(TimeoutError()) is Do.FINISH
    assert names(life) == ["Pending", "Running", "Retrying", "TimedOut"]


def test_a_condition_is_asked_about_the_failed_state() -> None:
    """T4: with a condition, it is asked about every failure but the last, as a Failed state."""
    life = running(times=1, conditional=True)
    error = ValueError("no")
    assert life.raised(error) is Do.ASK
    assert life.proposed.is_failed()
    assert life.proposed.data is error
    assert life.state.name == "Running"
    assert life.decide(True) is Do.RUN
    assert life.raised(error) is Do.FINISH


def test_a_condition_that_says_no_ends_the_run() -> None:
    """T4: without the condition's consent there is no retry."""
    life = running(times=5, conditional=True)
    life.raised(ValueError())
    assert life.decide(False) is Do.FINISH
    assert names(life) == ["Pending", "Running", "Failed"]


@pytest.mark.parametrize(
    ("delays", "expected"),
    [
        (None, [0, 0, 0]),
        (0, [0, 0, 0]),
        (2, [2, 2, 2]),
        (0.5, [0.5, 0.5, 0.5]),
        ([1, 2], [1, 2, 2]),
        ([1, 2, 3, 4], [1, 2, 3]),
        ([], [0, 0, 0]),
        ([0, 5], [0, 5, 5]),
        (lambda times: [10**n for n in range(times)], [1, 10, 100]),
    ],
)
def test_delays_are_a_number_a_list_or_a_callable(delays: Any, expected: list[float]) -> None:
    """T3: the delay before retry n is the number, the n-th of the list (the last goes on), or computed."""
    rule_ = retry_rule(3, delays, None, False)
    assert [rule_.delay(attempt, Random()) for attempt in (1, 2, 3)] == expected


@pytest.mark.parametrize("jitter", [0.25, 1.0, 3.0])
def test_jitter_lengthens_a_delay_by_up_to_its_factor(jitter: float) -> None:
    """T3: with jitter a delay lies between itself and (1 + factor) times itself, and varies."""
    rule_ = retry_rule(1, 10, jitter, False)
    random = Random(1)
    drawn = [rule_.delay(1, random) for _ in range(500)]
    assert all(10 <= delay <= 10 * (1 + jitter) for delay in drawn)
    assert min(drawn) < 10 * (1 + jitter / 4)
    assert max(drawn) > 10 * (1 + jitter * 3 / 4)


# --- any life at all


class AnyLife(RuleBasedStateMachine):
    """Whatever happens to a run, its states follow the table, and it does not try too often."""

    life: Life
    do: Do
    allowed: int

    @initialize(
        times=st.integers(0, 4),
        delays=st.lists(st.sampled_from([0.0, 1.5]), max_size=3),
        conditional=st.booleans(),
    )
    def begin(self, times: int, delays: list[float], conditional: bool) -> None:
        self.life = Life()
        self.life.rule = Retry(times, tuple(delays), 0.5, conditional)
        self.life.pend()
        self.allowed = times + 1
        self.do = Do.RUN

    def _runs(self) -> bool:
        return self.life.state.name in ("Running", "Retrying") and self.do is Do.RUN

    @precondition(lambda self: self.life.state.name in ("Pending", "Waiting") and self.life.attempt == 0)
    @rule()
    def start(self) -> None:
        self.life.start()

    @precondition(lambda self: self.life.state.name == "Pending")
    @rule(event=st.sampled_from(["wait", "hit", "not_ready", "fail"]))
    def before_it_runs(self, event: str) -> None:
        self.life.enter(event)

    @precondition(lambda self: self._runs())
    @rule(
        outcome=st.sampled_from(["value", "error", "time", "COMPLETED", "FAILED", "RUNNING", "CRASHED"]),
    )
    def end_the_body(self, outcome: str) -> None:
        if outcome == "value":
            self.do = self.life.returned(1)
        elif outcome == "error":
            self.do = self.life.raised(ValueError("no"))
        elif outcome == "time":
            self.do = self.life.timed_out(TimeoutError("late"))
        else:
            self.do = self.life.returned(State(StateType(outcome)))

    @precondition(lambda self: self.do is Do.ASK)
    @rule(again=st.booleans())
    def answer(self, again: bool) -> None:
        self.do = self.life.decide(again)

    @precondition(lambda self: self.do is Do.SLEEP and not self.life.is_over)
    @rule()
    def wake(self) -> None:
        assert self.life.delay > 0
        self.life.again()
        self.do = Do.RUN

    @precondition(lambda self: not self.life.is_over)
    @rule(event=st.sampled_from(["cancel", "crash"]))
    def break_off(self, event: str) -> None:
        self.life.enter(event)
        self.do = Do.FINISH

    @precondition(lambda self: self.life.is_over)
    @rule(event=st.sampled_from(EVENTS))
    def disturb_a_final_state(self, event: str) -> None:
        if (self.life.state.name, event) in LEGAL:
            return
        with pytest.raises(IllegalTransitionError):
            self.life.enter(event)

    @invariant()
    def states_follow_the_table(self) -> None:
        if not hasattr(self, "life"):
            return
        arrows = {
            (source, name) for event in TABLE for source in TABLE[event][0] for name in [TABLE[event][1]]
        }
        steps = names(self.life)
        assert set(pairwise(steps)) <= arrows

    @invariant()
    def times_increase_and_attempts_are_bounded(self) -> None:
        if not hasattr(self, "life"):
            return
        times = [state.timestamp for state in self.life.states]
        assert times == sorted(set(times))
        assert self.life.attempt <= self.allowed
        assert [state.is_final() for state in self.life.states[:-1]].count(True) == 0


AnyLife.TestCase.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
test_any_life = AnyLife.TestCase
