"""Redis in particular: paused, restarted, cut off, asked no more than needed."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import time
from contextlib import AsyncExitStack

import pytest
from lock_places import cancel_on_the_wire, turns, until
from onceflow.locking import (
    LeaseLostError,
    LockAccessError,
    LockConfigurationError,
    LockUnavailableError,
    RedisLockManager,
)
from onceflow.locking._waiting.keys import Ticket
from processes import line, python
from redis_servers import RedisServer, free_port
from tcp_proxy import TcpProxy


def through(proxy: TcpProxy, lease_seconds: float = 30) -> RedisLockManager:
    return RedisLockManager(f"redis://127.0.0.1:{proxy.port}/0", lease_seconds=lease_seconds)


async def test_commands_without_contention(own_redis: RedisServer) -> None:
    """An acquire and a release are one command each; an unknown script costs one more, once."""
    async with RedisLockManager(own_redis.url) as manager:
        for number in range(50):
            async with manager.lock(f"key-{number}"):
                pass
    counts = await counted(own_redis)
    assert counts == {"evalsha": 100, "eval": 2}


async def test_commands_while_many_wait(own_redis: RedisServer) -> None:
    """22: while 4 processes with 200 tasks each wait for one key, fewer than 50 commands are sent in all."""
    async with RedisLockManager(own_redis.url) as manager, AsyncExitStack() as stack:
        lease = await manager.acquire("key", "me")
        assert lease is not None
        workers = [
            await stack.enter_async_context(python("lock_worker.py", own_redis.url, "wait", "key", "200"))
            for _ in range(4)
        ]
        for worker in workers:
            assert await line(worker) == ["ready"]
        await subscribers(own_redis, 4)
        await asyncio.sleep(0.5)
        await lease.release()
        for worker in workers:
            assert await line(worker) == ["done"]
    counts = await counted(own_redis)
    assert sum(counts.values()) < 50, counts


async def counted(server: RedisServer) -> dict[str, int]:
    """What the server was asked, but for the opening of connections."""
    counts = await asyncio.to_thread(server.commands)
    return {name: n for name, n in counts.items() if name not in ("ping", "hello", "config|get")}


async def subscribers(server: RedisServer, number: int) -> None:
    async def there() -> bool:
        return (await counted(server)).get("subscribe", 0) == number

    await until(there)


async def nobody_else(server: RedisServer) -> None:
    async def alone() -> bool:
        return await asyncio.to_thread(server.clients) == 1

    await until(alone)


async def test_tokens_survive_lost_data(own_redis: RedisServer) -> None:
    """13: tokens grow on though the server loses its data by FLUSHALL and by a restart."""
    tokens = []
    async with RedisLockManager(own_redis.url) as manager:
        for number in range(30):
            async with manager.lock("key") as lease:
                tokens.append(lease.token)
            if number == 10:
                await asyncio.to_thread(own_redis.ask, b"FLUSHALL")
            if number == 20:
                await asyncio.to_thread(own_redis.restart)
    assert tokens == sorted(set(tokens))


async def test_tokens_ahead_of_the_clock(own_redis: RedisServer) -> None:
    """2.3: a token is above the last one also where the server's clock is behind that."""
    async with RedisLockManager(own_redis.url) as manager:
        await asyncio.to_thread(own_redis.ask, b"SET {onceflow}:token 9000000000000000")
        for number in (1, 2):
            async with manager.lock("key") as lease:
                assert lease.token == 9000000000000000 + number


async def test_a_late_release_by_the_same_name(own_redis: RedisServer) -> None:
    """9: a lease that the server has lost frees nothing, though who has the key by now bears the same name."""
    async with RedisLockManager(own_redis.url) as one, RedisLockManager(own_redis.url) as other:
        first = await one.acquire("key", "me")
        assert first is not None
        await asyncio.to_thread(own_redis.ask, b"FLUSHALL")
        assert await other.acquire("key", "me")
        await first.release()
        assert await one.is_held_by("key", "me")


def _first_in_line(manager: RedisLockManager) -> Ticket | None:
    """Who waits for the key; it has a future only while it waits for a message, and asks for nothing."""
    place = manager._room.places.get("key")
    return place.line.leader if place is not None else None


async def test_a_release_is_told(own_redis: RedisServer) -> None:
    """13: who waits elsewhere is woken by a message, long before the lease would be over."""
    async with RedisLockManager(own_redis.url) as one, RedisLockManager(own_redis.url) as other:
        lease = await one.acquire("key", "me")
        assert lease is not None
        waiting = asyncio.create_task(other.acquire("key", "you"))
        await until(lambda: (first := _first_in_line(other)) is not None and first.future is not None)
        await lease.release()
        async with asyncio.timeout(
            3
        ):  # the lease is 30 s, and after 5 s it looks again to tell who holds the key
            assert await waiting


