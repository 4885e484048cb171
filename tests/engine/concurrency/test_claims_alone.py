"""A claim by itself: taken, renewed, lost and ended, whatever becomes of its requests."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import pytest
from onceflow.engine._concurrency import claims
from onceflow.engine._concurrency.claims import Claim
from onceflow.storage import MemoryStorage
from onceflow.storage._format.envelope import unpack_header
from until import until
from watched_records import Watched, claim_on

Logged = pytest.LogCaptureFixture


@pytest.fixture
def storage() -> Watched:
    return Watched()


def due_within(claim: Claim, seconds: float) -> bool:
    """Whether the claim is written anew so soon."""
    assert claim._timer is not None
    return claim._timer.when() <= asyncio.get_running_loop().time() + seconds


async def test_renewed_while_held(storage: Watched) -> None:
    """7: a claim is written anew every third of its lease, and each time is another version."""
    claim = claim_on(storage, "one")
    assert await claim.take("", b"", 0)
    versions = {claim.version}
    assert due_within(claim, 0.1)
    for _ in range(3):
        await until(lambda: claim.version not in versions)
        versions.add(claim.version)
    await claim.release()
    assert await storage.kind("key") == "free"
    assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]


async def test_a_renewal_without_an_answer(storage: Watched, caplog: Logged) -> None:
    """8: a renewal that arrived, though its answer was lost, or did not arrive, takes the claim from nobody."""
    for lost in ("lost_before", "lost_after"):
        claim = claim_on(storage, "one")
        stat = await storage.stat("key")
        assert await claim.take("" if stat is None else stat.version, b"", 0)
        caplog.clear()
        setattr(storage, lost, 2)
        await until(lambda lost=lost: not getattr(storage, lost))  # type: ignore[misc]
        assert due_within(claim, 0.3 / 9)  # a second try comes before the lease is half over
        version = claim.version
        await until(lambda claim=claim, version=version: claim.version != version)  # type: ignore[misc]
        assert not claim.lost
        assert caplog.text.count("could not be renewed") == 1
        storage.asked()
        assert await claim.settle() == (await storage.stat("key") or stat).version  # type: ignore[union-attr]
        assert storage.asked() == {}  # it is sure again
        await claim.release()
        assert await storage.kind("key") == "free"


async def test_taken_over(storage: Watched, caplog: Logged) -> None:
    """9: a claim that somebody else has taken over is lost with one warning; releasing it disturbs nobody."""
    claim, other = claim_on(storage, "one"), claim_on(storage, "two", lease=30)
    assert await claim.take("", b"", 0)
    assert await other.take(claim.version, b"", claim.token)
    assert other.token > claim.token
    await until(lambda: claim.lost)
    storage.asked()
    await claim.release()
    assert storage.asked() == {}
    assert caplog.text.count("was taken over") == 1
    assert not other.lost
    assert await storage.kind("key") == "claim"
    await other.release()


async def test_only_one_takes_it(storage: Watched) -> None:
    """Of ten that have seen the same version one gets the claim."""
    ten = [claim_on(storage, f"{number}") for number in range(10)]
    taken = await asyncio.gather(*(claim.take("", b"", 0) for claim in ten))
    assert sum(taken) == 1
    for claim in ten:
        await claim.release()
    assert await storage.kind("key") == "free"
    stat = await storage.stat("key")
    assert stat is not None
    taken = await asyncio.gather(*(claim.take(stat.version, b"", 0) for claim in ten))
    assert sum(taken) == 1
    for claim in ten:
        await claim.release()


async def test_cancelled_while_it_is_taken(storage: Watched) -> None:
    """32: a claim whose request was on its way when its run was cancelled is undone before the cancellation goes on."""
    storage.gate = asyncio.Event()
    claim = claim_on(storage, "one")
    taking = asyncio.create_task(claim.take("", b"", 0))
    await storage.at_gate.wait()
    taking.cancel()
    await asyncio.sleep(0)
    taking.cancel()
    gate, storage.gate = storage.gate, None
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await taking
    assert await storage.kind("key") == "free"


@pytest.mark.parametrize("is_there", [True, False])
async def test_cancelled_at_every_step(is_there: bool) -> None:
    """32: cancelled at its n-th step, and at every one after it: what was there before is there again, or a grave."""

    class Slow(Watched):
        async def write(self, key: str, *args: Any, **options: Any) -> str:
            for _ in range(3):
                await asyncio.sleep(0)
            return await super().write(key, *args, **options)

    for steps in range(12):
        storage = Slow()
        version = await storage.write("key", b"before") if is_there else ""
        claim = claim_on(storage, "one")
        taking = asyncio.create_task(claim.take(version, b"before" if is_there else b"", 0))
        for _ in range(steps):
            await asyncio.sleep(0)
        was_done = taking.done()
        while not taking.done():
            taking.cancel()
            await asyncio.sleep(0)
        if was_done:
            await claim.release()
        else:
            assert taking.cancelled()
        stat = await storage.stat("key")
        if is_there:
            assert await storage.read("key") == b"before"
        elif stat is not None:
            assert await storage.kind("key") == "free"
        assert claim.lost
        assert claim._timer is None or claim._timer.cancelled()


async def test_tokens_grow_whatever_the_clock_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim's token is above that of what it replaces, also where the wall clock was set back."""
    storage = Watched()
    first, second = claim_on(storage, "one"), claim_on(storage, "two")
    assert await first.take("", b"", 0)
    monkeypatch.setattr(time, "time_ns", lambda: 0)
    assert await second.take(first.version, b"", first.token)
    assert second.token == first.token + 1
    await first.release()
    await second.release()
    header, _ = unpack_header(await storage.read("key"))
    assert header.token == second.token
    monkeypatch.undo()
    await MemoryStorage.delete(storage, "key")
    third = claim_on(storage, "three")
    assert await third.take("", b"", 0)
    assert third.token > second.token  # though nothing is there that says how far they were
    await third.release()


