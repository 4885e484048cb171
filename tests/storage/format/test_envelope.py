"""The record container: readable by its header alone, and every change is found."""

from __future__ import annotations

import hashlib
import hmac
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onceflow.storage._errors import (
    CorruptRecordError,
    NewerRecordError,
    RecordError,
    SerializationError,
    SignatureError,
)
from onceflow.storage._format.digest import PIECE
from onceflow.storage._format.envelope import (
    ALIGNMENT,
    MAGIC,
    PREFIX_SIZE,
    Header,
    check_payload,
    header_size,
    pack,
    split,
    unpack_header,
)
from onceflow.storage._storage import Buffer

GOLDEN = Path(__file__).parents[1] / "golden"
KEY, OLD_KEY = b"k" * 32, b"old key"


def header(**changes: Any) -> Header:
    """A header with something in every field."""
    full = Header(
        key="a/ünï key",
        created=1_700_000_000.125,
        expires_at=1_700_000_600.0,
        serializer="msgpack",
        run_id="run-1",
        task="fetch",
        components={"inputs": "ab12", "source": "cd34"},
        token=2**60,
        location="elsewhere",
        extra={"lease": 30.5, "holder": "me", "prev": b"\0\1", "list": [1, {"a": None}]},
    )
    return replace(full, **changes)


def packed(head: Header, segments: list[Buffer], *keys: bytes) -> bytes:
    return b"".join(pack(head, segments, signing_keys=keys))


def opened(data: Buffer, *keys: bytes, **options: Any) -> tuple[Header, list[memoryview]]:
    """The whole of what a reader does before it decodes the value."""
    head, offset = unpack_header(data, signing_keys=keys, **options)
    segments = split(head, memoryview(data)[offset:])
    check_payload(head, segments)
    return head, segments


@pytest.mark.parametrize("keys", [(), (KEY,)])
@pytest.mark.parametrize(
    "segments",
    [[], [b""], [b"one"], [b"one", b"two" * 50, b""], [b"tree", bytearray(3 * PIECE + 5), b"x" * PIECE]],
)
def test_a_record_comes_back_as_it_was_packed(segments: list[Buffer], keys: tuple[bytes, ...]) -> None:
    """S7: header and payload survive, signed and unsigned, empty, small and large."""
    head = header()
    data = packed(head, segments, *keys)
    back, parts = opened(data, *keys, require_signature=bool(keys))
    assert asdict(back) == asdict(head)
    assert [bytes(part) for part in parts] == [bytes(segment) for segment in segments]
    assert back.signed is bool(keys)
    assert back.payload_size == len(data) - header_size(data)


@given(
    st.builds(
        Header, key=st.text(min_size=1), created=st.floats(allow_nan=False), serializer=st.text(),
        components=st.dictionaries(st.text(), st.text()), token=st.none() | st.integers(0, 2**63),
        location=st.none() | st.text(), extra=st.dictionaries(st.text(), st.integers(-5, 5) | st.binary()),
    ),
    st.lists(st.binary(max_size=200), max_size=5),
)  # fmt: skip
def test_any_header_survives(head: Header, segments: list[Buffer]) -> None:
    """S7: any text, also lone surrogates, any sizes."""
    back, parts = opened(packed(head, segments))
    assert asdict(back) == asdict(head)
    assert [bytes(part) for part in parts] == segments


def test_surrogates_may_be_in_a_key() -> None:
    """B30: a key that is no UTF-8 is a key all the same."""
    assert opened(packed(Header("\ud800"), []))[0].key == "\ud800"


def test_the_header_is_readable_alone() -> None:
    """B18: a range read of the beginning tells all but the value, and how long that range must be."""
    data = packed(header(), [b"payload" * 1000])
    assert header_size(data[:10]) == PREFIX_SIZE
    need = header_size(data[:PREFIX_SIZE])
    assert unpack_header(data[:need])[0].segments == (7000,)
    with pytest.raises(CorruptRecordError, match=f"ends within its header, at byte {need - 1} of {need}"):
        unpack_header(data[: need - 1])


