"""What the key of a large argument costs, against hashing its bytes."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
from harness import FLOOR, OURS, Measure, Workload
from onceflow.engine._keys.digest import digest

try:
    import joblib
except ImportError:
    joblib = None
try:
    from dask.base import tokenize
except ImportError:
    tokenize = None


def of(fn: Callable[[Any], object], value: Any) -> Measure:
    """Milliseconds of one call."""

    async def run() -> float:
        started = perf_counter()
        fn(value)
        return (perf_counter() - started) * 1e3

    return run


def raw(value: bytes) -> str:
    return hashlib.sha256(value).hexdigest()


def pickled(value: object) -> str:
    return hashlib.sha256(pickle.dumps(value, protocol=5)).hexdigest()


def buffers(frame: pd.DataFrame) -> str:
    found = hashlib.sha256()
    for name in frame:
        found.update(np.ascontiguousarray(frame[name].to_numpy()))
    return found.hexdigest()


def workloads() -> Iterator[Workload]:
    random = np.random.default_rng(1)
    rows = 1_000_000
    frame = pd.DataFrame({"a": random.random(rows), "b": random.integers(0, rows, rows)})
    for what, floor, value, floor_fn, budget in (
        ("1 MB of bytes", "sha256", os.urandom(1_000_000), raw, 1.1),
        ("a list of 100 000 ints", "pickle 5 and sha256", list(range(100_000)), pickled, 2.0),
        ("a DataFrame of 10⁶ rows, two columns", "buffers and sha256", frame, buffers, 1.2),
    ):
        yield Workload(
            "W9",
            f"the key of {what}",
            floor,
            {
                FLOOR: of(floor_fn, value),
                OURS: of(digest, value),
                "joblib.hash": of(joblib.hash, value) if joblib else None,
                "dask.tokenize": of(tokenize, value) if tokenize else None,
            },
            budget=budget,
            unit="ms",
            rounds=15,
        )
