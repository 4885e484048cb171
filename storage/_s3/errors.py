"""What an S3 server's answer means: retry, read back, an ordinary "no", or one of our errors.

Two kinds come out of here. `Answer` and its subclasses are internal: an answer that the caller of the
request decides about. Everything else is a `StorageError` that names bucket, key, operation and remedy.
"""

from __future__ import annotations

import asyncio
from typing import Any

from .._errors import (
    StorageAccessError,
    StorageConfigurationError,
    StorageError,
    StorageFullError,
    StorageUnavailableError,
)


class Answer(Exception):
    """An answer other than success whose meaning depends on what was asked."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class Missing(Answer):
    """404: no such object, or no such upload."""


class Changed(Answer):
    """412: a condition does not hold, perhaps because our own earlier attempt made it so."""


class Unmodified(Answer):
    """304: the object is still the one the caller has."""


class OutOfRange(Answer):
    """416: the range begins behind the object's end, or the object is empty."""


class Unsupported(Answer):
    """501: the server says that it does not know such a request."""


class Unknown(Answer):
    """No usable answer; the request may have been carried out or not. Worth another try."""

    patience = float("inf")
    """For how many seconds another try is worthwhile."""


class Conflict(Unknown):
    """409: another request for this object was under way, and nothing was decided."""


class Unreachable(Unknown):
    """Nobody listens there. A server that restarts is given some seconds; a wrong address no more."""

    patience = 5.0


class Bodyless(Answer):
    """An error to a HEAD request: it has no body, so it does not say what is wrong. A GET will."""


_SAY_NO = {
    "AccessDenied": (
        "access denied",
        "Grant these credentials {right} on the bucket, or use others.",
    ),
    "AllAccessDisabled": ("access to the bucket is disabled", "Ask the bucket's owner."),
    "AccountProblem": ("the account has a problem", "Ask the store's operator."),
    "InvalidAccessKeyId": (
        "the store does not know the access key",
        "Check AWS_ACCESS_KEY_ID (or the profile) and that endpoint_url is the store that issued it.",
    ),
    "SignatureDoesNotMatch": (
        "the signature is wrong",
        "Check AWS_SECRET_ACCESS_KEY, and that no proxy rewrites requests.",
    ),
    "ExpiredToken": ("the session token has expired", "Renew the credentials (AWS_SESSION_TOKEN)."),
    "InvalidToken": ("the session token is invalid", "Renew the credentials (AWS_SESSION_TOKEN)."),
    "RequestTimeTooSkewed": (
        "this machine's clock differs too much from the store's",
        "Set the clock (NTP); signatures are valid for some minutes only.",
    ),
    "RequestExpired": (
        "the request arrived after its signature had expired",
        "Set the clock (NTP); signatures are valid for some minutes only.",
    ),
}
_SAY_NO["ExpiredTokenException"] = _SAY_NO["TokenRefreshRequired"] = _SAY_NO["ExpiredToken"]
_SAY_NO["Forbidden"] = _SAY_NO["403"] = _SAY_NO["Unauthorized"] = _SAY_NO["AccessDenied"]

# By request: a delete or a conditional write may be refused the look at what is there.
_RIGHTS = {
    "get_object": "s3:GetObject (and s3:ListBucket, without which a missing object counts as forbidden)",
    "delete_object": "s3:DeleteObject",
    "list_objects_v2": "s3:ListBucket",
    "abort_multipart_upload": "s3:AbortMultipartUpload",
}
_RIGHTS["head_object"] = _RIGHTS["get_object"]
_WRITING = "s3:PutObject"

_LATER = {"SlowDown", "RequestTimeout", "TooManyRequests", "Throttling", "ThrottlingException"}
_LATER |= {"RequestLimitExceeded", "InternalError", "ServiceUnavailable", "BadDigest", "IncompleteBody"}
_WRONG_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
_FULL = {"QuotaExceeded", "InsufficientStorage", "XMinioStorageFull", "StorageFull", "InsufficientCapacity"}
_BY_STATUS: dict[int, type[Answer]] = {
    304: Unmodified,
    404: Missing,
    409: Conflict,
    412: Changed,
    416: OutOfRange,
    501: Unsupported,
}


