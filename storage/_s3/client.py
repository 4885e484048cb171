"""One pooled aiobotocore client for each event loop, opened on first use, closed with the loop.

aiobotocore takes 0.4–1.3 s to import and the first client 60–200 ms to make, most of it reading JSON; both
happen in a worker thread. A client belongs to the loop that first sends with it, to one process and, because
botocore guards the renewal of credentials by asyncio locks, to a session of its own. What the sessions read
from disk is shared: that makes a further one cost 8 ms and 0.4 MB instead of 66 ms and growing.
"""

from __future__ import annotations

import asyncio
import io
import os
import threading
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

from .._errors import StorageClosedError, StorageConfigurationError
from .._runtime.loop_end import CLIENTS, at_loop_end, forget

_EXPECT_FROM = 64 * 1024
"""Bytes from which a PUT asks the server first (`Expect: 100-continue`); below, that wastes a round trip."""

_shared_loader: Any = None  # botocore's reader of service descriptions: no loop, no credentials in it
_left_behind: list[
    Any
] = []  # clients that a fork copied into this process: closing them would disturb the parent


class Endpoint(NamedTuple):
    """Where a client connects and how; what it takes to make the same client elsewhere."""

    endpoint_url: str | None
    region_name: str | None
    addressing_style: str | None
    checksums: str | None
    max_connections: int
    connect_timeout: float
    read_timeout: float


class LoopClient:
    """A client, and the slots that keep requests from queueing where their time already runs."""

    def __init__(self, slots: int) -> None:
        self.client: Any = None
        self.slots = asyncio.Semaphore(slots)
        self.probing = asyncio.Lock()
        self.opening: asyncio.Task[None] | None = None
        self.pid = os.getpid()

    async def open(self, make: Callable[[], Any]) -> None:
        client = await asyncio.to_thread(make)
        self.client = client
        await at_loop_end(self.close, CLIENTS)

    async def close(self) -> None:
        """Close the client; once, whoever asks."""
        if self.opening is not None:
            await asyncio.wait([self.opening])
        client, self.client, self.opening = self.client, None, None
        if client is not None:
            forget(self.close, asyncio.get_running_loop())
            await client.__aexit__(None, None, None)


class Clients:
    """The clients of one storage, by loop. Safe to use from several loops in several threads."""

    def __init__(self, endpoint: Endpoint, storage: str) -> None:
        self._endpoint = endpoint
        self._storage = storage
        self._by_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, LoopClient] = (
            weakref.WeakKeyDictionary()
        )
        self._guard = threading.Lock()
        self._closed = False

    async def get(self) -> LoopClient:
        """The running loop's client. Cancelling one caller leaves the opening to the others.

        Raises:
            StorageClosedError: After `aclose`.
            StorageConfigurationError: No asyncio event loop runs here.
            botocore.exceptions.BotoCoreError: Credentials, profile or endpoint cannot work.
        """
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise StorageConfigurationError(
                f"{self._storage} is reached by aiobotocore, which needs asyncio, and none runs here.",
                "Run it by asyncio.run(), or by anyio with backend='asyncio'; trio will not do.",
            ) from None
        entry = self._by_loop.get(loop)
        if entry is None or entry.client is None or entry.pid != os.getpid() or self._closed:
            entry = self._entry(loop)
            assert entry.opening is not None
            await asyncio.shield(entry.opening)
        return entry

    def _entry(self, loop: asyncio.AbstractEventLoop) -> LoopClient:
        with self._guard:
            if self._closed:
                raise StorageClosedError(self._storage)
            self._forget_the_dead()
            entry = self._by_loop.get(loop)
            if entry is None or entry.opening is None:
                entry = self._by_loop[loop] = LoopClient(self._endpoint.max_connections)
                entry.opening = loop.create_task(entry.open(lambda: make_client(self._endpoint)))
                entry.opening.add_done_callback(lambda task: self._opened(loop, entry, task))
            return entry

    def _opened(self, loop: asyncio.AbstractEventLoop, entry: LoopClient, task: asyncio.Task[None]) -> None:
        # A failure is not remembered: credentials may be there the next time. Asking for the exception also
        # keeps asyncio quiet when every waiter was cancelled.
        if task.cancelled() or task.exception() is not None:
            with self._guard:
                if self._by_loop.get(loop) is entry:
                    del self._by_loop[loop]

    def _forget_the_dead(self) -> None:
        for loop, entry in list(self._by_loop.items()):
            if entry.pid != os.getpid():
                _left_behind.append(entry)
                del self._by_loop[loop]
            elif loop.is_closed():
                del self._by_loop[loop]

    async def aclose(self) -> None:
        """Close the clients of every loop, each on its own; where a loop stands still, it closes with it."""
        with self._guard:
            self._closed = True
            self._forget_the_dead()
            entries = list(self._by_loop.items())
            self._by_loop.clear()
        if not entries:
            return  # also where no asyncio runs, so that leaving a block does not hide the error in it
        here = asyncio.get_running_loop()
        for loop, entry in entries:
            if loop is here:
                await entry.close()
            elif loop.is_running():
                await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(entry.close(), loop))
            else:
                _left_behind.append(entry)  # its loop's shutdown_asyncgens() is what closes it


def make_client(endpoint: Endpoint) -> Any:
    """An S3 client that no loop has touched yet. Blocks: for a worker thread.

    Credentials come from botocore's usual chain: environment, profile, role, instance.

    Raises:
        NoCredentialsError: The chain found none. Said here, so that no request looks for them again.
    """
    global _shared_loader
    from aiobotocore.config import AioConfig
    from aiobotocore.session import AioSession
    from botocore.exceptions import NoCredentialsError

    session = AioSession()
    if _shared_loader is None:
        _shared_loader = session.get_component("data_loader")
    session.register_component("data_loader", _shared_loader)
    if _run_here(session.get_credentials) is None:
        raise NoCredentialsError
    custom = (
        endpoint.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    )
    style = endpoint.addressing_style or ("path" if custom else "auto")
    checksums = endpoint.checksums or ("when_required" if custom else "when_supported")
    config = AioConfig(
        max_pool_connections=endpoint.max_connections,
        connect_timeout=endpoint.connect_timeout,
        read_timeout=endpoint.read_timeout,
        retries={
            "total_max_attempts": 1,
            "mode": "standard",
        },  # what a lost answer meant is for us to find out
        request_checksum_calculation=checksums,
        response_checksum_validation=checksums,
        s3={"addressing_style": style},
    )

    async def create() -> Any:
        context = session.create_client(
            "s3", region_name=endpoint.region_name, endpoint_url=endpoint.endpoint_url, config=config
        )
        return await context.__aenter__()

    client = _run_here(create)
    client.meta.events.register("before-call.s3", _expect_for_large_bodies_only)
    return client


def _run_here(start: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Run a coroutine in this thread, without a loop as long as it never waits.

    Environment, files and JSON are read by synchronous code inside of coroutines, which a loop, even one of
    this thread's own, may rightly be watched for. Sources on the network do wait; those get a loop.
    """
    coroutine = start()
    try:
        coroutine.send(None)
    except StopIteration as done:
        if done.value is not None:
            return done.value
    except RuntimeError:
        pass  # "no running event loop"
    finally:
        coroutine.close()
    return asyncio.run(_await(start))


async def _await(start: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return await start()


def _expect_for_large_bodies_only(params: dict[str, Any], **_: Any) -> None:
    body = params.get("body")
    if isinstance(body, io.BytesIO):
        with body.getbuffer() as view:
            if len(view) < _EXPECT_FROM:
                params["headers"].pop("Expect", None)
