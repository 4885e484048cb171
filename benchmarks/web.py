"""What a hit adds to a request: uvicorn and FastAPI over HTTP, a bare handler and a cached one in turn."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

from harness import FLOOR, OURS, Measure, Workload, in_folder
from onceflow.engine import INPUTS, TASK_SOURCE, Engine, task

try:
    import uvicorn
    from fastapi import FastAPI
except ImportError:
    uvicorn = None

REQUESTS = 1500
"""Of each kind, in turn on one connection, after a tenth as many to warm up."""


@task(cache_policy=INPUTS + TASK_SOURCE)
async def population(city: str) -> int:
    return len(city) * 1000


def _app(folder: Path) -> FastAPI:
    engine = Engine(storage=folder)
    app = FastAPI(lifespan=engine.lifespan)

    @app.get("/bare")
    async def bare(city: str) -> dict[str, int]:
        return {"people": len(city) * 1000}

    @app.get("/hit")
    async def hit(city: str) -> dict[str, int]:
        return {"people": await population(city)}

    return app


async def _compare(folder: Path) -> dict[str, list[float]]:
    """The times of all requests in µs, sorted: of the bare handler and of the cached one."""
    server = uvicorn.Server(uvicorn.Config(_app(folder), port=0, log_level="critical"))
    serving = asyncio.ensure_future(server.serve())
    while not server.started:  # noqa: ASYNC110 - it has no event
        await asyncio.sleep(0.01)
    address = server.servers[0].sockets[0].getsockname()
    reader, writer = await asyncio.open_connection(*address)
    times: dict[str, list[float]] = {"/bare": [], "/hit": []}
    for number in range(-REQUESTS // 10, REQUESTS):
        for path, taken in times.items():
            started = perf_counter()
            writer.write(f"GET {path}?city=Bonn HTTP/1.1\r\nHost: bench\r\n\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            assert await reader.readexactly(length) == b'{"people":4000}'
            if number >= 0:
                taken.append((perf_counter() - started) * 1e6)
    writer.close()
    server.should_exit = True
    await serving
    return {FLOOR: sorted(times["/bare"]), OURS: sorted(times["/hit"])}


def _side_by_side(quantile: float) -> dict[str, Measure | None]:
    """Both contestants out of one run: whoever is measured first in a round runs it for both."""
    measured: dict[str, list[float]] = {}

    def of(name: str) -> Measure:
        async def measure(folder: Path) -> float:
            if name not in measured:
                measured.update(await _compare(folder))
            times = measured.pop(name)
            return times[int(len(times) * quantile)]

        return in_folder(measure)

    return {FLOOR: of(FLOOR) if uvicorn else None, OURS: of(OURS) if uvicorn else None}


def workloads() -> Iterator[Workload]:
    # The 99th percentile is the machine's as much as ours, so that it has no budget.
    for name, quantile, extra in (("median", 0.5, 150), ("99 %", 0.99, None)):
        yield Workload(
            "W13",
            f"a request that is a hit, uvicorn and FastAPI over HTTP: {name}",
            "the handler without onceflow",
            _side_by_side(quantile),
            extra=extra,
            rounds=3,
        )
