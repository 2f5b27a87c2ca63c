"""Data elements that Amazon denies an application for an account: left out of requests for a while.

One denied element fails every createRestrictedDataToken that names it.
"""

from collections.abc import Callable

from proxy.observability.logging import LOGGER, extra
from proxy.observability.metrics import Metrics
from proxy.request.token_selection import TokenKey, access_token_key

DENIED_FOR = 3600.0  # seconds for which an element is not requested again
MAX_DENIED = 10_000


class DeniedElements:
    """The data elements denied lately; `now` is a monotonic clock in seconds."""

    def __init__(self, metrics: Metrics, now: Callable[[], float]) -> None:
        self._metrics = metrics
        self._now = now
        self.until: dict[tuple[TokenKey, str], float] = {}  # by the access token's key and the element

    def record(self, token_key: TokenKey, elements: frozenset[str]) -> None:
        """Leave these elements out of the requests for `token_key` for DENIED_FOR seconds."""
        access_key, now = access_token_key(token_key), self._now()
        for element in sorted(elements & set(token_key.data_elements)):
            if self.until.get((access_key, element), 0.0) <= now:
                LOGGER.warning(
                    "data element denied: left out for an hour; the application lacks its role",
                    extra=extra(account=token_key.account, region=token_key.region, element=element),
                )
            if len(self.until) >= MAX_DENIED:
                del self.until[next(iter(self.until))]
            self.until[access_key, element] = now + DENIED_FOR
            self._metrics.refused_elements.labels(token_key.account, token_key.region, element).inc()

    def remaining(self, token_key: TokenKey) -> tuple[str, ...]:
        """Return the elements of `token_key` that are not denied now."""
        access_key, now = access_token_key(token_key), self._now()
        return tuple(
            element for element in token_key.data_elements if now >= self.until.get((access_key, element), 0.0)
        )

    def invalidate(self, is_outdated: Callable[[TokenKey], bool]) -> None:
        """Forget what was denied for outdated keys: a seller who authorises again may grant more."""
        self.until = {key: until for key, until in self.until.items() if not is_outdated(key[0])}
