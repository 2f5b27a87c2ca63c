"""`requests`: follow the requests that a proxy serves, as `tail -f` follows a file."""

import argparse
import json
import os
import select
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TextIO

from proxy.cli import admin_client
from proxy.cli.admin_client import AdminAddress
from proxy.cli.common import FAILED, INTERRUPTED, OK, USAGE, Command, print_err
from proxy.cli.probe import add_admin_flags, with_admin_address

POLL_INTERVAL = 0.5  # seconds
MAX_BYTES = 4 * 1024 * 1024  # of one response

_RED, _YELLOW, _GREEN, _PLAIN = "\x1b[31m", "\x1b[33m", "\x1b[32m", "\x1b[0m"


@dataclass(frozen=True, slots=True)
class RequestFilter:
    """Which requests are shown, and how. `status`: a code or a class such as 4xx; `tail`: how many past ones."""

    account: str = ""
    status: str = ""
    failed: bool = False
    tail: int = 10
    as_json: bool = False
    follow: bool = True

    def matches(self, request: Mapping[str, Any]) -> bool:
        """Return whether a request is among them."""
        status = str(request["status"])
        if self.account and request["account"] != self.account:
            return False
        if self.failed and int(status) < 400 and not request["error"]:
            return False
        return not self.status or status == self.status or f"{status[0]}xx" == self.status


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that select requests and their format."""
    group = parser.add_argument_group("requests")
    group.add_argument("-n", dest="past", metavar="NUMBER", type=_count, default=10, help="how many of the past (10)")
    group.add_argument("--account", metavar="NAME", default="", help="only those of this account")
    group.add_argument("--status", metavar="CODE", default="", help="only those answered so: 429, or 4xx")
    group.add_argument("--failed", action="store_true", help="only those answered with 400 and more")
    group.add_argument("--json", action="store_true", help="one JSON object a line, for programs")
    group.add_argument("--once", action="store_true", help="show those of the past, and end")


def _count(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 6:
        raise argparse.ArgumentTypeError("must be a number such as 10")
    return int(text)


def filter_from(options: argparse.Namespace) -> RequestFilter:
    """Return the filter that the flags describe; raise ValueError if `--status` is not valid."""
    status = options.status.lower()
    if status and not (len(status) == 3 and status[0] in "12345" and (status[1:] == "xx" or status[1:].isdecimal())):
        raise ValueError("must be a status such as 429 or a class such as 5xx")
    return RequestFilter(options.account, status, options.failed, options.past, options.json, not options.once)


def follow(
    address: AdminAddress,
    which: RequestFilter,
    out: TextIO,
    complain: Callable[[str], None],
    *,
    with_colour: bool = False,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Show requests until Ctrl-C or until the output is closed; return the exit code.

    A proxy that does not respond at first is a failure; one that stops later is waited for.
    """
    has_shown = False
    try:
        for request in _status_body(address, which, out, complain, sleep):
            has_shown = True
            out.write(f"{json.dumps(request)}\n" if which.as_json else _line(request, with_colour=with_colour))
            out.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # a ConnectionError too, but of the output: `requests | head`, which main handles
        raise
    except ConnectionError as exc:
        complain(str(exc))
        return FAILED
    if not has_shown and which.tail and not which.follow:
        complain("no request matches")
    return OK


def _status_body(
    address: AdminAddress,
    which: RequestFilter,
    out: TextIO,
    complain: Callable[[str], None],
    sleep: Callable[[float], None],
) -> Iterator[Mapping[str, Any]]:
    """Yield the matching requests as they are served; end when the output is closed.

    Raises ConnectionError if nothing responds at first.
    """
    found = _poll(address, "")
    yield from _last([request for request in found["requests"] if which.matches(request)], which.tail)
    while which.follow:
        sleep(POLL_INTERVAL)
        if is_pipe_closed(out):
            return
        before, found = found, poll_until_available(address, found["cursor"], out, complain, sleep)
        if not found:
            return
        if found["instance"] != before["instance"]:
            complain("the proxy was restarted")
        if found["missed"]:
            complain(f"{found['missed']} more were answered than it remembers")
        yield from filter(which.matches, found["requests"])


def _last(requests: list[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    return requests[max(0, len(requests) - count) :]


def poll_until_available(
    address: AdminAddress, cursor: str, out: TextIO, complain: Callable[[str], None], sleep: Callable[[float], None]
) -> Mapping[str, Any]:
    """Return the next response, waiting while there is none, which is reported once; None when the output is closed."""
    has_said = False
    while not is_pipe_closed(out):
        try:
            return _poll(address, cursor)
        except ConnectionError as exc:
            if not has_said:
                complain(f"{exc}; waiting for it")
            has_said = True
        sleep(POLL_INTERVAL)
    return {}


def _poll(address: AdminAddress, cursor: str) -> Mapping[str, Any]:
    """Return the proxy's response; raise ConnectionError if it is not valid."""
    response = admin_client.request(address, "GET", f"/requests?after={cursor}", max_bytes=MAX_BYTES)
    if not response.ok:
        raise ConnectionError(response.text)
    try:
        found: Mapping[str, Any] = json.loads(response.text)
        _ = found["instance"], found["cursor"], found["missed"], found["requests"]
    except (ValueError, TypeError, KeyError):
        raise ConnectionError(f"what answers at {address} is no proxy of this version") from None
    return found


def is_pipe_closed(out: TextIO) -> bool:
    """Return whether the reader of a pipe is gone; without a line to write, nothing else would show it."""
    if not hasattr(select, "poll"):  # Windows
        return False
    try:
        poll = select.poll()
        poll.register(out.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except OSError:
        return False  # not a file: a buffer in memory


def _line(request: Mapping[str, Any], *, with_colour: bool) -> str:
    """Return one line for a person."""
    status = str(request["status"])
    colour = {"2": _GREEN, "3": _GREEN, "5": _RED}.get(status[0], _YELLOW)
    shown = f"{colour}{status}{_PLAIN}" if with_colour else status
    where = f"{request['account']}/{request['region']}"
    what = f"{request['method']} {request['operation']}"
    split = f"wait {_seconds(request['wait'])}, token {_seconds(request['token_wait'])}"
    split += f", Amazon {_seconds(request['upstream'])}"
    attempts = f"{request['attempts']} attempts" if request["attempts"] > 1 else None
    by = f"by {request['caller']}" if request["caller"] else None
    notes = ", ".join(filter(None, (request["error"], request["hint"], attempts, by)))
    line = f"{request['at'][11:23]} {{}} {where:<16} {what:<44} {request['duration']:8.3f} s ({split})  {notes}"
    return f"{_printable(line.rstrip()).replace('{}', shown, 1)}\n"


def _seconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds:.3f}"


def _printable(text: str) -> str:
    """Return a text without control characters, whatever server sent it."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add_admin_flags(parser)
    add_flags(parser)


def _requests(options: argparse.Namespace) -> int:
    try:
        request_filter = filter_from(options)
    except ValueError as exc:
        print_err(f"sp-api-proxy: --status: {exc}")
        return USAGE
    is_terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    with_colour = is_terminal and not os.environ.get("NO_COLOR")
    return with_admin_address(
        options, lambda target: follow(target, request_filter, sys.stdout, print_err, with_colour=with_colour)
    )


COMMANDS = {"requests": Command("sp-api-proxy requests --account acme --failed", _add_flags, _requests)}
