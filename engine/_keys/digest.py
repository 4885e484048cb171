"""Digests of inputs: equal for equal values in every process, machine and Python, different otherwise.

This is the face; `encoding` says what the bytes are, `objects` and `arrays` which
types have a key and what belongs to it, `source/meaning` what functions and classes mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from types import FunctionType
from typing import Any

from .._errors import UncacheableInputError
from . import arrow as arrow  # makes itself and its like known to the encoding
from .encoding import SCALARS, Encoder, RefusedError
from .names import is_user_class, is_user_function, type_name
from .objects import register as register
from .source.meaning import code_key, is_warm
from .weight import weighs_much

FORMAT = b"onceflow value 1\n"
"""Begins every digest. A change to any encoding has to change it: no old record is taken for a new one."""


def digest(value: object, *, path: str = "value") -> str:
    """The SHA-256 of the canonical encoding of `value`, 64 hex characters.

    Equal values have equal digests, whatever the process, hash seed, machine, Python version, insertion order
    of dicts, memory layout of arrays, and sharing of objects. Values that differ in anything, their types
    included, have different ones. Nothing is consumed, and no user code runs but `__cache_key__`.

    Streams: large buffers are hashed in place. See `is_heavy` for what should be done off the event loop.

    Args:
        value: What to digest.
        path: What the value is called in an error.

    Raises:
        UncacheableInputError: Something in `value` has no key; the error's path leads to it.
    """
    scalar = SCALARS.get(type(value))
    if scalar is not None:
        return sha256(FORMAT + scalar(value)).hexdigest()
    try:
        return sha256(FORMAT + Encoder(code_key)(value)).hexdigest()
    except RefusedError as error:
        raise UncacheableInputError(path + "".join(reversed(error.trail)), error.type_name) from None
    except RecursionError:
        raise UncacheableInputError(path, f"{type_name(type(value))} nested too deeply") from None


def is_heavy(value: object) -> bool:
    """Whether `digest(value)` belongs off the event loop: a cheap guess, a few microseconds for small values.

    True from about 64 KiB or 1 000 members on, and for functions and classes whose files have yet to be read.
    """
    return weighs_much(value, _reads_files)


def _reads_files(code: Any) -> bool:
    if isinstance(code, type):
        return is_user_class(code)
    function = getattr(code, "__func__", code)
    return isinstance(function, FunctionType) and is_user_function(function) and not is_warm(code)


def digest_inputs(parameters: Mapping[str, object]) -> dict[str, str]:
    """The digest of each argument by its name.

    Raises:
        UncacheableInputError: An argument has no key; the error's path begins with the argument's name.
    """
    return {name: digest(value, path=name) for name, value in parameters.items()}
