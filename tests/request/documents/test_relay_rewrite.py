"""Responses that name documents: presigned URLs become addresses on the proxy."""

import asyncio
import gzip
import json
import shutil
import ssl
import zlib
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from proxy.request.documents import relay_rewrite
from proxy.server.runtime import RunningProxy
from tests.conftest import needs
from tests.request.documents.conftest import (
    CONTENT,
    FEEDS,
    REPORT,
    SIGNED,
    Start,
    Started,
    named,
    serve,
)
from tests.support.certificates import Authority
from tests.support.fake_upstream import FakeUpstream, http_response
from tests.support.raw_client import Client, call, connect

# Without the setting.


async def test_without_the_setting_no_byte_is_another(proxy: RunningProxy, fake_upstream: FakeUpstream) -> None:
    body = named(fake_upstream, f"https://tortuga-prod-eu.s3.amazonaws.com/a?{SIGNED}")
    got = await call(proxy.addresses[0], "GET", REPORT)
    assert got.body == body
    got = await call(proxy.addresses[0], "GET", "/@acme/-/documents/abc?decompress=1")
    assert got.status == 200
    assert fake_upstream.received[-1].target == "/-/documents/abc?decompress=1"


# Responses that name documents.


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
async def test_a_packed_response_is_unpacked_and_rewritten(relayed: Started, coding: str) -> None:
    body = json.dumps({"url": f"{relayed.storage.url}/1"}).encode()
    packed = gzip.compress(body, mtime=0) if coding == "gzip" else zlib.compress(body)
    serve(relayed.fake_upstream, http_response("200 OK", packed, content_encoding=coding))
    got = await call(relayed.address, "GET", REPORT)
    assert json.loads(got.body)["url"].startswith("http://localhost/@acme/")
    assert got.get("content-encoding") is None
    assert got.get("content-length") == str(len(got.body))


async def test_a_response_in_chunks_is_rewritten(relayed: Started) -> None:
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
    lines = [line for line in log.getvalue().splitlines() if "URL was not replaced" in line]
    assert len(lines) == 1
    assert why in lines[0]
    assert url not in log.getvalue()


@pytest.mark.parametrize("is_packed", [False, True])
async def test_a_response_too_large_to_be_kept_passes_as_it_is(
    relayed: Started, *, is_packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_rewrite, "MAX_REWRITTEN", 1000)
    body = json.dumps({"url": f"{relayed.storage.url}/1", "more": "a" * 200_000}).encode()
    sent = gzip.compress(body, mtime=0) if is_packed else body
    serve(relayed.fake_upstream, http_response("200 OK", sent, **({"content_encoding": "gzip"} if is_packed else {})))
    assert (await call(relayed.address, "GET", REPORT)).body == sent
    assert relayed.count("too_large") == 1


async def test_a_response_of_very_many_urls_passes_as_it_is(relayed: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_rewrite, "MAX_URLS", 2)
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
async def test_a_response_that_is_no_json_passes_as_it_is(relayed: Started, body: bytes) -> None:
    serve(relayed.fake_upstream, http_response("200 OK", body))
    assert (await call(relayed.address, "GET", REPORT)).body == body
    assert relayed.count("unreadable") == 1


async def test_a_response_in_an_unknown_coding_passes_as_it_is(relayed: Started) -> None:
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
async def test_a_response_that_is_cut_off_looks_cut_off(relayed: Started, body: str) -> None:
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
