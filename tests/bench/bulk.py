"""Large bodies sent and received at minimal CPU cost, so that the proxy between the ends dominates.

Blocking sockets, prebuilt bytes, one receive buffer. Nothing is hashed, and chunks are not parsed: the payload contains
no line end, so the last bytes of a chunked body show whether it is complete. The upstream is a separate process,
speaks TLS 1.3 and serves each connection in a thread: a slow reader costs it no CPU.
"""

import argparse
import socket
import ssl
import threading
from pathlib import Path
from typing import Literal

from tests.bench.payload import BLOCK, MIB
from tests.bench.processes import HOST
from tests.bench.upstream import tls

Framing = Literal["length", "chunked"]

IDLE_TIMEOUT = 60.0  # seconds without a byte, after which a transfer has failed
UPLOAD = "/feeds/2021-06-30/feeds"
DOWNLOAD = "/orders/v0/orders"
HEADERS = "Host: localhost\r\nx-sp-region: na"  # selects the upstream for large bodies (streaming_proxies.py)

_HEAD_END = b"\r\n\r\n"
_LAST_CHUNK = b"\r\n0\r\n\r\n"
_PAYLOAD = b"x" * BLOCK
_BLOCKS: dict[Framing, bytes] = {"length": _PAYLOAD, "chunked": b"%x\r\n%b\r\n" % (BLOCK, _PAYLOAD)}
_STACK = 256 * 1024  # bytes for each of the upstream's threads


def download(port: int, mib: int, framing: Framing) -> str:
    """Fetch `mib` MiB; return a description of the fault, an empty string if there is none."""
    with socket.create_connection((HOST, port), timeout=IDLE_TIMEOUT) as sock:
        sock.sendall(f"GET {DOWNLOAD}?mib={mib}&framing={framing} HTTP/1.1\r\n{HEADERS}\r\n\r\n".encode())
        head, rest = _read_head(sock)
        if not head.startswith(b"HTTP/1.1 200") or framing_of(head) != framing:
            return f"unexpected response: {(head + rest)[:500]!r}"
        size = _read_body(sock, rest, framing, mib * MIB)
    return "" if size >= mib * MIB else f"only {size} bytes received"


def upload(port: int, mib: int, framing: Framing) -> str:
    """Send `mib` MiB; return a description of the fault, an empty string if there is none."""
    field = "Transfer-Encoding: chunked" if framing == "chunked" else f"Content-Length: {mib * MIB}"
    with socket.create_connection((HOST, port), timeout=IDLE_TIMEOUT) as sock:
        sock.sendall(f"POST {UPLOAD} HTTP/1.1\r\n{HEADERS}\r\nContent-Type: text/plain\r\n{field}\r\n\r\n".encode())
        _write_body(sock, mib, framing)
        head, rest = _read_head(sock)
        if not rest:
            rest = sock.recv(BLOCK)
    if not head.startswith(b"HTTP/1.1 200"):
        return f"upload rejected: {(head + rest)[:500]!r}"
    framing_seen, size = rest.split(b" ")
    if (framing_seen.decode(), int(size) >= mib * MIB) != (framing, True):
        return f"the upstream received {int(size)} bytes, framed by {framing_seen.decode()}"
    return ""


def framing_of(head: bytes) -> Framing:
    """Return how the body that follows `head` is framed."""
    return "chunked" if b"\r\ntransfer-encoding: chunked" in head.lower() else "length"


def _write_body(sock: socket.socket, mib: int, framing: Framing) -> None:
    block = memoryview(_BLOCKS[framing])
    for _ in range(mib * MIB // BLOCK):
        sock.sendall(block)
    if framing == "chunked":
        sock.sendall(b"0\r\n\r\n")


def _read_body(sock: socket.socket, first: bytes, framing: Framing, length: int) -> int:
    """Read a body of which `first` has been received; return its size in bytes, chunk framing included."""
    buffer, size, end = memoryview(bytearray(BLOCK)), len(first), first[-len(_LAST_CHUNK) :]
    while size < length if framing == "length" else not end.endswith(_LAST_CHUNK):
        count = sock.recv_into(buffer)
        if not count:
            break
        size += count
        if framing == "chunked":
            end = (end + bytes(buffer[max(0, count - len(_LAST_CHUNK)) : count]))[-len(_LAST_CHUNK) :]
    return size


def _read_head(sock: socket.socket) -> tuple[bytes, bytes]:
    """Return a head without its empty line, and the bytes received after it; an empty head if the connection ended."""
    read = b""
    while _HEAD_END not in read:
        more = sock.recv(BLOCK)
        if not more:
            return b"", read
        read += more
    head, _, rest = read.partition(_HEAD_END)
    return head, rest


def serve_connection(sock: ssl.SSLSocket) -> None:
    """Respond to the requests of one connection until it ends."""
    try:
        with sock:
            sock.do_handshake()
            while True:
                head, rest = _read_head(sock)
                if not head:
                    return
                if head.startswith(b"GET "):
                    _send_body(sock, head)
                else:
                    _receive_body(sock, head, rest)
    except OSError:
        return  # the client has disconnected


def _send_body(sock: socket.socket, head: bytes) -> None:
    """Send the `?mib=N` MiB that are requested, framed as `&framing=` says."""
    query = head.split(b" ", 2)[1].partition(b"?")[2].decode()
    query_values = dict(pair.split("=") for pair in query.split("&"))
    mib, framing = int(query_values["mib"]), query_values["framing"]
    field = "Transfer-Encoding: chunked" if framing == "chunked" else f"Content-Length: {mib * MIB}"
    sock.sendall(f"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n{field}\r\n\r\n".encode())
    _write_body(sock, mib, "chunked" if framing == "chunked" else "length")


def _receive_body(sock: socket.socket, head: bytes, rest: bytes) -> None:
    """Read a body; respond with its framing and its size in bytes."""
    framing, length = framing_of(head), 0
    if framing == "length":
        length = int(head.lower().partition(b"\r\ncontent-length:")[2].split(b"\r\n", 1)[0])
    response = f"{framing} {_read_body(sock, rest, framing, length)}".encode()
    sock.sendall(
        b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n%b" % (len(response), response)
    )


def serve(port: int, context: ssl.SSLContext) -> None:
    """Serve until the process ends."""
    threading.stack_size(_STACK)
    with socket.create_server((HOST, port), backlog=1024) as listening:
        while True:
            plain, _ = listening.accept()
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock = context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
            threading.Thread(target=serve_connection, args=(sock,), daemon=True).start()


def main() -> None:
    """Serve on the port given on the command line."""
    parser = argparse.ArgumentParser(description="The benchmark's stand-in for Amazon, for large bodies.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--certificate", type=Path, required=True)
    parser.add_argument("--key", type=Path, required=True)
    options = parser.parse_args()
    serve(options.port, tls(options.certificate, options.key))


if __name__ == "__main__":
    main()
