"""Clock controlled by the test: time is a parameter, and tests do not sleep."""

import asyncio
import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(order=True)
class Due:
    """A scheduled call."""

    moment: float
    number: int
    make: Callable[[], object] = field(compare=False)
    is_cancelled: bool = field(default=False, compare=False)

    def cancel(self) -> None:
        self.is_cancelled = True


class FakeClock:
    """Callable that returns seconds; `advance` moves it and makes the scheduled calls in between."""

    def __init__(self, start: float = 1_000_000.0) -> None:
        self.seconds = start
        self._due: list[Due] = []
        self._numbers = itertools.count()

    def __call__(self) -> float:
        return self.seconds

    def call_later(self, delay: float, callback: Callable[..., object], *arguments: Any) -> Due:
        """Schedule a call for when the clock has advanced by `delay` seconds."""
        due = Due(self.seconds + delay, next(self._numbers), lambda: callback(*arguments))
        heapq.heappush(self._due, due)
        return due

    def advance(self, seconds: float) -> None:
        end = self.seconds + seconds
        while self._due and self._due[0].moment <= end:
            due = heapq.heappop(self._due)
            if not due.is_cancelled:
                self.seconds = max(self.seconds, due.moment)
                due.make()
        self.seconds = end

    async def sleep(self, seconds: float) -> None:
        """Advance the clock instead of sleeping."""
        self.advance(seconds)
        await asyncio.sleep(0)
