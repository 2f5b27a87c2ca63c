"""Rate limiter for several processes that share usage plans: the token buckets are in Redis.

A call that arrives while none waits here asks Redis once for a token. Otherwise it waits in this process's queue, which
reserves one token at a time. While Redis is unavailable, each process limits the rate alone, to its share of the plan.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from proxy.observability.metrics import Metrics
from proxy.request.ratelimit.limiter import RateLimiter
from proxy.request.ratelimit.plan import CallLater, PlanLimiter, PublishedPlan
from proxy.request.request_options import AdmissionRequest
from proxy.request.routing import Route
from proxy.store.redis_buckets import BucketState, BucketUpdate, RedisBuckets
from proxy.store.redis_client import StoreUnavailable

SHARE_SAMPLE = 50  # tokens taken by all processes from which a process computes its share
# Never 0: a process that took no token of a sample could otherwise send nothing during an outage.
MIN_SHARE = 0.05
SMOOTHING_TIME = 4  # intervals between reservations: one alone varies when another process starts or stops to wait
# Prevents a division by zero for a deadline that is now.
_IMMEDIATE = 0.001  # seconds


@dataclass(slots=True)
class FleetShare:
    """This process's share of the fleet's calls, averaged over its plans; for plans whose own share is not known."""

    share: float = 1.0


class RedisPlan(PlanLimiter):
    """A plan whose bucket is in Redis; its own `bucket` is a copy of the last state from there."""

    def __init__(
        self,
        published: PublishedPlan,
        labels: tuple[str, str, str],
        now: Callable[[], float],
        call_later: CallLater,
        shared: RedisBuckets,
        name: str,
        fleet_share: FleetShare,
    ) -> None:
        super().__init__(published, labels, now, call_later)
        self._shared = shared
        self._name = name
        self._rate_is_news = False
        self._is_empty = False
        self._reserving: asyncio.Task[None] | None = None
        self._granted: Any = None  # the timer of the reserved token
        self._next_grant_at = 0.0
        self._fleet_share = fleet_share
        self._own_share: float | None = None  # of all tokens taken from this plan
        self._taken_here, self._taken_before = 0, 0.0
        self._is_standalone = False
        self.spacing = 0.0  # mean seconds between two reservations here; other processes take tokens in between

    def is_degraded(self) -> bool:
        """Return whether Redis is unavailable; on a change, switch the bucket to this process's share or back.

        With its share alone, the processes together stay within one plan.
        """
        # Checked at each use and not by a callback: a plan may be made, or be without calls, during an outage.
        is_alone = not self._shared.redis.is_up
        if is_alone != self._is_standalone:
            self._is_standalone = is_alone
            self.bucket.refill(self._now())
            self.bucket.rate = self.estimate.rate * (self._own_fraction if is_alone else 1.0)
            if is_alone:
                # The tokens of the copy belong to all processes: each keeps its share of them.
                self.bucket.tokens *= self._own_fraction
                self._next_grant_at = 0.0  # the interval that includes the outage must not count in `spacing`
        return is_alone

    def meet_deadlines(self) -> None:
        """Raise the rate above this process's share, up to the whole plan, where calls would miss their deadlines.

        They were queued because Redis's state promised them a token in time. They are few beside what all processes may
        send in that time, so Amazon accepts most of them; those that get a 429 are sent again.
        """
        # Starts at the share and only raises it, so that calls without a close deadline stay within the plan.
        now, needed = self._now(), self.estimate.rate * self._own_fraction
        self.bucket.refill(now)
        for index, waiter in enumerate(self.queue.waiting()):
            needed = max(needed, (index + 1 - self.bucket.tokens) / max(waiter.deadline - now, _IMMEDIATE))
        # Never above the whole plan, whatever the deadlines.
        self.bucket.rate = min(needed, self.estimate.rate)

    @property
    def _own_fraction(self) -> float:
        return self._fleet_share.share if self._own_share is None else self._own_share

    def _record_share(self, taken: float, *, is_mine: bool) -> None:
        """Update this process's share; `taken` is the number of tokens that all processes have taken so far."""
        self._taken_here += is_mine
        all_took = taken - self._taken_before
        if all_took < 0:  # Redis lost its data and counts from 0 again
            self._taken_here, self._taken_before = 0, taken
        elif all_took >= SHARE_SAMPLE:
            # Redis may have lost a part of the count, so the quotient can exceed 1.
            share = min(1.0, max(MIN_SHARE, self._taken_here / all_took))
            # Mean of the old and the new share: one sample of SHARE_SAMPLE tokens varies by chance.
            self._own_share = share if self._own_share is None else (self._own_share + share) / 2
            self._fleet_share.share += (self._own_share - self._fleet_share.share) / 4
            self._taken_here, self._taken_before = 0, taken

    def to_request(self) -> BucketUpdate:
        """Return this plan's state as the update for Redis."""
        self.is_degraded()
        bucket = self.bucket
        update = BucketUpdate(
            self._name, bucket.rate, self._rate_is_news, bucket.burst, bucket.margin, self._tokens(), self._is_empty
        )
        # Reset when it is built and not when it arrives: both are hints, and a 429 that follows repeats them.
        self._rate_is_news = self._is_empty = False
        return update

    def _tokens(self) -> float:
        self.bucket.refill(self._now())
        return self.bucket.tokens

    def apply(self, state: BucketState, *, is_mine: bool) -> None:
        """Adopt the state from Redis, including a rate that another process learnt; `is_mine`: a token was taken."""
        self._record_share(state.taken, is_mine=is_mine)
        if self.is_degraded():
            return
        bucket, now = self.bucket, self._now()
        # `updated` in the future: the tokens hold once the reservations before it have been granted. `Bucket.refill`
        # adds nothing until then.
        bucket.tokens, bucket.updated = min(state.tokens, bucket.burst), now + state.reserved_ahead
        # A hundredth of tolerance: Redis keeps the rate with 9 digits, so an equal one may come back a little smaller.
        if state.rate < self.estimate.min_rate * 0.99:
            self._rate_is_news = True  # no plan is that slow: overwrite the rate in Redis with the next update
        # A relative difference of 1e-6 is above the rounding of 9 digits. An own rate that is not sent yet takes
        # precedence.
        elif not self._rate_is_news and abs(state.rate / bucket.rate - 1) > 1e-6:
            if state.rate < bucket.rate:
                self.estimate.changed = now  # another process has already lowered the rate after this 429
            bucket.rate = self.estimate.rate = state.rate
            # The rate is another process's, so a 429 must not restore the one before this process's own probe.
            self.estimate.rate_before_probe, self.estimate.successes = None, 0

    def estimated_wait(self, admission: AdmissionRequest) -> float:
        """Return how long a call that arrived now would wait, in seconds, if the other processes keep their pace."""
        if self.is_degraded():
            return super().estimated_wait(admission)
        now = self._now()
        ahead = self.queue.position(self._virtual_time_of(admission)) if len(self.queue) else 0
        if self._granted is not None:
            first = max(0.0, self._next_grant_at - now)
        else:
            first = max(0.0, self.bucket.updated - now) + self.bucket.wait(now)
        # `spacing` includes the tokens that other processes take; 1 / rate alone would promise theirs to this one.
        return first + ahead * max(self.spacing, 1 / self.bucket.rate) if ahead else first

    def has_capacity(self, admission: AdmissionRequest) -> bool:
        """Return whether a call may be sent without asking Redis."""
        # While Redis is up, only Redis knows: the copy may be older than another process's calls.
        return self.is_degraded() and super().has_capacity(admission)

    def refund(self) -> None:
        """Return a token that was not used."""
        if self.is_degraded():
            super().refund()
        else:
            self._shared.send("back", (self.to_request(),))
            self._dispatch_due()

    def on_429(self) -> None:
        """Empty the bucket and lower the rate after a 429 of Amazon's, here and in Redis."""
        super().on_429()
        self._is_empty = True
        self._shared.send("look", (self.to_request(),))

    def _set_rate(self) -> None:
        self._rate_is_news = True
        if self._granted is not None:  # a token reserved at the old rate
            self._granted.cancel()
            self._granted = None
            self._shared.send("back", (self.to_request(),))
            self._rate_is_news = True  # again: `send` does not report whether the update arrived
        self.bucket.refill(self._now())  # the time until now counts at the old rate
        self.bucket.rate = self.estimate.rate * (self._own_fraction if self.is_degraded() else 1.0)
        self._dispatch_due()

    def _dispatch_due(self) -> None:
        """Reserve the next token in Redis if a call waits; while Redis is unavailable, use the own bucket."""
        # One reservation at a time: each takes a token from all processes, and the first in the queue may leave.
        if self._reserving is not None or self._granted is not None:
            return
        if self.is_degraded():
            self.meet_deadlines()
            super()._dispatch_due()
            return
        if self._timer is not None:  # set while Redis was unavailable
            self._timer.cancel()
            self._timer = None
        if len(self.queue):
            # The attribute keeps the task alive: the event loop has only weak references (bpo-44665).
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
            interval = max(0.0, now + wait - self._next_grant_at)
            self.spacing += (interval - self.spacing) / (SMOOTHING_TIME if self.spacing else 1)
        self._next_grant_at = now + wait
        self._granted = self._call_later(wait, self.on_reservation)

    def on_reservation(self) -> None:
        """Hand the reserved token to the first waiting call, or return it where none waits any more."""
        self._granted = None
        while len(self.queue):
            waiter = self.queue.first()[2]
            self.queue.pop(waiter.caller)
            waiter.is_queued = False
            if not waiter.future.done():
                waiter.future.set_result(None)
                # Nobody waits: the time until the next call comes says nothing about the pace of the other processes.
                if not len(self.queue):
                    self._next_grant_at = self.spacing = 0.0
                self._dispatch_due()
                return
        self._next_grant_at = self.spacing = 0.0
        self._shared.send("back", (self.to_request(),))


