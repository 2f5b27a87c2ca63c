"""Other projects' parser test corpora sent through the proxy: each side must see only canonical messages."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest

from proxy.server.runtime import RunningProxy
from tests.conftest import StartProxy
from tests.security.corpora import Case, Message, gunicorn, llhttp
from tests.support.fake_upstream import FakeUpstream, Received, Script, http_response
from tests.support.raw_client import Client, RawResponse, call, connect

EXCHANGE_TIMEOUT = 30.0  # seconds; the proxy's own timeouts are much shorter
TIMEOUT = {"header": "1s", "body_idle": "1s", "upstream_idle": "1s", "keep_alive": "200ms"}
MAX_SEGMENTS = 256
PATH = "/brand/new"

# Rejected by gunicorn's own policy. The proxy accepts them; what arrives must still be canonical.
POLICY = {
    "invalid/006": "gunicorn's limit for a request line is 4094 bytes, the proxy's 16 KiB",
    "invalid/007": "gunicorn's limit for a field is 8190 bytes, the proxy's 32 KiB",
    "invalid/008": "gunicorn's limit for a field is 8190 bytes, the proxy's 32 KiB",
    "invalid/009": "gunicorn's limit is 100 fields, the proxy's 128",
    "invalid/010": "a limit that the case sets: 10 bytes for a field",
    "invalid/011": "a limit that the case sets: 2 fields",
    "invalid/012": "a limit that the case sets: 98 bytes for a field",
    "invalid/017": "gunicorn's limit for a field is 8190 bytes, the proxy's 32 KiB",
    "invalid/019": "X-Forwarded-Proto and X-Forwarded-Ssl disagree; the proxy trusts neither and forwards none",
    "invalid/chunked_07": "a setting of the case refuses names with an underscore; the proxy drops Transfer_Encoding",
    "invalid/limit_header_default_01": "gunicorn's limit for a field is 8190 bytes, the proxy's 32 KiB",
    "invalid/rfc9110_trailer_forbidden_host_01": "trailer fields may be dropped (RFC 9112 section 7.1.2), and all are",
    "invalid/rfc9112_leading_crlf_02": "more than one empty line may be skipped (RFC 9112 section 2.2)",
}

# The error is in the body, so the start of the request may already have been forwarded.
IN_THE_BODY = ("invalid/chunked_", "invalid/rfc9110_trailer_", "invalid/rfc9112_chunked_")

# Number of requests in gunicorn's `valid` files with more than one.
PIPELINED = {"valid/018": 2, "valid/022": 2, "valid/023": 2, "valid/pp_02": 2}

# Accepted by the other project and rejected here, by reason.
REJECTED_HERE = {
    "the method is not forwarded": (
        "valid/031",
        "valid/031compat",
        "valid/031compat2",
        "valid/rfc9112_target_asterisk_options_01",
        "valid/rfc9112_target_authority_connect_01",
        "valid/rfc9112_target_authority_ipv6_01",
        "request/method/report-request",
        "request/method/connect-request",
        "request/method/connect-request-with-caps",
        "request/method/connect-with-body",
        "request/method/m-search-request",
        "request/method/purge-request",
        "request/method/search-request",
        "request/method/link-request",
        "request/method/link-request-again",
        "request/method/source-request",
        "request/method/source-request-with-ice",
        "request/method/options-request-with-rtsp",
        "request/method/announce-request-with-rtsp",
        "request/method/query-request",
        "request/sample/255-ascii-in-header-value",
        "request/sample/simple-request",
        "request/uri/underscore-in-hostname",
    ),
    "a body on GET, which Amazon rejects": (
        "valid/008",
        "valid/020",
        "valid/040",
        "valid/040_compat",
        "valid/rfc9110_body_framing_get_cl_nonzero_01",
        "request/content-length/funky-content-length-with-body",
    ),
    "a transfer coding besides chunked": (
        "valid/025",
        "valid/025_line",
        "valid/029",
        "valid/030",
        "valid/rfc9112_smuggle_gzip_chunked_01",
        "valid/rfc9112_smuggle_te_identity_chunked_01",
        "request/transfer-encoding/post-with-chunked-as-last-transfer-encoding",
        "request/transfer-encoding/post-with-chunked-as-last-transfer-encoding-multiple-headers",
    ),
    "the PROXY protocol, for which gunicorn has a setting": (
        "valid/pp_01",
        "valid/pp_02",
        "valid/pp_04",
        "valid/pp_05",
    ),
    "folded fields, for which gunicorn has a setting": ("valid/compat_obs_fold", "valid/compat_obs_fold_huge"),
    "a space after a field's name, for which gunicorn has a setting": ("valid/028",),
    "spaces in chunk extensions": ("valid/013",),
    "a target with '#'": ("valid/005", "request/uri/fragment-in-uri"),
    "a target with a backslash": ("request/uri/quotes-in-uri",),
    "a target that begins with two slashes": ("valid/100",),
    "a target with a user in it": ("valid/rfc9112_target_absolute_userinfo_01", "request/uri/host-port-and-basic-auth"),
    "no version": ("request/sample/no-http-version",),
    "an Origin: web pages are rejected": ("request/connection/upgrade-get-request",),
    "a body that is shorter than its length": ("valid/099",),
}

# Data after a request that ends its connection is rejected, with the request if both come in one segment.
# A connection also ends if the next request comes in one segment with the end of a chunked body: that end may have
# contained trailer fields (tests/security/test_fuzz.py).
SAME_SEGMENT = {"valid/019", "valid/021", "valid/023"}

# Responses that llhttp accepts and the proxy does not forward, by reason.
NOT_FORWARDED = {
    "an upgrade that was not requested": (
        "response/connection/http-101-response-with-upgrade-and-content-length-header",
        "response/connection/http-101-response-with-upgrade-and-transfer-encoding-header",
    ),
    "another version of HTTP": ("response/sample/http-version-0.9",),
    "a transfer coding besides chunked": (
        "response/transfer-encoding/chunked-before-other-transfer-encoding",
        "response/transfer-encoding/multiple-transfer-encoding-where-chunked-is-not-the-last-one",
        "response/transfer-encoding/chunkedchunked-transfer-encoding-does-not-enable-chunked-enconding",
    ),
}

# The only requests that may go to Amazon: the strictest form of RFC 9112.
_LINE = re.compile(rb"(GET|HEAD|POST|PUT|PATCH|DELETE) /[\x21\x22\x24-\x5b\x5d-\x7e]* HTTP/1\.1")
_VISIBLE = rb"[\x21-\x7e\x80-\xff]"
_FIELD = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+: (" + _VISIBLE + rb"([\t\x20-\x7e\x80-\xff]*" + _VISIBLE + rb")?)?")
_FRAMING = re.compile(rb"content-length: [0-9]+|transfer-encoding: chunked", re.IGNORECASE)
_CHUNK_SIZE = re.compile(rb"(0|[1-9a-f][0-9a-f]*)\r\n")


def violations(head: bytes) -> list[str]:
    """Return what is ambiguous or not canonical in a request's head (without its blank line)."""
    line, *fields = head.split(b"\r\n")
    names = [text.partition(b":")[0].strip().lower() for text in fields]
    framing = [text for text, name in zip(fields, names, strict=True) if _is_framing(name)]
    found = [] if _LINE.fullmatch(line) else [repr(line)]
    found += [repr(text) for text in fields if not _FIELD.fullmatch(text)]
    found += [repr(text) for text in framing if not _FRAMING.fullmatch(text)]
    if len(framing) > 1:
        found.append(f"{len(framing)} fields of framing")
    if names.count(b"host") != 1:
        found.append(f"{names.count(b'host')} hosts")
    return found


