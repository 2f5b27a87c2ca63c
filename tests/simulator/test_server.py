"""The simulator refuses what Amazon refuses, with Amazon's own words, and makes the faults it is told to."""

import asyncio
import gzip
import json
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from proxy.simulator import Fault, Seller, Settings, Simulator, examples
from proxy.simulator.cli import main
from tests.conftest import MODELS, needs
from tests.support.clock import FakeClock
from tests.support.paths import ROOT
from tests.support.proxy_process import command
from tests.support.raw_client import RawResponse, call

CLIENT, SECRET = "amzn1.application-oa2-client.simulator", "amzn1.oa2-cs.v1.simulator"
SELLERS = "/sellers/v1/marketplaceParticipations"
ADDRESS = "/orders/v0/orders/1/address"
AGENT = "Test/1.0 (Language=Python)"
GOOD = {"client_id": CLIENT, "client_secret": SECRET}
FOR_EU = {**GOOD, "grant_type": "refresh_token", "refresh_token": "Atzr|demo-eu"}
FOR_NOTIFICATIONS = {**GOOD, "grant_type": "client_credentials", "scope": "sellingpartnerapi::notifications"}


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def simulator(clock: FakeClock) -> AsyncIterator[Simulator]:
    other = Seller("other", "eu", "Atzr|other", "another-client")
    settings = Settings(
        clients={CLIENT: SECRET, "another-client": "another-secret"},
        sellers=(Seller("demo", "eu", "Atzr|demo-eu"), Seller("demo", "na", "Atzr|demo-na"), other),
    )
    async with Simulator(settings, now=clock) as started:
        yield started


def address(simulator: Simulator, service: str) -> str:
    return simulator.endpoints[service].split("/")[2]


async def exchange(simulator: Simulator, fields: dict[str, str], content_type: str = "") -> RawResponse:
    kind = content_type or "application/x-www-form-urlencoded;charset=UTF-8"
    body = json.dumps(fields) if kind == "application/json" else urlencode(fields)
    return await call(address(simulator, "lwa"), "POST", "/auth/o2/token", body.encode(), content_type=kind)


async def token(simulator: Simulator, fields: dict[str, str] | None = None) -> str:
    return str(json.loads((await exchange(simulator, fields or FOR_EU)).body)["access_token"])


async def ask(
    simulator: Simulator, method: str, target: str, access: str, body: bytes | None = None, /, **fields: str
) -> RawResponse:
    """Call the EU region as a well-behaved client does, unless `fields` say otherwise."""
    date = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    usual = {"x_amz_access_token": access, "x_amz_date": date, "user_agent": AGENT}
    given = {name: value for name, value in {**usual, **fields}.items() if value}
    return await call(address(simulator, "eu"), method, target, body, **given)


async def rdt(simulator: Simulator, method: str, path: str, *elements: str) -> RawResponse:
    resource: dict[str, Any] = {"method": method, "path": path, **({"dataElements": elements} if elements else {})}
    body = json.dumps({"restrictedResources": [resource]}).encode()
    target = "/tokens/2021-03-01/restrictedDataToken"
    return await ask(simulator, "POST", target, await token(simulator), body, content_type="application/json")


async def control(simulator: Simulator, method: str, path: str, order: Any = None) -> Any:
    body = json.dumps(order).encode() if order is not None else None
    got = await call(address(simulator, "lwa"), method, f"/_simulator{path}", body)
    return got.status, json.loads(got.body)


# Login with Amazon.


@pytest.mark.parametrize("content_type", ["application/x-www-form-urlencoded", "application/json"])
async def test_a_token_is_given_for_a_form_and_for_json(simulator: Simulator, content_type: str) -> None:
    got = await exchange(simulator, FOR_EU, content_type)
    content = json.loads(got.body)
    assert got.status == 200
    assert content["access_token"].startswith("Atza|")
    assert len(content["access_token"]) >= 350
    assert (content["token_type"], content["expires_in"], content["refresh_token"]) == ("bearer", 3600, "Atzr|demo-eu")
    assert (await token(simulator, FOR_NOTIFICATIONS)).startswith("Atc|")


