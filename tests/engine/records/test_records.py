"""What lies in the storages, what comes back, and what becomes of records that cannot be used."""

from __future__ import annotations

import asyncio
import io
import logging
import os
import struct
import threading
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from onceflow.engine import INPUTS, Engine, Settings, State, flow, get_run_context, task
from onceflow.engine import UnfinishedRunError as Unfinished
from onceflow.engine._runs.states import StateType
from onceflow.storage import (
    CorruptRecordError,
    LocalStorage,
    MemoryStorage,
    ObjectNotFoundError,
    PickleRefusedError,
    StorageAccessError,
    Stored,
)
from onceflow.storage._format.envelope import PREFIX_SIZE, pack
from onceflow.storage._storage import Data
from onceflow.storage._values.serializers import (
    CompressedSerializer,
    JsonSerializer,
    PickleSerializer,
    Serializer,
)
from stored_records import header_of, keys_in, names_in
from stored_tables import same_arrow, same_pandas, same_polars


@task(cache_policy=INPUTS)
async def echo(x: object) -> object:
    return x


@task(cache_key_fn=lambda context, parameters: "key")
async def keyed(x: object) -> object:
    return x


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# --- where records and values lie


@pytest.mark.parametrize("form", [lambda path: path, str, lambda path: path.as_uri(), LocalStorage])
async def test_key_storage_in_every_form(engine: Engine, tmp_path: Path, form: Callable[[Path], Any]) -> None:
    """S1, S2: the record lies in the key storage, named by the key, and the result storage holds the bare value."""
    keys, values = tmp_path / "keys", tmp_path / "values"
    split = echo.with_options(
        cache_policy=INPUTS.configure(key_storage=form(keys)), result_storage=form(values)
    )
    assert await split(["value"]) == ["value"]
    assert await names_in(keys) == {await split.cache_key(["value"])}
    [value] = await names_in(values)
    [name] = await names_in(keys)
    header = await header_of(LocalStorage(keys), name)
    assert (header.key, header.serializer, header.location, header.task) == (name, "msgpack", value, "echo")
    stored = await LocalStorage(values).read(value)
    assert len(stored) == header.payload_size < 20
    assert (await split.run_to_state(["value"])).name == "Cached"


async def test_records_may_be_deleted_without_their_values(engine: Engine, tmp_path: Path) -> None:
    """S2: with a key storage a record can be dropped on its own; the value stays, the call runs again."""
    keys, values = MemoryStorage(), MemoryStorage()
    split = echo.with_options(cache_policy=INPUTS.configure(key_storage=keys), result_storage=values)
    await split(1)
    [name] = await keys_in(keys)
    assert await keys.delete(name)
    assert len(await keys_in(values)) == 1
    assert (await split.run_to_state(1)).name == "Completed"
    assert (await split.run_to_state(1)).name == "Cached"


async def test_one_object_without_key_storage(engine: Engine) -> None:
    """S4: record and value are one object, and when it is removed nothing is left."""
    await echo(1)
    assert await keys_in(engine.storage) == [await echo.cache_key(1)]
    assert await echo.invalidate(1)
    assert await keys_in(engine.storage) == []
    assert not await echo.invalidate(1)
    assert (await echo.run_to_state(1)).name == "Completed"


