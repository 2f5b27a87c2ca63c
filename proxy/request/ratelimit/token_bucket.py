"""Token buckets, rate estimates and fair queues for Amazon's usage plans: arithmetic only, nothing here waits.

A plan is a token bucket: `rate` tokens per second are added, up to `burst`; each call consumes one (DOC "Usage Plans
and Rate Limits"). Moments are seconds of any monotonic clock, read by the caller.
"""

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Waiter = TypeVar("Waiter")

# Seconds added to a wait, so that a call whose network path is a little faster than that of an earlier one does not
# reach Amazon before its token. A bucket with a burst pays the margin once: Amazon's bucket keeps the surplus. A bucket
# that holds one token pays it for every call, so there it is limited to this fraction of the interval between calls.
MARGIN, MARGIN_SHARE = 0.05, 0.02
_ROUNDING = 1e-9  # tokens: refilling by floating-point steps may end just below a whole token

# A penalty and not a lower priority: a background call passes after a bounded number of others and never starves.
BACKGROUND_PENALTY = 20  # units of virtual time: how many calls of each ordinary caller pass a background call

# Lowered in larger steps than it is raised: a rate that is too high costs rejected calls, one that is
# too low only time.
LOWER, RAISE = 0.8, 1.1  # factors for an estimated rate: after a 429, and after enough calls without one
RAISE_AFTER = 20  # calls accepted without a 429 until a lowered rate is raised
# Accounts may have larger plans than the published ones (dynamic usage plans), and no response announces it where the
# rate header is missing.
PROBE_AFTER = 100  # calls accepted until a rate above the published one is tried, which may cost a 429
# Bounded, because Amazon may raise a rate at any time without notice (DOC "Usage Plans and Rate Limits").
MAX_PROBE_AFTER = 10_000


@dataclass(slots=True)
class Bucket:
    """The state of a token bucket; `rate` in tokens per second, `updated` is the moment for which `tokens` holds."""

    rate: float
    burst: float
    tokens: float
    updated: float

    @classmethod
    def full(cls, rate: float, burst: float, now: float) -> "Bucket":
        """Return an unused bucket."""
        return cls(rate, burst, burst, now)

    def wait(self, now: float, ahead: int = 0) -> float:
        """Return after how many seconds a call with `ahead` others before it has its token, margin included."""
        self.refill(now)
        missing = ahead + 1 - self.tokens
        return missing / self.rate + self.margin if missing > _ROUNDING else 0.0

    def has_token(self, now: float) -> bool:
        """Return whether a token is available now."""
        self.refill(now)
        return self.tokens >= 1 - _ROUNDING

    @property
    def margin(self) -> float:
        """The seconds added to the wait for a token (see MARGIN)."""
        # (burst - 1) / 2 tokens: with a burst of 1 there is no surplus to pay from, and the fraction applies.
        return min(MARGIN, max(MARGIN_SHARE, (self.burst - 1) / 2) / self.rate)

    def consume(self) -> None:
        """Take a token that is available or due."""
        self.tokens -= 1

    def refund(self) -> None:
        """Return a token that was taken and not used."""
        # Amazon's bucket would not exceed its burst either, so a token that is returned to a full bucket is lost.
        self.tokens = min(self.burst, self.tokens + 1)

    def empty(self, now: float) -> None:
        """Drop all tokens: a 429 showed that Amazon's bucket is empty."""
        self.refill(now)
        # Not set to 0: a negative count is owed to calls that were admitted already.
        self.tokens = min(self.tokens, 0.0)

    def refill(self, now: float) -> None:
        """Add the tokens since the last update; a clock that goes backwards changes nothing."""
        if now > self.updated:
            tokens = self.tokens + (now - self.updated) * self.rate
            self.tokens = min(self.burst, tokens)
            self.updated = now

    def tokens_at(self, now: float) -> float:
        """Return how many tokens there are, without changing the bucket."""
        return min(self.burst, self.tokens + max(0.0, now - self.updated) * self.rate)


