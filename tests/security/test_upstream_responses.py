"""Threats 27 and 30 to 38: no response of the upstream, whoever sends it, does harm.

Each response is sent as bytes. Afterwards, other requests must get their own responses.
"""

import gzip
import json
import socket
import ssl
import threading
import time
import warnings
from pathlib import Path

import pytest

from tests.security.harness import (
    SELLERS,
    TIMEOUT,
    Harness,
    ReceivedRequest,
    Server,
    Stream,
    http_response,
    request,
)
from tests.support.certificates import Authority
from tests.support.raw_client import RawResponse

OK = b"HTTP/1.1 200 OK\r\n"


def respond_with(
    harness: Harness, data: bytes, *, end: str = "close", method: str = "GET", target: str = "/played"
) -> list[RawResponse]:
    """Let the upstream send these bytes and then close, reset or keep the connection; return the responses."""

    def script(stream: Stream, _: ReceivedRequest) -> None:
        stream.send(data)
        if end == "reset":
            stream.reset()
        elif end == "close":
            stream.close()

    harness.api.scripts[target] = script
    body = b"{}" if method in {"POST", "PUT", "PATCH"} else None
    return harness.send(request(target, method=method, body=body), (method,))


def assert_later_requests_work(harness: Harness) -> None:
    """Check that later requests get responses of their own."""
    for number in range(3):
        (got,) = harness.send(request(f"/after/{number}"))
        assert (got.status, got.get("x-amzn-requestid")) == (200, f"for-/after/{number}")


MALFORMED = [
    b"",
    b"HTTP/1.1 200",
    b"HTTP/1.1 200 OK\r\n",
    b"garbage\r\n\r\n",
    b"<html></html>",
    b"\x00\x01\x02\x03\r\n\r\n",
    b"SSH-2.0-x\r\n",
    b"220 mail ESMTP\r\n",
    b"\x15\x03\x01\x00\x02\x02\x28",
    b"HTTP/2.0 200 OK\r\ncontent-length: 2\r\n\r\n{}",
    b"HTTP/0.9 200 OK\r\n\r\n",
    b"HTTP/1.2 200 OK\r\ncontent-length: 2\r\n\r\n{}",
    b"http/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
    b"ICY 200 OK\r\ncontent-length: 2\r\n\r\n{}",
    b"HTTP/1.1 20 OK\r\ncontent-length: 2\r\n\r\n{}",
    b"HTTP/1.1 2000 OK\r\ncontent-length: 2\r\n\r\n{}",
    b"HTTP/1.1 099 OK\r\ncontent-length: 2\r\n\r\n{}",
    b"HTTP/1.1 -20 OK\r\ncontent-length: 2\r\n\r\n{}",
    b"HTTP/1.1 abc OK\r\ncontent-length: 2\r\n\r\n{}",
    b"HTTP/1.1 200 O\x00K\r\ncontent-length: 2\r\n\r\n{}",
    b"HTTP/1.1 200 O\rK\r\ncontent-length: 2\r\n\r\n{}",
    b"HTTP/1.1\t200 OK\r\ncontent-length: 2\r\n\r\n{}",
    b" HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
    b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n\x81\x05hello",
    b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + OK + b"content-length: 2\r\n\r\n{}",
    OK + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}",
    OK + b"content-length: 2\r\ncontent-length: 2\r\n\r\n{}",
    OK + b"content-length: 2, 2\r\n\r\n{}",
    OK + b"content-length: +2\r\n\r\n{}",
    OK + b"content-length: -2\r\n\r\n{}",
    OK + b"content-length: 0x2\r\n\r\n{}",
    OK + b"content-length: two\r\n\r\n{}",
    OK + b"content-length: 99999999999999999999\r\n\r\n{}",
    OK + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    OK + b"transfer-encoding: chunked\r\ncontent-length: 2\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    OK + b"transfer-encoding: gzip, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    OK + b"transfer-encoding: chunked, gzip\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    OK + b"transfer-encoding: chunked, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    OK + b"transfer-encoding: identity\r\n\r\n{}",
    OK + b"transfer-encoding: xchunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    OK + b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    OK + b"transfer-encoding : chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    OK + b"transfer-encoding:\r\n chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    b"HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    OK + b"x: a\r\n folded\r\ncontent-length: 2\r\n\r\n{}",
    OK + b"x: a\x00b\r\ncontent-length: 2\r\n\r\n{}",
    OK + b"x: a\rb\r\ncontent-length: 2\r\n\r\n{}",
    OK + b"x: a\nset-cookie: b\r\ncontent-length: 2\r\n\r\n{}",
    OK + b"x y: z\r\ncontent-length: 2\r\n\r\n{}",
    OK + b"x : z\r\ncontent-length: 2\r\n\r\n{}",
    OK + b": z\r\ncontent-length: 2\r\n\r\n{}",
    OK + b"x\r\ncontent-length: 2\r\n\r\n{}",
    OK + b" x: z\r\ncontent-length: 2\r\n\r\n{}",
    OK + b"x\x00: z\r\ncontent-length: 2\r\n\r\n{}",
    OK + b"x: \x01\r\ncontent-length: 2\r\n\r\n{}",
    OK + b"x: \x7f\r\ncontent-length: 2\r\n\r\n{}",
    b"HTTP/1.1 200 OK\ncontent-length: 2\n\n{}",
    b"HTTP/1.1 200 OK\r\ncontent-length: 2\n\r\n{}",
    b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\n{}",
    OK + b"x: " + b"a" * 1_100_000 + b"\r\ncontent-length: 2\r\n\r\n{}",
    OK + b"x: y\r\n" * 100_000 + b"content-length: 2\r\n\r\n{}",
    b"HTTP/1.1 200 " + b"a" * 1_100_000 + b"\r\ncontent-length: 2\r\n\r\n{}",
]


