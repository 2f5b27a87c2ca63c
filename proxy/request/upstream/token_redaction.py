"""Redaction of a request's own token in its response: no app may see one.

Amazon does not echo tokens. A test server may, and so may an impostor in Amazon's place. The length of the data does
not change. Compressed bodies (Content-Encoding) are not searched.
"""


class TokenRedactor:
    """Redacts the distinctive part of one token in one response (`secret_suffix` of proxy.request.token)."""

    __slots__ = ("_held", "_secret", "matched")

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._held = b""
        self.matched = False

    def redact(self, data: bytes) -> bytes:
        """Return `data`, which is complete in itself, such as a head, with the token replaced by `*`."""
        if data.find(self._secret) < 0:  # faster than `in`, which first tries to convert its operand to an integer
            return data
        self.matched = True
        return data.replace(self._secret, b"*" * len(self._secret))

    def feed(self, chunk: bytes) -> bytes:
        """Return what may be sent of a body, redacted; hold back an end that may be the beginning of a token."""
        data = self.redact(self._held + chunk if self._held else chunk)
        end = self._prefix_at_end(data)
        self._held = data[end:]
        return data[:end] if self._held else data

    def end(self) -> bytes:
        """Return what was held back: it did not become a token."""
        return self._held

    def _prefix_at_end(self, data: bytes) -> int:
        """Return the position of a partial token at the end of `data`; the length of `data` where there is none."""
        at = data.find(self._secret[:1], max(0, len(data) - len(self._secret) + 1))
        while at >= 0:
            if self._secret.startswith(data[at:]):
                return at
            at = data.find(self._secret[:1], at + 1)
        return len(data)


class NullRedactor(TokenRedactor):
    """For a request that was sent without a token."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(b"")

    def redact(self, data: bytes) -> bytes:
        """Return the data unchanged."""
        return data

    def feed(self, chunk: bytes) -> bytes:
        """Return the chunk unchanged."""
        return chunk

    def end(self) -> bytes:
        """Return nothing: nothing is held back."""
        return b""
