"""The engine inside real web servers: uvicorn over HTTP, and the lifespans of other frameworks."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer
from blockbuster import BlockBuster
from litestar import Litestar, get
from litestar.testing import AsyncTestClient
from onceflow.engine import INPUTS, Engine, EngineClosedError, flow, get_run_context, task
from onceflow.storage import MemoryStorage
from redis_servers import RedisServer
from s3_servers import new_prefix, s3_bucket, s3_server
from starlette.applications import Starlette
from until import until
from web_servers import Server, serving

APP = "11_web:app"


@pytest.fixture(autouse=True)
def may_block(no_blocking_calls: BlockBuster) -> Iterator[None]:
    """Starting servers and frameworks reads files; the servers' own loops are watched in their own process."""
    no_blocking_calls.deactivate()
    yield
    no_blocking_calls.activate()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    """The example, on a folder, with locks in memory."""
    async with serving(APP, {"ONCEFLOW_STORAGE": str(tmp_path / "records")}, tmp_path) as server:
        yield server


# --- the example, over HTTP


async def test_a_cached_answer(server: Server) -> None:
    """E1: a handler that awaits a cached task answers the second time from the record, and says so."""
    async with server.client() as client:
        answers = [await client.get("/cities/Bonn?seconds=0") for _ in range(2)]
    assert [answer.json() for answer in answers] == [{"people": 4000}] * 2
    assert [answer.headers["x-cache"] for answer in answers] == ["MISS", "HIT"]


async def test_work_in_the_background(server: Server) -> None:
    """A handler that submits answers 202 with the run's address while the run goes on, and the run ends there."""
    async with server.client() as client:
        accepted = await client.post("/totals?seconds=0.2", json=["Bonn", "Köln"])
        assert accepted.status_code == 202
        where = accepted.headers["location"]
        assert (await client.get(where)).json()["state"] in ("Pending", "Running")

        async def state() -> Any:
            return (await client.get(where)).json()

        await until(lambda: is_over(state()))
        assert await state() == {"state": "Completed", "people": 8000}


async def is_over(answer: Any) -> bool:
    return bool((await answer)["state"] not in ("Pending", "Running"))


async def test_a_client_that_leaves(server: Server) -> None:
    """B4: a client that disconnects cancels the run it was waiting for; who waits for the same key runs then."""
    async with server.client() as client:
        async with client.stream("GET", "/cities/Ulm/live?seconds=1") as stream:
            assert await anext(stream.aiter_lines()) == "counting"
            waiting = asyncio.ensure_future(client.get("/cities/Ulm?seconds=1"))
            await asyncio.sleep(0.2)
        answer = await waiting
    assert answer.json() == {"people": 3000}
    assert answer.headers["x-cache"] == "MISS"
    assert await server.ends() == {("population", "Cancelled"): 1, ("population", "Completed"): 1}


async def test_a_handler_whose_client_has_gone_ends_all_the_same(server: Server) -> None:
    """A plain handler goes on without its client, as ASGI servers do, and its record serves the next one."""
    async with server.client() as client:
        with pytest.raises(httpx.TimeoutException):
            await client.get("/cities/Trier?seconds=0.3", timeout=0.1)
        answer = await client.get("/cities/Trier?seconds=0.3")
        assert answer.json() == {"people": 5000}
    assert (await server.ends())["population", "Completed"] == 1


# --- under load, on every backend


