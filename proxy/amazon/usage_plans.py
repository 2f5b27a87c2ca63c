"""Which usage plan does the description of an operation state?

Amazon's models write the plan into prose, as a Markdown table below the words Usage Plan; nothing else in them
carries it. Most tables have a head, a rule and one row `| 0.5 | 30 |`. Some have a first column with the word
Default, line ends written as a backslash and an n, `n` for numbers that were never filled in, or `.5`.
"""

import re
from dataclasses import dataclass

_LINE_ENDS = re.compile(r"\\r\\n|\\n|\r\n|\r|<br\s*/?>|</tr>")
_CELL_TAGS = re.compile(r"</t[dh]>\s*<t[dh][^>]*>")
_TAGS = re.compile(r"<[^>]+>")
_RULE = re.compile(r"[\s|:+-]+")
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?|\.\d+", re.ASCII)
_PER = {"second": 1.0, "minute": 60.0, "hour": 3600.0, "day": 86400.0}


@dataclass(frozen=True, slots=True)
class UsagePlan:
    """Calls per second and calls at once, as the model writes them; `stated` is False where no numbers stand there."""

    rate: str = ""
    burst: str = ""
    stated: bool = True


def parse_usage_plan(description: str) -> UsagePlan | None:
    """Return the plan that a description states, None where it has no table of one."""
    rows = [cells for line in _lines(description) if (cells := _cells(line))]
    for index, head in enumerate(rows):
        columns = _columns(head)
        if columns is not None:
            return _plan(rows[index + 1 :], head, columns)
    return None


def _lines(description: str) -> list[str]:
    text = _CELL_TAGS.sub(" | ", _LINE_ENDS.sub("\n", description))
    return [_TAGS.sub("|", line) for line in text.split("\n")]


def _cells(line: str) -> list[str]:
    """Return the cells of a table's line; nothing for prose and for rules (`| ---- | ---- |`)."""
    if "|" not in line or _RULE.fullmatch(line):
        return []
    cells = [cell.strip().strip("*_` ") for cell in line.strip().strip("|").split("|")]
    return [cell for cell in cells if cell]


def _columns(head: list[str]) -> tuple[int, int] | None:
    """Return which columns hold rate and burst."""
    lower = [cell.lower() for cell in head]
    rate = next((index for index, cell in enumerate(lower) if cell.startswith("rate")), None)
    burst = next((index for index, cell in enumerate(lower) if cell.startswith("burst")), None)
    return None if rate is None or burst is None else (rate, burst)


def _plan(rows: list[list[str]], head: list[str], columns: tuple[int, int]) -> UsagePlan:
    """Return the plan of the default row; the first row where none is called so."""
    body = [row for row in rows if _columns(row) is None]
    row = next((row for row in body if row[0].lower() == "default"), body[0] if body else [])
    if len(row) > max(columns):
        rate, burst = (_NUMBER.fullmatch(row[column]) for column in columns)
        if rate and burst:
            return UsagePlan(_per_second(rate[0], head[columns[0]]), _plain(burst[0]))
    return UsagePlan(stated=False)


def _per_second(rate: str, heading: str) -> str:
    """Return the rate as the model writes it, or converted where its heading speaks of another unit of time."""
    unit = next((seconds for word, seconds in _PER.items() if f"per {word}" in heading.lower()), 1.0)
    return _plain(rate) if unit == 1.0 else f"{float(rate.replace(',', '')) / unit:.4g}"


def _plain(number: str) -> str:
    """Return a number without thousands separators, and with a digit before its point."""
    text = number.replace(",", "")
    return f"0{text}" if text.startswith(".") else text
