"""A store that does not honour conditions is found out, and told from one that has its own way with them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
from fault_proxy import Fault, FaultProxy, Request
from onceflow.storage import (
    ConditionsUnsupportedError,
    LocalStorage,
    MemoryStorage,
    ObjectExistsError,
    S3Storage,
    StorageUnavailableError,
    VersionMismatchError,
)
from s3_servers import Server, new_prefix, own_bucket, own_server, rclone

PART = 5 * 1024 * 1024


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    for name, value in own_server().environment.items():
        monkeypatch.setenv(name, value)
    own_bucket()  # made here, outside of any loop, because it blocks
    return own_server()


@pytest.fixture
async def proxy(server: Server) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(server.endpoint_url).running() as running:
        yield running


@pytest.fixture
async def bucket(proxy: FaultProxy) -> AsyncIterator[S3Storage]:
    storage = S3Storage(own_bucket(), new_prefix(), endpoint_url=proxy.url, part_size=PART, timeout=1.5)
    async with storage:
        yield storage


@pytest.fixture(scope="module")
def careless_server() -> Iterator[tuple[Server, str]]:
    """A server that ignores every condition, and a bucket on it."""
    with rclone() as running:
        yield running, running.make_bucket()


async def left_over(storage: S3Storage) -> list[str]:
    client = (await storage._bucket.clients.get()).client
    found = await client.list_objects_v2(Bucket=storage._bucket.name, Prefix=storage._root)
    return [each["Key"] for each in found.get("Contents", ())]


def _without(header: str, method: str = "PUT") -> Callable[[Request], None]:
    def rewrite(request: Request) -> None:
        if request.method == method:
            request.headers.pop(header, None)

    return rewrite


def _unquoted(request: Request) -> None:
    """As Ceph RGW 16 has it: an entity tag in quotes never matches, one without does."""
    tag = request.headers.get("if-match")
    if tag is not None and request.method in ("PUT", "POST"):
        request.headers["if-match"] = '"never"' if tag.startswith('"') else f'"{tag}"'


async def test_a_good_store_is_asked_once(bucket: S3Storage, proxy: FaultProxy) -> None:
    """The probe finds nothing wrong, leaves nothing, and is not repeated, whoever asks."""
    await asyncio.gather(*(bucket.ensure_conditional() for _ in range(10)))
    first = proxy.counts.total()
    assert first < 40
    assert await left_over(bucket) == []
    assert [stat async for stat in bucket.list()] == []
    proxy.reset_counts()
    await bucket.ensure_conditional()
    async with S3Storage(own_bucket(), bucket._options.prefix, endpoint_url=proxy.url) as same:
        await same.ensure_conditional()
    assert proxy.counts.total() == 0


async def test_memory_and_folders_need_no_probe(tmp_path: object) -> None:
    """Where conditions always hold, asking is free."""
    await MemoryStorage().ensure_conditional()
    await LocalStorage(str(tmp_path)).ensure_conditional()


async def test_rclone_is_refused(careless_server: tuple[Server, str]) -> None:
    """49: a real server that ignores If-None-Match is refused; the error names the request and what to use."""
    server, bucket = careless_server
    async with S3Storage(bucket, "team", endpoint_url=server.endpoint_url) as storage:
        for _ in range(2):
            with pytest.raises(ConditionsUnsupportedError) as caught:
                await storage.ensure_conditional()
        assert "PUT with If-None-Match: * replaced an existing object" in str(caught.value)
        assert "RedisLockManager" in str(caught.value)
        assert await left_over(storage) == []
        await storage.write("key", b"plain writes are fine")
        assert await storage.read("key") == b"plain writes are fine"


FLAWS = {
    "ignores If-None-Match": (_without("if-none-match"), "If-None-Match: * replaced an existing object"),
    "ignores If-Match": (_without("if-match"), "If-Match replaced an object with another entity tag"),
    "drops metadata": (_without("x-amz-meta-onceflow-writes"), "metadata"),
    "never matches": (
        lambda request: request.headers.update({"if-match": '"no"'} if "if-match" in request.headers else {}),
        "If-Match never matched",
    ),
}


@pytest.mark.parametrize("flaw", FLAWS)
async def test_each_flaw_is_named(bucket: S3Storage, proxy: FaultProxy, flaw: str) -> None:
    """99: a store that honours all but one of the requests is refused, and the one is named."""
    proxy.rewrite, named = FLAWS[flaw]
    with pytest.raises(ConditionsUnsupportedError) as caught:
        await bucket.ensure_conditional()
    assert named in str(caught.value)


async def test_two_winners_are_noticed(bucket: S3Storage, proxy: FaultProxy) -> None:
    """A store whose check and write are not one step is refused when the probe's race shows it."""

    def forget_the_condition(request: Request) -> None:
        if "probe-race" in request.path:
            request.headers.pop("if-none-match", None)

    proxy.rewrite = forget_the_condition
    with pytest.raises(ConditionsUnsupportedError, match="8 winners of 8"):
        await bucket.ensure_conditional()


