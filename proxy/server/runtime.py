"""How are the parts built from a Config, handed over to the next one, started in order and stopped in reverse?"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakSet

from proxy import __version__
from proxy.amazon import rdt
from proxy.amazon.headers import user_agent_of
from proxy.amazon.operations import OperationTable, load_table
from proxy.config import Config, ConfigError, Problem
from proxy.errors import ShuttingDown
from proxy.observability.logging import LOGGER, dropped_lines, extra
from proxy.observability.metrics import Metrics
from proxy.observability.request_history import Sampler
from proxy.request.authentication import CallerAuthenticator
from proxy.request.authorization import build_policies
from proxy.request.forbidden_hints import SuccessHistory
from proxy.request.handler import Handler
from proxy.request.header_cache import HeaderCache
from proxy.request.ratelimit.concurrency import ConcurrencyLimiter
from proxy.request.ratelimit.limiter import RateLimiter
from proxy.request.routing import RouteCache, TokenKey, TokenKind
from proxy.request.tokens.client import TokenClient, access_token_keys, token_source
from proxy.request.tokens.placeholder_endpoint import TokenEndpoint
from proxy.request.tokens.provider import TokenProvider
from proxy.request.tokens.report_documents import UnrestrictedReports
from proxy.request.upstream.circuit_breaker import CircuitBreakers
from proxy.request.upstream.connector import ResumingContext, tls_context
from proxy.request.upstream.deadlines import DeadlineTimer
from proxy.request.upstream.forward import Forwarder
from proxy.request.upstream.pool import ConnectionPool, amazon_pool, lwa_pool
from proxy.request.upstream.retry import RetryPolicies
from proxy.request.validation import AllowedHosts
from proxy.server.admin.app import AdminContext, Readiness, ReloadStatus, admin_app, health_app
from proxy.server.http_protocol import ConnectionLimiter
from proxy.server.listeners import ListenerSet, ShutdownState, restart_only_changes, status_port
from proxy.server.sockets import CERTIFICATE_CHECK_INTERVAL, CannotListen, describe_error, descriptors, split_fd_limit
from proxy.store import MemoryStore, Store

if TYPE_CHECKING:
    from proxy.request.documents.relay_rewrite import DocumentRewriter
    from proxy.request.documents.relay_serve import DocumentServer
    from proxy.request.spans import Tracer
    from proxy.store.encryption import DocumentCipher

CLIENT_SECRET_LIFETIME = 180 * 86400.0  # seconds (DOC "Rotate your Application's LWA Credentials")
LAG_INTERVAL = 0.5  # seconds

# What a running process cannot change, and leaves as it is: where it is watched, what its series are called, where
# things are written and kept. Whom tokens are sent to, and who may come in by an open port, are not among them: without
# that the rest could mean something else, so that all of it is refused.
RESTART_ONLY = ("admin", "health", "store", "store_key", "audit", "metrics", "tracing")
_SHUTTING_DOWN = ShuttingDown(
    "the proxy ended before this call was finished", "A write may or may not have been done: look before you repeat it."
)
_RESTART = "cannot change while the proxy runs: restart it"


class ReloadOutcome(NamedTuple):
    """What came of a new configuration: whether anything is another now, and which keys count only after a restart."""

    has_changed: bool
    needs_restart: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunningProxy:
    """A proxy that serves: the addresses it listened on at the start, its parts, and what it can be told.

    `hand_over` serves every request that begins from then on by another Config; it raises CannotListen and ConfigError,
    and then changes nothing. `admin_told` is what came in by the admin address, `has_started` ends with the start.
    """

    addresses: tuple[str, ...]
    admin: str | None
    health: str | None
    readiness: Readiness
    metrics: Metrics
    tokens: TokenProvider
    rate_limiter: RateLimiter
    shutdown: ShutdownState
    reload_status: ReloadStatus
    quit: asyncio.Event
    has_started: "asyncio.Task[None]"
    apply_config: Callable[[Config], Awaitable[ReloadOutcome]]


@dataclass(slots=True)
class ConfigRef:
    """The configuration in force."""

    config: Config

    def __call__(self) -> Config:
        return self.config


@asynccontextmanager
async def start_proxy(config: Config) -> AsyncIterator[RunningProxy]:
    """Start a proxy and yield it; stop it in reverse order, requests in flight first finished.

    Raises CannotListen.
    """
    async with AsyncExitStack() as stack:
        current = ConfigRef(config)
        metrics = Metrics(
            account_on_histograms=config.metrics.account_on_histograms, remembers=config.admin is not None
        )
        readiness, reloading, told_to_quit = Readiness(), ReloadStatus(), asyncio.Event()
        metrics.last_reload_success.set(reloading.good_since)
        store, rate_limiter = await open_store(config, metrics, stack)
        traces = _open_traces(stack, config, metrics)
        most_clients, most_upstream = split_connections(config)
        pools = UpstreamPools()
        stack.push_async_callback(pools.close)
        made = await pools.prepare(config, most_upstream)
        pools.activate(made)
        amazon, lwa = made.pools
        table = load_table()
        token_client = TokenClient(
            config,
            lwa_session=lwa,
            amazon_session=amazon,
            rate_limiter=rate_limiter,
            mint=table.match("POST", rdt.PATH),
            metrics=metrics,
        )
        unrestricted_reports = UnrestrictedReports()
        tokens = TokenProvider(
            token_client=token_client, unrestricted_reports=unrestricted_reports, store=store, metrics=metrics
        )
        stack.push_async_callback(tokens.close)
        limiter = ConnectionLimiter(most_clients, metrics)
        ports = ListenerSet(metrics, limiter, current)
        shared = Runtime(
            current=current,
            table=table,
            concurrency=ConcurrencyLimiter(config.bounds, metrics),
            rate_limiter=rate_limiter,
            token_client=token_client,
            tokens=tokens,
            store=store,
            circuit_breakers=CircuitBreakers(metrics, time.monotonic),
            unrestricted_reports=unrestricted_reports,
            success_history=SuccessHistory(table),
            metrics=metrics,
            readiness=readiness,
            pools=pools,
            connection_limiter=limiter,
            listeners=ports,
            tracer=traces,
        )
        export_secret_ages(config, metrics, time.time)
        admin = health = None
        if config.admin is not None and metrics.history is not None:
            history = Sampler(metrics.history)
            stack.callback(asyncio.create_task(history.watch(), name="history").cancel)
            about = AdminContext(readiness, reloading, current, told_to_quit, tokens, metrics.history, history)
            app = admin_app(about, metrics, config.admin)
            admin = await stack.enter_async_context(status_port(app, config.admin, "admin", config, metrics))
        if config.health is not None:
            app = health_app(readiness, metrics, current)
            health = await stack.enter_async_context(status_port(app, config.health, "health", config, metrics))
        stack.push_async_callback(ports.stop, shared.abort_requests)
        handlers = shared.handlers(config, amazon)
        ports.activate(await ports.prepare(handlers, config), handlers, config)
        metrics.pre_scrape_hooks.append(export_dropped_lines(metrics))
        for watch in (LoopLagMonitor(metrics).watch(), watch_certificates(ports)):
            stack.callback(asyncio.create_task(watch, name="watch").cancel)
        stack.push_async_callback(delay_shutdown, current, ports.shutdown.immediate)
        stack.callback(mark_stopping, readiness)
        warming = asyncio.create_task(_become_ready(current, readiness, tokens), name="become ready")
        stack.callback(warming.cancel)
        stack.callback(shared.end_warming)
        if not config.warm_up:
            await warming
        del config, handlers  # a later configuration takes their place, and their secrets are kept no longer
        yield RunningProxy(
            ports.addresses,
            admin,
            health,
            readiness,
            metrics,
            tokens,
            rate_limiter,
            ports.shutdown,
            reloading,
            told_to_quit,
            warming,
            shared.apply_config,
        )


async def open_store(config: Config, metrics: Metrics, stack: AsyncExitStack) -> tuple[Store, RateLimiter]:
    """Return where tokens and usage plans are kept; `stack` closes it."""
    if config.store.is_shared:
        from proxy.server.replicas import open_shared  # noqa: PLC0415 - who keeps all in memory pays nothing for Redis and seals

        return await open_shared(config, metrics, stack)
    store = MemoryStore()
    stack.push_async_callback(store.close)
    return store, RateLimiter(metrics, pace=config.limits.pace, max_queue=config.limits.max_queue)


@dataclass(slots=True)
class Runtime:
    """What outlives a configuration: what was learnt, counted and fetched, and what is in use."""

    current: ConfigRef
    table: OperationTable
    concurrency: ConcurrencyLimiter
    rate_limiter: RateLimiter
    token_client: TokenClient
    tokens: TokenProvider
    store: Store
    circuit_breakers: CircuitBreakers
    unrestricted_reports: UnrestrictedReports
    success_history: SuccessHistory
    metrics: Metrics
    readiness: Readiness
    pools: "UpstreamPools"
    connection_limiter: ConnectionLimiter
    listeners: ListenerSet
    tracer: "Tracer | None"
    retry_policies: RetryPolicies | None = None
    document_cipher: "DocumentCipher | None" = None
    deadline_timers: WeakSet[DeadlineTimer] = field(
        default_factory=WeakSet
    )  # of every configuration that is still in use
    warming: "set[asyncio.Task[None]]" = field(default_factory=set)
    reload_lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def handlers(self, config: Config, amazon: ConnectionPool) -> list[Handler]:
        """Return what serves the requests of each listener under this configuration."""
        self.retry_policies = RetryPolicies(config, self.metrics, self.retry_policies)
        callers = CallerAuthenticator(config)
        upstream = Forwarder(session=amazon, user_agents=user_agents(config))
        deadlines = DeadlineTimer(config, asyncio.get_running_loop())
        self.deadline_timers.add(deadlines)
        rewriter, documents = (
            self._document_relay(config, upstream, amazon) if config.documents == "relay" else (None, None)
        )
        return [
            Handler(
                config,
                listener,
                f"listen[{index}]",
                AllowedHosts.from_config(listener, config),
                HeaderCache(len(config.listen)),
                callers,
                build_policies(config, index),
                self.concurrency,
                RouteCache(listener, config, self.table),
                TokenEndpoint(self.table, answers_rdt=config.local_rdt),
                self.rate_limiter,
                self.tokens,
                upstream,
                self.retry_policies,
                self.circuit_breakers,
                self.unrestricted_reports,
                self.success_history,
                deadlines,
                self.metrics,
                self.tracer,
                rewriter,
                documents,
            )
            for index, listener in enumerate(config.listen)
        ]

    def _document_relay(
        self, config: Config, forwarder: Forwarder, amazon: ConnectionPool
    ) -> "tuple[DocumentRewriter, DocumentServer]":
        """Return what relays documents; its key outlives a configuration."""
        # Imported here: `cryptography` costs start time and memory, which only `documents: relay` needs.
        from proxy.request.documents.relay import DocumentAddresses  # noqa: PLC0415
        from proxy.request.documents.relay_rewrite import DocumentRewriter  # noqa: PLC0415
        from proxy.request.documents.relay_serve import DocumentServer  # noqa: PLC0415
        from proxy.store.encryption import DocumentCipher  # noqa: PLC0415

        self.document_cipher = self.document_cipher or DocumentCipher(config.store_key)
        addresses = DocumentAddresses(config, self.document_cipher)
        rewriter = DocumentRewriter(config, addresses, forwarder=forwarder, metrics=self.metrics)
        return rewriter, DocumentServer(config, self.table, addresses, forwarder=forwarder, pool=amazon)

    def abort_requests(self) -> None:
        """End the waits of all requests in flight: the process is about to."""
        for deadlines in list(self.deadline_timers):
            deadlines.cancel_all(_SHUTTING_DOWN)

    async def apply_config(self, wanted: Config) -> ReloadOutcome:
        """Serve every request that begins from now on by `wanted`; those in flight finish as they began.

        Raises CannotListen and ConfigError, and leaves everything as it was.
        """
        async with self.reload_lock:
            before = self.current.config
            config, needs_restart = merge_reloadable(wanted, before)
            most_clients, most_upstream = split_connections(config)
            try:
                made = await self.pools.prepare(config, most_upstream)
            except OSError as exc:
                raise ConfigError([Problem("pool.ca_file", f"cannot be used: {describe_error(exc)}")]) from exc
            # Thousands of accounts take a while to compare: beside the requests.
            is_same, kept = await asyncio.to_thread(diff_credentials, config, before)
            if is_same and not made.is_new:
                return ReloadOutcome(has_changed=False, needs_restart=needs_restart)
            amazon, lwa = made.pools
            attempts_before = self.retry_policies
            handlers = self.handlers(config, amazon)
            # Before any request can come that only the new configuration knows; it knows those of the old one too.
            grants_before = self.token_client.settings
            self.token_client.activate(config, lwa, amazon)
            try:
                ports = await self.listeners.prepare(handlers, config)
            except BaseException as exc:
                self.token_client.settings, self.retry_policies = grants_before, attempts_before
                # What was fetched meanwhile may be for somebody whom only the refused configuration knows.
                self.tokens.invalidate(lambda token_key: _source_in(token_key) not in kept)
                await self.pools.discard(made)
                if isinstance(exc, OSError):
                    raise CannotListen(f"a certificate cannot be used: {describe_error(exc)}") from exc
                raise
            self.pools.activate(made)
            self.listeners.activate(ports, handlers, config)
            self.current.config = config
            self.store.timeout = config.timeouts.token
            self.invalidate_removed(before, config, kept)
            self.rate_limiter.configure(pace=config.limits.pace, max_queue=config.limits.max_queue)
            self.concurrency.configure(config.bounds)
            self.connection_limiter.limit = most_clients
            LOGGER.setLevel(config.log.level.upper())
            export_secret_ages(config, self.metrics, time.time)
            if self.readiness.is_ready:
                self.readiness.details = _details(config)
            if config.warm_up:
                self._warm_up(config, kept)
            return ReloadOutcome(has_changed=True, needs_restart=needs_restart)

    def _warm_up(self, config: Config, kept: "frozenset[_Source]") -> None:
        """Fetch the tokens of accounts that are new, or another's now, in the background."""
        new = [one for one in access_token_keys(config) if _source_in(one) not in kept]
        if new:
            task = asyncio.create_task(self.tokens.warm_up(new), name="warm up")
            self.warming.add(task)
            task.add_done_callback(self.warming.discard)

    def end_warming(self) -> None:
        """Fetch no more tokens that nobody waits for."""
        for task in list(self.warming):
            task.cancel()

    def invalidate_removed(self, before: Config, config: Config, kept: "frozenset[_Source]") -> None:
        """Forget the tokens that are for somebody else now, or for nobody, and the series of applications that left."""
        self.tokens.invalidate(lambda credential: _source_in(credential) not in kept)
        for name, application in before.applications.items():
            after = config.applications.get(name)
            if application.rotated_at is not None and (after is None or after.rotated_at is None):
                self.metrics.secret_age.remove(name)
                self.metrics.secret_expiry.remove(name)


