"""HTML elements and text formats of the status page. Everything that takes a text escapes it.

Parameters named `cells`, `parts` and `rows` are HTML already.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from html import escape


def section(name: str, title: str, *parts: str, kind: str = "") -> str:
    """Return a section with a heading; `name` is its id, `kind` its class."""
    attribute = f' class="{escape(kind)}"' if kind else ""
    heading = f'<h2 id="{name}-title">{escape(title)}</h2>'
    return f'<section id="{name}"{attribute} aria-labelledby="{name}-title">{heading}\n{"".join(parts)}</section>\n'


def table(name: str, label: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table that scrolls if it is too large; `tabindex` lets the keyboard scroll it (WCAG 2.1.1)."""
    columns = "".join(f'<th scope="col">{escape(title)}</th>' for title in head)
    body = "".join(f"<tr>{''.join(cells)}</tr>\n" for cells in rows)
    return (
        f'<div class="wide" id="{name}" role="region" tabindex="0" aria-label="{escape(label)}, scrollable table">'
        f"<table><thead><tr>{columns}</tr></thead><tbody>\n{body}</tbody></table></div>\n"
    )


def cell(text: str, kind: str = "") -> str:
    """Return a table cell; `kind` is its class."""
    return f'<td class="{escape(kind)}">{escape(text)}</td>' if kind else f"<td>{escape(text)}</td>"


def row_header(text: str) -> str:
    """Return the cell that names its row."""
    return f'<th scope="row">{escape(text)}</th>'


def prose(text: str) -> str:
    """Return a sentence as HTML; parts between backticks become code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def counted(count: int, singular: str, plural: str = "") -> str:
    """Return a count with its noun: `1 request`, `2,000 requests`."""
    return f"{count:,} {singular if count == 1 else plural or f'{singular}s'}"


def seconds(duration: float | None) -> str:
    """Return a measured duration: `1.25 s`, `120 ms`, `2.5 ms`."""
    if duration is None:
        return "–"
    if duration >= 1 or duration == 0:
        return f"{duration:.2f} s" if duration else "0"
    return f"{duration * 1000:.0f} ms" if duration >= 0.01 else f"{duration * 1000:.1f} ms"


def number(value: float) -> str:
    """Return a number with three significant digits, or whole from 100 on."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def span(duration: float) -> str:
    """Return a duration in seconds in one unit: `12 s`, `43 min`, `5 h`, `17 days`."""
    units: Sequence[tuple[float, Callable[[float], str]]] = (
        (90, lambda left: f"{left:.0f} s"),
        (90 * 60, lambda left: f"{left / 60:.0f} min"),
        (48 * 3600, lambda left: f"{left / 3600:.0f} h"),
    )
    return next((text(duration) for limit, text in units if duration < limit), f"{duration / 86400:.0f} days")
