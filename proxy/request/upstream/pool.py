"""Pools of connections to Amazon and to Login with Amazon.

A request takes the idle connection that was used last, so that surplus ones stay idle and are closed before the server
closes them. The number of connections is bounded over all hosts; waiters are served in order.
"""

import asyncio
from collections import deque
from collections.abc import Mapping
from typing import Self
from urllib.parse import urlsplit

from proxy import __version__
from proxy.config import Config
from proxy.request.upstream.connector import Connector, Origin, ResumingContext, tls_context
from proxy.request.upstream.http1 import ClientConnection, Response

MAX_AGE = 3600.0  # seconds that a connection is used, so that a host's change of address takes effect
LWA_CONNECTIONS = 32


class ConnectionPool:
    """Connections by origin, at most `limit` of them; use it as an asynchronous context manager.

    `headers` are sent with every `request` and `post`. `tls` is the context of an earlier pool that trusts the same
    certificates: loading those of the system takes a tenth of a second.
    """

    def __init__(
        self, config: Config, limit: int, headers: Mapping[str, str] | None = None, tls: ResumingContext | None = None
    ) -> None:
        self.tls = tls or tls_context(config)
        self._connector = Connector(config, self.tls)
        self.limit = limit
        self._headers = dict(headers or {})
        self._max_idle = config.pool.idle
        self._connect_timeout = config.timeouts.connect
        self._idle: dict[Origin, list[ClientConnection]] = {}  # most recently used last
        self._open: dict[ClientConnection, Origin] = {}
        self._connecting = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._is_closed = False

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._is_closed = True
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
        for connection in list(self._open):
            connection.abort()
        await asyncio.sleep(0)  # abort() closes transports in the next iteration of the loop

    def drain(self) -> None:
        """Close idle connections, and those in use after their request; requests under way may still open new ones."""
        self._is_closed = True
        for idle in self._idle.values():
            while idle:
                idle.pop().abort()

    @property
    def is_in_use(self) -> bool:
        """Whether any connection is open or being opened."""
        return bool(self._open or self._connecting)

    def pop_idle(self, origin: Origin) -> ClientConnection | None:
        """Return a usable idle connection, None where there is none."""
        idle = self._idle.get(origin)
        while idle:
            connection = idle.pop()
            if connection.is_usable():
                return connection
            connection.abort()
        return None

    async def acquire(self, origin: Origin, *, fresh: bool = False) -> ClientConnection:
        """Return an idle or a new connection; at the limit, wait for the next that becomes idle or closes.

        `fresh` accepts only a new one. Raises TimeoutError after `timeouts.connect` seconds, and OSError (which
        includes `ssl.SSLError`) where connecting fails.
        """
        connection = None if fresh else self.pop_idle(origin)
        if connection is not None:
            return connection
        async with asyncio.timeout(self._connect_timeout):
            while len(self._open) + self._connecting >= self.limit and not self._close_one_idle():
                await self._wait_for_connection()
                connection = None if fresh else self.pop_idle(origin)
                if connection is not None:
                    return connection
            return await self._connect_new(origin)

    async def post(self, url: str, headers: Mapping[str, str], body: bytes, limit: int) -> tuple[int, bytes]:
        """POST on a new connection; return the response's status and up to `limit` + 1 bytes of its body.

        Redirects are not followed: they would send the secrets to another address. Raises as `acquire` does, and
        RemoteProtocolError.
        """
        response, data = await self.request("POST", url, {"Content-Length": str(len(body)), **headers}, body, limit)
        return response.status, data

    async def request(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes, limit: int
    ) -> tuple[Response, bytes]:
        """Send one request on a new connection; return the response and up to `limit` + 1 bytes of its body."""
        origin = Origin.of(url)
        connection = await self.acquire(origin, fresh=True)
        parts = urlsplit(url)
        path = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
        own = {"Host": origin.authority, "Connection": "close", **self._headers}
        response = connection.send(method, request_head(method, path, [*own.items(), *headers.items()]) + body)
        try:
            await response.receive_head()
            data = b""
            while len(data) <= limit and (chunk := await response.read()):
                data += chunk
        finally:
            response.close()
        return response, data[: limit + 1]

    async def _connect_new(self, origin: Origin) -> ClientConnection:
        self._connecting += 1
        try:
            connection = await self._connector.connect(
                origin, lambda sock: ClientConnection(sock, self._on_idle, self._on_lost, self._loop)
            )
        finally:
            self._connecting -= 1
            self._wake()
        if not connection.is_open:
            raise ConnectionResetError("the connection closed at once")
        connection.created_at = self._loop.time()
        self._open[connection] = origin
        return connection

    def _close_one_idle(self) -> bool:
        """Close an idle connection, to make room for a new one; return whether there was one."""
        for idle in self._idle.values():
            if idle:
                idle.pop(0).abort()
                return True
        return False

    async def _wait_for_connection(self) -> None:
        """Wait until a connection becomes idle or closes."""
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._waiting.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self._wake()  # woken in the same iteration in which it was cancelled: pass the wake-up on
            raise

    def _wake(self) -> None:
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def _on_idle(self, connection: ClientConnection) -> None:
        origin = self._open.get(connection)
        now = self._loop.time()
        if origin is None or self._is_closed or now - connection.created_at > MAX_AGE:
            connection.abort()
            return
        if connection.request_count == 1 and origin.is_tls:
            self.tls.remember(origin.host, connection.tls)
        connection.idle_since = now
        self._idle.setdefault(origin, []).append(connection)
        if self._waiting:
            self._wake()
        if self._sweep_timer is None:
            self._sweep_timer = self._loop.call_later(self._max_idle, self._sweep)

    def _on_lost(self, connection: ClientConnection) -> None:
        origin = self._open.pop(connection, None)
        idle = self._idle.get(origin) if origin is not None else None
        if idle is not None and connection in idle:
            idle.remove(connection)
        self._wake()

    def _sweep(self) -> None:
        """Close connections that have been idle for `pool.idle`."""
        self._sweep_timer = None
        now = self._loop.time()
        for idle in self._idle.values():
            while idle and now - idle[0].idle_since >= self._max_idle:
                idle[0].abort()  # which removes it: `_on_lost`
        oldest = min((idle[0].idle_since for idle in self._idle.values() if idle), default=None)
        if oldest is not None:
            self._sweep_timer = self._loop.call_at(oldest + self._max_idle, self._sweep)


