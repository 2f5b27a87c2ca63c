"""Rate limiter: delays calls so that they stay within Amazon's usage plans, and learns the plans from responses."""

import asyncio
import math
import re
import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

from proxy.errors import UsagePlanExhausted
from proxy.observability.metrics import Metrics, PlanGauges
from proxy.request.ratelimit.plan import (
    CallLater,
    PlanLimiter,
    PublishedPlan,
    published_application_plan,
    published_plan,
)
from proxy.request.request_options import MAX_WAIT_HEADER, AdmissionRequest
from proxy.request.routing import UNCACHED, Route, RouteKey

RATE_HEADER = b"x-amzn-ratelimit-limit"

_RATE = re.compile(r"(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_RATE_BOUNDS = (1e-5, 1e5)  # calls per second; no usage plan is outside
_MAX_PLANS = 50_000
_MAX_CACHED_KEYS = 10_000


def parse_rate(text: str) -> float | None:
    """Return calls per second of an `x-amzn-RateLimit-Limit`, or None for anything that is no plan's rate."""
    return _parsed_rate(text) if len(text) <= 32 else None


@lru_cache(maxsize=256)  # Amazon sends the same few values all the time
def _parsed_rate(text: str) -> float | None:
    if not _RATE.fullmatch(text.strip(" \t")):
        return None
    rate = float(text)
    return rate if _RATE_BOUNDS[0] <= rate <= _RATE_BOUNDS[1] else None


class RateLimiter:
    """Usage plans by application, account, region and operation, created when first called."""

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
        # The plan of the account and that of the application, by routing decision.
        self._plans_by_route: dict[RouteKey, tuple[PlanLimiter | None, PlanLimiter | None]] = {}
        metrics.read_plans = self._gauges

    def configure(self, *, pace: bool, max_queue: int) -> None:
        """Apply changed settings; the state of the plans stays."""
        self._pace, self._max_queue = pace, max_queue

    async def acquire(self, route: Route, admission: AdmissionRequest) -> float:
        """Wait for a token of each usage plan that applies, and return the seconds waited.

        Raise UsagePlanExhausted, at once where no token is expected in time. A call that is cancelled returns its
        tokens.
        """
        if self.try_acquire(route, admission):
            return 0.0
        began = self._now()
        plan = self._plan(route)
        if plan is not None:
            await self._acquire_from(plan, route, admission)
        application_plan = self._application_plan(route)
        if application_plan is not None:
            try:
                remaining = max(0.0, admission.max_wait - (self._now() - began))
                await self._acquire_from(application_plan, route, replace(admission, max_wait=remaining))
            except BaseException:
                if plan is not None:
                    plan.refund()
                raise
        return self._now() - began

    def try_acquire(self, route: Route, admission: AdmissionRequest) -> bool:
        """Take the tokens if they are available now; return whether they were. Without pacing, always True."""
        if not self._pace:
            return True
        cached = self._plans_by_route.get(route.key)
        plan, application_plan = cached if cached is not None else self._find_plans(route)
        if (plan is not None and not plan.has_capacity(admission)) or (
            application_plan is not None and not application_plan.has_capacity(admission)
        ):
            return False
        if plan is not None:
            plan.consume()
        if application_plan is not None:
            application_plan.consume()
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
                f"{self._max_queue} calls already wait for the usage plan of {route.operation_name}",
                "Try again after Retry-After, or raise limits.max_queue.",
                retry_after=wait - plan.bucket.margin,
            )
        try:
            await plan.acquire(admission)
        except TimeoutError:
            raise self._exhausted_error(
                route, plan.estimated_wait(admission) - plan.bucket.margin, admission.max_wait
            ) from None

    def observe_response(self, route: Route, status: int, rate_header: str | None, *, waited: bool = False) -> None:
        """Adjust the plan to a response of Amazon's; many have no rate header (DOC "Parse SP-API Responses")."""
        if status == 429:
            self._metrics.throttled.labels(route.account, route.region, route.operation_name).inc()
            plan = self._plan(route, make=True)
            if plan is not None:
                plan.on_429()
            return
        cached = self._plans_by_route.get(route.key)
        plan = cached[0] if cached is not None else self._plan(route)
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
        """Return after how many seconds a call that arrived now would get its token."""
        plan = self._plan(route)
        return plan.estimated_wait(admission) if plan is not None else 0.0

    def _find_plans(self, route: Route) -> tuple[PlanLimiter | None, PlanLimiter | None]:
        """Return the account's plan and the application's for a route; cache them by its key."""
        application_plan = self._application_plan(route)
        plans = (self._plan(route), application_plan)
        # Outside the table, the plan depends on the path, and only a 429 shows that there is one.
        is_cacheable = route.operation is not None and route.key is not UNCACHED
        if is_cacheable and len(self._plans) < _MAX_PLANS:
            if len(self._plans_by_route) >= _MAX_CACHED_KEYS:
                self._plans_by_route.clear()
            self._plans_by_route[route.key] = plans
        return plans

    def _plan(self, route: Route, *, make: bool = False) -> PlanLimiter | None:
        """Return the account's plan for a route, None where none is known.

        With `make`, create it also where none is published: after a 429 there must be one.
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
        self._plans_by_route.clear()  # its entries may hold None for this plan, or the plan that was just evicted
        labels = (account or route.account, route.region, route.operation_name)
        call_later = self._call_later or asyncio.get_running_loop().call_later
        plan = self._plans[key] = self._make(key, published, labels, call_later)
        return plan

    def _make(
        self, _: tuple[str, ...], published: PublishedPlan, labels: tuple[str, str, str], call_later: CallLater
    ) -> PlanLimiter:
        return PlanLimiter(published, labels, self._now, call_later)

    def _gauges(self) -> dict[tuple[str, str, str], PlanGauges]:
        """Return the gauges of all plans, by labels. Runs in the exporter's thread, so it changes nothing."""
        now, gauges = self._now(), dict[tuple[str, str, str], PlanGauges]()
        for plan in self._plans.copy().values():
            waiting = len(plan.queue) + (gauges[plan.labels].waiting if plan.labels in gauges else 0)
            tokens = max(0.0, plan.bucket.tokens_at(now))
            gauges[plan.labels] = PlanGauges(plan.bucket.rate, tokens, waiting)
        return gauges

    def _exhausted_error(self, route: Route, wait: float, max_wait: float) -> UsagePlanExhausted:
        self._metrics.limit_refused.labels(route.account, route.region, route.operation_name).inc()
        return UsagePlanExhausted(
            f"the usage plan of {route.operation_name} allows the next call in {wait:.1f} s, "
            f"and this call may wait {max_wait:g} s",
            f"Try again after Retry-After, or let the call wait longer: {MAX_WAIT_HEADER}: {math.ceil(wait)}s.",
            retry_after=wait,
        )
