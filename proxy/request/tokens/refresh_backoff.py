"""Amazon refused a token: is a new one worth fetching?

Once, usually. But there are times when every call is refused although the tokens are good (2023-05-27, 25 minutes), and
a seller who withdrew the authorisation is refused with each new token. A token whose successor was refused as well is
not replaced again for a while, and where that happens to several in a row, none is, but for single probes.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

FIRST_PAUSE = 30.0  # seconds until the token of one credential may be replaced again; doubled each time
MAX_PAUSE = 900.0
STORM = 5  # tokens in a row whose successors were refused
STORM_PAUSE = 15.0  # seconds between two probes, doubled each time
MAX_STORM_PAUSE = 300.0
MAX_TRACKED = 10_000


@dataclass(slots=True)
class _Rejection:
    token: object
    count: int
    until: float


class RefreshBackoff:
    """What became of the tokens that were fetched in place of refused ones; `now` is a monotonic clock in seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._rejections: dict[Hashable, _Rejection] = {}
        self._consecutive = 0
        self._storm_pause = STORM_PAUSE
        self._probe_at = 0.0

    def was_rejected(self, credential: Hashable, token: object) -> bool:
        """Return whether `token` was fetched in place of another, and refused as well."""
        doubt = self._rejections.get(credential)
        return doubt is not None and doubt.token is token

    def allows(self, credential: Hashable) -> bool:
        """Return whether a new token may be fetched for `credential` now."""
        doubt, now = self._rejections.get(credential), self._now()
        if doubt is not None and now < doubt.until:
            return False
        if self._consecutive < STORM:
            return True
        if now < self._probe_at:
            return False
        self._probe_at = now + self._storm_pause
        return True

    def record_result(self, credential: Hashable, token: object, *, accepted: bool) -> None:
        """Learn whether Amazon took `token`, which was fetched in place of a refused one."""
        if accepted:
            self._rejections.pop(credential, None)
            self._consecutive, self._storm_pause = 0, STORM_PAUSE
            return
        before = self._rejections.pop(credential, None)
        if before is not None and before.token is token:
            self._rejections[credential] = before
            return  # others were refused with it too, which tells nothing new
        count = before.count + 1 if before else 1
        pause = min(MAX_PAUSE, FIRST_PAUSE * 2.0 ** min(count - 1, 20))
        if len(self._rejections) >= MAX_TRACKED:
            del self._rejections[next(iter(self._rejections))]
        self._rejections[credential] = _Rejection(token, count, self._now() + pause)
        self._consecutive += 1
        if self._consecutive >= STORM:
            self._probe_at = self._now() + self._storm_pause
            self._storm_pause = min(MAX_STORM_PAUSE, self._storm_pause * 2)
