"""Cap on the client connections of a process."""

from collections import Counter
from typing import Protocol

from proxy.observability.metrics import Metrics


class LimitedConnection(Protocol):
    """What the limiter has to know of a connection."""

    listener: str

    def force_close(self) -> None:
        """Close the connection now."""


class ConnectionLimiter:
    """Caps the client connections of all listeners together.

    At the limit, the connection that has been idle longest is evicted, those that never made a request before the
    others: a client that only opens connections must not push out one that uses them. A new connection is refused
    only where all the others are busy.
    """

    def __init__(self, limit: int, metrics: Metrics) -> None:
        self.limit = limit
        self._metrics = metrics
        self._open: Counter[str] = Counter()
        # Dicts as ordered sets: the first key is the connection that became idle first.
        self._unused: dict[LimitedConnection, None] = {}
        self._idle: dict[LimitedConnection, None] = {}
        metrics.pre_scrape_hooks.append(self._export)

    def try_acquire(self, connection: LimitedConnection, listener: str) -> bool:
        """Count a new connection; return whether it may stay. `release` follows in either case."""
        has_capacity = self._open.total() < self.limit or self._evict()
        self._open[listener] += 1
        if not has_capacity:
            self._metrics.closed_connections.labels(listener, "refused").inc()
            return False
        self._unused[connection] = None
        return True

    def release(self, connection: LimitedConnection, listener: str) -> None:
        """Stop counting a connection."""
        self.mark_busy(connection)
        self._open[listener] -= 1

    def mark_busy(self, connection: LimitedConnection) -> None:
        """Keep a connection that has a request from being evicted."""
        self._unused.pop(connection, None)
        self._idle.pop(connection, None)

    def mark_idle(self, connection: LimitedConnection) -> None:
        """Let a connection be evicted that has no request any more."""
        self._idle[connection] = None

    def _evict(self) -> bool:
        victim = next(iter(self._unused or self._idle), None)
        if victim is None:
            return False
        self._metrics.closed_connections.labels(victim.listener, "evicted").inc()
        self.mark_busy(victim)
        victim.force_close()
        return True

    def _export(self) -> None:
        # A copy: the hook runs on the thread of the scrape, while the event loop counts on.
        for listener, count in self._open.copy().items():
            self._metrics.client_connections.labels(listener).set(count)
