"""Streaming decompression of gzip documents (RFC 1952), with bounded memory and a limit against bombs."""

import zlib
from collections.abc import Iterator

from proxy.errors import BadGzip, GzipBomb

# ID1 and ID2 of RFC 1952 section 2.3.1.
MAGIC = b"\x1f\x8b"
CHUNK = 64 * 1024  # bytes of the largest chunk that is yielded
# Measured: zeros compress to 1029:1 with zlib at level 9, so a bomb is well above this limit.
MAX_RATIO = 200  # bytes out for one in; tables of numbers reach 20, and deflate at most 1032
# Small documents may have any ratio: 64 MiB harm nobody, since they are streamed and never held.
BOMB_THRESHOLD = 64 * 1024 * 1024  # bytes out that are accepted whatever the ratio

# Bytes fed at a time. At the end of each member zlib copies the rest of its input into `unused_data`: many small
# members in one large chunk would take quadratic time.
_SLICE = 16 * 1024


class Gunzip:
    """Decompresses one document: `feed` each chunk, then call `end`."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
        self._bytes_in = self._bytes_out = 0

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the decompressed data in chunks of at most CHUNK bytes; raise BadGzip or GzipBomb."""
        for begin in range(0, len(data), _SLICE):
            rest = data[begin : begin + _SLICE]
            # Counted before its output: the ratio would be too high otherwise, by up to one slice.
            self._bytes_in += len(rest)
            for chunk in self._decompress(rest):
                self._bytes_out += len(chunk)
                # Before the `yield`: a chunk beyond the limit is not sent.
                if self._bytes_out > max(BOMB_THRESHOLD, self._bytes_in * MAX_RATIO):
                    raise GzipBomb(
                        "the document decompresses to far too much",
                        "Fetch it without decompress=1, and examine it with care.",
                    )
                yield chunk

    def end(self) -> None:
        """Raise BadGzip where the document is cut off."""
        # zlib reports no error for input that ends too early; only `eof` tells (Python's zlib.Decompress.eof).
        if not self._member.eof:
            raise _invalid_gzip("ends too early")

    def _decompress(self, data: bytes) -> Iterator[bytes]:
        while True:
            if self._member.eof:
                data = data.lstrip(b"\0")  # zero padding between or after members, which gzip(1) accepts too
                if not data:
                    return
                # A gzip file is one or more members (RFC 1952 section 2.2).
                self._member = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
            try:
                # The second argument is a limit, not a size: without it one call would return all of a bomb in memory.
                # What it does not read is in `unconsumed_tail`.
                chunk = self._member.decompress(data, CHUNK)
            except zlib.error as exc:
                raise _invalid_gzip("is damaged") from exc
            if chunk:
                yield chunk
            if self._member.eof:
                data = self._member.unused_data
            else:
                data = self._member.unconsumed_tail
                if not data:
                    return  # data left inside zlib comes out with the 8-byte trailer, which is still to be read


def _invalid_gzip(what: str) -> BadGzip:
    return BadGzip(f"the document {what}", "Fetch it without decompress=1, or ask Amazon for it again.")
