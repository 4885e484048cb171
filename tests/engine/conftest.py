"""What the engine's tests share: an open engine on a folder of its own, and one on each way to lock."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from onceflow.engine import Engine
from onceflow.engine._lifecycle.engine import current_engine
from serial_ways import WAYS, Side, Way


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    """An open engine with its results in `tmp_path`: the only one on this loop, so every run uses it."""
    async with Engine(storage=tmp_path) as engine:
        yield engine


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test of ways to lock runs for those that its decorator names, else its module as KINDS, else for all."""
    named = any("way" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "way" in metafunc.fixturenames and not named:
        metafunc.parametrize("way", getattr(metafunc.module, "KINDS", WAYS), indirect=True)


@pytest.fixture
def way(request: pytest.FixtureRequest, tmp_path: Path) -> Way:
    """An empty place of one kind."""
    return WAYS[request.param](request, tmp_path)


@pytest.fixture
async def side(way: Way) -> AsyncIterator[Side]:
    """One engine on it; leaving must find every key free."""
    async with Side(way) as side:
        yield side
        assert len(side.engine.flights) == 0


@pytest.fixture(autouse=True)
def nothing_entered() -> None:
    """A test that failed inside of an engine leaves it entered in pytest's own context: the next one starts without."""
    current_engine.set(None)
