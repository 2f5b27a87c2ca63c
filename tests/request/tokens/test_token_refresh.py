"""Amazon refuses a token: it is replaced and the call sent once more, where that is possible and worth it."""

import asyncio
import gzip
import json

import pytest

from proxy.request.upstream.call import MAX_BUFFERED
from proxy.server.runtime import RunningProxy
from tests.conftest import StartProxy
from tests.support.fake_upstream import FakeUpstream, Received, TokenHost, http_response, read_body
from tests.support.raw_client import call, connect, request

SELLERS = "/sellers/v1/marketplaceParticipations"
FEEDS = "/feeds/2021-06-30/feeds"
ADDRESS = "/orders/v0/orders/1/address"

EXPIRED = "The access token you provided has expired."
REVOKED = "The access token you provided is revoked, malformed or invalid."
DENIED = "Access to requested resource is denied."


def refusal(message: str = DENIED, details: str = "", code: str = "Unauthorized") -> bytes:
    return json.dumps({"errors": [{"code": code, "message": message, "details": details}]}).encode()


def takes(fake_upstream: FakeUpstream, *tokens: str, refused: bytes, status: str = "403 Forbidden") -> None:
    """Let the far side take these tokens alone."""

    async def script(received: Received, writer: asyncio.StreamWriter) -> None:
        good = received.get("x-amz-access-token") in tokens
        writer.write(http_response("200 OK", b"taken: " + received.body) if good else http_response(status, refused))
        await writer.drain()

    fake_upstream.script = script


def retried(proxy: RunningProxy) -> float | None:
    return proxy.metrics.registry.get_sample_value("spapi_proxy_upstream_retries_total", {"reason": "token"})