@pytest.mark.parametrize("data", MALFORMED, ids=lambda data: repr(data[:70]))
@pytest.mark.parametrize("end", ["close", "stay"])
def test_27_a_malformed_response_is_a_502(harness: Harness, data: bytes, end: str) -> None:
    got = respond_with(harness, data, end=end)
    assert len(got) == 1
    assert got[0].status in {502, 504}, got[0]
    assert got[0].error in {"UpstreamBroken", "UpstreamTimeout"}
    assert b"HTTP/" not in got[0].body
    assert_later_requests_work(harness)


CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n"
CUT = [
    OK + b"content-length: 20\r\n\r\n{}",
    OK + b"content-length: 20\r\n\r\n",
    CHUNKED,
    CHUNKED + b"2\r\n{}",
    CHUNKED + b"2\r\n{}\r\n",
    CHUNKED + b"2\r\n{}\r\n0\r\n",
    CHUNKED + b"5\r\n{}",
    CHUNKED + b"2\r\n{}x\r\n0\r\n\r\n",
    CHUNKED + b"2\r\n{}\r\nx\r\n\r\n",
    CHUNKED + b"-2\r\n{}\r\n0\r\n\r\n",
    CHUNKED + b"0x2\r\n{}\r\n0\r\n\r\n",
    CHUNKED + b"2\n{}\n0\n\n",
    CHUNKED + b"2\r\n{}\n0\r\n\r\n",
    CHUNKED + b"2 \r\n{}\r\n0\r\n\r\n",
    CHUNKED + b"FFFFFFFFFFFFFFFFF\r\n{}\r\n0\r\n\r\n",
    CHUNKED + b"2\r\n{}\r\n0\r\n" + b"x: y\r\n" * 50_000 + b"\r\n",
]


@pytest.mark.parametrize("data", CUT, ids=lambda data: repr(data[:80]))
@pytest.mark.parametrize("end", ["close", "reset"])
def test_27_a_truncated_response_is_visibly_truncated(harness: Harness, data: bytes, end: str) -> None:
    got = respond_with(harness, data, end=end)
    assert len(got) <= 1
    if got:
        one = got[0]
        is_whole_error = one.status == 502 and one.error == "UpstreamBroken"
        assert is_whole_error or not one.complete
    assert_later_requests_work(harness)


