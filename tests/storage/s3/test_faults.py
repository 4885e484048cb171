"""A store that answers late, wrongly, in part or not at all: success or a typed error, in time."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest
from blockbuster import BlockBuster
from fault_proxy import Fault, FaultProxy, Request
from onceflow.storage import (
    ConditionsUnsupportedError,
    ObjectExistsError,
    ObjectNotFoundError,
    S3Storage,
    StorageAccessError,
    StorageConfigurationError,
    StorageError,
    StorageFullError,
    StorageUnavailableError,
    VersionMismatchError,
)
from s3_servers import Server, new_prefix, rclone, s3_bucket, s3_server

PART = 5 * 1024 * 1024
OLD, NEW = b"old " * 100, b"new " * 100
LARGE = os.urandom(PART + 3)
TIMEOUT = 3.0


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    for name, value in s3_server().environment.items():
        monkeypatch.setenv(name, value)
    s3_bucket()  # made here, outside of any loop, because it blocks
    return s3_server()


@pytest.fixture
async def proxy(server: Server) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(server.endpoint_url).running() as running:
        yield running


@pytest.fixture
async def bucket(proxy: FaultProxy) -> AsyncIterator[S3Storage]:
    storage = S3Storage(
        s3_bucket(), new_prefix(), endpoint_url=proxy.url, part_size=PART, concurrency=3, timeout=TIMEOUT
    )
    async with storage:
        yield storage


async def chunks(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), 999_983):
        yield data[start : start + 999_983]


# What one fault does. Each operation prepares, is called while the fault is armed, and checks the outcome.

Act = tuple[Callable[[], Awaitable[object]], object, bytes | None]
"""What to call, what it returns (`str` for any version), and what is stored under the key afterwards."""

Operation = Callable[[S3Storage], Awaitable[Act]]


async def reading(storage: S3Storage) -> Act:
    await storage.write("key", OLD)
    return lambda: storage.read("key"), OLD, OLD


async def reading_large(storage: S3Storage) -> Act:
    await storage.write("key", LARGE)
    return lambda: storage.read("key"), LARGE, LARGE


async def writing(storage: S3Storage) -> Act:
    await storage.write("key", OLD)
    return lambda: storage.write("key", NEW), str, NEW


async def creating(storage: S3Storage) -> Act:
    await storage.stat("key")
    return lambda: storage.write("key", NEW, if_absent=True), str, NEW


async def replacing(storage: S3Storage) -> Act:
    version = await storage.write("key", OLD)
    return lambda: storage.write("key", NEW, if_version=version), str, NEW


async def writing_large(storage: S3Storage) -> Act:
    await storage.write("key", OLD)
    return lambda: storage.write("key", LARGE), str, LARGE


async def replacing_large(storage: S3Storage) -> Act:
    version = await storage.write("key", OLD)
    in_parts = await storage._conditions.multipart_honoured()  # where not, as on Ceph RGW 16, it is one PUT
    return lambda: storage.write("key", chunks(LARGE) if in_parts else LARGE, if_version=version), str, LARGE


async def looking(storage: S3Storage) -> Act:
    await storage.write("key", OLD)
    return lambda: storage.stat("key"), await storage.stat("key"), OLD


async def deleting(storage: S3Storage) -> Act:
    version = await storage.write("key", OLD)
    return lambda: storage.delete("key", if_version=version), True, None


async def listing(storage: S3Storage) -> Act:
    await storage.write("key", OLD)

    async def keys() -> list[str]:
        return [stat.key async for stat in storage.list()]

    return keys, ["key"], OLD


OPERATIONS: list[Operation] = [
    reading, reading_large, writing, creating, replacing, writing_large, replacing_large,
    looking, deleting, listing,
]  # fmt: skip

FAULTS = {
    "late": Fault(delay=0.1),
    "503": Fault(status=503, code="SlowDown"),
    "500": Fault(status=500),
    "500 after applying": Fault(status=500, applied=True),
    "404 after applying": Fault(status=404, code="NoSuchKey", applied=True),
    "409": Fault(status=409, code="ConditionalRequestConflict"),
    "412 after applying": Fault(status=412, code="PreconditionFailed", applied=True),
    "reset": Fault(lost=True),
    "lost reply": Fault(lost=True, applied=True),
    "cut body": Fault(cut=7),
    "silence": Fault(silent=True),
}
ANSWERS_TO_CONDITIONS = ("404 after applying", "412 after applying", "409")
CONDITIONAL = (creating, replacing, replacing_large)
LARGE_ONES = (reading_large, writing_large, replacing_large)


def _cases() -> Iterator[tuple[Operation, str, int]]:
    for operation in OPERATIONS:
        for name in FAULTS:
            if name in ANSWERS_TO_CONDITIONS and operation not in CONDITIONAL:
                continue  # only those are answered so
            if name == "silence" and operation in (writing, looking, deleting, listing):
                continue  # each costs a second, and the others show it
            yield operation, name, 0
            if operation in LARGE_ONES and name in ("500", "reset", "lost reply", "cut body"):
                yield operation, name, 1


@pytest.mark.parametrize(
    ("operation", "name", "nth"),
    [pytest.param(*case, id=f"{case[0].__name__}-{case[1]}-{case[2]}") for case in _cases()],
)
async def test_one_fault_is_overcome(
    bucket: S3Storage, proxy: FaultProxy, operation: Operation, name: str, nth: int
) -> None:
    """35-39, 42: whatever happens to the nth request, the operation succeeds, with the right result."""
    act, expected, left = await operation(bucket)
    if name not in ANSWERS_TO_CONDITIONS:
        proxy.next("*", *[Fault()] * nth, FAULTS[name])
    elif operation is replacing_large:
        proxy.rule = _at_the_completion(FAULTS[name])
    else:
        proxy.next("PUT", FAULTS[name])
    result = await act()
    proxy.faults.clear()
    proxy.rule = lambda request: None
    assert isinstance(result, str) if expected is str else result == expected
    if left is None:
        assert await bucket.stat("key") is None
    else:
        assert await bucket.read("key") == left


def _at_the_completion(fault: Fault) -> Callable[[Request], Fault | None]:
    armed = [fault]
    return lambda request: (
        armed.pop()
        if armed and ("if-match" in request.headers and request.method in ("PUT", "POST"))
        else None
    )


async def test_no_answer_at_all_ends_in_time(bucket: S3Storage, proxy: FaultProxy) -> None:
    """37, 41: a store that says 503 for ever, or nothing, is a typed error at the deadline."""
    options = bucket._options._replace(timeout=0.9)
    bucket = S3Storage(**options._asdict())
    async with bucket:
        await _no_answer(bucket, proxy)


async def _no_answer(bucket: S3Storage, proxy: FaultProxy) -> None:
    version = await bucket.write("key", OLD)
    await bucket.write("large", LARGE)
    for fault in (Fault(status=503, code="SlowDown"), Fault(silent=True), Fault(lost=True)):
        proxy.rule = lambda request, fault=fault: fault  # type: ignore[misc]
        proxy.reset_counts()
        acts: list[Callable[[], Awaitable[object]]] = [
            lambda: bucket.read("key"),
            lambda: bucket.read("large"),
            lambda: bucket.write("key", NEW),
            lambda: bucket.write("new", NEW, if_absent=True),
            lambda: bucket.write("key", NEW, if_version=version),
            lambda: bucket.write("key", LARGE),
            lambda: bucket.stat("key"),
            lambda: bucket.delete("key"),
            lambda: anext(bucket.list()),
        ]
        async with asyncio.timeout(30):
            ends = await asyncio.gather(*(act() for act in acts), return_exceptions=True)
        for end in ends:
            assert isinstance(end, StorageUnavailableError), end
            assert s3_bucket() in str(end)
            assert proxy.url in str(end)
        assert max(len([r for r in proxy.seen if r.method == m]) for m in proxy.counts) <= 12 * len(acts)
    proxy.rule = lambda request: None
    assert await bucket.read("key") == OLD
    assert await bucket.read("large") == LARGE


async def test_a_store_that_comes_back_is_waited_for(bucket: S3Storage, proxy: FaultProxy) -> None:
    """40: 503 for a second is overcome by a handful of attempts, with pauses that grow."""
    loop = asyncio.get_running_loop()
    await bucket.write("key", OLD)
    until = loop.time() + 1.0
    proxy.reset_counts()
    proxy.rule = lambda _: Fault(status=503, code="SlowDown") if loop.time() < until else None
    assert await bucket.read("key") == OLD
    assert 2 <= proxy.counts["GET"] <= 10


async def test_a_lost_create_is_won_and_a_taken_key_is_lost(bucket: S3Storage, proxy: FaultProxy) -> None:
    """35, 36, 38: whose object is there decides, not what was answered; a conflict is never 'exists'."""
    lost = Fault(lost=True, applied=True)
    proxy.next("PUT", lost)
    version = await bucket.write("mine", NEW, if_absent=True)
    assert (await bucket.fetch("mine")) == (NEW, version, len(NEW))
    await bucket.write("theirs", OLD)
    for fault in (lost, Fault(status=500), Fault(status=409, code="ConditionalRequestConflict")):
        proxy.next("PUT", fault)
        with pytest.raises(ObjectExistsError):
            await bucket.write("theirs", NEW, if_absent=True)
        proxy.next("PUT", fault)
        with pytest.raises(VersionMismatchError):
            await bucket.write("theirs", NEW, if_version="0" * 32)
    assert await bucket.read("theirs") == OLD


async def test_a_lost_replacement_is_won_though_others_went_on(bucket: S3Storage, proxy: FaultProxy) -> None:
    """36: our write took place, its answer was lost, and before we look others have replaced it: it was done."""
    await bucket.ensure_conditional()
    plain = S3Storage(s3_bucket(), bucket._options.prefix, endpoint_url=s3_server().endpoint_url)
    async with plain:
        await plain.ensure_conditional()
        for condition in ("if_absent", "if_version"):
            version = await bucket.write(condition, OLD) if condition == "if_version" else None
            reached, until = asyncio.Event(), asyncio.Event()
            proxy.next("PUT", Fault(lost=True, applied=True))
            proxy.next("HEAD", Fault(reached=reached, until=until))
            writing = asyncio.create_task(
                bucket.write(condition, NEW, if_absent=version is None, if_version=version)
            )
            await reached.wait()
            latest = None
            for number in range(3):
                stored = await plain.fetch(condition)
                assert stored is not None
                latest = await plain.write(condition, b"%d" % number, if_version=stored.version)
            until.set()
            with pytest.raises(VersionMismatchError):
                await bucket.write(condition, OLD, if_version=await writing)
            assert await bucket.read(condition) == b"2"
            assert (await bucket.stat(condition) or [None] * 4)[2] == latest


async def test_gone_means_changed(bucket: S3Storage) -> None:
    """39: only-if-version on an object that is gone is a mismatch, as it is on one that changed."""
    version = await bucket.write("key", OLD)
    await bucket.delete("key")
    with pytest.raises(VersionMismatchError):
        await bucket.write("key", NEW, if_version=version)
    assert await bucket.stat("key") is None


async def test_conflicts_without_end_are_no_answer(bucket: S3Storage, proxy: FaultProxy) -> None:
    """38: a store that says 409 for ever has decided nothing: that is 'unavailable', not 'exists'."""
    proxy.rule = lambda request: (
        Fault(status=409, code="ConditionalRequestConflict") if request.method == "PUT" else None
    )
    with pytest.raises(StorageUnavailableError, match="ConditionalRequestConflict"):
        await bucket.write("key", NEW, if_absent=True)


async def test_an_honest_no_is_passed_on(bucket: S3Storage, proxy: FaultProxy) -> None:
    """A store that says 501 to a condition is refused at once, with what it said."""
    proxy.reset_counts()
    proxy.next("PUT", Fault(status=501, code="NotImplemented"))
    with pytest.raises(ConditionsUnsupportedError, match="NotImplemented"):
        await bucket.write("key", NEW, if_absent=True)
    assert proxy.counts["PUT"] == 1


async def test_no_increment_is_lost_among_faults(bucket: S3Storage, proxy: FaultProxy) -> None:
    """44: every tenth request fails in one of five ways, and each successful compare-and-swap counts once."""
    dice = random.Random(44)
    faults = [Fault(status=500), Fault(status=500, applied=True), Fault(lost=True)]
    faults += [Fault(lost=True, applied=True), Fault(status=503, code="SlowDown"), Fault(cut=3)]
    await bucket.write("counter", b"0:start")
    proxy.rule = lambda _: dice.choice(faults) if dice.random() < 0.1 else None

    async def increment(worker: int, times: int) -> None:
        done = 0
        while done < times:
            stored = await bucket.fetch("counter")
            assert stored is not None
            count = int(bytes(stored.data).split(b":")[0])
            try:
                body = f"{count + 1}:{worker}-{os.urandom(4).hex()}".encode()
                await bucket.write("counter", body, if_version=stored.version)
                done += 1
            except VersionMismatchError:
                pass

    for _ in range(10):  # in step: who is passed by more writes than marks are kept cannot be decided
        await asyncio.gather(*(increment(worker, 1) for worker in range(4)))
    proxy.rule = lambda request: None
    assert (await bucket.read("counter")).startswith(b"40:")


async def test_one_winner_among_faults(bucket: S3Storage, proxy: FaultProxy) -> None:
    """44: of many creators whose requests fail at random, exactly one is told that it won, and it did."""
    dice = random.Random(7)
    faults = [Fault(status=500, applied=True), Fault(lost=True, applied=True), Fault(lost=True)]
    proxy.rule = lambda _: dice.choice(faults) if dice.random() < 0.3 else None
    for number in range(6):
        bodies = [b"%d" % worker for worker in range(8)]
        ends = await asyncio.gather(
            *(bucket.write(f"key{number}", body, if_absent=True) for body in bodies), return_exceptions=True
        )
        won = [body for body, end in zip(bodies, ends, strict=True) if isinstance(end, str)]
        assert [type(end) for end in ends if not isinstance(end, str)] == [ObjectExistsError] * 7
        assert [await bucket.read(f"key{number}")] == won


# Errors that say what to do

REFUSALS = {
    "NoSuchBucket": (404, StorageConfigurationError, "Create it"),
    "AccessDenied": (403, StorageAccessError, "Grant these credentials"),
    "InvalidAccessKeyId": (403, StorageAccessError, "AWS_ACCESS_KEY_ID"),
    "SignatureDoesNotMatch": (403, StorageAccessError, "AWS_SECRET_ACCESS_KEY"),
    "ExpiredToken": (400, StorageAccessError, "AWS_SESSION_TOKEN"),
    "RequestTimeTooSkewed": (403, StorageAccessError, "clock"),
    "AuthorizationHeaderMalformed": (400, StorageConfigurationError, "region_name"),
    "QuotaExceeded": (403, StorageFullError, "Free some space"),
    "EntityTooLarge": (400, StorageConfigurationError, "Check"),
}


@pytest.mark.parametrize("code", REFUSALS)
async def test_a_refusal_is_told_once_and_well(bucket: S3Storage, proxy: FaultProxy, code: str) -> None:
    """79-81: bucket, key, operation and remedy are named; nothing is asked twice, but a HEAD by a GET."""
    status, kind, remedy = REFUSALS[code]
    await bucket.write("warm", OLD)
    proxy.rule = lambda _: Fault(status=status, code=code)
    acts: dict[str, Callable[[], Awaitable[object]]] = {
        "read": lambda: bucket.read("some-key"),
        "write": lambda: bucket.write("some-key", NEW, if_absent=True),
        "stat": lambda: bucket.stat("some-key"),
        "delete": lambda: bucket.delete("some-key"),
        "list": lambda: anext(bucket.list("some-key")),
    }
    for operation, act in acts.items():
        proxy.reset_counts()
        if code == "NoSuchBucket" and operation in ("stat", "delete"):
            continue  # a HEAD is told 404, and the bucket was there before
        with pytest.raises(kind) as caught:
            await act()
        for named in (s3_bucket(), "some-key", remedy):
            assert named in str(caught.value)
        if kind is not StorageFullError:
            assert operation in str(caught.value)
        if code != "AuthorizationHeaderMalformed":  # botocore looks for the region by a HEAD of the bucket
            limit = 2 if operation in ("stat", "delete") else 1
            limit += operation in ("stat", "delete") and status == 400  # the region once more
            assert sum(proxy.counts.values()) <= limit


@pytest.mark.parametrize("denied", ["GET", "PUT", "DELETE", "LIST"])
async def test_the_right_that_is_missing_is_named(bucket: S3Storage, proxy: FaultProxy, denied: str) -> None:
    """81: denied one kind of request, an operation names the right to it; the others work as before."""
    await bucket.ensure_conditional()  # so that no write has to look why its tag was refused, as on Ceph RGW
    version = await bucket.write("key", OLD)

    def kind_of(request: Request) -> str:
        return "LIST" if "list-type" in request.path else request.method.replace("HEAD", "GET")

    proxy.rule = lambda request: (
        Fault(status=403, code="AccessDenied") if kind_of(request) == denied else None
    )
    rights = {
        "GET": "s3:GetObject",
        "PUT": "s3:PutObject",
        "DELETE": "s3:DeleteObject",
        "LIST": "s3:ListBucket",
    }
    acts: dict[str, tuple[str, Callable[[], Awaitable[object]]]] = {
        "read": ("GET", lambda: bucket.read("key")),
        "stat": ("GET", lambda: bucket.stat("key")),
        "write": ("PUT", lambda: bucket.write("key", OLD, if_version=version)),
        "list": ("LIST", lambda: anext(bucket.list())),
        "delete": ("GET" if denied == "GET" else "DELETE", lambda: bucket.delete("key")),
    }
    for operation, (needed, act) in acts.items():
        if needed == denied:
            with pytest.raises(StorageAccessError, match=f"May not {operation} .*Grant .*{rights[denied]}"):
                await act()
        else:
            await act()
    proxy.rule = lambda request: None
    assert await bucket.stat("key") is None or denied in ("GET", "DELETE")


async def test_a_missing_bucket_is_no_missing_object(server: Server) -> None:
    """79: every operation on a bucket that is not there says so; a stat does not answer 'no such object'."""
    async with S3Storage("there-is-no-such-bucket", endpoint_url=server.endpoint_url) as storage:
        for act in (storage.stat("a"), storage.read("a"), storage.write("a", b""), anext(storage.list())):
            with pytest.raises(
                StorageConfigurationError, match="there is no bucket 'there-is-no-such-bucket'"
            ):
                await act
    async with S3Storage(s3_bucket(), new_prefix(), endpoint_url=server.endpoint_url) as storage:
        assert await storage.stat("a") is None


async def test_no_credentials(
    server: Server, monkeypatch: pytest.MonkeyPatch, no_blocking_calls: BlockBuster
) -> None:
    """80: without credentials the error says where they are looked for; later they may be there."""
    for function in no_blocking_calls.functions.values():
        # A worker thread asks the whole chain again on a loop of its own, which stops nobody.
        function.can_block_in("_s3/client.py", "_run_here")
    keys = {name: os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    for name in keys:
        monkeypatch.delenv(name)
    async with S3Storage(s3_bucket(), new_prefix(), endpoint_url=server.endpoint_url) as storage:
        for _ in range(2):
            with pytest.raises(StorageAccessError, match="AWS_PROFILE"):
                await storage.read("key")
        for name, value in keys.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ObjectNotFoundError):
            await storage.read("key")


@pytest.fixture(scope="module")
def checking_server() -> Iterator[tuple[Server, str]]:
    """A server that checks signatures, and a bucket on it."""
    with rclone() as running:
        yield running, running.make_bucket()


@pytest.mark.parametrize(
    ("variable", "remedy"),
    [("AWS_ACCESS_KEY_ID", "access key"), ("AWS_SECRET_ACCESS_KEY", "signature is wrong")],
)
async def test_wrong_credentials_on_a_real_server(
    checking_server: tuple[Server, str], monkeypatch: pytest.MonkeyPatch, variable: str, remedy: str
) -> None:
    """80: an unknown key and a wrong secret are two different errors, on a server that checks them."""
    server, bucket = checking_server
    for name, value in (server.environment | {variable: "wrong"}).items():
        monkeypatch.setenv(name, value)
    async with S3Storage(bucket, endpoint_url=server.endpoint_url) as storage:
        with pytest.raises(StorageAccessError, match=remedy):
            await storage.read("key")
        with pytest.raises(StorageAccessError, match=remedy):
            await storage.stat("key")


@pytest.mark.parametrize(
    ("variable", "value", "named"),
    [
        ("AWS_PROFILE", "no-such-profile", "no-such-profile"),
        ("AWS_DEFAULT_REGION", "no region!", "no region!"),
        ("AWS_CONFIG_FILE", __file__, __file__),
    ],
)
async def test_a_configuration_that_cannot_be(
    server: Server, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, named: str
) -> None:
    """89: what the environment has wrong is named with where to look; it is not laid to the store."""
    monkeypatch.setenv(variable, value)
    async with S3Storage(s3_bucket(), new_prefix(), endpoint_url=server.endpoint_url) as storage:
        with pytest.raises(StorageConfigurationError) as caught:
            await storage.read("key")
    for word in (named, "AWS_PROFILE", "'key'"):
        assert word in str(caught.value)
    assert "refused" not in str(caught.value)


async def test_a_web_site_is_no_store(bucket: S3Storage, proxy: FaultProxy) -> None:
    """79: a server that answers everything, but is no S3 store, is found out; its page is no object."""
    proxy.rule = lambda _: Fault(status=200, page=b"<html>Welcome!</html>")
    acts: list[Awaitable[object]] = [bucket.read("key"), bucket.stat("key"), bucket.delete("key")]
    acts += [bucket.write("key", NEW), bucket.write("key", NEW, if_absent=True)]
    for act in acts:
        with pytest.raises(StorageConfigurationError, match=r"'key'.*no S3 store.*endpoint_url"):
            await act


async def test_nobody_there(server: Server) -> None:
    """82: a refused connection, an unknown host and a server without TLS are typed errors, soon."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        refused = f"http://127.0.0.1:{taken.getsockname()[1]}"
        no_tls = server.endpoint_url.replace("http:", "https:")
        for endpoint_url in (refused, "http://no-such-host.invalid", no_tls):
            async with (
                asyncio.timeout(10),
                S3Storage("bucket", endpoint_url=endpoint_url, timeout=1) as storage,
            ):
                with pytest.raises(StorageUnavailableError) as caught:
                    await storage.read("key")
                assert endpoint_url in str(caught.value)
                assert "'key'" in str(caught.value)


def _answered(code: str, status: int) -> dict[str, dict[str, object]]:
    return {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


def test_every_refusal_has_a_text_of_its_own() -> None:
    """80: no two kinds of refusal say the same."""
    from onceflow.storage._s3.errors import Translator

    translator = Translator("bucket", "s3://bucket")
    texts = {
        str(translator._response(_answered(code, status), "read", "k", "get_object"))
        for code, (status, _, _) in REFUSALS.items()
    }  # fmt: skip
    assert len(texts) == len(REFUSALS)
    assert all("'k'" in text and "bucket" in text for text in texts)
    assert issubclass(StorageUnavailableError, StorageError)
