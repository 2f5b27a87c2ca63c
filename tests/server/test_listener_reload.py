"""A new configuration in place of the one in force: what stays, what goes, and what a request in flight sees of it."""

import asyncio
import gc
import json
import re
import shutil
import socket
import weakref
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from proxy.config import Config, ConfigError
from proxy.server.runtime import RunningProxy
from proxy.server.sockets import CannotListen
from tests.conftest import StartProxy, config_from, settings_for
from tests.support.certificates import Authority
from tests.support.fake_upstream import FakeUpstream, Received, TokenHost, http_response
from tests.support.raw_client import call, connect, request

SELLERS = "/sellers/v1/marketplaceParticipations"
ADDRESS = "/orders/v0/orders/902-1845936-5435065/address"

ACME = {"refresh_tokens": {"eu": "Atzr|acme-eu"}}
OTHER = {"refresh_tokens": {"eu": "Atzr|other-eu"}}
BOTH = {"acme": ACME, "other": OTHER}


@pytest.fixture
def configured(fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path) -> Any:
    """Makes a Config of the tests' usual settings, changed by keywords."""

    def make(**changed: Any) -> Config:
        return config_from(settings_for(fake_upstream, token_host, **changed), tmp_path)

    return make


class Held:
    """A script of the far side that answers when it is told to."""

    def __init__(self) -> None:
        self.release = asyncio.Event()

    async def __call__(self, _: Received, writer: asyncio.StreamWriter) -> None:
        await self.release.wait()
        writer.write(http_response("200 OK", b"{}"))


async def test_a_request_of_an_account_that_leaves_completes_and_the_next_is_refused(
    start_proxy: StartProxy, fake_upstream: FakeUpstream, configured: Any
) -> None:
    proxy = await start_proxy(accounts=BOTH)
    fake_upstream.script = held = Held()
    async with connect(proxy.addresses[0]) as client:
        await client.send(request("GET", SELLERS, x_sp_account="other"))
        await fake_upstream.arrived.wait()
        assert (await proxy.apply_config(configured())).has_changed
        held.release.set()
        assert (await client.read_response()).status == 200
        assert (await client.request("GET", SELLERS, x_sp_account="other")).error == "UnknownAccount"
        assert (await client.request("GET", SELLERS, x_sp_account="acme")).status == 200


@pytest.mark.parametrize("path", [SELLERS, ADDRESS])
async def test_a_request_that_waits_for_its_token_when_its_account_leaves_completes(
    start_proxy: StartProxy, token_host: TokenHost, configured: Any, path: str
) -> None:
    proxy = await start_proxy(accounts=BOTH)
    token_host.held = asyncio.Event()
    waiting = asyncio.create_task(call(proxy.addresses[0], "GET", path, x_sp_account="other"))
    await token_host.arrived.wait()
    await proxy.apply_config(configured())
    await proxy.apply_config(configured(warm_up=True))
    token_host.held.set()
    assert (await waiting).status == 200


async def test_a_request_that_has_no_token_yet_when_its_account_leaves_gets_one(
    start_proxy: StartProxy, fake_upstream: FakeUpstream, token_host: TokenHost, configured: Any
) -> None:
    proxy = await start_proxy(accounts=BOTH)
    refused = http_response(
        "403 Forbidden", b'{"errors":[{"code":"Unauthorized","message":"The access token expired"}]}'
    )
    release, scripted = asyncio.Event(), [refused, http_response("200 OK", b"{}")]

    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        await release.wait()
        writer.write(scripted.pop(0))

    fake_upstream.script = script
    waiting = asyncio.create_task(call(proxy.addresses[0], "GET", SELLERS, x_sp_account="other"))
    await fake_upstream.arrived.wait()
    await proxy.apply_config(configured())
    release.set()
    assert (await waiting).status == 200
    assert b"Atzr%7Cother-eu" in token_host.received[-1].body
    assert len(token_host.received) == 2


