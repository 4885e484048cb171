"""The digest of a record's payload: SHA-256, or XXH3 where it is large and unsigned.

A payload of up to 1 MiB is digested by SHA-256 as a whole. A larger one in a signed record is cut into pieces of
1 MiB (a new segment begins a new piece), and SHA-256 over the SHA-256 of each is the digest, so that several cores
work on it, and nobody without the key can change a bit.

In an unsigned record XXH3-128 serves as well, because whoever can forge such a record can digest it anew: what is
left to find is damage, and that it misses once in 2^128. The reason is time. SHA-256 was measured at 1.0 GiB/s on a
core with SHA instructions, which is as slow as writing *and* syncing the file, zlib's CRC-32 at 1.0 to 2 GiB/s,
XXH3 at 11 GiB/s. All of them release the GIL.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

from xxhash import xxh3_128

from .._storage import Buffer

PIECE = 1 << 20
_PARALLEL = 8 * PIECE  # below this, starting threads costs more than they save
_THREADS = min(4, os.cpu_count() or 1)


def payload_digest(segments: Sequence[Buffer], *, signed: bool) -> bytes:
    """The digest of a payload's segments, as its header keeps it: 32 bytes of SHA-256, or 16 of XXH3.

    On the calling thread, and for signed payloads from 8 MiB on, on up to three more: 1 µs for 100 bytes.
    """
    if sum(map(len, segments)) > PIECE:
        return _sha256_of_pieces(segments) if signed else _xxh3(segments)
    digest = sha256()
    for segment in segments:
        digest.update(segment)
    return digest.digest()


def _xxh3(segments: Sequence[Buffer]) -> bytes:
    digest = xxh3_128()
    for segment in segments:
        digest.update(segment)
    return digest.digest()


def _sha256_of_pieces(segments: Sequence[Buffer]) -> bytes:
    pieces = list(_cut(segments))
    if _THREADS > 1 and len(pieces) * PIECE >= _PARALLEL:
        with ThreadPoolExecutor(_THREADS, "onceflow-digest") as pool:
            checks = list(pool.map(_sha256, pieces))
    else:
        checks = list(map(_sha256, pieces))
    return sha256(b"".join(checks)).digest()


def _sha256(piece: Buffer) -> bytes:
    return sha256(piece).digest()


def _cut(segments: Sequence[Buffer]) -> Iterator[memoryview]:
    for segment in segments:
        view = memoryview(segment)
        for at in range(0, len(view), PIECE):
            yield view[at : at + PIECE]
