"""Tasks that tests of futures wait on: one behind a gate, one that returns, one that fails."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from onceflow.engine import flow, task


class Gate:
    """A task body that waits until it is let through, and tells that it has begun."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.open = asyncio.Event()
        self.ended: list[str] = []

    @property
    def task(self) -> Any:
        return task(name="gated")(self.body)

    async def body(self, value: Any = None) -> Any:
        self.begun.set()
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise
        self.ended.append("finished")
        return value


# Typed as Any where they are given futures in place of values, which no signature can say.
@task
async def _same(x: Any) -> Any:
    return x


@task
async def _fails(x: Any = None) -> Any:
    raise ValueError(x)


same: Any = _same
fails: Any = _fails


async def in_flow(body: Callable[[], Any], **options: Any) -> Any:
    """Run an async function as a flow."""
    return await flow(**options)(body)()
