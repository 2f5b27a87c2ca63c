"""Threats 19 to 26: a message that two parsers could read differently is rejected, not repaired."""

from contextlib import suppress

import pytest

from tests.security.harness import SELLERS, Harness, ReceivedRequest, Stream, http_response, request, until

HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: localhost\r\n\r\n"
FEEDS = b"/feeds/2021-06-30/feeds"


def post(*fields: bytes, body: bytes = b"", version: bytes = b"HTTP/1.1") -> bytes:
    """Return a POST without framing fields of its own."""
    return b"\r\n".join([b"POST " + FEEDS + b" " + version, b"Host: localhost", *fields, b"", body])


def assert_rejected(harness: Harness, data: bytes, *statuses: int) -> None:
    """Send; expect one rejection and a closed connection, and nothing forwarded, including what follows."""
    got = harness.send(data + HIDDEN)
    assert len(got) == 1
    assert got[0].status in (statuses or (400,))
    assert got[0].error
    assert not [one for one in harness.api.received if one.target == "/hidden"]
    # A body may be found malformed while it is forwarded; it is then never completed.
    assert not [one for one in harness.api.received if one.body]


BOTH = [
    (b"Content-Length: 5", b"Transfer-Encoding: chunked"),
    (b"Transfer-Encoding: chunked", b"Content-Length: 5"),
    (b"Content-Length: 0", b"Transfer-Encoding: chunked"),
    (b"content-length: 5", b"transfer-encoding: identity"),
    (b"Content-Length: 5", b"Transfer-Encoding: x"),
    (b"Content-Length: 5", b"Transfer-Encoding:"),
]


@pytest.mark.parametrize("fields", BOTH, ids=repr)
def test_19_both_framings_are_rejected(harness: Harness, fields: tuple[bytes, ...]) -> None:
    assert_rejected(harness, post(*fields, body=b"0\r\n\r\n"))


CODINGS = [
    b"Transfer-Encoding: gzip, chunked",
    b"Transfer-Encoding: chunked, gzip",
    b"Transfer-Encoding: identity",
    b"Transfer-Encoding: gzip",
    b"Transfer-Encoding: chunked, chunked",
    b"Transfer-Encoding: xchunked",
    b"Transfer-Encoding: chunkedx",
    b"Transfer-Encoding: chunked;q=1",
    b"Transfer-Encoding: 'chunked'",
    b'Transfer-Encoding: "chunked"',
    b"Transfer-Encoding: chunked,",
    b"Transfer-Encoding: ,chunked",
    b"Transfer-Encoding: chunked\x0b",
    b"Transfer-Encoding: \x0bchunked",
    b"Transfer-Encoding: chunked\x00",
    b"Transfer-Encoding: chun\xeb",
    b"Transfer-Encoding:\n chunked",
    b"Transfer-Encoding: \r\n chunked",
    b"Transfer-Encoding : chunked",
    b"Transfer-Encoding\t: chunked",
    b" Transfer-Encoding: chunked",
    b"X: y\n Transfer-Encoding: chunked",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
    b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
    b"Transfer-Encoding: cow\r\nTransfer-Encoding: chunked",
    b"Transfer-Encoding: chunk",
    b"Transfer-Encoding: \xefchunked",
    b"Transfer-Encoding: chunked\x0c",
    b"Transfer-Encoding: \x85chunked",
    b"Transfer-Encoding: chunked\xa0",
    b"Transfer-Encoding: chunked\r",
    b"\x00Transfer-Encoding: chunked",
    b"Transfer\x00-Encoding: chunked",
    b"Transfer-Encoding: c\x08hunked",
    b"Transfer-Encoding:",
    b"Transfer-Encoding: 0",
]


@pytest.mark.parametrize("fields", CODINGS, ids=repr)
def test_20_any_transfer_coding_but_chunked_is_rejected(harness: Harness, fields: bytes) -> None:
    assert_rejected(harness, post(fields, body=b"5\r\nhello\r\n0\r\n\r\n"), 400, 501)


@pytest.mark.parametrize("name", [b"Transfer_Encoding", b"Content_Length", b"X-Transfer-Encoding"])
def test_20_a_name_that_resembles_a_framing_field_frames_nothing(harness: Harness, name: bytes) -> None:
    got = harness.send(post(name + b": 5", b"Content-Length: 2", b"Connection: close", body=b"{}"))
    assert [one.status for one in got] == [200]
    assert [one.body for one in harness.api.received] == [b"{}"]