@pytest.mark.parametrize(
    ("status", "refused"),
    [
        ("403 Forbidden", refusal(details=EXPIRED)),
        ("403 Forbidden", refusal(message=EXPIRED)),
        ("403 Forbidden", refusal(details=REVOKED)),
        ("401 Unauthorized", refusal(message=EXPIRED)),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE"])
async def test_a_refused_token_is_replaced_and_the_call_sent_once_more(
    proxy: RunningProxy, fake_upstream: FakeUpstream, token_host: TokenHost, method: str, status: str, refused: bytes
) -> None:
    takes(fake_upstream, "Atza|2", refused=refused, status=status)
    body = None if method == "GET" else b"0123456789" * 1000
    got = await call(proxy.addresses[0], method, FEEDS, body)
    assert (got.status, got.body, got.decided["attempts"]) == (200, b"taken: " + (body or b""), "2")
    assert "hint" not in got.decided
    assert len(token_host.received) == 2
    assert [received.get("x-amz-access-token") for received in fake_upstream.received] == ["Atza|1", "Atza|2"]
    assert retried(proxy) == 1
    assert len(fake_upstream.open_connections) <= 1, "the refused answer's connection is not left behind"
    again = await call(proxy.addresses[0], method, FEEDS, body)
    assert (again.status, again.decided["attempts"]) == (200, "1")


async def test_a_packed_refusal_is_read_and_passed_on_packed(
    proxy: RunningProxy, fake_upstream: FakeUpstream, token_host: TokenHost
) -> None:
    packed = gzip.compress(refusal(details=EXPIRED))

    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(http_response("403 Forbidden", packed, content_encoding="gzip"))

    fake_upstream.script = script
    got = await call(proxy.addresses[0], "GET", SELLERS)
    assert (got.status, got.body, got.get("content-encoding")) == (403, packed, "gzip")
    assert (got.decided["attempts"], got.decided["hint"]) == ("2", "token_refused")
    assert len(token_host.received) == 2


async def test_a_chunked_upload_is_sent_again_whole(proxy: RunningProxy, fake_upstream: FakeUpstream) -> None:
    takes(fake_upstream, "Atza|2", refused=refusal(details=EXPIRED))
    async with connect(proxy.addresses[0]) as client:
        await client.send(request("POST", FEEDS, transfer_encoding="chunked") + b"4\r\nhalf\r\n")
        await client.send(b"4\r\nrest\r\n0\r\n\r\n")
        got = await client.read_response()
    assert (got.status, got.body) == (200, b"taken: halfrest")


@pytest.mark.parametrize(("size", "attempts"), [(MAX_BUFFERED, "2"), (MAX_BUFFERED + 1, "1"), (3_000_000, "1")])
async def test_bodies_up_to_a_bound_are_kept_for_it(
    proxy: RunningProxy, fake_upstream: FakeUpstream, size: int, attempts: str
) -> None:
    takes(fake_upstream, "Atza|2", refused=refusal(details=EXPIRED))
    got = await call(proxy.addresses[0], "POST", FEEDS, b"x" * size)
    assert (got.status, got.decided["attempts"]) == (200 if attempts == "2" else 403, attempts)
    if attempts == "1":
        assert got.body == refusal(details=EXPIRED)
        assert got.decided["hint"] == "token_refused"


async def test_an_upload_that_was_refused_before_it_ended_is_not_sent_again(
    proxy: RunningProxy, fake_upstream: FakeUpstream
) -> None:
    fake_upstream.reads_bodies = False

    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(http_response("403 Forbidden", refusal(details=EXPIRED), connection="close"))
        await writer.drain()
        writer.close()

    fake_upstream.script = script
    async with connect(proxy.addresses[0]) as client:
        await client.send(request("POST", FEEDS, content_length="100") + b"half")
        got = await client.read_response()
    assert (got.status, got.body) == (403, refusal(details=EXPIRED))
    assert len(fake_upstream.received) == 1


@pytest.mark.parametrize(
    "refused", [refusal(), b"", b"<html>", refusal(details="Access token is missing in the request header.")]
)
async def test_what_another_token_would_not_fix_is_passed_on_at_once(
    proxy: RunningProxy, fake_upstream: FakeUpstream, token_host: TokenHost, refused: bytes
) -> None:
    takes(fake_upstream, refused=refused)
    got = await call(proxy.addresses[0], "GET", SELLERS)
    assert (got.status, got.body, got.decided["attempts"], got.error) == (403, refused, "1", None)
    assert len(token_host.received) == 1


async def test_a_token_whose_successor_is_refused_too_is_left_alone(
    proxy: RunningProxy, fake_upstream: FakeUpstream, token_host: TokenHost
) -> None:
    takes(fake_upstream, refused=refusal(details=REVOKED))
    for _ in range(10):
        got = await call(proxy.addresses[0], "GET", SELLERS)
        assert (got.status, got.body, got.decided["hint"]) == (403, refusal(details=REVOKED), "token_refused")
    assert len(token_host.received) == 2
    assert len(fake_upstream.received) == 11


async def test_many_that_is_refused_shares_one_new_token(
    start_proxy: StartProxy, fake_upstream: FakeUpstream, token_host: TokenHost
) -> None:
    proxy = await start_proxy(limits={"pace": False})
    await call(proxy.addresses[0], "GET", SELLERS)
    takes(fake_upstream, "Atza|2", refused=refusal(details=EXPIRED))
    got = await asyncio.gather(*(call(proxy.addresses[0], "GET", SELLERS) for _ in range(100)))
    assert {one.status for one in got} == {200}
    assert len(token_host.received) == 2


async def test_a_storm_for_everybody_passes_without_a_storm_of_exchanges(
    start_proxy: StartProxy, fake_upstream: FakeUpstream, token_host: TokenHost
) -> None:
    accounts = {f"a{number}": {"refresh_tokens": {"eu": f"Atzr|{number}"}} for number in range(60)}
    proxy = await start_proxy(accounts=accounts, limits={"pace": False})
    for name in accounts:
        await call(proxy.addresses[0], "GET", SELLERS, x_sp_account=name)
    takes(fake_upstream, refused=refusal(details=REVOKED))
    for _ in range(3):
        got = await asyncio.gather(*(call(proxy.addresses[0], "GET", SELLERS, x_sp_account=name) for name in accounts))
        assert {one.status for one in got} == {403}
    assert len(token_host.received) - len(accounts) <= 45
    fake_upstream.script = None
    got = await asyncio.gather(*(call(proxy.addresses[0], "GET", SELLERS, x_sp_account=name) for name in accounts))
    assert {one.status for one in got} == {200}, "it is over as soon as Amazon says so"


async def test_a_restricted_token_that_is_refused_is_minted_anew(
    proxy: RunningProxy, fake_upstream: FakeUpstream, token_host: TokenHost
) -> None:
    takes(fake_upstream, "Atz.sprdt|2", refused=refusal(details=EXPIRED))
    got = await call(proxy.addresses[0], "GET", ADDRESS)
    assert (got.status, got.decided["token"], got.decided["attempts"]) == (200, "rdt", "2")
    assert (len(fake_upstream.minted), len(token_host.received)) == (2, 1)


async def test_a_refused_client_gets_amazons_refusal_where_no_new_token_is_to_be_had(
    proxy: RunningProxy, fake_upstream: FakeUpstream, token_host: TokenHost
) -> None:
    await call(proxy.addresses[0], "GET", SELLERS)
    takes(fake_upstream, refused=refusal(details=EXPIRED))
    token_host.responses = [http_response("400 Bad Request", b'{"error":"invalid_grant"}')]
    got = await call(proxy.addresses[0], "GET", SELLERS)
    assert (got.status, got.body, got.error) == (403, refusal(details=EXPIRED), None)


async def test_a_long_refusal_passes_whole(proxy: RunningProxy, fake_upstream: FakeUpstream) -> None:
    long = b"<html>" + b"x" * 200_000
    takes(fake_upstream, refused=long)
    got = await call(proxy.addresses[0], "GET", SELLERS)
    assert (got.status, got.body, got.complete) == (403, long, True)


async def test_a_refusal_that_breaks_off_breaks_off(proxy: RunningProxy, fake_upstream: FakeUpstream) -> None:
    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 100\r\n\r\nhalf")
        await writer.drain()
        writer.close()

    fake_upstream.script = script
    got = await call(proxy.addresses[0], "GET", SELLERS)
    assert (got.status, got.body, got.complete) == (403, b"half", False)


async def test_a_refusal_of_a_head_request_has_no_body(proxy: RunningProxy, fake_upstream: FakeUpstream) -> None:
    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 100\r\n\r\n")

    fake_upstream.script = script
    got = await call(proxy.addresses[0], "HEAD", SELLERS)
    assert (got.status, got.get("content-length")) == (403, "100")


async def test_an_upload_is_read_whole_by_amazon_though_it_is_kept(
    proxy: RunningProxy, fake_upstream: FakeUpstream
) -> None:
    fake_upstream.reads_bodies = False
    sizes: list[int] = []

    async def script(received: Received, writer: asyncio.StreamWriter) -> None:
        assert received.reader is not None
        sizes.append(len(await read_body(received, received.reader)))
        writer.write(http_response("200 OK"))

    fake_upstream.script = script
    for size in (1, MAX_BUFFERED, MAX_BUFFERED * 3):
        await call(proxy.addresses[0], "POST", FEEDS, b"x" * size)
    assert sizes == [1, MAX_BUFFERED, MAX_BUFFERED * 3]
