"""Gauges of the process: lag of the event loop, age of client secrets, dropped log lines."""

import asyncio
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial

from proxy.config import Config
from proxy.observability.logging import dropped_lines
from proxy.observability.metrics import Metrics

CLIENT_SECRET_LIFETIME = 180 * 86400.0  # seconds (DOC "Rotate your Application's LWA Credentials")
LAG_INTERVAL = 0.5  # seconds


class LoopLagMonitor:
    """Measures how late the event loop runs its timers; whatever blocks it delays every request."""

    def __init__(self, metrics: Metrics) -> None:
        self._worst = 0.0
        self._gauge = metrics.loop_lag
        metrics.pre_scrape_hooks.append(self._export)

    async def watch(self) -> None:
        """Measure every LAG_INTERVAL seconds, for as long as the proxy runs."""
        clock = asyncio.get_running_loop().time
        while True:
            due = clock() + LAG_INTERVAL
            await asyncio.sleep(LAG_INTERVAL)
            self._worst = max(self._worst, clock() - due)

    def _export(self) -> None:
        worst, self._worst = self._worst, 0.0
        self._gauge.set(worst)


def export_dropped_lines(metrics: Metrics) -> Callable[[], None]:
    """Return a hook that exports the dropped log lines; the log counts for the process, a registry for one proxy."""
    seen: Counter[str] = Counter()

    def export() -> None:
        for log, count in dropped_lines.copy().items():
            metrics.dropped_lines.labels(log).inc(count - seen[log])
            seen[log] = count

    return export


def export_secret_ages(config: Config, metrics: Metrics, wall: Callable[[], float]) -> None:
    """Export the age of each client secret: once it is past CLIENT_SECRET_LIFETIME, Amazon refuses all calls."""
    for name, application in config.applications.items():
        if application.rotated_at is not None:
            rotated_at = datetime.combine(application.rotated_at, datetime.min.time(), UTC).timestamp()
            metrics.secret_age.labels(name).set_function(partial(_since, rotated_at, wall))
            metrics.secret_expiry.labels(name).set(rotated_at + CLIENT_SECRET_LIFETIME)


def remove_secret_ages(before: Config, config: Config, metrics: Metrics) -> None:
    """Remove the series of applications that are gone, or that no longer say when their secret was rotated."""
    for name, application in before.applications.items():
        after = config.applications.get(name)
        if application.rotated_at is not None and (after is None or after.rotated_at is None):
            metrics.secret_age.remove(name)
            metrics.secret_expiry.remove(name)


def _since(moment: float, wall: Callable[[], float]) -> float:
    return wall() - moment