@pytest.mark.parametrize(
    ("changed", "status", "error"),
    [
        ({"client_secret": "wrong"}, 401, "invalid_client"),
        ({"client_id": "nobody"}, 401, "invalid_client"),
        ({"refresh_token": "Atzr|wrong"}, 400, "invalid_grant"),
        ({"refresh_token": "Atzr|other"}, 400, "unauthorized_client"),
        ({"grant_type": "password"}, 400, "unsupported_grant_type"),
        ({"scope": "sellingpartnerapi::notifications"}, 400, "invalid_request"),
        ({"grant_type": "client_credentials"}, 400, "invalid_request"),
    ],
)
async def test_wrong_credentials_are_refused_as_amazon_refuses_them(
    simulator: Simulator, changed: dict[str, str], status: int, error: str
) -> None:
    got = await exchange(simulator, {**FOR_EU, **changed})
    content = json.loads(got.body)
    assert (got.status, content["error"]) == (status, error)
    assert content["error_description"]
    assert content["request_id"]


async def test_an_unknown_scope_is_refused(simulator: Simulator) -> None:
    got = await exchange(simulator, {**FOR_NOTIFICATIONS, "scope": "sellingpartnerapi::everything"})
    assert (got.status, json.loads(got.body)["error"]) == (400, "invalid_scope")


# What the regions refuse.


async def test_a_well_formed_call_is_answered(simulator: Simulator) -> None:
    got = await ask(simulator, "GET", SELLERS, await token(simulator))
    assert got.status == 200
    assert got.get("x-amzn-requestid")
    assert got.get("x-amzn-ratelimit-limit") == "0.016"
    assert "payload" in json.loads(got.body)


@pytest.mark.parametrize(
    ("fields", "status", "details"),
    [
        ({"x_amz_access_token": ""}, 403, "Access token is missing in the request header."),
        (
            {"x_amz_access_token": "Atza|made-up"},
            403,
            "The access token you provided is revoked, malformed or invalid.",
        ),
        ({"x_amz_date": ""}, 400, ""),
        ({"x_amz_date": "2026-01-01T00:00:00Z"}, 400, ""),
        ({"x_amz_date": "20190430T123600Z"}, 400, ""),
        ({"user_agent": ""}, 400, ""),
        ({"user_agent": "curl/8"}, 400, ""),
        ({"user_agent": f"{'a' * 500}/1 (Language=x)"}, 400, ""),
    ],
)
async def test_missing_and_malformed_headers_are_refused(
    simulator: Simulator, fields: dict[str, str], status: int, details: str
) -> None:
    got = await ask(simulator, "GET", SELLERS, await token(simulator), **fields)
    assert (got.status, json.loads(got.body)["errors"][0]["details"]) == (status, details)


async def test_a_body_on_get_gets_the_front_ends_page(simulator: Simulator) -> None:
    got = await ask(simulator, "GET", SELLERS, await token(simulator), b"x")
    assert (got.status, got.get("content-type")) == (400, "text/html")


async def test_a_token_expires_and_can_be_revoked(simulator: Simulator, clock: FakeClock) -> None:
    first, second = await token(simulator), await token(simulator)
    for issued in list(simulator.state.tokens.values())[1:]:
        issued.revoked = True
    got = await ask(simulator, "GET", SELLERS, second)
    assert "revoked, malformed or invalid" in got.body.decode()
    clock.advance(3600)
    got = await ask(simulator, "GET", SELLERS, first)
    assert (got.status, "has expired" in got.body.decode()) == (403, True)


async def test_a_token_of_another_region_is_refused_without_a_reason(simulator: Simulator) -> None:
    got = await ask(simulator, "GET", SELLERS, await token(simulator, {**FOR_EU, "refresh_token": "Atzr|demo-na"}))
    error = json.loads(got.body)["errors"][0]
    assert (got.status, error["code"], error["details"]) == (403, "Unauthorized", "")


