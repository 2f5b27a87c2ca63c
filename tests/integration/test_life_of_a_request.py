"""One request from end to end: app, proxy, Login with Amazon and Amazon, and what is said about it afterwards."""

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from proxy.config import Config
from proxy.server.runtime import RunningProxy, start_proxy
from proxy.simulator import Fault, Seller, Simulator
from tests.conftest import StartProxy, config_from
from tests.support.fake_upstream import FakeUpstream, Received, TokenHost, http_response
from tests.support.raw_client import RawResponse, call, connect

SELLERS = "/sellers/v1/marketplaceParticipations"
ADDRESS = "/orders/v0/orders/902-1845936-5435065/address"
SELLERS_NAME = "sellers.v1.getMarketplaceParticipations"
DESTINATIONS = "/notifications/v1/destinations"
CLIENT = {"client_id": "amzn1.application-oa2-client.simulator", "client_secret": "amzn1.oa2-cs.v1.simulator"}


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    async with Simulator() as started:
        yield started


def settings(simulator: Simulator, folder: Path, **changed: Any) -> Config:
    regions = ("na", "eu", "fe")
    return config_from(
        {
            "listen": "127.0.0.1:0",
            "admin": "127.0.0.1:0",
            "applications": {"main": CLIENT},
            "accounts": {"demo": {"refresh_tokens": {region: f"Atzr|demo-{region}" for region in regions}}},
            "endpoints": {name: simulator.endpoints[name] for name in (*regions, "lwa")},
            **changed,
        },
        folder,
    )


@pytest.fixture
async def simulated(simulator: Simulator, tmp_path: Path) -> AsyncIterator[RunningProxy]:
    async with start_proxy(settings(simulator, tmp_path)) as proxy:
        yield proxy


@pytest.mark.parametrize(
    ("target", "token"), [(SELLERS, "lwa"), (DESTINATIONS, "grantless"), (ADDRESS, "rdt"), ("/brand/new", "lwa")]
)
async def test_each_kind_of_call_brings_the_token_that_amazon_wants(
    simulated: RunningProxy, simulator: Simulator, target: str, token: str
) -> None:
    got = await call(simulated.addresses[0], "GET", target, x_sp_region="eu")
    assert got.status == 200, got.body
    assert got.decided["token"] == token
    entry = simulator.journal[-1]
    assert (entry.service, entry.target, entry.token_kind) == ("eu", target, token)


async def test_personal_data_comes_when_it_is_asked_for(simulated: RunningProxy) -> None:
    plain = await call(simulated.addresses[0], "GET", "/orders/v0/orders/1", x_sp_region="na")
    asked = await call(
        simulated.addresses[0], "GET", "/orders/v0/orders/1", x_sp_region="na", x_sp_data_elements="buyerInfo"
    )
    assert b"BuyerEmail" not in plain.body
    assert b"BuyerEmail" in asked.body


async def test_five_hundred_orders_cost_one_restricted_data_token(
    simulated: RunningProxy, simulator: Simulator
) -> None:
    async with connect(simulated.addresses[0]) as client:
        for number in range(20):
            got = await client.request("GET", f"/orders/v0/orders/{number}/address", x_sp_region="eu")
            assert got.status == 200
    minted = [entry for entry in simulator.journal if entry.target.endswith("/restrictedDataToken")]
    assert len(minted) == 1


async def test_many_mixed_requests_are_never_mixed_up(simulator: Simulator, tmp_path: Path) -> None:
    accounts = {f"s{number}": {"refresh_tokens": {"eu": f"Atzr|s{number}"}} for number in range(20)}
    for name in accounts:
        simulator.state.sellers[f"Atzr|{name}"] = Seller(name, "eu", f"Atzr|{name}")
    config = settings(simulator, tmp_path, accounts=accounts, limits={"pace": False})
    async with start_proxy(config) as proxy:

        async def one(name: str, number: int) -> None:
            target = f"/orders/v0/orders/{name}-{number}/address" if number % 2 else f"/x/{name}"
            got = await call(proxy.addresses[0], "GET", target, x_sp_account=name)
            assert got.status == 200
            assert got.decided["account"] == name
            assert name.encode() in got.body

        await asyncio.gather(*(one(name, number) for number in range(10) for name in accounts))
    for entry in simulator.journal:
        if entry.service == "eu" and "restrictedDataToken" not in entry.target:
            assert entry.seller in re.split(r"[/-]", entry.target), entry.target


