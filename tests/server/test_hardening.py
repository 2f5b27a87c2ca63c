"""How the process keeps its secrets, and what it writes about who did what."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from proxy.config import load_config
from proxy.server.hardening import scrub_environment
from tests.conftest import settings_for
from tests.support.fake_upstream import FakeUpstream, TokenHost
from tests.support.proxy_process import command, serving, started
from tests.support.raw_client import call

SELLERS = "/sellers/v1/marketplaceParticipations"
ENVIRONMENT = {
    "LWA_APP_ID": "amzn1.client",
    "LWA_CLIENT_SECRET": "distinctive-client-secret",
    "SP_API_REFRESH_TOKEN_EU": "Atzr|distinctive-refresh-token",
    "COPY": "x=Atzr|distinctive-refresh-token;",
    "OTEL_EXPORTER_OTLP_HEADERS": "api-key=distinctive-collector-key",
    "PATH": "/usr/bin",
}


def test_variables_that_hold_a_secret_are_forgotten() -> None:
    environ = dict(ENVIRONMENT)
    config = load_config(None, environ).config
    scrub_environment(environ, config)
    assert environ == {"LWA_APP_ID": "amzn1.client", "PATH": "/usr/bin"}
    assert config.applications["main"].client_secret.refreshed().reveal() == "distinctive-client-secret"


def environment_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="there is no such thing elsewhere")
async def test_no_secret_is_left_where_others_see_the_environment(
    fake_upstream: FakeUpstream, token_host: TokenHost
) -> None:
    settings = settings_for(fake_upstream, token_host)
    given = {
        **ENVIRONMENT,
        **{f"SP_API_PROXY_ENDPOINTS_{name.upper()}": url for name, url in settings["endpoints"].items()},
        "SP_API_PROXY_LISTEN": "127.0.0.1:0",
        "SP_API_PROXY_ADMIN": "127.0.0.1:0",
    }
    del given["PATH"]
    async with started("serve", "--log-format", "json", environment=given) as proxy:
        shown = environment_of(proxy.process.pid)
        assert b"distinctive" not in shown
        assert b"LWA_APP_ID=amzn1.client\0" in shown
        assert b"LWA_CLIENT_SECRET=****" in shown
        assert (await call(proxy.addresses[0], "GET", SELLERS)).status == 200
    assert token_host.received[0].body.count(b"distinctive-refresh-token") == 1


def test_an_exception_that_ends_the_process_is_named_without_its_text() -> None:
    code = (
        "from proxy.server import hardening; hardening.harden()\ndef fail(): raise ValueError('distinctive')\nfail()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "distinctive" not in done.stderr
    assert done.stderr.startswith("sp-api-proxy: ended by builtins.ValueError at ")


@pytest.mark.skipif(sys.platform != "linux", reason="there is no such thing elsewhere")
def test_a_hardened_process_is_not_to_be_looked_into() -> None:
    code = (
        "import ctypes, resource; from proxy.server import hardening; hardening.harden()\n"
        "print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), resource.getrlimit(resource.RLIMIT_CORE))\n"  # PR_GET_DUMPABLE
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "0 (0, 0)\n"


def test_what_is_made_while_the_collector_is_kept_away_is_left_to_reference_counting() -> None:
    code = (
        "import gc; from proxy.server.hardening import FULL_COLLECTION_EVERY, GcPaused\n"
        "class Ring:\n"
        "    def __init__(self): self.itself = self\n"
        "gc.disable(); gc.enable(); paused, kept, frozen = GcPaused(), [], []\n"
        "for _ in range(2 * FULL_COLLECTION_EVERY):\n"
        "    old = Ring(); gc.collect()\n"
        "    with paused:\n"
        "        assert not gc.isenabled()\n"
        "        kept.append([]); Ring()\n"
        "        del old\n"
        "    assert gc.isenabled()\n"
        "    frozen.append(gc.get_freeze_count())\n"
        "rings = lambda: sum(isinstance(one, Ring) for one in gc.get_objects())\n"
        "gc.unfreeze(); print(frozen[0] > 1000, rings())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True 0\n"


# The audit log.


async def test_the_audit_log_says_who_did_what_on_whose_account(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path
) -> None:
    path = tmp_path / "audit.jsonl"
    callers = {"job": {"key": "distinctive-key-of-the-job", "operations": ["orders.*", "GET sellers.*"]}}
    settings = settings_for(fake_upstream, token_host, callers=callers, audit=str(path))
    key = {"x_sp_key": "distinctive-key-of-the-job"}
    async with serving(settings, tmp_path) as proxy:
        address = proxy.addresses[0]
        await call(address, "GET", f"{SELLERS}?personal=data", x_request_id="mine-1", **key)
        await call(address, "GET", "/orders/v0/orders", x_sp_data_elements="buyerInfo", **key)
        await call(address, "POST", "/feeds/2021-06-30/feeds", b"personal data", **key)
        await call(address, "GET", SELLERS)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    shown = [
        {name: line[name] for name in ("caller", "operation", "method", "token", "data_elements", "status", "error")}
        for line in lines
    ]
    common = {"caller": "job", "method": "GET", "error": None, "status": 200}
    assert shown == [
        {**common, "operation": "sellers.v1.getMarketplaceParticipations", "token": "lwa", "data_elements": []},
        {**common, "operation": "orders.v0.getOrders", "token": "rdt", "data_elements": ["buyerInfo"]},
        {
            "caller": "job",
            "method": "POST",
            "status": 403,
            "error": "NotAllowed",
            "operation": "feeds.2021-06-30.createFeed",
            "token": "none",
            "data_elements": [],
        },
        {
            "caller": None,
            "method": "GET",
            "status": 403,
            "error": "CallerRefused",
            "operation": "unknown",
            "token": "none",
            "data_elements": [],
        },
    ]
    assert [line["request_id"] for line in lines] == ["mine-1", None, None, None]
    assert {line["listener"] for line in lines} == {"listen[0]"}
    assert all(line["time"].endswith("Z") for line in lines)
    assert "personal" not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_an_audit_log_that_was_moved_away_goes_on_in_a_new_file(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path
) -> None:
    path = tmp_path / "audit.jsonl"
    async with serving(settings_for(fake_upstream, token_host, audit=str(path)), tmp_path) as proxy:
        await call(proxy.addresses[0], "GET", SELLERS)
        while not path.read_text():
            await call(proxy.addresses[0], "GET", SELLERS)  # the line is written by a thread
        path.rename(tmp_path / "old.jsonl")
        await call(proxy.addresses[0], "GET", SELLERS)
    assert path.read_text()


async def test_an_audit_log_that_cannot_be_written_is_a_mistake(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(settings_for(fake_upstream, token_host, audit="/nowhere/audit")))
    code, _, complained = await command("serve", "--config", str(path))
    assert code == 2
    assert "audit: /nowhere/audit: No such file or directory" in complained


async def test_the_audit_log_may_go_to_standard_output(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(settings_for(fake_upstream, token_host, audit="stdout")))
    path.chmod(0o600)
    async with started("serve", "--config", str(path), "--log-format", "json") as proxy:
        await call(proxy.addresses[0], "GET", SELLERS)
        assert proxy.process.stdout is not None
        line = json.loads(await proxy.process.stdout.readline())
    assert line["operation"] == "sellers.v1.getMarketplaceParticipations"


# Files that others can read.


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o602, 0o620, 0o666])
@pytest.mark.parametrize("strict", [False, True])
async def test_secrets_that_others_can_read_are_warned_about_or_refused(
    tmp_path: Path, mode: int, strict: bool
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("distinctive-secret")
    secret.chmod(mode)
    settings: dict[str, Any] = {
        "applications": {"main": {"client_id": "c", "client_secret": {"file": "secret"}}},
        "accounts": {"acme": {"refresh_tokens": {"eu": "${TOKEN}"}}},
        "strict_permissions": strict,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(settings))
    code, printed, complained = await command(
        "check", "--config", str(path), environment={"TOKEN": "distinctive-token"}
    )
    assert code == (2 if strict else 0)
    assert "secret holds a secret that other users can read or change" in complained
    assert "distinctive" not in printed + complained


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o440, 0o640])
async def test_secrets_that_the_owner_and_a_group_can_read_are_fine(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "config.json"
    settings = {
        "applications": {"main": {"client_id": "c", "client_secret": "distinctive"}},
        "accounts": {"acme": {"refresh_tokens": {"eu": "distinctive"}}},
        "strict_permissions": True,
    }
    path.write_text(json.dumps(settings))
    path.chmod(mode)
    code, _, complained = await command("check", "--config", str(path))
    assert (code, complained) == (0, "")
    path.chmod(0o644)
    code, _, complained = await command("check", "--config", str(path))
    assert code == 2
    assert "config.json holds a secret that other users can read" in complained


def test_the_modes_are_looked_at_on_systems_that_have_them() -> None:
    assert os.name == "posix"
