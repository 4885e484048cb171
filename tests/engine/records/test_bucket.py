"""The engine on a bucket: requests counted, pickles refused unless signed, one bucket for several processes."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import Fault, FaultProxy, Request
from onceflow.engine import INPUTS, Engine, Settings, flow, task
from onceflow.locking import StorageLockManager
from onceflow.storage import S3Storage
from s3_servers import new_prefix, s3_bucket, s3_server


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """The endpoint and the bucket of this run's S3 server, with its keys in the environment."""
    server = s3_server()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server.endpoint_url, s3_bucket()


@pytest.fixture
async def proxy(bucket: tuple[str, str]) -> AsyncIterator[FaultProxy]:
    """A proxy in front of the server, which counts what is asked."""
    async with FaultProxy(bucket[0]).running() as proxy:
        yield proxy


@task(cache_policy=INPUTS)
async def double(x: Any) -> Any:
    return x * 2


class Thing:
    """Needs pickle."""

    def __mul__(self, other: int) -> Thing:
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Thing)

    def __hash__(self) -> int:
        return 1


def requests(proxy: FaultProxy) -> dict[str, int]:
    counted = dict(Counter(proxy.counts))
    proxy.reset_counts()
    return counted


async def test_requests_of_hit_and_miss(bucket: tuple[str, str], proxy: FaultProxy) -> None:
    """B18: on S3 a miss with commit is 1 GET and 1 PUT, a hit 1 GET, and so is a hit from a validated copy."""
    storage = S3Storage(bucket[1], new_prefix(), endpoint_url=proxy.url)
    async with storage, Engine(storage=storage):
        await double(1)
        assert requests(proxy) == {"GET": 1, "PUT": 1}
        await double(1)
        assert "if-none-match" not in proxy.seen[-1].headers
        assert requests(proxy) == {"GET": 1}
        await double(1)
        assert "if-none-match" in proxy.seen[-1].headers  # answered 304, without a body
        assert requests(proxy) == {"GET": 1}


async def test_a_copy_is_what_a_fresh_read_would_be(bucket: tuple[str, str]) -> None:
    """B13: given another process's commit to the bucket, a copy in memory is not served; nor is a shared object."""
    prefix, said = new_prefix(), ["first"]

    @task(cache_key_fn=lambda context, parameters: "the key")
    async def say() -> list[str]:
        return list(said)

    def engine() -> Engine:
        return Engine(storage=S3Storage(bucket[1], prefix, endpoint_url=bucket[0]))

    async with engine() as here, engine() as there:
        for number in range(3):
            for _ in range(3):
                value = await _in(here, say)
                assert value == said
                value.append("changed by its caller")
            said[0] = f"written by another {number}"
            await _in(there, say.with_options(refresh_cache=True))
            assert await _in(here, say) == said


async def _in(engine: Engine, call: Any) -> Any:
    @flow
    async def inside() -> Any:
        return await call()

    return await engine.submit(inside)


async def test_a_map_looks_up_side_by_side_and_bounded(bucket: tuple[str, str], proxy: FaultProxy) -> None:
    """B18: of 40 look-ups as many are under way at once as there are connections, and never more."""
    storage = S3Storage(bucket[1], new_prefix(), endpoint_url=proxy.url, max_connections=6)
    async with storage, Engine(storage=storage):
        await double(-1)
        requests(proxy)
        full, go = asyncio.Event(), asyncio.Event()
        fault = Fault(until=go)

        def hold(request: Request) -> Fault:
            if proxy.counts["GET"] == 6:
                full.set()
            return fault

        proxy.rule = hold
        mapping = asyncio.ensure_future(double.map(range(40)))
        await full.wait()
        for _ in range(100):
            await asyncio.sleep(0)  # who were let in too many would come now
        assert proxy.counts == {"GET": 6}
        go.set()
        assert await mapping == [2 * x for x in range(40)]
        assert requests(proxy) == {"GET": 40, "PUT": 40}


async def test_requests_of_a_serializable_miss(bucket: tuple[str, str], proxy: FaultProxy) -> None:
    """B18: with the locks in the same bucket a SERIALIZABLE miss is 1 GET and 2 PUTs, a hit 1 GET."""
    storage = S3Storage(bucket[1], new_prefix(), endpoint_url=proxy.url)
    alone = double.with_options(cache_policy=INPUTS.configure(isolation_level="SERIALIZABLE"))
    async with storage, Engine(storage=storage, lock_manager=StorageLockManager(storage)):
        await storage.ensure_conditional()
        requests(proxy)
        await alone(1)
        assert requests(proxy) == {"GET": 1, "PUT": 2}
        await alone(1)
        assert requests(proxy) == {"GET": 1}


