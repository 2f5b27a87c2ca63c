"""What reaches Amazon, and what reaches the app: held byte by byte, with a raw server on either side."""

import asyncio
import gzip
import shutil
import ssl
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy

from proxy.errors import MalformedRequest
from proxy.request.upstream.request_headers import end_to_end_headers
from proxy.server.runtime import RunningProxy
from tests.conftest import StartProxy, needs
from tests.support.fake_upstream import FakeUpstream, Received, TokenHost, http_response
from tests.support.raw_client import Client, call, connect, request

SELLERS = "/sellers/v1/marketplaceParticipations"
FEEDS = "/feeds/2021-06-30/feeds"


# The request, on its way to Amazon.


async def test_path_and_query_reach_amazon_byte_for_byte(proxy: RunningProxy, fake_upstream: FakeUpstream) -> None:
    target = "/listings/2021-08-01/items/A1/%7Esku%2F%2b%41%00 %0d%0a".replace(" ", "%20") + "?a=%7E&b=&&c=x+y%2Bz&a=2?"
    await call(proxy.addresses[0], "GET", target)
    assert fake_upstream.received[0].target == target


async def test_an_empty_query_is_kept(proxy: RunningProxy, fake_upstream: FakeUpstream) -> None:
    await call(proxy.addresses[0], "GET", SELLERS + "?")
    assert fake_upstream.received[0].target == SELLERS + "?"


async def test_a_long_target_reaches_amazon_whole(proxy: RunningProxy, fake_upstream: FakeUpstream) -> None:
    target = "/catalog/2022-04-01/items?keywords=" + "%C3%BC" * 1300
    await call(proxy.addresses[0], "GET", target)
    assert fake_upstream.received[0].target == target


async def test_amazon_gets_its_token_date_and_user_agent_once_each(
    start_proxy: StartProxy, fake_upstream: FakeUpstream
) -> None:
    application = {
        "client_id": "client",
        "client_secret": "secret",
        "user_agent": {"name": "My Tool/2", "version": "2.10", "language": "Python/3", "platform": "Li;nux"},
    }
    proxy = await start_proxy(applications={"main": application})
    await call(proxy.addresses[0], "GET", SELLERS)
    received = fake_upstream.received[0]
    assert received.get("x-amz-access-token") == "Atza|1"
    assert received.get("user-agent") == r"My Tool\/2/2.10 (Language=Python/3; Platform=Li\;nux)"
    date = received.get("x-amz-date")
    assert date is not None
    assert len(date) == len("20190430T123600Z")
    assert received.get("host") == f"127.0.0.1:{fake_upstream.port}"


DROPPED = {
    "Authorization": "Bearer app",
    "Cookie": "session=app",
    "X-Amz-Access-Token": "Atza|app",
    "x_amz_access_token": "Atza|app",
    "X-Amz-Date": "20190430T123600Z",
    "X-Amz-Security-Token": "app",
    "X-Amz-Content-Sha256": "app",
    "X-SP-Max-Wait": "1s",
    "x_sp_anything": "app",
    "Forwarded": "for=app",
    "X-Forwarded-For": "10.0.0.1",
    "X-Real-Ip": "10.0.0.1",
    "Via": "1.1 app",
    "traceparent": "00-app",
    "Keep-Alive": "timeout=5",
    "Proxy-Authorization": "Basic app",
    "TE": "trailers",
    "Upgrade": "h2c",
    "HTTP2-Settings": "app",
    "User-Agent": "app/1",
}


@pytest.mark.parametrize("name", DROPPED)
async def test_what_is_not_for_amazon_stays_here(proxy: RunningProxy, fake_upstream: FakeUpstream, name: str) -> None:
    head = f"GET {SELLERS} HTTP/1.1\r\nHost: localhost\r\n{name}: {DROPPED[name]}\r\n\r\n"
    async with connect(proxy.addresses[0]) as client:
        await client.send(head.encode())
        assert (await client.read_response()).status == 200
    assert not [pair for pair in fake_upstream.received[0].fields if "app" in pair[1] or pair[1] == DROPPED[name]]


async def test_fields_named_in_connection_stay_here_and_cannot_name_the_token_away(
    proxy: RunningProxy, fake_upstream: FakeUpstream
) -> None:
    named = "X-Custom, x-amz-access-token, Host, close"
    await call(proxy.addresses[0], "GET", SELLERS, connection=named, x_custom="1", x_other="2")
    received = fake_upstream.received[0]
    assert received.get("x-custom") is None
    assert received.get("x-other") == "2"
    assert received.get("x-amz-access-token") == "Atza|1"