@pytest.mark.parametrize("coding", [b"chunked", b"Chunked", b"CHUNKED", b" chunked "])
def test_20_chunked_is_accepted(harness: Harness, coding: bytes) -> None:
    fields = (b"Transfer-Encoding:" + coding, b"Connection: close")
    got = harness.send(post(*fields, body=b"5\r\nhello\r\n1\r\n!\r\n0\r\n\r\n"))
    assert [one.status for one in got] == [200]
    assert [one.body for one in harness.api.received] == [b"hello!"]


def test_20_chunked_in_http_1_0_is_rejected(harness: Harness) -> None:
    for more in ((), (b"Connection: keep-alive",)):
        data = post(b"Transfer-Encoding: chunked", *more, body=b"2\r\n{}\r\n0\r\n\r\n", version=b"HTTP/1.0")
        assert_rejected(harness, data)
        (got,) = harness.send(data)
        assert got.error == "MalformedRequest"
        assert not harness.api.received


LENGTHS = [
    b"Content-Length: +2",
    b"Content-Length: -2",
    b"Content-Length: 2x",
    b"Content-Length: 0x2",
    b"Content-Length: 2 2",
    b"Content-Length: 2,2",
    b"Content-Length: 2, 2",
    b"Content-Length: 2.0",
    b"Content-Length: 2e0",
    b"Content-Length:",
    b"Content-Length: 1_0",
    b"Content-Length: \xd9\xa2",
    b"Content-Length: 2\r\nContent-Length: 3",
    b"Content-Length: 2\r\nContent-Length: 2",
    b"Content-Length : 2",
    b"Content-Length: 2\x00",
    b"Content-Length: \x0b2",
    b"Content-Length: 2\x0c",
    b"Content-Length: " + b"9" * 30,
    b"Content-Length: " + b"9" * 5000,
    b"Content-Length: '2'",
    b"Content-Length: 18446744073709551618",
    b"Content-Length: two",
    b" Content-Length: 2",
    b"Content-Length\n: 2",
    b"Content-Length: 2;a",
    b"Content-Length: \xb2",
    b"Content-Length: 2\r",
    b"Content-Length: 2 \r\n 3",
]


@pytest.mark.parametrize("fields", LENGTHS, ids=repr)
def test_21_a_length_is_digits_and_given_once(harness: Harness, fields: bytes) -> None:
    assert_rejected(harness, post(fields, body=b"{}"), 400, 431)


@pytest.mark.parametrize("length", [b"2", b"02", b"0002", b" 2", b"2 ", b"\t2\t"])
def test_21_a_valid_length_is_accepted_and_forwarded_canonically(harness: Harness, length: bytes) -> None:
    got = harness.send(post(b"Content-Length:" + length, b"Connection: close", body=b"{}"))
    assert [one.status for one in got] == [200]
    assert [one.body for one in harness.api.received] == [b"{}"]


CHUNKS = [
    b"2\n{}\n0\n\n",
    b"2\r\n{}\n0\r\n\r\n",
    b"2\n{}\r\n0\r\n\r\n",
    b"+2\r\n{}\r\n0\r\n\r\n",
    b"-2\r\n{}\r\n0\r\n\r\n",
    b"0x2\r\n{}\r\n0\r\n\r\n",
    b"2 \r\n{}\r\n0\r\n\r\n",
    b" 2\r\n{}\r\n0\r\n\r\n",
    b"2_\r\n{}\r\n0\r\n\r\n",
    b"\r\n{}\r\n0\r\n\r\n",
    b"g\r\n{}\r\n0\r\n\r\n",
    b"2\r\n{}0\r\n\r\n",
    b"2\r\n{}x\r\n0\r\n\r\n",
    b"2\r\r\n{}\r\n0\r\n\r\n",
    b"2;a\n{}\r\n0\r\n\r\n",
    b"2;a=\x00\r\n{}\r\n0\r\n\r\n",
    b"1" + b"0" * 16 + b"2\r\n{}\r\n0\r\n\r\n",
    b"FFFFFFFFFFFFFFFFF\r\n{}\r\n0\r\n\r\n",
    b"2\r\n{}\r\n0\r\nX\r\n\r\n",
    b"2\r\n{}\r\n0\r\n X: y\r\n\r\n",
    b"2\r\n{}\r\n00x\r\n\r\n",
    b"2,2\r\n{}\r\n0\r\n\r\n",
    b"2\r\n{}\r\n0\r\nX : y\r\n\r\n",
    b"2;a\r\n\r{}\r\n0\r\n\r\n",
    b"\xd9\xa2\r\n{}\r\n0\r\n\r\n",
    b"2\r\n{}\r\n0\r\nX: a\x00\r\n\r\n",
    b"2;\x7f\r\n{}\r\n0\r\n\r\n",
]


