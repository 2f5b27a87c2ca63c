"""Generator of hostile requests: a grammar with odd parts, pipelining, mutations and splitting.

All randomness comes from the generator passed in, so that a case can be reproduced from its seed.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

_T = TypeVar("_T")
MARKS = rb"(?:mk|bm)[0-9a-f]{10}z"  # of a request, and of its body
MAX_CASE_SIZE = 200_000  # bytes of one case

METHODS = (*[b"GET"] * 8, *[b"POST"] * 6, b"HEAD", b"HEAD", b"PUT", b"PATCH", b"DELETE")
ODD_METHODS = (
    *(b"OPTIONS", b"CONNECT", b"TRACE", b"PRI", b"PROPFIND", b"M-SEARCH", b"get", b"Post", b"", b"GE T", b"GET\t"),
    *(b"G\x00T", b"GET:", b"X" * 300, b"\xc7ET", b"POST /x HTTP/1.1\r\nHost: localhost\r\n\r\nGET"),
)
PATHS = (
    *[b"/brand/new/{mark}"] * 4,
    *(b"/orders/v0/orders/{mark}", b"/orders/v0/orders/{mark}/address", b"/reports/2021-06-30/documents/d1"),
    *(b"/early/{mark}", b"/chunky/{mark}", b"/slow/{mark}", b"/notifications/v1/destinations", b"/", b"/{mark}/"),
)
SEGMENTS = (
    *(b"..", b".", b"%2e%2e", b"%2E.", b".%2f..", b"..;a=1", b"%252e%252e", b"", b"/", b"%2f", b"%5c..%5c", b"\\.."),
    *(b"%00", b"%0d%0a", b"%zz", b"%", b"\xc3\xa4", b"\xff", b"a b", b"a#b", b"@", b"@{account}", b"a:b", b"*", b"~"),
    *(b"a%20b", b"\x7f", b"\x01", b"[", b'"', b"<", b"{{", b"|", b"^", b"`", b"...", b"..%20", b"%2e%2e%2f", b"..%00"),
)
QUERIES = (
    *(b"?", b"?a={mark}", b"?MarketplaceIds=A1PA6795UKMFR9", b"?MarketplaceIds=ATVPDKIKX0DER&a={mark}", b"?a=/../b"),
    *(b"?MarketplaceIds={mark}", b"?a=//", b"?x=%0d%0a", b"??", b"?a=http://evil.test/", b"?a#b", b"?a=\xff", b"?a b"),
)
PREFIXES = (
    *(b"/@{account}", b"/@{account}/eu", b"/@{account}/EU", b"/@{other}", b"/@{other}/na", b"/@{other}/fe", b"/@"),
    *(b"/@/eu", b"/@{account}/", b"/@{account}//", b"/@{account}/xx", b"/%40{account}/eu", b"//@{account}/eu"),
    *(b"/@{account}/eu/@{account}/eu", b"/@{account}/eu/..", b"/./@{account}", b"/@{account}/eu/", b"/@{account}%2feu"),
)
AUTHORITIES = (
    *(b"http://localhost", b"http://127.0.0.1:{port}", b"http://sellingpartnerapi-eu.amazon.com", b"HTTP://LOCALHOST"),
    *(
        b"https://sellingpartnerapi-na.amazon.com:443",
        b"http://user@localhost",
        b"http://localhost@evil.test",
        b"http:",
    ),
    *(b"http://evil.test", b"http://", b"ftp://localhost", b"//localhost", b"localhost:80", b"*", b"http://[::1]:80"),
    *(
        b"http://localhost:80:80",
        b"http://localhost\\",
        b"http:/localhost",
        b"http://localhost%2f",
        b"http://localhost?",
    ),
    *(b"http://localhost#", b"http:///", b"http://LOCALHOST/", b"http://sandbox.sellingpartnerapi-eu.amazon.com"),
)
HOSTS = (
    *(b"127.0.0.1", b"127.0.0.1:{port}", b"LOCALHOST", b"[::1]", b"sellingpartnerapi-eu.amazon.com", b"evil.test", b""),
    *(
        b"localhost:99999",
        b"localhost, evil.test",
        b"localhost evil.test",
        b"localhost\x00",
        b"localhost/",
        b"@localhost",
    ),
)
VERSIONS = (
    *(b"HTTP/1.0", b"HTTP/2.0", b"HTTP/0.9", b"HTTP/1.2", b"http/1.1", b"HTTP/1.1 ", b"HTTP/01.1", b"HTTP/1.1\t", b""),
    *(b"HTTP/1", b"HTTP/1.10", b"HTTPS/1.1", b"HTTP /1.1", b"ICE/1.0", b"RTSP/1.0"),
)
# Names of fields that are never forwarded, or that determine framing, host and credentials.
NAMES = (
    *(b"content-length", b"transfer-encoding", b"host", b"x-amz-access-token", b"connection", b"x-sp-account", b"te"),
    *(b"authorization", b"cookie", b"expect", b"upgrade", b"trailer", b"x-amz-date", b"user-agent", b"x-sp-region"),
    *(b"proxy-connection", b"keep-alive", b"x-forwarded-for", b"content-type", b"content-encoding", b"accept-encoding"),
)
VALUES: tuple[tuple[bytes, tuple[bytes, ...]], ...] = (
    (
        b"Transfer-Encoding",
        (
            *(
                b"chunked",
                b"Chunked",
                b"chunked, chunked",
                b"gzip, chunked",
                b"chunked, gzip",
                b"identity",
                b"xchunked",
            ),
            *(b"chunked;q=1", b"\tchunked\t", b"\x0bchunked", b"chun\xe2\x84\xaaed", b"chunked\x00", b'"chunked"', b""),
            *(b",chunked", b"chunked,", b"chunked\r\n ", b" \r\n chunked"),
        ),
    ),
    (
        b"Content-Length",
        (
            *(b"0", b"1", b"5", b"05", b"+5", b"-1", b"5, 5", b"5 5", b"0x5", b"", b"18446744073709551621", b"5\x00"),
            *(b"\xd9\xa5", b"1e1", b"5;a", b"_5", b"99999", b"5.0", b"5\x0b"),
        ),
    ),
    (
        b"Connection",
        (
            *(
                b"close",
                b"keep-alive",
                b"close, keep-alive",
                b"x-amz-access-token",
                b"host",
                b"content-length",
                b"cLoSe",
            ),
            *(b"transfer-encoding, te", b"upgrade", b"x-sp-account", b"x-kept", b",,", b"close;", b"x-amz-date, close"),
        ),
    ),
    (b"Sec-WebSocket-Key1", (b"x",)),
    (b"Upgrade", (b"websocket", b"h2c", b"TLS/1.0", b"foo", b"")),
    (b"Expect", (b"100-continue", b"100-Continue", b"200-ok", b"")),
    (b"TE", (b"trailers", b"chunked")),
    (b"Trailer", (b"x-amz-access-token", b"content-length")),
    (b"x-amz-access-token", (b"Atza|of-the-client", b"", b"\x00", b"a\r\nb: c")),
    (b"Authorization", (b"Bearer of-the-client",)),
    (b"Cookie", (b"a=b",)),
    (
        b"x-sp-account",
        (b"{account}", b"{other}", b"nobody", b"", b" {account} ", b"{account},{other}", b"{account}\x00"),
    ),
    (b"x-sp-region", (b"eu", b"EU", b"na", b"fe", b"xx", b"")),
    (b"x-sp-data-elements", (b"buyerInfo", b"none", b"buyerInfo,shippingAddress", b"x", b"none,none")),
    (b"x-sp-max-wait", (b"0", b"10s", b"-1", b"never", b"1e9")),
    (b"x-sp-timeout", (b"1s", b"30ms", b"0", b"inf", b"1ms")),
    (b"x-sp-priority", (b"background", b"normal", b"urgent")),
    (b"x-sp-client", (b"me", b"a b", b"x" * 65, b"")),
    (b"x-sp-retry", (b"off", b"on", b"yes")),
    (b"x-request-id", (b"id-1", b"a b", b"a\r\nb", b"x" * 65, b"\xff")),
    (b"Origin", (b"http://evil.test", b"null")),
    (b"Sec-Fetch-Site", (b"cross-site", b"none")),
    (b"x-kept", (b"kept", b"\xc3\xa4", b"\xff", b"a" * 20_000, b"\x7f", b"\x01", b"a\rb", b"a\nb", b"", b"a\tb", b",")),
    (b"Content-Type", (b"application/json", b"text/plain; charset=x")),
    (b"Content-Encoding", (b"gzip", b"br", b"identity")),
    (b"Accept-Encoding", (b"gzip", b"")),
    (b"Forwarded", (b"for=1.2.3.4",)),
    (b"x-forwarded-host", (b"evil.test",)),
)
TRAILERS = (
    *(b"x: y", b"x-amz-access-token: z", b"Content-Length: 5", b"Transfer-Encoding: chunked", b"Connection: close"),
    *(b"x-sp-account: {other}", b"x-sp-data-elements: none", b"Host: evil.test", b"bad trailer", b": ", b"\x00"),
)
PIECES = (
    *(b"\r\n", b"\r\n\r\n", b"\n", b"\r", b"\x00", b" ", b"\t", b":", b"/", b"..", b"0\r\n\r\n", b"\r\n ", b";", b"#"),
    *(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"Content-Length: 10\r\n", b"Transfer-Encoding: chunked\r\n"),
    *(b"Host: evil.test\r\n", b"Connection: close\r\n", b"//", b"\\", b"\xff", b"\xe2\x80\xa8", b"\x0b", b"\x0c", b"@"),
)


@dataclass(frozen=True, slots=True)
class Sender:
    """The sending client: two accounts of its own, and the port it sends to; `fixed`: the port is for one account."""

    account: bytes
    other: bytes
    port: int
    fixed: bool


@dataclass(slots=True)
class Case:
    """What one connection sends, in pieces, with a pause after each, and how it ends.

    `ending` is "read" (all responses, then close), "fin" (half-close), "reset" or "wait" (the proxy must close it).
    """

    number: int
    sender: Sender
    pieces: list[bytes]
    pauses: list[float]
    ending: str
    resets: bool

    @property
    def data(self) -> bytes:
        return b"".join(self.pieces)


def case(seed: int, number: int, sender: Sender) -> Case:
    """Return the case with this number: the same for the same seed and sender."""
    random = Random(f"{seed}/{number}")
    count = random.choices((1, 2, 3, 5, 15), (550, 250, 150, 40, 10))[0]
    made = [_Maker(random, sender, number, index).request() for index in range(count)]
    if random.random() < 0.005:  # more than typical limits
        many = b"GET /many/mk%09xfz/%d HTTP/1.1\r\nHost: localhost\r\nx-sp-account: %s\r\n\r\n"
        made += [many % (number, index, sender.account) for index in range(70)]
    data = b"".join(made)
    if random.random() < 0.5:
        for _ in range(random.choice((1, 1, 1, 2, 3, 6))):
            data = random.choice(MUTATIONS)(random, data)[:MAX_CASE_SIZE]
    if random.random() < 0.12:
        data = data[: random.randrange(len(data) + 1)]
    chunks = _split(random, data)
    pauses = [random.choice((0.0, 0.0, 0.0, 0.001, 0.004)) if len(chunks) < 10 else 0.0 for _ in chunks]
    ending = random.choices(("read", "fin", "reset", "wait"), (81, 9, 9, 1))[0]
    return Case(number, sender, chunks, pauses, ending, random.random() < 0.3)


def _split(random: Random, data: bytes) -> list[bytes]:
    """Return the data in one or a few pieces, some cut after a head; occasionally byte by byte."""
    if len(data) < 600 and random.random() < 0.03:
        return [data[at : at + 1] for at in range(len(data))]
    ends = [found.end() for found in re.finditer(rb"\r\n\r\n", data)]
    cuts = sorted(
        random.choice(ends) if ends and random.random() < 0.3 else random.randrange(len(data) + 1)
        for _ in range(random.choice((0, 0, 0, 1, 2, 5)))
    )
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


# Mutations: damage by broken clients and middleboxes, and attacks.


def _flip(random: Random, data: bytes) -> bytes:
    at = random.randrange(len(data) + 1)
    return data[:at] + bytes(byte ^ (1 << random.randrange(8)) for byte in data[at : at + 1]) + data[at + 1 :]


def _insert(random: Random, data: bytes) -> bytes:
    at = random.randrange(len(data) + 1)
    chunk = random.choice(PIECES) if random.random() < 0.8 else bytes([random.randrange(256)])
    return data[:at] + chunk + data[at:]


def _delete(random: Random, data: bytes) -> bytes:
    at = random.randrange(len(data) + 1)
    return data[:at] + data[at + random.choice((1, 1, 2, 4, 30)) :]


def _duplicate(random: Random, data: bytes) -> bytes:
    """Repeat a line or any range."""
    if random.random() < 0.5:
        lines = data.split(b"\r\n")
        at = random.randrange(len(lines))
        return b"\r\n".join([*lines[:at], lines[at], *lines[at:]])
    a, b = sorted(random.randrange(len(data) + 1) for _ in range(2))
    return data[:b] + data[a:b] + data[b:]


def _splice(random: Random, data: bytes) -> bytes:
    """Join the start and the end of the data at two random cuts: halves of two requests meet."""
    a, b = (random.randrange(len(data) + 1) for _ in range(2))
    return data[:a] + data[b:]


def _line_breaks(random: Random, data: bytes) -> bytes:
    """Replace one line break, or all."""
    by = random.choice((b"\n", b"\r", b"\r\r\n", b"\n\r", b"\r\n\n", b"\r\n\t", b" \r\n"))
    if random.random() < 0.2:
        return data.replace(b"\r\n", by)
    lines = data.split(b"\r\n")
    at = random.randrange(len(lines))
    return b"\r\n".join(lines[:at]) + by + b"\r\n".join(lines[at:])


def _repeat(random: Random, data: bytes) -> bytes:
    at = random.randrange(len(data) + 1)
    chunk = data[at : at + random.choice((1, 3, 20))]
    return data[:at] + chunk * random.choice((2, 10, 200, 3000)) + data[at:]


def _change_case(random: Random, data: bytes) -> bytes:
    at = random.randrange(len(data) + 1)
    return data[:at] + data[at : at + 12].swapcase() + data[at + 12 :]


MUTATIONS: Sequence[Callable[[Random, bytes], bytes]] = (
    *(_flip, _flip, _insert, _insert, _insert, _delete, _delete, _duplicate, _duplicate),
    *(_splice, _line_breaks, _line_breaks, _repeat, _change_case),
)


class _Maker:
    """Generates one request; most of its parts are valid, so that some requests are processed far into the proxy."""

    def __init__(self, random: Random, sender: Sender, number: int, index: int) -> None:
        self.random = random
        self.sender = sender
        self.mark = b"mk%09x%xz" % (number, index)
        self.body_mark = b"bm%09x%xz" % (number, index)
        self.oddity = random.choice((0.0, 0.0, 0.01, 0.04, 0.15))  # probability that a part is odd

    def odd(self, factor: float = 1.0) -> bool:
        return self.random.random() < self.oddity * factor

    def one_of(self, options: Sequence[_T]) -> _T:
        return self.random.choice(options)

    def filled(self, text: bytes) -> bytes:
        """Return a text of the grammar with its placeholders filled in."""
        filled = text.replace(b"{mark}", self.mark).replace(b"{account}", self.sender.account)
        return filled.replace(b"{other}", self.sender.other).replace(b"{port}", b"%d" % self.sender.port)

    def request(self) -> bytes:
        """Return the bytes of one request."""
        method = self.one_of(ODD_METHODS if self.odd() else METHODS)
        head, body = [self.request_line(method)], b""
        fields = self.fields()
        if method not in {b"GET", b"HEAD"} or self.odd():
            framing, body = self.body()
            fields += framing
        if self.odd():
            self.random.shuffle(fields)
        head += [self.field(name, value) for name, value in fields]
        return b"\r\n".join([*head, b"", b""]) + body

    def request_line(self, method: bytes) -> bytes:
        version = self.one_of(VERSIONS) if self.odd(0.7) else b"HTTP/1.1"
        gap = self.one_of((b"  ", b"\t", b"", b"\x0b", b" \t ")) if self.odd(0.2) else b" "
        return method + gap + self.target() + (b" " + version if version or self.odd() else b"")

    def target(self) -> bytes:
        path = self.filled(self.one_of(PATHS))
        while self.odd(1.5):
            segments = path.split(b"/")
            segments.insert(self.random.randrange(1, len(segments) + 1), self.filled(self.one_of(SEGMENTS)))
            path = b"/".join(segments)
        if self.random.random() < 0.3:
            path += self.filled(self.one_of(QUERIES) if self.odd(3) else QUERIES[1])
        if self.random.random() < 0.3:
            path = self.filled(self.one_of(PREFIXES) if self.odd(3) else PREFIXES[self.random.randrange(3)]) + path
        if self.random.random() < 0.15:
            path = (
                self.filled(self.one_of(AUTHORITIES) if self.odd(3) else AUTHORITIES[self.random.randrange(4)]) + path
            )
        return path

    def fields(self) -> list[tuple[bytes, bytes]]:
        """Return Host, the account selection, a mark, and some other fields."""
        fields = [(b"Host", self.filled(self.one_of(HOSTS)) if self.odd() else b"localhost")]
        if self.odd(0.5):
            fields = self.one_of(([], fields * 2, [*fields, (b"host", b"evil.test")]))
        if not self.sender.fixed and self.random.random() < 0.9:
            account = self.sender.account if self.random.random() < 0.8 else self.sender.other
            fields.append((b"x-sp-account", account))
            if account == self.sender.other:
                fields.append((b"x-sp-region", self.one_of((b"na", b"fe"))))
        fields.append((b"X-Kept-Mark", self.mark))
        for _ in range(self.one_of((0, 0, 1, 2, 4))):
            name, values = self.one_of(VALUES)
            if self.random.random() < 0.4 or self.odd(4):
                fields.append((name, self.filled(self.one_of(values))))
        if self.random.random() < 0.02:
            fields += [(b"Connection", b"upgrade"), (b"Upgrade", self.one_of((b"websocket", b"h2c", b"foo")))]
        if self.odd(0.1):
            fields += [(b"x-%d" % number, b"a" * 700) for number in range(self.one_of((100, 130)))]
        return fields

    def field(self, name: bytes, value: bytes) -> bytes:
        if self.odd(0.3):
            name = self.one_of(NAMES)
        if self.odd(0.5):
            name = self.one_of(
                (
                    *(name.replace(b"-", b"_"), name.upper(), name + b" ", b" " + name, name + b"\t", name + b"\x00"),
                    *(b"\x0b" + name, name.replace(b"-", b"\r\n"), name[:3] + b"\xe2\x84\xaa" + name[3:], name + b"\r"),
                    *(b"", name + b":", b"x\r\n\t" + name),
                )
            )
        colon = self.one_of((b":", b":  ", b": \t", b" : ", b":\r\n ", b"", b":\x0b")) if self.odd(0.5) else b": "
        return name + colon + value

    # Bodies.

    def content(self) -> bytes:
        """Return a body; often one that looks like a request and must never be parsed as one."""
        inner = b"GET /inner/%s HTTP/1.1\r\nHost: localhost\r\nx-sp-account: %s\r\n\r\n"
        return self.one_of(
            (
                b"",
                b'{"a":"%s"}' % self.body_mark,
                inner % (self.body_mark, self.sender.account),
                b"0\r\n\r\n" + inner % (self.body_mark, self.sender.account),
                bytes(self.random.randrange(256) for _ in range(40)),
                self.body_mark * self.one_of((30, 900, 12_000)),
            )
        )

    def body(self) -> tuple[list[tuple[bytes, bytes]], bytes]:
        """Return the framing fields of a body, and its bytes."""
        content = self.content()
        if self.odd(0.5):
            return [], content
        if self.random.random() < 0.5:
            length = len(content) + (self.one_of((-3, -1, 1, 2, 30)) if self.odd() else 0)
            framing = [(b"Content-Length", b"%d" % max(0, length))]
        else:
            framing = [(b"Transfer-Encoding", b"chunked")]
            content = self.chunked(content)
        if self.odd():
            name, values = self.one_of(VALUES[:2])
            framing.insert(self.random.randrange(2), (name, self.one_of(values)))
        return framing, content

    def chunked(self, content: bytes) -> bytes:
        chunked = b""
        while content:
            size = min(len(content), self.one_of((1, 7, 40, 5000, 70_000)))
            chunked += self.chunk_size(size) + b"\r\n" + content[:size] + (b"" if self.odd(0.3) else b"\r\n")
            content = content[size:]
        end = self.one_of((b"00", b"-0", b"", b"0;a=b", b"0 ", b"0\n")) if self.odd(0.5) else b"0"
        trailer = b"".join(self.filled(self.one_of(TRAILERS)) + b"\r\n" for _ in range(self.one_of((1, 1, 2))))
        return chunked + end + b"\r\n" + (trailer if self.odd(2) else b"") + (b"" if self.odd(0.3) else b"\r\n")

    def chunk_size(self, size: int) -> bytes:
        plain = b"%x" % size
        if not self.odd():
            return plain
        return self.one_of(
            (
                *(
                    plain.upper(),
                    b"000" + plain,
                    b"0x" + plain,
                    b"+" + plain,
                    b" " + plain,
                    plain + b" ",
                    plain + b"\t",
                ),
                *(
                    plain + b";a=b",
                    plain + b';a="\n"',
                    plain + b" ; x",
                    b"%x" % (size + 1),
                    b"f" * 17,
                    b"_" + plain,
                    b"",
                ),
                *(b"1" + b"0" * 15 + plain, plain + b";a=\r", plain + b"\n", plain + b";\x00", b"-" + plain),
            )
        )
