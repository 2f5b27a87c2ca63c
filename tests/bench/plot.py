"""SVG bar charts of the comparison, readable on a light and on a dark page."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _LABEL, _VALUE = 720, 118, 60  # pixels: total, the names at the left, the figures at the right
_BAR, _GAP, _HEAD = 13, 3, 34
_TEXT, _OURS, _OURS_LIGHT, _THEIRS, _THEIRS_LIGHT = "#808080", "#d9730d", "#eba766", "#4c86c6", "#93b5dc"
_STYLE = (
    f"text{{font:12px system-ui,sans-serif;fill:{_TEXT}}}.t{{font-weight:600;font-size:13px}}.e{{text-anchor:end}}"
    f".o{{fill:{_OURS}}}.p{{fill:{_OURS_LIGHT}}}.q{{fill:{_THEIRS}}}.r{{fill:{_THEIRS_LIGHT}}}"
)


@dataclass(frozen=True, slots=True)
class Group:
    """Bars under one heading: one per entry of `series` for each proxy, with the figures next to them."""

    heading: str
    series: tuple[str, str]
    form: str
    rows: Sequence[tuple[str, tuple[float, float]]]


def svg(title: str, description: str, ours: str, groups: Sequence[Group]) -> str:
    """Return the picture; the bars of the proxy called `ours` have a colour of their own."""
    body: list[str] = []
    y = 0
    for group in groups:
        y = _draw(body, group, ours, y)
    size = f'viewBox="0 0 {_WIDTH} {y}" width="{_WIDTH}" height="{y}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-labelledby="t d">',
            f'<title id="t">{escape(title)}</title>',
            f'<desc id="d">{escape(description)}</desc>',
            f"<style>{_STYLE}</style>",
            *body,
            "</svg>\n",
        ]
    )


def _draw(body: list[str], group: Group, ours: str, y: int) -> int:
    """Add a group below `y` and return its lower edge."""
    body.append(f'<text class="t" x="0" y="{y + 18}">{escape(group.heading)}</text>')
    _legend(body, group.series, y + 18)
    maximum = max(max(figures) for _, figures in group.rows)
    y += _HEAD
    for name, figures in group.rows:
        middle = y + _BAR + 4
        body.append(f'<text class="e" x="{_LABEL - 8}" y="{middle}">{escape(name)}</text>')
        for figure, kind in zip(figures, "op" if name == ours else "qr", strict=True):
            width = max(1.0, figure / maximum * (_WIDTH - _LABEL - _VALUE))
            body.append(f'<rect class="{kind}" x="{_LABEL}" y="{y}" width="{width:.1f}" height="{_BAR}" rx="2"/>')
            body.append(f'<text x="{_LABEL + width + 5:.1f}" y="{y + _BAR - 2}">{figure:{group.form}}</text>')
            y += _BAR + 1
        y += _GAP + 4
    return y + 8


def _legend(body: list[str], series: tuple[str, str], y: int) -> None:
    """Write the legend at the right, with both colours of each series."""
    x = _WIDTH - 2 * 138
    for text, kinds in zip(series, ("oq", "pr"), strict=True):
        for offset, kind in enumerate(kinds):
            body.append(f'<rect class="{kind}" x="{x + offset * 12}" y="{y - 10}" width="10" height="10" rx="2"/>')
        body.append(f'<text x="{x + 28}" y="{y}">{escape(text)}</text>')
        x += 138
