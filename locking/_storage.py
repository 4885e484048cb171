"""Locks in any storage with conditional writes: a bucket alone is enough.

A lock is a small object that is written only on the version that was read, so that one of two writers wins.
Nobody compares clocks of two machines: a waiter remembers when it first saw a version, on its own clock, and takes
the lock over when that version stays for longer than the lease that it names. The holder writes anew every third
of the lease, and stops relying on it while a fifth is left.

After Litestream's S3 leaser, without its expiry time in the object: that trusts wall clocks. Releasing writes
`free` and never deletes: many stores ignore the condition of a conditional DELETE.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, NamedTuple

import msgpack

from ..storage import (
    ConditionFailedError,
    ConditionsUnsupportedError,
    ObjectNotFoundError,
    Storage,
    StorageAccessError,
    StorageError,
    StorageUnavailableError,
)
from ..storage._runtime.random import nonce, random_bits
from ._errors import LockAccessError, LockConfigurationError, LockUnavailableError
from ._waiting.acquisition import Busy, Claim, checked_lease, patience
from ._waiting.backoff import Pace
from ._waiting.manager import QueuedLockManager

DEFAULT_LEASE = 30.0
PREFIX = ".locks/"
_FORMAT = 1
_RACES = 3
"""How often somebody may be faster until the next try waits as for a held key. Many who want a key that is held for
less time than a request takes would go on losing, and take the store for out of reach when their deadline came."""

_PROBE_SECONDS = 30.0
"""For the first request, which loads and opens a client, and for probing the store, once."""

_ASK_SECONDS = 5.0
"""For asking for a key, at least, also where leases are short: nothing is held yet that could run out meanwhile."""

_MARGIN, _GRACE = 1.1, 0.2
"""A lease counts as abandoned after so many times its length, and so many seconds more."""


class StorageLockManager(QueuedLockManager):
    """Locks for all who write to one storage, as objects under `.locks/`. No other server is needed.

    A key whose holder is killed is free after 1.1 × `lease_seconds` + 0.2 s and the waiter's next look, which
    comes within 2 s. A holder that is paused for longer than its lease finds it lost. Tokens count
    microseconds, and always up from the last one in the object.

    Requests: acquire 1 read + 1 write, release 1 write, renewal 1 write every third of the lease; of waiters
    one looks for each key and process, after 50 ms at first, at least every 2 s (37 reads a minute at most). The
    first use of a storage may probe whether it honours conditions.

    Objects of free keys stay, some 80 bytes each, and carry the tokens on; they may be deleted when nobody
    uses the key. The bucket must not be a replica or have Object Lock on `.locks/`.

    A holder here is a holder of this manager: the same name elsewhere waits.

    Args:
        storage: Where; the manager does not close it.
        lease_seconds: How long a holder that is no longer heard of keeps a key.
    """

    def __init__(self, storage: Storage, *, lease_seconds: float = DEFAULT_LEASE) -> None:
        if not isinstance(storage, Storage):
            raise LockConfigurationError(
                f"{storage!r} is no storage.", "Give a Storage, or use lock_manager_from_url for a URL."
            )
        self.storage = storage
        self.lease_seconds = checked_lease(lease_seconds)
        super().__init__()
        self.owns_storage = False
        self._seen: dict[str, _Seen] = {}
        self._probed = self._has_answered = False

    @property
    def url(self) -> str:
        """`storage+` and the storage's URL, with the lease if it is not the default."""
        url = f"storage+{self.storage.url}"
        if self.lease_seconds == DEFAULT_LEASE:
            return url
        return f"{url}{'&' if '?' in url else '?'}lease_seconds={self.lease_seconds:g}"

    async def _prepare(self) -> None:
        if not self._probed:
            await self._within("acquire", "any", self.storage.ensure_conditional(), _PROBE_SECONDS)
            self._probed = True

    async def _take(self, claim: Claim) -> Busy | None:
        claim.nonce = nonce(32)
        seconds = self._asking()
        busy: Busy | None = await self._within("acquire", claim.key, self._taken(claim, seconds), seconds)
        return busy

    async def _taken(self, claim: Claim, seconds: float) -> Busy | None:
        pace, until, lost = Pace(1.0), self._clock() + seconds, 0
        while True:
            try:
                found = await self._read(claim.key)
                if found is not None and found.lock.nonce == claim.nonce:
                    claim.handle, claim.token = found.version, found.lock.token
                    return None  # won, and the answer was lost
                if found is not None and (lost >= _RACES or (found.lock.held and not self._abandoned(found))):
                    return self._busy(found)
                token = max((found.lock.token if found else 0) + 1, time.time_ns() // 1000)
                body = _pack(True, token, claim.nonce, self._lease_of_claim(claim), claim.holder)
                claim.sent = self._clock()  # from here on nobody else takes it
                claim.handle = await self._write(claim.key, body, found)
                claim.token = token
                return None
            except ConditionFailedError:
                lost += 1  # somebody was faster, or it was this very claim: read what is there now
            except StorageUnavailableError:
                pause = pace.next()
                if self._clock() + pause > until:
                    raise
                await asyncio.sleep(pause)

    async def _renew(self, claim: Claim) -> bool:
        kept: bool = await self._within("renew", claim.key, self._rewritten(claim, True))
        return kept

    async def _give_back(self, claim: Claim) -> None:
        if claim.nonce:  # else no request was made
            await self._within("release", claim.key, self._rewritten(claim, False))

    async def _rewritten(self, claim: Claim, held: bool) -> bool:
        """Write anew what the claim wrote before; False if the object is somebody else's by now."""
        version = claim.handle
        while True:
            if version is None:  # unknown: an answer was lost, or a renewal is under way
                found = await self._read(claim.key)
                if found is None or found.lock.nonce != claim.nonce or not found.lock.held:
                    return False
                version, claim.token = found.version, found.lock.token
            body = _pack(held, claim.token, claim.nonce, self._lease_of_claim(claim), claim.holder)
            try:
                claim.handle = await self.storage.write(_name(claim.key), body, if_version=version)
            except ConditionFailedError:
                version = None
            else:
                return True

    async def _look(self, key: str) -> Busy | None:
        found = await self._within("look at", key, self._read(key), self._asking())
        if found is None or not found.lock.held or self._abandoned(found):
            return None
        return self._busy(found)

    def _forget(self, key: str) -> None:
        self._seen.pop(key, None)

    async def _close_connections(self) -> None:
        if self.owns_storage:
            await self.storage.aclose()

    def _after_fork(self) -> None:
        self._seen.clear()
        super()._after_fork()

    def __reduce__(self) -> tuple[Any, ...]:
        return _remake, (self.storage, self.lease_seconds, self.owns_storage)

    # What was seen

    async def _read(self, key: str) -> _Seen | None:
        """The object as it is now, and since when this process has known this version of it."""
        seen = self._seen.get(key)
        try:
            stored = await self.storage.fetch(_name(key), unless=seen.version if seen else None)
        except ObjectNotFoundError:
            return None
        if stored is None:
            assert seen is not None
            return seen
        found = _Seen(key, stored.version, self._clock(), _unpack(bytes(stored.data), self.lease_seconds))
        if seen is not None and seen.lock.token == found.lock.token:
            found.pace = seen.pace  # a renewal: the same holder still
        if key in self._room.places:  # else nobody would ever forget it
            self._seen[key] = found
        return found

    def _abandoned(self, seen: _Seen) -> bool:
        return self._clock() - seen.since >= seen.lock.lease * _MARGIN + _GRACE

    def _busy(self, seen: _Seen) -> Busy:
        left = seen.since + seen.lock.lease * _MARGIN + _GRACE - self._clock()
        return Busy(seen.lock.holder, max(0.001, min(seen.pace.next(), left)))

    async def _write(self, key: str, body: bytes, found: _Seen | None) -> str:
        if found is None:
            return await self.storage.write(_name(key), body, if_absent=True)
        return await self.storage.write(_name(key), body, if_version=found.version)

    def _lease_of_claim(self, claim: Claim) -> float:
        return max(0.001, min(self.lease_seconds, claim.hold_until - self._clock()))

    def _asking(self) -> float:
        """Seconds for a request of one who holds nothing."""
        return max(patience(self.lease_seconds), _ASK_SECONDS) if self._has_answered else _PROBE_SECONDS

    async def _within(self, operation: str, key: str, work: Any, seconds: float = 0) -> Any:
        """The work within its deadline, a holder's unless told, and the storage's errors in this package's words."""
        seconds = seconds or patience(self.lease_seconds)
        try:
            async with asyncio.timeout(seconds):
                answer = await work
            self._has_answered = True
            return answer
        except TimeoutError as error:
            raise LockUnavailableError(
                operation,
                key,
                self.url,
                f"no answer within {seconds:g} s",
                "Look whether the storage can be reached.",
            ) from error
        except ConditionsUnsupportedError as error:
            raise LockConfigurationError(str(error), "") from error
        except StorageAccessError as error:
            raise LockAccessError(operation, key, self.url, error.reason, error.remedy) from error
        except StorageUnavailableError as error:
            raise LockUnavailableError(operation, key, self.url, error.reason, error.remedy) from error
        except StorageError as error:
            raise LockUnavailableError(operation, key, self.url, str(error).rstrip("."), "") from error


class _Lock(NamedTuple):
    """What a lock's object says."""

    held: bool
    token: int
    nonce: str
    lease: float
    holder: str | None


class _Seen:
    """A version of a lock's object, and since when it is known here."""

    __slots__ = ("key", "lock", "pace", "since", "version")

    def __init__(self, key: str, version: str, since: float, lock: _Lock) -> None:
        self.key, self.version, self.since, self.lock = key, version, since, lock
        self.pace = Pace()


def _pack(held: bool, token: int, nonce: str, lease: float, holder: str) -> bytes:
    # A second nonce for each write: where a version is a hash of the content, none may come back.
    another = random_bits(128).to_bytes(16, "big")
    body: Any = msgpack.packb([_FORMAT, held, token, nonce, another, lease, holder])
    return bytes(body)


def _unpack(body: bytes, lease: float) -> _Lock:
    """What the object says; one that cannot be read is held by somebody unknown, for a lease of our own."""
    try:
        version, held, token, nonce, _, seconds, holder = msgpack.unpackb(body)
        if version == _FORMAT:
            return _Lock(bool(held), int(token), str(nonce), float(seconds), str(holder))
    except (ValueError, TypeError, msgpack.UnpackException):
        pass  # not ours, newer, or damaged: the lease is the way out of all three
    return _Lock(True, 0, "", lease, None)


def _name(key: str) -> str:
    return PREFIX + key


def _remake(storage: Storage, lease_seconds: float, owns_storage: bool) -> StorageLockManager:
    manager = StorageLockManager(storage, lease_seconds=lease_seconds)
    manager.owns_storage = owns_storage
    return manager