async def test_fields_of_amazons_operations_reach_it_in_order_and_apart(
    proxy: RunningProxy, fake_upstream: FakeUpstream
) -> None:
    sent = (
        f"GET {SELLERS} HTTP/1.1\r\nHost: localhost\r\nX-Amzn-Shipping-Business-Id: AmazonShipping_UK\r\n"
        "Accept-Language: de\r\nX-Twice: 1\r\nX-Twice: 2\r\nX-Empty:\r\nx-utf8: ü\r\n\r\n"
    )
    async with connect(proxy.addresses[0]) as client:
        await client.send(sent.encode())
        await client.read_response()
    received = fake_upstream.received[0]
    assert received.get("x-amzn-shipping-business-id") == "AmazonShipping_UK"
    assert received.all("x-twice") == ["1", "2"]
    assert received.all("x-empty") == [""]
    assert received.all("x-utf8") == ["ü".encode().decode("latin-1")]


async def test_nothing_is_sent_that_nobody_asked_for(proxy: RunningProxy, fake_upstream: FakeUpstream) -> None:
    await call(proxy.addresses[0], "GET", SELLERS)
    names = {name.lower() for name, _ in fake_upstream.received[0].fields}
    assert names == {"host", "x-amz-access-token", "x-amz-date", "user-agent"}


async def test_a_header_that_cannot_be_carried_whole_is_refused(
    proxy: RunningProxy, fake_upstream: FakeUpstream
) -> None:
    async with connect(proxy.addresses[0]) as client:
        await client.send(f"GET {SELLERS} HTTP/1.1\r\nHost: localhost\r\nx-bytes: ".encode() + b"\xff\xfe\r\n\r\n")
        refused = await client.read_response()
    assert (refused.status, refused.error) == (400, "MalformedRequest")
    assert not fake_upstream.received


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_no_body_headers_reach_amazon_on_get_and_head(
    proxy: RunningProxy, fake_upstream: FakeUpstream, method: str
) -> None:
    await call(proxy.addresses[0], method, SELLERS, content_length="0", content_type="application/json")
    received = fake_upstream.received[0]
    assert received.get("content-length") is None
    assert received.get("content-type") is None
    assert received.get("transfer-encoding") is None


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("framing", [{"content_length": "2"}, {"transfer_encoding": "chunked"}])
async def test_a_body_on_get_or_head_is_refused(
    proxy: RunningProxy, fake_upstream: FakeUpstream, method: str, framing: dict[str, str]
) -> None:
    body = b"hi" if "content_length" in framing else b"2\r\nhi\r\n0\r\n\r\n"
    async with connect(proxy.addresses[0]) as client:
        await client.send(request(method, SELLERS, **framing) + body)
        refused = await client.read_response(method)
        assert (refused.status, refused.error) == (400, "MalformedRequest")
        assert await client.at_end(), "what follows would be read as a request"
    assert not fake_upstream.received


async def test_a_body_arrives_with_its_length(proxy: RunningProxy, fake_upstream: FakeUpstream) -> None:
    sent = await call(proxy.addresses[0], "POST", FEEDS, b'{"a":1}', content_type="application/json; charset=x")
    assert sent.status == 200
    received = fake_upstream.received[0]
    assert received.body == b'{"a":1}'
    assert received.get("content-length") == "7"
    assert received.get("transfer-encoding") is None
    assert received.get("content-type") == "application/json; charset=x"


async def test_a_chunked_body_arrives_chunked_and_without_its_trailers(
    proxy: RunningProxy, fake_upstream: FakeUpstream
) -> None:
    chunks = b"5;extension=1\r\nhello\r\n6\r\n world\r\n0\r\nx-amz-access-token: Atza|trailer\r\n\r\n"
    async with connect(proxy.addresses[0]) as client:
        await client.send(request("POST", FEEDS, transfer_encoding="chunked") + chunks)
        assert (await client.read_response()).status == 200
    received = fake_upstream.received[0]
    assert received.body == b"hello world"
    assert received.get("x-amz-access-token") == "Atza|1"


async def test_an_empty_post_says_so(proxy: RunningProxy, fake_upstream: FakeUpstream) -> None:
    await call(proxy.addresses[0], "POST", FEEDS, b"")
    assert fake_upstream.received[0].get("content-length") == "0"


