"""What is there to see of a proxy that runs? Gathered once, for the status page and for `/status`.

Nothing here is secret and nothing comes from a request: names are those of the configuration and the operation table.
Most of it grows with the number of accounts, so that it is gathered on a thread of its own.
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
from proxy.request.token_selection import access_token_key_of
from proxy.request.tokens.provider import TokenProvider, TokenStatus

RECENT_WINDOW = 300.0  # seconds: what is older says nothing about now
MAX_ROWS = 200  # accounts and regions that are shown
MAX_PLANS = 50
MAX_SHOWN = 50  # requests on the page

TokenState = Literal["failed", "failing", "fetching", "good", "unused"]
# In the order in which they are shown: what needs somebody first.
TOKEN_STATES: dict[TokenState, str] = {
    "failed": "no token",
    "failing": "token good, its renewal fails",
    "fetching": "being fetched",
    "good": "good",
    "unused": "not asked for yet",
}
_ORDER = {state: place for place, state in enumerate(TOKEN_STATES)}

MEANINGS = {error.code: (error.__doc__ or "").splitlines()[0] for error in all_errors()}
AMAZON_429 = "429"


class TokenRow(NamedTuple):
    """The ordinary token of one account and region, or an application's own (no account); seconds from now."""

    account: str
    application: str
    environment: str
    region: str
    state: TokenState
    left: float | None = None
    age: float | None = None
    error: str = ""
    reason: str = ""
    do: str = ""
    failures: int = 0
    pause: float = 0.0
    restricted: int = 0  # Restricted Data Tokens that are held beside it
    restricted_failed: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return what `/status` says of it."""
        last = "failed" if self.error else "ok" if self.age is not None else None
        return {
            "account": self.account or None,
            "application": self.application,
            "environment": self.environment,
            "region": self.region,
            "state": self.state,
            "seconds_left": _rounded(self.left),
            "last_exchange": last,
            "seconds_since_good_exchange": _rounded(self.age),
            "error": self.error or None,
            "reason": self.reason or None,
            "do": self.do or None,
            "failures_in_a_row": self.failures,
            "next_try_in_seconds": _rounded(self.pause) if self.error else None,
            "restricted_data_tokens": self.restricted,
        }


class PlanRow(NamedTuple):
    """A usage plan that is short, or was; `refused` and `throttled` are counted since the start."""

    account: str
    region: str
    operation: str
    rate: float
    tokens: float
    waiting: int
    refused: int
    throttled: int


class ErrorRow(NamedTuple):
    """What went wrong: how often since the start, how often lately among the requests that are remembered."""

    name: str
    times: int
    recent: int
    meaning: str

    def as_json(self) -> dict[str, object]:
        """Return the row as `/status` shows it."""
        return {"name": self.name, "times": self.times, "lately": self.recent, "meaning": self.meaning}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All there is to see; `now` is the monotonic clock of the requests, `wall` the same moment in Unix time."""

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
    store_is_up: bool | None  # None: this process shares nothing
    store_failures: Mapping[str, int]
    regions_down: Sequence[tuple[str, str]]
    secrets_left: Mapping[str, float]  # seconds until a client secret of an application is past its life
    now: float
    wall: float

    @property
    def recent(self) -> list[RequestRecord]:
        """The requests of the last LATELY seconds that are remembered."""
        return [request for request in self.requests if self.now - request.ended <= RECENT_WINDOW]

    def for_account(self, account: str) -> "Snapshot":
        """Return what is to be seen of one account; the rest stays as it is."""
        return replace(
            self,
            tokens=[row for row in self.tokens if row.account == account],
            plans=[row for row in self.plans if row.account in {account, "*"}],
            requests=[request for request in self.requests if request.account == account],
        )

    def moment(self, monotonic: float) -> str:
        """Return a moment of the monotonic clock as ISO 8601 has it, in UTC."""
        return iso_timestamp(self.wall - (self.now - monotonic))

    def as_json(self) -> dict[str, Any]:
        """Return what `/status` says, bounded as the page is."""
        states = Counter(row.state for row in self.tokens)
        return {
            "version": self.version,
            "state": self.state,
            "waiting_for": self.waiting_for,
            "accounts": self.accounts,
            "requests_in_flight": self.in_flight,
            "configuration": self.configuration,
            "tokens_by_state": {state: states[state] for state in TOKEN_STATES},
            "tokens": [row.as_json() for row in self.tokens[:MAX_ROWS]],
            "usage_plans": [row._asdict() for row in self.plans[:MAX_PLANS]],
            "errors": [row.as_json() for row in self.errors],
            "store": None
            if self.store_is_up is None
            else {"is_up": self.store_is_up, "failures": dict(self.store_failures)},
            "regions_down": [list(where) for where in self.regions_down],
            "samples": [
                {
                    "at": self.moment(sample.at),
                    "requests_per_second": round(sample.requests / sample.seconds, 3) if sample.seconds else 0.0,
                    "median_seconds": _rounded(sample.median, 4),
                    "p95_seconds": _rounded(sample.p95, 4),
                    "throttled_per_second": round(sample.throttled / sample.seconds, 3) if sample.seconds else 0.0,
                }
                for sample in self.samples
            ],
        }


def iso_timestamp(epoch: float) -> str:
    """Return seconds of the Unix epoch as ISO 8601 has them, in UTC."""
    return datetime.fromtimestamp(epoch, UTC).isoformat(timespec="milliseconds")


