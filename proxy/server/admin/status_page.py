"""The status page: one HTML document, complete without its script.

It is bounded whatever the number of accounts, with problems first. Every text is escaped, by `status_html` or here.
"""

from collections import Counter
from collections.abc import Sequence
from functools import cache
from html import escape
from importlib import resources

from proxy.observability.request_history import SAMPLE_INTERVAL, RequestRecord
from proxy.server.admin.diagnosis import Diagnosis, Responsible, failure_of, responsible_for
from proxy.server.admin.snapshot import (
    MAX_PLAN_ROWS,
    MAX_REQUEST_ROWS,
    MAX_TOKEN_ROWS,
    TOKEN_STATES,
    Snapshot,
    TokenRow,
)
from proxy.server.admin.status_charts import charts_section
from proxy.server.admin.status_html import cell, counted, prose, row_header, seconds, section, span, table

MAX_OPEN_ROWS = 12  # accounts and regions; with more, those without problems are folded away
MAX_OTHER_ISSUES = 20
RELOAD_WITHOUT_SCRIPT = 10  # seconds

# CSP Level 3. The page loads nothing but its own files, submits no form, and cannot be framed (clickjacking), so that
# even a text that escaped escaping could not run a script or send anything elsewhere.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",  # for browsers without frame-ancestors
}

FILES = {"page.css": "text/css", "page.js": "text/javascript"}

_TITLES = {
    "working": "Working",
    "degraded": "Degraded",
    "not working": "Not working",
    "starting": "Starting",
    "stopping": "Shutting down",
}
_CAUSES: dict[Responsible, str] = {
    "yours": "your side",
    "Amazon's": "Amazon",
    "the network's": "the network",
    "the proxy's": "the proxy",
}


@cache
def read_file(name: str) -> bytes:
    """Return one of FILES."""
    return resources.files("proxy.server.admin").joinpath(f"status_{name}").read_bytes()


def render(
    snapshot: Snapshot, diagnosis: Diagnosis, *, refresh_interval: float = SAMPLE_INTERVAL, account: str | None = None
) -> str:
    """Return the page, which its script updates every `refresh_interval` seconds; `account` shows this one alone."""
    title = _TITLES[diagnosis.state]
    sections = (
        _diagnosis(diagnosis),
        charts_section(snapshot),
        _accounts(snapshot, account),
        _plans(snapshot),
        _requests(snapshot),
        _errors(snapshot),
        _configuration(snapshot),
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)} – sp-api-proxy</title>\n"
        '<link rel="stylesheet" href="/page.css">\n<script src="/page.js" defer></script>\n'
        f'<noscript><meta http-equiv="refresh" content="{RELOAD_WITHOUT_SCRIPT}"></noscript>\n</head>\n<body>\n'
        f"<header><h1>sp-api-proxy</h1><p>{escape(snapshot.version)}, {counted(snapshot.accounts, 'account')}, "
        f"{counted(snapshot.in_flight, 'request')} in flight, as of "
        f"<time>{escape(snapshot.clock(snapshot.now))} UTC</time></p></header>\n"
        '<p id="unreachable" role="alert" hidden>The proxy does not respond. This page shows an earlier state.</p>\n'
        f'<main data-refresh-interval="{refresh_interval:g}">\n{"".join(sections)}</main>\n'
        '<footer><p>For programs: <a href="/status">/status</a>, <a href="/requests">/requests</a>, '
        '<a href="/metrics">/metrics</a>, <a href="/readyz?verbose">/readyz</a>. In a terminal: '
        "<code>sp-api-proxy requests</code>.</p></footer>\n</body>\n</html>\n"
    )


def _diagnosis(diagnosis: Diagnosis) -> str:
    kind = diagnosis.state.replace(" ", "-")
    cause = f" Cause: <strong>{escape(_CAUSES[diagnosis.responsible])}</strong>." if diagnosis.responsible else ""
    summary = f'<p role="status">{prose(diagnosis.summary)}{cause}</p>\n'
    remedy = f"<p>What to do: {prose(diagnosis.remedy)}</p>\n" if diagnosis.remedy else ""
    issues = "".join(
        f"<li>{prose(issue.summary)} <em>(cause: {escape(_CAUSES[issue.responsible])})</em> "
        f"{prose(issue.remedy)}</li>\n"
        for issue in diagnosis.others[:MAX_OTHER_ISSUES]
    )
    others = f'<p class="more">Also:</p><ul>\n{issues}</ul>\n' if issues else ""
    return section("diagnosis", _TITLES[diagnosis.state], summary, remedy, others, kind=kind)


