"""Apps that ask for tokens: what they get is worth nothing, says what it was asked for, gives nobody more rights."""

import json
from contextlib import suppress
from io import StringIO
from typing import Any
from urllib.parse import urlencode

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.amazon.personal_data import ALL_ELEMENTS
from proxy.amazon.placeholder_tokens import (
    ACCESS_TOKEN,
    GRANTLESS_TOKEN,
    MAX_TOKEN,
    RDT_PREFIX,
    REFRESH_TOKEN,
    Resource,
    placeholder_for,
    resources_in,
)
from proxy.request.tokens.placeholder_endpoint import MAX_BODY
from proxy.server.runtime import RunningProxy
from tests.conftest import StartProxy
from tests.support.fake_upstream import FakeUpstream, TokenHost
from tests.support.raw_client import RawResponse, call, connect

TOKEN = "/auth/o2/token"
RDT = "/tokens/2021-03-01/restrictedDataToken"
ORDERS = "/orders/v0/orders"
FORM = {"content_type": "application/x-www-form-urlencoded;charset=UTF-8"}
SECRETS = {"client_id": "distinctive-id", "client_secret": "distinctive-secret", "refresh_token": "Atzr|distinctive"}
REFRESH = urlencode({"grant_type": "refresh_token", **SECRETS}).encode()
GRANTLESS = urlencode({"grant_type": "client_credentials", "scope": "sellingpartnerapi::notifications"}).encode()
KEY = "key-of-the-one-caller"
AMAZONS_LWA = "api.amazon.com"


def asking_for(*resources: dict[str, Any], **more: Any) -> bytes:
    return json.dumps({"restrictedResources": list(resources), **more}).encode()


def resource(path: str = ORDERS, *elements: str, method: str = "GET") -> dict[str, Any]:
    return {"method": method, "path": path, **({"dataElements": list(elements)} if elements else {})}


async def minted(at: str, *resources: dict[str, Any], **fields: str) -> str:
    got = await call(at, "POST", RDT, asking_for(*resources), **fields)
    assert got.status == 200, got.body
    content = json.loads(got.body)
    assert set(content) == {"restrictedDataToken", "expiresIn"}
    assert content["expiresIn"] == 3600
    return str(content["restrictedDataToken"])


async def asked_of_amazon(
    fake_upstream: FakeUpstream, at: str, target: str, token: str, **fields: str
) -> list[Any] | None:
    """Call with a token of the app's; return what the proxy's own was asked for, None where it was an ordinary one."""
    fake_upstream.minted.clear()
    got = await call(at, "GET", target, x_amz_access_token=token, **fields)
    assert got.status == 200, got.body
    assert fake_upstream.received[-1].all("x-amz-access-token") != [token]
    if got.decided["token"] == "lwa":
        return None
    (request,) = fake_upstream.minted
    (wanted,) = json.loads(request.body)["restrictedResources"]
    return [wanted["path"], wanted.get("dataElements", [])]


# Access tokens.


@pytest.mark.parametrize("target", [TOKEN, "/@acme/auth/o2/token", "/@acme/EU/auth/o2/token", f"{TOKEN}?client=x"])
async def test_a_token_is_answered_as_login_with_amazon_would(proxy: RunningProxy, target: str) -> None:
    got = await call(proxy.addresses[0], "POST", target, REFRESH, **FORM)
    assert got.status == 200
    assert json.loads(got.body) == {
        "access_token": ACCESS_TOKEN,
        "token_type": "bearer",
        "expires_in": 3600,
        "refresh_token": REFRESH_TOKEN,
    }
    assert (got.get("content-type"), got.get("cache-control")) == ("application/json;charset=UTF-8", "no-store")
    assert (got.decided["operation"], got.decided["token"], got.decided["attempts"]) == ("lwa.token", "none", "0")
    assert got.error is None


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (GRANTLESS, "application/x-www-form-urlencoded"),
        (json.dumps({"grant_type": "client_credentials", "scope": "x"}).encode(), "application/json"),
        (json.dumps({"grant_type": "client_credentials"}).encode(), "Application/JSON; charset=utf-8"),
        (GRANTLESS, ""),
    ],
)
async def test_a_grantless_token_brings_no_refresh_token(proxy: RunningProxy, body: bytes, kind: str) -> None:
    got = await call(proxy.addresses[0], "POST", TOKEN, body, **({"content_type": kind} if kind else {}))
    assert json.loads(got.body) == {"access_token": GRANTLESS_TOKEN, "token_type": "bearer", "expires_in": 3600}


