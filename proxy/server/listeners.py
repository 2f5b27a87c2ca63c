"""Open listeners: started, kept or replaced by a reload, drained at the end."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field

from aiohttp import web

from proxy.config import Address, Config, Listener
from proxy.observability.logging import LOGGER, extra
from proxy.observability.metrics import Metrics
from proxy.request.handler import Handler
from proxy.server.connection_limiter import ConnectionLimiter
from proxy.server.http_server import HttpServer
from proxy.server.self_check import SelfCheckFailed, check_listener
from proxy.server.sockets import CannotListen, listen
from proxy.server.tls import ServerTls

DRAIN_INTERVAL = 0.02  # seconds between two checks for requests in flight
ABORT_GRACE = 0.2  # seconds for handlers of aborted requests to end
STATUS_CONNECTIONS = 256  # client connections of the admin listener, and as many of the health listener


@dataclass(slots=True)
class ShutdownState:
    """State of the shutdown. `immediate` ends the wait for requests in flight.

    `aborted` is how many connections were cut off, because their requests took longer than that wait or
    `timeouts.shutdown`.
    """

    aborted: int = 0
    immediate: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True, eq=False)
class OpenListener:
    """One listener for apps: its configured address, its actual one, and its server."""

    settings: Address
    address: str
    listening: asyncio.AbstractServer
    server: HttpServer
    tls: ServerTls | None


def restart_only_changes(listener: Listener, before: Listener) -> list[str]:
    """Return the keys in which a listener differs from the open one and which an open listener cannot change.

    asyncio takes the TLS context when it begins to listen, so TLS and the request for client certificates cannot be
    switched on or off; neither can the permissions of a socket file.
    """
    kept = [key for key in ("mode", "owner", "group") if getattr(listener, key) != getattr(before, key)]
    old, new = before.tls, listener.tls
    switches_tls = (old is None) is not (new is None)
    switches_client_ca = old is not None and new is not None and (old.client_ca is None) is not (new.client_ca is None)
    if switches_tls or switches_client_ca:
        kept.append("tls")
    return kept


class ListenerSet:
    """The listeners for apps; `current` returns the configuration in force."""

    def __init__(self, metrics: Metrics, limiter: ConnectionLimiter, current: Callable[[], Config]) -> None:
        self._metrics = metrics
        self._limiter = limiter
        self._current = current
        self._open: list[OpenListener] = []
        self._draining: dict[OpenListener, asyncio.Task[None]] = {}
        self.shutdown = ShutdownState()

    @property
    def addresses(self) -> tuple[str, ...]:
        """The actual addresses, in the order of the configuration."""
        return tuple(port.address for port in self._open)

    def reload_certificates(self) -> None:
        """Read certificates whose files have changed."""
        for port in self._open:
            if port.tls is not None:
                port.tls.reload_if_changed()

    async def prepare(self, handlers: list[Handler], config: Config) -> list[OpenListener]:
        """Return a listener for each handler: the open one, or a new one, which serves at once.

        Raises CannotListen, and then changes nothing.
        """
        free, found, opened = list(self._open), list[OpenListener](), list[OpenListener]()
        try:
            for handler in handlers:
                port = next((one for one in free if one.settings == handler.listener.address), None)
                if port is None:
                    port = await self._start(handler, config)
                    opened.append(port)
                else:
                    free.remove(port)
                found.append(port)
        except BaseException:
            await asyncio.gather(*(_abort(port.listening, port.server) for port in opened))
            raise
        return found

    def activate(self, ports: list[OpenListener], handlers: list[Handler], config: Config) -> None:
        """Serve by these handlers from now on; listeners that are not among these finish their requests and close.

        That takes `timeouts.total` at most, since no request lasts longer.
        """
        gone = [port for port in self._open if port not in ports]
        self._open = ports
        for port, handler in zip(ports, handlers, strict=True):
            port.server.activate(handler.handle, handler.name, config)
            if port.tls is not None and handler.listener.tls is not None:
                port.tls.activate(handler.listener.tls)
        for port in gone:
            port.listening.close()
            port.server.close_idle()
            task = asyncio.create_task(self._drain(port, config.timeouts.total), name=f"drain {port.address}")
            self._draining[port] = task

    async def _drain(self, port: OpenListener, drain_timeout: float) -> None:
        await _drained(port.server.busy, drain_timeout, self.shutdown.immediate)
        if cut_off := port.server.busy():
            LOGGER.warning(
                "aborted in-flight requests of a removed listener",
                extra=extra(address=port.address, connections=cut_off),
            )
        await _abort(port.listening, port.server)
        del self._draining[port]

    async def _start(self, handler: Handler, config: Config) -> OpenListener:
        listener = handler.listener
        tls = ServerTls(listener.tls) if listener.tls else None
        server = HttpServer(handler.handle, config, self._metrics, limiter=self._limiter, name=handler.name)
        context = tls.context if tls is not None else None
        listening, actual = await listen(server, listener.address, handler.name, listener=listener, context=context)
        await _check(server, listening, handler.name, actual)
        if not listener.address.is_local:
            protected = "TLS" if tls is not None else "nothing"
            LOGGER.warning(
                "this listener can be reached from other machines", extra=extra(address=actual, protected_by=protected)
            )
        return OpenListener(listener.address, actual, listening, server, tls)

    async def stop(self, abort_requests: Callable[[], None]) -> None:
        """Close the listeners, let requests in flight finish within `timeouts.shutdown`, abort the rest.

        `abort_requests` ends the waits of these, so that clients without a response yet get an error that says why.
        """
        for port in self._open:
            port.listening.close()
            port.server.close_idle()
        await _drained(self._busy, self._current().timeouts.shutdown, self.shutdown.immediate)
        self.shutdown.aborted = self._busy()
        if self.shutdown.aborted:
            abort_requests()
            LOGGER.warning("aborted in-flight requests", extra=extra(connections=self.shutdown.aborted))
        ports, draining = list(self._all()), list(self._draining.values())
        for task in draining:
            task.cancel()
        await asyncio.gather(*draining, return_exceptions=True)
        await asyncio.gather(*(_abort(port.listening, port.server) for port in ports))

    def _all(self) -> Iterator[OpenListener]:
        yield from self._open
        yield from list(self._draining)

    def _busy(self) -> int:
        return sum(port.server.busy() for port in self._all())


@asynccontextmanager
async def status_port(
    app: web.Application, address: Address, setting: str, config: Config, metrics: Metrics
) -> AsyncIterator[str]:
    """Serve the admin or health application, and yield its actual address; raise CannotListen."""
    async with AsyncExitStack() as stack:
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        plain = runner.server
        if plain is None:
            raise CannotListen(f"{setting} did not start")
        # The limits and timers of a listener for apps, but a connection limit of its own: apps cannot lock probes out.
        server = HttpServer(
            plain.request_handler,
            config,
            metrics,
            limiter=ConnectionLimiter(STATUS_CONNECTIONS, metrics),
            name=setting,
            request_factory=plain.request_factory,
        )
        listening, actual = await listen(server, address, setting)
        await _check(server, listening, setting, actual)
        stack.push_async_callback(_abort, listening, server)
        del config  # drop its secrets: this frame lives as long as the listener
        yield actual


async def _check(server: HttpServer, listening: asyncio.AbstractServer, setting: str, address: str) -> None:
    """Raise CannotListen, and close the listener, unless it responds to a request of the proxy's own."""
    try:
        await check_listener(server)
    except SelfCheckFailed as exc:
        fields = extra(listener=setting, address=address, reason=str(exc))
        LOGGER.error("a listener failed its self-check", extra=fields)
        await _abort(listening, server)
        raise CannotListen(
            f"{setting} listens on {address} but does not respond to requests: {exc}; reinstall the proxy with the "
            "versions of its dependencies that it was tested with"
        ) from exc


async def _drained(busy: Callable[[], int], drain_timeout: float, immediate: asyncio.Event) -> None:
    """Wait until no request is in flight, `drain_timeout` seconds have passed, or `immediate` is set."""
    with suppress(TimeoutError):
        async with asyncio.timeout(drain_timeout):
            while busy() and not immediate.is_set():  # noqa: ASYNC110 - aiohttp has no event for the end of a connection
                await asyncio.sleep(DRAIN_INTERVAL)


async def _abort(listening: asyncio.AbstractServer, server: HttpServer) -> None:
    listening.close()
    server.pre_shutdown()
    await server.shutdown(ABORT_GRACE)
