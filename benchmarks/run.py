"""`make bench`: every workload against its floor and the peers that are installed, as ratios.

python benchmarks/run.py [W1 W4 …]

Prints each workload as it is measured and keeps the whole in benchmarks/last.json. Ratios count; the times are
those of this machine at this moment.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path

import buckets
import calls
import imports
import keys
import large
import records
import transactions
import waiters
import web
from harness import Row, measure, show

LAST = Path(__file__).with_name("last.json")
GROUPS = (calls, records, large, buckets, imports, keys, transactions, waiters, web)


def main(wanted: list[str]) -> None:
    started = time.perf_counter()
    machine = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
    }
    print("Python {python}, {cores} cores, load {load:.1f}, {system}".format(**machine))
    rows: list[Row] = []
    for group in GROUPS:
        for workload in group.workloads():
            if not wanted or workload.id in wanted:
                measured = measure(workload)
                show(workload, measured)
                rows += measured
    LAST.write_text(json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    over = sum(row.is_over for row in rows)
    print(f"\n{over} over budget; {time.perf_counter() - started:.0f} s; kept in {LAST}")


if __name__ == "__main__":
    main(sys.argv[1:])
