"""Start of the proxy: its parts are built from a Config, started in order, and stopped in reverse."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from proxy import __version__
from proxy.amazon import rdt
from proxy.amazon.operations import load_table
from proxy.config import Config
from proxy.observability.metrics import Metrics
from proxy.observability.request_history import RequestHistory, Sampler
from proxy.request.forbidden_hints import SuccessHistory
from proxy.request.ratelimit.concurrency import ConcurrencyLimiter
from proxy.request.ratelimit.limiter import RateLimiter
from proxy.request.tokens.client import TokenClient, access_token_keys
from proxy.request.tokens.provider import TokenProvider
from proxy.request.tokens.report_documents import UnrestrictedReports
from proxy.request.upstream.circuit_breaker import CircuitBreakers
from proxy.server.admin.app import AdminContext, Readiness, ReloadStatus, admin_app, health_app
from proxy.server.connection_limiter import ConnectionLimiter
from proxy.server.gauges import LoopLagMonitor, export_dropped_lines, export_secret_ages
from proxy.server.handover import ConfigRef, ReloadOutcome, Runtime, readiness_details, split_connections
from proxy.server.internal_errors import InternalErrors
from proxy.server.listeners import ListenerSet, ShutdownState, status_port
from proxy.server.tls import CERTIFICATE_CHECK_INTERVAL
from proxy.server.upstream_pools import UpstreamPools
from proxy.store import MemoryStore, Store

if TYPE_CHECKING:
    from proxy.request.tracing import Tracer


@dataclass(frozen=True, slots=True)
class RunningProxy:
    """A proxy that serves: the addresses it listened on at the start, its parts, and how it is controlled.

    `apply_config` serves every request that begins from then on by another Config; it raises CannotListen and
    ConfigError, and then changes nothing. `quit` is set by the admin address; `has_started` is done when it is ready.
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
    history: RequestHistory | None


@asynccontextmanager
async def start_proxy(config: Config) -> AsyncIterator[RunningProxy]:
    """Start a proxy and yield it; then finish its requests and stop its parts in reverse order.

    Raises CannotListen, also for a listener that does not respond.
    """
    async with AsyncExitStack() as stack:
        current = ConfigRef(config)
        metrics = Metrics(account_on_histograms=config.metrics.account_on_histograms)
        history = RequestHistory() if config.admin is not None else None
        InternalErrors(metrics).watch(asyncio.get_running_loop())
        readiness, reload_status, quit_requested = Readiness(), ReloadStatus(), asyncio.Event()
        metrics.last_reload_success.set(reload_status.good_since)
        store, rate_limiter = await open_store(config, metrics, stack)
        tracer = _open_tracer(stack, config, metrics)
        max_clients, max_upstream = split_connections(config)
        pools = UpstreamPools()
        stack.push_async_callback(pools.close)
        prepared = await pools.prepare(config, max_upstream)
        pools.activate(prepared)
        amazon, lwa = prepared.pools
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
        limiter = ConnectionLimiter(max_clients, metrics)
        listeners = ListenerSet(metrics, limiter, current)
        runtime = Runtime(
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
            listeners=listeners,
            tracer=tracer,
            history=history,
        )
        export_secret_ages(config, metrics, time.time)
        admin = health = None
        if config.admin is not None and history is not None:
            sampler = Sampler(history)
            stack.callback(asyncio.create_task(sampler.watch(), name="history").cancel)
            context = AdminContext(readiness, reload_status, current, quit_requested, tokens, history, sampler)
            app = admin_app(context, metrics, config.admin)
            admin = await stack.enter_async_context(status_port(app, config.admin, "admin", config, metrics))
        if config.health is not None:
            app = health_app(readiness, metrics, current)
            health = await stack.enter_async_context(status_port(app, config.health, "health", config, metrics))
        stack.push_async_callback(listeners.stop, runtime.abort_requests)
        handlers = runtime.handlers(config, amazon)
        readiness.waiting_for = "the listeners to respond to a request (self-check)"
        listeners.activate(await listeners.prepare(handlers, config), handlers, config)
        metrics.pre_scrape_hooks.append(export_dropped_lines(metrics))
        for watch in (LoopLagMonitor(metrics).watch(), watch_certificates(listeners)):
            stack.callback(asyncio.create_task(watch, name="watch").cancel)
        stack.push_async_callback(delay_shutdown, current, listeners.shutdown.immediate)
        stack.callback(mark_stopping, readiness)
        warming = asyncio.create_task(_become_ready(current, readiness, tokens), name="become ready")
        stack.callback(warming.cancel)
        stack.callback(runtime.end_warming)
        if not config.warm_up:
            await warming
        del config, handlers  # this frame lives as long as the proxy: drop the secrets that a reload replaces
        yield RunningProxy(
            listeners.addresses,
            admin,
            health,
            readiness,
            metrics,
            tokens,
            rate_limiter,
            listeners.shutdown,
            reload_status,
            quit_requested,
            warming,
            runtime.apply_config,
            history,
        )


