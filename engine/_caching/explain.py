"""Why a call ran, or did not: its key's components beside those of the nearest earlier record of the task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .._keys.policies import DEFAULT, CachePolicy

if TYPE_CHECKING:
    from .turn import Key


@dataclass(frozen=True, slots=True)
class Explanation:
    """Whether a call would hit, and why.

    Attributes:
        would_hit: Whether it would be served from its record.
        reason: One line, as it stands in the log.
        key: The key of the call; None where it has none.
        changed: The components that differ from the nearest earlier record of the task.
        components: The call's own labelled digests.
    """

    would_hit: bool
    reason: str
    key: str | None
    changed: tuple[str, ...]
    components: dict[str, str]

    def __bool__(self) -> bool:
        return self.would_hit

    def __str__(self) -> str:
        return self.reason


def reason_for(policy: CachePolicy | None, changed: tuple[str, ...]) -> str:
    """The differing components as one line: `input 'day' changed`, `helper clean() changed`."""
    if not changed:
        return "no record"
    others = [label for label in changed if label != "run id"]
    if not others:
        return f"{'DEFAULT' if policy == DEFAULT else repr(policy)} includes the run id"
    shown = [f"{label} changed" for label in others[:3]]
    if len(others) > 3:
        shown.append(f"and {len(others) - 3} more")
    return ", ".join(shown)


def explanation(call_key: Key, would_hit: bool, reason: str, changed: tuple[str, ...] = ()) -> Explanation:
    """An `Explanation` of a call with this key."""
    return Explanation(would_hit, reason, call_key.text, changed, dict(call_key.components))
