"""A new client secret: asked for by command, used without a restart, and its age on a gauge."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

from proxy.server.gauges import CLIENT_SECRET_LIFETIME
from proxy.server.runtime import RunningProxy
from proxy.simulator import Fault, Settings, Simulator
from proxy.simulator.state import DEMO_CLIENT, DEMO_SECRET
from tests.conftest import StartProxy
from tests.support.proxy_process import command, serving
from tests.support.raw_client import call

SELLERS = "/sellers/v1/marketplaceParticipations"
REGIONS = ("na", "eu", "fe")


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    async with Simulator(Settings(token_lifetime=2.0)) as running:
        yield running


def settings(simulator: Simulator, secret: Path) -> dict[str, object]:
    secret.write_text(DEMO_SECRET)
    return {
        "listen": "127.0.0.1:0",
        "admin": None,
        "applications": {"main": {"client_id": DEMO_CLIENT, "client_secret": {"file": str(secret)}}},
        "accounts": {"demo": {"refresh_tokens": {"eu": "Atzr|demo-eu"}}},
        "endpoints": {name: simulator.endpoints[name] for name in (*REGIONS, "lwa")},
    }


def write(folder: Path, content: dict[str, object]) -> str:
    path = folder / "rotate.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


async def test_rotate_asks_amazon_and_says_what_comes_next(simulator: Simulator, tmp_path: Path) -> None:
    path = write(tmp_path, settings(simulator, tmp_path / "secret"))
    code, printed, complained = await command("rotate", "main", "--config", path)
    assert (code, complained) == (0, "")
    assert "SQS" in printed
    assert str(tmp_path / "secret") in printed
    assert DEMO_SECRET not in printed
    (entry,) = [entry for entry in simulator.journal if entry.service != "lwa"]
    assert (entry.service, entry.method, entry.target) == ("na", "POST", "/applications/2023-11-30/clientSecret")
    assert (entry.token_kind, entry.status) == ("grantless", 204)


async def test_rotate_says_what_was_wrong(simulator: Simulator, tmp_path: Path) -> None:
    content = settings(simulator, tmp_path / "secret")
    path = write(tmp_path, content)
    code, _, complained = await command("rotate", "other", "--config", path)
    assert (code, "known: main" in complained) == (2, True)
    body = '{"errors":[{"code":"QuotaExceeded","message":"You exceeded your quota for the requested resource."}]}'
    simulator.state.faults.append(Fault("status", service="na", status=429, body=body, times=1))
    code, _, complained = await command("rotate", "main", "--config", path)
    assert code == 1
    assert "429: QuotaExceeded You exceeded your quota" in complained
    assert "one rotation a minute" in complained
    (tmp_path / "secret").write_text("another")
    code, _, complained = await command("rotate", "main", "--config", path)
    assert (code, "refuses the application main: invalid_client" in complained) == (1, True)
    assert f"Look at applications.main.client_id and client_secret (from file {tmp_path}/secret)." in complained
    assert "Traceback" not in complained
    simulator.state.faults.append(Fault("reset", service="lwa"))
    code, _, complained = await command("rotate", "main", "--config", path)
    assert (code, "did not answer properly" in complained) == (1, True)


async def test_a_running_proxy_uses_a_rotated_secret_without_a_restart(simulator: Simulator, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    async with serving(settings(simulator, secret), tmp_path) as proxy:
        assert (await call(proxy.addresses[0], "GET", SELLERS)).status == 200
        simulator.state.clients[DEMO_CLIENT] = {"brand-new-secret"}
        simulator.state.tokens.clear()
        refused = await call(proxy.addresses[0], "GET", SELLERS)
        assert refused.status == 403, "no new token with the old secret: Amazon's refusal is passed on"
        replacement = tmp_path / "new"
        replacement.write_text("brand-new-secret\n")
        replacement.rename(secret)
        assert (await call(proxy.addresses[0], "GET", SELLERS)).status == 200
        assert "brand-new-secret" not in "".join(proxy.log)


async def test_a_gauge_says_how_old_the_secret_is(start_proxy: StartProxy) -> None:
    main = {"client_id": "client", "client_secret": "client-secret", "rotated_at": "2026-01-01"}
    other = {"client_id": "client", "client_secret": "client-secret"}
    accounts = {"acme": {"application": "main", "refresh_tokens": {"eu": "Atzr|acme"}}}
    proxy: RunningProxy = await start_proxy(applications={"main": main, "other": other}, accounts=accounts)

    def value(name: str, application: str) -> float | None:
        return proxy.metrics.registry.get_sample_value(f"spapi_proxy_{name}", {"application": application})

    made = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
    age = datetime.now(UTC).timestamp() - made
    assert value("client_secret_age_seconds", "main") == pytest.approx(age, abs=60)
    assert value("client_secret_expiry_timestamp_seconds", "main") == made + CLIENT_SECRET_LIFETIME
    assert value("client_secret_age_seconds", "other") is None