async def test_a_packed_upload_stays_packed(proxy: RunningProxy, fake_upstream: FakeUpstream) -> None:
    packed = gzip.compress(b"x" * 100_000, mtime=0)
    await call(proxy.addresses[0], "POST", FEEDS, packed, content_encoding="gzip")
    assert fake_upstream.received[0].body == packed
    assert fake_upstream.received[0].get("content-encoding") == "gzip"


async def test_expect_continue_is_answered_here_once_everything_is_checked(
    proxy: RunningProxy, fake_upstream: FakeUpstream
) -> None:
    async with connect(proxy.addresses[0]) as client:
        await client.send(request("POST", FEEDS, expect="100-continue", content_length="5"))
        assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await client.send(b"hello")
        assert (await client.read_response()).status == 200
    assert fake_upstream.received[0].body == b"hello"
    assert fake_upstream.received[0].get("expect") is None


# Amazon's answer, on its way to the app.


DECIDED = (
    "account=acme; region=eu; operation=sellers.v1.getMarketplaceParticipations; token=lwa; attempts=1; wait=0.000"
)


async def test_status_reason_headers_and_bytes_are_amazons(proxy: RunningProxy, fake_upstream: FakeUpstream) -> None:
    packed = gzip.compress(b'{"payload":1}', mtime=0)

    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(
            b"HTTP/1.1 207 Multi Colour\r\nX-Amzn-RequestId: r1\r\nx-amzn-RateLimit-Limit: 0.5\r\n"
            b"Content-Type: application/json\r\nContent-Encoding: gzip\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\n"
            b"x-sp-proxy-error: Forged\r\nKeep-Alive: timeout=9\r\nConnection: X-Hop\r\nX-Hop: 1\r\n"
            + f"Content-Length: {len(packed)}\r\n\r\n".encode()
            + packed
        )

    fake_upstream.script = script
    got = await call(proxy.addresses[0], "GET", SELLERS, accept_encoding="gzip")
    assert (got.status, got.reason, got.body) == (207, "Multi Colour", packed)
    assert got.fields == [
        ("X-Amzn-RequestId", "r1"),
        ("x-amzn-RateLimit-Limit", "0.5"),
        ("Content-Type", "application/json"),
        ("Content-Encoding", "gzip"),
        ("Set-Cookie", "a=1"),
        ("Set-Cookie", "b=2"),
        ("Content-Length", str(len(packed))),
        ("x-sp-proxy", DECIDED),
    ]


async def test_an_responses_length_goes_on_even_where_connection_names_it(
    proxy: RunningProxy, fake_upstream: FakeUpstream
) -> None:
    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(
            b"HTTP/1.1 200 OK\r\nConnection: content-length, x-hop\r\nX-Hop: 1\r\nContent-Length: 5\r\n\r\nhello"
        )

    fake_upstream.script = script
    async with connect(proxy.addresses[0]) as client:
        for _ in range(2):
            got = await client.request("GET", "/orders/v0/orders")
            assert (got.status, got.body, got.get("content-length"), got.get("x-hop")) == (200, b"hello", "5", None)


async def test_a_response_without_type_date_or_server_gets_none(proxy: RunningProxy) -> None:
    got = await call(proxy.addresses[0], "POST", FEEDS, b"{}")
    assert {name.lower() for name, _ in got.fields} == {"content-type", "content-length", "x-sp-proxy"}


async def test_a_chunked_response_arrives_chunked(proxy: RunningProxy, fake_upstream: FakeUpstream) -> None:
    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n")

    fake_upstream.script = script
    got = await call(proxy.addresses[0], "GET", SELLERS)
    assert (got.body, got.complete, got.get("transfer-encoding")) == (b"hello", True, "chunked")


async def test_a_response_that_ends_with_its_connection_arrives_whole(
    proxy: RunningProxy, fake_upstream: FakeUpstream
) -> None:
    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nhello")
        await writer.drain()
        writer.close()

    fake_upstream.script = script
    got = await call(proxy.addresses[0], "GET", SELLERS)
    assert (got.body, got.complete) == (b"hello", True)


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
async def test_responses_without_bodies_have_none(
    proxy: RunningProxy, fake_upstream: FakeUpstream, status: str
) -> None:
    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.1 {status}\r\netag: e\r\n\r\n".encode())

    fake_upstream.script = script
    async with connect(proxy.addresses[0]) as client:
        first = await client.request("GET", SELLERS)
        second = await client.request("GET", SELLERS)
    assert first.status == second.status == int(status[:3])
    assert first.get("etag") == "e"


