"""Documents by way of the proxy: what stands for Amazon's URLs, who may use it, what goes to the storage and back."""

import asyncio
import gzip
import json
import logging
import shutil
import ssl
import zlib
from collections.abc import AsyncIterator, Awaitable
from io import StringIO
from pathlib import Path
from typing import Any, Protocol

import pytest

from proxy.config import Secret
from proxy.observability.logging import AUDIT
from proxy.request.documents import relay as relay_module
from proxy.server.runtime import RunningProxy
from proxy.store.encryption import DecryptionFailed, DocumentCipher
from tests.conftest import StartProxy, config_from, needs, settings_for
from tests.support.certificates import Authority
from tests.support.fake_upstream import FakeUpstream, RawServer, Received, TokenHost, http_response
from tests.support.raw_client import Client, RawResponse, call, connect, request

FEEDS, REPORTS = "/feeds/2021-06-30/documents", "/reports/2021-06-30/documents"
REPORT = f"{REPORTS}/amzn1.spdoc.1"
SIGNED = "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Date=20260101T000000Z&X-Amz-Expires=300&X-Amz-Signature=distinctive-1"
CONTENT = b"sku\tquantity\n" * 100
STORE_KEY = "0123456789abcdef0123456789abcdef"


@pytest.fixture
async def storage() -> AsyncIterator[RawServer]:
    """Amazon's storage of documents."""
    async with RawServer() as server:
        serve(server, http_response("200 OK", CONTENT, content_type="text/plain", etag='"1"'))
        yield server


def serve(server: RawServer, data: bytes, *, ends: bool = False) -> None:
    """Let a server answer everything by these bytes; and then, where the connection `ends`, nothing more."""

    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()
        if ends:
            writer.close()

    server.script = script


def named(fake_upstream: FakeUpstream, url: str, field: str = "url", status: str = "200 OK") -> bytes:
    """Let Amazon name a document by this URL in all its answers; return the body."""
    body = json.dumps({"reportDocumentId": "amzn1.spdoc.1", field: url, "compressionAlgorithm": "GZIP"}).encode()
    serve(fake_upstream, http_response(status, body, content_type="application/json"))
    return body


class Started:
    """A proxy that relays, with what is behind it."""

    def __init__(self, proxy: RunningProxy, fake_upstream: FakeUpstream, storage: RawServer) -> None:
        self.proxy = proxy
        self.address = proxy.addresses[0]
        self.fake_upstream = fake_upstream
        self.storage = storage

    async def document(
        self, target: str = REPORT, query: str = SIGNED, method: str = "GET", address: str = "", **fields: str
    ) -> str:
        """Have Amazon name a document; return the target that stands for it."""
        named(self.fake_upstream, f"{self.storage.url}/bucket/%2Fa~b?{query}", status="200 OK")
        got = await call(address or self.address, method, target, b"{}" if method == "POST" else None, **fields)
        assert got.status == 200, got.body
        url = json.loads(got.body)["url"]
        assert url.startswith("http://localhost/@acme/-/documents/"), url
        return str(url.removeprefix("http://localhost"))

    async def upload(self, **fields: str) -> str:
        return await self.document(FEEDS, method="POST", **fields)

    def count(self, result: str) -> float:
        name = "spapi_proxy_document_urls_total"
        return self.proxy.metrics.registry.get_sample_value(name, {"result": result}) or 0.0


class Start(Protocol):
    """Starts a proxy whose settings are the defaults of these tests, changed by keywords."""

    def __call__(self, **settings: Any) -> Awaitable[Started]: ...


@pytest.fixture
def start(start_proxy: StartProxy, fake_upstream: FakeUpstream, token_host: TokenHost, storage: RawServer) -> Start:
    """Starts proxies that relay documents of `storage`."""

    async def started(**settings: Any) -> Started:
        endpoints = {**dict.fromkeys(("na", "eu", "fe"), fake_upstream.url), "lwa": token_host.url}
        endpoints["documents"] = storage.url
        proxy = await start_proxy(**{"documents": "relay", "endpoints": endpoints, **settings})
        return Started(proxy, fake_upstream, storage)

    return started


@pytest.fixture
async def relayed(start: Start) -> Started:
    return await start()


# Without the setting.


async def test_without_the_setting_no_byte_is_another(proxy: RunningProxy, fake_upstream: FakeUpstream) -> None:
    body = named(fake_upstream, f"https://tortuga-prod-eu.s3.amazonaws.com/a?{SIGNED}")
    got = await call(proxy.addresses[0], "GET", REPORT)
    assert got.body == body
    got = await call(proxy.addresses[0], "GET", "/@acme/-/documents/abc?decompress=1")
    assert got.status == 200
    assert fake_upstream.received[-1].target == "/-/documents/abc?decompress=1"


# Answers that name documents.


