"""Which report documents need no Restricted Data Token? Learnt from the answers that pass through.

A getReport or getReports answer names document and type; the mint's own refusal of a document names it unrestricted.
What is not known is asked with a Restricted Data Token first.
"""

import zlib
from collections import OrderedDict

from proxy.amazon.report_types import REPORT_OPERATIONS, RESTRICTED_TYPES, documents_in
from proxy.request.routing import Route
from proxy.request.token_selection import TokenKey
from proxy.request.upstream.http1 import Response

MAX_READ = 256 * 1024  # bytes of an answer that are looked at; getReports names a hundred reports in a fifth of that
MAX_KNOWN = 2_000  # documents of one account and region: the newest
MAX_ACCOUNTS = 500  # those that asked last

# Document ids are unique only together with the seller (model reports_2021-06-30).
Owner = tuple[str, str, str]


class UnrestrictedReports:
    """What is known of each account's report documents."""

    def __init__(self) -> None:
        self._unrestricted: OrderedDict[Owner, OrderedDict[str, None]] = OrderedDict()

    def is_unrestricted(self, token_key: TokenKey) -> bool:
        """Return whether the document that `credential` is for is known to need no Restricted Data Token."""
        known = self._unrestricted.get(_owner(token_key))
        return known is not None and _document(token_key) in known

    def add_unrestricted(self, token_key: TokenKey) -> None:
        """Learn that Amazon gives no Restricted Data Token for this document, because it needs none."""
        self._add(_owner(token_key), _document(token_key))

    def forget(self, token_key: TokenKey) -> None:
        """Unlearn a document that Amazon refused without a Restricted Data Token."""
        self._unrestricted.get(_owner(token_key), OrderedDict()).pop(_document(token_key), None)

    def tap(self, route: Route, response: Response) -> "BodyTap | None":
        """Return what reads along with an answer that may name documents; None for every other answer."""
        if route.operation_name not in REPORT_OPERATIONS or response.status != 200:
            return None
        length = response.first(b"content-length") or "0"
        if not length.isdigit() or int(length) > MAX_READ:
            return None
        return BodyTap(self, _owner(route.token_key), response.first(b"content-encoding") or "")

    def _add(self, owner: Owner, document: str) -> None:
        known = self._unrestricted.setdefault(owner, OrderedDict())
        self._unrestricted.move_to_end(owner)
        if len(self._unrestricted) > MAX_ACCOUNTS:
            self._unrestricted.popitem(last=False)
        known[document] = None
        known.move_to_end(document)
        if len(known) > MAX_KNOWN:
            known.popitem(last=False)

    def learn(self, owner: Owner, body: bytes) -> None:
        """Learn from a whole answer of getReport or getReports."""
        for document, kind in documents_in(body):
            if kind not in RESTRICTED_TYPES:
                self._add(owner, document)


class BodyTap:
    """Reads along with one answer, up to a bound, and changes nothing of it."""

    def __init__(self, unrestricted_reports: UnrestrictedReports, owner: Owner, coding: str) -> None:
        self._documents = unrestricted_reports
        self._owner = owner
        self._coding = coding
        self._read: bytearray | None = bytearray()

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes; of an answer that grows past the bound, nothing is learnt."""
        if self._read is not None and len(self._read) + len(chunk) <= MAX_READ:
            self._read += chunk
        else:
            self._read = None

    def end(self) -> None:
        """Learn from the answer, now that it is whole."""
        if self._read is not None:
            self._documents.learn(self._owner, decompress(bytes(self._read), self._coding, MAX_READ * 4))


def decompress(body: bytes, coding: str, most: int) -> bytes:
    """Return a copy of `body` without its content coding, at most `most` bytes of it; empty where it cannot be read."""
    if not coding or coding.lower() == "identity":
        return body
    try:
        return zlib.decompressobj(wbits=zlib.MAX_WBITS | 32).decompress(body, most)
    except zlib.error:
        return b""


def _owner(token_key: TokenKey) -> Owner:
    return token_key.environment, token_key.account, token_key.region


def _document(token_key: TokenKey) -> str:
    return token_key.path.rpartition("/")[2]