async def test_head_keeps_the_length_and_has_no_body(proxy: RunningProxy, fake_upstream: FakeUpstream) -> None:
    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 12345\r\n\r\n")

    fake_upstream.script = script
    async with connect(proxy.addresses[0]) as client:
        assert (await client.request("HEAD", SELLERS)).get("content-length") == "12345"
        assert (await client.request("HEAD", SELLERS)).status == 200


async def test_interim_responses_are_left_out(proxy: RunningProxy, fake_upstream: FakeUpstream) -> None:
    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(
            b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n" + http_response("200 OK", b"x")
        )

    fake_upstream.script = script
    assert (await call(proxy.addresses[0], "GET", SELLERS)).body == b"x"


async def test_a_redirect_is_passed_on_and_not_followed(proxy: RunningProxy, fake_upstream: FakeUpstream) -> None:
    async with FakeUpstream() as elsewhere:

        async def script(_: Received, writer: asyncio.StreamWriter) -> None:
            writer.write(http_response("307 Temporary Redirect", location=elsewhere.url + "/stolen"))

        fake_upstream.script = script
        got = await call(proxy.addresses[0], "GET", SELLERS)
        assert (got.status, got.get("location")) == (307, elsewhere.url + "/stolen")
        assert not elsewhere.received


async def test_a_cookie_of_one_response_goes_out_with_no_request(
    start_proxy: StartProxy, fake_upstream: FakeUpstream
) -> None:
    # By name: aiohttp's usual jar keeps no cookies for addresses, and would pass for none.
    urls = dict.fromkeys(("na", "eu", "fe"), f"http://localhost:{fake_upstream.port}")
    lwa = (await start_proxy()).tokens._client.settings.config.endpoints.lwa
    proxy = await start_proxy(endpoints={**urls, "lwa": lwa})

    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(http_response("200 OK", b"{}", set_cookie="session=first; Path=/"))

    fake_upstream.script = script
    await call(proxy.addresses[0], "GET", SELLERS)
    await call(proxy.addresses[0], "GET", SELLERS)
    assert fake_upstream.received[1].get("cookie") is None


async def test_a_switch_of_protocols_is_an_error(proxy: RunningProxy, fake_upstream: FakeUpstream) -> None:
    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n")

    fake_upstream.script = script
    got = await call(proxy.addresses[0], "POST", FEEDS, b"{}")
    assert (got.status, got.error) == (502, "UpstreamBroken")


# What goes wrong.


@pytest.mark.parametrize(
    "half",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
    ],
    ids=["length", "chunked"],
)
async def test_a_response_cut_off_looks_cut_off(proxy: RunningProxy, fake_upstream: FakeUpstream, half: bytes) -> None:
    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(half)
        await writer.drain()
        writer.close()

    fake_upstream.script = script
    async with connect(proxy.addresses[0]) as client:
        got = await client.request("GET", SELLERS)
        assert (got.body, got.complete) == (b"half", False)
        assert await client.at_end()
    assert proxy.metrics.registry.get_sample_value("spapi_proxy_answers_cut_off_total") == 1


async def test_a_get_on_a_connection_that_amazon_just_closed_is_asked_again_once(
    proxy: RunningProxy, fake_upstream: FakeUpstream
) -> None:
    async def script(received: Received, writer: asyncio.StreamWriter) -> None:
        if received.connection == 1 and len(fake_upstream.received) == 2:
            writer.close()  # the idle connection dies under the second request
        else:
            writer.write(http_response("200 OK", b"{}"))

    fake_upstream.script = script
    async with connect(proxy.addresses[0]) as client:
        await client.request("GET", SELLERS)
        second = await client.request("GET", SELLERS)
    assert (second.status, second.decided["attempts"]) == (200, "2")
    assert len(fake_upstream.received) == 3


async def test_amazon_out_of_reach_is_said_plainly(start_proxy: StartProxy, token_host: TokenHost) -> None:
    gone = FakeUpstream()
    async with gone:
        url = gone.url
    proxy = await start_proxy(endpoints={"na": url, "eu": url, "fe": url, "lwa": token_host.url})
    got = await call(proxy.addresses[0], "GET", SELLERS)
    assert (got.status, got.error) == (502, "UpstreamUnreachable")


async def test_a_response_that_is_not_http_is_an_error(proxy: RunningProxy, fake_upstream: FakeUpstream) -> None:
    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 smtp.example.com ESMTP\r\n\r\n")

    fake_upstream.script = script
    got = await call(proxy.addresses[0], "POST", FEEDS, b"{}")
    assert (got.status, got.error) == (502, "UpstreamBroken")
    assert b"smtp" not in got.body


