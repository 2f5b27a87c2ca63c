"""A proxy process between raw sockets: what the tests of this folder send, and what arrives at the upstream.

No HTTP library and no asyncio: a test sends bytes, reads bytes and checks bytes.
"""

import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import yaml

from tests.support.paths import ROOT
from tests.support.raw_client import RawResponse

TIMEOUT = 20.0  # seconds

REFRESH_TOKENS = {"acme": "Atzr|distinctive-refresh-acme", "zenith": "Atzr|distinctive-refresh-zenith"}
CLIENT_SECRET = "distinctive-client-secret-of-main"
CALLER_KEY = "distinctive-caller-key-of-reports"
TOKEN = "distinctive-token-of-"  # followed by the account and a number
SECRETS = (*REFRESH_TOKENS.values(), CLIENT_SECRET, CALLER_KEY, TOKEN)

_LINE = re.compile(rb"(GET|HEAD|POST|PUT|PATCH|DELETE) (/[\x21-\x7e]*) HTTP/1\.1")
_FIELD = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+: ?[\x20-\x7e\x80-\xff\t]*")


@dataclass
class ReceivedRequest:
    """One request as the server received it."""

    line: bytes
    fields: list[tuple[str, str]]
    body: bytes = b""
    connection: int = 0

    @property
    def target(self) -> str:
        return self.line.split(b" ")[1].decode()

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.fields if key.lower() == name.lower()]

    def get(self, name: str) -> str | None:
        values = self.all(name)
        assert len(values) <= 1, f"{name} came {len(values)} times"
        return values[0] if values else None


Script = Callable[["Stream", ReceivedRequest], None]


