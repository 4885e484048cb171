"""Futures of submitted runs, and what stands in for a value: `unmapped`, `allow_failure`, `quote`."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from types import CodeType, FunctionType, ModuleType, NoneType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from ._context import current_run
from ._errors import DeadlockError
from ._states import COMPLETED, State

if TYPE_CHECKING:
    from ._context import FlowRun, Run, TaskRun

T = TypeVar("T")
R = TypeVar("R")


class Annotation(Generic[T]):
    """An argument with a note to the engine; the body sees the bare value."""

    __slots__ = ("value",)

    def __init__(self, value: T) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.value!r})"


class unmapped(Annotation[T]):
    """`t.map(xs, unmapped(y))`: every run gets the whole `y`."""


class allow_failure(Annotation[T]):
    """`t.submit(allow_failure(future))`: runs also when the future failed, and is given its exception."""


class quote(Annotation[T]):
    """`t.submit(quote(x))`: `x` is handed on as it is, neither searched for futures nor awaited."""


class RunFuture(Generic[R]):
    """A run that is under way on the caller's loop. Await it for its value; what the run raised is raised.

    Awaiting does not own the run: when the awaiting task is cancelled, the run goes on; `cancel()` ends it,
    and so does the end of the flow run or engine that owns it. A future can be awaited by any number of
    tasks of its loop, any number of times.
    """

    __slots__ = ("__weakref__", "_observed", "_work", "run")

    _work: asyncio.Task[None]

    def __init__(self, run: Run) -> None:
        self.run = run
        self._observed = False

    @property
    def id(self) -> str:
        """The run's id."""
        return self.run.id

    @property
    def name(self) -> str:
        """The run's name."""
        return self.run.name

    @property
    def state(self) -> State[R]:
        """The run's state now. Looking at a final state counts as having noticed a failure."""
        self._settle()
        state = self.run.states[-1]
        if state.is_final():
            self._observed = True
        return state

    def done(self) -> bool:
        """Whether the run has ended."""
        return self._work.done()

    def cancel(self) -> bool:
        """Ask the run to end as Cancelled; whether it was still running. What it awaits is cancelled as well."""
        return self._work.cancel()

    async def wait(self, timeout: float | None = None) -> State[R] | None:
        """Wait for the end of the run, `timeout` seconds at most, and return its final state, else None.

        Never raises for a failed run, and never ends it.
        """
        if timeout is not None and timeout < 0:
            raise ValueError(f"timeout must not be negative, got {timeout}.")
        if not self._work.done():
            self._refuse_deadlock()
            await asyncio.wait([self._work], timeout=timeout)
        return self.state if self._work.done() else None

    async def result(self, timeout: float | None = None, raise_on_failure: bool = True) -> R:
        """The run's value, after `timeout` seconds at most; `raise_on_failure=False` returns an exception instead.

        Raises:
            TimeoutError: The run has not ended by then; it goes on.
        """
        state = await self.wait(timeout)
        if state is None:
            raise TimeoutError(f"Run {self.name!r} has not ended within {timeout:g} s; it goes on.")
        return state.result(raise_on_failure)

    def __await__(self) -> Generator[Any, None, R]:
        self._observed = True
        if not self._work.done():
            self._refuse_deadlock()
            yield from _until_done(self._work).__await__()
        self._settle()
        state = self.run.states[-1]
        if state.type is COMPLETED:
            return cast(R, state.data)
        raise state.error()

    def _settle(self) -> None:
        """A run cancelled before its first step never got to say so itself."""
        if self._work.done() and not self.run.is_over:
            self.run.enter("cancel", message="cancelled before it began")

    def _refuse_deadlock(self) -> None:
        waiter: Run | None = current_run.get()
        chain = [self.run.name]
        while waiter is not None:
            chain.append(waiter.name) if waiter is not self.run else None
            if waiter is self.run:
                raise DeadlockError([self.run.name, *reversed(chain[1:]), self.run.name])
            waiter = waiter.parent

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} {self.run.states[-1]!r}>"


async def _until_done(work: asyncio.Task[None]) -> None:
    """Wait for a task without owning it: `asyncio.shield` without its second future."""
    waiter = asyncio.get_running_loop().create_future()
    wake = partial(_wake, waiter)
    work.add_done_callback(wake)
    try:
        await waiter
    except BaseException:
        work.remove_done_callback(wake)
        raise


def _wake(waiter: asyncio.Future[None], _: object) -> None:
    if not waiter.done():
        waiter.set_result(None)


class TaskFuture(RunFuture[R]):
    """The future of a submitted task run."""

    __slots__ = ()

    run: TaskRun

    @property
    def task_run_id(self) -> str:
        """The task run's id."""
        return self.run.id


class FlowFuture(RunFuture[R]):
    """The future of a flow that runs in the background of an engine."""

    __slots__ = ()

    run: FlowRun

    @property
    def flow_run_id(self) -> str:
        """The flow run's id."""
        return self.run.id


