"""What was found about the accounts, and how is it shown: to a person, to a program, and while it is going on?"""

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

TERMINAL_INTERVAL = 0.2  # seconds between two signs of progress
FILE_INTERVAL = 5.0
MAX_NAMED = 5  # of those who have the same trouble

_MARKS: dict[Result, str] = {"ok": "ok", "warning": "warning", "failed": "FAILED", "not tried": "-"}
_COLUMNS: tuple[Check, ...] = ("token", "call", "rdt")


class CheckResult(NamedTuple):
    """What came of one step; what it is not about is empty.

    `code` is a word for programs, `said` what happened, `advice` what to do; both hold nothing secret or personal.
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
    """Return the accounts and regions to look at; no names stand for all of them."""
    return [
        AccountRegion(name, region)
        for name, account in config.accounts.items()
        if not accounts or name in accounts
        for region in account.refresh_tokens
        if not regions or region in regions
    ]


@dataclass(slots=True)
class Report:
    """What is wanted, what was found so far, and how many of the wanted are done."""

    targets: list[AccountRegion]
    results: list[CheckResult] = field(default_factory=list)
    completed: int = 0
    is_complete: bool = False

    @property
    def ok(self) -> bool:
        """Whether everything was tried, and nothing failed."""
        return self.is_complete and all(result.result in {"ok", "warning"} for result in self.results)


class Progress:
    """Says how far it has come: over and over on one line of a terminal, seldom elsewhere."""

    def __init__(self, report: Report, stream: TextIO = sys.stderr, now: Callable[[], float] = time.monotonic) -> None:
        self._report = report
        self._stream = stream
        self._now = now
        self._is_terminal = stream.isatty()
        self._next = now() + (0.0 if self._is_terminal else FILE_INTERVAL)
        self._line, self._last_line = "", 0

    def update(self) -> None:
        """Say it, where the last time was long enough ago."""
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
        """Say it again and again, until this is cancelled."""
        while True:
            self.update()
            await asyncio.sleep(TERMINAL_INTERVAL)

    def clear(self) -> None:
        """Leave the line as it was before."""
        if self._last_line:
            self._stream.write(f"\r{'':<{self._last_line}}\r")
            self._stream.flush()


def as_json(report: Report) -> str:
    """Return the report for programs: `works`, `complete`, and one object with always the same keys for each step."""
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
    """Return the report for a person: a table of what works, and below it what does not, why, and what to do."""
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
    """Return whom or what a finding is about."""
    if result.account:
        return f"{result.account} {result.region} {result.check}"
    if result.application:
        return f"{result.check} token of application {result.application}"
    return f"connection to {result.host}" if result.host else result.check


def _grouped_failures(results: list[CheckResult]) -> Iterator[str]:
    """Yield what is wrong: the same trouble of many accounts once."""
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
