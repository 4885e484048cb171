"""Locks in Redis when much is asked at once, when the network parts, and when loops end badly."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lock_places import cancel_on_the_wire, turns, until
from onceflow.locking import Lease, LeaseLostError, LockUnavailableError, RedisLockManager
from processes import ask, line, python
from redis_servers import RedisServer
from tcp_proxy import TcpProxy

LEASE = 1.0


def through(proxy: TcpProxy, lease_seconds: float = LEASE, connections: int = 16) -> RedisLockManager:
    return RedisLockManager(
        f"redis://127.0.0.1:{proxy.port}/0", lease_seconds=lease_seconds, max_connections=connections
    )


def part(proxy: TcpProxy) -> None:
    """Nothing passes any more, either way, and nobody is told."""
    proxy.requests.clear()
    proxy.replies.clear()


def heal(proxy: TcpProxy) -> None:
    """What was held back arrives, and all that follows."""
    proxy.requests.set()
    proxy.replies.set()


# --- the network parts


async def test_one_process_is_cut_off(proxy: TcpProxy, redis_server: RedisServer) -> None:
    """B10: a process that is cut off for longer than its lease learns of its loss before another has the key."""
    url = f"redis://127.0.0.1:{proxy.port}/0"
    async with (
        RedisLockManager(redis_server.url, lease_seconds=LEASE) as here,
        python("lock_worker.py", url, "hold", "key", str(LEASE)) as there,
    ):
        word, token = await line(there)
        assert word == "held"
        waiting = asyncio.create_task(here.acquire("key", "me"))
        await asyncio.sleep(LEASE)  # which it renews
        assert not waiting.done()
        part(proxy)
        lease = await asyncio.wait_for(waiting, 10)
        assert await ask(there) == ["lost", token]
        assert lease is not None
        assert lease.token > int(token)
        heal(proxy)
        assert there.stdin is not None
        there.stdin.write_eof()
        assert await line(there) == ["released"]
        assert await there.wait() == 0
        assert await here.is_held_by("key", "me")
        await lease.release()
        assert not await here.is_locked("key")


async def test_a_short_cut(
    proxy: TcpProxy, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A partition that is shorter than the lease costs nothing but one warning, which says why."""
    async with through(proxy, 3) as manager:
        lease = await manager.acquire("key", "me")
        assert lease is not None
        before = lease._deadline
        part(proxy)
        await until(lambda: bool(caplog.records))
        heal(proxy)
        await until(lambda: lease._deadline > before)
        assert not lease.lost
        await lease.release()
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "no answer within 1 s" in record.getMessage()
    async with RedisLockManager(redis_server.url) as direct:
        assert not await direct.is_locked("key")


async def test_a_renewal_that_is_cut_off_says_why(proxy: TcpProxy, caplog: pytest.LogCaptureFixture) -> None:
    """Where the lease is over before the request's deadline, the warning still has a reason."""
    async with through(proxy, 1.5) as manager:
        lease = await manager.acquire("key", "me")
        assert lease is not None
        part(proxy)
        await asyncio.wait_for(lease.wait_lost(), 5)
        heal(proxy)
    messages = [record.getMessage() for record in caplog.records if "could not be renewed" in record.msg]
    assert len(messages) == 1
    assert not messages[0].rstrip().endswith(":")


async def test_killed_connections(own_redis: RedisServer) -> None:
    """All connections are closed by the server, for messages too: the holder keeps, the waiter is woken."""
    async with RedisLockManager(own_redis.url) as one, RedisLockManager(own_redis.url) as other:
        await asyncio.gather(*(_visit(one, f"{number}") for number in range(8)))  # idle ones
        lease = await one.acquire("key", "me")
        assert lease is not None
        waiting = asyncio.create_task(other.acquire("key", "you"))
        await until(lambda: _subscribed(own_redis))
        await asyncio.to_thread(own_redis.ask, b"CLIENT KILL TYPE normal SKIPME yes")
        await asyncio.to_thread(own_redis.ask, b"CLIENT KILL TYPE pubsub SKIPME yes")
        await lease.release()
        assert await asyncio.wait_for(waiting, 5)


async def _subscribed(server: RedisServer) -> bool:
    return (await asyncio.to_thread(server.ask, b"PUBSUB CHANNELS")) != b"*0\r\n"


async def test_forgotten_scripts(own_redis: RedisServer) -> None:
    """A server that has forgotten its scripts is told them again, by whatever request comes next."""
    async with RedisLockManager(own_redis.url, lease_seconds=LEASE) as manager:
        lease = await manager.acquire("key", "me")
        assert lease is not None
        before = lease._deadline
        await asyncio.to_thread(own_redis.ask, b"SCRIPT FLUSH")
        await until(lambda: lease._deadline > before)
        await asyncio.to_thread(own_redis.ask, b"SCRIPT FLUSH")
        assert await manager.is_held_by("key", "me")
        await asyncio.to_thread(own_redis.ask, b"SCRIPT FLUSH")
        await lease.release()
        assert not await manager.is_locked("key")


# --- much at once


