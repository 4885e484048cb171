"""Objects in memory, in a folder or in a bucket, behind one small asynchronous interface."""

from __future__ import annotations  # noqa: I001 - several names a line keep the face short

from ._errors import (
    ConditionFailedError, ConditionsUnsupportedError, CorruptRecordError, NewerRecordError, ObjectExistsError,
    ObjectNotFoundError, PickleRefusedError, RecordError, SerializationError, SignatureError,
    StorageAccessError, StorageClosedError, StorageConfigurationError, StorageError, StorageFullError,
    StorageUnavailableError, UnreadableValueError, VersionMismatchError,
)  # fmt: skip
from ._local.storage import LocalStorage
from ._memory import MemoryStorage
from ._s3.storage import S3Storage
from ._storage import Stat, Storage, Stored
from ._urls import storage_from_url

__all__ = [
    "ConditionFailedError", "ConditionsUnsupportedError", "CorruptRecordError", "LocalStorage",
    "MemoryStorage", "NewerRecordError", "ObjectExistsError", "ObjectNotFoundError", "PickleRefusedError",
    "RecordError", "S3Storage", "SerializationError", "SignatureError", "Stat", "Storage",
    "StorageAccessError", "StorageClosedError", "StorageConfigurationError", "StorageError",
    "StorageFullError", "StorageUnavailableError", "Stored", "UnreadableValueError", "VersionMismatchError",
    "storage_from_url",
]  # fmt: skip

for _name in __all__:
    globals()[_name].__module__ = __name__  # reprs, tracebacks and pickles carry the public path
