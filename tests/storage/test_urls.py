"""Which storage a URL or a path means, and what is said about a wrong one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from onceflow.storage import (
    LocalStorage,
    MemoryStorage,
    S3Storage,
    Storage,
    StorageConfigurationError,
    storage_from_url,
)


@pytest.mark.parametrize(
    ("url", "kind", "expected"),
    [
        ("file:///data/results", LocalStorage, "file:///data/results"),
        ("file:/data/results", LocalStorage, "file:///data/results"),
        ("file://localhost/data", LocalStorage, "file:///data"),
        ("FILE:///data", LocalStorage, "file:///data"),
        ("file:///with%20blank%23", LocalStorage, "file:///with%20blank%23"),
        (
            "file:///data?durability=power&threads=2",
            LocalStorage,
            "file:///data?durability=power&threads=2",
        ),
        ("file:///data?durability=process&threads=8", LocalStorage, "file:///data"),
        ("/data/results", LocalStorage, "file:///data/results"),
        ("/data/../results/", LocalStorage, "file:///results"),
        ("/with blank?#%", LocalStorage, "file:///with%20blank%3F%23%25"),
        (Path("/data/results"), LocalStorage, "file:///data/results"),
        ("memory://name", MemoryStorage, "memory://name"),
        ("memory://Name/with%20more", MemoryStorage, "memory://Name%2Fwith%20more"),
        ("s3://bucket", S3Storage, "s3://bucket"),
        ("s3://bucket/team/a/", S3Storage, "s3://bucket/team/a"),
        (
            "s3://bucket/a?endpoint_url=http://localhost:9000&region=eu-central-1&max_connections=7&timeout=2.5",
            S3Storage,
            "s3://bucket/a?endpoint_url=http://localhost:9000&region=eu-central-1&max_connections=7&timeout=2.5",
        ),
    ],
)
def test_urls(url: str | Path, kind: type[Storage], expected: str) -> None:
    """Every form makes its storage, whose own URL makes an equal one."""
    storage = storage_from_url(url)
    assert type(storage) is kind
    assert storage.url == expected
    assert storage_from_url(storage.url).url == expected


def test_relative_and_home_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path is bound at once to the working folder, `~` at first use to the home folder."""
    monkeypatch.chdir(tmp_path)
    relative, home = storage_from_url("results"), storage_from_url("~/results")
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", "/somewhere")
    assert relative.url == (tmp_path / "results").as_uri()
    assert home.url == "file:///somewhere/results"


def test_a_storage_stands_for_itself() -> None:
    """A storage is handed through, so that every setting may be either."""
    storage = MemoryStorage()
    assert storage_from_url(storage) is storage


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("", ["no storage", "memory://name"]),
        ("s4://bucket", ["Unknown scheme", "file, memory, s3", "Did you mean 's3'?"]),
        ("https://example.org/x", ["Unknown scheme", "file, memory, s3"]),
        ("memory://", ["no name", "MemoryStorage()"]),
        ("memory://name?size=3", ["'size'", "none"]),
        ("s3:bucket/prefix", ["lacks '//'", "s3://bucket/prefix"]),
        ("file://data/results", ["host 'data'", "file:///data/results"]),
        ("file://", ["no path", "file:///absolute/path"]),
        ("file:///data#1", ["'#'", "%23"]),
        (
            "file:///data?durabilty=power",
            ["'durabilty'", "durability, threads", "Did you mean 'durability'?"],
        ),
        ("file:///data?durability=disk", ["'disk'", "'process'", "'power'"]),
        ("file:///data?threads=many", ["threads='many'", "no number"]),
        ("file:///data?threads=0", ["0 threads", "threads=1"]),
        ("file:///data?threads=1&threads=2", ["'threads'", "twice"]),
        ("file:///da%00ta", ["path of a folder"]),
        ("s3://bucket?endpoint=http://x", ["'endpoint'", "Did you mean 'endpoint_url'?"]),
        ("s3://bucket?region_name=x", ["'region_name'", "Did you mean 'region'?"]),
        ("s3://", ["bucket name"]),
        ("s3://[bucket", ["no URL"]),
    ],
)
def test_bad_urls(url: str, words: list[str]) -> None:
    """What cannot work is refused with what was wrong, what is known, and the nearest of it."""
    with pytest.raises(StorageConfigurationError) as caught:
        storage_from_url(url)
    assert isinstance(caught.value, ValueError)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "url", ["s3://id:secret@bucket/x", "s4://id:secret@bucket", "file://id:secret@host/x"]
)
def test_credentials_are_never_shown(url: str) -> None:
    """A URL with credentials is refused, and the message does not repeat them."""
    with pytest.raises(StorageConfigurationError) as caught:
        storage_from_url(url)
    assert "secret" not in str(caught.value)
    assert "bucket" in str(caught.value) or "host" in str(caught.value)


def test_an_unknown_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A `~` that leads nowhere is an error at first use, not a folder named `~`."""
    storage = storage_from_url("~no-such-user-here/results")
    with pytest.raises(StorageConfigurationError, match="home folder"):
        _ = storage.url


def test_nothing_heavy_is_imported() -> None:
    """W8: The public face loads neither aiobotocore nor aiofiles nor numpy."""
    heavy = ["aiobotocore", "botocore", "aiofiles", "numpy"]
    code = f"import sys, onceflow.storage; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
