"""Settings: one frozen dataclass, read from `ONCEFLOW_*`, `.env` and `[tool.onceflow]`.

`Settings` itself is plain, so that importing it costs nothing; pydantic-settings (0.15–0.3 s to import) reads
and validates, and is loaded only where something is set at all.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from ..locking import lock_manager_from_url
from ..storage import storage_from_url
from ..storage._values.serializers import serializer_by_name
from ._concurrency.limits import check_size
from ._errors import SettingsError, closest

PREFIX = "ONCEFLOW_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What can be set from outside. Times are seconds, sizes bytes.

    The environment wins over `.env`, that over `[tool.onceflow]` in the pyproject.toml of the working
    folder, that over the defaults; an empty variable is one that is not set. An unknown key is an error with
    a suggestion.
    """

    storage: str | None = None
    """Where results lie: a path or URL (`file:///…`, `s3://bucket/prefix`, `memory://name`). `~/.onceflow/storage`."""
    key_storage: str | None = None
    """Where records lie when they lie apart from results: a path or URL."""
    locks: str | None = None
    """The lock manager's URL (`redis://…`, `file:///…`, `s3://…`, `memory://name`)."""
    lock_timeout: float | None = None
    """How long a SERIALIZABLE run waits for another holder; for ever by default."""
    durability: str = "process"
    """What local files survive: `process` (kill -9) or `power` (fsync on every write)."""
    results_persist_by_default: bool = False
    """Whether tasks and flows that leave `persist_result` open persist."""
    results_default_serializer: str = "default"
    """The serializer of tasks and flows that name none."""
    results_signing_key: str | None = field(default=None, repr=False)
    """Signs records and lets pickled values travel over shared storage; several, comma-separated, rotate."""
    results_allow_pickle: bool = False
    """Lets unsigned pickled values travel over shared storage."""
    results_memory_bytes: int = 64 * 1024 * 1024
    """How many bytes of records the engine keeps in memory, each validated before it is served; 0 keeps none."""
    tasks_default_persist_result: bool | None = None
    """Whether tasks that leave `persist_result` open persist, whatever their flow says."""
    tasks_default_no_cache: bool = False
    """Gives tasks that state no cache policy the policy NONE."""
    tasks_disable_caching: bool = False
    """Switches caching off for every task, whatever it states."""
    tasks_refresh_cache: bool = False
    """Runs every task again and overwrites its record, unless the task says refresh_cache=False."""
    tasks_default_retries: int = 0
    """The retries of tasks that state none."""
    tasks_default_retry_delay_seconds: float = 0
    """The retry delay of tasks that state none."""
    flows_default_retries: int = 0
    """The retries of flows that state none."""
    flows_default_retry_delay_seconds: float = 0
    """The retry delay of flows that state none."""
    tag_limits: Mapping[str, int] | None = None
    """How many runs with a tag may run at once, as JSON: `{"database": 10}`."""
    worker_threads: int = 40
    """How many synchronous bodies run at once."""
    grace: float = 10
    """How long a closing engine waits for its runs before it cancels them."""
    log_prints: bool = False
    """Whether print() inside tasks and flows that leave `log_prints` open becomes log lines."""
    logging_level: str | None = None
    """Shows onceflow's log lines from this level on, where the program configures no logging itself."""
    warn_blocking: float | None = None
    """Warns of a task that blocks the event loop for longer (`100ms`, `0.5`)."""

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be, also where a program makes its settings itself.

        Raises:
            SettingsError: Names the setting and its value.
        """
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, (int, float)) or not value >= least):
                raise SettingsError(
                    name, f"cannot be {value!r}: it must be a number from {least} on.", "Mend it."
                )

    @classmethod
    def load(cls) -> Settings:
        """The settings of this process, read now.

        Costs a look at `.env` and `pyproject.toml` in the working folder, on the calling thread.

        Raises:
            SettingsError: A key is unknown, or a value cannot be read.
        """
        environment = _environment()
        if not environment and not os.path.isfile(".env") and not _table():
            return Settings()
        return _load(environment)


_LEAST = {
    "lock_timeout": 0,
    "results_memory_bytes": 0,
    "tasks_default_retries": 0,
    "tasks_default_retry_delay_seconds": 0,
    "flows_default_retries": 0,
    "flows_default_retry_delay_seconds": 0,
    "worker_threads": 1,
    "grace": 0,
    "warn_blocking": 0,
}
"""The least that a number may be."""
_URLS: dict[str, Callable[[str], object]] = {
    "storage": storage_from_url, "key_storage": storage_from_url, "locks": lock_manager_from_url,
}  # fmt: skip
_TABLE = "[tool.onceflow]"
_SPEAKS_OF_US = re.compile(rb"""tool["'\s]*\.["'\s]*onceflow|^\s*["']?onceflow["']?\s*[.=]""", re.MULTILINE)
"""TOML is read only where it seems to have our table, in any of the ways to write one."""
NAMES = tuple(field.name for field in fields(Settings))
# Read by the tests, by the chaos runs and by log handlers, not by the engine.
_FOREIGN = ("ONCEFLOW_TEST_",)