def _is_framing(name: bytes) -> bool:
    return name.replace(b"_", b"-") in {b"content-length", b"transfer-encoding"}


async def whole_body(request: Received, reader: asyncio.StreamReader) -> bytes:
    """Read a request's body; raise ValueError if its chunks are not canonical."""
    if request.get("transfer-encoding") is None:
        return await reader.readexactly(int(request.get("content-length") or 0))
    body = b""
    while True:
        size = await reader.readuntil(b"\r\n")
        if not _CHUNK_SIZE.fullmatch(size):
            raise ValueError(f"chunk size {size!r}")
        chunk = await reader.readexactly(int(size, 16) + 2)
        if not chunk.endswith(b"\r\n"):
            raise ValueError(f"chunk {chunk!r}")
        if chunk == b"\r\n":
            return body
        body += chunk[:-2]


@dataclass
class Witness(FakeUpstream):
    """Fake of Amazon's API that accepts only canonical requests and records other ones and truncated ones."""

    not_canonical: list[str] = field(default_factory=list)
    truncated: list[bytes] = field(default_factory=list)

    async def _one_request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> bool:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as exc:
            self.not_canonical += [f"half a head: {exc.partial!r}"] if exc.partial else []
            return False
        if found := violations(head.removesuffix(b"\r\n\r\n")):
            self.not_canonical += found
            return False
        line, *fields = head.decode("latin-1").split("\r\n")[:-2]
        request = Received(line, [(name, value) for name, _, value in (text.partition(": ") for text in fields)])
        request.connection = number
        try:
            request.body = await whole_body(request, reader)
        except asyncio.IncompleteReadError:
            self.truncated.append(head)
            return False
        except ValueError as exc:
            self.not_canonical.append(str(exc))
            return False
        self.received.append(request)
        await self.respond(request, writer)
        return not writer.is_closing()


