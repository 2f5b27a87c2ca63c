"""Threats 1 to 14: access to the port, the account, and the credentials that are used."""

import os
import ssl
import stat
import subprocess
from pathlib import Path

import pytest

from tests.security.harness import CALLER_KEY, Harness, Stream, connect, request
from tests.support.certificates import Authority

EU = "sellingpartnerapi-eu.amazon.com"


def assert_rejected(harness: Harness, data: bytes, status: int, error: str) -> None:
    got = harness.send(data)
    assert [(one.status, one.error) for one in got] == [(status, error)]
    assert not [name for name, _ in got[0].fields if name.lower().startswith("access-control")]
    assert not harness.api.received
    assert not harness.lwa.received


FOREIGN = [
    "evil.test",
    "evil.test:80",
    "localhost.evil.test",
    "evil-localhost",
    "localhost.",
    "127.0.0.1.evil.test",
    "127.0.0.1@evil.test",
    "evil.test@127.0.0.1",
    "user:password@localhost",
    "0.0.0.0",
    "[::]",
    "[::1",
    "127.1",
    "0x7f000001",
    "2130706433",
    "017700000001",
    "localhost:80:80",
    "localhost:x",
    "localhost/x",
    "local host",
    "[::ffff:127.0.0.1]",
    f"{EU}.evil.test",
    f"x.{EU}",
    "api.amazon.com",
    "localhost,evil.test",
    "*",
    "",
    "%6c",
    "localhost:99999",
    "127.0.0.1:",
    "\xc3\xa4",
    "localhost\x00",
]


@pytest.mark.parametrize("host", FOREIGN)
@pytest.mark.parametrize("target", ["/orders/v0/orders", "/metrics", "/", "/livez"])
def test_1_4_a_foreign_host_is_rejected_on_every_path(harness: Harness, target: str, host: str) -> None:
    got = harness.send(request(target, b"Host: " + host.encode("latin-1")))
    assert [one.status for one in got] in ([421], [400])
    assert got[0].error
    assert not harness.api.received
    assert not harness.lwa.received


@pytest.mark.parametrize("host", ["localhost", "LocalHost:1", "127.0.0.1", "127.0.0.1:8080", "[::1]", EU, EU.upper()])
def test_1_hosts_of_the_proxy_and_of_amazon_are_accepted(harness: Harness, host: str) -> None:
    assert [one.status for one in harness.send(request("/x", f"Host: {host}".encode()))] == [200]


@pytest.mark.parametrize(
    "fields",
    [
        (b"Host: localhost", b"Host: localhost"),
        (b"Host: localhost", b"Host: evil.test"),
        (b"X: 1", b"Host: ", b"host: x"),
    ],
)
def test_1_two_hosts_are_rejected(harness: Harness, fields: tuple[bytes, ...]) -> None:
    assert_rejected(harness, request("/x", *fields), 400, "MalformedRequest")


def test_1_a_missing_host_is_rejected(harness: Harness) -> None:
    assert_rejected(harness, b"GET /x HTTP/1.1\r\nConnection: close\r\n\r\n", 400, "MalformedRequest")
    assert_rejected(harness, b"GET /x HTTP/1.0\r\n\r\n", 400, "MalformedRequest")


def test_1_the_admin_listener_has_the_same_check(harness: Harness) -> None:
    for path in ("/", "/metrics", "/readyz", "/livez", "/nothing"):
        (got,) = harness.send(request(path, b"Host: evil.test"), address=harness.admin)
        assert got.status == 421
        (got,) = harness.send(request(path, b"Origin: http://evil.test"), address=harness.admin)
        assert got.status == 403


SIGNS = [
    b"Origin: http://evil.test",
    b"Origin: null",
    b"Origin:",
    b"Origin: http://localhost",
    b"origin: file://",
    b"Sec-Fetch-Site: cross-site",
    b"Sec-Fetch-Site: same-site",
    b"sec-fetch-site: x",
    b"Sec-Fetch-Site: none\r\nSec-Fetch-Site: cross-site",
    b"Access-Control-Request-Method: GET",
    b"Access-Control-Request-Private-Network: true",
    b"Sec-Fetch-Site: same-origin\r\nSec-Fetch-Dest: image",
]


