"""Hops from the event loop to a few threads and back, many at a time.

The dear part of a thread hop is neither the work nor the thread but the two wake-ups, of the thread and of
the loop: ten times an inline read. So hops are queued, a thread that is awake takes them until none is left,
and the loop is woken once for whatever is done by then. One at a time this costs a little less than
`loop.run_in_executor` (no concurrent future, no chaining); a thousand at once share a few wake-ups.

One thread is fastest as long as the files are in memory, for several fight over the interpreter; where a disk
is waited for, more are. So a second one is woken, and a third, while hops queue and those awake take too few.

A hop is never left behind: cancelled before its turn it is withdrawn and nothing happens; cancelled while it
runs it is awaited to its end, however often the cancellation is repeated, and raised then. Otherwise a write
that nobody waits for could land after a later one.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar, TypeVarTuple
from weakref import WeakSet

T = TypeVar("T")
Args = TypeVarTuple("Args")

_TICK = 0.001  # seconds between two looks while hops queue; epoll knows no less
_ENOUGH = 4  # hops for a thread and tick: what is slower than 250 µs waits for something
_CROWD = 8  # hops in the queue, from which on the loop is not woken for each


class Hops:
    """A bounded pool of threads that serves any number of loops. Opens nothing before its first hop."""

    def __init__(self, threads: int, name: str) -> None:
        self._threads, self._name = threads, name
        self._closed = False
        self._forget()
        _alive.add(self)

    def _forget(self) -> None:
        """The state of a new pool; a forked child returns to it: it has no thread, and maybe a held lock."""
        self._lock = threading.Lock()
        self._queue: deque[_Hop[Any]] = deque()
        self._awake = 0  # threads that serve
        self._taken, self._looked = 0, 0.0  # hops begun since the time of the last tick
        self._pool: ThreadPoolExecutor | None = None
        self._outboxes: dict[asyncio.AbstractEventLoop, _Outbox] = {}

    async def run(
        self, function: Callable[[*Args], T], *args: *Args, on_cancel: Callable[[], object] | None = None
    ) -> T:
        """What `function(*args)` returns or raises in one of the threads.

        When cancelled it is withdrawn; if it runs already, `on_cancel` is called, which may ask it to stop,
        and it is awaited to its end.

        Raises:
            RuntimeError: The pool is closed.
        """
        hop = _Hop(function, args, self._outbox(asyncio.get_running_loop()))
        self._send(hop)
        try:
            await hop.future
            return hop.take()
        except asyncio.CancelledError:
            if not self._withdraw(hop):
                if on_cancel is not None:
                    on_cancel()
                await hop.to_the_end()
            raise

    def later(self, function: Callable[[], object]) -> None:
        """Have it done after what is queued, unless the pool is closed. Nobody hears of its outcome."""
        try:
            self._send(_Hop(function, (), None))
        except RuntimeError:
            pass

    def executor(self) -> ThreadPoolExecutor:
        """The threads themselves, for libraries that take an executor."""
        with self._lock:
            if self._closed:
                raise RuntimeError("The thread pool is closed.")
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._threads, self._name)
            return self._pool

    def close(self) -> None:
        """Take no more hops; the threads end when those that were taken are done. Idempotent."""
        with self._lock:
            self._closed = True
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False)

    def tick(self) -> bool:
        """Wake another thread if hops queue and those awake take few; whether to look again."""
        with self._lock:
            now = time.monotonic()
            if self._queue and now - self._looked >= _TICK:
                slow = self._taken < _ENOUGH * self._awake * (now - self._looked) / _TICK
                if slow and self._awake < self._threads and not self._closed:
                    self._wake()
                self._looked, self._taken = now, 0
            return bool(self._queue)

    def _send(self, hop: _Hop[Any]) -> None:
        self.executor()  # made, or refused
        with self._lock:
            self._queue.append(hop)
            if self._awake == 0:
                self._looked, self._taken = time.monotonic(), 0
                self._wake()
                return
        if hop.outbox is not None:
            hop.outbox.watch()

    def _wake(self) -> None:
        assert self._pool is not None
        self._pool.submit(self._serve)
        self._awake += 1

    def _withdraw(self, hop: _Hop[Any]) -> bool:
        with self._lock:
            hop.withdrawn = not hop.begun
            return hop.withdrawn

    def _next(self) -> _Hop[Any] | None:
        with self._lock:
            while self._queue:
                hop = self._queue.popleft()
                if not hop.withdrawn:
                    hop.begun = True
                    self._taken += 1
                    return hop
            self._awake -= 1
            return None

    def _serve(self) -> None:
        while (hop := self._next()) is not None:
            hop.work()
            if hop.outbox is not None:
                hop.outbox.put(hop, len(self._queue))
            del hop  # a thread that waits must not keep the last value alive

    def _outbox(self, loop: asyncio.AbstractEventLoop) -> _Outbox:
        outbox = self._outboxes.get(loop)
        if outbox is None:
            with self._lock:
                for gone in [one for one in self._outboxes if one.is_closed()]:
                    del self._outboxes[gone]
                outbox = self._outboxes.setdefault(loop, _Outbox(loop, self))
        return outbox


class _Hop(Generic[T]):
    """One function on its way: begun under the pool's lock, worked in a thread, settled on the loop."""

    __slots__ = (
        "args",
        "begun",
        "ended",
        "error",
        "function",
        "future",
        "outbox",
        "value",
        "waiter",
        "withdrawn",
    )

    def __init__(
        self,
        function: Callable[..., T],
        args: tuple[Any, ...],
        outbox: _Outbox | None,
    ) -> None:
        self.function, self.args, self.outbox = function, args, outbox
        if outbox is not None:
            self.future: asyncio.Future[None] = outbox.loop.create_future()
        self.waiter: asyncio.Future[None] | None = None
        self.value: T | None = None
        self.error: BaseException | None = None
        self.begun = self.withdrawn = self.ended = False

    def work(self) -> None:
        try:
            self.value = self.function(*self.args)
        except BaseException as error:
            self.error = error

    def settle(self) -> None:
        self.ended = True
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)
        if self.future.done():
            return  # cancelled
        if self.error is None:
            self.future.set_result(None)
        else:
            self.future.set_exception(self.error)
            self.error = None  # it holds the frame that holds this hop

    def take(self) -> T:
        """The value, for the caller alone: the loop keeps a future, and so its result, until the caller's step ends."""
        value, self.value = self.value, None
        return value  # type: ignore[return-value]

    async def to_the_end(self) -> None:
        while not self.ended:
            self.waiter = asyncio.get_running_loop().create_future()
            try:
                await self.waiter
            except asyncio.CancelledError:
                pass  # told once already, and raised by the caller as soon as the thread is out


