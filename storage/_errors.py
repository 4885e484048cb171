"""The errors of onceflow.storage.

StorageError
├── ObjectNotFoundError (FileNotFoundError)      nothing under this key
├── ConditionFailedError                         a conditional write met another object
│   ├── ObjectExistsError (FileExistsError)      only-if-absent, but the key is taken
│   └── VersionMismatchError                     only-if-version, but the object is another (or gone)
├── ConditionsUnsupportedError                   the store ignores or refuses conditional writes
├── StorageAccessError (PermissionError)         the store or the operating system said no
├── StorageUnavailableError (ConnectionError)    no answer, or "later", until the deadline
├── StorageFullError (OSError)                   no space, no inodes, quota
├── StorageConfigurationError (ValueError)       a URL, bucket, region or option that cannot work
├── StorageClosedError (RuntimeError)            used after aclose()
├── RecordError (ValueError)                     bytes that are not a readable record
│   ├── CorruptRecordError                       torn, truncated, changed, or not onceflow's
│   ├── NewerRecordError                         written by a newer onceflow
│   └── SignatureError                           signature missing or not by a known key
└── SerializationError (TypeError)               a value that this serializer cannot carry
    ├── UnreadableValueError                     a stored value that cannot be made again
    └── PickleRefusedError                       pickled bytes where pickle is not allowed

Every error keeps what it was built from as attributes, builds its own message, and pickles.
"""

from __future__ import annotations

from typing import Any


class StorageError(Exception):
    """Base of everything that onceflow.storage raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        # The arguments are kept as attributes; rebuilding from the message would lose them.
        return _rebuild, (type(self), dict(self.__dict__), self.args)


def _rebuild(cls: type[StorageError], attributes: dict[str, Any], args: tuple[Any, ...]) -> StorageError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(attributes)
    return error


class ObjectNotFoundError(StorageError, FileNotFoundError):
    """Nothing is stored under `key`."""

    def __init__(self, key: str, storage: str) -> None:
        self.key, self.storage = key, storage
        super().__init__(f"No object {key!r} in {storage}.")

    __str__ = Exception.__str__


class ConditionFailedError(StorageError):
    """A conditional write or delete did nothing, because its condition does not hold."""

    key: str
    storage: str


class ObjectExistsError(ConditionFailedError, FileExistsError):
    """An only-if-absent write found `key` taken; what is there is untouched."""

    def __init__(self, key: str, storage: str) -> None:
        self.key, self.storage = key, storage
        super().__init__(f"Object {key!r} already exists in {storage}; the only-if-absent write did nothing.")

    __str__ = Exception.__str__


class VersionMismatchError(ConditionFailedError):
    """An only-if-version write or delete found another version (or nothing) under `key`."""

    def __init__(self, key: str, storage: str, expected: str) -> None:
        self.key, self.storage, self.expected = key, storage, expected
        super().__init__(
            f"Object {key!r} in {storage} is no longer version {expected!r}; the conditional request did nothing."
        )


class ConditionsUnsupportedError(StorageError):
    """The store does not honour conditional writes, so locks and transactions on it would be unsafe."""

    def __init__(self, storage: str, request: str) -> None:
        self.storage, self.request = storage, request
        super().__init__(
            f"{storage} does not honour conditional writes ({request}). Locks and transactions need them: "
            "use another store, a RedisLockManager, or READ_COMMITTED."
        )


class StorageAccessError(StorageError, PermissionError):
    """The store, or the operating system, refused `operation`."""

    def __init__(self, operation: str, key: str, storage: str, reason: str, remedy: str) -> None:
        self.operation, self.key, self.storage = operation, key, storage
        self.reason, self.remedy = reason, remedy
        super().__init__(f"May not {operation} {key!r} in {storage}: {reason}. {remedy}")

    __str__ = Exception.__str__


class StorageUnavailableError(StorageError, ConnectionError):
    """The store did not answer, or asked to come back later, until the operation's deadline was over."""

    def __init__(self, operation: str, key: str, storage: str, reason: str, remedy: str) -> None:
        self.operation, self.key, self.storage = operation, key, storage
        self.reason, self.remedy = reason, remedy
        super().__init__(f"Could not {operation} {key!r} in {storage}: {reason}. {remedy}")

    __str__ = Exception.__str__


class StorageFullError(StorageError, OSError):
    """No room for `key`; what was stored before is untouched."""

    def __init__(self, key: str, storage: str, reason: str) -> None:
        self.key, self.storage, self.reason = key, storage, reason
        super().__init__(
            f"No room to write {key!r} in {storage}: {reason}. Free some space or use another storage."
        )

    __str__ = Exception.__str__


class StorageConfigurationError(StorageError, ValueError):
    """A storage cannot be made from what was given."""

    def __init__(self, problem: str, remedy: str) -> None:
        self.problem, self.remedy = problem, remedy
        super().__init__(f"{problem} {remedy}")


class StorageClosedError(StorageError, RuntimeError):
    """The storage was closed before it was asked for something."""

    def __init__(self, storage: str) -> None:
        self.storage = storage
        super().__init__(
            f"{storage} is closed. Make a new storage, or keep the engine open while it is used."
        )


class RecordError(StorageError, ValueError):
    """Bytes that cannot be read as a record."""


class CorruptRecordError(RecordError):
    """The bytes are torn, truncated, changed, or were never written by onceflow."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"Not a readable record: {reason}.")


class NewerRecordError(RecordError):
    """The record was written by a newer onceflow than this one."""

    def __init__(self, version: int, supported: int) -> None:
        self.version, self.supported = version, supported
        super().__init__(
            f"The record has format version {version}, this onceflow reads up to {supported}. Upgrade onceflow."
        )


class SignatureError(RecordError):
    """The record's signature is missing, or no configured key made it."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"The record's signature was refused: {reason}. "
            "Set ONCEFLOW_RESULTS_SIGNING_KEY to the same keys wherever it is written and read."
        )


class SerializationError(StorageError, TypeError):
    """A value that the serializer cannot carry, or bytes that it cannot read back."""

    def __init__(self, serializer: str, reason: str) -> None:
        self.serializer, self.reason = serializer, reason
        super().__init__(f"The {serializer!r} serializer cannot carry this value: {reason}.")


class UnreadableValueError(SerializationError):
    """A stored value that cannot be made again: its class, its serializer or its layout is not there any more."""

    def __init__(self, serializer: str, reason: str) -> None:
        self.serializer, self.reason = serializer, reason
        StorageError.__init__(
            self, f"A value stored by the {serializer!r} serializer cannot be read: {reason}."
        )


class PickleRefusedError(SerializationError):
    """The value needs pickle, and pickle is not allowed on this storage."""

    def __init__(self, storage: str, type_name: str) -> None:
        self.storage, self.type_name = storage, type_name
        StorageError.__init__(
            self,
            f"A {type_name} needs pickle, and {storage} is shared: whoever can write there could run code here. "
            "Set ONCEFLOW_RESULTS_SIGNING_KEY, or ONCEFLOW_RESULTS_ALLOW_PICKLE=true if you trust every writer.",
        )
        self.serializer, self.reason = "pickle", "pickle is not allowed on shared storage"
