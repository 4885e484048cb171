"""Which storage a URL or a path means."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from ._errors import StorageConfigurationError
from ._local.storage import LocalStorage
from ._memory import MemoryStorage
from ._s3.storage import S3Storage
from ._storage import Storage

_FORMS = "a path, file:///path, memory://name or s3://bucket/prefix"
# A Windows drive is no scheme, and `s3:bucket` is a slip rather than a folder of that name.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+://|(?:file|memory|s3):", re.ASCII)

Convert = Callable[[str], Any]


def storage_from_url(url: str | os.PathLike[str] | Storage) -> Storage:
    """The storage that a URL, a path, or a storage itself stands for. Opens nothing.

    A path, with `~` or not, and `file:///path?durability=power&threads=8` are a `LocalStorage`,
    `memory://name` is a `MemoryStorage`, and `s3://bucket/prefix?endpoint_url=…&region=…` is an `S3Storage`,
    whose other options have the names of its arguments. Credentials are refused.

    Raises:
        StorageConfigurationError: Unknown scheme or option, or one that cannot work; it names what is known.
    """
    if isinstance(url, Storage):
        return url
    text = os.fspath(url)
    if not isinstance(text, str) or not text:
        raise StorageConfigurationError(f"{url!r} is no storage.", f"Give {_FORMS}.")
    if not isinstance(url, str) or not _URL.match(text):
        return LocalStorage(text)
    try:
        parts = urlsplit(text)
    except ValueError as error:
        raise StorageConfigurationError(
            f"{_public(text)!r} is no URL: {error}.", f"Give {_FORMS}."
        ) from error
    make = _SCHEMES.get(parts.scheme)
    if make is None:
        raise StorageConfigurationError(
            f"Unknown scheme in {_public(text)!r}.",
            f"Known are {', '.join(_SCHEMES)}.{_suggestion(parts.scheme, _SCHEMES)}",
        )
    if parts.fragment:
        raise StorageConfigurationError(
            f"{_public(text)!r} has a '#'.", "Write %23 if it belongs to the name."
        )
    if not text.startswith("//", len(parts.scheme) + 1) and parts.scheme != "file":
        raise StorageConfigurationError(f"{_public(text)!r} lacks '//'.", f"Give {_FORMS}.")
    return make(parts)


def _local(parts: SplitResult) -> Storage:
    options = _options(parts, {"durability": str, "threads": int})
    path = unquote(parts.path)
    if parts.netloc not in ("", "localhost"):
        raise StorageConfigurationError(
            f"{_public(parts.geturl())!r} names the host {_host(parts)!r}, and files lie on this one.",
            f"For an absolute path write file:///{_host(parts)}{parts.path}, else the path alone.",
        )
    if not path.startswith("/"):
        raise StorageConfigurationError(f"{parts.geturl()!r} has no path.", "Write file:///absolute/path.")
    return LocalStorage(path, **options)


def _memory(parts: SplitResult) -> Storage:
    _options(parts, {})
    name = unquote(parts.netloc + parts.path)
    if not name:
        raise StorageConfigurationError(
            "'memory://' has no name.", "Write memory://name, or use MemoryStorage()."
        )
    return MemoryStorage(name)


def _s3(parts: SplitResult) -> Storage:
    if "@" in parts.netloc:
        raise StorageConfigurationError(
            f"The URL of the bucket {_host(parts)!r} holds credentials.",
            "Leave them out, and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE.",
        )
    options = _options(
        parts,
        {
            "endpoint_url": str,
            "region": str,
            "max_connections": int,
            "part_size": int,
            "concurrency": int,
            "checksums": str,
            "addressing_style": str,
            "timeout": float,
        },
    )
    if "region" in options:  # the short name reads better in a URL; the argument is named as botocore's
        options["region_name"] = options.pop("region")
    return S3Storage(parts.netloc, unquote(parts.path), **options)


_SCHEMES: dict[str, Callable[[SplitResult], Storage]] = {"file": _local, "memory": _memory, "s3": _s3}


def _options(parts: SplitResult, known: Mapping[str, Convert]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        convert = known.get(name)
        if convert is None:
            names = ", ".join(known) or "none"
            raise StorageConfigurationError(
                f"Unknown option {name!r} in the URL of a {parts.scheme} storage.",
                f"Known are: {names}.{_suggestion(name, known)}",
            )
        if name in options:
            raise StorageConfigurationError(f"The URL's option {name!r} is given twice.", "Leave one out.")
        try:
            options[name] = convert(value)
        except ValueError:
            raise StorageConfigurationError(
                f"The URL's option {name}={value!r} is no number.",
                f"Write {name}=8, say.",
            ) from None
    return options


def _suggestion(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, known, 1, 0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def _host(parts: SplitResult) -> str:
    return parts.netloc.rpartition("@")[2]


def _public(url: str) -> str:
    """The URL as it may be shown: without what stands before an `@`, which could be a secret."""
    return re.sub(r"//[^/@]*@", "//***@", url)
