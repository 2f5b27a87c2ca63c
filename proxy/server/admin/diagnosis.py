"""The diagnosis on the status page and in `/status`: whether the proxy works, the cause if not, and the remedy.

It rests on what happened recently: the result of each token refresh, the outcome of the last requests, the regions that
are down, and whether the newest configuration was valid. The most severe issue becomes the summary, the others follow.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from proxy.errors import ClientError, ProxyError, all_errors
from proxy.observability.request_history import RequestRecord
from proxy.request.forbidden_hints import HINTS
from proxy.server.admin.snapshot import MEANINGS, Snapshot, TokenRow

# The values are part of `/status`.
Responsible = Literal["yours", "Amazon's", "the network's", "the proxy's"]
State = Literal["working", "degraded", "not working", "starting", "stopping"]

SHORT_WINDOW = 60.0  # seconds; with MIN_REQUESTS in it, earlier requests are ignored, so that a recovery shows soon
MIN_REQUESTS = 5  # requests; fewer say too little about the whole proxy
DOWN_RATIO, DEGRADED_RATIO = 0.5, 0.05  # failed requests / requests
# Client errors degrade the proxy only from this share of all requests on: one app that sends wrong requests must not
# make a proxy look broken that serves the others.
MAJORITY = 0.9
INFO, DEGRADED, DOWN = 1, 2, 3  # severities: a note; part of the proxy does not work; all of it
SECRET_WARNING = 14 * 86400.0  # seconds before a client secret expires
DAY = 86400.0

_ERRORS: Mapping[str, type[ProxyError]] = {error.code: error for error in all_errors()}
_NETWORK_ERRORS = frozenset({"UpstreamUnreachable", "ConnectTimeout"})
_NETWORK_REASONS = frozenset({"connection", "timeout"})  # of TokenUnavailable
CLIENT_ERRORS = frozenset(code for code, error in _ERRORS.items() if issubclass(error, ClientError))
_CLIENT_CLOSED = 499  # the client left before a response: says nothing about the proxy or Amazon

# Remedies for the operator of the proxy, where the error's own `remedy` addresses the author of the client; and 429,
# which is a response of Amazon's and has no error class.
_OPERATOR_REMEDIES: dict[str, str] = {
    "UsagePlanExhausted": "Make fewer calls, or let them wait longer: limits.max_wait, x-sp-max-wait.",
    "429": "Make fewer calls. Another program may use the same usage plan: make all calls through this proxy, or let "
    "its replicas share a store.",
    "TokenRefused": "The table of accounts below says what to fix; the proxy loads a changed file without a restart.",
    "RegionDown": "The proxy probes the region until it recovers; Amazon's health page may say more.",
}
_NO_REMEDY = "Nothing to fix here. The proxy retries what can be retried safely; Amazon's health page may say more."
_LWA_NETWORK_REMEDY = (
    "Check this machine's network, DNS and firewall, pool.proxy and endpoints.lwa. Cached tokens are used until they "
    "expire."
)


class Issue(NamedTuple):
    """One thing that is wrong or worth knowing; `severity` is INFO, DEGRADED or DOWN."""

    severity: int
    responsible: Responsible
    summary: str
    remedy: str


class Diagnosis(NamedTuple):
    """The state of the proxy, its main issue if there is one, and the other issues, most severe first."""

    state: State
    responsible: Responsible | None
    summary: str
    remedy: str
    others: Sequence[Issue] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the diagnosis as `/status` shows it, under the key `verdict`; its keys are a contract."""
        others = [{"whose": each.responsible, "says": each.summary, "do": each.remedy} for each in self.others]
        return {
            "state": self.state,
            "whose": self.responsible,
            "says": self.summary,
            "do": self.remedy,
            "others": others,
        }