def _environment() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if value and name.upper().startswith(PREFIX) and not name.upper().startswith(_FOREIGN)
    }


def stamp() -> tuple[tuple[str, str], ...]:
    """What of the environment the settings depend on; cheap enough to compare at the start of each root run."""
    return tuple(sorted(_environment().items()))


def _table() -> dict[str, Any]:
    """`[tool.onceflow]` of the working folder's pyproject.toml."""
    path = Path("pyproject.toml")
    if not path.is_file():
        return {}
    data = path.read_bytes()
    if not _SPEAKS_OF_US.search(data):
        return {}
    import tomllib

    try:
        table = tomllib.loads(data.decode()).get("tool", {}).get("onceflow", {})
    except ValueError as error:  # no TOML, or no text
        raise SettingsError("pyproject.toml", f"cannot be read: {error}.", "Mend it.") from error
    if not isinstance(table, dict):
        raise SettingsError("[tool.onceflow]", f"cannot be {table!r}: it is a table of settings.", "Mend it.")
    for name in table:
        _check(f"{_TABLE} {name}", name)
    return {name.lower(): value for name, value in table.items()}


def _check(shown: str, name: str) -> None:
    if name.lower() not in NAMES:
        if shown.startswith(_TABLE):
            near = closest(name.lower(), NAMES)
        else:
            near = closest(name.upper(), [name.upper() for name in NAMES]).replace("'", f"'{PREFIX}", 1)
        raise SettingsError(shown, f"is not a setting of onceflow.{near}", "Remove it or mend its name.")


def _load(environment: Mapping[str, str]) -> Settings:
    for shown in environment:
        _check(shown, shown[len(PREFIX) :])
    from pydantic import ValidationError
    from pydantic_settings import SettingsError as SourceError

    table = _values_of_table(environment)
    try:
        values = _model()(**table).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        shown = f"{_TABLE} {name}" if name in table else f"{PREFIX}{name.upper()}"
        problem = first["msg"].removeprefix("Value error, ").rstrip(".")
        given = "used" if name in _URLS else repr(first.get("input"))  # a URL may hold a password
        raise SettingsError(shown, f"cannot be {given}: {problem}.", "Mend its value.") from error
    except SourceError as error:  # text that had to be JSON
        name, given = _not_json(environment)
        raise SettingsError(name, f"cannot be {given!r}: {error.__cause__}.", "Write it as JSON.") from error
    return Settings(**values)


def _not_json(environment: Mapping[str, str]) -> tuple[str, str]:
    """The one setting that is read as JSON, and its text."""
    name = f"{PREFIX}TAG_LIMITS"
    given = {key.upper(): value for key, value in environment.items()}.get(name)
    if given is None:
        from dotenv import dotenv_values

        given = {key.upper(): value for key, value in dotenv_values(".env").items()}.get(name)
    return name, given or ""


