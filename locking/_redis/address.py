"""The URL of a Redis server: what it may say, and what of it may be shown.

redis-py passes what a URL asks for on to its connections, some of which do not take it, and ignores a database
that is no number: both would show at the first lock, or never.
"""

from __future__ import annotations

from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit, urlunsplit

from .._errors import LockConfigurationError

_SCHEMES = {"redis": "redis", "rediss": "rediss", "valkey": "redis", "valkeys": "rediss", "unix": "unix"}
_SECRET = {"username", "password", "ssl_password"}
_OPTIONS = {"db", "username", "password", "client_name", "protocol"}
_TLS = {
    "ssl_ca_certs", "ssl_ca_data", "ssl_ca_path", "ssl_cert_reqs", "ssl_certfile", "ssl_check_hostname",
    "ssl_ciphers", "ssl_keyfile", "ssl_min_version", "ssl_password",
}  # fmt: skip
_FORM = "Give redis://host:port/database."


def checked(url: str) -> str:
    """The URL as redis-py takes it.

    Raises:
        LockConfigurationError: It is none, or asks for what cannot be had.
    """
    try:
        parts = urlsplit(url)
        scheme, _ = _SCHEMES[parts.scheme], parts.port
    except (KeyError, AttributeError, TypeError):
        raise LockConfigurationError(f"{shown(url)!r} is no URL of a Redis server.", _FORM) from None
    except ValueError as error:
        raise LockConfigurationError(f"{shown(url)!r} is no URL: {error}.", _FORM) from None
    parts = parts._replace(scheme=scheme)
    _check_database(parts)
    _check_options(parts)
    return _joined(parts)


def _check_database(parts: SplitResult) -> None:
    if parts.scheme == "unix":
        if not parts.path.strip("/"):
            raise LockConfigurationError(
                "The URL unix:// names no socket.", "Give unix:///path/of/the/socket?db=0."
            )
        database = "0"
    else:
        database = parts.path.removeprefix("/") or "0"
    for number in (database, dict(parse_qsl(parts.query)).get("db", "0")):
        if not (number.isascii() and number.isdigit()):
            raise LockConfigurationError(
                f"The database {number!r} in the URL of a Redis server is no number.", _FORM
            )


def _check_options(parts: SplitResult) -> None:
    known = _OPTIONS | _TLS if parts.scheme == "rediss" else _OPTIONS
    for name, _ in parse_qsl(parts.query, keep_blank_values=True):
        if name in known:
            continue
        problem = f"The URL of a Redis server has the option {name!r}, which locks do not take."
        if name in _TLS:
            raise LockConfigurationError(problem, "It is one of TLS: write rediss:// for that.")
        remedy = f"Leave it out; known are {', '.join(sorted(known))}"
        raise LockConfigurationError(
            problem, f"{remedy}, and to lock_manager_from_url() lease_seconds, max_connections, prefix."
        )


def shown(url: str, **options: str) -> str:
    """The URL without user and passwords, with these options added."""
    try:
        parts = urlsplit(url)
        query = [(name, value) for name, value in parse_qsl(parts.query) if name not in _SECRET]
        netloc = parts.netloc.rpartition("@")[2]
        return _joined(parts._replace(netloc=netloc, query=urlencode(query + list(options.items()))))
    except (AttributeError, TypeError, ValueError):
        head, _, tail = str(url).rpartition("@")
        return f"{head.split('//')[0]}//…@{tail}" if head else tail


def _joined(parts: SplitResult) -> str:
    url = urlunsplit(parts)
    return url if "://" in url else url.replace(":", "://", 1)  # unix:///path has no host
