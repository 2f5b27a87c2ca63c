"""A clock that the test moves: time is a parameter, and tests do not sleep."""


class FakeClock:
    """Seconds, as a callable; `advance` moves it."""

    def __init__(self, start: float = 1_000_000.0) -> None:
        self.seconds = start

    def __call__(self) -> float:
        return self.seconds

    def advance(self, seconds: float) -> None:
        self.seconds += seconds