# Accounts.


def _accounts(snapshot: Snapshot, account: str | None) -> str:
    rows, states = snapshot.tokens, Counter(row.state for row in snapshot.tokens)
    counts = "; ".join(f"{text}: {states[state]}" for state, text in TOKEN_STATES.items() if states[state])
    intro = f"<p>{escape(counts) or 'None configured.'}</p>\n"
    if account is not None:
        unknown = "" if rows else " No account has this name."
        intro = f'<p>Only {escape(account)}.{unknown} <a href="/">Show all</a></p>\n' + intro
    if len(rows) <= MAX_OPEN_ROWS:
        return section("accounts", "Accounts and regions", intro, _token_table("tokens", "Accounts", rows))
    failing = [row for row in rows if row.error or row.restricted_failed]
    healthy = [row for row in rows if not (row.error or row.restricted_failed)]
    limit = MAX_TOKEN_ROWS // 2
    parts = [intro]
    if failing:
        parts += [_token_table("failing", "Accounts with problems", failing[:limit]), _left_out(len(failing) - limit)]
    if healthy:
        rest = _token_table("healthy", "Accounts without problems", healthy[:limit]) + _left_out(len(healthy) - limit)
        title = f"{counted(len(healthy), 'account and region', 'accounts and regions')} without problems"
        parts += [f'<details id="rest"><summary>{title}</summary>{rest}</details>\n']
    return section("accounts", "Accounts and regions", *parts)


def _left_out(count: int) -> str:
    return f"<p>and {count} more; /?account=NAME shows one account, /metrics has all.</p>\n" if count > 0 else ""


def _token_table(name: str, label: str, rows: Sequence[TokenRow]) -> str:
    head = ("account", "region", "token", "expires in", "last refresh", "what to do")
    return table(name, label, head, (_token_cells(row) for row in rows)) if rows else ""


def _token_cells(row: TokenRow) -> tuple[str, ...]:
    name = escape(row.account)
    owner = f'<a href="/?account={name}">{name}</a>' if row.account else f"application {escape(row.application)}"
    if row.environment != "production":
        owner += f" <small>{escape(row.environment)}</small>"
    refresh = "none yet"
    if row.error:
        reason = f" ({row.reason})" if row.reason else ""
        retry = f", next attempt in {span(row.retry_in)}" if row.retry_in else ""
        refresh = f"{row.error}{reason}, {counted(row.failures, 'time')} in a row{retry}"
    elif row.age is not None:
        refresh = f"succeeded {span(row.age)} ago"
    state = TOKEN_STATES[row.state]
    if row.restricted:
        state += f", {counted(row.restricted, 'Restricted Data Token')}"
    remedy = row.remedy
    if row.restricted_failed:
        remedy = f"{remedy} {counted(row.restricted_failed, 'Restricted Data Token')} could not be obtained.".strip()
    return (
        f'<th scope="row">{owner}</th>',
        cell(row.region),
        cell(state, f"state {row.state}"),
        cell("–" if row.expires_in is None else span(row.expires_in), "number"),
        cell(refresh),
        cell(remedy or "–"),
    )


# Usage plans, requests, errors.


def _plans(snapshot: Snapshot) -> str:
    title = "Throttled usage plans"
    if not snapshot.plans:
        return section("plans", title, "<p>None, now or since the start.</p>\n")
    rows = (
        (
            row_header(row.operation),
            cell("all accounts" if row.account == "*" else row.account),
            cell(row.region),
            cell(f"{row.rate:.3g} per second", "number"),
            cell(f"{row.tokens:.1f}", "number short" if row.tokens < 1 else "number"),
            cell(str(row.waiting), "number short" if row.waiting else "number"),
            cell(str(row.refused), "number"),
            cell(str(row.throttled), "number"),
        )
        for row in snapshot.plans[:MAX_PLAN_ROWS]
    )
    head = ("operation", "account", "region", "rate", "calls left", "waiting", "rejected", "429 from Amazon")
    return section(
        "plans", title, table("plan-rows", title, head, rows), _left_out(len(snapshot.plans) - MAX_PLAN_ROWS)
    )


