"""An HTTP proxy between a client and a server that loses, cuts, delays and forges what it is told to.

It understands just enough HTTP/1.1 to know where a request and a response end, serves each connection of the
client over one connection of its own, counts requests by method, and keeps no body.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import urlsplit

Headers = dict[str, str]


class Request(NamedTuple):
    method: str
    path: str
    headers: Headers


@dataclass
class Fault:
    """What happens to one request. Without any of it, it passes unharmed."""

    delay: float = 0.0
    """Seconds before the request is passed on."""
    reached: asyncio.Event | None = None
    """Set when the request has come; with `until`, it is passed on only when that is set."""
    until: asyncio.Event | None = None
    status: int | None = None
    """Answer this instead; with `applied`, after the server has carried out the request."""
    code: str = "InternalError"
    applied: bool = False
    lost: bool = False
    """Close the connection instead of answering; with `applied`, after the server has carried it out."""
    silent: bool = False
    """Never answer, and keep the connection."""
    cut: int | None = None
    """Close the connection after so many bytes of the response's body."""
    shorten: int | None = None
    """Drop so many bytes of the body's end, and say so in the length: a forgery that HTTP does not show."""
    headers: Headers = field(default_factory=dict)
    """Added to a forged answer."""
    page: bytes | None = None
    """The body of a forged answer, instead of an S3 error's."""


Rule = Callable[[Request], Fault | None]
Rewrite = Callable[[Request], None]


class FaultProxy:
    """Forwards to `upstream`; `rule` decides about each request, `faults` are used up first, one by one."""

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self.url = ""
        self.counts: Counter[str] = Counter()
        self.seen: list[Request] = []
        self.faults: list[tuple[str, Fault]] = []
        self.rule: Rule = lambda request: None
        self.rewrite: Rewrite = lambda request: None
        self.silenced = asyncio.Event()
        self._connections: set[asyncio.Task[None]] = set()

    def next(self, method: str, *faults: Fault) -> None:
        """Let the coming requests of this method meet these faults, one each."""
        self.faults += [(method, fault) for fault in faults]

    def reset_counts(self) -> None:
        self.counts.clear()
        self.seen.clear()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[FaultProxy]:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            for task in list(self._connections):
                task.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        upstream: list[asyncio.StreamWriter] = []
        try:
            await self._serve(reader, writer, upstream)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client went away, or was sent away
        except asyncio.CancelledError:
            pass  # the proxy stops; asyncio would log a handler that ends cancelled
        finally:
            self._connections.discard(task)
            for each in (writer, *upstream):
                each.close()

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, upstream: list[asyncio.StreamWriter]
    ) -> None:
        server: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            start, headers = _parse(head)
            method, path, _ = start.split(" ", 2)
            request = Request(method, path, headers)
            self.counts[method] += 1
            self.seen.append(Request(method, path, dict(headers)))
            fault = self._fault(request)
            if fault.silent:
                self.silenced.set()
                await reader.read()
                return
            if fault.lost and not fault.applied:
                writer.transport.abort()
                return
            if headers.pop("expect", None):
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            body = await _body(reader, headers)
            if fault.reached is not None:
                fault.reached.set()
            if fault.until is not None:
                await fault.until.wait()
            if fault.delay:
                await asyncio.sleep(fault.delay)
            if fault.status is not None and not fault.applied:
                await _answer(writer, method, fault)
                continue
            self.rewrite(request)
            if server is None:
                server = await asyncio.open_connection(self._host, self._port)
                upstream.append(server[1])
            server[1].write(_format(start, headers) + body)
            status, answer_headers, answer = await _response(server[0], method)
            if fault.lost:
                writer.transport.abort()
                return
            if fault.status is not None:
                await _answer(writer, method, fault)
                continue
            if fault.shorten is not None and answer:
                answer = answer[: -fault.shorten]
                answer_headers["content-length"] = str(len(answer))
            if fault.cut is not None:
                writer.write(_format(status, answer_headers) + answer[: fault.cut])
                await writer.drain()
                return
            writer.write(_format(status, answer_headers) + answer)
            await writer.drain()

    def _fault(self, request: Request) -> Fault:
        for index, (method, fault) in enumerate(self.faults):
            if method in (request.method, "*"):
                del self.faults[index]
                return fault
        return self.rule(request) or Fault()


def _parse(head: bytes) -> tuple[str, Headers]:
    start, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    return start, headers


def _format(start: str, headers: Headers) -> bytes:
    lines = [start, *(f"{name}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


async def _body(reader: asyncio.StreamReader, headers: Headers) -> bytes:
    if headers.get("transfer-encoding", "").lower() == "chunked":
        del headers["transfer-encoding"]
        body = await _chunks(reader)
        headers["content-length"] = str(len(body))
        return body
    return await reader.readexactly(int(headers.get("content-length", 0)))


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    body = bytearray()
    while True:
        size = int((await reader.readline()).split(b";")[0], 16)
        body += await reader.readexactly(size)
        await reader.readline()
        if not size:
            return bytes(body)


async def _response(reader: asyncio.StreamReader, method: str) -> tuple[str, Headers, bytes]:
    while True:
        status, headers = _parse(await reader.readuntil(b"\r\n\r\n"))
        if status.split(" ")[1] != "100":
            break
    bodyless = method == "HEAD" or status.split(" ")[1] in ("204", "304")
    return status, headers, b"" if bodyless else await _body(reader, headers)


async def _answer(writer: asyncio.StreamWriter, method: str, fault: Fault) -> None:
    body = fault.page
    if body is None:
        body = f"<Error><Code>{fault.code}</Code><Message>by the proxy</Message></Error>".encode()
    headers = {"content-type": "application/xml", "content-length": str(len(body)), **fault.headers}
    writer.write(_format(f"HTTP/1.1 {fault.status} Forged", headers) + (b"" if method == "HEAD" else body))
    await writer.drain()
