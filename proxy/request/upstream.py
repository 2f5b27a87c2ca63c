"""How does the request reach Amazon, and the answer the app, changed in nothing but what must change?

Strip first, add last: what belongs to one hop, to the proxy or to the app's own credentials goes, then Amazon's
headers are set. Bodies are streamed both ways as they are. aiohttp's client behaves like a browser unless it is told
otherwise; everything it is told stands in `open_session` and `_send`.
"""

import asyncio
import re
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Self

import aiohttp
from aiohttp import web
from aiohttp.http import HttpVersion10, HttpVersion11
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from proxy.amazon.headers import credential_headers
from proxy.config import Config
from proxy.errors import (
    BodyTimeout,
    CallTimeout,
    ConnectTimeout,
    MalformedRequest,
    ProxyError,
    TotalTimeout,
    UpstreamBroken,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from proxy.request.answers import HOP_BY_HOP, AmazonsAnswer, break_off, named_in_connection
from proxy.request.connector import REUSED, Connector
from proxy.request.documents import Reader
from proxy.request.exchange import Exchange
from proxy.request.identify import Target
from proxy.request.mask import Mask
from proxy.request.tokens import Token

# What an app sends that is not for Amazon: its own credentials and those of AWS signatures, what the proxy sets
# itself, what names the hops and traces inside the user's network, and what would have some servers take the request
# for another method or path than was judged.
PRIVATE = frozenset(
    {
        "authorization",
        "baggage",
        "client-ip",
        "cookie",
        "expect",
        "forwarded",
        "host",
        "traceparent",
        "tracestate",
        "true-client-ip",
        "user-agent",
        "via",
        "x-amz-access-token",
        "x-amz-content-sha256",
        "x-amz-date",
        "x-amz-security-token",
        "x-amz-signature",
        "x-client-ip",
        "x-host",
        "x-http-method",
        "x-http-method-override",
        "x-method-override",
        "x-original-host",
        "x-original-uri",
        "x-original-url",
        "x-real-ip",
        "x-request-id",
        "x-rewrite-url",
    }
)
PRIVATE_PREFIXES = ("x-sp-", "x-forwarded-")

# Amazon's front end refuses these on GET and HEAD (DOC "API request validation for 400 errors with HTML response").
BODY_FIELDS = frozenset({"content-length", "content-type", "content-encoding"})
BODILESS = frozenset({"GET", "HEAD"})

# Written with `_`, they are others than these, but not for everybody.
LOOKALIKES = BODY_FIELDS

MOST_KEPT = 128 * 1024  # bytes of an app's body that are kept until Amazon has answered
MOST_OF_REFUSAL = 16 * 1024  # bytes of a refusal of Amazon's that are looked at

MAX_RESPONSE_LINE = 16 * 1024
MAX_RESPONSE_FIELD = 64 * 1024
MAX_RESPONSE_FIELDS = 256


_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


def check_body(method: str, headers: CIMultiDictProxy[str]) -> None:
    """Raise MalformedRequest for a body on GET or HEAD: Amazon answers that with a page of HTML."""
    if method in BODILESS and ("Transfer-Encoding" in headers or headers.get("Content-Length", "0").strip("0")):
        raise MalformedRequest(f"a {method} request has a body", "Send it without a body, or use POST.")


def cleaned(method: str, headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    """Return what of an app's headers goes to Amazon, in order, repeated fields kept apart."""
    dropped = HOP_BY_HOP | named_in_connection(headers)
    if method in BODILESS:
        dropped |= BODY_FIELDS
    kept: CIMultiDict[str] = CIMultiDict()
    for name, value in headers.items():
        # Some servers read `_` as `-`: x_amz_access_token must not slip through as another spelling.
        lower = name.lower().replace("_", "-")
        if "_" in name and lower in LOOKALIKES:
            continue
        if lower in dropped or lower in PRIVATE or lower.startswith(PRIVATE_PREFIXES):
            continue
        if not value.isascii() and not _is_utf8(value):
            raise MalformedRequest("a header's value is not UTF-8", "Send header values in ASCII or UTF-8.")
        kept.add(name, value)
    return kept


def _is_utf8(value: str) -> bool:
    # A byte that is not UTF-8 arrives as a lone surrogate, and would be left out without a word on the way on.
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


_APP_STALLED = BodyTimeout(
    "the app stopped sending its body, or reading the answer", "Send or read without long pauses (timeouts.body_idle)."
)
_AMAZON_SILENT = UpstreamTimeout(
    "Amazon was silent for too long", "A write may or may not have been done: look before you repeat it."
)
_CALL_OVER = CallTimeout(
    "the time that the call had (x-sp-timeout) is over",
    "A write may or may not have been done: look before you repeat it.",
)
_TOO_LONG = TotalTimeout("the whole exchange took too long", "Raise timeouts.total for very large bodies.")


class Patience:
    """One bound for all the waits of one exchange: each phase sets how long it may take and what its end is called.

    Use it as an asynchronous context manager; a phase that outlasts its time raises its error there. A phase only
    notes its end; the timer looks at it no more often than the shortest phase is long, so that no end is missed and
    a phase costs next to nothing.
    """

    def __init__(self, config: Config, timeout: float | None = None) -> None:
        timeouts = config.timeouts
        self._body_idle, self._upstream_idle = timeouts.body_idle, timeouts.upstream_idle
        self._body_rate = config.bounds.body_rate
        self._app_time, self._app_since = 0.0, None  # type: float, float | None
        has_own = timeout is not None and timeout < timeouts.total
        total = timeout if timeout is not None and has_own else timeouts.total
        self._shortest = min(timeouts.body_idle, timeouts.upstream_idle, total)
        self._loop = asyncio.get_running_loop()
        self._ends_at = self._deadline = self._loop.time() + total
        self._error: ProxyError = _CALL_OVER if has_own else _TOO_LONG
        self._too_long = self._error
        self._expiry = asyncio.timeout(None)
        self._timer: asyncio.TimerHandle | None = None

    def for_app(self, moved: int = 0) -> None:
        """Wait for the app: to send more of its body, or to take more of the answer, of which it has `moved` bytes.

        It may pause for `timeouts.body_idle`, but all its pauses together may not be longer than that and what
        `bounds.body_rate` gives it for what it has moved: one byte every few seconds would never end.
        """
        self._end_phase()
        self._app_since = now = self._loop.time()
        left = self._body_idle
        if self._body_rate:
            left = min(left, self._body_idle + moved / self._body_rate - self._app_time)
        self._wait_until(now + left, _APP_STALLED)

    def for_proxy(self) -> None:
        """Wait for what the proxy itself does, each part of which has a bound of its own."""
        self._end_phase()
        self._deadline, self._error = self._ends_at, self._too_long

    @property
    def left(self) -> float:
        """The seconds that the whole exchange still has."""
        return max(0.0, self._ends_at - self._loop.time())

    def for_amazon(self) -> None:
        """Wait for Amazon: to take more of the body, to answer, or to send more of its answer."""
        self._end_phase()
        self._wait_until(self._loop.time() + self._upstream_idle, _AMAZON_SILENT)

    @property
    def amazon_was_silent(self) -> bool:
        """Whether time ran out while it was Amazon's turn."""
        return self._expiry.expired() and isinstance(self._error, UpstreamTimeout)

    def _end_phase(self) -> None:
        if self._app_since is not None:
            self._app_time += self._loop.time() - self._app_since
            self._app_since = None

    def _wait_until(self, end: float, error: ProxyError) -> None:
        self._deadline, self._error = (end, error) if end < self._ends_at else (self._ends_at, self._too_long)

    def _look(self) -> None:
        now = self._loop.time()
        if now >= self._deadline:
            self._expiry.reschedule(now)
        else:
            self._timer = self._loop.call_at(min(self._deadline, now + self._shortest), self._look)

    async def __aenter__(self) -> Self:
        await self._expiry.__aenter__()
        self._look()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        try:
            await self._expiry.__aexit__(*exc_info)  # type: ignore[arg-type]  # the same triple, passed on
        except TimeoutError as exc:
            raise type(self._error)(self._error.message, self._error.hint) from exc


class Call:
    """One request on its way: what was decided, how patient to be, and its body.

    The body is streamed as it comes, and kept up to a bound, so that it can be sent again.
    """

    def __init__(self, request: web.BaseRequest, target: Target, exchange: Exchange, patience: Patience) -> None:
        self.request = request
        self.target = target
        self.exchange = exchange
        self.patience = patience
        self.has_place = False  # among the account's requests at Amazon
        self.wants_new_connection = False  # the last attempt broke on one that had been idle
        self.mask = Mask("")  # for the token that went with it
        self._kept: list[bytes] | None = []
        self._kept_size = 0
        self._is_read = not request.body_exists

    @property
    def can_be_sent_again(self) -> bool:
        """Whether all of it is at hand."""
        return self._is_read and self._kept is not None

    async def body(self) -> AsyncIterator[bytes]:
        """Yield the body: as it comes the first time, from what was kept after that."""
        if self._is_read:
            for chunk in self._kept or ():
                yield chunk
            return
        _say_continue(self.request)
        while chunk := await self._next():
            self._keep(chunk)
            self.exchange.request_bytes += len(chunk)
            yield chunk
        self._is_read = True

    async def _next(self) -> bytes:
        self.patience.for_app(self.exchange.request_bytes)
        try:
            chunk = await self.request.content.readany()
        except (web.RequestPayloadError, aiohttp.ClientError, ValueError) as exc:
            error = MalformedRequest("the request's body is not well-formed", "Check its framing.")
            self.exchange.upload_error = error
            raise error from exc
        self.patience.for_amazon()
        return chunk

    def _keep(self, chunk: bytes) -> None:
        self._kept_size += len(chunk)
        if self._kept is not None and self._kept_size <= MOST_KEPT:
            self._kept.append(chunk)
        else:
            self._kept = None


def _say_continue(request: web.BaseRequest) -> None:
    """Tell an app that waits for it to send its body (RFC 9110 section 10.1.1); everything is checked by now."""
    expects = request.headers.get("Expect", "").lower() == "100-continue" and request.version >= HttpVersion11
    if expects and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


def tls_context(config: Config) -> ssl.SSLContext:
    """Return what verifies Amazon's hosts: TLS 1.2 and up, the system's certificates or those of `pool.ca_file`."""
    context = ssl.create_default_context(cafile=config.pool.ca_file)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def open_session(config: Config, limit: int, *, fresh: bool = False) -> aiohttp.ClientSession:
    """Return a session that does nothing of its own accord, with `limit` connections at most.

    `fresh` ones never reuse a connection.
    """
    connector = Connector(
        limit=limit,
        ssl=tls_context(config),
        force_close=fresh,
        ttl_dns_cache=30,
        keepalive_timeout=None if fresh else config.pool.idle,
    )
    session = aiohttp.ClientSession(
        connector=connector,
        # With a real jar, one seller's cookie would go out with another seller's request.
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        timeout=aiohttp.ClientTimeout(total=None, connect=config.timeouts.connect),
        trust_env=False,
        max_line_size=MAX_RESPONSE_LINE,
        max_field_size=MAX_RESPONSE_FIELD,
        max_headers=MAX_RESPONSE_FIELDS,
    )
    # aiohttp repeats idempotent calls by itself, unseen; there is no public switch. Ours is counted, and once only.
    session._retry_connection = False  # noqa: SLF001
    return session


class Upstream:
    """Sends requests to Amazon and streams the answers back."""

    def __init__(
        self,
        config: Config,
        *,
        session: aiohttp.ClientSession,
        fresh_session: aiohttp.ClientSession,
        user_agents: Mapping[str, str],
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._session = session
        self._fresh_session = fresh_session
        self._user_agents = user_agents
        self._wall = wall

    async def send(self, call: Call, token: Token) -> aiohttp.ClientResponse:
        """Send the request and return Amazon's answer as soon as its head is there; its body is still to be read.

        Raises an error of ours for everything that keeps an answer from coming.
        """
        call.exchange.attempts += 1
        call.mask = Mask(token.value.reveal())
        session = self._fresh_session if call.wants_new_connection else self._session
        request, target = call.request, call.target
        headers = cleaned(request.method, request.headers)
        headers.extend(credential_headers(token.value, self._user_agents[target.application], self._wall()))
        call.patience.for_amazon()
        try:
            response = await session.request(
                request.method,
                # As an encoded path, query and all: escapes are not tidied, and an empty query is kept. The path that
                # Amazon sees is the one that was decided on.
                URL(target.endpoint).with_path(target.path_and_query, encoded=True),
                headers=headers,
                data=call.body() if request.body_exists else None,
                allow_redirects=False,
            )
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            error = call.exchange.upload_error or _translated(exc)
            # An idle connection that Amazon closed just now, perhaps.
            call.wants_new_connection = isinstance(error, UpstreamBroken) and REUSED.get()
            raise error from exc
        wrong = _what_is_wrong_with(response)
        if wrong:
            response.close()
            raise UpstreamBroken(f"Amazon's answer {wrong}", "Try again.")
        return response

    async def relay(
        self, call: Call, response: aiohttp.ClientResponse, *, beginning: bytes = b"", reader: Reader | None = None
    ) -> web.StreamResponse:
        """Stream the answer to the app; break its connection where Amazon's answer breaks off.

        A client must never take half an answer for a whole one. `beginning` is what was read of it before; `reader`
        reads along.
        """
        request, exchange = call.request, call.exchange
        answer = AmazonsAnswer(response, exchange, call.mask)
        if request.body_exists and not request.content.at_eof():
            answer.force_close()  # answered before the upload ended: what still comes is not a request
        connection = response.connection.protocol if response.connection is not None else None
        try:
            call.patience.for_app()
            exchange.begun = True
            await answer.prepare(request)
            await _stream(call, response, answer, beginning, reader)
            if connection is not None and isinstance(connection.exception(), aiohttp.ClientOSError):
                raise aiohttp.ClientPayloadError  # its end is the connection's, and that was a reset
            call.patience.for_app()
            await answer.write_eof()
            await request.writer.drain()  # or what is left would be waited for outside all timeouts
        except (aiohttp.ClientError, ConnectionError):
            exchange.broken = True
            break_off(request)
        except asyncio.CancelledError:
            break_off(request)
            raise
        finally:
            if exchange.broken or not response.content.at_eof():
                response.close()
            else:
                response.release()
        return answer


def _what_is_wrong_with(response: aiohttp.ClientResponse) -> str:
    """Return what makes an answer unfit to be passed on, though aiohttp took it; nothing where it is fit."""
    if response.version not in {HttpVersion10, HttpVersion11}:
        return "is of an HTTP version that was not asked for"
    if response.status < 200:  # aiohttp takes 099 for a status, and 101 for the end of HTTP
        return "has no status that ends a request"
    codings = response.headers.getall("Transfer-Encoding", ())
    if codings and (len(codings) > 1 or codings[0].strip().lower() != "chunked" or response.version == HttpVersion10):
        return "has a transfer coding that nobody asked for"  # it would go on as if it were not coded at all
    if _CONTROL.search(response.reason or ""):
        return "has a status line with control characters"
    return ""


async def beginning_of(call: Call, response: aiohttp.ClientResponse) -> bytes:
    """Read the beginning of a refusal: all of it, as a rule; `relay` passes it on before the rest."""
    read = b""
    call.patience.for_amazon()
    try:
        while len(read) < MOST_OF_REFUSAL and (chunk := await response.content.readany()):
            read += chunk
    except (aiohttp.ClientError, OSError):
        pass  # relay meets the same end, and knows what to do
    return read


async def _stream(
    call: Call, response: aiohttp.ClientResponse, answer: web.StreamResponse, chunk: bytes, reader: Reader | None
) -> None:
    """Pass the rest of an answer's body on, behind the `chunk` that was read before."""
    while True:
        if chunk:
            await _pass_on(call, answer, call.mask.feed(chunk))
            if reader is not None:
                reader.feed(chunk)
        call.patience.for_amazon()
        chunk = await response.content.readany()
        if not chunk:
            break
    await _pass_on(call, answer, call.mask.end())
    if reader is not None:
        reader.end()


async def _pass_on(call: Call, answer: web.StreamResponse, data: bytes) -> None:
    if data:
        call.patience.for_app(call.exchange.response_bytes)
        await answer.write(data)
        call.exchange.response_bytes += len(data)


def _translated(exc: Exception) -> ProxyError:
    """Return the error of ours for what aiohttp raised; its own text may quote the request, so none of it is kept."""
    if isinstance(exc, (aiohttp.ConnectionTimeoutError, TimeoutError)):
        return ConnectTimeout("no connection to Amazon in time", "Try again; check the network if it goes on.")
    if isinstance(exc, aiohttp.ClientConnectorCertificateError):
        return UpstreamUnreachable(
            "Amazon's TLS certificate is not trusted", "Check pool.ca_file and what stands between here and Amazon."
        )
    if isinstance(exc, (aiohttp.ClientConnectorError, aiohttp.ClientSSLError)):
        return UpstreamUnreachable("no connection to Amazon", "Check the network and the endpoints setting.")
    return UpstreamBroken(
        "Amazon ended the connection without a proper answer",
        "A write may or may not have been done: look before you repeat it.",
    )
