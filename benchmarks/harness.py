"""How a workload is measured: every contestant in turn, several rounds, each in an event loop of its own."""

from __future__ import annotations

import asyncio
import gc
import random
import tempfile
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

Measure = Callable[[], Awaitable[float]]
"""Does the work once and returns its cost: for one operation, in the workload's unit."""

FLOOR = "floor"
OURS = "onceflow"


@dataclass
class Workload:
    """Something that onceflow, the cheapest thing that does the physical work, and others can do.

    Args:
        id: As in the table of budgets, `W4`.
        what: One line for people.
        floor: What the floor does.
        contestants: How each does it; None stands for one that is not installed, or cannot do it yet.
        budget: What onceflow's multiple of the floor may be.
        extra: What onceflow may cost beyond the floor, in the unit, where that is the budget.
        unit: Of the costs.
        rounds: How often each is measured.
        size: Bytes that are moved, where MB/s are of interest; the unit is ms then.
    """

    id: str
    what: str
    floor: str
    contestants: dict[str, Measure | None]
    budget: float | None = None
    extra: float | None = None
    unit: str = "µs"
    rounds: int = 7
    size: int | None = None


@dataclass
class Row:
    """One contestant's median cost and its median multiple of the floor; None where it is missing."""

    workload: str
    what: str
    contestant: str
    cost: float | None
    ratio: float | None
    unit: str
    budget: str = ""
    is_over: bool = False


def in_folder(run: Callable[[Path], Coroutine[Any, Any, float]]) -> Callable[[], Coroutine[Any, Any, float]]:
    """A measurement with an empty folder of its own."""

    async def measured() -> float:
        with tempfile.TemporaryDirectory() as folder:
            return await run(Path(folder))

    return measured


def measure(workload: Workload) -> list[Row]:
    """Measure all contestants side by side; the ratios are taken within each round, so that drift cancels."""
    runs = {name: run for name, run in workload.contestants.items() if run is not None}
    costs: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(workload.rounds):
        for name in random.sample(list(runs), len(runs)):
            gc.collect()
            costs[name].append(asyncio.run(_measured(runs[name])))
    rows = []
    for name in workload.contestants:
        row = Row(workload.id, workload.what, name, None, None, workload.unit)
        if name in runs:
            row.cost = median(costs[name])
            row.ratio = median(cost / floor for cost, floor in zip(costs[name], costs[FLOOR], strict=True))
        if name == OURS and row.cost is not None and row.ratio is not None:
            if workload.budget is not None:
                row.budget, row.is_over = f"{workload.budget:g} ×", row.ratio > workload.budget
            elif workload.extra is not None:
                row.budget = f"+ {workload.extra:g} {workload.unit}"
                row.is_over = row.cost - median(costs[FLOOR]) > workload.extra
        rows.append(row)
    return rows


async def _measured(run: Measure) -> float:
    return await run()


def show(workload: Workload, rows: list[Row]) -> None:
    """Print a workload's rows as they come."""
    print(f"\n{workload.id}  {workload.what}", flush=True)
    for row in rows:
        name = f"{FLOOR}: {workload.floor}" if row.contestant == FLOOR else row.contestant
        if row.cost is None or row.ratio is None:
            print(f"    {name:44} {'missing':>12}")
            continue
        verdict = f"   budget {row.budget}{'  OVER' if row.is_over else ''}" if row.budget else ""
        if workload.size is not None:
            verdict = f"   {workload.size / row.cost / 1000:.0f} MB/s{verdict}"
        print(f"    {name:44} {row.cost:9.2f} {row.unit}  {row.ratio:8.2f} ×{verdict}", flush=True)
