"""The status page and its like for programs: what they say, to whom, and how large they may become."""

import asyncio
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proxy.observability.metrics import PlanGauges
from proxy.observability.request_history import MAX_REQUESTS
from proxy.server.admin import status_page
from proxy.server.admin.app import ReloadStatus
from proxy.server.admin.diagnosis import diagnose
from proxy.server.admin.snapshot import MAX_ROWS, MEANINGS, ErrorRow, Snapshot
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


async def ask(proxy: RunningProxy, path: str, **fields: str) -> RawResponse:
    assert proxy.admin is not None
    return await call(proxy.admin, "GET", path, **fields)


async def asked(proxy: RunningProxy, path: str) -> Any:
    got = await ask(proxy, path)
    assert (got.status, got.get("content-type")) == (200, "application/json; charset=utf-8")
    return json.loads(got.body)


async def test_the_page_says_what_happened(proxy: RunningProxy, fake_upstream: FakeUpstream) -> None:
    assert "no request came" in (await ask(proxy, "/")).body.decode()
    await call(proxy.addresses[0], "GET", ORDERS)
    await call(proxy.addresses[0], "GET", ORDERS, x_sp_account="nobody")
    text = (await ask(proxy, "/")).body.decode()
    assert '<h2 id="verdict-title">Working</h2>' in text
    assert "1 of 2 requests lately: UnknownAccount. The account is not in the configuration." in text
    assert "<em>(yours)</em> Check its spelling; <code>check</code> lists the accounts." in text
    assert "GET orders.v0.getOrders" in text
    assert "UnknownAccount" in text
    assert ">acme</a>" in text
    assert "nobody" not in text
    assert fake_upstream.received


@pytest.mark.parametrize("path", SHOWN)
async def test_all_of_it_is_for_local_eyes_alone(proxy: RunningProxy, path: str) -> None:
    got = await ask(proxy, path)
    assert (got.status, got.get("x-content-type-options"), got.get("cache-control")) == (200, "nosniff", "no-store")
    for host in ("evil.example", "127.0.0.1.evil.example", "0.0.0.0", ""):
        assert (await ask(proxy, path, host=host)).status == 421
    for fields in (
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
    ):
        got = await ask(proxy, path, **fields)
        assert (got.status, got.body) == (403, b"not for web pages, nor links on them: type this address in yourself\n")
    assert (await ask(proxy, path, sec_fetch_site="same-origin")).status == 200


async def test_the_health_address_has_none_of_it(start_proxy: StartProxy) -> None:
    proxy = await start_proxy(health="127.0.0.1:0")
    assert proxy.health is not None
    assert {(await call(proxy.health, "GET", path)).status for path in SHOWN} == {404}


async def test_the_page_may_load_nothing_from_elsewhere(proxy: RunningProxy) -> None:
    got = await ask(proxy, "/")
    assert got.get("content-type") == "text/html; charset=utf-8"
    assert got.get("content-security-policy") == (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    assert got.get("referrer-policy") == "no-referrer"
    assert got.get("cross-origin-resource-policy") == "same-origin"
    assert {name: (await ask(proxy, f"/{name}")).get("content-type") for name in status_page.FILES} == {
        "page.css": "text/css; charset=utf-8",
        "page.js": "text/javascript; charset=utf-8",
    }


def test_every_text_is_escaped() -> None:
    row = REFUSED._replace(account=ATTACK, application=ATTACK, region=ATTACK, reason=ATTACK, error=ATTACK, do=ATTACK)
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
        secrets_left={ATTACK: 1.0},
    )
    for state in ("ready", "starting"):
        text = render(replace(full, state=state), diagnose(replace(full, state=state)), account=ATTACK)
        assert text.count("<script") == 1  # its own
        assert text.count("&lt;script&gt;") > 10
        assert ATTACK not in text


