"""Concurrency limits: requests in flight per caller, and calls at Amazon per account.

A caller or account that sends too much, or waits for slow responses, leaves capacity to the others.
"""

import asyncio
from collections import deque
from collections.abc import Callable

from proxy.config import Bounds
from proxy.errors import AccountBusy, CallerBusy
from proxy.observability.metrics import Metrics


class ConcurrencyLimiter:
    """Counts of requests in flight, their limits, and the calls that wait for a slot of their account."""

    def __init__(self, bounds: Bounds, metrics: Metrics) -> None:
        self.configure(bounds)
        # Plain dictionaries: an increment of a Counter takes ten times as long.
        self._caller_slots: dict[str, int] = {}
        self._account_slots: dict[str, int] = {}
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        metrics.pre_scrape_hooks.append(self._exporter(metrics))

    def configure(self, bounds: Bounds) -> None:
        """Apply changed limits to requests that arrive from now on."""
        self._max_per_caller, self._max_per_account = bounds.requests, bounds.account_requests

    def acquire_caller(self, caller: str) -> None:
        """Count one request of a caller; raise CallerBusy where it has too many in flight."""
        count = self._caller_slots.get(caller, 0)
        if count >= self._max_per_caller:
            raise CallerBusy(
                f"this caller already has {self._max_per_caller} requests in flight",
                "Send fewer at once, or raise bounds.requests.",
                retry_after=1.0,
            )
        self._caller_slots[caller] = count + 1

    def release_caller(self, caller: str) -> None:
        """Count one request of a caller less."""
        self._caller_slots[caller] -= 1

    def try_acquire_account(self, account: str) -> bool:
        """Take one of the account's slots if one is free and no call waits for it; return whether it was taken."""
        count = self._account_slots.get(account, 0)
        if count >= self._max_per_account or (self._waiting and self._waiting.get(account)):
            return False
        self._account_slots[account] = count + 1
        return True

    async def acquire_account(self, account: str, max_wait: float) -> None:
        """Take one of the account's slots, first come, first served; raise AccountBusy after `max_wait` seconds."""
        if self.try_acquire_account(account):
            return
        slot: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(account, deque())
        waiting.append(slot)
        try:
            async with asyncio.timeout(max_wait):
                await slot
        except (TimeoutError, asyncio.CancelledError) as exc:
            if slot.done() and not slot.cancelled():
                self.release_account(account)  # granted in the same iteration of the loop as the timeout
            elif slot in waiting:
                waiting.remove(slot)
            if isinstance(exc, TimeoutError):
                raise AccountBusy(
                    f"the account {account} already has {self._max_per_account} requests at Amazon",
                    "Send fewer at once, or raise bounds.account_requests.",
                    retry_after=1.0,
                ) from None
            raise

    def release_account(self, account: str) -> None:
        """Hand the slot to the next waiting call, or free it."""
        if account in self._waiting:
            waiting = self._waiting[account]
            while waiting:
                slot = waiting.popleft()
                if not slot.done():
                    slot.set_result(None)  # the count stays the same
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
