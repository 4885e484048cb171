"""What it means when a Redis server, or the way to it, says no: whether to try again, which error, what to do."""

from __future__ import annotations

import re
from typing import NamedTuple

from .._errors import LockAccessError, LockConfigurationError, LockError, LockUnavailableError


class Meaning(NamedTuple):
    """Whether the next attempt may succeed by itself; what to raise if none does; the remedy."""

    passes: bool
    error: type[LockError]
    remedy: str

    def told(self, operation: str, key: str, url: str, reason: str) -> LockError:
        """The error."""
        if issubclass(self.error, LockConfigurationError):
            return LockConfigurationError(
                f"Could not {operation} the lock {key!r} in {url}: {reason}.", self.remedy
            )
        assert issubclass(self.error, (LockAccessError, LockUnavailableError))
        return self.error(operation, key, url, reason, self.remedy)


_RIGHTS = (
    "Give its user the rights: ACL SETUSER name ~{prefix}:* &{prefix}:* +@connection +evalsha +eval +get +set +del "
    "+pttl +pexpire +time +publish +subscribe +unsubscribe."
)
_PRIMARY = "This is a replica: give the URL of its primary."
_REACH = {
    "redis": "Look whether the server runs and can be reached; one with TLS wants rediss://.",
    "rediss": "Look whether the server runs, can be reached, and speaks TLS.",
}
_CERTIFICATE = (
    "Name files that exist and fit in the URL: ?ssl_ca_certs=file.pem, or ssl_certfile and ssl_keyfile."
)

# By what the message has in it: redis-py has classes for few of them, and for none that a script meets inside.
_KNOWN = (
    (r"max number of clients", True, LockUnavailableError, "Raise its maxclients, or lower max_connections."),
    (r"read only replica|MASTER is down", True, LockUnavailableError, _PRIMARY),
    (r"^BUSY ", True, LockUnavailableError, "Somebody's script runs for long there: end it by SCRIPT KILL."),
    (r"loading the dataset", True, LockUnavailableError, "It answers as soon as it has read its data."),
    (
        r"maxmemory",
        False,
        LockUnavailableError,
        "Its memory is used up: raise maxmemory, or delete something.",
    ),
    (
        r"DB index",
        False,
        LockConfigurationError,
        "Name a database that it has: 0 to 15, unless it was told so.",
    ),
    (
        r"^MOVED |CLUSTERDOWN|Hash slot",
        False,
        LockConfigurationError,
        "Redis Cluster is not supported: use one server.",
    ),
    (r"[Nn]o permissions|NOPERM", False, LockAccessError, _RIGHTS),
    (
        r"[Aa]uthenticat|NOAUTH|WRONGPASS|password",
        False,
        LockAccessError,
        "Check user and password in the URL.",
    ),
    (
        r"Permission denied",
        False,
        LockAccessError,
        "Check the rights of the socket and the files in the URL.",
    ),
    (
        r"(?i)protocol error",
        False,
        LockUnavailableError,
        "No Redis server answers there: check host and port.",
    ),
)
_KNOWN_TLS = (
    (r"certificate|CERTIFICATE|No such file", False, LockConfigurationError, _CERTIFICATE),
    (
        r"(?i)wrong.version.number|record.layer",
        False,
        LockConfigurationError,
        "It speaks no TLS: write redis://.",
    ),
)


def meaning(error: Exception, prefix: str, scheme: str, answered: tuple[type[Exception], ...]) -> Meaning:
    """What an error of redis-py or the system tells; `answered` are those that a server sent."""
    text = str(error)
    for pattern, passes, kind, remedy in (*_KNOWN, *(_KNOWN_TLS if scheme == "rediss" else ())):
        if re.search(pattern, text):
            return Meaning(passes, kind, remedy.replace("{prefix}", f"{{{prefix}}}"))
    if isinstance(error, answered):
        return Meaning(False, LockUnavailableError, "The server answers, but cannot do it: see its log.")
    return Meaning(
        True, LockUnavailableError, _REACH.get(scheme, "Look whether the server runs and can be reached.")
    )


def reason_of(error: Exception) -> str:
    """What it says, without where in our script it happened."""
    return re.sub(r",? script: [\w, ]*on @\w+:\d+\.*$", "", str(error)).rstrip(". ") or type(error).__name__
