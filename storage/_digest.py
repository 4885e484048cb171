"""The digest of a record's payload: SHA-256, over CRC-32 pieces where it is large and unsigned.

A payload of up to 1 MiB is digested by SHA-256 as a whole. A larger one is cut into pieces of 1 MiB (a new
segment begins a new piece), each piece gets a check of its own, and SHA-256 over the checks is the digest.
The check is SHA-256 in a signed record, so that nobody without the key can change a bit. In an unsigned one
it is CRC-32, because whoever can forge an unsigned record can digest it anew as well: what is left to find
is damage, and CRC-32 finds every burst of up to 32 bits for certain and the rest but for one in 2³² a piece.

The reason is time: SHA-256 was measured at 1.0-1.1 GiB/s on a core with SHA instructions, which is as slow as
writing *and* syncing the file; CRC-32 at 2 GiB/s. The pieces also let several cores work, and let a reader
check the first ones while the last ones are still being read. Both functions release the GIL.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

from ._storage import Buffer

PIECE = 1 << 20
_PARALLEL = 8 * PIECE  # below this, starting threads costs more than they save
_THREADS = min(4, os.cpu_count() or 1)


def _crc32(piece: Buffer) -> bytes:
    return zlib.crc32(piece).to_bytes(4, "big")


def _sha256(piece: Buffer) -> bytes:
    return sha256(piece).digest()


def small_digest(segments: Sequence[Buffer]) -> bytes:
    """SHA-256 over the segments, one after the other."""
    if len(segments) == 1:
        return sha256(segments[0]).digest()
    digest = sha256()
    for segment in segments:
        digest.update(segment)
    return digest.digest()


class PayloadDigest:
    """The digest of a payload that may still be on its way into its buffers.

    `advance(n)` digests the pieces that lie wholly within the first n bytes, so that a thread can follow
    another one that reads; `finish()` digests the rest, on several cores if it is large.

    Args:
        segments: Byte views of the payload's segments.
        ends: For each segment, where in the payload it ends, in bytes.
        signed: Whether the record is signed, which decides the check of a piece.
    """

    def __init__(self, segments: Sequence[Buffer], ends: Sequence[int], *, signed: bool) -> None:
        self._segments = segments
        self._small = sum(map(len, segments)) <= PIECE
        self._check: Callable[[Buffer], bytes] = _sha256 if signed else _crc32
        self._checks: list[bytes] = []
        self._pieces: list[tuple[int, memoryview]] = [] if self._small else list(_cut(segments, ends))

    def advance(self, ready: int) -> None:
        """Digest what lies wholly before byte `ready` of the payload and was not digested yet."""
        for end, piece in self._pieces[len(self._checks) :]:
            if end > ready:
                break
            self._checks.append(self._check(piece))

    def finish(self) -> bytes:
        """The digest; every byte of the payload must be there now."""
        if self._small:
            return small_digest(self._segments)
        rest = [piece for _, piece in self._pieces[len(self._checks) :]]
        if _THREADS > 1 and sum(map(len, rest)) >= _PARALLEL:
            with ThreadPoolExecutor(_THREADS, "onceflow-digest") as pool:
                self._checks.extend(pool.map(self._check, rest))
        else:
            self._checks.extend(map(self._check, rest))
        return sha256(b"".join(self._checks)).digest()


def _cut(segments: Sequence[Buffer], ends: Sequence[int]) -> list[tuple[int, memoryview]]:
    pieces = []
    for segment, end in zip(segments, ends, strict=True):
        view, start = memoryview(segment), end - len(segment)
        for at in range(0, len(view), PIECE):
            piece = view[at : at + PIECE]
            pieces.append((start + at + len(piece), piece))
    return pieces
