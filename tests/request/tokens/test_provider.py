"""Tokens: fetched once for a crowd, renewed before they expire, kept apart, and refused clearly."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from io import StringIO
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import pytest

from proxy.amazon.operations import load_table
from proxy.config import Secret
from proxy.errors import RestrictedDataRefused, TokenRefused, TokenUnavailable, UsagePlanExhausted
from proxy.observability.metrics import Metrics
from proxy.request.ratelimit.limiter import RateLimiter
from proxy.request.token import Token
from proxy.request.token_selection import TokenKey
from proxy.request.tokens import provider as tokens_module
from proxy.request.tokens.client import TRIES, TokenClient, access_token_keys
from proxy.request.tokens.provider import SETTLED_AFTER, TokenProvider
from proxy.request.tokens.refresh_policy import CHECK_INTERVAL, MAX_PAUSE
from proxy.request.tokens.report_documents import UnrestrictedReports
from proxy.request.upstream.pool import amazon_pool, lwa_pool
from proxy.store import MemoryStore, StoredToken
from tests.conftest import config_from, settings_for
from tests.support.clock import FakeClock
from tests.support.fake_upstream import FakeUpstream, Received, TokenHost, http_response

TABLE = load_table()
ACME = TokenKey("lwa", "main", "acme", "production", "eu")
GRANTLESS = TokenKey("grantless", "main", "", "production", "eu", scope="sellingpartnerapi::notifications")
RDT = TokenKey("rdt", "main", "acme", "production", "eu", method="GET", path="/orders/v0/orders/{orderId}/address")
DOCUMENT = RDT._replace(path="/reports/2021-06-30/documents/d1", is_shared=False)


@asynccontextmanager
async def open_tokens(
    fake_upstream: FakeUpstream, token_host: TokenHost, folder: Path, clock: FakeClock, **settings: Any
) -> AsyncIterator[tuple[TokenProvider, Metrics]]:
    config = config_from(settings_for(fake_upstream, token_host, **{"limits": {"pace": False}, **settings}), folder)
    metrics, store = Metrics(), MemoryStore()
    async with lwa_pool(config) as lwa_session, amazon_pool(config, 10) as amazon_session:
        limits = RateLimiter(metrics, pace=config.limits.pace, now=clock)
        grants = TokenClient(
            config,
            lwa_session=lwa_session,
            amazon_session=amazon_session,
            rate_limiter=limits,
            mint=TABLE.match("POST", "/tokens/2021-03-01/restrictedDataToken"),
            metrics=metrics,
            now=clock,
            sleep=clock.sleep,
        )
        tokens = TokenProvider(
            token_client=grants,
            unrestricted_reports=UnrestrictedReports(),
            store=store,
            metrics=metrics,
            now=clock,
            wall=clock,
            call_later=clock.call_later,
        )
        yield tokens, metrics
        await tokens.close()
        await store.close()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def tokens(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path, clock: FakeClock
) -> AsyncIterator[TokenProvider]:
    async with open_tokens(fake_upstream, token_host, tmp_path, clock) as (opened, _):
        yield opened


async def settle(tokens: TokenProvider) -> None:
    """Wait until no exchange is under way."""
    while tokens._pending:
        await asyncio.gather(*tokens._pending.values(), return_exceptions=True)
        await asyncio.sleep(0)


def form(body: bytes) -> dict[str, str]:
    return dict(parse_qsl(body.decode()))


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


async def test_a_burst_on_a_cold_cache_makes_one_exchange(tokens: TokenProvider, token_host: TokenHost) -> None:
    token_host.held = asyncio.Event()
    waiting = [asyncio.create_task(tokens.get(ACME)) for _ in range(100)]
    await token_host.arrived.wait()
    waiting[0].cancel()  # the first caller hangs up
    token_host.held.set()
    got = await asyncio.gather(*waiting[1:])
    assert len({token.value.reveal() for token in got}) == 1
    assert len(token_host.received) == 1


async def test_an_exchange_outlives_everybody_who_waited_for_it(tokens: TokenProvider, token_host: TokenHost) -> None:
    token_host.held = asyncio.Event()
    waiting = [asyncio.create_task(tokens.get(ACME)) for _ in range(3)]
    await token_host.arrived.wait()
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    token_host.held.set()
    await settle(tokens)
    assert (await tokens.get(ACME)).value.reveal() == "Atza|1"


async def test_a_held_token_serves_until_it_is_due(
    tokens: TokenProvider, token_host: TokenHost, clock: FakeClock
) -> None:
    first = await tokens.get(ACME)
    clock.advance(3600 * 0.79)
    assert await tokens.get(ACME) is first
    await settle(tokens)
    assert len(token_host.received) == 1


async def test_a_token_that_is_due_is_renewed_behind_the_callers_back(
    tokens: TokenProvider, token_host: TokenHost, clock: FakeClock
) -> None:
    first = await tokens.get(ACME)
    clock.advance(3600 * 0.91)
    token_host.held = asyncio.Event()
    assert await tokens.get(ACME) is first, "nobody waits while the old one is good"
    token_host.held.set()
    await settle(tokens)
    assert (await tokens.get(ACME)).value.reveal() == "Atza|2"


async def test_a_token_is_not_sent_in_its_last_seconds(
    tokens: TokenProvider, token_host: TokenHost, clock: FakeClock
) -> None:
    await tokens.get(ACME)
    clock.advance(3599)
    assert (await tokens.get(ACME)).value.reveal() == "Atza|2"
    assert len(token_host.received) == 2


async def test_the_life_that_amazon_names_is_believed(
    tokens: TokenProvider, token_host: TokenHost, clock: FakeClock
) -> None:
    token_host.expires_in = 60
    await tokens.get(ACME)
    clock.advance(59)
    assert (await tokens.get(ACME)).value.reveal() == "Atza|2"


@pytest.mark.parametrize("expires_in", [0, -5, "soon", None, True])
async def test_a_life_that_makes_no_sense_serves_once(
    tokens: TokenProvider, token_host: TokenHost, expires_in: object
) -> None:
    token_host.expires_in = expires_in
    assert (await tokens.get(ACME)).value.reveal() == "Atza|1"
    assert (await tokens.get(ACME)).value.reveal() == "Atza|2"


async def test_a_valid_token_serves_while_login_with_amazon_is_down(
    tokens: TokenProvider, token_host: TokenHost, clock: FakeClock
) -> None:
    first = await tokens.get(ACME)
    token_host.responses = [http_response("500 Internal Server Error")] * 100
    for _ in range(20):
        clock.advance(3600 * 0.92 / 20)
        assert await tokens.get(ACME) is first
        await settle(tokens)
    clock.advance(3600)
    with pytest.raises(TokenUnavailable):
        await tokens.get(ACME)


async def test_a_failure_is_remembered_for_a_moment_and_then_tried_again(
    tokens: TokenProvider, token_host: TokenHost, clock: FakeClock
) -> None:
    token_host.responses = [http_response("503 Service Unavailable")] * TRIES
    for _ in range(10):
        with pytest.raises(TokenUnavailable) as caught:
            await tokens.get(ACME)
        assert caught.value.retry_after is not None
        assert 0 < caught.value.retry_after <= MAX_PAUSE
    assert len(token_host.received) == TRIES
    clock.advance(MAX_PAUSE)
    assert (await tokens.get(ACME)).value.reveal() == f"Atza|{TRIES + 1}"


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


async def test_one_accounts_trouble_is_not_anothers(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path, clock: FakeClock
) -> None:
    accounts = {name: {"refresh_tokens": {"eu": f"Atzr|{name}"}} for name in ("acme", "zeta")}
    async with open_tokens(fake_upstream, token_host, tmp_path, clock, accounts=accounts) as (tokens, _):
        token_host.responses = [http_response("400 Bad Request", b'{"error":"invalid_grant"}')]
        with pytest.raises(TokenRefused):
            await tokens.get(ACME)
        assert (await tokens.get(ACME._replace(account="zeta"))).kind == "lwa"


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


async def test_a_refused_token_is_told_apart_from_its_successor(tokens: TokenProvider, token_host: TokenHost) -> None:
    first = await tokens.get(ACME)
    second = await tokens.get(ACME, rejected=first)
    assert second.value.reveal() == "Atza|2"
    assert await tokens.get(ACME, rejected=first) is second, "everybody who was refused shares the successor"
    assert len(token_host.received) == 2


async def test_tokens_of_different_credentials_are_kept_apart(tokens: TokenProvider) -> None:
    token_keys = [ACME, GRANTLESS, RDT, RDT._replace(data_elements=("buyerInfo",)), RDT._replace(method="DELETE")]
    values = [(await tokens.get(token_key)).value.reveal() for token_key in token_keys]
    assert len(set(values)) == len(token_keys)
    assert [(await tokens.get(token_key)).value.reveal() for token_key in token_keys] == values


async def test_a_store_that_still_has_a_token_saves_an_exchange(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path, clock: FakeClock
) -> None:
    async with open_tokens(fake_upstream, token_host, tmp_path, clock) as (tokens, _):
        first = await tokens.get(ACME)
        tokens._tokens.clear()
        assert (await tokens.get(ACME)).value == first.value
        assert len(token_host.received) == 1


async def test_an_unrestricted_document_gets_the_ordinary_token(
    tokens: TokenProvider, fake_upstream: FakeUpstream
) -> None:
    message = {"code": "InvalidInput", "message": "Invalid or unsupported document ID found"}
    fake_upstream.rdt_response = http_response("400 Bad Request", json.dumps({"errors": [message]}).encode())
    token = await tokens.get(DOCUMENT)
    assert (token.kind, token.value.reveal()) == ("lwa", "Atza|1")


async def test_a_refused_rdt_says_why_and_what_to_do(tokens: TokenProvider, fake_upstream: FakeUpstream) -> None:
    message = "Application does not have access to one or more requested data elements: [shippingAddress]"
    body = json.dumps({"errors": [{"code": "InvalidInput", "message": message}]}).encode()
    fake_upstream.rdt_response = http_response("400 Bad Request", body)
    with pytest.raises(RestrictedDataRefused) as caught:
        await tokens.get(RDT)
    assert message in caught.value.message
    assert "restricted role" in caught.value.hint


async def test_what_is_held_is_bounded(tokens: TokenProvider, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "MAX_CACHED", 10)
    for number in range(30):
        await tokens.get(DOCUMENT._replace(path=f"/reports/2021-06-30/documents/{number}"))
    assert len(tokens._tokens) <= 10


async def test_a_warm_up_fetches_every_account_and_region_and_survives_refusals(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path, clock: FakeClock
) -> None:
    accounts = {f"a{number}": {"refresh_tokens": {"eu": f"t{number}", "na": f"u{number}"}} for number in range(30)}
    token_host.responses = [http_response("400 Bad Request", b'{"error":"invalid_grant"}')]
    async with open_tokens(fake_upstream, token_host, tmp_path, clock, accounts=accounts) as (tokens, _):
        await tokens.warm_up(access_token_keys(tokens._client.settings.config))
        assert len(token_host.received) == 60
        assert len(tokens._tokens) == 59


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


def test_neither_a_token_nor_its_keeper_shows_its_text() -> None:
    for shown in (Token(Secret("distinctive"), "lwa", 0, 0, 0, 0, 0), StoredToken(Secret("distinctive"), 0)):
        assert "distinctive" not in f"{shown} {shown!r}"


# Renewed before anybody has to wait.


async def test_a_token_in_use_is_renewed_without_anybody_asking(
    tokens: TokenProvider, token_host: TokenHost, clock: FakeClock
) -> None:
    await tokens.get(ACME)
    clock.advance(3600 * 0.7)
    await tokens.get(ACME)
    clock.advance(3600 * 0.25)
    await settle(tokens)
    assert len(token_host.received) == 2, "it was used within the last half hour"
    clock.advance(3600 * 0.2)
    assert (await tokens.get(ACME)).value.reveal() == "Atza|2"
    assert len(token_host.received) == 2


async def test_an_idle_token_is_left_to_expire(tokens: TokenProvider, token_host: TokenHost, clock: FakeClock) -> None:
    await tokens.get(ACME)
    clock.advance(3600 * 3)
    await settle(tokens)
    assert len(token_host.received) == 1
    assert (await tokens.get(ACME)).value.reveal() == "Atza|2"


async def test_a_slow_token_host_is_asked_early_enough(
    tokens: TokenProvider, token_host: TokenHost, clock: FakeClock
) -> None:
    token_host.expires_in, token_host.held = 3, asyncio.Event()
    first = asyncio.create_task(tokens.get(ACME))
    await token_host.arrived.wait()
    clock.advance(1)
    token_host.held.set()
    token = await first
    assert clock() < token.renew_at <= token.expires_at - 1.5
    assert token.expires_at < clock() + 2, "its life is counted from before the exchange"


async def test_a_renewal_that_fails_is_tried_again_while_the_token_is_in_use(
    tokens: TokenProvider, token_host: TokenHost, clock: FakeClock
) -> None:
    await tokens.get(ACME)
    clock.advance(3600 * 0.7)
    await tokens.get(ACME)
    token_host.responses = [http_response("500 Internal Server Error")] * TRIES
    clock.advance(3600 * 0.21)
    await settle(tokens)
    assert len(token_host.received) == 1 + TRIES
    clock.advance(CHECK_INTERVAL + MAX_PAUSE)
    await settle(tokens)
    assert (await tokens.get(ACME)).value.reveal() == f"Atza|{TRIES + 2}"


async def test_expired_tokens_of_documents_are_let_go_of(tokens: TokenProvider, clock: FakeClock) -> None:
    for number in range(5):
        await tokens.get(DOCUMENT._replace(path=f"/reports/2021-06-30/documents/{number}"))
    clock.advance(3600)
    assert [token_key.kind for token_key in tokens._tokens] == ["lwa"]


async def test_a_passing_fault_is_nobodys_business(tokens: TokenProvider, token_host: TokenHost) -> None:
    token_host.responses = [http_response("503 Service Unavailable"), http_response("200 OK", b"<html>")]
    assert (await tokens.get(ACME)).value.reveal() == "Atza|3"


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
async def test_a_wall_clock_that_jumps_changes_nothing(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path, clock: FakeClock, jump: float
) -> None:
    async with open_tokens(fake_upstream, token_host, tmp_path, clock) as (tokens, _):
        wall = FakeClock(clock())
        tokens._wall = wall
        first = await tokens.get(ACME)
        wall.seconds += jump
        clock.advance(3000)
        assert await tokens.get(ACME) is first
        await settle(tokens)
        clock.advance(700)
        second = await tokens.get(ACME)
        assert second is not first
        assert len(token_host.received) == 2


async def test_while_login_with_amazon_is_silent_callers_are_not_kept_for_a_timeout_each(
    fake_upstream: FakeUpstream,
    token_host: TokenHost,
    tmp_path: Path,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokens_module, "PROBE_TIMEOUT", 0.05)
    async with open_tokens(fake_upstream, token_host, tmp_path, clock) as (tokens, _):
        token_host.responses = [http_response("503 Service Unavailable")] * TRIES
        with pytest.raises(TokenUnavailable):
            await tokens.get(ACME)
        clock.advance(MAX_PAUSE)
        token_host.held = asyncio.Event()
        with pytest.raises(TokenUnavailable) as caught:
            await asyncio.wait_for(tokens.get(ACME), 5)
        assert caught.value.retry_after is not None
        token_host.held.set()
        assert (await tokens.get(ACME)).value.reveal().startswith("Atza|"), "its return is noticed"
        assert len(token_host.received) == TRIES + 1


async def test_in_its_last_seconds_a_token_serves_where_no_other_is_to_be_had(
    tokens: TokenProvider, token_host: TokenHost, clock: FakeClock
) -> None:
    first = await tokens.get(ACME)
    clock.advance(3590)
    token_host.responses = [http_response("503 Service Unavailable")] * 1000
    moments = []
    while clock() < first.expires_hard - 0.7:
        assert await tokens.get(ACME) is first
        await settle(tokens)
        moments.append(first.expires_hard - clock())
        clock.advance(0.1)
    assert min(moments) < 1, "to its last second"
    clock.advance(0.7)
    with pytest.raises(TokenUnavailable):
        await tokens.get(ACME)


async def test_a_pause_ends_when_the_token_does(tokens: TokenProvider, token_host: TokenHost, clock: FakeClock) -> None:
    first = await tokens.get(ACME)
    token_host.responses = [http_response("503 Service Unavailable")] * TRIES * 4
    for _ in range(4):
        clock.advance(max(0.0, first.renew_at - clock()) + MAX_PAUSE)
        await tokens.get(ACME)
        await settle(tokens)
    clock.advance(first.expires_at - clock() - 0.5)
    token_host.responses = [http_response("503 Service Unavailable")] * TRIES
    await tokens.get(ACME)
    await settle(tokens)
    clock.advance(first.expires_hard - clock())
    assert (await tokens.get(ACME)) is not first, "the token host is back, and asked at once"


# Secrets that change.


async def test_a_secret_that_was_rotated_is_used_from_the_next_exchange_on(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path, clock: FakeClock
) -> None:
    secret, refresh = tmp_path / "secret", tmp_path / "refresh"
    secret.write_text("old-secret\n")
    refresh.write_text("Atzr|old\n")
    applications = {"main": {"client_id": "client", "client_secret": {"file": str(secret)}}}
    accounts = {"acme": {"refresh_tokens": {"eu": {"file": str(refresh)}}}}
    async with open_tokens(
        fake_upstream, token_host, tmp_path, clock, applications=applications, accounts=accounts
    ) as (
        tokens,
        _,
    ):
        await tokens.get(ACME)
        secret.write_text("new-secret\n")
        refresh.write_text("Atzr|new\n")
        clock.advance(4000)
        await tokens.get(ACME)
        secret.unlink()
        refresh.write_text("")
        clock.advance(4000)
        await tokens.get(ACME)
    sent = [form(received.body) for received in token_host.received]
    assert [(one["client_secret"], one["refresh_token"]) for one in sent] == [
        ("old-secret", "Atzr|old"),
        ("new-secret", "Atzr|new"),
        ("old-secret", "Atzr|old"),
    ]


async def test_a_refused_secret_is_tried_again_as_soon_as_it_is_another(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path, clock: FakeClock
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("old-secret")
    applications = {"main": {"client_id": "client", "client_secret": {"file": str(secret)}}}
    async with open_tokens(fake_upstream, token_host, tmp_path, clock, applications=applications) as (tokens, _):
        token_host.responses = [http_response("401 Unauthorized", b'{"error":"invalid_client"}')]
        for _ in range(3):
            with pytest.raises(TokenRefused):
                await tokens.get(RDT)
        assert len(token_host.received) == 1
        secret.write_text("new-secret")
        assert (await tokens.get(RDT)).kind == "rdt"


async def test_refusals_are_asked_about_ever_more_rarely(
    tokens: TokenProvider, token_host: TokenHost, clock: FakeClock
) -> None:
    token_host.responses = [http_response("400 Bad Request", b'{"error":"invalid_grant"}')] * 1000
    for _ in range(3600):
        with pytest.raises(TokenRefused):
            await tokens.get(ACME)
        clock.advance(1)
    assert len(token_host.received) < 30


# Tokens that Amazon refuses.


async def test_a_replacement_is_fetched_once_for_many(tokens: TokenProvider, token_host: TokenHost) -> None:
    first = await tokens.get(ACME)
    got = await asyncio.gather(*(tokens.refresh_rejected(ACME, first) for _ in range(100)))
    assert len(set(map(id, got))) == 1
    assert got[0] is not None
    assert got[0].value.reveal() == "Atza|2"
    assert len(token_host.received) == 2


async def test_a_successor_that_is_refused_too_is_not_replaced_for_a_while(
    tokens: TokenProvider, token_host: TokenHost, clock: FakeClock
) -> None:
    first = await tokens.get(ACME)
    second = await tokens.refresh_rejected(ACME, first)
    assert second is not None
    tokens.report_result(ACME, second, accepted=False)
    assert await tokens.refresh_rejected(ACME, first) is None
    assert await tokens.refresh_rejected(ACME, second) is None
    assert len(token_host.received) == 2
    clock.advance(31)
    third = await tokens.refresh_rejected(ACME, second)
    assert third is not None
    tokens.report_result(ACME, third, accepted=True)
    assert await tokens.refresh_rejected(ACME, third) is not None, "a token that worked may be replaced again"


async def test_a_storm_of_refusals_is_no_storm_of_exchanges(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path, clock: FakeClock
) -> None:
    accounts = {f"a{number}": {"refresh_tokens": {"eu": f"Atzr|{number}"}} for number in range(200)}
    async with open_tokens(fake_upstream, token_host, tmp_path, clock, accounts=accounts) as (tokens, _):
        token_keys = [ACME._replace(account=name) for name in accounts]
        held = {credential: await tokens.get(credential) for credential in token_keys}
        before = len(token_host.received)

        async def refused(credential: TokenKey) -> None:
            another = await tokens.refresh_rejected(credential, held[credential])
            if another is not None:
                tokens.report_result(credential, another, accepted=False)

        await asyncio.gather(*map(refused, token_keys))
        assert len(token_host.received) - before < 50
        for _ in range(25 * 60):
            clock.advance(1)
            await refused(token_keys[0])
            await refused(token_keys[-1])
        assert len(token_host.received) - before < 75


async def test_an_rdt_is_minted_although_the_ordinary_token_was_taken_back(
    tokens: TokenProvider, fake_upstream: FakeUpstream, token_host: TokenHost
) -> None:
    await tokens.get(ACME)
    message = {"code": "Unauthorized", "message": "Access to requested resource is denied.",
               "details": "The access token you provided is revoked, malformed or invalid."}  # fmt: skip
    inner = fake_upstream.respond

    async def respond(received: Received, writer: asyncio.StreamWriter) -> None:
        if received.get("x-amz-access-token") == "Atza|1":
            writer.write(http_response("403 Forbidden", json.dumps({"errors": [message]}).encode()))
        else:
            await inner(received, writer)

    fake_upstream.respond = respond  # type: ignore[assignment, method-assign]
    assert (await tokens.get(RDT)).value.reveal() == "Atz.sprdt|1"
    assert len(token_host.received) == 2


# Restricted Data Tokens.


def elements_refused(*names: str) -> bytes:
    text = f"Application does not have access to one or more requested data elements: [{', '.join(names)}]"
    return http_response(
        "400 Bad Request", json.dumps({"errors": [{"code": "InvalidInput", "message": text}]}).encode()
    )


ORDERS = RDT._replace(path="/orders/v0/orders", data_elements=("buyerInfo", "shippingAddress"), optional=True)


def asked(received: Received) -> list[str]:
    elements: list[str] = json.loads(received.body)["restrictedResources"][0].get("dataElements", [])
    return elements


async def test_an_element_without_a_role_is_left_out_for_an_hour(
    fake_upstream: FakeUpstream,
    token_host: TokenHost,
    tmp_path: Path,
    clock: FakeClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with open_tokens(fake_upstream, token_host, tmp_path, clock) as (tokens, metrics):
        inner = fake_upstream.respond

        async def respond(received: Received, writer: asyncio.StreamWriter) -> None:
            if "shippingAddress" in asked(received):
                fake_upstream.received.remove(received)
                fake_upstream.minted.append(received)
                writer.write(elements_refused("shippingAddress"))
            else:
                await inner(received, writer)

        fake_upstream.respond = respond  # type: ignore[assignment, method-assign]
        item = ORDERS._replace(path="/orders/v0/orders/{orderId}")
        concurrency = await asyncio.gather(*(tokens.get(wanted) for wanted in [ORDERS, item] * 20))
        assert {(token.kind, token.data_elements) for token in concurrency} == {("rdt", ("buyerInfo",))}
        both = ["buyerInfo", "shippingAddress"]
        assert sorted(map(asked, fake_upstream.minted)) == [["buyerInfo"], ["buyerInfo"], both, both]
        labels = {"account": "acme", "region": "eu", "element": "shippingAddress"}
        assert metrics.registry.get_sample_value("spapi_proxy_data_elements_refused_total", labels) == 2
        assert sum("data element denied" in record.message for record in caplog.records) == 1
        clock.advance(3601)
        await tokens.get(ORDERS)
        assert asked(fake_upstream.minted[4]) == both, "the role may have been granted meanwhile"


async def test_with_no_element_left_the_ordinary_token_goes_where_it_works(
    tokens: TokenProvider, fake_upstream: FakeUpstream
) -> None:
    fake_upstream.rdt_response = elements_refused("buyerInfo", "shippingAddress")
    token = await tokens.get(ORDERS)
    assert (token.kind, token.value.reveal(), token.data_elements) == ("lwa", "Atza|1", ())
    await tokens.get(ORDERS)
    assert len(fake_upstream.minted) == 1


async def test_with_no_element_left_other_operations_are_refused_clearly(
    tokens: TokenProvider, fake_upstream: FakeUpstream
) -> None:
    fake_upstream.rdt_response = elements_refused("buyerInfo", "shippingAddress")
    for _ in range(3):
        with pytest.raises(RestrictedDataRefused, match="no role for any") as caught:
            await tokens.get(ORDERS._replace(optional=False))
        assert caught.value.hint
    assert len(fake_upstream.minted) == 1


async def test_elements_refused_for_one_account_are_asked_for_another(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path, clock: FakeClock
) -> None:
    accounts = {name: {"refresh_tokens": {"eu": f"Atzr|{name}"}} for name in ("acme", "zeta")}
    async with open_tokens(fake_upstream, token_host, tmp_path, clock, accounts=accounts) as (tokens, _):
        fake_upstream.rdt_response = elements_refused("buyerInfo", "shippingAddress")
        await tokens.get(ORDERS)
        fake_upstream.rdt_response = None
        assert (await tokens.get(ORDERS._replace(account="zeta"))).data_elements == ("buyerInfo", "shippingAddress")


async def test_a_refusal_that_names_other_elements_is_no_endless_loop(
    tokens: TokenProvider, fake_upstream: FakeUpstream
) -> None:
    fake_upstream.rdt_response = elements_refused("buyerTaxInformation")
    with pytest.raises(RestrictedDataRefused):
        await tokens.get(ORDERS)
    assert len(fake_upstream.minted) == 1


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


async def test_a_document_that_is_not_restricted_is_asked_about_once(
    tokens: TokenProvider, fake_upstream: FakeUpstream
) -> None:
    message = {"code": "InvalidInput", "message": "Invalid or unsupported document ID found"}
    fake_upstream.rdt_response = http_response("400 Bad Request", json.dumps({"errors": [message]}).encode())
    for _ in range(3):
        assert (await tokens.get(DOCUMENT)).kind == "lwa"
    assert len(fake_upstream.minted) == 1


async def test_delegation_names_the_application_that_may_use_the_token(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path, clock: FakeClock
) -> None:
    accounts = {"acme": {"refresh_tokens": {"eu": "Atzr|acme"}, "target_application": "amzn1.sp.solution.x"}}
    async with open_tokens(fake_upstream, token_host, tmp_path, clock, accounts=accounts) as (tokens, _):
        await tokens.get(RDT)
    assert json.loads(fake_upstream.minted[0].body)["targetApplication"] == "amzn1.sp.solution.x"


async def test_a_token_got_by_what_a_file_held_for_a_moment_is_not_kept(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path, clock: FakeClock
) -> None:
    """Another seller's refresh token was put there, and taken back before the next look at the file."""
    refresh = tmp_path / "refresh"
    refresh.write_text("Atzr|right")
    accounts = {"acme": {"refresh_tokens": {"eu": {"file": str(refresh)}}}}
    async with open_tokens(fake_upstream, token_host, tmp_path, clock, accounts=accounts) as (tokens, _):
        refresh.write_text("Atzr|wrong")
        await tokens.get(ACME)
        refresh.write_text("Atzr|right")
        clock.advance(SETTLED_AFTER)
        await tokens.get(ACME)
        sent = [received.body.decode() for received in token_host.received]
        assert [text.partition("refresh_token=Atzr%7C")[2].partition("&")[0] for text in sent] == ["wrong", "right"]
        clock.advance(SETTLED_AFTER)
        await tokens.get(ACME)
        assert len(token_host.received) == 2


async def test_a_token_got_by_what_a_file_holds_from_now_on_is_kept(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path, clock: FakeClock
) -> None:
    refresh = tmp_path / "refresh"
    refresh.write_text("Atzr|old")
    accounts = {"acme": {"refresh_tokens": {"eu": {"file": str(refresh)}}}}
    async with open_tokens(fake_upstream, token_host, tmp_path, clock, accounts=accounts) as (tokens, _):
        refresh.write_text("Atzr|new")
        await tokens.get(ACME)
        clock.advance(SETTLED_AFTER)
        await tokens.get(ACME)
        assert len(token_host.received) == 1
