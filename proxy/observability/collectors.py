"""Collectors for the series of the request path: plain numbers, turned into samples only when they are scraped.

prometheus_client takes a lock at each increment and looks a child up by its labels. Threads need that; the request path
runs on one event loop, thousands of times a second, and does not.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

# Upper bounds in seconds, from a rejection by the proxy (1 ms) to a slow report call (60 s).
DURATION_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


def _format_bound(bound: float) -> str:
    # As prometheus_client writes the bounds of its own histograms: `1.0`, `+Inf`.
    text: str = floatToGoString(bound)  # type: ignore[no-untyped-call]  # not annotated there
    return text


class HotHistogram:
    """A histogram of durations in seconds: a count for each bucket, and the sum.

    Only the event loop may change it; a scrape on another thread reads it, and may see a count without its sum.
    """

    __slots__ = ("counts", "sum", "zero_count")

    def __init__(self) -> None:
        # The last one is the bucket +Inf.
        self.counts = [0] * (len(DURATION_BUCKETS) + 1)
        # Zero durations. Most waits are zero, so their callers add them here, which is cheaper than `observe`.
        self.zero_count = 0
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count a duration in seconds."""
        # bisect_left: a bound is inclusive (`le`), so that a value equal to it belongs to its bucket.
        self.counts[bisect_left(DURATION_BUCKETS, seconds)] += 1
        self.sum += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """Return the upper bound and the cumulative count of each bucket, as Prometheus defines them."""
        # A zero is below every bound: it counts in all buckets, of which the first is the smallest.
        total, buckets = self.zero_count, []
        for bound, count in zip((*DURATION_BUCKETS, float("inf")), self.counts, strict=True):
            total += count
            buckets.append((_format_bound(bound), float(total)))
        return buckets


Kind = Literal["counter", "gauge", "histogram"]
Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily
_FAMILIES: dict[Kind, Callable[..., Family]] = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "histogram": HistogramMetricFamily,
}


class CallbackCollector(Collector):
    """A metric whose values are kept elsewhere; `read` returns the label values and the value of each series.

    `read` is called on the thread of the scrape, not on the event loop, so it must copy what the loop may change.
    """

    def __init__(
        self,
        kind: Kind,
        name: str,
        help_text: str,
        labels: Sequence[str],
        read: Callable[[], Iterable[tuple[Sequence[str], float | HotHistogram]]],
    ) -> None:
        self.kind = kind
        self.name = name
        self.documentation = help_text
        self.labels = tuple(labels)
        self._read = read

    def describe(self) -> Iterable[Metric]:
        """Return the metric without samples; the registry checks the names of its series by it.

        Without this method, a registry with auto_describe calls `collect` at registration (prometheus_client 0.26).
        """
        return (self._family(),)

    def collect(self) -> Iterable[Metric]:
        """Yield the metric with a sample for each series."""
        family = self._family()
        for labels, value in self._read():
            if isinstance(family, HistogramMetricFamily) and isinstance(value, HotHistogram):
                # The count comes from the bucket +Inf; prometheus_client 0.26 writes `_count` from it.
                family.add_metric(labels, value.buckets(), value.sum)
            elif not isinstance(family, HistogramMetricFamily) and not isinstance(value, HotHistogram):
                family.add_metric(labels, value)
        yield family

    def _family(self) -> Family:
        return _FAMILIES[self.kind](self.name, self.documentation, labels=self.labels)
