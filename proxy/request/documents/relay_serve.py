"""Serving relayed documents: streams from and to Amazon's storage, without a token (`documents: relay`).

Of the app's fields only those that the storage needs are forwarded.
"""

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from proxy.amazon.operations import Operation, OperationTable
from proxy.amazon.presigned_urls import (
    parse,
    signed_headers,
)
from proxy.config import REGIONS, Config, Listener
from proxy.errors import (
    BadOption,
    BadTarget,
    DocumentExpired,
    DocumentRefused,
    DocumentsBusy,
    UnknownAccount,
    UpstreamBroken,
)
from proxy.request.authorization import AccessPolicy
from proxy.request.documents.gzip_stream import MAGIC, Gunzip
from proxy.request.documents.relay import INVALID_ADDRESS, REQUEST_AGAIN, Document, DocumentAddresses
from proxy.request.header_cache import HeaderBlock
from proxy.request.routing import UNCACHED, Route
from proxy.request.target import account_of
from proxy.request.token_selection import access_token_key_of
from proxy.request.upstream.call import UpstreamCall
from proxy.request.upstream.forward import Forwarder
from proxy.request.upstream.http1 import RemoteProtocolError, Response
from proxy.request.upstream.pool import ConnectionPool, field_lines
from proxy.request.upstream.request_headers import end_to_end_headers
from proxy.request.upstream.response import RewrittenHead, UpstreamResponse
from proxy.request.validation import ValidatedTarget

# The app's fields that are forwarded to the storage, besides those that the URL's signature covers.
# An allow list: S3 rejects an Authorization header beside a presigned URL ("Only one auth mechanism allowed").
_FIELDS = frozenset(
    {
        "cache-control",
        "content-disposition",
        "content-encoding",
        "content-language",
        "content-length",
        "content-md5",
        "content-type",
        "if-match",
        "if-modified-since",
        "if-none-match",
        "if-range",
        "if-unmodified-since",
        "range",
    }
)
_FIELD_PREFIXES = ("x-amz-checksum-", "x-amz-meta-", "x-amz-server-side-encryption")

# No HEAD: the method is part of what a presigned URL's signature covers (Signature Version 4).
_DOWNLOADS, _UPLOADS = ("GET",), ("PUT", "POST")
_PREFIX = re.compile(r"/@[^/?]+/-/documents/")
# Only base64url without padding (RFC 4648 section 5), because the decoder would skip other characters.
_PATH = re.compile(r"/@([^/?]+)/-/documents/([A-Za-z0-9_-]+)(?:\?(.*))?", re.ASCII)
_GZIP = frozenset({"gzip", "x-gzip"})
# The whole query is compared: any other parameter would be lost without notice.
_DECOMPRESS = {None: False, "": False, "decompress=0": False, "decompress=1": True}

RELAYED = Operation(
    name="relayDocument",
    api="",
    version="",
    operation_id="relayDocument",
    method="",
    template="",
    rate=None,
    burst=None,
    rate_source="",
    app_rate=None,
    app_burst=None,
    restricted=False,
    restricted_certainty="",
    generic_path=False,
    data_elements=(),
    scope=None,
    deprecated=False,
    removal_date="",
    sandbox="",
    sandbox_only=False,
    only_reads=False,
)


class OpenedDocument(NamedTuple):
    """The document that a request is for."""

    target: Route
    decompress: bool
    elements: tuple[str, ...]  # the personal data that may be in it


