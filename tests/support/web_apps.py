"""Apps that embed the engine in two lines, in every framework, each with all that a request may come by."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from aiohttp import web
from fastapi import BackgroundTasks, FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from litestar import Litestar, get
from onceflow.engine import INPUTS, TASK_SOURCE, Engine, flow, get_run_context, task
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

engine = Engine()


@task(cache_policy=(INPUTS + TASK_SOURCE).configure(isolation_level="SERIALIZABLE"))
async def double(x: int, seconds: float = 0.0) -> int:
    await asyncio.sleep(seconds)
    return 2 * x


@task
def synchronous(x: int) -> int:
    return double.run(x)


@flow
async def report(x: int, seconds: float = 0.0) -> dict[str, Any]:
    value = await double(x, seconds)
    return {"value": value, "here": get_run_context().engine is engine, "process": os.getpid()}


async def bare(request: Any) -> JSONResponse:
    return JSONResponse(await report(int(request.query_params["x"])))


starlette = Starlette(
    routes=[Route("/x", bare), Mount("/sub", Starlette(routes=[Route("/x", bare)]))], lifespan=engine.lifespan
)


@get("/x")
async def litestar_handler(x: int) -> dict[str, Any]:
    return await report(x)


litestar = Litestar([litestar_handler], lifespan=[engine.lifespan])


async def aiohttp_handler(request: web.Request) -> web.Response:
    return web.json_response(await report(int(request.query["x"])))


async def socket(request: web.Request) -> web.WebSocketResponse:
    connection = web.WebSocketResponse()
    await connection.prepare(request)
    async for message in connection:
        await connection.send_json(await report(int(message.data)))
    return connection


def aiohttp(argv: list[str]) -> web.Application:
    """For `python -m aiohttp.web`."""
    app = web.Application()
    app.router.add_get("/x", aiohttp_handler)
    app.router.add_get("/socket", socket)
    app.cleanup_ctx.append(engine.cleanup_ctx)
    return app


app = FastAPI(lifespan=engine.lifespan)
app.mount("/sub", Starlette(routes=[Route("/x", bare)]))


@app.middleware("http")
async def say_what_hit(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
    with engine.observe() as seen:
        response = await call(request)
    response.headers["X-Cache"] = "HIT" if seen.hit else "MISS"
    return response


@app.get("/x")
async def x(x: int, seconds: float = 0.0) -> dict[str, Any]:
    return await report(x, seconds)


@app.get("/in-a-thread")
def in_a_thread(x: int) -> str:
    return engine.submit(report, x).id  # a handler that is no coroutine, in a thread of the server's


@app.get("/sync-task")
async def sync_task(x: int) -> int:
    return await synchronous(x)


@app.get("/after")
async def after(x: int, background: BackgroundTasks) -> str:
    background.add_task(report, x)
    return "later"


@app.get("/events")
async def events(x: int) -> StreamingResponse:
    async def lines() -> AsyncIterator[str]:
        for number in range(3):
            yield f"data: {await double(x + number)}\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream")


@app.get("/runs")
async def runs() -> list[str]:
    return [run.name for run in engine.runs.values()]