async def test_restart_under_waiters(own_redis: RedisServer) -> None:
    """46: a server that restarts empty: waiters go on, and the holder of before learns that it lost its lease."""
    async with AsyncExitStack() as stack:
        here, there = [
            await stack.enter_async_context(RedisLockManager(own_redis.url, lease_seconds=3))
            for _ in range(2)
        ]
        lease = await here.acquire("key", "me")
        assert lease is not None
        waiting = asyncio.create_task(there.acquire("key", "you"))
        await subscribers(own_redis, 1)
        await asyncio.to_thread(own_redis.restart)
        second = await asyncio.wait_for(waiting, 10)
        assert second is not None
        assert second.token > lease.token
        await asyncio.wait_for(lease.wait_lost(), 10)
        with pytest.raises(LeaseLostError):
            lease.check()
        await lease.release()
        assert await there.is_held_by("key", "you")


async def test_paused_server(own_redis: RedisServer) -> None:
    """45: a server that does not answer: the holder stops in time, a waiter gets a named error, both recover."""
    async with RedisLockManager(own_redis.url, lease_seconds=1.5) as manager:
        lease = await manager.acquire("key", "me")
        assert lease is not None
        own_redis.pause()
        try:
            began = time.monotonic()
            with pytest.raises(LockUnavailableError, match="'other'"):
                await manager.acquire("other", "you")
            assert time.monotonic() - began < 5
            await asyncio.wait_for(lease.wait_lost(), 5)
        finally:
            own_redis.resume()
        await lease.release()
        async with asyncio.timeout(10):
            async with manager.lock("key"), manager.lock("third"):
                pass


async def test_unavailable_for_all_waiters(own_redis: RedisServer) -> None:
    """A server that is gone is told to all waiters at once, not to one after the other."""
    async with RedisLockManager(own_redis.url, lease_seconds=2) as manager:
        await asyncio.to_thread(own_redis.kill)
        began = time.monotonic()
        tasks = [asyncio.create_task(manager.acquire("key", f"{number}")) for number in range(20)]
        errors = await asyncio.gather(*tasks, return_exceptions=True)
        assert time.monotonic() - began < 10
        assert all(isinstance(error, LockUnavailableError) for error in errors)
        assert len({id(error) for error in errors}) == len(errors)


async def test_lost_reply(proxy: TcpProxy) -> None:
    """35: an acquire whose answer is lost is repeated, and gets the key that it has already, once."""
    async with through(proxy, lease_seconds=6) as manager:
        async with manager.lock("warm"):
            pass
        proxy.replies.clear()
        acquiring = asyncio.create_task(manager.acquire("key", "me"))
        direct = RedisLockManager(f"redis://127.0.0.1:{proxy._target}/0")
        async with direct:
            await until(lambda: direct.is_held_by("key", "me"))
            proxy.drop()
            proxy.replies.set()
            lease = await asyncio.wait_for(acquiring, 10)
            assert lease is not None
            await lease.release()
            assert not await direct.is_locked("key")


async def test_cancelled_while_the_request_is_on_the_wire(proxy: TcpProxy) -> None:
    """32: an acquire that is cancelled before its request arrives is undone when it has."""
    async with through(proxy) as manager:
        async with manager.lock("warm"):
            pass
        await cancel_on_the_wire(proxy, manager.acquire("key", "me"))
        async with RedisLockManager(f"redis://127.0.0.1:{proxy._target}/0") as direct:
            assert not await direct.is_locked("key")


async def test_lost_message(proxy: TcpProxy) -> None:
    """A waiter whose connection for messages broke, and who missed the release, learns of it all the same."""
    async with RedisLockManager(f"redis://127.0.0.1:{proxy._target}/0") as direct, through(proxy) as manager:
        await direct.acquire("key", "me")
        waiting = asyncio.create_task(manager.acquire("key", "you"))
        await until(lambda: subscribed(manager))
        proxy.replies.clear()
        await direct.release("key", "me")
        await asyncio.sleep(0.05)
        assert not waiting.done()
        proxy.drop()
        proxy.replies.set()
        assert await asyncio.wait_for(waiting, 10)


def subscribed(manager: RedisLockManager) -> bool:
    link = manager._links.get(asyncio.get_running_loop())
    channels = list(link.messages._channels.values()) if link is not None else []
    return bool(channels) and all(channel.confirmed.is_set() for channel in channels)


