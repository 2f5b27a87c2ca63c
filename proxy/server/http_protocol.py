"""HTTP/1.1 towards clients: framing checks, the timeout of a request's head, responses to malformed requests.

It builds on aiohttp's low-level server, without routing and middleware. Defaults of aiohttp 3.14 that do not fit here:
no timeout for a request's head, no cap on connections, error pages that quote the request, decompressed bodies.
"""

import asyncio
from dataclasses import dataclass
from typing import Any

from aiohttp import StreamReader, web
from aiohttp.http import HttpVersion10, HttpVersion11
from aiohttp.http_exceptions import LineTooLong

from proxy.config import Config
from proxy.errors import (
    HeaderTooLarge,
    InternalError,
    MalformedRequest,
    ProxyError,
    RequestHeaderTimeout,
    TooManyConnections,
)
from proxy.observability.logging import LOGGER
from proxy.observability.metrics import Metrics
from proxy.request.aiohttp_internals import (
    EMPTY_PAYLOAD,
    UNREADABLE,
    ConnectionProtocol,
    Handle,
    LeanRequest,
    ParseError,
    RawRequestMessage,
    set_version,
)
from proxy.request.authentication import PEER, UNKNOWN_PEER
from proxy.request.context import RequestContext
from proxy.request.upstream.response import CLOSE_AFTER, ErrorResponse, UpstreamResponse, abort_connection
from proxy.request.validation import VERSION_REFUSED
from proxy.server.connection_limiter import ConnectionLimiter
from proxy.server.framing import MAX_LINE, ends_connection, is_plain_end, is_valid_request_line, may_reuse_after
from proxy.server.peer import peer_of

SUPPORTED_VERSIONS = (HttpVersion10, HttpVersion11)
LINGERING_TIMEOUT = 5.0  # seconds in which an unread body is discarded after the response (nginx: lingering_timeout)

INVALID_BYTE = b"\x00"  # no request begins with it, so the parser reports an error

_EMPTY_SUMMARY = RequestContext("", 0.0).summary()


@dataclass(frozen=True, slots=True)
class ConnectionSettings:
    """Settings of every connection of a listener; times in seconds, sizes in bytes."""

    header_timeout: float
    header_size: int
    write_timeout: float
    metrics: Metrics

    @classmethod
    def of(cls, config: Config, metrics: Metrics) -> "ConnectionSettings":
        """Return the settings that the configuration gives."""
        timeouts = config.timeouts
        return cls(timeouts.header, config.bounds.header_size, timeouts.body_idle, metrics)


