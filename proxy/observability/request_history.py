"""The history of the last requests, and samples of the last minutes, for the status page and `/requests`.

Both are bounded. They hold names of the configuration and of the operation table, words of the proxy's own, and
numbers: no path, query, header, id or body, and no reference through which one could be reached.
"""

import asyncio
import itertools
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

MAX_REQUESTS = 500
SAMPLE_INTERVAL = 2.0  # seconds
MAX_SAMPLES = 300  # ten minutes


class FinishedRequest(Protocol):
    """What the history reads of a request's context; durations in seconds."""

    @property
    def caller(self) -> str: ...
    @property
    def started(self) -> float: ...
    @property
    def rate_limit_wait(self) -> float: ...
    @property
    def token_wait(self) -> float: ...
    @property
    def upstream_duration(self) -> float | None: ...
    @property
    def attempts(self) -> int: ...
    @property
    def error(self) -> str: ...
    @property
    def hint(self) -> str: ...


class RequestRecord(NamedTuple):
    """One request of the history; durations in seconds, `started` on the monotonic clock.

    `labels` are those of `requests_total`: account, region, operation, method, code, token, source. All requests of a
    series share the tuple.
    """

    number: int  # from 1 on
    labels: tuple[str, ...]
    caller: str
    started: float
    duration: float
    rate_limit_wait: float
    token_wait: float
    upstream_duration: float | None  # until the head of Amazon's response
    attempts: int
    error: str  # code of the proxy's own error, or empty
    hint: str  # probable cause of a 401 or 403 of Amazon's, or empty

    @property
    def ended(self) -> float:
        """When the response was complete, on the monotonic clock."""
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
        """The status of the response; 499 where the client left before there was one."""
        return int(self.labels[4])

    @property
    def token(self) -> str:
        """The kind of token that was sent, or `none`."""
        return self.labels[5]

    @property
    def source(self) -> str:
        """Who sent the response: `amazon`, `proxy`, or `client` where it left before there was one."""
        return self.labels[6]


# A record as it is kept: the fields of RequestRecord, in its order, as a plain tuple. This is on the path of every
# request: adding a plain tuple takes 0.3 µs, a NamedTuple 0.8 to 1.4 µs (measured with Python 3.11), and CPython's
# garbage collector stops tracking a plain tuple of atomic values, but never an instance of a subclass.
RawRecord = tuple[int, tuple[str, ...], str, float, float, float, float, float | None, int, str, str]


class RequestHistory:
    """The last requests. `instance` is random: a cursor of an earlier process is recognised by it."""

    __slots__ = ("_next_number", "instance", "records")

    def __init__(self, max_requests: int = MAX_REQUESTS) -> None:
        self.instance = secrets.token_hex(8)
        self.records: deque[RawRecord] = deque(maxlen=max_requests)
        self._next_number: Callable[[], int] = itertools.count(1).__next__

    def add(self, labels: tuple[str, ...], request: FinishedRequest, duration: float) -> None:
        """Add a request that ended after `duration` seconds; `labels` as in RequestRecord."""
        self.records.append(
            (
                self._next_number(),
                labels,
                request.caller,
                request.started,
                duration,
                request.rate_limit_wait,
                request.token_wait,
                request.upstream_duration,
                request.attempts,
                request.error,
                request.hint,
            )
        )

    def after(self, number: int = 0) -> list[RequestRecord]:
        """Return the records with a higher number that are still kept, oldest first."""
        found: list[RequestRecord] = []
        for record in reversed(self.records):
            if record[0] <= number:
                break
            found.append(RequestRecord._make(record))
        found.reverse()
        return found

    @property
    def last_number(self) -> int:
        """The number of the newest record, 0 before the first."""
        return self.records[-1][0] if self.records else 0


class Sample(NamedTuple):
    """What happened in the `seconds` before `at`, which is on the monotonic clock.

    `requests` is exact. The others are computed from the records that the history still holds of these requests, at
    most MAX_REQUESTS; `throttled` (429 of the proxy or of Amazon) is scaled up to all of them.
    """

    at: float
    seconds: float
    requests: int
    throttled: float
    median: float | None  # seconds; None where there was no request
    p95: float | None


class Sampler:
    """Takes the samples of the last minutes; `now` is the clock of the requests."""

    def __init__(self, history: RequestHistory, now: Callable[[], float] = time.monotonic) -> None:
        self.samples: deque[Sample] = deque(maxlen=MAX_SAMPLES)
        self._history = history
        self._now = now
        self._number = history.last_number
        self._at = now()

    async def watch(self) -> None:
        """Take a sample every SAMPLE_INTERVAL seconds until cancelled."""
        while True:
            await asyncio.sleep(SAMPLE_INTERVAL)
            self.take()

    def take(self) -> None:
        """Take a sample of the requests since the last one."""
        now, number, durations, throttled = self._now(), self._history.last_number, list[float](), 0
        for record in reversed(self._history.records):  # raw, without `after`: this runs on the event loop
            if record[0] <= self._number:
                break
            durations.append(record[4])
            if record[1][4] == "429":  # the label `code`
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
