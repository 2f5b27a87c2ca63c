"""HTTP/1.1 on one connection to a server: a request out, its response in, parsed strictly (RFC 9112).

httptools (llhttp) parses; the rest is what a proxy needs and a parser does not know: which response belongs to a
request, where it ends, how large it may grow, and whether the connection may be used again. In doubt it is closed.
Bytes that arrive while no response is expected close it, too.

Statements about httptools here were checked with 0.7.1, the oldest release allowed, and 0.9.0.
"""

import asyncio
import re
import select
import socket
import ssl
from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import chain
from typing import cast

import httptools

MAX_REASON = 16 * 1024
MAX_FIELD = 64 * 1024
MAX_FIELDS = 256
# Bytes in a row that are no body: a head with the interim responses before it, or a trailer section.
MAX_HEAD_BYTES = 256 * 1024
HIGH_WATER = 64 * 1024  # bytes of body in the buffer at which reading from the server is paused

_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_SUPPORTED_VERSIONS = ("1.1", "1.0")
_NO_BODY = frozenset({204, 304})
_LENGTH, _CODING = b"content-length", b"transfer-encoding"
MAX_ORDERS, MAX_ORDER_LENGTH = 256, 8192  # sequences of field names that are cached; bytes of the longest of them


class HeaderNames:
    """The names of a response's fields in order, with what is derived from them; servers send few different ones."""

    __slots__ = ("in_order", "index", "line_prefixes", "line_template")

    def __init__(self, in_order: tuple[bytes, ...]) -> None:
        self.in_order = in_order
        # The position of the first field of each name, in lower case.
        self.index: Mapping[bytes, int] = {
            name.lower(): len(in_order) - 1 - index for index, name in enumerate(reversed(in_order))
        }
        # Derived in `response`: what precedes each value in the response to the app (empty for a field that is not
        # forwarded), and a %-template of all these lines. None until then.
        self.line_prefixes: tuple[bytes, ...] | None = None
        self.line_template: bytes | None = None


_known_names = lru_cache(maxsize=MAX_ORDERS)(HeaderNames)
_NO_NAMES = HeaderNames(())


class RemoteProtocolError(Exception):
    """The server sent no valid response, or only part of one; the text says what is wrong and quotes nothing."""


class _InvalidResponse(Exception):
    """The response must not be forwarded."""