def request_as_json(request: RequestRecord, moment: str) -> dict[str, Any]:
    """Return what `/requests` says of one request."""
    account, region, operation, method, code, token, source = request.labels
    return {
        "number": request.number,
        "at": moment,
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
        "upstream": _rounded(request.upstream, 4),
        "attempts": request.attempts,
        "error": request.error or None,
        "hint": request.hint or None,
    }


def _rounded(seconds: float | None, digits: int = 1) -> float | None:
    return None if seconds is None else round(seconds, digits)


# Tokens.


def token_rows(config: Config, tokens: TokenProvider) -> list[TokenRow]:
    """Return how the token of every account and region stands, those first that need somebody."""
    status, restricted, failed = dict[Any, TokenStatus](), Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    grantless: dict[tuple[str, str], TokenStatus] = {}
    for one in tokens.statuses():
        token_key = one.token_key
        if token_key.kind == "lwa":
            status[token_key] = one
        elif token_key.kind == "grantless":
            key = (token_key.application, token_key.region)
            grantless[key] = max(one, grantless.get(key, one), key=lambda each: each.error is not None)
        else:
            restricted[token_key.account, token_key.region] += one.left is not None
            failed[token_key.account, token_key.region] += one.error is not None
    rows = []
    for name, account in config.accounts.items():
        application, _ = config.application_of(account)
        environment = config.environment_of(account)
        for place in account.refresh_tokens:
            row = _row(
                TokenRow(name, application, environment, place, "unused"),
                status.get(access_token_key_of(application, name, environment, place)),
            )
            where = (name, place)
            if restricted[where] or failed[where]:
                row = row._replace(restricted=restricted[where], restricted_failed=failed[where])
            rows.append(row)
    for (application, region), one in grantless.items():
        rows.append(_row(TokenRow("", application, one.token_key.environment, region, "unused"), one))
    rows.sort(key=lambda row: (_ORDER[row.state], -row.restricted_failed))
    return rows


def _row(row: TokenRow, status: TokenStatus | None) -> TokenRow:
    if status is None:
        return row
    error = status.error
    state: TokenState = "good" if status.left is not None else "fetching"
    if error is not None:
        state = "failing" if status.left is not None else "failed"
    row = row._replace(state=state, left=status.left, age=status.age)
    if error is None:
        return row
    # Not its message: that may name what Amazon said, and its request id.
    do = "The proxy tries again by itself." if isinstance(error, TokenUnavailable) else error.hint
    return row._replace(error=error.code, reason=error.reason, do=do, failures=status.failures, pause=status.pause)


# Usage plans, errors.


def _counts(series: CounterSeries | GaugeSeries) -> Iterator[tuple[Mapping[str, str], float]]:
    metrics: Iterable[Metric] = series.collect()
    for metric in metrics:
        for sample in metric.samples:
            yield sample.labels, sample.value


def plan_rows(metrics: Metrics, lately: Iterable[RequestRecord]) -> list[PlanRow]:
    """Return the usage plans that are short now, or were: the shortest first."""
    refused, throttled = (
        {(labels["account"], labels["region"], labels["operation"]): round(count) for labels, count in _counts(series)}
        for series in (metrics.limit_refused, metrics.throttled)
    )
    short_lately = Counter(request.labels[:3] for request in lately if request.status == 429)
    rows = [
        PlanRow(*where, plan.rate, round(plan.tokens, 2), plan.waiting, refused.get(where, 0), throttled.get(where, 0))
        for where, plan in metrics.read_plans().items()
        if plan.waiting or plan.tokens < 1 or where in refused or where in throttled
    ]
    rows.sort(key=lambda row: (-row.waiting, -short_lately[row[:3]], row.tokens >= 1, -row.refused - row.throttled))
    return rows


def error_rows(metrics: Metrics, lately: Iterable[RequestRecord]) -> list[ErrorRow]:
    """Return what went wrong since the start, most frequent first: the proxy's own errors, and Amazon's refusals."""
    seen = Counter(request.hint or request.error for request in lately)
    rows = [
        ErrorRow(labels["code"], round(count), seen[labels["code"]], MEANINGS.get(labels["code"], ""))
        for labels, count in _counts(metrics.errors)
    ]
    hints: Counter[str] = Counter()
    for labels, count in _counts(metrics.forbidden):
        hints[labels["hint"]] += round(count)
    meanings: Mapping[str, str] = {str(hint): text for hint, text in HINTS.items()}
    rows += [ErrorRow(hint, count, seen[hint], meanings.get(hint, "")) for hint, count in hints.items()]
    throttled = round(sum(count for _, count in _counts(metrics.throttled)))
    if throttled:
        now = sum(request.status == 429 and request.labels[6] == "amazon" for request in lately)
        rows.append(ErrorRow(AMAZON_429, throttled, now, "Amazon had no room for it in a usage plan."))
    rows.sort(key=lambda row: (-row.recent, -row.times))
    return rows


def regions_down(metrics: Metrics) -> list[tuple[str, str]]:
    """Return the environments and regions that calls are not sent to, because they fail throughout."""
    return [(labels["environment"], labels["region"]) for labels, value in _counts(metrics.circuit_open) if value]


def store_failures(metrics: Metrics) -> dict[str, int]:
    """Return how often Redis did not answer well, by reason."""
    return {labels["reason"]: round(count) for labels, count in _counts(metrics.store_failures) if count}


def store_is_up(metrics: Metrics) -> bool:
    """Return whether what replicas share can be had."""
    return any(value for _, value in _counts(metrics.store_up))


def secrets_left(metrics: Metrics, wall: float) -> dict[str, float]:
    """Return the seconds until each client secret is past its life, where the configuration says when it began."""
    return {labels["application"]: until - wall for labels, until in _counts(metrics.secret_expiry)}
