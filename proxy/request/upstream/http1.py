"""How does one connection to a server speak HTTP/1.1: a request out, its answer in, read strictly (RFC 9112)?

llhttp, by httptools, reads the answers. Around it stands what a proxy needs and a parser does not know: which answer
belongs to a request, where it ends, how large it may grow, and whether another request may follow. When in doubt, the
connection is not used again; what arrives on one that nobody waits on ends it.
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
MAX_HEAD_BYTES = (
    256 * 1024
)  # bytes in a row that are no body: a head with the interim ones before it, a trailer section
HIGH_WATER = 64 * 1024  # bytes of body that wait to be read before the server is made to wait

_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_SUPPORTED_VERSIONS = ("1.1", "1.0")
_NO_BODY = frozenset({204, 304})
_LENGTH, _CODING = b"content-length", b"transfer-encoding"
MAX_ORDERS, MAX_ORDER_LENGTH = 256, 8192  # sequences of field names that are remembered; bytes of the longest of them


class HeaderNames:
    """The names of an answer's fields in their order, and what follows from them; a server sends the same few."""

    __slots__ = ("in_order", "index", "line_beginnings", "lines")

    def __init__(self, in_order: tuple[bytes, ...]) -> None:
        self.in_order = in_order
        # Where the first field of each name, in lower case, stands.
        self.index: Mapping[bytes, int] = {
            name.lower(): len(in_order) - 1 - index for index, name in enumerate(reversed(in_order))
        }
        # On the way to the app, and all their lines with a place for each value; None until that is worked out.
        self.line_beginnings: tuple[bytes, ...] | None = None
        self.lines: bytes | None = None


_known_names = lru_cache(maxsize=MAX_ORDERS)(HeaderNames)
_NO_NAMES = HeaderNames(())


class RemoteProtocolError(Exception):
    """The server gave no proper answer, or only part of one; the text says what is wrong, and nothing of it."""


class _Malformed(Exception):
    """What came is no answer to be passed on."""


