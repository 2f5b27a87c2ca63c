"""Identity of a client by its connection, without a server."""

import asyncio
import os
import socket
from typing import Any

import pytest

from proxy.request.authentication import UNKNOWN_PEER, Peer
from proxy.server.peer import certificate_names, peer_of


class Transport(asyncio.BaseTransport):
    """A transport that has nothing but these."""

    def __init__(self, **extra: Any) -> None:
        super().__init__(extra)


@pytest.mark.parametrize(
    ("certificate", "names"),
    [
        ({"subjectAltName": (("DNS", "a.example"), ("URI", "spiffe://b"))}, {"a.example", "spiffe://b"}),
        ({"subject": ((("commonName", "c"),),)}, {"c"}),
        ({"subject": ((("commonName", "c"),),), "subjectAltName": (("DNS", "a.example"),)}, {"a.example"}),
        ({"subject": ((("organizationName", "o"),),)}, set()),
    ],
)
def test_alternative_names_count_before_the_common_name(certificate: dict[str, Any], names: set[str]) -> None:
    assert certificate_names(certificate) == names
    assert peer_of(Transport(peercert=certificate)) == Peer(names=frozenset(names))


def test_a_unix_socket_tells_the_user() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert peer_of(Transport(socket=ours)) == Peer(uid=os.getuid())


def test_a_tcp_connection_proves_nothing() -> None:
    with socket.socket() as sock:
        assert peer_of(Transport(socket=sock)) is UNKNOWN_PEER
    assert peer_of(Transport()) is UNKNOWN_PEER
