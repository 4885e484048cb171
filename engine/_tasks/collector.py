"""Making very many objects at once without the cycle collector looking through all of them again and again."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

MANY = 1000
"""From how many runs on it pays: 100 000 of them were walked through a dozen times while they were made."""


@contextmanager
def undisturbed(count: int) -> Iterator[None]:
    """Put the collector off while `count` runs are made, in one go and without a word from the loop.

    Nothing of them is garbage, but each pass costs as much as they are many. What other threads leave behind
    meanwhile waits, some µs a run. A collector that is switched off stays off. (Mercurial's `util.nogc`.)
    """
    puts_off = count >= MANY and gc.isenabled()
    if puts_off:
        gc.disable()
    try:
        yield
    finally:
        if puts_off:
            gc.enable()
