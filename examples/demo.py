"""`make demo`: what has been computed once is not computed again, on the installed standard library.

python examples/demo.py [FOLDER [STORAGE]]

Runs 04_library.py in processes of their own and counts in its log lines what ran and what was cached: twice
over the whole library, then over a copied part of it, before and after an edit of one module. The library's
records stay in `.demo/`, so that the next `make demo` finds them; `rm -r .demo` starts afresh.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

EXAMPLE = Path(__file__).with_name("04_library.py")
STORAGE = EXAMPLE.parents[1] / ".demo" / "storage"
LINE = re.compile(r"Task run '(measure [^']+|fold)' - Finished in state (\w+)\(.*")


class Run(NamedTuple):
    """One process of the flow: its report, and the closing log lines of its cacheable tasks by name."""

    report: str
    seconds: float
    executed: dict[str, str]
    cached: dict[str, str]

    def __str__(self) -> str:
        executed, cached = (len(lines.keys() - {"fold"}) for lines in (self.executed, self.cached))
        fold = "executed" if "fold" in self.executed else "cached"
        counts = f"{executed + cached} modules: {executed} executed, {cached} cached"
        return f"{self.seconds:5.2f} s   {counts}; fold {fold}"


def run(folder: Path, storage: Path) -> Run:
    """Index `folder` in a new process."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ONCEFLOW_")}
    environment |= {"ONCEFLOW_STORAGE": os.fspath(storage), "HOME": os.fspath(storage.parent)}
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, EXAMPLE, folder], env=environment, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        sys.exit(f"{EXAMPLE} failed:\n{done.stderr[-4000:]}")
    ended = [match for match in map(LINE.search, done.stderr.splitlines()) if match]
    executed = {match[1]: match[0] for match in ended if match[2] != "Cached"}
    cached = {match[1]: match[0] for match in ended if match[2] == "Cached"}
    return Run(done.stdout, seconds, executed, cached)


def whole(folder: Path, storage: Path) -> None:
    """Twice the same: the second run executes nothing and reports the same."""
    print(f"The Python modules in {folder}, twice, each time in a new process:\n", flush=True)
    first = run(folder, storage)
    print(f"  run 1   {first}", flush=True)
    second = run(folder, storage)
    print(f"  run 2   {second}\n")
    if not first.executed:
        print(f"Run 1 found the records of an earlier `make demo` in {storage}; remove them to start afresh.")
    if second.executed:
        sys.exit(
            f"Run 2 should have been served by records alone, but executed {', '.join(second.executed)}."
        )
    if second.report != first.report:
        sys.exit(f"The reports differ.\n\nRun 1:\n{first.report}\nRun 2:\n{second.report}")
    print(f"The report of run 2 is identical to that of run 1:\n\n{second.report}")


def edited(part: Path) -> None:
    """A copy with records of its own, of which one module is edited: that module runs again, and the fold."""
    with tempfile.TemporaryDirectory() as temporary:
        storage, copy = Path(temporary, "storage"), Path(temporary, "copy")
        shutil.copytree(part, copy, ignore=shutil.ignore_patterns("__pycache__"))
        print(f"A copy of {part.name}/, before and after a function is added to one module:\n", flush=True)
        print(f"  before  {run(copy, storage)}", flush=True)
        module = max(copy.glob("*.py"))
        with module.open("a", encoding="utf-8") as text:
            text.write("\n\ndef added():\n    return None\n")
        after = run(copy, storage)
        print(f"  after   {after}\n")
        print("\n".join(f"  {line}" for line in after.executed.values()))
        if after.executed.keys() != {f"measure {module.stem}", "fold"}:
            sys.exit(f"The edit of {module.name} should have run that module and the fold, and nothing else.")


def main(folder: str | None = None, storage: str | None = None) -> None:
    library = Path(folder or sysconfig.get_path("stdlib"))
    whole(library, Path(storage or STORAGE))
    edited(library / "asyncio" if (library / "asyncio").is_dir() else library)


if __name__ == "__main__":
    main(*sys.argv[1:])
