"""The errors of onceflow.locking.

LockError
├── LockNotHeldError (ValueError)          released by one who does not hold the key
├── LeaseLostError (RuntimeError)          a lease that is over is used for a commit
├── LockTimeoutError (TimeoutError)        `async with manager.lock(key, timeout=…)` waited in vain
├── LockUnavailableError (ConnectionError) the lock server or the storage did not answer in time
├── LockAccessError (PermissionError)      the operating system or the server refused
├── LockConfigurationError (ValueError)    a URL, path or option that cannot work
└── LockClosedError (RuntimeError)         used after aclose()

Every error keeps what it was built from as attributes, builds its own message, and pickles.
"""

from __future__ import annotations

from typing import Any


class LockError(Exception):
    """Base of everything that onceflow.locking raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        # The arguments are kept as attributes; rebuilding from the message would lose them.
        return _rebuild, (type(self), dict(self.__dict__), self.args)


def _rebuild(cls: type[LockError], attributes: dict[str, Any], args: tuple[Any, ...]) -> LockError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(attributes)
    return error


class LockNotHeldError(LockError, ValueError):
    """`holder` does not hold `key`; whoever does (`owner`, None if nobody) still holds it."""

    def __init__(self, key: str, holder: str, manager: str, owner: str | None = None) -> None:
        self.key, self.holder, self.manager, self.owner = key, holder, manager, owner
        fact = "nobody holds it" if owner is None else f"{owner!r} does and is not disturbed"
        super().__init__(
            f"{holder!r} does not hold the lock {key!r} in {manager}: {fact}. "
            "Release once, with the holder that acquired; a lease may also have ended before (see Lease.lost)."
        )


class LeaseLostError(LockError, RuntimeError):
    """The lease is over, so what was done under it must not be committed."""

    def __init__(self, key: str, holder: str, token: int, reason: str) -> None:
        self.key, self.holder, self.token, self.reason = key, holder, token, reason
        super().__init__(
            f"{holder!r} no longer holds the lock {key!r} (token {token}): {reason}. "
            "Do not commit: read what is stored now, or acquire again."
        )


class LockTimeoutError(LockError, TimeoutError):
    """The key was not free within `timeout` seconds; nothing is held."""

    def __init__(self, key: str, holder: str, manager: str, timeout: float, owner: str | None = None) -> None:
        self.key, self.holder, self.manager, self.timeout, self.owner = key, holder, manager, timeout, owner
        by = "somebody" if owner is None else repr(owner)
        super().__init__(
            f"{holder!r} waited {timeout:g} s for the lock {key!r} in {manager}; {by} holds it. "
            "Wait longer, or end that holder: its lock ends with it."
        )

    __str__ = Exception.__str__


class LockUnavailableError(LockError, ConnectionError):
    """No answer from where the locks are kept. A lock that is held there ends with its lease."""

    def __init__(self, operation: str, key: str, manager: str, reason: str, remedy: str) -> None:
        self.operation, self.key, self.manager, self.reason, self.remedy = (
            operation,
            key,
            manager,
            reason,
            remedy,
        )
        super().__init__(f"Could not {operation} the lock {key!r} in {manager}: {reason}. {remedy}")

    __str__ = Exception.__str__


class LockAccessError(LockError, PermissionError):
    """The operating system, or the server, refused; trying again does not help."""

    def __init__(self, operation: str, key: str, manager: str, reason: str, remedy: str) -> None:
        self.operation, self.key, self.manager, self.reason, self.remedy = (
            operation,
            key,
            manager,
            reason,
            remedy,
        )
        super().__init__(f"May not {operation} the lock {key!r} in {manager}: {reason}. {remedy}")

    __str__ = Exception.__str__


class LockConfigurationError(LockError, ValueError):
    """A lock manager cannot be made from, or asked for, what was given."""

    def __init__(self, problem: str, remedy: str) -> None:
        self.problem, self.remedy = problem, remedy
        super().__init__(f"{problem} {remedy}")


class LockClosedError(LockError, RuntimeError):
    """The manager was closed before it was asked for something."""

    def __init__(self, manager: str) -> None:
        self.manager = manager
        super().__init__(
            f"{manager} is closed. Make a new lock manager, or keep the engine open while it is used."
        )