_Source = tuple[TokenKind, str, str, str]  # what a credential's source depends on, but for the configuration


def _source_in(token_key: TokenKey) -> _Source:
    account, region = ("", "") if token_key.kind == "grantless" else (token_key.account, token_key.region)
    return token_key.kind, token_key.application, account, region


def diff_credentials(config: Config, before: Config) -> tuple[bool, frozenset[_Source]]:
    """Return whether two configurations are the same, and of which credentials the tokens are as good in both."""
    kept = set[_Source]()
    for ordinary in access_token_keys(config):
        for kind in ("lwa", "rdt", "grantless"):
            token_key = ordinary._replace(kind=kind)
            source = token_source(config, token_key)
            if source is not None and source == token_source(before, token_key):
                kept.add(_source_in(token_key))
    return config == before, frozenset(kept)


def merge_reloadable(wanted: Config, before: Config) -> tuple[Config, tuple[str, ...]]:
    """Return as much of a new configuration as a running process can take up, and the keys that need a restart.

    Raises ConfigError where the rest would not be safe without these.
    """
    hosts = type(wanted.endpoints).model_fields
    moved = [name for name in hosts if getattr(wanted.endpoints, name) != getattr(before.endpoints, name)]
    refused = [Problem(f"endpoints.{name}", _RESTART) for name in moved]
    kept = [key for key in RESTART_ONLY if getattr(wanted, key) != getattr(before, key)]
    changes: dict[str, Any] = {key: getattr(before, key) for key in kept}
    if wanted.log.format != before.log.format:
        kept.append("log.format")
        changes["log"] = wanted.log.model_copy(update={"format": before.log.format})
    open_now = list(before.listen)
    for index, listener in enumerate(wanted.listen):
        old = next((one for one in open_now if one.address == listener.address), None)
        if old is not None:
            open_now.remove(old)
            refused += [
                Problem(f"listen[{index}].{key}", f"{_RESTART}, or give the listener another address")
                for key in restart_only_changes(listener, old)
            ]
    if refused:
        raise ConfigError(refused)
    return (wanted.model_copy(update=changes) if changes else wanted), tuple(kept)