async def test_tokens_of_unchanged_accounts_are_kept(
    start_proxy: StartProxy, token_host: TokenHost, configured: Any
) -> None:
    proxy = await start_proxy(accounts=BOTH)
    for account in BOTH:
        await call(proxy.addresses[0], "GET", SELLERS, x_sp_account=account)
    await call(proxy.addresses[0], "GET", ADDRESS, x_sp_account="acme")
    await proxy.apply_config(configured(accounts={"acme": ACME, "third": OTHER}, limits={"max_wait": "3s"}))
    assert len(token_host.received) == 2
    for path in (SELLERS, ADDRESS):
        assert (await call(proxy.addresses[0], "GET", path, x_sp_account="acme")).status == 200
    assert len(token_host.received) == 2


@pytest.mark.parametrize("path", [SELLERS, ADDRESS])
async def test_a_changed_refresh_token_brings_a_token_of_its_own(
    start_proxy: StartProxy, fake_upstream: FakeUpstream, token_host: TokenHost, configured: Any, path: str
) -> None:
    proxy = await start_proxy()
    await call(proxy.addresses[0], "GET", path)
    before = fake_upstream.received[-1].get("x-amz-access-token")
    await proxy.apply_config(configured(accounts={"acme": {"refresh_tokens": {"eu": "Atzr|acme-new"}}}))
    await call(proxy.addresses[0], "GET", path)
    assert fake_upstream.received[-1].get("x-amz-access-token") != before
    assert b"Atzr%7Cacme-new" in token_host.received[-1].body


async def test_an_account_that_comes_back_as_another_has_none_of_its_old_tokens(
    start_proxy: StartProxy, token_host: TokenHost, configured: Any
) -> None:
    proxy = await start_proxy(accounts=BOTH)
    await call(proxy.addresses[0], "GET", SELLERS, x_sp_account="other")
    await proxy.apply_config(configured())
    await proxy.apply_config(configured(accounts={"acme": ACME, "other": {"refresh_tokens": {"eu": "Atzr|other-new"}}}))
    await call(proxy.addresses[0], "GET", SELLERS, x_sp_account="other")
    assert b"Atzr%7Cother-new" in token_host.received[-1].body


@pytest.mark.parametrize("path", [SELLERS, "/notifications/v1/destinations"])
async def test_a_changed_client_id_brings_tokens_of_its_own(
    start_proxy: StartProxy, token_host: TokenHost, configured: Any, path: str
) -> None:
    proxy = await start_proxy()
    await call(proxy.addresses[0], "GET", path, x_sp_region="eu")
    await proxy.apply_config(configured(applications={"main": {"client_id": "new", "client_secret": "client-secret"}}))
    await call(proxy.addresses[0], "GET", path, x_sp_region="eu")
    assert b"client_id=new" in token_host.received[-1].body
    assert len(token_host.received) == 2


async def test_after_a_changed_client_secret_old_tokens_serve_and_the_next_exchange_uses_it(
    start_proxy: StartProxy, token_host: TokenHost, configured: Any
) -> None:
    proxy = await start_proxy()
    await call(proxy.addresses[0], "GET", SELLERS)
    await proxy.apply_config(
        configured(applications={"main": {"client_id": "client", "client_secret": "client-secret-2"}}, accounts=BOTH)
    )
    await call(proxy.addresses[0], "GET", SELLERS, x_sp_account="acme")
    assert len(token_host.received) == 1
    await call(proxy.addresses[0], "GET", SELLERS, x_sp_account="other")
    assert b"client_secret=client-secret-2" in token_host.received[-1].body


async def test_an_exchange_that_began_with_an_old_refresh_token_serves_only_who_waits_for_it(
    start_proxy: StartProxy, fake_upstream: FakeUpstream, token_host: TokenHost, configured: Any
) -> None:
    proxy = await start_proxy()
    token_host.held = asyncio.Event()
    grants = [json.dumps({"access_token": f"Atza|{name}", "expires_in": 3600}).encode() for name in ("new", "old")]
    token_host.responses = [http_response("200 OK", grant, content_type="application/json") for grant in grants]
    old = asyncio.create_task(call(proxy.addresses[0], "GET", SELLERS))
    await token_host.arrived.wait()
    await proxy.apply_config(configured(accounts={"acme": {"refresh_tokens": {"eu": "Atzr|acme-new"}}}))
    old_exchange, token_host.held = token_host.held, None
    assert (await call(proxy.addresses[0], "GET", SELLERS)).status == 200
    old_exchange.set()
    assert (await old).status == 200
    assert {one.get("x-amz-access-token") for one in fake_upstream.received} == {"Atza|old", "Atza|new"}
    await call(proxy.addresses[0], "GET", SELLERS)
    assert fake_upstream.received[-1].get("x-amz-access-token") == "Atza|new"
    assert len(token_host.received) == 2


