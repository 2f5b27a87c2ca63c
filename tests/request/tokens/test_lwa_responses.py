"""What the answers of Login with Amazon mean: a token, a refusal for good, or another try later."""

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.amazon.lwa import (
    MAX_TOKEN,
    OAUTH_ERRORS,
    OAuthError,
    TokenRequestFailed,
    TokenResponse,
    authorization_code_grant,
    parse_lifetime,
    parse_response,
)
from proxy.config import Secret

TOKEN = "Atza|" + "x" * 345
RESPONSE = {"access_token": TOKEN, "token_type": "bearer", "expires_in": 3600, "refresh_token": "Atzr|y"}

# Answers that hold no JSON object, whatever their status.
NONSENSE = [
    b"",
    b" ",
    b"<html><body>Service Unavailable</body></html>",
    b"[]",
    b'["access_token"]',
    b"null",
    b"42",
    b'"Atza|x"',
    b"true",
    b"{",
    b"{]",
    b"\xff\xfe\x00",
    b"\x1f\x8b\x08\x00",
    b"[" * 50_000,
    b'{"a":' * 50_000,
    b"9" * 5_000,
    b"{}",
]


def body(**changed: Any) -> bytes:
    return json.dumps({**RESPONSE, **changed}).encode()


def test_a_response_holds_the_token_and_its_life() -> None:
    assert parse_response(200, body()) == TokenResponse(Secret(TOKEN), 3600.0)


@pytest.mark.parametrize("token", ["Atza|x", "Atc|" + "x" * 400, "x", "a" * MAX_TOKEN, "Atza|+/=_-.~"])
def test_a_token_is_taken_as_it_is(token: str) -> None:
    assert parse_response(200, body(access_token=token)).value.reveal() == token


def test_a_response_without_the_refresh_token_and_with_unknown_fields_is_fine() -> None:
    text = json.dumps({"access_token": TOKEN, "expires_in": 3600, "token_type": "Bearer", "new": [1, {"a": None}]})
    assert parse_response(200, text.encode()).expires_in == 3600


def test_a_byte_order_mark_or_utf_16_is_read_as_json_allows() -> None:
    assert parse_response(200, body().decode().encode("utf-16")).value.reveal() == TOKEN
    assert parse_response(200, b"\xef\xbb\xbf" + body()).value.reveal() == TOKEN


# FACTS of the token host: status, error, whether it is for good.
@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, "invalid_grant"),
        (401, "invalid_client"),
        (400, "unauthorized_client"),
        (400, "invalid_scope"),
        (400, "invalid_request"),
        (400, "unsupported_grant_type"),
        (403, "access_denied"),
    ],
)
def test_a_refusal_is_for_good_and_keeps_reason_and_request_id(status: int, error: str) -> None:
    response = {"error": error, "error_description": "The request has an invalid grant parameter", "request_id": "r-1"}
    with pytest.raises(OAuthError) as caught:
        parse_response(status, json.dumps(response).encode())
    assert (caught.value.reason, caught.value.request_id) == (error, "r-1")
    assert "parameter" not in repr(caught.value)


@pytest.mark.parametrize("request_id", [None, 7, ["r"], {"a": "b"}])
def test_a_request_id_that_is_no_text_is_left_out(request_id: object) -> None:
    response = {"error": "invalid_grant", "error_index": "x", "request_id": request_id}
    with pytest.raises(OAuthError) as caught:
        parse_response(400, json.dumps(response).encode())
    assert caught.value.request_id == ""


@pytest.mark.parametrize(
    ("status", "response"),
    [
        (500, {"error": "server_error"}),
        (503, {"error": "temporarily_unavailable"}),
        (500, {"error": "invalid_grant"}),
        (503, {"error": "invalid_client"}),
        (429, {"error": "invalid_request"}),
        (429, {"error": "slow_down"}),
        (400, {"error": "authorization_pending"}),
        (400, {"error": "something_new"}),
        (400, {"error": None}),
        (400, {"error": 7}),
        (400, {"error": ["invalid_grant"]}),
        (400, {"error": {"invalid_grant": 1}}),
        (400, {"error": "INVALID_GRANT"}),
        (400, {"message": "invalid_grant"}),
        (403, {}),
        (408, {}),
        (301, {"error": "invalid_grant"}),
        (302, RESPONSE),
        (201, RESPONSE),
        (204, {}),
    ],
)
def test_anything_else_may_succeed_later(status: int, response: dict[str, Any]) -> None:
    with pytest.raises(TokenRequestFailed) as caught:
        parse_response(status, json.dumps(response).encode())
    assert caught.value.reason == f"http_{status}"


@pytest.mark.parametrize("text", NONSENSE, ids=range(len(NONSENSE)))
def test_nonsense_is_a_failure_that_may_pass(text: bytes) -> None:
    for status, reason in ((200, "no_token"), (400, "http_400"), (500, "http_500")):
        with pytest.raises(TokenRequestFailed) as caught:
            parse_response(status, text)
        assert caught.value.reason == reason


@pytest.mark.parametrize("token", [None, "", 7, True, [TOKEN], {"value": TOKEN}, "x" * (MAX_TOKEN + 1)])
def test_a_response_without_a_token_is_a_failure(token: object) -> None:
    with pytest.raises(TokenRequestFailed, match="no_token"):
        parse_response(200, body(access_token=token))


