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
from proxy.observability.metrics import Metrics, PlanNumbers
from proxy.request.ratelimit.token_bucket import Bucket, Estimate, Queue
from proxy.request.routing import ONE_OFF, Kind, Target

MAX_WAIT_HEADER = "x-sp-max-wait"
RATE_HEADER = b"x-amzn-ratelimit-limit"


_RATE = re.compile(r"(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_RATE_BOUNDS = (1e-5, 1e5)  # calls per second; what is outside is no usage plan
_GUESSED_RATE = 1.0  # calls per second, where a 429 says that there is a plan and nothing says which
_GRACE = 0.5  # seconds by which timers may be late
_MOST_PLANS = 50_000
_MOST_FOUND = 10_000
_SLOWEST = 0.01  # of the published rate: one answer that says less must not stop an operation for a day


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
class Claim:
    """How a call wants its place: how long it may wait in seconds, who sends it, and how it stands in the queue."""

    max_wait: float
    caller: Hashable = ""
    background: bool = False
    first: bool = False  # it waited already, and Amazon answered 429


class Published(NamedTuple):
    """A usage plan as it is published; `rate` is None where only a 429 tells that there is one."""

    name: str
    rate: float | None
    burst: float


# The sandbox has one plan for everything (DOC "Selling Partner API Sandbox").
SANDBOX_PLAN = Published("sandbox", 5.0, 15.0)


def _published(target: Target) -> Published:
    """Return the plan of an account's calls (DOC "Usage Plans and Rate Limits": by account, application, operation)."""
    if target.environment == "sandbox":
        return SANDBOX_PLAN
    operation = target.operation
    if operation is None:
        # Its path is all there is to go by; the first segments name API and version.
        path = target.path_and_query.partition("?")[0]
        return Published("unknown " + "/".join(path.split("/", 4)[:4])[:100], None, 1.0)
    return _published_as(operation.method, operation.name, operation.rate, operation.burst)


@lru_cache(maxsize=2048)
def _published_as(method: str, name: str, rate: float | None, burst: int | None) -> Published:
    # With the method: one name stands for two operations with plans of their own (shipping v2 linkCarrierAccount).
    return Published(f"{method} {name}", rate, float(burst or 1))


def _published_for_all(target: Target) -> Published | None:
    """Return the plan of all accounts of the application together, None where the operation has none."""
    operation = target.operation
    if operation is None or operation.app_rate is None or target.environment == "sandbox":
        return None
    # The published burst is that of one account; a tenth of a second's worth is what calls may bunch.
    burst = max(1.0, float(operation.app_burst or operation.app_rate / 10))
    return Published(f"all {operation.method} {operation.name}", operation.app_rate, burst)


@dataclass(eq=False, slots=True)
class _Place:
    """A call that waits; `due` is the moment by which it was promised its place."""

    come: asyncio.Future[None]
    caller: Hashable
    due: float
    is_queued: bool = True


class Plan:
    """One usage plan in use: its bucket, what is known of its rate, and who waits."""

    def __init__(
        self, published: Published, where: tuple[str, str, str], now: Callable[[], float], call_later: CallLater
    ) -> None:
        rate = published.rate or _GUESSED_RATE
        self.where = where
        self.bucket = Bucket.full(rate, published.burst, now())
        self.estimate = Estimate(rate, published.rate, rate * _SLOWEST)
        self.queue: Queue[_Place] = Queue()
        self.said: str | None = None  # the header that announced the rate last
        self._now = now
        self._call_later = call_later
        self._timer: Any = None

    def wait_of(self, claim: Claim) -> float:
        """Return how long a call would wait that came now, in seconds."""
        ahead = self.queue.ahead_of(self._round_of(claim)) if len(self.queue) else 0
        return self.bucket.wait(self._now(), ahead)

    def _round_of(self, claim: Claim) -> float:
        caller = (claim.caller, claim.background)
        return self.queue.round_of_next(caller, background=claim.background, first=claim.first)

    async def turn(self, claim: Claim) -> None:
        """Wait for a place and take it; raise TimeoutError where it has not come within `claim.max_wait`.

        That happens where others came between. A call that is cancelled leaves its place to those behind it.
        """
        caller = (claim.caller, claim.background)
        place = _Place(asyncio.get_running_loop().create_future(), caller, self._now() + claim.max_wait)
        entry = self.queue.add(caller, self._round_of(claim), place)
        if self._timer is None:
            self._look()
        try:
            async with asyncio.timeout(claim.max_wait + _GRACE):
                await place.come
        except (asyncio.CancelledError, TimeoutError):
            if place.is_queued:
                self.queue.leave(caller, entry)
            elif not place.come.cancelled():
                self.give_back()  # it came in the very moment
            raise

    def is_free(self, claim: Claim) -> bool:  # noqa: ARG002 - who it is matters where others are asked
        """Return whether a call that comes now has its place at once."""
        now = self._now
        return not self.queue and self.bucket.has_token(now())

    def take(self) -> None:
        """Take a place that is free."""
        self.bucket.take()

    def give_back(self) -> None:
        """Return a place that was not used."""
        self.bucket.give_back()
        self._look()

    def announce(self, rate: float) -> None:
        """Learn the rate that Amazon names."""
        if rate != self.estimate.known or not self.estimate.announced:
            self.estimate.announce(rate)
            self._set_rate()

    def throttled(self) -> None:
        """Learn from a 429 of Amazon's."""
        now = self._now()
        self.bucket.empty(now)
        self.estimate.throttled(now)
        self._set_rate()

    def passed(self) -> None:
        """Learn that a call which had waited was let through."""
        self.estimate.passed()
        if self.estimate.rate != self.bucket.rate:
            self._set_rate()

    def _set_rate(self) -> None:
        self.bucket.refill(self._now())  # what came so far came at the old rate
        self.bucket.rate = self.estimate.rate
        self._look()

    def look(self) -> None:
        """See whose turn it is: something has changed."""
        self._look()

    def _look(self) -> None:
        """Let go whose turn has come, and look again when the next one's does."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while len(self.queue):
            wait = self.bucket.wait(self._now())
            if wait > 0:
                self._timer = self._call_later(wait, self._look)
                return
            place = self.queue.first()[2]
            self.queue.next_round(place.caller)
            place.is_queued = False
            if not place.come.done():  # it may be about to leave
                self.bucket.take()
                place.come.set_result(None)


class Limits:
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
        self._plans: dict[tuple[str, ...], Plan] = {}
        # Those of them that calls of a kind fall under.
        self._found: dict[Kind, tuple[Plan | None, Plan | None]] = {}
        metrics.read_plans = self._numbers

    def take_up(self, *, pace: bool, max_queue: int) -> None:
        """Go by other settings from now on; what is known of the plans stays."""
        self._pace, self._max_queue = pace, max_queue

    async def admit(self, target: Target, claim: Claim) -> float:
        """Wait for a place in the usage plan and return the seconds waited.

        Raises UsagePlanExhausted at once where no place comes in time. A caller who is cancelled gives its place back.
        """
        if self.admits_at_once(target, claim):
            return 0.0
        began = self._now()
        plan = self._plan(target)
        if plan is not None:
            await self._place_in(plan, target, claim)
        for_all = self._plan_for_all(target)
        if for_all is not None:
            try:
                left = max(0.0, claim.max_wait - (self._now() - began))
                await self._place_in(for_all, target, replace(claim, max_wait=left))
            except BaseException:
                if plan is not None:
                    plan.give_back()
                raise
        return self._now() - began

    def admits_at_once(self, target: Target, claim: Claim) -> bool:
        """Take a place that is free now; return whether there was one. Without pacing there always is."""
        if not self._pace:
            return True
        found = self._found.get(target.kind)
        plan, for_all = found if found is not None else self._find(target)
        if (plan is not None and not plan.is_free(claim)) or (for_all is not None and not for_all.is_free(claim)):
            return False
        if plan is not None:
            plan.take()
        if for_all is not None:
            for_all.take()
        return True

    async def _place_in(self, plan: Plan, target: Target, claim: Claim) -> None:
        if plan.is_free(claim):
            plan.take()
            return
        wait = plan.wait_of(claim)
        if wait > claim.max_wait:
            raise self._exhausted(target, wait - plan.bucket.margin, claim.max_wait)
        if len(plan.queue) >= self._max_queue:
            self._metrics.limit_refused.labels(target.account, target.region, target.operation_name).inc()
            raise UsagePlanExhausted(
                f"{self._max_queue} calls wait for the usage plan of {target.operation_name} already",
                "Come back after Retry-After, or raise limits.max_queue.",
                retry_after=wait - plan.bucket.margin,
            )
        try:
            await plan.turn(claim)
        except TimeoutError:
            raise self._exhausted(target, plan.wait_of(claim) - plan.bucket.margin, claim.max_wait) from None

    def learn(self, target: Target, status: int, rate_header: str | None, *, waited: bool = False) -> None:
        """Correct the plan by what Amazon's answer says; no header is normal (DOC "Parse SP-API Responses")."""
        if status == 429:
            self._metrics.throttled.labels(target.account, target.region, target.operation_name).inc()
            plan = self._plan(target, make=True)
            if plan is not None:
                plan.throttled()
            return
        found = self._found.get(target.kind)
        plan = found[0] if found is not None else self._plan(target)
        if plan is None or (not waited and rate_header == plan.said):
            return
        if target.operation is None or target.environment != "production":
            return
        rate = parse_rate(rate_header) if rate_header is not None else None
        if rate is not None:
            plan.said = rate_header
            plan.announce(rate)
        elif waited:
            plan.passed()

    def retry_after(self, target: Target, claim: Claim) -> float:
        """Return in how many seconds a call that came now would have its place."""
        plan = self._plan(target)
        return plan.wait_of(claim) if plan is not None else 0.0

    def _find(self, target: Target) -> tuple[Plan | None, Plan | None]:
        """Return the plan that the target falls under, and that over all accounts; remember them for its kind."""
        for_all = self._plan_for_all(target)
        found = (self._plan(target), for_all)
        # Without an operation its path decides, and only a 429 tells that there is a plan.
        is_lasting = target.operation is not None and target.kind is not ONE_OFF
        if is_lasting and len(self._plans) < _MOST_PLANS:
            if len(self._found) >= _MOST_FOUND:
                self._found.clear()
            self._found[target.kind] = found
        return found

    def _plan(self, target: Target, *, make: bool = False) -> Plan | None:
        """Return the plan that the target falls under, with its state; None where none is known.

        With `make`, one is made where there was none: a 429 tells that there is a plan.
        """
        published = _published(target)
        key = (target.application, target.credential.account, target.environment, target.region, published.name)
        plan = self._plans.get(key)
        if plan is None and (make or published.rate is not None):
            plan = self._new(key, published, target)
        return plan

    def _plan_for_all(self, target: Target) -> Plan | None:
        published = _published_for_all(target)
        if published is None:
            return None
        key = (target.application, "", target.environment, target.region, published.name)
        return self._plans.get(key) or self._new(key, published, target, account="*")

    def _new(self, key: tuple[str, ...], published: Published, target: Target, account: str = "") -> Plan:
        if len(self._plans) >= _MOST_PLANS:
            idle = next((known for known, plan in self._plans.items() if not len(plan.queue)), key)
            self._plans.pop(idle, None)
        self._found.clear()  # calls of some kind may fall under this one, where there was none for them
        where = (account or target.account, target.region, target.operation_name)
        call_later = self._call_later or asyncio.get_running_loop().call_later
        plan = self._plans[key] = self._make(key, published, where, call_later)
        return plan

    def _make(
        self, _: tuple[str, ...], published: Published, where: tuple[str, str, str], call_later: CallLater
    ) -> Plan:
        return Plan(published, where, self._now, call_later)

    def _numbers(self) -> dict[tuple[str, str, str], PlanNumbers]:
        """Return what is shown of all plans. It is asked from another thread, and changes nothing."""
        now, numbers = self._now(), dict[tuple[str, str, str], PlanNumbers]()
        for plan in self._plans.copy().values():
            waiting = len(plan.queue) + (numbers[plan.where].waiting if plan.where in numbers else 0)
            tokens = max(0.0, plan.bucket.tokens_at(now))
            numbers[plan.where] = PlanNumbers(plan.bucket.rate, tokens, waiting)
        return numbers

    def _exhausted(self, target: Target, wait: float, max_wait: float) -> UsagePlanExhausted:
        self._metrics.limit_refused.labels(target.account, target.region, target.operation_name).inc()
        return UsagePlanExhausted(
            f"the usage plan of {target.operation_name} has its next place in {wait:.1f} s, "
            f"and this call may wait {max_wait:g} s",
            f"Come back after Retry-After, or let the call wait longer: {MAX_WAIT_HEADER}: {math.ceil(wait)}s.",
            retry_after=wait,
        )
