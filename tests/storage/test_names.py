"""Names are safe, unique and lead back to their keys."""

from __future__ import annotations

import hashlib
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from onceflow.storage._names import LONGEST, key_of, name_of, name_prefix

# Text of the characters on which the rules turn, and any text at all, lone surrogates included.
tricky = st.text(alphabet="aZ09-_.=+@, %~/\\:*?\"<>|'\0\n\x7fé🦆\ud800CONconLPT1", max_size=12)
anything = st.text(alphabet=st.characters(), max_size=60)
devices = st.sampled_from(["CON", "prn", "Aux", "nul", "com1", "LPT9"]).flatmap(
    lambda stem: st.sampled_from(["", ".", ".txt", " ", " .x", "x", "/"]).map(lambda tail: stem + tail)
)
aliases = st.binary(max_size=8).map(lambda data: "~" + hashlib.sha256(data).hexdigest())
long = st.builds(lambda text, times: text * times, st.text(min_size=1, max_size=5), st.integers(50, 300))
keys = st.one_of(tricky, anything, devices, aliases, long).filter(bool)

ALIAS = re.compile(r"~[0-9a-f]{64}")
SAFE = re.compile(r"[A-Za-z0-9\-_=+@,%~][A-Za-z0-9\-_=+@,%~. ]*", re.ASCII)
DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d) *(\..*)?", re.ASCII | re.IGNORECASE | re.DOTALL)


@pytest.mark.parametrize(
    "key",
    [
        "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "daily report, 2026-11-22.csv",
        "a=1+b@c",
        "-_",
        "_",
        "CONTROL",
        "com",
        "x" * 200,
    ],
)
def test_safe_keys_are_their_names(key: str) -> None:
    """A key that is safe as a name is its own name, so that a person finds the file."""
    assert name_of(key) == key
    assert key_of(key) == key


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("a/b", "a%2Fb"),
        ("..", "%2E%2E"),
        (".hidden", "%2Ehidden"),
        ("end.", "end%2E"),
        ("100%", "100%25"),
        ("~", "%7E"),
        ("é", "%C3%A9"),
        ("\ud800", "%ED%A0%80"),
        ("CON", "CO%4E"),
        ("nul.txt", "nu%6C.txt"),
        ("com1 .x", "com%31 .x"),
        (" ", "%20"),
    ],
)
def test_other_keys_are_encoded(key: str, name: str) -> None:
    """What is not safe is percent-encoded where it is not, and only there."""
    assert name_of(key) == name
    assert key_of(name) == key


def test_long_keys_have_aliases() -> None:
    """A key whose encoding is longer than 200 bytes is named by its SHA-256, and the alias denotes it."""
    for key in ("x" * 201, "é" * 34, "a/" * 1_000_000):
        name = name_of(key)
        assert name == "~" + hashlib.sha256(key.encode()).hexdigest()
        assert name_of(name) == name
        assert key_of(name) == name
    assert name_of("é" * 33) == "%C3%A9" * 33


def test_the_empty_key() -> None:
    """The empty key is refused with a remedy."""
    with pytest.raises(ValueError, match="Give the object a name"):
        name_of("")


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".tmp-1",
        "a/b",
        "%41",
        "%2f",
        "a%",
        "%zz",
        "~",
        "~1",
        "é",
        "end.",
        "CON",
        "x" * 201,
        "%FF",
    ],
)
def test_names_that_are_not_ours(name: str) -> None:
    """A name that no key has is refused, so that a foreign file is never taken for an object."""
    with pytest.raises(ValueError, match="not the name"):
        key_of(name)


@given(keys)
@example("~" + "0" * 64)
@example("~" + "0" * 64 + "\n")
@example("a\n")
def test_names_are_safe(key: str) -> None:
    """Every name is plain ASCII of at most 200 bytes, neither hidden nor a device, without a trailing dot."""
    name = name_of(key)
    assert SAFE.fullmatch(name)
    assert len(name) <= LONGEST
    assert name[-1] not in ". "
    assert not DEVICE.fullmatch(name)


@given(keys)
def test_the_way_back(key: str) -> None:
    """The key comes back from its name, or its alias does, which has the same name."""
    name = name_of(key)
    back = key_of(name)
    assert back == key or (ALIAS.fullmatch(back) and name == back)
    assert name_of(back) == name


@given(keys, keys)
def test_names_are_unique(one: str, other: str) -> None:
    """Two keys have two names, unless one is the other's alias."""
    if one != other and not (ALIAS.fullmatch(one) or ALIAS.fullmatch(other)):
        assert name_of(one) != name_of(other)


@given(keys, st.integers(0, 80))
@example("CON", 3)
@example("CON.txt", 4)
@example("CON .txt", 4)
@example("a. b", 3)
@example(".", 1)
@example("..", 2)
@example("~" + "a" * 64, 3)
def test_prefixes(key: str, length: int) -> None:
    """The name of every listed key with a prefix begins with the prefix's own name prefix."""
    prefix = key[:length]
    name = name_of(key)
    if key_of(name).startswith(prefix):
        assert name.startswith(name_prefix(prefix))


def test_prefixes_are_worth_asking_for() -> None:
    """The name prefix is as long as it can be, so that a store has not to list everything."""
    assert name_prefix("locks/") == "locks%2F"
    assert name_prefix("9f86d08") == "9f86d08"
    assert name_prefix("a.") == "a"
    assert name_prefix(".a") == "%2Ea"
    assert name_prefix("CONTROL") == "CONTROL"
