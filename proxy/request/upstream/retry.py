"""May a call that failed be sent again, and when? Rules and arithmetic alone.

Nothing that may have been acted on is sent twice, unless doing it twice is the same as once (RFC 9110 section 9.2.2) or
Amazon said that it was not executed. A budget keeps an outage from being multiplied by everybody's retries.
"""

import random
from dataclasses import dataclass

from proxy.config import Config, Retry
from proxy.errors import ConnectTimeout, UpstreamBroken, UpstreamUnreachable
from proxy.observability.metrics import Metrics
from proxy.request.routing import Target
from proxy.request.upstream.forward import Call

IDEMPOTENT = frozenset({"GET", "HEAD", "PUT", "DELETE"})
RETRIED_STATUSES = frozenset({500, 502, 503, 504})

MOST_SAVED = 100.0  # retries that a quiet time can save up for
AT_START = 10.0


def is_repeatable(target: Target, method: str) -> bool:
    """Return whether doing a call twice is the same as doing it once: by its method, or because it only reads."""
    return method in IDEMPOTENT or (target.operation is not None and target.operation.only_reads)


def pause(retry: Retry, failures: int, random_share: float | None = None) -> float:
    """Return the seconds to wait after so many failures: a random share of a doubling time (full jitter)."""
    longest = min(retry.longest_pause, retry.first_pause * 2.0 ** min(failures - 1, 30))
    return longest * (random.random() if random_share is None else random_share)  # noqa: S311 - spreads load


@dataclass(slots=True)
class Budget:
    """How many retries an application may still make: each call adds a share of one."""

    share: float
    saved: float = AT_START

    def note_call(self) -> None:
        """Add what one call allows."""
        if self.saved < MOST_SAVED:
            self.saved = min(MOST_SAVED, self.saved + self.share)

    def take(self) -> bool:
        """Take one retry; return whether there was one."""
        if self.saved < 1:
            return False
        self.saved -= 1
        return True


# What stands in for an answer where the connection failed. Amazon's silence is not among them: it may still be at work
# on the call, and the time is gone.
NO_ANSWER = (UpstreamUnreachable, UpstreamBroken, ConnectTimeout)


class Attempts:
    """The attempts of one call; each question is asked once per failed attempt."""

    def __init__(self, retry: Retry, budget: Budget, metrics: Metrics, *, is_repeatable: bool) -> None:
        self._retry = retry
        self._budget = budget
        self._metrics = metrics
        self._is_repeatable = is_repeatable
        self._failures = 0

    def after_no_answer(self, call: Call) -> float | None:
        """Return the pause before the call is sent again after its connection failed, None where it is not."""
        if call.wants_new_connection and self._is_repeatable and self._failures == 0 and call.can_be_sent_again:
            # A pooled connection that had died: nobody's failure, so that neither pause nor budget are due.
            self._failures += 1
            self._metrics.retries.labels("connection").inc()
            return 0.0
        return self._next(call, "connection")

    def after_status(self, status: int, call: Call) -> float | None:
        """Return the pause before the call is sent again after one of RETRIED_STATUSES, None where that counts."""
        return self._next(call, f"status_{status}")

    def _next(self, call: Call, reason: str) -> float | None:
        if not self._is_repeatable or not call.can_be_sent_again or call.exchange.attempts >= self._retry.attempts:
            return None
        self._failures += 1
        seconds = pause(self._retry, self._failures)
        if seconds >= call.patience.left or not self._budget.take():
            return None
        self._metrics.retries.labels(reason).inc()
        return seconds


class AllAttempts:
    """The rules and the budget of each application."""

    def __init__(self, config: Config, metrics: Metrics, before: "AllAttempts | None" = None) -> None:
        self._rules = {name: application.retry or config.retry for name, application in config.applications.items()}
        # What was saved up under the configuration before this one stays.
        saved: dict[str, float] = {}
        if before is not None:
            saved = {name: budget.saved for name, budget in before.budgets.items()}
        self.budgets: dict[str, Budget] = {
            name: Budget(rule.budget / 100, saved.get(name, AT_START)) for name, rule in self._rules.items()
        }
        self._metrics = metrics

    def note_call(self, target: Target) -> None:
        """Count a call that begins now."""
        self.budgets[target.application].note_call()

    def of(self, call: Call, *, may_repeat: bool) -> Attempts:
        """Return the attempts of a call that failed for the first time."""
        application = call.target.application
        repeatable = may_repeat and is_repeatable(call.target, call.request.method)
        return Attempts(self._rules[application], self.budgets[application], self._metrics, is_repeatable=repeatable)