async def test_a_mistake_in_the_configuration_is_shown_and_does_nothing(
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
        assert "There is none of that name." in text


async def mended(proxy: RunningProxy) -> None:
    """Call until the pause after a refused exchange is over; the test's own timeout is the bound."""
    while (await call(proxy.addresses[0], "GET", ORDERS)).status != 200:
        pass


@pytest.mark.parametrize("path", SHOWN)
async def test_nothing_secret_and_nothing_of_a_request_is_shown(
    path: str, proxy: RunningProxy, fake_upstream: FakeUpstream, token_host: TokenHost
) -> None:
    refusal = b'{"error": "invalid_grant", "request_id": "amazon-id-1", "error_description": "of Atzr|acme-eu"}'
    token_host.answers = [http_response("400 Bad Request", refusal, content_type="application/json")]
    await call(proxy.addresses[0], "GET", ORDERS)
    refused = (await ask(proxy, path)).body.decode()
    assert ("invalid_grant" in refused) == (path in {"/", "/status"})
    await mended(proxy)
    fake_upstream.rdt_answer = http_response(
        "403 Forbidden", b'{"errors": [{"message": "of order 902-1845936-5435065"}]}'
    )
    await call(proxy.addresses[0], "GET", ORDER, x_request_id="app-id-1")
    await call(proxy.addresses[0], "GET", "/tokens/902-1845936-5435065", x_request_id="app-id-1")
    body = refused + (await ask(proxy, path)).body.decode()
    assert fake_upstream.minted
    for secret in ("Atza|", "Atzr|", "client-secret", "902-1845936", "secret-query", "app-id-1", "amazon-id-1"):
        assert secret not in body


async def test_status_says_what_the_page_shows(proxy: RunningProxy, token_host: TokenHost) -> None:
    fresh = await asked(proxy, "/status")
    assert [row["state"] for row in fresh["tokens"]] == ["unused"]
    await call(proxy.addresses[0], "GET", ORDERS)
    said = await asked(proxy, "/status")
    assert (said["state"], said["accounts"], said["requests_in_flight"]) == ("ready", 1, 0)
    (row,) = said["tokens"]
    assert (row["account"], row["region"], row["state"], row["last_exchange"]) == ("acme", "eu", "good", "ok")
    assert 3000 < row["seconds_left"] < 3600
    assert said["verdict"]["state"] == "working"
    assert (await asked(proxy, "/status?account=other"))["tokens"] == []
    assert len(token_host.received) == 1


async def test_an_account_whose_credentials_are_refused_comes_first(
    start_proxy: StartProxy, token_host: TokenHost
) -> None:
    accounts = {f"a{number}": {"refresh_tokens": {"eu": f"Atzr|a{number}"}} for number in range(30)}
    proxy = await start_proxy(accounts=accounts)
    await call(proxy.addresses[0], "GET", ORDERS, x_sp_account="a3")
    token_host.answers = [
        http_response("400 Bad Request", b'{"error": "invalid_grant"}', content_type="application/json")
    ]
    await call(proxy.addresses[0], "GET", ORDERS, x_sp_account="a7")
    said = await asked(proxy, "/status")
    first, second, *_ = said["tokens"]
    assert (first["account"], first["state"], first["reason"]) == ("a7", "failed", "invalid_grant")
    assert (second["account"], second["state"]) == ("a3", "good")
    assert said["tokens_by_state"] == {"failed": 1, "failing": 0, "fetching": 0, "good": 1, "unused": 28}
    assert "a7 in eu" in said["verdict"]["says"]
    assert (said["verdict"]["state"], said["verdict"]["whose"]) == ("degraded", "yours")


async def test_a_usage_plan_that_is_short_is_shown(start_proxy: StartProxy) -> None:
    proxy = await start_proxy(limits={"max_wait": "0"})
    for _ in range(21):
        await call(proxy.addresses[0], "GET", ORDERS)
    (row,) = (await asked(proxy, "/status"))["usage_plans"]
    assert (row["account"], row["operation"], row["refused"]) == ("acme", "orders.v0.getOrders", 1)
    assert row["tokens"] < 1
    assert "orders.v0.getOrders" in (await ask(proxy, "/")).body.decode().partition('id="plan-rows"')[2]


# Recent requests, for programs.


async def test_requests_are_asked_for_from_where_one_stopped(proxy: RunningProxy) -> None:
    for _ in range(3):
        await call(proxy.addresses[0], "GET", ORDERS)
    said = await asked(proxy, "/requests")
    assert [one["number"] for one in said["requests"]] == [1, 2, 3]
    last = said["requests"][-1]
    assert (last["status"], last["operation"], last["account"]) == (200, "orders.v0.getOrders", "acme")
    assert last["duration"] >= last["upstream"] > 0
    assert (await asked(proxy, f"/requests?after={said['cursor']}"))["requests"] == []
    await call(proxy.addresses[0], "GET", ORDERS)
    more = await asked(proxy, f"/requests?after={said['cursor']}")
    assert ([one["number"] for one in more["requests"]], more["missed"]) == ([4], 0)
    assert [one["number"] for one in (await asked(proxy, "/requests?limit=2"))["requests"]] == [3, 4]
    assert (await asked(proxy, "/requests?limit=0"))["requests"] == []
    other = await asked(proxy, "/requests?after=of-another-start:3")
    assert ([one["number"] for one in other["requests"]], other["missed"]) == ([1, 2, 3, 4], 0)


async def test_who_comes_late_learns_how_many_were_missed(proxy: RunningProxy) -> None:
    recent = proxy.metrics.history
    assert recent is not None
    for _ in range(MAX_REQUESTS + 10):
        recent.append((recent.number(), request().labels, "", 0.0, 0.0, 0.0, 0.0, None, 1, "", ""))
    said = await asked(proxy, f"/requests?after={recent.instance}:3")
    assert (said["missed"], said["requests"][0]["number"], len(said["requests"])) == (7, 11, MAX_REQUESTS)


@pytest.mark.parametrize(
    "query", ["after=x:y", "after=x:-1", "limit=-1", "limit=many", "limit=", "after=x:" + "9" * 99]
)
async def test_a_cursor_that_is_none_is_refused(proxy: RunningProxy, query: str) -> None:
    got = await ask(proxy, f"/requests?{query}")
    assert (got.status, got.body) == (400, b"after is the cursor of an earlier answer, limit a number\n")


# Many accounts.


def many(count: int) -> Snapshot:
    rows = [
        (REFUSED if number % 20 == 0 else GOOD)._replace(account=f"seller-with-a-long-name-{number:05}")
        for number in range(count)
    ]
    rows.sort(key=lambda row: row.state != "failed")
    return seen([request(number=number) for number in range(MAX_REQUESTS)], rows, accounts=count)


def test_what_stands_between_backticks_is_code() -> None:
    given = seen([request(), request(400, "BadOption")], errors=[ErrorRow("BadOption", 1, 1, MEANINGS["BadOption"])])
    text = render(given, diagnose(given))
    assert "An <code>x-sp-…</code> header holds a value that means nothing, or its name is misspelt." in text
    assert text.count("<code>x-sp-…</code>") == 2  # to know as well, and in the table of errors
    assert "`" not in text


@pytest.mark.parametrize("count", [1, 200, 2000, 20_000])
def test_the_page_and_its_json_are_bounded(count: int) -> None:
    given = many(count)
    text = render(given, diagnose(given))
    assert len(text) < 150_000
    assert text.count("</tr>") < 400
    assert len(json.dumps(given.as_json())) < 150_000
    assert len(given.as_json()["tokens"]) == min(count, MAX_ROWS)
    if count > 100:
        assert text.index("seller-with-a-long-name-00020") < text.index("without trouble")


async def test_requests_are_served_while_the_page_is_made(proxy: RunningProxy) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def slow_plans() -> dict[tuple[str, str, str], PlanGauges]:
        begun.set()
        assert may_end.wait(10)
        return {}

    proxy.metrics.read_plans = slow_plans
    looks = [asyncio.create_task(ask(proxy, path)) for path in ("/", "/status")]
    assert await asyncio.to_thread(begun.wait, 10)
    assert (await call(proxy.addresses[0], "GET", ORDERS)).status == 200
    assert not any(look.done() for look in looks)
    may_end.set()
    assert [(await look).status for look in looks] == [200, 200]


def test_the_configuration_of_the_test_is_what_a_proxy_has() -> None:
    assert set(CONFIGURATION) == set(ReloadStatus().as_json())
