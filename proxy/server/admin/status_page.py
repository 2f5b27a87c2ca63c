"""What does a person see who opens the admin address in a browser? One page, whole without its script.

Every text goes through `escape`. The page is bounded whatever the number of accounts: what needs somebody comes first.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from html import escape
from importlib import resources

from proxy.observability.request_history import MAX_SAMPLES, SAMPLE_INTERVAL, RequestRecord, Sample
from proxy.server.admin.diagnosis import Diagnosis, name_of, responsible_for
from proxy.server.admin.snapshot import MAX_PLANS, MAX_ROWS, MAX_SHOWN, TOKEN_STATES, Snapshot, TokenRow

FEW_ROWS = 12  # accounts and regions: so many are shown without being asked for
WITHOUT_SCRIPT = 10  # seconds after which the page comes anew where there is no script

# Nothing but what comes from this address, and no place where a page could be put into another (CSP Level 3).
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}

FILES = {"page.css": "text/css", "page.js": "text/javascript"}

_TITLES = {
    "working": "Working",
    "degraded": "Degraded",
    "not working": "Not working",
    "starting": "Starting",
    "stopping": "Shutting down",
}


@cache
def file_of(name: str) -> bytes:
    """Return a file that belongs to the page, one of FILES."""
    return resources.files("proxy.server.admin").joinpath(f"status_{name}").read_bytes()


def render(
    snapshot: Snapshot, diagnosis: Diagnosis, *, every: float = SAMPLE_INTERVAL, account: str | None = None
) -> str:
    """Return the page; its script brings it up to date every so many seconds. `account`: it is about this one alone."""
    title = _TITLES[diagnosis.state]
    sections = (
        _diagnosis(diagnosis),
        _chart(snapshot),
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
        f'<noscript><meta http-equiv="refresh" content="{WITHOUT_SCRIPT}"></noscript>\n</head>\n<body>\n'
        f"<header><h1>sp-api-proxy</h1><p>{escape(snapshot.version)}, {_count(snapshot.accounts, 'account')}, "
        f"{_count(snapshot.in_flight, 'request')} in flight, as of "
        f"<time>{escape(_clock(snapshot, snapshot.now))} UTC</time></p></header>\n"
        f'<p id="lost" role="alert" hidden>The proxy does not answer any more. What you see is from before.</p>\n'
        f'<main data-every="{every:g}">\n{"".join(sections)}</main>\n'
        '<footer><p>For programs: <a href="/status">/status</a>, <a href="/requests">/requests</a>, '
        '<a href="/metrics">/metrics</a>, <a href="/readyz?verbose">/readyz</a>. In a terminal: '
        "<code>sp-api-proxy requests</code>.</p></footer>\n</body>\n</html>\n"
    )


def _section(name: str, title: str, *parts: str, kind: str = "") -> str:
    marked = f' class="{escape(kind)}"' if kind else ""
    heading = f'<h2 id="{name}-title">{title}</h2>'
    return f'<section id="{name}"{marked} aria-labelledby="{name}-title">{heading}\n{"".join(parts)}</section>\n'


def _table(name: str, label: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table that scrolls by itself where it is too large; cells are HTML already."""
    columns = "".join(f'<th scope="col">{title}</th>' for title in head)
    body = "".join(f"<tr>{''.join(cells)}</tr>\n" for cells in rows)
    return (
        f'<div class="wide" id="{name}" role="region" tabindex="0" aria-label="{escape(label)}, a table that scrolls">'
        f"<table><thead><tr>{columns}</tr></thead><tbody>\n{body}</tbody></table></div>\n"
    )


def _cell(text: str, kind: str = "") -> str:
    return f'<td class="{kind}">{escape(text)}</td>' if kind else f"<td>{escape(text)}</td>"


# The sections.


def _diagnosis(diagnosis: Diagnosis) -> str:
    kind = diagnosis.state.replace(" ", "-")
    whose = f" The cause is <strong>{escape(diagnosis.responsible)}</strong>." if diagnosis.responsible else ""
    do = f"<p>What to do: {_prose(diagnosis.remedy)}</p>\n" if diagnosis.remedy else ""
    others = "".join(
        f"<li>{_prose(one.summary)} <em>({escape(one.responsible)})</em> {_prose(one.remedy)}</li>\n"
        for one in diagnosis.others[:20]
    )
    more = f'<p class="more">To know as well:</p><ul>\n{others}</ul>\n' if others else ""
    says = f'<p role="status">{_prose(diagnosis.summary)}{whose}</p>\n'
    return _section("verdict", _TITLES[diagnosis.state], says, do, more, kind=kind)