async def test_neither_amazon_nor_the_log_hears_of_it(
    proxy: RunningProxy, fake_upstream: FakeUpstream, token_host: TokenHost, log: StringIO
) -> None:
    await call(proxy.addresses[0], "POST", TOKEN, REFRESH, **FORM)
    await call(proxy.addresses[0], "POST", TOKEN, b"grant_type=distinctive-grant", **FORM)
    assert not fake_upstream.received
    assert not token_host.received
    assert "distinctive" not in log.getvalue()
    requests = [json.loads(line) for line in log.getvalue().splitlines() if '"request"' in line]
    assert [(line["operation"], line["code"], line["account"]) for line in requests] == [
        ("lwa.token", 200, "-"),
        ("lwa.token", 400, "-"),
    ]


@pytest.mark.parametrize(
    ("body", "kind", "error"),
    [
        (b"", "", "invalid_request"),
        (b"\xff\xfe", "", "invalid_request"),
        (b"{", "application/json", "invalid_request"),
        (b"[" * 50_000, "application/json", "invalid_request"),
        (b'{"grant_type": 1}', "application/json", "invalid_request"),
        (b"&".join([b"a=b"] * 200) + b"&grant_type=refresh_token", "", "invalid_request"),
        (b"grant_type=authorization_code&code=distinctive-code", "", "unsupported_grant_type"),
        (b"grant_type=refresh_token&x=" + b"x" * MAX_BODY, "", "invalid_request"),
    ],
)
async def test_what_cannot_be_answered_is_refused_as_oauth_does(
    proxy: RunningProxy, fake_upstream: FakeUpstream, body: bytes, kind: str, error: str
) -> None:
    got = await call(proxy.addresses[0], "POST", TOKEN, body, **({"content_type": kind} if kind else {}))
    assert (got.status, got.error) == (400, "TokenRequestRefused")
    content = json.loads(got.body)
    assert set(content) == {"error", "error_description"}
    assert content["error"] == error
    assert b"distinctive" not in got.body
    assert not fake_upstream.received


async def test_a_connection_goes_on_behind_a_token(proxy: RunningProxy) -> None:
    async with connect(proxy.addresses[0]) as client:
        assert (await client.request("POST", TOKEN, REFRESH, **FORM)).status == 200
        assert (await client.request("GET", ORDERS)).status == 200


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("GET", TOKEN),
        ("PUT", TOKEN),
        ("POST", "/auth/o2/token/"),
        ("POST", "/x/auth/o2/token"),
        ("POST", "/orders/v0/orders?next=/auth/o2/token"),
    ],
)
async def test_nothing_else_is_taken_for_it(
    proxy: RunningProxy, fake_upstream: FakeUpstream, method: str, target: str
) -> None:
    await call(proxy.addresses[0], method, target)
    assert [request.target for request in fake_upstream.received] == [target]


# Who may ask for one.


@pytest.mark.parametrize("fields", [{}, {"x_sp_key": "wrong"}])
async def test_a_token_needs_no_key_and_a_call_with_it_does(
    start_proxy: StartProxy, fake_upstream: FakeUpstream, fields: dict[str, str]
) -> None:
    proxy = await start_proxy(callers={"one": {"key": KEY}})
    at = proxy.addresses[0]
    got = await call(at, "POST", TOKEN, REFRESH, **FORM, **fields)
    assert json.loads(got.body)["access_token"] == ACCESS_TOKEN
    refused = await call(at, "GET", ORDERS, x_amz_access_token=ACCESS_TOKEN, **fields)
    assert refused.error == "CallerRefused"
    assert not fake_upstream.received


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"host": "evil.example"}, "HostRefused"),
        ({"origin": "https://evil.example"}, "BrowserRefused"),
        ({"sec_fetch_site": "cross-site"}, "BrowserRefused"),
    ],
)
async def test_the_guard_stands_before_tokens_too(proxy: RunningProxy, fields: dict[str, str], error: str) -> None:
    got = await call(proxy.addresses[0], "POST", TOKEN, REFRESH, **fields)
    assert got.error == error