async def test_usage_plans_and_counters_go_on(
    start_proxy: StartProxy, fake_upstream: FakeUpstream, configured: Any
) -> None:
    proxy = await start_proxy()

    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(http_response("429 Too Many Requests", b"{}"))

    fake_upstream.script = script
    await call(proxy.addresses[0], "GET", SELLERS, x_sp_max_wait="0s")
    await proxy.apply_config(configured(limits={"max_queue": 7}))
    fake_upstream.script = None
    got = await call(proxy.addresses[0], "GET", SELLERS, x_sp_max_wait="0s")
    assert got.error == "UsagePlanExhausted"
    counted = proxy.metrics.registry.get_sample_value(
        "spapi_proxy_upstream_throttled_total",
        {"account": "acme", "region": "eu", "operation": "sellers.v1.getMarketplaceParticipations"},
    )
    assert counted == 1


async def test_the_same_again_changes_nothing(start_proxy: StartProxy, configured: Any) -> None:
    proxy = await start_proxy()
    assert await proxy.apply_config(configured()) == (False, ())


async def test_a_connection_that_stays_open_sees_the_new_settings(start_proxy: StartProxy, configured: Any) -> None:
    proxy = await start_proxy()
    async with connect(proxy.addresses[0]) as client:
        assert (await client.request("GET", SELLERS)).status == 200
        await proxy.apply_config(configured(callers={"app": {"key": "a-key"}}))
        assert (await client.request("GET", SELLERS)).error == "CallerRefused"
        assert (await client.request("GET", SELLERS, x_sp_key="a-key")).status == 200


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


async def test_listeners_come_and_go_and_requests_in_flight_on_one_that_goes_complete(
    start_proxy: StartProxy, fake_upstream: FakeUpstream, configured: Any, tmp_path: Path
) -> None:
    socket_path = f"unix:{tmp_path}/going.sock"
    proxy = await start_proxy(listen=["127.0.0.1:0", socket_path])
    held = Held()
    coming = f"127.0.0.1:{free_port()}"
    async with (
        connect(socket_path) as client,
        connect(socket_path) as idle_there,
        connect(proxy.addresses[0]) as idle,
    ):
        assert (await idle_there.request("GET", "/other")).error is None
        fake_upstream.script = held
        fake_upstream.arrived.clear()
        await client.send(request("GET", SELLERS))
        await fake_upstream.arrived.wait()
        await proxy.apply_config(configured(listen=[coming, "127.0.0.1:0"]))
        with pytest.raises(ConnectionRefusedError):
            await call(socket_path, "GET", SELLERS)
        assert await idle_there.at_end()
        held.release.set()
        assert (await client.read_response()).status == 200
        assert await client.at_end()
        assert (await call(coming, "GET", SELLERS)).status == 200
        assert (await idle.request("GET", SELLERS)).status == 200


async def test_an_address_that_cannot_be_had_leaves_everything_as_it_was(
    start_proxy: StartProxy, token_host: TokenHost, configured: Any
) -> None:
    proxy = await start_proxy()
    other = {"acme": {"refresh_tokens": {"eu": "Atzr|acme-new"}}, "other": OTHER}
    fine = f"127.0.0.1:{free_port()}"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        in_use = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(CannotListen, match="stop what uses it, or change listen\\[1\\]"):
            await proxy.apply_config(configured(listen=[fine, in_use], accounts=other))
    with pytest.raises(ConnectionRefusedError):
        await call(fine, "GET", SELLERS)
    assert (await call(proxy.addresses[0], "GET", SELLERS, x_sp_account="acme")).status == 200
    assert b"Atzr%7Cacme-eu" in token_host.received[-1].body
    assert (await call(proxy.addresses[0], "GET", SELLERS, x_sp_account="other")).error == "UnknownAccount"


