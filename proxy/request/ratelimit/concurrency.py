"""Is there room for one more: of this caller's requests in flight, and of this account's at Amazon?

So one caller or account that sends too much, or waits for something slow, leaves room for the others.
"""

import asyncio
from collections import deque
from collections.abc import Callable

from proxy.config import Bounds
from proxy.errors import AccountBusy, CallerBusy
from proxy.observability.metrics import Metrics


class ConcurrencyLimiter:
    """Who is being served now."""

    def __init__(self, bounds: Bounds, metrics: Metrics) -> None:
        self.configure(bounds)
        # Plain dictionaries: a Counter takes ten times as long to count one more.
        self._caller_slots: dict[str, int] = {}
        self._account_slots: dict[str, int] = {}
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        metrics.pre_scrape_hooks.append(self._exporter(metrics))

    def configure(self, bounds: Bounds) -> None:
        """Keep to these bounds from now on."""
        self._max_per_caller, self._max_per_account = bounds.requests, bounds.account_requests

    def acquire_caller(self, caller: str) -> None:
        """Count one request of a caller's; raise CallerBusy where it has too many."""
        count = self._caller_slots.get(caller, 0)
        if count >= self._max_per_caller:
            raise CallerBusy(
                f"this caller has {self._max_per_caller} requests in flight already",
                "Send fewer at once, or raise bounds.requests.",
                retry_after=1.0,
            )
        self._caller_slots[caller] = count + 1

    def release_caller(self, caller: str) -> None:
        """Count it no more."""
        self._caller_slots[caller] -= 1

    def try_acquire_account(self, account: str) -> bool:
        """Take one of the account's places at Amazon where one is free; return whether it was."""
        count = self._account_slots.get(account, 0)
        if count >= self._max_per_account or (self._waiting and self._waiting.get(account)):
            return False
        self._account_slots[account] = count + 1
        return True

    async def acquire_account(self, account: str, max_wait: float) -> None:
        """Take one of the account's places at Amazon, in turn; raise AccountBusy where none comes in `max_wait` s."""
        if self.try_acquire_account(account):
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(account, deque())
        waiting.append(place)
        try:
            async with asyncio.timeout(max_wait):
                await place
        except (TimeoutError, asyncio.CancelledError) as exc:
            if place.done() and not place.cancelled():
                self.release_account(account)  # it came in the very moment
            elif place in waiting:
                waiting.remove(place)
            if isinstance(exc, TimeoutError):
                raise AccountBusy(
                    f"the account {account} has {self._max_per_account} requests at Amazon already",
                    "Send fewer at once, or raise bounds.account_requests.",
                    retry_after=1.0,
                ) from None
            raise

    def release_account(self, account: str) -> None:
        """Give the place to the next who waits, or free it."""
        if account in self._waiting:
            waiting = self._waiting[account]
            while waiting:
                place = waiting.popleft()
                if not place.done():
                    place.set_result(None)
                    return
            del self._waiting[account]
        self._account_slots[account] -= 1

    def _exporter(self, metrics: Metrics) -> Callable[[], None]:
        def export() -> None:
            for caller, count in self._caller_slots.copy().items():
                metrics.caller_requests.labels(caller).set(count)
            for account, count in self._account_slots.copy().items():
                metrics.account_requests.labels(account).set(count)

        return export
