"""Is there room for one more: of this caller's requests in flight, and of this account's at Amazon?

So one caller or account that sends too much, or waits for something slow, leaves room for the others.
"""

import asyncio
from collections import deque
from collections.abc import Callable

from proxy.config import Bounds
from proxy.errors import AccountBusy, CallerBusy
from proxy.observability.metrics import Metrics


class Crowd:
    """Who is being served now."""

    def __init__(self, bounds: Bounds, metrics: Metrics) -> None:
        self.keep_to(bounds)
        # Plain dictionaries: a Counter takes ten times as long to count one more.
        self._callers: dict[str, int] = {}
        self._at_amazon: dict[str, int] = {}
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        metrics.before_export.append(self._exporter(metrics))

    def keep_to(self, bounds: Bounds) -> None:
        """Keep to these bounds from now on."""
        self._most_of_caller, self._most_at_amazon = bounds.requests, bounds.account_requests

    def enter(self, caller: str) -> None:
        """Count one request of a caller's; raise CallerBusy where it has too many."""
        count = self._callers.get(caller, 0)
        if count >= self._most_of_caller:
            raise CallerBusy(
                f"this caller has {self._most_of_caller} requests in flight already",
                "Send fewer at once, or raise bounds.requests.",
                retry_after=1.0,
            )
        self._callers[caller] = count + 1

    def leave(self, caller: str) -> None:
        """Count it no more."""
        self._callers[caller] -= 1

    def goes_at_once(self, account: str) -> bool:
        """Take one of the account's places at Amazon where one is free; return whether it was."""
        count = self._at_amazon.get(account, 0)
        if count >= self._most_at_amazon or (self._waiting and self._waiting.get(account)):
            return False
        self._at_amazon[account] = count + 1
        return True

    async def go(self, account: str, max_wait: float) -> None:
        """Take one of the account's places at Amazon, in turn; raise AccountBusy where none comes in `max_wait` s."""
        if self.goes_at_once(account):
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(account, deque())
        waiting.append(place)
        try:
            async with asyncio.timeout(max_wait):
                await place
        except (TimeoutError, asyncio.CancelledError) as exc:
            if place.done() and not place.cancelled():
                self.come_back(account)  # it came in the very moment
            elif place in waiting:
                waiting.remove(place)
            if isinstance(exc, TimeoutError):
                raise AccountBusy(
                    f"the account {account} has {self._most_at_amazon} requests at Amazon already",
                    "Send fewer at once, or raise bounds.account_requests.",
                    retry_after=1.0,
                ) from None
            raise

    def come_back(self, account: str) -> None:
        """Give the place to the next who waits, or free it."""
        if account in self._waiting:
            waiting = self._waiting[account]
            while waiting:
                place = waiting.popleft()
                if not place.done():
                    place.set_result(None)
                    return
            del self._waiting[account]
        self._at_amazon[account] -= 1

    def _exporter(self, metrics: Metrics) -> Callable[[], None]:
        def export() -> None:
            for caller, count in self._callers.copy().items():
                metrics.caller_requests.labels(caller).set(count)
            for account, count in self._at_amazon.copy().items():
                metrics.account_requests.labels(account).set(count)

        return export
