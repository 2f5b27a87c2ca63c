"""Token requests: what is sent, and what each failure is called."""

import asyncio
import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from proxy.errors import RestrictedDataRefused, TokenRefused, TokenUnavailable, UsagePlanExhausted
from proxy.request.tokens.client import TRIES
from proxy.request.tokens.provider import TokenProvider
from proxy.request.tokens.refresh_policy import MAX_PAUSE
from tests.request.tokens.conftest import ACME, DOCUMENT, GRANTLESS, RDT, form, open_tokens
from tests.support.clock import FakeClock
from tests.support.fake_upstream import FakeUpstream, TokenHost, http_response


async def test_an_exchange_says_exactly_what_login_with_amazon_asks_for(
    tokens: TokenProvider, token_host: TokenHost
) -> None:
    token = await tokens.get(ACME)
    assert token.value.reveal() == "Atza|1"
    (received,) = token_host.received
    assert (received.method, received.target) == ("POST", "/auth/o2/token")
    assert received.get("content-type") == "application/x-www-form-urlencoded;charset=UTF-8"
    assert form(received.body) == {
        "grant_type": "refresh_token",
        "refresh_token": "Atzr|acme-eu",
        "client_id": "client",
        "client_secret": "client-secret",
    }


async def test_a_grantless_exchange_names_its_scope_and_no_seller(tokens: TokenProvider, token_host: TokenHost) -> None:
    await tokens.get(GRANTLESS)
    assert form(token_host.received[0].body) == {
        "grant_type": "client_credentials",
        "scope": "sellingpartnerapi::notifications",
        "client_id": "client",
        "client_secret": "client-secret",
    }


async def test_an_rdt_is_minted_with_the_sellers_token_for_one_path(
    tokens: TokenProvider, fake_upstream: FakeUpstream
) -> None:
    token = await tokens.get(RDT._replace(data_elements=("buyerInfo",)))
    assert (token.kind, token.value.reveal()) == ("rdt", "Atz.sprdt|1")
    (minted,) = fake_upstream.minted
    assert minted.get("x-amz-access-token") == "Atza|1"
    assert minted.get("content-type") == "application/json"
    assert minted.get("x-amz-date")
    resource = {"method": "GET", "path": "/orders/v0/orders/{orderId}/address", "dataElements": ["buyerInfo"]}
    assert json.loads(minted.body) == {"restrictedResources": [resource]}


@pytest.mark.parametrize(
    ("status", "body", "reason", "place"),
    [
        ("400 Bad Request", {"error": "invalid_grant"}, "invalid_grant", "Look at accounts.acme.refresh_tokens.eu."),
        (
            "401 Unauthorized",
            {"error": "invalid_client", "request_id": "r-1"},
            "invalid_client",
            "Look at applications.main.client_id and client_secret.",
        ),
        (
            "400 Bad Request",
            {"error": "unauthorized_client"},
            "unauthorized_client",
            "Look at accounts.acme.application and accounts.acme.refresh_tokens.eu.",
        ),
        ("400 Bad Request", {"error": "invalid_scope"}, "invalid_scope", "ask Amazon for its role."),
    ],
)
async def test_a_refusal_names_the_account_and_what_to_do_and_is_not_hammered(
    tokens: TokenProvider,
    token_host: TokenHost,
    clock: FakeClock,
    status: str,
    body: dict[str, str],
    reason: str,
    place: str,
) -> None:
    refused = http_response(status, json.dumps(body).encode(), content_type="application/json")
    token_host.responses = [refused] * 100
    for _ in range(30):
        with pytest.raises(TokenRefused) as caught:
            await tokens.get(ACME)
        assert "account acme in eu" in caught.value.message
        assert reason in caught.value.message
        assert caught.value.hint.endswith(place)
        assert caught.value.retry_after is None
        clock.advance(0.2)
    assert len(token_host.received) <= 5


