"""What do the header fields of a request say, whatever its path and its body?

An app sends the same fields over and over. What follows from them is worked out for the first such request; the
steps note it here, and find it for the next one.
"""

from itertools import chain

from multidict import CIMultiDictProxy

# How many heads are remembered over all listeners, and how many bytes of memory they may take: about FIELD_COST for
# each field, beside its own text, of which there are some COPIES.
MAX_HEADS, MAX_BYTES = 2048, 8 * 1024 * 1024
FIELD_COST, COPIES = 700, 4

Raw = tuple[tuple[bytes, bytes], ...]  # names and values as they came


class HeaderBlock:
    """The header fields of all requests that bring the same ones; None stands for what no step has worked out yet.

    `names` are in lower case. `size` is that of the block in bytes, with its separators.
    """

    __slots__ = ("bodiless_lines", "cost", "has_content_length", "headers", "host", "lines", "names", "size")

    def __init__(self, headers: CIMultiDictProxy[str], raw: Raw = ()) -> None:
        self.headers = headers
        self.names = frozenset(map(str.lower, headers))
        self.size = sum(map(len, chain.from_iterable(raw))) + 4 * len(raw)
        self.cost = FIELD_COST * (2 + len(raw)) + COPIES * self.size  # bytes of memory that it takes, about
        self.host: str | None = None  # that the Host field names; by then all that the guard looks at was in order
        # What of them goes to Amazon, as it goes over the wire: with a body, and without one (GET and HEAD).
        self.lines: bytes | None = None
        self.has_content_length = False  # whether there is a Content-Length among these lines
        self.bodiless_lines: bytes | None = None


class HeaderCache:
    """The header fields that came to one listener lately; `listeners` share what may be remembered."""

    def __init__(self, listeners: int = 1) -> None:
        self._max_heads, self._max_bytes = MAX_HEADS // listeners, MAX_BYTES // listeners
        self._bytes = 0  # that all that are known take
        self._blocks: dict[Raw | bytes, HeaderBlock] = {}

    def get(self, raw: Raw, headers: CIMultiDictProxy[str], block: bytes | None = None) -> HeaderBlock:
        """Return what is known of these fields; `headers` are the same ones, read.

        `block` is all of them as they came over the wire, where that is at hand: one text is found faster than many.
        """
        key = raw if block is None else block
        known = self._blocks.get(key)
        if known is not None:
            return known
        head = HeaderBlock(headers, raw)
        if head.cost > self._max_bytes:
            return head
        while self._blocks and (len(self._blocks) >= self._max_heads or self._bytes + head.cost > self._max_bytes):
            oldest = next(iter(self._blocks))  # one that comes all the time is back at once
            self._bytes -= self._blocks.pop(oldest).cost
        self._bytes += head.cost
        self._blocks[key] = head
        return head