class PreparedPools(NamedTuple):
    """Connections to Amazon and to its token host, by what they were made, and how many there may be to Amazon."""

    settings: tuple[object, ...]
    pools: tuple[ConnectionPool, ConnectionPool]
    max_upstream: int
    is_new: bool


class UpstreamPools:
    """The connections to Amazon and to Login with Amazon, and those of earlier configurations that are still in use."""

    def __init__(self) -> None:
        self._settings: tuple[object, ...] = ()
        self._current: tuple[ConnectionPool, ...] = ()
        self._retired: list[ConnectionPool] = []
        self._tls: tuple[object, tuple[ResumingContext, ResumingContext]] | None = None

    async def prepare(self, config: Config, most_upstream: int) -> "PreparedPools":
        """Return the connections to Amazon and those to its token host, new ones where their settings have changed.

        Raises OSError where `pool.ca_file` cannot be used. `take_up` or `give_up` follows.
        """
        trusts = (config.pool.ca_file, _stamp(config.pool.ca_file))
        made_by = (config.pool.model_copy(update={"max_connections": 0}), config.timeouts.connect, trusts)
        if made_by == self._settings:
            return PreparedPools(made_by, (self._current[0], self._current[1]), most_upstream, is_new=False)
        tls = self._tls[1] if self._tls is not None and trusts == self._tls[0] else None
        if tls is None:
            # Two of them: a session is resumed by the name of its host.
            tls = await asyncio.to_thread(lambda: (tls_context(config), tls_context(config)))
        self._tls = trusts, tls
        pools = amazon_pool(config, most_upstream, tls[0]), lwa_pool(config, tls[1])
        for pool in pools:
            await pool.__aenter__()
        return PreparedPools(made_by, pools, most_upstream, is_new=True)

    def activate(self, made: "PreparedPools") -> None:
        """Use these from now on; those before them end when nobody uses them any more."""
        if made.is_new:
            for pool in self._current:
                pool.drain()
            self._retired = [*(pool for pool in self._retired if pool.is_in_use), *self._current]
            self._settings, self._current = made.settings, made.pools
        made.pools[0].limit = made.max_upstream

    async def discard(self, made: "PreparedPools") -> None:
        """Use these not after all."""
        if made.is_new:
            for pool in made.pools:
                await pool.__aexit__(None, None, None)

    async def close(self) -> None:
        """End all connections."""
        for pool in (*self._current, *self._retired):
            await pool.__aexit__(None, None, None)