async def test_what_needs_a_restart_is_named_and_left_as_it_is(start_proxy: StartProxy, configured: Any) -> None:
    proxy = await start_proxy()
    done = await proxy.apply_config(
        configured(
            admin="127.0.0.1:1",
            health="127.0.0.1:0",
            log={"format": "json", "level": "error"},
            metrics={"account_on_histograms": True},
            store="redis://127.0.0.1:9",
            store_key="k" * 40,
            audit="/nowhere/audit.log",
        )
    )
    assert set(done.needs_restart) == {"admin", "health", "log.format", "metrics", "store", "store_key", "audit"}
    assert (await call(proxy.addresses[0], "GET", SELLERS)).status == 200


@pytest.mark.parametrize("change", ["tls", "mode", "endpoints"])
async def test_what_would_mean_something_else_without_a_restart_is_refused_with_all_the_rest(
    start_proxy: StartProxy, configured: Any, tmp_path: Path, change: str
) -> None:
    authority = Authority.made(tmp_path)
    certificate, key = authority.issue("proxy")
    unix = f"unix:{tmp_path}/app.sock"
    plain: list[Any] = ["127.0.0.1:0", unix]
    callers = {"job": {"key": "a-key-of-the-job"}}
    proxy = await start_proxy(listen=plain, callers=callers)
    tls = {"certificate": str(certificate), "key": str(key), "client_ca": str(authority.certificate)}
    changes: dict[str, tuple[str, dict[str, Any]]] = {
        "tls": ("listen[0].tls", {"listen": [{"address": "127.0.0.1:0", "tls": tls}, unix]}),
        "mode": ("listen[1].mode", {"listen": ["127.0.0.1:0", {"address": unix, "mode": "0666"}]}),
        "endpoints": ("endpoints", {"listen": plain, "endpoints": {"lwa": "http://127.0.0.1:9/"}}),
    }
    named, changed = changes[change]
    with pytest.raises(ConfigError, match=re.escape(named)):
        await proxy.apply_config(configured(**changed))
    assert (await call(proxy.addresses[0], "GET", SELLERS)).error == "CallerRefused", "the callers are those of before"


async def test_a_refused_configuration_leaves_the_connections_to_amazon_alone(
    start_proxy: StartProxy, fake_upstream: FakeUpstream, configured: Any
) -> None:
    proxy = await start_proxy()
    assert (await call(proxy.addresses[0], "GET", SELLERS)).status == 200
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = ["127.0.0.1:0", f"127.0.0.1:{taken.getsockname()[1]}"]
        with pytest.raises(CannotListen):
            await proxy.apply_config(configured(listen=listen, timeouts={"connect": "3s"}))
    for _ in range(3):
        assert (await call(proxy.addresses[0], "GET", SELLERS)).status == 200
    assert len({received.connection for received in fake_upstream.received}) == 1


async def test_another_content_of_the_authority_that_is_trusted_is_a_change(
    start_proxy: StartProxy, configured: Any, tmp_path: Path
) -> None:
    trusted = tmp_path / "ca.pem"
    shutil.copyfile(Authority.made(tmp_path).certificate, trusted)
    settings = {"pool": {"ca_file": str(trusted)}}
    proxy = await start_proxy(**settings)
    assert not (await proxy.apply_config(configured(**settings))).has_changed
    (tmp_path / "new").mkdir()
    shutil.copyfile(Authority.made(tmp_path / "new").certificate, trusted)
    assert (await proxy.apply_config(configured(**settings))).has_changed
    assert not (await proxy.apply_config(configured(**settings))).has_changed