SURPLUS = [
    http_response(b"{}") + b"x",
    http_response(b"{}") + http_response(b"stolen"),
    http_response(b"{}") + b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nstolen",
    http_response(b"{}") * 2,
    http_response(b"{}") + b"\r\n",
    http_response(b"{}") + b"HTTP/1.1 100 Continue\r\n\r\n",
    CHUNKED + b"2\r\n{}\r\n0\r\n\r\n" + b"x",
    CHUNKED + b"2\r\n{}\r\n0\r\n\r\n" + http_response(b"stolen"),
    b"HTTP/1.1 204 No Content\r\n\r\n" + http_response(b"stolen"),
    b"HTTP/1.1 204 No Content\r\ncontent-length: 6\r\n\r\nstolen",
    b"HTTP/1.1 204 No Content\r\ntransfer-encoding: chunked\r\n\r\n6\r\nstolen\r\n0\r\n\r\n",
    b"HTTP/1.1 304 Not Modified\r\ncontent-length: 6\r\n\r\nstolen",
    b"HTTP/1.1 304 Not Modified\r\n\r\nstolen",
]


@pytest.mark.parametrize("data", SURPLUS, ids=lambda data: repr(data[:90]))
@pytest.mark.parametrize("end", ["stay", "close"])
def test_27_bytes_after_a_response_are_no_response_to_another_request(harness: Harness, data: bytes, end: str) -> None:
    got = respond_with(harness, data, end=end)
    assert len(got) == 1
    for _ in range(5):
        (other,) = harness.send(request("/other"))
        assert other.get("x-amzn-requestid") == "for-/other"
        assert b"stolen" not in other.body
    assert_later_requests_work(harness)


@pytest.mark.parametrize("surplus", [b"stolen", http_response(b"stolen")[:200]], ids=["text", "answer"])
def test_27_a_body_after_the_response_to_head_is_no_response_to_another_request(
    harness: Harness, surplus: bytes
) -> None:
    got = respond_with(harness, OK + b"content-length: 6\r\n\r\n" + surplus, end="stay", method="HEAD")
    assert [(one.status, one.body) for one in got] in ([(200, b"")], [(502, b"")])
    assert_later_requests_work(harness)


INTERIM = [
    b"HTTP/1.1 100 Continue\r\n\r\n",
    b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n" * 5,
    b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\n",
    b"HTTP/1.1 199 Odd\r\nx: y\r\n\r\n",
]


@pytest.mark.parametrize("interim", INTERIM, ids=lambda data: repr(data[:60]))
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_27_interim_responses_are_not_the_final_response(harness: Harness, interim: bytes, method: str) -> None:
    (got,) = respond_with(harness, interim + http_response(b"final"), end="stay", method=method)
    assert (got.status, got.body) == (200, b"final")
    assert_later_requests_work(harness)


@pytest.mark.parametrize("chunk", [b"2;\r\n", b'2;"\r\n', b"zz\r\n", b"2\r\n{}x", b"-1\r\n"], ids=repr)
def test_27_a_malformed_chunk_after_valid_ones_aborts_the_response_immediately(harness: Harness, chunk: bytes) -> None:
    def script(stream: Stream, _: ReceivedRequest) -> None:
        stream.send(CHUNKED + b"2\r\n{}\r\n")
        forwarded.wait(TIMEOUT)
        stream.send(chunk)

    forwarded = threading.Event()
    harness.api.scripts["/played"] = script
    with harness.client() as stream:
        stream.send(request("/played"))
        stream.until(b"2\r\n{}\r\n")
        began = time.monotonic()
        forwarded.set()
        assert b"0\r\n\r\n" not in stream.rest()
    assert time.monotonic() - began < 1.0, "it waits for data that cannot come"
    assert_later_requests_work(harness)


