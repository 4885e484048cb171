"""What a Redis server, or the way to it, says no to: told at once or borne, by name, and nothing is left held."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from lock_places import until
from onceflow.locking import (
    LockAccessError,
    LockConfigurationError,
    LockError,
    LockManager,
    LockUnavailableError,
    RedisLockManager,
    lock_manager_from_url,
)
from redis_servers import RedisServer, free_port


async def ask(server: RedisServer, *commands: str) -> None:
    """Have the server do this."""
    for command in commands:
        answer = await asyncio.to_thread(server.ask, command.encode())
        assert not answer.startswith(b"-"), answer


async def refused(manager: LockManager, kind: type[LockError], *words: str, seconds: float = 5) -> None:
    """The manager says so in words, in time, and holds nothing."""
    async with asyncio.timeout(seconds):
        with pytest.raises(kind, match="'key'") as caught:
            await manager.acquire("key", "me")
    for word in words:
        assert word in str(caught.value)
    assert ".." not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://h/abc",
        "redis://h/-1",
        "redis://h?db=x",
        "redis://h/0?decode_responses=true",
        "redis://h/0?socket_timeout=5",
        "redis://h/0?lease_seconds=5",
        "redis://h/0?ssl_ca_certs=x",
        "unix://",
    ],
)
def test_urls_that_cannot_work(url: str) -> None:
    """89: a database or an option that cannot be had is refused when the manager is made, with what can."""
    with pytest.raises(LockConfigurationError, match=r"Give|known are|rediss://"):
        RedisLockManager(url)


def test_urls_make_equal_managers() -> None:
    """The manager's URL keeps all that decides with whom it shares locks, and no secret."""
    url = "redis://user:secret@h/2?lease_seconds=9&max_connections=3&prefix=mine&ssl_password=secret"
    manager = lock_manager_from_url(url.replace("redis:", "rediss:"))
    assert "secret" not in manager.url
    assert "user" not in manager.url
    again = lock_manager_from_url(manager.url)
    assert isinstance(again, RedisLockManager)
    assert (again.url, again._prefix, again.lease_seconds, again._max_connections) == (
        manager.url, "mine", 9, 3,
    )  # fmt: skip
    assert lock_manager_from_url("unix:///a/b?db=1&prefix=x").url == "unix:///a/b?db=1&prefix=x"
    with pytest.raises(LockConfigurationError, match="max_connections=16"):
        lock_manager_from_url("redis://h?max_connections=many")


async def test_an_option_that_redis_refuses(redis_server: RedisServer) -> None:
    """89: what only redis-py can tell to be wrong is a configuration error, too."""
    async with RedisLockManager(f"{redis_server.url}?protocol=9") as manager:
        with pytest.raises(LockConfigurationError, match="protocol"):
            await manager.acquire("key", "me")


async def test_unix_socket(tmp_path: Path) -> None:
    """A server is reached by its socket, and one that is not there is told as such."""
    path = tmp_path / "s"
    server = await asyncio.to_thread(RedisServer, None, None, ("--unixsocket", str(path)))
    try:
        async with lock_manager_from_url(f"unix://{path}?lease_seconds=2") as manager:
            async with manager.lock("key"):
                assert await manager.is_locked("key")
            assert lock_manager_from_url(manager.url).url == manager.url
        async with RedisLockManager(f"unix://{path}x", lease_seconds=1) as manager:
            await refused(manager, LockUnavailableError, "No such file")
    finally:
        server.kill()


async def test_a_database_that_is_not_there(redis_server: RedisServer) -> None:
    """A database that the server does not have is told at once."""
    async with RedisLockManager(redis_server.url.replace("/0", "/99")) as manager:
        await refused(manager, LockConfigurationError, "Name a database", seconds=2)


ALL = "on >pw ~* &* +@all"


@pytest.mark.parametrize(
    "rights", [f"{ALL} resetkeys", f"{ALL} -evalsha", f"{ALL} -set", "on >pw %R~* &* +@all"]
)
async def test_rights_that_are_missing(own_redis: RedisServer, rights: str) -> None:
    """80: a user that may not lock is told at once which rights it needs; those suffice, also for waiting."""
    await ask(own_redis, f"ACL SETUSER one {rights}")
    url = own_redis.url.replace("://", "://one:pw@")
    async with RedisLockManager(url) as manager, RedisLockManager(own_redis.url) as other:
        with pytest.raises(LockAccessError, match="ACL SETUSER") as caught:
            await manager.acquire("key", "me")
        assert not await other.is_locked("key")
        rule = caught.value.remedy.partition("ACL SETUSER name ")[2].rstrip(".")
        await ask(own_redis, f"ACL SETUSER one reset on >pw {rule}")
        await _hand_over(manager, other)


