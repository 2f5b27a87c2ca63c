"""Does an answer repeat the token of its own request? No app may see one, so it is masked where it stands.

Amazon does not do that. A test server that echoes what it gets does, and so may whoever answers in Amazon's place.
Lengths stay as they are. What is packed (Content-Encoding) is not looked into.
"""

_LEAST = 16  # characters that tell one token from another


def telling_part(token: str) -> bytes:
    """Return what of a token to look for.

    That is without what all tokens begin with (`Atza|`), which may come back in another spelling (`Atza%7C`).
    """
    behind = token.partition("|")[2]
    return (behind if len(behind) >= _LEAST else token).encode()


class Mask:
    """Looks through one answer for the telling part of one token."""

    __slots__ = ("_held", "_secret", "was_needed")

    def __init__(self, looked_for: bytes) -> None:
        self._secret = looked_for
        self._held = b""
        self.was_needed = False

    def whole(self, data: bytes) -> bytes:
        """Return what is no part of something longer, a head for one, with the token masked."""
        if data.find(self._secret) < 0:  # `in` tries to make a number of it first
            return data
        self.was_needed = True
        return data.replace(self._secret, b"*" * len(self._secret))

    def feed(self, chunk: bytes) -> bytes:
        """Return what may be passed on of a body; what could be a token's beginning is held back till it is known."""
        data = self.whole(self._held + chunk if self._held else chunk)
        unsure = self._beginning_in(data)
        self._held = data[unsure:]
        return data[:unsure] if self._held else data

    def end(self) -> bytes:
        """Return what was held back: no token came of it."""
        return self._held

    def _beginning_in(self, data: bytes) -> int:
        """Return where a token begins that is not at its end yet; the length of `data` where none does."""
        at = data.find(self._secret[:1], max(0, len(data) - len(self._secret) + 1))
        while at >= 0:
            if self._secret.startswith(data[at:]):
                return at
            at = data.find(self._secret[:1], at + 1)
        return len(data)


class NoMask(Mask):
    """Stands for the mask of a request with which no token went."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(b"")

    def whole(self, data: bytes) -> bytes:
        """Return the data as it is."""
        return data

    def feed(self, chunk: bytes) -> bytes:
        """Return the chunk as it is."""
        return chunk

    def end(self) -> bytes:
        """Return nothing: nothing is held back."""
        return b""
