"""The status page, `/status` and `/requests`: content, access, and bounds."""

import asyncio
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proxy.observability.metrics import PlanGauges
from proxy.observability.request_history import MAX_REQUESTS
from proxy.request.context import RequestContext
from proxy.server.admin import status_page
from proxy.server.admin.app import ReloadStatus
from proxy.server.admin.diagnosis import diagnose
from proxy.server.admin.snapshot import MAX_TOKEN_ROWS, MEANINGS, ErrorRow, Snapshot
from proxy.server.admin.status_page import render
from proxy.server.runtime import RunningProxy
from tests.conftest import StartProxy, settings_for
from tests.server.admin.test_diagnosis import CONFIGURATION, GOOD, REFUSED, request, seen
from tests.support.fake_upstream import FakeUpstream, TokenHost, http_response
from tests.support.proxy_process import serving
from tests.support.raw_client import RawResponse, call

ORDERS = "/orders/v0/orders"
ORDER = "/orders/v0/orders/902-1845936-5435065/address?secret-query=1"
SHOWN = ("/", "/status", "/requests", "/page.css", "/page.js")
ATTACK = "<script>alert(1)</script>\"'&"


async def get(proxy: RunningProxy, path: str, **fields: str) -> RawResponse:
    assert proxy.admin is not None
    return await call(proxy.admin, "GET", path, **fields)


async def get_json(proxy: RunningProxy, path: str) -> Any:
    got = await get(proxy, path)
    assert (got.status, got.get("content-type")) == (200, "application/json; charset=utf-8")
    return json.loads(got.body)


async def test_the_page_shows_what_happened(proxy: RunningProxy, fake_upstream: FakeUpstream) -> None:
    assert "no request came" in (await get(proxy, "/")).body.decode()
    await call(proxy.addresses[0], "GET", ORDERS)
    await call(proxy.addresses[0], "GET", ORDERS, x_sp_account="nobody")
    text = (await get(proxy, "/")).body.decode()
    assert '<h2 id="diagnosis-title">Working</h2>' in text
    assert "1 of 2 recent requests: UnknownAccount. The account is not in the configuration." in text
    assert "<em>(cause: your side)</em> Check its spelling; <code>check</code> lists the accounts." in text
    assert "GET orders.v0.getOrders" in text
    assert "UnknownAccount" in text
    assert ">acme</a>" in text
    assert "nobody" not in text
    assert fake_upstream.received


@pytest.mark.parametrize("path", SHOWN)
async def test_all_of_it_is_for_local_requests_only(proxy: RunningProxy, path: str) -> None:
    got = await get(proxy, path)
    assert (got.status, got.get("x-content-type-options"), got.get("cache-control")) == (200, "nosniff", "no-store")
    for host in ("evil.example", "127.0.0.1.evil.example", "0.0.0.0", ""):
        assert (await get(proxy, path, host=host)).status == 421
    for fields in (
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
    ):
        got = await get(proxy, path, **fields)
        assert (got.status, got.body) == (403, b"not for web pages or links on them: enter the address yourself\n")
    assert (await get(proxy, path, sec_fetch_site="same-origin")).status == 200


async def test_the_health_address_serves_none_of_it(start_proxy: StartProxy) -> None:
    proxy = await start_proxy(health="127.0.0.1:0")
    assert proxy.health is not None
    assert {(await call(proxy.health, "GET", path)).status for path in SHOWN} == {404}