async def test_a_url_becomes_an_address_on_the_proxy_and_all_else_stays(
    start: Start, fake_upstream: FakeUpstream
) -> None:
    started = await start()
    url = f"https://tortuga-prod-eu.s3.amazonaws.com/a?{SIGNED}"
    before = b'{ "x" : 1.10,\t"url":"' + url.replace("/", "\\/").encode() + b'", "caf\xc3\xa9":"\\u00e9", "n":1e2 }\n'
    fields = {"content_type": "application/json", "etag": '"1"', "x_amzn_requestid": "id"}
    serve(fake_upstream, http_response("200 OK", before, **fields))
    got = await call(started.address, "GET", REPORT)
    new = json.loads(got.body)["url"]
    assert got.body == before.replace(url.replace("/", "\\/").encode(), new.encode())
    assert (got.get("content-length"), got.get("etag")) == (str(len(got.body)), None)
    assert (got.get("content-type"), got.get("x-amzn-requestid")) == ("application/json", "id")
    assert "amazonaws" not in new
    assert "distinctive" not in new
    assert started.count("relayed") == 1


@pytest.mark.parametrize(
    ("method", "target", "body"),
    [
        ("POST", FEEDS, {"feedDocumentId": "1", "url": "@1"}),
        ("GET", f"{FEEDS}/1", {"feedDocumentId": "1", "url": "@1"}),
        ("GET", "/dataKiosk/2023-11-15/documents/1", {"documentUrl": "@1"}),
        ("POST", "/uploads/2020-11-01/uploadDestinations/messaging/v1/a", {"payload": {"url": "@1", "headers": {}}}),
        ("GET", "/awd/2024-05-09/inboundShipments/1/labels", {"labelDownloadURL": "@1"}),
        ("GET", "/fba/inbound/v0/shipments/1/labels", {"payload": {"DownloadURL": "@1"}}),
        ("POST", "/inbound/fba/2024-03-20/items/labels", {"documentDownloads": [{"uri": "@1"}, {"uri": "@2"}]}),
        ("GET", "/tax/invoices/2024-06-19/documents/1", {"invoicesDocument": {"invoicesDocumentUrl": "@1"}}),
    ],
)
async def test_every_operation_that_names_documents(
    relayed: Started, method: str, target: str, body: dict[str, Any]
) -> None:
    text = json.dumps(body).replace("@", f"{relayed.storage.url}/")
    serve(relayed.fake_upstream, http_response("201 Created", text.encode()))
    got = await call(relayed.address, method, target, b"{}" if method == "POST" else None)
    assert relayed.storage.url not in got.body.decode()
    assert got.body.decode().count("http://localhost/@acme/-/documents/") == text.count(relayed.storage.url)


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
async def test_a_packed_answer_is_unpacked_and_rewritten(relayed: Started, coding: str) -> None:
    body = json.dumps({"url": f"{relayed.storage.url}/1"}).encode()
    packed = gzip.compress(body, mtime=0) if coding == "gzip" else zlib.compress(body)
    serve(relayed.fake_upstream, http_response("200 OK", packed, content_encoding=coding))
    got = await call(relayed.address, "GET", REPORT)
    assert json.loads(got.body)["url"].startswith("http://localhost/@acme/")
    assert got.get("content-encoding") is None
    assert got.get("content-length") == str(len(got.body))


async def test_an_answer_in_chunks_is_rewritten(relayed: Started) -> None:
    body = json.dumps({"url": f"{relayed.storage.url}/1"}).encode()
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:20], body[20:])) + b"0\r\n\r\n"
    serve(relayed.fake_upstream, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)
    got = await call(relayed.address, "GET", REPORT)
    assert json.loads(got.body)["url"].startswith("http://localhost/@acme/")


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("https://storage.example/a", "foreign_host"),
        ("http://tortuga-prod-eu.s3.amazonaws.com/a", "foreign_host"),
        ("https://tortuga-prod-eu.s3.amazonaws.com:8443/a", "foreign_host"),
        ("https://s3.amazonaws.com@evil.test/a", "foreign_host"),
        ("https://s3.amazonaws.com/" + "a" * 12_000, "too_large"),
    ],
)
async def test_what_leads_elsewhere_stays_as_it_is_and_is_told_once(
    relayed: Started, log: StringIO, url: str, why: str
) -> None:
    body = named(relayed.fake_upstream, url)
    for _ in range(2):
        assert (await call(relayed.address, "GET", REPORT)).body == body
    assert relayed.count(why) == 2
    assert relayed.count("relayed") == 0
    lines = [line for line in log.getvalue().splitlines() if "is left as Amazon gave it" in line]
    assert len(lines) == 1
    assert why in lines[0]
    assert url not in log.getvalue()


