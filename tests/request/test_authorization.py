"""What a caller or a listener may do: accounts, operations, personal data; refusals name their rule."""

from pathlib import Path
from typing import Any

import pytest
from multidict import CIMultiDict, CIMultiDictProxy

from proxy.amazon.operations import load_table
from proxy.amazon.personal_data import implied_elements
from proxy.config import Config
from proxy.errors import NotAllowed
from proxy.request.authorization import AccessPolicy, build_policies, validate_policies
from proxy.request.routing import Route, resolve
from proxy.request.validation import AllowedHosts, validate
from tests.conftest import StartProxy, config_from
from tests.support.fake_upstream import FakeUpstream, TokenHost
from tests.support.raw_client import call

TABLE = load_table()
ORDERS, ORDER = "/orders/v0/orders", "/orders/v0/orders/902-1845936-5435065"
ACCOUNTS: dict[str, Any] = {
    "acme": {"refresh_tokens": {"eu": "acme-eu"}, "data_elements": ["buyerInfo", "shippingAddress"]},
    "zeta": {"refresh_tokens": {"eu": "zeta-eu"}},
}


def config(folder: Path, policy: dict[str, Any], *, of_caller: bool = False, **listener: Any) -> Config:
    settings: dict[str, Any] = {
        "listen": [{"address": "127.0.0.1:0", **listener, **({} if of_caller else policy)}],
        "applications": {"main": {"client_id": "c", "client_secret": "s"}},
        "accounts": ACCOUNTS,
        "default_account": "acme",
        **({"callers": {"job": {"key": "key-of-the-job", **policy}}} if of_caller else {}),
    }
    return config_from(settings, folder)


def decide(config: Config, policy: AccessPolicy, target: str, *fields: tuple[str, str], method: str = "GET") -> Route:
    sent = CIMultiDictProxy(CIMultiDict([("Host", "localhost"), *fields]))
    listener = config.listen[0]
    validated = validate(method, target, sent, AllowedHosts.from_config(listener, config))
    return resolve(method, validated, sent, listener, config, TABLE, policy)