async def test_an_honest_store_is_refused(bucket: S3Storage, proxy: FaultProxy) -> None:
    """A store that answers 501 to a condition is refused, with its own words."""
    proxy.rule = lambda request: (
        Fault(status=501, code="NotImplemented") if "if-none-match" in request.headers else None
    )
    with pytest.raises(ConditionsUnsupportedError, match="NotImplemented"):
        await bucket.ensure_conditional()


async def test_unquoted_tags_are_found_out(bucket: S3Storage, proxy: FaultProxy) -> None:
    """51: a store that compares entity tags only without quotes works, after the probe."""
    proxy.rewrite = _unquoted
    await bucket.ensure_conditional()
    proxy.reset_counts()
    version = await bucket.write("key", b"1", if_absent=True)
    version = await bucket.write("key", b"2", if_version=version)
    assert proxy.counts == {"PUT": 2}
    with pytest.raises(VersionMismatchError):
        await bucket.write("key", b"3", if_version="0" * 32)
    assert await bucket.delete("key", if_version=version)


async def test_unquoted_tags_are_found_out_without_asking(bucket: S3Storage, proxy: FaultProxy) -> None:
    """51: nobody has to probe first: a refusal that contradicts what is there makes the storage do so."""
    proxy.rewrite = _unquoted
    version = await bucket.write("key", b"1")
    version = await bucket.write("key", b"2", if_version=version)
    assert await bucket.read("key") == b"2"
    large = os.urandom(PART + 1)
    await bucket.write("key", large, if_version=version)
    assert await bucket.read("key") == large
    assert await left_over(bucket) == [f"{bucket._root}key"]


async def test_deletes_do_not_rely_on_conditions(bucket: S3Storage, proxy: FaultProxy) -> None:
    """50: a store that ignores If-Match on DELETE works: what is there is compared before."""
    proxy.rewrite = _without("if-match", "DELETE")
    old = await bucket.write("key", b"1")
    new = await bucket.write("key", b"2")
    with pytest.raises(VersionMismatchError):
        await bucket.delete("key", if_version=old)
    assert await bucket.read("key") == b"2"
    assert await bucket.delete("key", if_version=new)
    proxy.rule = lambda request: (
        Fault(status=501, code="NotImplemented")
        if request.method == "DELETE" and "if-match" in request.headers
        else None
    )
    proxy.rewrite = lambda request: None
    version = await bucket.write("key", b"1")
    assert await bucket.delete("key", if_version=version)
    assert await bucket.stat("key") is None


async def test_a_store_that_ignores_conditions_of_reads(bucket: S3Storage, proxy: FaultProxy) -> None:
    """`unless` and `if_version` of a read hold also where the store does not know If-None-Match."""

    def forget_the_condition(request: Request) -> None:
        request.headers.pop("if-none-match", None)

    version = await bucket.write("key", b"old")
    proxy.rewrite = forget_the_condition
    assert await bucket.fetch("key", unless=version) is None
    stored = await bucket.fetch("key", unless="other")
    assert stored is not None
    assert stored.data == b"old"
    with pytest.raises(VersionMismatchError):
        await bucket.fetch("key", if_version="other")


async def test_parts_without_conditions(bucket: S3Storage, proxy: FaultProxy) -> None:
    """Where only a PUT honours conditions, large buffers are one PUT, and a large stream is refused."""
    proxy.rewrite = _without("if-none-match", "POST")
    large = os.urandom(PART + 1)
    await bucket.write("key", large, if_absent=True)
    with pytest.raises(ObjectExistsError):
        await bucket.write("key", [large, large], if_absent=True)
    assert await bucket.read("key") == large

    async def stream() -> AsyncIterator[bytes]:
        yield large

    with pytest.raises(ConditionsUnsupportedError, match="CompleteMultipartUpload"):
        await bucket.write("other", stream(), if_absent=True)
    await bucket.write("other", stream())
    assert sorted(await left_over(bucket)) == [f"{bucket._root}key", f"{bucket._root}other"]


async def test_faults_are_no_flaws(bucket: S3Storage, proxy: FaultProxy) -> None:
    """A store that fails now and then while it is probed is not taken for one that ignores conditions."""
    for fault in (Fault(lost=True, applied=True), Fault(status=500, applied=True), Fault(status=503)):
        proxy.next("PUT", fault, Fault(), fault, fault)
        prefix = new_prefix()
        async with S3Storage(own_bucket(), prefix, endpoint_url=proxy.url) as storage:
            await storage.ensure_conditional()


async def test_an_unfinished_probe_leaves_the_question_open(bucket: S3Storage, proxy: FaultProxy) -> None:
    """Unreachable or cancelled, the probe finds nothing out, shows nothing, and is made again next time."""
    proxy.rule = lambda request: Fault(status=503)
    with pytest.raises(StorageUnavailableError):
        await bucket.ensure_conditional()
    proxy.rule = lambda request: None
    for nth in range(1, 12, 2):
        proxy.reset_counts()
        reached = asyncio.Event()
        proxy.rewrite = lambda _, nth=nth, reached=reached: (  # type: ignore[misc]
            reached.set() if proxy.counts.total() >= nth else None
        )
        probing = asyncio.create_task(bucket.ensure_conditional())
        await reached.wait()
        probing.cancel()
        await asyncio.wait([probing])
        assert probing.cancelled()
        assert [stat async for stat in bucket.list()] == []
    await bucket.ensure_conditional()
