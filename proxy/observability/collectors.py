"""How is counted what happens on every request? By plain numbers, turned into series only when somebody asks.

prometheus_client takes a lock and checks labels at each step, which is right for threads and too much for a path that
one event loop walks thousands of times a second.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

# From a local refusal (1 ms) to a slow report call (60 s), in seconds.
DURATION_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


def _text(bound: float) -> str:
    text: str = floatToGoString(bound)  # type: ignore[no-untyped-call]  # not annotated there
    return text


class HotHistogram:
    """One histogram of durations in seconds: how many fell into each bucket, and their sum."""

    __slots__ = ("counts", "sum", "zero_count")

    def __init__(self) -> None:
        self.counts = [0] * (len(DURATION_BUCKETS) + 1)
        self.zero_count = 0  # durations of nothing, which most waits are: counted apart, and with the others when asked
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one duration."""
        self.counts[bisect_left(DURATION_BUCKETS, seconds)] += 1
        self.sum += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """Return the buckets as Prometheus has them: each with those below it, by its upper bound."""
        so_far, found = self.zero_count, []
        for bound, count in zip((*DURATION_BUCKETS, float("inf")), self.counts, strict=True):
            so_far += count
            found.append((_text(bound), float(so_far)))
        return found


Kind = Literal["counter", "gauge", "histogram"]
Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily
_FAMILIES: dict[Kind, Callable[..., Family]] = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "histogram": HistogramMetricFamily,
}


class CallbackCollector(Collector):
    """One family of series whose numbers are kept elsewhere; `read` returns label values and number of each.

    It is asked on another thread than the one that counts, so that many series do not hold requests up.
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
        """Say what there will be."""
        return (self._family(),)

    def collect(self) -> Iterable[Metric]:
        """Yield the family with its series."""
        family = self._family()
        for labels, value in self._read():
            if isinstance(family, HistogramMetricFamily) and isinstance(value, HotHistogram):
                family.add_metric(labels, value.buckets(), value.sum)
            elif not isinstance(family, HistogramMetricFamily) and not isinstance(value, HotHistogram):
                family.add_metric(labels, value)
        yield family

    def _family(self) -> Family:
        return _FAMILIES[self.kind](self.name, self.documentation, labels=self.labels)