async def test_a_restricted_token_that_was_minted_for_somebody_else_is_kept_for_nobody(
    start_proxy: StartProxy, fake_upstream: FakeUpstream, token_host: TokenHost, configured: Any, tmp_path: Path
) -> None:
    secret = tmp_path / "refresh-token"
    secret.write_text("Atzr|one")
    secret.chmod(0o600)
    accounts = {"acme": {"refresh_tokens": {"eu": {"file": str(secret)}}, "data_elements": ["buyerInfo"]}}
    proxy = await start_proxy(accounts=accounts)
    assert (await call(proxy.addresses[0], "GET", SELLERS)).status == 200
    secret.write_text("Atzr|two")
    orders = "/orders/v0/orders"
    assert (await call(proxy.addresses[0], "GET", orders)).decided["token"] == "rdt"
    assert (await proxy.apply_config(configured(accounts=accounts))).has_changed
    assert (await call(proxy.addresses[0], "GET", orders)).decided["token"] == "rdt"
    assert len(fake_upstream.minted) == 2, "the one that was minted with the token of before is not used"
    assert fake_upstream.minted[0].get("x-amz-access-token") != fake_upstream.minted[1].get("x-amz-access-token")
    assert len(token_host.received) == 2


async def test_other_settings_of_the_way_out_leave_requests_in_flight_alone(
    start_proxy: StartProxy, fake_upstream: FakeUpstream, configured: Any
) -> None:
    proxy = await start_proxy()
    fake_upstream.script = held = Held()
    async with connect(proxy.addresses[0]) as client:
        await client.send(request("GET", SELLERS))
        await fake_upstream.arrived.wait()
        await proxy.apply_config(configured(pool={"idle": "1s"}))
        held.release.set()
        assert (await client.read_response()).status == 200
        assert (await client.request("GET", SELLERS)).status == 200
    assert len({one.connection for one in fake_upstream.received}) == 2


async def test_certificates_that_cannot_be_used_to_trust_are_refused(
    proxy: RunningProxy, configured: Any, tmp_path: Path
) -> None:
    (tmp_path / "ca.pem").write_text("no certificate", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"pool\.ca_file: cannot be used"):
        await proxy.apply_config(configured(pool={"ca_file": str(tmp_path / "ca.pem")}))
    assert (await call(proxy.addresses[0], "GET", SELLERS)).status == 200


async def test_configurations_that_nobody_uses_any_more_are_let_go(start_proxy: StartProxy, configured: Any) -> None:
    proxy = await start_proxy()
    earlier: list[weakref.ref[Config]] = []
    async with connect(proxy.addresses[0]) as client:
        for number in range(5):
            config = configured(accounts=BOTH, limits={"max_queue": 10 + number}, pool={"idle": f"{number + 1}s"})
            earlier.append(weakref.ref(config))
            await proxy.apply_config(config)
            assert (await client.request("GET", SELLERS, x_sp_account="other")).status == 200
        del config
    gc.collect()
    assert [one() is None for one in earlier] == [True] * 4 + [False]


async def test_the_age_of_a_secret_leaves_with_its_application(start_proxy: StartProxy, configured: Any) -> None:
    main = {"client_id": "client", "client_secret": "client-secret", "rotated_at": "2026-01-01"}
    proxy = await start_proxy(applications={"main": main})
    name = "spapi_proxy_client_secret_age_seconds"
    assert proxy.metrics.registry.get_sample_value(name, {"application": "main"})
    await proxy.apply_config(configured())
    assert proxy.metrics.registry.get_sample_value(name, {"application": "main"}) is None


async def test_a_lower_log_level_counts_from_now_on(start_proxy: StartProxy, configured: Any, log: StringIO) -> None:
    proxy = await start_proxy()
    await proxy.apply_config(configured(log={"level": "error"}))
    log.truncate(0)
    await call(proxy.addresses[0], "GET", SELLERS)
    assert not log.getvalue()


async def test_a_host_name_that_is_allowed_from_now_on_counts_everywhere(
    start_proxy: StartProxy, configured: Any
) -> None:
    proxy = await start_proxy(health="127.0.0.1:0")
    addresses = [(proxy.addresses[0], SELLERS), (proxy.admin or "", "/livez"), (proxy.health or "", "/livez")]
    for address, path in addresses:
        assert (await call(address, "GET", path, host="proxy.example")).status == 421
    await proxy.apply_config(configured(health="127.0.0.1:0", allowed_hosts=["proxy.example"]))
    for address, path in addresses:
        assert (await call(address, "GET", path, host="proxy.example")).status == 200
