"""Whose request, which region, which operation, which token: as a table, without a network."""

from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy

from proxy.amazon.marketplaces import MARKETPLACE_PARAMETERS
from proxy.amazon.operations import OperationTable, load_table
from proxy.cli.explain import describe_route
from proxy.config import Address, Config, Listener
from proxy.errors import (
    AccountRequired,
    BadOption,
    BadTarget,
    ConflictingSources,
    HeaderRequired,
    MalformedRequest,
    NotAllowed,
    ProxyError,
    RegionNotConfigured,
    RegionRequired,
    UnknownAccount,
    UnknownMarketplace,
    UnknownRegion,
)
from proxy.request.authorization import ALLOW_ALL, AccessPolicy, build_policies
from proxy.request.route_cache import RouteCache
from proxy.request.routing import Route, resolve
from proxy.request.target import marketplace_ids
from proxy.request.validation import AllowedHosts, validate
from tests.conftest import config_from

TABLE: OperationTable = load_table()
ORDERS = "/orders/v0/orders"
GERMANY, USA, JAPAN = "A1PA6795UKMFR9", "ATVPDKIKX0DER", "A1VC38T7YXB528"

ACCOUNTS: dict[str, Any] = {
    "acme": {"refresh_tokens": {"na": "acme-na", "eu": "acme-eu"}},
    "zeta": {"refresh_tokens": {"fe": "zeta-fe"}, "data_elements": ["shippingAddress", "buyerInfo"]},
}


def config(folder: Path, **changed: Any) -> Config:
    settings = {
        "applications": {"main": {"client_id": "c", "client_secret": "s"}},
        "accounts": ACCOUNTS,
        **changed,
    }
    return config_from(settings, folder)


def decide(
    config: Config, target: str, *fields: tuple[str, str], method: str = "GET", listener: Listener | None = None
) -> Route:
    """Return what the proxy decides about a request."""
    headers: CIMultiDict[str] = CIMultiDict(fields)
    headers.setdefault("Host", "localhost")
    sent = CIMultiDictProxy(headers)
    listener = listener or config.listen[0]
    validated = validate(method, target, sent, AllowedHosts.from_config(listener, config))
    return resolve(method, validated, sent, listener, config, TABLE)


def fixed(account: str | None = None, region: Any = None, *, require_header: bool = False) -> Listener:
    return Listener(address=Address("127.0.0.1", 8080), account=account, region=region, require_header=require_header)


ACME = ("x-sp-account", "acme")
EU = ("x-sp-region", "eu")


@pytest.mark.parametrize(
    ("target", "fields", "listener", "expected"),
    [
        (ORDERS, (), fixed("acme", "eu"), ("acme", "eu")),
        (f"/@acme/eu{ORDERS}", (), None, ("acme", "eu")),
        (f"/@acme/EU{ORDERS}", (), None, ("acme", "eu")),
        (f"/@zeta{ORDERS}", (), None, ("zeta", "fe")),
        (ORDERS, (ACME, EU), None, ("acme", "eu")),
        (ORDERS, (ACME, ("x-sp-region", "NA")), None, ("acme", "na")),
        (ORDERS, (ACME, ("Host", "sellingpartnerapi-na.amazon.com")), None, ("acme", "na")),
        (f"https://sellingpartnerapi-eu.amazon.com{ORDERS}", (ACME,), None, ("acme", "eu")),
        (f"{ORDERS}?MarketplaceIds={GERMANY}", (ACME,), None, ("acme", "eu")),
        (f"{ORDERS}?marketplaceIds={USA}", (ACME,), None, ("acme", "na")),
        (f"{ORDERS}?marketplaceId={USA}", (ACME,), None, ("acme", "na")),
        (f"{ORDERS}?MarketplaceId={USA}", (ACME,), None, ("acme", "na")),
        (f"{ORDERS}?MarketplaceIds={USA}%2CA2EUQ1WTGCTBG2", (ACME,), None, ("acme", "na")),
        (f"{ORDERS}?MarketplaceIds={USA}&MarketplaceIds=A2EUQ1WTGCTBG2", (ACME,), None, ("acme", "na")),
        (f"{ORDERS}?Marketplace%49ds={USA}", (ACME,), None, ("acme", "na")),
        (ORDERS, (("x-sp-account", "zeta"),), None, ("zeta", "fe")),
        (f"/@acme/eu{ORDERS}?MarketplaceIds={GERMANY}", (ACME, EU), fixed("acme", "eu"), ("acme", "eu")),
    ],
)
def test_account_and_region_come_from_the_first_source_that_names_them(
    tmp_path: Path,
    target: str,
    fields: tuple[tuple[str, str], ...],
    listener: Listener | None,
    expected: tuple[str, str],
) -> None:
    decided = decide(config(tmp_path), target, *fields, listener=listener)
    assert (decided.account, decided.region) == expected
    assert decided.path_and_query.startswith(ORDERS)
    assert decided.token_key.account == expected[0]
    assert decided.token_key.region == expected[1]