@pytest.mark.parametrize("is_packed", [False, True])
async def test_an_answer_too_large_to_be_kept_passes_as_it_is(
    relayed: Started, *, is_packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_module, "MAX_REWRITTEN", 1000)
    body = json.dumps({"url": f"{relayed.storage.url}/1", "more": "a" * 200_000}).encode()
    sent = gzip.compress(body, mtime=0) if is_packed else body
    serve(relayed.fake_upstream, http_response("200 OK", sent, **({"content_encoding": "gzip"} if is_packed else {})))
    assert (await call(relayed.address, "GET", REPORT)).body == sent
    assert relayed.count("too_large") == 1


async def test_an_answer_of_very_many_urls_passes_as_it_is(relayed: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "MAX_URLS", 2)
    for count in (2, 3):
        urls = [{"uri": f"{relayed.storage.url}/{number}"} for number in range(count)]
        body = json.dumps({"documentDownloads": urls}).encode()
        serve(relayed.fake_upstream, http_response("200 OK", body))
        got = await call(relayed.address, "POST", "/inbound/fba/2024-03-20/items/labels", b"{}")
        assert (got.body == body) == (count == 3)
    assert relayed.count("too_large") == 1


async def test_a_url_is_found_however_it_is_spelt(relayed: Started) -> None:
    url = f"{relayed.storage.url}/1"
    spelt = "".join(f"\\u{ord(letter):04x}" for letter in url)
    serve(
        relayed.fake_upstream, http_response("200 OK", f'{{"http": "x", "url": "{spelt}", "note": "{url}"}}'.encode())
    )
    got = json.loads((await call(relayed.address, "GET", REPORT)).body)
    assert got["url"] == got["note"] != url
    assert got["url"].startswith("http://localhost/@acme/")


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"<html>"])
async def test_an_answer_that_is_no_json_passes_as_it_is(relayed: Started, body: bytes) -> None:
    serve(relayed.fake_upstream, http_response("200 OK", body))
    assert (await call(relayed.address, "GET", REPORT)).body == body
    assert relayed.count("unreadable") == 1


async def test_an_answer_in_an_unknown_coding_passes_as_it_is(relayed: Started) -> None:
    serve(relayed.fake_upstream, http_response("200 OK", b"\x1b\x0f", content_encoding="br"))
    assert (await call(relayed.address, "GET", REPORT)).body == b"\x1b\x0f"
    assert relayed.count("unreadable") == 1


async def test_refusals_and_other_operations_are_not_looked_into(relayed: Started) -> None:
    body = json.dumps({"url": f"{relayed.storage.url}/1"}).encode()
    serve(relayed.fake_upstream, http_response("404 Not Found", body))
    assert (await call(relayed.address, "GET", REPORT)).body == body
    serve(relayed.fake_upstream, http_response("200 OK", body))
    assert (await call(relayed.address, "GET", "/sellers/v1/marketplaceParticipations")).body == body
    assert relayed.count("relayed") == 0


@pytest.mark.parametrize("body", ['{"url": "', '{"url": "URL"}'])
async def test_an_answer_that_is_cut_off_looks_cut_off(relayed: Started, body: str) -> None:
    body = body.replace("URL", f"{relayed.storage.url}/1")
    serve(relayed.fake_upstream, f"HTTP/1.1 200 OK\r\nContent-Length: 200\r\n\r\n{body}".encode(), ends=True)
    got = await call(relayed.address, "GET", REPORT)
    assert (got.status, got.complete, got.body) == (200, False, body.encode())


@pytest.mark.parametrize(
    ("settings", "line", "base"),
    [
        ({}, f"GET {REPORT} HTTP/1.1\r\nhost: 127.0.0.1:18080\r\n\r\n", "http://127.0.0.1:18080"),
        ({}, f"GET {REPORT} HTTP/1.1\r\nhost: [::1]:1\r\n\r\n", "http://[::1]:1"),
        (
            {},
            f"GET http://sellingpartnerapi-eu.amazon.com{REPORT} HTTP/1.1\r\nhost: localhost\r\n\r\n",
            "http://sellingpartnerapi-eu.amazon.com",
        ),
        (
            {"allowed_hosts": ["sp.internal"]},
            f"GET {REPORT} HTTP/1.1\r\nhost: sp.internal\r\n\r\n",
            "http://sp.internal",
        ),
        (
            {"documents_url": "https://gateway.internal/sp/"},
            f"GET {REPORT} HTTP/1.1\r\nhost: localhost\r\n\r\n",
            "https://gateway.internal/sp",
        ),
    ],
)
async def test_the_address_is_where_the_app_found_the_proxy(
    start: Start, settings: dict[str, Any], line: str, base: str
) -> None:
    started = await start(**settings)
    named(started.fake_upstream, f"{started.storage.url}/1")
    async with connect(started.address) as client:
        await client.send(line.encode())
        got = await client.read_response()
    assert json.loads(got.body)["url"].startswith(f"{base}/@acme/-/documents/")


