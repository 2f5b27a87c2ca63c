"""The generated parts of the reference pages, and of other pages that take text from the code.

`python -m docs.generate` writes them; tests/project/test_docs.py fails where a page differs from the code. In a page of
docs/reference/, what stands between `<!-- NAME -->` and `<!-- /NAME -->` is generated; all else is written by hand.
"""

import argparse
import re
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from signal import SIGTERM
from typing import Any, get_args, get_origin

from prometheus_client.metrics import MetricWrapperBase
from pydantic import BaseModel

import proxy
from docs.log_events import events
from docs.navigation import ROOT
from proxy.amazon.catalog.rebuild import _parser as rebuild_parser
from proxy.amazon.report_types import RESTRICTED_TYPES
from proxy.cli.common import FAILED, INTERRUPTED, OK, USAGE
from proxy.cli.main import _parser as proxy_parser
from proxy.cli.options import ALL_FLAGS, add_config_flags
from proxy.config.model import Config, default_as_written, settings_in
from proxy.errors import ProxyError, all_errors
from proxy.observability.collectors import CallbackCollector
from proxy.observability.metrics import Metrics
from proxy.request.access_log import CLIENT_CLOSED_REQUEST, _audit_fields, _log_fields
from proxy.request.authentication import KEY_HEADER
from proxy.request.context import RequestContext
from proxy.request.forbidden_hints import HINTS
from proxy.request.request_options import (
    CLIENT_HEADER,
    MAX_WAIT_HEADER,
    PRIORITY_HEADER,
    RETRY_HEADER,
    TIMEOUT_HEADER,
)
from proxy.request.target import ACCOUNT_HEADER, REGION_HEADER
from proxy.request.token_selection import ELEMENTS_HEADER
from proxy.request.upstream.request_headers import BODY_FIELDS, STRIPPED_HEADERS, STRIPPED_PREFIXES
from proxy.request.upstream.response import HOP_BY_HOP
from proxy.simulator.cli import _parser as simulator_parser

FOLDER = ROOT / "docs"
REFERENCE = FOLDER / "reference"
SOURCE = Path(proxy.__file__).parent

# What stands for the names in a mapping; a number in a list of groups is N.
NAMES = {"refresh_tokens": "REGION", "marketplaces": "ID"}


def table(*rows: tuple[str, ...]) -> str:
    """Return a Markdown table; the first row is its head."""
    head, *rest = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rest))


# Configuration.


