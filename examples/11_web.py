"""Inside a web app: cached answers, work in the background, clients that leave, and an end without loss.

uvicorn --app-dir examples 11_web:app (ONCEFLOW_STORAGE=s3://… and ONCEFLOW_LOCKS=redis://… for many machines)
"""

import asyncio
import os
from collections.abc import AsyncIterator

from fastapi import FastAPI, Response
from fastapi.responses import StreamingResponse
from onceflow.engine import INPUTS, TASK_SOURCE, Engine, FlowFuture, flow, task

os.environ.setdefault("ONCEFLOW_LOCKS", "memory://web")
engine = Engine()
app = FastAPI(lifespan=engine.lifespan)
jobs: dict[str, FlowFuture[int]] = {}


@task(cache_policy=(INPUTS + TASK_SOURCE).configure(isolation_level="SERIALIZABLE"))
async def population(city: str, seconds: float) -> int:
    await asyncio.sleep(seconds)  # stands for something expensive; a thousand requests at once run it once
    return len(city) * 1000


@flow
async def total(cities: list[str], seconds: float = 0.5) -> int:
    return sum([await population(city, seconds) for city in cities])


@app.get("/cities/{city}")
async def one(city: str, response: Response, seconds: float = 0.5) -> dict[str, int]:
    with engine.observe() as seen:
        people = await population(city, seconds)
    response.headers["X-Cache"] = "HIT" if seen.hit else "MISS"
    return {"people": people}


@app.post("/totals", status_code=202)
async def start(cities: list[str], response: Response, seconds: float = 0.5) -> dict[str, str]:
    future = engine.submit(total, cities, seconds)  # goes on when the request is over
    jobs[future.id] = future
    response.headers["Location"] = f"/totals/{future.id}"
    return {"run": future.id}


@app.get("/totals/{run}")
async def look(run: str) -> dict[str, str | int]:
    state = jobs[run].state
    return {"state": state.name, "people": state.result() if state.is_completed() else 0}


@app.get("/cities/{city}/live")
async def live(city: str, seconds: float = 0.5) -> StreamingResponse:
    async def lines() -> AsyncIterator[str]:  # a client that leaves cancels the run, and frees its lock
        yield "counting\n"
        yield f"{await population(city, seconds)}\n"

    return StreamingResponse(lines())
