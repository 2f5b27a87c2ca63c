"""The Prometheus series that the proxy exports.

Names follow Prometheus' naming practices: one prefix, base units, `_total` for counters. Label values are bounded:
accounts and applications come from the configuration, operations from the table (or are `unknown`, or
`relayDocument`); no path, id or header of a request becomes one.

What is counted for each request is a plain number or a HotHistogram behind a CallbackCollector (see `collectors`);
everything else is an instrument of prometheus_client.
"""

import asyncio
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, PlatformCollector, ProcessCollector
from prometheus_client import disable_created_metrics as _disable_created_metrics
from prometheus_client.registry import Collector

from proxy import __version__
from proxy.observability.collectors import DURATION_BUCKETS, CallbackCollector, HotHistogram, Kind

# prometheus_client exports the creation time of each counter and histogram as a series of its own (`…_created`), which
# adds a series for each combination of labels, and nothing here needs it.
_disable_created_metrics()  # type: ignore[no-untyped-call]  # not annotated there


@dataclass(slots=True)
class Traffic:
    """Bytes of request bodies sent to Amazon and of response bodies received, of one account, region and operation."""

    sent: int = 0
    received: int = 0


@dataclass(slots=True)
class RequestSeries:
    """The series that one finished request counts in; looked up once for each combination of labels."""

    duration: HotHistogram
    upstream_duration: HotHistogram
    traffic: Traffic
    labels: tuple[str, ...]
    requests: int = 0


class PlanGauges(NamedTuple):
    """The state of a usage plan: calls per second, calls that it allows at once now, calls that wait."""

    rate: float
    tokens: float
    waiting: int


class PreScrape(Collector):
    """Runs functions that update gauges before each scrape; has no series.

    It works because a registry collects in the order of registration, and this is registered first. The functions run
    on the thread of the scrape, not on the event loop.
    """

    def __init__(self, updates: list[Callable[[], None]]) -> None:
        self._updates = updates

    def describe(self) -> Iterable[Metric]:
        """Return nothing and run nothing; the registry calls this once, when this is registered."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Run the functions and return nothing."""
        for update in self._updates:
            update()
        return ()