async def test_a_refusal_names_the_key_of_the_credential_and_to_the_log_alone_its_file(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path, clock: FakeClock, log: StringIO
) -> None:
    (tmp_path / "acme_eu").write_text("Atzr|acme-eu")
    (tmp_path / "secret").write_text("distinctive-secret")
    settings = {
        "accounts": {"acme": {"refresh_tokens": {"eu": {"file": str(tmp_path / "acme_eu")}}}},
        "applications": {"main": {"client_id": "client", "client_secret": {"file": str(tmp_path / "secret")}}},
    }
    async with open_tokens(fake_upstream, token_host, tmp_path, clock, **settings) as (tokens, _):
        for reason, keys, file in (
            ("invalid_grant", "accounts.acme.refresh_tokens.eu", tmp_path / "acme_eu"),
            ("invalid_client", "applications.main.client_id and client_secret", tmp_path / "secret"),
        ):
            token_host.responses = [http_response("400 Bad Request", json.dumps({"error": reason}).encode())]
            with pytest.raises(TokenRefused) as caught:
                await tokens.get(ACME)
            assert caught.value.hint.endswith(f" Look at {keys}, in the place that the log names.")
            assert f'"look_at": "{keys} (from file {file})"' in log.getvalue()
            clock.advance(MAX_PAUSE)


NONSENSE = {
    "html": http_response("200 OK", b"<html>busy</html>"),
    "empty": http_response("200 OK"),
    "array": http_response("200 OK", b"[]"),
    "null": http_response("200 OK", b"null"),
    "no token": http_response("200 OK", b'{"expires_in":3600}'),
    "empty token": http_response("200 OK", b'{"access_token":"","expires_in":3600}'),
    "line break in the token": http_response("200 OK", b'{"access_token":"a\\r\\nx: y","expires_in":3600}'),
    "brackets": http_response("200 OK", b"[" * 50_000),
    "large": http_response("200 OK", b'{"access_token":"a","expires_in":3600}' + b" " * 1_000_000),
    "not http": b"220 smtp\r\n\r\n",
    "error with 200": http_response("200 OK", b'{"error":"server_error"}'),
    "429": http_response("429 Too Many Requests"),
}


@pytest.mark.parametrize("case", NONSENSE)
async def test_nonsense_from_the_token_host_is_no_token(
    tokens: TokenProvider, token_host: TokenHost, case: str
) -> None:
    token_host.responses = [NONSENSE[case]] * TRIES
    with pytest.raises(TokenUnavailable) as caught:
        await tokens.get(ACME)
    assert caught.value.retry_after is not None
    assert "smtp" not in caught.value.message


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "307 Temporary Redirect", "308 Permanent Redirect"])
async def test_a_redirect_of_the_token_host_is_no_way_to_the_secret(
    tokens: TokenProvider, token_host: TokenHost, status: str
) -> None:
    async with TokenHost() as elsewhere:
        token_host.responses = [http_response(status, location=elsewhere.url)] * TRIES
        with pytest.raises(TokenUnavailable):
            await tokens.get(ACME)
        assert not elsewhere.received


async def test_a_silent_token_host_runs_out_of_time(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path, clock: FakeClock
) -> None:
    token_host.held = asyncio.Event()
    async with open_tokens(fake_upstream, token_host, tmp_path, clock, timeouts={"token": "100ms"}) as (tokens, _):
        with pytest.raises(TokenUnavailable, match="timeout"):
            await tokens.get(ACME)


