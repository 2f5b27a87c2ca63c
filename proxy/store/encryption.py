"""Encryption of tokens in Redis, and of document URLs that apps carry.

A value is encrypted with AES-256-GCM, with its full key as associated data: a value that was copied from the key of
another account does not decrypt. Redis key names are keyed hashes (HMAC), so that they do not reveal account names.
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
MAX_BYTES = 16 * 1024  # of an encrypted value: Amazon's tokens have at most 2 KiB
_VERSION = b"\x01"
_NONCE = 12  # bytes, random: safe for 2^32 values of one key (NIST SP 800-38D section 8.3)
_KEY_ID = 4  # bytes that identify the key


class DecryptionFailed(Exception):
    """The value was not encrypted by one of our keys for this associated data."""


class _Ciphers:
    """The ciphers of several keys for one purpose: the first one encrypts, all decrypt."""

    def __init__(self, keys: tuple[Secret, ...], purpose: bytes) -> None:
        ciphers = [(_derived(key, b"mark")[:_KEY_ID], AESGCM(_derived(key, purpose))) for key in keys]
        self.key_id, self._cipher = ciphers[0]
        self._ciphers = dict(reversed(ciphers))

    def encrypt(self, text: bytes, associated_data: bytes) -> bytes:
        nonce = os.urandom(_NONCE)
        return _VERSION + self.key_id + nonce + self._cipher.encrypt(nonce, text, associated_data)

    def decrypt(self, value: bytes, associated_data: bytes) -> bytes:
        """Return the text; raise DecryptionFailed."""
        head = len(_VERSION) + _KEY_ID
        cipher = self._ciphers.get(value[len(_VERSION) : head])
        if cipher is None or not value.startswith(_VERSION) or len(value) > MAX_BYTES:
            raise DecryptionFailed
        try:
            return cipher.decrypt(value[head : head + _NONCE], value[head + _NONCE :], associated_data)
        except (InvalidTag, ValueError):
            raise DecryptionFailed from None


class TokenCipher:
    """The keys of `store_key`: the first one encrypts, all decrypt; the last one, the oldest, hashes the names."""

    def __init__(self, keys: tuple[Secret, ...]) -> None:
        self._ciphers = _Ciphers(keys, b"seal")
        # The oldest key: while a new key is rolled out, replicas with and without it compute the same names.
        self._naming = _derived(keys[-1], b"name")

    def name(self, purpose: str, key: str) -> str:
        """Return the name of `key` in Redis."""
        digest = hmac.digest(self._naming, _associated_data(purpose, key), hashlib.sha256)
        return f"{PREFIX}{purpose}:{digest[:20].hex()}"

    def encrypt(self, key: str, token: StoredToken) -> bytes:
        """Return the encrypted token."""
        text = json.dumps([token.value.reveal(), token.expires_at]).encode()
        return self._ciphers.encrypt(text, _associated_data("token", key))

    def decrypt(self, key: str, value: bytes) -> StoredToken:
        """Return the token that was encrypted for `key`; raise DecryptionFailed."""
        text = self._ciphers.decrypt(value, _associated_data("token", key))
        try:
            token, expires_at = json.loads(text)
            return StoredToken(Secret(str(token)), float(expires_at))
        except (ValueError, TypeError):
            raise DecryptionFailed from None


class DocumentCipher:
    """Encrypts what an app carries from a response to the request for its document, bound to the account.

    The keys are those of `store_key`, so that replicas decrypt each other's; without any, a random one.
    """

    def __init__(self, keys: tuple[Secret, ...]) -> None:
        self._ciphers = _Ciphers(keys or (Secret(os.urandom(32).hex()),), b"document")

    def encrypt(self, account: str, text: bytes) -> str:
        """Return the text as a path segment holds it (base64url, RFC 4648 section 5, without padding)."""
        return (
            urlsafe_b64encode(self._ciphers.encrypt(text, _associated_data("document", account))).decode().rstrip("=")
        )

    def decrypt(self, account: str, segment: str) -> bytes:
        """Return the text that was encrypted for an account; raise DecryptionFailed."""
        if len(segment) > 2 * MAX_BYTES:
            raise DecryptionFailed
        try:
            value = urlsafe_b64decode(segment + "=" * (-len(segment) % 4))
        except ValueError:
            raise DecryptionFailed from None
        return self._ciphers.decrypt(value, _associated_data("document", account))


def _derived(key: Secret, purpose: bytes) -> bytes:
    """Return 32 bytes for one purpose (HKDF, RFC 5869); `store_key` is random and long, so it needs no stretching."""
    return HKDF(SHA256(), 32, salt=None, info=b"sp-api-proxy store 1 " + purpose).derive(key.reveal().encode())


def _associated_data(purpose: str, key: str) -> bytes:
    return f"{purpose}\x1f{key}".encode()
