"""Types of calls, options, futures, maps, streams, generators, methods and flows, as mypy and pyright must see them.

Read by the checkers, never run. A line with an `error` comment is wrong on purpose: both must report it.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=true, reportUnusedCoroutine=false

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from typing import Any, assert_type

from onceflow.engine import (
    INPUTS,
    TASK_SOURCE,
    Engine,
    FlowFuture,
    State,
    TaskFuture,
    allow_failure,
    as_completed,
    flow,
    quote,
    task,
    unmapped,
    wait,
)


@task
async def fetch(url: str, retries: int = 3) -> bytes:
    return url.encode() * retries


@task
def parse(page: bytes) -> list[str]:
    return [page.decode()]


@task(cache_policy=INPUTS + TASK_SOURCE, cache_expiration=timedelta(days=1), retries=3, tags=["web"])
async def size(page: bytes) -> int:
    return len(page)


@task(timeout_seconds=1.5, runner="process")
def crunch(numbers: list[int]) -> float:
    return sum(numbers) / 2


# --- plain calls


async def calls() -> None:
    assert_type(await fetch("a"), bytes)
    assert_type(await fetch("a", retries=1), bytes)
    assert_type(await parse(b"a"), list[str])  # a sync body is awaited too
    assert_type(await size(b"a"), int)
    assert_type(await crunch([1]), float)
    await fetch(1)  # type: ignore[arg-type]  # error: the argument is no text
    await fetch()  # type: ignore[call-arg]  # error: the argument is missing
    await fetch("a", retry=1)  # type: ignore[call-arg]  # error: there is no such parameter
    wrong: int = await fetch("a")  # type: ignore[assignment]  # error: the value is no number
    await size("a")  # type: ignore[arg-type]  # error: with options, too
    del wrong


async def states() -> None:
    state = await fetch.run_to_state("a")
    assert_type(state, State[bytes])
    assert_type(state.result(), bytes)
    assert_type(state.name, str)
    await parse.run_to_state(1)  # type: ignore[call-overload]  # error: the argument is no page
    number: int = state.result()  # type: ignore[assignment]  # error: the result is no number
    del number


def blocking() -> None:
    assert_type(fetch.run("a"), bytes)
    assert_type(parse.run(b"a"), list[str])
    fetch.run(2)  # type: ignore[arg-type]  # error: the argument is no text


async def keys() -> None:
    assert_type(await fetch.cache_key("a"), str | None)
    assert_type(await fetch.invalidate("a"), bool)
    await fetch.cache_key(1)  # type: ignore[arg-type]  # error: a key is that of a call that could be


# --- options


def options() -> None:
    other = fetch.with_options(name="other", retries=0, cache_policy=None)
    assert_type(other.run("a"), bytes)
    fetch.with_options(retires=3)  # type: ignore[call-arg]  # error: there is no such option
    fetch.with_options(retries="three")  # type: ignore[arg-type]  # error: the option takes a number
    other.run(1)  # type: ignore[arg-type]  # error: a copy takes what the original took


@task(task_run_name=42)  # type: ignore[call-overload, untyped-decorator]  # error: the option takes a text or a callable
async def misnamed() -> None:
    pass


# --- futures


async def futures() -> None:
    future = fetch.submit("a")
    assert_type(future, TaskFuture[bytes])
    assert_type(await future, bytes)
    assert_type(await future.result(timeout=1), bytes)
    assert_type(await future.wait(), State[bytes] | None)
    assert_type(future.state, State[bytes])
    assert_type(future.cancel(), bool)
    fetch.submit("a", wait_for=[future])
    fetch.submit(1)  # type: ignore[call-overload]  # error: the argument is no text
    await size.submit(future)  # type: ignore[call-overload]  # error: a future is no page, to a checker
    assert_type(size.submit(future, wait_for=()), TaskFuture[int])  # the way out
    assert_type(await size.map([future, b"a"]), list[int])
    assert_type(await size.run_to_state(future, wait_for=()), State[int])
    wrong: TaskFuture[int] = fetch.submit("a")  # type: ignore[assignment]  # error: a future of something else
    del wrong


async def many_futures() -> None:
    futures = [fetch.submit("a"), fetch.submit("b")]
    done, not_done = await wait(futures)
    for future in done | not_done:
        assert_type(await future, bytes)
    async for future in as_completed(futures):
        assert_type(await future, bytes)


async def stand_ins() -> None:
    assert_type(unmapped([1]).value, list[int])
    assert_type(allow_failure(fetch.submit("a")).value, TaskFuture[bytes])
    assert_type(quote("x").value, str)


# --- map and stream


async def maps() -> None:
    pages = await fetch.map(["a", "b"])
    assert_type(pages, list[bytes])
    for future in fetch.map(["a"], unmapped(3)):
        assert_type(future, TaskFuture[bytes])
    numbers: list[int] = await fetch.map(["a"])  # type: ignore[assignment]  # error: a list of something else
    del numbers


async def endless() -> AsyncIterator[str]:
    while True:
        yield "a"


async def streams() -> None:
    async for page in fetch.stream(endless(), limit=10, ordered=False):
        assert_type(page, bytes)
    async for page in fetch.stream(["a"]):
        assert_type(page, bytes)
    fetch.stream(42)  # type: ignore[arg-type]  # error: what is streamed is an iterable
    fetch.stream(["a"], limit="10")  # type: ignore[arg-type]  # error: the limit is a number


# --- generators


@task
async def lines(path: str) -> AsyncIterator[str]:
    yield path


@task(cache_policy=INPUTS)
def numbers(n: int) -> Iterator[int]:
    yield n


async def generators() -> None:
    async for line in lines("a"):
        assert_type(line, str)
    async for number in numbers(3):
        assert_type(number, int)
    assert_type(await lines("a"), list[str])
    assert_type(await numbers(1), list[int])
    stream = lines("a")
    assert_type(await anext(stream), str)
    await stream.aclose()
    lines(1)  # type: ignore[arg-type]  # error: the argument is no text
    wrong: list[int] = await lines("a")  # type: ignore[assignment]  # error: a list of something else
    del wrong


def generators_in_scripts() -> None:
    assert_type(numbers.run(1), list[int])


# --- methods


class Client:
    @task
    async def get(self, path: str) -> bytes:
        return path.encode()

    @task(retries=1)
    async def post(self, path: str, data: bytes) -> int:
        return len(path) + len(data)

    @task
    async def pages(self, path: str) -> AsyncIterator[bytes]:
        yield path.encode()


async def methods(client: Client) -> None:
    assert_type(await client.get("a"), bytes)
    assert_type(await client.post("a", data=b""), int)
    assert_type(await client.get.submit("a"), bytes)
    assert_type(await client.get.map(["a"]), list[bytes])
    assert_type(await client.get.with_options(retries=2)("a"), bytes)
    async for page in client.pages("a"):
        assert_type(page, bytes)
    await client.get(1)  # type: ignore[arg-type]  # error: the argument is no text
    await client.get(client, "a")  # type: ignore[call-arg, arg-type]  # error: self is there already
    client.get.submit(b"a")  # type: ignore[call-overload]  # error: the argument is no text


# --- flows


@flow
async def crawl(urls: list[str]) -> int:
    pages = await fetch.map(urls)
    return sum(len(page) for page in pages)


@flow(retries=2, flow_run_name="count {n}", validate_parameters=False, cache_policy=INPUTS)
def count(n: int) -> str:
    return str(n)


async def flows() -> None:
    assert_type(await crawl(["a"]), int)
    assert_type(await count(1), str)
    assert_type(await crawl.run_to_state(["a"]), State[int])
    assert_type(await crawl.with_options(name="other")(["a"]), int)
    await crawl("a")  # type: ignore[arg-type]  # error: a list is wanted
    await crawl(["a"], 1)  # type: ignore[call-arg]  # error: there is one parameter
    crawl.with_options(runner="process")  # type: ignore[call-arg]  # error: an option of tasks only


def flows_in_scripts() -> None:
    assert_type(crawl.run(["a"]), int)
    crawl.run([1])  # type: ignore[list-item]  # error: a list of something else


async def background(engine: Engine) -> None:
    future = engine.submit(crawl, ["a"])
    assert_type(future, FlowFuture[int])
    assert_type(await future, int)
    engine.submit(crawl, 1)  # type: ignore[arg-type]  # error: a list is wanted


# --- hooks as decorators keep their function


@fetch.on_completion
def note(task: Any, run: Any, state: State[Any]) -> int:
    return 1


def hooks() -> None:
    assert_type(note(None, None, State("COMPLETED")), int)  # type: ignore[arg-type]  # error: a StateType is wanted
