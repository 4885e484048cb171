"""Why a call ran, or did not: in the log and by `explain`."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from onceflow.engine import DEFAULT, FLOW_PARAMETERS, INPUTS, Engine, flow, task
from onceflow.storage import LocalStorage, MemoryStorage, Storage, Stored
from until import until


class Counting(MemoryStorage):
    """Counts what is read and written."""

    reads = 0
    writes = 0

    async def fetch(self, key: str, *args: Any, **kwargs: Any) -> Stored | None:
        self.reads += 1
        return await super().fetch(key, *args, **kwargs)

    async def write(self, key: str, *args: Any, **kwargs: Any) -> str:
        self.writes += 1
        return await super().write(key, *args, **kwargs)


@task(cache_policy=INPUTS)
async def sales(day: str, shop: int = 1) -> str:
    return f"{day} {shop}"


def reasons(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.message.partition("; ")[2]
        for record in caplog.records
        if "Finished in state" in record.message
    ]


@pytest.fixture(params=["memory", "local"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return MemoryStorage() if request.param == "memory" else LocalStorage(tmp_path)


async def test_a_miss_names_the_input_that_changed(
    storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    """B28: given a miss, the log line and explain name the component that differs from the nearest record."""
    caplog.set_level(logging.INFO, "onceflow")
    async with Engine(storage=storage):
        await sales("monday", 2)
        await sales("tuesday", 2)
        await sales("tuesday", 2)
        found = await sales.explain("tuesday", 3)
    assert reasons(caplog)[0] == "ran: no record"
    assert reasons(caplog)[1] == "ran: input 'day' changed"
    assert reasons(caplog)[2].startswith("cached: written by run ")
    assert (bool(found), str(found), found.changed) == (False, "ran: input 'shop' changed", ("input 'shop'",))


async def test_a_later_process_knows_the_records_of_an_earlier_one(storage: Storage) -> None:
    """B28: an engine that is opened later compares with what an earlier one has written."""
    async with Engine(storage=storage):
        await sales("monday")
    async with Engine(storage=storage):
        assert str(await sales.explain("friday")) == "ran: input 'day' changed"
        assert (await sales.explain("monday")).would_hit


async def test_the_nearest_of_many_records_is_compared(storage: Storage) -> None:
    """B28: of everything that a task has recorded, what differs least is compared, and not what is latest."""
    async with Engine(storage=storage):
        for day in range(20):
            await sales(str(day))
        assert (await sales.explain("3", 2)).changed == ("input 'shop'",)
    async with Engine(storage=storage):
        await sales("20", 5)
        assert (await sales.explain("3", 2)).changed == ("input 'shop'",)
        assert (await sales.explain("21", 5)).changed == ("input 'day'",)
    async with Engine(storage=storage):
        assert (await sales.explain("3", 2)).changed == ("input 'shop'",)


async def test_notes_are_bounded(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest records of a task are remembered, up to a number, across engines."""
    monkeypatch.setattr("onceflow.engine._records.history.KEPT", 3)
    for shops in (range(2), range(2, 7), range(7, 8)):
        async with Engine(storage=storage):
            for shop in shops:
                await sales(str(shop), shop)
    async with Engine(storage=storage):
        changed = [(await sales.explain(str(shop), 100)).changed for shop in range(8)]
    both, one = ("input 'day'", "input 'shop'"), ("input 'shop'",)
    assert changed == [both] * 5 + [one] * 3


async def test_notes_are_written_while_the_engine_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """B28: a process that lives on, or is killed, has left its notes: at once the first, then now and then."""
    monkeypatch.setattr("onceflow.engine._records.history.SOON_SHARED", 0.0)
    storage = Counting()
    async with Engine(storage=storage):
        await sales("monday")
        await until(lambda: storage.writes == 2)
        async with Engine(storage=storage):
            assert str(await sales.explain("friday")) == "ran: input 'day' changed"
        await asyncio.gather(*(sales(str(day)) for day in range(10)))
        assert storage.writes == 12  # ten seconds have yet to go by


