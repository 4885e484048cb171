"""The kinds of optional libraries: each library's module here is imported when a value or a record needs it."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

from .kinds import Kind, Unreadable


class _Library(NamedTuple):
    module: str
    """Has `KINDS`, and `kind_of(value)`, the kind that serves a value of the library, None for none."""
    codes: dict[str, int]
    """Of its kinds, by their names; known without importing it."""


_LIBRARIES = {
    "numpy": _Library("arrays", {"ndarray": 40, "scalar": 41, "dtype": 42}),
    "pyarrow": _Library(
        "arrow", {"arrowtable": 48, "arrowbatch": 49, "arrowarray": 50, "arrowchunks": 51}
    ),
    "polars": _Library("polars", {"polarsframe": 56, "polarsseries": 57}),
    "pandas": _Library(
        "pandas", {"frame": 64, "series": 65, "index": 66, "pandasarray": 67, "pandasscalar": 68}
    ),
}  # fmt: skip
CODES = {name: code for library in _LIBRARIES.values() for name, code in library.codes.items()}
_NAMES = {code: name for name, library in _LIBRARIES.items() for code in library.codes.values()}


def library_kind(value: object) -> Kind | None:
    """The kind that serves a value of one of the libraries, None where there is none."""
    library = _LIBRARIES.get(type(value).__module__.partition(".")[0])
    return library and _load(library).kind_of(value)


def library_kinds(code: int) -> dict[int, Kind]:
    """All kinds of the library that has the kind with this extension type; none where no library has it.

    Raises:
        Unreadable: The library is not installed.
    """
    name = _NAMES.get(code)
    if name is None:
        return {}
    try:
        kinds = _load(_LIBRARIES[name]).KINDS
    except ImportError as error:
        raise Unreadable(f"it holds {name} values, and {name} is not installed") from error
    return {kind.code: kind for kind in kinds}


def _load(library: _Library) -> Any:
    return import_module(f".{library.module}", __package__)