@pytest.mark.parametrize("chunks", CHUNKS, ids=lambda chunks: repr(chunks[:40]))
def test_22_malformed_chunks_never_become_a_request(harness: Harness, chunks: bytes) -> None:
    got = harness.send(post(b"Transfer-Encoding: chunked", body=chunks + HIDDEN))
    assert len(got) <= 1
    assert not got or got[0].status in {400, 408}
    assert not [one for one in harness.api.received if one.body or one.target == "/hidden"]


@pytest.mark.parametrize(
    "chunks", [b"2;x=y\r\n{}\r\n0\r\n\r\n", b'2;x="y"\r\n{}\r\n0;z\r\n\r\n', b"002\r\n{}\r\n000\r\n\r\n"]
)
def test_22_chunk_extensions_are_not_forwarded(harness: Harness, chunks: bytes) -> None:
    got = harness.send(post(b"Transfer-Encoding: chunked", b"Connection: close", body=chunks))
    assert [one.status for one in got] == [200]
    assert [one.body for one in harness.api.received] == [b"{}"]


TRAILERS = [
    b"Host: evil.test",
    b"Content-Length: 5",
    b"Transfer-Encoding: chunked",
    b"x-amz-access-token: mine",
    b"Authorization: mine",
    b"x-sp-account: zenith",
    b"Connection: keep-alive",
    b"X-Mine: mine",
    b"Cookie: mine",
    b"x-sp-key: mine",
    b"Expect: 100-continue",
    b"Trailer: x",
]


@pytest.mark.parametrize("trailer", TRAILERS, ids=repr)
def test_23_trailers_are_dropped(harness: Harness, trailer: bytes) -> None:
    chunks = b"2\r\n{}\r\n0\r\n" + trailer + b"\r\n\r\n"
    got = harness.send(post(b"Transfer-Encoding: chunked", b"Connection: close", body=chunks))
    assert len(got) == 1
    assert got[0].status in {200, 400}
    whole = [one for one in harness.api.received if one.body]
    assert len(whole) == (1 if got[0].status == 200 else 0)
    for one in whole:
        assert not [value for _, value in one.fields if "mine" in value or "evil" in value]
        assert (one.get("x-amz-access-token") or "").startswith("Atza|distinctive-token-of-acme")


def test_23_endless_trailers_are_cut_off(harness: Harness) -> None:
    chunks = b"2\r\n{}\r\n0\r\n" + b"x: y\r\n" * 50_000
    got = harness.send(post(b"Transfer-Encoding: chunked", b"Connection: close", body=chunks))
    assert [one.status for one in got] in ([400], [431])
    assert not [one for one in harness.api.received if one.body]


BAD_HEADS = [
    b"x: a\r\n folded",
    b"x: a\r\n\tfolded",
    b" x: y",
    b"\tx: y",
    b"x : y",
    b"x\t: y",
    b": y",
    b":",
    b"x",
    b"x y: z",
    b"x: a\x00b",
    b"x: a\rb",
    b"x: a\nb: c",
    b"x\x00: y",
    b"x\x01: y",
    b"x: \x01",
    b"x: \x7f",
    b"x: \x08",
    b"\x00",
    b"x(y): z",
    b"x@y: z",
    b"x\xe4: y",
    b"x=y: z",
    b"x;y: z",
    b'"x": y',
    b"x/y: z",
    b"x[y]: z",
    b"{x}: y",
    b"x: y\r\n\r\r\n",
    b"x\\y: z",
    b"x,y: z",
    b"x?: y",
    b"\rx: y",
    b"\nx: y",
    b"x\r: y",
    b"x\n: y",
    b"x:\x0b",
]


@pytest.mark.parametrize("field", BAD_HEADS, ids=repr)
def test_24_a_malformed_field_is_rejected(harness: Harness, field: bytes) -> None:
    assert_rejected(harness, b"GET " + SELLERS.encode() + b" HTTP/1.1\r\nHost: localhost\r\n" + field + b"\r\n\r\n")


BARE = [
    b"GET /a HTTP/1.1\nHost: localhost\n\n",
    b"GET /a HTTP/1.1\r\nHost: localhost\n\r\n",
    b"GET /a HTTP/1.1\nHost: localhost\r\n\r\n",
    b"GET /a HTTP/1.1\r\nHost: localhost\r\n\n",
    b"GET /a HTTP/1.1\rHost: localhost\r\r",
    b"GET /a HTTP/1.1\r\nHost: localhost\r\r\n",
    b"GET /a HTTP/1.1\r\rHost: localhost\r\n\r\n",
]