async def test_amazon_silent_before_its_response_runs_out_of_time(
    start_proxy: StartProxy, fake_upstream: FakeUpstream
) -> None:
    never = asyncio.Event()

    async def script(_: Received, __: asyncio.StreamWriter) -> None:
        await never.wait()

    fake_upstream.script = script
    proxy = await start_proxy(timeouts={"upstream_idle": "100ms"})
    got = await call(proxy.addresses[0], "GET", SELLERS)
    assert (got.status, got.error) == (504, "UpstreamTimeout")


async def test_amazon_silent_within_its_response_breaks_the_response(
    start_proxy: StartProxy, fake_upstream: FakeUpstream
) -> None:
    never = asyncio.Event()

    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
        await writer.drain()
        await never.wait()

    fake_upstream.script = script
    proxy = await start_proxy(timeouts={"upstream_idle": "100ms"})
    async with connect(proxy.addresses[0]) as client:
        got = await client.request("GET", SELLERS)
        assert (got.body, got.complete) == (b"half", False)
        assert await client.at_end(), "no second answer may follow the half one"
    registry = proxy.metrics.registry
    labels = {"code": "UpstreamTimeout", "fault": "amazon"}
    assert registry.get_sample_value("spapi_proxy_answers_cut_off_total") == 1
    assert registry.get_sample_value("spapi_proxy_errors_total", labels) == 1


async def test_the_whole_exchange_has_a_bound_of_its_own(start_proxy: StartProxy, fake_upstream: FakeUpstream) -> None:
    never = asyncio.Event()

    async def script(_: Received, __: asyncio.StreamWriter) -> None:
        await never.wait()

    fake_upstream.script = script
    proxy = await start_proxy(timeouts={"total": "100ms"})
    got = await call(proxy.addresses[0], "GET", SELLERS)
    assert (got.status, got.error) == (504, "TotalTimeout")


async def test_a_client_that_stops_sending_runs_out_of_time(
    start_proxy: StartProxy, fake_upstream: FakeUpstream
) -> None:
    fake_upstream.reads_bodies = True
    proxy = await start_proxy(timeouts={"body_idle": "100ms"})
    async with connect(proxy.addresses[0]) as client:
        await client.send(request("POST", FEEDS, content_length="100") + b"half")
        got = await client.read_response()
    assert (got.status, got.error) == (408, "BodyTimeout")
    await fake_upstream.last_closed.wait()
    assert fake_upstream.received[0].body == b"", "half an upload must not become a whole request"


async def test_a_client_that_stops_reading_is_given_up(start_proxy: StartProxy, fake_upstream: FakeUpstream) -> None:
    gave_up = asyncio.Event()

    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
        try:
            while True:
                writer.write(b"x" * 65536)
                await writer.drain()
        except ConnectionError:
            gave_up.set()

    fake_upstream.script = script
    proxy = await start_proxy(timeouts={"body_idle": "200ms"})
    async with connect(proxy.addresses[0]) as client:
        await client.send(request("GET", SELLERS))
        await asyncio.wait_for(gave_up.wait(), 20)


async def test_a_client_that_sends_too_little_too_long_runs_out_of_time(start_proxy: StartProxy) -> None:
    proxy = await start_proxy(timeouts={"body_idle": "200ms"}, bounds={"body_rate": 1000})

    async def drip(client: Client) -> None:
        while True:
            await client.send(b"x")
            await asyncio.sleep(0.01)

    async with connect(proxy.addresses[0]) as client:
        await client.send(request("POST", FEEDS, content_length="100000"))
        dripping = asyncio.create_task(drip(client))
        got = await asyncio.wait_for(client.read_response(), 20)
        dripping.cancel()
    assert (got.status, got.error) == (408, "BodyTimeout")


async def test_a_slow_upstream_is_not_the_clients_fault(start_proxy: StartProxy, fake_upstream: FakeUpstream) -> None:
    fake_upstream.reads_bodies = False

    async def script(received: Received, writer: asyncio.StreamWriter) -> None:
        assert received.reader is not None
        left = 4_000_000
        while left:
            await asyncio.sleep(0.02)  # so that it takes longer than the client itself might
            left -= len(await received.reader.read(100_000))
        writer.write(http_response("200 OK", b"{}"))
        await writer.drain()

    fake_upstream.script = script
    proxy = await start_proxy(timeouts={"body_idle": "300ms"}, bounds={"body_rate": 100_000_000})
    got = await call(proxy.addresses[0], "POST", FEEDS, b"x" * 4_000_000)
    assert got.status == 200