def test_27_endless_interim_responses_are_cut_off(harness: Harness) -> None:
    def script(stream: Stream, _: ReceivedRequest) -> None:
        while True:  # until the connection is closed
            stream.send(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)

    harness.api.scripts["/endless"] = script
    (got,) = harness.send(request("/endless"))
    assert got.status in {502, 504}
    assert_later_requests_work(harness)


def test_27_endless_header_fields_are_cut_off(harness: Harness) -> None:
    def script(stream: Stream, _: ReceivedRequest) -> None:
        stream.send(OK)
        while True:  # until the connection is closed
            stream.send(b"x-y: z\r\n" * 100)

    harness.api.scripts["/endless"] = script
    (got,) = harness.send(request("/endless"))
    assert got.status in {502, 504}
    assert_later_requests_work(harness)


HOP = [
    b"Connection: x-mine",
    b"Keep-Alive: mine",
    b"Proxy-Authenticate: mine",
    b"Proxy-Connection: mine",
    b"TE: mine",
    b"Trailer: mine",
    b"Upgrade: mine",
    b"x-sp-proxy: mine",
    b"x-sp-proxy-error: mine",
    b"HTTP2-Settings: mine",
    b"X_Mine: mine\r\nConnection: x_mine",
]


@pytest.mark.parametrize("field", HOP, ids=repr)
def test_28_hop_by_hop_fields_do_not_reach_the_app(harness: Harness, field: bytes) -> None:
    (got,) = respond_with(harness, http_response(b"{}", "200 OK", b"x-mine: mine", field, b"x-kept: 1"), end="stay")
    names = {name.lower() for name, value in got.fields if value == "mine"}
    assert names <= {"x-mine"}
    assert ("x-mine" in names) is (b"\r\nConnection" not in b"\r\n" + field)
    assert got.get("x-kept") == "1"


ABSENT = [
    "accept",
    "accept-encoding",
    "content-type",
    "content-length",
    "transfer-encoding",
    "connection",
    "cookie",
    "accept-language",
    "referer",
    "origin",
    "te",
    "authorization",
]


def test_30_no_header_is_added_by_the_http_client(harness: Harness) -> None:
    harness.send(request("/x"))
    (received,) = harness.api.received
    assert [name for name, _ in received.fields if name.lower() in ABSENT] == []
    assert len(received.fields) == 4


def test_30_the_token_endpoint_receives_a_form(tmp_path: Path) -> None:
    with Harness.start(tmp_path) as harness:
        harness.send(request("/x"))
        (context,) = harness.lwa.received
    assert (context.get("content-type") or "").startswith("application/x-www-form-urlencoded")
    assert context.line == b"POST /auth/o2/token HTTP/1.1"
    assert context.get("cookie") is None


KEPT = [
    (b"x-twice: 1", b"x-twice: 2"),
    (b"x-empty:",),
    ("x-utf8: Grüße".encode(),),
    (b"X-CaSe: MiXed",),
    (b"x-comma: a, b,, c",),
    (b"x-tab: a\tb",),
    (b"x-long: " + b"a" * 30_000,),
    (b"accept: */*", b"accept: text/csv"),
    (b"content-language: de",),
    (b'if-match: "a", W/"b"',),
    (b"range: bytes=0-1",),
    (b'x-quotes: "a\\"b"',),
]


@pytest.mark.parametrize("fields", KEPT, ids=lambda fields: repr(fields[0][:40]))
def test_31_request_fields_are_forwarded_unchanged(harness: Harness, fields: tuple[bytes, ...]) -> None:
    assert [one.status for one in harness.send(request("/x", *fields))] == [200]
    (received,) = harness.api.received
    written = [one.decode("latin-1").partition(":") for one in fields]
    expected = [(name.lower(), value.strip()) for name, _, value in written]
    names = {name for name, _ in expected}
    assert [(name.lower(), value) for name, value in received.fields if name.lower() in names] == expected


@pytest.mark.parametrize("value", [b"\xff", b"a\xe4b", b"\xc3\x28", b"\x80"], ids=repr)
def test_31_a_field_that_cannot_be_forwarded_unchanged_is_rejected(harness: Harness, value: bytes) -> None:
    got = harness.send(request("/x", b"x-odd: " + value))
    assert [one.status for one in got] == [400]
    assert not harness.api.received


