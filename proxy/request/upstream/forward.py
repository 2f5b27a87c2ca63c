"""Forwarding: the request to Amazon, and Amazon's response to the app.

Strip first, add last: what belongs to one hop, to the proxy or to the app's own credentials is removed, then Amazon's
headers are set. Bodies are streamed unchanged in both directions, and in both at once.
"""

import asyncio
import ssl
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from functools import lru_cache
from typing import Any, Protocol

from proxy.amazon.headers import credential_headers
from proxy.errors import ConnectTimeout, MalformedRequest, ProxyError, UpstreamBroken, UpstreamUnreachable
from proxy.request.token import Token
from proxy.request.upstream.call import UpstreamCall
from proxy.request.upstream.connector import Origin
from proxy.request.upstream.http1 import ClientConnection, RemoteProtocolError, Response
from proxy.request.upstream.pool import ConnectionPool, field_lines
from proxy.request.upstream.request_headers import BODILESS, upstream_header_lines
from proxy.request.upstream.response import ResponseHead, UpstreamResponse, abort_connection
from proxy.request.upstream.token_redaction import TokenRedactor

MAX_ERROR_BODY = 16 * 1024  # bytes of an error response of Amazon's that are parsed
_MAX_ORIGINS = 64  # endpoints whose parsed form is cached


class BodyTap(Protocol):
    """Reads a response's body along with the app, without changing it."""

    def feed(self, chunk: bytes) -> None:
        """Read the next bytes."""

    def end(self) -> None:
        """Read the end of a complete body."""


@lru_cache(maxsize=_MAX_ORIGINS)
def _origin_of(endpoint: str) -> tuple[Origin, bytes]:
    """Return the origin of an endpoint, and the line of its `Host` field."""
    origin = Origin.of(endpoint)
    return origin, field_lines([("Host", origin.authority)])