async def test_released_during_a_renewal(storage: Watched) -> None:
    """A claim that is released while it is renewed is not renewed any more: no timer stays."""
    claim = claim_on(storage, "one")
    assert await claim.take("", b"", 0)
    storage.gate = asyncio.Event()
    await storage.at_gate.wait()
    releasing = asyncio.create_task(claim.release())
    await asyncio.sleep(0)
    gate, storage.gate = storage.gate, None
    gate.set()
    await releasing
    assert await storage.kind("key") == "free"
    assert claim._timer is not None
    assert claim._timer.cancelled()


async def test_a_slow_renewal_counts_from_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    """8: what is left of a lease is counted from before the renewal was sent: nobody waits for the next any longer."""
    storage, clock = Watched(), 0.0
    monkeypatch.setattr(claims, "now", lambda: clock)
    claim = claim_on(storage, "one")
    assert await claim.take("", b"", 0)
    clock = 5.0
    storage.gate = asyncio.Event()
    await storage.at_gate.wait()  # the renewal has arrived
    clock = 5.2
    storage.gate.set()
    await until(lambda: claim._timer is not None)
    assert claim._sent == 5.0
    storage.gate, storage.at_gate = asyncio.Event(), asyncio.Event()  # and the next one never ends
    await storage.at_gate.wait()
    clock = 5.31
    async with asyncio.timeout(5):
        assert await claim.settle() == (await MemoryStorage.stat(storage, "key")).version  # type: ignore[union-attr]
    assert not claim.lost
    storage.gate = None
    await claim.release()


async def test_what_was_there_is_put_back(storage: Watched) -> None:
    """A claim that ends without a commit leaves what was committed before, byte for byte."""
    before = os.urandom(100)
    version = await storage.write("key", before)
    claim = claim_on(storage, "one")
    assert await claim.take(version, before, 0)
    assert await storage.kind("key") == "claim"
    await claim.release()
    assert await storage.read("key") == before


async def test_a_claim_that_cannot_be_ended(storage: Watched, caplog: Logged) -> None:
    """41: where the end of a claim cannot be written that is a warning, and the claim ends with its lease."""
    claim = claim_on(storage, "one")
    assert await claim.take("", b"", 0)
    storage.lost_before = 1
    await claim.release()
    assert "It ends with its lease" in caplog.text
    assert claim.lost
    assert await storage.kind("key") == "claim"


async def test_what_lies_there_is_another(storage: Watched) -> None:
    """9: a claim of the same number by another holder, or what cannot be read, is not taken for one's own."""
    for number, holder in ((0, "two"), (1, "one")):
        claim, other = claim_on(storage, "one"), claim_on(storage, holder, lease=30)
        assert await claim.take("", b"", 0)
        await MemoryStorage.delete(storage, "key")
        assert await other.take("", b"", claim.token + 10**12)
        other.token = claim.token + number
        storage.requests.clear()
        assert await other._write_anew(other._body())
        claim._is_unsure = True
        await claim.settle()
        assert claim.lost
        await other.release()
        await MemoryStorage.delete(storage, "key")
    claim = claim_on(storage, "one")
    assert await claim.take("", b"", 0)
    await MemoryStorage.delete(storage, "key")
    await until(lambda: claim.lost)
    claim = claim_on(storage, "one")
    assert await claim.take("", b"", 0)
    await storage.write("key", b"not to be read")
    await until(lambda: claim.lost)
    await claim.release()
    assert await storage.read("key") == b"not to be read"
