"""How are the parts built from a Config, started in order and stopped in reverse?"""

import asyncio
import os
import socket
import stat
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import aiohttp
from aiohttp import web

from proxy import __version__
from proxy.amazon import rdt
from proxy.amazon.headers import user_agent
from proxy.amazon.operations import load_table
from proxy.config import Address, Config
from proxy.listener import Listening
from proxy.logs import LOGGER, fields
from proxy.metrics import Metrics
from proxy.request.circuit import Circuits
from proxy.request.documents import Documents
from proxy.request.forbidden import Experience
from proxy.request.grants import Grants
from proxy.request.guard import Doorway
from proxy.request.handler import Handler
from proxy.request.limits import Limits
from proxy.request.retries import AllAttempts
from proxy.request.tokens import Tokens
from proxy.request.upstream import Upstream, open_session, tls_context
from proxy.status import Readiness, admin_app, health_app
from proxy.store import Store

SECRET_LIFE = 180 * 86400.0  # seconds (DOC "Rotate your Application's LWA Credentials")
DRAIN_INTERVAL = 0.02  # seconds between two looks at what is still in flight
LAST_MOMENT = 0.2  # seconds in which what was cut off may notice it


class CannotListen(Exception):
    """An address cannot be listened on; the text says which setting to change."""


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
        store = Store()
        stack.push_async_callback(store.close)
        session = await stack.enter_async_context(open_session(config))
        fresh_session = await stack.enter_async_context(open_session(config, fresh=True))
        lwa_session = await stack.enter_async_context(open_lwa_session(config))
        table = load_table()
        limits = Limits(metrics, pace=config.limits.pace)
        grants = Grants(
            config,
            lwa_session=lwa_session,
            amazon_session=fresh_session,  # mints are rare as well
            user_agents=agents,
            limits=limits,
            mint=table.match("POST", rdt.PATH),
            metrics=metrics,
        )
        documents = Documents()
        tokens = Tokens(config, grants=grants, documents=documents, store=store, metrics=metrics)
        stack.push_async_callback(tokens.close)
        show_secrets_age(config, metrics, time.time)
        upstream = Upstream(config, session=session, fresh_session=fresh_session, user_agents=agents)
        admin, health = await _start_status(stack, config, readiness, metrics)
        attempts, circuits = AllAttempts(config, metrics), Circuits(metrics, time.monotonic)
        parts = (table, limits, tokens, upstream, attempts, circuits, documents, Experience(table), metrics)
        handlers = [Handler(config, listener, Doorway.of(listener, config), *parts) for listener in config.listen]
        listening = _Listeners(config, Ending())
        stack.push_async_callback(listening.stop)
        addresses = [await listening.start(handler, index) for index, handler in enumerate(handlers)]
        stack.callback(_stopping, readiness)
        warming = asyncio.create_task(_become_ready(config, readiness, tokens), name="become ready")
        stack.callback(warming.cancel)
        if not config.warm_up:
            await warming
        yield Running(tuple(addresses), admin, health, readiness, metrics, tokens, limits, listening.ending)


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


def open_lwa_session(config: Config) -> aiohttp.ClientSession:
    """Return the session for token exchanges: apart from Amazon's, and each exchange on a connection of its own.

    Exchanges are rare, so that a kept connection would mostly have died, or hold what nobody asked for.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=32, ssl=tls_context(config), force_close=True, ttl_dns_cache=30),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"User-Agent": f"sp-api-proxy/{__version__}"},
        timeout=aiohttp.ClientTimeout(total=config.timeouts.token),
        trust_env=False,
    )


async def _become_ready(config: Config, readiness: Readiness, tokens: Tokens) -> None:
    if config.warm_up:
        readiness.waiting_for = "the tokens (warm_up)"
        await tokens.warm_up()
    readiness.state, readiness.waiting_for = "ready", ""
    readiness.details = {"version": __version__, "accounts": str(len(config.accounts))}


def _stopping(readiness: Readiness) -> None:
    readiness.state, readiness.waiting_for = "stopping", "the process is shutting down"


async def _start_status(
    stack: AsyncExitStack, config: Config, readiness: Readiness, metrics: Metrics
) -> tuple[str | None, str | None]:
    admin = health = None
    keep_alive = config.timeouts.keep_alive
    if config.admin is not None:
        runner = web.AppRunner(
            admin_app(readiness, metrics, config, config.admin), access_log=None, keepalive_timeout=keep_alive
        )
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        admin = await _listen(runner, config.admin, "admin")
    if config.health is not None:
        runner = web.AppRunner(health_app(readiness, metrics), access_log=None, keepalive_timeout=keep_alive)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        health = await _listen(runner, config.health, "health")
    return admin, health


class _Listeners:
    """The proxied ports: started one by one, stopped together."""

    def __init__(self, config: Config, ending: Ending) -> None:
        self._config = config
        self._runners: list[tuple[web.ServerRunner, Listening]] = []
        self.ending = ending

    async def start(self, handler: Handler, index: int) -> str:
        """Listen on the handler's address and return it as it turned out; raise CannotListen."""
        server = Listening(handler.handle, self._config, handler.metrics)
        runner = web.ServerRunner(server, shutdown_timeout=LAST_MOMENT)
        await runner.setup()
        self._runners.append((runner, server))
        address = handler.listener.address
        turned_out = await _listen(runner, address, f"listen[{index}]")
        if not address.is_local:
            LOGGER.warning("other machines reach this listener and act as the seller", extra=fields(address=turned_out))
        return turned_out

    async def stop(self) -> None:
        """Take no more, let requests in flight finish within `timeouts.shutdown`, cut the rest off."""
        for runner, server in self._runners:
            for site in list(runner.sites):
                await site.stop()
            server.close_idle()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._config.timeouts.shutdown):
                while self._busy():  # noqa: ASYNC110 - connections come and go in a library that tells nobody
                    await asyncio.sleep(DRAIN_INTERVAL)
        self.ending.cut_off = self._busy()
        if self.ending.cut_off:
            LOGGER.warning("requests in flight were cut off", extra=fields(connections=self.ending.cut_off))
        await asyncio.gather(*(runner.cleanup() for runner, _ in self._runners))

    def _busy(self) -> int:
        return sum(server.busy() for _, server in self._runners)


async def _listen(runner: web.BaseRunner, address: Address, setting: str) -> str:
    """Listen on `address` and return it as it turned out (port 0 becomes a real one); raise CannotListen."""
    try:
        if address.path:
            _clear_stale_socket(address.path)
            before = os.umask(0o177)  # the socket is born with mode 0600: no moment in which others can connect
            try:
                await web.UnixSite(runner, address.path).start()
            finally:
                os.umask(before)
            return str(address)
        await web.TCPSite(runner, address.host, address.port).start()
    except OSError as exc:
        reason = os.strerror(exc.errno) if exc.errno and exc.errno > 0 else "the name is not known"
        raise CannotListen(f"cannot listen on {address}: {reason}; change {setting}, or end what uses it") from exc
    port = next((name[1] for name in runner.addresses if isinstance(name, tuple)), address.port)
    return str(Address(address.host, port))


def _clear_stale_socket(path: str) -> None:
    """Remove a socket file that nobody listens on any more; raise OSError where somebody does, or it is no socket."""
    try:
        mode = Path(path).stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(17, "exists and is no socket")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            Path(path).unlink(missing_ok=True)
            return
    raise OSError(98, "Address already in use")
