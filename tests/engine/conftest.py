"""What the engine's tests share: an open engine on a folder of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from onceflow.engine import Engine
from onceflow.engine._engine import current_engine


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    """An open engine with its results in `tmp_path`: the only one on this loop, so every run uses it."""
    async with Engine(storage=tmp_path) as engine:
        yield engine


@pytest.fixture(autouse=True)
def nothing_entered() -> None:
    """A test that failed inside of an engine leaves it entered in pytest's own context: the next one starts without."""
    current_engine.set(None)
