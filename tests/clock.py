"""A clock that the test moves: time is a parameter, and tests do not sleep."""

import asyncio
from collections.abc import Callable
from typing import Any


class FakeClock:
    """Seconds, as a callable; `advance` moves it, and makes the calls that fall due on the way."""

    def __init__(self, start: float = 1_000_000.0) -> None:
        self.seconds = start
        self.due: list[tuple[float, Callable[..., object], tuple[Any, ...]]] = []

    def __call__(self) -> float:
        return self.seconds

    def call_later(self, delay: float, callback: Callable[..., object], *arguments: Any) -> None:
        """Make a call once the clock has moved on by `delay` seconds."""
        self.due.append((self.seconds + delay, callback, arguments))

    def advance(self, seconds: float) -> None:
        end = self.seconds + seconds
        while self.due and min(moment for moment, _, _ in self.due) <= end:
            entry = min(self.due, key=lambda waiting: waiting[0])
            self.due.remove(entry)
            self.seconds = max(self.seconds, entry[0])
            entry[1](*entry[2])
        self.seconds = end

    async def sleep(self, seconds: float) -> None:
        """Let the time pass that somebody would sleep for."""
        self.advance(seconds)
        await asyncio.sleep(0)