@pytest.mark.parametrize("head", BARE, ids=repr)
def test_24_a_line_ends_with_both_cr_and_lf(harness: Harness, head: bytes) -> None:
    assert_rejected(harness, head, 400, 408)


LINES = [
    b"GET  /a HTTP/1.1",
    b"GET /a  HTTP/1.1",
    b" GET /a HTTP/1.1",
    b"GET /a HTTP/1.1 ",
    b"GET\t/a HTTP/1.1",
    b"GET /a\tHTTP/1.1",
    b"GET /a",
    b"GET",
    b"/a HTTP/1.1",
    b"GET /a http/1.1",
    b"GET /a HTTP/1.1x",
    b"GET /a HTTP/1",
    b"GET /a HTTP/01.1",
    b"GET /a HTTP/1.01",
    b"GET /a HTTP 1.1",
    b"GET /a HTTPS/1.1",
    b"GET /a HTTP/1,1",
    b"GET /a HTTP/-1.1",
    b"GET /a HTTP/\xd9\xa1.1",
    b"GET /a b HTTP/1.1",
    b"GET\x00 /a HTTP/1.1",
    b"GET /a HTTP/1.1\x00",
    b"GET /a ICE/1.1",
    b"GET /a RTSP/1.0",
    b"\x00GET /a HTTP/1.1",
    b"GET\x0b/a HTTP/1.1",
    b"GET /a \x0bHTTP/1.1",
    b"GET\xa0/a HTTP/1.1",
]


@pytest.mark.parametrize("line", LINES, ids=repr)
def test_24_25_a_malformed_request_line_is_rejected(harness: Harness, line: bytes) -> None:
    assert_rejected(harness, line + b"\r\nHost: localhost\r\n\r\n", 400, 505)


VERSIONS = [b"HTTP/2.0", b"HTTP/0.9", b"HTTP/1.2", b"HTTP/1.10", b"HTTP/3.0", b"HTTP/9.9", b"HTTP/1.9"]


@pytest.mark.parametrize("version", VERSIONS, ids=repr)
def test_25_other_versions_are_rejected_in_http_1_1(harness: Harness, version: bytes) -> None:
    with harness.client() as stream:
        stream.send(b"GET /a " + version + b"\r\nHost: localhost\r\n\r\n")
        got = stream.rest()
    assert got.startswith((b"HTTP/1.1 505 ", b"HTTP/1.1 400 "))
    assert not harness.api.received


FOREIGN = [
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00" * 9,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 500,
    b"EHLO localhost\r\nMAIL FROM: <a@b>\r\n",
    b"SSH-2.0-OpenSSH_9\r\n",
    b"\x00" * 200,
    b"\x80\x9e\x01\x03\x01" * 20,
    b"*1\r\n$4\r\nPING\r\n",
    b"GET /a\r\n",
    b"\r\n\r\n\r\n",
    b"{}\r\n\r\n",
    b"<?xml?>\r\n\r\n",
]


@pytest.mark.parametrize("data", FOREIGN, ids=lambda data: repr(data[:20]))
def test_25_other_protocols_are_rejected_and_closed(harness: Harness, data: bytes) -> None:
    with harness.client() as stream:
        stream.send(data)
        got = stream.rest()
    assert got == b"" or got.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 505 ", b"HTTP/1.1 408 "))
    assert not harness.api.received


@pytest.mark.parametrize("upgrade", [b"h2c", b"websocket", b"TLS/1.0", b"HTTP/2.0", b"x, h2c"])
def test_25_no_protocol_is_switched(harness: Harness, upgrade: bytes) -> None:
    fields = (
        b"Connection: Upgrade, HTTP2-Settings, close",
        b"Upgrade: " + upgrade,
        b"HTTP2-Settings: AAMAAABkAAQAAP__",
    )
    got = harness.send(request("/x", *fields))
    assert [one.status for one in got] == [200]
    (received,) = harness.api.received
    assert {name.lower() for name, _ in received.fields} == {"host", "x-amz-access-token", "x-amz-date", "user-agent"}


def test_25_bytes_after_an_upgrade_request_are_parsed_as_http(harness: Harness) -> None:
    first = request("/first", b"Connection: Upgrade", b"Upgrade: h2c")
    got = harness.send(first + request("/second"))
    targets = [one.target for one in harness.api.received]
    assert targets in (["/first"], ["/first", "/second"])  # the connection may end with the first
    assert [one.status for one in got] == [200] * len(targets)