@pytest.mark.parametrize("port", ["", ":443"])
async def test_amazons_token_host_is_good_for_tokens_alone(
    proxy: RunningProxy, fake_upstream: FakeUpstream, port: str
) -> None:
    at, fields = proxy.addresses[0], {"host": AMAZONS_LWA + port}
    assert (await call(at, "POST", TOKEN, REFRESH, **FORM, **fields)).status == 200
    for method, target in (("GET", TOKEN), ("POST", ORDERS), ("GET", ORDERS), ("POST", f"{ORDERS}?x={TOKEN}")):
        # Twice: fields that came in before are not looked at as closely.
        for _ in range(2):
            assert (await call(at, method, target, **fields)).error == "HostRefused"
    assert not fake_upstream.received
    absolute = await call(at, "POST", f"http://{AMAZONS_LWA}{TOKEN}", REFRESH, **FORM)
    assert absolute.status == 200
    assert (await call(at, "GET", f"http://{AMAZONS_LWA}{ORDERS}")).error == "HostRefused"


# Restricted Data Tokens.


@pytest.mark.parametrize("local_rdt", [False, True])
async def test_an_app_gets_amazons_token_unless_told_otherwise(
    start_proxy: StartProxy, fake_upstream: FakeUpstream, local_rdt: bool
) -> None:
    proxy = await start_proxy(local_rdt=local_rdt)
    got = await call(proxy.addresses[0], "POST", RDT, asking_for(resource(ORDERS, "buyerInfo")))
    token = json.loads(got.body)["restrictedDataToken"]
    assert token.startswith(RDT_PREFIX) is local_rdt
    assert len(fake_upstream.minted) == (not local_rdt)
    assert got.decided["operation"] == "tokens.2021-03-01.createRestrictedDataToken"
    assert got.decided["attempts"] == ("0" if local_rdt else "1")


@pytest.mark.parametrize(
    "path", ["/tokens/2021-03-01/restricted%44ataToken", "/@acme/%74okens/2021-03-01/restrictedDataToken"]
)
async def test_another_spelling_of_the_path_gets_no_token_of_amazons(
    start_proxy: StartProxy, fake_upstream: FakeUpstream, path: str
) -> None:
    proxy = await start_proxy(local_rdt=True)
    got = await call(proxy.addresses[0], "POST", path, asking_for(resource(ORDERS, "buyerInfo")))
    assert json.loads(got.body)["restrictedDataToken"].startswith(RDT_PREFIX)
    assert not fake_upstream.minted
    assert not fake_upstream.received


@pytest.mark.parametrize("prefix", ["", "/@acme/eu", "/@acme"])
@pytest.mark.parametrize(
    ("asked", "called", "wanted"),
    [
        (resource(ORDERS, "buyerInfo"), ORDERS, [ORDERS, ["buyerInfo"]]),
        (resource(ORDERS, "shippingAddress", "buyerInfo"), f"{ORDERS}?a=b", [ORDERS, ["buyerInfo", "shippingAddress"]]),
        (resource(ORDERS), ORDERS, None),
        (resource(f"{ORDERS}/1", "buyerInfo"), f"{ORDERS}/1", [f"{ORDERS}/{{orderId}}", ["buyerInfo"]]),
        (resource(f"{ORDERS}/{{orderId}}", "buyerInfo"), f"{ORDERS}/2", [f"{ORDERS}/{{orderId}}", ["buyerInfo"]]),
        (resource(f"{ORDERS}/{{id}}", "buyerInfo"), f"{ORDERS}/3", [f"{ORDERS}/{{orderId}}", ["buyerInfo"]]),
        (resource(f"{ORDERS}/1/address"), f"{ORDERS}/1/address", [f"{ORDERS}/{{orderId}}/address", []]),
        # Made for another order, or another call: it has no say.
        (resource(f"{ORDERS}/1", "buyerInfo"), f"{ORDERS}/2", None),
        (resource(ORDERS, "buyerInfo"), f"{ORDERS}/1", None),
        (resource(ORDERS, "buyerInfo"), "/sellers/v1/marketplaceParticipations", None),
        # What an operation does not know, Amazon would not give.
        (
            resource(f"{ORDERS}/1/orderItems", "buyerInfo", "shippingAddress"),
            f"{ORDERS}/1/orderItems",
            [f"{ORDERS}/{{orderId}}/orderItems", ["buyerInfo"]],
        ),
    ],
)
async def test_a_placeholder_makes_the_proxy_ask_for_what_it_names(
    start_proxy: StartProxy,
    fake_upstream: FakeUpstream,
    prefix: str,
    asked: dict[str, Any],
    called: str,
    wanted: list[Any] | None,
) -> None:
    proxy = await start_proxy(local_rdt=True)
    at = proxy.addresses[0]
    token = await minted(at, asked | {"path": prefix + asked["path"]})
    assert await asked_of_amazon(fake_upstream, at, prefix + called, token) == wanted
    # And again, when it was decided before.
    again = await call(at, "GET", prefix + called, x_amz_access_token=token)
    assert again.decided["token"] == ("lwa" if wanted is None else "rdt")


