"""Strict HTTP/1.1 parser by RFC 9112 that shares no code with the proxy.

It determines what a client really sent and parses what arrived upstream: with the same parser on both sides, a byte
that the proxy interprets differently shows as a difference.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
# More than one space, and RTSP, which some parsers accept: the end of a request does not depend on them.
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb") +([^\x00-\x20\x7f]+) +(?:HTTP|RTSP)/(1\.[01])")
_STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-5]\d\d) [\t\x20-\x7e\x80-\xff]*")
_FIELD = re.compile(rb"(" + _TOKEN + rb"):([\t\x20-\x7e\x80-\xff]*)")
_CHUNK = re.compile(rb"(0*[0-9A-Fa-f]{1,16})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?\r\n")
_END = b"\r\n\r\n"


@dataclass(slots=True)
class Message:
    """A request or a response with a complete head; `start` holds its method or status, target and version.

    `complete`: its whole body was received; `clear`: its framing is unambiguous; `is_last`: no message can follow it;
    `raw`: all of its bytes.
    """

    start: tuple[bytes, ...]
    fields: list[tuple[bytes, bytes]]
    body: bytes = b""
    complete: bool = False
    clear: bool = True
    is_last: bool = False
    raw: bytes = b""
    chunk_lines: list[bytes] = field(default_factory=list)

    @property
    def method(self) -> bytes:
        return self.start[0]

    @property
    def target(self) -> bytes:
        return self.start[1]

    @property
    def status(self) -> int:
        return int(self.start[0])

    def all(self, name: bytes) -> list[bytes]:
        """Return every value of a field; `_` in its name counts as `-`, as some servers treat it."""
        return [value for key, value in self.fields if key.lower().replace(b"_", b"-") == name]


def requests(data: bytes) -> list[Message]:
    """Return the requests in what a client sent, up to the first byte that is not HTTP.

    Line breaks before a request line are skipped (RFC 9112 section 2.2). The last one may be incomplete.
    """
    found: list[Message] = []
    at = 0
    while True:
        while data[at : at + 1] in {b"\r", b"\n"}:
            at += 1
        message = request(data, at)
        if message is None:
            return found
        found.append(message)
        at += len(message.raw)
        if message.is_last or not message.complete:
            return found


def request(data: bytes, at: int = 0) -> Message | None:
    """Return the request that begins at `at`; None without a complete, well-formed head."""
    message = _head(data, at, _REQUEST_LINE)
    if message is None:
        return None
    lengths, codings = _exactly(message, b"content-length"), _exactly(message, b"transfer-encoding")
    message.clear = (
        (not lengths or (len(lengths) == 1 and re.fullmatch(rb"\d{1,18}", lengths[0]) is not None))
        and (not codings or (len(codings) == 1 and codings[0].lower() == b"chunked"))
        and not (lengths and codings)
    )
    connection = {
        part.strip(b" \t").lower() for value in _exactly(message, b"connection") for part in value.split(b",")
    }
    kept = b"keep-alive" in connection or message.start[2] == b"1.1"
    message.is_last = b"close" in connection or not kept or not message.clear
    if message.clear:
        _read_body(message, data, at, int(lengths[0]) if lengths else 0, chunked=bool(codings))
    return message


def responses(data: bytes, methods: Sequence[bytes], *, at_end: bool) -> tuple[list[Message], bytes]:
    """Return the final responses to requests with these methods, and the remaining bytes.

    `at_end`: the connection has ended, which also ends a response without framing.
    """
    found: list[Message] = []
    at = 0
    while at < len(data):
        message = _head(data, at, _STATUS_LINE)
        if message is None:
            break
        if 100 <= message.status < 200:
            at += len(message.raw)
            continue
        method = methods[len(found)] if len(found) < len(methods) else b""
        _read_response_body(message, data, at, method, at_end=at_end)
        found.append(message)
        at += len(message.raw)
        if not message.complete:
            break
    return found, data[at:]


def _read_response_body(message: Message, data: bytes, at: int, method: bytes, *, at_end: bool) -> None:
    begin = at + len(message.raw)
    lengths = message.all(b"content-length")
    # An error that replaces the response to HEAD may have a body; it then closes the connection.
    has_none = method == b"HEAD" and not (data[begin : begin + 1] == b"{" and b"close" in message.all(b"connection"))
    if has_none or message.status in {204, 304}:
        message.complete = True
    elif message.all(b"transfer-encoding"):
        _read_body(message, data, at, 0, chunked=True)
    elif lengths:
        _read_body(message, data, at, int(lengths[0]), chunked=False)
    else:
        message.body, message.raw, message.complete = data[begin:], data[at:], at_end


def _exactly(message: Message, name: bytes) -> list[bytes]:
    return [value for key, value in message.fields if key.lower() == name]


def _head(data: bytes, at: int, first_line: re.Pattern[bytes]) -> Message | None:
    end = data.find(_END, at)
    if end < 0:
        return None
    line, *rest = data[at:end].split(b"\r\n")
    start = first_line.fullmatch(line)
    fields = [_FIELD.fullmatch(text) for text in rest]
    if start is None or None in fields:
        return None
    return Message(
        start.groups(), [(f[1], f[2].strip(b" \t")) for f in fields if f is not None], raw=data[at : end + len(_END)]
    )


def _read_body(message: Message, data: bytes, at: int, length: int, *, chunked: bool) -> None:
    """Read a body as far as it is received and well-formed; extend `raw` by it."""
    begin = at + len(message.raw)
    if chunked:
        end = _read_chunks(message, data, begin)
    else:
        end = min(begin + length, len(data))
        message.body = data[begin:end]
        message.complete = len(message.body) == length
    message.raw = data[at:end]


def _read_chunks(message: Message, data: bytes, at: int) -> int:
    while True:
        line = _CHUNK.match(data, at)
        if line is None:
            return at
        message.chunk_lines.append(line[0])
        size, at = int(line[1], 16), line.end()
        if size == 0:
            return _read_trailer(message, data, at)
        message.body += data[at : at + size]
        at += size
        if data[at : at + 2] != b"\r\n":
            return min(at, len(data))
        at += 2


def _read_trailer(message: Message, data: bytes, at: int) -> int:
    while True:
        end = data.find(b"\r\n", at)
        if end < 0:
            return at
        line, at = data[at:end], end + 2
        if not line:
            message.complete = True
            return at
        if _FIELD.fullmatch(line) is None:
            return end
        message.chunk_lines.append(line)