class DocumentServer:
    """Serves the addresses of documents; `wall` is Unix time in seconds."""

    def __init__(
        self,
        config: Config,
        table: OperationTable,
        addresses: DocumentAddresses,
        *,
        forwarder: Forwarder,
        pool: ConnectionPool,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._table = table
        self._addresses = addresses
        self._forwarder = forwarder
        self._pool = pool
        self._wall = wall
        self._in_progress = 0

    @staticmethod
    def matches(target: str) -> bool:
        """Return whether a request is for a relayed document."""
        # The cheap test first: this is asked for each request.
        return target.startswith("/@") and _PREFIX.match(target) is not None

    def open(
        self,
        method: str,
        validated: ValidatedTarget,
        head: HeaderBlock,
        listener: Listener,
        caller: str,
        policy: AccessPolicy,
    ) -> OpenedDocument:
        """Return the document that a request is for.

        Raises BadTarget, BadOption, DocumentRefused, DocumentExpired, UnknownAccount or an error of the access policy.
        """
        found = _PATH.fullmatch(validated.target)
        if found is None or found[3] not in _DECOMPRESS:
            raise BadTarget(
                "the address of a document is not complete", "Use it unchanged; only ?decompress=1 may be added."
            )
        account, source = account_of(found[1], head.headers, listener, self._config, policy)
        # The account is part of the associated data: another account's address does not decrypt.
        document = self._addresses.document_in(account, found[2])
        # An address alone must not be enough: it may be in a log or in another program's hands.
        if document.caller != caller:
            raise DocumentRefused("the document's address was issued to another caller", REQUEST_AGAIN)
        if method not in (_UPLOADS if document.is_upload else _DOWNLOADS):
            raise DocumentRefused(
                f"the document's address is for {'an upload' if document.is_upload else 'a download'}",
                f"Send {' or '.join(_UPLOADS if document.is_upload else _DOWNLOADS)}.",
            )
        # Again at each use: the policy may have changed since the address was issued.
        self._check_policy(document, listener, policy)
        # By wall clock: the address may have been issued by another replica.
        if self._wall() >= document.expires_at:
            raise DocumentExpired("the document's address has expired", REQUEST_AGAIN)
        decompress = _DECOMPRESS[found[3]]
        # A range is of the compressed bytes (RFC 9110 section 14.2), and gzip cannot be read from the middle.
        if decompress and (document.is_upload or "range" in head.names):
            raise BadOption(
                "decompress=1 is for whole downloads", "Omit decompress=1 or Range: they cannot be combined."
            )
        return OpenedDocument(self._target(document, account, source), decompress, document.elements)

    def _check_policy(self, document: Document, listener: Listener, policy: AccessPolicy) -> None:
        """Raise NotAllowed where the call whose response held the address is not allowed now on this listener."""
        if listener.region not in {None, document.region}:
            raise DocumentRefused("the document's address is of another region than this listener's", REQUEST_AGAIN)
        policy.check_operation(document.method, self._table.match(document.method, document.template), "")
        policy.check_elements(set(document.elements))

    def _target(self, document: Document, account: str, source: str) -> Route:
        parts = parse(document.url)
        region = next((region for region in REGIONS if region == document.region), None)
        # Although the address is authenticated: a key that leaked must not make the proxy call any host (SSRF).
        if parts is None or region is None or not self._addresses.is_allowed_host(parts.scheme, parts.netloc):
            raise DocumentRefused(INVALID_ADDRESS, REQUEST_AGAIN)
        if account not in self._config.accounts:
            raise UnknownAccount("the document's account is not configured", REQUEST_AGAIN)
        settings = self._config.accounts[account]
        environment, (application, _) = self._config.environment_of(settings), self._config.application_of(settings)
        return Route(
            account=account,
            account_source=source,
            region=region,
            region_source="the document's address",
            environment=environment,
            application=application,
            operation=RELAYED,
            operation_name=RELAYED.name,
            endpoint=f"{parts.scheme}://{parts.netloc}",
            token_key=access_token_key_of(application, account, environment, region),
            elements_source="",
            key=UNCACHED,
            # Unchanged: the signature covers path and query as they were issued.
            path_and_query=(parts.path or "/") + (f"?{parts.query}" if parts.query else ""),
        )

    async def fetch(self, call: UpstreamCall, *, decompress: bool) -> UpstreamResponse:
        """Send a request to the storage and stream its response, whatever the status; raise DocumentsBusy."""
        with self._acquire_slot():
            response = await self._send(call)
            # Errors of the storage are XML and are passed on as they are.
            if not decompress or response.status != 200:
                return await self._forwarder.stream(call, response)
            return await self._stream_decompressed(call, response)

    @contextmanager
    def _acquire_slot(self) -> Iterator[None]:
        """Take a slot: documents may use half of the connections, so that calls are not blocked by slow downloads."""
        # Refused and not queued: a download can last for minutes.
        if self._in_progress >= max(1, self._pool.limit // 2):
            raise DocumentsBusy(
                "too many documents are in progress",
                "Fetch fewer at once, or raise pool.max_connections.",
                retry_after=1,
            )
        self._in_progress += 1
        try:
            yield
        finally:
            self._in_progress -= 1

    async def _send(self, call: UpstreamCall) -> Response:
        lines, has_length = _storage_header_lines(call)
        began = call.deadline.now()
        call.context.begin_attempt()
        try:
            response = await self._forwarder.send_with(call, lines, has_length=has_length)
        except UpstreamBroken:
            # The idle connection was closed meanwhile. GET and PUT are idempotent (RFC 9110 section 9.2.2).
            if not (call.needs_fresh_connection and call.is_replayable and call.request.method != "POST"):
                raise
            call.context.begin_attempt()
            response = await self._forwarder.send_with(call, lines, has_length=has_length)
        call.context.end_attempt(response.status, call.deadline.now() - began)
        # S3's name; SP-API's is x-amzn-RequestId.
        call.context.amazon_request_id = response.value(b"x-amz-request-id")
        return response

    async def _stream_decompressed(self, call: UpstreamCall, response: Response) -> UpstreamResponse:
        """Stream a gzip document decompressed, any other unchanged; raise UpstreamBroken, BadGzip or GzipBomb."""
        try:
            prefix = await _prefix_of(call, response)
            # `identity` with gzip bytes is usual: since 2026-04-01 S3 says `gzip` only where the app has set
            # enableContentEncodingUrlHeader (Amazon's models).
            coding = (response.first(b"content-encoding") or "identity").lower()
            is_gzip = coding in _GZIP or (coding == "identity" and prefix.startswith(MAGIC))
            chunks = _decompressed(call, response, prefix)
            # Nothing was sent yet: a document that is not gzip can still get an error response.
            first = await anext(chunks, b"") if is_gzip else b""
        except RemoteProtocolError as exc:
            raise UpstreamBroken("the document was cut off", "Fetch it again.") from exc
        # BaseException, because a cancelled request must end the response, too, or the connection stays taken.
        except BaseException:
            await response.end()
            raise
        if not is_gzip:
            return await self._forwarder.stream(call, response, prefix=prefix)
        return await self._forwarder.stream_rewritten(call, response, RewrittenHead.of(response, None), first, chunks)


async def _prefix_of(call: UpstreamCall, response: Response) -> bytes:
    """Return enough of a document to recognise gzip by its first bytes; raise RemoteProtocolError."""
    prefix = b""
    # The first read may return a single byte.
    while len(prefix) < len(MAGIC):
        call.deadline.wait_for_upstream()
        if not (chunk := await response.read()):
            break
        prefix += chunk
    return prefix


async def _decompressed(call: UpstreamCall, response: Response, chunk: bytes) -> AsyncGenerator[bytes, None]:
    """Yield the decompressed document; raise BadGzip, GzipBomb or RemoteProtocolError."""
    gunzip = Gunzip()
    while chunk:
        for data in gunzip.feed(chunk):
            yield data
            await asyncio.sleep(0)  # a small chunk may decompress to very much: let other requests run
        call.deadline.wait_for_upstream()
        chunk = await response.read()
    # Only here is it known whether the document was complete: the caller then breaks the connection.
    gunzip.end()


def _storage_header_lines(call: UpstreamCall) -> tuple[bytes, bool]:
    """Return the lines of the app's fields that go to the storage, and whether Content-Length is among them."""
    # A header that the signature covers must arrive unchanged, or S3 rejects the request (Signature Version 4).
    signed = signed_headers(call.route.path_and_query.partition("?")[2])
    kept = [
        (name, value)
        for name, value in end_to_end_headers(call.request.method, call.headers.headers).items()
        if (lower := name.lower()) in _FIELDS or lower in signed or lower.startswith(_FIELD_PREFIXES)
    ]
    return field_lines(kept), any(name.lower() == "content-length" for name, _ in kept)
