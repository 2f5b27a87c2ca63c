"""What do answers look like on the wire: Amazon's, passed on, and the proxy's own?"""

import json
import math
import socket
import struct
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import compress
from typing import Protocol, Self

from aiohttp import web
from aiohttp.http import HttpVersion11
from multidict import CIMultiDictProxy

from proxy.errors import ProxyError
from proxy.request.aiohttp_internals import BareResponse
from proxy.request.context import RequestContext
from proxy.request.upstream.http1 import HeaderNames
from proxy.request.upstream.token_redaction import TokenRedactor

# Fields that belong to one connection (RFC 9110 section 7.6.1), and those that ask to switch protocols on it.
HOP_BY_HOP = frozenset(
    {
        "connection",
        "http2-settings",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)

BODILESS_STATUSES = frozenset({204, 304})

_MAX_REASON = 64  # bytes of a reason phrase that is remembered

# Only the proxy may say these: an answer that brings them is not to be taken for the proxy's own.
PROXY_HEADERS = frozenset({"x-sp-proxy", "x-sp-proxy-error"})


# What is true of the bytes of a body alone, and no longer where it was unpacked or written anew.
_BODY_HEADERS = frozenset(
    {
        "accept-ranges",
        "content-digest",
        "content-encoding",
        "content-length",
        "content-md5",
        "digest",
        "etag",
        "repr-digest",
    }
)
_CHECKSUM = "x-amz-checksum-"


def named_in_connection(headers: CIMultiDictProxy[str]) -> frozenset[str]:
    """Return the field names, with `_` as `-`, that `Connection` declares to be for one hop alone."""
    values = headers.getall("Connection", None)
    return _named(values) if values else frozenset()


def _named(values: list[str]) -> frozenset[str]:
    return frozenset(_plain(name.strip()) for value in values for name in value.split(","))


# Set on a request whose connection ends with its answer, because the proxy is about to stop.
CLOSE_AFTER = web.RequestKey("last_on_connection", bool)

_RESET = struct.pack("ii", 1, 0)  # linger for no time: what is unsent is dropped, and the peer sees a reset


def abort_connection(request: web.BaseRequest) -> None:
    """End the app's connection so that it cannot take what came for a whole answer."""
    transport = request.transport
    if transport is None:
        return
    if request.version < HttpVersion11:
        # Without chunks, the orderly end of the connection would be the end of the answer (RFC 9112 section 6.3).
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    transport.abort()


class _ProxyResponse(BareResponse):
    """A response of the proxy's own."""

    def on_prepare(self, request: web.BaseRequest) -> None:
        """End the connection with this response where that was decided while the request was served."""
        if CLOSE_AFTER in request:
            self.force_close()


class ResponseHead(Protocol):
    """What there is to know of an answer before its body: Amazon's own, or one that was made of it."""

    @property
    def status(self) -> int:
        """The status code."""

    @property
    def reason(self) -> bytes:
        """The reason phrase."""

    @property
    def names(self) -> HeaderNames:
        """The names of its fields."""

    @property
    def values(self) -> Sequence[bytes]:
        """Their values, in the same order."""

    def first(self, name: bytes) -> str | None:
        """Return the first value of the field with this name in lower case, None where there is none."""


class RewrittenHead:
    """The head of an answer whose body is not the one it came with; what tells of the bytes of that one is left out."""

    def __init__(self, status: int, reason: bytes, fields: Iterable[tuple[bytes, bytes]]) -> None:
        kept = list(fields)
        self.status = status
        self.reason = reason
        self.names = HeaderNames(tuple(name for name, _ in kept))
        self.values = [value for _, value in kept]

    @classmethod
    def of(cls, head: ResponseHead, length: int | None) -> Self:
        """Return the head for another body, of `length` bytes where that is known."""
        fields = [
            (name, value)
            for name, value in zip(head.names.in_order, head.values, strict=True)
            if _plain(name.decode("latin-1")) not in _BODY_HEADERS
            and not _plain(name.decode("latin-1")).startswith(_CHECKSUM)
        ]
        if length is not None:
            fields.append((b"Content-Length", b"%d" % length))
        return cls(head.status, head.reason, fields)

    def first(self, name: bytes) -> str | None:
        """Return the first value of the field with this name in lower case, None where there is none."""
        index = self.names.index.get(name)
        return self.values[index].decode("latin-1").rstrip(" \t") if index is not None else None


class UpstreamResponse:
    """How Amazon's answer is written to the app: with one field more, what the proxy decided and did.

    The rest of a field line is passed on byte for byte. `is_last` ends the app's connection with it.
    """

    __slots__ = ("head", "is_chunked", "keep_alive")

    def __init__(
        self,
        response: ResponseHead,
        request: web.BaseRequest,
        context: RequestContext,
        redactor: TokenRedactor,
        *,
        is_last: bool,
    ) -> None:
        is_1_0 = request.version != HttpVersion11
        self.keep_alive = request.keep_alive and not is_last and CLOSE_AFTER not in request
        self.is_chunked = False
        names, status = response.names, response.status
        line = _status_line if len(response.reason) <= _MAX_REASON else _status_line.__wrapped__
        parts = [line(not is_1_0, status, response.reason)]
        if names.lines is None or names.line_beginnings is None:
            _work_out_lines(names)
        if status == 204 or b"connection" in names.index:
            _add_headers(parts, response)
        else:
            parts.append((names.lines or b"") % tuple(compress(response.values, names.line_beginnings or ())))
        if b"content-length" not in names.index and status not in BODILESS_STATUSES and request.method != "HEAD":
            self.is_chunked = not is_1_0
            if is_1_0:
                self.keep_alive = False  # the end of the connection is the end of the answer
            else:
                parts.append(b"\r\nTransfer-Encoding: chunked")
        if is_1_0 is self.keep_alive:
            parts.append(b"\r\nConnection: keep-alive" if is_1_0 else b"\r\nConnection: close")
        parts.append(b"\r\nx-sp-proxy: " + context.summary().encode())
        if context.retry_after is not None and b"retry-after" not in names.index:
            parts.append(b"\r\nRetry-After: %d" % max(1, math.ceil(context.retry_after)))
        parts.append(b"\r\n\r\n")
        self.head = redactor.redact(b"".join(parts))

    def encode_chunk(self, data: bytes) -> bytes:
        """Return a piece of the body as it is written."""
        return b"%x\r\n%b\r\n" % (len(data), data) if self.is_chunked and data else data

    @property
    def end(self) -> bytes:
        """What is written behind the body."""
        return b"0\r\n\r\n" if self.is_chunked else b""


@lru_cache(maxsize=256)
def _status_line(minor: int, status: int, reason: bytes) -> bytes:
    return b"HTTP/1.%d %d %b" % (minor, status, reason)


def _add_headers(parts: list[bytes], response: ResponseHead) -> None:
    """Add what is passed on, where more than the names of the fields decides about it."""
    named = _named(
        [
            value.decode("latin-1")
            for name, value in zip(response.names.in_order, response.values, strict=True)
            if name.lower() == b"connection"
        ]
    )
    # The length goes on whatever Connection says, where there is a body: without it nobody knew where that ends.
    length = {"content-length"}
    left_out = named | length if response.status == 204 else named - length  # RFC 9110 section 8.6
    lines = zip(response.names.line_beginnings or (), response.names.in_order, response.values, strict=True)
    for prefix, name, value in lines:
        if prefix and _plain(name.decode("latin-1")) not in left_out:
            parts += (prefix, value)


def _work_out_lines(names: HeaderNames) -> None:
    """Note each field line up to its value, with the line end before it, and nothing for one that goes no further."""
    names.line_beginnings = tuple(_head_prefix(name) for name in names.in_order)
    names.lines = b"".join(prefix.replace(b"%", b"%%") + b"%b" for prefix in names.line_beginnings if prefix)


def _head_prefix(name: bytes) -> bytes:
    plain = _plain(name.decode("latin-1"))
    return b"" if plain in HOP_BY_HOP or plain in PROXY_HEADERS else b"\r\n" + name + b": "


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


class PlaceholderResponse(_ProxyResponse, web.Response):
    """The answer to an app that asks for a token: as Amazon's, with a placeholder, which nobody is to keep."""

    def __init__(self, content: Mapping[str, object], summary: str) -> None:
        headers = {"Content-Type": "application/json;charset=UTF-8", "Cache-Control": "no-store", "Pragma": "no-cache"}
        super().__init__(body=json.dumps(content).encode(), headers={**headers, "x-sp-proxy": summary})


class ErrorResponse(_ProxyResponse, web.Response):
    """The answer for an error of the proxy's own: Amazon's envelope, and the mark that it is not Amazon's."""

    def __init__(self, error: ProxyError, summary: str, *, with_body: bool = True) -> None:
        super().__init__(status=error.status, body=error.body() if with_body else b"", headers=error.headers())
        self.headers["x-sp-proxy"] = summary

    def as_bytes(self) -> bytes:
        """Return the whole message, for a connection on which no request came about; it ends with this answer."""
        body = self.body if isinstance(self.body, bytes) else b""
        fields = {**self.headers, "Content-Length": str(len(body)), "Connection": "close"}
        lines = [f"HTTP/1.1 {self.status} {self.reason}", *(f"{name}: {value}" for name, value in fields.items())]
        return "\r\n".join([*lines, "", ""]).encode() + body
