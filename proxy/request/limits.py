"""When may this call go out under Amazon's usage plan, and what do Amazon's answers teach about the plan?

A plan is a token bucket: `rate` calls per second are added, up to `burst` (DOC "Usage Plans and Rate Limits"). A call
takes its place at once and then sleeps until the place comes; so the order is first come, first served, and how long
a call would wait is known before it waits.
"""

import asyncio
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from proxy.config import parse_duration
from proxy.errors import BadOption, UsagePlanExhausted
from proxy.metrics import Metrics
from proxy.request.identify import Target

MAX_WAIT_HEADER = "x-sp-max-wait"
RATE_HEADER = "x-amzn-RateLimit-Limit"

# The sandbox has one plan for everything (DOC "Selling Partner API Sandbox").
SANDBOX_PLAN = ("sandbox", 5.0, 15.0)

_LONGEST_WAIT = 3600.0  # seconds; a caller who asks for more has made a mistake
_RATE = re.compile(r"(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_RATE_BOUNDS = (1e-5, 1e4)  # calls per second; what is outside is no usage plan
_SLOWEST = 0.01  # of the published rate: one answer that says less must not stop an operation for a day


@dataclass(slots=True)
class Bucket:
    """The arithmetic of one usage plan; times in seconds of any clock that the caller reads.

    `tokens` below zero are places given to calls that still wait.
    """

    rate: float
    burst: float
    tokens: float
    updated: float

    @classmethod
    def full(cls, rate: float, burst: float, now: float) -> "Bucket":
        """Return a bucket nobody has used yet."""
        return cls(rate, burst, burst, now)

    def take(self, now: float) -> float:
        """Take one place and return how long to wait for it, in seconds."""
        self._refill(now)
        self.tokens -= 1
        return max(0.0, -self.tokens / self.rate)

    def give_back(self) -> None:
        """Return the place that was taken last and not used; whoever waits before it keeps an earlier one."""
        self.tokens = min(self.burst, self.tokens + 1)

    def empty(self, now: float) -> None:
        """Learn from a 429 that Amazon's bucket holds nothing."""
        self._refill(now)
        self.tokens = min(self.tokens, 0.0)

    def _refill(self, now: float) -> None:
        # A clock that goes backwards adds nothing and takes nothing.
        self.tokens = min(self.burst, self.tokens + max(0.0, now - self.updated) * self.rate)
        self.updated = max(self.updated, now)


def parse_rate(text: str) -> float | None:
    """Return calls per second of an `x-amzn-RateLimit-Limit`, or None for anything that is no plan's rate."""
    if len(text) > 32 or not _RATE.fullmatch(text.strip(" \t")):
        return None
    rate = float(text)
    return rate if _RATE_BOUNDS[0] <= rate <= _RATE_BOUNDS[1] else None


def parse_max_wait(text: str | None, default: float) -> float:
    """Return how long this call may wait, in seconds: the header's value, or the setting's."""
    if text is None:
        return default
    try:
        seconds = parse_duration(text)
    except ValueError as exc:
        raise BadOption(f"the header {MAX_WAIT_HEADER} is no duration", "Write 500ms, 10s or 2m; 0 for none.") from exc
    return min(seconds, _LONGEST_WAIT)


def _published_plan(target: Target) -> tuple[str, float, float] | None:
    """Return name, rate and burst of the plan that a call falls under, None where none is known."""
    if target.environment == "sandbox":
        return SANDBOX_PLAN
    operation = target.operation
    if operation is None or operation.rate is None:
        return None
    # With the method: one name stands for two operations with plans of their own (shipping v2 linkCarrierAccount).
    return f"{operation.method} {operation.name}", operation.rate, float(operation.burst or 1)


@dataclass(eq=False, slots=True)
class _Place:
    """A call that waits, and the moment, on the event loop's clock, at which its place comes."""

    come: asyncio.Future[None]
    at: float = 0.0
    timer: asyncio.TimerHandle | None = None


@dataclass(slots=True)
class _Plan:
    """One usage plan in use: its bucket, and those who wait for a place, first come first."""

    bucket: Bucket
    slowest: float
    waiting: list[_Place] = field(default_factory=list)

    async def turn(self, wait: float) -> float:
        """Wait `wait` seconds, or less where somebody ahead leaves; return the seconds waited.

        A call that is cancelled lets those behind it move up.
        """
        loop = asyncio.get_running_loop()
        came, place = loop.time(), _Place(loop.create_future())
        self.waiting.append(place)
        self._comes_at(came + wait, place, loop)
        try:
            await place.come
        except asyncio.CancelledError:
            self._leave(place, loop)
            raise
        return loop.time() - came

    def _comes_at(self, moment: float, place: _Place, loop: asyncio.AbstractEventLoop) -> None:
        if place.timer is not None:
            place.timer.cancel()
        place.at = moment
        place.timer = loop.call_at(moment, self._comes, place)

    def _comes(self, place: _Place) -> None:
        self.waiting.remove(place)
        if not place.come.done():
            place.come.set_result(None)

    def _leave(self, leaver: _Place, loop: asyncio.AbstractEventLoop) -> None:
        """Give everybody behind the place before theirs, so that it is the last one that becomes free."""
        if leaver not in self.waiting:
            return  # its place had come, and counts as used
        index = self.waiting.index(leaver)
        moments = [place.at for place in self.waiting[index:-1]]
        del self.waiting[index]
        if leaver.timer is not None:
            leaver.timer.cancel()
        for place, moment in zip(self.waiting[index:], moments, strict=True):
            self._comes_at(moment, place, loop)
        self.bucket.give_back()


class Limits:
    """The usage plans of every application, account, region and operation that was called."""

    def __init__(self, metrics: Metrics, *, pace: bool, now: Callable[[], float] = time.monotonic) -> None:
        self._metrics = metrics
        self._pace = pace
        self._now = now
        self._plans: dict[tuple[str, ...], _Plan] = {}

    async def admit(self, target: Target, max_wait: float) -> float:
        """Wait for a place in the usage plan and return the seconds waited.

        Raises UsagePlanExhausted at once where no place comes within `max_wait` seconds. A caller who is cancelled
        gives its place back.
        """
        plan = self._plan(target)
        if plan is None or not self._pace:
            return 0.0
        wait = plan.bucket.take(self._now())
        if wait == 0.0:
            return 0.0
        if wait > max_wait:
            plan.bucket.give_back()
            raise self._exhausted(target, wait, max_wait)
        return await plan.turn(wait)

    def learn(self, target: Target, status: int, rate_header: str | None) -> None:
        """Correct the plan by what Amazon's answer says; no header is normal (DOC "Parse SP-API Responses")."""
        labels = (target.account, target.region, target.operation_name)
        if status == 429:
            self._metrics.throttled.labels(*labels).inc()
        rate = parse_rate(rate_header) if rate_header is not None else None
        plan = self._plan(target)
        if rate is not None and target.operation is not None:
            self._metrics.plan_rate.labels(*labels).set(rate)
            if plan is not None and target.environment == "production":
                plan.bucket.rate = max(rate, plan.slowest)
        if status == 429 and plan is not None:
            plan.bucket.empty(self._now())

    def _plan(self, target: Target) -> "_Plan | None":
        """Return the plan that the target falls under, with its state; None where none is known."""
        published = _published_plan(target)
        if published is None:
            return None
        name, rate, burst = published
        key = (target.application, target.credential.account, target.environment, target.region, name)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = _Plan(Bucket.full(rate, burst, self._now()), rate * _SLOWEST)
        return plan

    def _exhausted(self, target: Target, wait: float, max_wait: float) -> UsagePlanExhausted:
        self._metrics.limit_refused.labels(target.account, target.region, target.operation_name).inc()
        return UsagePlanExhausted(
            f"the usage plan of {target.operation_name} has its next place in {wait:.1f} s, "
            f"and this call may wait {max_wait:g} s",
            f"Come back after Retry-After, or let the call wait longer: {MAX_WAIT_HEADER}: {math.ceil(wait)}s.",
            retry_after=wait,
        )