def _stamp(name: str | None) -> tuple[int, int] | None:
    if name is None:
        return None
    status = Path(name).stat()
    return status.st_ino, status.st_mtime_ns


def split_connections(config: Config) -> tuple[int, int]:
    """Return how many connections there may be from clients and to Amazon."""
    shares = split_fd_limit(config.bounds, config.pool.max_connections, descriptors())
    if shares != (config.bounds.connections, config.pool.max_connections):
        LOGGER.warning(
            "fewer connections than the settings allow: this process may open too few files",
            extra=extra(files=descriptors(), from_clients=shares[0], to_amazon=shares[1]),
        )
    return shares


def export_secret_ages(config: Config, metrics: Metrics, wall: Callable[[], float]) -> None:
    """Export how old each client secret is: Amazon refuses all calls when it is past its 180 days."""
    for name, application in config.applications.items():
        if application.rotated_at is not None:
            made = datetime.combine(application.rotated_at, datetime.min.time(), UTC).timestamp()
            metrics.secret_age.labels(name).set_function(partial(_since, made, wall))
            metrics.secret_expiry.labels(name).set(made + CLIENT_SECRET_LIFETIME)


def _since(moment: float, wall: Callable[[], float]) -> float:
    return wall() - moment


def user_agents(config: Config) -> dict[str, str]:
    """Return the `user-agent` of each application, built once."""
    return {name: user_agent_of(application) for name, application in config.applications.items()}


