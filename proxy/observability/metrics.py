"""Which Prometheus series does the proxy export? All of them are in this list.

Names follow Prometheus' own practice: one prefix, base units, `_total` for counters. Labels are bounded: accounts and
applications come from the configuration, operations from the table (or are `unknown`, or `relayDocument`); no path, id
or header of a caller ever becomes one.
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
from proxy.observability.request_history import RequestHistory

# The `_created` series double the number of series and nobody asks them anything.
_disable_created_metrics()  # type: ignore[no-untyped-call]  # not annotated there


@dataclass(slots=True)
class Traffic:
    """Body bytes of one account, region and operation."""

    sent: int = 0
    received: int = 0


@dataclass(slots=True)
class RequestSeries:
    """The series that one finished request counts in; found once for each combination of labels."""

    duration: HotHistogram
    upstream_duration: HotHistogram
    traffic: Traffic
    labels: tuple[str, ...]
    requests: int = 0


class PlanGauges(NamedTuple):
    """What is shown of a usage plan: calls per second, calls there is room for, calls that wait."""

    rate: float
    tokens: float
    waiting: int


class PreScrape(Collector):
    """Not a series: brings gauges up to date when somebody wants to see them; the first that the registry asks.

    That is on a thread of its own.
    """

    def __init__(self, updates: list[Callable[[], None]]) -> None:
        self._updates = updates

    def describe(self) -> Iterable[Metric]:
        """Say what there will be, without an update."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Make the updates."""
        for update in self._updates:
            update()
        return ()