class Stream:
    """A socket with a buffer."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.buffer = b""

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def more(self) -> bool:
        data = self.socket.recv(65536)
        self.buffer += data
        return bool(data)

    def until(self, mark: bytes) -> bytes:
        while mark not in self.buffer:
            if not self.more():
                raise EOFError
        found, _, self.buffer = self.buffer.partition(mark)
        return found

    def exactly(self, size: int) -> bytes:
        while len(self.buffer) < size:
            if not self.more():
                raise EOFError
        found, self.buffer = self.buffer[:size], self.buffer[size:]
        return found

    def rest(self) -> bytes:
        """Return everything received until the peer closes the connection."""
        try:
            while self.more():
                pass
        except ConnectionError:
            pass
        found, self.buffer = self.buffer, b""
        return found

    def reset(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def close(self) -> None:
        # shutdown() wakes a thread that is blocked in recv().
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


def http_response(body: bytes = b'{"payload":[]}', status: str = "200 OK", *fields: bytes) -> bytes:
    """Return a response with its Content-Length, as Amazon sends it."""
    head = [b"HTTP/1.1 " + status.encode(), b"content-type: application/json", *fields]
    return b"\r\n".join([*head, b"content-length: %d" % len(body), b"", body])


class Server:
    """A server that records requests, parses them strictly and responds by the script for their path."""

    def __init__(self, respond: Script) -> None:
        self.respond = respond
        self.scripts: dict[str, Script] = {}
        self.received: list[ReceivedRequest] = []
        self.violations: list[str] = []  # of HTTP by the proxy
        self.connections = 0
        self._streams: list[Stream] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.settimeout(TIMEOUT)
            self.connections += 1
            stream = Stream(sock)
            self._streams.append(stream)
            thread = threading.Thread(target=self._serve, args=(stream, self.connections), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, stream: Stream, number: int) -> None:
        try:
            while True:
                request = self._read(stream, number)
                script = self.scripts.get(request.target.partition("?")[0], self.respond)
                script(stream, request)
        except (EOFError, OSError):
            pass
        finally:
            stream.socket.close()

    def _read(self, stream: Stream, number: int) -> ReceivedRequest:
        head = stream.until(b"\r\n\r\n")
        line, *lines = head.split(b"\r\n")
        if not _LINE.fullmatch(line):
            self.violations.append(f"request line {line!r}")
        self.violations += [f"field {one!r}" for one in lines if not _FIELD.fullmatch(one)]
        pairs = [one.decode("latin-1").partition(":") for one in lines]
        request = ReceivedRequest(line, [(name, value.strip()) for name, _, value in pairs], connection=number)
        lengths, codings = request.all("content-length"), request.all("transfer-encoding")
        if len(lengths) + len(codings) > 1 or codings not in ([], ["chunked"]):
            self.violations.append(f"framing {lengths} {codings}")
        if lengths and not re.fullmatch("[0-9]+", lengths[0]):
            self.violations.append(f"length {lengths}")
        for name in ("host", "x-amz-access-token"):
            if name == "host" and len(request.all(name)) != 1:
                self.violations.append(f"{len(request.all(name))} times {name}")
        self.received.append(request)
        if "early" not in request.target:
            request.body = self.body_of(stream, request)
        return request

    def body_of(self, stream: Stream, request: ReceivedRequest) -> bytes:
        if not request.all("transfer-encoding"):
            return stream.exactly(int((request.all("content-length") or ["0"])[0]))
        body = b""
        while size := int(stream.until(b"\r\n"), 16):
            body += stream.exactly(size)
            if stream.exactly(2) != b"\r\n":
                self.violations.append("a chunk without its end")
        if stream.exactly(2) != b"\r\n":
            self.violations.append("a trailer")
        return body

    def close(self) -> None:
        self._listener.close()
        for stream in self._streams:
            stream.close()


def _issue_token(stream: Stream, request: ReceivedRequest) -> None:
    form = dict(part.partition("=")[::2] for part in request.body.decode().split("&"))
    account = form.get("refresh_token", "nobody").rpartition("-")[2]
    _issue_token.count += 1  # type: ignore[attr-defined]
    number: int = _issue_token.count  # type: ignore[attr-defined]
    token = f"Atza|{TOKEN}{account}-{number:06d}"
    stream.send(http_response(json.dumps({"access_token": token, "token_type": "bearer", "expires_in": 3600}).encode()))


_issue_token.count = 0  # type: ignore[attr-defined]


def _respond_as_amazon(stream: Stream, request: ReceivedRequest) -> None:
    if request.target == "/tokens/2021-03-01/restrictedDataToken":
        account = (request.get("x-amz-access-token") or "").split("-")[-2]
        token = f"Atz.sprdt|{TOKEN}{account}-000000"
        stream.send(http_response(json.dumps({"restrictedDataToken": token, "expiresIn": 3600}).encode()))
    elif request.line.startswith(b"HEAD "):
        stream.send(b"HTTP/1.1 200 OK\r\ncontent-length: 14\r\n\r\n")
    else:
        stream.send(
            http_response(b'{"payload":[]}', "200 OK", b"x-amzn-requestid: for-" + request.target.encode()[:60])
        )


def parse_responses(data: bytes, methods: tuple[str, ...] = ()) -> list[RawResponse]:
    """Return the responses in what a client received; `methods` are those of the requests (default GET)."""
    found: list[RawResponse] = []
    while data:
        head, end, data = data.partition(b"\r\n\r\n")
        line, *lines = head.split(b"\r\n")
        match = re.fullmatch(rb"HTTP/1\.[01] ([1-5][0-9][0-9]) ([\x20-\x7e\x80-\xff]*)", line)
        assert match, f"no status line: {line!r}"
        assert end, f"no end of the head: {head!r}"
        pairs = [one.decode("latin-1").partition(":") for one in lines]
        fields = [(name, value.strip()) for name, _, value in pairs]
        one = RawResponse(int(match[1]), match[2].decode("latin-1"), fields, b"", complete=True)
        if one.status < 200:
            assert one.status == 100, "no other interim response was requested"
            continue
        method = methods[len(found)] if len(found) < len(methods) else "GET"
        found.append(one)
        if method == "HEAD" or one.status in {204, 304}:
            continue
        data = _take_body(one, data)
    return found


def _take_body(one: RawResponse, data: bytes) -> bytes:
    """Remove the body of a response from the start of `data` and return the rest."""
    if one.get("transfer-encoding") == "chunked":
        while True:
            size_text, end, rest = data.partition(b"\r\n")
            if not end or not re.fullmatch(rb"[0-9a-fA-F]+", size_text):
                one.complete = False
                return b""
            size = int(size_text, 16)
            one.body += rest[:size]
            if rest[size : size + 2] != b"\r\n":
                one.complete = False
                return b""
            data = rest[size + 2 :]
            if not size:
                return data
    length = one.get("content-length")
    if length is None:
        one.body = data
        return b""
    one.body, rest = data[: int(length)], data[int(length) :]
    one.complete = len(one.body) == int(length)
    return rest


def settings_of(api: Server, lwa: Server, **changed: Any) -> dict[str, Any]:
    """Return the settings of a proxy between these servers; timeouts are short to keep the tests short."""
    url = f"http://127.0.0.1:{api.port}"
    return {
        "listen": "127.0.0.1:0",
        "admin": "127.0.0.1:0",
        "applications": {"main": {"client_id": "amzn1.client", "client_secret": CLIENT_SECRET}},
        "accounts": {name: {"refresh_tokens": {"eu": token}} for name, token in REFRESH_TOKENS.items()},
        "default_account": "acme",
        "endpoints": {"na": url, "eu": url, "fe": url, "lwa": f"http://127.0.0.1:{lwa.port}/auth/o2/token"},
        "limits": {"pace": False},
        "retry": {"attempts": 1},
        "timeouts": {
            "header": "1s",
            "body_idle": "1s",
            "upstream_idle": "1500ms",
            "connect": "2s",
            "token": "2s",
            "keep_alive": "3s",
            "shutdown": "2s",
        },
        **changed,
    }


@dataclass
class Harness:
    """A proxy process with fake servers for Amazon's API and Login with Amazon."""

    api: Server
    lwa: Server
    folder: Path
    process: subprocess.Popen[bytes]
    addresses: list[str]
    admin: str
    log: list[str] = field(default_factory=list)
    client_output: list[bytes] = field(default_factory=list)  # everything that any client received

    @classmethod
    @contextmanager
    def start(cls, folder: Path, limit: int | None = None, **changed: Any) -> Iterator[Self]:
        """Start all; `limit` is the proxy's limit of open files."""
        api, lwa = Server(_respond_as_amazon), Server(_issue_token)
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(settings_of(api, lwa, **changed)), encoding="utf-8")
        path.chmod(0o600)
        command = [sys.executable, "-m", "proxy", "serve", "--config", str(path)]
        command += ["--log-format", "json", "--log-level", "debug"]
        if limit is not None:
            command = ["sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh", *command]
        kept = {name: text for name, text in os.environ.items() if name.startswith(("COVERAGE", "PATH", "HOME"))}
        process = subprocess.Popen(command, cwd=ROOT, env=kept, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        harness = cls(api, lwa, folder, process, [], "")
        reading = threading.Thread(target=harness._read_log, daemon=True)
        harness._serving = threading.Event()  # type: ignore[attr-defined]
        reading.start()
        try:
            assert harness._serving.wait(TIMEOUT), harness.log  # type: ignore[attr-defined]
            assert harness.addresses, harness.log
            yield harness
        finally:
            process.terminate()
            process.wait(TIMEOUT)
            reading.join(TIMEOUT)
            if process.stderr is not None:
                process.stderr.close()
            api.close()
            lwa.close()

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for data in self.process.stderr:
            line = data.decode(errors="replace")
            self.log.append(line)
            if '"message": "serving"' in line:
                entry = json.loads(line)
                self.addresses, self.admin = entry["listen"], entry["admin"]
                self._serving.set()  # type: ignore[attr-defined]
        self._serving.set()  # type: ignore[attr-defined]

    @contextmanager
    def client(self, address: str | None = None, receive: int | None = None) -> Iterator[Stream]:
        """Connect to the proxy port; `receive` is the size of the socket's receive buffer."""
        stream = Stream(connect(address or self.addresses[0], receive))
        try:
            yield stream
        finally:
            stream.socket.close()

    def send(self, data: bytes, methods: tuple[str, ...] = (), address: str | None = None) -> list[RawResponse]:
        """Send bytes on a new connection, and return the responses up to its end."""
        with self.client(address) as stream:
            with suppress(ConnectionError):  # rejected before all was sent: the response can still be read
                stream.send(data)
            got = stream.rest()
        self.client_output.append(got)
        return parse_responses(got, methods)

    def metric(self, name: str) -> float:
        """Return the sum of a metric's series; `name` may include the start of its labels."""
        with urllib.request.urlopen(f"http://{self.admin}/metrics", timeout=TIMEOUT) as page:
            lines = page.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def connect(address: str, receive: int | None = None) -> socket.socket:
    """Connect to `host:port` or `unix:/path`."""
    if address.startswith("unix:"):
        sock = socket.socket(socket.AF_UNIX)
        target: Any = address.removeprefix("unix:")
    else:
        host, _, port = address.rpartition(":")
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        target = (host.strip("[]"), int(port))
    sock.settimeout(TIMEOUT)
    if receive is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    try:
        sock.connect(target)
    except OSError:
        sock.close()
        raise
    return sock


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait until a condition holds; poll it for at most TIMEOUT seconds."""
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


SELLERS = "/sellers/v1/marketplaceParticipations"


def request(target: str | bytes = SELLERS, *fields: bytes, method: str = "GET", body: bytes | None = None) -> bytes:
    """Return a request to localhost that ends its connection, with these fields, and a length if it has a body.

    A Host or Connection field replaces the default one.
    """
    raw = target if isinstance(target, bytes) else target.encode()
    names = {one.partition(b":")[0].lower() for one in fields}
    usual = [b"Host: localhost"] * (b"host" not in names) + [b"Connection: close"] * (b"connection" not in names)
    length = [b"Content-Length: %d" % len(body)] if body is not None else []
    return b"\r\n".join([method.encode() + b" " + raw + b" HTTP/1.1", *usual, *fields, *length, b"", body or b""])