class Response:
    """One answer: its head once `head` has returned, its body by `read`.

    `names` and `values` are those of its fields as they came, in order. An answer that is not wanted to its end must
    be closed.
    """

    __slots__ = (
        "_error",
        "_loop",
        "_waiter",
        "_wire",
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
        self.is_complete = False  # all of it is here, though perhaps not read yet
        self.upload: asyncio.Task[None] | None = None  # of the request's body, where that goes on
        self._wire: ClientConnection | None = connection
        self._error: Exception | None = None
        self.chunks: list[bytes] = []  # of the body, that wait to be read, and how many bytes they are
        self.buffered = 0
        self._waiter: asyncio.Future[None] | None = None
        self.names = _NO_NAMES
        self.values: list[bytes] = []

    def first(self, name: bytes) -> str | None:
        """Return the first value of the field with this name in lower case, None where there is none."""
        index = self.names.index.get(name)
        return self.values[index].decode("latin-1").rstrip(" \t") if index is not None else None

    def value(self, name: bytes) -> bytes | None:
        """Return what `first` returns, as it came."""
        index = self.names.index.get(name)
        return self.values[index] if index is not None else None

    @property
    def is_waiting(self) -> bool:
        """Whether some of the body waits to be read."""
        return bool(self.chunks)

    @property
    def at_end(self) -> bool:
        """Whether all of it came and was read."""
        return self.is_complete and not self.chunks

    @property
    def is_close_delimited(self) -> bool:
        """Whether only the end of the connection says where the body ends (RFC 9112 section 6.3)."""
        return not (
            self.method == "HEAD"
            or self.status in _NO_BODY
            or _LENGTH in self.names.index
            or _CODING in self.names.index
        )

    async def head(self) -> None:
        """Wait for the head; raise Broken where none comes."""
        while not self.has_head:
            if self._error is not None:
                raise self._error
            await self._wait()

    async def read(self) -> bytes:
        """Return what has come of the body, nothing at its end; raise Broken where it was cut off."""
        while not self.chunks:
            if self.is_complete:
                return b""
            if self._error is not None:
                raise self._error
            await self._wait()
        data = self.read_buffered()
        if self._wire is not None:
            self._wire.resume()
        return data

    def read_buffered(self) -> bytes:
        """Return what waits to be read, without waiting for more."""
        chunks = self.chunks
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        self.chunks, self.buffered = [], 0
        return data

    def close(self) -> None:
        """Give the answer up: where not all of it came, its connection ends."""
        if self.upload is not None:
            self.upload.cancel()
        if self._wire is not None:
            self._wire.abort()

    async def end(self) -> None:
        """Close it, and wait until nobody reads the request's body any more."""
        self.close()
        if self.upload is not None and not self.upload.done():
            await asyncio.wait([self.upload])

    async def _wait(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    # What the connection tells.

    def completed(self) -> None:
        """Note that the last of it has come: nothing binds it to its connection any more."""
        self.is_complete = True
        self._wire = None

    def failed(self, error: Exception) -> None:
        """Note that no more will come."""
        self._error = error
        self._wire = None
        self.wake()

    def wake(self) -> None:
        """Let who waits look again."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _SelectPoll:
    """Does for one socket what `select.poll` does, where there is none (Windows)."""

    def __init__(self, sock: socket.socket) -> None:
        self._descriptor = sock.fileno()

    def poll(self, timeout: float) -> list[int]:
        """Return what can be read, within `timeout` milliseconds."""
        return select.select([self._descriptor], [], [], timeout / 1000)[0]


def _poll_of(sock: socket.socket) -> "select.poll | _SelectPoll":
    if not hasattr(select, "poll"):  # Windows
        return _SelectPoll(sock)
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return poll


class ClientConnection(asyncio.Protocol):
    """One connection: idle, or with one request whose answer is not complete.

    `sock` is what the transport uses. `on_idle` is called when another request may be sent, `on_lost` once, when the
    connection is gone.
    """

    def __init__(
        self,
        sock: socket.socket,
        on_idle: Callable[["ClientConnection"], None],
        on_lost: Callable[["ClientConnection"], None],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._loop = loop
        self.served = 0  # requests that were sent
        self.made_at = self.idle_since = 0.0
        self._poll_before_use = _poll_of(sock)
        self._on_idle = on_idle
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._response: Response | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._between = 0
        self._fields: list[bytes] = []  # names and values by turns, of those that come
        self._may_be_kept = False
        self._is_paused = False
        self._can_write: asyncio.Future[None] | None = None

    @property
    def is_open(self) -> bool:
        """Whether the connection has not ended."""
        return self._transport is not None

    def is_usable(self) -> bool:
        """Return whether an idle connection is still one: nothing has arrived, not even an end not known yet."""
        if self._transport is None or self._response is not None or self._transport.is_closing():
            return False
        return not self._poll_before_use.poll(0)

    @property
    def tls(self) -> ssl.SSLObject | None:
        """The TLS of this connection, None where there is none."""
        return self._transport.get_extra_info("ssl_object") if self._transport is not None else None

    def send(self, method: str, message: bytes) -> Response:
        """Send a request's head and what of its body is at hand; return its answer, of which nothing is there yet."""
        if self._transport is None or self._response is not None:
            raise RemoteProtocolError("the connection is not free")
        self.served += 1
        self._between = 0
        self._may_be_kept = False
        if self._parser is None:
            self._parser = httptools.HttpResponseParser(self)
        self._response = response = Response(self, method, self._loop)
        self._fields = []
        self._transport.write(message)
        return response

    async def write(self, data: bytes) -> None:
        """Send more of the request's body, as fast as the server takes it."""
        if self._transport is None:
            raise RemoteProtocolError("the connection ended")
        self._transport.write(data)
        if self._can_write is not None:
            await self._can_write

    def resume(self) -> None:
        """Let the server send on."""
        if self._is_paused and self._transport is not None:
            self._is_paused = False
            self._transport.resume_reading()

    def abort(self) -> None:
        """End the connection at once."""
        if self._transport is not None:
            self._transport.abort()
        self._gone(RemoteProtocolError("the connection was given up"))

    def close(self) -> None:
        """End an idle connection in order."""
        if self._transport is not None:
            self._transport.close()

    # What the transport tells.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are no subclass of it
        self._transport.set_write_buffer_limits(HIGH_WATER)

    def data_received(self, data: bytes) -> None:
        """Read what came, for the answer that is waited for."""
        response, parser = self._response, self._parser
        if response is None or parser is None:
            self.abort()  # nobody asked for this: it must not become the answer to the next request
            return
        self._between += len(data)
        try:
            parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            self._may_be_kept = False
            if not response.is_complete:
                self._give_up(exc)
        if response.is_complete:
            self._end_of(response)
        elif self._between > MAX_HEAD_BYTES:
            self._give_up(None)
        response.wake()  # once for all that came together

    def eof_received(self) -> None:
        """Let the transport close: no server of ours ends one direction alone."""

    def connection_lost(self, exc: Exception | None) -> None:
        """End what is under way; an answer that only this could end is complete."""
        response = self._response
        if response is not None and exc is None and response.has_head and response.is_close_delimited:
            self._response = None
            response.completed()
            response.wake()
        self._gone(RemoteProtocolError("the connection ended"))

    def pause_writing(self) -> None:
        """Make writers wait."""
        self._can_write = self._loop.create_future()

    def resume_writing(self) -> None:
        """Let writers go on."""
        if self._can_write is not None:
            if not self._can_write.done():
                self._can_write.set_result(None)
            self._can_write = None

    def _give_up(self, cause: Exception | None) -> None:
        context = cause.__context__ if cause is not None else None
        text = str(context) if isinstance(context, _Malformed) else "is not well-formed"
        if self._transport is not None:
            self._transport.abort()
        self._gone(RemoteProtocolError(f"it {text}"))

    def _end_of(self, response: Response) -> None:
        """Keep the connection for another request, where the server lets us and all of this one was sent."""
        self._response = None
        all_sent = response.upload is None or response.upload.done()
        if not all_sent and response.upload is not None:
            response.upload.cancel()
        if not (self._may_be_kept and all_sent) or self._transport is None or self._transport.is_closing():
            self.abort()
            return
        self.resume()
        self._on_idle(self)

    def _gone(self, error: RemoteProtocolError) -> None:
        """Forget the connection, once."""
        if self._transport is None:
            return
        self._transport = self._parser = None
        self.resume_writing()
        response, self._response = self._response, None
        if response is not None:
            response.failed(error)
        self._on_lost(self)

    # What the parser tells. What is raised here becomes the context of its error.

    def on_message_begin(self) -> None:
        """Refuse an answer behind the one that was asked for; forget what an interim one brought."""
        response = self._response
        if response is None or response.is_complete:
            raise _Malformed("is followed by another one")
        self._fields = []
        response.reason = b""

    def on_status(self, reason: bytes) -> None:
        """Take the reason phrase, or a part of it."""
        if self._response is not None:
            self._response.reason += reason
            if len(self._response.reason) > MAX_REASON:
                raise _Malformed("has a status line that is too long")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a field of the head, or of a trailer section, which goes no further."""
        self._fields += (name, value)

    def on_headers_complete(self) -> None:
        """Judge the head. Interim answers (1xx) are passed over; nobody asked to switch protocols."""
        response, parser = self._response, self._parser
        if response is None or parser is None:
            raise _Malformed("was not asked for")
        response.status = status = parser.get_status_code()
        if 100 <= status < 200 and status != 101:
            return
        response.version = parser.get_http_version()
        response.names = self._known(tuple(self._fields[::2]))
        response.values = self._fields[1::2]
        wrong = validation_error(response, self._between)
        if wrong:
            raise _Malformed(wrong)
        self._fields = []  # what still comes is no part of the head
        response.has_head = True
        if response.method == "HEAD":
            # The parser does not know the method, and would wait for a body.
            self._may_be_kept = parser.should_keep_alive()
            self._parser = None
            response.completed()

    def _known(self, names: tuple[bytes, ...]) -> HeaderNames:
        is_long = self._between > MAX_ORDER_LENGTH and (
            len(names) > MAX_FIELDS or sum(map(len, names)) > MAX_ORDER_LENGTH
        )
        return HeaderNames(names) if is_long else _known_names(names)

    def on_body(self, chunk: bytes) -> None:
        """Pass a piece of the body on."""
        response = self._response
        if response is None or response.is_complete:
            raise _Malformed("has a body that it may not have")
        self._between = 0
        response.chunks.append(chunk)
        response.buffered += len(chunk)
        if response.buffered > HIGH_WATER and not self._is_paused and self._transport is not None:
            self._is_paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        """Note the end of an answer; of an interim one, nothing is kept."""
        response, parser = self._response, self._parser
        if response is None or parser is None or not response.has_head:
            return
        if len(self._fields) > 2 * MAX_FIELDS:
            raise _Malformed("has a trailer section that is too long")
        self._may_be_kept = parser.should_keep_alive()
        if _CODING in response.names.index:
            # The last field of a trailer section would come out as the first one of the next answer.
            self._parser = None
        response.completed()


def validation_error(response: Response, came: int) -> str:
    """Return what makes an answer unfit to be passed on, though the parser took it; nothing where it is fit.

    `came` is of how many bytes the head is at most.
    """
    if response.version not in _SUPPORTED_VERSIONS:
        return "is of an HTTP version that was not asked for"
    is_too_long = (
        came > MAX_FIELD and max(map(len, chain(response.names.in_order, response.values)), default=0) > MAX_FIELD
    )
    if is_too_long or len(response.values) > MAX_FIELDS:
        return "has fields that are too many or too long"
    if response.status < 200:
        return "has no status that ends a request"
    if _CODING in response.names.index:
        codings = [
            value
            for name, value in zip(response.names.in_order, response.values, strict=True)
            if name.lower() == _CODING
        ]
        if len(codings) > 1 or codings[0].strip(b" \t").lower() != b"chunked" or response.version == "1.0":
            return "has a transfer coding that nobody asked for"  # it would go on as if it were not coded at all
    if _CONTROL.search(response.reason):
        return "has a status line with control characters"
    return ""
