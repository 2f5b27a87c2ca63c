"""Retry policy: whether a failed call is sent again, and after which backoff. Rules and arithmetic alone.

A call that may have been executed is not sent twice, unless it is idempotent (RFC 9110 section 9.2.2) or Amazon said
that it was not executed. A retry budget keeps retries from multiplying the load of an outage.
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

MAX_BALANCE = 100.0  # retries that a budget can hold
INITIAL_BALANCE = 10.0


def is_retryable_method(route: Route, method: str) -> bool:
    """Return whether a call is idempotent: by its method, or because its operation only reads."""
    return method in IDEMPOTENT or (route.operation is not None and route.operation.only_reads)


def backoff(retry: Retry, failures: int, random_share: float | None = None) -> float:
    """Return the seconds to wait after so many failures: exponential, with full jitter."""
    longest = min(retry.longest_pause, retry.first_pause * 2.0 ** min(failures - 1, 30))
    return longest * (random.random() if random_share is None else random_share)  # noqa: S311 - spreads load


@dataclass(slots=True)
class RetryBudget:
    """The retries that an application may still make; each call adds a share of one."""

    share: float
    balance: float = INITIAL_BALANCE

    def deposit(self) -> None:
        """Add the share of one call."""
        if self.balance < MAX_BALANCE:
            self.balance = min(MAX_BALANCE, self.balance + self.share)

    def withdraw(self) -> bool:
        """Take one retry; return False where none is left."""
        if self.balance < 1:
            return False
        self.balance -= 1
        return True


# Errors of a failed connection. UpstreamTimeout is not among them: Amazon may still be executing the call, and no time
# is left.
CONNECTION_ERRORS = (UpstreamUnreachable, UpstreamBroken, ConnectTimeout)


class RetryState:
    """The retries of one call; call one of the methods once per failed attempt: it takes from the budget."""

    def __init__(self, retry: Retry, budget: RetryBudget, metrics: Metrics, *, is_repeatable: bool) -> None:
        self._retry = retry
        self._budget = budget
        self._metrics = metrics
        self._is_repeatable = is_repeatable
        self._failures = 0

    def backoff_after_error(self, call: UpstreamCall) -> float | None:
        """Return the seconds until the call is sent again after its connection failed, None where it is not."""
        if call.needs_fresh_connection and self._is_repeatable and self._failures == 0 and call.is_replayable:
            # An idle connection that the server had closed (RFC 9112 section 9.3.1) is no failure: neither backoff nor
            # budget applies.
            self._failures += 1
            self._metrics.retries.labels("connection").inc()
            return 0.0
        return self._backoff(call, "connection")

    def backoff_after_status(self, status: int, call: UpstreamCall) -> float | None:
        """Return the seconds until the call is sent again after one of RETRIED_STATUSES, None where it is not."""
        return self._backoff(call, f"status_{status}")

    def _backoff(self, call: UpstreamCall, reason: str) -> float | None:
        if not self._is_repeatable or not call.is_replayable or call.context.attempts >= self._retry.attempts:
            return None
        self._failures += 1
        seconds = backoff(self._retry, self._failures)
        if seconds >= call.deadline.remaining or not self._budget.withdraw():
            return None
        self._metrics.retries.labels(reason).inc()
        return seconds


class RetryPolicies:
    """The retry settings and the budget of each application."""

    def __init__(self, config: Config, metrics: Metrics, before: "RetryPolicies | None" = None) -> None:
        self._settings = {name: application.retry or config.retry for name, application in config.applications.items()}
        # Balances outlive a reload.
        balances: dict[str, float] = {}
        if before is not None:
            balances = {name: budget.balance for name, budget in before.budgets.items()}
        self.budgets: dict[str, RetryBudget] = {
            name: RetryBudget(retry.budget / 100, balances.get(name, INITIAL_BALANCE))
            for name, retry in self._settings.items()
        }
        self._metrics = metrics

    def deposit(self, route: Route) -> None:
        """Add the share of a call that begins now."""
        self.budgets[route.application].deposit()

    def start(self, call: UpstreamCall, *, may_repeat: bool) -> RetryState:
        """Return the retry state of a call that failed for the first time."""
        application = call.route.application
        is_repeatable = may_repeat and is_retryable_method(call.route, call.request.method)
        return RetryState(
            self._settings[application], self.budgets[application], self._metrics, is_repeatable=is_repeatable
        )
