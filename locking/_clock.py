"""The clock by which leases are measured: this machine's own, running on through suspend."""

from __future__ import annotations

import time

# CLOCK_MONOTONIC stands still on Linux while a laptop or a virtual machine sleeps, and the lease does not.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", getattr(time, "CLOCK_MONOTONIC", None))


def now() -> float:
    """Seconds since some moment in the past; never compared with another machine's."""
    return time.monotonic() if _CLOCK is None else time.clock_gettime(_CLOCK)