async def _hand_over(one: LockManager, other: LockManager) -> None:
    lease = await one.acquire("key", "me")
    assert lease is not None
    waiting = asyncio.create_task(other.acquire("key", "you"))
    assert not await other.wait_until_free("key", timeout=0.05)
    await lease.release()
    second = await asyncio.wait_for(waiting, 5)
    assert second is not None
    waiting = asyncio.create_task(one.acquire("key", "me"))
    assert not await one.wait_until_free("key", timeout=0.05)
    await second.release()
    third = await asyncio.wait_for(waiting, 5)
    assert third is not None
    await third.release()


async def test_channels_that_are_denied(own_redis: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """80: a user that may not listen is told so when it would wait, and frees its own keys all the same."""
    await ask(own_redis, "ACL SETUSER one on >pw ~* resetchannels +@all")
    url = own_redis.url.replace("://", "://one:pw@")
    async with RedisLockManager(url) as manager, RedisLockManager(own_redis.url) as other:
        async with manager.lock("mine"):
            pass
        assert "channel" in caplog.text
        assert not await other.is_locked("mine")
        async with other.lock("key"):
            for _ in range(2):
                await refused(manager, LockAccessError, "channel", "ACL SETUSER", seconds=2)
            with pytest.raises(LockAccessError, match="wait for"):
                await manager.wait_until_free("key")


async def test_rights_that_are_taken_away(own_redis: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """A holder that is forbidden to renew learns that it lost its lease, and nothing hangs when it is closed."""
    await ask(own_redis, f"ACL SETUSER one {ALL}")
    async with RedisLockManager(own_redis.url.replace("://", "://one:pw@"), lease_seconds=1) as manager:
        lease = await manager.acquire("key", "me")
        kept = await manager.acquire("kept", "me")
        assert lease is not None
        assert kept is not None
        await ask(own_redis, "ACL SETUSER one -evalsha")
        assert "renewal" in await asyncio.wait_for(lease.wait_lost(), 5)
        assert "has no permissions" in caplog.text
    assert kept._over is not None


async def test_memory_that_is_used_up(own_redis: RedisServer) -> None:
    """A server without memory grants nothing and says why; who holds a key keeps it, and can free it."""
    async with RedisLockManager(own_redis.url, lease_seconds=0.6) as manager:
        lease = await manager.acquire("held", "me")
        assert lease is not None
        before = lease._deadline
        await ask(own_redis, "CONFIG SET maxmemory 1")
        await refused(manager, LockUnavailableError, "maxmemory", "memory is used up", seconds=2)
        await until(lambda: lease._deadline > before)
        assert not lease.lost
        await lease.release()
        assert not await manager.is_locked("held")


async def test_too_many_clients(own_redis: RedisServer) -> None:
    """A server that takes no more connections is asked again until it does, or the deadline is over."""
    async with RedisLockManager(own_redis.url, lease_seconds=2) as manager:
        await ask(own_redis, "CONFIG SET maxclients 3")
        others = [(await asyncio.open_connection("127.0.0.1", own_redis.port))[1] for _ in range(3)]
        await refused(manager, LockUnavailableError, "maxclients")
        acquiring = asyncio.create_task(manager.acquire("key", "me"))
        await asyncio.sleep(0.05)
        for one in others:
            one.transport.abort()
        assert await asyncio.wait_for(acquiring, 5)


async def test_a_server_that_becomes_a_replica(own_redis: RedisServer, redis_server: RedisServer) -> None:
    """A holder at a server that was demoted learns of its loss; a waiter is told to ask the primary."""
    async with RedisLockManager(own_redis.url, lease_seconds=1.5) as manager:
        lease = await manager.acquire("key", "me")
        waiting = asyncio.create_task(manager.acquire("key", "you"))
        assert lease is not None
        await ask(own_redis, f"REPLICAOF 127.0.0.1 {redis_server.port}")
        await asyncio.wait_for(lease.wait_lost(), 5)
        with pytest.raises(LockUnavailableError, match="primary"):
            await asyncio.wait_for(waiting, 5)
        await ask(own_redis, "REPLICAOF NO ONE")
        async with asyncio.timeout(5), manager.lock("key"):
            pass


async def test_a_server_that_is_busy(own_redis: RedisServer) -> None:
    """While a script of somebody else runs for long, requests wait for its end: none fails."""
    script = (
        "local from = redis.call('TIME') while true do for n = 1, 100000 do end local now = redis.call('TIME') "
        "if now[1] - from[1] + (now[2] - from[2]) / 1000000 > 0.4 then return 1 end end"
    )
    async with RedisLockManager(own_redis.url) as manager:
        lease = await manager.acquire("held", "me")
        assert lease is not None
        await ask(own_redis, "CONFIG SET busy-reply-threshold 20")
        reader, writer = await asyncio.open_connection("127.0.0.1", own_redis.port)
        writer.write(f"*3\r\n$4\r\nEVAL\r\n${len(script)}\r\n{script}\r\n$1\r\n0\r\n".encode())
        await asyncio.sleep(0.1)
        assert (await asyncio.to_thread(own_redis.ask, b"PING")).startswith(b"-BUSY")
        async with asyncio.timeout(4):
            async with manager.lock("key"):
                await lease.release()
        assert await reader.readline() == b":1\r\n"
        writer.close()
        await writer.wait_closed()


async def test_a_server_that_reads_its_data(tmp_path: Path) -> None:
    """A server that was started and reads what it had saved is waited for: nothing fails, no key is lost."""
    slowly = ("--key-load-delay", "200", "--loading-process-events-interval-bytes", "1024")
    server = await asyncio.to_thread(RedisServer, None, None, ("--dir", str(tmp_path), *slowly))
    try:
        async with RedisLockManager(server.url) as manager, RedisLockManager(server.url) as other:
            lease = await manager.acquire("key", "me")
            assert lease is not None
            fill = "for n = 1, 2000 do redis.call('SET', 'x' .. n, string.rep('y', 100)) end"
            await ask(server, f'EVAL "{fill}" 0', "SAVE")
            await asyncio.to_thread(server.restart)
            assert (await asyncio.to_thread(server.ask, b"PING")).startswith(b"-LOADING")
            async with asyncio.timeout(5):
                assert await manager.acquire("key", "you", timeout=0) is None
                assert await other.is_held_by("key", "me")
                await lease.release()
    finally:
        await asyncio.to_thread(server.kill)


async def test_a_cluster(tmp_path: Path) -> None:
    """A server of a cluster is refused by a word that says so."""
    bus = await asyncio.to_thread(free_port)  # else the port and 10 000, which there may not be
    options = ("--cluster-enabled", "yes", "--cluster-port", str(bus), "--dir", str(tmp_path))
    server = await asyncio.to_thread(RedisServer, None, None, options)
    try:
        async with RedisLockManager(server.url) as manager:
            await refused(manager, LockConfigurationError, "Cluster is not supported", seconds=2)
    finally:
        server.kill()


async def test_something_else_at_the_port() -> None:
    """What is no Redis server is told to be none."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with RedisLockManager(f"redis://127.0.0.1:{port}") as manager:
            await refused(manager, LockUnavailableError, "No Redis server", seconds=2)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    command = (
        f"openssl req -x509 -newkey rsa:2048 -nodes -keyout {folder}/key -out {folder}/pem -days 2 "
        "-subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    )
    subprocess.run(command.split(), check=True, capture_output=True)
    return folder / "pem", folder / "key"


@pytest.fixture
async def tls_port(redis_server: RedisServer, certificate: tuple[Path, Path]) -> AsyncIterator[int]:
    """The port of what speaks TLS in front of the server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    tasks: set[asyncio.Task[None] | None] = set()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
        except OSError:
            pass
        writer.transport.abort()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", redis_server.port)
        await asyncio.gather(copy(reader, far_writer), copy(far_reader, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    yield server.sockets[0].getsockname()[1]
    server.close()
    await asyncio.gather(*(task for task in tasks if task is not None))


async def test_tls(tls_port: int, certificate: tuple[Path, Path]) -> None:
    """A certificate that nobody knows is told at once, with the option that makes it known; then locks work."""
    url = f"rediss://127.0.0.1:{tls_port}/0"
    async with RedisLockManager(url) as manager:
        await refused(manager, LockConfigurationError, "CERTIFICATE", "ssl_ca_certs", seconds=3)
    async with RedisLockManager(f"{url}?ssl_ca_certs=/nowhere.pem") as manager:
        await refused(manager, LockConfigurationError, "No such file", "ssl_ca_certs", seconds=3)
    async with RedisLockManager(f"{url}?ssl_ca_certs={certificate[0]}") as manager, manager.lock("tls"):
        pass


async def test_tls_on_one_side_only(tls_port: int, redis_server: RedisServer) -> None:
    """TLS to a server without it, and none to one that wants it, end in time and name both schemes."""
    began = time.monotonic()
    async with RedisLockManager(f"redis://127.0.0.1:{tls_port}", lease_seconds=1) as manager:
        await refused(manager, LockUnavailableError, "rediss://")
    async with RedisLockManager(f"rediss://127.0.0.1:{redis_server.port}", lease_seconds=1) as manager:
        await refused(manager, LockUnavailableError, "TLS")
    assert time.monotonic() - began < 5