async def test_the_address_says_https_where_the_listener_speaks_tls(start: Start, tmp_path: Path) -> None:
    needs(shutil.which("openssl") is not None, "openssl")
    authority = Authority.made(tmp_path / "authority")
    certificate, key = authority.issue("localhost", alternative="DNS:localhost")
    started = await start(listen={"address": "127.0.0.1:0", "tls": {"certificate": certificate, "key": key}})
    named(started.fake_upstream, f"{started.storage.url}/1")
    context, port = ssl.create_default_context(cafile=authority.certificate), int(started.address.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="localhost")
    got = await Client(reader, writer).request("GET", REPORT)
    writer.close()
    assert json.loads(got.body)["url"].startswith("https://localhost/@acme/-/documents/")


async def test_an_app_at_a_unix_socket_uses_the_same_socket(start: Start, tmp_path: Path) -> None:
    started = await start(listen=f"unix:{tmp_path}/x.sock")
    target = await started.document()
    assert (await call(started.address, "GET", target)).body == CONTENT


# Downloads.


async def test_a_download_comes_as_the_storage_sends_it(relayed: Started) -> None:
    target = await relayed.document()
    got = await call(relayed.address, "GET", target)
    assert (got.status, got.body, got.get("content-type"), got.get("etag")) == (200, CONTENT, "text/plain", '"1"')
    assert got.get("x-sp-proxy") == (
        "account=acme; region=eu; operation=relayDocument; token=none; attempts=1; wait=0.000"
    )
    assert relayed.storage.received[-1].target == f"/bucket/%2Fa~b?{SIGNED}"
    assert relayed.storage.received[-1].method == "GET"


async def test_nothing_of_the_apps_goes_to_the_storage_but_what_that_needs(relayed: Started) -> None:
    target = await relayed.document()
    await call(
        relayed.address,
        "GET",
        target,
        authorization="Bearer secret",
        cookie="a=b",
        x_amz_access_token="Atza|own",
        x_amz_security_token="token",
        x_sp_account="acme",
        x_sp_client="c",
        user_agent="app",
        accept_encoding="gzip",
        x_forwarded_for="10.0.0.1",
        x_internal="secret",
        if_none_match='"2"',
        range="bytes=0-9",
    )
    sent = relayed.storage.received[-1]
    host = relayed.storage.url.removeprefix("http://")
    assert lower(sent) == [("host", host), ("if-none-match", '"2"'), ("range", "bytes=0-9")]


@pytest.mark.parametrize(
    "data",
    [
        http_response("403 Forbidden", b"<Error><Code>AccessDenied</Code></Error>", content_type="application/xml"),
        http_response("206 Partial Content", b"part", content_range="bytes 0-3/100"),
        http_response("307 Temporary Redirect", b"", location="http://127.0.0.1:1/elsewhere"),
        http_response("503 Slow Down", b""),
    ],
)
async def test_whatever_the_storage_says_is_passed_on(relayed: Started, data: bytes) -> None:
    target = await relayed.document()
    serve(relayed.storage, data)
    got = await call(relayed.address, "GET", target)
    assert got.error is None
    assert f"HTTP/1.1 {got.status} {got.reason}".encode() == data.split(b"\r\n")[0]
    assert got.body == data.partition(b"\r\n\r\n")[2]
    assert got.get("location") in {None, "http://127.0.0.1:1/elsewhere"}
    assert len(relayed.storage.received) == 1


async def test_a_download_that_is_cut_off_breaks_the_apps_connection(relayed: Started) -> None:
    target = await relayed.document()
    serve(relayed.storage, b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b"a" * 500, ends=True)
    async with connect(relayed.address) as client:
        got = await client.request("GET", target)
        assert (got.complete, got.body) == (False, b"a" * 500)
        assert await client.at_end()
    assert relayed.proxy.metrics.registry.get_sample_value("spapi_proxy_answers_cut_off_total") == 1


async def test_a_connection_that_ended_while_it_was_idle_costs_nothing_but_another(relayed: Started) -> None:
    target = await relayed.document()
    assert (await call(relayed.address, "GET", target)).status == 200
    first = True

    async def script(received: Received, writer: asyncio.StreamWriter) -> None:
        nonlocal first
        if first and received.connection == 1:
            first = False
            writer.close()
        else:
            writer.write(http_response("200 OK", CONTENT))
            await writer.drain()

    relayed.storage.script = script
    got = await call(relayed.address, "GET", target)
    assert (got.status, got.body, got.decided["attempts"]) == (200, CONTENT, "2")