async def _visit(manager: RedisLockManager, key: str) -> None:
    async with manager.lock(key):
        pass


async def test_a_long_line_for_one_connection(proxy: TcpProxy) -> None:
    """48: a request's deadline begins when it has a connection: who stands in line for longer does not fail."""
    async with through(proxy, connections=1) as manager:
        await _visit(manager, "warm")
        proxy.delay = 0.01
        began = time.monotonic()
        await asyncio.gather(*(_visit(manager, f"{number}") for number in range(25)))
        assert time.monotonic() - began > 0.5, "nobody stood in line for longer than the deadline"


async def test_renewals_go_first(proxy: TcpProxy) -> None:
    """However many acquires stand in line for a connection, a lease is renewed, and a key freed, before them."""
    async with through(proxy, connections=1) as manager:
        lease = await manager.acquire("key", "me")
        assert lease is not None
        proxy.delay = 0.01
        line = [asyncio.create_task(manager.acquire(f"{number}", "me", timeout=0)) for number in range(100)]
        before = lease._deadline
        await until(lambda: lease._deadline > before)
        await lease.release()
        assert not line[-1].done()
        for acquiring in line:
            acquiring.cancel()
        await asyncio.gather(*line, return_exceptions=True)


async def test_cancelled_in_the_line_for_a_connection(proxy: TcpProxy, redis_server: RedisServer) -> None:
    """Who is cancelled while it stands in line asks for nothing, not even when its turn came at that moment."""
    async with through(proxy, connections=1) as manager:
        await _visit(manager, "warm")
        before = await asyncio.to_thread(redis_server.commands)
        proxy.replies.clear()
        first = asyncio.create_task(manager.acquire("first", "me"))
        await turns(3)
        others = [asyncio.create_task(manager.acquire(f"{number}", "me")) for number in range(20)]
        await turns(3)
        for number, other in enumerate(others):
            if number != 10:
                other.cancel()
        proxy.replies.set()
        assert await first
        assert await asyncio.wait_for(others[10], 5)
        (turn,) = manager._links.values()
        connection = turn._idle.pop()
        late = asyncio.create_task(manager.acquire("late", "me"))
        await turns(3)
        turn._hand_on(connection)
        late.cancel()
        assert isinstance((await asyncio.gather(late, return_exceptions=True))[0], asyncio.CancelledError)
        assert turn._idle == [connection]
        after = await asyncio.to_thread(redis_server.commands)
        assert after["evalsha"] - before["evalsha"] <= 2
        assert not await manager.is_locked("0")


async def test_a_silent_server_is_told_to_the_whole_line(proxy: TcpProxy) -> None:
    """46: when the server answers nobody, who stands in line is told with the first, not after its own turn."""
    async with through(proxy, connections=1) as manager:
        await _visit(manager, "warm")
        part(proxy)
        began = time.monotonic()
        errors = await asyncio.gather(
            *(manager.acquire(f"{number}", "me") for number in range(20)), return_exceptions=True
        )
        assert time.monotonic() - began < 20 * 0.5 / 2
        assert all(isinstance(error, LockUnavailableError) for error in errors)
        assert len({id(error) for error in errors}) == len(errors)
        heal(proxy)
        await _visit(manager, "afterwards")


async def test_cancelled_in_the_line_before_another_of_its_holder(proxy: TcpProxy) -> None:
    """L2: of two tasks of one holder the first is cancelled before it has asked: the other gets a lease that holds."""
    async with through(proxy, 30, connections=1) as manager, through(proxy, 30) as other:
        await _visit(manager, "warm")
        proxy.replies.clear()
        first = asyncio.create_task(manager.acquire("first", "me"))
        await turns(3)
        one, two = [asyncio.create_task(manager.acquire("key", "same")) for _ in range(2)]
        await turns(3)
        one.cancel()
        await turns(5)
        assert not two.done()
        proxy.replies.set()
        lease = await asyncio.wait_for(two, 5)
        assert lease is not None
        assert lease.token > 0
        assert await other.is_held_by("key", "same")
        assert await first


async def test_a_connection_for_messages_that_stays_silent(proxy: TcpProxy) -> None:
    """A connection for messages that is accepted and never answered is given up, and another one is made."""
    async with through(proxy, 6) as holder, through(proxy, 1) as manager:
        lease = await holder.acquire("key", "me")
        assert lease is not None
        await _visit(manager, "warm")
        proxy.replies = asyncio.Event()  # for connections to come
        waiting = asyncio.create_task(manager.acquire("key", "you"))
        messages = next(iter(manager._links.values())).messages
        await until(lambda: messages._listener is not None)
        await asyncio.sleep(0.2)
        proxy.replies = asyncio.Event()
        proxy.replies.set()
        await until(lambda: any(channel.confirmed.is_set() for channel in messages._channels.values()))
        await lease.release()
        assert await asyncio.wait_for(waiting, 5)