async def test_a_missing_value_is_a_miss(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """S2: a record whose value is gone is a miss with one warning, and the run mends it."""
    keys, values = MemoryStorage(), MemoryStorage()
    split = echo.with_options(cache_policy=INPUTS.configure(key_storage=keys), result_storage=values)
    await split(1)
    [value] = await keys_in(values)
    await values.delete(value)
    assert (await split.run_to_state(1)).name == "Completed"
    [warning] = warnings_in(caplog)
    assert value in warning
    assert (await split.run_to_state(1)).name == "Cached"


async def test_the_default_storage_is_one_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S5, S6: engines made from the settings share `~/.onceflow/storage`, and find what another has written."""
    monkeypatch.setenv("HOME", str(tmp_path))
    async with Engine():
        assert await echo(1) == 1
    async with Engine():
        assert (await echo.run_to_state(1)).name == "Cached"
    assert len(await names_in(tmp_path / ".onceflow" / "storage")) == 1


async def test_what_a_record_says(engine: Engine) -> None:
    """S7: a full record says its key, serializer, writer, expiry and components beside the value."""

    @task(cache_policy=INPUTS, cache_expiration=timedelta(hours=1))
    async def described(x: int) -> str:
        return get_run_context().id

    state = await described.run_to_state(1)
    name = await described.cache_key(1)
    assert name is not None
    header = await header_of(engine.storage, name)
    assert (header.key, header.run_id, header.kind, header.location) == (name, state.result(), "record", None)
    assert header.expires_at is not None
    assert header.expires_at - header.created == pytest.approx(3600, abs=1)
    assert list(header.components) == ["input 'x'"]
    assert state.location == name


# --- records that cannot be used


async def test_an_unknown_serializer(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """S8: a record by a serializer that nobody here knows is a miss with one warning that names it."""
    [segment] = pack_into(await written(engine, "key", 1), serializer="martian")
    await engine.storage.write("key", segment)
    header = await header_of(engine.storage, "key")
    assert header.serializer == "martian"
    assert (await keyed.run_to_state(2)).name == "Completed"
    [warning] = warnings_in(caplog)
    assert "martian" in warning
    assert "key" in warning


@pytest.mark.parametrize("name", ["compressed/json?level=99", "jsonn", "json?indent=2", "compressed/"])
async def test_a_serializer_that_cannot_be(engine: Engine, name: str) -> None:
    """S9: an unknown serializer, or one with invalid options, is an error when the task is declared."""
    with pytest.raises(ValueError, match=r"serializer|level"):
        echo.with_options(result_serializer=name)
    with pytest.raises(ValueError, match=r"serializer|level"):
        async with Engine(serializer=name):
            pass


async def written(engine: Engine, key: str, value: object) -> bytes:
    """The record of a run, as the engine writes it."""
    by_key = echo.with_options(cache_key_fn=lambda context, parameters: key)
    await by_key(value)
    return await engine.storage.read(key)


def pack_into(data: bytes, **changes: Any) -> list[bytes]:
    """The record with other fields."""
    from onceflow.storage._format.envelope import unpack_header

    header, offset = unpack_header(data)
    for name, value in changes.items():
        setattr(header, name, value)
    return [b"".join(bytes(buffer) for buffer in pack(header, [data[offset:]]))]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "foreign": lambda data: b"hello, I am a text file, and rather longer than the fixed part of any record",
    "short": lambda data: data[:20],
    "torn in the header": lambda data: data[: PREFIX_SIZE + 5],
    "torn in the value": lambda data: data[:-1],
    "longer": lambda data: data + b"x",
    "changed header": lambda data: data[:60] + bytes([data[60] ^ 1]) + data[61:],
    "changed value": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "newer": lambda data: data[:4] + b"\x09" + data[5:],
    "of another key": lambda data: pack_into(data, key="another")[0],
    "huge header": lambda data: data[:6] + struct.pack(">I", 2**31) + data[10:],
    "header beyond its end": lambda data: data[:6] + struct.pack(">I", 2**20) + data[10:],
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("size", [1, 300_000])
async def test_damaged_records_are_misses(
    engine: Engine, caplog: pytest.LogCaptureFixture, damage: str, size: int
) -> None:
    """S7: corrupt, torn, foreign and newer objects are misses with one warning, and the run replaces them."""
    data = await written(engine, "key", bytes(size))
    await engine.storage.write("key", DAMAGES[damage](data))
    failing = keyed.with_options(retries=0)
    assert (await failing.run_to_state("new")).name == "Completed"
    [warning] = warnings_in(caplog)
    assert "'key'" in warning
    assert engine.storage.url in warning
    state = await keyed.run_to_state("newer")
    assert (state.name, state.result()) == ("Cached", "new")
    assert len(warnings_in(caplog)) == 1


@pytest.mark.parametrize("damage", ["empty", "torn in the value", "longer", "changed value"])
async def test_damaged_values_are_misses(
    engine: Engine, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    """S2: a value that lies apart and was torn or changed is a miss with one warning, and never a failure."""
    keys, values = MemoryStorage(), MemoryStorage()
    split = echo.with_options(cache_policy=INPUTS.configure(key_storage=keys), result_storage=values)
    await split("a value of some length")
    [value] = await keys_in(values)
    await values.write(value, DAMAGES[damage](await values.read(value)))
    state = await split.run_to_state("a value of some length")
    assert (state.name, state.result()) == ("Completed", "a value of some length")
    assert len(warnings_in(caplog)) == 1
    assert (await split.run_to_state("a value of some length")).name == "Cached"


async def test_the_same_damage_is_warned_of_once(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """S7: as long as nobody can mend it, an object is warned of once, not once a look-up."""
    storage = Refusing("write")
    await MemoryStorage.write(storage, "key", b"not a record")
    for _ in range(3):
        assert await keyed.with_options(result_storage=storage)(1) == 1
    assert len([text for text in warnings_in(caplog) if "treated as a miss" in text]) == 1


async def test_a_record_of_another_kind_is_no_record(engine: Engine) -> None:
    """S7: what a protocol or a failed run left under the key is never served as a value."""
    data = await written(engine, "key", "old")
    await engine.storage.write("key", pack_into(data, kind="failure")[0])
    state = await keyed.run_to_state("new")
    assert (state.name, state.result()) == ("Completed", "new")


# --- storages that refuse


class Refusing(MemoryStorage):
    """Says no to reading or writing, with an error of storage's own or another one."""

    def __init__(self, what: str, error: Exception | None = None) -> None:
        super().__init__()
        self.what = what
        self.error = error or StorageAccessError(what, "key", "memory", "it says no", "Ask somebody else.")

    async def fetch(self, *args: Any, **kwargs: Any) -> Stored | None:
        if self.what == "read":
            raise self.error
        return await super().fetch(*args, **kwargs)

    async def write(self, *args: Any, **kwargs: Any) -> str:
        if self.what == "write":
            raise self.error
        return await super().write(*args, **kwargs)


@pytest.mark.parametrize("what", ["read", "write"])
@pytest.mark.parametrize("error", [None, OSError(28, "no space"), RuntimeError("strange"), TimeoutError()])
async def test_a_storage_that_refuses(
    engine: Engine, caplog: pytest.LogCaptureFixture, what: str, error: Exception | None
) -> None:
    """R3: whatever a storage raises, the task completes with its value, and a warning says why nothing is cached."""
    refused = echo.with_options(result_storage=Refusing(what, error))
    state = await refused.run_to_state(5)
    assert (state.name, state.result()) == ("Completed", 5)
    assert len(warnings_in(caplog)) == 1


@pytest.mark.parametrize("part", ["key_storage", "result_storage"])
async def test_a_key_storage_that_refuses(
    engine: Engine, caplog: pytest.LogCaptureFixture, part: str
) -> None:
    """R3: with records apart either storage may refuse, and nothing is served that was not committed."""
    good, bad = MemoryStorage(), Refusing("write")
    keys, values = (bad, good) if part == "key_storage" else (good, bad)
    split = echo.with_options(cache_policy=INPUTS.configure(key_storage=keys), result_storage=values)
    assert [(await split.run_to_state(1)).name for _ in range(2)] == ["Completed", "Completed"]
    assert await keys_in(keys) == []


async def test_a_folder_that_cannot_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """R3: a storage path that runs through a file warns, naming the path, and loses no value."""

    def occupy() -> None:
        (tmp_path / "file").write_text("I am in the way")

    await asyncio.to_thread(occupy)
    async with Engine(storage=tmp_path / "file" / "storage"):
        state = await echo.run_to_state(1)
    assert (state.name, state.result()) == ("Completed", 1)
    assert any(str(tmp_path / "file") in text for text in warnings_in(caplog))


async def test_a_read_only_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """R3: a folder without write permission serves what is in it, and a miss there warns and completes."""
    async with Engine(storage=tmp_path) as engine:
        await written(engine, "key", "old")
        await asyncio.to_thread(os.chmod, tmp_path, 0o500)
        try:
            if os.geteuid() == 0:
                pytest.skip("root may write everywhere")
            assert await keyed("new") == "old"
            assert (await echo.run_to_state(1)).name == "Completed"
        finally:
            await asyncio.to_thread(os.chmod, tmp_path, 0o700)
    assert len(warnings_in(caplog)) == 1


async def test_a_folder_in_the_place_of_a_record(engine: Engine, tmp_path: Path) -> None:
    """R3: a directory of the record's name is neither served nor fatal."""
    await asyncio.to_thread((tmp_path / "key").mkdir)
    assert [(await keyed.run_to_state(x)).result() for x in (1, 2)] == [1, 2]


# --- values and serializers


@dataclass
class Point:
    x: int
    y: tuple[int, ...]


@dataclass
class Opaque:
    """Hidden from msgpack's exact types by what it holds."""

    call: Callable[[int], int]


VALUES: list[Any] = [
    (1, 2), [1, 2], {1, 2}, frozenset({1}), {1: "a", "1": "b"}, 2**200, 1 + 2j, Decimal("1.10"), b"", bytearray(b"x"),
    None, "", [], {}, (), {"value": 1}, {"__type__": "x"}, {"key": "k", "serializer": "msgpack"}, Point(1, (2, 3)),
    [(), [()]], float("inf"), -0.0, True, Path("a/b"), timedelta(days=1), StateType.FAILED, {(1, 2): 3}, "\x00",
]  # fmt: skip
NAMES = ["default", "msgpack", "json", "pickle", "compressed/json", "compressed/pickle", "compressed/default"]


@pytest.mark.parametrize("name", NAMES)
async def test_values_come_back_as_they_went(engine: Engine, name: str) -> None:
    """R1, R4: whichever the serializer, every value comes back equal and of its type, nested or not."""
    for number, value in enumerate(VALUES):
        by = keyed.with_options(
            cache_key_fn=lambda context, parameters, number=number: str(number), result_serializer=name
        )
        for wrapped in (value, [value]):
            await by.with_options(refresh_cache=True)(wrapped)
            state = await by.run_to_state("other")
            assert state.name == "Cached", (name, wrapped)
            found = state.result()
            assert repr(found) == repr(wrapped), (name, wrapped)
            assert type(found) is type(wrapped)


async def test_pickle_carries_the_rest(engine: Engine) -> None:
    """R1: what msgpack does not carry is pickled by default, and the record says so."""
    await keyed(Opaque(abs))
    assert (await header_of(engine.storage, "key")).serializer == "pickle"
    found = await keyed(None)
    assert isinstance(found, Opaque)
    assert found.call(-2) == 2


@pytest.mark.parametrize(
    ("serializer", "recorded"),
    [
        ("json", "json"),
        ("pickle", "pickle"),
        ("compressed/json", "compressed/json"),
        ("compressed/pickle", "compressed/pickle"),
        ("compressed/json?level=9", "compressed/json"),
        (JsonSerializer(), "json"),
        (PickleSerializer(), "pickle"),
        (CompressedSerializer(JsonSerializer(), level=1), "compressed/json"),
    ],
)
@pytest.mark.parametrize("where", ["task", "flow", "engine"])
async def test_the_record_names_its_serializer(
    tmp_path: Path, serializer: Any, recorded: str, where: str
) -> None:
    """R1: by name or as an instance, on task, flow or engine, the serializer is in the record and reads back."""
    by = keyed.with_options(result_serializer=serializer) if where == "task" else keyed

    async def call() -> str:
        return (await by.run_to_state([1])).name

    outer = flow(call).with_options(result_serializer=serializer if where == "flow" else None)
    async with Engine(storage=tmp_path, serializer=serializer if where == "engine" else None) as engine:
        assert [await outer(), await outer()] == ["Completed", "Cached"]
        assert (await header_of(engine.storage, "key")).serializer == recorded


async def test_a_task_serializer_beats_the_flows(engine: Engine) -> None:
    """R2: the task's serializer wins over its flow's, and a subflow inside a task has its own."""
    seen = {}

    @task(cache_key_fn=lambda context, parameters: "inner")
    async def inner() -> int:
        return 1

    @flow(result_serializer="json")
    async def subflow() -> int:
        return await inner()

    @task(cache_key_fn=lambda context, parameters: "outer", result_serializer="compressed/pickle")
    async def outer() -> int:
        return await subflow()

    @flow(result_serializer="pickle")
    async def parent() -> None:
        await outer()
        await keyed(1)

    await parent()
    for name in ("inner", "outer", "key"):
        seen[name] = (await header_of(engine.storage, name)).serializer
    assert seen == {"inner": "json", "outer": "compressed/pickle", "key": "pickle"}


class Rot13(Serializer):
    name = "rot13"

    def dumps(self, value: Any) -> list[bytes]:
        if not isinstance(value, str):
            raise ValueError("only text")
        return [value.swapcase().encode()]

    def loads(self, segments: Any) -> str:
        return bytes(segments[0]).decode().swapcase()


async def test_a_serializer_of_ones_own(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """R1, S8: a user's serializer writes and reads; without it its record is a miss that names it."""
    mine = keyed.with_options(result_serializer=Rot13())
    assert [await mine("Hello"), await mine("other")] == ["Hello", "Hello"]
    assert await engine.storage.read("key") != b""
    assert (await keyed.run_to_state("plain")).result() == "plain"
    [warning] = warnings_in(caplog)
    assert "rot13" in warning


@pytest.mark.parametrize("value", [threading.Lock(), (x for x in "ab"), io.BytesIO().getbuffer()])
@pytest.mark.parametrize("name", ["default", "json", "pickle", "msgpack"])
async def test_a_value_that_cannot_be_stored(
    engine: Engine, caplog: pytest.LogCaptureFixture, value: Any, name: str
) -> None:
    """R3: a value that no serializer carries is returned, nothing is stored, and a warning names the type."""
    make = keyed.with_options(result_serializer=name, cache_key_fn=lambda context, parameters: "unstorable")
    assert await make(value) is value
    [warning] = warnings_in(caplog)
    assert type(value).__name__ in warning
    assert await keys_in(engine.storage) == []


class Vicious:
    """Cannot even be pickled without harm."""

    def __reduce__(self) -> Any:
        raise RuntimeError("never store me")


async def test_a_value_that_raises_when_it_is_stored(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """R3: an error out of the value's own code does no harm to the run."""
    state = await keyed.run_to_state(Vicious())
    assert state.name == "Completed"
    assert "never store me" in caplog.text


class Forgetful:
    """Pickles, and cannot be made again."""

    def __reduce__(self) -> Any:
        return int, ("not a number",)


async def test_a_value_that_cannot_be_made_again(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """R3, B20: a value that would not load again is returned, not stored, and its writer is told."""
    value = Forgetful()
    assert await keyed(value) is value
    assert "not a number" in caplog.text
    assert await keys_in(engine.storage) == []


async def test_returned_values_are_nobody_elses(engine: Engine) -> None:
    """E1: changing a returned value, of a first call or of a hit, changes no later hit."""
    for _ in range(3):
        value: Any = await keyed([1, {"a": [2]}])
        assert value == [1, {"a": [2]}]
        value[1]["a"].append(3)
        value.clear()


# --- pickle where others can write


class Bucket(MemoryStorage):
    """Memory that says others can write to it."""

    shared = True


async def test_pickle_is_refused_on_shared_storage(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """R3: a pickled value is not written to shared storage; the warning names both remedies."""
    bucket = Bucket()
    shared = keyed.with_options(result_storage=bucket)
    assert isinstance(await shared(Opaque(abs)), Opaque)
    assert await keys_in(bucket) == []
    [warning] = warnings_in(caplog)
    assert "ONCEFLOW_RESULTS_SIGNING_KEY" in warning
    assert "ONCEFLOW_RESULTS_ALLOW_PICKLE" in warning
    assert await shared([1]) == [1] == await shared([2])


async def test_tables_need_no_pickle_on_shared_storage(caplog: pytest.LogCaptureFixture) -> None:
    """R3, S7: an unsigned bucket takes frames and Arrow tables, and serves them exactly, large and small."""
    rows = np.arange(20_000)
    tables: list[tuple[Any, Callable[[Any, Any], bool]]] = [
        (pd.DataFrame({"n": rows, "t": rows.astype(str), "o": [(1, None)] * len(rows)}), same_pandas),
        (pd.Series([1.5, None], ["a", "b"], name="s"), same_pandas),
        (pl.DataFrame({"n": rows, "t": rows.astype(str)}), same_polars),
        (pa.table({"n": rows, "t": rows.astype(str)}).replace_schema_metadata({"k": "v"}), same_arrow),
    ]
    for number, (table, same) in enumerate(tables):

        @task(cache_key_fn=lambda context, parameters, number=number: f"table-{number}")
        async def make(table: Any = table) -> Any:
            return table

        bucket = Bucket()
        async with Engine(storage=bucket):
            assert same(await make(), table)
        async with Engine(storage=bucket):  # that has no copy in memory
            state = await make.run_to_state()
            assert state.name == "Cached"
            assert same(state.result(), table)
    assert warnings_in(caplog) == []


class Bomb:
    exploded = False

    def __reduce__(self) -> Any:
        return _explode, ()


def _explode() -> Bomb:
    Bomb.exploded = True
    return Bomb()


@pytest.mark.parametrize("apart", [False, True])
async def test_foreign_pickles_are_never_loaded(caplog: pytest.LogCaptureFixture, apart: bool) -> None:
    """R3: a pickled record that somebody else put into shared storage is a miss, and its code does not run."""
    bucket, policy = Bucket(), INPUTS.configure(key_storage=MemoryStorage() if apart else None)

    async def plant(x: object) -> object:
        return Bomb()

    shared = echo.with_options(cache_policy=policy)
    async with Engine(storage=bucket, settings=Settings(results_allow_pickle=True)):
        await task(plant).with_options(cache_policy=policy)("plain")
        assert len(await keys_in(bucket)) == 1
    Bomb.exploded = False
    async with Engine(storage=bucket):
        state = await shared.run_to_state("plain")
    assert (state.name, Bomb.exploded) == ("Completed", False)
    assert len(warnings_in(caplog)) == 1


async def test_signed_pickles_travel(caplog: pytest.LogCaptureFixture) -> None:
    """R3: with a signing key pickles travel over shared storage; a wrong or no key makes them misses."""
    bucket = Bucket()
    signed = keyed.with_options(result_storage=bucket)
    async with Engine(storage=bucket, settings=Settings(results_signing_key="one")):
        await signed(Opaque(abs))
        assert (await signed.run_to_state(0)).name == "Cached"
    async with Engine(storage=bucket, settings=Settings(results_signing_key="two,one")):
        assert (await signed.run_to_state(0)).name == "Cached"
    assert warnings_in(caplog) == []
    async with Engine(storage=bucket, settings=Settings(results_allow_pickle=True)):
        assert (await signed.with_options(refresh_cache=None).run_to_state(0)).name == "Completed"
    assert len(warnings_in(caplog)) == 1


@pytest.mark.parametrize("apart", [False, True])
async def test_unsigned_records_where_records_are_signed(
    caplog: pytest.LogCaptureFixture, apart: bool
) -> None:
    """R3: with a signing key whoever lacks it can put nothing into a bucket that is served, plain values neither."""
    bucket, policy = Bucket(), INPUTS.configure(key_storage=Bucket() if apart else None)
    shared = echo.with_options(cache_policy=policy)

    async def plant(x: object) -> object:
        return "forged"

    async with Engine(storage=bucket):
        await task(plant).with_options(cache_policy=policy)("plain")
    async with Engine(storage=bucket, settings=Settings(results_signing_key="one")):
        state = await shared.run_to_state("plain")
        assert (state.name, state.result()) == ("Completed", "plain")
        assert [(await shared.run_to_state("plain")).name for _ in range(2)] == ["Cached"] * 2
    [warning] = warnings_in(caplog)
    assert "not signed" in warning
    assert "ONCEFLOW_RESULTS_SIGNING_KEY" in warning


async def test_unsigned_records_where_every_writer_is_trusted(tmp_path: Path) -> None:
    """R3: in one's own folder, and where ONCEFLOW_RESULTS_ALLOW_PICKLE says so, a new key spoils no old record."""
    for storage, trusting in ((LocalStorage(tmp_path), False), (Bucket(), True)):
        async with Engine(storage=storage):
            await echo("plain")
        settings = Settings(results_signing_key="one", results_allow_pickle=trusting)
        async with Engine(storage=storage, settings=settings):
            assert (await echo.run_to_state("plain")).name == "Cached"


async def test_a_signed_record_serves_its_own_key_only(caplog: pytest.LogCaptureFixture) -> None:
    """R3: a sound, signed record that somebody copies to another key is a miss there, pickled or plain."""
    bucket = Bucket()
    async with Engine(storage=bucket, settings=Settings(results_signing_key="one")):
        for value in ("plain", Opaque(abs)):
            one = keyed.with_options(cache_key_fn=lambda context, parameters: "one")
            other = keyed.with_options(cache_key_fn=lambda context, parameters: "other")
            await one.with_options(refresh_cache=True)(value)
            await bucket.write("other", await bucket.read("one"))
            state = await other.run_to_state("own")
            assert (state.name, state.result()) == ("Completed", "own")
            assert "it belongs to the key 'one'" in warnings_in(caplog)[0]


# --- failures


async def broken(x: int) -> int:
    raise LookupError("no", x)


fails = task(broken).with_options(cache_policy=INPUTS)


async def test_a_failure_is_kept_apart(engine: Engine) -> None:
    """R5: a failure goes to a random key, never to the cache key, and can be read and raised again."""
    state = await fails.run_to_state(3)
    assert state.location is not None
    assert state.location != await fails.cache_key(3)
    assert await keys_in(engine.storage) == [state.location]
    assert (await header_of(engine.storage, state.location)).kind == "failure"
    async with Engine(storage=engine.storage) as later:
        error = await later.records.failure(later.storage, state.location)
        with pytest.raises(LookupError) as caught:
            raise error
        assert caught.value.args == ("no", 3)
    other = await fails.run_to_state(3)
    assert (other.name, len(await keys_in(engine.storage))) == ("Failed", 2)


async def test_no_failure_is_kept_without_persistence(engine: Engine) -> None:
    """R5: with persistence off a failure leaves nothing behind."""
    state = await task(broken).run_to_state(3)
    assert (state.name, state.location) == ("Failed", None)
    assert await keys_in(engine.storage) == []


class Awkward(Exception):
    """Pickles by its message, which its constructor does not take."""

    def __init__(self, code: int, *, detail: str) -> None:
        super().__init__(f"{code}: {detail}")


class Clinging(Exception):
    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    "error", [Awkward(7, detail="seven"), Clinging("holds on"), ExceptionGroup("two", [ValueError(1)])]
)
async def test_every_failure_can_be_kept(
    engine: Engine, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    """R5: an exception that cannot be pickled and made again is kept by its text."""

    @task(cache_policy=INPUTS)
    async def raising(x: int) -> int:
        raise error

    state = await raising.run_to_state(1)
    assert state.data is error
    assert warnings_in(caplog) == []
    assert state.location is not None
    kept = await engine.records.failure(engine.storage, state.location)
    assert str(error) in str(kept)


async def test_failures_are_pickles_too(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """R5: on shared storage a failure is neither written nor read unsigned; the run's own failure stays."""
    bucket = Bucket()
    state = await fails.with_options(result_storage=bucket).run_to_state(1)
    assert isinstance(state.result(raise_on_failure=False), LookupError)
    assert (state.location, await keys_in(bucket)) == (None, [])
    assert "ONCEFLOW_RESULTS_SIGNING_KEY" in warnings_in(caplog)[0]
    async with Engine(storage=bucket, settings=Settings(results_allow_pickle=True)) as trusting:
        state = await fails.with_options(result_storage=bucket).run_to_state(1)
        assert state.location is not None
        assert isinstance(await trusting.records.failure(bucket, state.location), LookupError)
    with pytest.raises(PickleRefusedError):
        await engine.records.failure(bucket, state.location)


async def test_what_is_no_failure(engine: Engine) -> None:
    """R5: reading a value as a failure is a clear error, as is reading nothing."""
    await keyed(1)
    with pytest.raises(CorruptRecordError, match="not a failure"):
        await engine.records.failure(engine.storage, "key")
    with pytest.raises(ObjectNotFoundError):
        await engine.records.failure(engine.storage, "nothing")


async def test_a_failing_refresh_keeps_the_record(engine: Engine) -> None:
    """R5: a run that fails leaves the committed record of its key alone."""
    await keyed("good")
    failing = task(broken).with_options(cache_key_fn=lambda context, parameters: "key", refresh_cache=True)
    assert (await failing.run_to_state(1)).name == "Failed"
    assert await keyed("other") == "good"


# --- storage keys


async def test_storage_key_templates(engine: Engine) -> None:
    """R6: parameters with defaults and the fields of the run are available to a storage key."""

    @task(
        result_storage_key="{parameters[x]}-{y}-{task_run.name}-{flow_run.name}.json", task_run_name="run {x}"
    )
    async def templated(x: int, y: str = "default") -> int:
        return x

    @flow(flow_run_name="my flow")
    async def parent() -> None:
        await templated(1)
        await templated(2, y="other")

    await parent()
    assert set(await keys_in(engine.storage)) == {
        "1-default-run 1-my flow.json",
        "2-other-run 2-my flow.json",
    }


@pytest.mark.parametrize(
    "template", ["{nothing}", "{parameters[nope]}", "{flow_run.name}", "{x.y.z}", "{", "{0}", ""]
)
async def test_a_storage_key_that_cannot_be_made(
    engine: Engine, caplog: pytest.LogCaptureFixture, template: str
) -> None:
    """R6: a template that does not fit is a warning that names it; the task completes uncached."""

    @task(result_storage_key=template)
    async def templated(x: int) -> int:
        return x

    for with_policy in (templated, templated.with_options(cache_policy=INPUTS)):
        caplog.clear()
        state = await with_policy.run_to_state(1)
        assert (state.name, state.result()) == ("Completed", 1)
        assert len(warnings_in(caplog)) == 1
        assert repr(template) in warnings_in(caplog)[0]
    assert await keys_in(engine.storage) == []


# --- unfinished states, late values


@pytest.mark.parametrize("name", ["PENDING", "RUNNING", "SCHEDULED"])
def test_unfinished_states_have_no_result(name: str) -> None:
    """R8: asking an unfinished state for its result is an "unfinished" error, whatever else is said."""
    state: State[int] = State(StateType(name))
    for raising in (True, False):
        with pytest.raises(Unfinished):
            state.result(raise_on_failure=raising)


async def test_failed_states_raise_unless_told_not_to(engine: Engine) -> None:
    """R8: a failed state raises its exception, or returns it."""
    state = await fails.run_to_state(1)
    with pytest.raises(LookupError):
        state.result()
    assert isinstance(state.result(raise_on_failure=False), LookupError)


class Late(MemoryStorage):
    """Shows what was written only after it was asked for it some times."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after
        self.asked = 0

    async def fetch(self, key: str, *args: Any, **kwargs: Any) -> Stored | None:
        self.asked += 1
        if self.asked <= self.after:
            raise ObjectNotFoundError(key, self.url)
        return await super().fetch(key, *args, **kwargs)


async def test_a_late_value_is_asked_for_again(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """R9: a value that is not visible yet is read again, and then it is a hit."""
    late = Late(after=2)
    split = echo.with_options(cache_policy=INPUTS.configure(key_storage=MemoryStorage()), result_storage=late)
    await split(1)
    assert (await split.run_to_state(1)).name == "Cached"
    assert (late.asked, warnings_in(caplog)) == (3, [])


async def test_a_value_that_never_comes(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """R9: the reads are bounded, and in the end the last error is the reason of the miss."""
    late = Late(after=100)
    split = echo.with_options(cache_policy=INPUTS.configure(key_storage=MemoryStorage()), result_storage=late)
    await split(1)
    assert (await split.run_to_state(1)).name == "Completed"
    assert late.asked == 4
    [warning] = warnings_in(caplog)
    assert "gone" in warning


class Slow(MemoryStorage):
    """Writes when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go = asyncio.Event(), asyncio.Event()

    async def write(
        self, key: str, data: Data, *, if_absent: bool = False, if_version: str | None = None
    ) -> str:
        self.begun.set()
        await self.go.wait()
        return await super().write(key, data, if_absent=if_absent, if_version=if_version)


async def test_cancelled_while_it_commits(engine: Engine) -> None:
    """S5: a run cancelled during its commit is cancelled like any other, and leaves no half-written record."""
    slow = Slow()
    work = asyncio.create_task(keyed.with_options(result_storage=slow)(1))
    await slow.begun.wait()
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert await keys_in(slow) == []
    slow.go.set()
    assert await keyed.with_options(result_storage=slow)(2) == 2


async def test_large_values_come_back(engine: Engine) -> None:
    """S5: values beyond the first read, and beyond what stays on the loop, come back whole."""
    import numpy

    big: Any = {"text": "x" * 3_000_000, "array": numpy.arange(500_000), "list": list(range(100_000))}
    await keyed(big)
    found: Any = await keyed(None)
    assert (found["text"], found["list"]) == (big["text"], big["list"])
    assert found["array"].tobytes() == big["array"].tobytes()
    found["array"][0] = 7  # it is the caller's own


@pytest.mark.parametrize("make", [lambda: bytes(8 << 20), lambda: np.zeros(1 << 20)])
async def test_a_large_hit_takes_the_room_of_its_value(tmp_path: Path, make: Callable[[], Any]) -> None:
    """B25: bytes and arrays are read without a second copy, and an array can be written to."""

    @task(cache_policy=INPUTS)
    async def large() -> Any:
        return make()

    named = large.with_options(cache_policy=None, cache_key_fn=lambda *_: "large")
    async with Engine(storage=tmp_path):
        await named()
    async with Engine(storage=LocalStorage(tmp_path)):
        tracemalloc.start()
        try:
            value = await named()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 1.5 * (8 << 20)
    if not isinstance(value, bytes):
        value[0] = 1.0
        assert value[0] == 1.0
