"""Fuzzing for a few seconds, tests of the fuzzer's own rules, and regression tests of past findings."""

import asyncio
from pathlib import Path

import pytest

from tests.conftest import StartProxy, needs
from tests.security import strict
from tests.security.fuzz import Grant, Oracle, check_responses, echo, fuzz
from tests.security.grammar import Case, Sender, case
from tests.support.fake_upstream import FakeUpstream
from tests.support.raw_client import connect

SEED, CASES = 1, 300
SENDER = Sender(b"ann", b"bob", 1, fixed=True)


def test_no_generated_request_breaks_a_rule() -> None:
    needs(Path("/proc/self/fd").exists(), "/proc")
    findings = asyncio.run(fuzz(SEED, 4, cases=CASES))
    assert not findings.violations, "\n".join(map(str, findings.violations))
    assert findings.cases == CASES
    assert findings.arrived > CASES // 5, "some of it must get through, or nothing was tried"


# Past findings: bytes that a client sends, and text that must then be in no request to Amazon.

HOST = b"Host: localhost\r\n"
HIDDEN = b"GET /hidden HTTP/1.1\r\n" + HOST + b"\r\n"
FOUND = {
    "the last trailer field becomes a field of the next request": (
        [
            b"POST /first HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n0\r\nx-leaked: 1\r\n\r\n"
            b"GET /second HTTP/1.1\r\n" + HOST + b"\r\n"
        ],
        "x-leaked",
    ),
    "after a rejected CONNECT, its body is read as a request": (
        [b"CONNECT /first HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN],
        "/hidden",
    ),
    "after a rejected CONNECT, its body is read as a request where another one ends in chunks": (
        [
            b"CONNECT /first HTTP/1.1\r\n"
            + HOST
            + b"Content-Length: %d\r\n\r\n" % len(HIDDEN)
            + HIDDEN
            + b"POST /second HTTP/1.1\r\n"
            + HOST
            + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
        ],
        "/hidden",
    ),
    "after an empty Transfer-Encoding, which does not frame the body, requests are served": (
        [b"POST /first HTTP/1.1\r\n" + HOST + b"Transfer-Encoding:\r\n\r\n" + HIDDEN],
        "/hidden",
    ),
    "data after an unknown upgrade is lost, and the body of the next request is read as a request": (
        [
            b"GET /first HTTP/1.1\r\n" + HOST + b"Connection: upgrade\r\nUpgrade: foo\r\n\r\n"
            b"POST /second HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % len(HIDDEN),
            HIDDEN,
        ],
        "GET /hidden",
    ),
    "Content_Length goes on beside Content-Length": (
        [b"POST /first HTTP/1.1\r\n" + HOST + b"Content_Length: 5\r\n\r\n"],
        "content_length",
    ),
    "an account's name followed by a Unicode line separator is taken for the account's": (
        [b"GET /first HTTP/1.1\r\n" + HOST + b"x-sp-account: acme\xe2\x80\xa8\r\n\r\n"],
        "/first",
    ),
}


@pytest.mark.parametrize(("pieces", "never"), FOUND.values(), ids=FOUND.keys())
async def test_past_findings_stay_fixed(
    start_proxy: StartProxy, fake_upstream: FakeUpstream, pieces: list[bytes], never: str
) -> None:
    proxy = await start_proxy(timeouts={"header": "300ms", "body_idle": "300ms", "keep_alive": "300ms"})
    async with connect(proxy.addresses[0]) as client:
        await client.send(pieces[0])
        for chunk in pieces[1:]:
            await client.read_response()  # the response to the previous segment: the next one is sent separately
            await client.send(chunk)
        await client.reader.read()  # until the proxy closes the connection
    for received in fake_upstream.received:
        assert never not in received.line
        assert not any(never in name.lower() for name, _ in received.fields)


# Rules of the fuzzer.

TOKEN = b"x-amz-access-token: T\r\n"
GOOD = b"GET /mine HTTP/1.1\r\nhost: h\r\n" + TOKEN + b"\r\n"


def oracle_after(data: bytes) -> Oracle:
    """Return an oracle that has recorded `data` as sent, and T as the token that was issued for it."""
    oracle = Oracle(1)
    oracle.hosts["eu"] = b"h"
    oracle.issued[b"T"] = Grant("app-0", b"ann", "eu")
    oracle.issued[b"OTHER"] = Grant("app-0", b"bob", "eu")
    oracle.begin(Case(0, SENDER, [data], [0.0], "read", resets=False), oracle.workers[0])
    return oracle


SENT = b"GET /mine HTTP/1.1\r\nhost: localhost\r\nx: 1\r\n\r\nPOST /body HTTP/1.1\r\ncontent-length: 5\r\n\r\nhello"


@pytest.mark.parametrize(
    "arrives",
    [
        b"GET  /mine HTTP/1.1\r\nhost: h\r\n" + TOKEN + b"\r\n",
        b"GET /mine HTTP/1.0\r\nhost: h\r\n" + TOKEN + b"\r\n",
        b"GET //mine HTTP/1.1\r\nhost: h\r\n" + TOKEN + b"\r\n",
        b"GET /a/%2E./mine HTTP/1.1\r\nhost: h\r\n" + TOKEN + b"\r\n",
        b"GET /mine HTTP/1.1\r\nhost: localhost\r\n" + TOKEN + b"\r\n",
        b"GET /mine HTTP/1.1\r\nhost: h\r\nhost: h\r\n" + TOKEN + b"\r\n",
        b"GET /mine HTTP/1.1\r\nhost: h\r\n" + TOKEN + TOKEN + b"\r\n",
        b"GET /mine HTTP/1.1\r\nhost: h\r\nX_Amz_Access_Token: of-the-client\r\n" + TOKEN + b"\r\n",
        b"GET /mine HTTP/1.1\r\nhost: h\r\nx-amz-access-token: of-the-client\r\n\r\n",
        b"GET /mine HTTP/1.1\r\nhost: h\r\nx-amz-access-token: OTHER\r\n\r\n",
        b"GET /mine HTTP/1.1\r\nhost: h\r\nx-sp-account: a\r\n" + TOKEN + b"\r\n",
        b"GET /mine HTTP/1.1\r\nhost: h\r\nx: 2\r\n" + TOKEN + b"\r\n",
        b"GET /mine/ HTTP/1.1\r\nhost: h\r\n" + TOKEN + b"\r\n",
        b"HEAD /mine HTTP/1.1\r\nhost: h\r\n" + TOKEN + b"\r\n",
        b"OPTIONS /mine HTTP/1.1\r\nhost: h\r\n" + TOKEN + b"\r\n",
        b"POST /body HTTP/1.1\r\nhost: h\r\ncontent-length: 4\r\n" + TOKEN + b"\r\nhell",
        b"POST /body HTTP/1.1\r\nhost: h\r\ncontent-length: 5\r\ncontent_length: 5\r\n" + TOKEN + b"\r\nhello",
        b"POST /body HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n" + TOKEN + b"\r\n5;a\r\nhello\r\n0\r\n\r\n",
    ],
)
def test_a_request_that_must_not_arrive_is_a_violation(arrives: bytes) -> None:
    oracle = oracle_after(SENT)
    message = strict.request(arrives)
    assert message is not None
    oracle.arrived("eu", message)
    assert oracle.findings.violations


def test_requests_as_sent_are_no_violations_but_a_repetition_is() -> None:
    oracle = oracle_after(SENT)
    body = b"POST /body HTTP/1.1\r\nhost: h\r\ncontent-length: 5\r\n" + TOKEN + b"\r\nhel"
    for data in (GOOD, body):
        message = strict.request(data)
        assert message is not None
        oracle.arrived("eu", message)
    assert not oracle.findings.violations
    message = strict.request(GOOD)
    assert message is not None
    oracle.arrived("eu", message)
    assert [violation.rule for violation in oracle.findings.violations] == ["as sent"]


def test_a_truncated_upload_must_not_arrive_complete() -> None:
    oracle = oracle_after(b"POST /body HTTP/1.1\r\ncontent-length: 5\r\n\r\nhel")
    message = strict.request(b"POST /body HTTP/1.1\r\nhost: h\r\ncontent-length: 3\r\n" + TOKEN + b"\r\nhel")
    assert message is not None
    oracle.arrived("eu", message)
    assert [violation.rule for violation in oracle.findings.violations] == ["as sent"]


def test_responses_out_of_order_and_secrets_are_violations() -> None:
    one = Case(0, SENDER, [SENT], [0.0], "read", resets=False)
    first, second = (echo(message) for message in strict.requests(SENT))
    for data, is_valid in (
        (first + second, True),
        (second + first, False),
        (first + second + first, False),
        (first + b"surplus", False),
        (first + second.replace(b"POST /body", b"NEVERSHOWN"), False),
    ):
        oracle = oracle_after(SENT)
        data = data.replace(b"NEVERSHOWN", oracle.secret.encode()[:10])  # noqa: PLW2901 - each world has its own
        check_responses(oracle, one, list(oracle.workers[0].sent), data, at_end=True)
        assert (not oracle.findings.violations) is is_valid
    oracle = oracle_after(SENT)
    oracle.check_hidden("hidden", b"a token: Atza|" + oracle.secret.encode())
    assert oracle.findings.violations


# The strict parser.


@pytest.mark.parametrize(
    ("data", "read"),
    [
        (SENT, [(b"/mine", b""), (b"/body", b"hello")]),
        (b"\r\nGET / HTTP/1.1\r\n\r\n", [(b"/", b"")]),
        (
            b"POST / HTTP/1.1\r\ntransfer-encoding: Chunked\r\n\r\n05;a=b\r\nhello\r\n0\r\nx: y\r\n\r\n",
            [(b"/", b"hello")],
        ),
        (b"GET / HTTP/1.1\r\nconnection: a, Close\r\n\r\nGET /hidden HTTP/1.1\r\n\r\n", [(b"/", b"")]),
        (b"GET / HTTP/1.0\r\n\r\nGET /hidden HTTP/1.1\r\n\r\n", [(b"/", b"")]),
        (b"GET / HTTP/1.1\n\n", []),
        (b"GET / HTTP/1.1\r\na : b\r\n\r\n", []),
        (b"GET / HTTP/1.1\r\na: b\r\n c\r\n\r\n", []),
        (b"GET / HTTP/1.1\r\na: b\rc\r\n\r\n", []),
        (b"GET / HTTP/2.0\r\n\r\n", []),
    ],
)
def test_the_strict_parser_finds_the_requests(data: bytes, read: list[tuple[bytes, bytes]]) -> None:
    found = strict.requests(data)
    assert [(message.target, message.body) for message in found] == read
    assert all(message.complete and message.clear for message in found)


@pytest.mark.parametrize(
    "framing",
    [
        b"content-length: 5\r\ncontent-length: 5\r\n",
        b"content-length: +5\r\n",
        b"content-length: 5\r\ntransfer-encoding: chunked\r\n",
        b"transfer-encoding: gzip, chunked\r\n",
        b"transfer-encoding:\r\n",
    ],
)
def test_the_strict_parser_stops_at_ambiguous_framing(framing: bytes) -> None:
    (message,) = strict.requests(b"POST / HTTP/1.1\r\n" + framing + b"\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n")
    assert not message.clear
    assert not message.complete


def test_a_case_is_the_same_for_the_same_seed() -> None:
    assert [case(1, number, SENDER).pieces for number in range(50)] == [
        case(1, number, SENDER).pieces for number in range(50)
    ]
