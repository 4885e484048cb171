"""A TCP proxy on 127.0.0.1 that delays, holds back, or drops what passes: the network between Redis and us."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class TcpProxy:
    """Passes bytes on both ways. What is set takes effect with the next bytes."""

    def __init__(self, port: int) -> None:
        self._target = port
        self.port = 0
        self.delay = 0.0
        """Seconds that every piece waits."""
        self.replies = asyncio.Event()
        """While it is clear the server's answers are held back: requests arrive, nobody hears of it."""
        self.replies.set()
        self.requests = asyncio.Event()
        """While it is clear requests are held back, and arrive later."""
        self.requests.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    def drop(self) -> None:
        """Reset every connection, with all that is under way; new ones pass."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, far_writer}
        ways = [
            asyncio.create_task(self._pass(reader, far_writer, self.requests)),
            asyncio.create_task(self._pass(far_reader, writer, self.replies)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            for one in (writer, far_writer):
                self._writers.discard(one)
                one.transport.abort()

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, gate: asyncio.Event
    ) -> None:
        try:
            while data := await reader.read(65536):
                if self.delay:
                    await asyncio.sleep(self.delay)
                await gate.wait()
                writer.write(data)
                await writer.drain()
        except OSError:
            pass  # reset by one side, which ends the other too


@asynccontextmanager
async def tcp_proxy(port: int) -> AsyncIterator[TcpProxy]:
    """A proxy in front of a port of 127.0.0.1."""
    proxy = TcpProxy(port)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        proxy._tasks.add(task)
        try:
            await proxy._serve(reader, writer)
        except asyncio.CancelledError:
            pass  # the test is over
        finally:
            proxy._tasks.discard(task)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        proxy.drop()
        tasks = list(proxy._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