@dataclass(slots=True)
class RateEstimator:
    """Estimate of a plan's rate, in calls per second.

    `known` is the published or announced rate, None where there is neither. An announced rate is used as it is.
    Otherwise a 429 lowers the estimate, and accepted calls raise it again, slowly: first to the known rate, then,
    rarely, beyond it, in case the account has a larger plan than the published one. A raise that causes a 429 is
    undone, and the next one is tried later.
    """

    rate: float
    known: float | None
    min_rate: float
    announced: bool = False
    successes: int = 0  # calls accepted since the last change
    probe_after: int = PROBE_AFTER  # successes until the next raise
    rate_before_probe: float | None = None  # the rate before the last raise, until that is confirmed
    changed: float = float("-inf")  # the moment when the rate was last lowered

    def announce(self, rate: float) -> None:
        """Adopt the rate of `x-amzn-RateLimit-Limit`, but not less than `min_rate`."""
        # The header is best effort and holds the rate, not the burst (DOC "Tokens API Rate Limits"), so the burst stays
        # as published.
        self.known = self.rate = max(rate, self.min_rate)
        self.announced = True

    def on_429(self, now: float) -> None:
        """Lower the rate after a 429; several within one interval count as one."""
        # Calls in flight at the time of the first 429 get theirs at the same moment; each would lower the rate again.
        if self.announced or now - self.changed < 1 / self.rate:
            return  # with an announced rate, another client has spent the burst
        # The 429 came after a raise: the earlier rate was right, so it is restored and not lowered.
        if self.rate_before_probe is not None:
            self.rate, self.rate_before_probe = self.rate_before_probe, None
            self.probe_after = min(MAX_PROBE_AFTER, self.probe_after * 2)
        else:
            self.rate = max(self.min_rate, self.rate * LOWER)
            self.probe_after = RAISE_AFTER
        self.successes, self.changed = 0, now

    def on_success(self) -> None:
        """Count a call that waited for its token and was accepted; raise the rate after enough of them."""
        if self.announced:
            return
        self.successes += 1
        if self.successes < (self.probe_after if self.rate_before_probe is None else RAISE_AFTER):
            return
        self.successes = 0
        # A raise stops at the known rate, so that going beyond it always counts as a probe.
        if self.known is not None and self.rate < self.known <= self.rate * RAISE:
            self.rate, self.rate_before_probe = self.known, None
            self.probe_after = max(self.probe_after, PROBE_AFTER)
        else:
            self.rate, self.rate_before_probe = self.rate * RAISE, self.rate


@dataclass(slots=True)
class FairQueue(Generic[Waiter]):
    """Waiting calls of one bucket, in the order in which they are dequeued.

    First come, first served for each caller, and round-robin between callers, so that one caller's many calls do not
    delay all others. This is start-time fair queueing (Goyal, Vin, Cheng 1996) with equal weights: each entry has a
    virtual time, and entries are dequeued in its order. A background call gets a later virtual time.
    """

    _order: list[tuple[float, int, Waiter]] = field(default_factory=list)
    _last: dict[Hashable, tuple[float, int]] = field(default_factory=dict)  # last virtual time, entries
    _virtual_time: float = 0.0
    _count: int = 0

    def __len__(self) -> int:
        return len(self._order)

    def next_virtual_time(self, caller: Hashable, *, background: bool = False, first: bool = False) -> float:
        """Return the virtual time of the caller's next call; with `first`, one before all others."""
        if first:
            # A call with a 429 has had its turn; behind the others it would wait twice.
            return self._virtual_time - 1
        # A caller without entries starts at the current time: credit for idle time would let it overtake all others.
        last, _ = self._last.get(caller, (self._virtual_time, 0))
        return max(last, self._virtual_time) + (BACKGROUND_PENALTY if background else 1)

    def position(self, virtual_time: float) -> int:
        """Return how many entries precede a call with that virtual time that arrives now."""
        # The next count is larger than that of any entry: with equal virtual times the newcomer is last.
        return bisect_left(self._order, (virtual_time, self._count))

    def add(self, caller: Hashable, virtual_time: float, waiter: Waiter) -> tuple[float, int, Waiter]:
        """Enqueue a call; return its entry, for `remove`."""
        # The count is unique, so that tuples never compare waiters, which have no order.
        entry = (virtual_time, self._count, waiter)
        self._count += 1
        insort(self._order, entry)
        last, waiting = self._last.get(caller, (virtual_time, 0))
        self._last[caller] = max(last, virtual_time), waiting + 1
        return entry

    def remove(self, caller: Hashable, entry: tuple[float, int, Waiter]) -> None:
        """Remove an entry at any position."""
        # A shorter tuple sorts before a longer one with the same start, so this is the index of the entry itself.
        index = bisect_left(self._order, entry[:2])
        del self._order[index]
        self._decrement(caller)

    def waiting(self) -> Iterator[Waiter]:
        """Return the waiting calls in the order in which they are dequeued."""
        return (waiter for _, _, waiter in self._order)

    def first(self) -> tuple[float, int, Waiter]:
        """Return the next entry; raise IndexError where there is none."""
        return self._order[0]

    def pop(self, caller: Hashable) -> None:
        """Dequeue the first entry, which is `caller`'s."""
        # Never backwards: an entry with `first` has a virtual time before the current one.
        self._virtual_time = max(self._virtual_time, self._order.pop(0)[0])
        self._decrement(caller)

    def _decrement(self, caller: Hashable) -> None:
        last, waiting = self._last[caller]
        if waiting > 1:
            self._last[caller] = last, waiting - 1
        else:
            # Callers are forgotten with their last entry, so the dict is never larger than the queue.
            del self._last[caller]