async def test_slow_network(proxy: TcpProxy) -> None:
    """With 50 ms of delay each way, locks work as ever."""
    proxy.delay = 0.05
    async with through(proxy) as one, through(proxy) as other:
        order = []

        async def visit(manager: RedisLockManager, name: str) -> None:
            async with manager.lock("key"):
                order.append(name)
                await asyncio.sleep(0.01)
                order.append(name)

        await asyncio.gather(*(visit(m, f"{n}") for n, m in enumerate((one, other, one))))
        assert order[::2] == order[1::2]


async def test_few_connections_are_enough(own_redis: RedisServer) -> None:
    """48: a thousand requests at once wait for the pool; none fails, and no more connections are opened."""
    async with RedisLockManager(own_redis.url, max_connections=4) as manager:
        await asyncio.gather(*(_visit(manager, f"key-{number}") for number in range(500)))
        assert await asyncio.to_thread(own_redis.clients) <= 4 + 1 + 1  # for messages, and for this question


async def _visit(manager: RedisLockManager, key: str) -> None:
    async with manager.lock(key):
        pass


async def test_connections_are_closed(own_redis: RedisServer) -> None:
    """Closing the manager closes its connections; so does the end of its event loop."""
    async with RedisLockManager(own_redis.url) as manager:
        await _contend(manager)
    await nobody_else(own_redis)
    left = RedisLockManager(own_redis.url)
    await asyncio.to_thread(asyncio.run, _contend(left))
    await nobody_else(own_redis)


async def _contend(manager: RedisLockManager) -> None:
    await manager.acquire("key", "me")
    waiting = asyncio.create_task(manager.acquire("key", "you"))
    await turns(100)
    await manager.release("key", "me")
    assert await waiting
    await manager.release("key", "you")


async def test_release_by_the_same_holder_elsewhere(redis_server: RedisServer) -> None:
    """A holder is its name: it may acquire again and release in another process."""
    async with RedisLockManager(redis_server.url) as here, RedisLockManager(redis_server.url) as there:
        lease = await here.acquire("elsewhere", "me")
        again = await there.acquire("elsewhere", "me", timeout=0)
        assert lease is not None
        assert again is not None
        assert again.token == lease.token
        await there.release("elsewhere", "me")
        assert not await here._look("elsewhere")
        await lease.release()


async def test_no_server_there() -> None:
    """82: a server that refuses connections is an error that names the key and keeps the password to itself."""
    port = await asyncio.to_thread(free_port)
    manager = RedisLockManager(f"redis://:secret@127.0.0.1:{port}/0", lease_seconds=2)
    async with manager:
        with pytest.raises(LockUnavailableError, match="'key'") as caught:
            await manager.acquire("key", "me")
        assert isinstance(caught.value, ConnectionError)
        assert "secret" not in str(caught.value) + repr(manager) + manager.url


async def test_wrong_password() -> None:
    """80: a wrong or missing password is told at once, and not tried again."""
    server = await asyncio.to_thread(RedisServer, None, "right")
    try:
        for user in (":wrong@", ""):
            async with RedisLockManager(f"redis://{user}127.0.0.1:{server.port}/0") as manager:
                began = time.monotonic()
                with pytest.raises(LockAccessError, match="password"):
                    await manager.acquire("key", "me")
                assert time.monotonic() - began < 2
        async with RedisLockManager(server.url) as manager, manager.lock("key"):
            pass
    finally:
        server.kill()


def test_bad_options() -> None:
    """89: what cannot work is refused when the manager is made."""
    for url in ("http://localhost", "localhost:6379", "redis://localhost:port"):
        with pytest.raises(LockConfigurationError, match="redis://"):
            RedisLockManager(url)
    with pytest.raises(LockConfigurationError, match="max_connections"):
        RedisLockManager(max_connections=0)


def test_redis_is_optional(tmp_path: object) -> None:
    """Without redis-py the other managers work, and this one names the extra."""
    script = (
        "import sys; sys.modules['redis'] = None\n"
        "from onceflow.locking import *\n"
        "try: RedisLockManager('redis://x')\n"
        "except LockConfigurationError as error: print(error)\n"
    )
    import sys
    from pathlib import Path

    root = Path(__file__).parents[3] / ".dev"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(root)},
        check=True,
    )
    assert "onceflow[redis]" in done.stdout


async def test_no_noise(own_redis: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """A server that comes and goes while nobody asks it for anything is not worth a word."""
    async with RedisLockManager(own_redis.url) as manager:
        async with manager.lock("key"):
            pass
        await asyncio.to_thread(own_redis.restart)
        async with manager.lock("key"):
            pass
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
