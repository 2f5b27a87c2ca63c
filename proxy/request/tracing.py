"""What is noted of a request that may be traced? When each wait ended, and when each call to Amazon began and ended.

The steps know nothing of traces: they write their numbers into the record, and this one notes when they change.
"""

from collections.abc import Callable
from typing import NamedTuple

from proxy.request.context import RequestContext

MAX_PHASES = 32  # of one request that become spans
MIN_WAIT = 0.0005  # seconds: a look at a token that is there is no wait


class Phase(NamedTuple):
    """A wait, or a call to Amazon, between two moments on the monotonic clock; `status` is 0 where none came."""

    name: str
    began: float
    ended: float
    status: int = 0


class TracedContext(RequestContext):
    """The record of a traced request: it notes when waits end, and when calls to Amazon begin and are answered."""

    def __init__(self, method: str, started: float, now: Callable[[], float]) -> None:
        self.phases: list[Phase] = []
        self._now = now
        self._sent: float | None = None  # a call to Amazon that has no answer yet
        self._rate_limit_wait = self._token_wait = 0.0
        self._upstream_duration: float | None = None
        self._attempts = 0
        super().__init__(method, started)
        self._sent = None  # nothing was sent: the record was but filled in

    def _add_phase(self, step: Phase) -> None:
        if len(self.phases) < MAX_PHASES:
            self.phases.append(step)

    def close(self, ended: float) -> None:
        """Note a call that was never answered."""
        if self._sent is not None:
            self._add_phase(Phase("call", self._sent, ended))
            self._sent = None

    # Plain numbers of the record, which here note when they change.

    @property
    def rate_limit_wait(self) -> float:
        """Seconds in the queue of a usage plan."""
        return self._rate_limit_wait

    @rate_limit_wait.setter
    def rate_limit_wait(self, seconds: float) -> None:
        ended = self._now()
        if seconds - self._rate_limit_wait >= MIN_WAIT:
            self._add_phase(Phase("usage plan", ended - (seconds - self._rate_limit_wait), ended))
        self._rate_limit_wait = seconds

    @property
    def token_wait(self) -> float:
        """Seconds of waiting for a token."""
        return self._token_wait

    @token_wait.setter
    def token_wait(self, seconds: float) -> None:
        ended = self._now()
        if seconds - self._token_wait >= MIN_WAIT:
            self._add_phase(Phase("token", ended - (seconds - self._token_wait), ended))
        self._token_wait = seconds

    @property
    def attempts(self) -> int:
        """How often it was sent to Amazon."""
        return self._attempts

    @attempts.setter
    def attempts(self, count: int) -> None:
        now = self._now()
        self.close(now)
        self._sent, self._attempts = now, count

    @property
    def upstream_duration(self) -> float | None:
        """Seconds from sending to the head of Amazon's answer."""
        return self._upstream_duration

    @upstream_duration.setter
    def upstream_duration(self, seconds: float | None) -> None:
        if self._sent is not None:
            self._add_phase(Phase("call", self._sent, self._now(), self.status))
            self._sent = None
        self._upstream_duration = seconds
