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
# First byte, so that a later format can be told apart from this one.
_VERSION = b"\x01"
_NONCE = 12  # bytes, random: safe for 2^32 values of one key (NIST SP 800-38D section 8.3)
# Not secret: it is derived for this purpose alone (`mark`), and says nothing about the encryption key.
_KEY_ID = 4  # bytes that identify the key


class DecryptionFailed(Exception):
    """The value was not encrypted by one of our keys for this associated data."""


class _Ciphers:
    """The ciphers of several keys for one purpose: the first one encrypts, all decrypt."""

    def __init__(self, keys: tuple[Secret, ...], purpose: bytes) -> None:
        ciphers = [(_derived(key, b"mark")[:_KEY_ID], AESGCM(_derived(key, purpose))) for key in keys]
        self.key_id, self._cipher = ciphers[0]
        # Reversed: with equal ids of two keys, the first key's cipher is kept, which also encrypts.
        self._ciphers = dict(reversed(ciphers))

    def encrypt(self, text: bytes, associated_data: bytes) -> bytes:
        # Random and not a counter: replicas share the key and have no common counter. A repeated nonce breaks GCM (NIST
        # SP 800-38D section 8).
        nonce = os.urandom(_NONCE)
        return _VERSION + self.key_id + nonce + self._cipher.encrypt(nonce, text, associated_data)

    def decrypt(self, value: bytes, associated_data: bytes) -> bytes:
        """Return the text; raise DecryptionFailed."""
        head = len(_VERSION) + _KEY_ID
        cipher = self._ciphers.get(value[len(_VERSION) : head])
        # The length is checked before anything is decrypted: a value of any size may be in Redis.
        if cipher is None or not value.startswith(_VERSION) or len(value) > MAX_BYTES:
            raise DecryptionFailed
        try:
            return cipher.decrypt(value[head : head + _NONCE], value[head + _NONCE :], associated_data)
        # `from None`: which of the checks failed is of use only to an attacker. ValueError: cryptography
        # 50 raises it for a nonce that is too short.
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
        # 160 of 256 bits are enough for unique names (truncation: RFC 2104 section 5).
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
            # Checked although authenticated: another version of this program may have written it. JSON and not pickle:
            # unpickling executes code (aiohttp CVE-2026-34993).
            token, expires_at = json.loads(text)
            return StoredToken(Secret(str(token)), float(expires_at))
        except (ValueError, TypeError):
            raise DecryptionFailed from None


class DocumentCipher:
    """Encrypts what an app carries from a response to the request for its document, bound to the account.

    The keys are those of `store_key`, so that replicas decrypt each other's; without any, a random one.
    """

    def __init__(self, keys: tuple[Secret, ...]) -> None:
        # A random key lasts until the restart; then apps have to ask Amazon for the document again.
        self._ciphers = _Ciphers(keys or (Secret(os.urandom(32).hex()),), b"document")

    def encrypt(self, account: str, text: bytes) -> str:
        """Return the text as a path segment holds it (base64url, RFC 4648 section 5, without padding)."""
        return (
            urlsafe_b64encode(self._ciphers.encrypt(text, _associated_data("document", account))).decode().rstrip("=")
        )

    def decrypt(self, account: str, segment: str) -> bytes:
        """Return the text that was encrypted for an account; raise DecryptionFailed."""
        # Before the decoding: base64 needs 4 characters for 3 bytes, so a valid segment is well below this.
        if len(segment) > 2 * MAX_BYTES:
            raise DecryptionFailed
        try:
            # Python's decoder skips characters outside its alphabet; the GCM tag, not the decoder, tells what is
            # genuine.
            value = urlsafe_b64decode(segment + "=" * (-len(segment) % 4))
        except ValueError:
            raise DecryptionFailed from None
        return self._ciphers.decrypt(value, _associated_data("document", account))


def _derived(key: Secret, purpose: bytes) -> bytes:
    """Return 32 bytes for one purpose (HKDF, RFC 5869); `store_key` is random and long, so it needs no stretching."""
    # One derived key per purpose, so that a value of one cannot be used as another. No salt: RFC 5869 section 3.1 makes
    # it optional, and replicas must derive the same key.
    return HKDF(SHA256(), 32, salt=None, info=b"sp-api-proxy store 1 " + purpose).derive(key.reveal().encode())


def _associated_data(purpose: str, key: str) -> bytes:
    # A control character separates them, so that two pairs cannot give the same bytes.
    return f"{purpose}\x1f{key}".encode()
