"""Health, readiness and metrics: what probes and scrapes get, and who may ask."""

import asyncio
import shutil
import subprocess
import threading

import pytest

from proxy.server.runtime import RunningProxy
from tests.conftest import StartProxy, needs
from tests.support.fake_upstream import TokenHost, http_response
from tests.support.raw_client import call, connect

SELLERS = "/sellers/v1/marketplaceParticipations"


def admin(proxy: RunningProxy) -> str:
    assert proxy.admin is not None
    return proxy.admin


@pytest.mark.parametrize(
    "path", ["/livez", "/healthz", "/liveness", "/readyz", "/readiness", "/startupz", "/startup", "/metrics"]
)
async def test_a_healthy_proxy_responds_200(proxy: RunningProxy, path: str) -> None:
    got = await call(admin(proxy), "GET", path)
    assert got.status == 200
    assert (got.get("content-type") or "").startswith("text/plain")


async def test_the_apps_port_serves_no_metrics(proxy: RunningProxy) -> None:
    assert (await call(proxy.addresses[0], "GET", "/metrics")).decided["operation"] == "unknown"


async def test_readiness_waits_for_the_tokens_where_warm_up_is_set(
    start_proxy: StartProxy, token_host: TokenHost
) -> None:
    token_host.held = asyncio.Event()
    proxy = await start_proxy(warm_up=True)
    got = await call(admin(proxy), "GET", "/readyz")
    assert (got.status, got.body) == (503, b"not ready: the tokens (warm_up)\n")
    assert (await call(admin(proxy), "GET", "/livez")).status == 200
    assert (await call(admin(proxy), "GET", "/startupz")).status == 503
    token_host.held.set()
    await became_ready(proxy)
    assert len(token_host.received) == 1


async def became_ready(proxy: RunningProxy) -> None:
    """Poll until the proxy is ready; the test's own timeout is the bound."""
    while (await call(admin(proxy), "GET", "/readyz")).status != 200:
        pass


async def test_a_probe_makes_no_call(proxy: RunningProxy, token_host: TokenHost) -> None:
    await call(admin(proxy), "GET", "/readyz?verbose")
    assert not token_host.received


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "0.0.0.0", ""])
async def test_the_admin_address_accepts_local_names_only(proxy: RunningProxy, host: str) -> None:
    assert (await call(admin(proxy), "GET", "/metrics", host=host)).status == 421


async def test_the_admin_address_rejects_web_pages(proxy: RunningProxy) -> None:
    for fields in ({"origin": "https://evil.example"}, {"sec_fetch_site": "cross-site"}):
        got = await call(admin(proxy), "GET", "/metrics", **fields)
        assert got.status == 403
        assert not [name for name, _ in got.fields if name.lower().startswith("access-control")]


async def test_the_health_address_accepts_other_hosts_and_serves_nothing_else(start_proxy: StartProxy) -> None:
    proxy = await start_proxy(health="127.0.0.1:0")
    assert proxy.health is not None
    assert (await call(proxy.health, "GET", "/readyz", host="10.1.2.3")).status == 200
    assert (await call(proxy.health, "GET", "/metrics", host="10.1.2.3")).status == 200
    assert (await call(proxy.health, "GET", "/", host="10.1.2.3")).status == 404
    assert (await call(proxy.health, "POST", "/metrics", b"", host="10.1.2.3")).status == 405


async def test_openmetrics_is_sent_on_request(proxy: RunningProxy) -> None:
    got = await call(admin(proxy), "GET", "/metrics", accept="application/openmetrics-text; version=1.0.0")
    assert (got.get("content-type") or "").startswith("application/openmetrics-text")
    assert got.body.endswith(b"# EOF\n")


async def test_requests_are_served_during_a_scrape(proxy: RunningProxy) -> None:
    started, may_end = threading.Event(), threading.Event()

    def slow_series() -> None:
        started.set()
        assert may_end.wait(10)

    proxy.metrics.pre_scrape_hooks.append(slow_series)
    scrape = asyncio.create_task(call(admin(proxy), "GET", "/metrics"))
    assert await asyncio.to_thread(started.wait, 10)
    assert (await call(proxy.addresses[0], "GET", "/orders/v0/orders")).status == 200
    assert not scrape.done()
    may_end.set()
    assert (await scrape).status == 200


async def test_promtool_accepts_the_metrics(proxy: RunningProxy, token_host: TokenHost) -> None:
    needs(shutil.which("promtool") is not None, "promtool (Debian's package prometheus)")
    token_host.responses = [http_response("503 Service Unavailable")]
    await call(proxy.addresses[0], "GET", SELLERS)
    await call(proxy.addresses[0], "GET", "/mfn/v0/shipments/1")
    await call(proxy.addresses[0], "POST", "/feeds/2021-06-30/feeds", b"{}")
    text = (await call(admin(proxy), "GET", "/metrics")).body
    result = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, timeout=60, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")


@pytest.mark.parametrize(
    ("host", "is_accepted"),
    [
        ("127.0.0.1:9091", True),
        ("10.1.2.3:9091", True),
        ("[fd00::1]:9091", True),
        ("localhost", True),
        ("sp-api-proxy:9091", True),
        ("metrics.internal", True),
        ("evil.test", False),
        ("127.0.0.1.evil.test", False),
        ("", False),
        ("x@y", False),
    ],
)
async def test_the_health_address_accepts_hosts_that_no_web_page_can_have(
    start_proxy: StartProxy, host: str, is_accepted: bool
) -> None:
    proxy = await start_proxy(health="127.0.0.1:0", allowed_hosts=["metrics.internal"])
    assert proxy.health is not None
    got = await call(proxy.health, "GET", "/metrics", host=host)
    assert got.status == (200 if is_accepted else 421)
    got = await call(proxy.health, "GET", "/livez", origin="http://evil.test")
    assert got.status == 403


async def test_the_admin_address_rejects_forms(proxy: RunningProxy) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        assert (await call(admin(proxy), "POST", "/livez", b"x", content_type=kind)).status == 415
    assert (await call(admin(proxy), "POST", "/livez", b"{}", content_type="application/json")).status == 405
    assert (await call(admin(proxy), "POST", "/livez")).status == 405


async def test_the_admin_address_rejects_other_http_versions(proxy: RunningProxy) -> None:
    async with connect(admin(proxy)) as client:
        await client.send(b"GET /livez HTTP/2.0\r\nHost: localhost\r\n\r\n")
        assert (await client.reader.readline()).startswith(b"HTTP/1.1 505 ")
