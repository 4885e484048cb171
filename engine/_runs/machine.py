"""The life of a run, decided without I/O: events come in, states and instructions go out.

A `Life` knows its states, its attempts and the rule for the next one; it neither sleeps nor calls anybody.
The shell (`_execution/perform`) tells it what happened and does what it says, so that every transition can be
driven by a table in the tests, without an event loop. (The pattern: dask's worker_state_machine, httpcore's pool.)

    event        from                                         to             type
    pend         (new)                                        Pending        PENDING
    not_ready    Pending                                      NotReady       PENDING, final
    wait         Pending, Running, Retrying                   Waiting        PENDING
    start        Pending, Waiting                             Running        RUNNING
    hit          Pending, Waiting                             Cached         COMPLETED, final
    complete     Running, Retrying                            Completed      COMPLETED, final
    fail         any that is not final                        Failed         FAILED, final
    time_out     Waiting, Running, Retrying                   TimedOut       FAILED, final
    put_off      Running, Retrying                            AwaitingRetry  SCHEDULED
    retry        Running, Retrying, AwaitingRetry, Waiting    Retrying       RUNNING
    cancel       any that is not final                        Cancelled      CANCELLED, final
    crash        any that is not final                        Crashed        CRASHED, final
    roll_back    Completed, Cached                            RolledBack     COMPLETED, final
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from random import Random
from typing import Any, NamedTuple

from .states import (
    CANCELLED,
    COMPLETED,
    CRASHED,
    FAILED,
    FINAL,
    PENDING,
    RUNNING,
    SCHEDULED,
    State,
    StateType,
    now_us,
    quick,
)

_BODY_RUNS = ("Running", "Retrying")
_OPEN = ("Pending", "Waiting", "Running", "Retrying", "AwaitingRetry")
TABLE: dict[str, tuple[tuple[str, ...], str, StateType]] = {
    "pend": (("",), "Pending", PENDING),
    "not_ready": (("Pending",), "NotReady", PENDING),
    "wait": (("Pending", "Running", "Retrying"), "Waiting", PENDING),
    "start": (("Pending", "Waiting"), "Running", RUNNING),
    "hit": (("Pending", "Waiting"), "Cached", COMPLETED),
    "complete": (("Running", "Retrying"), "Completed", COMPLETED),
    "fail": (_OPEN, "Failed", FAILED),
    "time_out": (("Waiting", "Running", "Retrying"), "TimedOut", FAILED),
    "put_off": (("Running", "Retrying"), "AwaitingRetry", SCHEDULED),
    "retry": (("Running", "Retrying", "AwaitingRetry", "Waiting"), "Retrying", RUNNING),
    "cancel": (_OPEN, "Cancelled", CANCELLED),
    "crash": (_OPEN, "Crashed", CRASHED),
    "roll_back": (("Completed", "Cached"), "RolledBack", COMPLETED),
}
_ARROWS = {
    (source, event): (name, type_) for event, (sources, name, type_) in TABLE.items() for source in sources
}


class Do(Enum):
    """What the shell has to do next."""

    RUN = "run the body again, now"
    SLEEP = "wait for `delay` seconds, then enter `retry` and run the body"
    ASK = "ask the retry condition, then tell `decide`"
    FINISH = "nothing more: the final state is in"


class Retry(NamedTuple):
    """When to try again. `delays` are seconds: for the first retry, the second …; the last one goes on."""

    times: int = 0
    delays: Sequence[float] = ()
    jitter: float = 0.0
    conditional: bool = False

    def delay(self, attempt: int, random: Random) -> float:
        """Seconds before the attempt after `attempt`; jitter lengthens it by up to its factor."""
        if not self.delays:
            return 0.0
        delay = self.delays[min(attempt, len(self.delays)) - 1]
        return delay * (1 + random.random() * self.jitter) if self.jitter else delay


class IllegalTransitionError(AssertionError):
    """The shell told a life something that cannot have happened: a bug in onceflow."""


_NEVER = Retry()
_random = Random()


class Life:
    """One run's states, from Pending to a final one. Attributes not set yet are read from the class."""

    rule: Retry = _NEVER
    attempt: int = 0
    delay: float = 0.0
    _proposed: State[Any] | None = None
    _pended: int
    _state: State[Any] | None
    """None for Pending, which says nothing but since when: `_pended`. It is made when somebody looks."""

    def pend(self) -> None:
        """The life begins."""
        self._pended = now_us()
        self._state = None

    def enter(self, event: str, data: Any = None, message: str | None = None) -> State[Any]:
        """Take the arrow `event` of the table from the current state, and return the new state."""
        before = self._state
        arrow = _ARROWS.get(("Pending" if before is None else before.name, event))
        if arrow is None:
            arrow = self._from_renamed(event)
        self._state = state = quick(arrow[1], arrow[0], data, message)
        state.before = before
        return state

    def _add(self, state: State[Any]) -> None:
        state.before, self._state = self._state, state

    def _from_renamed(self, event: str) -> tuple[str, StateType]:
        """The arrow from a state that the user named: Completed by another name may still be rolled back."""
        state = self.state
        if event == "roll_back" and state.type is COMPLETED and state.name != "RolledBack":
            return _ARROWS["Completed", event]
        raise IllegalTransitionError(f"{event!r} cannot happen to a run in state {state!r}")

    @property
    def state(self) -> State[Any]:
        """The state that the run is in."""
        if self._state is None:
            self._state = self._pending()
        return self._state

    def _pending(self) -> State[Any]:
        pending: State[Any] = quick(PENDING, "Pending")
        pending._moment = self._pended
        return pending

    @property
    def states(self) -> list[State[Any]]:
        """All states so far, the first one first."""
        states: list[State[Any]] = []
        state: State[Any] | None = self.state
        while state is not None:
            states.append(state)
            state = state.before
        if states[-1].name != "Pending":
            first = states[-1].before = self._pending()
            states.append(first)
        return states[::-1]

    @property
    def is_over(self) -> bool:
        return self._state is not None and self._state.is_final()

    def start(self) -> State[Any]:
        """The first attempt begins."""
        self.attempt = 1
        return self.enter("start")

    def returned(self, value: Any) -> Do:
        """The body returned; a `State` that it returns is final, unless it failed and attempts are left."""
        if not isinstance(value, State):
            self.enter("complete", value)
            return Do.FINISH
        self._check_running("returned")
        if value.type not in FINAL:
            return self._propose(
                quick(FAILED, "Failed", None, f"the body returned the unfinished state {value!r}")
            )
        # A copy: the user may have made it before the run began, or return the same one from several runs.
        mine = quick(value.type, value.name, value.data, value.message)
        if mine.type is FAILED:
            return self._propose(mine)
        self._add(mine)
        return Do.FINISH

    def raised(self, error: BaseException) -> Do:
        """The body raised an ordinary exception."""
        self._check_running("raised")
        return self._propose(quick(FAILED, "Failed", error, _describe(error)))

    def timed_out(self, error: BaseException) -> Do:
        """The body was still running when its time was over."""
        self._check_running("timed out")
        return self._propose(quick(FAILED, "TimedOut", error, str(error)))

    def _check_running(self, event: str) -> None:
        if self.state.name not in _BODY_RUNS:
            raise IllegalTransitionError(f"the body of a run in state {self.state!r} cannot have {event}")

    def _propose(self, failed: State[Any]) -> Do:
        if self.attempt > self.rule.times:
            self._add(failed)
            return Do.FINISH
        self._proposed = failed
        return Do.ASK if self.rule.conditional else self.decide(True)

    @property
    def proposed(self) -> State[Any]:
        """The failed state that is under decision: what a retry condition is asked about."""
        assert self._proposed is not None
        return self._proposed

    def decide(self, again: bool) -> Do:
        """The retry condition said whether to try again."""
        failed, self._proposed = self.proposed, None
        if not again:
            self._add(failed)
            return Do.FINISH
        self.delay = self.rule.delay(self.attempt, _random)
        if self.delay > 0:
            self.enter("put_off", message=failed.message)
            return Do.SLEEP
        self.again()
        return Do.RUN

    def again(self) -> State[Any]:
        """The next attempt begins."""
        self.attempt += 1
        return self.enter("retry")


def _describe(error: BaseException) -> str:
    text = str(error)
    name = type(error).__name__
    return f"{name}: {text}" if text else name


def retry_rule(
    times: int,
    delays: float | Sequence[float] | Callable[[int], float | Sequence[float]] | None,
    jitter: float | None,
    conditional: bool,
) -> Retry:
    """The rule that the options `retries`, `retry_delay_seconds`, … describe."""
    given = delays(times) if callable(delays) else delays
    if given is None or given == 0:
        given = ()
    elif isinstance(given, (int, float)):
        given = (float(given),)
    return Retry(times, tuple(given), jitter or 0.0, conditional)
