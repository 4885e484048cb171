"""Driving a coroutine step by step: its suspension points are counted, and it is cancelled at one of them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from typing import Any, Literal

Moment = Literal["asleep", "woken"]


class Stepped:
    """Awaits a coroutine in the caller's asyncio task, and cancels that task at suspension number `at`, from 1 on.

    `asleep`: while what it waits for is under way. `woken`: when that has just come, and the task has not run yet,
    which is when a lock, a slot or a value is lost that was just handed over.
    """

    def __init__(
        self, work: Coroutine[Any, Any, Any], at: int | None = None, moment: Moment = "asleep"
    ) -> None:
        self._work = work
        self._at = at
        self._moment = moment
        self.count = 0
        self.was_cancelled = False

    def __await__(self) -> Generator[Any, Any, Any]:
        value: Any = None
        error: BaseException | None = None
        while True:
            try:
                waits_for = self._work.send(value) if error is None else self._work.throw(error)
            except StopIteration as stop:
                return stop.value
            self.count += 1
            if self.count == self._at:
                self._cancel(waits_for)
            value, error = None, None
            try:
                value = yield waits_for
            except BaseException as raised:
                error = raised

    def _cancel(self, waits_for: Any) -> None:
        self.was_cancelled = True
        task = asyncio.current_task()
        assert task is not None
        if self._moment == "woken" and asyncio.isfuture(waits_for):
            # Called before the task's own callback, since that one is added when it yields.
            waits_for.add_done_callback(lambda _: task.cancel())
        else:
            task.cancel()


async def stepped(steps: Stepped) -> Any:
    """As a coroutine, for `create_task`."""
    return await steps