async def test_a_placeholder_counts_more_than_the_setting_and_less_than_the_header(
    start_proxy: StartProxy, fake_upstream: FakeUpstream
) -> None:
    account = {"refresh_tokens": {"eu": "Atzr|acme-eu"}, "data_elements": ["shippingAddress"]}
    proxy = await start_proxy(local_rdt=True, accounts={"acme": account})
    at = proxy.addresses[0]
    assert await asked_of_amazon(fake_upstream, at, ORDERS, ACCESS_TOKEN) == [ORDERS, ["shippingAddress"]]
    token = await minted(at, resource(ORDERS, "buyerInfo"))
    assert await asked_of_amazon(fake_upstream, at, ORDERS, token) == [ORDERS, ["buyerInfo"]]
    assert await asked_of_amazon(fake_upstream, at, ORDERS, await minted(at, resource(ORDERS))) is None
    assert await asked_of_amazon(fake_upstream, at, ORDERS, token, x_sp_data_elements="none") is None


async def test_a_placeholder_of_one_replica_is_good_at_another(
    start_proxy: StartProxy, fake_upstream: FakeUpstream
) -> None:
    first, second = await start_proxy(local_rdt=True), await start_proxy(local_rdt=True)
    token = await minted(first.addresses[0], resource(ORDERS, "buyerInfo"))
    assert await asked_of_amazon(fake_upstream, second.addresses[0], ORDERS, token) == [ORDERS, ["buyerInfo"]]


async def test_a_placeholder_means_nothing_where_there_are_none(
    proxy: RunningProxy, fake_upstream: FakeUpstream
) -> None:
    token = placeholder_for([Resource("GET", ORDERS, ("buyerInfo",))])
    assert await asked_of_amazon(fake_upstream, proxy.addresses[0], ORDERS, token) is None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b"[" * 50_000,
        asking_for(),
        asking_for(*[resource()] * 51),
        asking_for({"method": "GET"}),
        asking_for({"path": ORDERS}),
        asking_for(resource(method="PATCH")),
        asking_for(resource(method="get")),
        asking_for(resource("/orders/v0/orders?x=y")),
        asking_for(resource("orders/v0/orders")),
        asking_for(resource("/@acme")),
        asking_for(resource("/sellers/v1/marketplaceParticipations")),
        asking_for(resource("/distinctive-path")),
        asking_for(resource(ORDERS, "distinctive-element")),
        asking_for({"method": "GET", "path": ORDERS, "dataElements": "buyerInfo"}),
        asking_for({"method": "GET", "path": ORDERS, "dataElements": [["buyerInfo"]]}),
        asking_for(resource(), targetApplication="amzn1.sp.solution.other"),
        asking_for(*[resource(f"{ORDERS}/{'9' * 500}{number}") for number in range(40)]),
        b" " * (MAX_BODY + 1),
    ],
)
async def test_a_malformed_request_for_a_restricted_token_is_amazons_400(
    start_proxy: StartProxy, fake_upstream: FakeUpstream, body: bytes
) -> None:
    proxy = await start_proxy(local_rdt=True)
    got = await call(proxy.addresses[0], "POST", RDT, body)
    assert (got.status, got.error) == (400, "InvalidInput")
    (error,) = json.loads(got.body)["errors"]
    assert set(error) == {"code", "message", "details"}
    assert error["code"] == "InvalidInput"
    assert b"distinctive" not in got.body
    assert not fake_upstream.received
    assert not fake_upstream.minted


@pytest.mark.parametrize(
    "text", ["!", "W10", "e30", "WzFd", "W1sxLDIsM11d", "x" * MAX_TOKEN, "W1siR0VUIiwiL3giLFsieCJdXV0"]
)
async def test_a_placeholder_that_is_not_whole_is_refused(
    start_proxy: StartProxy, fake_upstream: FakeUpstream, text: str
) -> None:
    proxy = await start_proxy(local_rdt=True)
    got = await call(proxy.addresses[0], "GET", ORDERS, x_amz_access_token=RDT_PREFIX + text)
    if text in {"W10", "e30"}:  # [] and {}: whole, and about nothing
        assert got.status == 200
        return
    assert (got.status, got.error) == (400, "InvalidInput")
    assert not fake_upstream.received


# What may be had.


