"""How does a port speak HTTP: its limits, its patience with slow heads, and its answers to broken requests?

aiohttp's low-level server, without routing and middleware. Four of its defaults are not for ports like these: it
waits for ever for a request's head, takes any number of connections, answers broken requests with a page that quotes
them, and unpacks bodies.
"""

import asyncio
import re
import socket
import struct
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import StreamReader, web
from aiohttp.http import HttpVersion10, HttpVersion11, RawRequestMessage, StreamWriter
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong
from aiohttp.http_parser import HttpRequestParser
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import ERROR, RequestHandler, _ErrInfo

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
from proxy.request.authentication import PEER, UNKNOWN_PEER, Peer
from proxy.request.context import RequestContext
from proxy.request.upstream.response import CLOSE_AFTER, ErrorResponse, UpstreamResponse, abort_connection
from proxy.request.validation import VERSION_REFUSED

MAX_LINE = 16 * 1024
MAX_FIELD = 32 * 1024 + 512
SUPPORTED_VERSIONS = (HttpVersion10, HttpVersion11)
LINGERING_TIMEOUT = 5.0  # seconds in which an unread body is swallowed, so that the client gets to read its answer

# The parser that comes with aiohttp as C (llhttp) is strict; the one in Python, where there is no other, takes more.
USES_LLHTTP = HttpRequestParser.__module__ == "aiohttp._http_parser"

Handle = Callable[..., Awaitable[Any]]  # of a web.StreamResponse, or of an answer that is written already
RequestFactory = Callable[..., web.BaseRequest]

INVALID_BYTE = b"\x00"  # no request begins with it
# The first line of a request behind another one, with a space too many.
_SPACED_LINE = re.compile(rb"\r\n\r\n[A-Z]+ (?: [^\r\n]*|[^ \r\n]+ +) HTTP/[0-9.]+\r\n")

_PLAIN_END = re.compile(rb"\r\n0+\r\n\r\n\Z")  # of a chunked body, without a trailer section
_PLAIN_END_ALONE = re.compile(rb"0+\r\n\r\n")

_EMPTY_SUMMARY = RequestContext("", 0.0).summary()


@dataclass(frozen=True, slots=True)
class ConnectionSettings:
    """What holds for every connection of a listener; times in seconds, sizes in bytes."""

    header_timeout: float
    header_size: int
    write_timeout: float
    metrics: Metrics

    @classmethod
    def of(cls, config: Config, metrics: Metrics) -> "ConnectionSettings":
        """Return what the configuration says."""
        timeouts = config.timeouts
        return cls(timeouts.header, config.bounds.header_size, timeouts.body_idle, metrics)


class ConnectionLimiter:
    """How many client connections there may be at once, over all listeners, and which of them are idle.

    Where there is no room, the connection that has been idle longest gives way, those that never made a request before
    the others; a new one is refused only where all are busy.
    """

    def __init__(self, limit: int, metrics: Metrics) -> None:
        self.limit = limit
        self._metrics = metrics
        self._open: Counter[str] = Counter()
        self._unused: dict[ServerConnection, None] = {}  # in the order in which they became idle
        self._idle: dict[ServerConnection, None] = {}
        metrics.pre_scrape_hooks.append(self._export)

    def try_acquire(self, connection: "ServerConnection", listener: str) -> bool:
        """Count a new connection; return whether it may stay."""
        has_room = self._open.total() < self.limit or self._evict()
        self._open[listener] += 1
        if not has_room:
            self._metrics.closed_connections.labels(listener, "refused").inc()
            return False
        self._unused[connection] = None
        return True

    def release(self, connection: "ServerConnection", listener: str) -> None:
        """Count a connection no more."""
        self.mark_busy(connection)
        self._open[listener] -= 1

    def mark_busy(self, connection: "ServerConnection") -> None:
        """Note that a connection has a request."""
        self._unused.pop(connection, None)
        self._idle.pop(connection, None)

    def mark_idle(self, connection: "ServerConnection") -> None:
        """Note that a connection has none any more."""
        self._idle[connection] = None

    def _evict(self) -> bool:
        victim = next(iter(self._unused or self._idle), None)
        if victim is None:
            return False
        self._metrics.closed_connections.labels(victim.listener, "evicted").inc()
        self.mark_busy(victim)
        victim.force_close()
        return True

    def _export(self) -> None:
        for listener, count in self._open.copy().items():
            self._metrics.client_connections.labels(listener).set(count)


