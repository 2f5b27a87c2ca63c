"""How does the proxied port speak HTTP: its limits, its patience with slow heads, and its answers to broken requests?

aiohttp's low-level server, without routing and middleware. Three of its defaults are not for a port like this: it
waits for ever for a request's head, answers broken requests with a page that quotes them, and unpacks bodies.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from aiohttp.http import HttpVersion10, HttpVersion11, RawRequestMessage
from aiohttp.http_exceptions import LineTooLong
from aiohttp.web_protocol import ERROR, RequestHandler, _ErrInfo

from proxy.config import Config
from proxy.errors import HeaderTimeout, HeaderTooLarge, InternalError, MalformedRequest, ProxyError
from proxy.metrics import Metrics
from proxy.request.answers import LAST_ON_CONNECTION, OwnAnswer, break_off
from proxy.request.exchange import Exchange
from proxy.request.guard import MAX_HEADER_BLOCK, VERSION_REFUSED

MAX_LINE = 16 * 1024
MAX_FIELD = 32 * 1024 + 512
MAX_FIELDS = 128
SPOKEN = (HttpVersion10, HttpVersion11)
LINGERING = 5.0  # seconds in which an unread body is swallowed, so that the client gets to read its answer

Handle = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

_NOTHING_KNOWN = Exchange("", 0.0).summary()


class Connection(RequestHandler):
    """One client connection."""

    __slots__ = ("_head_bytes", "_head_timer", "_header_timeout", "_is_leaving", "_metrics", "_patience")

    def __init__(
        self, manager: web.Server, *, header_timeout: float, patience: float, metrics: Metrics, **options: Any
    ) -> None:
        super().__init__(manager, **options)
        self._header_timeout = header_timeout
        self._patience = patience
        self._is_leaving = False
        self._metrics = metrics
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0

    @property
    def is_busy(self) -> bool:
        """Whether a request is being served, or waits to be."""
        return self._request_in_progress or bool(self._messages)

    def data_received(self, data: bytes) -> None:
        """Parse what came; the first byte of a head starts its timer, its last one ends it."""
        before, current = self._request_count, self._current_request
        between_requests = self._waiter is not None and not self._messages
        super().data_received(data)
        if self._request_count != before:
            self._end_head_timer()
            if current is not None and not current.content.is_eof() and isinstance(self._messages[-1][0], _ErrInfo):
                # Its body went on as something that is no body; aiohttp would let it wait for the rest.
                current.content.set_exception(web.RequestPayloadError())
        elif between_requests:
            self._head_goes_on(len(data))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Let a write wait until the kernel has all of it: so nothing is left over that no timeout looks at."""
        super().connection_made(transport)
        if self.transport is not None:
            self.transport.set_write_buffer_limits(0)

    def leave(self) -> None:
        """End this connection: now where it is idle, otherwise with the answer to the request being served."""
        if not self.is_busy:
            self.force_close()
            return
        self._is_leaving = True
        if self._current_request is not None:
            self._current_request[LAST_ON_CONNECTION] = True

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send what is still to be sent of an answer, in bounded time, and end a connection that is to leave."""
        if self._is_leaving:
            resp.force_close()
        if resp.prepared:  # it was streamed, under timeouts of its own
            return await super().finish_response(request, resp, start_time)
        try:
            async with asyncio.timeout(self._patience):
                return await super().finish_response(request, resp, start_time)
        except TimeoutError:
            break_off(request)
            return resp, True

    def connection_lost(self, exc: BaseException | None) -> None:
        """Forget the timer with the connection."""
        self._end_head_timer()
        super().connection_lost(exc)

    def _head_goes_on(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > MAX_HEADER_BLOCK:
            self._refuse(HeaderTooLarge("the request's head is too large", "Send fewer or shorter headers."))
        elif self._head_timer is None:
            self._head_timer = self._loop.call_later(self._header_timeout, self._head_too_slow)

    def _end_head_timer(self) -> None:
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_too_slow(self) -> None:
        self._refuse(
            HeaderTimeout("the request's head did not come in time", "Send the whole head within timeouts.header.")
        )

    def _refuse(self, error: ProxyError) -> None:
        """Answer what has not become a request, and close."""
        self._end_head_timer()
        if self.transport is not None:
            self._count(error)
            self.transport.write(OwnAnswer(error, _NOTHING_KNOWN).as_bytes())
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
            break_off(request)
            raise ConnectionError("the answer has begun") from exc
        error = _error_for(status, exc)
        self._count(error)
        answer = OwnAnswer(error, _NOTHING_KNOWN)
        answer.force_close()
        return answer

    def _count(self, error: ProxyError) -> None:
        self._metrics.errors.labels(error.code, error.fault).inc()
        self._metrics.requests.labels("-", "-", "unknown", "other", error.status, "none", "proxy").inc()


def _error_for(status: int, exc: BaseException | None) -> ProxyError:
    if isinstance(exc, LineTooLong) or "Too many headers" in str(exc):
        return HeaderTooLarge("a line of the request's head is too long", "Send fewer or shorter headers.")
    if status < 500:
        return MalformedRequest("the request is not well-formed HTTP/1.1", "Check the client that sent it.")
    return InternalError("the proxy failed", "Its log says more; try again.")


class Listening(web.Server):
    """The server of one listener; makes a Connection for each client."""

    def __init__(self, handle: Handle, config: Config, metrics: Metrics) -> None:
        super().__init__(
            handle,
            handler_cancellation=True,  # a client that leaves ends the call to Amazon
            access_log=None,
            keepalive_timeout=config.timeouts.keep_alive,
            max_line_size=MAX_LINE,
            max_field_size=MAX_FIELD,
            max_headers=MAX_FIELDS,
            lingering_time=LINGERING,
            auto_decompress=False,
        )
        self._header_timeout = config.timeouts.header
        self._patience = config.timeouts.body_idle
        self._metrics = metrics

    def busy(self) -> int:
        """Return how many connections have a request in flight."""
        return sum(connection.is_busy for connection in self._ours())

    def close_idle(self) -> None:
        """End idle connections now, and busy ones after their answer."""
        for connection in self._ours():
            connection.leave()

    def _ours(self) -> list["Connection"]:
        return [connection for connection in self.connections if isinstance(connection, Connection)]

    def __call__(self) -> RequestHandler:
        """Return the protocol for a new connection."""
        return Connection(
            self,
            loop=self._loop,
            header_timeout=self._header_timeout,
            patience=self._patience,
            metrics=self._metrics,
            **self._kwargs,
        )

    def _make_request(self, message: RawRequestMessage, *parts: Any) -> web.BaseRequest:
        request = super()._make_request(message, *parts)
        if message is ERROR:
            request._version = HttpVersion11  # noqa: SLF001 - a request that could not be read counts as 1.0 there
        if message.version not in SPOKEN:
            # aiohttp reads 2.0 and 0.9 as versions, and would begin its answer with them.
            request[VERSION_REFUSED] = True
            request._version = HttpVersion11  # noqa: SLF001 - see above
        return request