async def test_every_kind_of_token_is_good_for_its_own_operations_alone(simulator: Simulator) -> None:
    ordinary, grantless = await token(simulator), await token(simulator, FOR_NOTIFICATIONS)
    restricted = json.loads((await rdt(simulator, "GET", "/orders/v0/orders/{orderId}/address")).body)
    restricted_token = restricted["restrictedDataToken"]
    statuses = {
        (kind, target): (await ask(simulator, "GET", target, access)).status
        for kind, access in (("lwa", ordinary), ("grantless", grantless), ("rdt", restricted_token))
        for target in (SELLERS, "/notifications/v1/destinations", ADDRESS)
    }
    assert [key for key, status in statuses.items() if status == 200] == [
        ("lwa", SELLERS),
        ("grantless", "/notifications/v1/destinations"),
        ("rdt", ADDRESS),
    ]
    assert set(statuses.values()) == {200, 403}


# Restricted Data Tokens.


@pytest.mark.parametrize(
    ("method", "path", "elements", "message"),
    [
        ("GET", SELLERS, (), "Application do not have access to some or all requested resource"),
        ("GET", "/orders/v0/orders/", (), "Application do not have access to some or all requested resource"),
        ("GET", "/orders/v0/orders?x=1", (), "Application do not have access to some or all requested resource"),
        ("PATCH", "/orders/v0/orders", (), "Application do not have access to some or all requested resource"),
        ("GET", "/reports/2021-06-30/documents/d1", (), "Invalid or unsupported document ID found"),
        (
            "GET",
            "/orders/v0/orders",
            ("buyerInfo", "buyerTaxInformation"),
            "Application does not have access to one or more requested data elements: [buyerTaxInformation]",
        ),
    ],
)
async def test_an_rdt_is_refused_with_amazons_words(
    simulator: Simulator, method: str, path: str, elements: tuple[str, ...], message: str
) -> None:
    got = await rdt(simulator, method, path, *elements)
    error = json.loads(got.body)["errors"][0]
    assert (got.status, error["code"], error["message"]) == (400, "InvalidInput", message)


async def test_a_generic_rdt_serves_every_order_and_nothing_else(simulator: Simulator) -> None:
    minted = json.loads((await rdt(simulator, "GET", "/orders/v0/orders/{orderId}/address")).body)
    assert minted["restrictedDataToken"].startswith("Atz.sprdt|")
    assert minted["expiresIn"] == 3600
    access = minted["restrictedDataToken"]
    assert [(await ask(simulator, "GET", f"/orders/v0/orders/{n}/address", access)).status for n in (1, 2)] == [200] * 2
    assert (await ask(simulator, "GET", "/orders/v0/orders/1/buyerInfo", access)).status == 403


async def test_restricted_documents_are_those_that_say_so(simulator: Simulator) -> None:
    path = "/reports/2021-06-30/documents/restricted-1"
    assert (await rdt(simulator, "GET", path)).status == 200
    assert (await ask(simulator, "GET", path, await token(simulator))).status == 403
    assert (await ask(simulator, "GET", path.replace("restricted-", ""), await token(simulator))).status == 200


# Usage plans.


async def test_a_plan_that_is_used_up_responds_429_until_it_fills_again(simulator: Simulator, clock: FakeClock) -> None:
    order = {"method": "GET", "path": SELLERS, "rate": 0.5, "burst": 2, "enforce": True}
    assert await control(simulator, "POST", "/plans", order) == (200, {"enforced": True})
    access = await token(simulator)
    responses = [await ask(simulator, "GET", SELLERS, access) for _ in range(3)]
    assert [got.status for got in responses] == [200, 200, 429]
    assert json.loads(responses[2].body)["errors"][0]["code"] == "QuotaExceeded"
    assert responses[2].get("x-amzn-errortype") == "TooManyRequestsException"
    assert responses[2].get("x-amzn-ratelimit-limit") is None
    assert responses[2].get("retry-after") is None
    clock.advance(2)
    assert (await ask(simulator, "GET", SELLERS, access)).status == 200