@pytest.mark.parametrize("name", [b"x-amzn-RateLimit-Limit", b"x-amzn-RequestId", b"Vary", b"Set-Cookie"])
def test_31_response_fields_are_forwarded_unchanged(harness: Harness, name: bytes) -> None:
    (got,) = respond_with(harness, http_response(b"{}", "200 OK", name + b": one", name + b": two"), end="stay")
    assert got.all(name.decode()) == ["one", "two"]


REDIRECTS = [
    b"http://127.0.0.1:%d/canary",
    b"/canary",
    b"//127.0.0.1:%d/canary",
    b"https://evil.test/canary",
    b"canary",
]


@pytest.mark.parametrize(
    "status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent", "300 Choose"]
)
@pytest.mark.parametrize("location", REDIRECTS, ids=repr)
def test_33_no_redirect_is_followed(harness: Harness, status: str, location: bytes) -> None:
    where = location % harness.lwa.port if b"%d" in location else location
    (got,) = respond_with(harness, http_response(b"", status, b"location: " + where), end="stay", method="POST")
    assert got.status == int(status[:3])
    assert got.get("location") == where.decode()
    assert [one.target for one in harness.api.received] == ["/played"]
    assert "/canary" not in [one.target for one in harness.lwa.received]


def test_33_no_redirect_of_the_token_endpoint_is_followed(tmp_path: Path) -> None:
    with Harness.start(tmp_path) as harness:
        location = b"location: http://127.0.0.1:%d/canary" % harness.api.port
        harness.lwa.respond = lambda stream, _: stream.send(http_response(b"", "307 Temporary Redirect", location))
        (got,) = harness.send(request("/x"))
        assert got.status in {502, 503}
        assert not harness.api.received


def test_34_no_cookie_is_stored(harness: Harness) -> None:
    cookie = b"set-cookie: session=stolen; Path=/; Domain=localhost"
    (got,) = respond_with(harness, http_response(b"{}", "200 OK", cookie), end="stay")
    assert got.get("set-cookie")
    for account in (b"acme", b"zenith"):
        harness.send(request("/next", b"x-sp-account: " + account))
    assert not [one for one in harness.api.received if one.all("cookie")]


ECHOES = [b"%s", b"prefix %s suffix", b"%s%s", b'{"authorization": "%s"}', b"x" * 65_530 + b"%s" + b"y" * 100]