@pytest.mark.chaos
@pytest.mark.parametrize("connections", [1, 16])
async def test_ten_thousand_keys_at_once(own_redis: RedisServer, connections: int) -> None:
    """48: ten thousand keys are acquired and freed at once, through one connection or a few."""
    async with RedisLockManager(own_redis.url, max_connections=connections) as manager:
        leases = await asyncio.gather(*(manager.acquire(f"{number}", "me") for number in range(10_000)))
        assert len({lease.token for lease in leases if isinstance(lease, Lease)}) == 10_000
        await asyncio.gather(*(lease.release() for lease in leases if lease is not None))
    assert await asyncio.to_thread(own_redis.ask, b"DBSIZE") == b":1\r\n"  # the last token


async def test_a_loop_that_stands_still(redis_server: RedisServer) -> None:
    """A loop that is blocked for longer than a request's deadline does not blame the server for it."""
    async with RedisLockManager(redis_server.url, lease_seconds=LEASE) as manager:
        await _visit(manager, "warm")
        acquiring = asyncio.create_task(manager.acquire("still", "me"))
        await turns(1)
        until_then = time.monotonic() + 0.7
        while time.monotonic() < until_then:
            pass
        lease = await acquiring
        assert lease is not None
        assert not lease.lost
        await lease.release()


async def test_long_holders(proxy: TcpProxy, redis_server: RedisServer) -> None:
    """A holder's name of any length is kept whole, and its acquire seen through cancellations, too."""
    name = "x" * 12_000_000
    async with through(proxy, 30) as manager, through(proxy, 30) as other:
        async with manager.lock("key", name):
            assert await other.is_held_by("key", name)
        asked = (await asyncio.to_thread(redis_server.commands))["evalsha"]
        await cancel_on_the_wire(proxy, manager.acquire("key", name))

        async def arrived() -> bool:
            return (await asyncio.to_thread(redis_server.commands))["evalsha"] == asked + 2

        await until(arrived)  # the acquire and its undoing, in whatever order
        assert not await other.is_locked("key")


# --- who shares locks, and who does not


async def test_prefixes_and_databases_are_apart(own_redis: RedisServer) -> None:
    """Managers of different prefixes or databases neither exclude nor wake each other."""
    async with (
        RedisLockManager(own_redis.url, prefix="a") as one,
        RedisLockManager(own_redis.url, prefix="b") as other,
        RedisLockManager(own_redis.url.replace("/0", "/1"), prefix="a") as third,
    ):
        leases = [await each.acquire("key", f"me at {each!r}", timeout=0) for each in (one, other, third)]
        waiting = [asyncio.create_task(each.acquire("key", "you")) for each in (one, other, third)]
        assert all(leases)
        assert leases[0] is not None
        await leases[0].release()
        assert await asyncio.wait_for(waiting[0], 5)
        await turns(20)
        assert [each.done() for each in waiting] == [True, False, False]
        for each in waiting[1:]:
            each.cancel()
        await asyncio.gather(*waiting[1:], return_exceptions=True)


async def test_a_lock_without_an_end(own_redis: RedisServer) -> None:
    """A lock that somebody made last for ever is waited for without asking all the time."""
    async with RedisLockManager(own_redis.url) as manager, RedisLockManager(own_redis.url) as other:
        lease = await manager.acquire("key", "me")
        assert lease is not None
        await asyncio.to_thread(own_redis.ask, b"PERSIST {onceflow}:lock:key")
        assert await other.acquire("key", "you", timeout=0.5) is None
        counts = await asyncio.to_thread(own_redis.commands)
        assert counts["evalsha"] + counts["eval"] < 8
        await lease.release()


# --- ends

_BRUTAL = """
import asyncio, sys
from onceflow.locking import RedisLockManager
manager = RedisLockManager(sys.argv[1], lease_seconds=0.7)
loop = asyncio.new_event_loop()
lease = loop.run_until_complete(manager.acquire("key", "me"))
loop.close()
async def again():
    async with asyncio.timeout(4):
        assert (await manager.acquire("key", "you")).token > lease.token
    assert lease.lost
    await manager.aclose()
if sys.argv[2] == "again":
    asyncio.run(again())
"""


@pytest.mark.parametrize("then", ["again", "end"])
async def test_a_loop_that_is_closed_without_a_shutdown(own_redis: RedisServer, then: str) -> None:
    """A lease whose loop is closed over it ends by itself, for this process and others; nothing hangs, or alarms."""
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", _BRUTAL, own_redis.url, then],
        capture_output=True,
        text=True,
        timeout=20,
        env={"PYTHONPATH": str(Path(__file__).parents[3] / ".dev")},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "ERROR" not in done.stderr
    async with RedisLockManager(own_redis.url) as manager:
        assert await manager.acquire("key", "him", timeout=5)


async def test_a_lost_lease_is_lost_for_commits(proxy: TcpProxy) -> None:
    """A lease that could not be renewed refuses its use though nobody else took the key."""
    async with through(proxy) as manager:
        lease = await manager.acquire("key", "me")
        assert lease is not None
        part(proxy)
        await asyncio.wait_for(lease.wait_lost(), 5)
        heal(proxy)
        with pytest.raises(LeaseLostError):
            lease.check()
