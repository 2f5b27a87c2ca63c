"""Is the proxy working, and if not, whose fault is it, and what is to be done?

One sentence for a person who is in a hurry. It goes by what happened lately: what Login with Amazon said to each
account, how the last requests ended, which regions are down, whether the newest configuration was good.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from proxy.errors import ClientError, ProxyError, all_errors
from proxy.observability.request_history import RequestRecord
from proxy.request.forbidden_hints import HINTS
from proxy.server.admin.snapshot import MEANINGS, Snapshot, TokenRow

Responsible = Literal["yours", "Amazon's", "the network's", "the proxy's"]
State = Literal["working", "degraded", "not working", "starting", "stopping"]

SHORT_WINDOW = 60.0  # seconds; where enough came in that time, what was before counts no more
MIN_REQUESTS = 5  # requests
DOWN_RATIO, DEGRADED_RATIO = 0.5, 0.05  # shares of them that fail
MAJORITY = 0.9  # share of mistakes of the apps' own from which on they are more than a remark
INFO, DEGRADED, DOWN = 1, 2, 3  # how much of the proxy does not work
SOON = 14 * 86400.0  # seconds until a client secret is past its life
DAY = 86400.0

_CLASSES: Mapping[str, type[ProxyError]] = {error.code: error for error in all_errors()}
_NETWORK = frozenset({"UpstreamUnreachable", "ConnectTimeout"})
_NETWORK_REASONS = frozenset({"connection", "timeout"})
# Requests that cannot be served as they are, which is no fault of a proxy that says so.
CLIENT_ERRORS = frozenset(code for code, error in _CLASSES.items() if issubclass(error, ClientError))
_CLIENT_CLOSED = 499

_REMEDIES: dict[str, str] = {
    "UpstreamUnreachable": "Check this machine's network, DNS and firewall, pool.proxy, endpoints and pool.ca_file.",
    "ConnectTimeout": "Check this machine's network, DNS and firewall, and whether pool.max_connections are in use.",
    "UsagePlanExhausted": "Ask less often, or let calls wait longer: limits.max_wait, x-sp-max-wait.",
    "429": "Ask less often. Somebody else may be spending the same usage plan: ask here alone, or share a store.",
    "InternalError": "Its log says where it happened; report it.",
    "TokenRefused": "The table of accounts below says what to mend; the proxy takes up a changed file by itself.",
    "RegionDown": "The proxy looks for its return by itself; Amazon's health page may say more.",
}
_NO_REMEDY = "Nothing to mend here. The proxy repeats what may be repeated; Amazon's health page may say more."


class Issue(NamedTuple):
    """Something that is not as it should be."""

    severity: int
    responsible: Responsible
    summary: str
    remedy: str


class Diagnosis(NamedTuple):
    """What a person wants to know first, and everything else that is not as it should be."""

    state: State
    responsible: Responsible | None
    summary: str
    remedy: str
    others: Sequence[Issue] = ()

    def as_json(self) -> dict[str, Any]:
        """Return what `/status` says of it."""
        others = [{"whose": each.responsible, "says": each.summary, "do": each.remedy} for each in self.others]
        return {
            "state": self.state,
            "whose": self.responsible,
            "says": self.summary,
            "do": self.remedy,
            "others": others,
        }


def diagnose(snapshot: Snapshot) -> Diagnosis:
    """Return the verdict on what is to be seen."""
    found = sorted(_issues(snapshot), key=lambda issue: -issue.severity)
    if snapshot.state == "starting":
        return Diagnosis("starting", None, f"Starting: waiting for {snapshot.waiting_for}.", "Wait; see below.", found)
    if snapshot.state == "stopping":
        return Diagnosis("stopping", None, "Shutting down: requests in flight are finished.", "Nothing.", found)
    if not found or found[0].severity == INFO:
        count = len(snapshot.recent)
        says = f"Working: {_plural(count, 'request')} lately, all as it should be."
        if found:
            says = f"Working: {_plural(count, 'request')} lately. {_plural(len(found), 'thing')} to know below."
        elif not count:
            says = "Working, as far as can be told: no request came in the last five minutes."
        return Diagnosis("working", None, says, "", found)
    first, *rest = found
    state: State = "not working" if first.severity == DOWN else "degraded"
    return Diagnosis(state, first.responsible, first.summary, first.remedy, rest)


def _issues(snapshot: Snapshot) -> Iterator[Issue]:
    if not snapshot.accounts:
        yield Issue(DOWN, "yours", "No account is configured.", "Add one under accounts.")
    requests = _relevant(snapshot)
    yield from _token_issues(snapshot.tokens, requests)
    yield from _region_issues(snapshot, requests)
    yield from _request_issues(requests, has_failed_tokens=any(row.error for row in snapshot.tokens))
    yield from _configuration_issues(snapshot)
    if snapshot.store_is_up is False:
        yield Issue(
            DEGRADED,
            "yours",
            "The store that replicas share (Redis) cannot be used; this one keeps tokens and usage plans on its own.",
            "Look at Redis and at the way to it; the proxy takes it up again by itself.",
        )


def _relevant(snapshot: Snapshot) -> list[RequestRecord]:
    """Return the requests to go by: those of the last minute where there are enough, else of the last five."""
    lately = [request for request in snapshot.recent if request.status != _CLIENT_CLOSED]
    just_now = [request for request in lately if snapshot.now - request.ended <= SHORT_WINDOW]
    return just_now if len(just_now) >= MIN_REQUESTS else lately


# Tokens.


def _token_issues(rows: Sequence[TokenRow], requests: Sequence[RequestRecord]) -> Iterator[Issue]:
    groups: dict[tuple[str, str], list[TokenRow]] = {}
    for row in rows:
        if row.error:
            groups.setdefault((row.error, row.reason), []).append(row)
    has_good = any(row.left is not None for row in rows)
    failed = sum(request.error in {"TokenRefused", "TokenUnavailable"} for request in requests)
    nothing_works = not has_good or (len(requests) >= MIN_REQUESTS and failed >= DOWN_RATIO * len(requests))
    for (code, reason), group in groups.items():
        of_all = nothing_works and any(row.left is None for row in group)
        weight = DOWN if of_all else DEGRADED
        who, why = _named(group), f" ({reason})" if reason else ""
        if code != "TokenUnavailable":
            do = group[0].do
            yield Issue(weight, "yours", f"Login with Amazon refuses the credentials of {who}{why}.", do)
        elif reason in _NETWORK_REASONS:
            says = f"Login with Amazon cannot be reached{why}: no token for {who}."
            do = "Check this machine's network, DNS and firewall, pool.proxy and endpoints.lwa."
            yield Issue(weight, "the network's", says, f"{do} Tokens at hand are used until they expire.")
        else:
            says = f"Login with Amazon gives no token{why} for {who}."
            yield Issue(weight, "Amazon's", says, "Nothing to mend here: the proxy tries again by itself.")


def _named(rows: Sequence[TokenRow]) -> str:
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
    unreachable = sum(request.error in _NETWORK for request in requests if request.region in down)
    answered = sum(request.status >= 500 and not request.error for request in requests if request.region in down)
    whose: Responsible = "the network's" if unreachable > answered else "Amazon's"
    yield Issue(
        DOWN if in_use and in_use <= down else DEGRADED,
        whose,
        f"Amazon's {_plural(len(down), 'region')} {', '.join(sorted(down))} cannot be used: calls fail throughout.",
        _REMEDIES["UpstreamUnreachable"] if whose == "the network's" else _REMEDIES["RegionDown"],
    )


def _request_issues(requests: Sequence[RequestRecord], *, has_failed_tokens: bool) -> Iterator[Issue]:
    bad = Counter(name for request in requests if (name := name_of(request)))
    mistakes = sum(count for name, count in bad.items() if name in CLIENT_ERRORS)
    are_nearly_all = len(requests) >= MIN_REQUESTS and mistakes >= MAJORITY * len(requests)
    for name, count in bad.most_common():
        if name == "RegionDown" or (has_failed_tokens and name in {"TokenRefused", "TokenUnavailable"}):
            continue  # said already
        share = count / len(requests)
        is_all = share == 1 or (share >= DOWN_RATIO and len(requests) >= MIN_REQUESTS)
        weight = DOWN if is_all else DEGRADED if share >= DEGRADED_RATIO else INFO
        if name in CLIENT_ERRORS and not are_nearly_all:
            weight = INFO
        says = f"{count} of {_plural(len(requests), 'request')} lately: {_meaning(name)}"
        yield Issue(weight, responsible_for(name), says, _remedy_for(name))


def name_of(request: RequestRecord) -> str:
    """Return what went wrong with a request: a hint, a code of the proxy's or a status of Amazon's; nothing, else.

    Amazon's other refusals (400, 404, …) are answers to what the app asked.
    """
    if request.hint or request.error:
        return request.hint or ("" if request.status == _CLIENT_CLOSED else request.error)
    return str(request.status) if request.status == 429 or request.status >= 500 else ""


def responsible_for(name: str) -> Responsible:
    """Return whose fault it is, by what `name_of` says."""
    if name in _NETWORK:
        return "the network's"
    if name == "InternalError":
        return "the proxy's"
    error = _CLASSES.get(name)
    if error is not None:
        return "Amazon's" if error.fault == "amazon" else "yours"
    return "Amazon's" if name.isdecimal() and name != "429" else "yours"


def _meaning(name: str) -> str:
    if name.isdecimal():
        return f"Amazon answered {name}" + (": a usage plan had no room." if name == "429" else ".")
    hints: Mapping[str, str] = {str(hint): text for hint, text in HINTS.items()}
    if name in hints:
        return f"Amazon refused them ({name})."
    return f"{name}. {MEANINGS.get(name, '')}".rstrip()


def _remedy_for(name: str) -> str:
    hints: Mapping[str, str] = {str(hint): text for hint, text in HINTS.items()}
    return _REMEDIES.get(name) or hints.get(name) or REMEDIES.get(name) or _NO_REMEDY


# The configuration.


def _configuration_issues(snapshot: Snapshot) -> Iterator[Issue]:
    if snapshot.configuration["problems"]:
        yield Issue(
            DEGRADED,
            "yours",
            "The newest configuration was refused, and the one before it serves on.",
            "Mend what is listed under Configuration; the proxy takes up the file by itself.",
        )
    if snapshot.configuration["needs_restart"]:
        keys = ", ".join(snapshot.configuration["needs_restart"])
        yield Issue(INFO, "yours", f"Settings that count only after a restart have changed: {keys}.", "Restart it.")
    yield from _secret_issues(snapshot.secrets_left.items())


def _secret_issues(left: Iterable[tuple[str, float]]) -> Iterator[Issue]:
    for application, seconds in left:
        rotate = f"Get a new one: sp-api-proxy rotate {application}."
        if seconds <= 0:
            says = f"The client secret of {application} is past its 180 days; Amazon refuses it, or will."
            yield Issue(DEGRADED, "yours", says, rotate)
        elif seconds <= SOON:
            says = f"The client secret of {application} has {_plural(int(seconds / DAY), 'day')} left."
            yield Issue(INFO, "yours", says, rotate)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
