"""The proxy's own errors: the contract of each, and the response that a client gets."""

import json
from collections import Counter

import pytest

from proxy.errors import (
    HostRefused,
    InternalError,
    MethodRefused,
    ProxyError,
    RequestHeaderTimeout,
    TokenRequestRefused,
    TokenUnavailable,
    UsagePlanExhausted,
    all_errors,
)

# Written out by hand: these are a contract with clients, and change on purpose only.
CONTRACT = [
    ("MalformedRequest", 400, "client", False),
    ("BadTarget", 400, "client", False),
    ("MethodNotAllowed", 405, "client", False),
    ("HeaderTooLarge", 431, "client", False),
    ("HeaderTimeout", 408, "client", False),
    ("BodyTimeout", 408, "client", False),
    ("HTTPVersionNotSupported", 505, "client", False),
    ("HostRefused", 421, "client", False),
    ("BrowserRefused", 403, "client", False),
    ("HeaderRequired", 403, "client", False),
    ("UnknownAccount", 400, "client", False),
    ("UnknownRegion", 400, "client", False),
    ("CallerRefused", 403, "client", False),
    ("NotAllowed", 403, "client", False),
    ("DocumentRefused", 403, "client", False),
    ("DocumentExpired", 403, "client", False),
    ("DocumentsBusy", 503, "client", True),
    ("BadGzip", 502, "amazon", False),
    ("GzipBomb", 502, "amazon", False),
    ("CallerBusy", 429, "client", True),
    ("AccountBusy", 503, "client", True),
    ("TooManyConnections", 503, "client", True),
    ("UnknownMarketplace", 400, "client", False),
    ("AccountRequired", 400, "client", False),
    ("RegionRequired", 400, "client", False),
    ("RegionNotConfigured", 400, "client", False),
    ("ConflictingSources", 400, "client", False),
    ("BadOption", 400, "client", False),
    ("InvalidInput", 400, "client", False),
    ("TokenRequestRefused", 400, "client", False),
    ("UsagePlanExhausted", 429, "client", True),
    ("ShuttingDown", 503, "proxy", False),
    ("InternalError", 500, "proxy", False),
    ("TokenUnavailable", 503, "amazon", True),
    ("RegionDown", 503, "amazon", True),
    ("CallTimeout", 504, "client", False),
    ("TokenRefused", 502, "proxy", False),
    ("RestrictedDataRefused", 403, "proxy", False),
    ("UpstreamUnreachable", 502, "amazon", True),
    ("UpstreamBroken", 502, "amazon", False),
    ("ConnectTimeout", 504, "amazon", True),
    ("UpstreamTimeout", 504, "amazon", False),
    ("TotalTimeout", 504, "amazon", False),
]


def test_code_status_fault_and_retry_of_every_error_are_those_of_the_contract() -> None:
    found = [(error.code, error.status, error.fault, error.retryable) for error in all_errors()]
    assert sorted(found) == sorted(CONTRACT)


def test_no_two_errors_share_a_code() -> None:
    counted = Counter(error.code for error in all_errors())
    assert [code for code, times in counted.items() if times > 1] == []


def test_every_error_has_a_meaning_a_remedy_of_its_own_and_an_error_status() -> None:
    for error in all_errors():
        assert (error.__doc__ or "").strip().endswith("."), error
        assert vars(error)["remedy"].endswith("."), error
        assert 400 <= error.status < 600, error
        assert error.code.isalnum(), error


@pytest.mark.parametrize("kind", all_errors(), ids=lambda kind: kind.code)
def test_every_error_is_sent_in_the_envelope_of_amazon_and_marked_as_ours(kind: type[ProxyError]) -> None:
    error = kind("something is wrong", "Do this.")
    if kind is TokenRequestRefused:  # clients of a token endpoint expect OAuth's format
        as_oauth = {"error": "invalid_request", "error_description": "something is wrong. Do this."}
        assert json.loads(error.body()) == as_oauth
    else:
        assert json.loads(error.body()) == {
            "errors": [{"code": kind.code, "message": "something is wrong", "details": "Do this."}]
        }
    headers = error.headers()
    assert headers["Content-Type"] == "application/json; charset=utf-8"
    assert headers["x-sp-proxy-error"] == kind.code
    assert "Retry-After" not in headers


def test_an_error_without_a_hint_has_empty_details() -> None:
    assert json.loads(InternalError("broken").body())["errors"][0]["details"] == ""


@pytest.mark.parametrize("text", ['"quoted" \\ <b>', "Türkiye – 店", "line\nbreak\x00", "{{}}"])
def test_any_message_survives_json(text: str) -> None:
    error = HostRefused(text, text)
    assert json.loads(error.body())["errors"][0] == {"code": "HostRefused", "message": text, "details": text}
    assert str(error) == text


@pytest.mark.parametrize(
    ("seconds", "header"),
    [(0, "1"), (0.0, "1"), (0.001, "1"), (1, "1"), (1.0, "1"), (1.0001, "2"), (59.5, "60"), (3600, "3600"), (-5, "1")],
)
def test_retry_after_is_in_whole_seconds_rounded_up_and_at_least_one(seconds: float, header: str) -> None:
    for kind in (UsagePlanExhausted, TokenUnavailable):
        assert kind("later", retry_after=seconds).headers()["Retry-After"] == header


def test_a_405_names_the_allowed_methods() -> None:
    headers = MethodRefused("TRACE is not forwarded").headers()
    assert headers["Allow"] == "GET, HEAD, POST, PUT, PATCH, DELETE"
    assert headers["x-sp-proxy-error"] == "MethodNotAllowed"


def test_every_error_is_a_proxy_error_that_keeps_message_hint_and_time() -> None:
    error = RequestHeaderTimeout("slow", "Be quick.", retry_after=2.5)
    assert isinstance(error, ProxyError)
    assert (error.message, error.hint, error.retry_after, str(error)) == ("slow", "Be quick.", 2.5, "slow")