def _open_traces(stack: AsyncExitStack, config: Config, metrics: Metrics) -> "Tracer | None":
    """Return what makes spans, None where nobody wants any; `stack` gives the last of them time to leave."""
    if config.tracing.endpoint is None:
        return None
    from proxy.request import spans  # noqa: PLC0415 - needs OpenTelemetry, an extra

    traces = spans.open_tracer(config.tracing, __version__, metrics)
    stack.push_async_callback(traces.close)
    return traces


async def _become_ready(current: ConfigRef, readiness: Readiness, tokens: TokenProvider) -> None:
    if current.config.warm_up:
        readiness.waiting_for = "the tokens (warm_up)"
        await tokens.warm_up(access_token_keys(current.config))
    readiness.state, readiness.waiting_for = "ready", ""
    readiness.details = _details(current.config)


def _details(config: Config) -> dict[str, str]:
    return {"version": __version__, "accounts": str(len(config.accounts))}


def mark_stopping(readiness: Readiness) -> None:
    readiness.state, readiness.waiting_for = "stopping", "the process is shutting down"


async def delay_shutdown(current: ConfigRef, at_once: asyncio.Event) -> None:
    """Go on taking requests for `timeouts.shutdown_delay`, in which those who send them learn that this proxy ends."""
    delay = current.config.timeouts.shutdown_delay
    if delay:  # otherwise nothing is to come in between: asyncio trips over what connects the moment a listener closes
        with suppress(TimeoutError):
            await asyncio.wait_for(at_once.wait(), delay)


class LoopLagMonitor:
    """How late the event loop is: what holds it up delays every request."""

    def __init__(self, metrics: Metrics) -> None:
        self._worst = 0.0
        self._gauge = metrics.loop_lag
        metrics.pre_scrape_hooks.append(self._export)

    async def watch(self) -> None:
        """Look every LAG_INTERVAL seconds."""
        clock = asyncio.get_running_loop().time
        while True:
            due = clock() + LAG_INTERVAL
            await asyncio.sleep(LAG_INTERVAL)
            self._worst = max(self._worst, clock() - due)

    def _export(self) -> None:
        worst, self._worst = self._worst, 0.0
        self._gauge.set(worst)


def export_dropped_lines(metrics: Metrics) -> Callable[[], None]:
    seen: Counter[str] = Counter()

    def export() -> None:
        for log, count in dropped_lines.copy().items():
            metrics.dropped_lines.labels(log).inc(count - seen[log])
            seen[log] = count

    return export


async def watch_certificates(ports: ListenerSet) -> None:
    """Take up certificates that change, for as long as the proxy runs."""
    while True:
        await asyncio.sleep(CERTIFICATE_CHECK_INTERVAL)
        ports.reload_certificates()
