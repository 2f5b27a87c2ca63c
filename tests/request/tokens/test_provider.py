"""Tokens are fetched once for all callers, kept apart, stored, replaced and forgotten."""

import asyncio
import json
from pathlib import Path

import pytest

from proxy.config import Secret
from proxy.errors import TokenRefused
from proxy.request.token import Token
from proxy.request.token_selection import TokenKey
from proxy.request.tokens import provider as tokens_module
from proxy.request.tokens.client import access_token_keys
from proxy.request.tokens.provider import SETTLED_AFTER, TokenProvider
from proxy.store import StoredToken
from tests.request.tokens.conftest import ACME, DOCUMENT, GRANTLESS, RDT, form, open_tokens, settle
from tests.support.clock import FakeClock
from tests.support.fake_upstream import FakeUpstream, Received, TokenHost, http_response


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


async def test_one_accounts_trouble_is_not_anothers(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path, clock: FakeClock
) -> None:
    accounts = {name: {"refresh_tokens": {"eu": f"Atzr|{name}"}} for name in ("acme", "zeta")}
    async with open_tokens(fake_upstream, token_host, tmp_path, clock, accounts=accounts) as (tokens, _):
        token_host.responses = [http_response("400 Bad Request", b'{"error":"invalid_grant"}')]
        with pytest.raises(TokenRefused):
            await tokens.get(ACME)
        assert (await tokens.get(ACME._replace(account="zeta"))).kind == "lwa"


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


def test_neither_a_token_nor_its_keeper_shows_its_text() -> None:
    for shown in (Token(Secret("distinctive"), "lwa", 0, 0, 0, 0, 0), StoredToken(Secret("distinctive"), 0)):
        assert "distinctive" not in f"{shown} {shown!r}"


# Renewed before anybody has to wait.


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


async def test_a_document_that_is_not_restricted_is_asked_about_once(
    tokens: TokenProvider, fake_upstream: FakeUpstream
) -> None:
    message = {"code": "InvalidInput", "message": "Invalid or unsupported document ID found"}
    fake_upstream.rdt_response = http_response("400 Bad Request", json.dumps({"errors": [message]}).encode())
    for _ in range(3):
        assert (await tokens.get(DOCUMENT)).kind == "lwa"
    assert len(fake_upstream.minted) == 1


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
