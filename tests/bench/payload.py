"""Payload of the large bodies: the same bytes at both ends, so that both can verify what they receive."""

import hashlib
import random
from collections.abc import Iterator
from functools import cache

BLOCK = 256 * 1024  # bytes
MIB = 1024 * 1024  # bytes

_NOISE = random.Random(1).randbytes(BLOCK - 8)


def blocks(mib: int) -> Iterator[bytes]:
    """Yield `mib` MiB in numbered blocks, so that a lost, repeated or reordered block changes the digest."""
    for number in range(mib * MIB // BLOCK):
        yield number.to_bytes(8, "big") + _NOISE


@cache
def digest_of(mib: int) -> str:
    """Return the SHA-256 of `mib` MiB of payload."""
    digest = hashlib.sha256()
    for block in blocks(mib):
        digest.update(block)
    return digest.hexdigest()
