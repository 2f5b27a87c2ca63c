"""Threats 15 to 18: a request goes to Amazon's host with exactly the validated path, or nowhere."""

import re

import pytest

from tests.security.harness import Harness, request

EU = "sellingpartnerapi-eu.amazon.com"


def assert_rejected(harness: Harness, data: bytes, *statuses: int) -> None:
    """Send; expect one rejection and no outgoing request, not even for a token."""
    got = harness.send(data)
    assert [one.status for one in got] == [got[0].status]
    assert got[0].status in statuses
    assert got[0].error
    assert not harness.api.received
    assert not harness.lwa.received


@pytest.fixture(params=[b"127.0.0.1", b"localhost", b"169.254.169.254", b"evil.test"])
def elsewhere(request: pytest.FixtureRequest, shared_harness: Harness) -> bytes:
    """Another server: a running one (this machine's token host), and one that does not exist."""
    host: bytes = request.param
    return host + b":%d" % shared_harness.lwa.port


@pytest.mark.parametrize(
    "spelling",
    [
        b"//%s/x",
        b"///%s/x",
        b"/\\%s/x",
        b"\\\\%s/x",
        b"@%s/x",
        b".%s/x",
        b"%s",
        b"%s/x",
        b"?x=//%s",
        b"*",
        b"",
        b"ftp://%s/x",
        b"file://%s/x",
        b"unix:/run/x|http://%s/",
        b"http:/%s/x",
        b"http:///%s/x",
        b"https:%s/x",
        b"gopher://%s/x",
        b"ws://%s/x",
        b"http://localhost@%s/x",
        b"http://localhost:80@%s/x",
        b"http://localhost%%00@%s/",
        b"http://localhost#@%s/",
        b"http://localhost\\@%s/",
        b"http://[::1]@%s/",
        b"javascript:%s",
        b"/%%0d%%0a//%s /x",
    ],
    ids=repr,
)
def test_15_no_spelling_of_another_server_redirects_a_request(
    harness: Harness, elsewhere: bytes, spelling: bytes
) -> None:
    target = spelling % elsewhere if b"%s" in spelling else spelling
    assert_rejected(harness, request(target), 400, 421)


@pytest.mark.parametrize("scheme", [b"http", b"https", b"HTTP"])
def test_15_an_absolute_form_to_another_server_is_refused(harness: Harness, scheme: bytes) -> None:
    for authority in (
        b"169.254.169.254",
        b"evil.test",
        b"127.0.0.1.evil.test",
        b"%s.evil.test" % EU.encode(),
        b"amazon.com",
    ):
        assert_rejected(harness, request(scheme + b"://" + authority + b"/x"), 421)
        assert not harness.lwa.received


@pytest.mark.parametrize("authority", [EU, f"{EU}:443", f"{EU.upper()}", "localhost", "127.0.0.1:1"])
def test_15_an_absolute_form_to_amazon_or_to_ourselves_is_reduced_to_its_path(harness: Harness, authority: str) -> None:
    (got,) = harness.send(request(f"http://{authority}/orders/v0/orders?x=%41"))
    assert got.status == 200
    (received,) = harness.api.received
    assert (received.target, received.get("host")) == ("/orders/v0/orders?x=%41", f"127.0.0.1:{harness.api.port}")


@pytest.mark.parametrize(
    "target",
    [
        "/a/%41",
        "/a/%7E~",
        "/a/%2b+%20",
        "/a?",
        "/a??",
        "/a?b&&c==d&",
        "/a%2Fb",
        "/a%2fb",
        "/a//b",
        "/a/",
        "/a;b=c",
        "/a/%00",
        "/a/%0d%0a",
        "/a?b=%0D%0AHost:%20x",
        "/a?redirect=http://evil.test/",
        "/a?z=1&a=2&z=0",
        "/a/%C3%A4",
        "/a/%c3%a4",
        "/a/%ff",
        "/a/%zz",
        "/a/%",
        "/a/'()*!$&,:@",
        "/a/%2E%2E%2E",
        "/a/...",
        "/a?x=../..",
        "/a?x=/./",
        '/a/[b]{c}|^`"<>',
        "/" + "a" * 7900,
        "/a?" + "b=c&" * 1900,
        "/a/b%2Ec",
        "/%E2%80%AE",
    ],
    ids=lambda target: target[:40],
)
def test_16_17_a_target_is_forwarded_byte_for_byte(harness: Harness, target: str) -> None:
    (got,) = harness.send(request(target))
    assert got.status == 200
    assert [one.target for one in harness.api.received] == [target]