class RedisRateLimiter(RateLimiter):
    """RateLimiter whose plans are shared through Redis."""

    def __init__(self, metrics: Metrics, shared: RedisBuckets, *, pace: bool, max_queue: int = 5000) -> None:
        super().__init__(metrics, pace=pace, max_queue=max_queue)
        self._shared = shared
        self._fleet_share = FleetShare()
        shared.redis.on_recovery.append(self._dispatch_all)

    def _dispatch_all(self) -> None:
        """Reserve in Redis again for the calls that wait, which were released at this process's own rate."""
        for plan in list(self._plans.values()):
            if len(plan.queue):
                plan.dispatch()

    def try_acquire(self, route: Route, admission: AdmissionRequest) -> bool:
        """Take a token that is available now, where that is known without asking Redis."""
        if self._pace and self._shared.redis.is_up:
            cached = self._plans_by_route.get(route.key)
            plan, application_plan = cached if cached is not None else self._find_plans(route)
            return plan is None and application_plan is None
        return super().try_acquire(route, admission)

    async def acquire(self, route: Route, admission: AdmissionRequest) -> float:
        """Wait for a token of each usage plan that applies; return the seconds waited: 0 where the first try succeeds.

        Raise what RateLimiter.acquire raises.
        """
        if self._pace and self._shared.redis.is_up and await self._try_reserve(route):
            return 0.0
        return await super().acquire(route, admission)

    async def _try_reserve(self, route: Route) -> bool:
        """Take a token of each plan in Redis if all have one now and no call waits here; return whether it did."""
        cached = self._plans_by_route.get(route.key)
        found = cached if cached is not None else self._find_plans(route)
        plans = [plan for plan in found if isinstance(plan, RedisPlan)]
        if any(len(plan.queue) for plan in plans):
            return False
        if not plans:
            return True
        try:
            # All plans in one script: it takes a token of each or of none, so nothing has to be returned.
            reservation = await self._shared.execute("try", [plan.to_request() for plan in plans])
        except StoreUnavailable:
            return False
        for plan, state in zip(plans, reservation.buckets, strict=True):
            plan.apply(state, is_mine=reservation.wait is not None)
        return reservation.wait is not None

    def _make(
        self, key: tuple[str, ...], published: PublishedPlan, labels: tuple[str, str, str], call_later: CallLater
    ) -> PlanLimiter:
        name = self._shared.name(key)
        return RedisPlan(published, labels, self._now, call_later, self._shared, name, self._fleet_share)