def _requests(snapshot: Snapshot) -> str:
    newest = list(reversed(snapshot.requests))[:MAX_REQUEST_ROWS]
    if not newest:
        return section("requests", "Recent requests", "<p>None yet.</p>\n")
    head = (
        *("ended (UTC)", "status", "operation", "account", "duration"),
        *("plan", "token", "Amazon", "note"),
    )
    rows = (_request_cells(snapshot, request) for request in newest)
    intro = (
        "<p>Parts of the duration: plan and token are the waits for the usage plan and for the token, Amazon is the "
        "time until its response began.</p>\n"
    )
    return section("requests", "Recent requests", intro, table("request-rows", "Recent requests", head, rows))


def _request_cells(snapshot: Snapshot, request: RequestRecord) -> tuple[str, ...]:
    kind = "bad" if failure_of(request) else "other" if request.status >= 400 else "fine"
    attempts = f"{request.attempts} attempts" if request.attempts > 1 else ""
    notes = (request.error, request.hint, attempts, request.caller and f"by {request.caller}")
    return (
        cell(snapshot.clock(request.ended), "number"),
        cell(str(request.status), f"number {kind}"),
        row_header(f"{request.method} {request.operation}"),
        cell(f"{request.account} {request.region}" if request.account != "-" else "–"),
        cell(seconds(request.duration), "number"),
        cell(seconds(request.rate_limit_wait), "number"),
        cell(seconds(request.token_wait), "number"),
        cell(seconds(request.upstream_duration), "number"),
        cell(", ".join(filter(None, notes)) or "–"),
    )


def _errors(snapshot: Snapshot) -> str:
    if not snapshot.errors:
        return section("errors", "Errors and hints", "<p>None since the start.</p>\n")
    rows = (
        (
            row_header(row.name),
            cell(_CAUSES[responsible_for(row.name)]),
            cell(str(row.recent), "number"),
            cell(str(row.total), "number"),
            f"<td>{prose(row.meaning)}</td>",
        )
        for row in snapshot.errors
    )
    head = ("error or hint", "cause", "last five minutes", "since the start", "meaning")
    return section("errors", "Errors and hints", table("error-rows", "Errors and hints", head, rows))


# The configuration.


def _configuration(snapshot: Snapshot) -> str:
    configuration = snapshot.configuration
    last = configuration["last_reload"]
    reload = f"{last['result']}, {last['at']}" if last else "none since the start"
    facts = [("in force since", configuration["good_since"]), ("last reload", reload)]
    if configuration["needs_restart"]:
        facts += [("takes effect after a restart", ", ".join(configuration["needs_restart"]))]
    if snapshot.store_is_up is not None:
        failures = ", ".join(f"{reason} {count}" for reason, count in snapshot.store_failures.items()) or "none"
        facts += [
            ("shared store", "available" if snapshot.store_is_up else "unavailable: this replica works alone"),
            ("store failures since the start", failures),
        ]
    if snapshot.regions_down:
        regions = ", ".join(f"{region} ({environment})" for environment, region in snapshot.regions_down)
        facts += [("regions down", regions)]
    lifetimes = list(snapshot.secret_lifetimes.items())[:MAX_PLAN_ROWS]
    facts += [(f"client secret of {application}", _secret_text(left)) for application, left in lifetimes]
    terms = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>\n" for name, text in facts)
    items = "".join(f"<li>{escape(problem)}</li>\n" for problem in configuration["problems"])
    problems = f"<p>The newest configuration was rejected:</p><ul>\n{items}</ul>\n" if items else ""
    return section("configuration", "Configuration", problems, f"<dl>\n{terms}</dl>\n")


def _secret_text(lifetime: float) -> str:
    return f"expires in {span(lifetime)}" if lifetime > 0 else "older than 180 days"
