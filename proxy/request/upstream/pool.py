"""Which connection does a request take: an idle one, a new one, or the next that comes free?

The one used last comes first, so that those which a quiet hour leaves over grow old and are closed, before the server
does it. How many there may be is bounded, over all hosts; who waits for one waits in turn.
"""

import asyncio
from collections import deque
from collections.abc import Mapping
from typing import Self
from urllib.parse import urlsplit

from proxy.config import Config
from proxy.request.upstream.connector import Connector, Origin, ResumingContext, tls_context
from proxy.request.upstream.http1 import ClientConnection, Response

MAX_AGE = 3600.0  # seconds of a connection, so that an address a host had once is not used for ever


class ConnectionPool:
    """Connections by origin, `limit` of them at most; use it as an asynchronous context manager.

    `headers` go with every `post`. `tls` is that of a pool before this one, where it is to trust the same: the system's
    certificates take a tenth of a second to read.
    """

    def __init__(
        self, config: Config, limit: int, headers: Mapping[str, str] | None = None, tls: ResumingContext | None = None
    ) -> None:
        self.tls = tls or tls_context(config)
        self._connector = Connector(config, self.tls)
        self.limit = limit
        self._headers = dict(headers or {})
        self._idle = config.pool.idle
        self._connect = config.timeouts.connect
        self._free: dict[Origin, list[ClientConnection]] = {}  # the one used last is the last
        self._open: dict[ClientConnection, Origin] = {}
        self._connecting = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._sweeping: asyncio.TimerHandle | None = None
        self._is_closed = False

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._is_closed = True
        if self._sweeping is not None:
            self._sweeping.cancel()
        for connection in list(self._open):
            connection.abort()
        await asyncio.sleep(0)  # in which the transports end

    def drain(self) -> None:
        """Keep no connection any more: those in use end with their request. Requests that go on may still take some."""
        self._is_closed = True
        for free in self._free.values():
            while free:
                free.pop().abort()

    @property
    def is_in_use(self) -> bool:
        """Whether there is any connection."""
        return bool(self._open or self._connecting)

    def pop_idle(self, origin: Origin) -> ClientConnection | None:
        """Return an idle connection, None where there is none."""
        free = self._free.get(origin)
        while free:
            connection = free.pop()
            if connection.is_usable():
                return connection
            connection.abort()
        return None

    async def acquire(self, origin: Origin, *, fresh: bool = False) -> ClientConnection:
        """Return a connection: an idle one, or a new one; where there are too many, the next that comes free.

        `fresh` takes no idle one. Raises TimeoutError after `timeouts.connect`, and OSError for what goes wrong on the
        way, of which `ssl.SSLError` is one.
        """
        connection = None if fresh else self.pop_idle(origin)
        if connection is not None:
            return connection
        async with asyncio.timeout(self._connect):
            while len(self._open) + self._connecting >= self.limit and not self._close_one_idle():
                await self._wait_for_connection()
                connection = None if fresh else self.pop_idle(origin)
                if connection is not None:
                    return connection
            return await self._connect_new(origin)

    async def post(self, url: str, headers: Mapping[str, str], body: bytes, most: int) -> tuple[int, bytes]:
        """Send one request on a connection of its own; return the answer's status and up to `most` + 1 bytes of it.

        No redirect is followed: it would carry the secrets to another address. Raises as `take`, and Broken.
        """
        response, read = await self.request("POST", url, {"Content-Length": str(len(body)), **headers}, body, most)
        return response.status, read

    async def request(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes, most: int
    ) -> tuple[Response, bytes]:
        """Do what `post` does with any method; return the answer, for its head, and up to `most` + 1 bytes of it."""
        origin = Origin.of(url)
        connection = await self.acquire(origin, fresh=True)
        parts = urlsplit(url)
        path = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
        own = {"Host": origin.authority, "Connection": "close", **self._headers}
        response = connection.send(method, request_head(method, path, [*own.items(), *headers.items()]) + body)
        try:
            await response.head()
            read = b""
            while len(read) <= most and (chunk := await response.read()):
                read += chunk
        finally:
            response.close()
        return response, read[: most + 1]

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
            raise ConnectionResetError("the connection ended at once")
        connection.made_at = self._loop.time()
        self._open[connection] = origin
        return connection

    def _close_one_idle(self) -> bool:
        """Close an idle connection, which is to another host, or was not wanted; return whether there was one."""
        for free in self._free.values():
            if free:
                free.pop(0).abort()
                return True
        return False

    async def _wait_for_connection(self) -> None:
        """Wait until a connection comes free, or ends."""
        turn: asyncio.Future[None] = self._loop.create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._wake()  # it came in the very moment, and is somebody else's now
            raise

    def _wake(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return

    def _on_idle(self, connection: ClientConnection) -> None:
        origin = self._open.get(connection)
        now = self._loop.time()
        if origin is None or self._is_closed or now - connection.made_at > MAX_AGE:
            connection.abort()
            return
        if connection.served == 1 and origin.is_tls:
            self.tls.remember(origin.host, connection.tls)
        connection.idle_since = now
        self._free.setdefault(origin, []).append(connection)
        if self._waiting:
            self._wake()
        if self._sweeping is None:
            self._sweeping = self._loop.call_later(self._idle, self._sweep)

    def _on_lost(self, connection: ClientConnection) -> None:
        origin = self._open.pop(connection, None)
        free = self._free.get(origin) if origin is not None else None
        if free is not None and connection in free:
            free.remove(connection)
        self._wake()

    def _sweep(self) -> None:
        """Close what has been idle too long."""
        self._sweeping = None
        now = self._loop.time()
        for free in self._free.values():
            while free and now - free[0].idle_since >= self._idle:
                free[0].abort()
        oldest = min((free[0].idle_since for free in self._free.values() if free), default=None)
        if oldest is not None:
            self._sweeping = self._loop.call_at(oldest + self._idle, self._sweep)


def request_head(method: str, path: str, fields: list[tuple[str, str]]) -> bytes:
    """Return a request's head; raise ValueError for a line break in it, which would be another request."""
    if "\n" in path or "\r" in path:
        raise ValueError("a line break in a request's target")
    return f"{method} {path} HTTP/1.1\r\n".encode() + field_lines(fields) + b"\r\n"


def field_lines(fields: list[tuple[str, str]]) -> bytes:
    """Return the lines of these fields, each with its end. They were judged before, but for a line break in one.

    Raises ValueError for that: it would be another field, or another request.
    """
    lines = list(map(": ".join, fields))
    together = "".join(lines)
    if "\n" in together or "\r" in together:
        raise ValueError("a line break in a request's head")
    return "\r\n".join([*lines, ""]).encode()
