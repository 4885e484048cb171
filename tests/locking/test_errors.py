"""The errors: importable, told in whole sentences, picklable."""

from __future__ import annotations

import copy
import pickle

import onceflow.locking as face
import pytest
from onceflow.locking import (
    LeaseLostError,
    LockAccessError,
    LockClosedError,
    LockConfigurationError,
    LockError,
    LockNotHeldError,
    LockTimeoutError,
    LockUnavailableError,
)

ERRORS = [
    LockNotHeldError("key", "me", "memory://x", "you"),
    LockNotHeldError("key", "me", "memory://x"),
    LeaseLostError("key", "me", 7, "it was taken over"),
    LockTimeoutError("key", "me", "memory://x", 1.5, "you"),
    LockUnavailableError("acquire", "key", "redis://x", "no answer", "Look."),
    LockAccessError("acquire", "key", "file:///x", "denied", "Allow it."),
    LockConfigurationError("A lease of 0 s cannot work.", "Give 5."),
    LockClosedError("memory://x"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors(error: LockError) -> None:
    """Each error says what, where and what to do, and comes out of a pickle and a copy as it went in."""
    assert str(error).endswith(".")
    assert len(str(error)) > 20
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(other) is type(error)
        assert str(other) == str(error)
        assert other.__dict__ == error.__dict__


def test_builtin_bases() -> None:
    """Whoever knows only the builtin error catches ours."""
    bases = {
        LockNotHeldError: ValueError,
        LockTimeoutError: TimeoutError,
        LockUnavailableError: ConnectionError,
        LockAccessError: PermissionError,
        LockConfigurationError: ValueError,
    }
    for error, base in bases.items():
        assert issubclass(error, base)
        assert issubclass(error, LockError)


def test_face() -> None:
    """The face is sorted, and everything in it says that it lives there."""
    assert face.__all__ == sorted(face.__all__)
    for name in face.__all__:
        assert getattr(face, name).__module__ == "onceflow.locking"
