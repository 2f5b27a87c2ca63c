"""How many calls does a usage plan allow, who is next, and what do 429s teach about the rate? Arithmetic alone.

A plan is a token bucket: `rate` tokens a second are added, up to `burst`; a call takes one (DOC "Usage Plans and Rate
Limits"). Moments are seconds of any clock that the caller reads; nothing here waits.
"""

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Waiter = TypeVar("Waiter")

# Seconds behind a token's exact moment, so that a call whose way to Amazon is a little faster than that of an earlier
# one does not come too early. Where the bucket holds several, that is paid once, and kept in Amazon's bucket; where it
# holds one, it is paid for each call, so that it is no more than this share of the time between two.
MARGIN, MARGIN_SHARE = 0.05, 0.02
_ROUNDING = 1e-9

BACKGROUND_PENALTY = 20  # how many rounds of ordinary callers a background call lets pass

LOWER, RAISE = 0.8, 1.1  # what a 429 and a time without one do to a rate that is only guessed
RAISE_AFTER = 20  # calls let through without a 429 until a lowered rate is raised
PROBE_AFTER = 100  # calls until a rate above the published one is tried, which may cost a 429
MAX_PROBE_AFTER = 10_000


@dataclass(slots=True)
class Bucket:
    """The state of one usage plan."""

    rate: float
    burst: float
    tokens: float
    updated: float

    @classmethod
    def full(cls, rate: float, burst: float, now: float) -> "Bucket":
        """Return a bucket nobody has used yet."""
        return cls(rate, burst, burst, now)

    def wait(self, now: float, ahead: int = 0) -> float:
        """Return in how many seconds the token is there of a call that lets `ahead` others go first."""
        self.refill(now)
        missing = ahead + 1 - self.tokens
        return missing / self.rate + self.margin if missing > _ROUNDING else 0.0

    def has_token(self, now: float) -> bool:
        """Return whether a call that comes now goes at once."""
        self.refill(now)
        return self.tokens >= 1 - _ROUNDING

    @property
    def margin(self) -> float:
        """The seconds behind a token's exact moment at which a call that waited for it goes."""
        return min(MARGIN, max(MARGIN_SHARE, (self.burst - 1) / 2) / self.rate)

    def consume(self) -> None:
        """Take the token whose moment has come."""
        self.tokens -= 1

    def refund(self) -> None:
        """Return a token that was taken and not used."""
        self.tokens = min(self.burst, self.tokens + 1)

    def empty(self, now: float) -> None:
        """Learn from a 429 that Amazon's bucket holds nothing."""
        self.refill(now)
        self.tokens = min(self.tokens, 0.0)

    def refill(self, now: float) -> None:
        """Add what has come since the last look; a clock that goes backwards adds nothing and takes nothing."""
        if now > self.updated:
            tokens = self.tokens + (now - self.updated) * self.rate
            self.tokens = min(self.burst, tokens)
            self.updated = now

    def tokens_at(self, now: float) -> float:
        """Return how many tokens there are, without a change."""
        return min(self.burst, self.tokens + max(0.0, now - self.updated) * self.rate)


@dataclass(slots=True)
class RateEstimator:
    """What a plan's rate is thought to be, in calls per second.

    `known` is what Amazon published or announced, None where it said nothing. An announced rate is believed. Otherwise
    a 429 lowers the estimate, and calls without one raise it again, slowly: first to what is known, then, rarely,
    beyond, in case the account has more than is published. A raise that brings a 429 is taken back, and the next one
    comes later.
    """

    rate: float
    known: float | None
    min_rate: float
    announced: bool = False
    successes: int = 0  # calls let through since the last change
    probe_after: int = PROBE_AFTER  # how many it takes until the next raise
    rate_before_probe: float | None = None  # the rate before the last raise, while that is on trial
    changed: float = float("-inf")  # when it was lowered last

    def announce(self, rate: float) -> None:
        """Believe what `x-amzn-RateLimit-Limit` says, within reason."""
        self.known = self.rate = max(rate, self.min_rate)
        self.announced = True

    def on_429(self, now: float) -> None:
        """Learn from a 429; from several at once, as from one."""
        if self.announced or now - self.changed < 1 / self.rate:
            return  # of an announced rate: a burst that somebody else has spent
        if self.rate_before_probe is not None:
            self.rate, self.rate_before_probe = self.rate_before_probe, None
            self.probe_after = min(MAX_PROBE_AFTER, self.probe_after * 2)
        else:
            self.rate = max(self.min_rate, self.rate * LOWER)
            self.probe_after = RAISE_AFTER
        self.successes, self.changed = 0, now

    def on_success(self) -> None:
        """Learn from a call that had waited for its token, and was let through."""
        if self.announced:
            return
        self.successes += 1
        if self.successes < (self.probe_after if self.rate_before_probe is None else RAISE_AFTER):
            return
        self.successes = 0
        if self.known is not None and self.rate < self.known <= self.rate * RAISE:
            self.rate, self.rate_before_probe = self.known, None
            self.probe_after = max(self.probe_after, PROBE_AFTER)
        else:
            self.rate, self.rate_before_probe = self.rate * RAISE, self.rate


@dataclass(slots=True)
class FairQueue(Generic[Waiter]):
    """Who waits for one bucket, and in which order they go.

    First come, first served for each caller; callers take turns, so that nobody's crowd is before everybody else
    (start-time fair queueing: each place has a round, and rounds go in order). A background call is some rounds behind.
    """

    _order: list[tuple[float, int, Waiter]] = field(default_factory=list)
    _last: dict[Hashable, tuple[float, int]] = field(default_factory=dict)  # the last round of a caller; how many wait
    _virtual_time: float = 0.0
    _count: int = 0

    def __len__(self) -> int:
        return len(self._order)

    def next_virtual_time(self, caller: Hashable, *, background: bool = False, first: bool = False) -> float:
        """Return the round in which the caller's next call goes; `first` is before everybody."""
        if first:
            return self._virtual_time - 1
        last, _ = self._last.get(caller, (self._virtual_time, 0))
        return max(last, self._virtual_time) + (BACKGROUND_PENALTY if background else 1)

    def position(self, its_round: float) -> int:
        """Return how many go before a call of that round that comes now."""
        return bisect_left(self._order, (its_round, self._count))

    def add(self, caller: Hashable, its_round: float, waiter: Waiter) -> tuple[float, int, Waiter]:
        """Let a call wait; return its entry, by which it can leave."""
        entry = (its_round, self._count, waiter)
        self._count += 1
        insort(self._order, entry)
        last, waiting = self._last.get(caller, (its_round, 0))
        self._last[caller] = max(last, its_round), waiting + 1
        return entry

    def remove(self, caller: Hashable, entry: tuple[float, int, Waiter]) -> None:
        """Take an entry out, wherever it stands."""
        index = bisect_left(self._order, entry[:2])
        del self._order[index]
        self._gone(caller)

    def waiting(self) -> Iterator[Waiter]:
        """Return who waits, in the order in which they go."""
        return (waiter for _, _, waiter in self._order)

    def first(self) -> tuple[float, int, Waiter]:
        """Return the entry that goes next; there must be one."""
        return self._order[0]

    def pop(self, caller: Hashable) -> None:
        """Take the first entry, which is the caller's, out: its turn has come."""
        self._virtual_time = max(self._virtual_time, self._order.pop(0)[0])
        self._gone(caller)

    def _gone(self, caller: Hashable) -> None:
        last, waiting = self._last[caller]
        if waiting > 1:
            self._last[caller] = last, waiting - 1
        else:
            del self._last[caller]
