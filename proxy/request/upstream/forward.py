"""How does the request reach Amazon, and the answer the app, changed in nothing but what must change?

Strip first, add last: what belongs to one hop, to the proxy or to the app's own credentials goes, then Amazon's
headers are set. Bodies are streamed both ways as they are, and both ways at once.
"""

import asyncio
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from functools import lru_cache
from operator import itemgetter
from typing import Any

from aiohttp import ClientError, web
from aiohttp.http import HttpVersion11
from multidict import CIMultiDict, CIMultiDictProxy

from proxy.amazon.headers import credential_headers
from proxy.config import Config
from proxy.errors import ConnectTimeout, MalformedRequest, ProxyError, UpstreamBroken, UpstreamUnreachable
from proxy.request.context import RequestContext
from proxy.request.header_cache import HeaderBlock
from proxy.request.routing import Route
from proxy.request.tokens.provider import Token
from proxy.request.tokens.report_documents import BodyTap
from proxy.request.upstream.connector import Origin, ResumingContext
from proxy.request.upstream.deadlines import RequestDeadline
from proxy.request.upstream.http1 import ClientConnection, RemoteProtocolError, Response
from proxy.request.upstream.pool import ConnectionPool, field_lines
from proxy.request.upstream.response import (
    HOP_BY_HOP,
    ResponseHead,
    UpstreamResponse,
    abort_connection,
    named_in_connection,
)
from proxy.request.upstream.token_redaction import NullRedactor, TokenRedactor