@pytest.fixture
async def fake_upstream() -> AsyncIterator[Witness]:
    """Amazon's API as these tests need it."""
    async with Witness() as server:
        yield server


@pytest.fixture
async def proxy(start_proxy: StartProxy) -> RunningProxy:
    """A proxy with short timeouts."""
    return await start_proxy(timeouts=TIMEOUT)


def items(cases: list[Case]) -> list[Any]:
    """Return one parameter for each case."""
    return [pytest.param(case, id=case.name) for case in cases]


async def deliver(data: bytes, send: Callable[[bytes], Awaitable[None]], *, in_segments: bool) -> None:
    """Send the data in one write, or in small segments, mostly byte by byte."""
    size = max(1, len(data) // MAX_SEGMENTS) if in_segments else len(data)
    for start in range(0, len(data), size):
        await send(data[start : start + size])
        await asyncio.sleep(0)  # yields to the event loop, so that the peer reads the segment


# Requests.

_HOST = re.compile(rb"^(host:[ \t]*)(\S+)", re.IGNORECASE | re.MULTILINE)
_NAMES_VERSION = re.compile(rb"[A-Za-z]+/[0-9]\S*\r?\n")
_ABSOLUTE = re.compile(rb"^(\S+ https?://)[^/?#@\s]+")
_FRAMED = re.compile(rb"^(?:content-length|transfer-encoding):[ \t]*(.*?)[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)
_LAST_CHUNK = re.compile(rb"(?:^|\r\n)0+\r\n(?:[^\r\n]+\r\n)*\r\n")


def with_accepted_host(data: bytes) -> bytes:
    """Return a corpus' requests with a Host that the proxy accepts, so that Host alone does not reject them.

    A head with several different Hosts is unchanged, and so is a target with userinfo.
    """
    result = b""
    while data:
        start = len(data) - len(data.lstrip(b"\r\n"))
        head, blank, rest = data[start:].partition(b"\r\n\r\n")
        size = _body_size(head, rest)
        result += data[:start] + _with_our_host(head + blank) + rest[:size]
        data = rest[size:]
    return result


def _with_our_host(head: bytes) -> bytes:
    head = _ABSOLUTE.sub(rb"\1localhost", head)
    hosts = {match[2] for match in _HOST.finditer(head)}
    if not hosts:
        return _NAMES_VERSION.sub(rb"\g<0>Host: localhost\r\n", head, count=1)
    return _HOST.sub(rb"\1localhost", head) if len(hosts) == 1 else head


def _body_size(head: bytes, rest: bytes) -> int:
    """Return how much of `rest` is this request's body; all of it if its framing is ambiguous."""
    framing: list[bytes] = _FRAMED.findall(head)
    if not framing:
        return 0
    if len(framing) == 1 and framing[0].isdigit():
        return int(framing[0])
    last = _LAST_CHUNK.search(rest)
    return last.end() if last is not None and len(framing) == 1 else len(rest)


async def responses_of(client: Client, method: str) -> list[RawResponse]:
    """Return the responses up to one with `Connection: close`, or up to the end of the connection."""
    responses: list[RawResponse] = []
    with suppress(OSError):  # a reset also ends the connection
        try:
            while not responses or responses[-1].get("connection") != "close":
                responses.append(await client.read_response(method))
        except asyncio.IncompleteReadError as exc:
            if exc.partial:
                raise
    return responses


async def exchange(address: str, data: bytes, *, in_segments: bool) -> list[RawResponse]:
    """Send raw bytes on a new connection; return the responses when the proxy has closed it."""
    method = data.lstrip().split(b" ")[0].decode("latin-1")
    async with asyncio.timeout(EXCHANGE_TIMEOUT), connect(address) as client:
        reading = asyncio.create_task(responses_of(client, method))
        with suppress(OSError):  # the proxy may close before it has received all
            await deliver(data, client.send, in_segments=in_segments)
        responses = await reading
        with suppress(OSError):
            client.writer.write_eof()  # half-close: no further response may follow
        return responses + await responses_of(client, method)


def allowed(case: Case) -> int:
    """Return how many complete requests of a case may reach Amazon."""
    if case.messages:
        return sum(message.is_whole for message in case.messages)
    if case.is_rejected:
        return int(case.name in POLICY)
    return PIPELINED.get(case.name, 1)


def may_be_truncated(case: Case) -> bool:
    """Return whether a case ends, or becomes invalid, inside a body: its start may have been forwarded."""
    if case.messages:
        return any(message.has_head and not message.is_whole for message in case.messages)
    return not case.is_rejected or case.name.startswith(IN_THE_BODY)


def matches(request: Received, message: Message) -> bool:
    """Return whether a received request is the one that llhttp read."""
    target = re.sub(r"^https?://[^/?]*", "", message.url)
    target = target if target.startswith("/") else f"/{target}"
    return (request.method, request.target, request.body) == (message.method, target, message.body)


@pytest.mark.parametrize("case", items([*gunicorn("invalid"), *gunicorn("valid"), *llhttp("request")]))
async def test_only_canonical_requests_reach_amazon_and_no_invalid_one(
    proxy: RunningProxy, fake_upstream: Witness, case: Case
) -> None:
    async def script(request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(http_response("200 OK", x_line=request.line))
        await writer.drain()

    fake_upstream.script = script
    max_received = 0
    for in_segments in (False, True):
        fake_upstream.received.clear()
        responses = await exchange(proxy.addresses[0], with_accepted_host(case.data), in_segments=in_segments)
        arrived = fake_upstream.received.copy()
        good = await call(proxy.addresses[0], "GET", PATH)
        assert (good.status, good.get("x-line")) == (200, f"GET {PATH} HTTP/1.1")

        assert not fake_upstream.not_canonical
        assert len(arrived) <= allowed(case)
        assert may_be_truncated(case) or not fake_upstream.truncated
        if case.messages:
            read = iter(case.messages)
            assert all(any(matches(request, message) for message in read) for request in arrived)

        passed = [got for got in responses if got.error is None]
        assert [got.get("x-line") for got in passed] == [request.line for request in arrived]
        assert all(got.status == 200 for got in passed)
        assert all(400 <= got.status <= 505 for got in responses if got.error is not None)
        max_received = max(max_received, len(arrived))

    if (case.name in POLICY or not case.is_rejected) and case.name not in SAME_SEGMENT:
        is_rejected_here = any(case.name in names for names in REJECTED_HERE.values())
        assert max_received == (0 if is_rejected_here else allowed(case))


# Responses.


@pytest.mark.parametrize("case", items(llhttp("response")))
async def test_a_response_is_forwarded_complete_or_visibly_truncated(
    proxy: RunningProxy, fake_upstream: Witness, case: Case
) -> None:
    message = next((each for each in case.messages if each.status == 101 or not 100 <= each.status < 200), Message())
    has_explicit_end = message.is_whole or case.is_rejected
    for in_segments in (False, True):
        for closes in (False, True) if has_explicit_end else (True,):
            fake_upstream.received.clear()
            fake_upstream.script = respond_once_with(case.data, fake_upstream, in_segments=in_segments, closes=closes)
            first = await call_if_answered(proxy.addresses[0])
            second = await call_if_answered(proxy.addresses[0])
            assert is_valid_result(first, message), (in_segments, closes, first)
            if not case.is_rejected:
                is_own_error = first is not None and first.error is not None
                assert is_own_error == any(case.name in names for names in NOT_FORWARDED.values())
            assert second is not None
            assert (second.status, second.reason, second.body, second.complete) == (200, "OK", b"own", True)


def respond_once_with(data: bytes, fake_upstream: Witness, *, in_segments: bool, closes: bool) -> Script:
    """Return a script that sends these bytes to the first request and a valid response to every other."""

    async def script(request: Received, writer: asyncio.StreamWriter) -> None:
        async def send(piece: bytes) -> None:
            writer.write(piece)
            await writer.drain()

        if request is not fake_upstream.received[0]:
            await send(http_response("200 OK", b"own"))
            return
        await deliver(data, send, in_segments=in_segments)
        if closes:
            writer.close()

    return script


async def call_if_answered(address: str) -> RawResponse | None:
    """Send one request that is never retried; return None if the connection ended without a response."""
    try:
        async with asyncio.timeout(EXCHANGE_TIMEOUT):
            return await call(address, "POST", PATH, b"{}", x_sp_retry="off")
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def is_valid_result(got: RawResponse | None, message: Message) -> bool:
    """Return whether the app can rely on the result: Amazon's complete response, or a recognisable failure.

    The proxy may reject more than llhttp does. An error after a complete response does not make that response wrong.
    """
    if got is None or got.error is not None:
        return got is None or got.status in {502, 504}
    if not got.complete:
        return not message.is_whole
    is_whole = message.is_whole or (message.has_head and not message.is_framed)
    return is_whole and message.status != 101 and (got.status, got.body) == (message.status, message.body)
