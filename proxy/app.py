"""How are the parts built from a Config, started in order and stopped in reverse?"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from aiohttp import web

from proxy import __version__
from proxy.amazon import rdt
from proxy.amazon.headers import user_agent
from proxy.amazon.operations import load_table
from proxy.config import Address, Config
from proxy.listener import Listening, Room
from proxy.logs import LOGGER, LOST, fields
from proxy.metrics import Metrics
from proxy.request.callers import Callers
from proxy.request.circuit import Circuits
from proxy.request.crowd import Crowd
from proxy.request.documents import Documents
from proxy.request.forbidden import Experience
from proxy.request.grants import Grants
from proxy.request.guard import Doorway
from proxy.request.handler import Handler
from proxy.request.heads import KnownHeads
from proxy.request.identify import Decisions
from proxy.request.limits import Limits
from proxy.request.patience import Deadlines
from proxy.request.policy import permits
from proxy.request.pool import Pool
from proxy.request.retries import AllAttempts
from proxy.request.tokens import Tokens
from proxy.request.upstream import Upstream, open_session
from proxy.sockets import LOOK_AGAIN, CannotListen, ServerTls, descriptors, listen, share_descriptors
from proxy.status import Readiness, admin_app, health_app
from proxy.store import MemoryStore, Store

SECRET_LIFE = 180 * 86400.0  # seconds (DOC "Rotate your Application's LWA Credentials")
DRAIN_INTERVAL = 0.02  # seconds between two looks at what is still in flight
STATUS_CONNECTIONS = 256  # of the admin listener, and of the health listener
LWA_CONNECTIONS = 32
LAG_INTERVAL = 0.5  # seconds
LAST_MOMENT = 0.2  # seconds in which what was cut off may notice it


@dataclass(slots=True)
class Ending:
    """How the end went: how many connections were cut because their requests took longer than `timeouts.shutdown`."""

    cut_off: int = 0


@dataclass(frozen=True, slots=True)
class Running:
    """A proxy that serves: the addresses it really listens on, and its parts."""

    addresses: tuple[str, ...]
    admin: str | None
    health: str | None
    readiness: Readiness
    metrics: Metrics
    tokens: Tokens
    limits: Limits
    ending: Ending


@asynccontextmanager
async def running(config: Config) -> AsyncIterator[Running]:
    """Start a proxy and yield it; stop it in reverse order, requests in flight first finished.

    Raises CannotListen.
    """
    async with AsyncExitStack() as stack:
        metrics = Metrics(account_on_histograms=config.metrics.account_on_histograms)
        readiness = Readiness()
        agents = user_agents(config)
        store, limits = await _own_or_shared(config, metrics, stack)
        most_clients, most_upstream = share_descriptors(config.bounds, config.pool.max_connections, descriptors())
        if (most_clients, most_upstream) != (config.bounds.connections, config.pool.max_connections):
            LOGGER.warning(
                "fewer connections than the settings allow: this process may open too few files",
                extra=fields(files=descriptors(), from_clients=most_clients, to_amazon=most_upstream),
            )
        session = await stack.enter_async_context(open_session(config, most_upstream))
        lwa_session = await stack.enter_async_context(open_lwa_session(config))
        table = load_table()
        grants = Grants(
            config,
            lwa_session=lwa_session,
            amazon_session=session,
            user_agents=agents,
            limits=limits,
            mint=table.match("POST", rdt.PATH),
            metrics=metrics,
        )
        documents = Documents()
        tokens = Tokens(config, grants=grants, documents=documents, store=store, metrics=metrics)
        stack.push_async_callback(tokens.close)
        show_secrets_age(config, metrics, time.time)
        upstream = Upstream(session=session, user_agents=agents)
        attempts, circuits = AllAttempts(config, metrics), Circuits(metrics, time.monotonic)
        who = (Callers(config), Crowd(config.bounds, metrics))
        parts = (
            limits,
            tokens,
            upstream,
            attempts,
            circuits,
            documents,
            Experience(table),
            Deadlines(config, asyncio.get_running_loop()),
            metrics,
        )
        ports = _Ports(config, metrics, Room(most_clients, metrics))
        admin = health = None
        if config.admin is not None:
            app = admin_app(readiness, metrics, config, config.admin)
            admin = await ports.start_status(stack, app, config.admin, "admin")
        if config.health is not None:
            app = health_app(readiness, metrics, config)
            health = await ports.start_status(stack, app, config.health, "health")
        stack.push_async_callback(ports.stop)
        addresses = []
        certificates = [ServerTls(listener.tls) if listener.tls else None for listener in config.listen]
        for index, tls in enumerate(certificates):
            handler = handler_of(config, index, *who, Decisions(config.listen[index], config, table), parts)
            addresses.append(await ports.start(handler, tls))
        metrics.before_export.append(_export_lost_lines(metrics))
        lag = asyncio.create_task(_Lag(metrics).watch(), name="event loop lag")
        stack.callback(lag.cancel)
        watching = asyncio.create_task(_look_at_certificates([tls for tls in certificates if tls]), name="certificates")
        stack.callback(watching.cancel)
        stack.callback(_stopping, readiness)
        warming = asyncio.create_task(_become_ready(config, readiness, tokens), name="become ready")
        stack.callback(warming.cancel)
        if not config.warm_up:
            await warming
        yield Running(tuple(addresses), admin, health, readiness, metrics, tokens, limits, ports.ending)


async def _own_or_shared(config: Config, metrics: Metrics, stack: AsyncExitStack) -> tuple[Store, Limits]:
    """Return where tokens and usage plans are kept; `stack` closes it."""
    if config.store.is_shared:
        from proxy.replicas import joined  # noqa: PLC0415 - who keeps all in memory pays nothing for Redis and seals

        return await joined(config, metrics, stack)
    store = MemoryStore()
    stack.push_async_callback(store.close)
    return store, Limits(metrics, pace=config.limits.pace, max_queue=config.limits.max_queue)


def handler_of(
    config: Config, index: int, callers: Callers, crowd: Crowd, decisions: Decisions, parts: tuple[Any, ...]
) -> Handler:
    """Return what serves the requests of the listener with this index."""
    listener = config.listen[index]
    doorway = Doorway.of(listener, config)
    return Handler(
        config,
        listener,
        f"listen[{index}]",
        doorway,
        KnownHeads(),
        callers,
        permits(config, index),
        crowd,
        decisions,
        *parts,
    )


def show_secrets_age(config: Config, metrics: Metrics, wall: Callable[[], float]) -> None:
    """Export how old each client secret is: Amazon refuses all calls when it is past its 180 days."""
    for name, application in config.applications.items():
        if application.rotated_at is not None:
            made = datetime.combine(application.rotated_at, datetime.min.time(), UTC).timestamp()
            metrics.secret_age.labels(name).set_function(partial(_since, made, wall))
            metrics.secret_expiry.labels(name).set(made + SECRET_LIFE)


def _since(moment: float, wall: Callable[[], float]) -> float:
    return wall() - moment


def user_agents(config: Config) -> dict[str, str]:
    """Return the `user-agent` of each application, built once."""
    return {
        name: user_agent(
            application.user_agent.name,
            application.user_agent.version,
            application.user_agent.language,
            application.user_agent.platform,
        )
        for name, application in config.applications.items()
    }


def open_lwa_session(config: Config) -> Pool:
    """Return the connections for token exchanges, apart from Amazon's, so that neither waits for the other."""
    return Pool(config, LWA_CONNECTIONS, {"User-Agent": f"sp-api-proxy/{__version__}"})


