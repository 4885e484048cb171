"""The futures of a `map`, as one thing to await."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator, Iterator
from typing import Any, TypeVar

from .futures import RunFuture, TaskFuture, check_timeout
from .states import COMPLETED, State
from .waiting import all_done, wait

R = TypeVar("R")


class FutureList(list["TaskFuture[R]"]):
    """The futures of `map`, in input order. Await it for the list of values; the first failure is raised at once.

    As an argument of a task it stands for that list of values.
    """

    def __await__(self) -> Generator[Any, None, list[R]]:
        return self.result().__await__()

    __hash__ = object.__hash__  # type: ignore[assignment]  # asyncio.gather(a.map(…), b.map(…)) looks it up in a dict
    _filling: RunFuture[None] | None = None

    def is_filled(self) -> bool:
        """Whether the futures exist."""
        return True

    async def wait(self, timeout: float | None = None) -> list[State[R]]:
        """Wait for all, `timeout` seconds at most, and return the states then."""
        await wait(self, timeout)
        return [future.state for future in self]

    async def result(self, timeout: float | None = None, raise_on_failure: bool = True) -> list[R]:
        """The values in input order; `raise_on_failure=False` returns exceptions in their places.

        Raises:
            TimeoutError: Some have not ended by then; they go on.
        """
        check_timeout(timeout)
        try:
            async with asyncio.timeout(timeout):
                await all_done(self, stop_on_failure=raise_on_failure)
        except TimeoutError:
            left = sum(not future.done() for future in self)
            raise TimeoutError(
                f"{left} of {len(self)} runs have not ended within {timeout:g} s; they go on."
            ) from None
        for future in self:
            future._observed = True
        if raise_on_failure:
            for future in self:
                if future._work.done() and (state := future.state).type is not COMPLETED:
                    raise state.error()
        return [future.state.result(raise_on_failure=False) for future in self]


class PendingFutureList(FutureList[R]):
    """The futures of a `map` over a future that was not done yet: there are none before it is awaited."""

    _filling: RunFuture[None]

    def __init__(self, filling: RunFuture[None]) -> None:
        super().__init__()
        self._filling = filling  # pyright: ignore[reportIncompatibleVariableOverride]  #  always set

    async def wait(self, timeout: float | None = None) -> list[State[R]]:
        left = await self._fill(timeout)
        return await super().wait(left)

    async def result(self, timeout: float | None = None, raise_on_failure: bool = True) -> list[R]:
        left = await self._fill(timeout)
        return await super().result(left, raise_on_failure)

    async def _fill(self, timeout: float | None) -> float | None:
        """Wait until the futures exist, and say how much of the time is left."""
        began = time.monotonic()
        await self._filling.result(timeout)
        return None if timeout is None else max(0.0, timeout - (time.monotonic() - began))

    def is_filled(self) -> bool:
        return self._filling.run.state.type is COMPLETED

    def _check_filled(self) -> None:
        if not self._filling.done():
            raise RuntimeError(
                "This map waits for a future among its arguments, so its own futures do not exist yet. "
                "Await the list first, or map over `await future`."
            )
        self._filling.state.result()  # raises what kept the futures from coming into being

    def __iter__(self) -> Iterator[TaskFuture[R]]:
        self._check_filled()
        return super().__iter__()

    def __len__(self) -> int:
        self._check_filled()
        return super().__len__()

    def __getitem__(self, index: Any) -> Any:
        self._check_filled()
        return super().__getitem__(index)