@pytest.mark.parametrize(
    ("target", "fields", "listener", "sources"),
    [
        (f"/@acme/eu{ORDERS}", (("x-sp-account", "zeta"),), None, ("path prefix", "header x-sp-account")),
        (ORDERS, (ACME, EU), fixed("zeta"), ("listener 127.0.0.1:8080", "header x-sp-account")),
        (f"/@acme/eu{ORDERS}", (("x-sp-region", "na"),), None, ("path prefix", "header x-sp-region")),
        (ORDERS, (ACME, EU), fixed("acme", "na"), ("listener 127.0.0.1:8080", "header x-sp-region")),
        (ORDERS, (ACME, EU, ("Host", "sellingpartnerapi-na.amazon.com")), None, ("header x-sp-region", "Host")),
        (f"{ORDERS}?MarketplaceIds={USA}", (ACME, EU), None, ("header x-sp-region", f"marketplace {USA}")),
        (f"{ORDERS}?MarketplaceIds={USA},{GERMANY}", (ACME,), None, (f"marketplace {USA}", f"marketplace {GERMANY}")),
        (ORDERS, (ACME, EU, ("Host", "sandbox.sellingpartnerapi-eu.amazon.com")), None, ("sandbox", "production")),
    ],
)
def test_sources_that_disagree_are_refused_and_both_named(
    tmp_path: Path,
    target: str,
    fields: tuple[tuple[str, str], ...],
    listener: Listener | None,
    sources: tuple[str, str],
) -> None:
    with pytest.raises(ConflictingSources) as caught:
        decide(config(tmp_path), target, *fields, listener=listener)
    assert all(source in caught.value.message for source in sources)


def test_an_id_that_looks_like_the_parameter_of_another_is_not_decided_as_that(tmp_path: Path) -> None:
    settings = config(tmp_path)
    routes = RouteCache(settings.listen[0], settings, TABLE)
    headers = CIMultiDictProxy(CIMultiDict([("Host", "localhost"), ACME, EU]))

    def decided(query: str) -> Route:
        target = f"{ORDERS}?{query}"
        validated = validate("GET", target, headers, AllowedHosts.from_config(settings.listen[0], settings))
        return routes.get("GET", validated, headers, "", ALLOW_ALL)

    # An id that nobody knows, which Amazon is to judge, since the region is named.
    assert decided(f"%4DarketplaceId=%3D{USA}").region == "eu"
    with pytest.raises(ConflictingSources):
        decided(f"MarketplaceId={USA}")


@pytest.mark.parametrize(
    ("target", "fields", "error"),
    [
        (ORDERS, (), AccountRequired),
        (ORDERS, (("x-sp-account", "nobody"),), UnknownAccount),
        (ORDERS, (("x-sp-account", "acme, zeta"),), UnknownAccount),
        (ORDERS, (("x-sp-account", "*"),), UnknownAccount),
        (ORDERS, (("x-sp-account", ""),), UnknownAccount),
        (ORDERS, (("x-sp-account", "ACME"),), UnknownAccount),
        (ORDERS, (("x-sp-account", "acme"), ("x-sp-account", "acme")), MalformedRequest),
        (f"/@nobody/eu{ORDERS}", (), UnknownAccount),
        (f"/@%61cme/eu{ORDERS}", (), UnknownAccount),
        ("/@acme", (), BadTarget),
        ("/@/orders", (), BadTarget),
        (f"/@acme/eu/{ORDERS}", (), BadTarget),
        (f"/@acme/xx{ORDERS}", (), UnknownRegion),
        (ORDERS, (ACME,), RegionRequired),
        (ORDERS, (ACME, ("x-sp-region", "mars")), UnknownRegion),
        (ORDERS, (ACME, EU, EU), MalformedRequest),
        (ORDERS, (ACME, ("x-sp-region", "fe")), RegionNotConfigured),
        (f"{ORDERS}?MarketplaceIds={JAPAN}", (ACME,), RegionNotConfigured),
        (f"{ORDERS}?MarketplaceIds=NOSUCHPLACE", (("x-sp-account", "zeta"),), UnknownMarketplace),
        (f"{ORDERS}?MarketplaceIds=" + ",".join([USA] * 65), (ACME,), BadTarget),
        (ORDERS, (ACME, EU, ("x-sp-data-elements", "everything")), BadOption),
        (ORDERS, (ACME, EU, ("x-sp-data-elements", "none, buyerInfo")), BadOption),
    ],
)
def test_what_is_missing_or_unknown_is_said(
    tmp_path: Path, target: str, fields: tuple[tuple[str, str], ...], error: type[ProxyError]
) -> None:
    with pytest.raises(error) as caught:
        decide(config(tmp_path), target, *fields)
    assert caught.value.hint, "an error says what to do next"


