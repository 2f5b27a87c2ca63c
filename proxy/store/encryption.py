"""How does a token lie in Redis so that whoever reads there learns nothing, and whoever writes there misleads nobody?

And how does an app carry a document's URL that is for the proxy alone?

A value is AES-256-GCM, with the whole key that it is kept under as associated data: one that was moved there from
another account does not unseal. Names are keyed hashes, so that no account can be read or guessed from them.
"""

import hashlib
import hmac
import json
import os
from base64 import urlsafe_b64decode, urlsafe_b64encode

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from proxy.config import Secret
from proxy.store.interface import StoredToken

PREFIX = "sp-api-proxy:"
MAX_BYTES = 16 * 1024  # of a sealed value: Amazon's tokens have 2 KiB at most
_VERSION = b"\x01"
_NONCE = 12  # bytes, random: far fewer values are sealed with one key than the 2^32 that permits
_KEY_ID = 4  # bytes that tell which key sealed


class DecryptionFailed(Exception):
    """A value that none of our keys sealed for this place."""


class _Ciphers:
    """The ciphers of several keys for one purpose: the first one seals, all unseal."""

    def __init__(self, keys: tuple[Secret, ...], purpose: bytes) -> None:
        ciphers = [(_derived(key, b"mark")[:_KEY_ID], AESGCM(_derived(key, purpose))) for key in keys]
        self.key_id, self._cipher = ciphers[0]
        self._ciphers = dict(reversed(ciphers))

    def encrypt(self, text: bytes, place: bytes) -> bytes:
        nonce = os.urandom(_NONCE)
        return _VERSION + self.key_id + nonce + self._cipher.encrypt(nonce, text, place)

    def decrypt(self, value: bytes, place: bytes) -> bytes:
        """Return the text; raise NotSealed."""
        head = len(_VERSION) + _KEY_ID
        cipher = self._ciphers.get(value[len(_VERSION) : head])
        if cipher is None or not value.startswith(_VERSION) or len(value) > MAX_BYTES:
            raise DecryptionFailed
        try:
            return cipher.decrypt(value[head : head + _NONCE], value[head + _NONCE :], place)
        except (InvalidTag, ValueError):
            raise DecryptionFailed from None


class TokenCipher:
    """The keys of `store_key`: the first one seals, all unseal. The last, which is the oldest, makes the names."""

    def __init__(self, keys: tuple[Secret, ...]) -> None:
        self._ciphers = _Ciphers(keys, b"seal")
        # Of the oldest key, so that replicas with and without a new one find the same places while it is given out.
        self._naming = _derived(keys[-1], b"name")

    def name(self, purpose: str, key: str) -> str:
        """Return the name under which Redis keeps what belongs to `key`."""
        digest = hmac.digest(self._naming, _associated_data(purpose, key), hashlib.sha256)
        return f"{PREFIX}{purpose}:{digest[:20].hex()}"

    def encrypt(self, key: str, token: StoredToken) -> bytes:
        """Return the token as it may leave the process."""
        text = json.dumps([token.value.reveal(), token.expires_at]).encode()
        return self._ciphers.encrypt(text, _associated_data("token", key))

    def decrypt(self, key: str, value: bytes) -> StoredToken:
        """Return the token that was sealed for `key`; raise NotSealed."""
        text = self._ciphers.decrypt(value, _associated_data("token", key))
        try:
            token, expires_at = json.loads(text)
            return StoredToken(Secret(str(token)), float(expires_at))
        except (ValueError, TypeError):
            raise DecryptionFailed from None


class DocumentCipher:
    """Seals what an app carries from one answer to the request for its document, bound to the account.

    The keys are those of `store_key`, so that replicas open each other's; without any, one of this process alone.
    """

    def __init__(self, keys: tuple[Secret, ...]) -> None:
        self._ciphers = _Ciphers(keys or (Secret(os.urandom(32).hex()),), b"document")

    def encrypt(self, account: str, text: bytes) -> str:
        """Return the text as a path segment holds it (base64url, RFC 4648 section 5, without padding)."""
        return (
            urlsafe_b64encode(self._ciphers.encrypt(text, _associated_data("document", account))).decode().rstrip("=")
        )

    def decrypt(self, account: str, segment: str) -> bytes:
        """Return the text that was sealed for an account; raise NotSealed."""
        if len(segment) > 2 * MAX_BYTES:
            raise DecryptionFailed
        try:
            value = urlsafe_b64decode(segment + "=" * (-len(segment) % 4))
        except ValueError:
            raise DecryptionFailed from None
        return self._ciphers.decrypt(value, _associated_data("document", account))


def _derived(key: Secret, purpose: bytes) -> bytes:
    """Return 32 bytes for one purpose (HKDF, RFC 5869); `store_key` is random enough to need no stretching."""
    return HKDF(SHA256(), 32, salt=None, info=b"sp-api-proxy store 1 " + purpose).derive(key.reveal().encode())


def _associated_data(purpose: str, key: str) -> bytes:
    return f"{purpose}\x1f{key}".encode()
