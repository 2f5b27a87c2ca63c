"""Responses that httptools accepts and the client rejects, and what it relies on in httptools."""

import asyncio
import socket
from collections.abc import Iterator

import httptools
import pytest

from proxy.request.upstream.http1 import ClientConnection, RemoteProtocolError, Response


class RecordingTransport(asyncio.Transport):
    """Accepts what is written and is never readable."""

    def __init__(self) -> None:
        super().__init__()
        self.aborted = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Accept the data."""

    def abort(self) -> None:
        self.aborted = True

    def is_closing(self) -> bool:
        return self.aborted

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Accept the limits."""


@pytest.fixture
def sock() -> Iterator[socket.socket]:
    one, other = socket.socketpair()
    with one, other:
        yield one


def receive(sock: socket.socket, data: bytes, method: str = "GET") -> tuple[Response, list[ClientConnection]]:
    """Return the response that is parsed from these bytes, and the connection if it became idle."""
    idle: list[ClientConnection] = []
    connection = ClientConnection(sock, idle.append, lambda _: None, asyncio.get_running_loop())
    connection.connection_made(RecordingTransport())
    response = connection.send(method, b"")
    connection.data_received(data)
    return response, idle


REJECTED = {
    b"HTTP/0.9 200 OK\r\nContent-Length: 0\r\n\r\n": "has an unsupported HTTP version",
    b"HTTP/2.0 200 OK\r\nContent-Length: 0\r\n\r\n": "has an unsupported HTTP version",
    b"HTTP/1.1 099 Low\r\nContent-Length: 0\r\n\r\n": "has no final status",
    b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n": "has no final status",
    b"HTTP/1.1 200 O\x01K\r\nContent-Length: 0\r\n\r\n": "has control characters in its status line",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n": "has an unsupported transfer coding",
    b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n": "has an unsupported transfer coding",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n": (
        "has an unsupported transfer coding"
    ),
}


@pytest.mark.parametrize("data", REJECTED)
async def test_what_httptools_accepts_and_must_not_be_forwarded_is_rejected(sock: socket.socket, data: bytes) -> None:
    response, idle = receive(sock, data)
    with pytest.raises(RemoteProtocolError, match=REJECTED[data]):
        await response.receive_head()
    assert not idle


async def test_nothing_of_a_trailer_section_is_in_the_next_response(sock: socket.socket) -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX-Trailer: 1\r\n\r\n"
    response, (connection,) = receive(sock, chunked)
    await response.receive_head()
    assert (await response.read(), response.names.in_order) == (b"a", (b"Transfer-Encoding",))
    following = connection.send("GET", b"")
    connection.data_received(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    await following.receive_head()
    assert following.names.in_order == (b"Content-Length",)


async def test_the_response_to_head_has_no_body_whatever_its_length_says(sock: socket.socket) -> None:
    response, (connection,) = receive(sock, b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", "HEAD")
    await response.receive_head()
    assert response.at_end
    assert connection.is_usable()


async def test_bytes_on_an_idle_connection_close_it(sock: socket.socket) -> None:
    _, (connection,) = receive(sock, b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    connection.data_received(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged")
    assert not connection.is_open


def test_httptools_keeps_the_exception_of_a_callback_as_context() -> None:
    class Failing:
        def on_headers_complete(self) -> None:
            raise ValueError("ours")

    with pytest.raises(httptools.HttpParserCallbackError) as caught:
        httptools.HttpResponseParser(Failing()).feed_data(b"HTTP/1.1 200 OK\r\n\r\n")
    assert str(caught.value.__context__) == "ours"
