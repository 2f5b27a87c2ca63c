"""The results of `check --live`, as text, as JSON, and as progress while it runs."""

import asyncio
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TextIO

from proxy.config import Config, Region

Check = Literal["connection", "clock", "grantless", "token", "call", "rdt"]
Result = Literal["ok", "warning", "failed", "not tried"]

TERMINAL_INTERVAL = 0.2  # seconds between two updates
FILE_INTERVAL = 5.0
MAX_NAMED = 5  # accounts with the same failure

_MARKS: dict[Result, str] = {"ok": "ok", "warning": "warning", "failed": "FAILED", "not tried": "-"}
_COLUMNS: tuple[Check, ...] = ("token", "call", "rdt")


class CheckResult(NamedTuple):
    """The result of one check; fields that do not apply are empty.

    `code` is for programs, `detail` says what happened, `advice` what to do; neither has secrets or personal data.
    """

    check: Check
    result: Result
    application: str = ""
    account: str = ""
    region: str = ""
    host: str = ""
    code: str = ""
    detail: str = ""
    advice: str = ""
    countries: tuple[str, ...] = ()


class AccountRegion(NamedTuple):
    """An account in a region."""

    account: str
    region: Region


def select(config: Config, accounts: Sequence[str], regions: Sequence[str]) -> list[AccountRegion]:
    """Return the accounts and regions to check: all of them if none is named."""
    return [
        AccountRegion(name, region)
        for name, account in config.accounts.items()
        if not accounts or name in accounts
        for region in account.refresh_tokens
        if not regions or region in regions
    ]


@dataclass(slots=True)
class Report:
    """The targets, the results so far, and how many targets are completed."""

    targets: list[AccountRegion]
    results: list[CheckResult] = field(default_factory=list)
    completed: int = 0
    is_complete: bool = False

    @property
    def ok(self) -> bool:
        """Whether everything was checked and nothing failed."""
        return self.is_complete and all(result.result in {"ok", "warning"} for result in self.results)


class Progress:
    """Shows progress: on one line of a terminal, updated often, or as a line now and then elsewhere."""

    def __init__(self, report: Report, stream: TextIO = sys.stderr, now: Callable[[], float] = time.monotonic) -> None:
        self._report = report
        self._stream = stream
        self._now = now
        self._is_terminal = stream.isatty()
        self._next = now() + (0.0 if self._is_terminal else FILE_INTERVAL)
        self._line, self._last_line = "", 0

    def update(self) -> None:
        """Show the progress if the last update is long enough ago."""
        now = self._now()
        if now < self._next:
            return
        failed = len({(one.account, one.region) for one in self._report.results if one.result == "failed"} - {("", "")})
        line = f"checked {self._report.completed} of {len(self._report.targets)}, {failed} with trouble"
        if self._is_terminal:
            self._stream.write(f"\r{line:<{self._last_line}}" if line != self._line else "")
            self._line, self._last_line = line, len(line)
        else:
            self._stream.write(f"{line}\n")
        self._stream.flush()
        self._next = now + (TERMINAL_INTERVAL if self._is_terminal else FILE_INTERVAL)

    async def run(self) -> None:
        """Update until this is cancelled."""
        while True:
            self.update()
            await asyncio.sleep(TERMINAL_INTERVAL)

    def clear(self) -> None:
        """Clear the line."""
        if self._last_line:
            self._stream.write(f"\r{'':<{self._last_line}}\r")
            self._stream.flush()


def as_json(report: Report) -> str:
    """Return the report as JSON: `works`, `complete`, and one object for each check, always with the same keys."""
    checks = [
        {
            "step": result.check,
            "result": result.result,
            "application": result.application,
            "account": result.account,
            "region": result.region,
            "host": result.host,
            "code": result.code,
            "said": result.detail,
            "advice": result.advice,
            "countries": list(result.countries),
        }
        for result in report.results
    ]
    return json.dumps({"works": report.ok, "complete": report.is_complete, "checks": checks}, indent=2)


def as_text(report: Report) -> str:
    """Return the report as text: a table of the accounts, then what failed, why, and what to do."""
    lines = [*_table(report), *_grouped_failures(report.results), _conclusion(report)]
    return "\n".join(lines)


def _table(report: Report) -> Iterator[str]:
    by_place: dict[tuple[str, str], dict[Check, CheckResult]] = {}
    for result in report.results:
        if result.account:
            by_place.setdefault((result.account, result.region), {})[result.check] = result
    rows = [("ACCOUNT", "REGION", "TOKEN", "CALL", "RDT", "MARKETPLACES")]
    rows += [_row(target, by_place.get(target, {})) for target in report.targets]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
    yield ""
    for result in report.results:
        if not result.account:
            yield f"{_subject(result)}: {_MARKS[result.result]}"
    yield ""


def _row(target: AccountRegion, found: dict[Check, CheckResult]) -> tuple[str, str, str, str, str, str]:
    token, call, restricted = (_MARKS[found[step].result] if step in found else "" for step in _COLUMNS)
    countries = found["call"].countries if "call" in found else ()
    return (target.account, target.region, token, call, restricted, " ".join(countries))


def _subject(result: CheckResult) -> str:
    """Return what a result is about."""
    if result.account:
        return f"{result.account} {result.region} {result.check}"
    if result.application:
        return f"{result.check} token of application {result.application}"
    return f"connection to {result.host}" if result.host else result.check


def _grouped_failures(results: list[CheckResult]) -> Iterator[str]:
    """Yield the failures; the same failure of many accounts is shown once."""
    groups: dict[tuple[str, ...], list[CheckResult]] = {}
    for result in results:
        if result.result in {"failed", "warning"}:
            key = result.check, result.code, result.advice, result.application
            groups.setdefault(key, []).append(result)
    for group in groups.values():
        first, more = group[0], len(group) - MAX_NAMED
        named = ", ".join(_subject(finding) for finding in group[:MAX_NAMED])
        yield f"{named}{f' and {more} more' if more > 0 else ''}:"
        who = f"account {first.account} in {first.region}"
        yield f"  {first.code}: {first.detail.replace(who, 'them' if len(group) > 1 else who)}"
        yield f"  {first.advice}"
        yield ""


def _conclusion(report: Report) -> str:
    if not report.is_complete:
        return f"Interrupted: {report.completed} of {len(report.targets)} were looked at."
    troubled = {(one.account, one.region) for one in report.results if one.account and one.result != "ok"}
    count = len(report.targets)
    if report.ok:
        return f"All {count} work." if count > 1 else "It works."
    return f"{count - len(troubled)} of {count} accounts and regions work."