async def test_a_storage_that_says_nothing_is_told_in_time(start: Start) -> None:
    started = await start(timeouts={"upstream_idle": "100ms"})
    target = await started.document()

    async def script(_: Received, __: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    started.storage.script = script
    assert await refused(started.address, "GET", target) == (504, "UpstreamTimeout")
    assert await refused(started.address, "GET", target, x_sp_timeout="50ms") == (504, "CallTimeout")


async def test_a_storage_that_is_not_there_is_told(relayed: Started) -> None:
    target = await relayed.document()
    await relayed.storage.__aexit__()
    got = await call(relayed.address, "GET", target)
    assert (got.status, got.error) == (502, "UpstreamUnreachable")
    assert b"distinctive" not in got.body


# Uploads.


async def test_an_upload_brings_what_its_signature_covers(relayed: Started) -> None:
    signed = "X-Amz-SignedHeaders=content-md5%3Bcontent-type%3Bhost%3Bx-amz-acl&X-Amz-Expires=300"
    target = await relayed.document(FEEDS, query=signed, method="POST")
    got = await call(
        relayed.address,
        "PUT",
        target,
        b"<xml/>",
        content_type="text/xml; charset=UTF-8",
        content_md5="abc==",
        x_amz_acl="private",
        x_amz_server_side_encryption="aws:kms",
        x_amz_request_payer="requester",
        authorization="Bearer secret",
    )
    assert got.status == 200
    sent = relayed.storage.received[-1]
    assert (sent.method, sent.target, sent.body) == ("PUT", f"/bucket/%2Fa~b?{signed}", b"<xml/>")
    assert lower(sent) == [
        ("host", relayed.storage.url.removeprefix("http://")),
        ("content-type", "text/xml; charset=UTF-8"),
        ("content-md5", "abc=="),
        ("x-amz-acl", "private"),
        ("x-amz-server-side-encryption", "aws:kms"),
        ("content-length", "6"),
    ]


async def test_an_upload_in_chunks_goes_on_in_chunks(relayed: Started) -> None:
    target = await relayed.upload()
    async with connect(relayed.address) as client:
        await client.send(request("PUT", target, b"3\r\nabc\r\n0\r\n\r\n", transfer_encoding="chunked"))
        assert (await client.read_response()).status == 200
    assert relayed.storage.received[-1].body == b"abc"
    assert relayed.storage.received[-1].get("transfer-encoding") == "chunked"


async def test_an_app_that_leaves_in_its_upload_ends_the_one_to_the_storage(relayed: Started) -> None:
    target = await relayed.upload()
    arrived = announced(relayed.storage)
    async with connect(relayed.address) as client:
        await client.send(request("PUT", target, None, content_length="1000") + b"a" * 10)
        await asyncio.wait_for(arrived.wait(), 10)
    await asyncio.wait_for(relayed.storage.last_closed.wait(), 10)
    assert not relayed.storage.received[-1].body


def announced(server: RawServer) -> asyncio.Event:
    """Return what is set when the head of the next request has come, whose body is left unread."""
    arrived = asyncio.Event()
    server.reads_bodies = False

    async def script(received: Received, _: asyncio.StreamWriter) -> None:
        arrived.set()
        assert received.reader is not None
        await received.reader.readexactly(1000)

    server.script = script
    return arrived


# Who may use an address.


def lower(sent: Received) -> list[tuple[str, str]]:
    return [(name.lower(), value) for name, value in sent.fields]


async def refused(address: str, method: str, target: str, body: bytes | None = None, **fields: str) -> tuple[int, str]:
    got = await call(address, method, target, body, **fields)
    assert got.error is not None
    return got.status, got.error


@pytest.mark.parametrize("where", [0, 1, 10, 40, -2])
async def test_an_address_that_was_changed_is_refused(relayed: Started, where: int) -> None:
    target = await relayed.document()
    head, slash, sealed = target.rpartition("/")
    letters = list(sealed)
    letters[where] = "B" if letters[where] != "B" else "C"
    assert await refused(relayed.address, "GET", head + slash + "".join(letters)) == (403, "DocumentRefused")
    assert not relayed.storage.received


@pytest.mark.parametrize("sealed", ["a", "abcd", "A" * 100, "_-" * 50, "A" * 15_000])
async def test_what_is_no_address_is_refused(relayed: Started, sealed: str) -> None:
    assert await refused(relayed.address, "GET", f"/@acme/-/documents/{sealed}") == (403, "DocumentRefused")


@pytest.mark.parametrize(
    "target",
    [
        "/@acme/-/documents/",
        "/@acme/-/documents/a/b",
        "/@acme/-/documents/a%41",
        "/@acme/-/documents/a?decompress=2",
        "/@acme/-/documents/a?x=1",
        "/@acme/-/documents/a=",
    ],
)
async def test_what_has_not_the_form_of_an_address_is_told(relayed: Started, target: str) -> None:
    assert await refused(relayed.address, "GET", target) == (400, "BadTarget")


async def test_a_query_that_holds_the_word_is_no_address(relayed: Started) -> None:
    got = await call(relayed.address, "GET", "/@acme/sellers/v1/marketplaceParticipations?a=/-/documents/b")
    assert got.error is None


async def test_another_account_may_not_use_it(start: Start) -> None:
    accounts = {name: {"refresh_tokens": {"eu": f"Atzr|{name}"}} for name in ("acme", "zeta")}
    started = await start(accounts=accounts)
    target = await started.document(x_sp_account="acme")
    other = target.replace("/@acme/", "/@zeta/")
    assert await refused(started.address, "GET", other) == (403, "DocumentRefused")
    assert await refused(started.address, "GET", target, x_sp_account="zeta") == (400, "ConflictingSources")
    unknown = target.replace("/@acme/", "/@nobody/")
    assert await refused(started.address, "GET", unknown) == (400, "UnknownAccount")
    assert not started.storage.received


@pytest.mark.parametrize("method", ["PUT", "POST", "DELETE", "PATCH"])
async def test_a_download_is_no_upload(relayed: Started, method: str) -> None:
    target = await relayed.document()
    assert await refused(relayed.address, method, target, b"x") == (403, "DocumentRefused")
    assert not relayed.storage.received


async def test_an_upload_is_no_download(relayed: Started) -> None:
    target = await relayed.upload()
    assert await refused(relayed.address, "GET", target) == (403, "DocumentRefused")
    got = await call(relayed.address, "HEAD", target)
    assert (got.status, got.error) == (403, "DocumentRefused")
    assert not relayed.storage.received


async def test_it_lasts_no_longer_than_the_url(relayed: Started) -> None:
    target = await relayed.document(query="X-Amz-Expires=0")
    assert await refused(relayed.address, "GET", target) == (403, "DocumentExpired")


async def test_it_lasts_no_longer_than_an_hour(relayed: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "MAX_LIFETIME", 0.0)
    target = await relayed.document(query="X-Amz-Expires=604800")
    assert await refused(relayed.address, "GET", target) == (403, "DocumentExpired")


@pytest.mark.parametrize(
    ("fields", "code"),
    [({"host": "evil.test"}, "HostRefused"), ({"origin": "http://evil.test"}, "BrowserRefused")],
)
async def test_the_guard_stands_before_documents_too(relayed: Started, fields: dict[str, str], code: str) -> None:
    target = await relayed.document()
    assert (await call(relayed.address, "GET", target, None, **fields)).error == code
    assert not relayed.storage.received


async def test_a_caller_may_not_use_what_another_got(start: Start) -> None:
    callers = {name: {"key": f"key-of-{name}", "accounts": ["acme"]} for name in ("one", "two")}
    callers["three"] = {"key": "key-of-three", "accounts": ["zeta"]}
    accounts = {name: {"refresh_tokens": {"eu": f"Atzr|{name}"}} for name in ("acme", "zeta")}
    started = await start(callers=callers, accounts=accounts)
    target = await started.document(x_sp_key="key-of-one", x_sp_account="acme")
    assert (await call(started.address, "GET", target, x_sp_key="key-of-one")).body == CONTENT
    assert await refused(started.address, "GET", target) == (403, "CallerRefused")
    assert await refused(started.address, "GET", target, x_sp_key="key-of-two") == (403, "DocumentRefused")
    assert await refused(started.address, "GET", target, x_sp_key="key-of-three") == (403, "NotAllowed")
    assert len(started.storage.received) == 1


@pytest.mark.parametrize(
    ("policy", "code"),
    [
        ({"operations": ["orders.*"]}, "NotAllowed"),
        ({"operations": ["reports.*"]}, None),
        ({"operations": ["READ *"]}, None),
        ({"accounts": ["zeta"]}, "NotAllowed"),
        ({"account": "zeta"}, "ConflictingSources"),
        ({"region": "na"}, "DocumentRefused"),
        ({"region": "eu", "account": "acme"}, None),
        ({"require_header": True}, "HeaderRequired"),
    ],
)
async def test_a_listener_serves_the_documents_of_what_may_be_called_there(
    start: Start, policy: dict[str, Any], code: str | None
) -> None:
    accounts = {name: {"refresh_tokens": {"eu": f"Atzr|{name}", "na": "Atzr|na"}} for name in ("acme", "zeta")}
    listen = [{"address": "127.0.0.1:0"}, {"address": "127.0.0.1:0", **policy}]
    started = await start(listen=listen, accounts=accounts)
    target = await started.document(x_sp_account="acme", x_sp_region="eu")
    got = await call(started.proxy.addresses[1], "GET", target)
    assert got.error == code
    assert len(started.storage.received) == (code is None)


async def test_a_document_with_personal_data_stays_with_those_who_may_have_some(start: Start) -> None:
    listen = [{"address": "127.0.0.1:0"}, {"address": "127.0.0.1:0", "data_elements": []}]
    started = await start(listen=listen)
    restricted = await started.document()
    assert started.fake_upstream.minted
    assert (await call(started.address, "GET", restricted)).body == CONTENT
    assert await refused(started.proxy.addresses[1], "GET", restricted) == (403, "NotAllowed")
    harmless = await started.document(address=started.proxy.addresses[1])
    assert (await call(started.proxy.addresses[1], "GET", harmless)).body == CONTENT
    assert (await call(started.address, "GET", harmless)).body == CONTENT


# Keys.


async def test_replicas_with_one_key_serve_each_others_addresses(start: Start) -> None:
    one, two = await start(store_key=STORE_KEY), await start(store_key=STORE_KEY)
    target = await one.document()
    assert (await call(two.address, "GET", target)).body == CONTENT


async def test_without_a_key_each_process_has_its_own(start: Start) -> None:
    one, two = await start(), await start()
    target = await one.document()
    assert await refused(two.address, "GET", target) == (403, "DocumentRefused")


def test_a_new_key_opens_what_the_old_one_sealed() -> None:
    def keys(*texts: str) -> tuple[Secret, ...]:
        return tuple(map(Secret, texts))

    old, both, new = (
        DocumentCipher(keys("o" * 32)),
        DocumentCipher(keys("n" * 32, "o" * 32)),
        DocumentCipher(keys("n" * 32)),
    )
    sealed = old.encrypt("acme", b"text")
    assert both.decrypt("acme", sealed) == b"text"
    assert new.decrypt("acme", both.encrypt("acme", b"text")) == b"text"
    assert old.encrypt("acme", b"text") != sealed
    for cipher, account in ((new, "acme"), (both, "zeta"), (DocumentCipher(()), "acme")):
        with pytest.raises(DecryptionFailed):
            cipher.decrypt(account, sealed)


async def test_an_address_outlives_a_reload(
    start: Start, fake_upstream: FakeUpstream, token_host: TokenHost, storage: RawServer, tmp_path: Path
) -> None:
    started = await start()
    target = await started.document()
    settings = settings_for(fake_upstream, token_host, documents="relay", warm_up=True)
    settings["endpoints"]["documents"] = storage.url
    assert (await started.proxy.apply_config(config_from(settings, tmp_path))).has_changed
    assert (await call(started.address, "GET", target)).body == CONTENT
    settings["documents"] = "direct"
    await started.proxy.apply_config(config_from(settings, tmp_path))
    serve(fake_upstream, http_response("404 Not Found"))
    assert (await call(started.address, "GET", target)).status == 404
    settings["documents"] = "relay"
    await started.proxy.apply_config(config_from(settings, tmp_path))
    assert (await call(started.address, "GET", target)).body == CONTENT


# Unpacking.


async def unpacked(relayed: Started, data: bytes, **fields: str) -> RawResponse:
    target = await relayed.document()
    serve(relayed.storage, data)
    return await call(relayed.address, "GET", f"{target}?decompress=1", **fields)


@pytest.mark.parametrize("coding", [{}, {"content_encoding": "gzip"}, {"content_encoding": "x-gzip"}])
async def test_a_packed_document_is_unpacked_on_request(relayed: Started, coding: dict[str, str]) -> None:
    content = CONTENT * 1000
    about = {"etag": '"1"', "accept_ranges": "bytes", "x_amz_checksum_crc32": "AAAA", "content_type": "text/plain"}
    got = await unpacked(relayed, http_response("200 OK", gzip.compress(content, mtime=0), **coding, **about))
    assert got.body == content
    assert got.complete
    gone = ("content-encoding", "content-length", "etag", "accept-ranges", "x-amz-checksum-crc32")
    assert [got.get(name) for name in gone] == [None] * 5
    assert (got.get("content-type"), got.get("transfer-encoding")) == ("text/plain", "chunked")


async def test_an_old_client_gets_an_unpacked_document_to_the_end_of_its_connection(relayed: Started) -> None:
    target = await relayed.document()
    serve(relayed.storage, http_response("200 OK", gzip.compress(CONTENT, mtime=0)))
    async with connect(relayed.address) as client:
        await client.send(f"GET {target}?decompress=1 HTTP/1.0\r\nhost: localhost\r\n\r\n".encode())
        got = await client.read_response()
    assert (got.body, got.get("transfer-encoding"), got.get("connection")) == (CONTENT, None, None)


@pytest.mark.parametrize(
    "data",
    [
        http_response("200 OK", CONTENT),
        http_response("200 OK", b""),
        http_response("200 OK", b"\x1f"),
        http_response("200 OK", CONTENT, content_encoding="identity"),
        http_response("200 OK", b"\x1b\x0f", content_encoding="br"),
        http_response("403 Forbidden", gzip.compress(b"<Error/>", mtime=0)),
        http_response("304 Not Modified"),
    ],
)
async def test_what_is_not_packed_is_passed_on_as_it_is(relayed: Started, data: bytes) -> None:
    got = await unpacked(relayed, data)
    assert got.error is None
    assert got.body == data.partition(b"\r\n\r\n")[2]


async def test_no_part_of_a_document_is_unpacked(relayed: Started) -> None:
    got = await unpacked(relayed, http_response("200 OK"), range="bytes=0-9")
    assert (got.status, got.error) == (400, "BadOption")
    target = await relayed.upload()
    assert await refused(relayed.address, "PUT", f"{target}?decompress=1", b"x") == (400, "BadOption")
    assert not relayed.storage.received


@pytest.mark.parametrize(
    "data",
    [
        http_response("200 OK", gzip.compress(CONTENT, mtime=0)[:-4]),
        http_response("200 OK", gzip.compress(CONTENT, mtime=0)[:-8] + b"12345678"),
        http_response("200 OK", b"\x1f\x8b and then something else"),
        http_response("200 OK", CONTENT, content_encoding="gzip"),
        http_response("200 OK", gzip.compress(CONTENT, mtime=0) + b"garbage"),
    ],
)
async def test_a_document_that_is_no_gzip_is_told(relayed: Started, data: bytes) -> None:
    got = await unpacked(relayed, data)
    assert (got.status, got.error) == (502, "BadGzip")


async def test_damage_further_on_breaks_the_apps_connection(relayed: Started, log: StringIO) -> None:
    packed = gzip.compress(b"".join(b"%d\n" % number for number in range(200_000)))
    got = await unpacked(relayed, http_response("200 OK", packed[:-8] + b"12345678"))
    assert got.status == 200
    assert not got.complete
    assert '"error": "BadGzip"' in log.getvalue()


async def test_a_packed_document_that_is_cut_off_looks_cut_off(relayed: Started) -> None:
    packed = gzip.compress(b"".join(b"%d\n" % number for number in range(200_000)))
    target = await relayed.document()
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(packed)
    serve(relayed.storage, head + packed[:-100], ends=True)
    got = await call(relayed.address, "GET", f"{target}?decompress=1")
    assert (got.status, got.complete) == (200, False)
    serve(relayed.storage, head + packed[:12], ends=True)
    assert (await refused(relayed.address, "GET", f"{target}?decompress=1"))[1] == "UpstreamBroken"


async def test_a_bomb_is_given_up(relayed: Started, log: StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.request.documents.gzip_stream.BOMB_THRESHOLD", 1024 * 1024)
    got = await unpacked(relayed, http_response("200 OK", gzip.compress(bytes(20 * 1024 * 1024))))
    assert got.status == 200
    assert not got.complete
    assert len(got.body) < 4 * 1024 * 1024
    assert '"error": "GzipBomb"' in log.getvalue()


# Many at once.


async def test_documents_leave_half_of_the_connections_to_calls(start: Start) -> None:
    started = await start(pool={"max_connections": 4})
    target = await started.document()
    both, released = asyncio.Event(), asyncio.Event()

    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        if len(started.storage.received) == 2:
            both.set()
        await released.wait()
        writer.write(http_response("200 OK", CONTENT))
        await writer.drain()

    started.storage.script = script
    under_way = [asyncio.create_task(call(started.address, "GET", target)) for _ in range(2)]
    await asyncio.wait_for(both.wait(), 10)
    got = await call(started.address, "GET", target)
    assert (got.status, got.error, got.get("retry-after")) == (503, "DocumentsBusy", "1")
    assert (await call(started.address, "GET", "/sellers/v1/marketplaceParticipations")).error is None
    released.set()
    assert [got.body for got in await asyncio.gather(*under_way)] == [CONTENT, CONTENT]
    assert (await call(started.address, "GET", target)).body == CONTENT


# What is said of it.


async def test_a_document_is_counted_and_logged_without_its_url(relayed: Started, log: StringIO) -> None:
    target = await relayed.document()
    await call(relayed.address, "GET", target)
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    line = next(line for line in lines if line.get("operation") == "relayDocument")
    assert (line["account"], line["region"], line["code"], line["token"]) == ("acme", "eu", 200, "none")
    sealed = target.rpartition("/")[2]
    assert sealed not in log.getvalue()
    assert "distinctive" not in log.getvalue()
    labels = {"account": "acme", "region": "eu", "operation": "relayDocument", "method": "GET", "code": "200"}
    count = relayed.proxy.metrics.registry.get_sample_value(
        "spapi_proxy_requests_total", {**labels, "token": "none", "source": "amazon"}
    )
    assert count == 1
    received = relayed.proxy.metrics.registry.get_sample_value(
        "spapi_proxy_response_body_bytes_total", {"account": "acme", "region": "eu", "operation": "relayDocument"}
    )
    assert received == len(CONTENT)


async def test_the_audit_log_says_that_a_document_had_personal_data(
    relayed: Started, caplog: pytest.LogCaptureFixture
) -> None:
    target = await relayed.document()
    with caplog.at_level(logging.INFO, logger=AUDIT.name):
        AUDIT.addHandler(caplog.handler)
        try:
            await call(relayed.address, "GET", target)
        finally:
            AUDIT.removeHandler(caplog.handler)
    fields = [getattr(record, "fields", {}) for record in caplog.records]
    line = [one for one in fields if "data_elements" in one][-1]
    assert line["operation"] == "relayDocument"
    assert line["data_elements"] == ["buyerInfo", "shippingAddress", "buyerTaxInformation"]