# Faults and control.


async def test_a_fault_is_made_where_when_and_as_often_as_asked(simulator: Simulator) -> None:
    order = {"kind": "status", "service": "eu", "path": "/sellers/*", "status": 503, "times": 2, "body": "busy"}
    assert (await control(simulator, "POST", "/faults", order))[0] == 200
    access = await token(simulator)
    statuses = [(await ask(simulator, "GET", SELLERS, access)).status for _ in range(3)]
    assert statuses == [503, 503, 200]
    assert (await ask(simulator, "GET", ADDRESS, access)).status == 403


async def test_any_response_can_be_made(simulator: Simulator) -> None:
    headers = {"Content-Type": "text/plain", "Location": "https://elsewhere.example"}
    simulator.state.faults.append(Fault("answer", service="eu", status=302, headers=headers, body="moved"))
    got = await ask(simulator, "GET", SELLERS, await token(simulator))
    assert (got.status, got.body, got.get("location")) == (302, b"moved", "https://elsewhere.example")


@pytest.mark.parametrize("kind", ["reset", "close", "truncate"])
async def test_connections_can_be_broken(simulator: Simulator, kind: str) -> None:
    access = await token(simulator)
    simulator.state.faults.append(Fault(kind, service="eu"))
    try:
        got = await ask(simulator, "GET", SELLERS, access)
    except (ConnectionError, asyncio.IncompleteReadError):
        assert kind != "truncate"
    else:
        assert kind == "truncate"
        assert not got.complete


@pytest.mark.parametrize("is_chunked", [True, False])
async def test_a_response_of_any_size_can_be_made(simulator: Simulator, is_chunked: bool) -> None:
    simulator.state.faults.append(Fault("size", service="eu", size=1_000_001, chunked=is_chunked))
    got = await ask(simulator, "GET", SELLERS, await token(simulator))
    assert (len(got.body), got.complete) == (1_000_001, True)


async def test_an_upload_is_recorded_by_size_and_hash(simulator: Simulator) -> None:
    body = gzip.compress(b"x" * 10_000_000, mtime=0)
    await ask(simulator, "POST", "/feeds/2021-06-30/feeds", await token(simulator), body, content_encoding="gzip")
    entry = simulator.journal[-1]
    assert (entry.body_size, entry.operation, entry.seller, entry.token_kind) == (len(body), "", "demo", "lwa")
    assert entry.header("Content-Encoding") == "gzip"


@pytest.mark.parametrize(
    ("method", "path", "order", "status"),
    [
        ("GET", "/nonsense", None, 404),
        ("POST", "/faults", {"kind": "nonsense"}, 400),
        ("POST", "/faults", {"kind": "status", "colour": "red"}, 400),
        ("POST", "/faults", [], 400),
        ("POST", "/tokens", {"action": "frame"}, 400),
        ("POST", "/plans", {"path": "/x"}, 400),
        ("GET", "/state", None, 200),
        ("GET", "/journal", None, 200),
        ("DELETE", "/journal", None, 200),
        ("DELETE", "/faults", None, 200),
        ("POST", "/lifetime", {"seconds": 3}, 200),
        ("POST", "/clients", {"client_id": "new", "client_secret": "s"}, 200),
        ("POST", "/sellers", {"name": "n", "region": "fe", "refresh_token": "t"}, 200),
        ("POST", "/elements", {"granted": []}, 200),
    ],
)
async def test_orders_are_carried_out_or_refused_plainly(
    simulator: Simulator, method: str, path: str, order: Any, status: int
) -> None:
    got, content = await control(simulator, method, path, order)
    assert got == status
    assert status == 200 or content["error"]


