"""Identity of a client, as its connection proves it: a user id or the names of a certificate."""

import asyncio
import socket
import struct
from typing import Any

from proxy.request.authentication import UNKNOWN_PEER, Peer

_UCRED = struct.Struct("3i")  # struct ucred of SO_PEERCRED: pid, uid, gid (unix(7))


def peer_of(transport: asyncio.BaseTransport) -> Peer:
    """Return the user id at the other end of a Unix socket, or the names in a verified client certificate."""
    certificate = transport.get_extra_info("peercert")
    if certificate:
        return Peer(names=certificate_names(certificate))
    sock = transport.get_extra_info("socket")
    # Windows has no AF_UNIX, macOS no SO_PEERCRED.
    if sock is None or sock.family != getattr(socket, "AF_UNIX", None) or not hasattr(socket, "SO_PEERCRED"):
        return UNKNOWN_PEER
    _, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return Peer(uid=uid)


def certificate_names(certificate: dict[str, Any]) -> frozenset[str]:
    """Return the subject alternative names of a certificate, its common names only where it has none.

    RFC 9525 section 2 takes the common name for no identity at all: it may be any text. Certificates of private
    authorities often have nothing else, so it counts where there is no alternative name that it could contradict.
    """
    alternatives = frozenset(str(value) for _, value in certificate.get("subjectAltName", ()))
    subject = (pair for part in certificate.get("subject", ()) for pair in part)
    return alternatives or frozenset(str(value) for name, value in subject if name == "commonName")