_Line = tuple[str, Callable[[float], str], Sequence[float | None], Sequence[float | None], str]


def _chart(snapshot: Snapshot) -> str:
    samples = list(snapshot.samples)
    minutes = MAX_SAMPLES * SAMPLE_INTERVAL / 60
    lines: Sequence[_Line] = (
        ("Requests per second", _number, [_per_second(sample.requests, sample) for sample in samples], (), ""),
        (
            "Time a request takes: median, 95 % (paler)",
            _seconds,
            [sample.median for sample in samples],
            [sample.p95 for sample in samples],
            "",
        ),
        ("Throttled per second", _number, [_per_second(sample.throttled, sample) for sample in samples], (), "alert"),
    )
    figures = "".join(_figure(*line) for line in lines)
    rows = [
        (
            f'<th scope="row">{escape(_clock(snapshot, first.at)[:5])}</th>',
            _cell(f"{_per_minute(group, 'requests') / 60:.2f}", "number"),
            _cell(_seconds(_middle(group, "median")), "number"),
            _cell(_seconds(_middle(group, "p95")), "number"),
            _cell(f"{_per_minute(group, 'throttled') / 60:.2f}", "number"),
        )
        for first, group in _by_minute(samples)
    ]
    head = ("minute until, UTC", "requests per second", "median", "95 %", "throttled per second")
    numbers = _table("numbers", "The last minutes as numbers", head, reversed(rows))
    table = f'<details id="as-table"><summary>As a table</summary>{numbers}</details>\n' if rows else ""
    return _section("lately", f"The last {minutes:.0f} minutes", f'<div class="charts">{figures}</div>\n', table)


def _per_second(count: float, sample: Sample) -> float:
    return count / sample.seconds if sample.seconds > 0 else 0.0


def _figure(
    title: str,
    say: Callable[[float], str],
    values: Sequence[float | None],
    slow: Sequence[float | None],
    kind: str,
) -> str:
    shown = [value for value in (*values, *slow) if value is not None]
    most = max(shown, default=0.0)
    now = next((value for value in reversed(values) if value is not None), None)
    when = "now" if values and values[-1] is not None else "last"
    says = "nothing yet" if now is None else f"{when} {say(now)}, at most {say(most)}"
    top = most or 1.0
    paths = f'<path class="second" d="{_path(slow, top)}"/>' if slow else ""
    paths += f'<path class="first {kind}" d="{_path(values, top)}"/>'
    return (
        f"<figure><figcaption>{escape(title)} <b>{escape(says)}</b></figcaption>"
        f'<svg viewBox="0 0 {MAX_SAMPLES} 60" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(f"{title}: {says}")}">{paths}</svg></figure>\n'
    )


def _path(values: Sequence[float | None], top: float) -> str:
    """Return a line through the values, the newest at the right end; it has a gap where there was nothing."""
    steps, is_down = [], False
    for place, value in enumerate(values, MAX_SAMPLES - len(values)):
        if value is not None:
            steps.append(f"{'L' if is_down else 'M'}{place} {58 - value / top * 56:.1f}h1")
        is_down = value is not None
    return "".join(steps)


def _by_minute(samples: Sequence[Sample]) -> Iterator[tuple[Sample, list[Sample]]]:
    """Yield the samples of each full minute back from now, the oldest first, with the last of them."""
    each = round(60 / SAMPLE_INTERVAL)
    for end in range(len(samples) % each or each, len(samples) + 1, each):
        group = list(samples[max(0, end - each) : end])
        if group:
            yield group[-1], group


def _per_minute(group: Sequence[Sample], name: str) -> float:
    seconds = sum(sample.seconds for sample in group)
    return sum(getattr(sample, name) for sample in group) / seconds * 60 if seconds else 0.0


