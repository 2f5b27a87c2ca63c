"""Decompression of short bodies: bounded, and never an error."""

import gzip

from proxy.request.upstream.content_coding import decompress


def test_a_decompression_bomb_is_cut_at_the_limit() -> None:
    assert len(decompress(gzip.compress(b"0" * 50_000_000, mtime=0), "gzip", 1000)) == 1000
    assert decompress(b"text", "br", 1000) == b""
