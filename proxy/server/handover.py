"""Change from one configuration to the next while the proxy runs, and what outlives each of them."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakSet

from proxy import __version__
from proxy.amazon.operations import OperationTable
from proxy.config import Config, ConfigError, Problem
from proxy.errors import ShuttingDown
from proxy.observability.logging import LOGGER, extra
from proxy.observability.metrics import Metrics
from proxy.observability.request_history import RequestHistory
from proxy.request.authentication import CallerAuthenticator
from proxy.request.authorization import build_policies
from proxy.request.forbidden_hints import SuccessHistory
from proxy.request.handler import Handler
from proxy.request.header_cache import HeaderCache
from proxy.request.ratelimit.concurrency import ConcurrencyLimiter
from proxy.request.ratelimit.limiter import RateLimiter
from proxy.request.route_cache import RouteCache
from proxy.request.token_selection import TokenKey, TokenKind
from proxy.request.tokens.client import TokenClient, access_token_keys, token_source
from proxy.request.tokens.placeholder_endpoint import TokenEndpoint
from proxy.request.tokens.provider import TokenProvider
from proxy.request.tokens.report_documents import UnrestrictedReports
from proxy.request.upstream.circuit_breaker import CircuitBreakers
from proxy.request.upstream.deadlines import DeadlineTimer
from proxy.request.upstream.forward import Forwarder
from proxy.request.upstream.pool import ConnectionPool
from proxy.request.upstream.retry import RetryPolicies
from proxy.request.validation import AllowedHosts
from proxy.server.admin.app import Readiness
from proxy.server.connection_limiter import ConnectionLimiter
from proxy.server.gauges import export_secret_ages, remove_secret_ages
from proxy.server.listeners import ListenerSet, restart_only_changes
from proxy.server.sockets import CannotListen, describe_error, descriptors, split_fd_limit
from proxy.server.upstream_pools import UpstreamPools, user_agents
from proxy.store import Store

if TYPE_CHECKING:
    from proxy.request.documents.relay_rewrite import DocumentRewriter
    from proxy.request.documents.relay_serve import DocumentServer
    from proxy.request.tracing import Tracer
    from proxy.store.encryption import DocumentCipher

# Settings that take effect only after a restart. A change is ignored with a warning. Changes to `endpoints` or to the
# TLS of an open listener are rejected instead, with the whole configuration: to apply the rest without them could send
# tokens to the wrong host, or let in clients that should not come in.
RESTART_ONLY = ("admin", "health", "store", "store_key", "audit", "metrics", "tracing")
_RESTART = "cannot change while the proxy runs: restart it"

_SHUTTING_DOWN = ShuttingDown(
    "the proxy stopped before this call was finished",
    "A write may or may not have been done: check before you repeat it.",
)


class ReloadOutcome(NamedTuple):
    """Result of a new configuration: whether anything has changed, and which keys take effect only after a restart."""

    has_changed: bool
    needs_restart: tuple[str, ...]


@dataclass(slots=True)
class ConfigRef:
    """The configuration in force."""

    config: Config

    def __call__(self) -> Config:
        return self.config


@dataclass(slots=True)
class Runtime:
    """What outlives a configuration: what was learned, counted and fetched, and what is in use."""

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
    pools: UpstreamPools
    connection_limiter: ConnectionLimiter
    listeners: ListenerSet
    tracer: "Tracer | None"
    history: RequestHistory | None
    retry_policies: RetryPolicies | None = None
    document_cipher: "DocumentCipher | None" = None
    # Of every configuration that a request still uses.
    deadline_timers: WeakSet[DeadlineTimer] = field(default_factory=WeakSet)
    warming: "set[asyncio.Task[None]]" = field(default_factory=set)
    reload_lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def handlers(self, config: Config, amazon: ConnectionPool) -> list[Handler]:
        """Return the handler of each listener under this configuration."""
        self.retry_policies = RetryPolicies(config, self.metrics, self.retry_policies)
        callers = CallerAuthenticator(config)
        forwarder = Forwarder(session=amazon, user_agents=user_agents(config))
        deadline_timer = DeadlineTimer(config, asyncio.get_running_loop())
        self.deadline_timers.add(deadline_timer)
        rewriter, documents = (
            self._document_relay(config, forwarder, amazon) if config.documents == "relay" else (None, None)
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
                TokenEndpoint(self.table, serves_rdt=config.local_rdt),
                self.rate_limiter,
                self.tokens,
                forwarder,
                self.retry_policies,
                self.circuit_breakers,
                self.unrestricted_reports,
                self.success_history,
                deadline_timer,
                self.metrics,
                self.tracer,
                rewriter,
                documents,
                self.history,
            )
            for index, listener in enumerate(config.listen)
        ]

    def _document_relay(
        self, config: Config, forwarder: Forwarder, amazon: ConnectionPool
    ) -> "tuple[DocumentRewriter, DocumentServer]":
        """Return the two halves of the document relay; its key outlives a configuration, as issued addresses do."""
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
        """End the waits of all requests in flight: the process is about to end."""
        for deadline_timer in list(self.deadline_timers):
            deadline_timer.cancel_all(_SHUTTING_DOWN)

    async def apply_config(self, wanted: Config) -> ReloadOutcome:
        """Serve every request that begins from now on by `wanted`; those in flight finish under their own.

        Raises CannotListen and ConfigError, and then changes nothing.
        """
        async with self.reload_lock:
            before = self.current.config
            config, needs_restart = merge_reloadable(wanted, before)
            max_clients, max_upstream = split_connections(config)
            try:
                pools = await self.pools.prepare(config, max_upstream)
            except OSError as exc:
                raise ConfigError([Problem("pool.ca_file", f"cannot be used: {describe_error(exc)}")]) from exc
            # In a thread: to compare thousands of accounts takes long enough to delay requests.
            is_same, kept = await asyncio.to_thread(diff_credentials, config, before)
            if is_same and not pools.is_new:
                return ReloadOutcome(has_changed=False, needs_restart=needs_restart)
            amazon, lwa = pools.pools
            retry_policies_before = self.retry_policies
            handlers = self.handlers(config, amazon)
            # Before any new listener can take a request for an account that only the new configuration has. The client
            # keeps the accounts of the old one.
            settings_before = self.token_client.settings
            self.token_client.activate(config, lwa, amazon)
            try:
                listeners = await self.listeners.prepare(handlers, config)
            except BaseException as exc:
                self.token_client.settings, self.retry_policies = settings_before, retry_policies_before
                # A token fetched meanwhile may be for an account that only the rejected configuration has.
                self.tokens.invalidate(lambda token_key: _source_in(token_key) not in kept)
                await self.pools.discard(pools)
                if isinstance(exc, OSError):
                    raise CannotListen(f"a certificate cannot be used: {describe_error(exc)}") from exc
                raise
            # Nothing from here to `current` awaits: no request sees a part of the change.
            self.pools.activate(pools)
            self.listeners.activate(listeners, handlers, config)
            self.current.config = config
            self.store.timeout = config.timeouts.token
            self.tokens.invalidate(lambda token_key: _source_in(token_key) not in kept)
            self.rate_limiter.configure(pace=config.limits.pace, max_queue=config.limits.max_queue)
            self.concurrency.configure(config.bounds)
            self.connection_limiter.limit = max_clients
            LOGGER.setLevel(config.log.level.upper())
            remove_secret_ages(before, config, self.metrics)
            export_secret_ages(config, self.metrics, time.time)
            if self.readiness.is_ready:
                self.readiness.details = readiness_details(config)
            if config.warm_up:
                self._warm_up(config, kept)
            return ReloadOutcome(has_changed=True, needs_restart=needs_restart)

    def _warm_up(self, config: Config, kept: "frozenset[_Source]") -> None:
        """Fetch the tokens of new or changed accounts in the background."""
        new = [token_key for token_key in access_token_keys(config) if _source_in(token_key) not in kept]
        if new:
            task = asyncio.create_task(self.tokens.warm_up(new), name="warm up")
            self.warming.add(task)
            task.add_done_callback(self.warming.discard)

    def end_warming(self) -> None:
        """Cancel the token requests of `warm_up`."""
        for task in list(self.warming):
            task.cancel()


_Source = tuple[TokenKind, str, str, str]  # what a token's source depends on within a configuration


def _source_in(token_key: TokenKey) -> _Source:
    # A grantless token belongs to an application, not to an account.
    account, region = ("", "") if token_key.kind == "grantless" else (token_key.account, token_key.region)
    return token_key.kind, token_key.application, account, region


def diff_credentials(config: Config, before: Config) -> tuple[bool, frozenset[_Source]]:
    """Return whether two configurations are equal, and the sources whose tokens are as good in both."""
    kept = set[_Source]()
    for access_token_key in access_token_keys(config):
        for kind in ("lwa", "rdt", "grantless"):
            token_key = access_token_key._replace(kind=kind)
            source = token_source(config, token_key)
            if source is not None and source == token_source(before, token_key):
                kept.add(_source_in(token_key))
    return config == before, frozenset(kept)


def merge_reloadable(wanted: Config, before: Config) -> tuple[Config, tuple[str, ...]]:
    """Return as much of a new configuration as a running process can apply, and the keys that need a restart.

    Raises ConfigError if the rest would not be safe without these: see RESTART_ONLY.
    """
    hosts = type(wanted.endpoints).model_fields
    moved = [name for name in hosts if getattr(wanted.endpoints, name) != getattr(before.endpoints, name)]
    problems = [Problem(f"endpoints.{name}", _RESTART) for name in moved]
    needs_restart = [key for key in RESTART_ONLY if getattr(wanted, key) != getattr(before, key)]
    changes: dict[str, Any] = {key: getattr(before, key) for key in needs_restart}
    if wanted.log.format != before.log.format:
        needs_restart.append("log.format")
        changes["log"] = wanted.log.model_copy(update={"format": before.log.format})
    open_now = list(before.listen)
    for index, listener in enumerate(wanted.listen):
        old = next((one for one in open_now if one.address == listener.address), None)
        if old is not None:
            open_now.remove(old)
            problems += [
                Problem(f"listen[{index}].{key}", f"{_RESTART}, or give the listener another address")
                for key in restart_only_changes(listener, old)
            ]
    if problems:
        raise ConfigError(problems)
    return (wanted.model_copy(update=changes) if changes else wanted), tuple(needs_restart)


def readiness_details(config: Config) -> dict[str, str]:
    """Return what `/readyz` says of a proxy that is ready."""
    return {"version": __version__, "accounts": str(len(config.accounts))}


def split_connections(config: Config) -> tuple[int, int]:
    """Return the limits of client connections and of upstream connections; warn if descriptors are too few."""
    available = descriptors()
    limits = split_fd_limit(config.bounds, config.pool.max_connections, available)
    if limits != (config.bounds.connections, config.pool.max_connections):
        LOGGER.warning(
            "the file descriptor limit of this process allows fewer connections than configured",
            extra=extra(files=available, from_clients=limits[0], to_amazon=limits[1]),
        )
    return limits
