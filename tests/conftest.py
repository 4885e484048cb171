"""What every test gets: a watch that fails any blocking call on the event loop."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from blockbuster import BlockBuster, blockbuster_ctx
from redis_servers import RedisServer

_numbers = itertools.count()


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of the test's own: nothing is written to the developer's."""
    # Not by mktemp, which looks at all folders made so far for the next free number: 3 ms a test.
    home = tmp_path_factory.getbasetemp() / "homes" / str(next(_numbers))
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    return home


@pytest.fixture(autouse=True)
def no_blocking_calls() -> Iterator[BlockBuster]:
    """A blocking call on the loop raises BlockingError in the test that made it."""
    with blockbuster_ctx() as watch:
        # Of a module that another thread imports, an import has to wait until it is there.
        watch.functions["threading.Lock.acquire"].can_block_in("<frozen importlib._bootstrap>", {"acquire"})
        yield watch


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """A server that all tests share, so nobody may kill it."""
    server = RedisServer()
    yield server
    server.kill()
