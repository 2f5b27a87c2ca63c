"""Circuit breakers per region: while a region is down, calls fail at once and single probes test it.

A region counts as down after failures alone: no connection, no response, or server errors of several operations. One
operation that fails does not open the circuit for the others.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from proxy.config import Environment, Region
from proxy.errors import RegionDown
from proxy.observability.metrics import Metrics

FAILURES = 20  # in a row
MIN_OUTAGE = 5.0  # seconds from the first of them
OPERATIONS = 3  # different ones that must fail, where the failures are responses
FIRST_PROBE, MAX_PROBE = 1.0, 30.0  # seconds between two probes

Where = tuple[Environment, Region]


@dataclass(slots=True)
class CircuitBreaker:
    """Recent failures of one region; times in seconds of a monotonic clock."""

    failures: int = 0
    since: float = 0.0
    operations: set[str] = field(default_factory=set)
    connection_errors: int = 0
    is_open: bool = False
    probe_at: float = 0.0
    probe_pause: float = FIRST_PROBE

    def seconds_until_probe(self, now: float) -> float:
        """Return for how many seconds calls fail at once; 0 admits this call, as a probe where the circuit is open.

        Admitting a probe sets the time of the next one.
        """
        if not self.is_open:
            return 0.0
        if now < self.probe_at:
            return self.probe_at - now
        self.probe_at = now + self.probe_pause
        self.probe_pause = min(MAX_PROBE, self.probe_pause * 2)
        return 0.0

    def record_failure(self, operation: str, now: float, *, answered: bool) -> None:
        """Record a failure: a server error, or with `answered=False` no response."""
        if self.failures == 0:
            self.since = now
        self.failures += 1
        self.connection_errors += not answered
        if len(self.operations) < OPERATIONS:
            self.operations.add(operation)
        is_broad = self.connection_errors >= FAILURES or len(self.operations) >= OPERATIONS
        if not self.is_open and self.failures >= FAILURES and is_broad and now - self.since >= MIN_OUTAGE:
            self.is_open = True
            self.probe_pause = FIRST_PROBE
            self.probe_at = now + self.probe_pause

    def record_success(self) -> None:
        """Record a response that is no server error: close the circuit."""
        self.failures = self.connection_errors = 0
        self.operations.clear()
        self.is_open = False


class CircuitBreakers:
    """One circuit breaker for each region that was called; `now` is a monotonic clock in seconds."""

    def __init__(self, metrics: Metrics, now: Callable[[], float]) -> None:
        self._metrics = metrics
        self._now = now
        self._breakers: dict[Where, CircuitBreaker] = {}

    def check(self, where: Where) -> None:
        """Raise RegionDown while the circuit of this region is open, except for a probe."""
        breaker = self._breakers.get(where)
        if breaker is not None and (seconds := breaker.seconds_until_probe(self._now())) > 0:
            raise RegionDown(
                f"Amazon's region {where[1]} has returned only errors for {self._now() - breaker.since:.0f} s",
                "Nothing was sent. The proxy probes the region; try again after Retry-After.",
                retry_after=seconds,
            )

    def record_failure(self, where: Where, operation: str, *, answered: bool) -> None:
        """Record a failure of this region."""
        breaker = self._breakers.setdefault(where, CircuitBreaker())
        breaker.record_failure(operation, self._now(), answered=answered)
        self._metrics.circuit_open.labels(*where).set(breaker.is_open)

    def record_success(self, where: Where) -> None:
        """Record a response of this region that is no server error."""
        breaker = self._breakers.get(where)
        if breaker is not None and breaker.failures:
            breaker.record_success()
            self._metrics.circuit_open.labels(*where).set(0)
