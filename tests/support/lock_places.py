"""Where the tests of lock managers keep locks, and how they wait."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NamedTuple

import pytest
from tcp_proxy import TcpProxy


class Place(NamedTuple):
    """Where locks are kept: the kind, the URL, and whether other processes reach it."""

    kind: str
    url: str
    between_processes: bool = True
    leased: bool = False


async def until(condition: Callable[[], bool | Awaitable[bool]], within: float = 10) -> None:
    """Look again and again until it is true; the deadline is for tests that fail."""
    async with asyncio.timeout(within):
        while True:
            found = condition()
            if found if isinstance(found, bool) else await found:
                return
            await asyncio.sleep(0.002)


async def turns(number: int) -> None:
    """Let the loop go round so many times."""
    for _ in range(number):
        await asyncio.sleep(0)


async def cancel_on_the_wire(proxy: TcpProxy, work: Coroutine[Any, Any, object]) -> None:
    """Cancel it while the proxy holds its request back, and let the request arrive then."""
    proxy.requests.clear()
    asking = asyncio.create_task(work)
    await turns(20)
    asking.cancel()
    await turns(20)
    proxy.requests.set()
    with pytest.raises(asyncio.CancelledError):
        await asking
