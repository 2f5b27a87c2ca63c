"""One usage plan: what is published of it, its token bucket, and the calls that wait for a token.

A wait is estimated when a call arrives, so that a call whose wait would be too long is refused at once.
"""

import asyncio
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from proxy.request.ratelimit.token_bucket import Bucket, FairQueue, RateEstimator
from proxy.request.request_options import AdmissionRequest
from proxy.request.routing import Route

# Only a first guess: RateEstimator lowers and raises it.
DEFAULT_RATE = 1.0  # calls per second, where a 429 shows that there is a plan and nothing tells its rate
MIN_RATE_FRACTION = 0.01  # of the published rate: one response with a tiny rate must not stop an operation for a day
# A call whose token is due at its deadline must not be refused because the timer for the token fired after that of the
# timeout.
GRACE = 0.5  # seconds by which timers may fire late

CallLater = Callable[..., Any]  # as `loop.call_later`


class PublishedPlan(NamedTuple):
    """A usage plan as Amazon publishes it; `rate` is None where only a 429 shows that there is one.

    `rate` is in calls per second, `burst` in calls.
    """

    name: str
    rate: float | None
    burst: float


# The sandbox has one plan for everything (DOC "Selling Partner API Sandbox").
SANDBOX_PLAN = PublishedPlan("sandbox", 5.0, 15.0)


def published_plan(route: Route) -> PublishedPlan:
    """Return the plan of a call: one per account, application and operation (DOC "Usage Plans and Rate Limits")."""
    if route.environment == "sandbox":
        return SANDBOX_PLAN
    operation = route.operation
    if operation is None:
        # Only the path is known; its first segments name the API and its version.
        path = route.path_and_query.partition("?")[0]
        # Bounded, because the name becomes a label of metrics and comes from the app's path. A burst of 1 is the
        # smallest.
        return PublishedPlan("unknown " + "/".join(path.split("/", 4)[:4])[:100], None, 1.0)
    return _published_by_name(operation.method, operation.name, operation.rate, operation.burst)


# Amazon's models have 370 operations, so that all of them fit.
@lru_cache(maxsize=2048)
def _published_by_name(method: str, name: str, rate: float | None, burst: int | None) -> PublishedPlan:
    # With the method, because one name can stand for two operations with separate plans: shipping v2
    # linkCarrierAccount is both a POST and a PUT.
    return PublishedPlan(f"{method} {name}", rate, float(burst or 1))


def published_application_plan(route: Route) -> PublishedPlan | None:
    """Return the plan of the application over all its accounts, None where the operation has none."""
    operation = route.operation
    # An operation may have a second plan over all sellers of the application; the one that is exhausted first throttles
    # (DOC "Usage Plans and Rate Limits").
    if operation is None or operation.app_rate is None or route.environment == "sandbox":
        return None
    # The published burst is for one account. Over all accounts, allow bursts of a tenth of a second's calls.
    burst = max(1.0, float(operation.app_burst or operation.app_rate / 10))
    return PublishedPlan(f"all {operation.method} {operation.name}", operation.app_rate, burst)


@dataclass(eq=False, slots=True)
class Waiter:
    """A call that waits for a token; `deadline` is the moment, on the limiter's clock, until which it may wait."""

    future: asyncio.Future[None]
    caller: Hashable
    deadline: float
    is_queued: bool = True


