"""How long may each phase of an exchange take, and what is its running out called?

Every exchange has a deadline, which moves with its phases. Hardly any comes to pass, so that one timer serves them all:
a phase costs a few comparisons, and no timer of its own.
"""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

from proxy.config import Config
from proxy.errors import BodyTimeout, CallTimeout, ProxyError, TotalTimeout, UpstreamTimeout

_CLIENT_STALLED = BodyTimeout(
    "the app stopped sending its body, or reading the answer", "Send or read without long pauses (timeouts.body_idle)."
)
_UPSTREAM_SILENT = UpstreamTimeout(
    "Amazon was silent for too long", "A write may or may not have been done: look before you repeat it."
)
_CALL_OVER = CallTimeout(
    "the time that the call had (x-sp-timeout) is over",
    "A write may or may not have been done: look before you repeat it.",
)
_TOTAL_EXCEEDED = TotalTimeout("the whole exchange took too long", "Raise timeouts.total for very large bodies.")

_NEVER = float("inf")


class DeadlineTimer:
    """The deadlines of all exchanges under way, and the one timer that looks after them."""

    def __init__(self, config: Config, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.now = loop.time
        timeouts = config.timeouts
        self.total, self.upstream_idle, self.body_idle = timeouts.total, timeouts.upstream_idle, timeouts.body_idle
        self.body_rate = config.bounds.body_rate
        self.waiting: set[RequestDeadline] = set()
        self.next = _NEVER
        self._timer: asyncio.TimerHandle | None = None

    def schedule(self, moment: float) -> None:
        """Be there at this moment, which is earlier than any other."""
        if self._timer is not None:
            self._timer.cancel()
        self.next = moment
        self._timer = self.loop.call_at(moment, self._expire_due)

    def cancel_all(self, error: ProxyError) -> None:
        """Break the waits of all exchanges under way off, each with this error."""
        breaking, self.waiting = self.waiting, set()
        for deadline in breaking:
            deadline.cancel(error)

    def _expire_due(self) -> None:
        self._timer, self.next = None, _NEVER
        now = self.loop.time()
        for deadline in [one for one in self.waiting if one.deadline <= now]:
            self.waiting.discard(deadline)
            deadline.expire()
        earliest = min((one.deadline for one in self.waiting), default=_NEVER)
        if earliest < _NEVER:
            self.schedule(earliest)


class RequestDeadline:
    """One bound for all the waits of one exchange: each phase sets how long it may take and what its end is called.

    Use it as a context manager around the waits of one task; a phase that outlasts its time raises its error there.
    `timeout` is what the call has in all, in seconds, where it says so.
    """

    __slots__ = (
        "_amazon_idle",
        "_cancelling",
        "_deadlines",
        "_ends_at",
        "_error",
        "_has_expired",
        "_now",
        "_reason",
        "_task",
        "_too_long",
        "client_since",
        "client_time",
        "deadline",
    )

    def __init__(self, deadlines: DeadlineTimer, timeout: float | None = None) -> None:
        total = deadlines.total
        self._too_long: ProxyError = _TOTAL_EXCEEDED
        if timeout is not None and timeout < total:
            total, self._too_long = timeout, _CALL_OVER
        self._deadlines = deadlines
        self._amazon_idle = deadlines.upstream_idle
        self._now = now = deadlines.now
        self.client_time, self.client_since = 0.0, None  # type: float, float | None
        self._error: ProxyError = self._too_long
        self.deadline = self._ends_at = now() + total
        self._has_expired = False
        self._reason: ProxyError = self._too_long  # why it was broken off, once that has happened

    def wait_for_client(self, moved: int = 0) -> None:
        """Wait for the app: to send more of its body, or to take more of the answer, of which it has `moved` bytes.

        It may pause for `timeouts.body_idle`, but all its pauses together may not be longer than that and what
        `bounds.body_rate` gives it for what it has moved: one byte every few seconds would never end.
        """
        self.client_since = now = self._end_phase()
        idle, rate = self._deadlines.body_idle, self._deadlines.body_rate
        left = min(idle, idle + moved / rate - self.client_time) if rate else idle
        self._wait_until(now + left, _CLIENT_STALLED)

    def wait_for_proxy(self) -> None:
        """Wait for what the proxy itself does, each part of which has a bound of its own."""
        self._end_phase()
        self.deadline, self._error = self._ends_at, self._too_long

    def wait_for_upstream(self) -> None:
        """Wait for Amazon: to take more of the body, to answer, or to send more of its answer."""
        if self.client_since is not None:
            self._end_phase()
        now = self._now
        end = now() + self._amazon_idle
        if end >= self._ends_at:
            self._wait_until(end, _UPSTREAM_SILENT)
            return
        self.deadline, self._error = end, _UPSTREAM_SILENT
        if end < self._deadlines.next:
            self._deadlines.schedule(end)

    @property
    def now(self) -> Callable[[], float]:
        """The clock, monotonic, in seconds."""
        return self._now

    @property
    def remaining(self) -> float:
        """The seconds that the whole exchange still has."""
        return max(0.0, self._ends_at - self._now())

    @property
    def upstream_timed_out(self) -> bool:
        """Whether time ran out while it was Amazon's turn."""
        return self._has_expired and isinstance(self._reason, UpstreamTimeout)

    def cancel(self, error: ProxyError) -> None:
        """Break the wait off for another reason than time."""
        self._error = error
        self.expire()

    def expire(self) -> None:
        """Break the wait off."""
        # An upload of its own task may begin another phase before this one's task hears of it.
        self._has_expired, self._reason = True, self._error
        self._task.cancel()

    def _end_phase(self) -> float:
        """Note how long the app took, where it was waited for; return the moment."""
        now = self._now()
        if self.client_since is not None:
            self.client_time += now - self.client_since
            self.client_since = None
        return now

    def _wait_until(self, end: float, error: ProxyError) -> None:
        if end >= self._ends_at:
            end, error = self._ends_at, self._too_long
        self.deadline, self._error = end, error
        if end < self._deadlines.next:
            self._deadlines.schedule(end)

    def __enter__(self) -> Self:
        task = asyncio.current_task(self._deadlines.loop)
        if task is None:
            raise RuntimeError("patience is for the waits of a task")
        self._task, self._cancelling = task, task.cancelling()
        self._deadlines.waiting.add(self)
        if self.deadline < self._deadlines.next:
            self._deadlines.schedule(self.deadline)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._deadlines.waiting.discard(self)
        if self._has_expired and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            # One instance raised by many would grow a traceback for each.
            raise type(self._reason)(self._reason.message, self._reason.hint) from exc
