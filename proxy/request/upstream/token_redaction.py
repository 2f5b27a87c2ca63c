"""Does an answer repeat the token of its own request? No app may see one, so it is masked where it stands.

Amazon does not do that. A test server that echoes what it gets does, and so may whoever answers in Amazon's place.
Lengths stay as they are. What is packed (Content-Encoding) is not looked into.
"""

_MIN_SUFFIX = 16  # characters that tell one token from another


def secret_suffix(token: str) -> bytes:
    """Return what of a token to look for.

    That is without what all tokens begin with (`Atza|`), which may come back in another spelling (`Atza%7C`).
    """
    behind = token.partition("|")[2]
    return (behind if len(behind) >= _MIN_SUFFIX else token).encode()


class TokenRedactor:
    """Looks through one answer for the telling part of one token."""

    __slots__ = ("_held", "_secret", "matched")

    def __init__(self, looked_for: bytes) -> None:
        self._secret = looked_for
        self._held = b""
        self.matched = False

    def redact(self, data: bytes) -> bytes:
        """Return what is no part of something longer, a head for one, with the token masked."""
        if data.find(self._secret) < 0:  # `in` tries to make a number of it first
            return data
        self.matched = True
        return data.replace(self._secret, b"*" * len(self._secret))

    def feed(self, chunk: bytes) -> bytes:
        """Return what may be passed on of a body; what could be a token's beginning is held back till it is known."""
        data = self.redact(self._held + chunk if self._held else chunk)
        unsure = self._prefix_at_end(data)
        self._held = data[unsure:]
        return data[:unsure] if self._held else data

    def end(self) -> bytes:
        """Return what was held back: no token came of it."""
        return self._held

    def _prefix_at_end(self, data: bytes) -> int:
        """Return where a token begins that is not at its end yet; the length of `data` where none does."""
        at = data.find(self._secret[:1], max(0, len(data) - len(self._secret) + 1))
        while at >= 0:
            if self._secret.startswith(data[at:]):
                return at
            at = data.find(self._secret[:1], at + 1)
        return len(data)


class NullRedactor(TokenRedactor):
    """Stands for the mask of a request with which no token went."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(b"")

    def redact(self, data: bytes) -> bytes:
        """Return the data as it is."""
        return data

    def feed(self, chunk: bytes) -> bytes:
        """Return the chunk as it is."""
        return chunk

    def end(self) -> bytes:
        """Return nothing: nothing is held back."""
        return b""
