"""How often one looks who polls."""

from __future__ import annotations

from itertools import pairwise

from onceflow.locking._waiting.backoff import FIRST, LONGEST, Pace


def pauses(pace: Pace, seconds: float) -> list[float]:
    """Those that begin within so many seconds."""
    found: list[float] = []
    while sum(found) < seconds:
        found.append(pace.next())
    return found


def test_looks_in_a_minute() -> None:
    """22: whatever the jitter, a minute's wait takes fewer than 40 looks, the first comes soon, and none is far."""
    for _ in range(1000):
        waits = pauses(Pace(), 60)
        assert len(waits) <= 37
        assert FIRST * 0.9 <= waits[0] <= FIRST * 2
        assert max(waits) <= LONGEST
        assert all(after >= min(1.8 * before, 0.9 * LONGEST) for before, after in pairwise(waits))


def test_a_new_holder() -> None:
    """After a restart it looks as often as in the beginning."""
    pace = Pace(0.5)
    assert max(pauses(pace, 10)) <= 0.5
    pace.restart()
    assert pace.next() <= FIRST * 2


def test_jitter() -> None:
    """Ten that begin at the same moment do not look at the same moments."""
    assert len({pace.next() for pace in [Pace() for _ in range(10)]}) == 10
