"""Responses to the app as bytes: those of Amazon, forwarded, and those of the proxy."""

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

# Fields of one connection (RFC 9110 section 7.6.1), and those that ask to switch protocols on it.
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

_MAX_REASON = 64  # bytes of a reason phrase in a cached status line

# Set by the proxy alone: removed from responses of Amazon, which must not look like errors of the proxy.
PROXY_HEADERS = frozenset({"x-sp-proxy", "x-sp-proxy-error"})

# Fields that describe the bytes of a body, and are wrong for a body that was decompressed or rewritten.
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
_CHECKSUM_PREFIX = "x-amz-checksum-"


def named_in_connection(headers: CIMultiDictProxy[str]) -> frozenset[str]:
    """Return the field names that `Connection` declares hop-by-hop, in lower case and with `_` as `-`."""
    values = headers.getall("Connection", None)
    return _named(values) if values else frozenset()


def _named(values: list[str]) -> frozenset[str]:
    return frozenset(_normalized(name.strip()) for value in values for name in value.split(","))


# Set on a request whose connection is closed after its response, because the proxy is shutting down.
CLOSE_AFTER = web.RequestKey("last_on_connection", bool)

_RESET = struct.pack("ii", 1, 0)  # l_onoff, l_linger: close() drops unsent data and sends RST


def abort_connection(request: web.BaseRequest) -> None:
    """Close the app's connection so that it cannot mistake a truncated response for a complete one."""
    transport = request.transport
    if transport is None:
        return
    if request.version < HttpVersion11:
        # In a response without chunks or length, an orderly close ends the body (RFC 9112 section 6.3): send RST.
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
    """The head of a response: Amazon's, or a rewritten one."""

    @property
    def status(self) -> int:
        """The status code."""

    @property
    def reason(self) -> bytes:
        """The reason phrase."""

    @property
    def names(self) -> HeaderNames:
        """The names of its fields, in order."""

    @property
    def values(self) -> Sequence[bytes]:
        """Their values, in the same order."""

    def first(self, name: bytes) -> str | None:
        """Return the first value of the field with this name in lower case, None where there is none."""


class RewrittenHead:
    """The head of a response whose body was replaced, without the fields that describe the original body."""

    def __init__(self, status: int, reason: bytes, fields: Iterable[tuple[bytes, bytes]]) -> None:
        kept = list(fields)
        self.status = status
        self.reason = reason
        self.names = HeaderNames(tuple(name for name, _ in kept))
        self.values = [value for _, value in kept]

    @classmethod
    def of(cls, head: ResponseHead, length: int | None) -> Self:
        """Return `head` for another body, of `length` bytes where that is known."""
        fields = [
            (name, value)
            for name, value in zip(head.names.in_order, head.values, strict=True)
            if _normalized(name.decode("latin-1")) not in _BODY_HEADERS
            and not _normalized(name.decode("latin-1")).startswith(_CHECKSUM_PREFIX)
        ]
        if length is not None:
            fields.append((b"Content-Length", b"%d" % length))
        return cls(head.status, head.reason, fields)

    def first(self, name: bytes) -> str | None:
        """Return the first value of the field with this name in lower case, None where there is none."""
        index = self.names.index.get(name)
        return self.values[index].decode("latin-1").rstrip(" \t") if index is not None else None


class UpstreamResponse:
    """Amazon's response as it is written to the app, with `x-sp-proxy`, a summary of what the proxy did.

    Field lines are forwarded byte for byte. `is_last` closes the app's connection after it.
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
        if names.line_template is None or names.line_prefixes is None:
            _prepare_lines(names)
        if status == 204 or b"connection" in names.index:
            _add_headers(parts, response)
        else:
            parts.append((names.line_template or b"") % tuple(compress(response.values, names.line_prefixes or ())))
        if b"content-length" not in names.index and status not in BODILESS_STATUSES and request.method != "HEAD":
            self.is_chunked = not is_1_0
            if is_1_0:
                self.keep_alive = False  # the end of the connection ends the body
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
        """Return a part of the body as it is written; nothing for no data, which would be the last chunk."""
        return b"%x\r\n%b\r\n" % (len(data), data) if self.is_chunked and data else data

    @property
    def end(self) -> bytes:
        """The bytes after the body."""
        return b"0\r\n\r\n" if self.is_chunked else b""


@lru_cache(maxsize=256)
def _status_line(minor: int, status: int, reason: bytes) -> bytes:
    return b"HTTP/1.%d %d %b" % (minor, status, reason)


def _add_headers(parts: list[bytes], response: ResponseHead) -> None:
    """Add the forwarded fields of a response where not the field names alone decide which they are."""
    named = _named(
        [
            value.decode("latin-1")
            for name, value in zip(response.names.in_order, response.values, strict=True)
            if name.lower() == b"connection"
        ]
    )
    # Content-Length is forwarded even if Connection names it: without it the end of the body would be unknown.
    length = {"content-length"}
    removed = named | length if response.status == 204 else named - length  # RFC 9110 section 8.6
    lines = zip(response.names.line_prefixes or (), response.names.in_order, response.values, strict=True)
    for prefix, name, value in lines:
        if prefix and _normalized(name.decode("latin-1")) not in removed:
            parts += (prefix, value)


def _prepare_lines(names: HeaderNames) -> None:
    """Cache what precedes each value in the forwarded head, nothing for a removed field, and a %-template of it."""
    names.line_prefixes = tuple(_head_prefix(name) for name in names.in_order)
    names.line_template = b"".join(prefix.replace(b"%", b"%%") + b"%b" for prefix in names.line_prefixes if prefix)


def _head_prefix(name: bytes) -> bytes:
    plain = _normalized(name.decode("latin-1"))
    return b"" if plain in HOP_BY_HOP or plain in PROXY_HEADERS else b"\r\n" + name + b": "


def _normalized(name: str) -> str:
    return name.lower().replace("_", "-")


class PlaceholderResponse(_ProxyResponse, web.Response):
    """The response to a token request of an app: as Amazon's, with a placeholder token, not to be cached."""

    def __init__(self, content: Mapping[str, object], summary: str) -> None:
        headers = {"Content-Type": "application/json;charset=UTF-8", "Cache-Control": "no-store", "Pragma": "no-cache"}
        super().__init__(body=json.dumps(content).encode(), headers={**headers, "x-sp-proxy": summary})


class ErrorResponse(_ProxyResponse, web.Response):
    """An error response of the proxy: Amazon's envelope, and a field that marks it as the proxy's."""

    def __init__(self, error: ProxyError, summary: str, *, with_body: bool = True) -> None:
        super().__init__(status=error.status, body=error.body() if with_body else b"", headers=error.headers())
        self.headers["x-sp-proxy"] = summary

    def as_bytes(self) -> bytes:
        """Return the whole message, for a connection without a parsed request; it is closed after this response."""
        body = self.body if isinstance(self.body, bytes) else b""
        fields = {**self.headers, "Content-Length": str(len(body)), "Connection": "close"}
        lines = [f"HTTP/1.1 {self.status} {self.reason}", *(f"{name}: {value}" for name, value in fields.items())]
        return "\r\n".join([*lines, "", ""]).encode() + body