class ServerConnection(RequestHandler):
    """One client connection."""

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
        "listener",
        "peer",
    )

    def __init__(
        self,
        manager: web.Server,
        *,
        options: "ConnectionSettings",
        limiter: ConnectionLimiter,
        listener: str,
        **others: Any,
    ) -> None:
        super().__init__(manager, **others)
        self.listener = listener
        self.peer = UNKNOWN_PEER
        self._options = options
        self._limiter = limiter
        self._is_counted = False
        self._is_draining = False
        self._final_body: StreamReader | None = None  # the body of a request behind which nothing is read
        self._may_reuse = False  # but where that body is seen to end without a trailer section
        self._last_two_bytes = b""  # the last two bytes of what came of it before
        self._request_line_buffer: bytes | None = (
            b""  # what came of a request's head; None where none is known to begin
        )
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0

    @property
    def is_draining(self) -> bool:
        """Whether it ends with the answer that is next."""
        return self._is_draining

    @property
    def is_busy(self) -> bool:
        """Whether a request is being served, or waits to be."""
        return self._request_in_progress or bool(self._messages)

    def data_received(self, data: bytes) -> None:
        """Parse what came; the first byte of a head starts its timer, its last one ends it."""
        before, current = self._request_count, self._current_request
        # The first bytes may come before the task that waits for them has begun.
        between_requests = (self._waiter is not None or not before) and not self._messages
        if self._request_line_buffer is not None and not self.is_valid_request_line(data):
            data = INVALID_BYTE  # so that it is refused in its turn
        super().data_received(data)
        if self._request_count != before:
            is_bare = self._request_count == before + 1 and self._messages and self._messages[-1][1].is_eof()
            self._request_line_buffer = b"" if is_bare and data.endswith(b"\r\n\r\n") else None
            self.find_final_request(self._request_count - before)
        if self._final_body is not None and self._final_body.is_eof():
            self.close_after_final(data)
        if self._final_body is not None and data:  # aiohttp comes with nothing where it goes on with what it held back
            self._last_two_bytes = data[-2:]
        if self._request_count != before:
            self._limiter.mark_busy(self)
            self._end_head_timer()
            if current is not None and not current.content.is_eof() and isinstance(self._messages[-1][0], _ErrInfo):
                # Its body went on as something that is no body; aiohttp would let it wait for the rest.
                current.content.set_exception(web.RequestPayloadError())
        elif between_requests:
            self.on_partial_head(len(data))

    def is_valid_request_line(self, data: bytes) -> bool:
        """Return whether the request that begins here has single spaces in its first line (RFC 9112 section 3).

        aiohttp's parser passes over more, and does not tell where a request begins: so this is looked at where it is
        certain, for the first request of a connection and behind one without a body.
        """
        self._request_line_buffer = (self._request_line_buffer or b"") + data[:MAX_LINE]
        line, end, behind = self._request_line_buffer.lstrip(b"\r\n").partition(b"\r\n")
        if not end:
            return len(self._request_line_buffer) <= 2 * MAX_LINE  # the parser says what is too long
        return line.count(b" ") == 2 and not _SPACED_LINE.search(behind)

    def find_final_request(self, new: int) -> None:
        """Find a request among the new ones behind which nothing may be read on this connection.

        Behind an attempt to switch protocols aiohttp loses bytes, or reads a CONNECT's body as requests; the last field
        of a trailer section becomes a field of the next request.
        """
        if self._final_body is not None:
            return  # it ended just now, and these came with its end
        for message, payload in list(self._messages)[-new:]:
            if isinstance(message, _ErrInfo):
                continue
            if message.upgrade or message.chunked or message.method == "CONNECT":
                self._final_body = payload
                self._may_reuse = message.chunked and not message.upgrade and message.method != "CONNECT"
                return

    def close_after_final(self, data: bytes) -> None:
        """Read no more: what is being served is answered first. A chunked body that plainly had no trailer is fine."""
        last, self._final_body = self._final_body, None
        is_newest = not self._messages or self._messages[-1][1] is last
        # Alone, it may be the end of a trailer field that began in the piece before.
        is_plain = _PLAIN_END.search(data) or (self._last_two_bytes == b"\r\n" and _PLAIN_END_ALONE.fullmatch(data))
        if is_newest and self._may_reuse and is_plain:
            return
        while self._messages and self._messages[-1][1] is not last and any(one[1] is last for one in self._messages):
            self._messages.pop()
        self._is_draining = True
        if self._current_request is not None:
            self._current_request[CLOSE_AFTER] = True
        self.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Let a write wait until the kernel has all of it: so nothing is left over that no timeout looks at."""
        super().connection_made(transport)
        if self.transport is None:
            return
        self.transport.set_write_buffer_limits(0)
        self._is_counted = True
        if not self._limiter.try_acquire(self, self.listener):
            busy = TooManyConnections(
                "there are too many connections", "Use fewer, and keep them open.", retry_after=1.0
            )
            self.reject(busy)
            return
        self.peer = _peer_of(self.transport)
        # From the connection's first moment, not its first byte: one that stays silent holds a descriptor too.
        self._head_timer = self._loop.call_later(self._options.header_timeout, self.on_header_timeout)

    def drain(self) -> None:
        """End this connection: now where it is idle, otherwise with the answer to the request being served."""
        if not self.is_busy:
            self.force_close()
            return
        self._is_draining = True
        if self._current_request is not None:
            self._current_request[CLOSE_AFTER] = True

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send what is still to be sent of an answer, in bounded time, and end a connection that is to leave."""
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
            if not self._messages and self._is_counted:
                self._limiter.mark_idle(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Forget the timer with the connection."""
        self._end_head_timer()
        if self._is_counted:
            self._is_counted = False
            self._limiter.release(self, self.listener)
        super().connection_lost(exc)

    def on_partial_head(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self._options.header_size:
            self.reject(HeaderTooLarge("the request's head is too large", "Send fewer or shorter headers."))
        elif self._head_timer is None:
            self._head_timer = self._loop.call_later(self._options.header_timeout, self.on_header_timeout)

    def _end_head_timer(self) -> None:
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def on_header_timeout(self) -> None:
        if not self._head_bytes:
            self.force_close()  # it said nothing, so there is nothing to answer
            return
        self.reject(
            RequestHeaderTimeout(
                "the request's head did not come in time", "Send the whole head within timeouts.header."
            )
        )

    def reject(self, error: ProxyError) -> None:
        """Answer what has not become a request, and close."""
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
        """Answer a request that could not be parsed, or whose handler broke off; quote nothing of it."""
        if self.transport is None or request.writer.output_size > 0:
            # An answer has begun; all that can be said now is said by breaking the connection.
            abort_connection(request)
            raise ConnectionError("the answer has begun") from exc
        error = _error_for(status, exc)
        self._count(error)
        response = ErrorResponse(error, _EMPTY_SUMMARY)
        response.force_close()
        return response

    def _count(self, error: ProxyError) -> None:
        metrics = self._options.metrics
        metrics.errors.labels(error.code, error.fault).inc()
        metrics.series_of("-", "-", "unknown", "other", str(error.status), "none", "proxy").requests += 1


class Request(web.BaseRequest):
    """A request as it came, without what only a framework asks it for: a tidied URL, the peer's name.

    What the steps ask for is at hand; aiohttp would look each of them up, and make a writer that hardly any needs.
    """

    __slots__ = (
        "_writer",
        "body_exists",
        "content",
        "head_block",
        "headers",
        "keep_alive",
        "method",
        "protocol",
        "raw_headers",
        "raw_path",
        "version",
    )

    def __init__(
        self,
        message: RawRequestMessage,
        payload: StreamReader,
        protocol: RequestHandler,
        task: "asyncio.Task[None]",
        loop: asyncio.AbstractEventLoop,
        head_block: bytes | None,
    ) -> None:
        self._message = message
        self.head_block = head_block  # its fields as they came, where nothing else came with them
        self.method = self._method = message.method
        self.raw_path = message.path
        self.version = message.version
        self.headers = message.headers
        self.raw_headers = message.raw_headers
        self.keep_alive = not message.should_close
        self.content = self._payload = payload
        self.body_exists = payload is not EMPTY_PAYLOAD
        self.protocol = self._protocol = protocol  # type: ignore[misc]  # read-only in aiohttp
        self._task = task
        self._loop = loop
        self._rel_url = message.url
        self._writer: StreamWriter | None = None
        self._cache: dict[str, Any] = {}
        self._state: dict[Any, Any] = {}

    @property
    def _payload_writer(self) -> StreamWriter:  # type: ignore[override]  # aiohttp has it as an attribute
        if self._writer is None:
            self._writer = StreamWriter(self._protocol, self._loop)
        return self._writer

    def __contains__(self, key: object) -> bool:
        return key in self._state


class ProxyConnection(ServerConnection):
    """A client connection whose requests go to Amazon; what serves them writes Amazon's answers itself."""

    __slots__ = ("_head_block",)

    def __init__(self, manager: web.Server, **others: Any) -> None:
        super().__init__(manager, **others)
        self._head_block: bytes | None = None

    def data_received(self, data: bytes) -> None:
        """Take what is nearly always the case without much ado: a whole head, with nothing before and behind it."""
        parser, waiter, line_end = self._parser, self._waiter, data.find(b"\r")
        if (
            self._request_line_buffer != b""
            or waiter is None
            or self._messages
            or self._head_bytes
            or self._final_body is not None
            or parser is None
            or data.find(b"\r\n\r\n") != len(data) - 4
            or data.count(b" ", 0, line_end) != 2
            or not data[:1].isalpha()
            or self._force_close
            or self._close
            or self._upgraded
            or waiter.done()
        ):
            super().data_received(data)
            return
        # As aiohttp does it, but for what only bodies, upgrades and long queues of requests need.
        try:
            messages, self._upgraded, self._message_tail = parser.feed_data(data)
        except HttpProcessingError as exc:
            messages = [(_ErrInfo(status=400, exc=exc, message=exc.message), EMPTY_PAYLOAD)]
        if messages:
            self._request_count += len(messages)
            self._messages.extend(messages)
            waiter.set_result(None)
            message, payload = messages[0]
            if (
                len(messages) == 1
                and (payload is EMPTY_PAYLOAD or payload.is_eof())
                and type(message) is RawRequestMessage
                and not (message.upgrade or message.chunked)
                and message.method != "CONNECT"
            ):
                self._head_block = data[line_end:]
                self._limiter.mark_busy(self)
                if self._head_timer is not None:
                    self._end_head_timer()
                return
        self.slow_path(data)

    def slow_path(self, data: bytes) -> None:
        """Do what is left to do where a head that looked plain is none."""
        self._request_line_buffer = None
        self.find_final_request(len(self._messages))
        if self._final_body is not None and self._final_body.is_eof():
            self.close_after_final(data)
        self._last_two_bytes = data[-2:]
        if self._messages:
            self._limiter.mark_busy(self)
            self._end_head_timer()
        else:
            self.on_partial_head(len(data))

    async def start(self) -> None:
        """Serve one request after the other: as aiohttp does it, but for the task that it makes for each."""
        if self._manager is None or self._request_handler is None:
            return
        manager = self._manager
        while not self._force_close:
            if not self._messages:
                self._waiter = self._loop.create_future()
                try:
                    await self._waiter
                finally:
                    self._waiter = None
            message, payload = self._messages.popleft()
            if self._parser is not None:
                self._parser.message_consumed()
            if self._buffer_paused and len(self._messages) <= self._msg_queue_resume_size:
                self._resume_reading_if_drained()
            manager.requests_count += 1
            # The server's own, which a new configuration may have replaced since the last request.
            if not await self._serve(message, payload, manager.request_handler):
                break
            self._next_keepalive_close_time = now = self._loop.time() + self._keepalive_timeout
            if self._keepalive_handle is None:
                self._keepalive_handle = self._loop.call_at(now, self._process_keepalive)
        if not self._force_close:
            self._task_handler = None
            if self.transport is not None:
                self.transport.close()

    async def _serve(self, message: RawRequestMessage | _ErrInfo, payload: StreamReader, handle: Handle) -> bool:
        """Answer one request; return whether another one may follow on this connection."""
        request = self._request_of(ERROR if isinstance(message, _ErrInfo) else message, payload)
        self._request_in_progress = True
        self._current_request = request
        try:
            if isinstance(message, _ErrInfo):
                response = self.handle_error(request, message.status, message.exc)
            else:
                response = await handle(request)
            self._current_request = None
            if isinstance(response, UpstreamResponse):  # it was streamed, under timeouts of its own
                may_go_on = response.keep_alive and not self._is_draining
                if not self._messages and self._is_counted:
                    self._limiter.mark_idle(self)
            else:
                response, is_cut_off = await self.finish_response(request, response, None)
                may_go_on = bool(response.keep_alive) and not is_cut_off
        except ConnectionError:
            abort_connection(request)  # half an answer is out
            return False
        except asyncio.CancelledError:
            self.force_close()
            raise
        except Exception:  # noqa: BLE001 - logged, and the connection ended
            LOGGER.exception("internal error")  # the last net, below the handler's own
            abort_connection(request)
            return False
        finally:
            self._current_request = None
            self._request_in_progress = False
            if self._handler_waiter is not None:
                self._handler_waiter.set_result(None)
        if not payload.is_eof():
            await self.drain_body(payload)
        return may_go_on and not self._close and not self._force_close

    def _request_of(self, message: RawRequestMessage, payload: StreamReader) -> web.BaseRequest:
        if self._task_handler is None:
            raise ConnectionError("the connection ended")
        request = Request(message, payload, self, self._task_handler, self._loop, self._head_block)
        self._head_block = None
        if (
            message.version is not HttpVersion11
            or message is ERROR
            or self.peer is not UNKNOWN_PEER
            or self._is_draining
        ):
            annotate_request(request, message, self)
        return request

    async def drain_body(self, payload: StreamReader) -> None:
        """Read what is left of a body, for a while, so that the client gets to read its answer; then end."""
        if self._force_close:
            return
        try:
            async with asyncio.timeout(LINGERING_TIMEOUT):
                while not payload.is_eof():
                    await payload.readany()
        except (TimeoutError, web.RequestPayloadError):
            self.close()


def _error_for(status: int, exc: BaseException | None) -> ProxyError:
    if isinstance(exc, LineTooLong) or "Too many headers" in str(exc):
        return HeaderTooLarge("a line of the request's head is too long", "Send fewer or shorter headers.")
    if status < 500:
        return MalformedRequest("the request is not well-formed HTTP/1.1", "Check the client that sent it.")
    return InternalError("the proxy failed", "Its log says more; try again.")


class HttpServer(web.Server):
    """The server of one listener; makes a Connection for each client.

    `name` is the listener's in metrics; `request_factory` makes requests of another kind than the plain ones.
    """

    def __init__(
        self,
        handle: Handle,
        config: Config,
        metrics: Metrics,
        *,
        limiter: ConnectionLimiter,
        name: str,
        request_factory: RequestFactory | None = None,
    ) -> None:
        super().__init__(
            handle,
            handler_cancellation=True,  # a client that leaves ends the call to Amazon
            access_log=None,
            keepalive_timeout=config.timeouts.keep_alive,
            max_line_size=MAX_LINE,
            max_field_size=MAX_FIELD,
            max_headers=config.bounds.header_fields,
            lingering_time=LINGERING_TIMEOUT,
            auto_decompress=False,
        )
        self.request_factory = self.annotate
        self._make = request_factory or web.BaseRequest  # the latter is never called: see ProxiedConnection
        self._is_status = request_factory is not None
        self._options = ConnectionSettings.of(config, metrics)
        self._limiter = limiter
        self._name = name

    def activate(self, handle: Handle, name: str, config: Config) -> None:
        """Serve every request that begins from now on by `handle`; new connections keep to the bounds of `config`."""
        self.request_handler = handle
        self._name = name
        self._options = ConnectionSettings.of(config, self._options.metrics)
        self._kwargs.update(keepalive_timeout=config.timeouts.keep_alive, max_headers=config.bounds.header_fields)

    async def shutdown(self, timeout: float | None = None) -> None:  # noqa: ASYNC109 - aiohttp calls it so
        """End all connections, and hold no configuration any more: this object is one of a ring, and goes late."""
        await super().shutdown(timeout)
        self.request_handler = reject_all

    @property
    def header_timeout(self) -> float:
        """How long a client may take for a request's head, in seconds."""
        return self._options.header_timeout

    def busy(self) -> int:
        """Return how many connections have a request in flight."""
        return sum(connection.is_busy for connection in self._own_connections())

    def close_idle(self) -> None:
        """End idle connections now, and busy ones after their answer."""
        for connection in self._own_connections():
            connection.drain()

    def _own_connections(self) -> list["ServerConnection"]:
        return [connection for connection in self.connections if isinstance(connection, ServerConnection)]

    def __call__(self) -> RequestHandler:
        """Return the protocol for a new connection."""
        kind = ServerConnection if self._is_status else ProxyConnection
        return kind(
            self, loop=self._loop, options=self._options, limiter=self._limiter, listener=self._name, **self._kwargs
        )

    def annotate(
        self, message: RawRequestMessage, payload: Any, protocol: RequestHandler, *parts: Any
    ) -> web.BaseRequest:
        """Make a request, with what the connection says of it."""
        request = self._make(message, payload, protocol, *parts)
        if isinstance(protocol, ServerConnection):
            annotate_request(request, message, protocol)
        return request


async def reject_all(_: web.BaseRequest) -> web.StreamResponse:
    raise ConnectionError("the listener is closed")


def annotate_request(request: web.BaseRequest, message: RawRequestMessage, connection: ServerConnection) -> None:
    """Note what the steps have to know, and aiohttp does not say."""
    if message is ERROR or message.version not in SUPPORTED_VERSIONS:
        # aiohttp reads 2.0 and 0.9 as versions, and would begin its answer with them; what it could not read is 1.0.
        if isinstance(request, Request):
            request.version = HttpVersion11
        else:
            request._version = HttpVersion11  # noqa: SLF001 - there is no other place
        if message.version not in SUPPORTED_VERSIONS:
            request[VERSION_REFUSED] = True
    if connection.peer is not UNKNOWN_PEER:
        request[PEER] = connection.peer
    if connection.is_draining:
        request[CLOSE_AFTER] = True


def _peer_of(transport: asyncio.BaseTransport) -> Peer:
    """Return the user id at the other end of a Unix socket, or the names in the certificate that a client showed."""
    certificate = transport.get_extra_info("peercert")
    if certificate:
        return Peer(names=_names_in(certificate))
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family != getattr(socket, "AF_UNIX", None) or not hasattr(socket, "SO_PEERCRED"):
        return UNKNOWN_PEER
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    return Peer(uid=uid)


def _names_in(certificate: dict[str, Any]) -> frozenset[str]:
    """Return the alternative names of a verified certificate, its common name only where there are none.

    So RFC 9525 section 2 has it for servers: a common name may be anything.
    """
    alternatives = frozenset(str(value) for _, value in certificate.get("subjectAltName", ()))
    subject = (pair for part in certificate.get("subject", ()) for pair in part)
    return alternatives or frozenset(str(value) for name, value in subject if name == "commonName")
