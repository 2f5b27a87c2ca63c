"""The names of aiohttp that its documentation does not promise, all of them in this file, behind classes of our own.

The server side of aiohttp makes a task, a writer and a request with a dozen cached properties for each request; the
proxy needs none of them, and tests/bench/gate.py holds it to a fraction of a bare aiohttp proxy's processor time. The
price is this file. aiohttp's `web_protocol.py` differs in 3.13.5, 3.14.0, 3.14.1 and 3.14.4; before 3.14.4 there is no
`_buffer_paused`, and the task of each connection ends with an AttributeError. Therefore pyproject.toml allows one minor
version alone, and tests/request/test_aiohttp_internals.py lists each name with what is expected of it.
"""
# ruff: noqa: SLF001 - this is the one file that may

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from aiohttp import StreamReader, web
from aiohttp.http import HttpVersion, HttpVersion11, RawRequestMessage, StreamWriter
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import HttpRequestParser
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import ERROR, RequestHandler, _ErrInfo

__all__ = [
    "EMPTY_PAYLOAD",
    "UNREADABLE",
    "USES_LLHTTP",
    "BareResponse",
    "ConnectionProtocol",
    "Handle",
    "LeanRequest",
    "ParseError",
    "ParsedRequest",
    "Protocol",
    "ProtocolServer",
    "RawRequestMessage",
    "RequestFactory",
    "set_version",
]

ParseError = _ErrInfo  # stands in the queue in place of a request that could not be parsed: status, exc, message
UNREADABLE = ERROR  # the message that aiohttp makes a request of where there was a ParseError
Protocol = RequestHandler
ParsedRequest = tuple[RawRequestMessage | ParseError, StreamReader]
Handle = Callable[..., Awaitable[Any]]  # of a web.StreamResponse, or of a response that has been written already
RequestFactory = Callable[..., web.BaseRequest]

# aiohttp's parser in C is llhttp in its strict mode. The one in Python, which takes its place where a wheel has no
# extension or AIOHTTP_NO_EXTENSIONS is set, has been open to request smuggling again and again: CVE-2024-52304 (line
# feeds in chunk extensions), CVE-2025-53643 (trailer sections).
USES_LLHTTP = HttpRequestParser.__module__ == "aiohttp._http_parser"


