"""What one request to a lock server is about, what it answers, and which requests make sense."""

from __future__ import annotations

import asyncio
import math
from typing import Any, NamedTuple

from .._errors import LockConfigurationError

PATIENCE = 1 / 6
"""The part of a lease that one request may take, so that several fit between two renewals."""


class Claim:
    """One acquisition as the lock server knows it, from before the request until it is given back."""

    __slots__ = ("handle", "hold_until", "holder", "key", "nonce", "sent", "token")

    def __init__(self, key: str, holder: str, sent: float, hold_until: float) -> None:
        self.key, self.holder, self.sent, self.hold_until = key, holder, sent, hold_until
        self.nonce = ""  # set by the managers that tell their own writes from others' by it
        self.token = 0
        self.handle: Any = None


class Busy(NamedTuple):
    """Somebody else holds the key; look again after so many seconds at the latest.

    `about` tells people more of the owner, where more is known.
    """

    owner: str | None
    look_again: float
    about: str = ""


def checked_lease(seconds: float) -> float:
    """The lease, if one can work with it.

    Raises:
        LockConfigurationError: It is not a positive number of seconds.
    """
    if not 0 < seconds < math.inf:
        raise LockConfigurationError(f"A lease of {seconds!r} s cannot work.", "Give 5 or more seconds.")
    return float(seconds)


def patience(lease_seconds: float) -> float:
    """Seconds for one request: several must fit into a lease, and a short lease must still allow one."""
    return min(max(PATIENCE * lease_seconds, 1.0), lease_seconds / 2)


def check(
    key: str, holder: str | None = "-", timeout: float | None = None, hold_timeout: float | None = None
) -> None:
    check_loop()
    for name, text in (("key", key), ("holder", holder)):
        if not isinstance(text, str):
            raise TypeError(f"The {name} of a lock must be a str, not {type(text).__name__} ({text!r}).")
        if not text:
            raise LockConfigurationError(
                f"The {name} of a lock is empty.", "Give it a name, such as 'report'."
            )
    assert holder is not None
    if not holder.isascii():
        try:
            holder.encode()
        except UnicodeEncodeError as error:
            raise LockConfigurationError(
                f"The holder {holder!r} of a lock is no text that can be written down ({error.reason}).",
                "Give a name without surrogates.",
            ) from None
    _check_seconds("timeout", timeout, "Give 0 to try once, None to wait for ever.")
    if hold_timeout is not None:
        _check_seconds("hold_timeout", hold_timeout, _HOLD)
        if hold_timeout == 0:
            raise LockConfigurationError("hold_timeout is 0 s.", _HOLD)


def check_loop() -> None:
    """Refuse to go on where asyncio's loop does not run, as under trio, by a message that says so."""
    if asyncio._get_running_loop() is None:
        raise LockConfigurationError(
            "Locks need a running event loop of asyncio, and there is none here.",
            "Call them from coroutines under asyncio.run(), or anyio's with backend='asyncio'; "
            "trio is not supported.",
        )


_HOLD = "Give None to hold until released."


def _check_seconds(name: str, seconds: float | None, remedy: str) -> None:
    if seconds is None:
        return
    if not isinstance(seconds, (int, float)):
        raise TypeError(
            f"{name} is a number of seconds, not {type(seconds).__name__} ({seconds!r}). {remedy}"
        )
    if not seconds >= 0:
        raise LockConfigurationError(f"{name} is {seconds!r} s.", remedy)