@pytest.fixture(params=[False, True], ids=["listener", "caller"])
def of_caller(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def permitted(folder: Path, policy: dict[str, Any], of_caller: bool) -> tuple[Config, AccessPolicy, str]:
    """Return the configuration, what it permits, and the key of the policy."""
    made = config(folder, policy, of_caller=of_caller)
    where = "callers.job" if of_caller else "listen[0]"
    return made, build_policies(made, 0)["job" if of_caller else ""], where


@pytest.mark.parametrize(
    ("patterns", "method", "target", "is_allowed"),
    [
        (["GET *"], "GET", ORDERS, True),
        (["GET *"], "HEAD", ORDERS, True),
        (["GET *"], "GET", "/something/new", True),
        (["GET *"], "POST", "/feeds/2021-06-30/feeds", False),
        (["HEAD *"], "GET", ORDERS, False),
        (["reports.*"], "POST", "/reports/2021-06-30/reports", True),
        (["reports.*"], "DELETE", "/reports/2021-06-30/schedules/1", True),
        (["reports.*"], "GET", ORDERS, False),
        (["reports.*"], "GET", "/reports/2099-01-01/new", False),
        (["POST reports.*"], "GET", "/reports/2021-06-30/reports", False),
        (["READ *"], "GET", ORDERS, True),
        (["READ *"], "POST", "/products/fees/v0/feesEstimate", True),
        (["READ *"], "POST", "/feeds/2021-06-30/feeds", False),
        (["READ *"], "POST", "/something/new", False),
        (["READ *"], "DELETE", "/feeds/2021-06-30/feeds/1", False),
        (["orders.v0.getOrder?"], "GET", ORDERS, True),
        (["orders.v0.getOrder?"], "GET", ORDER, False),
        (["orders.v0.getOrder"], "GET", ORDER, True),
        (["Orders.*"], "GET", ORDERS, False),
        (["unknown"], "GET", "/something/new", True),
        (["unknown"], "GET", ORDERS, False),
        (["*"], "DELETE", "/something/new", True),
        (["GET *", "reports.*"], "POST", "/reports/2021-06-30/reports", True),
        (["GET   orders.*"], "GET", ORDERS, True),
        ([], "GET", ORDERS, False),
    ],
)
def test_operations(
    tmp_path: Path, of_caller: bool, patterns: list[str], method: str, target: str, is_allowed: bool
) -> None:
    made, policy, where = permitted(tmp_path, {"operations": patterns}, of_caller)
    if is_allowed:
        assert decide(made, policy, target, method=method).account == "acme"
        return
    with pytest.raises(NotAllowed) as caught:
        decide(made, policy, target, method=method)
    assert caught.value.status == 403
    assert f"{where}.operations" in caught.value.message


@pytest.mark.parametrize(("target", "is_allowed"), [("/@acme/x", False), ("/@zeta/x", True), ("/@nobody/x", False)])
def test_accounts(tmp_path: Path, of_caller: bool, target: str, is_allowed: bool) -> None:
    made, policy, where = permitted(tmp_path, {"accounts": ["zeta"]}, of_caller)
    if is_allowed:
        assert decide(made, policy, target).account == "zeta"
        return
    with pytest.raises(NotAllowed) as caught:
        decide(made, policy, target)
    assert f"{where}.accounts" in caught.value.message
    assert "acme" not in caught.value.message


def test_the_only_account_allowed_is_the_usual_one_and_a_default_that_is_not_allowed_is_refused(tmp_path: Path) -> None:
    made, policy, _ = permitted(tmp_path, {"accounts": ["zeta"]}, of_caller=True)
    assert decide(made, policy, "/x").account == "zeta"
    for accounts in ([], ["acme", "zeta"]):
        made, policy, _ = permitted(tmp_path, {"accounts": accounts}, of_caller=True)
        if accounts:
            assert decide(made, policy, "/x").account == "acme"
        else:
            with pytest.raises(NotAllowed):
                decide(made, policy, "/x")


ADDRESS, BUYER = f"{ORDER}/address", f"{ORDER}/buyerInfo"


@pytest.mark.parametrize(
    ("elements", "target", "fields", "kind", "given"),
    [
        (None, ORDERS, [], "rdt", ("buyerInfo", "shippingAddress")),
        ([], ORDERS, [], "lwa", ()),
        (["buyerInfo"], ORDERS, [], "rdt", ("buyerInfo",)),
        (["buyerInfo"], ORDERS, [("x-sp-data-elements", "buyerInfo")], "rdt", ("buyerInfo",)),
        (["buyerInfo"], ORDERS, [("x-sp-data-elements", "shippingAddress")], "refused", ()),
        (["buyerInfo"], ORDERS, [("x-sp-data-elements", "buyerInfo,shippingAddress")], "refused", ()),
        ([], ORDERS, [("x-sp-data-elements", "none")], "lwa", ()),
        ([], ADDRESS, [], "refused", ()),
        (["buyerInfo"], ADDRESS, [], "refused", ()),
        (["shippingAddress"], ADDRESS, [], "rdt", ()),
        (["shippingAddress"], BUYER, [], "refused", ()),
        (["buyerInfo"], BUYER, [], "rdt", ()),
        (["buyerInfo", "shippingAddress"], f"{ORDER}/regulatedInfo", [], "refused", ()),
        (["buyerInfo", "shippingAddress", "buyerTaxInformation"], f"{ORDER}/regulatedInfo", [], "rdt", ()),
        ([], "/reports/2021-06-30/documents/1", [], "lwa", ()),
        (["buyerInfo"], "/reports/2021-06-30/documents/1", [], "lwa", ()),
        (["buyerInfo"], "/reports/2021-06-30/documents/1", [("x-sp-data-elements", "buyerInfo")], "lwa", ()),
        (None, "/reports/2021-06-30/documents/1", [], "rdt", ()),
        (["buyerInfo", "shippingAddress", "buyerTaxInformation"], "/reports/2021-06-30/documents/1", [], "rdt", ()),
        ([], "/reports/2021-06-30/reports", [], "lwa", ()),
        ([], "/something/new", [], "refused", ()),
        ([], f"{ORDERS}/", [], "refused", ()),
        ([], "/shipping/v2/tracking", [], "refused", ()),
        ([], "/fba/outbound/2020-07-01/fulfillmentOrders", [], "refused", ()),
        ([], "/orders/2026-01-01/orders", [], "lwa", ()),
        ([], "/orders/2026-01-01/orders?includedData=PROCEEDS", [], "lwa", ()),
        ([], "/orders/2026-01-01/orders?includedData=BUYER", [], "refused", ()),
        ([], "/orders/2026-01-01/orders?included%44ata=PROCEEDS,%62uyer", [], "refused", ()),
        (["buyerInfo"], "/orders/2026-01-01/orders?includedData=BUYER", [], "lwa", ()),
        (["buyerInfo"], "/orders/2026-01-01/orders?includedData=BUYER&includedData=RECIPIENT", [], "refused", ()),
    ],
)
def test_personal_data(
    tmp_path: Path,
    of_caller: bool,
    elements: list[str] | None,
    target: str,
    fields: list[tuple[str, str]],
    kind: str,
    given: tuple[str, ...],
) -> None:
    made, policy, where = permitted(tmp_path, {"data_elements": elements} if elements is not None else {}, of_caller)
    if kind == "refused":
        with pytest.raises(NotAllowed) as caught:
            decide(made, policy, target, *fields)
        assert f"{where}.data_elements" in caught.value.message
        return
    decided = decide(made, policy, target, *fields)
    assert (decided.token_key.kind, decided.token_key.data_elements) == (kind, given)


def test_who_may_not_have_personal_data_may_not_have_a_token_for_it_either(tmp_path: Path) -> None:
    made, policy, _ = permitted(tmp_path, {"data_elements": []}, of_caller=True)
    with pytest.raises(NotAllowed):
        decide(made, policy, "/tokens/2021-03-01/restrictedDataToken", method="POST")


def test_every_restricted_operation_brings_something_but_those_that_do_without() -> None:
    brings_nothing = {one.name for one in TABLE if one.restricted and not implied_elements(one, "")}
    assert brings_nothing == {
        "orders.v0.getOrders",
        "orders.v0.getOrder",
        "orders.v0.getOrderItems",
        "reports.2021-06-30.getReportDocument",
    }


def test_listener_and_caller_must_both_allow(tmp_path: Path) -> None:
    made = config(
        tmp_path,
        {"operations": ["orders.*"], "data_elements": ["buyerInfo"]},
        of_caller=True,
        operations=["GET *"],
        data_elements=["shippingAddress"],
    )
    policy = build_policies(made, 0)["job"]
    assert decide(made, policy, ORDERS).token_key.kind == "lwa"
    with pytest.raises(NotAllowed, match=r"listen\[0\]\.operations"):
        decide(made, policy, f"{ORDER}/shipment", method="POST")
    with pytest.raises(NotAllowed, match=r"callers\.job\.operations"):
        decide(made, policy, "/reports/2021-06-30/reports")


def test_the_only_account_that_both_allow_is_the_usual_one(tmp_path: Path) -> None:
    made = config(tmp_path, {"accounts": ["zeta"]}, of_caller=True, accounts=["acme", "zeta"])
    assert decide(made, build_policies(made, 0)["job"], "/x").account == "zeta"


@pytest.mark.parametrize("pattern", ["order.*", "GET reports.v0.*", "orders.v0.getOrderz"])
def test_a_pattern_that_fits_nothing_is_a_mistake(tmp_path: Path, of_caller: bool, pattern: str) -> None:
    made, _, where = permitted(tmp_path, {"operations": ["GET *", pattern]}, of_caller)
    (problem,) = validate_policies(made, TABLE)
    assert problem.key == f"{where}.operations[1]"
    assert "matches no operation" in problem.message


async def test_a_refusal_costs_amazon_nothing(
    start_proxy: StartProxy, fake_upstream: FakeUpstream, token_host: TokenHost
) -> None:
    proxy = await start_proxy(listen={"address": "127.0.0.1:0", "operations": ["READ *"]})
    got = await call(proxy.addresses[0], "POST", "/feeds/2021-06-30/feeds", b"{}")
    assert (got.status, got.error) == (403, "NotAllowed")
    assert b"listen[0].operations does not allow POST feeds.2021-06-30.createFeed here" in got.body
    assert not fake_upstream.received
    assert not token_host.received
    assert (await call(proxy.addresses[0], "GET", ORDERS)).status == 200
