"""Random bits for what has to be unique, and need not be secret: ids, nonces, names of drafts.

From a generator of the process, seeded by the system: `os.urandom` is a system call, which lets go of the
interpreter, and to get it back can take longer than the rest of the work while threads write files.
"""

from __future__ import annotations

import os
from random import Random

_random = Random()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_random.seed)

random_bits = _random.getrandbits
"""`random_bits(n)`: an integer of n random bits, in a forked child others than in its parent."""


def nonce(digits: int) -> str:
    """So many random hex digits."""
    return f"{random_bits(4 * digits):0{digits}x}"