class _Outbox:
    """What is done and belongs to one loop; the loop is woken once for all of it.

    While many hops queue the loop looks by itself at every tick: woken for each of them, it would take the
    interpreter from the threads each time.
    """

    __slots__ = ("_done", "_hops", "_ticking", "_woken", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop, hops: Hops) -> None:
        self.loop, self._hops = loop, hops
        self._done: deque[_Hop[Any]] = deque()
        self._woken = self._ticking = False

    def put(self, hop: _Hop[Any], queued: int) -> None:
        self._done.append(hop)
        if not self._woken and (queued < _CROWD or not self._ticking):
            self._woken = True  # two threads may both come here: the second delivery finds nothing to do
            try:
                self.loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:
                self._done.clear()  # the loop is closed, so nobody waits any more

    def watch(self) -> None:
        if not self._ticking:
            self._ticking = True
            self.loop.call_later(_TICK, self._tick)

    def _tick(self) -> None:
        self._ticking = False  # before the look: what is put after it wakes the loop again
        self._deliver()
        if self._hops.tick():
            self.watch()

    def _deliver(self) -> None:
        self._woken = False
        while self._done:
            self._done.popleft().settle()


_alive: WeakSet[Hops] = WeakSet()


def _after_fork() -> None:
    for hops in list(_alive):
        hops._forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