def diagnose(snapshot: Snapshot) -> Diagnosis:
    """Return the diagnosis of a snapshot."""
    issues = sorted(_issues(snapshot), key=lambda issue: -issue.severity)
    if snapshot.state == "starting":
        summary = f"Starting: waiting for {snapshot.waiting_for}."
        return Diagnosis("starting", None, summary, "Wait; details are below.", issues)
    if snapshot.state == "stopping":
        return Diagnosis("stopping", None, "Shutting down: completing the requests in flight.", "Nothing.", issues)
    if not issues or issues[0].severity == INFO:
        count = len(snapshot.recent)
        summary = f"Working: {_plural(count, 'recent request')}, no problems."
        if issues:
            summary = f"Working: {_plural(count, 'recent request')}. {_plural(len(issues), 'note')} below."
        elif not count:
            summary = "Working as far as known: no request came in the last five minutes."
        return Diagnosis("working", None, summary, "", issues)
    first, *others = issues
    state: State = "not working" if first.severity == DOWN else "degraded"
    return Diagnosis(state, first.responsible, first.summary, first.remedy, others)


def _issues(snapshot: Snapshot) -> Iterator[Issue]:
    if not snapshot.accounts:
        yield Issue(DOWN, "yours", "No account is configured.", "Add one under accounts.")
    requests = _relevant_requests(snapshot)
    yield from _token_issues(snapshot.tokens, requests)
    yield from _region_issues(snapshot, requests)
    yield from _request_issues(requests, has_failed_tokens=any(row.error for row in snapshot.tokens))
    yield from _configuration_issues(snapshot)
    if snapshot.store_is_up is False:
        yield Issue(
            DEGRADED,
            "yours",
            "The store that the replicas share (Redis) is unavailable; this replica keeps its own tokens and usage "
            "plans.",
            "Check Redis and the network to it; the proxy reconnects without a restart.",
        )


def _relevant_requests(snapshot: Snapshot) -> list[RequestRecord]:
    """Return the requests of the last minute if there are enough, else those of the last five minutes."""
    recent = [request for request in snapshot.recent if request.status != _CLIENT_CLOSED]
    newest = [request for request in recent if snapshot.now - request.ended <= SHORT_WINDOW]
    return newest if len(newest) >= MIN_REQUESTS else recent


# Tokens.


def _token_issues(rows: Sequence[TokenRow], requests: Sequence[RequestRecord]) -> Iterator[Issue]:
    groups: dict[tuple[str, str], list[TokenRow]] = {}
    for row in rows:
        if row.error:
            groups.setdefault((row.error, row.reason), []).append(row)
    has_valid = any(row.expires_in is not None for row in rows)
    failed = sum(request.error in {"TokenRefused", "TokenUnavailable"} for request in requests)
    nothing_works = not has_valid or (len(requests) >= MIN_REQUESTS and failed >= DOWN_RATIO * len(requests))
    for (code, error_reason), group in groups.items():
        # A group that still has its tokens cannot be the reason that nothing works.
        is_down = nothing_works and any(row.expires_in is None for row in group)
        severity = DOWN if is_down else DEGRADED
        names, reason = _names(group), f" ({error_reason})" if error_reason else ""
        if code != "TokenUnavailable":
            summary = f"Login with Amazon refuses the credentials of {names}{reason}."
            yield Issue(severity, "yours", summary, group[0].remedy)
        elif error_reason in _NETWORK_REASONS:
            summary = f"Login with Amazon cannot be reached{reason}: no token for {names}."
            yield Issue(severity, "the network's", summary, _LWA_NETWORK_REMEDY)
        else:
            summary = f"Login with Amazon issues no token{reason} for {names}."
            yield Issue(severity, "Amazon's", summary, "Nothing to fix here: the proxy keeps retrying.")


def _names(rows: Sequence[TokenRow]) -> str:
    names = [f"{row.account} in {row.region}" if row.account else f"application {row.application}" for row in rows]
    if len(names) <= 3:
        return ", ".join(names)
    return f"{', '.join(names[:2])} and {len(names) - 2} more"


# Regions, requests.


def _region_issues(snapshot: Snapshot, requests: Sequence[RequestRecord]) -> Iterator[Issue]:
    down = {region for _, region in snapshot.regions_down}
    if not down:
        return
    in_use = {request.region for request in requests} - {"-"}
    # While the circuit is open, most requests fail with RegionDown, which says nothing about the cause. The failures
    # that opened it and the failed probes do: no connection (network), or a 5xx response (Amazon).
    unreachable = sum(request.error in _NETWORK_ERRORS for request in requests if request.region in down)
    responded = sum(request.status >= 500 and not request.error for request in requests if request.region in down)
    is_network = unreachable > responded
    yield Issue(
        DOWN if in_use and in_use <= down else DEGRADED,
        "the network's" if is_network else "Amazon's",
        f"Amazon's {_plural(len(down), 'region')} {', '.join(sorted(down))} cannot be used: its calls keep failing.",
        _remedy_for("UpstreamUnreachable" if is_network else "RegionDown"),
    )


