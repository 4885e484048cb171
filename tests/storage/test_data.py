"""What reads fill."""

from __future__ import annotations

import pytest
from onceflow.storage._data import new_buffer
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