async def test_login_with_amazon_down_is_a_clear_503_at_once(simulated: RunningProxy, simulator: Simulator) -> None:
    simulator.state.faults.append(Fault("status", service="lwa", status=500))
    got = await call(simulated.addresses[0], "GET", SELLERS, x_sp_region="eu")
    assert (got.status, got.error) == (503, "TokenUnavailable")
    assert int(got.get("retry-after") or 0) >= 1
    assert not [entry for entry in simulator.journal if entry.service == "eu"], "nothing was sent to Amazon"


async def test_a_refresh_token_that_amazon_refuses_names_the_account(
    simulated: RunningProxy, simulator: Simulator
) -> None:
    simulator.state.revoked_sellers.add("Atzr|demo-eu")
    got = await call(simulated.addresses[0], "GET", SELLERS, x_sp_region="eu")
    assert (got.status, got.error) == (502, "TokenRefused")
    error = json.loads(got.body)["errors"][0]
    assert "account demo in eu" in error["message"]
    assert "authorise" in error["details"]
    other = await call(simulated.addresses[0], "GET", SELLERS, x_sp_region="na")
    assert other.status == 200, "other regions go on"


async def test_amazons_own_errors_pass_unchanged(simulated: RunningProxy, simulator: Simulator) -> None:
    body = '{"errors":[{"code":"InternalFailure","message":"We encountered an internal error.","details":""}]}'
    simulator.state.faults.append(Fault("status", service="eu", status=500, body=body, times=1))
    got = await call(simulated.addresses[0], "GET", SELLERS, x_sp_region="eu", x_sp_retry="off")
    assert (got.status, got.body.decode(), got.error) == (500, body, None)
    assert got.decided["attempts"] == "1"


# Usage plans.


async def test_a_call_waits_for_its_place_and_says_how_long(
    start_proxy: StartProxy, fake_upstream: FakeUpstream
) -> None:
    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(http_response("200 OK", b"{}", x_amzn_ratelimit_limit="20"))

    fake_upstream.script = script
    proxy = await start_proxy()
    path = "/mfn/v0/shipments/1"  # 1 call per second, burst 1
    first = await call(proxy.addresses[0], "GET", path)
    second = await call(proxy.addresses[0], "GET", path)
    assert first.decided["wait"] == "0.000"
    assert 0 < float(second.decided["wait"]) < 0.9, "the rate that Amazon's answer named is believed"


async def test_a_call_without_a_place_in_time_is_refused_at_once(
    start_proxy: StartProxy, fake_upstream: FakeUpstream
) -> None:
    proxy = await start_proxy()
    path = "/mfn/v0/shipments/1"
    await call(proxy.addresses[0], "GET", path)
    got = await call(proxy.addresses[0], "GET", path, x_sp_max_wait="0")
    assert (got.status, got.error, got.get("retry-after")) == (429, "UsagePlanExhausted", "1")
    assert len(fake_upstream.received) == 1
    bad = await call(proxy.addresses[0], "GET", path, x_sp_max_wait="soon")
    assert (bad.status, bad.error) == (400, "BadOption")


async def test_an_exchange_does_not_come_between_a_place_and_its_call(
    start_proxy: StartProxy, token_host: TokenHost
) -> None:
    token_host.held = asyncio.Event()
    proxy = await start_proxy()
    where = {"account": "acme", "region": "eu", "operation": "orders.v0.getOrders"}

    def left() -> float | None:
        return proxy.metrics.registry.get_sample_value("spapi_proxy_usage_plan_tokens", where)

    cold = asyncio.create_task(call(proxy.addresses[0], "GET", "/orders/v0/orders"))
    await token_host.arrived.wait()
    assert left() is None, "Amazon counts a call when it arrives, which may be long from now"
    token_host.held.set()
    assert (await cold).status == 200
    assert left() is not None