@pytest.mark.parametrize("sign", SIGNS, ids=repr)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "PUT", "HEAD"])
def test_3_5_requests_of_web_pages_are_rejected_whatever_the_method(harness: Harness, sign: bytes, method: str) -> None:
    body = b"{}" if method in {"POST", "PUT"} else None
    got = harness.send(request("/feeds/2021-06-30/feeds", sign, method=method, body=body), (method,))
    assert [one.status for one in got] == [403]
    assert not [name for name, _ in got[0].fields if name.lower().startswith("access-control")]
    assert not harness.api.received
    assert not harness.lwa.received


@pytest.mark.parametrize("sign", [b"Sec-Fetch-Site: none", b"Sec-Fetch-Site: same-origin", b"Referer: http://x.test/"])
def test_3_headers_that_programs_send_too_are_accepted(harness: Harness, sign: bytes) -> None:
    assert [one.status for one in harness.send(request("/x", sign))] == [200]


def test_5_a_cors_preflight_gets_no_permission(harness: Harness) -> None:
    preflight = (b"Origin: https://evil.test", b"Access-Control-Request-Method: PUT")
    assert_rejected(harness, request("/x", *preflight, method="OPTIONS"), 403, "BrowserRefused")
    assert_rejected(harness, request("/x", method="OPTIONS"), 405, "MethodNotAllowed")


def test_3_a_websocket_is_rejected(harness: Harness) -> None:
    fields = (b"Upgrade: websocket", b"Connection: Upgrade", b"Sec-WebSocket-Key: x", b"Sec-WebSocket-Version: 13")
    assert_rejected(harness, request("/x", *fields, b"Origin: http://evil.test"), 403, "BrowserRefused")
    (got,) = harness.send(request("/x", *fields, b"Connection: close"))
    assert got.status == 200
    assert not [name for name, _ in harness.api.received[0].fields if "upgrade" in name.lower()]


