"""The state of a running proxy at one moment, for the status page and `/status`.

It holds no secret and nothing that a client sent: all names come from the configuration and the operation table. Most
of it grows with the number of accounts, so the functions below run on a thread and not on the event loop.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

from prometheus_client import Counter as CounterSeries
from prometheus_client import Gauge as GaugeSeries
from prometheus_client import Metric

from proxy.config import Config
from proxy.errors import TokenUnavailable, all_errors
from proxy.observability.metrics import Metrics
from proxy.observability.request_history import RequestRecord, Sample
from proxy.request.forbidden_hints import HINTS
from proxy.request.token_selection import TokenKey, access_token_key_of
from proxy.request.tokens.provider import TokenProvider, TokenStatus

RECENT_WINDOW = 300.0  # seconds; older requests say nothing about the present
# Bounds of the page and of `/status`, so that neither grows with the number of accounts.
MAX_TOKEN_ROWS = 200
MAX_PLAN_ROWS = 50
MAX_REQUEST_ROWS = 50

TokenState = Literal["failed", "failing", "fetching", "good", "unused"]
# The states, which are part of `/status`, and their texts on the page; in the order of the rows: problems first.
TOKEN_STATES: dict[TokenState, str] = {
    "failed": "no token",
    "failing": "valid, refresh fails",
    "fetching": "being fetched",
    "good": "valid",
    "unused": "not requested yet",
}
_STATE_ORDER = {state: index for index, state in enumerate(TOKEN_STATES)}

MEANINGS = {error.code: (error.__doc__ or "").splitlines()[0] for error in all_errors()}
AMAZON_429 = "429"


class TokenRow(NamedTuple):
    """The access token of one account and region, or a grantless one of an application (`account` is empty).

    Durations are in seconds. Restricted Data Tokens of the account and region are only counted.
    """

    account: str
    application: str
    environment: str
    region: str
    state: TokenState
    expires_in: float | None = None  # None: there is no valid token
    age: float | None = None  # of the valid token, since it was requested
    error: str = ""  # code of the last refresh's error, empty if it succeeded
    reason: str = ""  # OAuth error code, or a word such as `connection`
    remedy: str = ""
    failures: int = 0  # in a row
    retry_in: float = 0.0
    restricted: int = 0  # valid Restricted Data Tokens
    restricted_failed: int = 0  # those whose last refresh failed

    def as_json(self) -> dict[str, Any]:
        """Return the row as `/status` shows it; the keys are a contract."""
        last = "failed" if self.error else "ok" if self.age is not None else None
        return {
            "account": self.account or None,
            "application": self.application,
            "environment": self.environment,
            "region": self.region,
            "state": self.state,
            "seconds_left": _rounded(self.expires_in),
            "last_exchange": last,
            "seconds_since_good_exchange": _rounded(self.age),
            "error": self.error or None,
            "reason": self.reason or None,
            "do": self.remedy or None,
            "failures_in_a_row": self.failures,
            "next_try_in_seconds": _rounded(self.retry_in) if self.error else None,
            "restricted_data_tokens": self.restricted,
        }


class PlanRow(NamedTuple):
    """A usage plan that is exhausted or has throttled calls since the start; its fields are keys of `/status`.

    `rate` is in calls per second and `tokens` the calls it allows at once now. Since the start, `refused` counts the
    calls that the proxy rejected for it, and `throttled` Amazon's 429 responses.
    """

    account: str
    region: str
    operation: str
    rate: float
    tokens: float
    waiting: int
    refused: int
    throttled: int


class ErrorRow(NamedTuple):
    """One kind of failure: an error code of the proxy, a hint, or Amazon's 429."""

    name: str
    total: int  # since the start
    recent: int  # among the requests in the history that ended within RECENT_WINDOW
    meaning: str

    def as_json(self) -> dict[str, object]:
        """Return the row as `/status` shows it; the keys are a contract."""
        return {"name": self.name, "times": self.total, "lately": self.recent, "meaning": self.meaning}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The whole state; `now` is its moment on the monotonic clock of the requests, `wall` the same in Unix time."""

    version: str
    state: str
    waiting_for: str
    accounts: int
    in_flight: int
    configuration: Mapping[str, Any]
    tokens: Sequence[TokenRow]
    plans: Sequence[PlanRow]
    errors: Sequence[ErrorRow]
    requests: Sequence[RequestRecord]
    samples: Sequence[Sample]
    store_is_up: bool | None  # None: no shared store is configured
    store_failures: Mapping[str, int]
    regions_down: Sequence[tuple[str, str]]  # environment and region
    secret_lifetimes: Mapping[str, float]  # seconds until the client secret of an application expires
    now: float
    wall: float

    @property
    def recent(self) -> list[RequestRecord]:
        """The requests in the history that ended within RECENT_WINDOW."""
        return [request for request in self.requests if self.now - request.ended <= RECENT_WINDOW]

    def for_account(self, account: str) -> "Snapshot":
        """Return the snapshot with the tokens, usage plans and requests of one account alone."""
        return replace(
            self,
            tokens=[row for row in self.tokens if row.account == account],
            plans=[row for row in self.plans if row.account in {account, "*"}],
            requests=[request for request in self.requests if request.account == account],
        )

    def timestamp(self, monotonic: float) -> str:
        """Return a moment of the monotonic clock in ISO 8601 format, in UTC."""
        return iso_timestamp(self.wall - (self.now - monotonic))

    def clock(self, monotonic: float) -> str:
        """Return the time of day of a moment of the monotonic clock: `HH:MM:SS`, in UTC."""
        return self.timestamp(monotonic)[11:19]

    def as_json(self) -> dict[str, Any]:
        """Return the body of `/status` without the diagnosis, bounded as the page is; the keys are a contract."""
        states = Counter(row.state for row in self.tokens)
        return {
            "version": self.version,
            "state": self.state,
            "waiting_for": self.waiting_for,
            "accounts": self.accounts,
            "requests_in_flight": self.in_flight,
            "configuration": self.configuration,
            "tokens_by_state": {state: states[state] for state in TOKEN_STATES},
            "tokens": [row.as_json() for row in self.tokens[:MAX_TOKEN_ROWS]],
            "usage_plans": [row._asdict() for row in self.plans[:MAX_PLAN_ROWS]],
            "errors": [row.as_json() for row in self.errors],
            "store": None
            if self.store_is_up is None
            else {"is_up": self.store_is_up, "failures": dict(self.store_failures)},
            "regions_down": [list(pair) for pair in self.regions_down],
            "samples": [
                {
                    "at": self.timestamp(sample.at),
                    "requests_per_second": round(sample.requests / sample.seconds, 3) if sample.seconds else 0.0,
                    "median_seconds": _rounded(sample.median, 4),
                    "p95_seconds": _rounded(sample.p95, 4),
                    "throttled_per_second": round(sample.throttled / sample.seconds, 3) if sample.seconds else 0.0,
                }
                for sample in self.samples
            ],
        }


def iso_timestamp(epoch: float) -> str:
    """Return a Unix time in ISO 8601 format, in UTC."""
    return datetime.fromtimestamp(epoch, UTC).isoformat(timespec="milliseconds")


def request_as_json(request: RequestRecord, ended_at: str) -> dict[str, Any]:
    """Return one request as `/requests` shows it; the keys are a contract."""
    account, region, operation, method, code, token, source = request.labels
    return {
        "number": request.number,
        "at": ended_at,
        "account": account,
        "region": region,
        "operation": operation,
        "method": method,
        "status": int(code),
        "source": source,
        "token": token,
        "caller": request.caller or None,
        "duration": round(request.duration, 4),
        "wait": round(request.rate_limit_wait, 4),
        "token_wait": round(request.token_wait, 4),
        "upstream": _rounded(request.upstream_duration, 4),
        "attempts": request.attempts,
        "error": request.error or None,
        "hint": request.hint or None,
    }


def _rounded(seconds: float | None, digits: int = 1) -> float | None:
    return None if seconds is None else round(seconds, digits)


# Tokens.


def token_rows(config: Config, tokens: TokenProvider) -> list[TokenRow]:
    """Return the tokens of every account and region, and grantless ones in use; those with problems first."""
    access_tokens: dict[TokenKey, TokenStatus] = {}
    grantless: dict[tuple[str, str], TokenStatus] = {}
    restricted, restricted_failed = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for status in tokens.statuses():
        token_key = status.token_key
        if token_key.kind == "lwa":
            access_tokens[token_key] = status
        elif token_key.kind == "grantless":
            # An application has a grantless token for each scope; the row shows one that failed, if there is one.
            owner = (token_key.application, token_key.region)
            grantless[owner] = max(status, grantless.get(owner, status), key=lambda each: each.error is not None)
        else:
            restricted[token_key.account, token_key.region] += status.left is not None
            restricted_failed[token_key.account, token_key.region] += status.error is not None
    rows = []
    for name, account in config.accounts.items():
        application, _ = config.application_of(account)
        environment = config.environment_of(account)
        for region in account.refresh_tokens:
            row = _with_status(
                TokenRow(name, application, environment, region, "unused"),
                access_tokens.get(access_token_key_of(application, name, environment, region)),
            )
            key = (name, region)
            if restricted[key] or restricted_failed[key]:
                row = row._replace(restricted=restricted[key], restricted_failed=restricted_failed[key])
            rows.append(row)
    for (application, _), status in grantless.items():
        token_key = status.token_key
        row = TokenRow("", application, token_key.environment, token_key.region, "unused")
        rows.append(_with_status(row, status))
    rows.sort(key=lambda row: (_STATE_ORDER[row.state], -row.restricted_failed))
    return rows


def _with_status(row: TokenRow, status: TokenStatus | None) -> TokenRow:
    if status is None:
        return row
    error = status.error
    state: TokenState = "good" if status.left is not None else "fetching"
    if error is not None:
        state = "failing" if status.left is not None else "failed"
    row = row._replace(state=state, expires_in=status.left, age=status.age)
    if error is None:
        return row
    # Not `error.message`: it may quote Login with Amazon, including its request id.
    remedy = "The proxy keeps retrying." if isinstance(error, TokenUnavailable) else error.hint
    return row._replace(
        error=error.code, reason=error.reason, remedy=remedy, failures=status.failures, retry_in=status.pause
    )


# Usage plans, errors.


def _samples(series: CounterSeries | GaugeSeries) -> Iterator[tuple[Mapping[str, str], float]]:
    """Yield the labels and the value of each sample of a series."""
    metrics: Iterable[Metric] = series.collect()
    for metric in metrics:
        for sample in metric.samples:
            yield sample.labels, sample.value


def plan_rows(metrics: Metrics, recent: Iterable[RequestRecord]) -> list[PlanRow]:
    """Return the usage plans that are exhausted or have throttled calls since the start, the busiest first."""
    refused, throttled = (
        {(labels["account"], labels["region"], labels["operation"]): round(count) for labels, count in _samples(series)}
        for series in (metrics.limit_refused, metrics.throttled)
    )
    recent_429 = Counter(request.labels[:3] for request in recent if request.status == 429)
    rows = [
        PlanRow(*key, plan.rate, round(plan.tokens, 2), plan.waiting, refused.get(key, 0), throttled.get(key, 0))
        for key, plan in metrics.read_plans().items()
        if plan.waiting or plan.tokens < 1 or key in refused or key in throttled
    ]
    rows.sort(key=lambda row: (-row.waiting, -recent_429[row[:3]], row.tokens >= 1, -row.refused - row.throttled))
    return rows


def error_rows(metrics: Metrics, recent: Sequence[RequestRecord]) -> list[ErrorRow]:
    """Return the failures since the start, those that are frequent recently first.

    These are the proxy's own errors, Amazon's 401 and 403 responses by hint, and its 429 responses.
    """
    recent_failures = Counter(request.hint or request.error for request in recent)
    rows = [
        ErrorRow(labels["code"], round(count), recent_failures[labels["code"]], MEANINGS.get(labels["code"], ""))
        for labels, count in _samples(metrics.errors)
    ]
    hints: Counter[str] = Counter()
    for labels, count in _samples(metrics.forbidden):
        hints[labels["hint"]] += round(count)
    meanings: Mapping[str, str] = {str(hint): text for hint, text in HINTS.items()}
    rows += [ErrorRow(hint, count, recent_failures[hint], meanings.get(hint, "")) for hint, count in hints.items()]
    throttled = round(sum(count for _, count in _samples(metrics.throttled)))
    if throttled:
        recent_429 = sum(request.status == 429 and request.source == "amazon" for request in recent)
        rows.append(ErrorRow(AMAZON_429, throttled, recent_429, "Amazon's usage plan was exhausted."))
    rows.sort(key=lambda row: (-row.recent, -row.total))
    return rows


def regions_down(metrics: Metrics) -> list[tuple[str, str]]:
    """Return the environments and regions whose circuit is open: their calls keep failing and are not sent."""
    return [(labels["environment"], labels["region"]) for labels, value in _samples(metrics.circuit_open) if value]


def store_failures(metrics: Metrics) -> dict[str, int]:
    """Return the failed commands to Redis, by reason."""
    return {labels["reason"]: round(count) for labels, count in _samples(metrics.store_failures) if count}


def store_is_up(metrics: Metrics) -> bool:
    """Return whether the store that replicas share is available."""
    return any(value for _, value in _samples(metrics.store_up))


def secret_lifetimes(metrics: Metrics, wall: float) -> dict[str, float]:
    """Return the seconds until each client secret expires, for the applications that have `rotated_at`."""
    return {labels["application"]: expiry - wall for labels, expiry in _samples(metrics.secret_expiry)}