@pytest.mark.parametrize("echo", ECHOES, ids=lambda echo: repr(echo[:30]))
@pytest.mark.parametrize("framing", ["length", "chunks", "dripped", "close"])
@pytest.mark.parametrize("status", ["200 OK", "403 Forbidden"])
def test_a_token_that_is_echoed_is_masked(harness: Harness, echo: bytes, framing: str, status: str) -> None:
    tokens: list[bytes] = []

    def script(stream: Stream, received: ReceivedRequest) -> None:
        token = (received.get("x-amz-access-token") or "").encode()
        tokens.append(token)
        body = echo.replace(b"%s", token)
        head = f"HTTP/1.1 {status}\r\nx-echo: {token.decode()}\r\nx-other: 1\r\n".encode()
        if framing == "length":
            stream.send(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        elif framing == "close":
            stream.send(head + b"connection: close\r\n\r\n" + body)
            stream.close()
        else:
            stream.send(head + b"transfer-encoding: chunked\r\n\r\n")
            size = 7 if framing == "dripped" and len(body) < 1000 else 1000
            for start in range(0, len(body), size):
                chunk = body[start : start + size]
                stream.send(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            stream.send(b"0\r\n\r\n")

    harness.api.scripts["/echo"] = script
    (got,) = harness.send(request("/echo"))
    assert (got.status, got.get("x-other"), got.complete) == (int(status[:3]), "1", True)
    assert len(got.body) == len(echo.replace(b"%s", tokens[-1]))
    assert b"*" * 20 in got.body
    assert tokens[-1].partition(b"|")[2] not in got.body + str(got.fields).encode()


# Bodies: threats 37 and 38.

PACKED = gzip.compress(b'{"payload": "' + b"a" * 5000 + b'"}', mtime=0)
BODIES = [
    (b"gzip", PACKED),
    (b"gzip", b"not gzip at all"),
    (b"br", b"\x00\x01"),
    (b"zstd", b"(\xb5/\xfd"),
    (b"deflate", b"x"),
    (b"identity", b"{}"),
    (b"gzip, gzip", PACKED),
    (b"x-unknown", b"{}"),
    (b"", b"{}"),
]


@pytest.mark.parametrize(("coding", "body"), BODIES, ids=lambda value: repr(value[:15]))
def test_37_bodies_are_not_decoded_in_either_direction(harness: Harness, coding: bytes, body: bytes) -> None:
    harness.api.scripts["/packed"] = lambda stream, _: stream.send(
        http_response(body, "200 OK", b"content-encoding: " + coding, b'etag: "x"')
    )
    (got,) = harness.send(request("/packed", b"Content-Encoding: " + coding, method="POST", body=body))
    assert (got.status, got.body, got.get("content-encoding"), got.get("etag")) == (200, body, coding.decode(), '"x"')
    assert [one.body for one in harness.api.received] == [body]


def test_37_a_gzip_bomb_is_forwarded_compressed(harness: Harness) -> None:
    bomb = gzip.compress(b"0" * 100_000_000, mtime=0)
    before = memory_of(harness)
    harness.api.scripts["/bomb"] = lambda stream, _: stream.send(
        http_response(bomb, "200 OK", b"content-encoding: gzip")
    )
    (got,) = harness.send(request("/bomb", b"Content-Encoding: gzip", method="POST", body=bomb))
    assert got.body == bomb
    assert harness.api.received[0].body == bomb
    assert memory_of(harness) - before < 10 * 1024 * 1024


def memory_of(harness: Harness) -> int:
    """Return the resident memory of the process, in bytes."""
    status = Path(f"/proc/{harness.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


def test_38_a_response_is_not_buffered_for_a_client_that_does_not_read(harness: Harness) -> None:
    sent = [0]

    def script(stream: Stream, _: ReceivedRequest) -> None:
        stream.send(OK + b"content-length: 200000000\r\n\r\n")
        for _piece in range(3000):
            stream.send(b"x" * 65536)
            sent[0] += 65536

    harness.api.scripts["/large"] = script
    before = memory_of(harness)
    with harness.client(receive=4096) as stream:
        stream.send(request("/large"))
        assert_later_requests_work(harness)
        stream.socket.settimeout(0.5)
        assert memory_of(harness) - before < 10 * 1024 * 1024
        assert sent[0] < 20_000_000


def test_38_an_upload_is_not_buffered_for_an_upstream_that_does_not_read(harness: Harness) -> None:
    held = threading.Event()
    harness.api.scripts["/early/held"] = lambda stream, _: (held.wait(10), stream.close())[1]  # type: ignore[func-returns-value]
    before = memory_of(harness)
    head = request("/early/held", b"Content-Length: 200000000", method="POST")
    with harness.client() as stream:
        stream.send(head)
        stream.socket.settimeout(0.5)
        sent = 0
        try:
            while sent < 100_000_000:
                stream.send(b"x" * 65536)
                sent += 65536
        except (TimeoutError, ConnectionError):
            pass
        assert sent < 50_000_000
        assert memory_of(harness) - before < 10 * 1024 * 1024
    held.set()
    assert_later_requests_work(harness)


# TLS: threats 35 and 36, fault 30.


class TlsServer(Server):
    """The same server with TLS; `heard` is the decrypted input."""

    def __init__(self, paths: tuple[str, str], version: ssl.TLSVersion | None = None) -> None:
        self.heard: list[bytes] = []
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(*paths)
        if version is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # intentionally obsolete versions
                self._context.minimum_version = self._context.maximum_version = version
            self._context.set_ciphers("DEFAULT@SECLEVEL=0")
        super().__init__(lambda stream, _: stream.send(http_response()))

    def _serve(self, stream: Stream, number: int) -> None:
        try:
            stream.socket = self._context.wrap_socket(stream.socket, server_side=True)
            self.heard.append(b"handshake")
            super()._serve(stream, number)
        except OSError:
            stream.socket.close()


@pytest.mark.parametrize("case", ["good", "untrusted", "wrong name", "expired", "old version"])
def test_35_no_byte_is_sent_where_the_certificate_is_invalid(tmp_path: Path, case: str) -> None:
    name = "elsewhere.test" if case == "wrong name" else "localhost"
    authority = Authority.made(tmp_path / "authority")
    paths = authority.issue(name, expired=case == "expired", alternative=f"DNS:{name}")
    trusted = Authority.made(tmp_path / "other").certificate if case == "untrusted" else authority.certificate
    server = TlsServer(paths, ssl.TLSVersion.TLSv1_1 if case == "old version" else None)
    endpoints = dict.fromkeys(("na", "eu", "fe"), f"https://localhost:{server.port}")
    try:
        with Harness.start(tmp_path) as plain:
            lwa = {"lwa": f"http://127.0.0.1:{plain.lwa.port}/auth/o2/token"}
            folder = tmp_path / "second"
            folder.mkdir()
            with Harness.start(folder, endpoints={**endpoints, **lwa}, pool={"ca_file": trusted}) as harness:
                (got,) = harness.send(request(SELLERS))
                assert got.status == (200 if case == "good" else 502)
                assert len(server.received) == (1 if case == "good" else 0)
                if case != "good":
                    assert got.error == "UpstreamUnreachable"
    finally:
        server.close()


def test_35_plain_http_is_allowed_only_on_loopback(tmp_path: Path) -> None:
    for url in ("http://sellingpartnerapi-eu.amazon.com", "http://10.0.0.1:80", "http://localhost.evil.test"):
        with pytest.raises(AssertionError, match="must be https"), Harness.start(tmp_path, endpoints={"eu": url}):
            pass


def test_36_proxy_variables_and_netrc_are_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as trap:
        url = f"http://127.0.0.1:{trap.getsockname()[1]}"
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, url)
        (tmp_path / ".netrc").write_text("machine 127.0.0.1 login mine password mine\n")
        monkeypatch.setenv("HOME", str(tmp_path))
        # Harness passes on variables that begin with PATH, HOME or COVERAGE.
        monkeypatch.setenv("PATH_HTTP_PROXY", url)
        with Harness.start(tmp_path) as harness:
            (got,) = harness.send(request(SELLERS))
            assert got.status == 200
            assert harness.api.received[0].get("authorization") is None
        trap.settimeout(0.01)
        with pytest.raises(TimeoutError):
            trap.accept()


LWA_NONSENSE = [
    b"<html></html>",
    b"",
    b"[]",
    b"null",
    b"7",
    b'"x"',
    b"{",
    b"[" * 50_000,
    b'{"access_token": 5}',
    b'{"access_token": ""}',
    json.dumps({"access_token": "a\r\nx: y", "expires_in": 3600}).encode(),
    b'{"access_token": "a\\u0000b", "expires_in": 3600}',
    b'{"access_token": "\\ud800", "expires_in": 3600}',
    b'{"error": "x", "access_token": null}',
    b"x" * 3_000_000,
]


@pytest.mark.parametrize("body", LWA_NONSENSE, ids=lambda body: repr(body[:40]))
def test_32_f3_a_malformed_token_response_reaches_no_client(tmp_path: Path, body: bytes) -> None:
    with Harness.start(tmp_path) as harness:
        harness.lwa.respond = lambda stream, _: stream.send(http_response(body))
        (got,) = harness.send(request("/x", b"x-sp-timeout: 5s"))
        assert got.status in {502, 503}
        assert got.error in {"TokenUnavailable", "TokenRefused"}
        assert not harness.api.received