def test_7_no_socket_listens_outside_loopback(harness: Harness) -> None:
    pid = harness.process.pid
    sockets = {str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    open_to_others = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            address = local.partition(":")[0]
            is_loopback = address.endswith("7F") or address == "00000000000000000000000001000000"
            if state == "0A" and f"socket:[{inode}]" in sockets and not is_loopback:
                open_to_others.append(local)
    assert len(sockets) > 2
    assert not open_to_others


def test_8_the_admin_pages_are_not_on_the_proxy_port(harness: Harness) -> None:
    for path in ("/metrics", "/livez", "/readyz", "/status", "/quitquitquit", "/debug/pprof"):
        harness.send(request(path))
    assert [one.target for one in harness.api.received] == [
        *("/metrics", "/livez", "/readyz", "/status", "/quitquitquit", "/debug/pprof")
    ]


def test_8_the_admin_listener_is_not_reachable_through_the_proxy(harness: Harness) -> None:
    for address in (harness.admin, harness.addresses[0]):
        (got,) = harness.send(request(f"http://{address}/metrics"))
        assert b"spapi_proxy" not in got.body
    assert {one.target for one in harness.api.received} == {"/metrics"}


@pytest.mark.parametrize("path", ["/quitquitquit", "/debug", "/config", "/metrics", "/reload"])
def test_8_nothing_is_changed_through_the_admin_listener(harness: Harness, path: str) -> None:
    for kind in (b"text/plain", b"application/x-www-form-urlencoded", b"multipart/form-data; boundary=x"):
        (got,) = harness.send(request(path, b"Content-Type: " + kind, method="POST", body=b"x"), address=harness.admin)
        assert got.status in {404, 405, 415}
    (got,) = harness.send(request(path, method="POST", body=b""), address=harness.admin)
    assert got.status in {404, 405}
    assert harness.process.poll() is None


# Account: threats 10 to 14 (tests/integration/test_tenant_isolation.py checks whose token is used).


@pytest.mark.parametrize(
    ("target", "fields", "error"),
    [
        ("/x", (b"x-sp-account: acme", b"x-sp-account: zenith"), "MalformedRequest"),
        ("/x", (b"x-sp-account: acme", b"x-sp-account: acme"), "MalformedRequest"),
        ("/x", (b"x-sp-account: acme, zenith",), "UnknownAccount"),
        ("/x", (b"x-sp-account: *",), "UnknownAccount"),
        ("/x", (b"x-sp-account: ACME",), "UnknownAccount"),
        ("/x", (b"x-sp-account: nobody",), "UnknownAccount"),
        ("/x", (b"x-sp-account:",), "UnknownAccount"),
        ("/x", (b"x-sp-account: ../acme",), "UnknownAccount"),
        ("/x", (b"x-sp-account: acme%0d%0ax-sp-account: zenith",), "UnknownAccount"),
        ("/@zenith/x", (b"x-sp-account: acme",), "ConflictingSources"),
        ("/@nobody/x", (), "UnknownAccount"),
        ("/@acm%65/x", (), "UnknownAccount"),
        ("/@acme%2Feu/x", (), "UnknownAccount"),
        ("/@acme,zenith/x", (), "UnknownAccount"),
        ("/@/x", (), "BadTarget"),
        ("/@acme", (), "BadTarget"),
        ("/@acme//x", (), "BadTarget"),
        ("/@acme/eu//x", (), "BadTarget"),
        ("/@acme/na/x", (), "RegionNotConfigured"),
        ("/@acme/eu/x", (b"x-sp-region: na",), "ConflictingSources"),
        ("/x", (b"x-sp-region: eu", b"x-sp-region: na"), "MalformedRequest"),
        ("/x", (b"x-sp-region: mars",), "UnknownRegion"),
        ("/x?MarketplaceIds=ATVPDKIKX0DER", (b"x-sp-region: eu",), "ConflictingSources"),
    ],
)
def test_11_an_ambiguous_account_or_region_is_rejected(
    harness: Harness, target: str, fields: tuple[bytes, ...], error: str
) -> None:
    assert_rejected(harness, request(target, *fields), 400, error)


OWN = [
    b"x-amz-access-token: mine",
    b"X-AMZ-ACCESS-TOKEN: mine",
    b"x-amz-access-token: mine\r\nx-amz-access-token: mine2",
    b"x_amz_access_token: mine",
    b"X-Amz_Access-Token: mine",
    b"Authorization: Bearer mine",
    b"Cookie: session=mine",
    b"Proxy-Authorization: Basic mine",
    b"authorization: AWS4-HMAC-SHA256 mine",
    b"X-Amz-Security-Token: mine",
    b"x-amz-content-sha256: mine",
    b"x-amz-date: mine",
    b"x_amz_date: mine",
    b"user_agent: mine",
    b"User-Agent: mine",
    b"x-sp-key: mine",
    b"x-sp-other: mine",
    b"x_sp_other: mine",
    b"X-Forwarded-For: mine",
    b"X-Forwarded-Host: mine",
    b"Forwarded: for=mine",
    b"Via: 1.1 mine",
    b"X-Real-IP: mine",
    b"X-Request-Id: mine",
    b"traceparent: mine",
    b"TE: mine",
    b"Trailer: mine",
    b"Keep-Alive: mine",
    b"Proxy-Connection: mine",
    b"Upgrade: mine",
    b"HTTP2-Settings: mine",
    b"X-Mine: mine\r\nConnection: X-Mine",
    b"X_Mine: mine\r\nConnection: X-Mine",
    b"True-Client-IP: mine",
]


@pytest.mark.parametrize("field", OWN, ids=repr)
def test_12_to_14_and_28_29_private_and_hop_by_hop_fields_are_not_forwarded(harness: Harness, field: bytes) -> None:
    (got,) = harness.send(request("/x", field))
    assert got.status == 200
    (received,) = harness.api.received
    assert not [value for _, value in received.fields if "mine" in value.lower()]
    token = received.get("x-amz-access-token")
    assert token is not None
    assert token.startswith("Atza|distinctive-token-of-acme-")
    assert len([name for name, _ in received.fields if name.lower().replace("_", "-") == "x-amz-access-token"]) == 1


@pytest.mark.parametrize("named", [b"x-amz-access-token", b"Host", b"x-amz-date", b"user-agent", b"Content-Length, x"])
def test_28_connection_cannot_remove_fields_that_the_proxy_adds(harness: Harness, named: bytes) -> None:
    (got,) = harness.send(request("/feeds/2021-06-30/feeds", b"Connection: close, " + named, method="POST", body=b"{}"))
    assert got.status == 200
    (received,) = harness.api.received
    assert received.body == b"{}"
    for name in ("host", "x-amz-access-token", "x-amz-date", "user-agent"):
        assert received.get(name)


def test_28_several_connection_lines_all_count(harness: Harness) -> None:
    fields = (b"Connection: x-one", b"X-One: 1", b"connection: X-Two , close", b"X-Two: 2", b"X-Three: 3")
    harness.send(request("/x", *fields))
    names = {name.lower() for name, _ in harness.api.received[0].fields}
    assert names == {"x-three", "host", "x-amz-access-token", "x-amz-date", "user-agent"}


def test_14_no_decision_depends_on_forwarding_headers(harness: Harness) -> None:
    fields = (
        b"X-Forwarded-Host: evil.test",
        b"X-Forwarded-Proto: https",
        b"Forwarded: host=evil.test",
        b"User-Agent: kube",
    )
    (got,) = harness.send(request("/x", *fields))
    assert got.status == 200
    refused_one = harness.send(request("/x", b"Host: evil.test", b"X-Forwarded-Host: localhost"))
    assert [one.status for one in refused_one] == [421]


def test_9_a_unix_socket_is_accessible_to_its_owner_alone_by_default(tmp_path: Path) -> None:
    listeners = [
        f"unix:{tmp_path}/own.sock",
        {"address": f"unix:{tmp_path}/group.sock", "mode": "0660", "group": "nogroup"},
        {"address": f"unix:{tmp_path}/nobody.sock", "owner": "nobody"},
    ]
    with Harness.start(tmp_path, listen=listeners) as harness:
        modes = {name: (tmp_path / f"{name}.sock").stat() for name in ("own", "group", "nobody")}
        assert [stat.S_IMODE(status.st_mode) for status in modes.values()] == [0o600, 0o660, 0o600]
        assert (tmp_path / "group.sock").group() == "nogroup"
        assert (tmp_path / "nobody.sock").owner() == "nobody"
        assert [one.status for one in harness.send(request("/x"))] == [200]
        attempt = ["setpriv", "--reuid=nobody", "--clear-groups", "curl", "-s", "--unix-socket", f"{tmp_path}/own.sock"]
        assert subprocess.run([*attempt, "http://localhost/x"], check=False, capture_output=True).returncode != 0


@pytest.mark.parametrize("field", [f"x-sp-key: {CALLER_KEY}", f"Authorization: Bearer {CALLER_KEY}"])
def test_6_a_listener_can_require_a_header_that_a_url_fetcher_cannot_send(tmp_path: Path, field: str) -> None:
    listen = [{"address": "127.0.0.1:0", "require_header": True}]
    callers = {"reports": {"key": CALLER_KEY, "accounts": ["acme"]}}
    with Harness.start(tmp_path, listen=listen, callers=callers) as harness:
        assert_rejected(harness, request("/x"), 403, "CallerRefused")
        assert_rejected(harness, request("/@acme/x"), 403, "CallerRefused")
        account = b"x-sp-account: acme" if "Bearer" in field else b"x: y"
        assert [one.status for one in harness.send(request("/x", field.encode(), account))] == [200]
        assert CALLER_KEY not in str(harness.api.received[0].fields)


def test_7_9_callers_are_authenticated_by_certificate_and_by_uid(tmp_path: Path) -> None:
    authority = Authority.made(tmp_path / "authority")
    certificate, key = authority.issue("localhost", alternative="DNS:localhost,IP:127.0.0.1")
    tls = {"certificate": certificate, "key": key, "client_ca": authority.certificate}
    listen = [{"address": "127.0.0.1:0", "tls": tls}, f"unix:{tmp_path}/x.sock"]
    callers = {"warehouse": {"certificate": "warehouse"}, "me": {"uid": os.getuid(), "operations": ["sellers.*"]}}
    with Harness.start(tmp_path, listen=listen, callers=callers) as harness:
        context = ssl.create_default_context(cafile=authority.certificate)
        for name, expected in (("warehouse", b"HTTP/1.1 200 "), ("stranger", b"HTTP/1.1 403 ")):
            context.load_cert_chain(*authority.issue(name))
            with (
                connect(harness.addresses[0]) as plain,
                context.wrap_socket(plain, server_hostname="localhost") as encrypted,
            ):
                stream = Stream(encrypted)
                stream.send(request("/x"))
                assert stream.rest().startswith(expected)
        assert [one.status for one in harness.send(request(), address=harness.addresses[1])] == [200]
        assert [one.error for one in harness.send(request("/x"), address=harness.addresses[1])] == ["NotAllowed"]
        with connect(harness.addresses[0]) as silent:  # a client that never starts the TLS handshake
            assert Stream(silent).rest() == b""
    assert any('"caller": "warehouse"' in line for line in harness.log)


def test_8_39_the_admin_listener_times_out_incomplete_requests(harness: Harness) -> None:
    for said in (b"", b"GET /livez HTTP/1.1\r\nHost: loc"):
        with harness.client(harness.admin) as stream:
            stream.send(said)
            got = stream.rest()
        assert got == b"" or got.startswith(b"HTTP/1.1 408 ")