DOTS = [
    "/a/../b",
    "/a/./b",
    "/..",
    "/.",
    "/a/..",
    "/a/.",
    "/a/%2e%2e/b",
    "/a/%2E%2e/b",
    "/a/.%2e/b",
    "/a/%2e/b",
    "/a/..;/b",
    "/a/..;x=y/b",
    "/a/.;/b",
    "/a%2F..%2Fb",
    "/a%2f%2e%2e%2fb",
    "/a%5c..%5cb",
    "/../../etc/passwd",
    "/orders/v0/orders/../../tokens",
    "/@acme/../x",
    "/@acme/eu/../x",
]


@pytest.mark.parametrize("target", DOTS)
def test_16_a_dot_segment_is_rejected_in_every_spelling(harness: Harness, target: str) -> None:
    assert_rejected(harness, request(target), 400)


UNFIT = [
    b"/a#b",
    b"/a\\b",
    b"/a\x00b",
    b"/a\x01",
    b"/a\x7f",
    b"/a\xc3\xa4",
    b"/a\xff",
    b"/a\tb",
    b"/a b",
    b"/a?b#c",
    b"/a?b=\\",
    b"/a\x0bb",
    b"/a\x0cb",
    b"/a\rb",
    b"/a\nb",
    b"/a\xe2\x80\xa8b",
    b"/\x80",
]


@pytest.mark.parametrize("target", UNFIT, ids=repr)
def test_16_a_byte_that_is_not_allowed_in_a_target_is_rejected(harness: Harness, target: bytes) -> None:
    assert_rejected(harness, request(target), 400)


@pytest.mark.parametrize(
    "target", ["/orders/v0/%6frders", "/orders/v0//orders", "/Orders/v0/orders", "/orders/v0/orders/"]
)
def test_16_a_path_that_resembles_an_operation_gets_only_an_access_token(harness: Harness, target: str) -> None:
    harness.send(request(target, b"x-sp-data-elements: buyerInfo"))
    assert (
        "/tokens/2021-03-01/restrictedDataToken" not in [one.target for one in harness.api.received] or "%6f" in target
    )


METHODS = [
    "OPTIONS",
    "TRACE",
    "CONNECT",
    "TRACK",
    "PROPFIND",
    "SEARCH",
    "LINK",
    "get",
    "Get",
    "post",
    "GETS",
    "GE",
    "PRI",
    "DEBUG",
    "PURGE",
    "M-SEARCH",
    "QUERY",
    "0",
    "GET\x0b",
    "G@T",
    "GET,POST",
    "%47ET",
]


@pytest.mark.parametrize("method", METHODS)
def test_18_any_other_method_is_rejected(harness: Harness, method: str) -> None:
    got = harness.send(request("/orders/v0/orders", b"x-amz-access-token: mine", method=method))
    assert len(got) == 1
    assert got[0].status in {400, 405}
    assert b"mine" not in got[0].body
    assert not harness.api.received
    assert not harness.lwa.received


def test_18_connect_is_refused_and_nothing_is_tunnelled(harness: Harness) -> None:
    with harness.client() as stream:
        stream.send(f"CONNECT {EU}:443 HTTP/1.1\r\nHost: {EU}:443\r\n\r\n".encode())
        stream.send(b"\x16\x03\x01" + b"x" * 100)
        got = stream.rest()
    assert re.match(rb"HTTP/1\.1 (405|400) ", got)
    assert not harness.api.received


@pytest.mark.parametrize(
    "name", ["X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override", "X_HTTP_Method_Override"]
)
def test_18_no_header_changes_the_method(harness: Harness, name: str) -> None:
    (got,) = harness.send(request("/feeds/2021-06-30/feeds", f"{name}: DELETE".encode(), method="POST", body=b"{}"))
    assert got.status == 200
    (received,) = harness.api.received
    assert not [key for key, _ in received.fields if "method" in key.lower()]


@pytest.mark.parametrize(
    "name", ["X-Original-URL", "X-Rewrite-URL", "X-Original-URI", "X-Forwarded-Uri", "X-Forwarded-Prefix"]
)
def test_16_no_header_changes_the_path(harness: Harness, name: str) -> None:
    harness.send(request("/orders/v0/orders", f"{name}: /tokens/2021-03-01/restrictedDataToken".encode()))
    (received,) = harness.api.received
    assert received.target == "/orders/v0/orders"
    assert name.lower() not in [key.lower() for key, _ in received.fields]