def _values_of_table(environment: Mapping[str, str]) -> dict[str, Any]:
    """The lowest source: what the table says of settings that neither the environment nor `.env` names."""
    named = {name[len(PREFIX) :].lower() for name in environment} | _dotenv()
    return {name: value for name, value in _table().items() if name not in named}


def _dotenv() -> set[str]:
    """The settings that `.env` names."""
    if not os.path.isfile(".env"):
        return set()
    from dotenv import dotenv_values

    try:
        values = dotenv_values(".env")
    except UnicodeDecodeError as error:
        raise SettingsError(".env", f"cannot be read: {error}.", "Save it as UTF-8.") from error
    named = {name.upper() for name, value in values.items() if value and name.upper().startswith(PREFIX)}
    for name in named:
        _check(name, name[len(PREFIX) :])
    return {name[len(PREFIX) :].lower() for name in named}


@lru_cache(maxsize=1)
def _model() -> Any:
    """A pydantic-settings model with the dataclass's fields."""
    from typing import Annotated, Literal, get_type_hints

    from pydantic import AfterValidator, BeforeValidator, create_model
    from pydantic_settings import BaseSettings, SettingsConfigDict

    class Base(BaseSettings):
        model_config = SettingsConfigDict(
            env_prefix=PREFIX, env_file=".env", extra="ignore", case_sensitive=False, env_ignore_empty=True
        )

    hints = get_type_hints(Settings, globals())  # the class itself says that it lives in the public face
    for name in ("lock_timeout", "grace", "warn_blocking"):
        hints[name] = Annotated[hints[name], BeforeValidator(_seconds)]
    for name, least in _LEAST.items():
        hints[name] = Annotated[hints[name], AfterValidator(partial(_at_least, least))]
    for name, meaning in _URLS.items():
        hints[name] = Annotated[hints[name], AfterValidator(partial(_means, meaning))]
    limits = hints["tag_limits"]
    hints["tag_limits"] = Annotated[limits, AfterValidator(_tag_limits)]
    hints["durability"] = Literal["process", "power"]
    hints["logging_level"] = Annotated[str | None, AfterValidator(_level)]
    hints["results_default_serializer"] = Annotated[str, AfterValidator(_serializer)]
    definitions: dict[str, Any] = {
        field.name: (hints[field.name], field.default) for field in fields(Settings)
    }
    return create_model("Settings", __base__=Base, **definitions)


def _at_least(least: float, number: float | None) -> float | None:
    if number is not None and not number >= least:  # nan is not
        raise ValueError(f"it must be a number from {least} on")
    return number


def _means(meaning: Callable[[str], object], url: str | None) -> str | None:
    """Make, and drop, what the URL stands for, which opens nothing; what cannot be is a ValueError."""
    if url:
        meaning(url)
    return url


def _tag_limits(limits: Mapping[str, int] | None) -> Mapping[str, int] | None:
    for tag, size in (limits or {}).items():
        check_size(f"the limit of tag {tag!r}", size)
    return limits


def _level(name: str | None) -> str | None:
    if name is not None and name.upper() not in logging.getLevelNamesMapping():
        raise ValueError(f"a level is one of {', '.join(logging.getLevelNamesMapping())}")
    return name


def _serializer(name: str) -> str:
    serializer_by_name(name)
    return name


_UNITS = {"ms": 0.001, "s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}


def _seconds(value: Any) -> Any:
    """`100ms`, `0.5s`, `2min` and plain numbers as seconds."""
    if isinstance(value, str):
        text = value.strip().lower()
        for unit, factor in _UNITS.items():
            number = text.removesuffix(unit)
            if number != text:
                try:
                    return float(number) * factor
                except ValueError:
                    continue
    return value