class Forwarder:
    """Sends requests to Amazon and streams the responses back; `wall` is Unix time in seconds."""

    def __init__(
        self, *, session: ConnectionPool, user_agents: Mapping[str, str], wall: Callable[[], float] = time.time
    ) -> None:
        self._pool = session
        self._user_agents = user_agents
        self._wall = wall

    def send(self, call: UpstreamCall, token: Token) -> Coroutine[Any, Any, Response]:
        """Send the request; return Amazon's response once its head has arrived, with its body still to be read.

        Raises ConnectTimeout, UpstreamUnreachable, UpstreamBroken or MalformedRequest where no response arrives.
        """
        # Not a coroutine function: that would be one more frame on every request.
        call.context.begin_attempt()
        call.redactor = TokenRedactor(token.secret_suffix)
        own = upstream_header_lines(call.request.method, call.headers)
        credentials = self._credentials(call.route.application, token)
        return self.send_with(call, own + credentials, has_length=call.headers.has_content_length)

    async def send_with(self, call: UpstreamCall, lines: bytes, *, has_length: bool) -> Response:
        """Send the request with exactly these header lines to the route's endpoint; return as `send` does.

        `has_length` says whether Content-Length is among the lines.
        """
        call.deadline.wait_for_upstream()
        origin, host = _origin_of(call.route.endpoint)
        head, is_chunked = _head(call, host + lines, has_length=has_length)
        connection = await self._connection(origin, fresh=call.needs_fresh_connection)
        was_used = connection.request_count > 0
        response = _begin(connection, call, head, is_chunked=is_chunked)
        try:
            await response.receive_head()
        except RemoteProtocolError as exc:
            error = call.context.upload_error or UpstreamBroken(
                f"Amazon sent no valid response: {exc}",
                "A write may or may not have been done: check before you repeat it.",
            )
            # Amazon may have closed the idle connection while the request was being sent (RFC 9112 section 9.3.1).
            call.needs_fresh_connection = was_used and isinstance(error, UpstreamBroken)
            raise error from exc
        except BaseException:
            await response.end()
            raise
        return response

    def _credentials(self, application: str, token: Token) -> bytes:
        """Return the lines that authenticate a call: x-amz-date counts seconds, so they are cached for one second."""
        wall = self._wall
        now = wall()
        if token.header_lines_second != int(now):
            headers = credential_headers(token.value, self._user_agents[application], now)
            token.header_lines, token.header_lines_second = field_lines(list(headers.items())), int(now)
        return token.header_lines

    async def _connection(self, origin: Origin, *, fresh: bool) -> ClientConnection:
        connection = None if fresh else self._pool.pop_idle(origin)
        if connection is not None:
            return connection
        try:
            return await self._pool.acquire(origin, fresh=fresh)
        except OSError as exc:
            raise _connection_error(exc) from exc

    async def stream(
        self, call: UpstreamCall, response: Response, *, prefix: bytes = b"", tap: BodyTap | None = None
    ) -> UpstreamResponse:
        """Stream the response to the app; abort the app's connection where Amazon's response is cut off.

        A client must never mistake a truncated response for a complete one (RFC 9112 section 8). `prefix` is the part
        of the body that was read before; `tap` reads along.
        """
        request, context = call.request, call.context
        # A response before the end of the upload: what the app still sends is body, and must not be read as a request.
        is_early = request.body_exists and not request.content.at_eof()
        forwarded = UpstreamResponse(response, request, context, call.redactor, is_last=is_early)
        try:
            context.response_started = True
            if response.is_complete and tap is None:
                data = call.redactor.redact(prefix + response.read_buffered())
                context.response_bytes += len(data)
                framed = forwarded.encode_chunk(data) + forwarded.end if forwarded.is_chunked else data
                if _write(call, forwarded.head + framed):
                    await _drain(call)
            else:
                await _stream(call, response, forwarded, prefix, tap)
        except (RemoteProtocolError, ConnectionError):
            context.truncated = True
            abort_connection(request)
        except asyncio.CancelledError:
            abort_connection(request)
            raise
        finally:
            if response.upload is not None or context.truncated or not response.at_end:
                await response.end()
        return forwarded

    async def stream_rewritten(
        self,
        call: UpstreamCall,
        response: Response,
        head: ResponseHead,
        chunk: bytes,
        chunks: AsyncGenerator[bytes, None] | None = None,
    ) -> UpstreamResponse:
        """Stream a rewritten response: `head`, then `chunk` and all `chunks`.

        Where it is cut off after bytes were sent to the app, the app's connection is aborted. Before that, raises
        UpstreamBroken and whatever `chunks` raises.
        """
        request, context = call.request, call.context
        is_early = request.body_exists and not request.content.at_eof()
        forwarded = UpstreamResponse(head, request, context, call.redactor, is_last=is_early)
        try:
            await _stream_rewritten(call, forwarded, chunk, chunks)
        except BaseException as exc:
            if not context.response_started:
                if isinstance(exc, RemoteProtocolError):
                    raise UpstreamBroken("Amazon's response was cut off", "Try again.") from exc
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
        return forwarded


def _head(call: UpstreamCall, lines: bytes, *, has_length: bool) -> tuple[bytes, bool]:
    """Return the request's head, and whether its body is sent in chunks (RFC 9112 section 6.3)."""
    method, is_chunked, framing = call.request.method, False, b"\r\n"
    if method not in BODILESS and not has_length:
        is_chunked = call.request.body_exists
        framing = b"Transfer-Encoding: chunked\r\n\r\n" if is_chunked else b"Content-Length: 0\r\n\r\n"
    # Byte for byte the path that was authorized. It has no line break: validation accepts none in a request's target.
    line = f"{method} {call.route.path_and_query} HTTP/1.1\r\n".encode("ascii")
    return b"".join((line, lines, framing)), is_chunked


def _begin(connection: ClientConnection, call: UpstreamCall, head: bytes, *, is_chunked: bool) -> Response:
    """Send the request; a body that has not arrived completely is uploaded by a task, beside the response."""
    if not call.request.body_exists:
        return connection.send(call.request.method, head)
    body = call.buffered_body()
    if body is not None:
        return connection.send(
            call.request.method, head + _encode_chunk(body, is_chunked=is_chunked) + _last_chunk(is_chunked=is_chunked)
        )
    response = connection.send(call.request.method, head)
    response.upload = asyncio.create_task(_upload(connection, call, is_chunked=is_chunked), name="upload")
    return response