# What an app sends that is not for Amazon: its own credentials and those of AWS signatures, what the proxy sets
# itself, what names the hops and traces inside the user's network, and what would have some servers take the request
# for another method or path than was judged.
STRIPPED_HEADERS = frozenset(
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
STRIPPED_PREFIXES = ("x-sp-", "x-forwarded-")

# Amazon's front end refuses these on GET and HEAD (DOC "API request validation for 400 errors with HTML response").
BODY_FIELDS = frozenset({"content-length", "content-type", "content-encoding"})
BODILESS = frozenset({"GET", "HEAD"})
_BODY_LENGTH = frozenset({"content-length", "transfer-encoding"})

# Written with `_`, they are others than these, but not for everybody.
LOOKALIKES = BODY_FIELDS

MAX_BUFFERED = 128 * 1024  # bytes of an app's body that are kept until Amazon has answered
MAX_ERROR_BODY = 16 * 1024  # bytes of a refusal of Amazon's that are looked at

_VALUE = itemgetter(1)
_MAX_ORIGINS = 64  # addresses that are kept taken apart


def check_body(method: str, head: HeaderBlock) -> None:
    """Raise MalformedRequest for a body on GET or HEAD: Amazon answers that with a page of HTML."""
    if method not in BODILESS or _BODY_LENGTH.isdisjoint(head.names):
        return
    if "Transfer-Encoding" in head.headers or head.headers.get("Content-Length", "0").strip("0"):
        raise MalformedRequest(f"a {method} request has a body", "Send it without a body, or use POST.")


def end_to_end_headers(method: str, headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    """Return what of an app's headers goes to Amazon, in order, repeated fields kept apart."""
    fits = _fits_bodiless if method in BODILESS else _fits
    kept = [field for field in headers.items() if fits(field[0])]
    if "Connection" in headers:
        named = named_in_connection(headers)
        kept = [field for field in kept if field[0].lower().replace("_", "-") not in named]
    if not all(map(str.isascii, map(_VALUE, kept))) and not all(map(_is_utf8, map(_VALUE, kept))):
        raise MalformedRequest("a header's value is not UTF-8", "Send header values in ASCII or UTF-8.")
    return CIMultiDict(kept)


def upstream_header_lines(method: str, head: HeaderBlock) -> bytes:
    """Return the lines of an app's fields that go to Amazon; raise MalformedRequest as `cleaned` does."""
    if method in BODILESS:
        if head.bodiless_lines is None:
            head.bodiless_lines = field_lines(list(end_to_end_headers(method, head.headers).items()))
        return head.bodiless_lines
    if head.lines is None:
        kept = end_to_end_headers(method, head.headers)
        head.has_content_length = "Content-Length" in kept  # a Connection may have named the one that came
        head.lines = field_lines(list(kept.items()))
    return head.lines


@lru_cache(maxsize=512)
def _fits_bodiless(name: str) -> bool:
    return _is_for_amazon(name, is_bodiless=True)


@lru_cache(maxsize=512)
def _fits(name: str) -> bool:
    return _is_for_amazon(name, is_bodiless=False)


def _is_for_amazon(name: str, *, is_bodiless: bool) -> bool:
    """Return whether a field goes to Amazon, as far as its name says; the names that apps use are judged once."""
    # Some servers read `_` as `-`: x_amz_access_token must not slip through as another spelling.
    lower = name.lower().replace("_", "-")
    if ("_" in name and lower in LOOKALIKES) or (is_bodiless and lower in BODY_FIELDS):
        return False
    return lower not in HOP_BY_HOP and lower not in STRIPPED_HEADERS and not lower.startswith(STRIPPED_PREFIXES)


def _is_utf8(value: str) -> bool:
    # A byte that is not UTF-8 arrives as a lone surrogate, and would be left out without a word on the way on.
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


_NO_REDACTION = NullRedactor()


class UpstreamCall:
    """One request on its way: what was decided, how patient to be, and its body.

    The body is streamed as it comes, and kept up to a bound, so that it can be sent again.
    """

    def __init__(
        self,
        request: web.BaseRequest,
        head: HeaderBlock,
        route: Route,
        context: RequestContext,
        deadline: RequestDeadline,
    ) -> None:
        self.request = request
        self.headers = head
        self.route = route
        self.context = context
        self.deadline = deadline
        self.has_account_slot = False  # among the account's requests at Amazon
        self.needs_fresh_connection = False  # the last attempt broke on one that had been idle
        self.redactor: TokenRedactor = _NO_REDACTION  # for the token that went with it
        self._kept: list[bytes] | None = []
        self._kept_size = 0
        self._is_read = not request.body_exists

    @property
    def is_replayable(self) -> bool:
        """Whether all of it is at hand."""
        return self._is_read and self._kept is not None

    async def body(self) -> AsyncIterator[bytes]:
        """Yield the body: as it comes the first time, from what was kept after that."""
        if self._is_read:
            for chunk in self._kept or ():
                yield chunk
            return
        send_100_continue(self.request)
        while chunk := await self._next():
            self._keep(chunk)
            self.context.request_bytes += len(chunk)
            yield chunk
        self._is_read = True

    def buffered_body(self) -> bytes | None:
        """Return the body where all of it has come already; None where it is still to be waited for."""
        content = self.request.content
        if not self._is_read and content.is_eof() and content.exception() is None:
            self._is_read = True
            data = content.read_nowait()
            self._keep(data)
            self.context.request_bytes += len(data)
            return data
        return b"".join(self._kept) if self._is_read and self._kept is not None else None

    async def _next(self) -> bytes:
        self.deadline.wait_for_client(self.context.request_bytes)
        try:
            chunk = await self.request.content.readany()
        except (web.RequestPayloadError, ClientError, ValueError) as exc:
            error = MalformedRequest("the request's body is not well-formed", "Check its framing.")
            self.context.upload_error = error
            raise error from exc
        self.deadline.wait_for_upstream()
        return chunk

    def _keep(self, chunk: bytes) -> None:
        self._kept_size += len(chunk)
        if self._kept is not None and self._kept_size <= MAX_BUFFERED:
            self._kept.append(chunk)
        else:
            self._kept = None


def send_100_continue(request: web.BaseRequest) -> None:
    """Tell an app that waits for it to send its body (RFC 9110 section 10.1.1); everything is checked by now."""
    expects = request.headers.get("Expect", "").lower() == "100-continue" and request.version >= HttpVersion11
    if expects and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


def amazon_pool(config: Config, limit: int, tls: ResumingContext | None = None) -> ConnectionPool:
    """Return the connections to Amazon, `limit` of them at most; `tls` as in Pool."""
    return ConnectionPool(config, limit, tls=tls)


@lru_cache(maxsize=_MAX_ORIGINS)
def _origin_of(endpoint: str) -> tuple[Origin, bytes]:
    """Return whom an endpoint is to connect to, and the line that says so."""
    origin = Origin.of(endpoint)
    return origin, field_lines([("Host", origin.authority)])


class Forwarder:
    """Sends requests to Amazon and streams the answers back."""

    def __init__(
        self, *, session: ConnectionPool, user_agents: Mapping[str, str], wall: Callable[[], float] = time.time
    ) -> None:
        self._pool = session
        self._user_agents = user_agents
        self._wall = wall

    def send(self, call: UpstreamCall, token: Token) -> Coroutine[Any, Any, Response]:
        """Send the request and return Amazon's answer as soon as its head is there; its body is still to be read.

        Raises an error of ours for everything that keeps an answer from coming.
        """
        call.context.begin_attempt()
        call.redactor = TokenRedactor(token.secret_suffix)
        own = upstream_header_lines(call.request.method, call.headers)
        credentials = self._credentials(call.route.application, token)
        return self.send_with(call, own + credentials, says_length=call.headers.has_content_length)

    async def send_with(self, call: UpstreamCall, lines: bytes, *, says_length: bool) -> Response:
        """Do what `send` does with these lines of fields and no other; they say the body's length, or do not.

        The request goes to the target's endpoint, whatever that is.
        """
        call.deadline.wait_for_upstream()
        origin, host = _origin_of(call.route.endpoint)
        head, is_chunked = _head(call, host + lines, says_length=says_length)
        connection = await self._connection(origin, fresh=call.needs_fresh_connection)
        was_used = connection.served > 0
        response = _begin(connection, call, head, is_chunked=is_chunked)
        try:
            await response.head()
        except RemoteProtocolError as exc:
            error = call.context.upload_error or UpstreamBroken(
                f"Amazon gave no proper answer: {exc}",
                "A write may or may not have been done: look before you repeat it.",
            )
            # An idle connection that Amazon closed just now, perhaps.
            call.needs_fresh_connection = was_used and isinstance(error, UpstreamBroken)
            raise error from exc
        except BaseException:
            await response.end()
            raise
        return response

    def _credentials(self, application: str, token: Token) -> bytes:
        """Return the lines that authenticate a call: the same for all that go out with one token in one second."""
        wall = self._wall
        now = wall()
        if token.header_lines != int(now):
            headers = credential_headers(token.value, self._user_agents[application], now)
            token.lines, token.header_lines = field_lines(list(headers.items())), int(now)
        return token.lines

    async def _connection(self, origin: Origin, *, fresh: bool) -> ClientConnection:
        connection = None if fresh else self._pool.pop_idle(origin)
        if connection is not None:
            return connection
        try:
            return await self._pool.acquire(origin, fresh=fresh)
        except OSError as exc:
            raise _connection_error(exc) from exc

    async def stream(
        self, call: UpstreamCall, response: Response, *, prefix: bytes = b"", reader: BodyTap | None = None
    ) -> UpstreamResponse:
        """Stream the answer to the app; break its connection where Amazon's answer breaks off.

        A client must never take half an answer for a whole one. `beginning` is what was read of it before; `reader`
        reads along.
        """
        request, context = call.request, call.context
        # Where it came before the upload ended, what still comes is not a request.
        is_early = request.body_exists and not request.content.at_eof()
        passed = UpstreamResponse(response, request, context, call.redactor, is_last=is_early)
        try:
            context.response_started = True
            if response.is_complete and reader is None:
                data = call.redactor.redact(prefix + response.read_buffered())
                context.response_bytes += len(data)
                framed = passed.encode_chunk(data) + passed.end if passed.is_chunked else data
                if _write(call, passed.head + framed):
                    await _drain(call)
            else:
                await _stream(call, response, passed, prefix, reader)
        except (RemoteProtocolError, ConnectionError):
            context.truncated = True
            abort_connection(request)
        except asyncio.CancelledError:
            abort_connection(request)
            raise
        finally:
            if response.upload is not None or context.truncated or not response.at_end:
                await response.end()
        return passed

    async def stream_rewritten(
        self,
        call: UpstreamCall,
        response: Response,
        head: ResponseHead,
        chunk: bytes,
        chunks: AsyncGenerator[bytes, None] | None = None,
    ) -> UpstreamResponse:
        """Stream what was made of an answer, a first piece and all `pieces`, behind a head of its own.

        Where it breaks off, so does the app's connection, if anything went out on it. Raises UpstreamBroken before
        that, and what `pieces` raise.
        """
        request, context = call.request, call.context
        is_early = request.body_exists and not request.content.at_eof()
        passed = UpstreamResponse(head, request, context, call.redactor, is_last=is_early)
        try:
            await _stream_rewritten(call, passed, chunk, chunks)
        except BaseException as exc:
            if not context.response_started:
                if isinstance(exc, RemoteProtocolError):
                    raise UpstreamBroken("Amazon's answer broke off", "Try again.") from exc
                raise
            context.truncated = True
            abort_connection(request)
            if not isinstance(exc, (RemoteProtocolError, ConnectionError)):
                raise
        finally:
            if chunks is not None:
                await chunks.aclose()
            if response.upload is not None or context.truncated or not response.at_end:
                await response.end()
        return passed


def _head(call: UpstreamCall, lines: bytes, *, says_length: bool) -> tuple[bytes, bool]:
    """Return the request's head, and whether its body goes in chunks."""
    method, is_chunked, framing = call.request.method, False, b"\r\n"
    if method not in BODILESS and not says_length:
        is_chunked = call.request.body_exists
        framing = b"Transfer-Encoding: chunked\r\n\r\n" if is_chunked else b"Content-Length: 0\r\n\r\n"
    # The path that Amazon sees is the one that was decided on, byte for byte; the guard let no line break in.
    line = f"{method} {call.route.path_and_query} HTTP/1.1\r\n".encode("ascii")
    return b"".join((line, lines, framing)), is_chunked


def _begin(connection: ClientConnection, call: UpstreamCall, head: bytes, *, is_chunked: bool) -> Response:
    """Send what is there of a request; where more of its body is to come, that goes on beside the answer."""
    if not call.request.body_exists:
        return connection.send(call.request.method, head)
    body = call.buffered_body()
    if body is not None:
        return connection.send(
            call.request.method, head + _encode_chunk(body, is_chunked=is_chunked) + _end(is_chunked=is_chunked)
        )
    response = connection.send(call.request.method, head)
    response.upload = asyncio.create_task(_upload(connection, call, is_chunked=is_chunked), name="upload")
    return response


async def _upload(connection: ClientConnection, call: UpstreamCall, *, is_chunked: bool) -> None:
    """Send the body as it comes. Where it does not come whole, the request must not seem to."""
    try:
        async for chunk in call.body():
            await connection.write(_encode_chunk(chunk, is_chunked=is_chunked))
        if is_chunked:
            await connection.write(_end(is_chunked=True))
    except RemoteProtocolError:
        pass  # whoever waits for the answer learns of it
    except BaseException as exc:
        connection.abort()
        if not isinstance(exc, MalformedRequest):
            raise


def _encode_chunk(data: bytes, *, is_chunked: bool) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data) if is_chunked and data else data


def _end(*, is_chunked: bool) -> bytes:
    return b"0\r\n\r\n" if is_chunked else b""


async def peek(call: UpstreamCall, response: Response) -> bytes:
    """Read the beginning of a refusal: all of it, as a rule; `relay` passes it on before the rest."""
    read = b""
    call.deadline.wait_for_upstream()
    try:
        while len(read) < MAX_ERROR_BODY and (chunk := await response.read()):
            read += chunk
    except RemoteProtocolError:
        pass  # relay meets the same end, and knows what to do
    return read


async def _stream(
    call: UpstreamCall, response: Response, passed: UpstreamResponse, chunk: bytes, reader: BodyTap | None
) -> None:
    """Write the answer, behind its head the `chunk` that was read before; what is there goes out in one piece."""
    out = passed.head
    while True:
        if chunk:
            if reader is not None:
                reader.feed(chunk)
            data = call.redactor.feed(chunk)
            call.context.response_bytes += len(data)
            out += passed.encode_chunk(data)
        if response.at_end:
            break
        if out and not response.is_waiting:
            if _write(call, out):
                await _drain(call)
            out = b""
        call.deadline.wait_for_upstream()
        chunk = await response.read()
    if reader is not None:
        reader.end()
    data = call.redactor.end()
    call.context.response_bytes += len(data)
    if _write(call, out + passed.encode_chunk(data) + passed.end):
        await _drain(call)


async def _stream_rewritten(
    call: UpstreamCall, passed: UpstreamResponse, chunk: bytes, chunks: AsyncGenerator[bytes, None] | None
) -> None:
    """Write what was made of an answer; nothing goes out before there is a second piece, or no more of them."""
    context, out = call.context, passed.head
    while True:
        data = call.redactor.feed(chunk)
        context.response_bytes += len(data)
        out += passed.encode_chunk(data)
        chunk = await anext(chunks, b"") if chunks is not None else b""
        if not chunk:
            break
        context.response_started = True
        if _write(call, out):
            await _drain(call)
        out = b""
    context.response_started, data = True, call.redactor.end()
    context.response_bytes += len(data)
    if _write(call, out + passed.encode_chunk(data) + passed.end):
        await _drain(call)


def _write(call: UpstreamCall, data: bytes) -> bool:
    """Write to the app; return whether to wait until it has taken more of it."""
    protocol = call.request.protocol
    transport = protocol.transport
    if transport is None or transport.is_closing():
        raise ConnectionResetError("the app left")
    if data:
        transport.write(data)
    return protocol.writing_paused


async def _drain(call: UpstreamCall) -> None:
    call.deadline.wait_for_client(call.context.response_bytes)
    await call.request.writer.drain()


def _connection_error(exc: OSError) -> ProxyError:
    """Return the error of ours for what kept a connection from coming about."""
    if isinstance(exc, TimeoutError):
        return ConnectTimeout("no connection to Amazon in time", "Try again; check the network if it goes on.")
    if isinstance(exc, ssl.SSLCertVerificationError):
        return UpstreamUnreachable(
            "Amazon's TLS certificate is not trusted", "Check pool.ca_file and what stands between here and Amazon."
        )
    return UpstreamUnreachable("no connection to Amazon", "Check the network and the endpoints setting.")
