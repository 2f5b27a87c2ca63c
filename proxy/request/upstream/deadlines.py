"""Deadlines of requests: how long each phase may take, and the error when it takes longer.

Each request has one deadline, which moves with its phases. Hardly any expires, so one event loop timer serves all
requests: starting a phase costs a few comparisons. `asyncio.timeout` would set and cancel a timer for each phase.
"""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

from proxy.config import Config
from proxy.errors import BodyTimeout, CallTimeout, ProxyError, TotalTimeout, UpstreamTimeout

_CLIENT_STALLED = BodyTimeout(
    "the app stopped sending its body, or reading the response",
    "Send or read without long pauses (timeouts.body_idle).",
)
_UPSTREAM_SILENT = UpstreamTimeout(
    "Amazon was silent for too long", "A write may or may not have been done: check before you repeat it."
)
_CALL_OVER = CallTimeout(
    "the time limit of the call (x-sp-timeout) is exceeded",
    "A write may or may not have been done: check before you repeat it.",
)
_TOTAL_EXCEEDED = TotalTimeout("the request as a whole took too long", "Raise timeouts.total for very large bodies.")

_NEVER = float("inf")


class DeadlineTimer:
    """The deadlines of all requests in flight, and the one timer for them; times are those of the loop's clock."""

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
        """Re-arm the timer for an earlier deadline."""
        if self._timer is not None:
            self._timer.cancel()
        self.next = moment
        self._timer = self.loop.call_at(moment, self._expire_due)

    def cancel_all(self, error: ProxyError) -> None:
        """Cancel the waits of all requests in flight, each with this error."""
        cancelled, self.waiting = self.waiting, set()
        for deadline in cancelled:
            deadline.cancel(error)

    def _expire_due(self) -> None:
        self._timer, self.next = None, _NEVER
        now = self.loop.time()
        for deadline in [waiting for waiting in self.waiting if waiting.deadline <= now]:
            self.waiting.discard(deadline)
            deadline.expire()
        earliest = min((deadline.deadline for deadline in self.waiting), default=_NEVER)
        if earliest < _NEVER:
            self.schedule(earliest)


class RequestDeadline:
    """The deadline of one request: each phase sets how long it may take, and the error if it takes longer.

    Use it as a context manager around the waits of one task, which is cancelled at the deadline; leaving the context
    then raises the phase's error. `timeout` is the limit in seconds that the app set for the whole call, if any.
    """

    __slots__ = (
        "_cancelling",
        "_deadlines",
        "_ends_at",
        "_error",
        "_has_expired",
        "_now",
        "_reason",
        "_task",
        "_total_error",
        "_upstream_idle",
        "client_since",
        "client_time",
        "deadline",
    )

    def __init__(self, deadlines: DeadlineTimer, timeout: float | None = None) -> None:
        total = deadlines.total
        self._total_error: ProxyError = _TOTAL_EXCEEDED
        if timeout is not None and timeout < total:
            total, self._total_error = timeout, _CALL_OVER
        self._deadlines = deadlines
        self._upstream_idle = deadlines.upstream_idle
        self._now = now = deadlines.now
        self.client_time, self.client_since = 0.0, None  # type: float, float | None
        self._error: ProxyError = self._total_error
        self.deadline = self._ends_at = now() + total
        self._has_expired = False
        self._reason: ProxyError = self._total_error  # why it was cancelled, once it was

    def wait_for_client(self, moved: int = 0) -> None:
        """Begin waiting for the app to send more of its body or to read more of the response.

        One pause may last `timeouts.body_idle`, all together that long plus `moved` bytes at `bounds.body_rate`.
        Without the second limit one byte every few seconds would keep the request open (slow HTTP attack).
        """
        self.client_since = now = self._end_phase()
        idle, rate = self._deadlines.body_idle, self._deadlines.body_rate
        remaining = min(idle, idle + moved / rate - self.client_time) if rate else idle
        self._wait_until(now + remaining, _CLIENT_STALLED)

    def wait_for_proxy(self) -> None:
        """Begin a phase of the proxy's own; only the limit of the whole request applies, besides those of the steps."""
        self._end_phase()
        self.deadline, self._error = self._ends_at, self._total_error

    def wait_for_upstream(self) -> None:
        """Begin waiting for Amazon to read more of the body, to respond, or to send more of its response."""
        # `_wait_until` inlined: this is called for every part of a body.
        if self.client_since is not None:
            self._end_phase()
        now = self._now
        end = now() + self._upstream_idle
        if end >= self._ends_at:
            self._wait_until(end, _UPSTREAM_SILENT)
            return
        self.deadline, self._error = end, _UPSTREAM_SILENT
        if end < self._deadlines.next:
            self._deadlines.schedule(end)

    @property
    def now(self) -> Callable[[], float]:
        """The monotonic clock, in seconds."""
        return self._now

    @property
    def remaining(self) -> float:
        """The seconds left for the whole request."""
        return max(0.0, self._ends_at - self._now())

    @property
    def upstream_timed_out(self) -> bool:
        """Whether the deadline expired while waiting for Amazon."""
        return self._has_expired and isinstance(self._reason, UpstreamTimeout)

    def cancel(self, error: ProxyError) -> None:
        """Cancel the wait with this error."""
        self._error = error
        self.expire()

    def expire(self) -> None:
        """Cancel the wait with the error of the current phase."""
        # Keep the error now: the upload, another task, may begin another phase before this task runs again.
        self._has_expired, self._reason = True, self._error
        self._task.cancel()

    def _end_phase(self) -> float:
        """Add the time of a wait for the app; return the current time."""
        now = self._now()
        if self.client_since is not None:
            self.client_time += now - self.client_since
            self.client_since = None
        return now

    def _wait_until(self, end: float, error: ProxyError) -> None:
        if end >= self._ends_at:
            end, error = self._ends_at, self._total_error
        self.deadline, self._error = end, error
        if end < self._deadlines.next:
            self._deadlines.schedule(end)

    def __enter__(self) -> Self:
        task = asyncio.current_task(self._deadlines.loop)
        if task is None:
            raise RuntimeError("a deadline needs a task")
        self._task, self._cancelling = task, task.cancelling()
        self._deadlines.waiting.add(self)
        if self.deadline < self._deadlines.next:
            self._deadlines.schedule(self.deadline)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._deadlines.waiting.discard(self)
        # As asyncio.timeout does: only the cancellation that this deadline caused becomes its error.
        if self._has_expired and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            # A new instance: each raise of a shared one would append to its traceback.
            raise type(self._reason)(self._reason.message, self._reason.hint) from exc
