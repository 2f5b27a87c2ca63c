"""How do apps that reach nothing but the proxy get at documents: reports, feeds, labels, uploads (`documents: relay`)?

Amazon's answers name documents by presigned URLs to its storage. Here these become addresses on the proxy: the URL,
sealed, so that only this proxy and its replicas can read it, bound to account, caller and method, and good for no
longer than what it stands for. A request to such an address is streamed to Amazon's storage and back, without any
token, and without anything of the app's but what the storage needs.
"""

import asyncio
import json
import re
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple
from urllib.parse import urlsplit

from aiohttp import web

from proxy.amazon.operations import Operation, OperationTable
from proxy.amazon.personal_data import ALL_ELEMENTS
from proxy.amazon.presigned_urls import (
    URL_LOCATIONS,
    is_storage,
    lifetime,
    literals_in,
    parse,
    signed_headers,
    urls_in,
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
from proxy.observability.logging import LOGGER, extra
from proxy.observability.metrics import Metrics
from proxy.request.authorization import AccessPolicy
from proxy.request.documents.gzip_stream import MAGIC, Gunzip
from proxy.request.header_cache import HeaderBlock
from proxy.request.routing import UNCACHED, Route
from proxy.request.target import account_of
from proxy.request.token_selection import TokenKind, access_token_key_of
from proxy.request.tokens.report_documents import decompress
from proxy.request.upstream.forward import Forwarder, UpstreamCall, end_to_end_headers
from proxy.request.upstream.http1 import RemoteProtocolError, Response
from proxy.request.upstream.pool import ConnectionPool, field_lines
from proxy.request.upstream.response import RewrittenHead, UpstreamResponse
from proxy.request.validation import ValidatedTarget
from proxy.store.encryption import DecryptionFailed, DocumentCipher

MAX_REWRITTEN = 1024 * 1024  # bytes of an answer in which URLs are looked for; the largest have a few KiB
MAX_URLS = 500  # in one answer; a bulk of labels or an order of many packages names some dozens
MAX_LIFETIME = 3600.0  # seconds of an address, however long Amazon's URL behind it lasts
MAX_ADDRESS = 12 * 1024  # characters of its path: a request line may have 16 KiB, and apps less

# What is sent to the storage of an app's fields, besides those that the URL's signature covers.
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

_DOWNLOADS, _UPLOADS = ("GET",), ("PUT", "POST")
_BEGINNING = re.compile(r"/@[^/?]+/-/documents/")
_PATH = re.compile(r"/@([^/?]+)/-/documents/([A-Za-z0-9_-]+)(?:\?(.*))?", re.ASCII)
_AUTHORITY = re.compile(r"https?://([^/?#]*)", re.IGNORECASE)
_RESTRICTED: TokenKind = "rdt"
_GZIP = frozenset({"gzip", "x-gzip"})
_UNPACK = {None: False, "": False, "decompress=0": False, "decompress=1": True}

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

_INVALID_ADDRESS = "the document's address is none that this proxy gave for this account, or it was changed"
_REQUEST_AGAIN = "Ask Amazon for the document again, and use the address in that answer whole and unchanged."


class Document(NamedTuple):
    """What an address stands for: a URL, and to whom, by which call, it was given.

    `elements` is the personal data that may be in it. `expires_at` is in Unix time.
    """

    url: str
    is_upload: bool
    caller: str
    region: str
    method: str  # of the call in whose answer it was, and its path's template
    template: str
    elements: tuple[str, ...]
    expires_at: float


class OpenedDocument(NamedTuple):
    """What is behind the address that a request is for."""

    target: Route
    unpack: bool
    elements: tuple[str, ...]  # the personal data that may be in it


class DocumentRelay:
    """Gives addresses for presigned URLs, and serves them; `wall` is Unix time in seconds."""

    def __init__(
        self,
        config: Config,
        table: OperationTable,
        *,
        cipher: DocumentCipher,
        upstream: Forwarder,
        pool: ConnectionPool,
        metrics: Metrics,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._table = table
        self._seal = cipher
        self._upstream = upstream
        self._pool = pool
        self._metrics = metrics
        self._wall = wall
        self._in_progress = 0
        self._logged_hosts: set[str] = set()
        endpoint = config.endpoints.documents
        self._own = (urlsplit(endpoint).scheme, urlsplit(endpoint).netloc.lower()) if endpoint else None

    # Answers that name documents.

    def should_rewrite(self, route: Route, response: Response) -> bool:
        """Return whether an answer may hold presigned URLs."""
        return route.operation_name in URL_LOCATIONS and response.status in {200, 201}

    async def rewrite(self, call: UpstreamCall, response: Response, listener: Listener) -> UpstreamResponse:
        """Pass an answer on to the app, the URLs in it replaced; as it is where it cannot be read, which is told."""
        read = await self._read(call, response)
        if not response.at_end or len(read) > MAX_REWRITTEN:
            if len(read) > MAX_REWRITTEN:
                self.keep_original("too_large", call.route)
            return await self._upstream.stream(call, response, prefix=read)
        body = self._rewritten(call, listener, read, response.first(b"content-encoding") or "")
        if body is None:
            return await self._upstream.stream(call, response, prefix=read)
        return await self._upstream.stream_rewritten(call, response, RewrittenHead.of(response, len(body)), body)

    async def _read(self, call: UpstreamCall, response: Response) -> bytes:
        """Return all of an answer, or its beginning where it is too large or breaks off."""
        read = b""
        try:
            while len(read) <= MAX_REWRITTEN:
                call.deadline.wait_for_upstream()
                if not (chunk := await response.read()):
                    break
                read += chunk
        except RemoteProtocolError:
            pass  # who passes it on meets the same end, and knows what to do
        except BaseException:
            await response.end()
            raise
        return read

    def _rewritten(self, call: UpstreamCall, listener: Listener, read: bytes, coding: str) -> bytes | None:
        """Return an answer's body with addresses in place of URLs, and not another byte changed; None for no change."""
        body = decompress(read, coding, MAX_REWRITTEN + 1)
        if len(body) > MAX_REWRITTEN:
            self.keep_original("too_large", call.route)
            return None
        location = URL_LOCATIONS[call.route.operation_name]
        try:
            urls = set(urls_in(json.loads(body), location.keys))
        except (ValueError, RecursionError):
            self.keep_original("unreadable", call.route)
            return None
        if len(urls) > MAX_URLS:
            self.keep_original("too_large", call.route)
            return None
        found = {url: address for url in urls if (address := self._address(call, listener, url)) is not None}
        return _replaced(body, found) if found else None

    def _address(self, call: UpstreamCall, listener: Listener, url: str) -> str | None:
        """Return the address on the proxy that stands for a URL, None where it is to stay as it is."""
        parts = parse(url)
        if parts is None or not self._is_allowed_host(parts.scheme, parts.netloc):
            self.keep_original("foreign_host", call.route)
            return None
        route, context, now = call.route, call.context, self._wall()
        operation = route.operation
        if operation is None:
            return None
        document = Document(
            url,
            is_upload=URL_LOCATIONS[operation.name].is_upload,
            caller=context.caller,
            region=route.region,
            method=operation.method,
            template=operation.template,
            # It is the document that the token was for: what is personal in it cannot be told apart.
            elements=ALL_ELEMENTS if context.token == _RESTRICTED else (),
            expires_at=now + min(lifetime(parts.query, now), MAX_LIFETIME),
        )
        path = f"/@{route.account}/-/documents/{self._seal.encrypt(route.account, json.dumps(document).encode())}"
        if len(path) > MAX_ADDRESS:
            self.keep_original("too_large", call.route)
            return None
        self._metrics.document_urls.labels("relayed").inc()
        return self._base(call.request, listener) + path

    def _base(self, request: web.BaseRequest, listener: Listener) -> str:
        """Return scheme and authority by which the app reached the proxy: the guard let that name in."""
        if self._config.documents_url is not None:
            return self._config.documents_url
        absolute = _AUTHORITY.match(request.raw_path)
        authority = absolute[1] if absolute is not None else request.headers["Host"]
        return f"{'http' if listener.tls is None else 'https'}://{authority}"

    def _is_allowed_host(self, scheme: str, netloc: str) -> bool:
        """Return whether documents may come from there: Amazon's storage, or what the settings say."""
        host, colon, port = netloc.lower().partition(":")
        return (scheme, netloc.lower()) == self._own or (
            scheme == "https" and is_storage(host) and (not colon or port == "443")
        )

    def keep_original(self, why: str, route: Route) -> None:
        """Note that a URL stays as it is; the log says it once."""
        self._metrics.document_urls.labels(why).inc()
        if why not in self._logged_hosts:
            self._logged_hosts.add(why)
            LOGGER.warning(
                "a document's URL is left as Amazon gave it",
                extra=extra(reason=why, operation=route.operation_name, account=route.account),
            )

    # Requests for documents.

    @staticmethod
    def matches(target: str) -> bool:
        """Return whether a request is for a document."""
        return target.startswith("/@") and _BEGINNING.match(target) is not None

    def open(
        self,
        method: str,
        validated: ValidatedTarget,
        head: HeaderBlock,
        listener: Listener,
        caller: str,
        policy: AccessPolicy,
    ) -> OpenedDocument:
        """Return what a request is for; raise the error that says why it may not have it."""
        found = _PATH.fullmatch(validated.target)
        if found is None or found[3] not in _UNPACK:
            raise BadTarget(
                "the address of a document is not whole", "Use it unchanged; ?decompress=1 is all that may be added."
            )
        account, source = account_of(found[1], head.headers, listener, self._config, policy)
        document = self._unsealed(account, found[2])
        if document.caller != caller:
            raise DocumentRefused("the document's address was given to another caller", _REQUEST_AGAIN)
        if method not in (_UPLOADS if document.is_upload else _DOWNLOADS):
            raise DocumentRefused(
                f"the document's address is for {'an upload' if document.is_upload else 'a download'}",
                f"Send {' or '.join(_UPLOADS if document.is_upload else _DOWNLOADS)}.",
            )
        self._check_policy(document, listener, policy)
        if self._wall() >= document.expires_at:
            raise DocumentExpired("the document's address has expired", _REQUEST_AGAIN)
        unpack = _UNPACK[found[3]]
        if unpack and (document.is_upload or "range" in head.names):
            raise BadOption(
                "decompress=1 is for whole downloads", "Leave decompress=1 out, or Range, of which it makes no sense."
            )
        return OpenedDocument(self._target(document, account, source), unpack, document.elements)

    def _unsealed(self, account: str, sealed: str) -> Document:
        try:
            document = Document(*json.loads(self._seal.decrypt(account, sealed)))
        except (DecryptionFailed, ValueError, TypeError):
            raise DocumentRefused(_INVALID_ADDRESS, _REQUEST_AGAIN) from None
        return document

    def _check_policy(self, document: Document, listener: Listener, policy: AccessPolicy) -> None:
        """Raise NotAllowed where the call that brought the address would not be allowed here and now."""
        if listener.region not in {None, document.region}:
            raise DocumentRefused("the document's address is of another region than this listener's", _REQUEST_AGAIN)
        policy.check_operation(document.method, self._table.match(document.method, document.template), "")
        policy.check_elements(set(document.elements))

    def _target(self, document: Document, account: str, source: str) -> Route:
        parts = parse(document.url)
        region = next((region for region in REGIONS if region == document.region), None)
        if parts is None or region is None or not self._is_allowed_host(parts.scheme, parts.netloc):
            raise DocumentRefused(_INVALID_ADDRESS, _REQUEST_AGAIN)
        if account not in self._config.accounts:
            raise UnknownAccount("the document's account is not configured", _REQUEST_AGAIN)
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
            path_and_query=(parts.path or "/") + (f"?{parts.query}" if parts.query else ""),
        )

    async def fetch(self, call: UpstreamCall, *, unpack: bool) -> UpstreamResponse:
        """Send a request to the storage, and stream the answer back, whatever it says."""
        with self._acquire_slot():
            response = await self._send(call)
            if not unpack or response.status != 200:
                return await self._upstream.stream(call, response)
            return await self._unpacked(call, response)

    @contextmanager
    def _acquire_slot(self) -> Iterator[None]:
        """Take one of the places that documents have among the connections."""
        if self._in_progress >= max(1, self._pool.limit // 2):
            raise DocumentsBusy(
                "too many documents are under way", "Fetch fewer at once, or raise pool.max_connections.", retry_after=1
            )
        self._in_progress += 1
        try:
            yield
        finally:
            self._in_progress -= 1

    async def _send(self, call: UpstreamCall) -> Response:
        lines, says_length = _storage_header_lines(call)
        began = call.deadline.now()
        call.context.begin_attempt()
        try:
            response = await self._upstream.send_with(call, lines, says_length=says_length)
        except UpstreamBroken:
            # An idle connection that was closed just now. A document got or put twice is the same as once.
            if not (call.needs_fresh_connection and call.is_replayable and call.request.method != "POST"):
                raise
            call.context.begin_attempt()
            response = await self._upstream.send_with(call, lines, says_length=says_length)
        call.context.end_attempt(response.status, call.deadline.now() - began)
        call.context.amazon_request_id = response.value(b"x-amz-request-id")
        return response

    async def _unpacked(self, call: UpstreamCall, response: Response) -> UpstreamResponse:
        """Stream a document without its gzip; one that has none, as it is."""
        try:
            begun = await _prefix_of(call, response)
            coding = (response.first(b"content-encoding") or "identity").lower()
            is_packed = coding in _GZIP or (coding == "identity" and begun.startswith(MAGIC))
            chunks = _chunks(call, response, begun)
            # What is no gzip at all can still be said in an answer.
            first = await anext(chunks, b"") if is_packed else b""
        except RemoteProtocolError as exc:
            raise UpstreamBroken("the document broke off", "Fetch it again.") from exc
        except BaseException:
            await response.end()
            raise
        if not is_packed:
            return await self._upstream.stream(call, response, prefix=begun)
        return await self._upstream.stream_rewritten(call, response, RewrittenHead.of(response, None), first, chunks)


def _replaced(body: bytes, found: Mapping[str, str]) -> bytes:
    """Return a JSON text with other strings in place of those that are `found`, and not another byte changed."""
    chunks, done = [], 0
    for begin, end in literals_in(body):
        # Most are no URL, which is seen at once.
        if not body.startswith(b"http", begin + 1) and b"\\" not in body[begin:end]:
            continue
        address = found.get(json.loads(body[begin:end]))
        if address is not None:
            chunks += [body[done:begin], json.dumps(address).encode()]
            done = end
    return b"".join([*chunks, body[done:]])


async def _prefix_of(call: UpstreamCall, response: Response) -> bytes:
    """Return as much of a document as tells whether it is packed; raise Broken."""
    begun = b""
    while len(begun) < len(MAGIC):
        call.deadline.wait_for_upstream()
        if not (chunk := await response.read()):
            break
        begun += chunk
    return begun


async def _chunks(call: UpstreamCall, response: Response, chunk: bytes) -> AsyncGenerator[bytes, None]:
    """Yield what a packed document unpacks to; raise BadGzip, GzipBomb, Broken."""
    gunzip = Gunzip()
    while chunk:
        for piece in gunzip.feed(chunk):
            yield piece
            await asyncio.sleep(0)  # a small chunk may be a large piece of work: the others get their turn
        call.deadline.wait_for_upstream()
        chunk = await response.read()
    gunzip.end()


def _storage_header_lines(call: UpstreamCall) -> tuple[bytes, bool]:
    """Return the lines of an app's fields that go to the storage, and whether the body's length is among them."""
    signed = signed_headers(call.route.path_and_query.partition("?")[2])
    kept = [
        (name, value)
        for name, value in end_to_end_headers(call.request.method, call.headers.headers).items()
        if (lower := name.lower()) in _FIELDS or lower in signed or lower.startswith(_FIELD_PREFIXES)
    ]
    return field_lines(kept), any(name.lower() == "content-length" for name, _ in kept)