def _request_issues(requests: Sequence[RequestRecord], *, has_failed_tokens: bool) -> Iterator[Issue]:
    failures = Counter(name for request in requests if (name := failure_of(request)))
    client_errors = sum(count for name, count in failures.items() if name in CLIENT_ERRORS)
    are_nearly_all = len(requests) >= MIN_REQUESTS and client_errors >= MAJORITY * len(requests)
    for name, count in failures.most_common():
        if name == "RegionDown" or (has_failed_tokens and name in {"TokenRefused", "TokenUnavailable"}):
            continue  # already covered by the issues of regions and tokens
        share = count / len(requests)
        is_down = share == 1 or (share >= DOWN_RATIO and len(requests) >= MIN_REQUESTS)
        severity = DOWN if is_down else DEGRADED if share >= DEGRADED_RATIO else INFO
        if name in CLIENT_ERRORS and not are_nearly_all:
            severity = INFO
        summary = f"{count} of {_plural(len(requests), 'recent request')}: {_meaning(name)}"
        yield Issue(severity, responsible_for(name), summary, _remedy_for(name))


def failure_of(request: RequestRecord) -> str:
    """Return what went wrong with a request: a hint, an error code of the proxy, or a 429 or 5xx of Amazon's.

    Empty if nothing did. Amazon's other error responses (400, 404, …) are results of the call, not failures.
    """
    if request.hint or request.error:
        return request.hint or ("" if request.status == _CLIENT_CLOSED else request.error)
    return str(request.status) if request.status == 429 or request.status >= 500 else ""


def responsible_for(failure: str) -> Responsible:
    """Return who is responsible for a failure, as `failure_of` names it."""
    if failure in _NETWORK_ERRORS:
        return "the network's"
    if failure == "InternalError":
        return "the proxy's"
    error = _ERRORS.get(failure)
    if error is not None:
        return "Amazon's" if error.fault == "amazon" else "yours"
    return "Amazon's" if failure.isdecimal() and failure != "429" else "yours"


def _meaning(failure: str) -> str:
    if failure.isdecimal():
        return f"Amazon responded {failure}" + (": a usage plan was exhausted." if failure == "429" else ".")
    hints: Mapping[str, str] = {str(hint): text for hint, text in HINTS.items()}
    if failure in hints:
        return f"Amazon refused them ({failure})."
    return f"{failure}. {MEANINGS.get(failure, '')}".rstrip()


def _remedy_for(failure: str) -> str:
    hints: Mapping[str, str] = {str(hint): text for hint, text in HINTS.items()}
    own = _ERRORS[failure].remedy if failure in _ERRORS else ""
    return _OPERATOR_REMEDIES.get(failure) or hints.get(failure) or own or _NO_REMEDY


# The configuration.


def _configuration_issues(snapshot: Snapshot) -> Iterator[Issue]:
    if snapshot.configuration["problems"]:
        yield Issue(
            DEGRADED,
            "yours",
            "The newest configuration was rejected; the previous one stays in force.",
            "Fix what is listed under Configuration; the proxy loads the file without a restart.",
        )
    if snapshot.configuration["needs_restart"]:
        keys = ", ".join(snapshot.configuration["needs_restart"])
        yield Issue(INFO, "yours", f"Changed settings take effect only after a restart: {keys}.", "Restart the proxy.")
    yield from _secret_issues(snapshot.secret_lifetimes.items())


def _secret_issues(lifetimes: Iterable[tuple[str, float]]) -> Iterator[Issue]:
    for application, seconds in lifetimes:
        remedy = f"Get a new one: sp-api-proxy rotate {application}."
        if seconds <= 0:
            summary = f"The client secret of {application} is older than 180 days; Amazon rejects it, or soon will."
            yield Issue(DEGRADED, "yours", summary, remedy)
        elif seconds <= SECRET_WARNING:
            summary = f"The client secret of {application} expires in {_plural(int(seconds / DAY), 'day')}."
            yield Issue(INFO, "yours", summary, remedy)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
