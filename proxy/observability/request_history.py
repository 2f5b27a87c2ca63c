"""Which requests came lately, and how did the last minutes go?

Both are bounded, and hold names of the configuration and of the operation table, words of our own, and numbers: no
path, query, header, id or body, and nothing through which one could be reached.
"""

import asyncio
import itertools
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

MAX_REQUESTS = 500  # requests that are remembered
SAMPLE_INTERVAL = 2.0  # seconds between two samples
MAX_SAMPLES = 300  # ten minutes of them

# One request as it is kept: a plain tuple, the cheapest thing there is to make. The second are the labels of its series
# (account, region, operation, method, code, token, source), which all requests of that series share.
RawRecord = tuple[
    int,  # its number, from 1 on
    tuple[str, ...],
    str,  # the caller
    float,  # when it began, on the monotonic clock
    float,  # how long it took, and of that: the wait for its usage plan, the wait for its token, Amazon until its head
    float,
    float,
    float | None,
    int,  # attempts
    str,  # the code of the proxy's own error
    str,  # the hint for a refusal of Amazon's
]


class RequestRecord(NamedTuple):
    """One request that was answered; durations in seconds, `began` on the monotonic clock."""

    number: int
    labels: tuple[str, ...]
    caller: str
    started: float
    duration: float
    rate_limit_wait: float
    token_wait: float
    upstream: float | None
    attempts: int
    error: str
    hint: str

    @property
    def ended(self) -> float:
        """When it was answered, on the monotonic clock."""
        return self.started + self.duration

    @property
    def account(self) -> str:
        """The account's name, `-` where none was found."""
        return self.labels[0]

    @property
    def region(self) -> str:
        """The region, `-` where none was found."""
        return self.labels[1]

    @property
    def operation(self) -> str:
        """The operation's name, or `unknown`."""
        return self.labels[2]

    @property
    def method(self) -> str:
        """The method, or `other`."""
        return self.labels[3]

    @property
    def status(self) -> int:
        """The status of its answer; 499 where the client left before there was one."""
        return int(self.labels[4])


class RequestHistory:
    """The requests that were answered last. `instance` is another one after each start of a proxy."""

    __slots__ = ("append", "instance", "number", "records")

    def __init__(self, most: int = MAX_REQUESTS) -> None:
        self.instance = secrets.token_hex(8)
        self.records: deque[RawRecord] = deque(maxlen=most)
        self.append: Callable[[RawRecord], None] = self.records.append
        self.number: Callable[[], int] = itertools.count(1).__next__

    def after(self, number: int = 0) -> list[RequestRecord]:
        """Return those that are remembered and came after that number, the oldest first."""
        found: list[RequestRecord] = []
        for kept in reversed(self.records):
            if kept[0] <= number:
                break
            found.append(RequestRecord._make(kept))
        found.reverse()
        return found

    @property
    def last_number(self) -> int:
        """The number of the newest one, 0 before the first."""
        return self.records[-1][0] if self.records else 0


class Sample(NamedTuple):
    """How a few seconds went, which ended at `at` on the monotonic clock.

    `requests` is exact. The others come from what was remembered of them, which is all of it up to MOST_RECENT requests
    in a sample: `throttled` (429, whoever said it) is in proportion.
    """

    at: float
    seconds: float
    requests: int
    throttled: float
    median: float | None  # seconds that a request took, None where there was none
    p95: float | None  # seconds within which 95 of 100 were answered


class Sampler:
    """The samples of the last minutes; `now` is the clock that the requests were timed by."""

    def __init__(self, recent: RequestHistory, now: Callable[[], float] = time.monotonic) -> None:
        self.samples: deque[Sample] = deque(maxlen=MAX_SAMPLES)
        self._recent = recent
        self._now = now
        self._number = recent.last_number
        self._at = now()

    async def watch(self) -> None:
        """Take a sample every EVERY seconds, for as long as the proxy runs."""
        while True:
            await asyncio.sleep(SAMPLE_INTERVAL)
            self.take()

    def take(self) -> None:
        """Take a sample of what came since the last one."""
        now, number, durations, throttled = self._now(), self._recent.last_number, list[float](), 0
        for kept in reversed(self._recent.records):  # as it is kept: of few requests a second each one comes by here
            if kept[0] <= self._number:
                break
            durations.append(kept[4])
            if kept[1][4] == "429":
                throttled += 1
        durations.sort()
        count = number - self._number
        self.samples.append(
            Sample(
                now,
                now - self._at,
                count,
                throttled * count / len(durations) if durations else 0.0,
                _quantile(durations, 0.5),
                _quantile(durations, 0.95),
            )
        )
        self._number, self._at = number, now


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else None