@pytest.mark.parametrize("reason", ["connection", "timeout"])
async def test_a_token_host_that_is_out_of_reach_is_named_with_what_finds_out_why(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path, clock: FakeClock, reason: str
) -> None:
    changed: dict[str, Any] = {"endpoints": {"lwa": token_host.url.replace("127.0.0.1", "localhost")}}
    if reason == "connection":
        await token_host.__aexit__()
    else:
        token_host.held = asyncio.Event()
        changed["timeouts"] = {"token": "100ms"}
    async with open_tokens(fake_upstream, token_host, tmp_path, clock, **changed) as (tokens, _):
        with pytest.raises(TokenUnavailable) as caught:
            await tokens.get(ACME)
    assert f"({reason})" in caught.value.message
    assert "Login with Amazon at localhost " in caught.value.message, "the host, without the rest of the address"
    assert "/auth" not in str(caught.value.body())
    assert "`sp-api-proxy check --live` says why" in caught.value.hint


async def test_a_refused_rdt_says_why_and_what_to_do(tokens: TokenProvider, fake_upstream: FakeUpstream) -> None:
    message = "Application does not have access to one or more requested data elements: [shippingAddress]"
    body = json.dumps({"errors": [{"code": "InvalidInput", "message": message}]}).encode()
    fake_upstream.rdt_response = http_response("400 Bad Request", body)
    with pytest.raises(RestrictedDataRefused) as caught:
        await tokens.get(RDT)
    assert message in caught.value.message
    assert "restricted role" in caught.value.hint


async def test_exchanges_are_counted_by_kind_result_and_reason(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path, clock: FakeClock
) -> None:
    async with open_tokens(fake_upstream, token_host, tmp_path, clock) as (tokens, metrics):
        await tokens.get(ACME)
        token_host.responses = [http_response("400 Bad Request", b'{"error":"invalid_scope"}')]
        with pytest.raises(TokenRefused):
            await tokens.get(GRANTLESS)
        labels = {"account": "acme", "region": "eu", "kind": "lwa"}

        def value(name: str, **labels: str) -> float | None:
            return metrics.registry.get_sample_value(f"spapi_proxy_{name}", labels)

        assert value("token_refreshes_total", **labels, result="ok", reason="") == 1
        refused = {"account": "", "region": "eu", "kind": "grantless", "result": "refused", "reason": "invalid_scope"}
        assert value("token_refreshes_total", **refused) == 1
        expiry = value("token_expiry_timestamp_seconds", **labels)
        assert expiry is not None
        assert clock() + 3590 < expiry <= clock() + 3600
        assert value("token_refresh_duration_seconds_count", kind="lwa") == 1


async def test_mints_keep_to_their_own_usage_plan(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path, clock: FakeClock
) -> None:
    limits = {"pace": True, "max_wait": "0s"}
    async with open_tokens(fake_upstream, token_host, tmp_path, clock, limits=limits) as (tokens, _):
        documents = [DOCUMENT._replace(path=f"/reports/2021-06-30/documents/{number}") for number in range(12)]
        for document in documents[:10]:
            await tokens.get(document)
        with pytest.raises(UsagePlanExhausted, match="createRestrictedDataToken"):
            await tokens.get(documents[10])
        clock.advance(1)
        await tokens.get(documents[11])
    assert len(fake_upstream.minted) == 11


async def test_a_429_of_the_mint_teaches_its_plan(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path, clock: FakeClock
) -> None:
    limits = {"pace": True, "max_wait": "0s"}
    async with open_tokens(fake_upstream, token_host, tmp_path, clock, limits=limits) as (tokens, _):
        fake_upstream.rdt_response = http_response("429 Too Many Requests")
        with pytest.raises(TokenUnavailable):
            await tokens.get(RDT)
        with pytest.raises(UsagePlanExhausted):
            await tokens.get(DOCUMENT)


async def test_delegation_names_the_application_that_may_use_the_token(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path, clock: FakeClock
) -> None:
    accounts = {"acme": {"refresh_tokens": {"eu": "Atzr|acme"}, "target_application": "amzn1.sp.solution.x"}}
    async with open_tokens(fake_upstream, token_host, tmp_path, clock, accounts=accounts) as (tokens, _):
        await tokens.get(RDT)
    assert json.loads(fake_upstream.minted[0].body)["targetApplication"] == "amzn1.sp.solution.x"