async def test_the_page_may_load_nothing_from_other_hosts(proxy: RunningProxy) -> None:
    got = await get(proxy, "/")
    assert got.get("content-type") == "text/html; charset=utf-8"
    assert got.get("content-security-policy") == (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    assert got.get("referrer-policy") == "no-referrer"
    assert got.get("cross-origin-resource-policy") == "same-origin"
    assert {name: (await get(proxy, f"/{name}")).get("content-type") for name in status_page.FILES} == {
        "page.css": "text/css; charset=utf-8",
        "page.js": "text/javascript; charset=utf-8",
    }


def test_every_text_is_escaped() -> None:
    row = REFUSED._replace(
        account=ATTACK, application=ATTACK, region=ATTACK, reason=ATTACK, error=ATTACK, remedy=ATTACK
    )
    bad = request(502, ATTACK, ATTACK)._replace(caller=ATTACK, labels=(*(ATTACK,) * 4, "502", ATTACK, "proxy"))
    full = seen(
        [bad],
        [row],
        version=ATTACK,
        waiting_for=ATTACK,
        configuration={
            "good_since": ATTACK,
            "last_reload": {"at": ATTACK, "result": ATTACK},
            "problems": [ATTACK],
            "needs_restart": [ATTACK],
        },
        store_is_up=False,
        store_failures={ATTACK: 1},
        regions_down=[(ATTACK, ATTACK)],
        secret_lifetimes={ATTACK: 1.0},
    )
    for state in ("ready", "starting"):
        text = render(replace(full, state=state), diagnose(replace(full, state=state)), account=ATTACK)
        assert text.count("<script") == 1  # its own
        assert text.count("&lt;script&gt;") > 10
        assert ATTACK not in text


async def test_a_configuration_problem_is_shown_escaped(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path
) -> None:
    settings = settings_for(fake_upstream, token_host)
    async with serving(settings, tmp_path) as proxy:
        assert proxy.admin is not None
        (tmp_path / "config.yaml").write_text(json.dumps({**settings, "<script>alert(1)</script>": 1}))
        await proxy.process_says("the new configuration was rejected; the previous one stays in force")
        text = (await call(proxy.admin, "GET", "/")).body.decode()
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
        assert text.count("<script") == 1
        text = (await call(proxy.admin, "GET", "/?account=<script>alert(1)</script>")).body.decode()
        assert text.count("<script") == 1
        assert "No account has this name." in text


async def recovered(proxy: RunningProxy) -> None:
    """Call until the pause after a refused token request is over; the test's own timeout is the bound."""
    while (await call(proxy.addresses[0], "GET", ORDERS)).status != 200:
        pass


@pytest.mark.parametrize("path", SHOWN)
async def test_nothing_secret_and_nothing_of_a_request_is_shown(
    path: str, proxy: RunningProxy, fake_upstream: FakeUpstream, token_host: TokenHost
) -> None:
    refusal = b'{"error": "invalid_grant", "request_id": "amazon-id-1", "error_description": "of Atzr|acme-eu"}'
    token_host.responses = [http_response("400 Bad Request", refusal, content_type="application/json")]
    await call(proxy.addresses[0], "GET", ORDERS)
    refused = (await get(proxy, path)).body.decode()
    assert ("invalid_grant" in refused) == (path in {"/", "/status"})
    await recovered(proxy)
    fake_upstream.rdt_response = http_response(
        "403 Forbidden", b'{"errors": [{"message": "of order 902-1845936-5435065"}]}'
    )
    await call(proxy.addresses[0], "GET", ORDER, x_request_id="app-id-1")
    await call(proxy.addresses[0], "GET", "/tokens/902-1845936-5435065", x_request_id="app-id-1")
    body = refused + (await get(proxy, path)).body.decode()
    assert fake_upstream.minted
    for secret in ("Atza|", "Atzr|", "client-secret", "902-1845936", "secret-query", "app-id-1", "amazon-id-1"):
        assert secret not in body


async def test_status_has_what_the_page_shows(proxy: RunningProxy, token_host: TokenHost) -> None:
    fresh = await get_json(proxy, "/status")
    assert [row["state"] for row in fresh["tokens"]] == ["unused"]
    await call(proxy.addresses[0], "GET", ORDERS)
    status = await get_json(proxy, "/status")
    assert (status["state"], status["accounts"], status["requests_in_flight"]) == ("ready", 1, 0)
    (row,) = status["tokens"]
    assert (row["account"], row["region"], row["state"], row["last_exchange"]) == ("acme", "eu", "good", "ok")
    assert 3000 < row["seconds_left"] < 3600
    assert status["verdict"]["state"] == "working"
    assert (await get_json(proxy, "/status?account=other"))["tokens"] == []
    assert len(token_host.received) == 1


async def test_an_account_whose_credentials_are_refused_comes_first(
    start_proxy: StartProxy, token_host: TokenHost
) -> None:
    accounts = {f"a{number}": {"refresh_tokens": {"eu": f"Atzr|a{number}"}} for number in range(30)}
    proxy = await start_proxy(accounts=accounts)
    await call(proxy.addresses[0], "GET", ORDERS, x_sp_account="a3")
    token_host.responses = [
        http_response("400 Bad Request", b'{"error": "invalid_grant"}', content_type="application/json")
    ]
    await call(proxy.addresses[0], "GET", ORDERS, x_sp_account="a7")
    status = await get_json(proxy, "/status")
    first, second, *_ = status["tokens"]
    assert (first["account"], first["state"], first["reason"]) == ("a7", "failed", "invalid_grant")
    assert (second["account"], second["state"]) == ("a3", "good")
    assert status["tokens_by_state"] == {"failed": 1, "failing": 0, "fetching": 0, "good": 1, "unused": 28}
    assert "a7 in eu" in status["verdict"]["says"]
    assert (status["verdict"]["state"], status["verdict"]["whose"]) == ("degraded", "yours")


async def test_an_exhausted_usage_plan_is_shown(start_proxy: StartProxy) -> None:
    proxy = await start_proxy(limits={"max_wait": "0"})
    for _ in range(21):
        await call(proxy.addresses[0], "GET", ORDERS)
    (row,) = (await get_json(proxy, "/status"))["usage_plans"]
    assert (row["account"], row["operation"], row["refused"]) == ("acme", "orders.v0.getOrders", 1)
    assert row["tokens"] < 1
    assert "orders.v0.getOrders" in (await get(proxy, "/")).body.decode().partition('id="plan-rows"')[2]


# Recent requests, for programs.


async def test_requests_continue_from_a_cursor(proxy: RunningProxy) -> None:
    for _ in range(3):
        await call(proxy.addresses[0], "GET", ORDERS)
    status = await get_json(proxy, "/requests")
    assert [one["number"] for one in status["requests"]] == [1, 2, 3]
    last = status["requests"][-1]
    assert (last["status"], last["operation"], last["account"]) == (200, "orders.v0.getOrders", "acme")
    assert last["duration"] >= last["upstream"] > 0
    assert (await get_json(proxy, f"/requests?after={status['cursor']}"))["requests"] == []
    await call(proxy.addresses[0], "GET", ORDERS)
    more = await get_json(proxy, f"/requests?after={status['cursor']}")
    assert ([one["number"] for one in more["requests"]], more["missed"]) == ([4], 0)
    assert [one["number"] for one in (await get_json(proxy, "/requests?limit=2"))["requests"]] == [3, 4]
    assert (await get_json(proxy, "/requests?limit=0"))["requests"] == []
    other = await get_json(proxy, "/requests?after=of-another-start:3")
    assert ([one["number"] for one in other["requests"]], other["missed"]) == ([1, 2, 3, 4], 0)


async def test_a_late_reader_learns_how_many_requests_were_missed(proxy: RunningProxy) -> None:
    history = proxy.history
    assert history is not None
    for _ in range(MAX_REQUESTS + 10):
        history.add(request().labels, RequestContext("GET", 0.0), 0.0)
    status = await get_json(proxy, f"/requests?after={history.instance}:3")
    assert (status["missed"], status["requests"][0]["number"], len(status["requests"])) == (7, 11, MAX_REQUESTS)


@pytest.mark.parametrize(
    "query", ["after=x:y", "after=x:-1", "limit=-1", "limit=many", "limit=", "after=x:" + "9" * 99]
)
async def test_an_invalid_cursor_is_rejected(proxy: RunningProxy, query: str) -> None:
    got = await get(proxy, f"/requests?{query}")
    assert (got.status, got.body) == (400, b"after must be the cursor of an earlier response, limit a number\n")


# Many accounts.


def many(count: int) -> Snapshot:
    rows = [
        (REFUSED if number % 20 == 0 else GOOD)._replace(account=f"seller-with-a-long-name-{number:05}")
        for number in range(count)
    ]
    rows.sort(key=lambda row: row.state != "failed")
    return seen([request(number=number) for number in range(MAX_REQUESTS)], rows, accounts=count)


def test_text_between_backticks_is_code() -> None:
    given = seen([request(), request(400, "BadOption")], errors=[ErrorRow("BadOption", 1, 1, MEANINGS["BadOption"])])
    text = render(given, diagnose(given))
    assert "An <code>x-sp-…</code> header has an invalid value, or its name is misspelt." in text
    assert text.count("<code>x-sp-…</code>") == 2  # among the other issues, and in the table of errors
    assert "`" not in text


@pytest.mark.parametrize("count", [1, 200, 2000, 20_000])
def test_the_page_and_its_json_are_bounded(count: int) -> None:
    given = many(count)
    text = render(given, diagnose(given))
    assert len(text) < 150_000
    assert text.count("</tr>") < 400
    assert len(json.dumps(given.as_json())) < 150_000
    assert len(given.as_json()["tokens"]) == min(count, MAX_TOKEN_ROWS)
    if count > 100:
        assert text.index("seller-with-a-long-name-00020") < text.index("without problems")


async def test_requests_are_served_while_the_page_is_rendered(proxy: RunningProxy) -> None:
    started, may_end = threading.Event(), threading.Event()

    def slow_plans() -> dict[tuple[str, str, str], PlanGauges]:
        started.set()
        assert may_end.wait(10)
        return {}

    proxy.metrics.read_plans = slow_plans
    pages = [asyncio.create_task(get(proxy, path)) for path in ("/", "/status")]
    assert await asyncio.to_thread(started.wait, 10)
    assert (await call(proxy.addresses[0], "GET", ORDERS)).status == 200
    assert not any(page.done() for page in pages)
    may_end.set()
    assert [(await page).status for page in pages] == [200, 200]


def test_the_configuration_of_these_tests_has_the_real_keys() -> None:
    assert set(CONFIGURATION) == set(ReloadStatus().as_json())