async def test_many_hits_at_once(bucket: tuple[str, str], proxy: FaultProxy) -> None:
    """B18: map over many keys looks each up once."""
    storage = S3Storage(bucket[1], new_prefix(), endpoint_url=proxy.url)
    async with storage, Engine(storage=storage):
        assert await double.map(range(40)) == [2 * x for x in range(40)]
        assert requests(proxy) == {"GET": 40, "PUT": 40}
        await double.map(range(40))
        assert requests(proxy) == {"GET": 40}


async def test_pickles_are_refused(bucket: tuple[str, str], caplog: pytest.LogCaptureFixture) -> None:
    """R3: on a bucket a value that needs pickle is returned, not stored, and the warning says what to set."""
    storage = S3Storage(bucket[1], new_prefix(), endpoint_url=bucket[0])
    async with storage, Engine(storage=storage):
        assert await double(Thing()) == Thing()
        assert [stat.key async for stat in storage.list()] == []
    assert "ONCEFLOW_RESULTS_SIGNING_KEY" in caplog.text
    assert "ONCEFLOW_RESULTS_ALLOW_PICKLE" in caplog.text


async def test_signed_pickles_travel_and_keys_rotate(
    bucket: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """R1: with a signing key pickled values are stored and read; a key that was rotated out verifies no more."""
    prefix = new_prefix()

    async def name_with(keys: str | None) -> str:
        storage = S3Storage(bucket[1], prefix, endpoint_url=bucket[0])
        async with storage, Engine(storage=storage, settings=Settings(results_signing_key=keys)):
            return (await double.run_to_state(Thing())).name

    assert await name_with("first") == "Completed"
    assert await name_with("first") == "Cached"
    assert await name_with("second, first") == "Cached"
    assert "refused" not in caplog.text
    assert await name_with("third") == "Completed"  # written anew under the third
    assert "signature" in caplog.text
    assert await name_with("second, first") == "Completed"


async def test_pickles_travel_where_every_writer_is_trusted(bucket: tuple[str, str]) -> None:
    """R1: ONCEFLOW_RESULTS_ALLOW_PICKLE lets unsigned pickled values travel."""
    storage = S3Storage(bucket[1], new_prefix(), endpoint_url=bucket[0])
    async with storage, Engine(storage=storage, settings=Settings(results_allow_pickle=True)):
        assert [(await double.run_to_state(Thing())).name for _ in range(2)] == ["Completed", "Cached"]


async def test_a_bucket_out_of_reach_costs_the_cache_only(
    caplog: pytest.LogCaptureFixture, bucket: tuple[str, str]
) -> None:
    """R3: where the bucket is missing the task completes, and one warning names bucket, key and remedy."""
    storage = S3Storage("no-such-bucket-here", endpoint_url=bucket[0])
    async with storage, Engine(storage=storage):
        assert await double(4) == 8
    assert "no-such-bucket-here" in caplog.text


SCRIPT = """
import asyncio, sys
from onceflow.engine import INPUTS, flow, task

@task(cache_policy=INPUTS, task_run_name="square {x}")
async def square(x: int) -> int:
    print("ran", x)
    return x * x

@flow
async def squares() -> int:
    return sum(await square.map(range(5)))

print(asyncio.run(squares()))
"""


async def test_two_processes_share_one_bucket(
    bucket: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B13: the same script, pointed at a bucket by one variable, runs nothing the second time."""
    script = tmp_path / "squares.py"
    await asyncio.to_thread(script.write_text, SCRIPT)
    monkeypatch.setenv("ONCEFLOW_STORAGE", f"s3://{bucket[1]}/{new_prefix()}?endpoint_url={bucket[0]}")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    said = []
    for _ in range(2):
        run = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-W", "error", str(script)],
            capture_output=True,
            text=True,
            check=True,
        )
        said.append(run.stdout.split())
        assert run.stderr == ""
    assert sorted(said[0]) == sorted(["ran", "0", "ran", "1", "ran", "2", "ran", "3", "ran", "4", "30"])
    assert said[1] == ["30"]
