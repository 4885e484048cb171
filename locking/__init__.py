"""Lock managers and leases: one holder at a time for a key."""

from __future__ import annotations

from ._errors import (
    LeaseLostError,
    LockAccessError,
    LockClosedError,
    LockConfigurationError,
    LockError,
    LockNotHeldError,
    LockTimeoutError,
    LockUnavailableError,
)
from ._file.manager import FileLockManager
from ._lease import Lease
from ._manager import LockManager
from ._memory import MemoryLockManager
from ._redis.manager import RedisLockManager
from ._storage import StorageLockManager
from ._urls import lock_manager_from_url

__all__ = [
    "FileLockManager", "Lease", "LeaseLostError", "LockAccessError", "LockClosedError",
    "LockConfigurationError", "LockError", "LockManager", "LockNotHeldError", "LockTimeoutError",
    "LockUnavailableError", "MemoryLockManager", "RedisLockManager", "StorageLockManager",
    "lock_manager_from_url",
]  # fmt: skip

for _name in __all__:
    globals()[_name].__module__ = __name__  # reprs, tracebacks and pickles carry the public path