class Translator:
    """Makes typed errors for one bucket; `storage` is the storage's URL, the name that errors carry."""

    def __init__(self, bucket: str, storage: str) -> None:
        self.bucket, self.storage = bucket, storage

    def translate(self, error: Exception, operation: str, key: str, method: str) -> Exception:
        """The `Answer` or `StorageError` for what a request raised; the error itself if it is no answer."""
        from botocore import exceptions as boto

        if isinstance(error, boto.ClientError):
            return self._response(error.response, operation, key, method)
        if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError):
            return self.no_credentials(operation, key, str(error))
        if isinstance(error, boto.CredentialRetrievalError | boto.TokenRetrievalError):
            return StorageAccessError(
                operation,
                key,
                self.storage,
                f"credentials could not be fetched ({error})",
                "Check their source.",
            )
        if isinstance(error, boto.SSLError):
            return StorageUnavailableError(
                operation, key, self.storage, f"no trusted TLS connection ({error})",
                "Check endpoint_url, and name your certificate authority by AWS_CA_BUNDLE.",
            )  # fmt: skip
        if isinstance(error, boto.EndpointConnectionError | boto.ProxyConnectionError):
            return Unreachable(_one_line(error))
        if isinstance(error, boto.ConnectTimeoutError | boto.ReadTimeoutError | TimeoutError):
            return Unknown("no answer in time")
        if _is_transient(error):
            return Unknown(_one_line(error))
        if isinstance(error, boto.BotoCoreError | ValueError):
            # Nothing was sent: a profile that is not there, a region of the environment that is none.
            return self._configuration(
                operation, key, f"the request cannot be made ({_one_line(error)})",
                "Check the options, AWS_PROFILE, AWS_DEFAULT_REGION and the AWS configuration files.",
            )  # fmt: skip
        return error

    def no_store(self, operation: str, key: str) -> StorageConfigurationError:
        """For a success that no S3 store would have sent: a web site, a proxy's own page."""
        return self._configuration(
            operation, key, "the answer has no entity tag, so no S3 store gave it",
            "Check endpoint_url, and what HTTP_PROXY leads to.",
        )  # fmt: skip

    def no_credentials(
        self, operation: str, key: str, reason: str = "no credentials found"
    ) -> StorageAccessError:
        return StorageAccessError(
            operation, key, self.storage, reason,
            "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or give the machine a role.",
        )  # fmt: skip

    def _response(self, response: dict[str, Any], operation: str, key: str, method: str) -> Exception:
        code = str(response.get("Error", {}).get("Code", ""))
        status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        said = f"{status} {code}: {response.get('Error', {}).get('Message') or ''}".rstrip(": ")
        if code == "NoSuchBucket":
            return self._configuration(operation, key, f"there is no bucket {self.bucket!r}",
                                       "Create it, or check bucket, endpoint_url and region.")  # fmt: skip
        if code in _WRONG_REGION or status == 301:
            return self._configuration(
                operation, key, _wrong_region(response), "Set region_name (or ?region=…)."
            )
        if code in _FULL or status == 507:
            return StorageFullError(key, self.storage, said)
        if code.isdigit() and status in (400, 403):
            return Bodyless(said)
        if code in _SAY_NO or status in (401, 403):
            reason, remedy = _SAY_NO.get(code, _SAY_NO["AccessDenied"])
            right = _RIGHTS.get(method, _WRITING)
            return StorageAccessError(
                operation, key, self.storage, f"{reason} ({said})", remedy.format(right=right)
            )
        if code in _LATER or status == 429 or (status >= 500 and status != 501):
            return Unknown(said)
        if code in ("NotImplemented", "XNotImplemented"):
            return Unsupported(said)
        if kind := _BY_STATUS.get(status):
            return kind(said)
        return self._refusal(operation, key, said)

    def _refusal(self, operation: str, key: str, said: str) -> StorageError:
        return self._configuration(operation, key, f"the store refused: {said}",
                                   "Check bucket, prefix, endpoint_url and options.")  # fmt: skip

    def _configuration(self, operation: str, key: str, reason: str, remedy: str) -> StorageConfigurationError:
        return StorageConfigurationError(f"Cannot {operation} {key!r} in {self.storage}: {reason}.", remedy)


def _wrong_region(response: dict[str, Any]) -> str:
    headers = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    region = response.get("Error", {}).get("Region") or headers.get("x-amz-bucket-region")
    return f"the bucket is in region {region!r}" if region else "the bucket is in another region"


def _is_transient(error: BaseException) -> bool:
    import aiohttp
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError

    kinds = (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, boto.FlexibleChecksumError)
    return isinstance(
        error, (*kinds, ResponseParserError, aiohttp.ClientError, asyncio.TimeoutError, OSError)
    )


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
