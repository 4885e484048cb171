"""The settings of an S3 storage, checked before anything is opened, and their form as a URL."""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import quote, urlencode, urlsplit

from .._errors import StorageConfigurationError

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.\-]{1,61}[a-z0-9]", re.ASCII)
_ADDRESS = re.compile(r"\d+\.\d+\.\d+\.\d+", re.ASCII)
_CHECKSUMS = ("when_supported", "when_required")
_STYLES = ("auto", "path", "virtual")
_LONGEST_PREFIX = 512
"""Bytes. With the longest name that stays well below the 1024 that S3 allows."""

_LEAST_PART = 5 * 1024 * 1024
_MOST_PART = 5 * 1024 * 1024 * 1024


class Options(NamedTuple):
    """What `S3Storage` was given; see there."""

    bucket: str
    prefix: str
    endpoint_url: str | None
    region_name: str | None
    max_connections: int
    part_size: int
    concurrency: int
    checksums: str | None
    addressing_style: str | None
    timeout: float

    def checked(self) -> Options:
        """These options with a tidy prefix.

        Raises:
            StorageConfigurationError: One of them cannot work; it says which and what would.
        """
        _check_bucket(self.bucket)
        _check_endpoint(self.endpoint_url)
        if self.region_name is not None and not re.fullmatch(
            r"[A-Za-z0-9\-]{1,64}", self.region_name, re.ASCII
        ):
            raise StorageConfigurationError(
                f"{self.region_name!r} is no region.", "Give one such as 'eu-central-1'."
            )
        for name, value, least, most in (
            ("max_connections", self.max_connections, 1, 10_000),
            ("concurrency", self.concurrency, 1, 1_000),
            ("part_size", self.part_size, _LEAST_PART, _MOST_PART),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise StorageConfigurationError(f"{name}={value!r} is not possible.",
                                                f"Give a whole number from {least} to {most}.")  # fmt: skip
        for name, choice, choices in (
            ("checksums", self.checksums, _CHECKSUMS),
            ("addressing_style", self.addressing_style, _STYLES),
        ):
            if choice is not None and choice not in choices:
                raise StorageConfigurationError(
                    f"{name}={choice!r} is not known.", f"Give one of {choices}, or None."
                )
        if isinstance(self.timeout, bool) or not 0 < self.timeout < float("inf"):
            raise StorageConfigurationError(
                f"timeout={self.timeout!r} is not possible.", "Give a number of seconds."
            )
        return self._replace(prefix=_tidy(self.prefix))

    @property
    def url(self) -> str:
        """`s3://bucket/prefix` and whatever differs from the defaults."""
        query = {
            "endpoint_url": self.endpoint_url,
            "region": self.region_name,
            "max_connections": self.max_connections
            if self.max_connections != DEFAULT.max_connections
            else None,
            "part_size": self.part_size if self.part_size != DEFAULT.part_size else None,
            "concurrency": self.concurrency if self.concurrency != DEFAULT.concurrency else None,
            "checksums": self.checksums,
            "addressing_style": self.addressing_style,
            "timeout": f"{self.timeout:g}" if self.timeout != DEFAULT.timeout else None,
        }
        path = f"/{quote(self.prefix)}" if self.prefix else ""
        text = urlencode({name: value for name, value in query.items() if value is not None}, safe=":/")
        return f"s3://{self.bucket}{path}" + (f"?{text}" if text else "")


DEFAULT = Options(
    bucket="", prefix="", endpoint_url=None, region_name=None, max_connections=50, part_size=8 * 1024 * 1024,
    concurrency=8, checksums=None, addressing_style=None, timeout=30.0,
)  # fmt: skip


def _check_bucket(bucket: str) -> None:
    if (
        not isinstance(bucket, str)
        or not _BUCKET.fullmatch(bucket)
        or ".." in bucket
        or _ADDRESS.fullmatch(bucket)
    ):
        raise StorageConfigurationError(
            f"{bucket!r} is no bucket name.",
            "It takes 3 to 63 lower case letters, digits, dots and hyphens, and is no IP address.",
        )


def _check_endpoint(endpoint_url: str | None) -> None:
    if endpoint_url is None:
        return
    try:
        parts = urlsplit(endpoint_url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        parts, good = urlsplit(""), False
    if not good or parts.query or parts.fragment:
        shown = endpoint_url.rpartition("@")[2]
        raise StorageConfigurationError(
            f"endpoint_url={shown!r} is no address of a server.",
            "Give one such as 'https://s3.example.org:9000'.",
        )
    if parts.username is not None or parts.password is not None:
        raise StorageConfigurationError(
            f"endpoint_url for {parts.hostname} holds credentials.",
            "Leave them out, and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE.",
        )


def _tidy(prefix: str) -> str:
    tidy = prefix.strip("/")
    if not tidy:
        return ""
    odd = [part for part in tidy.split("/") if part in ("", ".", "..")]
    if odd or not tidy.isprintable():
        raise StorageConfigurationError(
            f"The prefix {prefix!r} has an empty, '.' or '..' part, or unprintable characters.",
            "Give one such as 'team/a'.",
        )
    try:
        size = len(tidy.encode())
    except UnicodeEncodeError:
        raise StorageConfigurationError(
            f"The prefix {prefix!r} is not valid Unicode.", "Give plain text."
        ) from None
    if size > _LONGEST_PREFIX:
        raise StorageConfigurationError(
            f"The prefix takes {size} bytes.",
            f"Give one of at most {_LONGEST_PREFIX}, for a key has 1024 in all.",
        )
    return tidy
