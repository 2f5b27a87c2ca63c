"""When may this call go out under Amazon's usage plan, and what do Amazon's answers teach about the plan?

The arithmetic stands in `buckets.py`; here calls wait. How long one would wait is known when it comes, so that it is
refused at once where that is too long.
"""

import asyncio
import math
import re
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

from proxy.errors import UsagePlanExhausted
from proxy.observability.metrics import Metrics, PlanGauges
from proxy.request.ratelimit.token_bucket import Bucket, FairQueue, RateEstimator
from proxy.request.routing import UNCACHED, Route, RouteKey

MAX_WAIT_HEADER = "x-sp-max-wait"
RATE_HEADER = b"x-amzn-ratelimit-limit"


_RATE = re.compile(r"(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_RATE_BOUNDS = (1e-5, 1e5)  # calls per second; what is outside is no usage plan
_DEFAULT_RATE = 1.0  # calls per second, where a 429 says that there is a plan and nothing says which
_GRACE = 0.5  # seconds by which timers may be late
_MAX_PLANS = 50_000
_MAX_FOUND = 10_000
_MIN_RATE = 0.01  # of the published rate: one answer that says less must not stop an operation for a day


CallLater = Callable[..., Any]


def parse_rate(text: str) -> float | None:
    """Return calls per second of an `x-amzn-RateLimit-Limit`, or None for anything that is no plan's rate."""
    return _rate_of(text) if len(text) <= 32 else None


@lru_cache(maxsize=256)  # Amazon says the same few over and over
def _rate_of(text: str) -> float | None:
    if not _RATE.fullmatch(text.strip(" \t")):
        return None
    rate = float(text)
    return rate if _RATE_BOUNDS[0] <= rate <= _RATE_BOUNDS[1] else None


@dataclass(frozen=True, slots=True)
class AdmissionRequest:
    """How a call wants its place: how long it may wait in seconds, who sends it, and how it stands in the queue."""

    max_wait: float
    caller: Hashable = ""
    background: bool = False
    is_retry: bool = False  # it waited already, and Amazon answered 429


class PublishedPlan(NamedTuple):
    """A usage plan as it is published; `rate` is None where only a 429 tells that there is one."""

    name: str
    rate: float | None
    burst: float


# The sandbox has one plan for everything (DOC "Selling Partner API Sandbox").
SANDBOX_PLAN = PublishedPlan("sandbox", 5.0, 15.0)


def published_plan(route: Route) -> PublishedPlan:
    """Return the plan of an account's calls (DOC "Usage Plans and Rate Limits": by account, application, operation)."""
    if route.environment == "sandbox":
        return SANDBOX_PLAN
    operation = route.operation
    if operation is None:
        # Its path is all there is to go by; the first segments name API and version.
        path = route.path_and_query.partition("?")[0]
        return PublishedPlan("unknown " + "/".join(path.split("/", 4)[:4])[:100], None, 1.0)
    return _published_by_name(operation.method, operation.name, operation.rate, operation.burst)


@lru_cache(maxsize=2048)
def _published_by_name(method: str, name: str, rate: float | None, burst: int | None) -> PublishedPlan:
    # With the method: one name stands for two operations with plans of their own (shipping v2 linkCarrierAccount).
    return PublishedPlan(f"{method} {name}", rate, float(burst or 1))


def published_application_plan(route: Route) -> PublishedPlan | None:
    """Return the plan of all accounts of the application together, None where the operation has none."""
    operation = route.operation
    if operation is None or operation.app_rate is None or route.environment == "sandbox":
        return None
    # The published burst is that of one account; a tenth of a second's worth is what calls may bunch.
    burst = max(1.0, float(operation.app_burst or operation.app_rate / 10))
    return PublishedPlan(f"all {operation.method} {operation.name}", operation.app_rate, burst)


@dataclass(eq=False, slots=True)
class Waiter:
    """A call that waits; `due` is the moment by which it was promised its place."""

    future: asyncio.Future[None]
    caller: Hashable
    deadline: float
    is_queued: bool = True


class PlanLimiter:
    """One usage plan in use: its bucket, what is known of its rate, and who waits."""

    def __init__(
        self, published: PublishedPlan, where: tuple[str, str, str], now: Callable[[], float], call_later: CallLater
    ) -> None:
        rate = published.rate or _DEFAULT_RATE
        self.labels = where
        self.bucket = Bucket.full(rate, published.burst, now())
        self.estimate = RateEstimator(rate, published.rate, rate * _MIN_RATE)
        self.queue: FairQueue[Waiter] = FairQueue()
        self.last_rate_header: str | None = None  # the header that announced the rate last
        self._now = now
        self._call_later = call_later
        self._timer: Any = None

    def estimated_wait(self, admission: AdmissionRequest) -> float:
        """Return how long a call would wait that came now, in seconds."""
        ahead = self.queue.position(self._virtual_time_of(admission)) if len(self.queue) else 0
        return self.bucket.wait(self._now(), ahead)

    def _virtual_time_of(self, admission: AdmissionRequest) -> float:
        caller = (admission.caller, admission.background)
        return self.queue.next_virtual_time(caller, background=admission.background, first=admission.is_retry)

    async def acquire(self, admission: AdmissionRequest) -> None:
        """Wait for a place and take it; raise TimeoutError where it has not come within `claim.max_wait`.

        That happens where others came between. A call that is cancelled leaves its place to those behind it.
        """
        caller = (admission.caller, admission.background)
        waiter = Waiter(asyncio.get_running_loop().create_future(), caller, self._now() + admission.max_wait)
        entry = self.queue.add(caller, self._virtual_time_of(admission), waiter)
        if self._timer is None:
            self._dispatch_due()
        try:
            async with asyncio.timeout(admission.max_wait + _GRACE):
                await waiter.future
        except (asyncio.CancelledError, TimeoutError):
            if waiter.is_queued:
                self.queue.remove(caller, entry)
            elif not waiter.future.cancelled():
                self.refund()  # it came in the very moment
            raise

    def has_capacity(self, admission: AdmissionRequest) -> bool:  # noqa: ARG002 - who it is matters where others are asked
        """Return whether a call that comes now has its place at once."""
        now = self._now
        return not self.queue and self.bucket.has_token(now())

    def consume(self) -> None:
        """Take a place that is free."""
        self.bucket.consume()

    def refund(self) -> None:
        """Return a place that was not used."""
        self.bucket.refund()
        self._dispatch_due()

    def announce(self, rate: float) -> None:
        """Learn the rate that Amazon names."""
        if rate != self.estimate.known or not self.estimate.announced:
            self.estimate.announce(rate)
            self._set_rate()

    def on_429(self) -> None:
        """Learn from a 429 of Amazon's."""
        now = self._now()
        self.bucket.empty(now)
        self.estimate.on_429(now)
        self._set_rate()

    def on_success(self) -> None:
        """Learn that a call which had waited was let through."""
        self.estimate.on_success()
        if self.estimate.rate != self.bucket.rate:
            self._set_rate()

    def _set_rate(self) -> None:
        self.bucket.refill(self._now())  # what came so far came at the old rate
        self.bucket.rate = self.estimate.rate
        self._dispatch_due()

    def dispatch(self) -> None:
        """See whose turn it is: something has changed."""
        self._dispatch_due()

    def _dispatch_due(self) -> None:
        """Let go whose turn has come, and look again when the next one's does."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while len(self.queue):
            wait = self.bucket.wait(self._now())
            if wait > 0:
                self._timer = self._call_later(wait, self._dispatch_due)
                return
            waiter = self.queue.first()[2]
            self.queue.pop(waiter.caller)
            waiter.is_queued = False
            if not waiter.future.done():  # it may be about to leave
                self.bucket.consume()
                waiter.future.set_result(None)


class RateLimiter:
    """The usage plans of every application, account, region and operation that was called."""

    def __init__(
        self,
        metrics: Metrics,
        *,
        pace: bool,
        max_queue: int = 5000,
        now: Callable[[], float] = time.monotonic,
        call_later: CallLater | None = None,
    ) -> None:
        self._metrics = metrics
        self._pace = pace
        self._max_queue = max_queue
        self._now = now
        self._call_later = call_later
        self._plans: dict[tuple[str, ...], PlanLimiter] = {}
        # Those of them that calls of a kind fall under.
        self._found: dict[RouteKey, tuple[PlanLimiter | None, PlanLimiter | None]] = {}
        metrics.read_plans = self._gauges

    def configure(self, *, pace: bool, max_queue: int) -> None:
        """Go by other settings from now on; what is known of the plans stays."""
        self._pace, self._max_queue = pace, max_queue

    async def acquire(self, route: Route, admission: AdmissionRequest) -> float:
        """Wait for a place in the usage plan and return the seconds waited.

        Raises UsagePlanExhausted at once where no place comes in time. A caller who is cancelled gives its place back.
        """
        if self.try_acquire(route, admission):
            return 0.0
        began = self._now()
        plan = self._plan(route)
        if plan is not None:
            await self._acquire_from(plan, route, admission)
        for_all = self._application_plan(route)
        if for_all is not None:
            try:
                left = max(0.0, admission.max_wait - (self._now() - began))
                await self._acquire_from(for_all, route, replace(admission, max_wait=left))
            except BaseException:
                if plan is not None:
                    plan.refund()
                raise
        return self._now() - began

    def try_acquire(self, route: Route, admission: AdmissionRequest) -> bool:
        """Take a place that is free now; return whether there was one. Without pacing there always is."""
        if not self._pace:
            return True
        found = self._found.get(route.key)
        plan, for_all = found if found is not None else self._find(route)
        if (plan is not None and not plan.has_capacity(admission)) or (
            for_all is not None and not for_all.has_capacity(admission)
        ):
            return False
        if plan is not None:
            plan.consume()
        if for_all is not None:
            for_all.consume()
        return True

    async def _acquire_from(self, plan: PlanLimiter, route: Route, admission: AdmissionRequest) -> None:
        if plan.has_capacity(admission):
            plan.consume()
            return
        wait = plan.estimated_wait(admission)
        if wait > admission.max_wait:
            raise self._exhausted_error(route, wait - plan.bucket.margin, admission.max_wait)
        if len(plan.queue) >= self._max_queue:
            self._metrics.limit_refused.labels(route.account, route.region, route.operation_name).inc()
            raise UsagePlanExhausted(
                f"{self._max_queue} calls wait for the usage plan of {route.operation_name} already",
                "Come back after Retry-After, or raise limits.max_queue.",
                retry_after=wait - plan.bucket.margin,
            )
        try:
            await plan.acquire(admission)
        except TimeoutError:
            raise self._exhausted_error(
                route, plan.estimated_wait(admission) - plan.bucket.margin, admission.max_wait
            ) from None

    def observe_response(self, route: Route, status: int, rate_header: str | None, *, waited: bool = False) -> None:
        """Correct the plan by what Amazon's answer says; no header is normal (DOC "Parse SP-API Responses")."""
        if status == 429:
            self._metrics.throttled.labels(route.account, route.region, route.operation_name).inc()
            plan = self._plan(route, make=True)
            if plan is not None:
                plan.on_429()
            return
        found = self._found.get(route.key)
        plan = found[0] if found is not None else self._plan(route)
        if plan is None or (not waited and rate_header == plan.last_rate_header):
            return
        if route.operation is None or route.environment != "production":
            return
        rate = parse_rate(rate_header) if rate_header is not None else None
        if rate is not None:
            plan.last_rate_header = rate_header
            plan.announce(rate)
        elif waited:
            plan.on_success()

    def retry_after(self, route: Route, admission: AdmissionRequest) -> float:
        """Return in how many seconds a call that came now would have its place."""
        plan = self._plan(route)
        return plan.estimated_wait(admission) if plan is not None else 0.0

    def _find(self, route: Route) -> tuple[PlanLimiter | None, PlanLimiter | None]:
        """Return the plan that the target falls under, and that over all accounts; remember them for its kind."""
        for_all = self._application_plan(route)
        found = (self._plan(route), for_all)
        # Without an operation its path decides, and only a 429 tells that there is a plan.
        is_lasting = route.operation is not None and route.key is not UNCACHED
        if is_lasting and len(self._plans) < _MAX_PLANS:
            if len(self._found) >= _MAX_FOUND:
                self._found.clear()
            self._found[route.key] = found
        return found

    def _plan(self, route: Route, *, make: bool = False) -> PlanLimiter | None:
        """Return the plan that the target falls under, with its state; None where none is known.

        With `make`, one is made where there was none: a 429 tells that there is a plan.
        """
        published = published_plan(route)
        key = (route.application, route.token_key.account, route.environment, route.region, published.name)
        plan = self._plans.get(key)
        if plan is None and (make or published.rate is not None):
            plan = self._new_plan(key, published, route)
        return plan

    def _application_plan(self, route: Route) -> PlanLimiter | None:
        published = published_application_plan(route)
        if published is None:
            return None
        key = (route.application, "", route.environment, route.region, published.name)
        return self._plans.get(key) or self._new_plan(key, published, route, account="*")

    def _new_plan(self, key: tuple[str, ...], published: PublishedPlan, route: Route, account: str = "") -> PlanLimiter:
        if len(self._plans) >= _MAX_PLANS:
            idle = next((known for known, plan in self._plans.items() if not len(plan.queue)), key)
            self._plans.pop(idle, None)
        self._found.clear()  # calls of some kind may fall under this one, where there was none for them
        where = (account or route.account, route.region, route.operation_name)
        call_later = self._call_later or asyncio.get_running_loop().call_later
        plan = self._plans[key] = self._make(key, published, where, call_later)
        return plan

    def _make(
        self, _: tuple[str, ...], published: PublishedPlan, where: tuple[str, str, str], call_later: CallLater
    ) -> PlanLimiter:
        return PlanLimiter(published, where, self._now, call_later)

    def _gauges(self) -> dict[tuple[str, str, str], PlanGauges]:
        """Return what is shown of all plans. It is asked from another thread, and changes nothing."""
        now, numbers = self._now(), dict[tuple[str, str, str], PlanGauges]()
        for plan in self._plans.copy().values():
            waiting = len(plan.queue) + (numbers[plan.labels].waiting if plan.labels in numbers else 0)
            tokens = max(0.0, plan.bucket.tokens_at(now))
            numbers[plan.labels] = PlanGauges(plan.bucket.rate, tokens, waiting)
        return numbers

    def _exhausted_error(self, route: Route, wait: float, max_wait: float) -> UsagePlanExhausted:
        self._metrics.limit_refused.labels(route.account, route.region, route.operation_name).inc()
        return UsagePlanExhausted(
            f"the usage plan of {route.operation_name} has its next place in {wait:.1f} s, "
            f"and this call may wait {max_wait:g} s",
            f"Come back after Retry-After, or let the call wait longer: {MAX_WAIT_HEADER}: {math.ceil(wait)}s.",
            retry_after=wait,
        )
