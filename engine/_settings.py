"""Settings: one frozen dataclass, read from `ONCEFLOW_*`, `.env` and `[tool.onceflow]`.

`Settings` itself is plain, so that importing it costs nothing; pydantic-settings (0.15–0.3 s to import) reads
and validates, and is loaded only where something is set at all.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..storage._serializers import serializer_by_name
from ._errors import SettingsError, closest

PREFIX = "ONCEFLOW_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What can be set from outside. Times are seconds, sizes bytes.

    The environment wins over `.env`, that over `[tool.onceflow]` in the pyproject.toml of the working
    folder, that over the defaults. An unknown key is an error with a suggestion.
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
    results_signing_key: str | None = None
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


NAMES = tuple(field.name for field in fields(Settings))
# Read by the tests, by the chaos runs and by log handlers, not by the engine.
_FOREIGN = ("ONCEFLOW_TEST_",)


def _environment() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if name.upper().startswith(PREFIX) and not name.upper().startswith(_FOREIGN)
    }


def stamp() -> tuple[tuple[str, str], ...]:
    """What of the environment the settings depend on; cheap enough to compare at the start of each root run."""
    return tuple(sorted(_environment().items()))


def _table() -> dict[str, Any]:
    """`[tool.onceflow]` of the working folder's pyproject.toml."""
    path = Path("pyproject.toml")
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    if "tool.onceflow" not in text:
        return {}
    import tomllib

    try:
        table = tomllib.loads(text).get("tool", {}).get("onceflow", {})
    except tomllib.TOMLDecodeError as error:
        raise SettingsError("pyproject.toml", f"cannot be read: {error}.", "Mend it.") from error
    for name in table:
        _check(f"[tool.onceflow] {name}", name)
    return dict(table)


def _check(shown: str, name: str) -> None:
    if name.lower() not in NAMES:
        known = [n.upper() if shown.startswith(PREFIX) else n for n in NAMES]
        near = closest(name.upper() if shown.startswith(PREFIX) else name, known)
        if shown.startswith(PREFIX):
            near = near.replace("'", f"'{PREFIX}", 1)
        raise SettingsError(shown, f"is not a setting of onceflow.{near}", "Remove it or mend its name.")


def _load(environment: Mapping[str, str]) -> Settings:
    for shown in environment:
        _check(shown, shown[len(PREFIX) :])
    from pydantic import ValidationError
    from pydantic_settings import SettingsError as SourceError

    model = _model()
    try:
        values = model(**_Pyproject.values(environment)).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "?"
        if first["type"] == "extra_forbidden":
            _check(f"{PREFIX}{name.upper()}" if not name.upper().startswith(PREFIX) else name.upper(), name)
        raise SettingsError(
            f"{PREFIX}{name.upper()}", f"cannot be {first.get('input')!r}: {first['msg']}.", "Mend its value."
        ) from error
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


class _Pyproject:
    """The lowest source: what the table says of settings that neither the environment nor `.env` names."""

    @staticmethod
    def values(environment: Mapping[str, str]) -> dict[str, Any]:
        named = {name[len(PREFIX) :].lower() for name in environment} | _dotenv()
        return {name.lower(): value for name, value in _table().items() if name.lower() not in named}


def _dotenv() -> set[str]:
    """The settings that `.env` names."""
    if not os.path.isfile(".env"):
        return set()
    from dotenv import dotenv_values

    named = {name.upper() for name in dotenv_values(".env") if name.upper().startswith(PREFIX)}
    for name in named:
        _check(name, name[len(PREFIX) :])
    return {name[len(PREFIX) :].lower() for name in named}


@lru_cache(maxsize=1)
def _model() -> Any:
    """A pydantic-settings model with the dataclass's fields."""
    from typing import Annotated, Literal, get_type_hints

    from pydantic import AfterValidator, BeforeValidator, Field, create_model
    from pydantic_settings import BaseSettings, SettingsConfigDict

    class Base(BaseSettings):
        model_config = SettingsConfigDict(
            env_prefix=PREFIX, env_file=".env", extra="ignore", case_sensitive=False
        )

    hints = get_type_hints(Settings, globals())  # the class itself says that it lives in the public face
    for name in ("lock_timeout", "grace", "warn_blocking"):
        hints[name] = Annotated[hints[name], BeforeValidator(_seconds)]
    for name, hint in hints.items():
        if hint in (int, float) or name in ("lock_timeout", "grace", "warn_blocking"):
            hints[name] = Annotated[hint, AfterValidator(_not_negative)]
    hints["worker_threads"] = Annotated[int, Field(ge=1)]
    hints["durability"] = Literal["process", "power"]
    hints["logging_level"] = Annotated[str | None, AfterValidator(_level)]
    hints["results_default_serializer"] = Annotated[str, AfterValidator(_serializer)]
    definitions: dict[str, Any] = {
        field.name: (hints[field.name], field.default) for field in fields(Settings)
    }
    return create_model("Settings", __base__=Base, **definitions)


def _not_negative(number: float | None) -> float | None:
    if number is not None and number < 0:
        raise ValueError("it must not be negative")
    return number


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
