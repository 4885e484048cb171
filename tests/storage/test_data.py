"""What reads fill."""

from __future__ import annotations

import pytest
from onceflow.storage._data import new_buffer, new_bytes
from processes import line, python


@pytest.mark.parametrize("length", [0, 1, 1 << 20, (1 << 20) + 1])
def test_a_new_buffer_is_writable_and_as_long_as_asked(length: int) -> None:
    """A read fills it to the last byte, whether it is a mapping or not."""
    buffer = new_buffer(length)
    assert (len(buffer), buffer.readonly, buffer.format) == (length, False, "B")
    buffer[:] = b"x" * length
    assert bytes(buffer) == b"x" * length


async def test_a_forked_child_writes_into_memory_of_its_own() -> None:
    """What a child does to a value that its parent has read does not change the parent's."""
    async with python("buffer_fork.py", str(1 << 20)) as process:
        assert await line(process) == ["1", "0"]


def test_new_bytes_are_the_very_object_that_was_filled() -> None:
    """Bytes are read without a copy: what is taken twice is one object, and what was filled."""
    room = new_bytes(1 << 20)
    with room.getbuffer() as view:
        view[:5] = b"begin"
        view[-3:] = b"end"
    taken = room.getvalue()
    assert taken is room.getvalue()
    assert (len(taken), taken[:5], taken[-3:]) == (1 << 20, b"begin", b"end")