class FutureList(list["TaskFuture[R]"]):
    """The futures of `map`, in input order. Await it for the list of values; the first failure is raised at once.

    As an argument of a task it stands for that list of values.
    """

    def __await__(self) -> Generator[Any, None, list[R]]:
        return self.result().__await__()

    async def _filled(self) -> None:
        """Return when the futures exist."""

    async def wait(self, timeout: float | None = None) -> list[State[R]]:
        """Wait for all, `timeout` seconds at most, and return the states then."""
        await wait(self, timeout)
        return [future.state for future in self]

    async def result(self, timeout: float | None = None, raise_on_failure: bool = True) -> list[R]:
        """The values in input order; `raise_on_failure=False` returns exceptions in their places.

        Raises:
            TimeoutError: Some have not ended by then; they go on.
        """
        async with asyncio.timeout(timeout):
            await _all_done(self, stop_on_failure=raise_on_failure)
        for future in self:
            future._observed = True
        if raise_on_failure:
            for future in self:
                if future._work.done() and (state := future.state).type is not COMPLETED:
                    raise state.error()
        return [future.state.result(raise_on_failure=False) for future in self]


class PendingFutureList(FutureList[R]):
    """The futures of a `map` over a future that was not done yet: there are none before it is awaited."""

    _filling: asyncio.Task[None] | None = None

    def fill_by(self, filling: asyncio.Task[None]) -> FutureList[R]:
        self._filling = filling
        return self

    async def wait(self, timeout: float | None = None) -> list[State[R]]:
        await self._filled()
        return await super().wait(timeout)

    async def result(self, timeout: float | None = None, raise_on_failure: bool = True) -> list[R]:
        await self._filled()
        return await super().result(timeout, raise_on_failure)

    async def _filled(self) -> None:
        if self._filling is not None:
            await self._filling

    def _check_filled(self) -> None:
        if self._filling is not None and not self._filling.done():
            raise RuntimeError(
                "This map waits for a future among its arguments, so its own futures do not exist yet. "
                "Await the list first, or map over `await future`."
            )

    def __iter__(self) -> Iterator[TaskFuture[R]]:
        self._check_filled()
        return super().__iter__()

    def __len__(self) -> int:
        self._check_filled()
        return super().__len__()

    def __getitem__(self, index: Any) -> Any:
        self._check_filled()
        return super().__getitem__(index)


async def _all_done(futures: Iterable[RunFuture[Any]], stop_on_failure: bool) -> None:
    """Return when all are done, or one has failed: one callback a future and one waiter for all."""
    pending = {future._work: future for future in futures if not future._work.done()}
    if not pending or (stop_on_failure and any(_has_failed(f) for f in futures if f._work not in pending)):
        return
    next(iter(pending.values()))._refuse_deadlock()
    waiter = asyncio.get_running_loop().create_future()
    left = len(pending)

    def ended(work: asyncio.Task[None]) -> None:
        nonlocal left
        left -= 1
        if not waiter.done() and (left == 0 or (stop_on_failure and _has_failed(pending[work]))):
            waiter.set_result(None)

    for work in pending:
        work.add_done_callback(ended)
    try:
        await waiter
    finally:
        for work in pending:
            work.remove_done_callback(ended)


def _has_failed(future: RunFuture[Any]) -> bool:
    future._settle()
    return future.run.states[-1].type is not COMPLETED


async def wait(
    futures: Iterable[RunFuture[R]], timeout: float | None = None
) -> tuple[set[RunFuture[R]], set[RunFuture[R]]]:
    """Wait for all futures, `timeout` seconds at most: `(done, not_done)`. Never raises for a failed run."""
    if timeout is not None and timeout < 0:
        raise ValueError(f"timeout must not be negative, got {timeout}.")
    futures = list(futures)
    works = {future._work for future in futures if not future._work.done()}
    if works:
        await asyncio.wait(works, timeout=timeout)
    done = {future for future in futures if future._work.done()}
    for future in done:
        future._settle()
    return done, set(futures) - done


async def as_completed(
    futures: Iterable[RunFuture[R]], timeout: float | None = None
) -> AsyncIterator[RunFuture[R]]:
    """Yield each future when its run ends, the first to finish first.

    Raises:
        TimeoutError: After `timeout` seconds in all, saying how many are unfinished. With a timeout of zero
            those that are already done are still yielded.
    """
    if timeout is not None and timeout < 0:
        raise ValueError(f"timeout must not be negative, got {timeout}.")
    futures = list(dict.fromkeys(futures))
    loop = asyncio.get_running_loop()
    finished: deque[RunFuture[R]] = deque(future for future in futures if future._work.done())
    pending = {future._work: future for future in futures if not future._work.done()}
    deadline = None if timeout is None else loop.time() + timeout
    waiter: asyncio.Future[None] | None = None

    def ended(work: asyncio.Task[None]) -> None:
        finished.append(pending.pop(work))
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    for work in list(pending):
        work.add_done_callback(ended)
    try:
        while finished or pending:
            while finished:
                yield finished.popleft()
            if pending:
                waiter = loop.create_future()
                left = None if deadline is None else max(0.0, deadline - loop.time())
                await asyncio.wait([waiter], timeout=left)
                if not waiter.done():
                    waiter.cancel()
                    raise TimeoutError(f"{len(pending)} of {len(futures)} futures are unfinished after {timeout:g} s.")
    finally:
        for work in pending:
            work.remove_done_callback(ended)