REJECTED_WITH_A_BODY = [
    request("/x", method="OPTIONS", body=HIDDEN),
    request("/a/../b", method="POST", body=HIDDEN),
    request("/x", b"Host: evil.test", method="POST", body=HIDDEN),
    request("/x", b"Origin: http://evil.test", method="POST", body=HIDDEN),
    request("/x", b"x-sp-account: nobody", method="POST", body=HIDDEN),
    request("/x", method="GET", body=HIDDEN),
    request("/x", b"x-sp-max-wait: soon", method="POST", body=HIDDEN),
]


@pytest.mark.parametrize("data", REJECTED_WITH_A_BODY, ids=lambda data: repr(data[:30]))
def test_26_the_body_of_a_rejected_request_is_not_parsed_as_a_request(harness: Harness, data: bytes) -> None:
    got = harness.send(data.replace(b"Connection: close", b"Connection: keep-alive"))
    assert len(got) == 1
    assert got[0].status in {400, 403, 405, 421}
    assert not harness.api.received


def test_26_pipelined_requests_get_responses_in_order(harness: Harness) -> None:
    ask = [request(f"/number/{number}", b"Connection: keep-alive") for number in range(20)]
    got = harness.send(b"".join(ask) + request("/number/20"))
    assert [one.get("x-amzn-requestid") for one in got] == [f"for-/number/{number}" for number in range(21)]


def test_26_a_body_is_exactly_as_long_as_its_content_length(harness: Harness) -> None:
    got = harness.send(request(FEEDS, b"Connection: keep-alive", method="POST", body=b"{}") + request("/next"))
    assert [one.status for one in got] == [200, 200]
    assert [(one.target, one.body) for one in harness.api.received] == [(FEEDS.decode(), b"{}"), ("/next", b"")]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_body_on_get_or_head_is_rejected(harness: Harness, method: str) -> None:
    assert_rejected(harness, request("/x", method=method, body=b"{}"))
    assert_rejected(harness, request("/x", b"Transfer-Encoding: chunked", method=method) + b"2\r\n{}\r\n0\r\n\r\n")


@pytest.mark.parametrize(
    "second", [b"Content-Length: 2\r\n\r\n{}", b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"]
)
def test_23_a_trailer_becomes_no_field_of_the_next_pipelined_request(harness: Harness, second: bytes) -> None:
    def script(stream: Stream, received: ReceivedRequest) -> None:
        harness.api.body_of(stream, received)
        stream.send(http_response())

    harness.api.scripts["/early/first"] = script  # /early/ requests are recorded before their body is received
    head = b"POST /early/first HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n"
    with harness.client() as stream:
        stream.send(head)
        until(lambda: bool(harness.api.received), "nothing arrives")
        stream.send(b"0\r\nx-leaked: 1\r\n\r\nPOST /second HTTP/1.1\r\nHost: localhost\r\n" + second)
        stream.rest()
    assert [one.target for one in harness.api.received] == ["/early/first"]


def test_23_a_trailer_in_two_segments_becomes_no_field_of_the_next_request(harness: Harness) -> None:
    def script(stream: Stream, received: ReceivedRequest) -> None:
        harness.api.body_of(stream, received)
        stream.send(http_response())

    harness.api.scripts["/early/first"] = script  # /early/ requests are recorded before their body is received
    head = b"POST /early/first HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with harness.client() as stream:
        stream.send(head + b"2\r\n{}\r\n0\r\nx-leaked: 1")
        until(lambda: bool(harness.api.received), "nothing arrives")
        stream.send(b"0\r\n\r\n")  # alone, this would end a body without a trailer section
        stream.until(b'{"payload":[]}')
        with suppress(ConnectionError):
            stream.send(request("/second"))
        stream.rest()
    assert not [one for one in harness.api.received if one.get("x-leaked") is not None]


def test_23_a_last_chunk_in_its_own_segment_does_not_end_the_connection(harness: Harness) -> None:
    def script(stream: Stream, received: ReceivedRequest) -> None:
        harness.api.body_of(stream, received)
        stream.send(http_response())

    harness.api.scripts["/early/first"] = script
    with harness.client() as stream:
        stream.send(b"POST /early/first HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n")
        until(lambda: bool(harness.api.received), "nothing arrives")
        stream.send(b"0\r\n\r\n")
        stream.until(b'{"payload":[]}')
        stream.send(request("/second"))
        stream.rest()
    assert [one.target for one in harness.api.received] == ["/early/first", "/second"]
