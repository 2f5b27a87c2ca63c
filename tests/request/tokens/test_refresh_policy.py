"""Tokens are renewed before they expire, and failed refreshes are tried again with backoff."""

import asyncio
from pathlib import Path

import pytest

from proxy.config import Secret
from proxy.errors import TokenRefused, TokenUnavailable
from proxy.request.token import Token
from proxy.request.tokens import provider as tokens_module
from proxy.request.tokens.client import TRIES
from proxy.request.tokens.provider import TokenProvider
from proxy.request.tokens.refresh_policy import (
    CHECK_INTERVAL,
    MAX_PAUSE,
    MAX_REJECTED_PAUSE,
    new_token,
    pause_after,
    retry_at,
)
from tests.request.tokens.conftest import ACME, open_tokens, settle
from tests.support.clock import FakeClock
from tests.support.fake_upstream import FakeUpstream, TokenHost, http_response


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


async def test_refusals_are_asked_about_ever_more_rarely(
    tokens: TokenProvider, token_host: TokenHost, clock: FakeClock
) -> None:
    token_host.responses = [http_response("400 Bad Request", b'{"error":"invalid_grant"}')] * 1000
    for _ in range(3600):
        with pytest.raises(TokenRefused):
            await tokens.get(ACME)
        clock.advance(1)
    assert len(token_host.received) < 30


def token(*, fetch_time: float = 0.0, lifetime: float = 3600.0) -> Token:
    return new_token(ACME, Secret("Atza|1"), issued_at=100.0, lifetime=lifetime, fetch_time=fetch_time, now=100.0)


@pytest.mark.parametrize(("lifetime", "margin"), [(3600.0, 2.0), (60.0, 2.0), (20.0, 1.0), (0.0, 0.0)])
def test_the_safety_margin_is_two_seconds_or_a_twentieth_of_the_lifetime(lifetime: float, margin: float) -> None:
    made = token(lifetime=lifetime)
    assert (made.expires_at, made.expires_hard) == (100.0 + lifetime - margin, 100.0 + lifetime)


def test_a_token_is_renewed_between_80_and_90_percent_of_its_lifetime() -> None:
    times = [token().renew_at - 100.0 for _ in range(200)]
    assert 0.8 * 3600 <= min(times) < max(times) <= 0.9 * 3600


def test_a_slow_fetch_moves_the_renewal_forward() -> None:
    made = token(fetch_time=1000.0)
    assert made.renew_at == made.expires_at - 1500.0


@pytest.mark.parametrize(("failures", "longest"), [(1, 1.0), (2, 2.0), (3, 4.0), (4, 5.0), (1000, 5.0)])
def test_pauses_double_up_to_a_bound(failures: int, longest: float) -> None:
    pauses = [pause_after(TokenUnavailable("down"), failures) for _ in range(100)]
    assert longest * 0.75 <= min(pauses) <= max(pauses) <= longest


def test_a_refusal_pauses_for_longer_than_an_outage() -> None:
    assert pause_after(TokenRefused("revoked"), 1000) >= MAX_REJECTED_PAUSE * 0.75


@pytest.mark.parametrize(("now", "expected"), [(3695.0, 3698.0), (3698.5, 3700.0), (3700.0, 3705.0), (200.0, 205.0)])
def test_a_retry_waits_no_longer_than_the_cached_token_is_valid(now: float, expected: float) -> None:
    assert retry_at(5.0, token(), now) == expected
    assert retry_at(5.0, None, now) == now + 5.0
