"""May a call that failed be sent again, and when? Rules and arithmetic alone.

Nothing that may have been acted on is sent twice, unless doing it twice is the same as once (RFC 9110 section 9.2.2) or
Amazon said that it was not executed. A budget keeps an outage from being multiplied by everybody's retries.
"""

import random
from dataclasses import dataclass

from proxy.config import Config, Retry
from proxy.errors import ConnectTimeout, UpstreamBroken, UpstreamUnreachable
from proxy.observability.metrics import Metrics
from proxy.request.routing import Route
from proxy.request.upstream.call import UpstreamCall

IDEMPOTENT = frozenset({"GET", "HEAD", "PUT", "DELETE"})
RETRIED_STATUSES = frozenset({500, 502, 503, 504})

MAX_BALANCE = 100.0  # retries that a quiet time can save up for
INITIAL_BALANCE = 10.0


def is_retryable_method(route: Route, method: str) -> bool:
    """Return whether doing a call twice is the same as doing it once: by its method, or because it only reads."""
    return method in IDEMPOTENT or (route.operation is not None and route.operation.only_reads)


def backoff(retry: Retry, failures: int, random_share: float | None = None) -> float:
    """Return the seconds to wait after so many failures: a random share of a doubling time (full jitter)."""
    longest = min(retry.longest_pause, retry.first_pause * 2.0 ** min(failures - 1, 30))
    return longest * (random.random() if random_share is None else random_share)  # noqa: S311 - spreads load


@dataclass(slots=True)
class RetryBudget:
    """How many retries an application may still make: each call adds a share of one."""

    share: float
    balance: float = INITIAL_BALANCE

    def deposit(self) -> None:
        """Add what one call allows."""
        if self.balance < MAX_BALANCE:
            self.balance = min(MAX_BALANCE, self.balance + self.share)

    def withdraw(self) -> bool:
        """Take one retry; return whether there was one."""
        if self.balance < 1:
            return False
        self.balance -= 1
        return True


# What stands in for an answer where the connection failed. Amazon's silence is not among them: it may still be at work
# on the call, and the time is gone.
CONNECTION_ERRORS = (UpstreamUnreachable, UpstreamBroken, ConnectTimeout)


class RetryState:
    """The attempts of one call; each question is asked once per failed attempt."""

    def __init__(self, retry: Retry, budget: RetryBudget, metrics: Metrics, *, is_repeatable: bool) -> None:
        self._retry = retry
        self._budget = budget
        self._metrics = metrics
        self._is_repeatable = is_repeatable
        self._failures = 0

    def backoff_after_error(self, call: UpstreamCall) -> float | None:
        """Return the pause before the call is sent again after its connection failed, None where it is not."""
        if call.needs_fresh_connection and self._is_repeatable and self._failures == 0 and call.is_replayable:
            # A pooled connection that had died: nobody's failure, so that neither pause nor budget are due.
            self._failures += 1
            self._metrics.retries.labels("connection").inc()
            return 0.0
        return self._next(call, "connection")

    def backoff_after_status(self, status: int, call: UpstreamCall) -> float | None:
        """Return the pause before the call is sent again after one of RETRIED_STATUSES, None where that counts."""
        return self._next(call, f"status_{status}")

    def _next(self, call: UpstreamCall, reason: str) -> float | None:
        if not self._is_repeatable or not call.is_replayable or call.context.attempts >= self._retry.attempts:
            return None
        self._failures += 1
        seconds = backoff(self._retry, self._failures)
        if seconds >= call.deadline.remaining or not self._budget.withdraw():
            return None
        self._metrics.retries.labels(reason).inc()
        return seconds


class RetryPolicies:
    """The rules and the budget of each application."""

    def __init__(self, config: Config, metrics: Metrics, before: "RetryPolicies | None" = None) -> None:
        self._rules = {name: application.retry or config.retry for name, application in config.applications.items()}
        # What was saved up under the configuration before this one stays.
        saved: dict[str, float] = {}
        if before is not None:
            saved = {name: budget.balance for name, budget in before.budgets.items()}
        self.budgets: dict[str, RetryBudget] = {
            name: RetryBudget(rule.budget / 100, saved.get(name, INITIAL_BALANCE)) for name, rule in self._rules.items()
        }
        self._metrics = metrics

    def deposit(self, route: Route) -> None:
        """Count a call that begins now."""
        self.budgets[route.application].deposit()

    def start(self, call: UpstreamCall, *, may_repeat: bool) -> RetryState:
        """Return the attempts of a call that failed for the first time."""
        application = call.route.application
        repeatable = may_repeat and is_retryable_method(call.route, call.request.method)
        return RetryState(self._rules[application], self.budgets[application], self._metrics, is_repeatable=repeatable)
