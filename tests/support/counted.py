"""Counting who is inside of a body, and in which order they came."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any


class Counted:
    """Counts who is inside, and fails if there is ever more than one at a time for a key."""

    def __init__(self) -> None:
        self.runs: Counter[Any] = Counter()
        self.order: list[Any] = []
        self._inside: set[Any] = set()

    async def visit(self, key: Any, name: Any = None, seconds: float = 0.0) -> None:
        assert key not in self._inside, f"two are inside of {key!r}"
        self._inside.add(key)
        self.runs[key] += 1
        self.order.append(name)
        try:
            await asyncio.sleep(seconds)
        finally:
            self._inside.discard(key)
