"""Content codings of short response bodies (RFC 9110 section 8.4)."""

import zlib


def decompress(body: bytes, coding: str, limit: int) -> bytes:
    """Return `body` without its content coding, at most `limit` bytes of it; empty where it cannot be decoded."""
    if not coding or coding.lower() == "identity":
        return body
    try:
        # 32: detect the gzip or zlib header.
        return zlib.decompressobj(wbits=zlib.MAX_WBITS | 32).decompress(body, limit)
    except zlib.error:
        return b""
