"""Flow parameters: validated and coerced by their annotations, with pydantic where it has something to do."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, get_type_hints

from .._errors import ConfigurationError, ParameterError

# A value of exactly these types is valid as it is, so that pydantic (0.1 s to import) is not asked.
_EXACT = frozenset({str, int, float, bool, bytes, type(None)})


class Validator:
    """Validates the bound parameters of one flow. Models are made when first needed, away from the loop."""

    def __init__(self, fn: Callable[..., Any], signature: inspect.Signature, name: str) -> None:
        self._fn = fn
        self._signature = signature
        self._name = name
        self._adapters: dict[str, Any] | None = None
        self._hints: dict[str, Any] | None = None

    def accepts(self, parameters: dict[str, Any]) -> bool:
        """Whether all parameters are valid as they are, which costs no model."""
        if self._hints is None:
            self._hints = self._read_hints()
        hints = self._hints
        return all(self._is_plain(hints.get(name, Any), value) for name, value in parameters.items())

    @property
    def is_ready(self) -> bool:
        """Whether the models are made."""
        return self._adapters is not None

    def _read_hints(self) -> dict[str, Any]:
        fn: Any = self._fn
        while isinstance(fn, partial):
            fn = fn.func
        if not inspect.isroutine(fn) and not isinstance(fn, type):
            fn = type(fn).__call__  # an object that is called
        try:
            hints = get_type_hints(fn, include_extras=True)
        except NameError as error:
            raise ConfigurationError(
                f"Flow {self._name!r} cannot validate its parameters: {error}.",
                "Import the annotation's names at module level, or set validate_parameters=False.",
            ) from error
        for name, parameter in self._signature.parameters.items():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                hints.pop(name, None)
        return hints

    @staticmethod
    def _is_plain(hint: Any, value: Any) -> bool:
        return (
            hint is Any or (hint in _EXACT and type(value) is hint) if isinstance(hint, type) else hint is Any
        )

    def make_ready(self) -> None:
        """Make the models. Costs 0.1 s and reads files where pydantic is not loaded yet: call it in a thread."""
        from pydantic import ConfigDict, PydanticUserError, TypeAdapter

        assert self._hints is not None
        adapters: dict[str, Any] = {}
        for name in self._signature.parameters:
            hint = self._hints.get(name, Any)
            if hint is Any:
                continue
            try:
                adapters[name] = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
            except PydanticUserError:  # the type brings its own configuration
                adapters[name] = TypeAdapter(hint)
        self._adapters = adapters

    def validate(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """The parameters, coerced; defaults too.

        Raises:
            ParameterError: Names every parameter that does not validate, and why.
        """
        from pydantic import ValidationError

        assert self._adapters is not None
        validated: dict[str, Any] = {}
        problems: list[str] = []
        for name, value in parameters.items():
            if name not in self._adapters:
                validated[name] = value
                continue
            try:
                validated[name] = self._adapters[name].validate_python(value)
            except ValidationError as error:
                problems += [_problem(name, each) for each in error.errors(include_url=False)]
        if problems:
            raise ParameterError(self._name, problems)
        return validated


def _problem(name: str, error: Any) -> str:
    path = name + "".join(f"[{part!r}]" for part in error["loc"])
    return f"{path}: {error['msg']}, got {error['input']!r:.80}"