async def test_a_rotated_secret_and_a_revoked_seller_take_effect(simulator: Simulator) -> None:
    await control(simulator, "POST", "/clients", {"client_id": CLIENT, "client_secret": "new"})
    assert (await exchange(simulator, FOR_EU)).status == 401
    assert (await exchange(simulator, {**FOR_EU, "client_secret": "new"})).status == 200
    await control(simulator, "POST", "/sellers", {"refresh_token": "Atzr|demo-eu", "revoked": True})
    got = await exchange(simulator, {**FOR_EU, "client_secret": "new"})
    assert json.loads(got.body)["error"] == "invalid_grant"


async def test_the_lifetime_of_tokens_can_be_set(simulator: Simulator, clock: FakeClock) -> None:
    await control(simulator, "POST", "/lifetime", {"seconds": 3})
    content = json.loads((await exchange(simulator, FOR_EU)).body)
    assert content["expires_in"] == 3
    clock.advance(3)
    assert (await ask(simulator, "GET", SELLERS, content["access_token"])).status == 403


# Amazon's models.


async def test_a_model_responds_by_the_parameters_it_names(clock: FakeClock, tmp_path: Path) -> None:
    statics = [
        {"request": {"parameters": {"ids": {"value": ["a", "b"]}}}, "response": {"payload": "both"}},
        {"request": {"parameters": {}}, "response": {"payload": "any"}},
    ]
    operation = {
        "operationId": "getThings",
        "description": "| Rate (requests per second) | Burst |\n| ---- | ---- |\n| 7 | 9 |",
        "parameters": [{"name": "ids", "in": "query", "type": "array"}],
        "responses": {"200": {"x-amzn-api-sandbox": {"static": statics}}},
    }
    (tmp_path / "things.json").write_text(json.dumps({"paths": {"/things/v1/things": {"get": operation}}}))
    (tmp_path / "broken.json").write_text("{")
    settings = Settings(sellers=[Seller("demo", "eu", "Atzr|demo-eu")], models=tmp_path)
    async with Simulator(settings, now=clock) as simulator:
        access = await token(simulator)
        bodies = [
            json.loads((await ask(simulator, "GET", f"/things/v1/things{query}", access)).body)["payload"]
            for query in ("?ids=a,b", "?ids=a&ids=b", "?ids=a", "")
        ]
        assert bodies == ["both", "both", "any", "any"]
        assert (await ask(simulator, "GET", "/things/v1/things", access)).get("x-amzn-ratelimit-limit") == "7"
        assert (await ask(simulator, "GET", "/no/such/path", access)).status == 403


def test_nearly_all_of_amazons_examples_can_be_replayed() -> None:
    needs(MODELS.is_dir(), "the folder of Amazon's models")
    found = list(examples(MODELS))
    assert len(found) == 501
    assert [one.operation for one in found if one.reason] == ["getCatalogItem"]


# The command.


async def test_the_command_says_where_it_listens_and_ends_on_a_signal() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy", "simulate", "--port", "0", "--json"),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    endpoints = json.loads(await asyncio.wait_for(process.stdout.readline(), 30))
    assert set(endpoints) == {"na", "eu", "fe", "lwa", "documents", "control"}
    got = await call(endpoints["lwa"].split("/")[2], "GET", "/_simulator/state")
    assert got.status == 200
    process.terminate()
    assert await asyncio.wait_for(process.wait(), 30) == 0


async def test_a_wrong_command_line_is_refused() -> None:
    for arguments in (["--host", "0.0.0.0"], ["--seller", "x"], ["--client", "x"], ["--nonsense"]):
        code, _, complained = await command("simulate", *arguments)
        assert (code, "Traceback" in complained) == (2, False), complained


def test_a_port_in_use_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["--port", str(taken.getsockname()[1])]) == 1
    complained = capsys.readouterr().err
    assert complained.count("\n") == 1
    assert "Address already in use" in complained
