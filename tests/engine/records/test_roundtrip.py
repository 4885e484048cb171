"""A value that its serializer would change is not stored, and its writer is told; all others are."""

from __future__ import annotations

import json
import logging
import threading
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import pytest
from onceflow.engine import Engine, task
from onceflow.engine._keys.digest import digest
from onceflow.storage._values.serializers import Serializer
from stored_records import keys_in

CONSTANT = 3


@task(cache_key_fn=lambda context, parameters: "key")
async def keyed(x: object) -> object:
    return x


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


class Text(str):
    """Text, but not `str`."""


class Lossy(Serializer):
    """JSON as the standard library writes it: tuples become lists, keys text."""

    name = "lossy"

    def dumps(self, value: Any) -> list[bytes]:
        return [json.dumps(value).encode()]

    def loads(self, segments: Any) -> Any:
        return json.loads(bytes(segments[0]))


class Reduced:
    """Says of itself that it comes back as something else."""

    def __reduce__(self) -> Any:
        return tuple, ((1, 2),)


@dataclass
class Dropping:
    """Leaves a field out when it is pickled."""

    kept: int
    dropped: int = 1

    def __getstate__(self) -> dict[str, int]:
        return {"kept": self.kept}


class Guarded:
    """Holds a lock, which it does not pickle."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __getstate__(self) -> Any:
        return {}

    def __setstate__(self, state: Any) -> None:
        self.lock = threading.Lock()


CHANGED: list[tuple[Any, Any, str]] = [
    (Lossy(), (1, 2), "value is a tuple, and would come back as a list"),
    (Lossy(), {"a": [{"b": (1,)}]}, "value['a'][0]['b'] is a tuple, and would come back as a list"),
    (Lossy(), {1: "x"}, "the key 1 of value is a int, and would come back as a str"),
    (Lossy(), [Text("x")], "value[0] is a test_exact.Text, and would come back as a str"),
    ("pickle", Reduced(), "value is a test_exact.Reduced, and would come back as a tuple"),
    ("compressed/pickle", [Reduced()], "value[0] is a test_exact.Reduced, and would come back as a tuple"),
    ("default", Dropping(1, 2), "value, a test_exact.Dropping, would come back with another content"),
]


@pytest.mark.parametrize(("serializer", "value", "said"), CHANGED, ids=[said for _, _, said in CHANGED])
async def test_a_value_that_its_serializer_would_change(
    engine: Engine, caplog: pytest.LogCaptureFixture, serializer: Any, value: Any, said: str
) -> None:
    """B20: a value that would come back changed is returned as computed, not stored, and the caller is told."""
    make = keyed.with_options(result_serializer=serializer)
    assert await make(value) is value
    [warning] = warnings_in(caplog)
    assert said in warning.replace(__name__, "test_exact")
    assert "is not cached" in warning
    assert await keys_in(engine.storage) == []
    assert (await make.run_to_state(value)).name == "Completed"


@pytest.mark.parametrize("serializer", ["json", "compressed/json", "msgpack", "pickle", "default"])
async def test_no_serializer_by_name_changes_a_value(engine: Engine, serializer: str) -> None:
    """B20: what JSON itself does not know comes back from every serializer as it went, type included."""
    value = {1: (2, {3}), "a": [(), b"x", 2**80, -0.0], (1, True): frozenset([1.0])}
    make = keyed.with_options(result_serializer=serializer)
    for name in ("Completed", "Cached"):
        state = await make.run_to_state(value)
        assert (state.name, digest(state.result())) == (name, digest(value))


async def test_what_pickles_exactly_is_stored(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """B20: what cannot be compared (a lock within), functions, local classes and cycles are stored as ever."""

    class Local:
        def __init__(self) -> None:
            self.me = self
            self.call = lambda x: x + CONSTANT

    cycle: list[Any] = [{1}]
    cycle.append(cycle)
    by_default: Any = defaultdict(lambda: CONSTANT)
    values: list[Any] = [Local(), lambda: CONSTANT, cycle, [Guarded()], by_default, ValueError("a")]
    for value in values:
        await keyed.with_options(refresh_cache=True)(value)
        assert (await keyed.run_to_state(0)).name == "Cached"
    assert warnings_in(caplog) == []