class Metrics:
    """The series of one proxy, in a registry of their own."""

    def __init__(self, *, account_on_histograms: bool = False, remembers: bool = True) -> None:
        self.history = RequestHistory() if remembers else None  # the requests that were answered last
        self.registry = CollectorRegistry()
        self.scrape_lock = asyncio.Lock()  # who exports: what is brought up to date for it is not made for two at once
        self.pre_scrape_hooks: list[Callable[[], None]] = []
        self.registry.register(PreScrape(self.pre_scrape_hooks))
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.account_on_histograms = account_on_histograms
        self.series_cache: dict[tuple[str, ...], RequestSeries] = {}
        self._durations: dict[tuple[str, ...], HotHistogram] = {}
        self._upstream_durations: dict[tuple[str, ...], HotHistogram] = {}
        self._traffic: dict[tuple[str, ...], Traffic] = {}
        self._requests()
        self._waiting()
        self._tokens()
        self._store()
        self._reloads()
        build = self._gauge("build_info", "Which version is running; always 1.", "version", "python")
        build.labels(__version__, platform.python_version()).set(1)

    def _requests(self) -> None:
        by_operation = ("account", "region", "operation") if self.account_on_histograms else ("region", "operation")
        self._callback_collector(
            "requests_total",
            "Requests answered, by what they were and who answered (source: amazon or proxy).",
            ("account", "region", "operation", "method", "code", "token", "source"),
            lambda: ((labels, series.requests) for labels, series in self.series_cache.copy().items()),
        )
        self._callback_collector(
            "request_duration_seconds",
            "From a request's head to the last byte of its answer.",
            by_operation,
            lambda: self._durations.copy().items(),
            kind="histogram",
        )
        self._callback_collector(
            "upstream_duration_seconds",
            "From sending to Amazon to the head of its answer.",
            by_operation,
            lambda: self._upstream_durations.copy().items(),
            kind="histogram",
        )
        self.in_flight = 0
        self.requests_in_flight = self._gauge("requests_in_flight", "Requests that are being served now.")
        self.pre_scrape_hooks.append(lambda: self.requests_in_flight.set(self.in_flight))
        self.caller_requests = self._gauge(
            "caller_requests_in_flight", "Requests of a caller, or of a listener's anonymous, now.", "caller"
        )
        self.account_requests = self._gauge(
            "account_requests_in_flight", "Requests of an account that are at Amazon now.", "account"
        )
        self.client_connections = self._gauge(
            "client_connections", "Connections of apps that are open now.", "listener"
        )
        self.closed_connections = self._counter(
            "client_connections_closed_total",
            "Connections of apps that were closed for want of room (evicted: an idle one; refused: a new one).",
            *("listener", "reason"),
        )
        self.loop_lag = self._gauge(
            "event_loop_lag_seconds", "How late the event loop was at most, since the last time this was asked."
        )
        self.masked_tokens = self._counter(
            "tokens_masked_total", "Answers of Amazon's that repeated the token of their request, which was masked."
        )
        self.document_urls = self._counter(
            "document_urls_total",
            "Presigned URLs in answers, where documents are relayed (relayed; left as they are: foreign_host, "
            "too_large, unreadable).",
            "result",
        )
        self.dropped_lines = self._counter(
            "log_lines_lost_total", "Lines that were not written because nobody took them.", "log"
        )
        self.dropped_spans = self._counter("trace_spans_lost_total", "Spans of traces that the collector did not take.")
        self._callback_collector(
            "request_body_bytes_total",
            "Body bytes sent to Amazon.",
            ("account", "region", "operation"),
            lambda: ((where, traffic.sent) for where, traffic in self._traffic.copy().items()),
        )
        self._callback_collector(
            "response_body_bytes_total",
            "Body bytes sent to apps.",
            ("account", "region", "operation"),
            lambda: ((where, traffic.received) for where, traffic in self._traffic.copy().items()),
        )
        self.errors = self._counter(
            "errors_total", "Errors that the proxy answered itself, by code and fault.", "code", "fault"
        )
        self.internal_errors = self._counter(
            "internal_errors_total",
            "Exceptions in the proxy that nothing handles, by type and place (module:line; `other` past 64 of them).",
            *("type", "place"),
        )
        self.truncated = self._counter(
            "answers_cut_off_total",
            "Answers whose connection to the app was broken because they could not be completed.",
        )
        self.circuit_open = self._gauge(
            "circuit_open", "1 where a region fails throughout, and calls to it are not sent.", "environment", "region"
        )
        self.retries = self._counter("upstream_retries_total", "Calls sent to Amazon again, by reason.", "reason")
        self.replaced_tokens = self._counter(
            "client_tokens_replaced_total", "Requests that brought an x-amz-access-token of their own."
        )

    def series_of(self, *labels: str) -> RequestSeries:
        """Return the series of a request by the labels of `requests_total`, looked up once for each combination."""
        found = self.series_cache.get(labels)
        if found is None:
            account, region, operation = where = labels[:3]
            by_operation = where if self.account_on_histograms else (region, operation)
            found = self.series_cache[labels] = RequestSeries(
                self._durations.setdefault(by_operation, HotHistogram()),
                self._upstream_durations.setdefault(by_operation, HotHistogram()),
                self._traffic.setdefault((account, region, operation), Traffic()),
                labels,
            )
        return found

    def _waiting(self) -> None:
        self.limit_wait = self._durations_of("limit_wait_seconds", "Time a call waited for its place in a usage plan.")
        self.read_plans: Callable[[], Mapping[tuple[str, str, str], PlanGauges]] = dict
        of_plans = ("account", "region", "operation")
        self._callback_collector(
            "limit_queue_length",
            "Calls that wait for a place in a usage plan now.",
            of_plans,
            lambda: ((where, plan.waiting) for where, plan in self.read_plans().items()),
            kind="gauge",
        )
        self._callback_collector(
            "usage_plan_tokens",
            "Calls that a usage plan has room for at once, by the proxy's estimate; account * is all of them together.",
            of_plans,
            lambda: ((where, plan.tokens) for where, plan in self.read_plans().items()),
            kind="gauge",
        )
        self.limit_refused = self._counter(
            "limit_refused_total", "Calls refused because no place came in time.", "account", "region", "operation"
        )
        self.throttled = self._counter(
            "upstream_throttled_total", "429 answers received from Amazon.", "account", "region", "operation"
        )
        self._callback_collector(
            "usage_plan_rate",
            "Calls per second that a usage plan allows, as published, announced or learnt.",
            of_plans,
            lambda: ((where, plan.rate) for where, plan in self.read_plans().items()),
            kind="gauge",
        )

    def _tokens(self) -> None:
        self.token_refreshes = self._counter(
            "token_refreshes_total",
            "Token exchanges, by result (ok, refused, failed) and reason.",
            *("kind", "account", "region", "result", "reason"),
        )
        self.token_refresh_duration = self._histogram(
            "token_refresh_duration_seconds", "How long a token exchange took.", "kind"
        )
        self.token_wait = self._durations_of("token_wait_seconds", "Time a request waited for its token.")
        self.refused_elements = self._counter(
            "data_elements_refused_total",
            "Data elements that Amazon refused a Restricted Data Token for, and that are left out for a while.",
            *("account", "region", "element"),
        )
        self.forbidden = self._counter(
            "forbidden_errors_total",
            "401 and 403 answers of Amazon's, by what is probably behind them.",
            *("account", "region", "operation", "hint"),
        )
        self.secret_age = self._gauge(
            "client_secret_age_seconds", "Since the client secret was made, where rotated_at says when.", "application"
        )
        self.secret_expiry = self._gauge(
            "client_secret_expiry_timestamp_seconds",
            "When Amazon's 180 days for a client secret are over, where rotated_at says when it was made.",
            "application",
        )
        self.token_expiry = self._gauge(
            "token_expiry_timestamp_seconds", "When the token in use expires.", "account", "region", "kind"
        )

    def _store(self) -> None:
        self.store_up = self._gauge(
            "store_up", "1 where what replicas share can be had; 0 while each process is on its own."
        )
        self.store_up.set(1)
        self.store_failures = self._counter(
            "store_failures_total",
            "Questions that Redis did not answer well (timeout, connection, refused, full, read_only, nonsense), or "
            "whose answer the proxy was too busy to see in time (late).",
            "reason",
        )
        self.store_ignored = self._counter(
            "store_values_ignored_total",
            "Values in Redis that were ignored (not_ours: of another key or place; too_large).",
            "reason",
        )

    def _reloads(self) -> None:
        self.reloads = self._counter(
            "config_reloads_total",
            "Times a new configuration was looked at (result: ok, unchanged or failed).",
            "result",
        )
        for result in ("ok", "unchanged", "failed"):
            self.reloads.labels(result)
        self.last_reload_success = self._gauge(
            "config_last_reload_success_timestamp_seconds", "When the configuration was last read and found good."
        )
        self.last_reload_successful = self._gauge(
            "config_last_reload_successful",
            "0 where the newest configuration was refused, and the one before it serves on.",
        )
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
