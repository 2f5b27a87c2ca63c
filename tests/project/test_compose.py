"""docker-compose.yml, as docker compose itself parses it."""

import base64
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from proxy.config import Config, load_config
from tests.project.test_image import program
from tests.support.paths import ROOT
from tests.support.proxy_process import started
from tests.support.raw_client import call

CREDENTIALS = {
    "LWA_APP_ID": "amzn1.application-oa2-client.example",
    "LWA_CLIENT_SECRET": "client-secret",
    "SP_API_REFRESH_TOKEN_EU": "Atzr|acme-eu",
}
Service = dict[str, Any]


def read_by_compose(environment: dict[str, str]) -> dict[str, Service]:
    """Return the services as `docker compose` resolves them with only `environment` set."""
    command = [program("docker-compose"), "--file", "docker-compose.yml", "config", "--format", "json"]
    kept = {"PATH": os.environ["PATH"], "COMPOSE_DISABLE_ENV_FILE": "true"}
    done = subprocess.run(
        command, cwd=ROOT, env={**kept, **environment}, capture_output=True, check=False, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    services: dict[str, Service] = json.loads(done.stdout)["services"]
    return services


@pytest.fixture(scope="module", name="services")
def without_credentials() -> dict[str, Service]:
    return read_by_compose({})


def settings_of(proxy: Service, **changed: str) -> dict[str, str]:
    """Return the proxy's environment adapted to a test: free ports, no Redis."""
    settings: dict[str, str] = {**proxy["environment"], **changed, "SP_API_PROXY_ADMIN": "127.0.0.1:0"}
    settings["SP_API_PROXY_LISTEN"] = settings["SP_API_PROXY_LISTEN"].replace(":8080", ":0")
    settings["SP_API_PROXY_HEALTH"] = "127.0.0.1:0"
    return {name: value for name, value in settings.items() if not name.startswith("SP_API_PROXY_STORE")}


def test_the_services_are_these_four_and_one_that_creates_the_store_key(services: dict[str, Service]) -> None:
    assert set(services) == {"proxy", "store-key", "redis", "prometheus", "grafana"}


def test_a_linter_finds_nothing_unsafe() -> None:
    command = [program("compose-lint"), "--fail-on", "high", str(ROOT / "docker-compose.yml")]
    done = subprocess.run(command, capture_output=True, check=False, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_port_is_published_to_this_machine_alone(services: dict[str, Service]) -> None:
    published = {port["published"]: port["host_ip"] for each in services.values() for port in each.get("ports", ())}
    assert published == dict.fromkeys(("8080", "9091", "3000"), "127.0.0.1")


def test_no_service_may_write_or_gain_rights(services: dict[str, Service]) -> None:
    for name, service in services.items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert int(service["mem_limit"]) > 0, name


def test_every_foreign_image_is_pinned_by_its_digest(services: dict[str, Service]) -> None:
    foreign = [service["image"] for service in services.values() if "build" not in service]
    assert len(foreign) == 3
    assert not [image for image in foreign if not re.fullmatch(r"[\w/-]+:[\w.-]+@sha256:[0-9a-f]{64}", image)]


def test_every_long_running_service_has_a_health_check_and_restart_policy(services: dict[str, Service]) -> None:
    lasting = {name: service for name, service in services.items() if service["restart"] != "no"}
    assert set(services) - set(lasting) == {"store-key"}
    checks = {name: service["healthcheck"] for name, service in lasting.items()}
    assert not [name for name, check in checks.items() if check.get("disable") or check["test"][0] != "CMD"]


def test_redis_is_reached_by_the_proxy_alone(services: dict[str, Service]) -> None:
    assert {name for name, service in services.items() if "store" in service.get("networks", ())} == {"proxy", "redis"}
    assert set(services["redis"]["networks"]) == {"store"}


def test_mounts_from_the_checkout_are_in_config_and_read_only(services: dict[str, Service]) -> None:
    mounts = [mount for service in services.values() for mount in service.get("volumes", ()) if mount["type"] == "bind"]
    sources = {Path(mount["source"]).relative_to(ROOT).as_posix() for mount in mounts}
    assert sources == {"config/prometheus", "config/grafana/provisioning", "config/grafana/dashboards"}
    assert all(mount["read_only"] for mount in mounts)


def test_the_grace_period_covers_the_shutdown_timeout(services: dict[str, Service]) -> None:
    timeouts = Config.model_fields["timeouts"].get_default(call_default_factory=True)
    assert services["proxy"]["stop_grace_period"] == "30s"
    assert timeouts.shutdown + getattr(timeouts, "shutdown_delay", 0) < 30


async def test_without_credentials_the_simulator_is_used(services: dict[str, Service]) -> None:
    command, settings = services["proxy"]["command"], settings_of(services["proxy"])
    async with started(*command, "--log-format", "json", environment=settings) as proxy:
        assert proxy.process.stdout is not None
        welcome = (await proxy.process.stdout.readuntil(b"Ctrl-C ends both.")).decode()
        # The address in the message accepts requests.
        address = welcome.partition("http://")[2].partition("/")[0]
        assert address == proxy.addresses[0].replace("0.0.0.0", "127.0.0.1")
        got = await call(address, "GET", "/sellers/v1/marketplaceParticipations", **{"x-sp-region": "eu"})
        assert got.status == 200
        assert "account=demo" in str(got.get("x-sp-proxy"))


def test_with_credentials_amazon_is_called() -> None:
    proxy = read_by_compose(CREDENTIALS)["proxy"]
    config = load_config(None, settings_of(proxy)).config
    assert set(config.accounts["default"].refresh_tokens) == {"eu"}
    assert config.endpoints.lwa.startswith("https://api.amazon.com/")


def test_the_key_of_the_store_is_made_once_and_only_its_group_may_read_it(
    services: dict[str, Service], tmp_path: Path
) -> None:
    (script,) = services["store-key"]["command"]
    script = script.replace("$$", "$").replace("/run/store-key", str(tmp_path))
    kept = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", script], check=True, timeout=30)
        kept.append((tmp_path / "key").read_bytes())
    assert kept[0] == kept[1]
    assert len(base64.b64decode(kept[0], validate=True)) == 32
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["key"]
