"""What every test gets: a watch that fails any blocking call on the event loop."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from blockbuster import BlockBuster, blockbuster_ctx


@pytest.fixture(autouse=True)
def no_blocking_calls() -> Iterator[BlockBuster]:
    """A blocking call on the loop raises BlockingError in the test that made it."""
    with blockbuster_ctx() as watch:
        yield watch
