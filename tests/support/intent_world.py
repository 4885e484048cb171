"""Objects, actors and a trivial model, for the transaction protocol without storages and without a loop.

Every write that reaches the world is checked against the model at once: a plain record may only appear if it is the
committed one or a single writer's new one, nothing may vanish that is committed, and a transaction is committed by
the one write that decides it.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from onceflow.engine._commit.intents import Member, is_grave, parse
from onceflow.engine._commit.requests import (
    ABSENT,
    ANY,
    Ask,
    Conflict,
    Found,
    Put,
    Read,
    Remove,
    Together,
    Visible,
    Where,
)
from onceflow.storage._format.envelope import Header, pack, unpack_header

KEYS: tuple[Where, ...] = (("s1", "a"), ("s1", "b"), ("s1", "c"), ("s2", "a"), ("s2", "d"))
LEASE = 30.0


def record(where: Where, name: str, location: str | None = None) -> bytes:
    """A record that says who wrote it."""
    extra = {"own": True} if location is not None else {}
    header = Header(where[1], run_id=name, location=location, extra=extra)
    return b"".join(pack(header, [name.encode()])[: 1 if location else None])


class Unavailable(Exception):
    """The store did not answer."""


class Loss(NamedTuple):
    """What goes wrong with a request: it may be applied all the same, at once or some time later."""

    applied: bool
    late: bool = False


@dataclass
class World:
    """What lies where, what is committed, and every state that was committed at some time."""

    objects: dict[Where, Found] = field(default_factory=dict)
    history: list[dict[Where, str]] = field(default_factory=lambda: [{}])
    members: dict[str, dict[Where, str]] = field(default_factory=dict)
    decided: set[str] = field(default_factory=set)
    singles: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    late: list[Put | Remove] = field(default_factory=list)
    writes: int = 0
    numbers: Any = field(default_factory=lambda: itertools.count(1))

    @property
    def committed(self) -> dict[Where, str]:
        return self.history[-1]

    def lay(self, where: Where, name: str) -> str:
        """A record from before."""
        self.history.append({**self.committed, where: name})
        self.objects[where] = Found(record(where, name), f"v{next(self.numbers)}")
        return self.objects[where].version

    def read(self, step: Read) -> Found | None:
        found = self.objects.get(step.where)
        if found is None or step.limit is None:
            return found
        return Found(bytes(found.data)[: step.limit], found.version)

    def put(self, step: Put) -> str:
        here = self.objects.get(step.where)
        if step.expect is not ANY and step.expect != (here.version if here is not None else ABSENT):
            raise Conflict
        data = step.data if isinstance(step.data, bytes) else b"".join(step.data)  # type: ignore[arg-type]
        if step.where in KEYS:
            self._check(step.where, here, data)
        self.writes += 1
        self.objects[step.where] = Found(data, f"v{next(self.numbers)}")
        return self.objects[step.where].version

    def remove(self, step: Remove) -> None:
        here = self.objects.get(step.where)
        if here is None or step.expect not in (ANY, here.version):
            return
        if step.where in KEYS:
            assert step.expect is not ANY, "a record's object is never removed whatever it is"
            assert step.where not in self.committed, f"removed what is committed at {step.where}"
        self.writes += 1
        del self.objects[step.where]

    def _check(self, where: Where, here: Found | None, data: bytes) -> None:
        intent = parse(where, data, ())
        before = parse(where, here.data, ()) if here is not None else None
        if intent is not None and intent.decided:
            assert before is not None
            assert (before.tx, before.decided) == (intent.tx, False)
            assert intent.tx not in self.decided
            self.decided.add(intent.tx)
            self.history.append({**self.committed, **self.members[intent.tx]})
        elif intent is not None:
            assert before is None, "an intent is never laid over another"
            old = unpack_header(intent.old)[0].run_id if intent.old else None
            assert old == self.committed.get(where), "an intent keeps what is committed"
        elif is_grave(data, ()):
            if before is None:  # somebody drops the record
                self.history.append({k: v for k, v in self.committed.items() if k != where})
            assert where not in self.committed
        else:
            name = unpack_header(data)[0].run_id
            if name in self.singles and self.committed.get(where) != name:
                assert before is None, "a single record never covers an intent"
                self.history.append({**self.committed, where: name})
            assert self.committed.get(where) == name, f"{name} was never committed at {where}"

    def leftovers(self) -> list[Where]:
        """Objects that are neither committed records nor values that these name."""
        named = {("values", header.location) for header in self.headers() if header.location is not None}
        return [
            where
            for where, found in self.objects.items()
            if (where not in self.committed or parse(where, found.data, ()) is not None)
            and where not in named
        ]

    def headers(self) -> list[Header]:
        return [unpack_header(found.data)[0] for where, found in self.objects.items() if where in KEYS]


@dataclass(eq=False)
class _Way:
    steps: Generator[Any, Any, Any]
    parent: _Way | None = None
    step: Any = None
    children: list[_Way] = field(default_factory=list)
    outcome: Any = None
    error: Exception | None = None
    is_over: bool = False


class Actor:
    """Somebody who carries out steps, one at a time, on as many ways at once as they ask for."""

    def __init__(self, world: World, steps: Generator[Any, Any, Any], name: str = "") -> None:
        self.world = world
        self.name = name
        self.began = len(world.history) - 1
        self.visible = False
        self.root = _Way(steps)
        self.ready: list[_Way] = []
        self._go(self.root)

    @property
    def is_over(self) -> bool:
        return self.root.is_over

    def next(self, at: int = 0) -> Any:
        """The step that `do(at)` carries out."""
        return self.ready[at % len(self.ready)].step

    def do(self, at: int = 0, loss: Loss | None = None, abandoned: bool = False) -> None:
        """Carry out one step of one of the ways."""
        way = self.ready.pop(at % len(self.ready))
        answer, error = None, None
        try:
            answer = self._answer(way.step, loss, abandoned)
        except (Conflict, Unavailable) as raised:
            error = raised
        self._go(way, answer, error)

    def _answer(self, step: Any, loss: Loss | None, abandoned: bool) -> Any:
        if isinstance(step, Ask):
            owner = step.owner[0]
            return owner in self.world.gone or abandoned
        if loss is not None:
            if loss.late and isinstance(step, (Put, Remove)):
                self.world.late.append(step)
            elif loss.applied:
                self._apply(step)
            raise Unavailable
        return self._apply(step)

    def _apply(self, step: Any) -> Any:
        match step:
            case Read():
                return self.world.read(step)
            case Put():
                return self.world.put(step)
            case Remove():
                return self.world.remove(step)
        raise AssertionError(step)

    def _go(self, way: _Way, answer: Any = None, error: Exception | None = None) -> None:
        try:
            step = way.steps.throw(error) if error is not None else way.steps.send(answer)
        except StopIteration as stop:
            self._end(way, stop.value, None)
        except Exception as raised:
            self._end(way, None, raised)
        else:
            if isinstance(step, Visible):
                self.visible = True
                self._go(way)
            elif isinstance(step, Together):
                way.children = children = [_Way(steps, way) for steps in step.ways]
                for child in children:
                    self._go(child)
                if not children:
                    self._go(way, [])
            else:
                way.step = step
                self.ready.append(way)

    def _end(self, way: _Way, outcome: Any, error: Exception | None) -> None:
        way.outcome, way.error, way.is_over = outcome, error, True
        parent = way.parent
        if parent is None:
            self.world.gone.add(self.name)  # whatever it left, it does not go on with it
        if parent is not None and all(child.is_over for child in parent.children):
            errors = [child.error for child in parent.children if child.error is not None]
            outcomes = [child.outcome for child in parent.children]
            parent.children = []
            self._go(parent, outcomes, errors[0] if errors else None)

    def result(self) -> Any:
        """What the steps returned; what they raised is raised."""
        assert self.is_over
        if self.root.error is not None:
            raise self.root.error
        return self.root.outcome

    def crash(self) -> None:
        """The process is killed: no step of it is carried out any more."""
        self.world.gone.add(self.name)
        self.ready.clear()

    def finish(self, most: int = 5_000) -> Any:
        """All that is left, in order."""
        for _ in range(most):
            if self.is_over:
                return self.result()
            self.do()
        raise AssertionError("it does not come to an end")


def member(where: Where, tx: str, **options: Any) -> Member:
    """A member whose record says which transaction wrote it."""
    location = options.pop("location", None)
    value = (("values", location), [b"value of " + tx.encode()]) if location is not None else None
    return Member(where, record(where, tx, location), value=value, values_at="values", **options)