async def test_a_client_that_leaves_ends_the_call_to_amazon(proxy: RunningProxy, fake_upstream: FakeUpstream) -> None:
    never = asyncio.Event()

    async def script(_: Received, __: asyncio.StreamWriter) -> None:
        await never.wait()

    fake_upstream.script = script
    async with connect(proxy.addresses[0]) as client:
        await client.send(request("GET", SELLERS))
        await fake_upstream.arrived.wait()
    reader = fake_upstream.received[0].reader
    assert reader is not None
    assert await asyncio.wait_for(reader.read(), 10) == b"", "the connection to Amazon ends with the client's"


async def test_a_client_that_leaves_during_its_upload_leaves_no_whole_request(
    proxy: RunningProxy, fake_upstream: FakeUpstream
) -> None:
    never = asyncio.Event()

    async def script(_: Received, __: asyncio.StreamWriter) -> None:
        await never.wait()

    fake_upstream.reads_bodies, fake_upstream.script = False, script
    async with connect(proxy.addresses[0]) as client:
        await client.send(request("POST", FEEDS, transfer_encoding="chunked") + b"4\r\nhalf\r\n")
        await fake_upstream.arrived.wait()
    reader = fake_upstream.received[0].reader
    assert reader is not None
    rest = await asyncio.wait_for(reader.read(), 10)
    assert b"0\r\n\r\n" not in rest


async def test_a_malformed_chunk_is_the_clients_fault_and_ends_the_upload(
    proxy: RunningProxy, fake_upstream: FakeUpstream
) -> None:
    async with connect(proxy.addresses[0]) as client:
        await client.send(request("POST", FEEDS, transfer_encoding="chunked") + b"4\r\nhalf\r\nZZ\r\n")
        got = await client.read_response()
    assert got.status == 400
    assert all(received.body == b"" for received in fake_upstream.received)


async def test_a_response_that_comes_before_the_upload_ends_is_passed_on(
    proxy: RunningProxy, fake_upstream: FakeUpstream
) -> None:
    fake_upstream.reads_bodies = False

    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(http_response("413 Payload Too Large", b"too large", connection="close"))
        await writer.drain()
        writer.close()

    fake_upstream.script = script
    async with connect(proxy.addresses[0]) as client:
        await client.send(request("POST", FEEDS, content_length="1000000") + b"x" * 1000)
        got = await client.read_response()
    assert (got.status, got.body) == (413, b"too large")


async def test_a_certificate_that_is_not_trusted_sees_no_request(
    start_proxy: StartProxy, token_host: TokenHost, tmp_path: Path
) -> None:
    needs(shutil.which("openssl") is not None, "openssl")
    received: list[bytes] = []
    context = untrusted_context(tmp_path)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.append(await reader.read(1))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with server:
        url = f"https://localhost:{server.sockets[0].getsockname()[1]}"
        proxy = await start_proxy(endpoints={"na": url, "eu": url, "fe": url, "lwa": token_host.url})
        got = await call(proxy.addresses[0], "GET", SELLERS)
    assert (got.status, got.error) == (502, "UpstreamUnreachable")
    assert "certificate" in got.body.decode()
    assert not received


def untrusted_context(folder: Path) -> ssl.SSLContext:
    """Return the server side of a certificate that nobody has signed but itself."""
    key, certificate = folder / "key.pem", folder / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "1"]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True, timeout=60)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


# The rules of cleaning, for any headers.

names = st.text("abcdefghijklmnopqrstuvwxyzXSP-_", min_size=1, max_size=20)
values = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20)


@given(st.lists(st.tuples(names, values), max_size=12), st.sampled_from(["GET", "POST"]))
def test_cleaning_only_leaves_out_and_never_reorders(fields: list[tuple[str, str]], method: str) -> None:
    kept = list(end_to_end_headers(method, CIMultiDictProxy(CIMultiDict(fields))).items())
    rest = iter(fields)
    assert all(pair in rest for pair in kept)
    assert not [name for name, _ in kept if name.lower().replace("_", "-").startswith("x-sp-")]


def test_cleaning_refuses_what_it_would_change() -> None:
    with pytest.raises(MalformedRequest):
        end_to_end_headers("GET", CIMultiDictProxy(CIMultiDict({"x": "\udcff"})))