KILLED = """
import asyncio, sys
from onceflow.engine import INPUTS, Engine, task

@task(cache_policy=INPUTS)
async def sales(day, shop=1):
    return day

async def main():
    async with Engine(storage=sys.argv[1]):
        if sys.argv[2:]:
            print(await sales.explain("friday"))
            return
        await sales("monday")
        print("committed", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_killed_process_has_left_its_notes(tmp_path: Path, home: Path) -> None:
    """B28: the process that comes after one that was killed names what changed since."""
    await asyncio.to_thread((tmp_path / "script.py").write_text, KILLED)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "storage")]
    first = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    assert first.stdout is not None
    assert await first.stdout.readline() == b"committed\n"
    notes = home / ".onceflow" / "explain"
    await until(lambda: asyncio.to_thread(lambda: any(len(note.name) == 64 for note in notes.glob("*"))))
    first.kill()
    await first.wait()
    successor = await asyncio.create_subprocess_exec(*command, "again", stdout=subprocess.PIPE)
    assert (await successor.communicate())[0] == b"ran: input 'day' changed\n"


async def test_notes_cost_a_hit_nothing_and_a_miss_one_read(caplog: pytest.LogCaptureFixture) -> None:
    """B28: a hit reads its record alone, an explained miss one small note more, once; a commit writes once."""
    caplog.set_level(logging.INFO, "onceflow")
    storage = Counting()
    async with Engine(storage=storage):
        await sales("monday")
        assert (storage.reads, storage.writes) == (2, 1)
        await sales("monday")
        assert (storage.reads, storage.writes) == (3, 1)
        await sales("tuesday")
        assert (storage.reads, storage.writes) == (4, 2)


async def test_nothing_is_read_for_lines_that_nobody_sees() -> None:
    """A miss reads no note while the log level is off."""
    storage = Counting()
    async with Engine(storage=storage):
        await sales("monday")
    assert (storage.reads, storage.writes) == (2, 2)  # the look-up and the record; at the end the note


async def test_notes_are_no_objects_of_the_users(storage: Storage) -> None:
    """A listing shows records only."""
    async with Engine(storage=storage):
        await sales("monday")
        key = await sales.cache_key("monday")
    assert [stat.key async for stat in storage.list()] == [key]


async def test_the_run_id_is_named(engine: Engine) -> None:
    """B28: a task with the default policy says that DEFAULT includes the run id."""

    @task(persist_result=True)
    async def loads(x: int) -> int:
        return x

    await loads(1)
    assert str(await loads.explain(1)) == "ran: DEFAULT includes the run id"
    assert loads.cache_policy == DEFAULT


async def test_flow_parameters_are_named(engine: Engine) -> None:
    """B28: a changed flow parameter is named."""
    said: list[str] = []

    @task(cache_policy=INPUTS + FLOW_PARAMETERS)
    async def loads(x: int) -> int:
        return x

    @flow
    async def nightly(day: str) -> None:
        said.append(str(await loads.explain(1)))
        await loads(1)

    await nightly("monday")
    await nightly("tuesday")
    assert said == ["ran: no record", "ran: flow parameter 'day' changed"]


async def test_expiry_and_refresh_are_named(tmp_path: Path) -> None:
    """B28: an expired record and a refresh say so."""
    now = 1_000_000.0
    async with Engine(storage=tmp_path, clock=lambda: now):
        brief = sales.with_options(cache_expiration=timedelta(minutes=1))
        await brief("monday")
        now += 240
        assert str(await brief.explain("monday")) == "ran: expired 3 min ago"
        assert (
            str(await brief.with_options(refresh_cache=True).explain("monday"))
            == "ran: refresh was asked for"
        )


async def test_what_is_never_cached_says_why(engine: Engine) -> None:
    """Explain has an answer also where there is no key."""

    @task
    async def plain() -> None: ...

    assert str(await plain.explain()) == "ran: persistence is off"
    assert str(await sales.explain(object())) == "ran: day has no cache key"  # type: ignore[arg-type]


async def test_a_broken_note_costs_the_explanation_only(tmp_path: Path, home: Path) -> None:
    """A note that cannot be read is as good as none."""
    async with Engine(storage=tmp_path):
        await sales("monday")
    [note] = await asyncio.to_thread(lambda: [*(home / ".onceflow" / "explain").iterdir()])
    await asyncio.to_thread(note.write_bytes, b"nonsense")
    async with Engine(storage=tmp_path):
        assert str(await sales.explain("friday")) == "ran: no record"
        assert await sales("friday") == "friday 1"


PIPELINE = """
import asyncio, logging, sys
from onceflow.engine import INPUTS, TASK_SOURCE, Engine, flow, task
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)

def clean(x):
    return x {operator} 1

def other(x):
    return x * 2

@task(cache_policy=INPUTS + TASK_SOURCE, task_run_name="cleans")
async def cleans(x):
    return clean(x)

@task(cache_policy=INPUTS + TASK_SOURCE, task_run_name="doubles")
async def doubles(x):
    return other(x)

@flow
async def pipeline():
    await cleans(1)
    await doubles(1)

async def main():
    async with Engine(storage=sys.argv[1]):
        await pipeline()

asyncio.run(main())
"""


def test_editing_a_helper_reruns_what_reaches_it(tmp_path: Path) -> None:
    """B15, B28: after a helper was edited exactly the tasks that reach it run again, and the log names it."""
    said = []
    for operator in "+-":
        script = tmp_path / "pipeline.py"
        script.write_text(PIPELINE.format(operator=operator))
        command = [sys.executable, str(script), str(tmp_path / "storage")]
        said.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert (
        "Task run 'cleans' - Finished in state Completed(); ran: helper __main__.clean() changed" in said[1]
    )
    assert "Task run 'doubles' - Finished in state Cached(type=COMPLETED)" in said[1]
