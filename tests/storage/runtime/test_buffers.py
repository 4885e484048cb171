"""What reads fill."""

from __future__ import annotations

from onceflow.storage._runtime.buffers import new_bytes


def test_new_bytes_are_the_very_object_that_was_filled() -> None:
    """Bytes are read without a copy: what is taken twice is one object, and what was filled."""
    room = new_bytes(1 << 20)
    with room.getbuffer() as view:
        view[:5] = b"begin"
        view[-3:] = b"end"
    taken = room.getvalue()
    assert taken is room.getvalue()
    assert (len(taken), taken[:5], taken[-3:]) == (1 << 20, b"begin", b"end")
