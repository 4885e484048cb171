"""Tasks that are cached together or not at all: the first run fails half-way, and keeps nothing.

With ONCEFLOW_STORAGE=s3://… it does the same in a bucket, for every machine that reads there.
"""

from pathlib import Path

from onceflow.engine import INPUTS, TASK_SOURCE, flow, get_run_context, task, transaction

cached = INPUTS + TASK_SOURCE - "fail"


@task(cache_policy=cached)
def load(name: str) -> list[int]:
    copy = Path(f"{name}.txt")
    copy.write_text("3 1 2")
    txn = get_run_context().transaction
    assert txn is not None
    txn.set("copy", copy)  # for the hooks of this very run
    return [3, 1, 2]


@load.on_rollback
def remove_copy(txn: transaction) -> None:
    txn.get("copy").unlink()
    print("  rolled back:", txn.get("copy"), "is removed")


@load.on_commit
def keep_copy(txn: transaction) -> None:
    print("  committed:", txn.get("copy"), "is kept")


@task(cache_policy=cached)
async def process(data: list[int], fail: bool) -> list[int]:
    if fail:
        raise RuntimeError("no power")
    return sorted(data)


@flow
async def pipeline(fail: bool = False) -> None:
    async with transaction():
        loaded = await load.run_to_state("numbers")
        print("  load:", loaded.name)
        processed = await process.run_to_state(loaded.result(), fail)
        print("  process:", processed.name)
        print("  sorted:", processed.result())


if __name__ == "__main__":
    for fail in (True, False, False):
        try:
            print("run")
            pipeline.run(fail)
        except RuntimeError as error:
            print("  failed:", error)