class ConnectionProtocol(RequestHandler):
    """aiohttp's protocol for one client connection, with public names for what subclasses may use of it."""

    __slots__ = ("_own_handle",)

    # A slot's descriptor under a second name reads the same memory at the same speed. Subclasses only read these. Where
    # a version has no such slot, the import of this file fails with its name. (mypy knows a slot on instances alone.)
    loop: asyncio.AbstractEventLoop = RequestHandler._loop  # type: ignore[misc]
    queue: deque[ParsedRequest] = RequestHandler._messages  # type: ignore[misc]  # parsed, not served yet; oldest first
    requests_seen: int = RequestHandler._request_count  # type: ignore[misc]
    current_request: web.BaseRequest | None = RequestHandler._current_request  # type: ignore[misc]
    is_serving: bool = RequestHandler._request_in_progress  # type: ignore[misc]

    def __init__(self, manager: web.Server, **settings: Any) -> None:
        super().__init__(manager, **settings)
        self._own_handle: Handle | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether the task of this connection waits for a request."""
        return self._waiter is not None

    @property
    def task(self) -> "asyncio.Task[None] | None":
        """The task that serves this connection."""
        return self._task_handler

    def serve_by(self, handle: Handle) -> None:
        """Have `handle` serve the requests of this connection, whatever serves the others of its server."""
        self._own_handle = self._request_handler = handle

    def end_request(self) -> None:
        """Stop offering the current request to be cancelled: its handler has returned."""
        self._current_request = None

    def feed_while_waiting(self, data: bytes) -> Sequence[ParsedRequest] | None:
        """Parse `data` and wake the task that serves this connection; return what was parsed.

        What aiohttp's `data_received` does, without what only bodies, upgrades and full queues need. Returns None, and
        parses nothing, unless the connection waits for a request and nothing is left over from before.
        """
        parser, waiter = self._parser, self._waiter
        if (
            waiter is None
            or parser is None
            or self._messages
            or self._force_close
            or self._close
            or self._upgraded
            or waiter.done()
        ):
            return None
        messages: Sequence[ParsedRequest]
        try:
            messages, self._upgraded, self._message_tail = parser.feed_data(data)
        except HttpProcessingError as exc:
            messages = [(_ErrInfo(status=400, exc=exc, message=exc.message), EMPTY_PAYLOAD)]
        if messages:
            self._request_count += len(messages)
            self._messages.extend(messages)
            waiter.set_result(None)
        return messages

    async def serve_in_one_task(self) -> None:
        """Serve one request after another; what aiohttp's `start` does, but for the task that it makes for each.

        A subclass makes this its `start`. aiohttp makes that task to copy context variables (aiohttp #3406); the proxy
        has none.
        """
        manager = self._manager
        if manager is None:
            return
        while not self._force_close:
            if not self._messages:
                self._waiter = self._loop.create_future()
                try:
                    await self._waiter
                finally:
                    self._waiter = None
            message, payload = self._take_from_queue()
            manager.requests_count += 1
            task = self._task_handler
            if task is None:
                return  # the connection was lost
            error = message if isinstance(message, _ErrInfo) else None
            request = self.new_request(ERROR if isinstance(message, _ErrInfo) else message, payload, task)
            self._request_in_progress = True
            self._current_request = request
            try:
                # The server's handler, not the one that this connection began with: a reload may have replaced it.
                may_reuse = await self.serve(request, error, self._own_handle or manager.request_handler)
            finally:
                self._end_serving()
            if not payload.is_eof() and not self._force_close:
                await self.drain_body(payload)
            if not may_reuse or self._close or self._force_close:
                break
            self._expect_next_request()
        if not self._force_close:
            self._task_handler = None
            if self.transport is not None:
                self.transport.close()

    def _take_from_queue(self) -> ParsedRequest:
        taken = self._messages.popleft()
        # The parser stops at 32 queued requests, and the transport is paused with it. Neither goes on unless it is told
        # that the queue has room again.
        if self._parser is not None:
            self._parser.message_consumed()
        if self._buffer_paused and len(self._messages) <= self._msg_queue_resume_size:
            self._resume_reading_if_drained()
        return taken

    def _end_serving(self) -> None:
        self._current_request = None
        self._request_in_progress = False
        if self._handler_waiter is not None:  # `shutdown` waits for this request
            self._handler_waiter.set_result(None)

    def _expect_next_request(self) -> None:
        # One timer for the whole connection: it is set again when it fires early, not for every request.
        self._next_keepalive_close_time = now = self._loop.time() + self._keepalive_timeout
        if self._keepalive_handle is None:
            self._keepalive_handle = self._loop.call_at(now, self._process_keepalive)

    def new_request(
        self, message: RawRequestMessage, payload: StreamReader, task: "asyncio.Task[None]"
    ) -> web.BaseRequest:
        """Return the request that is handed to `serve`."""
        raise NotImplementedError

    async def serve(self, request: web.BaseRequest, error: ParseError | None, handle: Handle) -> bool:
        """Send the response to one request, or to a ParseError; return whether another request may follow."""
        raise NotImplementedError

    async def drain_body(self, payload: StreamReader) -> None:
        """Read what is left of a request's body after the response to it."""
        raise NotImplementedError


_Connection = TypeVar("_Connection", bound=ConnectionProtocol)


class ProtocolServer(web.Server):
    """aiohttp's server, which makes the protocol of each new connection."""

    def change_settings(self, **changed: Any) -> None:
        """Give new connections these settings of aiohttp's from now on."""
        self._kwargs.update(changed)

    def new_connection(self, kind: type[_Connection], **settings: Any) -> _Connection:
        """Return the protocol for a new connection."""
        return kind(self, loop=self._loop, **settings, **self._kwargs)


class LeanRequest(web.BaseRequest):
    """A request without what only a framework needs: a normalized URL, the peer's name, a writer.

    aiohttp's own `__init__` is not called. `headers`, `method` and the rest, which aiohttp computes and caches by
    descriptors, are plain attributes. `head_block` is the bytes of the header section, where nothing else came with
    them.
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
        self.head_block = head_block
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
        # A response of Amazon's is written to the transport; only the proxy's own responses need a writer.
        if self._writer is None:
            self._writer = StreamWriter(self._protocol, self._loop)
        return self._writer

    def __contains__(self, key: object) -> bool:
        # MutableMapping's own asks `__getitem__` and catches a KeyError, which takes four times as long on a miss.
        return key in self._state


def set_version(request: web.BaseRequest, version: HttpVersion = HttpVersion11) -> None:
    """Make `version` the one that the response is written in."""
    if isinstance(request, LeanRequest):
        request.version = version
    else:
        request._version = version


class BareResponse(web.StreamResponse):
    """A response without the headers that aiohttp's server adds on its own: Content-Type, Date, Server."""

    def on_prepare(self, request: web.BaseRequest) -> None:
        """Do what has to be done before the head is written."""

    async def _prepare_headers(self) -> None:
        # Between aiohttp's defaults and the head on the wire. The documented place for this, the signal
        # on_response_prepare, belongs to an Application, and a low-level server has none.
        given = {name.lower() for name in self.headers}
        if self._req is not None:
            self.on_prepare(self._req)
        await super()._prepare_headers()
        for name in ("Content-Type", "Date", "Server"):
            if name.lower() not in given:
                self.headers.popall(name, None)
