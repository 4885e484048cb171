"""Deadlocks between runs that wait for each other's futures: refused when the last link of the cycle is about to close.

A run that waits keeps what it waits for, and so do those that cannot end before it has: the runs that called it,
and the flow run that owns it. So whoever is about to wait for a future can follow what that one's run waits for.
A run that nobody can wait for, as that of a flow that was called at the top, closes no cycle, and notes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from .._errors import DeadlockError
from .._runs.run import current_run

if TYPE_CHECKING:
    from .._runs.futures import RunFuture
    from .._runs.run import Run

REACH = 100
"""How many waits are followed: cycles are short, and a chain of 10 000 runs shall not be walked 10 000 times."""


class Waiting:
    """A wait that is noted until `end` is called."""

    __slots__ = ("_line",)

    def __init__(self, line: list[Run], futures: Collection[RunFuture[Any]]) -> None:
        self._line = line
        for run in line:
            if run.waits is None:
                run.waits = {}
            run.waits[self] = futures

    def end(self) -> None:
        for run in self._line:
            assert run.waits is not None
            del run.waits[self]


def begin_waiting(futures: Collection[RunFuture[Any]], *, for_good: bool = True) -> Waiting | None:
    """The current run is about to wait, `for_good` or with a timeout. What is returned must be ended.

    Raises:
        DeadlockError: One of these runs waits, directly or through others, for the current one.
    """
    run = current_run.get()
    if run is None or (run.parent is None and not run.is_submitted):
        return None
    line = list(_line(run))
    _refuse_cycle(futures, line)
    return Waiting(line, futures) if for_good else None


def _line(run: Run | None) -> Iterator[Run]:
    """The run, and those that cannot end before it has."""
    while run is not None:
        yield run
        above = run.flow_run if run.is_submitted else run.parent
        run = above if above is not run else None


def _refuse_cycle(futures: Iterable[RunFuture[Any]], line: list[Run]) -> None:
    way: dict[int, list[Run]] = {}
    ahead: list[tuple[Run, list[Run]]] = [(future.run, []) for future in futures if not future._work.done()]
    while ahead and len(way) < REACH:
        run, before = ahead.pop()
        if id(run) in way:
            continue
        chain = way[id(run)] = [*before, run]
        if run in line:
            back = [each.name for each in reversed(line[: line.index(run)])]
            raise DeadlockError([*(each.name for each in chain), *back, chain[0].name])
        for group in (getattr(run, "waits", None) or {}).values():
            ahead += [(future.run, chain) for future in group if not future._work.done()]