class Metrics:
    """The series of one proxy, in their own registry: several proxies in one process (tests) count separately."""

    def __init__(self, *, account_on_histograms: bool = False) -> None:
        self.registry = CollectorRegistry()
        # Needs no running loop: since Python 3.10 a lock binds to its loop at first use.
        self._scrape_lock = asyncio.Lock()
        self.pre_scrape_hooks: list[Callable[[], None]] = []
        # First: see PreScrape.
        self.registry.register(PreScrape(self.pre_scrape_hooks))
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.account_on_histograms = account_on_histograms
        self.series_cache: dict[tuple[str, ...], RequestSeries] = {}
        self._durations: dict[tuple[str, ...], HotHistogram] = {}
        self._upstream_durations: dict[tuple[str, ...], HotHistogram] = {}
        self._traffic: dict[tuple[str, ...], Traffic] = {}
        self._add_request_series()
        self._add_limit_series()
        self._add_token_series()
        self._add_store_series()
        self._add_reload_series()
        build = self._gauge("build_info", "The version that is running; the value is always 1.", "version", "python")
        build.labels(__version__, platform.python_version()).set(1)

    def _add_request_series(self) -> None:
        by_operation = ("account", "region", "operation") if self.account_on_histograms else ("region", "operation")
        self._callback_collector(
            "requests_total",
            "Requests served, by kind and by source of the response (amazon, proxy; client: it left before).",
            ("account", "region", "operation", "method", "code", "token", "source"),
            # copy(), here and below: the scrape is on another thread, and a dict that grows while it is iterated raises
            # RuntimeError. dict.copy itself is one step under the GIL.
            lambda: ((labels, series.requests) for labels, series in self.series_cache.copy().items()),
        )
        self._callback_collector(
            "request_duration_seconds",
            "Time from the head of a request to the last byte of its response.",
            by_operation,
            lambda: self._durations.copy().items(),
            kind="histogram",
        )
        self._callback_collector(
            "upstream_duration_seconds",
            "Time from sending a call to Amazon to the head of its response.",
            by_operation,
            lambda: self._upstream_durations.copy().items(),
            kind="histogram",
        )
        self.in_flight = 0
        self._callback_collector(
            "requests_in_flight",
            "Requests that are being served now.",
            (),
            lambda: (((), self.in_flight),),
            kind="gauge",
        )
        self.caller_requests = self._gauge(
            "caller_requests_in_flight",
            "Requests served now, by caller; without one, by listener.",
            "caller",
        )
        self.account_requests = self._gauge(
            "account_requests_in_flight", "Requests sent to Amazon and not complete yet, by account.", "account"
        )
        self.client_connections = self._gauge("client_connections", "Client connections that are open now.", "listener")
        self.closed_connections = self._counter(
            "client_connections_closed_total",
            "Client connections closed because of bounds.connections (evicted: an idle one; refused: a new one).",
            *("listener", "reason"),
        )
        self.loop_lag = self._gauge(
            "event_loop_lag_seconds", "Longest delay of the event loop since the previous scrape."
        )
        self.redacted_tokens = self._counter(
            "tokens_masked_total", "Amazon's responses that contained the request's token, which was redacted."
        )
        self.document_urls = self._counter(
            "document_urls_total",
            "Presigned URLs in responses where documents are relayed, by result (relayed; or left unchanged: "
            "foreign_host, too_large, unreadable).",
            "result",
        )
        self.dropped_lines = self._counter(
            "log_lines_lost_total", "Log lines dropped because the target did not accept them.", "log"
        )
        self.dropped_spans = self._counter("trace_spans_lost_total", "Trace spans that the collector did not accept.")
        self._callback_collector(
            "request_body_bytes_total",
            "Bytes of request bodies sent to Amazon.",
            ("account", "region", "operation"),
            lambda: ((labels, traffic.sent) for labels, traffic in self._traffic.copy().items()),
        )
        self._callback_collector(
            "response_body_bytes_total",
            "Bytes of response bodies sent to clients.",
            ("account", "region", "operation"),
            lambda: ((labels, traffic.received) for labels, traffic in self._traffic.copy().items()),
        )
        self.errors = self._counter("errors_total", "Errors of the proxy's own, by code and fault.", "code", "fault")
        self.internal_errors = self._counter(
            "internal_errors_total",
            "Unhandled exceptions in the proxy, by type and place (module:line; `other` after 64 of them).",
            *("type", "place"),
        )
        self.truncated = self._counter(
            "answers_cut_off_total",
            "Responses cut off by closing the client's connection, because they could not be completed.",
        )
        self.circuit_open = self._gauge(
            "circuit_open",
            "1 while a region is down: only probes are sent to it.",
            "environment",
            "region",
        )
        self.retries = self._counter("upstream_retries_total", "Calls that were retried, by reason.", "reason")
        self.replaced_tokens = self._counter(
            "client_tokens_replaced_total", "Requests with an x-amz-access-token of their own, which was replaced."
        )

    async def export(self, encode: Callable[[CollectorRegistry], bytes]) -> bytes:
        """Return all series as `encode` writes them.

        It runs on a thread: with many accounts there are many series, and requests must not wait for them. One scrape
        at a time, because pre_scrape_hooks compute differences to the previous scrape and are not thread-safe.
        """
        async with self._scrape_lock:
            return await asyncio.to_thread(encode, self.registry)

    def series_of(self, *labels: str) -> RequestSeries:
        """Return the series of a request by the labels of `requests_total`, creating them for new labels."""
        found = self.series_cache.get(labels)
        if found is None:
            account, region, operation = labels[:3]
            by_operation = (account, region, operation) if self.account_on_histograms else (region, operation)
            found = self.series_cache[labels] = RequestSeries(
                self._durations.setdefault(by_operation, HotHistogram()),
                self._upstream_durations.setdefault(by_operation, HotHistogram()),
                self._traffic.setdefault((account, region, operation), Traffic()),
                labels,
            )
        return found

    def _add_limit_series(self) -> None:
        self.limit_wait = self._durations_of("limit_wait_seconds", "Time that a call waited for its usage plan.")
        # Replaced by the rate limiter; `dict` is an empty mapping until then.
        self.read_plans: Callable[[], Mapping[tuple[str, str, str], PlanGauges]] = dict
        plan_labels = ("account", "region", "operation")
        self._callback_collector(
            "limit_queue_length",
            "Calls that wait for a usage plan now.",
            plan_labels,
            lambda: ((labels, plan.waiting) for labels, plan in self.read_plans().items()),
            kind="gauge",
        )
        self._callback_collector(
            "usage_plan_tokens",
            "Calls that a usage plan allows at once now, by the proxy's estimate; account * is all accounts together.",
            plan_labels,
            lambda: ((labels, plan.tokens) for labels, plan in self.read_plans().items()),
            kind="gauge",
        )
        self.limit_refused = self._counter(
            "limit_refused_total", "Calls rejected: no usage plan capacity in time.", "account", "region", "operation"
        )
        self.throttled = self._counter(
            "upstream_throttled_total", "429 responses received from Amazon.", "account", "region", "operation"
        )
        self._callback_collector(
            "usage_plan_rate",
            "Calls per second that a usage plan allows: as published, as sent in a response header, or as estimated.",
            plan_labels,
            lambda: ((labels, plan.rate) for labels, plan in self.read_plans().items()),
            kind="gauge",
        )

    def _add_token_series(self) -> None:
        self.token_refreshes = self._counter(
            "token_refreshes_total",
            "Requests for a new token, by kind of token, result (ok, refused, failed) and reason.",
            *("kind", "account", "region", "result", "reason"),
        )
        self.token_refresh_duration = self._histogram(
            "token_refresh_duration_seconds", "Duration of a request for a new token.", "kind"
        )
        self.token_wait = self._durations_of("token_wait_seconds", "Time that a request waited for its token.")
        self.refused_elements = self._counter(
            "data_elements_refused_total",
            "Data elements for which Amazon refused a Restricted Data Token; they are left out for a while.",
            *("account", "region", "element"),
        )
        self.forbidden = self._counter(
            "forbidden_errors_total",
            "401 and 403 responses of Amazon's, by probable cause (hint).",
            *("account", "region", "operation", "hint"),
        )
        self.secret_age = self._gauge(
            "client_secret_age_seconds", "Age of the client secret, for applications with rotated_at.", "application"
        )
        self.secret_expiry = self._gauge(
            "client_secret_expiry_timestamp_seconds",
            "When the client secret expires (180 days after rotated_at), as Unix time.",
            "application",
        )
        self.token_expiry = self._gauge(
            "token_expiry_timestamp_seconds", "Expiry of the token in use, as Unix time.", "account", "region", "kind"
        )

    def _add_store_series(self) -> None:
        self.store_up = self._gauge(
            "store_up", "1 while the store that replicas share is available, 0 while each replica works alone."
        )
        # Before the first command, nothing is known to be wrong: no alert at each start.
        self.store_up.set(1)
        self.store_failures = self._counter(
            "store_failures_total",
            "Failed commands to Redis, by reason (timeout, connection, refused, full, read_only, nonsense: an invalid "
            "reply, late: the proxy was too busy to read the reply in time).",
            "reason",
        )
        self.store_ignored = self._counter(
            "store_values_ignored_total",
            "Values in Redis that were ignored (not_ours: encrypted with another key or for another entry; too_large).",
            "reason",
        )

    def _add_reload_series(self) -> None:
        self.reloads = self._counter(
            "config_reloads_total",
            "Reloads of the configuration, by result (ok, unchanged, failed).",
            "result",
        )
        for result in ("ok", "unchanged", "failed"):
            # From the start, with 0: increase() does not see the first value of a series that appears with it.
            self.reloads.labels(result)
        self.last_reload_success = self._gauge(
            "config_last_reload_success_timestamp_seconds", "Time of the last successful reload, as Unix time."
        )
        self.last_reload_successful = self._gauge(
            "config_last_reload_successful",
            "1 if the last reload succeeded; 0 if it was rejected and the previous configuration stays in force.",
        )
        # The start itself was a successful load.
        self.last_reload_successful.set(1)

    def _callback_collector(
        self,
        name: str,
        help_text: str,
        labels: Sequence[str],
        read: Callable[[], Iterable[tuple[Sequence[str], float | HotHistogram]]],
        *,
        kind: Kind = "counter",
    ) -> None:
        self.registry.register(CallbackCollector(kind, f"spapi_proxy_{name}", help_text, labels, read))

    def _durations_of(self, name: str, help_text: str) -> HotHistogram:
        """Return a histogram without labels."""
        durations = HotHistogram()
        self._callback_collector(name, help_text, (), lambda: (((), durations),), kind="histogram")
        return durations

    def _counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return Counter(f"spapi_proxy_{name}", help_text, labels, registry=self.registry)

    def _gauge(self, name: str, help_text: str, *labels: str) -> Gauge:
        return Gauge(f"spapi_proxy_{name}", help_text, labels, registry=self.registry)

    def _histogram(self, name: str, help_text: str, *labels: str) -> Histogram:
        return Histogram(f"spapi_proxy_{name}", help_text, labels, buckets=DURATION_BUCKETS, registry=self.registry)