class PlanLimiter:
    """One usage plan in use: its bucket, the estimate of its rate, and the queue of waiting calls.

    `labels` are account, region and operation of its metrics.
    """

    def __init__(
        self, published: PublishedPlan, labels: tuple[str, str, str], now: Callable[[], float], call_later: CallLater
    ) -> None:
        rate = published.rate or DEFAULT_RATE
        self.labels = labels
        # Full, although Amazon's may not be after a restart: an empty start would delay every first call, and a 429
        # corrects it.
        self.bucket = Bucket.full(rate, published.burst, now())
        # `known` is published.rate and not `rate`: where none is published, none is known.
        self.estimate = RateEstimator(rate, published.rate, rate * MIN_RATE_FRACTION)
        self.queue: FairQueue[Waiter] = FairQueue()
        self.last_rate_header: str | None = None  # the last value of RATE_HEADER
        self._now = now
        self._call_later = call_later
        self._timer: Any = None

    def estimated_wait(self, admission: AdmissionRequest) -> float:
        """Return how long a call that arrived now would wait, in seconds."""
        # Without a queue every position is 0; most calls find it so.
        ahead = self.queue.position(self._virtual_time_of(admission)) if len(self.queue) else 0
        return self.bucket.wait(self._now(), ahead)

    def _virtual_time_of(self, admission: AdmissionRequest) -> float:
        caller = (admission.caller, admission.background)
        return self.queue.next_virtual_time(caller, background=admission.background, first=admission.is_retry)

    async def acquire(self, admission: AdmissionRequest) -> None:
        """Wait for a token and take it; raise TimeoutError where none comes within `admission.max_wait` seconds.

        That happens where other calls overtook this one after its wait was estimated. A call that is cancelled leaves
        the queue, or returns its token.
        """
        caller = (admission.caller, admission.background)
        waiter = Waiter(asyncio.get_running_loop().create_future(), caller, self._now() + admission.max_wait)
        entry = self.queue.add(caller, self._virtual_time_of(admission), waiter)
        # A running timer grants the next token to the entry that is first by then; a new entry does not change its
        # moment.
        if self._timer is None:
            self._dispatch_due()
        try:
            # The future is not shielded: nobody else waits for it.
            async with asyncio.timeout(admission.max_wait + GRACE):
                await waiter.future
        except (asyncio.CancelledError, TimeoutError):
            if waiter.is_queued:
                self.queue.remove(caller, entry)
            # A future that has its result cannot be cancelled any more, but the waiting task can be, before it runs
            # again.
            elif not waiter.future.cancelled():
                self.refund()  # the token was granted in the same iteration of the loop
            raise

    def has_capacity(self, admission: AdmissionRequest) -> bool:  # noqa: ARG002 - RedisPlan's signature
        """Return whether a call that arrives now need not wait."""
        now = self._now
        # A token belongs to the first in the queue; taking it here would overtake calls that wait.
        return not self.queue and self.bucket.has_token(now())

    def consume(self) -> None:
        """Take a token that is available."""
        self.bucket.consume()

    def refund(self) -> None:
        """Return a token that was not used."""
        self.bucket.refund()
        self._dispatch_due()

    def announce(self, rate: float) -> None:
        """Adopt the rate of RATE_HEADER, in calls per second."""
        # Amazon sends the header with 20x, 400 and 404, mostly with the same rate: the timer is set again only after a
        # change.
        if rate != self.estimate.known or not self.estimate.announced:
            self.estimate.announce(rate)
            self._set_rate()

    def on_429(self) -> None:
        """Empty the bucket and lower the rate estimate after a 429 of Amazon's."""
        now = self._now()
        # Before the estimate: emptying refills up to now, at the rate that held until now.
        self.bucket.empty(now)
        self.estimate.on_429(now)
        self._set_rate()

    def on_success(self) -> None:
        """Note that Amazon accepted a call which had waited; enough of them raise a lowered estimate."""
        self.estimate.on_success()
        if self.estimate.rate != self.bucket.rate:
            self._set_rate()

    def _set_rate(self) -> None:
        self.bucket.refill(self._now())  # the time until now counts at the old rate
        self.bucket.rate = self.estimate.rate
        self._dispatch_due()

    def dispatch(self) -> None:
        """Grant the tokens that are due; call it after any change of the bucket."""
        self._dispatch_due()

    def _dispatch_due(self) -> None:
        """Grant the tokens that are due, and set the timer for the next one."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while len(self.queue):
            wait = self.bucket.wait(self._now())
            if wait > 0:
                # One timer for the whole queue: each entry's moment depends on those before it and changes with the
                # rate.
                self._timer = self._call_later(wait, self._dispatch_due)
                return
            waiter = self.queue.first()[2]
            self.queue.pop(waiter.caller)
            waiter.is_queued = False
            if not waiter.future.done():  # done: cancelled, and not yet removed from the queue
                self.bucket.consume()
                waiter.future.set_result(None)