async def _become_ready(config: Config, readiness: Readiness, tokens: Tokens) -> None:
    if config.warm_up:
        readiness.waiting_for = "the tokens (warm_up)"
        await tokens.warm_up()
    readiness.state, readiness.waiting_for = "ready", ""
    readiness.details = {"version": __version__, "accounts": str(len(config.accounts))}


def _stopping(readiness: Readiness) -> None:
    readiness.state, readiness.waiting_for = "stopping", "the process is shutting down"


class _Ports:
    """Everything that listens: started one by one; the proxied ports are stopped together, status the last."""

    def __init__(self, config: Config, metrics: Metrics, room: Room) -> None:
        self._config = config
        self._metrics = metrics
        self._room = room
        self._proxied: list[tuple[asyncio.AbstractServer, Listening]] = []
        self.ending = Ending()

    async def start(self, handler: Handler, tls: ServerTls | None) -> str:
        """Listen on the handler's address and return it as it turned out; raise CannotListen."""
        listener = handler.listener
        server = Listening(handler.handle, self._config, self._metrics, room=self._room, name=handler.name)
        listening, turned_out = await listen(server, listener.address, handler.name, listener=listener, tls=tls)
        self._proxied.append((listening, server))
        if not listener.address.is_local:
            protected = "TLS" if tls is not None else "nothing"
            LOGGER.warning(
                "other machines reach this listener", extra=fields(address=turned_out, protected_by=protected)
            )
        return turned_out

    async def start_status(self, stack: AsyncExitStack, app: web.Application, address: Address, setting: str) -> str:
        """Serve the admin or health application on `address`; `stack` stops it."""
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        plain = runner.server
        if plain is None:
            raise CannotListen(f"{setting} did not start")
        # With the bounds and timers of the proxied port, and places of its own: apps cannot shut probes out.
        server = Listening(
            plain.request_handler,
            self._config,
            self._metrics,
            room=Room(STATUS_CONNECTIONS, self._metrics),
            name=setting,
            request_factory=plain.request_factory,
        )
        listening, turned_out = await listen(server, address, setting)
        stack.push_async_callback(_end, listening, server)
        return turned_out

    async def stop(self) -> None:
        """Take no more, let requests in flight finish within `timeouts.shutdown`, cut the rest off."""
        for listening, server in self._proxied:
            listening.close()
            server.close_idle()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._config.timeouts.shutdown):
                while self._busy():  # noqa: ASYNC110 - connections come and go in a library that tells nobody
                    await asyncio.sleep(DRAIN_INTERVAL)
        self.ending.cut_off = self._busy()
        if self.ending.cut_off:
            LOGGER.warning("requests in flight were cut off", extra=fields(connections=self.ending.cut_off))
        await asyncio.gather(*(_end(listening, server) for listening, server in self._proxied))

    def _busy(self) -> int:
        return sum(server.busy() for _, server in self._proxied)


