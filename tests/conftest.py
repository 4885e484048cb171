"""What every test gets: a watch that fails any blocking call on the event loop."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from blockbuster import BlockBuster, blockbuster_ctx


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of the test's own: nothing is written to the developer's."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    return home


@pytest.fixture(autouse=True)
def no_blocking_calls() -> Iterator[BlockBuster]:
    """A blocking call on the loop raises BlockingError in the test that made it."""
    with blockbuster_ctx() as watch:
        # Of a module that another thread imports, an import has to wait until it is there.
        watch.functions["threading.Lock.acquire"].can_block_in("<frozen importlib._bootstrap>", {"acquire"})
        yield watch
