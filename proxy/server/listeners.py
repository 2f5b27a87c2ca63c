"""What is listened on now: opened at the start, handed from one configuration to the next, closed in the end?"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field

from aiohttp import web

from proxy.config import Address, Config, Listener
from proxy.observability.logging import LOGGER, extra
from proxy.observability.metrics import Metrics
from proxy.request.handler import Handler
from proxy.server.http_protocol import ConnectionLimiter, HttpServer
from proxy.server.sockets import CannotListen, ServerTls, listen

DRAIN_INTERVAL = 0.02  # seconds between two looks at what is still in flight
ABORT_GRACE = 0.2  # seconds in which what was cut off may notice it
STATUS_CONNECTIONS = 256  # of the admin listener, and of the health listener


@dataclass(slots=True)
class ShutdownState:
    """How the end goes: whether nothing is waited for any more, and how many connections were cut off.

    That happens to those whose requests take longer than `timeouts.shutdown`, or than until `at_once` is set.
    """

    aborted: int = 0
    immediate: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True, eq=False)
class OpenListener:
    """One proxied port: the address that was asked for, the one it turned out to be, and what serves it."""

    settings: Address
    address: str
    listening: asyncio.AbstractServer
    server: HttpServer
    tls: ServerTls | None


def restart_only_changes(listener: Listener, before: Listener) -> list[str]:
    """Return the keys in which a listener differs from the one that is open, and in which a port cannot change.

    A port speaks TLS or not, and asks for client certificates or not, from its beginning; so it is with the rights of
    a socket file.
    """
    kept = [key for key in ("mode", "owner", "group") if getattr(listener, key) != getattr(before, key)]
    old, new = before.tls, listener.tls
    speaks_otherwise = (old is None) is not (new is None)
    asks_otherwise = old is not None and new is not None and (old.client_ca is None) is not (new.client_ca is None)
    if speaks_otherwise or asks_otherwise:
        kept.append("tls")
    return kept


class ListenerSet:
    """The proxied ports, and how they end; `current` returns the configuration in force."""

    def __init__(self, metrics: Metrics, limiter: ConnectionLimiter, current: Callable[[], Config]) -> None:
        self._metrics = metrics
        self._limiter = limiter
        self._current = current
        self._open: list[OpenListener] = []
        self._draining: dict[OpenListener, asyncio.Task[None]] = {}
        self.shutdown = ShutdownState()

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where requests come in, in the configuration's order."""
        return tuple(port.address for port in self._open)

    def reload_certificates(self) -> None:
        """Take up the files of certificates as they are now."""
        for port in self._open:
            if port.tls is not None:
                port.tls.reload_if_changed()

    async def prepare(self, handlers: list[Handler], config: Config) -> list[OpenListener]:
        """Return a port for each handler: the one that is open, or a new one, which serves at once.

        Raises CannotListen, and leaves everything as it was.
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
        """Serve by these handlers from now on; ports that are not among these finish what they have, and end.

        No request lasts longer than `timeouts.total`; where the process ends before that, they end with it.
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
            task = asyncio.create_task(self._drain(port, config.timeouts.total), name=f"leave {port.address}")
            self._draining[port] = task

    async def _drain(self, port: OpenListener, drain_timeout: float) -> None:
        await _drained(port.server.busy, drain_timeout, self.shutdown.immediate)
        if cut_off := port.server.busy():
            LOGGER.warning(
                "requests in flight were cut off: their listener is no more",
                extra=extra(address=port.address, connections=cut_off),
            )
        await _abort(port.listening, port.server)
        del self._draining[port]

    async def _start(self, handler: Handler, config: Config) -> OpenListener:
        listener = handler.listener
        tls = ServerTls(listener.tls) if listener.tls else None
        server = HttpServer(handler.handle, config, self._metrics, limiter=self._limiter, name=handler.name)
        listening, turned_out = await listen(server, listener.address, handler.name, listener=listener, tls=tls)
        if not listener.address.is_local:
            protected = "TLS" if tls is not None else "nothing"
            LOGGER.warning(
                "other machines reach this listener", extra=extra(address=turned_out, protected_by=protected)
            )
        return OpenListener(listener.address, turned_out, listening, server, tls)

    async def stop(self, break_off: Callable[[], None]) -> None:
        """Take no more, let requests in flight finish within `timeouts.shutdown`, cut the rest off.

        `break_off` ends their waits, so that who has no answer yet gets one that says why.
        """
        for port in self._open:
            port.listening.close()
            port.server.close_idle()
        await _drained(self._busy, self._current().timeouts.shutdown, self.shutdown.immediate)
        self.shutdown.aborted = self._busy()
        if self.shutdown.aborted:
            break_off()
            LOGGER.warning("requests in flight were cut off", extra=extra(connections=self.shutdown.aborted))
        ports, leaving = list(self._all()), list(self._draining.values())
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
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
    """Serve the admin or health application, and yield the address as it turned out; raise CannotListen."""
    async with AsyncExitStack() as stack:
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        plain = runner.server
        if plain is None:
            raise CannotListen(f"{setting} did not start")
        # With the bounds and timers of the proxied port, and places of its own: apps cannot shut probes out.
        server = HttpServer(
            plain.request_handler,
            config,
            metrics,
            limiter=ConnectionLimiter(STATUS_CONNECTIONS, metrics),
            name=setting,
            request_factory=plain.request_factory,
        )
        listening, turned_out = await listen(server, address, setting)
        stack.push_async_callback(_abort, listening, server)
        del config  # its secrets are not to be kept for as long as this listens
        yield turned_out


async def _drained(busy: Callable[[], int], drain_timeout: float, immediate: asyncio.Event) -> None:
    """Return when no request is in flight, after `drain_timeout` seconds, or when `immediate` is set."""
    with suppress(TimeoutError):
        async with asyncio.timeout(drain_timeout):
            while busy() and not immediate.is_set():  # noqa: ASYNC110 - connections come and go in a library that tells nobody
                await asyncio.sleep(DRAIN_INTERVAL)


async def _abort(listening: asyncio.AbstractServer, server: HttpServer) -> None:
    listening.close()
    server.pre_shutdown()
    await server.shutdown(ABORT_GRACE)
