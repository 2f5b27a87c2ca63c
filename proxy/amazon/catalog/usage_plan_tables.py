"""The usage plan in the description of an operation.

Amazon's models state the plan only in prose, as a Markdown table under the words Usage Plan. Most tables have a head, a
rule and one row `| 0.5 | 30 |`. Some have a first column with the word Default, line ends written as a backslash and
an n, `n` for numbers that were never filled in, or `.5`.
"""

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass

_LINE_END = re.compile(r"\\r\\n|\\n|\r\n?")
_HTML_ROW = re.compile(r"</?tr\b[^<>]*>", re.IGNORECASE)
_HTML_BORDER = re.compile(r"\s*</t[dh]>\s*<t[dh]\b[^<>]*>\s*", re.IGNORECASE)
_HTML_EDGE = re.compile(r"<t[dh]\b[^<>]*>\s*|\s*</t[dh]>", re.IGNORECASE)
_HTML_TAG = re.compile(r"</?[a-z][^<>\n]*>", re.IGNORECASE)
_RULE = re.compile(r"[\s|:+=-]+")
_NUMBER = re.compile(r"\d{1,3}(?:[,\s]\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+", re.ASCII)
_RATE = re.compile(r"\brate\b|\brequests (?:per|/)", re.IGNORECASE)
_BURST = re.compile(r"\bburst\b", re.IGNORECASE)
_UNIT = re.compile(r"(?:\bper|/)\s*(second|sec|minute|min|hour|day)", re.IGNORECASE)
_SECONDS = {"second": 1, "sec": 1, "minute": 60, "min": 60, "hour": 3600, "day": 86400}

Cells = list[str]


@dataclass(frozen=True, slots=True)
class UsagePlan:
    """Calls per second and calls at once, as the model writes them; `stated` is False where no numbers stand there."""

    rate: str = ""
    burst: str = ""
    stated: bool = True


def parse_usage_plan(description: str) -> UsagePlan | None:
    """Return the plan that a description states, None where it has no table of one.

    Of several tables the first with numbers counts; of several rows the one called Default, or else the first.
    """
    plans = [_plan(table) for table in _plan_tables(description)]
    return next((plan for plan in plans if plan.stated), plans[0] if plans else None)


def _plan_tables(description: str) -> Iterator[list[Cells]]:
    """Yield each table that has a column for the rate and one for the burst, its head first."""
    table: list[Cells] = []
    for line in _lines(description):
        cells = _cells(line)
        if cells and _columns(cells) is not None:
            if table:
                yield table
            table = [cells]
        elif cells and table:
            table.append(cells)
        elif line.strip() and not _RULE.fullmatch(line) and table:  # prose ends a table
            yield table
            table = []
    if table:
        yield table


def _lines(description: str) -> list[str]:
    """Return the lines of a description, those of an HTML table in the form of a Markdown table."""
    # Mark row ends with NUL, so that line ends between the cells of one row can be joined as white space.
    text = _HTML_ROW.sub("\0", _LINE_END.sub("\n", description))
    text = _HTML_EDGE.sub("|", _HTML_BORDER.sub("|", text))
    return html.unescape(_HTML_TAG.sub(" ", text)).replace("\0", "\n").split("\n")


def _cells(line: str) -> Cells:
    """Return the cells of a table's line, empty ones too; nothing for prose and for rules (`| ---- | ---- |`)."""
    if "|" not in line or _RULE.fullmatch(line):
        return []
    return [cell.strip("*_` \t\u00a0") for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]


def _columns(head: Cells) -> tuple[int, int] | None:
    """Return which columns hold rate and burst; None where the line is no head of a usage plan."""
    burst = next((index for index, cell in enumerate(head) if _BURST.search(cell)), None)
    rate = next((index for index, cell in enumerate(head) if _RATE.search(cell) and index != burst), None)
    return None if rate is None or burst is None else (rate, burst)


def _plan(table: list[Cells]) -> UsagePlan:
    head, *body = table
    columns = _columns(head)
    row = next((row for row in body if row[0].lower().startswith("default")), body[0] if body else [])
    if columns is None or len(row) <= max(columns):
        return UsagePlan(stated=False)
    rate, burst = _number(row[columns[0]]), _number(row[columns[1]])
    # A rate of 0 or a burst below 1 is no plan: no request could ever be sent.
    if not rate or not burst or float(rate) == 0 or float(burst) < 1 or not float(burst).is_integer():
        return UsagePlan(stated=False)
    return UsagePlan(_per_second(rate, head[columns[0]]), f"{float(burst):.0f}")


def _number(cell: str) -> str:
    """Return a number without thousands separators and with a digit before its point; empty where it is none."""
    if not _NUMBER.fullmatch(cell):
        return ""
    text = re.sub(r"[,\s]", "", cell)
    return f"0{text}" if text.startswith(".") else text


def _per_second(rate: str, heading: str) -> str:
    """Return the rate as the model writes it, or converted where its heading speaks of another unit of time."""
    unit = _UNIT.search(heading)
    seconds = _SECONDS[unit[1].lower()] if unit else 1
    if seconds == 1:
        return rate
    return f"{float(f'{float(rate) / seconds:.4g}'):.12f}".rstrip("0").rstrip(".")
