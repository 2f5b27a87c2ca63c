"""Cache of what the steps derive from a request's header fields alone.

An app sends the same fields again and again. Each step stores its result here for the first request with a set of
fields, and reads it for the next ones.
"""

from itertools import chain

from multidict import CIMultiDictProxy

# Limits of the cache over all listeners: header blocks, and bytes of memory. A block takes about FIELD_COST bytes for
# each field, and its text is stored COPIES times.
# Two limits, because a client may send few large blocks or many small ones; without the second, 2048 large heads would
# fill the memory.
MAX_BLOCKS, MAX_BYTES = 2048, 8 * 1024 * 1024
FIELD_COST, COPIES = 700, 4

Raw = tuple[tuple[bytes, bytes], ...]  # names and values as received


class HeaderBlock:
    """The header fields of all requests with the same ones; what no step has derived yet is None.

    `names` are in lower case. `size` is that of the block in bytes, with its separators.
    """

    # Slots: up to 2048 of these objects are held.
    __slots__ = ("bodiless_lines", "cost", "has_content_length", "headers", "host", "lines", "names", "size")

    def __init__(self, headers: CIMultiDictProxy[str], raw: Raw = ()) -> None:
        self.headers = headers
        self.names = frozenset(map(str.lower, headers))
        # Four bytes for `: ` and CRLF of each field line (RFC 9112 section 5).
        self.size = sum(map(len, chain.from_iterable(raw))) + 4 * len(raw)
        # Two more than there are fields: for the block's own objects.
        self.cost = FIELD_COST * (2 + len(raw)) + COPIES * self.size  # approximate bytes of memory
        # The host of the Host field; set by validation after all its checks of the fields have passed.
        self.host: str | None = None
        # The field lines to send to Amazon, for a request with a body and for one without (GET and HEAD).
        self.lines: bytes | None = None
        self.has_content_length = False  # whether `lines` has a Content-Length
        self.bodiless_lines: bytes | None = None


class HeaderCache:
    """Header blocks of the recent requests to one listener; `listeners` is the number that share the limits."""

    def __init__(self, listeners: int = 1) -> None:
        # Shared out, so that the limits hold for the process, however many listeners there are.
        self._max_blocks, self._max_bytes = MAX_BLOCKS // listeners, MAX_BYTES // listeners
        self._bytes = 0  # cost of all blocks
        self._blocks: dict[Raw | bytes, HeaderBlock] = {}

    def get(self, raw: Raw, headers: CIMultiDictProxy[str], block: bytes | None = None) -> HeaderBlock:
        """Return the block of these fields; `raw` and `headers` are the same fields, before and after parsing.

        `block` is all of them as received, where that is available: hashing one string is faster than hashing many.
        """
        # The whole of the fields and never a hash of it: equal keys must mean equal fields, because the Host check is
        # skipped.
        key = raw if block is None else block
        cached = self._blocks.get(key)
        if cached is not None:
            return cached
        head = HeaderBlock(headers, raw)
        # Served without being stored; the loop below would drop every other block and still not make room.
        if head.cost > self._max_bytes:
            return head
        # Before the insertion, so that the limit holds at any moment.
        while self._blocks and (len(self._blocks) >= self._max_blocks or self._bytes + head.cost > self._max_bytes):
            oldest = next(iter(self._blocks))  # not LRU: a block in frequent use is simply added again
            self._bytes -= self._blocks.pop(oldest).cost
        self._bytes += head.cost
        self._blocks[key] = head
        return head
