"""When may this call go out, where several processes keep to one usage plan?

As in `limits.py`, but the buckets lie in Redis. A call that finds nobody waiting asks there once and goes, or takes its
turn in this process's queue, which reserves one place at a time. While Redis is lost, this process paces by itself,
from what it knew last.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from proxy.observability.metrics import Metrics
from proxy.request.ratelimit.limiter import AdmissionRequest, CallLater, PlanLimiter, PublishedPlan, RateLimiter
from proxy.request.routing import Route
from proxy.store.redis_buckets import BucketState, BucketUpdate, RedisBuckets
from proxy.store.redis_client import StoreUnavailable

SHARE_OF = 50  # places that all take, by which a process finds its share of them
MIN_SHARE = 0.05
SMOOTHING_TIME = 4  # gaps between places: a single one may be long because somebody else left, or came
_IMMEDIATE = 0.001  # seconds


@dataclass(slots=True)
class FleetShare:
    """Which share of the fleet's calls this process makes, by the plans for which it is known."""

    share: float = 1.0


class RedisPlan(PlanLimiter):
    """A plan whose bucket lies in Redis; its own bucket is what it heard of that last."""

    def __init__(
        self,
        published: PublishedPlan,
        where: tuple[str, str, str],
        now: Callable[[], float],
        call_later: CallLater,
        shared: RedisBuckets,
        name: str,
        typical: FleetShare,
    ) -> None:
        super().__init__(published, where, now, call_later)
        self._shared = shared
        self._name = name
        self._rate_is_news = False
        self._is_empty = False
        self._reserving: asyncio.Task[None] | None = None
        self._granted: Any = None  # the timer of the place that is reserved
        self._next_grant_at = 0.0
        self._typical = typical
        self._own_share: float | None = None  # of all places that are taken
        self._taken_here, self._taken_before = 0, 0.0
        self._is_standalone = False
        self.spacing = 0.0  # seconds between two places here: the other processes take those between

    def is_degraded(self) -> bool:
        """Return whether Redis is lost; what this process has then is its share, so that all have one plan's worth."""
        is_alone = not self._shared.redis.is_up
        if is_alone != self._is_standalone:
            self._is_standalone = is_alone
            self.bucket.refill(self._now())
            self.bucket.rate = self.estimate.rate * (self._own_fraction if is_alone else 1.0)
            if is_alone:
                self.bucket.tokens *= self._own_fraction
                self._next_grant_at = 0.0  # the next place that Redis gives says nothing of how far apart they are
        return is_alone

    def meet_deadlines(self) -> None:
        """Go faster than this process's share, up to the whole plan, where those who wait would be late otherwise.

        They were promised their place by what Redis knew. Their crowd is small beside what all may call in that time:
        Amazon will take most of them, and what it does not take is sent again.
        """
        now, needed = self._now(), self.estimate.rate * self._own_fraction
        self.bucket.refill(now)
        for index, waiter in enumerate(self.queue.waiting()):
            needed = max(needed, (index + 1 - self.bucket.tokens) / max(waiter.deadline - now, _IMMEDIATE))
        self.bucket.rate = min(needed, self.estimate.rate)

    @property
    def _own_fraction(self) -> float:
        return self._typical.share if self._own_share is None else self._own_share

    def _record_share(self, taken: float, *, is_mine: bool) -> None:
        """Learn which share of the plan's places this process takes; `taken` is what all have taken so far."""
        self._taken_here += is_mine
        all_took = taken - self._taken_before
        if all_took < 0:  # a new Redis, which counts from nothing
            self._taken_here, self._taken_before = 0, taken
        elif all_took >= SHARE_OF:
            share = min(1.0, max(MIN_SHARE, self._taken_here / all_took))
            self._own_share = share if self._own_share is None else (self._own_share + share) / 2
            self._typical.share += (self._own_share - self._typical.share) / 4
            self._taken_here, self._taken_before = 0, taken

    def to_request(self) -> BucketUpdate:
        """Return what Redis is told of this plan."""
        self.is_degraded()
        bucket = self.bucket
        step = BucketUpdate(
            self._name, bucket.rate, self._rate_is_news, bucket.burst, bucket.margin, self._tokens(), self._is_empty
        )
        self._rate_is_news = self._is_empty = False
        return step

    def _tokens(self) -> float:
        self.bucket.refill(self._now())
        return self.bucket.tokens

    def apply(self, held: BucketState, *, is_mine: bool) -> None:
        """Take over what Redis says, a rate that another process has learnt, too; `is_mine`: a place was taken."""
        self._record_share(held.taken, is_mine=is_mine)
        if self.is_degraded():
            return
        bucket, now = self.bucket, self._now()
        bucket.tokens, bucket.updated = min(held.tokens, bucket.burst), now + held.reserved_ahead
        if held.rate < self.estimate.min_rate * 0.99:
            self._rate_is_news = True  # no plan is that slow: Redis is told better with the next step
        elif not self._rate_is_news and abs(held.rate / bucket.rate - 1) > 1e-6:
            if held.rate < bucket.rate:
                self.estimate.changed = now  # that 429 is dealt with
            bucket.rate = self.estimate.rate = held.rate
            self.estimate.rate_before_probe, self.estimate.successes = None, 0

    def estimated_wait(self, admission: AdmissionRequest) -> float:
        """Return how long a call would wait that came now, in seconds, if the other processes go on as they do."""
        if self.is_degraded():
            return super().estimated_wait(admission)
        now = self._now()
        ahead = self.queue.position(self._virtual_time_of(admission)) if len(self.queue) else 0
        if self._granted is not None:
            first = max(0.0, self._next_grant_at - now)
        else:
            first = max(0.0, self.bucket.updated - now) + self.bucket.wait(now)
        return first + ahead * max(self.spacing, 1 / self.bucket.rate) if ahead else first

    def has_capacity(self, admission: AdmissionRequest) -> bool:
        """Return whether a call has its place without asking anybody else."""
        return self.is_degraded() and super().has_capacity(admission)

    def refund(self) -> None:
        """Return a place that was not used."""
        if self.is_degraded():
            super().refund()
        else:
            self._shared.send("back", (self.to_request(),))
            self._dispatch_due()

    def on_429(self) -> None:
        """Learn from a 429 of Amazon's, and let the others know."""
        super().on_429()
        self._is_empty = True
        self._shared.send("look", (self.to_request(),))

    def _set_rate(self) -> None:
        self._rate_is_news = True
        if self._granted is not None:  # at the old rate
            self._granted.cancel()
            self._granted = None
            self._shared.send("back", (self.to_request(),))
            self._rate_is_news = True  # should that be lost
        self.bucket.refill(self._now())  # what came so far came at the old rate
        self.bucket.rate = self.estimate.rate * (self._own_fraction if self.is_degraded() else 1.0)
        self._dispatch_due()

    def _dispatch_due(self) -> None:
        """See to it that the next place comes, if somebody waits."""
        if self._reserving is not None or self._granted is not None:
            return
        if self.is_degraded():
            self.meet_deadlines()
            super()._dispatch_due()
            return
        if self._timer is not None:  # from when this process was on its own
            self._timer.cancel()
            self._timer = None
        if len(self.queue):
            self._reserving = asyncio.create_task(self._reserve(), name="usage plan")

    async def _reserve(self) -> None:
        try:
            reservation = await self._shared.execute("reserve", (self.to_request(),))
        except StoreUnavailable:
            self._reserving = None
            if self.is_degraded():
                self.meet_deadlines()
            super()._dispatch_due()
            return
        except BaseException:
            self._reserving = None
            raise
        self._reserving = None
        now, wait = self._now(), reservation.wait or 0.0
        self.apply(reservation.buckets[0], is_mine=True)
        if self._next_grant_at:
            apart = max(0.0, now + wait - self._next_grant_at)
            self.spacing += (apart - self.spacing) / (SMOOTHING_TIME if self.spacing else 1)
        self._next_grant_at = now + wait
        self._granted = self._call_later(wait, self.on_reservation)

    def on_reservation(self) -> None:
        """Give the place that was reserved to whoever is first now."""
        self._granted = None
        while len(self.queue):
            waiter = self.queue.first()[2]
            self.queue.pop(waiter.caller)
            waiter.is_queued = False
            if not waiter.future.done():
                waiter.future.set_result(None)
                if not len(self.queue):
                    self._next_grant_at = self.spacing = 0.0
                self._dispatch_due()
                return
        self._next_grant_at = self.spacing = 0.0
        self._shared.send("back", (self.to_request(),))


