"""What the operating system says about a file, in the words of onceflow.storage."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from .._errors import (
    ObjectExistsError,
    ObjectNotFoundError,
    StorageAccessError,
    StorageConfigurationError,
    StorageError,
    StorageFullError,
    StorageUnavailableError,
)
from .reading import NotAFileError

_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_NO_LOCKS = {errno.ENOLCK, errno.EBADF, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


@contextmanager
def edge(operation: str, key: str, storage: str) -> Iterator[None]:
    """Translate the OSErrors of what is done inside."""
    try:
        yield
    except OSError as error:
        raise translated(error, operation, key, storage) from error


def translated(error: OSError, operation: str, key: str, storage: str) -> StorageError:
    """The error to raise instead; `operation` is a verb, as in "Could not <operation> 'key' in <storage>"."""
    number = error.errno
    reason = _reason(error)
    if isinstance(error, NotAFileError) or number in (errno.ELOOP, errno.EISDIR):
        return StorageAccessError(
            operation,
            key,
            storage,
            "what has its name is no regular file",
            "Remove the link or folder of that name.",
        )
    if number == errno.ENOENT and operation != "write":
        return ObjectNotFoundError(key, storage)
    if number == errno.EEXIST:
        return ObjectExistsError(key, storage)
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageAccessError(
            operation,
            key,
            storage,
            reason,
            "Give this user the right to the folder, or choose another folder.",
        )
    if number in _FULL:
        return StorageFullError(key, storage, reason)
    if number in (errno.ENOTDIR, errno.ENAMETOOLONG):
        return StorageConfigurationError(
            f"{storage} cannot be a storage: {reason}.",
            "Give a path whose every part is a folder, or missing.",
        )
    if number in _NO_LOCKS:
        return StorageConfigurationError(
            f"The file system of {storage} has no locks: {reason}.", "Use a local file system, or a bucket."
        )
    return StorageUnavailableError(operation, key, storage, reason, _remedy(number))


def _reason(error: OSError) -> str:
    text = error.strerror or (os.strerror(error.errno) if error.errno else str(error)) or type(error).__name__
    return f"{text} ({error.filename})" if error.filename else text


def _remedy(number: int | None) -> str:
    if number in (errno.EMFILE, errno.ENFILE):
        return "Raise the limit of open files (ulimit -n), or run less at once."
    if number == errno.ENOENT:
        return "The folder was removed during the write. Write again; it will be made anew."
    return "Look at the disk and the file system, then try again."
