"""`map`: which arguments are spread over runs, and which go to every run."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from itertools import repeat
from typing import TYPE_CHECKING, Any, TypeVar

from .._runs.futurelists import FutureList, PendingFutureList
from .._runs.futures import Annotation, RunFuture, TaskFuture, allow_failure, unmapped
from .._runs.machine import Life
from .._runs.states import COMPLETED, State
from .._runs.waiting import all_done
from .collector import undisturbed

if TYPE_CHECKING:
    from .task import Task

R = TypeVar("R")
_SCALARS = (str, bytes, bytearray, memoryview, Mapping)


class Spreading(Life):
    """What becomes of a map over unfinished futures, as its owner sees it: one more run of its own."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.pend()


def spread(task: Task[..., R], args: tuple[Any, ...], kwargs: dict[str, Any]) -> FutureList[R]:
    """Submit one run per element. A future among the arguments is awaited first, where it is not done yet."""
    wait_for = kwargs.pop("wait_for", None)
    pending = [each for value in (*args, *kwargs.values()) if (each := _unfinished(value)) is not None]
    if not pending:
        return _spread(task, args, kwargs, wait_for)
    owner, _ = task.owner_for("map")
    life = Spreading(f"{task.name}.map")
    filling: RunFuture[None] = RunFuture(life)  # type: ignore[arg-type]  # as much of a run as a future needs
    futures: PendingFutureList[R] = PendingFutureList(filling)

    async def fill() -> None:
        try:
            await all_done(pending, stop_on_failure=False)
            futures.extend(_spread(task, args, kwargs, wait_for))
        except Exception as error:
            life.enter("fail", error, str(error))
            owner.failed.append(filling)
        else:
            life.start()
            life.returned(None)
        finally:
            owner.running.discard(filling)

    filling.owner = owner
    filling._work = asyncio.get_running_loop().create_task(fill())
    owner.running.add(filling)
    return futures


def _unfinished(value: Any) -> RunFuture[Any] | None:
    """The future that must be done before an argument can be spread."""
    if isinstance(value, Annotation):
        return _unfinished(value.value) if isinstance(value, allow_failure) else None
    if isinstance(value, PendingFutureList):
        value = value._filling
    return value if isinstance(value, RunFuture) and not value.done() else None


def _spread(
    task: Task[..., R], args: tuple[Any, ...], kwargs: dict[str, Any], wait_for: Any
) -> FutureList[R]:
    columns: dict[int | str, list[Any]] = {}
    constants: dict[int | str, Any] = {}
    given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for place, value in given:
        column = _column(value)
        if column is None:
            constants[place] = value.value if isinstance(value, unmapped) else value
        else:
            columns[place] = column
    if not columns:
        raise ValueError(
            f"{task.name}.map() was given nothing to map over: pass at least one iterable "
            "(text, bytes and dicts count as one value each)."
        )
    lengths = {len(column) for column in columns.values()}
    if len(lengths) > 1:
        named = ", ".join(f"{_shown(task, place)}: {len(column)}" for place, column in columns.items())
        raise ValueError(
            f"{task.name}.map() was given iterables of different lengths ({named}). "
            "Make them equal, or wrap what every run shall get in unmapped(…)."
        )
    count = lengths.pop()
    every = [columns[place] if place in columns else repeat(constants[place], count) for place, _ in given]
    rows = zip(*every, strict=True)
    owner, parent = task.owner_for("map")
    extra = {"wait_for": list(wait_for)} if wait_for else {}

    def begin(row: tuple[Any, ...]) -> TaskFuture[R]:
        named = dict(zip(kwargs, row[len(args) :], strict=True)) | extra
        return task.begin(row[: len(args)], named, parent, owner)

    with undisturbed(count):
        if not kwargs and not extra:
            return FutureList([task.begin(row, {}, parent, owner) for row in rows])
        return FutureList(map(begin, rows))


def _column(value: Any) -> list[Any] | None:
    """The elements of an argument that is spread; None for one that goes to every run."""
    if isinstance(value, allow_failure):
        if isinstance(value.value, RunFuture) and value.value.state.type is not COMPLETED:
            return None  # every run gets the exception
        inner = _column(value.value)
        return None if inner is None else [allow_failure(element) for element in inner]
    if isinstance(value, Annotation):
        return None
    if isinstance(value, RunFuture):
        value = value.state.result()
    elif isinstance(value, State):
        value = value.result()
    if isinstance(value, _SCALARS) or not isinstance(value, Iterable):
        return None
    return list(value)


def _shown(task: Task[..., Any], place: int | str) -> str:
    if isinstance(place, str):
        return place
    names = list(task.signature.parameters)[len(task._prefix) :]
    return names[place] if place < len(names) else f"argument {place + 1}"
