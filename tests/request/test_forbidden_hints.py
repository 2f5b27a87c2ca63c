"""What is probably behind a 403 of Amazon's: said beside its answer, which passes unchanged."""

import asyncio
import json
from io import StringIO

import pytest

from proxy.server.runtime import RunningProxy
from tests.conftest import StartProxy
from tests.support.fake_upstream import FakeUpstream, Received, http_response
from tests.support.raw_client import call

SELLERS = "/sellers/v1/marketplaceParticipations"
LISTING = "/listings/2021-08-01/items/A1SELLER/red/shoes"
DENIED = "Access to requested resource is denied."


def refusal(message: str = DENIED, details: str = "", code: str = "Unauthorized") -> bytes:
    return json.dumps({"errors": [{"code": code, "message": message, "details": details}]}).encode()


def refuse(fake_upstream: FakeUpstream, body: bytes = refusal(), **fields: str) -> None:
    """Let the far side refuse everything."""

    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(http_response("403 Forbidden", body, **fields))
        await writer.drain()

    fake_upstream.script = script


@pytest.mark.parametrize(
    ("target", "fields", "body", "hint"),
    [
        ("/brand/new", {}, refusal(), "path_unknown"),
        (SELLERS + "x", {}, refusal(), "path_unknown"),
        (SELLERS, {}, refusal(code="MissingAuthenticationToken"), "path_unknown"),
        (LISTING, {}, refusal(), "unencoded_slash"),
        (LISTING + "/left", {}, refusal(), "unencoded_slash"),
        (SELLERS, {}, refusal(), "region_or_authorisation"),
        (SELLERS, {}, b"<html>", "region_or_authorisation"),
        (SELLERS, {}, refusal(message="Access to the resource is forbidden"), "report_type"),
        ("/orders/v0/orders", {}, refusal(), "region_or_authorisation"),  # it answers an ordinary token too
        ("/orders/v0/orders/1/address", {}, refusal(), "restricted_role"),
        ("/orders/v0/orders/1/address", {"x_sp_data_elements": "none"}, refusal(), "restricted_without_rdt"),
        ("/notifications/v1/destinations", {}, refusal(), "grantless"),
    ],
)
async def test_the_hint_is_what_the_proxy_knows(
    proxy: RunningProxy, fake_upstream: FakeUpstream, target: str, fields: dict[str, str], body: bytes, hint: str
) -> None:
    refuse(fake_upstream, body, x_amzn_errortype="AccessDeniedException")
    got = await call(proxy.addresses[0], "GET", target, **fields)
    assert (got.status, got.body, got.error) == (403, body, None)
    assert (got.decided["hint"], got.decided["token_age"], got.decided["region"]) == (hint, "0", "eu")
    labels = {"account": "acme", "region": "eu", "operation": got.decided["operation"], "hint": hint}
    assert proxy.metrics.registry.get_sample_value("spapi_proxy_forbidden_errors_total", labels) == 1


async def test_an_account_whose_other_calls_work_lacks_a_role(proxy: RunningProxy, fake_upstream: FakeUpstream) -> None:
    await call(proxy.addresses[0], "GET", "/orders/v0/orders")
    refuse(fake_upstream)
    got = await call(proxy.addresses[0], "GET", SELLERS)
    assert got.decided["hint"] == "role"


async def test_a_failure_of_amazons_does_not_say_that_an_account_works(
    proxy: RunningProxy, fake_upstream: FakeUpstream
) -> None:
    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(http_response("503 Unavailable"))
        await writer.drain()

    fake_upstream.script = script
    await call(proxy.addresses[0], "GET", "/orders/v0/orders", x_sp_retry="off")
    refuse(fake_upstream)
    got = await call(proxy.addresses[0], "GET", SELLERS)
    assert got.decided["hint"] == "region_or_authorisation"


async def test_a_route_that_amazon_does_not_know_is_told_by_its_header_too(
    proxy: RunningProxy, fake_upstream: FakeUpstream
) -> None:
    refuse(fake_upstream, b"{}", x_amzn_errortype="MissingAuthenticationTokenException")
    got = await call(proxy.addresses[0], "GET", SELLERS)
    assert got.decided["hint"] == "path_unknown"


async def test_data_that_was_left_out_is_named_on_every_response(
    proxy: RunningProxy, fake_upstream: FakeUpstream
) -> None:
    text = "Application does not have access to one or more requested data elements: [shippingAddress, buyerInfo]"
    fake_upstream.rdt_response = http_response("400 Bad Request", refusal(text, code="InvalidInput"))
    asked = {"x_sp_data_elements": "shippingAddress,buyerInfo"}
    got = await call(proxy.addresses[0], "GET", "/orders/v0/orders/1", **asked)
    assert (got.status, got.decided["token"], got.decided["dropped"]) == (200, "lwa", "buyerInfo,shippingAddress")
    refuse(fake_upstream)
    got = await call(proxy.addresses[0], "GET", "/orders/v0/orders/1", **asked)
    assert (got.status, got.decided["hint"]) == (403, "elements_dropped")
    plain = await call(proxy.addresses[0], "GET", SELLERS)
    assert "dropped" not in plain.decided


async def test_the_log_says_it_too(proxy: RunningProxy, fake_upstream: FakeUpstream, log: StringIO) -> None:
    refuse(fake_upstream)
    await call(proxy.addresses[0], "GET", SELLERS)
    fake_upstream.script = None
    await call(proxy.addresses[0], "GET", SELLERS)
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    first, second = [line for line in lines if line["message"] == "request"]
    assert (first["code"], first["hint"], first["token_age"]) == (403, "region_or_authorisation", 0)
    assert second["hint"] is None


async def test_in_the_sandbox_the_ordinary_token_is_the_hint(
    start_proxy: StartProxy, fake_upstream: FakeUpstream
) -> None:
    proxy = await start_proxy(environment="sandbox")
    refuse(fake_upstream)
    got = await call(proxy.addresses[0], "GET", "/orders/v0/orders/1/address")
    assert (got.decided["token"], got.decided["hint"]) == ("lwa", "restricted_without_rdt")


async def test_the_sandbox_gets_a_token_made_in_production_where_that_is_set(
    start_proxy: StartProxy, fake_upstream: FakeUpstream
) -> None:
    proxy = await start_proxy(environment="sandbox", sandbox_rdt="production")
    got = await call(proxy.addresses[0], "GET", "/orders/v0/orders/1/address")
    assert (got.status, got.decided["token"]) == (200, "rdt")
    assert fake_upstream.received[0].get("x-amz-access-token") == "Atz.sprdt|1"
