"""Report documents that need no Restricted Data Token, learnt from the responses that pass through.

A response of getReport or getReports names documents and their types; a refusal of createRestrictedDataToken says that
a document is unrestricted. An unknown document is requested with a Restricted Data Token first.
"""

from collections import OrderedDict

from proxy.amazon.report_types import REPORT_OPERATIONS, RESTRICTED_TYPES, documents_in
from proxy.request.routing import Route
from proxy.request.token_selection import TokenKey
from proxy.request.upstream.content_coding import decompress
from proxy.request.upstream.http1 import Response

MAX_READ = 256 * 1024  # bytes of a response that are read; a hundred reports in getReports take a fifth of that
MAX_KNOWN = 2_000  # documents of one account and region: the newest
MAX_ACCOUNTS = 500  # the most recently used

# Document ids are unique only together with the seller (model reports_2021-06-30).
Owner = tuple[str, str, str]


class UnrestrictedReports:
    """The report documents of each account that are known to be unrestricted."""

    def __init__(self) -> None:
        self._unrestricted: OrderedDict[Owner, OrderedDict[str, None]] = OrderedDict()

    def is_unrestricted(self, token_key: TokenKey) -> bool:
        """Return whether the document of `token_key` is known to need no Restricted Data Token."""
        known = self._unrestricted.get(_owner(token_key))
        return known is not None and _document(token_key) in known

    def add_unrestricted(self, token_key: TokenKey) -> None:
        """Record that Amazon refuses a Restricted Data Token for this document because it needs none."""
        self._add(_owner(token_key), _document(token_key))

    def forget(self, token_key: TokenKey) -> None:
        """Forget a document that Amazon refused without a Restricted Data Token."""
        self._unrestricted.get(_owner(token_key), OrderedDict()).pop(_document(token_key), None)

    def tap(self, route: Route, response: Response) -> "ReportTap | None":
        """Return a tap for a response that may name documents, None for every other response."""
        if route.operation_name not in REPORT_OPERATIONS or response.status != 200:
            return None
        length = response.first(b"content-length") or "0"
        if not length.isdigit() or int(length) > MAX_READ:
            return None
        return ReportTap(self, _owner(route.token_key), response.first(b"content-encoding") or "")

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
        """Record the unrestricted documents in a whole response of getReport or getReports."""
        for document, kind in documents_in(body):
            if kind not in RESTRICTED_TYPES:
                self._add(owner, document)


class ReportTap:
    """Reads the body of one response along with the app, up to MAX_READ bytes."""

    def __init__(self, unrestricted_reports: UnrestrictedReports, owner: Owner, coding: str) -> None:
        self._reports = unrestricted_reports
        self._owner = owner
        self._coding = coding
        self._read: bytearray | None = bytearray()

    def feed(self, chunk: bytes) -> None:
        """Read the next bytes; a body larger than MAX_READ is ignored."""
        if self._read is not None and len(self._read) + len(chunk) <= MAX_READ:
            self._read += chunk
        else:
            self._read = None

    def end(self) -> None:
        """Record what the complete response says."""
        if self._read is not None:
            self._reports.learn(self._owner, decompress(bytes(self._read), self._coding, MAX_READ * 4))


def _owner(token_key: TokenKey) -> Owner:
    return token_key.environment, token_key.account, token_key.region


def _document(token_key: TokenKey) -> str:
    return token_key.path.rpartition("/")[2]
