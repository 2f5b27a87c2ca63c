"""Authentication of callers by key, client certificate or user id.

Without `callers` in the configuration, every client that reaches a listener is accepted as anonymous. With them, only
callers are, except by a listener with `anonymous`.
"""

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from aiohttp import web
from multidict import CIMultiDictProxy

from proxy.config import Config, Listener, Secret
from proxy.errors import CallerRefused, MalformedRequest

KEY_HEADER = "x-sp-key"
ANONYMOUS = ""

# Reading the files for each request would cost a system call per caller; a second is short for a rotation.
_RELOAD_INTERVAL = 1.0  # seconds after which key files are read again
# Compared in lower case: the name of a scheme is case-insensitive (RFC 9110 section 11.1).
_SCHEME = "bearer "


@dataclass(frozen=True, slots=True)
class Peer:
    """The other end of a connection: its user id (Unix sockets), the names in its verified certificate (TLS)."""

    uid: int | None = None
    names: frozenset[str] = frozenset()


UNKNOWN_PEER = Peer()
PEER = web.RequestKey("peer", Peer)  # set by the listener


def peer_of(request: web.BaseRequest) -> Peer:
    """Return the other end of a request's connection."""
    # aiohttp inherits `get` from MutableMapping, which raises and catches a KeyError where there is none.
    return request[PEER] if PEER in request else UNKNOWN_PEER  # noqa: SIM401


class CallerAuthenticator:
    """The configured callers and their credentials; `now` is a monotonic clock in seconds."""

    def __init__(self, config: Config, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._keys: dict[str, Secret] = {
            name: caller.key for name, caller in config.callers.items() if caller.key is not None
        }
        self._by_certificate = {
            caller.certificate: name for name, caller in config.callers.items() if caller.certificate is not None
        }
        self._by_uid = {caller.uid: name for name, caller in config.callers.items() if caller.uid is not None}
        self.is_configured = bool(config.callers)
        # Keys are looked up by a digest with a random salt. A client cannot compute it, so the time of a look-up
        # reveals nothing about the keys.
        self._salt = secrets.token_bytes(32)
        self._by_digest: dict[bytes, tuple[bytes, str]] = {}
        self._loaded_at = -_RELOAD_INTERVAL

    def authenticate(self, headers: CIMultiDictProxy[str], peer: Peer, listener: Listener) -> str:
        """Return the caller's name, or ANONYMOUS; raise CallerRefused, or MalformedRequest for several keys.

        A key takes precedence over a certificate, and that over a user id, because several programs may run as one
        user. An `Authorization` that holds no caller's key is ignored: apps send their own there.
        """
        if not self.is_configured:
            return ANONYMOUS
        key = _key(headers)
        # A wrong key is refused and does not fall back to the certificate or the user id: the client named another
        # caller.
        if key is not None:
            name = self._by_key(key)
            if name is None:
                raise CallerRefused(f"no caller has this {KEY_HEADER}", "Check the key, and callers.*.key.")
            return name
        # Bearer: RFC 6750 section 2.1.
        found = self._by_bearer(headers) or self._by_connection(peer)
        if found is None and not listener.anonymous:
            raise CallerRefused(
                "this listener accepts only requests of known callers",
                f"Send your key as {KEY_HEADER}, or as Authorization: Bearer.",
            )
        return found or ANONYMOUS

    def _by_connection(self, peer: Peer) -> str | None:
        # Sorted, because the names go into the message, and a set has no fixed order between processes (hash
        # randomisation).
        by_certificate = sorted(self._by_certificate[name] for name in peer.names & self._by_certificate.keys())
        if len(by_certificate) > 1:
            raise CallerRefused(
                f"the client certificate has the names of several callers ({', '.join(by_certificate)})",
                "Give each caller a name that no other certificate has.",
            )
        if by_certificate:
            return by_certificate[0]
        # Not `if peer.uid`: 0 is root.
        return self._by_uid.get(peer.uid) if peer.uid is not None else None

    def _by_bearer(self, headers: CIMultiDictProxy[str]) -> str | None:
        found = {
            name
            for value in headers.getall("Authorization", ())
            if value[: len(_SCHEME)].lower() == _SCHEME and (name := self._by_key(value[len(_SCHEME) :].strip(" \t")))
        }
        # A set of names: the same caller's old and new key together are not ambiguous.
        if len(found) > 1:
            raise MalformedRequest("two keys of different callers are given", "Send one.")
        return found.pop() if found else None

    def _by_key(self, key: str) -> str | None:
        if self._now() - self._loaded_at >= _RELOAD_INTERVAL:
            self.reload_keys()
        digest = self._digest(key)
        # An unknown key is compared, too, with an empty digest, which equals none.
        known, name = self._by_digest.get(digest, (b"", ""))
        return name if hmac.compare_digest(known, digest) else None

    def reload_keys(self) -> None:
        """Read the keys from their files again; a caller may have several, so that a new one can overlap the old."""
        # Before the reading: a file that cannot be read is not tried again with every request.
        self._loaded_at = self._now()
        self._keys = {name: key.refreshed() for name, key in self._keys.items()}
        self._by_digest = {
            (digest := self._digest(one)): (digest, name)
            for name, key in self._keys.items()
            for one in key.reveal().split()
        }

    def _digest(self, key: str) -> bytes:
        # aiohttp 3.14.5 decodes header bytes with `surrogateescape`; plain UTF-8 would raise for the surrogates.
        return hashlib.blake2b(key.encode("utf-8", "surrogateescape"), key=self._salt, digest_size=32).digest()


def _key(headers: CIMultiDictProxy[str]) -> str | None:
    values = headers.getall(KEY_HEADER, ())
    # Several could be read differently here and by a proxy in front (RFC 9110 section 5.3): never the first or the
    # last.
    if len(values) > 1:
        raise MalformedRequest(f"the header {KEY_HEADER} is given {len(values)} times", "Send it once.")
    return values[0].strip(" \t") if values else None
