"""Queries of rules and dashboard against a real Prometheus that scrapes two proxies under light traffic."""

import asyncio
import json
import math
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml

from proxy.observability.logging import dropped_lines
from proxy.server.runtime import RunningProxy, start_proxy
from proxy.simulator import Fault, Simulator
from tests.conftest import config_from, needs
from tests.project.test_alert_rules import PROMETHEUS, RECORDED, queries
from tests.support.promql import queried
from tests.support.raw_client import call

SELLERS = "/sellers/v1/marketplaceParticipations"
ORDER = "/orders/v0/orders/1"
DESTINATIONS = "/notifications/v1/destinations"
DOCUMENTS = "/feeds/2021-06-30/documents"

# Events that do not happen in this test: lost log lines, connections closed at the limit, store failures,
# exceptions that nothing handled.
EXPECTED_EMPTY = {
    "spapi_proxy_client_connections_closed_total",
    "spapi_proxy_internal_errors_total",
    "spapi_proxy_log_lines_lost_total",
    "spapi_proxy_store_failures_total",
    "spapi_proxy_store_values_ignored_total",
}


@asynccontextmanager
async def scraping(targets: list[str], folder: Path) -> AsyncIterator[str]:
    """Run Prometheus with the project's rules for `targets`; yield its address."""
    program = shutil.which("prometheus")
    needs(program is not None, "prometheus (Debian's package prometheus)")
    assert program is not None
    settings = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8"))
    settings["global"] = {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"}
    settings["rule_files"] = [str(PROMETHEUS / "rules" / "*.yml")]
    settings["scrape_configs"][0]["static_configs"][0]["targets"] = targets
    del settings["scrape_configs"][1:]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    process = await asyncio.create_subprocess_exec(
        program,
        *(f"--config.file={path}", f"--storage.tsdb.path={folder / 'tsdb'}", f"--web.listen-address={address}"),
        "--log.level=error",
    )
    try:
        yield address
    finally:
        process.terminate()
        await asyncio.wait_for(process.wait(), 20)


async def ask(address: str, path: str) -> Any:
    """Return the data of a response of Prometheus; None while it is not ready."""
    try:
        got = await call(address, "GET", f"/api/v1/{path}")
    except OSError:
        return None
    said = json.loads(got.body) if got.status != 503 else {"data": None}
    assert got.status in {200, 503}, said
    return said["data"]


async def finds(address: str, expression: str) -> bool:
    """Return whether an expression has a numeric value."""
    data = await ask(address, f"query?query={quote(expression)}")
    return data is not None and any(not math.isnan(float(one["value"][1])) for one in data["result"])


async def send_varied_traffic(proxy: RunningProxy, simulator: Simulator) -> None:
    """Send one call of each kind, successful and failing."""
    app = proxy.addresses[0]
    faults = simulator.state.faults
    for target, fields in (
        (SELLERS, {}),
        (ORDER, {"x_sp_data_elements": "buyerInfo"}),
        (ORDER, {"x_sp_data_elements": "shippingAddress"}),
        (DESTINATIONS, {}),
        ("/brand/new", {"x_amz_access_token": "of-the-app"}),
        (SELLERS, {"x_sp_account": "nobody"}),
        (SELLERS, {"x_sp_max_wait": "0"}),
    ):
        await call(app, "GET", target, None, **{"x_sp_region": "eu", **fields})
    await call(app, "POST", DOCUMENTS, b'{"contentType":"text/tab-separated-values"}', x_sp_region="eu")
    for status, retry in ((503, "off"), (503, "on"), (429, "on"), (403, "on")):
        faults.append(Fault("status", service="na", status=status, times=1))
        await call(app, "GET", "/brand/new", x_sp_region="na", **({"x_sp_retry": "off"} if retry == "off" else {}))


async def exceed_usage_plan(proxy: RunningProxy) -> None:
    """Exceed the usage plan, so that some calls are rejected."""
    for _ in range(20):
        await call(proxy.addresses[0], "GET", SELLERS, x_sp_region="fe", x_sp_max_wait="0")


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    async with Simulator() as started:
        started.state.elements = {"buyerInfo"}
        started.state.lifetime = 3.0  # seconds, so that tokens are exchanged continuously
        yield started


@pytest.fixture
async def proxies(simulator: Simulator, tmp_path: Path) -> AsyncIterator[list[RunningProxy]]:
    settings = {
        "listen": "127.0.0.1:0",
        "admin": None,
        "health": "127.0.0.1:0",
        "applications": {
            "main": {
                "client_id": "amzn1.application-oa2-client.simulator",
                "client_secret": "amzn1.oa2-cs.v1.simulator",
                "rotated_at": date(2026, 1, 1),
            }
        },
        "accounts": {"demo": {"refresh_tokens": {region: f"Atzr|demo-{region}" for region in ("na", "eu", "fe")}}},
        "limits": {"max_wait": "100ms"},
        "endpoints": {name: simulator.endpoints[name] for name in ("na", "eu", "fe", "lwa", "documents")},
        "documents": "relay",
    }
    dropped_lines.clear()  # counts of other tests in this process
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(start_proxy(config_from(settings, tmp_path))) for _ in range(2)]


async def test_every_query_returns_a_series_after_its_event(
    proxies: list[RunningProxy], simulator: Simulator, tmp_path: Path
) -> None:
    targets = [proxy.health for proxy in proxies if proxy.health]
    wanted = {*RECORDED, *(text for _, text in queries())}
    silent = {text for text in wanted if {one.name for one in queried(text)} <= EXPECTED_EMPTY}
    missing = wanted - silent
    async with scraping(targets, tmp_path) as prometheus:
        until = asyncio.get_running_loop().time() + 40
        for proxy in proxies:
            await exceed_usage_plan(proxy)
        while missing and asyncio.get_running_loop().time() < until:
            for proxy in proxies:
                await send_varied_traffic(proxy, simulator)
            missing -= {text for text in missing if await finds(prometheus, text)}
            await asyncio.sleep(0.3)  # Prometheus scrapes every half second
        assert not missing
        for text in silent:
            assert not await finds(prometheus, text), f"has a value: {text}"
        groups = (await ask(prometheus, "rules"))["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}, [rule.get("lastError") for rule in rules]
    assert len(rules) == len(RECORDED) + len([rule for rule in rules if rule["type"] == "alerting"]) > 30
