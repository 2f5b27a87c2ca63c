"""Server of one listener: settings, the protocol of each connection, and how its connections end."""

from typing import Any

from aiohttp import web

from proxy.config import Config
from proxy.observability.metrics import Metrics
from proxy.request.aiohttp_internals import (
    Handle,
    Protocol,
    ProtocolServer,
    RawRequestMessage,
    RequestFactory,
)
from proxy.server.connection_limiter import ConnectionLimiter
from proxy.server.framing import MAX_LINE
from proxy.server.http_protocol import (
    LINGERING_TIMEOUT,
    ConnectionSettings,
    ProxyConnection,
    ServerConnection,
    annotate_request,
)

MAX_FIELD = 32 * 1024 + 512  # bytes


class HttpServer(ProtocolServer):
    """The server of one listener; makes the protocol of each connection.

    `name` is the listener's in metrics. With a `request_factory` it serves an aiohttp application (admin, health).
    """

    def __init__(
        self,
        handle: Handle,
        config: Config,
        metrics: Metrics,
        *,
        limiter: ConnectionLimiter,
        name: str,
        request_factory: RequestFactory | None = None,
    ) -> None:
        super().__init__(
            handle,
            handler_cancellation=True,  # a client that leaves ends the call to Amazon
            access_log=None,
            keepalive_timeout=config.timeouts.keep_alive,
            max_line_size=MAX_LINE,
            max_field_size=MAX_FIELD,
            max_headers=config.bounds.header_fields,
            lingering_time=LINGERING_TIMEOUT,
            auto_decompress=False,  # bodies are passed on as they are
        )
        self.request_factory = self.annotate
        self._new_request = request_factory or web.BaseRequest  # not called without one: see ProxyConnection
        self._serves_application = request_factory is not None
        self._options = ConnectionSettings.of(config, metrics)
        self._limiter = limiter
        self._name = name

    def activate(self, handle: Handle, name: str, config: Config) -> None:
        """Serve every request that begins from now on by `handle`; new connections get the settings of `config`."""
        self.request_handler = handle
        self._name = name
        self._options = ConnectionSettings.of(config, self._options.metrics)
        self.change_settings(keepalive_timeout=config.timeouts.keep_alive, max_headers=config.bounds.header_fields)

    async def shutdown(self, timeout: float | None = None) -> None:  # noqa: ASYNC109 - aiohttp's signature
        """End all connections and drop the handler: it holds a configuration, and this object is part of a cycle."""
        await super().shutdown(timeout)
        self.request_handler = reject_all

    @property
    def header_timeout(self) -> float:
        """How long a client may take for a request's head, in seconds."""
        return self._options.header_timeout

    def busy(self) -> int:
        """Return how many connections have a request in flight."""
        return sum(connection.is_busy for connection in self._server_connections())

    def close_idle(self) -> None:
        """End idle connections at once, and busy ones with their response."""
        for connection in self._server_connections():
            connection.drain()

    def _server_connections(self) -> list[ServerConnection]:
        return [connection for connection in self.connections if isinstance(connection, ServerConnection)]

    def __call__(self) -> ServerConnection:
        """Return the protocol for a new connection."""
        kind = ServerConnection if self._serves_application else ProxyConnection
        return self.new_connection(kind, options=self._options, limiter=self._limiter, listener=self._name)

    def self_check_connection(self, handle: Handle) -> ServerConnection:
        """Return the protocol for a connection of the proxy's own, whose requests `handle` serves."""
        connection = self()
        connection.is_self_check = True
        connection.serve_by(handle)
        return connection

    def annotate(self, message: RawRequestMessage, payload: Any, protocol: Protocol, *parts: Any) -> web.BaseRequest:
        """Return an application's request, with what its connection says of it."""
        request = self._new_request(message, payload, protocol, *parts)
        if isinstance(protocol, ServerConnection):
            annotate_request(request, message, protocol)
        return request


async def reject_all(_: web.BaseRequest) -> web.StreamResponse:
    """Serve nothing."""
    raise ConnectionError("the listener is closed")