# --- futures as arguments

# Types that hold no future: whatever else an argument is made of is looked into.
LEAVES: frozenset[type] = frozenset(
    {NoneType, bool, int, float, complex, str, bytes, bytearray, type, range, slice, FunctionType, ModuleType, CodeType}
)
_walks: dict[type, Callable[[Any], Sequence[Any]] | None] = {
    list: list,
    tuple: list,
    set: list,
    frozenset: list,
    dict: lambda mapping: [*mapping.keys(), *mapping.values()],
}


def _members_of(kind: type) -> Callable[[Any], Sequence[Any]] | None:
    """How to get at what a value of this type holds; None where it holds no future."""
    if is_dataclass(kind):
        names = [field.name for field in fields(kind)]
        return lambda value: [getattr(value, name, None) for name in names]
    for container in (dict, list, tuple, set, frozenset):
        if issubclass(kind, container):
            return _walks[container]
    return None


def find_marked(value: Any, found: list[Any], seen: set[int]) -> None:
    """Collect futures and annotations in a value, at any depth; iterators are never touched.

    A container of leaves costs one pass in C (`set(map(type, …))`), and none is walked twice.
    """
    kind = type(value)
    if kind in LEAVES:
        return
    if issubclass(kind, (RunFuture, Annotation, FutureList)):
        found.append(value)
        if isinstance(value, allow_failure):
            find_marked(value.value, found, seen)
        return
    if kind not in _walks:
        _walks[kind] = _members_of(kind)
    members_of = _walks[kind]
    if members_of is None or id(value) in seen:
        return
    seen.add(id(value))
    members = members_of(value)
    kinds = set(map(type, members))
    if not kinds <= LEAVES:
        for member in members:
            if type(member) not in LEAVES:
                find_marked(member, found, seen)


def replace_marked(value: Any, settled: dict[int, Any], memo: dict[int, Any]) -> Any:
    """The value with every marked part replaced; what holds none is the same object, structure is kept."""
    kind = type(value)
    if kind in LEAVES:
        return value
    if id(value) in settled:
        return settled[id(value)]
    if _walks.get(kind) is None or id(value) in memo:
        return memo.get(id(value), value)
    memo[id(value)] = value  # a cycle ends here
    memo[id(value)] = _rebuilt(value, kind, settled, memo)
    return memo[id(value)]


def _rebuilt(value: Any, kind: type, settled: dict[int, Any], memo: dict[int, Any]) -> Any:
    def new(part: Any) -> Any:
        return replace_marked(part, settled, memo)

    if isinstance(value, dict):
        items = [(new(key), new(item)) for key, item in value.items()]
        if all(a is b and c is d for (a, c), (b, d) in zip(items, value.items(), strict=True)):
            return value
        copy = value.copy()
        copy.clear()
        copy.update(items)
        return copy
    if isinstance(value, (list, tuple, set, frozenset)):
        parts = [new(part) for part in value]
        if all(a is b for a, b in zip(parts, value, strict=True)):
            return value
        return kind(*parts) if hasattr(kind, "_fields") else kind(parts)
    changed = {
        field.name: part
        for field in fields(value)
        if (part := new(old := getattr(value, field.name, None))) is not old
    }
    if not changed:
        return value
    from copy import copy as shallow

    twin = shallow(value)
    for name, part in changed.items():
        object.__setattr__(twin, name, part)
    return twin


class NotReady(Exception):
    """A run that this one depends on did not complete."""

    def __init__(self, upstream: Run) -> None:
        self.upstream = upstream
        super().__init__(upstream)


async def settle(marked: Sequence[Any]) -> dict[int, Any]:
    """Await what was found, and say what stands for each: by the id of the marked part.

    Raises:
        NotReady: A future that is not under `allow_failure` did not complete.
    """
    settled: dict[int, Any] = {}
    lists = [part for part in marked if isinstance(part, FutureList)]
    for each in lists:
        await each._filled()
    futures = [part for part in marked if isinstance(part, RunFuture)] + [future for each in lists for future in each]
    forgiven = {
        id(inner)
        for part in marked
        if isinstance(part, allow_failure)
        for inner in _futures_in(part.value)
    }
    await _all_done(futures, stop_on_failure=False)
    for future in futures:
        state = future.state
        if state.type is COMPLETED:
            settled[id(future)] = state.data
        elif id(future) in forgiven:
            settled[id(future)] = state.error()
        else:
            raise NotReady(future.run)
    for part in reversed(marked):
        if isinstance(part, allow_failure):
            settled[id(part)] = replace_marked(part.value, settled, {})
        elif isinstance(part, Annotation):
            settled[id(part)] = part.value
        elif isinstance(part, FutureList):
            settled[id(part)] = [settled[id(future)] for future in part]
    return settled


def _futures_in(value: Any) -> list[Any]:
    found: list[Any] = []
    find_marked(value, found, set())
    return [
        future
        for part in found
        for future in (part if isinstance(part, FutureList) else [part])
        if isinstance(future, RunFuture)
    ]


