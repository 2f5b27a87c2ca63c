"""Backoff for replacing tokens that Amazon rejects.

Usually one new token helps. But there were outages in which every call was rejected although the tokens were valid
(2023-05-27, 25 minutes), and a seller who withdrew the authorisation is rejected with each new token. A token whose
successor was rejected as well is not replaced again for a while; after several of these in a row none is, except for
single probes.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

FIRST_PAUSE = 30.0  # seconds until the token of one key may be replaced again; doubled each time
MAX_PAUSE = 900.0
STORM = 5  # tokens in a row whose successors were rejected
STORM_PAUSE = 15.0  # seconds between two probes, doubled each time
MAX_STORM_PAUSE = 300.0
MAX_TRACKED = 10_000


@dataclass(slots=True)
class _Rejection:
    token: object
    count: int
    until: float


class RefreshBackoff:
    """The results of replacing rejected tokens; `now` is a monotonic clock in seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._rejections: dict[Hashable, _Rejection] = {}
        self._consecutive = 0
        self._storm_pause = STORM_PAUSE
        self._probe_at = 0.0

    def was_rejected(self, token_key: Hashable, token: object) -> bool:
        """Return whether `token` replaced a rejected one and was rejected as well."""
        rejection = self._rejections.get(token_key)
        return rejection is not None and rejection.token is token

    def allows(self, token_key: Hashable) -> bool:
        """Return whether a rejected token of this key may be replaced now; in a storm of rejections, admit a probe."""
        rejection, now = self._rejections.get(token_key), self._now()
        if rejection is not None and now < rejection.until:
            return False
        if self._consecutive < STORM:
            return True
        if now < self._probe_at:
            return False
        self._probe_at = now + self._storm_pause
        return True

    def record_result(self, token_key: Hashable, token: object, *, accepted: bool) -> None:
        """Record whether Amazon accepted `token`, which replaced a rejected one."""
        if accepted:
            self._rejections.pop(token_key, None)
            self._consecutive, self._storm_pause = 0, STORM_PAUSE
            return
        before = self._rejections.pop(token_key, None)
        if before is not None and before.token is token:
            self._rejections[token_key] = before
            return  # concurrent calls were rejected with the same token: one failure, not many
        count = before.count + 1 if before else 1
        pause = min(MAX_PAUSE, FIRST_PAUSE * 2.0 ** min(count - 1, 20))
        if len(self._rejections) >= MAX_TRACKED:
            del self._rejections[next(iter(self._rejections))]
        self._rejections[token_key] = _Rejection(token, count, self._now() + pause)
        self._consecutive += 1
        if self._consecutive >= STORM:
            self._probe_at = self._now() + self._storm_pause
            self._storm_pause = min(MAX_STORM_PAUSE, self._storm_pause * 2)