class Response:
    """One response: its head is there once `receive_head` has returned, its body is read by `read`.

    `names` and `values` are those of its fields as received, in order. A response that is not read to its end must be
    closed.
    """

    __slots__ = (
        "_connection",
        "_error",
        "_loop",
        "_waiter",
        "buffered",
        "chunks",
        "has_head",
        "is_complete",
        "method",
        "names",
        "reason",
        "status",
        "upload",
        "values",
        "version",
    )

    def __init__(self, connection: "ClientConnection", method: str, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.method = method
        self.status = 0
        self.reason = b""
        self.version = ""
        self.has_head = False
        self.is_complete = False  # all of it has arrived, though perhaps not been read yet
        self.upload: asyncio.Task[None] | None = None  # of the request's body, while it is sent
        self._connection: ClientConnection | None = connection
        self._error: Exception | None = None
        self.chunks: list[bytes] = []  # of the body, not read yet
        self.buffered = 0  # bytes in them
        self._waiter: asyncio.Future[None] | None = None
        self.names = _NO_NAMES
        self.values: list[bytes] = []

    def first(self, name: bytes) -> str | None:
        """Return the first value of the field with this name in lower case, None where there is none."""
        index = self.names.index.get(name)
        return self.values[index].decode("latin-1").rstrip(" \t") if index is not None else None

    def value(self, name: bytes) -> bytes | None:
        """Return what `first` returns, as the bytes received."""
        index = self.names.index.get(name)
        return self.values[index] if index is not None else None

    @property
    def has_data(self) -> bool:
        """Whether some of the body can be read without waiting."""
        return bool(self.chunks)

    @property
    def at_end(self) -> bool:
        """Whether all of it has arrived and been read."""
        return self.is_complete and not self.chunks

    @property
    def is_close_delimited(self) -> bool:
        """Whether the body ends where the connection does (RFC 9112 section 6.3, rule 8)."""
        return not (
            self.method == "HEAD"
            or self.status in _NO_BODY
            or _LENGTH in self.names.index
            or _CODING in self.names.index
        )

    async def receive_head(self) -> None:
        """Wait for the head; raise RemoteProtocolError where none arrives."""
        while not self.has_head:
            if self._error is not None:
                raise self._error
            await self._wait()

    async def read(self) -> bytes:
        """Return what has arrived of the body, empty at its end; raise RemoteProtocolError where it was cut off."""
        while not self.chunks:
            if self.is_complete:
                return b""
            if self._error is not None:
                raise self._error
            await self._wait()
        data = self.read_buffered()
        if self._connection is not None:
            self._connection.resume()
        return data

    def read_buffered(self) -> bytes:
        """Return the buffered part of the body without waiting for more."""
        chunks = self.chunks
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        self.chunks, self.buffered = [], 0
        return data

    def close(self) -> None:
        """Read no more of the response; abort its connection unless the response is complete."""
        if self.upload is not None:
            self.upload.cancel()
        if self._connection is not None:
            self._connection.abort()

    async def end(self) -> None:
        """Close it, and wait until the upload no longer reads the request's body."""
        self.close()
        if self.upload is not None and not self.upload.done():
            await asyncio.wait([self.upload])

    async def _wait(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    # Called by the connection.

    def complete(self) -> None:
        """Mark the response as complete and detach it from its connection."""
        self.is_complete = True
        self._connection = None

    def fail(self, error: Exception) -> None:
        """Make `receive_head` and `read` raise `error`, after what is buffered."""
        self._error = error
        self._connection = None
        self.wake()

    def wake(self) -> None:
        """Wake the task that waits in `receive_head` or `read`."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _SelectPoll:
    """`select.poll` for one socket, by `select.select`: Windows has no poll."""

    def __init__(self, sock: socket.socket) -> None:
        self._descriptor = sock.fileno()

    def poll(self, timeout: float) -> list[int]:
        """Return the descriptors that are readable within `timeout` milliseconds."""
        return select.select([self._descriptor], [], [], timeout / 1000)[0]


def _poll_of(sock: socket.socket) -> "select.poll | _SelectPoll":
    if not hasattr(select, "poll"):  # Windows
        return _SelectPoll(sock)
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return poll


class ClientConnection(asyncio.Protocol):
    """One connection: idle, or with one request whose response is not complete. No pipelining.

    `sock` is the transport's socket. `on_idle` is called when another request may be sent, `on_lost` once, when the
    connection is closed.
    """

    def __init__(
        self,
        sock: socket.socket,
        on_idle: Callable[["ClientConnection"], None],
        on_lost: Callable[["ClientConnection"], None],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._loop = loop
        self.request_count = 0  # requests sent
        self.created_at = self.idle_since = 0.0
        self._poll = _poll_of(sock)
        self._on_idle = on_idle
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._response: Response | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._head_bytes = 0  # received since the request or the last part of a body
        self._fields: list[bytes] = []  # names and values in turn, of the head or trailer section being received
        self._keep_alive = False
        self._is_paused = False
        self._writable: asyncio.Future[None] | None = None

    @property
    def is_open(self) -> bool:
        """Whether the connection is not closed."""
        return self._transport is not None

    def is_usable(self) -> bool:
        """Return whether an idle connection can take a request.

        The socket must not be readable: neither bytes nor an end of stream that the event loop has not read yet.
        """
        if self._transport is None or self._response is not None or self._transport.is_closing():
            return False
        return not self._poll.poll(0)

    @property
    def tls(self) -> ssl.SSLObject | None:
        """The TLS of this connection, None where there is none."""
        return self._transport.get_extra_info("ssl_object") if self._transport is not None else None

    def send(self, method: str, message: bytes) -> Response:
        """Send a request's head and what is available of its body; return its response, still to be received."""
        if self._transport is None or self._response is not None:
            raise RemoteProtocolError("the connection is not idle")
        self.request_count += 1
        self._head_bytes = 0
        self._keep_alive = False
        if self._parser is None:
            self._parser = httptools.HttpResponseParser(self)
        self._response = response = Response(self, method, self._loop)
        self._fields = []
        self._transport.write(message)
        return response

    async def write(self, data: bytes) -> None:
        """Send more of the request's body; wait while the write buffer is full."""
        if self._transport is None:
            raise RemoteProtocolError("the connection was closed")
        self._transport.write(data)
        if self._writable is not None:
            await self._writable

    def resume(self) -> None:
        """Resume reading, if it was paused."""
        if self._is_paused and self._transport is not None:
            self._is_paused = False
            self._transport.resume_reading()

    def abort(self) -> None:
        """Close the connection at once."""
        if self._transport is not None:
            self._transport.abort()
        self._release(RemoteProtocolError("the connection was aborted"))

    def close(self) -> None:
        """Close an idle connection in order."""
        if self._transport is not None:
            self._transport.close()

    # asyncio.Protocol.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are not a subclass of asyncio.Transport
        self._transport.set_write_buffer_limits(HIGH_WATER)

    def data_received(self, data: bytes) -> None:
        """Parse what has arrived."""
        response, parser = self._response, self._parser
        if response is None or parser is None:
            self.abort()  # not requested: it must not become the response to the next request (RFC 9112 section 9.2)
            return
        self._head_bytes += len(data)
        try:
            parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            self._keep_alive = False
            if not response.is_complete:
                self._fail(exc)
        if response.is_complete:
            self._finish(response)
        elif self._head_bytes > MAX_HEAD_BYTES:
            self._fail(None)
        response.wake()  # once per chunk of data, not per part of the response

    def eof_received(self) -> None:
        """Return None, so that the transport closes: half-closed connections are not supported."""

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail the pending response, or complete it where its body ends with the connection."""
        response = self._response
        if response is not None and exc is None and response.has_head and response.is_close_delimited:
            self._response = None
            response.complete()
            response.wake()
        self._release(RemoteProtocolError("the connection was closed"))

    def pause_writing(self) -> None:
        """Make `write` wait."""
        self._writable = self._loop.create_future()

    def resume_writing(self) -> None:
        """Let `write` continue."""
        if self._writable is not None:
            if not self._writable.done():
                self._writable.set_result(None)
            self._writable = None

    def _fail(self, cause: Exception | None) -> None:
        # httptools wraps what a callback raises in HttpParserCallbackError, and sets the original as its context.
        context = cause.__context__ if cause is not None else None
        text = str(context) if isinstance(context, _InvalidResponse) else "is not well-formed"
        if self._transport is not None:
            self._transport.abort()
        self._release(RemoteProtocolError(f"it {text}"))

    def _finish(self, response: Response) -> None:
        """Make the connection idle where it persists (RFC 9112 section 9.3) and the upload is done; else close it."""
        self._response = None
        is_sent = response.upload is None or response.upload.done()
        if not is_sent and response.upload is not None:
            response.upload.cancel()
        if not (self._keep_alive and is_sent) or self._transport is None or self._transport.is_closing():
            self.abort()
            return
        self.resume()
        self._on_idle(self)

    def _release(self, error: RemoteProtocolError) -> None:
        """Release transport, parser and response; does nothing the second time."""
        if self._transport is None:
            return
        self._transport = self._parser = None
        self.resume_writing()
        response, self._response = self._response, None
        if response is not None:
            response.fail(error)
        self._on_lost(self)

    # Callbacks of httptools. An exception here ends `feed_data`, see `_fail`.

    def on_message_begin(self) -> None:
        """Start a response; drop what an interim response brought. A second final response is an error."""
        response = self._response
        if response is None or response.is_complete:
            raise _InvalidResponse("is followed by another response")
        self._fields = []
        response.reason = b""

    def on_status(self, reason: bytes) -> None:
        """Append a part of the reason phrase."""
        if self._response is not None:
            self._response.reason += reason
            if len(self._response.reason) > MAX_REASON:
                raise _InvalidResponse("has a status line that is too long")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Store a field of the head, or of a trailer section, which is not forwarded (RFC 9110 section 6.5.1)."""
        self._fields += (name, value)

    def on_headers_complete(self) -> None:
        """Check the head. Interim responses (1xx) are skipped; 101 is an error: no upgrade was requested."""
        response, parser = self._response, self._parser
        if response is None or parser is None:
            raise _InvalidResponse("was not requested")
        response.status = status = parser.get_status_code()
        if 100 <= status < 200 and status != 101:
            return
        response.version = parser.get_http_version()
        response.names = self._header_names(tuple(self._fields[::2]))
        response.values = self._fields[1::2]
        error = validation_error(response, self._head_bytes)
        if error:
            raise _InvalidResponse(error)
        self._fields = []  # fields from here on are a trailer section
        response.has_head = True
        if response.method == "HEAD":
            # httptools parses responses without the request's method, and would take the next bytes for the body that
            # Content-Length announces (RFC 9112 section 6.3, rule 1).
            self._keep_alive = parser.should_keep_alive()
            self._parser = None
            response.complete()

    def _header_names(self, names: tuple[bytes, ...]) -> HeaderNames:
        # Not into the cache: a server could fill the memory with long sequences.
        is_long = self._head_bytes > MAX_ORDER_LENGTH and (
            len(names) > MAX_FIELDS or sum(map(len, names)) > MAX_ORDER_LENGTH
        )
        return HeaderNames(names) if is_long else _known_names(names)

    def on_body(self, chunk: bytes) -> None:
        """Buffer a part of the body; pause reading above HIGH_WATER."""
        response = self._response
        if response is None or response.is_complete:
            raise _InvalidResponse("has a body that is not allowed")
        self._head_bytes = 0
        response.chunks.append(chunk)
        response.buffered += len(chunk)
        if response.buffered > HIGH_WATER and not self._is_paused and self._transport is not None:
            self._is_paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        """Complete the response; called for interim responses, too."""
        response, parser = self._response, self._parser
        if response is None or parser is None or not response.has_head:
            return
        if len(self._fields) > 2 * MAX_FIELDS:
            raise _InvalidResponse("has a trailer section that is too long")
        self._keep_alive = parser.should_keep_alive()
        if _CODING in response.names.index:
            # A new parser for the next response, so that nothing of a trailer section can become part of its head.
            self._parser = None
        response.complete()


def validation_error(response: Response, head_size: int) -> str:
    """Return why a head that httptools accepted must not be forwarded; empty where it may be.

    `head_size` is an upper bound of its bytes, which saves measuring each field.
    """
    # httptools accepts HTTP/0.9 and HTTP/2.0 in a status line.
    if response.version not in _SUPPORTED_VERSIONS:
        return "has an unsupported HTTP version"
    is_too_long = (
        head_size > MAX_FIELD and max(map(len, chain(response.names.in_order, response.values)), default=0) > MAX_FIELD
    )
    if is_too_long or len(response.values) > MAX_FIELDS:
        return "has too many fields, or one that is too long"
    if response.status < 200:
        return "has no final status"  # 101, or one below 100, which httptools accepts
    if _CODING in response.names.index:
        # Only `chunked`, once. Transfer-Encoding is not forwarded: the app would take another coding, which httptools
        # does not decode, for the content itself. In HTTP/1.0 the framing is faulty (RFC 9112 section 6.1).
        codings = [
            value
            for name, value in zip(response.names.in_order, response.values, strict=True)
            if name.lower() == _CODING
        ]
        if len(codings) > 1 or codings[0].strip(b" \t").lower() != b"chunked" or response.version == "1.0":
            return "has an unsupported transfer coding"
    if _CONTROL.search(response.reason):  # httptools accepts them
        return "has control characters in its status line"
    return ""