async def _end(listening: asyncio.AbstractServer, server: Listening) -> None:
    listening.close()
    server.pre_shutdown()
    await server.shutdown(LAST_MOMENT)


class _Lag:
    """How late the event loop is: what holds it up delays every request."""

    def __init__(self, metrics: Metrics) -> None:
        self._worst = 0.0
        self._gauge = metrics.loop_lag
        metrics.before_export.append(self._export)

    async def watch(self) -> None:
        """Look every LAG_INTERVAL seconds."""
        clock = asyncio.get_running_loop().time
        while True:
            due = clock() + LAG_INTERVAL
            await asyncio.sleep(LAG_INTERVAL)
            self._worst = max(self._worst, clock() - due)

    def _export(self) -> None:
        self._gauge.set(self._worst)
        self._worst = 0.0


def _export_lost_lines(metrics: Metrics) -> Callable[[], None]:
    seen: Counter[str] = Counter()

    def export() -> None:
        for log, count in LOST.items():
            metrics.lost_lines.labels(log).inc(count - seen[log])
            seen[log] = count

    return export


async def _look_at_certificates(all_tls: list[ServerTls]) -> None:
    """Take up certificates that change, for as long as the proxy runs."""
    while True:
        await asyncio.sleep(LOOK_AGAIN)
        for tls in all_tls:
            tls.look()
