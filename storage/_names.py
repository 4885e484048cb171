"""The one way from a key, which is any text, to a name that every file system and bucket takes, and back.

A key that is safe as a name is its own name. Any other is percent-encoded in UTF-8, character by character,
so that the way back is certain and keys with a common beginning have names with one. What would grow beyond
200 bytes is named by its alias, `~` and the SHA-256 of the key: there is no way back from that, so the alias
stands for the key, and a key that looks like an alias denotes it.

Names are compared by their bytes. On a file system that folds case (macOS, Windows) two keys that differ in
case only share a file; records carry their true key and are checked against it.
"""

from __future__ import annotations

import hashlib
import re
from urllib.parse import quote_from_bytes, unquote_to_bytes

LONGEST = 200
"""Bytes of the longest name: file systems take 255, and temporary names and suffixes want some of it."""

# Windows opens the device whatever stands behind the dot, so the stem decides. Shared folders and archives
# travel, hence the rule holds everywhere.
_DEVICE = r"(?i:con|prn|aux|nul|com[0-9]|lpt[0-9])"
_DEVICE_STEM = re.compile(rf"({_DEVICE}) *(?:\.|\Z)", re.ASCII)
_SAFE = re.compile(
    rf"(?!{_DEVICE} *(?:\.|\Z))[A-Za-z0-9_\-=+@,](?:[A-Za-z0-9_\-.=+@, ]*[A-Za-z0-9_\-=+@,])?", re.ASCII
)
_ALIAS = re.compile(r"~[0-9a-f]{64}", re.ASCII)
_ALIAS_BEGINNING = re.compile(r"~[0-9a-f]{0,64}", re.ASCII)

_is_safe = _SAFE.fullmatch

HIDDEN = "\0onceflow:"
"""What keys of onceflow's own notes begin with. Their names begin with a dot, and no listing shows them."""


def name_of(key: str) -> str:
    """The safe, unique name of a key: the key itself where it can be, else its encoding, else its alias.

    Two keys have one name only if one of them is the alias of the other. A key of 64 hex digits costs 0.3 µs.

    Raises:
        TypeError: The key is no text.
        ValueError: The key is empty.
    """
    try:
        if _is_safe(key) and len(key) <= LONGEST:
            return key
    except TypeError:  # asked for only here, because a test beforehand costs half of the rest
        raise TypeError(f"A storage key is text, and {key!r} is of type {type(key).__name__}.") from None
    if not key:
        raise ValueError("A storage key must not be empty. Give the object a name, such as 'report'.")
    if _ALIAS.fullmatch(key):
        return key
    if key.startswith(HIDDEN) and _is_safe(note := key[len(HIDDEN) :]):
        return f".{note}"
    name = _encode(key)
    if len(name) <= LONGEST:
        return name
    return "~" + hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def key_of(name: str) -> str:
    """The key that has this name; of an alias, the alias.

    Raises:
        ValueError: No key has this name, so the file or object is not one of ours.
    """
    if _is_safe(name) and len(name) <= LONGEST:
        return name
    if _ALIAS.fullmatch(name):
        return name
    try:
        key = unquote_to_bytes(name).decode("utf-8", "surrogatepass")
        if name_of(key) == name:
            return key
    except ValueError:
        pass  # not UTF-8, or empty: told below in the words of this function
    raise ValueError(f"{name!r} is not the name of a storage key.")


def name_prefix(prefix: str) -> str:
    """What the names of all keys with this prefix begin with, as long as it is certain; aliases apart.

    A listing asks the store for it and then compares keys: it may match more than the prefix, never less.
    """
    if not prefix or _ALIAS_BEGINNING.fullmatch(prefix):
        return ""  # an alias keeps its `~`, any other key has it encoded
    stem = prefix.rstrip(" ")
    if "." not in prefix and _DEVICE_STEM.fullmatch(stem):
        return _quote(stem[:-1])  # `CON` would have its last letter encoded, `CONTROL` would not
    if len(prefix) > 1 and prefix[-1] in ". ":
        # Encoded at the end of a key, plain inside of one. What precedes it is inside in any case.
        return _encode(prefix + "x")[:-2]
    return _encode(prefix)


def _encode(key: str) -> str:
    head = tail = ""
    if key[0] in ". ":  # hidden files are ours, and some tools strip blanks
        head, key = f"%{ord(key[0]):02X}", key[1:]
    elif device := _DEVICE_STEM.match(key):
        last = device.end(1)
        head, key = f"{key[: last - 1]}%{ord(key[last - 1]):02X}", key[last:]
    if key and key[-1] in ". ":  # Windows drops them
        key, tail = key[:-1], f"%{ord(key[-1]):02X}"
    return head + _quote(key) + tail


def _quote(text: str) -> str:
    # `~` marks an alias, and urllib holds it for safe whatever it is told.
    return quote_from_bytes(text.encode("utf-8", "surrogatepass"), safe="=+@, ").replace("~", "%7E")
