"""Keys of your own making, where they lie, and for how long: run it twice."""

import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from onceflow.engine import INPUTS, flow, task

RECORDS = Path(os.environ.get("ONCEFLOW_STORAGE", "~/.onceflow/storage")).expanduser().parent / "records"


@task(cache_policy=INPUTS - "debug")  # `debug` does not change the value, so it is not part of the key
async def area(width: int, height: int, debug: bool = False) -> int:
    return width * height


def by_page(context: Any, parameters: Mapping[str, Any]) -> str:
    return f"page {parameters['number']} of {parameters['book']}"


@task(cache_key_fn=by_page, cache_expiration=timedelta(days=1))  # the text is the key, and the file's name
async def page(book: str, number: int) -> str:
    return f"{book}, page {number}"


@task(cache_policy=INPUTS.configure(key_storage=RECORDS))  # small records there, values in the storage
async def letters(word: str) -> tuple[str, ...]:
    return tuple(sorted(set(word)))


@task(cache_policy=INPUTS, refresh_cache=True)  # always runs, and later readers see its value
async def fresh(x: int) -> int:
    return x + 1


@flow
async def keys() -> None:
    for state in [
        await area.run_to_state(3, 4),
        await area.run_to_state(3, 4, debug=True),
        await page.run_to_state("Emma", 7),
        await letters.run_to_state("onceflow"),
        await fresh.run_to_state(1),
    ]:
        print(state.name, state.result())
    print("page's key:", await page.cache_key("Emma", 7))


if __name__ == "__main__":
    keys.run()
    print("records apart:", len(list(RECORDS.iterdir())))