ALLOWED = {"key": KEY, "operations": ["READ *"], "data_elements": ["buyerInfo"]}


async def limited(start_proxy: StartProxy) -> str:
    proxy = await start_proxy(local_rdt=True, callers={"one": ALLOWED, "all": {"key": "key-of-another-caller"}})
    return proxy.addresses[0]


async def test_a_caller_gets_a_placeholder_for_what_it_may_have(
    start_proxy: StartProxy, fake_upstream: FakeUpstream
) -> None:
    at = await limited(start_proxy)
    token = await minted(at, resource(ORDERS, "buyerInfo"), x_sp_key=KEY)
    assert await asked_of_amazon(fake_upstream, at, ORDERS, token, x_sp_key=KEY) == [ORDERS, ["buyerInfo"]]


@pytest.mark.parametrize(
    "asked",
    [
        resource(ORDERS, "shippingAddress"),
        resource(ORDERS, *ALL_ELEMENTS),
        resource(f"{ORDERS}/{{orderId}}/address"),
        resource("/mfn/v0/shipments", method="POST"),
    ],
)
async def test_a_caller_gets_no_placeholder_for_more(start_proxy: StartProxy, asked: dict[str, Any]) -> None:
    at = await limited(start_proxy)
    got = await call(at, "POST", RDT, asking_for(asked), x_sp_key=KEY)
    assert (got.status, got.error) == (403, "NotAllowed")


@pytest.mark.parametrize("made_up", [False, True])
async def test_another_callers_placeholder_gives_no_more_rights(
    start_proxy: StartProxy, fake_upstream: FakeUpstream, made_up: bool
) -> None:
    at = await limited(start_proxy)
    wanted = resource(ORDERS, "shippingAddress")
    token = placeholder_for([Resource("GET", ORDERS, ("shippingAddress",))])
    if not made_up:
        assert token == await minted(at, wanted, x_sp_key="key-of-another-caller")
    got = await call(at, "GET", ORDERS, x_amz_access_token=token, x_sp_key=KEY)
    assert (got.status, got.error) == (403, "NotAllowed")
    assert not fake_upstream.received


async def test_a_restricted_token_needs_a_key(start_proxy: StartProxy) -> None:
    got = await call(await limited(start_proxy), "POST", RDT, asking_for(resource(ORDERS, "buyerInfo")))
    assert got.error == "CallerRefused"


# What is in one.


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.builds(
            Resource,
            st.sampled_from(["GET", "POST"]),
            st.text(max_size=40).map(lambda text: f"/{text}"),
            st.sets(st.sampled_from(ALL_ELEMENTS)).map(lambda found: tuple(e for e in ALL_ELEMENTS if e in found)),
        ),
        max_size=20,
        unique=True,
    )
)
def test_a_placeholder_says_what_it_was_asked_for_and_fits_a_header(resources: list[Resource]) -> None:
    try:
        text = placeholder_for(resources)
    except ValueError:
        assert len(json.dumps(resources)) > MAX_TOKEN // 2
        return
    assert len(text) <= MAX_TOKEN
    assert text.isascii()
    assert text.isprintable()
    assert list(resources_in(text)) == resources


@settings(deadline=None)
@given(st.text(max_size=200))
def test_any_text_behind_the_prefix_is_read_or_refused(text: str) -> None:
    with suppress(ValueError):
        assert all(isinstance(one, Resource) for one in resources_in(RDT_PREFIX + text))


async def test_expect_is_answered_before_the_body_comes(proxy: RunningProxy) -> None:
    fields = f"Host: localhost\r\nExpect: 100-continue\r\nContent-Length: {len(GRANTLESS)}"
    head = f"POST {TOKEN} HTTP/1.1\r\n{fields}\r\n\r\n"
    async with connect(proxy.addresses[0]) as client:
        await client.send(head.encode())
        assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await client.send(GRANTLESS)
        got: RawResponse = await client.read_response("POST")
    assert got.status == 200


async def test_placeholders_are_counted_as_the_proxys_own(proxy: RunningProxy) -> None:
    assert proxy.admin is not None
    await call(proxy.addresses[0], "POST", TOKEN, REFRESH, **FORM)
    text = (await call(proxy.admin, "GET", "/metrics")).body.decode()
    (line,) = [line for line in text.splitlines() if line.startswith("spapi_proxy_requests_total{")]
    for label in ('operation="lwa.token"', 'source="proxy"', 'code="200"', 'token="none"', 'account="-"'):
        assert label in line
    assert line.endswith(" 1.0")
