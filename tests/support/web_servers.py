"""Real web servers in processes of their own, and what they wrote to their logs."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
from redis_servers import free_port

ROOT = Path(__file__).parents[2]


class Server:
    """A uvicorn process that serves one of the examples."""

    def __init__(self, process: asyncio.subprocess.Process, port: int, output: Path) -> None:
        self.process = process
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self._output = output

    def client(self) -> httpx.AsyncClient:
        """A client for very many requests at once."""
        return httpx.AsyncClient(
            base_url=self.url, timeout=60, limits=httpx.Limits(max_connections=None), trust_env=False
        )

    async def log(self) -> str:
        """All that it wrote so far."""
        return await asyncio.to_thread(self._output.read_text)

    async def ends(self) -> Counter[tuple[str, str]]:
        """How often each task or flow ended in each state, as its log says."""
        lines = re.findall(r"(?:Task|Flow) run '(.+?)-\w+' - Finished in state (\w+)", await self.log())
        return Counter(lines)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    async def wait(self, within: float) -> int:
        """The exit code."""
        return await asyncio.wait_for(self.process.wait(), within)


def _command(app: str, port: int, options: tuple[str, ...]) -> tuple[str, ...]:
    where = ROOT / ("tests/support" if app.startswith("web_apps:") else "examples")
    if app == "web_apps:aiohttp":
        return ("-m", "aiohttp.web", "-H", "127.0.0.1", "-P", str(port), *options, app)
    return (
        *("-m", "uvicorn", "--app-dir", str(where), app),
        *("--port", str(port), "--log-level", "warning", *options),
    )


@asynccontextmanager
async def serving(
    app: str, environment: dict[str, str], folder: Path, *options: str
) -> AsyncIterator[Server]:
    """Serve an app of examples/, or of `web_apps`, ready for requests; killed in the end if it still runs."""
    port = free_port()
    output = Path(tempfile.mkstemp(dir=folder, suffix=".log")[1])
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("ONCEFLOW_", "AWS_"))}
    with output.open("wb") as log:  # noqa: ASYNC230 - before the server's first request
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-X", "dev", *_command(app, port, options)),
            env=clean
            | {"HOME": str(folder), "ONCEFLOW_LOGGING_LEVEL": "INFO"}
            | {"PYTHONPATH": str(ROOT / "tests/support")}
            | environment,
            cwd=folder,
            stdout=log,
            stderr=log,
        )
    server = Server(process, port, output)
    try:
        await _ready(server)
        yield server
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _ready(server: Server) -> None:
    async with asyncio.timeout(30), server.client() as client:
        while True:
            try:
                await client.get("/openapi.json")
                return
            except httpx.TransportError:
                if server.process.returncode is not None:
                    raise RuntimeError(await server.log()) from None
                await asyncio.sleep(0.02)
