"""What is a token that is kept, and what does whoever keeps tokens promise?"""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from proxy.config import Secret


@dataclass(frozen=True, slots=True)
class StoredToken:
    """A token and the moment it expires, in seconds of the Unix epoch: processes share no other clock."""

    value: Secret
    expires_at: float


IsUsable = Callable[[StoredToken], bool]


class Store(Protocol):
    """Keeps tokens by key until they expire. Nothing here raises: what cannot be kept is fetched again.

    `patience` is how many seconds a turn is waited for at most: what one exchange may take.
    """

    timeout: float

    def get_or_lock(
        self, key: str, fits: IsUsable, refused: Secret | None = None
    ) -> AbstractAsyncContextManager[StoredToken | None]:
        """Give the token under `key` where it `fits`; None where it is the caller's turn to fetch one.

        While the block lasts nobody else is given a turn, as far as the store reaches. `refused` is a token that Amazon
        does not take: it is given to nobody any more.
        """

    async def put(self, key: str, token: StoredToken, life: float) -> None:
        """Keep `token` for `life` seconds."""

    async def close(self) -> None:
        """Let go of what is held."""