@pytest.mark.parametrize("named", ["uk", "UK", "us", "usa", "Europe", "eu-west-1", "far-east", "north_america", "apac"])
def test_what_looks_like_a_region_behind_the_account_is_no_part_of_the_path(tmp_path: Path, named: str) -> None:
    settings, listener = config(tmp_path), config(tmp_path).listen[0]
    routes = RouteCache(listener, settings, TABLE)
    headers = CIMultiDictProxy(CIMultiDict({"Host": "localhost", "x-sp-region": "fe"}))

    def decided(target: str) -> Route:
        return routes.get(
            "GET",
            validate("GET", target, headers, AllowedHosts.from_config(listener, settings)),
            headers,
            "",
            AccessPolicy(),
        )

    # Decided, and known from then on: unknown paths of an account are all alike otherwise.
    assert decided("/@zeta/new/api").operation is None
    for target in (f"/@zeta/{named}{ORDERS}", f"/@zeta/{named}/orders/v0/orders/1/address?x=y"):
        with pytest.raises(UnknownRegion) as caught:
            decided(target)
        assert "na, eu, fe" in caught.value.hint
        with pytest.raises(UnknownRegion):
            decide(settings, target, ("x-sp-region", "fe"))


@pytest.mark.parametrize(
    "path", ["/uk/new/api", "/uk", "/uk/", "/new/orders/v0/orders", "/ukulele/orders/v0/orders", "/u1/orders/v0/orders"]
)
def test_what_no_region_makes_an_operation_goes_on_as_a_path(tmp_path: Path, path: str) -> None:
    assert decide(config(tmp_path), f"/@zeta{path}").path_and_query == path
    assert decide(config(tmp_path), f"/uk{ORDERS}", ("x-sp-account", "zeta")).path_and_query == f"/uk{ORDERS}"


def test_an_account_that_is_not_allowed_is_refused_before_its_region_is_looked_at(tmp_path: Path) -> None:
    settings = config(tmp_path, listen={"address": "127.0.0.1:8080", "accounts": ["acme"]})
    routes = RouteCache(settings.listen[0], settings, TABLE)
    headers = CIMultiDictProxy(CIMultiDict({"Host": "localhost"}))
    validated = validate("GET", f"/@zeta/uk{ORDERS}", headers, AllowedHosts.from_config(settings.listen[0], settings))
    with pytest.raises(NotAllowed):
        routes.get("GET", validated, headers, "", build_policies(settings, 0)[""])


def test_every_way_to_name_the_region_is_said_where_it_is_missing(tmp_path: Path) -> None:
    with pytest.raises(RegionRequired) as caught:
        decide(config(tmp_path), ORDERS, ACME)
    ways = ("x-sp-region", "/@acme/REGION/", "marketplace", "listen[N].region")
    assert [way for way in ways if way not in caught.value.hint] == []


_NAMES = st.sampled_from(["MarketplaceIds", "marketplaceId", "xMarketplaceIds", "MarketplaceIdsX", "a", "", "a+b"])
_VALUES = st.text(alphabet="AZ1,+ =%&\t", max_size=6)
_WAYS = st.sampled_from([str, quote, quote_plus, lambda text: "".join(f"%{ord(letter):02x}" for letter in text)])