async def open_store(config: Config, metrics: Metrics, stack: AsyncExitStack) -> tuple[Store, RateLimiter]:
    """Return the store of tokens and the limiter of usage plans, in memory or in Redis; `stack` closes them."""
    if config.store.is_shared:
        return await open_shared(config, metrics, stack)
    store = MemoryStore()
    stack.push_async_callback(store.close)
    return store, RateLimiter(metrics, pace=config.limits.pace, max_queue=config.limits.max_queue)


async def open_shared(config: Config, metrics: Metrics, stack: AsyncExitStack) -> tuple[Store, RateLimiter]:
    """Return what replicas share in the Redis of `config.store`, whether it is up or not; `stack` closes it."""
    # Imported here: a proxy that keeps everything in memory does not load redis and cryptography.
    from proxy.request.ratelimit.redis_limiter import RedisRateLimiter  # noqa: PLC0415
    from proxy.store.encryption import TokenCipher  # noqa: PLC0415
    from proxy.store.redis_buckets import RedisBuckets  # noqa: PLC0415
    from proxy.store.redis_client import RedisClient  # noqa: PLC0415
    from proxy.store.redis_tokens import RedisTokenStore  # noqa: PLC0415

    client, cipher = RedisClient(config.store, metrics), TokenCipher(config.store_key)
    store = RedisTokenStore(client, cipher, metrics, timeout=config.timeouts.token)
    buckets = RedisBuckets(client, cipher)
    stack.push_async_callback(store.close)
    stack.push_async_callback(buckets.close)
    await client.start()
    return store, RedisRateLimiter(metrics, buckets, pace=config.limits.pace, max_queue=config.limits.max_queue)


def _open_tracer(stack: AsyncExitStack, config: Config, metrics: Metrics) -> "Tracer | None":
    """Return the tracer, None where tracing is off; `stack` exports its last spans at the end."""
    if config.tracing.endpoint is None:
        return None
    from proxy.request import tracing  # noqa: PLC0415 - needs OpenTelemetry, an extra

    tracer = tracing.open_tracer(config.tracing, __version__, metrics)
    stack.push_async_callback(tracer.close)
    return tracer


async def _become_ready(current: ConfigRef, readiness: Readiness, tokens: TokenProvider) -> None:
    if current.config.warm_up:
        readiness.waiting_for = "the tokens (warm_up)"
        await tokens.warm_up(access_token_keys(current.config))
    readiness.state, readiness.waiting_for = "ready", ""
    readiness.details = readiness_details(current.config)


def mark_stopping(readiness: Readiness) -> None:
    readiness.state, readiness.waiting_for = "stopping", "the process is shutting down"


async def delay_shutdown(current: ConfigRef, immediate: asyncio.Event) -> None:
    """Keep serving for `timeouts.shutdown_delay`, in which load balancers see `/readyz` fail and send no more."""
    delay = current.config.timeouts.shutdown_delay
    # Without a delay there must be no await: asyncio fails on a client that connects at the moment a listener closes.
    if delay:
        with suppress(TimeoutError):
            await asyncio.wait_for(immediate.wait(), delay)


async def watch_certificates(listeners: ListenerSet) -> None:
    """Reload certificates that change, for as long as the proxy runs."""
    while True:
        await asyncio.sleep(CERTIFICATE_CHECK_INTERVAL)
        listeners.reload_certificates()