async def test_callers_of_one_plan_take_turns_and_background_calls_wait(
    start_proxy: StartProxy, fake_upstream: FakeUpstream
) -> None:
    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(http_response("200 OK", b"{}", x_amzn_ratelimit_limit="5"))

    fake_upstream.script = script
    proxy = await start_proxy()
    path = "/mfn/v0/shipments/{}"  # burst 1, and 5 per second from the first answer on
    await call(proxy.addresses[0], "GET", path.format("first"))

    async def one(name: str, **fields: str) -> asyncio.Task[RawResponse]:
        task = asyncio.create_task(call(proxy.addresses[0], "GET", path.format(name), **fields))
        while proxy.metrics.in_flight < len(tasks) + 1:  # noqa: ASYNC110 - a gauge tells nobody
            await asyncio.sleep(0)
        return task

    tasks: list[asyncio.Task[RawResponse]] = []
    tasks.append(await one("background", x_sp_priority="background"))
    for number in range(4):
        tasks.append(await one(f"noisy-{number}", x_sp_client="noisy"))  # noqa: PERF401 - one counts the others
    tasks.append(await one("quiet", x_sp_client="quiet"))
    assert {(await task).status for task in tasks} == {200}
    went = [received.target.rpartition("/")[2] for received in fake_upstream.received]
    assert went == ["first", "noisy-0", "quiet", "noisy-1", "noisy-2", "noisy-3", "background"]
    assert not any(name.startswith("x-sp") for received in fake_upstream.received for name, _ in received.fields)


async def test_pace_false_sends_at_once_and_passes_amazons_429_on(
    start_proxy: StartProxy, fake_upstream: FakeUpstream
) -> None:
    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(http_response("429 Too Many Requests", b'{"errors":[{"code":"QuotaExceeded"}]}'))

    fake_upstream.script = script
    proxy = await start_proxy(limits={"pace": False})
    got = [await call(proxy.addresses[0], "GET", "/mfn/v0/shipments/1") for _ in range(3)]
    assert [(one.status, one.error) for one in got] == [(429, None)] * 3


async def test_the_sandbox_has_one_plan_for_everything(start_proxy: StartProxy) -> None:
    proxy = await start_proxy(environment="sandbox")
    paths = ["/mfn/v0/shipments/1", SELLERS, "/brand/new"]
    async with connect(proxy.addresses[0]) as client:
        statuses = [(await client.request("GET", paths[number % 3], x_sp_max_wait="0")).status for number in range(16)]
    assert statuses == [200] * 15 + [429]


# What is said afterwards.


async def test_a_request_leaves_one_line_without_its_query_body_or_token(
    simulated: RunningProxy, log: StringIO, simulator: Simulator
) -> None:
    target = "/orders/v0/orders/1/address?BuyerEmail=distinctive@example.com"
    await call(simulated.addresses[0], "GET", target, x_sp_region="eu", x_request_id="app-1")
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    (line,) = [line for line in lines if line["message"] == "request"]
    assert {name: line[name] for name in ("code", "method", "account", "region", "operation", "token", "attempts")} == {
        "code": 200,
        "method": "GET",
        "account": "demo",
        "region": "eu",
        "operation": "orders.v0.getOrderAddress",
        "token": "rdt",
        "attempts": 1,
    }
    assert line["duration"] >= line["upstream"] > 0
    assert line["amazon_request_id"]
    assert line["request_id"] == "app-1"
    secrets = ["distinctive", "Atza|", "Atzr|", "sprdt", CLIENT["client_secret"], *simulator.state.tokens]
    assert not [secret for secret in secrets if secret in log.getvalue()]


async def test_what_was_seen_is_counted(simulated: RunningProxy) -> None:
    await call(simulated.addresses[0], "GET", ADDRESS, x_sp_region="eu")
    await call(simulated.addresses[0], "GET", "/x", x_sp_account="nobody")
    await call(simulated.addresses[0], "POST", "/feeds/2021-06-30/feeds", b"12345", x_sp_region="eu")

    def value(name: str, **labels: str) -> float | None:
        return simulated.metrics.registry.get_sample_value(f"spapi_proxy_{name}", labels)

    labels = {"account": "demo", "region": "eu", "operation": "orders.v0.getOrderAddress"}
    assert value("requests_total", **labels, method="GET", code="200", token="rdt", source="amazon") == 1
    unknown = {"account": "-", "region": "-", "operation": "unknown"}
    assert value("requests_total", **unknown, method="GET", code="400", token="none", source="proxy") == 1
    assert value("errors_total", code="UnknownAccount", fault="client") == 1
    by_operation = {"region": "eu", "operation": "orders.v0.getOrderAddress"}
    assert value("request_duration_seconds_count", **by_operation) == 1
    assert value("upstream_duration_seconds_count", **by_operation) == 1
    assert value("requests_in_flight") == 0
    feeds = {"account": "demo", "region": "eu", "operation": "feeds.2021-06-30.createFeed"}
    assert value("request_body_bytes_total", **feeds) == 5
    assert (value("response_body_bytes_total", **feeds) or 0) > 0
    assert value("usage_plan_rate", **labels) == 0.5


