"""The interface of a token store, and the stored token."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from proxy.config import Secret


@dataclass(frozen=True, slots=True)
class StoredToken:
    """A token and its expiry in Unix time: processes share no monotonic clock."""

    value: Secret
    expires_at: float


IsUsable = Callable[[StoredToken], bool]


class Store(Protocol):
    """Stores tokens by key until they expire. No method raises: a token that cannot be stored is fetched again.

    `timeout` is the maximum wait for the lock in seconds, the time that one token request may take.
    """

    timeout: float

    def get_or_lock(
        self, key: str, fits: IsUsable, refused: Secret | None = None
    ) -> AbstractAsyncContextManager[StoredToken | None]:
        """Yield the token of `key` if it `fits`, else None: then the caller fetches one.

        The caller holds the lock of the key until the end of the block, as far as the store can enforce it. `refused`
        is a token that Amazon rejected: it is deleted.
        """

    async def put(self, key: str, token: StoredToken, life: float) -> None:
        """Store `token` for `life` seconds."""

    async def close(self) -> None:
        """Release all resources."""
