"""The charts of the last minutes on the status page: SVG lines, and the same numbers as a table."""

from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import NamedTuple

from proxy.observability.request_history import MAX_SAMPLES, SAMPLE_INTERVAL, Sample
from proxy.server.admin.snapshot import Snapshot
from proxy.server.admin.status_html import cell, number, row_header, seconds, section, table

HEIGHT, MARGIN = 60, 2  # units of the SVG's viewBox; one unit of its width is one sample

Values = Sequence[float | None]  # one for each sample, oldest first; None where there was no request


class Chart(NamedTuple):
    """One chart: a line, and a paler second one where `second` is not empty; `kind` is the class of the first."""

    title: str
    format: Callable[[float], str]
    values: Values
    second: Values = ()
    kind: str = ""


def charts_section(snapshot: Snapshot) -> str:
    """Return the section of the charts."""
    samples = snapshot.samples
    charts = (
        Chart("Requests per second", number, [_per_second(sample.requests, sample) for sample in samples]),
        Chart(
            "Request duration: median, 95th percentile (paler)",
            seconds,
            [sample.median for sample in samples],
            [sample.p95 for sample in samples],
        ),
        Chart(
            "Throttled requests per second",
            number,
            [_per_second(sample.throttled, sample) for sample in samples],
            kind="alert",
        ),
    )
    figures = "".join(_figure(chart) for chart in charts)
    rows = [
        (
            row_header(snapshot.clock(last.at)[:5]),
            cell(f"{_mean_rate(group, 'requests'):.2f}", "number"),
            cell(seconds(_median(group, "median")), "number"),
            cell(seconds(_median(group, "p95")), "number"),
            cell(f"{_mean_rate(group, 'throttled'):.2f}", "number"),
        )
        for last, group in _by_minute(samples)
    ]
    head = ("minute ending (UTC)", "requests per second", "median", "95th percentile", "throttled per second")
    numbers = table("numbers", "The last minutes as numbers", head, reversed(rows))
    details = f'<details id="as-table"><summary>As a table</summary>{numbers}</details>\n' if rows else ""
    minutes = MAX_SAMPLES * SAMPLE_INTERVAL / 60
    return section("charts", f"The last {minutes:.0f} minutes", f'<div class="charts">{figures}</div>\n', details)


def _per_second(count: float, sample: Sample) -> float:
    return count / sample.seconds if sample.seconds > 0 else 0.0


def _figure(chart: Chart) -> str:
    known = [value for value in (*chart.values, *chart.second) if value is not None]
    maximum = max(known, default=0.0)
    newest = next((value for value in reversed(chart.values) if value is not None), None)
    summary = "no data yet"
    if newest is not None:
        when = "now" if chart.values[-1] is not None else "last"
        summary = f"{when} {chart.format(newest)}, maximum {chart.format(maximum)}"
    top = maximum or 1.0
    paths = f'<path class="second" d="{_path(chart.second, top)}"/>' if chart.second else ""
    paths += f'<path class="first {chart.kind}" d="{_path(chart.values, top)}"/>'
    return (
        f"<figure><figcaption>{escape(chart.title)} <b>{escape(summary)}</b></figcaption>"
        f'<svg viewBox="0 0 {MAX_SAMPLES} {HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(f"{chart.title}: {summary}")}">{paths}</svg></figure>\n'
    )


def _path(values: Values, top: float) -> str:
    """Return the path of a line, the newest value at the right end, with a gap where there is no value."""
    steps, is_drawing = [], False
    for x, value in enumerate(values, MAX_SAMPLES - len(values)):
        if value is not None:
            y = HEIGHT - MARGIN - value / top * (HEIGHT - 2 * MARGIN)
            # `h1`: each value is a step of one unit, so that a single one between two gaps is visible.
            steps.append(f"{'L' if is_drawing else 'M'}{x} {y:.1f}h1")
        is_drawing = value is not None
    return "".join(steps)


def _by_minute(samples: Sequence[Sample]) -> Iterator[tuple[Sample, list[Sample]]]:
    """Yield the last sample and all samples of each minute, counted back from now, oldest first."""
    size = round(60 / SAMPLE_INTERVAL)
    for end in range(len(samples) % size or size, len(samples) + 1, size):
        group = list(samples[max(0, end - size) : end])
        if group:
            yield group[-1], group


def _mean_rate(group: Sequence[Sample], name: str) -> float:
    """Return the mean of a count of the samples, per second."""
    duration = sum(sample.seconds for sample in group)
    return sum(getattr(sample, name) for sample in group) / duration if duration else 0.0


def _median(group: Sequence[Sample], name: str) -> float | None:
    """Return the median of a value of the samples: an approximation of the whole minute's, whose requests are gone."""
    found = sorted(value for sample in group if (value := getattr(sample, name)) is not None)
    return found[len(found) // 2] if found else None
