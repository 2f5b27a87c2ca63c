"""Downloads and uploads through the proxy: what goes to the storage and back, and decompression."""

import asyncio
import gzip
import json
import logging
from io import StringIO

import pytest

from proxy.observability.logging import AUDIT
from tests.request.documents.conftest import (
    CONTENT,
    FEEDS,
    SIGNED,
    Start,
    Started,
    lower,
    refused,
    serve,
)
from tests.support.fake_upstream import RawServer, Received, http_response
from tests.support.raw_client import RawResponse, call, connect, request

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


# Decompression.


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


# Concurrency.


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


# Metrics and logs.


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
