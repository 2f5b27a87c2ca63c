"""What the answers to a Restricted Data Token call mean: a token, a refusal with Amazon's reason, or a failure."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.amazon.lwa import TokenRequestFailed
from proxy.amazon.rdt import RdtRefused, parse_response

TOKEN = "Atz.sprdt|" + "x" * 400
NO_ELEMENT = "Application does not have access to one or more requested data elements: [shippingAddress]"
NO_ROLE = "Application do not have access to some or all requested resource"
NO_DOCUMENT = "Invalid or unsupported document ID found"
DENIED = "Access to requested resource is denied."


def envelope(message: object, code: str = "InvalidInput") -> bytes:
    return json.dumps({"errors": [{"code": code, "message": message, "details": ""}]}).encode()


@pytest.mark.parametrize(
    "response",
    [
        {"restrictedDataToken": TOKEN, "expiresIn": 3600},
        {"payload": {"restrictedDataToken": TOKEN, "expiresIn": 3600}},  # as old guide pages show it
        {"restrictedDataToken": TOKEN, "expiresIn": 3600, "payload": None, "new": 1},
    ],
)
def test_a_response_holds_the_token_and_its_life(response: dict[str, Any]) -> None:
    grant = parse_response(200, json.dumps(response).encode())
    assert (grant.value.reveal(), grant.expires_in) == (TOKEN, 3600)
    assert TOKEN not in repr(grant)


@pytest.mark.parametrize(
    ("life", "seconds"),
    [(3600, 3600), (60, 60), (7200, 3600), ("60", 60), (0, 0), (-1, 0), (None, 0), (True, 0), ("x", 0), (1e30, 3600)],
)
def test_a_life_that_makes_no_sense_means_use_once(life: object, seconds: float) -> None:
    text = json.dumps({"restrictedDataToken": TOKEN, "expiresIn": life}).encode()
    assert parse_response(200, text).expires_in == seconds


@pytest.mark.parametrize(
    ("status", "code", "message", "means_unrestricted"),
    [
        (400, "InvalidInput", NO_ELEMENT, False),
        (400, "InvalidInput", NO_ROLE, False),
        (400, "InvalidInput", NO_DOCUMENT, True),
        (400, "InvalidInput", f"{NO_DOCUMENT}: d1", True),
        (400, "InvalidInput", "Invalid Input", False),
        (403, "Unauthorized", DENIED, False),
        (403, "Unauthorized", NO_DOCUMENT, False),
        (401, "Unauthorized", "The access token you provided has expired.", False),
        (404, "NotFound", "no such resource", False),
    ],
)
def test_a_refusal_keeps_status_and_the_reason_of_amazon(
    status: int, code: str, message: str, means_unrestricted: bool
) -> None:
    with pytest.raises(RdtRefused) as caught:
        parse_response(status, envelope(message, code))
    assert (caught.value.status, caught.value.refusal.message) == (status, message)
    assert caught.value.means_unrestricted is means_unrestricted
    assert str(caught.value) == f"{status} {message}"


@pytest.mark.parametrize(
    ("message", "kept"),
    [
        ("a\r\nx-evil: 1", "ax-evil: 1"),
        ("a\x00\x1b[31mb", "a[31mb"),
        ("x" * 5000, "x" * 300),
        (None, ""),
        (7, ""),
        (["a"], ""),
        ("", ""),
    ],
)
def test_a_reason_is_printable_and_short(message: object, kept: str) -> None:
    with pytest.raises(RdtRefused) as caught:
        parse_response(400, envelope(message))
    assert caught.value.refusal.message == kept


@pytest.mark.parametrize(
    "text",
    [b"", b"<html>Bad Request</html>", b"[]", b"null", b"{}", b'{"errors": []}', b'{"errors": null}',
     b'{"errors": "x"}', b'{"errors": ["x"]}', b'{"errors": [{}]}', b'{"errors": {"message": "x"}}', b"[" * 50_000,
     b'{"message": "x"}'],
    ids=lambda text: text[:20].decode(),
)  # fmt: skip
def test_a_refusal_without_a_reason_is_a_refusal_all_the_same(text: bytes) -> None:
    for status in (400, 401, 403, 404):
        with pytest.raises(RdtRefused) as caught:
            parse_response(status, text)
        assert (caught.value.status, caught.value.refusal.message) == (status, "")
        assert not caught.value.means_unrestricted


@pytest.mark.parametrize("status", [201, 204, 301, 302, 405, 408, 413, 415, 429, 500, 502, 503, 504])
def test_any_other_status_may_succeed_later(status: int) -> None:
    for text in (envelope(DENIED), json.dumps({"restrictedDataToken": TOKEN, "expiresIn": 3600}).encode(), b""):
        with pytest.raises(TokenRequestFailed) as caught:
            parse_response(status, text)
        assert caught.value.reason == f"http_{status}"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "no_token"),
        (b"<html></html>", "no_token"),
        (b"[]", "no_token"),
        (b"null", "no_token"),
        (b"42", "no_token"),
        (b"[" * 50_000, "no_token"),
        (b'{"payload": {}}', "no_token"),
        (b'{"payload": []}', "no_token"),
        (b'{"restrictedDataToken": null}', "no_token"),
        (b'{"restrictedDataToken": ""}', "no_token"),
        (b'{"restrictedDataToken": ["x"]}', "no_token"),
        (b'{"access_token": "Atza|x"}', "no_token"),
        (b'{"restrictedDataToken": "Atz.sprdt|x\\r\\nx-evil: 1"}', "malformed_token"),
        (b'{"restrictedDataToken": "Atz.sprdt|x y"}', "malformed_token"),
    ],
    ids=range(14),
)
def test_nonsense_is_a_failure_that_may_pass(text: bytes, reason: str) -> None:
    with pytest.raises(TokenRequestFailed) as caught:
        parse_response(200, text)
    assert caught.value.reason == reason


@given(status=st.integers(100, 599), text=st.binary())
def test_no_response_whatever_raises_anything_else(status: int, text: bytes) -> None:
    with pytest.raises((TokenRequestFailed, RdtRefused)):
        parse_response(status, text)
