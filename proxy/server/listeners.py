"""What is listened on now: opened at the start, handed from one configuration to the next, closed in the end?"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field

from aiohttp import web

from proxy.config import Address, Config, Listener
from proxy.observability.logging import LOGGER, fields
from proxy.observability.metrics import Metrics
from proxy.request.handler import Handler
from proxy.server.http_protocol import Listening, Room
from proxy.server.sockets import CannotListen, ServerTls, listen

DRAIN_INTERVAL = 0.02  # seconds between two looks at what is still in flight
LAST_MOMENT = 0.2  # seconds in which what was cut off may notice it
STATUS_CONNECTIONS = 256  # of the admin listener, and of the health listener


@dataclass(slots=True)
class Ending:
    """How the end goes: whether nothing is waited for any more, and how many connections were cut off.

    That happens to those whose requests take longer than `timeouts.shutdown`, or than until `at_once` is set.
    """

    cut_off: int = 0
    at_once: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True, eq=False)
class Port:
    """One proxied port: the address that was asked for, the one it turned out to be, and what serves it."""

    wanted: Address
    address: str
    listening: asyncio.AbstractServer
    server: Listening
    tls: ServerTls | None


def fixed_when_open(listener: Listener, before: Listener) -> list[str]:
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


class Ports:
    """The proxied ports, and how they end; `current` returns the configuration in force."""

    def __init__(self, metrics: Metrics, room: Room, current: Callable[[], Config]) -> None:
        self._metrics = metrics
        self._room = room
        self._current = current
        self._open: list[Port] = []
        self._leaving: dict[Port, asyncio.Task[None]] = {}
        self.ending = Ending()

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where requests come in, in the configuration's order."""
        return tuple(port.address for port in self._open)

    def look_at_certificates(self) -> None:
        """Take up the files of certificates as they are now."""
        for port in self._open:
            if port.tls is not None:
                port.tls.look()

    async def prepare(self, handlers: list[Handler], config: Config) -> list[Port]:
        """Return a port for each handler: the one that is open, or a new one, which serves at once.

        Raises CannotListen, and leaves everything as it was.
        """
        free, found, opened = list(self._open), list[Port](), list[Port]()
        try:
            for handler in handlers:
                port = next((one for one in free if one.wanted == handler.listener.address), None)
                if port is None:
                    port = await self._start(handler, config)
                    opened.append(port)
                else:
                    free.remove(port)
                found.append(port)
        except BaseException:
            await asyncio.gather(*(_end(port.listening, port.server) for port in opened))
            raise
        return found

    def take_up(self, ports: list[Port], handlers: list[Handler], config: Config) -> None:
        """Serve by these handlers from now on; ports that are not among these finish what they have, and end.

        No request lasts longer than `timeouts.total`; where the process ends before that, they end with it.
        """
        gone = [port for port in self._open if port not in ports]
        self._open = ports
        for port, handler in zip(ports, handlers, strict=True):
            port.server.take_up(handler.handle, handler.name, config)
            if port.tls is not None and handler.listener.tls is not None:
                port.tls.take_up(handler.listener.tls)
        for port in gone:
            port.listening.close()
            port.server.close_idle()
            task = asyncio.create_task(self._leave(port, config.timeouts.total), name=f"leave {port.address}")
            self._leaving[port] = task

    async def _leave(self, port: Port, patience: float) -> None:
        await _drained(port.server.busy, patience, self.ending.at_once)
        if cut_off := port.server.busy():
            LOGGER.warning(
                "requests in flight were cut off: their listener is no more",
                extra=fields(address=port.address, connections=cut_off),
            )
        await _end(port.listening, port.server)
        del self._leaving[port]

    async def _start(self, handler: Handler, config: Config) -> Port:
        listener = handler.listener
        tls = ServerTls(listener.tls) if listener.tls else None
        server = Listening(handler.handle, config, self._metrics, room=self._room, name=handler.name)
        listening, turned_out = await listen(server, listener.address, handler.name, listener=listener, tls=tls)
        if not listener.address.is_local:
            protected = "TLS" if tls is not None else "nothing"
            LOGGER.warning(
                "other machines reach this listener", extra=fields(address=turned_out, protected_by=protected)
            )
        return Port(listener.address, turned_out, listening, server, tls)

    async def stop(self, break_off: Callable[[], None]) -> None:
        """Take no more, let requests in flight finish within `timeouts.shutdown`, cut the rest off.

        `break_off` ends their waits, so that who has no answer yet gets one that says why.
        """
        for port in self._open:
            port.listening.close()
            port.server.close_idle()
        await _drained(self._busy, self._current().timeouts.shutdown, self.ending.at_once)
        self.ending.cut_off = self._busy()
        if self.ending.cut_off:
            break_off()
            LOGGER.warning("requests in flight were cut off", extra=fields(connections=self.ending.cut_off))
        ports, leaving = list(self._all()), list(self._leaving.values())
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        await asyncio.gather(*(_end(port.listening, port.server) for port in ports))

    def _all(self) -> Iterator[Port]:
        yield from self._open
        yield from list(self._leaving)

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
        server = Listening(
            plain.request_handler,
            config,
            metrics,
            room=Room(STATUS_CONNECTIONS, metrics),
            name=setting,
            request_factory=plain.request_factory,
        )
        listening, turned_out = await listen(server, address, setting)
        stack.push_async_callback(_end, listening, server)
        del config  # its secrets are not to be kept for as long as this listens
        yield turned_out


async def _drained(busy: Callable[[], int], patience: float, at_once: asyncio.Event) -> None:
    """Return when nothing is in flight any more, `patience` seconds are over, or nobody is to wait any more."""
    with suppress(TimeoutError):
        async with asyncio.timeout(patience):
            while busy() and not at_once.is_set():  # noqa: ASYNC110 - connections come and go in a library that tells nobody
                await asyncio.sleep(DRAIN_INTERVAL)


async def _end(listening: asyncio.AbstractServer, server: Listening) -> None:
    listening.close()
    server.pre_shutdown()
    await server.shutdown(LAST_MOMENT)