@given(st.lists(st.tuples(_NAMES, _WAYS, _VALUES, _WAYS, st.sampled_from(["=", "", "=="])), max_size=5))
def test_marketplaces_are_found_however_the_query_is_written(pairs: list[tuple[Any, ...]]) -> None:
    query = "&".join(write(name) + sign + write_value(value) for name, write, value, write_value, sign in pairs)
    wanted = [
        part.strip(" \t")
        for name, value in parse_qsl(query, keep_blank_values=True)
        if name in MARKETPLACE_PARAMETERS
        for part in value.split(",")
    ]
    assert list(marketplace_ids(query)) == [part for part in wanted if part]


def test_an_unknown_marketplace_is_amazons_to_judge_where_the_region_is_named(tmp_path: Path) -> None:
    target = f"{ORDERS}?MarketplaceIds=OPENEDYESTERDAY"
    assert decide(config(tmp_path), target, ACME, EU).region == "eu"
    added = config(tmp_path, marketplaces={"OPENEDYESTERDAY": "eu"})
    assert decide(added, target, ACME).region == "eu"
    sandbox = config(tmp_path, environment="sandbox")
    assert decide(sandbox, f"{ORDERS}?MarketplaceIds=TEST_CASE_400", ("x-sp-account", "zeta")).region == "fe"
    accounts = {**ACCOUNTS, "zeta": {**ACCOUNTS["zeta"], "environment": "sandbox"}}
    one_in_the_sandbox = config(tmp_path, accounts=accounts)
    assert decide(one_in_the_sandbox, f"{ORDERS}?MarketplaceIds=TEST_CASE_400", ("x-sp-account", "zeta")).region == "fe"


def test_a_default_account_serves_requests_that_name_none(tmp_path: Path) -> None:
    decided = decide(config(tmp_path, default_account="zeta"), ORDERS)
    assert (decided.account, decided.account_source) == ("zeta", "default_account")


def test_a_listener_that_demands_the_header_takes_no_bare_request(tmp_path: Path) -> None:
    listener = fixed("zeta", require_header=True)
    with pytest.raises(HeaderRequired):
        decide(config(tmp_path), ORDERS, listener=listener)
    with pytest.raises(HeaderRequired):
        decide(config(tmp_path), f"/@zeta{ORDERS}", listener=listener)
    assert decide(config(tmp_path), ORDERS, ("x-sp-account", "zeta"), listener=listener).account == "zeta"


# Which token.


@pytest.mark.parametrize(
    ("method", "path", "elements", "kind", "rdt_path", "granted"),
    [
        ("GET", ORDERS, None, "lwa", "", ()),
        ("GET", ORDERS, "buyerInfo", "rdt", ORDERS, ("buyerInfo",)),
        ("GET", ORDERS, "shippingAddress, buyerInfo", "rdt", ORDERS, ("buyerInfo", "shippingAddress")),
        ("GET", f"{ORDERS}/1-2", "buyerInfo", "rdt", f"{ORDERS}/{{orderId}}", ("buyerInfo",)),
        ("GET", f"{ORDERS}/1-2/orderItems", "shippingAddress", "lwa", "", ()),
        (
            "GET",
            f"{ORDERS}/1-2/orderItems",
            "buyerInfo,shippingAddress",
            "rdt",
            f"{ORDERS}/{{orderId}}/orderItems",
            ("buyerInfo",),
        ),
        ("GET", f"{ORDERS}/1-2/address", None, "rdt", f"{ORDERS}/{{orderId}}/address", ()),
        ("GET", f"{ORDERS}/1-2/address", "buyerInfo", "rdt", f"{ORDERS}/{{orderId}}/address", ()),
        ("GET", f"{ORDERS}/1-2/address", "none", "lwa", "", ()),
        ("POST", "/mfn/v0/shipments", None, "rdt", "/mfn/v0/shipments", ()),
        ("DELETE", "/mfn/v0/shipments/x", None, "rdt", "/mfn/v0/shipments/{shipmentId}", ()),
        (
            "GET",
            "/reports/2021-06-30/documents/amzn1.x%2Fy",
            None,
            "rdt",
            "/reports/2021-06-30/documents/amzn1.x%2Fy",
            (),
        ),
        ("HEAD", f"{ORDERS}/1-2/address", None, "lwa", "", ()),
        ("GET", f"{ORDERS}/1-2/address/", None, "lwa", "", ()),
        ("GET", "/notifications/v1/destinations", None, "grantless", "", ()),
        ("POST", "/notifications/v1/subscriptions/ANY_OFFER_CHANGED", None, "lwa", "", ()),
        ("POST", "/applications/2023-11-30/clientSecret", None, "grantless", "", ()),
        ("GET", "/orders/2026-01-01/orders", "buyerInfo", "lwa", "", ()),
        ("GET", "/brand/new/2030-01-01/thing", None, "lwa", "", ()),
    ],
)
def test_the_token_is_chosen_by_the_table_and_by_what_is_asked(
    tmp_path: Path, method: str, path: str, elements: str | None, kind: str, rdt_path: str, granted: tuple[str, ...]
) -> None:
    fields = (ACME, EU, *((("x-sp-data-elements", elements),) if elements else ()))
    token_key = decide(config(tmp_path), path, *fields, method=method).token_key
    assert (token_key.kind, token_key.path, token_key.data_elements) == (kind, rdt_path, granted)