class RedisRateLimiter(RateLimiter):
    """The usage plans of a fleet, as one of its processes keeps to them."""

    def __init__(self, metrics: Metrics, shared: RedisBuckets, *, pace: bool, max_queue: int = 5000) -> None:
        super().__init__(metrics, pace=pace, max_queue=max_queue)
        self._shared = shared
        self._typical = FleetShare()
        shared.redis.on_recovery.append(self._poll)

    def _poll(self) -> None:
        """Let those who wait take their turns with the other processes again, and no longer at this one's pace."""
        for plan in list(self._plans.values()):
            if len(plan.queue):
                plan.dispatch()

    def try_acquire(self, route: Route, admission: AdmissionRequest) -> bool:
        """Take a place that is free now, where that is known without asking Redis."""
        if self._pace and self._shared.redis.is_up:
            found = self._found.get(route.key)
            plan, for_all = found if found is not None else self._find(route)
            return plan is None and for_all is None
        return super().try_acquire(route, admission)

    async def acquire(self, route: Route, admission: AdmissionRequest) -> float:
        """Wait for a place in the usage plan and return the seconds waited: none where the first answer is yes.

        Raises what Limits.admit raises.
        """
        if self._pace and self._shared.redis.is_up and await self._has_capacity(route):
            return 0.0
        return await super().acquire(route, admission)

    async def _has_capacity(self, route: Route) -> bool:
        """Take a place in each of the target's plans, where each has one now and nobody waits here."""
        found = self._found.get(route.key)
        plans = [plan for plan in (found if found is not None else self._find(route)) if isinstance(plan, RedisPlan)]
        if any(len(plan.queue) for plan in plans):
            return False
        if not plans:
            return True
        try:
            reservation = await self._shared.execute("try", [plan.to_request() for plan in plans])
        except StoreUnavailable:
            return False
        for plan, held in zip(plans, reservation.buckets, strict=True):
            plan.apply(held, is_mine=reservation.wait is not None)
        return reservation.wait is not None

    def _make(
        self, key: tuple[str, ...], published: PublishedPlan, where: tuple[str, str, str], call_later: CallLater
    ) -> PlanLimiter:
        return RedisPlan(published, where, self._now, call_later, self._shared, self._shared.name(key), self._typical)