def test_segments_are_passed_on_uncopied_and_aligned() -> None:
    """W7: `pack` returns the segments themselves; in the object each begins at a multiple of 64 bytes."""
    array = np.arange(1000.0)
    segments: list[Buffer] = [b"tree", array.data, b"b" * 77, bytearray(5)]
    head = header()
    parts = pack(head, segments)
    assert any(part is segments[2] for part in parts)
    assert any(
        np.shares_memory(np.frombuffer(part, "u1"), array) for part in parts if len(part) == array.nbytes
    )
    data = b"".join(parts)
    _, offset = unpack_header(data)
    assert [(offset + start) % ALIGNMENT for start, _ in head.ranges()] == [0, 0, 0, 0]
    assert head.frozen == (2,)
    assert bytes(opened(data)[1][1]) == array.tobytes()


def test_each_packing_has_its_own_nonce() -> None:
    """A writer can tell its own write from an equal one by another."""
    head = header()
    nonces = {opened(packed(head, [b"x"]))[0].nonce for _ in range(100)}
    assert len(nonces) == 100
    assert head.nonce in nonces


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize("keys", [(), (KEY,)])
@pytest.mark.parametrize("segments", [[b"one segment"], [b"tree", b"second", b""]])
def test_every_flipped_bit_of_a_record_is_found(segments: list[Buffer], keys: tuple[bytes, ...]) -> None:
    """B19: no single bit of a record can change unnoticed, gaps included."""
    data = packed(header(), segments, *keys)
    for bit in range(len(data) * 8):
        with pytest.raises(RecordError):
            opened(flipped(data, bit), *keys)


@settings(max_examples=30, deadline=None)
@given(st.data(), st.sampled_from([(), (KEY,)]))
def test_flipped_bits_of_a_large_record_are_found(data: st.DataObject, keys: tuple[bytes, ...]) -> None:
    """B19: the same for payloads that are digested by the piece."""
    record = packed(header(), [b"tree", LARGE], *keys)
    bit = data.draw(st.integers(0, len(record) * 8 - 1))
    with pytest.raises(RecordError):
        opened(flipped(record, bit), *keys)


LARGE = random.Random(5).randbytes(PIECE + 12345)


def test_torn_and_foreign_bytes_are_corrupt() -> None:
    """B19: every proper beginning of a record, and anything that is none, is a CorruptRecordError."""
    data = packed(header(), [b"tree", b"second"])
    for end in range(len(data)):
        with pytest.raises(CorruptRecordError):
            opened(data[:end])
    for foreign in (b"", b"\0" * 500, b"{}", b"PK\3\4" * 50, b"ONC" * 99, data + b"\0", data[1:]):
        with pytest.raises(CorruptRecordError):
            opened(foreign)
    with pytest.raises(CorruptRecordError, match="does not begin like one"):
        header_size(b"foreign")
    with pytest.raises(CorruptRecordError, match="more than any record has"):
        header_size(data[:6] + b"\xff" * 4 + data[10:])


def test_a_newer_format_says_so() -> None:
    """A record of a later format version is no corrupt one: the error says to upgrade."""
    data = packed(header(), [b"x"])
    with pytest.raises(NewerRecordError, match="format version 2"):
        unpack_header(data[:4] + b"\2" + data[5:])


def retagged(fields: Any, payload: bytes = b"") -> bytes:
    """A record with a valid tag around any header: what a foreign program could write."""
    body = msgpack.packb(fields)
    start = MAGIC + b"\1\0" + len(body).to_bytes(4, "big") + bytes(8)
    return bytes(start + hashlib.sha256(start + body).digest() + body + payload)


def fields_of(data: bytes) -> list[Any]:
    fields: list[Any] = msgpack.unpackb(data[PREFIX_SIZE : header_size(data)])
    return fields


