"""How is a gzip document unpacked while it streams, however large it is and whatever somebody packed into it?

In pieces of a bounded size, so that no memory grows with the document (RFC 1952). What unpacks to far more than any
report does is given up: it is meant to fill somebody's disk.
"""

import zlib
from collections.abc import Iterator

from proxy.errors import BadGzip, GzipBomb

MAGIC = b"\x1f\x8b"
CHUNK = 64 * 1024  # bytes of the largest piece that is given
MAX_RATIO = 200  # bytes out for one in; tables of numbers come to 20, and deflate ends at a thousand
BOMB_THRESHOLD = 64 * 1024 * 1024  # bytes out that nobody minds, whatever the ratio

_SLICE = 16 * 1024  # bytes that are unpacked at a time: each member's end copies what is behind it


class Gunzip:
    """Unpacks one document: `feed` it what comes, then say that this was the `end`."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
        self._taken = self._given = 0

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield what these bytes unpack to, piece by piece; raise BadGzip or GzipBomb."""
        for begin in range(0, len(data), _SLICE):
            rest = data[begin : begin + _SLICE]
            self._taken += len(rest)
            for chunk in self._unpacked(rest):
                self._given += len(chunk)
                if self._given > max(BOMB_THRESHOLD, self._taken * MAX_RATIO):
                    raise GzipBomb("the document unpacks to far too much", "Fetch it packed, and look at it with care.")
                yield chunk

    def end(self) -> None:
        """Raise BadGzip where the document is not at its end."""
        if not self._member.eof:
            raise _invalid_gzip("ends too early")

    def _unpacked(self, data: bytes) -> Iterator[bytes]:
        while True:
            if self._member.eof:
                data = data.lstrip(b"\0")  # padding, as gzip itself allows it
                if not data:
                    return
                self._member = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)  # another member follows
            try:
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
                    return  # what may be left inside comes out with the trailer, which is still to be read


def _invalid_gzip(what: str) -> BadGzip:
    return BadGzip(f"the document {what}", "Fetch it without decompress=1, or ask Amazon for it again.")