async def _upload(connection: ClientConnection, call: UpstreamCall, *, is_chunked: bool) -> None:
    """Send the body as it arrives; abort the connection where it is cut off, so that it cannot look complete."""
    try:
        async for chunk in call.body():
            await connection.write(_encode_chunk(chunk, is_chunked=is_chunked))
        if is_chunked:
            await connection.write(_last_chunk(is_chunked=True))
    except RemoteProtocolError:
        pass  # `Response.receive_head` and `read` raise the same error
    except BaseException as exc:
        connection.abort()
        if not isinstance(exc, MalformedRequest):
            raise


def _encode_chunk(data: bytes, *, is_chunked: bool) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data) if is_chunked and data else data


def _last_chunk(*, is_chunked: bool) -> bytes:
    return b"0\r\n\r\n" if is_chunked else b""


async def peek(call: UpstreamCall, response: Response) -> bytes:
    """Read the first MAX_ERROR_BODY bytes of an error response, usually all of it; `stream` sends them as `prefix`."""
    prefix = b""
    call.deadline.wait_for_upstream()
    try:
        while len(prefix) < MAX_ERROR_BODY and (chunk := await response.read()):
            prefix += chunk
    except RemoteProtocolError:
        pass  # `stream` meets the same error, and handles it
    return prefix


async def _stream(
    call: UpstreamCall, response: Response, forwarded: UpstreamResponse, chunk: bytes, tap: BodyTap | None
) -> None:
    """Write the response: its head, `chunk`, which was read before, and the rest; what has arrived in one write."""
    out = forwarded.head
    while True:
        if chunk:
            if tap is not None:
                tap.feed(chunk)
            data = call.redactor.feed(chunk)
            call.context.response_bytes += len(data)
            out += forwarded.encode_chunk(data)
        if response.at_end:
            break
        if out and not response.has_data:
            if _write(call, out):
                await _drain(call)
            out = b""
        call.deadline.wait_for_upstream()
        chunk = await response.read()
    if tap is not None:
        tap.end()
    data = call.redactor.end()
    call.context.response_bytes += len(data)
    if _write(call, out + forwarded.encode_chunk(data) + forwarded.end):
        await _drain(call)


async def _stream_rewritten(
    call: UpstreamCall, forwarded: UpstreamResponse, chunk: bytes, chunks: AsyncGenerator[bytes, None] | None
) -> None:
    """Write a rewritten response; nothing is sent before the second chunk or the end is known.

    So an error in the first chunk can still become an error response.
    """
    context, out = call.context, forwarded.head
    while True:
        data = call.redactor.feed(chunk)
        context.response_bytes += len(data)
        out += forwarded.encode_chunk(data)
        chunk = await anext(chunks, b"") if chunks is not None else b""
        if not chunk:
            break
        context.response_started = True
        if _write(call, out):
            await _drain(call)
        out = b""
    context.response_started, data = True, call.redactor.end()
    context.response_bytes += len(data)
    if _write(call, out + forwarded.encode_chunk(data) + forwarded.end):
        await _drain(call)


def _write(call: UpstreamCall, data: bytes) -> bool:
    """Write to the app; return whether to wait until its connection accepts more; raise ConnectionResetError."""
    protocol = call.request.protocol
    transport = protocol.transport
    if transport is None or transport.is_closing():
        raise ConnectionResetError("the app closed its connection")
    if data:
        transport.write(data)
    return protocol.writing_paused


async def _drain(call: UpstreamCall) -> None:
    call.deadline.wait_for_client(call.context.response_bytes)
    await call.request.writer.drain()


def _connection_error(exc: OSError) -> ProxyError:
    """Translate the error of a failed connection attempt."""
    if isinstance(exc, TimeoutError):
        return ConnectTimeout("no connection to Amazon in time", "Try again; check the network if it goes on.")
    if isinstance(exc, ssl.SSLCertVerificationError):
        return UpstreamUnreachable(
            "Amazon's TLS certificate is not trusted",
            "Check pool.ca_file, and what inspects TLS on the way to Amazon.",
        )
    return UpstreamUnreachable("no connection to Amazon", "Check the network and the endpoints setting.")
