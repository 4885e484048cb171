"""Records kept in memory, each validated by its version before it is served: never stale, never shared.

A look-up asks the storage whether the version is still the one that was read (a stat on local files, a
conditional GET answered 304 on S3), so what is served is what a fresh read would have served; what is spared is
the transfer, the check of its digests and the header. Values are decoded anew for every hit, but for those that
nobody can change.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

from ...storage._format.envelope import Header
from ...storage._storage import Buffer
from .._commit.requests import Where

MISSING = object()
OVERHEAD = 1024
"""Bytes that a copy is taken to cost beside its payload."""


class Copy(NamedTuple):
    """A verified record: `original` is its value where that is immutable, else MISSING."""

    version: str
    header: Header
    segments: Sequence[Buffer]
    original: Any


class Copies:
    """The records used last, up to a number of bytes."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._size = 0
        self._copies: OrderedDict[Where, Copy] = OrderedDict()

    def __len__(self) -> int:
        return len(self._copies)

    def get(self, where: Where) -> Copy | None:
        copy = self._copies.get(where)
        if copy is not None:
            self._copies.move_to_end(where)
        return copy

    def put(self, where: Where, copy: Copy) -> None:
        """Keep a copy, and let the longest unused go; one larger than a quarter of the budget is not kept."""
        self.drop(where)
        size = _size(copy)
        if size * 4 > self._budget:
            return
        self._copies[where] = copy
        self._size += size
        while self._size > self._budget:
            _, oldest = self._copies.popitem(last=False)
            self._size -= _size(oldest)

    def drop(self, where: Where) -> None:
        copy = self._copies.pop(where, None)
        if copy is not None:
            self._size -= _size(copy)

    def resize(self, budget: int) -> None:
        """Obey another budget from now on."""
        if budget != self._budget:
            self._budget = budget
            self._copies.clear()
            self._size = 0


def _size(copy: Copy) -> int:
    return OVERHEAD + sum(map(len, copy.segments))