@pytest.fixture(params=["folder", "folder and uvloop", "s3 and redis", "s3 alone"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[dict[str, str], list[str]]]:
    """The environment that moves the app, and options of uvicorn."""
    if request.param.startswith("folder"):
        loop = "uvloop" if "uvloop" in request.param else "asyncio"
        yield {"ONCEFLOW_STORAGE": str(tmp_path / "records")}, ["--loop", loop]
        return
    s3 = s3_server()
    url = f"s3://{s3_bucket()}/{new_prefix()}?endpoint_url={s3.endpoint_url}"
    if request.param == "s3 alone":
        yield s3.environment | {"ONCEFLOW_STORAGE": url, "ONCEFLOW_LOCKS": url}, []
        return
    redis = RedisServer()
    try:
        yield s3.environment | {"ONCEFLOW_STORAGE": url, "ONCEFLOW_LOCKS": redis.url}, []
        assert b":lock:" not in redis.ask(b"KEYS *"), "a lock was left"
    finally:
        redis.kill()


async def test_200_requests_for_20_keys(backend: tuple[dict[str, str], list[str]], tmp_path: Path) -> None:
    """L15: 200 requests at once for 20 keys run each body once, whatever holds records and locks."""
    environment, options = backend
    async with serving(APP, environment, tmp_path, *options) as server, server.client() as client:
        cities = [f"city {number % 20}" for number in range(200)]
        answers = await asyncio.gather(*[client.get(f"/cities/{city}?seconds=0.05") for city in cities])
        assert {answer.status_code for answer in answers} == {200}
        assert Counter(answer.headers["x-cache"] for answer in answers) == {"MISS": 20, "HIT": 180}
        again = await client.get(f"/cities/{cities[0]}?seconds=0.05")
        assert again.headers["x-cache"] == "HIT"
        assert (await server.ends())["population", "Completed"] == 20
        server.terminate()
        await server.wait(15)
        check_quiet(await server.log())


@pytest.mark.parametrize("backend", ["folder", "s3 and redis"], indirect=True)
async def test_sigterm_under_load(backend: tuple[dict[str, str], list[str]], tmp_path: Path) -> None:
    """SIGTERM under load: every accepted run ends or is recorded as interrupted, and the exit is quick and quiet."""
    environment, options = backend
    grace = 3 if environment["ONCEFLOW_STORAGE"].startswith("s3:") else 1
    environment = environment | {"ONCEFLOW_GRACE": str(grace)}
    async with serving(APP, environment, tmp_path, *options) as server, server.client() as client:
        # Half of the runs end within the grace, the others would take a minute.
        starts = [
            client.post(f"/totals?seconds={0.05 if number % 2 else 60}", json=[f"city {number % 20}"])
            for number in range(100)
        ]
        requests = [client.get(f"/cities/asked {number % 20}?seconds=0.2") for number in range(100)]
        accepted = await asyncio.gather(*starts)
        assert {answer.status_code for answer in accepted} == {202}
        asked = [asyncio.ensure_future(request) for request in requests]
        await asyncio.sleep(0.05)
        server.terminate()
        answers = await asyncio.gather(*asked, return_exceptions=True)
        began = (
            asyncio.get_running_loop().time()
        )  # the server answers what it accepted before the grace begins
        await server.wait(30)
        took = asyncio.get_running_loop().time() - began
        log, ends = await server.log(), await server.ends()
    refused = [answer for answer in answers if isinstance(answer, BaseException)]
    assert all(isinstance(error, httpx.TransportError) for error in refused), refused
    assert {answer.status_code for answer in answers if isinstance(answer, httpx.Response)} <= {200}
    assert ends["total", "Completed"] + ends["total", "Cancelled"] == 100, ends
    assert (
        50 <= ends["total", "Cancelled"] <= 100
    )  # short ones end within the grace, however slow the machine is
    assert (
        log.count("Cancelled('the engine was closed')")
        == ends["total", "Cancelled"] + (ends["population", "Cancelled"])
    )
    check_quiet(log)
    assert took < grace + 3


def check_quiet(log: str) -> None:
    """No traceback, no warning about what was not closed, nothing that is an error."""
    for word in (
        "Traceback",
        "Unclosed",
        "unclosed",
        "ResourceWarning",
        "never retrieved",
        "ERROR",
        "Exception",
    ):
        assert word not in log, log


async def test_no_lock_is_left_behind(tmp_path: Path) -> None:
    """B4: after SIGTERM another server takes over the keys of interrupted runs at once, and waits for no lease."""
    s3 = s3_server()
    url = f"s3://{s3_bucket()}/{new_prefix()}?endpoint_url={s3.endpoint_url}"
    environment = s3.environment | {
        "ONCEFLOW_STORAGE": url, "ONCEFLOW_LOCKS": url, "ONCEFLOW_GRACE": "0"
    }  # fmt: skip
    async with serving(APP, environment, tmp_path) as first, first.client() as client:
        await client.post("/totals?seconds=60", json=["Jena"])
        await asyncio.sleep(0.3)
        first.terminate()
        await first.wait(20)
    async with serving(APP, environment, tmp_path) as second, second.client() as client:
        answer = await client.post("/totals?seconds=60", json=["Jena"])
        await asyncio.sleep(0.3)
        run = (await client.get(answer.headers["location"])).json()
        assert run["state"] == "Running"
        assert "Waiting" not in await second.log()


# --- every framework, in a process of its own


@pytest.mark.parametrize("app", ["app", "starlette", "litestar", "aiohttp"])
async def test_two_lines_are_enough(app: str, tmp_path: Path) -> None:
    """L15: in every framework handlers find the engine that its lifespan opened, also of apps mounted below."""
    environment = {"ONCEFLOW_STORAGE": "records", "ONCEFLOW_LOCKS": "memory://web", "PYTHONASYNCIODEBUG": "1"}
    paths = ["/x", "/sub/x"] if app in ("app", "starlette") else ["/x"]
    async with serving(f"web_apps:{app}", environment, tmp_path) as server, server.client() as client:
        for path in paths:
            answers = await asyncio.gather(*[client.get(f"{path}?x={number % 4}") for number in range(20)])
            assert [answer.json()["value"] for answer in answers] == [
                2 * (number % 4) for number in range(20)
            ]
            assert all(answer.json()["here"] for answer in answers)
        assert (await server.ends())["double", "Completed"] == 4
        server.terminate()
        await server.wait(15)
        check_quiet(await server.log())


async def test_all_that_a_request_may_come_by(tmp_path: Path) -> None:
    """Middleware, threads, synchronous tasks, background tasks and event streams find the engine, and hits are seen."""
    environment = {"ONCEFLOW_STORAGE": "records", "ONCEFLOW_LOCKS": "memory://web"}
    async with serving("web_apps:app", environment, tmp_path) as server, server.client() as client:
        assert [(await client.get("/x?x=1")).headers["x-cache"] for _ in range(2)] == ["MISS", "HIT"]
        assert (await client.get("/events?x=1")).text == "data: 2\n\ndata: 4\n\ndata: 6\n\n"
        assert (await client.get("/sync-task?x=3")).json() == 6
        assert (await client.get("/after?x=9")).json() == "later"
        await client.get("/in-a-thread?x=10")

        async def idle() -> bool:
            return bool((await client.get("/runs")).json() == [])

        await until(idle)
        ends = await server.ends()
        assert ends["report", "Completed"] == 4
        assert ends["double", "Completed"] == 5
        server.terminate()
        await server.wait(15)
        check_quiet(await server.log())


async def test_a_websocket(tmp_path: Path) -> None:
    """E1: what comes over a websocket runs in the app's engine, and a client that leaves leaves nothing behind."""
    environment = {"ONCEFLOW_STORAGE": "records", "ONCEFLOW_LOCKS": "memory://web"}
    async with serving("web_apps:aiohttp", environment, tmp_path) as server, ClientSession() as session:
        for _ in range(2):
            async with session.ws_connect(f"{server.url}/socket") as connection:
                await connection.send_str("4")
                answer = await connection.receive_json()
                assert (answer["value"], answer["here"]) == (8, True)
        assert (await server.ends())["double", "Cached"] == 1
        server.terminate()
        await server.wait(15)
        check_quiet(await server.log())


async def test_two_workers(tmp_path: Path) -> None:
    """L15: with `--workers 2` and locks in files each key runs once in all, and both workers serve and end quietly."""
    environment = {"ONCEFLOW_STORAGE": "records", "ONCEFLOW_LOCKS": "locks"}
    async with serving("web_apps:app", environment, tmp_path, "--workers", "2") as server:
        clients = [server.client() for _ in range(20)]  # each with a connection of its own
        answers = await asyncio.gather(
            *[client.get(f"/x?x={number % 5}&seconds=0.1") for number in range(10) for client in clients]
        )
        await asyncio.gather(*[client.aclose() for client in clients])
        assert {answer.status_code for answer in answers} == {200}
        assert (await server.ends())["double", "Completed"] == 5
        assert len({answer.json()["process"] for answer in answers}) == 2
        server.terminate()
        await server.wait(20)
        lines = (await server.log()).splitlines()
        # uvicorn's parent process never closes the socket that its workers serve.
        # The hint of ResourceWarning follows it.
        theirs = (f"laddr=('127.0.0.1', {server.port})", "Enable tracemalloc")
        check_quiet("\n".join(line for line in lines if not any(text in line for text in theirs)))


# --- other frameworks


@task(cache_policy=INPUTS)
async def double(x: int) -> int:
    return 2 * x


@flow
async def where() -> Engine:
    return get_run_context().engine


async def test_starlette() -> None:
    """Starlette's lifespan opens and closes the engine; a second app with an engine of its own does not mix."""
    engines = [Engine(storage=MemoryStorage()) for _ in range(2)]
    apps = [Starlette(lifespan=engine.lifespan) for engine in engines]
    async with apps[0].router.lifespan_context(apps[0]), apps[1].router.lifespan_context(apps[1]):
        for engine in engines:
            assert await engine.submit(where) is engine
    for engine in engines:
        with pytest.raises(EngineClosedError):
            engine.submit(where)


async def test_litestar() -> None:
    """Litestar takes the same lifespan in its list, and its handlers find the engine."""
    engine = Engine(storage=MemoryStorage())

    @get("/")
    async def handler() -> dict[str, Any]:
        with engine.observe() as seen:
            value = await double(21)
        return {"value": value, "hit": seen.hit, "here": await where() is engine}

    async with AsyncTestClient(
        Litestar([handler], lifespan=[engine.lifespan], logging_config=None)
    ) as client:
        answers = [(await client.get("/")).json() for _ in range(2)]
    assert answers == [{"value": 42, "hit": hit, "here": True} for hit in (False, True)]
    assert not engine._is_open


async def test_aiohttp() -> None:
    """aiohttp's cleanup context opens the engine before the first request and closes it after the last."""
    engine = Engine(storage=MemoryStorage())
    done: list[Any] = []

    @flow
    async def later() -> None:
        await asyncio.sleep(0.05)
        done.append(get_run_context().engine)

    async def handler(request: web.Request) -> web.Response:
        engine.submit(later)
        return web.json_response(await double(21))

    app = web.Application()
    app.router.add_get("/", handler)
    app.cleanup_ctx.append(engine.cleanup_ctx)
    async with TestServer(app) as server, ClientSession() as session:
        answer = await session.get(server.make_url("/"))
        assert await answer.json() == 42
    assert done == [engine]
    assert not engine._is_open