class ServerConnection(ConnectionProtocol):
    """One client connection.

    `is_self_check` is set on a connection of the proxy's own: it takes no slot, and is counted nowhere.
    """

    __slots__ = (
        "_final_body",
        "_head_bytes",
        "_head_timer",
        "_is_counted",
        "_is_draining",
        "_last_two_bytes",
        "_limiter",
        "_may_reuse",
        "_options",
        "_request_line_buffer",
        "is_self_check",
        "listener",
        "peer",
    )

    def __init__(
        self,
        manager: web.Server,
        *,
        options: ConnectionSettings,
        limiter: ConnectionLimiter,
        listener: str,
        **others: Any,
    ) -> None:
        super().__init__(manager, **others)
        self.listener = listener
        self.peer = UNKNOWN_PEER
        self.is_self_check = False
        self._options = options
        self._limiter = limiter
        self._is_counted = False
        self._is_draining = False
        self._final_body: StreamReader | None = None  # the body of a request that `ends_connection`
        self._may_reuse = False  # whether it does not, if that body is seen to end without a trailer section
        self._last_two_bytes = b""  # of what was received before
        # The head of a request so far; None where it is not known whether the next bytes begin one.
        self._request_line_buffer: bytes | None = b""
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0

    @property
    def is_draining(self) -> bool:
        """Whether the connection ends with its next response."""
        return self._is_draining

    @property
    def is_busy(self) -> bool:
        """Whether a request is being served, or waits to be."""
        return self.is_serving or bool(self.queue)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start to serve a connection, or refuse it where there are too many."""
        super().connection_made(transport)
        if self.task is not None:
            self.task.add_done_callback(self.on_task_done)
        if self.transport is None:
            return
        # With a write buffer of 0, `drain()` returns once the kernel has taken every byte. Otherwise up to 64 KiB
        # (asyncio's default) would be left to a transport that no write timeout watches.
        self.transport.set_write_buffer_limits(0)
        if self.is_self_check:
            return
        self._is_counted = True
        if not self._limiter.try_acquire(self, self.listener):
            busy = TooManyConnections("too many connections", "Use fewer, and keep them open.", retry_after=1.0)
            self.reject(busy)
            return
        self.peer = peer_of(self.transport)
        # From the connection's first moment, not its first byte: a silent connection holds a descriptor too.
        self._head_timer = self.loop.call_later(self._options.header_timeout, self.on_header_timeout)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Cancel the timer and release the slot."""
        self._end_head_timer()
        if self._is_counted:
            self._is_counted = False
            self._limiter.release(self, self.listener)
        super().connection_lost(exc)

    def on_task_done(self, task: "asyncio.Task[None]") -> None:
        """Report an exception that ended the connection's task, and close the connection.

        aiohttp does neither, and has no timer for such a connection: with aiohttp 3.14.3, where the task failed on a
        missing name, a client got no byte in 200 seconds, and the log no line.
        """
        if task.cancelled() or (exc := task.exception()) is None:
            return
        self.loop.call_exception_handler(
            {"message": "the task of a client connection failed", "exception": exc, "protocol": self}
        )
        if self.transport is not None:
            self.transport.abort()

    # Reading.

    def data_received(self, data: bytes) -> None:
        """Parse `data`; the first byte of a head starts its timer, the last one ends it."""
        before, current = self.requests_seen, self.current_request
        # On Python 3.11 the first bytes may come before the task that waits for them has run.
        between_requests = (self.is_waiting or not before) and not self.queue
        if self._request_line_buffer is not None:
            self._request_line_buffer += data[:MAX_LINE]
            if not is_valid_request_line(self._request_line_buffer):
                data = INVALID_BYTE  # so that the response comes after those to earlier requests
        super().data_received(data)
        if self.requests_seen != before:
            is_bodiless = self.requests_seen == before + 1 and self.queue and self.queue[-1][1].is_eof()
            # The next bytes begin a request only if this one is without a body and ends with what came.
            self._request_line_buffer = b"" if is_bodiless and data.endswith(b"\r\n\r\n") else None
            self.find_final_request(self.requests_seen - before)
        if self._final_body is not None and self._final_body.is_eof():
            self.close_after_final(data)
        # Empty data is aiohttp's own call, to parse what it held back while it did not read.
        if self._final_body is not None and data:
            self._last_two_bytes = data[-2:]
        if self.requests_seen != before:
            self._limiter.mark_busy(self)
            self._end_head_timer()
            if current is not None and not current.content.is_eof() and isinstance(self.queue[-1][0], ParseError):
                # The body of the current request went on as something that is no body. aiohttp queues the error behind
                # that request, which waits for the rest of its body.
                current.content.set_exception(web.RequestPayloadError())
        elif between_requests:
            self.on_partial_head(len(data))

    def find_final_request(self, new: int) -> None:
        """Note the first of the `new` newest requests that `ends_connection`."""
        if self._final_body is not None:
            return  # it ended with the same bytes that brought these
        for message, payload in list(self.queue)[-new:]:
            if not isinstance(message, ParseError) and ends_connection(message):
                self._final_body = payload
                self._may_reuse = may_reuse_after(message)
                return

    def close_after_final(self, data: bytes) -> None:
        """Read no more, and end the connection with the response to the final request, whose body ended in `data`.

        A chunked body that had no trailer section, and nothing behind it, is no reason to.
        """
        final, self._final_body = self._final_body, None
        is_newest = not self.queue or self.queue[-1][1] is final
        if is_newest and self._may_reuse and is_plain_end(data, self._last_two_bytes):
            return
        # What was parsed behind it is not served: its header section may begin with trailer fields.
        while self.queue and self.queue[-1][1] is not final and any(payload is final for _, payload in self.queue):
            self.queue.pop()
        self._is_draining = True
        if self.current_request is not None:
            self.current_request[CLOSE_AFTER] = True
        self.close()

    def on_partial_head(self, size: int) -> None:
        """Count `size` more bytes of a head that is not complete."""
        self._head_bytes += size
        if self._head_bytes > self._options.header_size:
            self.reject(HeaderTooLarge("the request's head is too large", "Send fewer or shorter headers."))
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self._options.header_timeout, self.on_header_timeout)

    def _end_head_timer(self) -> None:
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def on_header_timeout(self) -> None:
        """End a connection whose head is late: with 408, or without a response where nothing was received."""
        if not self._head_bytes:
            self.force_close()
            return
        self.reject(
            RequestHeaderTimeout(
                "the request's head did not arrive in time", "Send the whole head within timeouts.header."
            )
        )

    # Writing.

    def drain(self) -> None:
        """End this connection: at once if it is idle, otherwise with the response to the current request."""
        if not self.is_busy:
            self.force_close()
            return
        self._is_draining = True
        if self.current_request is not None:
            self.current_request[CLOSE_AFTER] = True

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send what is left of a response within the write timeout; end a connection that is being drained."""
        if self._is_draining:
            resp.force_close()
        if resp.prepared:  # it was streamed, under timeouts of its own
            return await super().finish_response(request, resp, start_time)
        try:
            async with asyncio.timeout(self._options.write_timeout):
                return await super().finish_response(request, resp, start_time)
        except TimeoutError:
            abort_connection(request)
            return resp, True
        finally:
            if not self.queue and self._is_counted:
                self._limiter.mark_idle(self)

    def reject(self, error: ProxyError) -> None:
        """Send an error for what has not become a request, and close."""
        self._end_head_timer()
        if self.transport is not None:
            self._count(error)
            self.transport.write(ErrorResponse(error, _EMPTY_SUMMARY).as_bytes())
            self.force_close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 - it quotes the request
    ) -> web.StreamResponse:
        """Return the response to a request that could not be parsed, or whose handler failed; it quotes nothing."""
        if self.transport is None or request.writer.output_size > 0:
            # A response has begun. A second one behind it would be taken for its body, so the connection breaks.
            abort_connection(request)
            raise ConnectionError("the response has begun") from exc
        error = _error_for(status, exc)
        self._count(error)
        response = ErrorResponse(error, _EMPTY_SUMMARY)
        response.force_close()
        return response

    def _count(self, error: ProxyError) -> None:
        if self.is_self_check:
            return
        metrics = self._options.metrics
        metrics.errors.labels(error.code, error.fault).inc()
        metrics.series_of("-", "-", "unknown", "other", str(error.status), "none", "proxy").requests += 1


class ProxyConnection(ServerConnection):
    """A client connection whose requests go to Amazon; the handler writes Amazon's responses itself."""

    __slots__ = ("_head_block",)

    # Not aiohttp's, which makes a task for each request.
    start = ServerConnection.serve_in_one_task

    def __init__(self, manager: web.Server, **others: Any) -> None:
        super().__init__(manager, **others)
        self._head_block: bytes | None = None

    def data_received(self, data: bytes) -> None:
        """Parse `data`. Fast path: exactly one complete request head, between two requests.

        This decides what a request costs. The checks of `ServerConnection.data_received` are made here by three
        searches in `data`: one empty line, at its end; two spaces in the first line; a letter at the beginning (no
        empty line before the request).
        """
        line_end = data.find(b"\r")
        if (
            self._request_line_buffer != b""
            or self._head_bytes
            or self._final_body is not None
            or data.find(b"\r\n\r\n") != len(data) - 4
            or data.count(b" ", 0, line_end) != 2
            or not data[:1].isalpha()
            or (messages := self.feed_while_waiting(data)) is None
        ):
            super().data_received(data)
            return
        if len(messages) == 1:
            message, payload = messages[0]
            if (
                (payload is EMPTY_PAYLOAD or payload.is_eof())
                and type(message) is RawRequestMessage
                and not (message.upgrade or message.chunked)  # as `ends_connection`, without the call
                and message.method != "CONNECT"
            ):
                self._head_block = data[line_end:]
                self._limiter.mark_busy(self)
                if self._head_timer is not None:
                    self._end_head_timer()
                return
        self.slow_path(data)

    def slow_path(self, data: bytes) -> None:
        """Do what is left to do where a head that looked plain is not: a body follows, or the parser refused it."""
        self._request_line_buffer = None
        self.find_final_request(len(self.queue))
        if self._final_body is not None and self._final_body.is_eof():
            self.close_after_final(data)
        self._last_two_bytes = data[-2:]
        if self.queue:
            self._limiter.mark_busy(self)
            self._end_head_timer()
        else:
            self.on_partial_head(len(data))

    def new_request(
        self, message: RawRequestMessage, payload: StreamReader, task: "asyncio.Task[None]"
    ) -> web.BaseRequest:
        """Return the request that the handler is called with."""
        request = LeanRequest(message, payload, self, task, self.loop, self._head_block)
        self._head_block = None
        if (
            message.version is not HttpVersion11
            or message is UNREADABLE
            or self.peer is not UNKNOWN_PEER
            or self._is_draining
        ):
            annotate_request(request, message, self)
        return request

    async def serve(self, request: web.BaseRequest, error: ParseError | None, handle: Handle) -> bool:
        """Send the response to one request; return whether another request may follow on this connection."""
        try:
            if error is not None:
                response = self.handle_error(request, error.status, error.exc)
            else:
                response = await handle(request)
            self.end_request()
            if isinstance(response, UpstreamResponse):  # the handler has written it, under timeouts of its own
                if not self.queue and self._is_counted:
                    self._limiter.mark_idle(self)
                return response.keep_alive and not self._is_draining
            response, is_cut_off = await self.finish_response(request, response, None)
            return bool(response.keep_alive) and not is_cut_off
        except ConnectionError:
            # Half a response is out. An orderly end would make it look whole to HTTP/1.0 clients.
            abort_connection(request)
        except asyncio.CancelledError:
            self.force_close()
            raise
        except Exception:  # noqa: BLE001 - the last net, below the handler's own; logged, and the connection ended
            LOGGER.exception("internal error")
            abort_connection(request)
        self.force_close()
        return False

    async def drain_body(self, payload: StreamReader) -> None:
        """Discard the rest of a request's body for LINGERING_TIMEOUT, then end the connection.

        To close a socket with unread bytes sends a reset, and with it the client may lose the response that is still
        on the way (RFC 9112 section 9.6).
        """
        try:
            async with asyncio.timeout(LINGERING_TIMEOUT):
                while not payload.is_eof():
                    await payload.readany()
        except (TimeoutError, web.RequestPayloadError):
            self.close()


def _error_for(status: int, exc: BaseException | None) -> ProxyError:
    # aiohttp has no class of its own for too many headers.
    if isinstance(exc, LineTooLong) or "Too many headers" in str(exc):
        return HeaderTooLarge("a line of the request's head is too long", "Send fewer or shorter headers.")
    if status < 500:
        return MalformedRequest("the request is not well-formed HTTP/1.1", "Check the client that sent it.")
    return InternalError("the proxy failed", "See its log, and try again.")


def annotate_request(request: web.BaseRequest, message: RawRequestMessage, connection: ServerConnection) -> None:
    """Note on a request what later steps have to know and aiohttp does not say: version, peer, end of connection."""
    if message is UNREADABLE or message.version not in SUPPORTED_VERSIONS:
        # llhttp accepts HTTP/2.0 and HTTP/0.9 as versions, and aiohttp would write the response in them. What could
        # not be parsed counts as 1.0 there.
        set_version(request, HttpVersion11)
        if message.version not in SUPPORTED_VERSIONS:
            request[VERSION_REFUSED] = True
    if connection.peer is not UNKNOWN_PEER:
        request[PEER] = connection.peer
    if connection.is_draining:
        request[CLOSE_AFTER] = True