def settings(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield (key, default, meaning) of every setting."""
    for name, field in model.model_fields.items():
        key, meaning = f"{prefix}{name}", field.description or ""
        below = settings_in(field.annotation) or _in_container(field.annotation)
        if below is None:
            yield f"{key}{_index(name, field)}", default(key, field), meaning
            continue
        if name == "listen":
            yield (
                key,
                f"`{Config().listen[0].address}`",
                f"{meaning} A plain address, or a mapping with the keys below.",
            )
        yield from settings(below, f"{key}{_index(name, field)}.")


def _index(name: str, field: Any) -> str:
    if get_origin(field.annotation) is dict:
        return f".{NAMES.get(name, 'NAME')}"
    return "[N]" if name == "listen" else ""


def _in_container(kind: Any) -> type[BaseModel] | None:
    if get_origin(kind) in {dict, tuple}:
        return next((found for argument in get_args(kind) if (found := settings_in(argument))), None)
    return None


def default(key: str, field: Any) -> str:
    """Return the default of a setting as the table shows it."""
    if field.is_required():
        return "required"
    value = default_as_written(field)
    if value is None:
        return "Amazon's" if key.startswith("endpoints.") else "none"
    if value in ([], {}):
        return "none"
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def settings_tables() -> str:
    """Return one table for the settings that belong to no group, and one for each group."""
    groups: dict[str, list[tuple[str, str, str]]] = {"": []}
    rows = list(settings())
    grouped = {_group(key) for key, *_ in rows if "." in key}
    for key, value, meaning in rows:
        group = _group(key) if _group(key) in grouped else ""
        groups.setdefault(group, []).append((f"`{key}`", value, meaning))
    return "\n\n".join(
        f"### {f'`{group}`' if group else 'Top level'}\n\n" + table(("key", "default", "meaning"), *of_group)
        for group, of_group in groups.items()
    )


def _group(key: str) -> str:
    return re.split(r"[.\[]", key, maxsplit=1)[0]


# Errors.


def errors_table() -> str:
    """Return the table of the proxy's own errors, by status."""
    return table(
        ("code", "status", "fault", "retry", "meaning", "remedy"),
        *(_error(error) for error in sorted(all_errors(), key=lambda error: (error.status, error.code))),
    )


def _error(error: type[ProxyError]) -> tuple[str, ...]:
    code, retry = f"[`{error.code}`](../errors.md#{error.code.lower()})", "yes" if error.retryable else "no"
    return code, str(error.status), error.fault, retry, _meaning(error), error.remedy


def _meaning(error: type[ProxyError]) -> str:
    return (error.__doc__ or "").splitlines()[0]


def hints_table() -> str:
    """Return the table of the hints for Amazon's 401 and 403."""
    return table(
        ("hint", "cause and remedy"), *((f"[`{hint}`](../forbidden.md#{hint})", text) for hint, text in HINTS.items())
    )


# Metrics.


def metrics_table() -> str:
    """Return the table of all series."""
    return table(("series", "type", "labels", "meaning"), *sorted(series()))


def series() -> Iterator[tuple[str, str, str, str]]:
    """Yield (name, type, labels, meaning) of every series."""
    # The registry tells labels only of what was counted already; its collectors know them from the start.
    for metric in Metrics().registry._collector_to_names:
        if isinstance(metric, MetricWrapperBase):
            kind = str(metric._type)
            name = f"{metric._name}_total" if kind == "counter" else metric._name
            yield f"`{name}`", kind, ", ".join(metric._labelnames), metric._documentation
        elif isinstance(metric, CallbackCollector):
            yield f"`{metric.name}`", metric.kind, ", ".join(metric.labels), metric.documentation


# Headers.

REQUEST_HEADERS = {
    ACCOUNT_HEADER: "The account, by its name in the configuration.",
    REGION_HEADER: "The region: `na`, `eu` or `fe`.",
    ELEMENTS_HEADER: "Personal data to request: `buyerInfo,shippingAddress`, or `none`.",
    KEY_HEADER: "The caller's key, where `callers` are configured. `Authorization: Bearer KEY` means the same.",
    MAX_WAIT_HEADER: "How long this call may wait for its usage plan: `500ms`, `30s`; `0`: do not wait.",
    PRIORITY_HEADER: "`background`: wait behind ordinary calls.",
    CLIENT_HEADER: "The sender's name, where several share a listener: callers of one usage plan are served in turn.",
    TIMEOUT_HEADER: "How long the whole call may take, waiting and retries included: `30s`.",
    RETRY_HEADER: "`off`: send this call to Amazon once, whatever happens.",
    "x-request-id": "An id for the log line: up to 64 letters, digits and `._:-`. It is not sent to Amazon.",
}
RESPONSE_HEADERS = {
    "x-sp-proxy": "What the proxy decided and did; on every response. The table below lists its parts.",
    "x-sp-proxy-error": "The code of one of the proxy's own errors; never on a response of Amazon's.",
    "Retry-After": "Whole seconds to wait before the next attempt, on errors of the proxy's where waiting helps.",
}
# The parts of `x-sp-proxy`, which are fields of the log too.
OUTCOME = {
    "account": "The account; `-` where none was found.",
    "region": "The region; `-` where none was found.",
    "operation": "The operation, as `sp-api-proxy operations` lists it; `unknown` for a path that it does not list.",
    "token": "The kind of token that was sent: `lwa`, `grantless`, `rdt`; `none` where nothing was sent to Amazon.",
    "attempts": "How often the call was sent to Amazon.",
    "wait": "Seconds that the call waited for its usage plan.",
    "dropped": "Data elements that were requested and left out, because the application has no role for them.",
    "token_age": "Seconds since the token was issued; only with `hint`.",
    "hint": "The probable cause of a 401 or 403 of Amazon's ([list](errors.md#hints-for-amazons-403)).",
}


def request_headers_table() -> str:
    """Return the table of the headers that an app may send to the proxy."""
    return table(("request header", "meaning"), *((f"`{name}`", text) for name, text in REQUEST_HEADERS.items()))


def response_headers_table() -> str:
    """Return the table of the headers that the proxy adds to a response."""
    return table(("response header", "meaning"), *((f"`{name}`", text) for name, text in RESPONSE_HEADERS.items()))


def outcome_table() -> str:
    """Return the table of what `x-sp-proxy` can hold, in its order."""
    full = RequestContext("GET", 0.0)
    full.dropped_elements, full.hint = ("buyerInfo",), "role"
    names = re.findall(r"(\w+)=", full.summary())
    return table(("part", "meaning"), *((f"`{name}`", OUTCOME[name]) for name in names))


def removed_headers_table() -> str:
    """Return the table of the request headers that do not reach Amazon."""
    return table(
        ("request headers", "why they are removed"),
        (
            _listed(HOP_BY_HOP),
            "they concern one connection only (RFC 9110 section 7.6.1), as do those that `Connection` names",
        ),
        (
            _listed({*STRIPPED_HEADERS, *(f"{prefix}…" for prefix in STRIPPED_PREFIXES)}),
            "credentials of the app, headers that the proxy sets itself, and those that describe your network",
        ),
        (_listed(BODY_FIELDS), "on GET and HEAD only: Amazon refuses them there"),
    )


def _listed(names: set[str] | frozenset[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


# Commands.

EXIT_CODES = {
    OK: "Success. `serve`: every request in flight was finished after SIGTERM, Ctrl-C or `/quitquitquit`.",
    FAILED: (
        "Failure while running, such as a port in use. `explain`: the request would be refused; `wait`, `healthcheck`: "
        "not ready; `requests`: no proxy responds; `check --live`: an account or region does not work; `authorize`: no "
        "refresh token."
    ),
    USAGE: "Wrong usage or configuration.",
    INTERRUPTED: "Ctrl-C. `serve`: before the requests in flight were finished.",
    128 + SIGTERM: "`serve`: SIGTERM or `/quitquitquit`, before the requests in flight were finished.",
}


def parsers() -> Iterator[argparse.ArgumentParser]:
    """Yield the parser of every command, sorted by name."""
    others = {parser.prog: parser for parser in (simulator_parser(), rebuild_parser())}
    commands = {parser.prog: parser for parser in _subcommands(proxy_parser())}
    for _, parser in sorted({**commands, **others}.items()):
        yield parser


def _subcommands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    for action in parser._subparsers._group_actions if parser._subparsers else ():
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


def configuration_flags_table() -> str:
    """Return the table of the flags that most commands share."""
    parser = argparse.ArgumentParser(add_help=False)
    add_config_flags(parser)
    return table(("flag", "meaning"), *(_flag(action) for action in parser._actions))


def commands() -> str:
    """Return a section for each command: its purpose, its arguments, which shared flags it takes."""
    introduction = (
        (
            f"[`{_name(parser)}`](#{_name(parser).replace(' ', '-')})",
            _with_code((parser.description or "").partition(":")[0].rstrip(".")),
        )
        for parser in parsers()
    )
    return "\n\n".join((table(("command", "purpose"), *introduction), *(_command(parser) for parser in parsers())))


def _name(parser: argparse.ArgumentParser) -> str:
    return parser.prog.partition(" ")[2]


def _command(parser: argparse.ArgumentParser) -> str:
    own = [
        action
        for action in parser._actions
        if not isinstance(action, argparse._HelpAction | argparse._SubParsersAction)
        and not set(action.option_strings) & set(ALL_FLAGS)
    ]
    shared = [flag for flag in ALL_FLAGS if flag in parser._option_string_actions]
    parts = [f"### `{_name(parser)}`", _with_code(parser.description or "")]
    if own:
        parts.append(table(("argument", "meaning"), *(_flag(action) for action in own)))
    if shared:
        which = "all" if len(shared) == len(ALL_FLAGS) else ", ".join(f"`{flag}`" for flag in shared)
        parts.append(f"[Configuration flags](#configuration-flags): {which}.")
    return "\n\n".join(parts)


def _flag(action: argparse.Action) -> tuple[str, str]:
    value = "" if action.nargs == 0 else str(action.metavar or "|".join(action.choices or ()) or action.dest)
    names = ", ".join(action.option_strings)
    written = f"{names} {value}".strip() if value else names
    needed = " Required." if action.required and action.option_strings else ""
    text = _with_code((action.help or "").replace("%(default)s", str(action.default)))
    return f"`{written}`".replace("|", r"\|"), f"{text[:1].upper()}{text[1:].rstrip('.')}.{needed}".replace("|", r"\|")


def _with_code(text: str) -> str:
    """Return a text of `--help` with the flags in it as code: typography would make a dash of `--`."""
    return re.sub(r"(?<![`\w])(--[a-z][a-z-]*)", r"`\1`", text)


def exit_codes_table() -> str:
    """Return the table of exit codes."""
    return table(("exit code", "meaning"), *((str(code), text) for code, text in EXIT_CODES.items()))


# The log.

_EACH_LINE = {
    "time": "When, in UTC: `2026-12-01T15:04:05.123Z`.",
    "level": "`debug`, `info`, `warning` or `error`.",
    "message": "The event; `request` for a finished request.",
    "exception": "The type of an exception and where it was raised, without its text. Only where there was one.",
}
_AUDIT_LINE = {"time": _EACH_LINE["time"], "listener": "The listener that the request came in by."}
REQUEST_FIELDS = {
    **OUTCOME,
    "code": f"The status of the response; {CLIENT_CLOSED_REQUEST}: the client disconnected before it began.",
    "status": "The same as `code` of the log.",
    "method": "The method; `other` for one that is not forwarded.",
    "caller": "The caller's name in the configuration; null where none was identified.",
    "duration": "Seconds from the request's header block to the last byte of the response.",
    "upstream": "Seconds from sending the call to Amazon to the header block of its response; null: nothing was sent.",
    "amazon_request_id": "Amazon's `x-amzn-RequestId`, which its support asks for.",
    "request_id": "The app's `x-request-id`, where it is well-formed.",
    "error": "The code of the proxy's own error, or `ClientLeft`; empty (audit: null) where there was none.",
    "broken": "True where the response was cut off.",
    "data_elements": "The personal data that the token covers, as a list.",
}
EVENT_FIELDS = {
    "account": "The account.",
    "accounts": "How many accounts are configured.",
    "address": "The address of a listener.",
    "admin": "The admin address.",
    "after": "Seconds that the store was unreachable.",
    "application": "The application, by its name in the configuration.",
    "because": "The reason: a signal, a changed file, or an error.",
    "certificate": "The certificate's file.",
    "collector": "The host of the collector of traces.",
    "connections": "How many connections were cut off.",
    "cut_off": "How many requests in flight were cut off at shutdown.",
    "duration": "Seconds that a token exchange took.",
    "element": "The data element.",
    "files": "How many files the process may open.",
    "from_clients": "How many connections of clients that leaves.",
    "health": "The health address.",
    "keys": "The settings that need a restart.",
    "kind": "The kind of token: `lwa`, `grantless` or `rdt`.",
    "listen": "The addresses of the listeners.",
    "look_at": "The setting, file or variable that holds the refused credential.",
    "operation": "The operation.",
    "place": "Where in the code it was raised: `module:line`.",
    "problem": "What should be changed, with its key and where it was set.",
    "problems": "What is wrong with the configuration.",
    "protected_by": "What protects the listener: `TLS` or `nothing`.",
    "reason": "The cause, in one word.",
    "region": "The region.",
    "result": "`ok`, `refused` or `failed`.",
    "store": "The address of Redis.",
    "to_amazon": "How many connections to Amazon that leaves.",
    "type": "The type of the exception.",
}


def request_line_table() -> str:
    """Return the table of the fields of a request's log line."""
    fields = _log_fields(RequestContext("GET", 0.0), 0.0)
    return _fields_table({**_EACH_LINE, **{name: REQUEST_FIELDS[name] for name in fields}})


def audit_line_table() -> str:
    """Return the table of the fields of a line of the audit log."""
    fields = _audit_fields(RequestContext("GET", 0.0))
    return _fields_table({**_AUDIT_LINE, **{name: REQUEST_FIELDS[name] for name in fields}})


def _fields_table(fields: dict[str, str]) -> str:
    return table(("field", "meaning"), *((f"`{name}`", text) for name, text in fields.items()))


def events_table() -> str:
    """Return the table of all events but `request`."""
    return table(
        ("message", "level", "fields"),
        *(
            (event.message, event.level, ", ".join(f"`{name}`" for name in event.fields))
            for event in events(SOURCE)
            if event.message != "request"
        ),
    )


def event_fields_table() -> str:
    """Return the table of the fields of these events."""
    used = {name for event in events(SOURCE) if event.message != "request" for name in event.fields}
    return _fields_table({name: EVENT_FIELDS[name] for name in sorted(used)})


# Pages.

BLOCKS: dict[str, dict[str, Callable[[], str]]] = {
    "configuration.md": {"settings": settings_tables},
    "errors.md": {"errors": errors_table, "hints": hints_table},
    "metrics.md": {"metrics": metrics_table},
    "headers.md": {
        "request headers": request_headers_table,
        "response headers": response_headers_table,
        "outcome": outcome_table,
        "removed headers": removed_headers_table,
    },
    "cli.md": {
        "commands": commands,
        "configuration flags": configuration_flags_table,
        "exit codes": exit_codes_table,
    },
    "log-fields.md": {
        "request line": request_line_table,
        "audit line": audit_line_table,
        "events": events_table,
        "event fields": event_fields_table,
    },
}


def generated(text: str, name: str) -> str:
    """Return what stands between the markers of a generated part."""
    return text.partition(f"<!-- {name} -->")[2].partition(f"<!-- /{name} -->")[0].strip()


def _with_blocks(text: str, blocks: dict[str, Callable[[], str]]) -> str:
    for name, make in blocks.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n\n{make()}\n\n{end}{rest.partition(end)[2]}"
    return text


def _with_errors(text: str) -> str:
    return _with_openings(text, {error.code: _about(error) for error in all_errors()})


def _about(error: type[ProxyError]) -> str:
    retry = "yes" if error.retryable else "no"
    return f"*{error.status}, fault: {error.fault}, retry: {retry}.* {_meaning(error)} **Remedy:** {error.remedy}"


def _with_hints(text: str) -> str:
    return _with_openings(text, {f"`{hint}`": meaning for hint, meaning in HINTS.items()})


def _with_openings(text: str, paragraphs: dict[str, str]) -> str:
    """Return a page with this first paragraph below each of these headings; new ones go before the page's last part."""
    for heading, paragraph in paragraphs.items():
        opening = f"\n### {heading}\n\n"
        if opening not in text:
            last = text.rindex("\n## ")
            text = f"{text[:last]}{opening}\n{text[last:]}"
        before, _, after = text.partition(opening)
        wrapped = textwrap.fill(paragraph, 120, break_long_words=False, break_on_hyphens=False)
        text = f"{before}{opening}{wrapped}\n{after[after.index(chr(10) * 2) + 1 :]}"
    return text


def _with_report_types(text: str) -> str:
    before, _, rest = text.partition("<!-- report types -->\n")
    after = rest.partition("<!-- /report types -->")[2]
    types = "".join(f"- `{name}`\n" for name in sorted(RESTRICTED_TYPES))
    return f"{before}<!-- report types -->\n{types}<!-- /report types -->{after}"


# What each page becomes when its generated parts are made again, by its path below docs/.
PAGES: dict[str, Callable[[str], str]] = {
    "errors.md": _with_errors,
    "forbidden.md": _with_hints,
    "personal-data.md": _with_report_types,
    **{f"reference/{name}": partial(_with_blocks, blocks=blocks) for name, blocks in BLOCKS.items()},
}


def write() -> None:
    """Write the generated parts of all pages."""
    for name, made in PAGES.items():
        path = FOLDER / name
        path.write_text(made(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write()
