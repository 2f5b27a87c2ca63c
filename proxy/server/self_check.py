"""A request of the proxy's own through each listener, before the proxy calls itself ready.

A library whose private names have changed can accept connections and answer none of them (aiohttp 3.14.3 did), and
nothing that an operator watches would show it.
"""

import asyncio
import socket
from functools import partial

from aiohttp import web

from proxy.errors import MethodRefused
from proxy.observability.logging import format_location
from proxy.request.context import RequestContext
from proxy.request.upstream.response import ErrorResponse
from proxy.server.http_server import HttpServer

TIMEOUT = 5.0  # seconds for the whole request; it takes about a millisecond

# No app may send it (OPTIONS is refused), so that no other request can be taken for it in a trace of the network.
_REQUEST = b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\nUser-Agent: sp-api-proxy self-check\r\n\r\n"
_STATUS_LINE = b"HTTP/1.1 405 "
_MARK = b"\r\nx-sp-proxy-error: MethodNotAllowed\r\n"


class SelfCheckFailed(Exception):
    """A listener did not send the response that it should; the text says what it did instead."""


async def check_listener(server: HttpServer, timeout: float = TIMEOUT) -> None:  # noqa: ASYNC109 - around the whole check
    """Send one request through the protocol of this listener; raise SelfCheckFailed unless it gets its response.

    The connection is a pair of sockets within the process, given to the listener's own protocol as one that it
    accepted. So it works for TCP, TLS with or without client certificates, and Unix sockets alike, and needs no
    caller key. The request goes through the parser, the queue, the connection's task and the writing of the response;
    it stops before the handler, and appears in no metric, history or log of requests.
    """
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    writer: asyncio.StreamWriter | None = None
    transport: asyncio.BaseTransport | None = None
    try:
        async with asyncio.timeout(timeout):
            # Before the protocol is connected: it finds its request there, and a write cannot meet a closed peer.
            ours.send(_REQUEST)
            transport, _ = await loop.connect_accepted_socket(partial(server.self_check_connection, _refuse), theirs)
            reader, writer = await asyncio.open_connection(sock=ours)
            response = await reader.read()  # the response closes the connection
    except TimeoutError as exc:
        raise SelfCheckFailed(f"no response within {timeout:g} s") from exc
    except Exception as exc:
        raise SelfCheckFailed(f"the connection failed: {format_location(exc)}") from exc
    finally:
        (ours if writer is None else writer).close()
        (theirs if transport is None else transport).close()
    if not response:
        raise SelfCheckFailed("the connection was closed without a response")
    if not response.startswith(_STATUS_LINE) or _MARK not in response:
        raise SelfCheckFailed("the response is not the expected one")


async def _refuse(_: web.BaseRequest) -> web.StreamResponse:
    error = MethodRefused("this is the proxy's check of its own listener", "")
    response = ErrorResponse(error, RequestContext("OPTIONS", 0.0).summary())
    response.force_close()
    return response