def amazon_pool(config: Config, limit: int, tls: ResumingContext | None = None) -> ConnectionPool:
    """Return the pool for calls to Amazon; `tls` as in ConnectionPool."""
    return ConnectionPool(config, limit, tls=tls)


def lwa_pool(config: Config, tls: ResumingContext | None = None) -> ConnectionPool:
    """Return the pool for token requests, apart from Amazon's so that neither waits for the other."""
    return ConnectionPool(config, LWA_CONNECTIONS, {"User-Agent": f"sp-api-proxy/{__version__}"}, tls)


def request_head(method: str, path: str, fields: list[tuple[str, str]]) -> bytes:
    """Return a request's head; raise ValueError for a line break in it, which would be request smuggling."""
    if "\n" in path or "\r" in path:
        raise ValueError("a line break in a request's target")
    return f"{method} {path} HTTP/1.1\r\n".encode() + field_lines(fields) + b"\r\n"


def field_lines(fields: list[tuple[str, str]]) -> bytes:
    """Return the lines of these fields, each with its CRLF.

    Raises ValueError for a line break in one: it would start another field or another request (RFC 9110 section 5.5).
    Everything else was validated before.
    """
    lines = list(map(": ".join, fields))
    joined = "".join(lines)
    if "\n" in joined or "\r" in joined:
        raise ValueError("a line break in a request's head")
    return "\r\n".join([*lines, ""]).encode()
