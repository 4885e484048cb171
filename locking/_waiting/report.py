"""The log line of a wait that has become long: for whom, for which key, and who holds it."""

from __future__ import annotations

import logging
import math

from .._manager import logger

TELL_AFTER = ((5.0, logging.INFO), (30.0, logging.WARNING))
"""Seconds of waiting after which the log says so, and how loudly. Afterwards it is silent."""


class Telling:
    """Of one wait, in the time of whoever waits: the loop's, or any other monotonic seconds."""

    __slots__ = ("_began", "_told")

    def __init__(self, began: float) -> None:
        self._began, self._told = began, 0

    @property
    def due(self) -> float:
        """When there is something to be told."""
        return self._began + TELL_AFTER[self._told][0] if self._told < len(TELL_AFTER) else math.inf

    def tell(self, now: float, holder: str, key: str, where: str, owner: str | None, about: str = "") -> None:
        """Say who is waited for, if it is time."""
        if now < self.due:
            return
        level = TELL_AFTER[self._told][1]
        self._told += 1
        by = "somebody" if owner is None else repr(owner)
        logger.log(
            level,
            "%r has been waiting %.0f s for the lock %r in %s: %s holds it%s.",
            holder, now - self._began, key, where, by, about and f" ({about})",
        )  # fmt: skip