def test_an_rdt_path_has_no_query_and_serves_every_order(tmp_path: Path) -> None:
    first = decide(config(tmp_path), f"{ORDERS}/1-2/address?x=1", ACME, EU).token_key
    second = decide(config(tmp_path), f"{ORDERS}/3-4/address", ACME, EU).token_key
    assert first == second
    assert first.is_shared
    assert not decide(config(tmp_path), "/reports/2021-06-30/documents/d", ACME, EU).token_key.is_shared


def test_an_accounts_own_elements_ask_where_it_is_optional(tmp_path: Path) -> None:
    zeta = ("x-sp-account", "zeta")
    token_key = decide(config(tmp_path), ORDERS, zeta).token_key
    assert (token_key.kind, token_key.data_elements) == ("rdt", ("buyerInfo", "shippingAddress"))
    assert decide(config(tmp_path), ORDERS, zeta, ("x-sp-data-elements", "none")).token_key.kind == "lwa"


def test_the_sandbox_gets_ordinary_tokens(tmp_path: Path) -> None:
    decided = decide(config(tmp_path, environment="sandbox"), f"{ORDERS}/1/address", ACME, EU)
    assert decided.token_key.kind == "lwa"
    assert decided.endpoint == "https://sandbox.sellingpartnerapi-eu.amazon.com"


def test_a_grantless_call_needs_no_refresh_token_for_its_region(tmp_path: Path) -> None:
    decided = decide(config(tmp_path), "/notifications/v1/destinations", ACME, ("x-sp-region", "fe"))
    assert (decided.token_key.kind, decided.token_key.account) == ("grantless", "")
    assert decided.token_key.scope == "sellingpartnerapi::notifications"


def test_everything_that_makes_two_tokens_differ_is_in_the_credential(tmp_path: Path) -> None:
    settings = config(tmp_path)
    token_keys = {
        decide(settings, target, *fields, method=method).token_key
        for target, fields, method in (
            (ORDERS, (ACME, EU), "GET"),
            (ORDERS, (ACME, ("x-sp-region", "na")), "GET"),
            (ORDERS, (ACME, EU, ("x-sp-data-elements", "buyerInfo")), "GET"),
            (ORDERS, (ACME, EU, ("x-sp-data-elements", "shippingAddress")), "GET"),
            (f"{ORDERS}/1", (ACME, EU, ("x-sp-data-elements", "buyerInfo")), "GET"),
            ("/mfn/v0/shipments/1", (ACME, EU), "GET"),
            ("/mfn/v0/shipments/1", (ACME, EU), "DELETE"),
            ("/notifications/v1/destinations", (ACME, EU), "GET"),
            ("/applications/2023-11-30/clientSecret", (ACME, EU), "POST"),
            (ORDERS, (("x-sp-account", "zeta"),), "GET"),
        )
    }
    assert len(token_keys) == 10


def test_a_description_says_what_and_why(tmp_path: Path) -> None:
    words = describe_route(decide(config(tmp_path), f"{ORDERS}/1/address", ACME, EU))
    assert words["account"] == "acme (from header x-sp-account)"
    assert words["region"] == "eu (from header x-sp-region)"
    assert words["token"] == "Restricted Data Token: for GET /orders/v0/orders/{orderId}/address"
    assert "orders.v0.getOrderAddress" in words["operation"]
