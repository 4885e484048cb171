"""What a bucket costs beside bare aiobotocore: hits and misses, their requests, and large values both ways.

The server is the one that the tests start, on this machine: no network, so that what is ours shows.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from files import micros
from harness import FLOOR, OURS, Measure, Workload
from onceflow.engine import INPUTS, Engine, Settings, task
from onceflow.locking import StorageLockManager
from onceflow.storage import S3Storage

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
try:
    import s3_servers
    from aiobotocore.config import AioConfig
    from aiobotocore.session import get_session
    from fault_proxy import FaultProxy
except ImportError:
    s3_servers = None

COUNT = 150
VALUE = os.urandom(100)
MIB = 1024 * 1024
LARGE = 64 * MIB
STREAMED = 1024 * MIB
_PART = 8 * MIB

Clock = Callable[[], float]


@task(cache_policy=INPUTS)
async def small(x: int) -> bytes:
    return VALUE


alone = small.with_options(cache_policy=INPUTS.configure(isolation_level="SERIALIZABLE"))


@asynccontextmanager
async def bare() -> AsyncIterator[Any]:
    """A client as plain aiobotocore makes it, with a pool as large as ours."""
    server = s3_servers.own_server()
    config = AioConfig(
        max_pool_connections=50,
        s3={"addressing_style": "path"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    async with get_session().create_client("s3", endpoint_url=server.endpoint_url, config=config) as client:
        yield client


def storage(url: str | None = None, prefix: str | None = None) -> S3Storage:
    server = s3_servers.own_server()
    return S3Storage(
        s3_servers.own_bucket(),
        prefix or s3_servers.new_prefix(),
        endpoint_url=url or server.endpoint_url,
        region_name="us-east-1",
        timeout=120,
    )


# --- hits and misses


def floor_small(what: str, clock: Clock) -> Measure:
    async def run() -> float:
        bucket, prefix = s3_servers.own_bucket(), s3_servers.new_prefix()
        record = VALUE + bytes(250)  # a record is so much longer than its value
        async with bare() as client:
            if what == "hit":
                for x in range(COUNT):
                    await client.put_object(Bucket=bucket, Key=f"{prefix}/{x}", Body=record)
            await _bare_call(client, bucket, f"{prefix}/warm", what, record)
            started = clock()
            for x in range(COUNT):
                await _bare_call(client, bucket, f"{prefix}/{x}", what, record)
            return (clock() - started) / COUNT * 1e6

    return run


async def _bare_call(client: Any, bucket: str, key: str, what: str, record: bytes) -> None:
    try:
        got = await client.get_object(Bucket=bucket, Key=key)
        await got["Body"].read()
    except client.exceptions.NoSuchKey:
        pass
    if what == "miss":
        await client.put_object(Bucket=bucket, Key=key, Body=record, IfNoneMatch="*")
    elif what == "exclusive miss":
        put = await client.put_object(Bucket=bucket, Key=key, Body=record, IfNoneMatch="*")
        await client.put_object(Bucket=bucket, Key=key, Body=record, IfMatch=put["ETag"])


def ours_small(what: str, clock: Clock) -> Measure:
    async def run() -> float:
        call = alone if what == "exclusive miss" else small
        async with storage() as bucket:
            locks = StorageLockManager(bucket)
            settings = Settings(results_memory_bytes=0)
            async with Engine(storage=bucket, lock_manager=locks, settings=settings):
                await call(-1)
                if what == "hit":
                    await small.map(range(COUNT))
                started = clock()
                for x in range(COUNT):
                    await call(x)
                return (clock() - started) / COUNT * 1e6

    return run


def requests(what: str) -> Measure:
    """How many requests one call makes, counted on the wire."""

    async def run() -> float:
        proxied = FaultProxy(s3_servers.own_server().endpoint_url)
        async with proxied.running() as proxy, storage(proxy.url) as bucket:
            await bucket.ensure_conditional()
            call = alone if what == "exclusive miss" else small
            async with Engine(storage=bucket, lock_manager=StorageLockManager(bucket)):
                if what == "hit":
                    await call(1)
                proxy.reset_counts()
                await call(1)
                return proxy.counts.total()

    return run


def constant(number: float) -> Measure:
    async def run() -> float:
        return number

    return run


# --- large values


def floor_large(what: str) -> Measure:
    """The same parts side by side, and one GET of all. (One PUT of all is 1.3 times as fast on this server.)"""

    async def run() -> float:
        target = {"Bucket": s3_servers.own_bucket(), "Key": f"{s3_servers.new_prefix()}/large"}
        body = bytes(LARGE)
        async with bare() as client:
            started = perf_counter()
            upload = await client.create_multipart_upload(**target)
            ticket = {"UploadId": upload["UploadId"], **target}

            async def send(number: int) -> dict[str, Any]:
                part = body[(number - 1) * _PART : number * _PART]
                sent = await client.upload_part(PartNumber=number, Body=part, **ticket)
                return {"PartNumber": number, "ETag": sent["ETag"]}

            parts = await asyncio.gather(*map(send, range(1, LARGE // _PART + 1)))
            await client.complete_multipart_upload(MultipartUpload={"Parts": parts}, **ticket)
            if what == "read":
                started = perf_counter()
                got = await client.get_object(**target)
                assert len(await got["Body"].read()) == LARGE
            cost = micros(started, 1000)
            await client.delete_object(**target)
            return cost

    return run


def ours_large(what: str) -> Measure:
    async def run() -> float:
        body = bytes(LARGE)
        async with storage() as bucket:
            await bucket.stat("large")
            started = perf_counter()
            await bucket.write("large", body)
            if what == "read":
                started = perf_counter()
                stored = await bucket.fetch("large")
                assert stored is not None
                assert len(stored.data) == LARGE
            cost = micros(started, 1000)
            await bucket.delete("large")
            return cost

    return run


def floor_streamed(what: str) -> Measure:
    """Parts one after the other, and the body piece by piece: what fits into little memory without more."""

    async def run() -> float:
        target = {"Bucket": s3_servers.own_bucket(), "Key": f"{s3_servers.new_prefix()}/large"}
        part, parts = bytes(_PART), []
        async with bare() as client:
            started = perf_counter()
            upload = await client.create_multipart_upload(**target)
            ticket = {"UploadId": upload["UploadId"], **target}
            for number in range(1, STREAMED // _PART + 1):
                sent = await client.upload_part(PartNumber=number, Body=part, **ticket)
                parts.append({"PartNumber": number, "ETag": sent["ETag"]})
            await client.complete_multipart_upload(MultipartUpload={"Parts": parts}, **ticket)
            if what == "read":
                started = perf_counter()
                body = (await client.get_object(**target))["Body"]
                seen = 0
                while piece := await body.read(_PART):
                    seen += len(piece)
                assert seen == STREAMED
            cost = micros(started, 1000)
            await client.delete_object(**target)
            return cost

    return run


def ours_streamed(what: str) -> Measure:
    async def pieces() -> AsyncIterator[bytes]:
        piece = bytes(_PART)
        for _ in range(STREAMED // _PART):
            yield piece

    async def run() -> float:
        async with storage() as bucket:
            await bucket.stat("large")
            started = perf_counter()
            version = await bucket.write("large", pieces())
            if what == "read":
                started = perf_counter()
                window = bytearray(8 * _PART)
                for start in range(0, STREAMED, len(window)):
                    await bucket.fetch("large", start, if_version=version, into=window)
            cost = micros(started, 1000)
            await bucket.delete("large")
            return cost

    return run


def workloads() -> Iterator[Workload]:
    there = s3_servers is not None
    if there:
        os.environ |= s3_servers.own_server().environment
        s3_servers.own_bucket()
    for what, calls, count in (
        ("hit", "get", 1),
        ("miss", "get, put", 2),
        ("exclusive miss", "get, put, put", 3),
    ):
        for unit, clock in (("CPU", process_time), ("time", perf_counter)):
            yield Workload(
                "W11",
                f"{what} in a bucket, {unit}",
                f"bare aiobotocore: {calls}",
                {
                    FLOOR: floor_small(what, clock) if there else None,
                    OURS: ours_small(what, clock) if there else None,
                },
                budget=1.3 if unit == "CPU" else None,
                rounds=5,
            )
        yield Workload(
            "W11",
            f"{what} in a bucket, requests",
            calls,
            {FLOOR: constant(count), OURS: requests(what) if there else None},
            budget=1,
            unit="requests",
            rounds=1,
        )
    sizes: tuple[tuple[str, int, Any, Any, str], ...] = (
        ("64 MiB", LARGE, floor_large, ours_large, "the same parts, one get"),
        ("1 GiB in 64 MiB of memory", STREAMED, floor_streamed, ours_streamed, "parts in turn, one stream"),
    )
    for name, size, floor, ours, calls in sizes:
        for what, budget in (("written", 1.2), ("read", 1.1)):
            yield Workload(
                "W7",
                f"{name}, {what} in a bucket",
                f"bare aiobotocore: {calls}",
                {FLOOR: floor(what) if there else None, OURS: ours(what) if there else None},
                budget=budget,
                unit="ms",
                rounds=5 if size == LARGE else 1,
                size=size,
            )
