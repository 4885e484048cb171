"""How often one looks who waits for somebody on another machine: soon at first, then less and less often."""

from __future__ import annotations

import random

FIRST, LONGEST = 0.05, 2.0
"""Seconds until the first look, at least, and between two later ones, at most."""


class Pace:
    """The pauses of one who polls: two to three times as long each time, at most `longest` seconds.

    The jitter keeps those apart who began at the same moment. It never shortens a pause below the one before, as
    "decorrelated jitter" does, which looks half as often again for nothing: here a minute takes 37 looks at most.
    """

    __slots__ = ("_longest", "_pause")

    def __init__(self, longest: float = LONGEST) -> None:
        self._longest, self._pause = longest, 0.0

    def next(self) -> float:
        """Seconds to wait now."""
        self._pause = min(self._longest, self._pause * random.uniform(2, 3) or FIRST * random.uniform(1, 2))
        return self._pause * random.uniform(0.9, 1)

    def restart(self) -> None:
        """Something has happened: somebody else holds it now, and for all one knows not for long."""
        self._pause = 0.0