@pytest.mark.parametrize(
    "token",
    ["Atza|x\r\nx-evil: 1", "Atza|x\n", "\rAtza|x", "Atza|\x00", "Atza|\t", "Atza| x", " Atza|x", "Atza|x ", "Atza|ä",
     "Atza|\x7f", "Atza|\u2028", "Atza|\u00a0", "Atza|\ud800"],
)  # fmt: skip
def test_a_token_that_no_header_may_hold_is_a_failure_that_does_not_quote_it(token: str) -> None:
    with pytest.raises(TokenRequestFailed) as caught:
        parse_response(200, body(access_token=token))
    assert caught.value.reason == "malformed_token"
    assert "Atza" not in repr(caught.value)


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("3600", 3600),
        ("1", 1),
        ("59.5", 59.5),
        ("3601", 3600),
        ("1e30", 3600),
        ("1e309", 3600),
        ("1" + "0" * 400, 3600),
        ('"3600"', 3600),
        ('"60"', 60),
        ("0", 0),
        ("-0", 0),
        ("-1", 0),
        ("-1e309", 0),
        ("null", 0),
        ("true", 0),
        ("false", 0),
        ('""', 0),
        ('"soon"', 0),
        ('"-5"', 0),
        ('"1e3"', 0),
        ('"٣"', 0),
        ('"9999999999"', 0),
        ("[3600]", 0),
        ("{}", 0),
        ("NaN", 0),
    ],
)
def test_a_life_that_makes_no_sense_means_use_once_and_none_is_longer_than_an_hour(
    written: str, seconds: float
) -> None:
    text = f'{{"access_token": "Atza|x", "expires_in": {written}}}'.encode()
    assert parse_response(200, text).expires_in == seconds


def test_a_response_without_a_life_means_use_once() -> None:
    assert parse_response(200, b'{"access_token": "Atza|x"}').expires_in == 0


@given(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers())))
def test_every_life_is_between_nothing_and_an_hour(value: object) -> None:
    assert 0 <= parse_lifetime(value) <= 3600


@given(status=st.integers(100, 599), text=st.binary())
def test_no_response_whatever_raises_anything_else(status: int, text: bytes) -> None:
    with pytest.raises((TokenRequestFailed, OAuthError)):
        parse_response(status, text)


@given(
    status=st.integers(100, 599),
    error=st.sampled_from(sorted(OAUTH_ERRORS)) | st.text(),
    token=st.text() | st.none() | st.just(TOKEN),
)
def test_a_token_comes_with_200_alone_and_a_refusal_with_4xx_alone(status: int, error: str, token: str | None) -> None:
    text = json.dumps({"error": error, "access_token": token, "expires_in": 60}).encode()
    try:
        grant = parse_response(status, text)
    except OAuthError:
        assert 400 <= status < 500
        assert status != 429
        assert error in OAUTH_ERRORS
    except TokenRequestFailed:
        pass
    else:
        assert (status, grant.value.reveal()) == (200, token)


def test_a_grant_does_not_show_its_token() -> None:
    assert TOKEN not in repr(parse_response(200, body()))


# The exchange of a code: one more text comes back.


class _Host:
    """Login with Amazon, as one function: keeps what it is sent, and answers one thing."""

    def __init__(self, status: int, response: bytes) -> None:
        self.status, self.response, self.sent = status, response, b""

    async def post(self, url: str, headers: Mapping[str, str], body: bytes, most: int) -> tuple[int, bytes]:
        assert (url, headers["Accept"]) == ("https://host.example/token", "application/json")
        self.sent = body
        return self.status, self.response[: most + 1]

    async def asked(self, redirect_uri: str | None = None) -> Secret:
        client = ("client|id", Secret("client&secret"))
        return await authorization_code_grant(
            self.post, "https://host.example/token", *client, Secret("a+code"), redirect_uri
        )


async def test_a_code_is_exchanged_for_a_refresh_token() -> None:
    host = _Host(200, body(refresh_token="Atzr|whole"))
    assert (await host.asked("https://app.example/r?x=1")).reveal() == "Atzr|whole"
    assert parse_qs(host.sent.decode(), strict_parsing=True) == {
        "grant_type": ["authorization_code"],
        "code": ["a+code"],
        "redirect_uri": ["https://app.example/r?x=1"],
        "client_id": ["client|id"],
        "client_secret": ["client&secret"],
    }
    await host.asked()
    assert b"redirect_uri" not in host.sent


@pytest.mark.parametrize("refresh_token", [None, "", 1, ["Atzr|x"], "Atzr|x\ny", "Atzr|x y", "a" * (MAX_TOKEN + 1)])
async def test_a_response_without_a_usable_refresh_token_is_a_failure(refresh_token: Any) -> None:
    with pytest.raises(TokenRequestFailed):
        await _Host(200, body(refresh_token=refresh_token)).asked()


@pytest.mark.parametrize("nonsense", NONSENSE)
async def test_nonsense_is_no_refresh_token(nonsense: bytes) -> None:
    with pytest.raises(TokenRequestFailed):
        await _Host(200, nonsense).asked()


async def test_a_refused_code_is_a_refusal() -> None:
    with pytest.raises(OAuthError, match="invalid_grant"):
        await _Host(400, json.dumps({"error": "invalid_grant"}).encode()).asked()