@pytest.mark.parametrize(
    ("target", "fields", "error", "operation"),
    [
        (ADDRESS, {}, "RegionRequired", "orders.v0.getOrderAddress"),
        (f"/@demo{ADDRESS}", {}, "RegionRequired", "orders.v0.getOrderAddress"),
        (f"{SELLERS}?marketplaceIds=NOSUCHPLACE", {}, "UnknownMarketplace", SELLERS_NAME),
        (SELLERS, {"x_sp_account": "nobody"}, "UnknownAccount", SELLERS_NAME),
        (f"/@nobody/eu{SELLERS}", {}, "UnknownAccount", SELLERS_NAME),
        (DESTINATIONS, {"x_sp_region": "eu"}, "NotAllowed", "notifications.v1.getDestinations"),
        ("/brand/new/902-1845936-5435065", {}, "NotAllowed", "unknown"),
        ("/@demo", {}, "BadTarget", "unknown"),
        (SELLERS, {"host": "evil.test"}, "HostRefused", "unknown"),
    ],
)
async def test_a_refused_request_has_its_operation_where_the_table_knows_it(
    simulator: Simulator, tmp_path: Path, log: StringIO, target: str, fields: dict[str, str], error: str, operation: str
) -> None:
    listen = {"address": "127.0.0.1:0", "operations": ["orders.*", "sellers.*"]}
    async with start_proxy(settings(simulator, tmp_path, listen=listen)) as proxy:
        got = await call(proxy.addresses[0], "GET", target, **fields)
        labels = {"account": "-", "region": "-", "operation": operation, "method": "GET", "code": str(got.status)}
        counted = proxy.metrics.registry.get_sample_value(
            "spapi_proxy_requests_total", {**labels, "token": "none", "source": "proxy"}
        )
        recent = proxy.metrics.history
        assert recent is not None
        (request,) = recent.after()
    assert (got.error, got.decided["operation"], counted, request.operation) == (error, operation, 1, operation)
    line = next(line for line in map(json.loads, log.getvalue().splitlines()) if line["message"] == "request")
    assert (line["operation"], line["error"]) == (operation, error)
    assert "902-1845936" not in log.getvalue()


@pytest.mark.parametrize(
    ("admin", "said"),
    [
        ("127.0.0.1:{free}", "This port is for apps; the status page is at http://127.0.0.1:{free}/. "),
        ("127.0.0.1:0", "This port is for apps. "),
        ("unix:{folder}/admin", "This port is for apps. "),
        (None, "This port is for apps. "),
    ],
)
async def test_who_opens_the_port_in_a_browser_learns_where_the_status_page_is(
    simulator: Simulator, tmp_path: Path, admin: str | None, said: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        names = {"free": server.getsockname()[1], "folder": tmp_path}
    config = settings(simulator, tmp_path, admin=admin and admin.format(**names))
    async with start_proxy(config) as proxy:
        got = await call(proxy.addresses[0], "GET", "/", sec_fetch_site="none", sec_fetch_dest="document")
        (error,) = json.loads(got.body)["errors"]
        assert (got.status, error["code"]) == (400, "RegionRequired")
        assert error["details"].startswith(said.format(**names) + "Add the header")
        for method, target in (("GET", SELLERS), ("GET", "/?x"), ("POST", "/")):
            other = await call(proxy.addresses[0], method, target)
            assert other.error == "RegionRequired"
            assert b"for apps" not in other.body


async def test_histograms_carry_the_account_only_where_it_is_wanted(simulator: Simulator, tmp_path: Path) -> None:
    config = settings(simulator, tmp_path, metrics={"account_on_histograms": True})
    async with start_proxy(config) as proxy:
        await call(proxy.addresses[0], "GET", SELLERS, x_sp_region="eu")
        labels = {"account": "demo", "region": "eu", "operation": "sellers.v1.getMarketplaceParticipations"}
        count = proxy.metrics.registry.get_sample_value("spapi_proxy_request_duration_seconds_count", labels)
    assert count == 1


async def test_paths_never_become_labels(simulated: RunningProxy) -> None:
    async with connect(simulated.addresses[0]) as client:
        for number in range(50):
            await client.request("GET", f"/unknown/{number}", x_sp_region="eu")
            await client.request("OPTIONS", f"/x/{number}")
    series = [sample for metric in simulated.metrics.registry.collect() for sample in metric.samples]
    assert len(series) < 400
    assert not [sample for sample in series if any("/unknown" in value for value in sample.labels.values())]
