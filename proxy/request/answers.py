"""What do answers look like on the wire: Amazon's, passed on, and the proxy's own?"""

import math
import socket
import struct

import aiohttp
from aiohttp import web
from aiohttp.http import HttpVersion11
from multidict import CIMultiDict, CIMultiDictProxy

from proxy.errors import ProxyError
from proxy.request.exchange import Exchange
from proxy.request.mask import Mask

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

# Only the proxy may say these: an answer that brings them is not to be taken for the proxy's own.
OURS = frozenset({"x-sp-proxy", "x-sp-proxy-error"})


def named_in_connection(headers: CIMultiDictProxy[str]) -> frozenset[str]:
    """Return the field names, with `_` as `-`, that `Connection` declares to be for one hop alone."""
    values = headers.getall("Connection", None)
    if not values:
        return frozenset()
    return frozenset(name.strip().lower().replace("_", "-") for value in values for name in value.split(","))


# Set on a request whose connection ends with its answer, because the proxy is about to stop.
LAST_ON_CONNECTION = web.RequestKey("last_on_connection", bool)

_RESET = struct.pack("ii", 1, 0)  # linger for no time: what is unsent is dropped, and the peer sees a reset


def break_off(request: web.BaseRequest) -> None:
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


class _Plain(web.StreamResponse):
    """A response without the headers that aiohttp's server adds of its own accord."""

    async def _prepare_headers(self) -> None:
        # Not public, but the only place between aiohttp's defaults and the wire; the tests of both answers hold it.
        given = {name.lower() for name in self.headers}
        if self._req is not None and LAST_ON_CONNECTION in self._req:
            self.force_close()
        await super()._prepare_headers()
        for name in ("Content-Type", "Date", "Server"):
            if name.lower() not in given:
                self.headers.popall(name, None)


class AmazonsAnswer(_Plain):
    """Amazon's answer with one header more: what the proxy decided and did. Its body is still to be written."""

    def __init__(self, response: aiohttp.ClientResponse, exchange: Exchange, mask: Mask) -> None:
        headers = _passed_on(response.headers, mask)
        super().__init__(status=response.status, reason=mask.of(response.reason or ""), headers=headers)
        self.headers["x-sp-proxy"] = exchange.summary()
        if exchange.retry_after is not None:
            self.headers.setdefault("Retry-After", str(max(1, math.ceil(exchange.retry_after))))


def _passed_on(headers: CIMultiDictProxy[str], mask: Mask) -> CIMultiDict[str]:
    dropped = HOP_BY_HOP | OURS | named_in_connection(headers)
    return CIMultiDict((name, mask.of(value)) for name, value in headers.items() if _plain(name) not in dropped)


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


class OwnAnswer(_Plain, web.Response):
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