def test_fields_of_a_newer_minor_writer_are_kept() -> None:
    """A header with more fields than we know is read, and they are still there when it is packed again."""
    data = packed(header(), [b"x"])
    head, _ = opened(retagged([*fields_of(data), "new", {"er": 1}], b"x"))
    assert head.unknown == ("new", {"er": 1})
    assert opened(packed(head, [b"y"]))[0].unknown == ("new", {"er": 1})


def test_a_header_with_a_valid_tag_and_wrong_fields_is_corrupt() -> None:
    """Whatever a foreign writer puts into a header, reading it raises nothing but a RecordError."""
    good = fields_of(packed(header(), [b"x"]))
    junk = [None, 1, -1, 2**63, 1.5, "x", b"x", [], [None], [-1], [True], ["x"], {}, {1: 2}]
    cases: list[Any] = [*junk, good[:5], []]
    cases += [[*good[:index], item, *good[index + 1 :]] for index in range(len(good)) for item in junk]
    unread = 0
    for case in cases:
        try:
            opened(retagged(case, b"x"))
        except RecordError:
            unread += 1
    assert unread > 120


def test_signatures() -> None:
    """B14: unsigned, wrongly signed and changed records are refused; any of several keys verifies."""
    plain, signed = packed(header(), [b"x"]), packed(header(), [b"x"], KEY)
    assert opened(signed, OLD_KEY, KEY)[0].signed
    assert opened(packed(header(), [b"x"], OLD_KEY), KEY, OLD_KEY)[0].signed
    assert not opened(plain, KEY)[0].signed
    for data, keys, options in [
        (plain, (KEY,), {"require_signature": True}),
        (signed, (OLD_KEY,), {}),
        (signed, (), {}),
        (signed[:60] + b"!" + signed[61:], (KEY,), {}),
    ]:
        with pytest.raises(SignatureError, match="ONCEFLOW_RESULTS_SIGNING_KEY"):
            opened(data, *keys, **options)
    with pytest.raises(ValueError, match="must not be empty"):
        pack(header(), [], signing_keys=[b""])


def test_the_signature_covers_the_payload_of_any_size() -> None:
    """No payload of the same XXH3 can be slipped under a signed header: its pieces have SHA-256 checks."""
    data = bytearray(packed(header(), [LARGE], KEY))
    head, offset = unpack_header(data, signing_keys=[KEY])
    pieces = [hashlib.sha256(LARGE[at : at + PIECE]).digest() for at in range(0, len(LARGE), PIECE)]
    assert head.digest == hashlib.sha256(b"".join(pieces)).digest()
    key_id = hmac.digest(KEY, b"onceflow key id", "sha256")[:8]
    assert bytes(data[10:18]) == key_id
    assert bytes(data[18:50]) == hmac.digest(KEY, bytes(data[:18] + data[50:offset]), "sha256")


def test_a_header_takes_plain_values_only() -> None:
    """What a protocol may put into `extra` is checked when it is packed, with an error that says so."""
    with pytest.raises(SerializationError, match="extra fields take plain values only"):
        pack(header(extra={"a": object()}), [])
    with pytest.raises(SerializationError, match="bytes are more than"):
        pack(header(extra={"a": bytes(17 << 20)}), [])


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("record-v*.bin")), ids=lambda path: path.stem)
def test_records_of_every_format_version_are_read(path: Path) -> None:
    """S7: a record once written is readable for ever: these files are never written again."""
    head, segments = opened(path.read_bytes(), KEY)
    assert (head.key, head.created, head.expires_at) == ("a/ünï key", 1_700_000_000.125, 1_700_000_600.0)
    assert (head.token, head.location, head.kind) == (2**60, "elsewhere", "record")
    assert head.extra == header().extra
    assert head.components == header().components
    assert head.signed is ("signed" in path.stem.split("-"))
    assert [bytes(part) for part in segments] == [b"tree", b"a buffer" * 10]
