"""Rewriting responses that name documents: presigned URLs become addresses on the proxy (`documents: relay`).

For apps that reach nothing but the proxy: reports, feeds, labels and uploads are then fetched through it.
"""

import json
import re
import time
from collections.abc import Callable, Mapping

from aiohttp import web

from proxy.amazon.personal_data import ALL_ELEMENTS
from proxy.amazon.presigned_urls import URL_LOCATIONS, lifetime, literals_in, parse, urls_in
from proxy.config import Config, Listener
from proxy.observability.logging import LOGGER, extra
from proxy.observability.metrics import Metrics
from proxy.request.documents.relay import Document, DocumentAddresses
from proxy.request.routing import Route
from proxy.request.token_selection import TokenKind
from proxy.request.upstream.call import UpstreamCall
from proxy.request.upstream.content_coding import decompress
from proxy.request.upstream.forward import Forwarder
from proxy.request.upstream.http1 import RemoteProtocolError, Response
from proxy.request.upstream.response import RewrittenHead, UpstreamResponse

MAX_REWRITTEN = 1024 * 1024  # bytes of a response in which URLs are replaced; the largest have a few KiB
MAX_URLS = 500  # in one response; a bulk of labels or an order of many packages names some dozens
MAX_LIFETIME = 3600.0  # seconds of an address, however long Amazon's URL behind it is valid
MAX_ADDRESS = 12 * 1024  # characters of its path: a request line may have 16 KiB, and many clients allow less

_AUTHORITY = re.compile(r"https?://([^/?#]*)", re.IGNORECASE)
_RESTRICTED: TokenKind = "rdt"


class DocumentRewriter:
    """Replaces presigned URLs in responses; `wall` is Unix time in seconds."""

    def __init__(
        self,
        config: Config,
        addresses: DocumentAddresses,
        *,
        forwarder: Forwarder,
        metrics: Metrics,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._addresses = addresses
        self._forwarder = forwarder
        self._metrics = metrics
        self._wall = wall
        self._logged_reasons: set[str] = set()

    def should_rewrite(self, route: Route, response: Response) -> bool:
        """Return whether a response may contain presigned URLs."""
        return route.operation_name in URL_LOCATIONS and response.status in {200, 201}

    async def rewrite(self, call: UpstreamCall, response: Response, listener: Listener) -> UpstreamResponse:
        """Stream a response to the app with its URLs replaced, or unchanged where it cannot be parsed (logged)."""
        prefix = await self._read(call, response)
        if not response.at_end or len(prefix) > MAX_REWRITTEN:
            if len(prefix) > MAX_REWRITTEN:
                self.keep_original("too_large", call.route)
            return await self._forwarder.stream(call, response, prefix=prefix)
        body = self._rewritten_body(call, listener, prefix, response.first(b"content-encoding") or "")
        if body is None:
            return await self._forwarder.stream(call, response, prefix=prefix)
        return await self._forwarder.stream_rewritten(call, response, RewrittenHead.of(response, len(body)), body)

    async def _read(self, call: UpstreamCall, response: Response) -> bytes:
        """Return the whole body, or its first part where it is too large or cut off."""
        data = b""
        try:
            while len(data) <= MAX_REWRITTEN:
                call.deadline.wait_for_upstream()
                if not (chunk := await response.read()):
                    break
                data += chunk
        except RemoteProtocolError:
            pass  # `Forwarder.stream` meets the same error, and handles it
        except BaseException:
            await response.end()
            raise
        return data

    def _rewritten_body(self, call: UpstreamCall, listener: Listener, data: bytes, coding: str) -> bytes | None:
        """Return the body with addresses in place of URLs and no other byte changed; None where nothing changes."""
        body = decompress(data, coding, MAX_REWRITTEN + 1)
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
        return _replace_strings(body, found) if found else None

    def _address(self, call: UpstreamCall, listener: Listener, url: str) -> str | None:
        """Return the address on the proxy for a URL, None where the URL is kept."""
        parts = parse(url)
        if parts is None or not self._addresses.is_allowed_host(parts.scheme, parts.netloc):
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
            # The RDT was for the document: which personal data is in it is not known, so all elements count.
            elements=ALL_ELEMENTS if context.token == _RESTRICTED else (),
            expires_at=now + min(lifetime(parts.query, now), MAX_LIFETIME),
        )
        path = self._addresses.path_of(route.account, document)
        if len(path) > MAX_ADDRESS:
            self.keep_original("too_large", call.route)
            return None
        self._metrics.document_urls.labels("relayed").inc()
        return self._base(call.request, listener) + path

    def _base(self, request: web.BaseRequest, listener: Listener) -> str:
        """Return scheme and authority by which the app reached the proxy; validation has checked the host name."""
        if self._config.documents_url is not None:
            return self._config.documents_url
        absolute = _AUTHORITY.match(request.raw_path)
        authority = absolute[1] if absolute is not None else request.headers["Host"]
        return f"{'http' if listener.tls is None else 'https'}://{authority}"

    def keep_original(self, reason: str, route: Route) -> None:
        """Count a URL that is not replaced; each reason is logged once."""
        self._metrics.document_urls.labels(reason).inc()
        if reason not in self._logged_reasons:
            self._logged_reasons.add(reason)
            LOGGER.warning(
                "a document's URL was not replaced",
                extra=extra(reason=reason, operation=route.operation_name, account=route.account),
            )


def _replace_strings(body: bytes, found: Mapping[str, str]) -> bytes:
    """Return a JSON text with the strings that are `found` replaced, and no other byte changed."""
    chunks, done = [], 0
    for begin, end in literals_in(body):
        # Fast path: most strings are not URLs. One with an escape may be (`\u0068ttp`), and is decoded.
        if not body.startswith(b"http", begin + 1) and b"\\" not in body[begin:end]:
            continue
        address = found.get(json.loads(body[begin:end]))
        if address is not None:
            chunks += [body[done:begin], json.dumps(address).encode()]
            done = end
    return b"".join([*chunks, body[done:]])
