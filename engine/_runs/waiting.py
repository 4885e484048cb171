"""Waiting for several futures: `wait` and `all_done` for all, `as_completed` for each as it ends."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable
from typing import Any, TypeVar

from .._concurrency.deadlocks import begin_waiting
from .futures import RunFuture, check_futures, check_loop, check_timeout
from .states import COMPLETED

R = TypeVar("R")


async def wait(
    futures: Iterable[RunFuture[R]], timeout: float | None = None
) -> tuple[set[RunFuture[R]], set[RunFuture[R]]]:
    """Wait for all futures, `timeout` seconds at most: `(done, not_done)`. Never raises for a failed run."""
    check_timeout(timeout)
    futures = check_futures("wait", futures)
    check_loop(futures)
    works = {future._work for future in futures if not future._work.done()}
    waiting = begin_waiting(futures, for_good=timeout is None)
    try:
        if works:
            await asyncio.wait(works, timeout=timeout)
    finally:
        if waiting is not None:
            waiting.end()
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
    check_timeout(timeout)
    futures = list(dict.fromkeys(check_futures("as_completed", futures)))
    check_loop(futures)
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
                waiting = begin_waiting([*pending.values()], for_good=left is None)
                try:
                    await asyncio.wait([waiter], timeout=left)
                finally:
                    if waiting is not None:
                        waiting.end()
                if not waiter.done():
                    waiter.cancel()
                    raise TimeoutError(
                        f"{len(pending)} of {len(futures)} futures are unfinished after {timeout:g} s."
                    )
    finally:
        for work in pending:
            work.remove_done_callback(ended)


MANY = 16
"""From how many futures on it pays to give them a turn of the loop before anything else."""


async def all_done(futures: Iterable[RunFuture[Any]], stop_on_failure: bool) -> None:
    """Return when all are done, or one has failed: one callback a future and one waiter for all."""
    futures = list(futures)
    if len(futures) > MANY:
        await asyncio.sleep(0)  # those that end in their first step, mostly all, need no callback then
    pending = {future._work: future for future in futures if not future._work.done()}
    if not pending or (stop_on_failure and any(_has_failed(f) for f in futures if f._work not in pending)):
        return
    check_loop(pending.values())
    waiting = begin_waiting(pending.values())
    waiter = asyncio.get_running_loop().create_future()

    def ended(work: asyncio.Task[None]) -> None:
        future = pending.pop(work)  # lets the asyncio task go
        if not waiter.done() and (not pending or (stop_on_failure and _has_failed(future))):
            waiter.set_result(None)

    for work in pending:
        work.add_done_callback(ended)
    try:
        await waiter
    finally:
        if waiting is not None:
            waiting.end()
        for work in pending:
            work.remove_done_callback(ended)


def _has_failed(future: RunFuture[Any]) -> bool:
    future._settle()
    return future.run.state.type is not COMPLETED