def _middle(group: Sequence[Sample], name: str) -> float | None:
    found = sorted(value for sample in group if (value := getattr(sample, name)) is not None)
    return found[len(found) // 2] if found else None


def _accounts(snapshot: Snapshot, account: str | None) -> str:
    rows, states = snapshot.tokens, Counter(row.state for row in snapshot.tokens)
    counted = ", ".join(f"{states[state]} {text}" for state, text in TOKEN_STATES.items() if states[state])
    about = f"<p>{escape(counted) or 'None is configured.'}</p>\n"
    if account is not None:
        known = "" if rows else " There is none of that name."
        about = f'<p>Of {escape(account)} alone.{known} <a href="/">Show all</a></p>\n' + about
    needy = [row for row in rows if row.error or row.restricted_failed]
    calm = [row for row in rows if not (row.error or row.restricted_failed)]
    if len(rows) <= FEW_ROWS:
        return _section("accounts", "Accounts and regions", about, _token_table("tokens", "Accounts", rows))
    parts = [about]
    if needy:
        parts += [_token_table("needy", "Accounts that need somebody", needy[: MAX_ROWS // 2])]
        parts += [_left_out(len(needy) - MAX_ROWS // 2)]
    if calm:
        table = _token_table("calm", "Accounts without trouble", calm[: MAX_ROWS // 2])
        summary = (
            f"<summary>{_count(len(calm), 'account and region', 'accounts and regions')} without trouble</summary>"
        )
        parts += [f'<details id="rest">{summary}{table}{_left_out(len(calm) - MAX_ROWS // 2)}</details>\n']
    return _section("accounts", "Accounts and regions", *parts)


def _left_out(count: int) -> str:
    return f"<p>and {count} more; /?account=NAME shows one, /metrics has all.</p>\n" if count > 0 else ""


def _token_table(name: str, label: str, rows: Sequence[TokenRow]) -> str:
    head = ("account", "region", "token", "time left", "last exchange", "what to do")
    return _table(name, label, head, (_token_cells(row) for row in rows)) if rows else ""


def _token_cells(row: TokenRow) -> tuple[str, ...]:
    name = escape(row.account)
    who = f'<a href="/?account={name}">{name}</a>' if row.account else f"application {escape(row.application)}"
    if row.environment != "production":
        who += f" <small>{escape(row.environment)}</small>"
    last = "none yet"
    if row.error:
        reason = f" ({row.reason})" if row.reason else ""
        again = f", next try in {_span(row.pause)}" if row.pause else ""
        last = f"{row.error}{reason}, {_count(row.failures, 'time')} in a row{again}"
    elif row.age is not None:
        last = f"good, {_span(row.age)} ago"
    state = TOKEN_STATES[row.state]
    if row.restricted:
        state += f", and {_count(row.restricted, 'restricted one')}"
    do = row.do
    if row.restricted_failed:
        do = f"{do} {_count(row.restricted_failed, 'Restricted Data Token')} could not be had.".strip()
    return (
        f'<th scope="row">{who}</th>',
        _cell(row.region),
        _cell(state, f"state {row.state}"),
        _cell("–" if row.left is None else _span(row.left), "number"),
        _cell(last),
        _cell(do or "–"),
    )


def _plans(snapshot: Snapshot) -> str:
    if not snapshot.plans:
        return _section("plans", "Usage plans under pressure", "<p>None: no call had to wait for long.</p>\n")
    rows = (
        (
            f'<th scope="row">{escape(row.operation)}</th>',
            _cell("all accounts" if row.account == "*" else row.account),
            _cell(row.region),
            _cell(f"{row.rate:.3g} per second", "number"),
            _cell(f"{row.tokens:.1f}", "number short" if row.tokens < 1 else "number"),
            _cell(str(row.waiting), "number short" if row.waiting else "number"),
            _cell(str(row.refused), "number"),
            _cell(str(row.throttled), "number"),
        )
        for row in snapshot.plans[:MAX_PLANS]
    )
    head = ("operation", "account", "region", "rate", "room for", "waiting", "refused", "429 from Amazon")
    table = _table("plan-rows", "Usage plans under pressure", head, rows)
    return _section("plans", "Usage plans under pressure", table, _left_out(len(snapshot.plans) - MAX_PLANS))


def _requests(snapshot: Snapshot) -> str:
    newest = list(reversed(snapshot.requests))[:MAX_SHOWN]
    if not newest:
        return _section("requests", "Recent requests", "<p>None yet.</p>\n")
    head = (
        *("ended, UTC", "status", "operation", "account", "took"),
        *("plan", "token", "Amazon", "note"),
    )
    rows = (_request_cells(snapshot, request) for request in newest)
    says = (
        "<p>Of what each took: the wait for its usage plan, for its token, and for Amazon until its answer began.</p>\n"
    )
    return _section("requests", "Recent requests", says, _table("request-rows", "Recent requests", head, rows))


def _request_cells(snapshot: Snapshot, request: RequestRecord) -> tuple[str, ...]:
    kind = "bad" if name_of(request) else "other" if request.status >= 400 else "fine"
    sent_again = f"{request.attempts} attempts" if request.attempts > 1 else ""
    notes = (request.error, request.hint, sent_again, request.caller and f"by {request.caller}")
    return (
        _cell(_clock(snapshot, request.ended), "number"),
        _cell(str(request.status), f"number {kind}"),
        f'<th scope="row">{escape(request.method)} {escape(request.operation)}</th>',
        _cell(f"{request.account} {request.region}" if request.account != "-" else "–"),
        _cell(_seconds(request.duration), "number"),
        _cell(_seconds(request.rate_limit_wait), "number"),
        _cell(_seconds(request.token_wait), "number"),
        _cell(_seconds(request.upstream), "number"),
        _cell(", ".join(filter(None, notes)) or "–"),
    )


def _errors(snapshot: Snapshot) -> str:
    if not snapshot.errors:
        return _section("errors", "Errors by hint", "<p>None since the start.</p>\n")
    rows = (
        (
            f'<th scope="row">{escape(row.name)}</th>',
            _cell(responsible_for(row.name)),
            _cell(str(row.recent), "number"),
            _cell(str(row.times), "number"),
            f"<td>{_prose(row.meaning)}</td>",
        )
        for row in snapshot.errors
    )
    head = ("error or hint", "whose fault", "in five minutes", "since the start", "what it means")
    return _section("errors", "Errors by hint", _table("error-rows", "Errors by hint", head, rows))


def _configuration(snapshot: Snapshot) -> str:
    configuration = snapshot.configuration
    last = configuration["last_reload"]
    reload = f"{last['result']}, {last['at']}" if last else "none since the start"
    facts = [("in force since", configuration["good_since"]), ("last reload", reload)]
    if configuration["needs_restart"]:
        facts += [("counts after a restart", ", ".join(configuration["needs_restart"]))]
    if snapshot.store_is_up is not None:
        failures = ", ".join(f"{reason} {count}" for reason, count in snapshot.store_failures.items()) or "none"
        facts += [
            ("store that replicas share", "there" if snapshot.store_is_up else "lost: this one is on its own"),
            ("its failures since the start", failures),
        ]
    if snapshot.regions_down:
        facts += [
            (
                "regions that fail throughout",
                ", ".join(f"{region} ({where})" for where, region in snapshot.regions_down),
            )
        ]
    facts += [
        (f"client secret of {name}", _secret(left)) for name, left in list(snapshot.secrets_left.items())[:MAX_PLANS]
    ]
    terms = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>\n" for name, text in facts)
    problems = "".join(f"<li>{escape(problem)}</li>\n" for problem in configuration["problems"])
    mistakes = f"<p>The newest one was refused:</p><ul>\n{problems}</ul>\n" if problems else ""
    return _section("configuration", "Configuration", mistakes, f"<dl>\n{terms}</dl>\n")


def _secret(left: float) -> str:
    return f"{_span(left)} left of its 180 days" if left > 0 else "past its 180 days"


# Words and numbers.


def _count(count: int, one: str, many: str = "") -> str:
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


def _prose(text: str) -> str:
    """Return a sentence as HTML; what it has between backticks is code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _clock(snapshot: Snapshot, monotonic: float) -> str:
    return snapshot.moment(monotonic)[11:19]


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds >= 1 or seconds == 0:
        return f"{seconds:.2f} s" if seconds else "0"
    return f"{seconds * 1000:.0f} ms" if seconds >= 0.01 else f"{seconds * 1000:.1f} ms"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _span(seconds: float) -> str:
    """Return a time as one would say it: `12 s`, `43 min`, `5 h`, `17 days`."""
    units: Sequence[tuple[float, Callable[[float], str]]] = (
        (90, lambda left: f"{left:.0f} s"),
        (90 * 60, lambda left: f"{left / 60:.0f} min"),
        (48 * 3600, lambda left: f"{left / 3600:.0f} h"),
    )
    return next((say(seconds) for most, say in units if seconds < most), f"{seconds / 86400:.0f} days")
