"""check --live: what works, what does not and what to do about it, asked of the simulator by the command itself."""

import asyncio
import json
import os
import pty
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
import yaml

from proxy.cli import advice, live_check
from proxy.cli.check_report import AccountRegion, Report, as_json
from proxy.config import Config, load_config
from proxy.simulator import Fault, Seller, Settings, Simulator
from proxy.simulator.restricted_operations import NOTIFICATIONS
from proxy.simulator.state import DEMO_CLIENT, DEMO_SECRET, errors_body
from tests.support.certificates import Authority
from tests.support.paths import ROOT
from tests.support.proxy_process import _environment, command
from tests.support.terminal import shown_at

REGIONS = ("na", "eu", "fe")
MANY = 50
SELLERS = (
    Seller("demo", "na", "Atzr|demo-na"),
    Seller("demo", "eu", "Atzr|demo-eu"),
    Seller("other", "eu", "Atzr|other-eu"),
    Seller("foreign", "eu", "Atzr|foreign-eu", "another-client"),
    *(Seller(f"shop{number}", "eu", f"Atzr|shop-{number}") for number in range(MANY)),
)
DENIED = json.dumps(errors_body("Unauthorized", "Access to requested resource is denied."))
KEYS = {"step", "result", "application", "account", "region", "host", "code", "said", "advice", "countries"}


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    async with Simulator(Settings(sellers=SELLERS)) as running:
        yield running


def settings(simulator: Simulator, **accounts: Any) -> dict[str, Any]:
    """Return settings with these accounts: a refresh token in eu, or all of an account's settings."""
    written = {
        name: value if isinstance(value, dict) else {"refresh_tokens": {"eu": value}}
        for name, value in accounts.items()
    }
    return {
        "applications": {"main": {"client_id": DEMO_CLIENT, "client_secret": DEMO_SECRET}},
        "accounts": written,
        "endpoints": {name: simulator.endpoints[name] for name in (*REGIONS, "lwa")},
    }


def write(folder: Path, content: dict[str, Any]) -> str:
    path = folder / "live.yaml"
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path)


async def checked(folder: Path, content: dict[str, Any], *more: str) -> tuple[int, dict[str, Any]]:
    """Run the command for programs; return its exit code, and its findings by what they are about."""
    code, printed, complained = await command("check", "--live", "--json", "--config", write(folder, content), *more)
    assert complained == ""
    assert "Mustermann" not in printed, "what Amazon says of the store is nobody's business"
    assert "Atz" not in printed
    response = json.loads(printed)
    assert response["works"] is (code == 0)
    assert all(set(check) == KEYS for check in response["checks"])
    return code, {_about(check): check for check in response["checks"]}


def _about(check: dict[str, Any]) -> str:
    names = (check["account"] or check["application"] or check["host"], check["region"], check["step"])
    return " ".join(filter(None, names))


async def test_accounts_that_work_are_named_with_their_marketplaces(simulator: Simulator, tmp_path: Path) -> None:
    both = {"refresh_tokens": {"na": "Atzr|demo-na", "eu": "Atzr|demo-eu"}, "data_elements": ["buyerInfo"]}
    path = write(tmp_path, settings(simulator, demo=both, other="Atzr|other-eu"))
    code, printed, complained = await command("check", "--live", "--config", path)
    assert (code, complained) == (0, "")
    rows = [line.split() for line in printed.splitlines()]
    assert rows[:4] == [
        ["ACCOUNT", "REGION", "TOKEN", "CALL", "RDT", "MARKETPLACES"],
        ["demo", "na", "ok", "ok", "ok", "US"],
        ["demo", "eu", "ok", "ok", "ok", "DE"],
        ["other", "eu", "ok", "ok", "DE"],
    ]
    assert "grantless token of application main: ok" in printed
    assert printed.endswith("All 3 work.\n")
    assert "Mustermann" not in printed
    kinds = sorted((entry.service, entry.token_kind, entry.target) for entry in simulator.journal if entry.seller)
    rdts = [kind for kind in kinds if kind[2].startswith("/tokens/")]
    assert len(kinds) == 5
    assert len(rdts) == 2
    assert simulator.state.counts["exchanges.client_credentials"] == 1


async def test_account_and_region_choose_what_is_asked(simulator: Simulator, tmp_path: Path) -> None:
    both = {"refresh_tokens": {"na": "Atzr|demo-na", "eu": "Atzr|demo-eu"}}
    content = settings(simulator, demo=both, other="Atzr|other-eu")
    code, found = await checked(tmp_path, content, "--account", "demo", "--region", "na")
    assert code == 0
    assert {name for name in found if " na " in name or " eu " in name} == {"demo na token", "demo na call"}
    assert {entry.service for entry in simulator.journal} == {"lwa", "na"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--live", "--account", "nobody"], "no account nobody"),
        (["--live", "--region", "fe"], "no account with a refresh token there"),
        (["--account", "demo"], "belong to --live"),
        (["--live", "--call", "/orders/v0/orders/1/address"], "neither restricted nor grantless"),
        (["--live", "--call", "http://evil.example/"], "must be the path of a GET"),
    ],
)
async def test_wrong_use_is_exit_code_2(simulator: Simulator, tmp_path: Path, flags: list[str], words: str) -> None:
    path = write(tmp_path, settings(simulator, demo="Atzr|demo-eu"))
    code, printed, complained = await command("check", "--config", path, *flags)
    assert (code, printed) == (2, "")
    assert words in complained
    assert not simulator.journal


async def test_a_call_that_fits_one_region_alone_is_said_of_the_others(simulator: Simulator, tmp_path: Path) -> None:
    both = {"refresh_tokens": {"na": "Atzr|demo-na", "eu": "Atzr|demo-eu"}}
    path = "/catalog/2022-04-01/items?marketplaceIds=ATVPDKIKX0DER&keywords=x"
    code, found = await checked(tmp_path, settings(simulator, demo=both), "--call", path)
    assert code == 1
    assert found["demo na call"]["result"] == "ok"
    assert (found["demo eu call"]["result"], found["demo eu call"]["code"]) == ("failed", "ConflictingSources")
    assert (found["demo eu token"]["result"], found["demo eu token"]["code"]) == ("ok", "")


async def test_each_refusal_of_login_with_amazon_has_its_advice(simulator: Simulator, tmp_path: Path) -> None:
    simulator.state.revoked_sellers.add("Atzr|demo-eu")
    content = settings(simulator, revoked="Atzr|demo-eu", foreign="Atzr|foreign-eu", fine="Atzr|other-eu")
    code, found = await checked(tmp_path, content)
    assert code == 1
    revoked, foreign = found["revoked eu token"], found["foreign eu token"]
    assert (revoked["result"], revoked["code"]) == ("failed", "invalid_grant")
    assert "authorise the application again" in revoked["advice"]
    assert (found["revoked eu call"]["result"], found["revoked eu call"]["code"]) == ("not tried", "token_missing")
    assert foreign["code"] == "unauthorized_client"
    assert "belongs to another application" in foreign["advice"]
    assert found["fine eu call"]["result"] == "ok"


async def test_a_wrong_secret_is_said_once_for_all_accounts(simulator: Simulator, tmp_path: Path) -> None:
    names = {f"shop{number}": f"Atzr|shop-{number}" for number in range(8)}
    content = settings(simulator, **names)
    content["applications"]["main"]["client_secret"] = "distinctive-secret"
    code, printed, _ = await command("check", "--live", "--config", write(tmp_path, content))
    assert code == 1
    assert printed.count("The client id or secret is wrong, or the secret is past its rotation") == 2  # grantless too
    assert "shop4 eu token and 3 more:" in printed
    assert printed.count("invalid_client: Login with Amazon refuses application main: invalid_client") == 2
    assert "refuses account" not in printed
    assert "0 of 8 accounts and regions work." in printed
    assert "distinctive" not in printed


async def test_a_missing_role_and_a_wrong_region_are_told_apart_by_the_others(
    simulator: Simulator, tmp_path: Path
) -> None:
    content = settings(simulator, wrong="Atzr|demo-na", fine="Atzr|other-eu")
    code, found = await checked(tmp_path, content)
    assert code == 1
    wrong = found["wrong eu call"]
    assert (wrong["result"], wrong["code"]) == ("failed", "region_or_authorisation")
    assert "its refresh token is for another region" in wrong["advice"].replace("this one's", "its")
    assert "403: Unauthorized Access to requested resource is denied." in wrong["said"]
    simulator.state.faults.append(Fault("answer", service="eu", path="/sellers/*", status=403, body=DENIED))
    code, found = await checked(tmp_path, content)
    assert code == 1
    for name in ("wrong", "fine"):
        assert "lacks the role of the Sellers API" in found[f"{name} eu call"]["advice"]
        assert "--call" in found[f"{name} eu call"]["advice"]


async def test_a_vendor_is_looked_at_by_a_call_of_its_own(simulator: Simulator, tmp_path: Path) -> None:
    simulator.state.faults.append(Fault("answer", service="eu", path="/sellers/*", status=403, body=DENIED))
    content = settings(simulator, vendor="Atzr|demo-eu")
    code, found = await checked(tmp_path, content, "--call", "/vendor/orders/v1/purchaseOrders?limit=1")
    assert code == 0
    assert found["vendor eu call"]["result"] == "ok"
    assert simulator.journal[-1].target == "/vendor/orders/v1/purchaseOrders?limit=1"


async def test_a_token_without_a_marketplace_is_no_success(simulator: Simulator, tmp_path: Path) -> None:
    simulator.state.faults.append(Fault("answer", service="eu", path="/sellers/*", status=200, body='{"payload": []}'))
    code, found = await checked(tmp_path, settings(simulator, demo="Atzr|demo-eu"))
    assert (code, found["demo eu call"]["code"]) == (1, "no_marketplaces")
    assert "another region" in found["demo eu call"]["advice"]


async def test_a_token_that_amazon_refuses_is_replaced_as_for_an_app(simulator: Simulator, tmp_path: Path) -> None:
    body = json.dumps(errors_body("Unauthorized", "Access denied.", "The access token you provided has expired."))
    simulator.state.faults.append(Fault("answer", service="eu", path="/sellers/*", status=403, body=body, times=1))
    code, _ = await checked(tmp_path, settings(simulator, demo="Atzr|demo-eu"))
    assert code == 0
    assert simulator.state.counts["exchanges.refresh_token"] == 2


async def test_data_elements_without_a_role_are_named(simulator: Simulator, tmp_path: Path) -> None:
    simulator.state.elements = {"buyerInfo"}
    elements = {"refresh_tokens": {"eu": "Atzr|demo-eu"}, "data_elements": ["buyerInfo", "shippingAddress"]}
    code, found = await checked(tmp_path, settings(simulator, demo=elements))
    restricted = found["demo eu rdt"]
    assert (code, restricted["result"], restricted["code"]) == (1, "failed", "elements_refused")
    assert restricted["said"] == "the application has no role for shippingAddress"
    assert "authorise anew" in restricted["advice"]
    simulator.state.faults.append(Fault("answer", service="eu", path="/tokens/*", status=403, body=DENIED))
    code, found = await checked(tmp_path, settings(simulator, demo=elements))
    assert (code, found["demo eu rdt"]["code"]) == (1, "RestrictedDataRefused")
    assert "restricted role" in found["demo eu rdt"]["advice"]


async def test_an_application_without_the_scope_is_a_warning(simulator: Simulator, tmp_path: Path) -> None:
    body = json.dumps({"error": "invalid_scope", "error_description": "The request has an invalid parameter : scope"})
    # The first exchange is the grantless one.
    simulator.state.faults.append(Fault("answer", service="lwa", status=400, body=body, times=1))
    code, found = await checked(tmp_path, settings(simulator, demo="Atzr|demo-eu"))
    assert (code, found["main grantless"]["result"], found["main grantless"]["code"]) == (0, "warning", "invalid_scope")
    assert found["main grantless"]["advice"] == advice.NO_SCOPE
    assert live_check.SCOPE == NOTIFICATIONS


async def test_hosts_that_cannot_be_reached_are_named_and_not_waited_for(simulator: Simulator, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        refusing = f"127.0.0.1:{taken.getsockname()[1]}"
        both = {"refresh_tokens": {"na": "Atzr|demo-na", "eu": "Atzr|demo-eu"}}
        content = settings(simulator, demo=both)
        content["endpoints"]["na"] = f"http://{refusing}"
        code, found = await checked(tmp_path, content)
        assert code == 1
        connection = found[f"{refusing} connection"]
        assert (connection["result"], connection["code"]) == ("failed", "refused")
        assert "pool.proxy or HTTPS_PROXY" in connection["advice"]
        assert (found["demo na token"]["result"], found["demo na call"]["result"]) == ("ok", "not tried")
        assert found["demo eu call"]["result"] == "ok"
        content["endpoints"]["lwa"] = f"http://{refusing}/auth/o2/token"
        code, found = await checked(tmp_path, content)
        assert code == 1
        assert {check["result"] for name, check in found.items() if name.startswith("demo")} == {"not tried"}
    content["endpoints"]["lwa"] = "https://no-such-host.invalid/auth/o2/token"
    _, found = await checked(tmp_path, content)
    assert found["no-such-host.invalid connection"]["code"] == "name"
    assert "name servers" in found["no-such-host.invalid connection"]["advice"]


async def test_a_forward_proxy_that_refuses_is_named(simulator: Simulator, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        content = settings(simulator, demo="Atzr|demo-eu")
        content["endpoints"]["eu"] = "https://amazon.invalid"
        content["pool"] = {"proxy": f"http://user:distinctive-pass@127.0.0.1:{taken.getsockname()[1]}"}
        code, found = await checked(tmp_path, content)
    connection = found["amazon.invalid connection"]
    assert (code, connection["code"]) == (1, "refused")
    assert connection["said"] == "it, or the forward proxy, refuses the connection"
    assert "the forward proxy (pool.proxy or HTTPS_PROXY)" in connection["advice"]


async def test_a_certificate_that_is_not_trusted_is_named(tmp_path: Path) -> None:
    authority = Authority.made(tmp_path)
    certificate, key = map(Path, authority.issue("localhost", alternative="DNS:localhost"))
    async with Simulator(Settings(sellers=SELLERS, tls=(certificate, key))) as simulator:
        code, found = await checked(tmp_path, settings(simulator, demo="Atzr|demo-eu"))
        (connection,) = [check for check in found.values() if check["step"] == "connection" and check["code"]]
        assert (code, connection["code"]) == (1, "certificate")
        assert connection["advice"] == advice.CERTIFICATE
        content = settings(simulator, demo="Atzr|demo-eu")
        content["pool"] = {"ca_file": str(authority.certificate)}
        code, _ = await checked(tmp_path, content)
        assert code == 0


async def test_a_clock_that_is_wrong_is_said(simulator: Simulator, tmp_path: Path) -> None:
    participations = json.dumps({"payload": [{"marketplace": {"countryCode": "DE"}}, {"marketplace": 1}, None]})
    headers = {"Date": formatdate(1_000_000_000, usegmt=True)}
    fault = Fault("answer", service="eu", path="/sellers/*", status=200, headers=headers, body=participations)
    simulator.state.faults.append(fault)
    code, found = await checked(tmp_path, settings(simulator, demo="Atzr|demo-eu"))
    assert (code, found["clock"]["result"]) == (0, "warning")
    assert "ahead of Amazon's" in found["clock"]["said"]
    assert "NTP" in found["clock"]["advice"]
    fault.status, fault.body = 400, json.dumps(errors_body("InvalidInput", "x-amz-date must be the current time"))
    code, found = await checked(tmp_path, settings(simulator, demo="Atzr|demo-eu"))
    assert (code, found["demo eu call"]["code"]) == (1, "clock")


async def test_trouble_of_amazons_is_tried_again_and_then_said(simulator: Simulator, tmp_path: Path) -> None:
    fault = Fault("status", service="eu", path="/sellers/*", status=503, times=2)
    simulator.state.faults.append(fault)
    content = settings(simulator, demo="Atzr|demo-eu")
    code, _ = await checked(tmp_path, content)
    assert code == 0
    fault.times = None
    code, found = await checked(tmp_path, content)
    assert (code, found["demo eu call"]["code"]) == (1, "amazon_failing")
    assert "try again later" in found["demo eu call"]["advice"]
    fault.kind = "reset"
    code, found = await checked(tmp_path, content)
    assert (code, found["demo eu call"]["code"]) == (1, "broken")
    fault.service, fault.path = "lwa", "/auth/*"
    code, found = await checked(tmp_path, content)
    assert (code, found["demo eu token"]["code"]) == (1, "connection")
    assert found["demo eu token"]["advice"] == found["main grantless"]["advice"] == advice.AMAZON_DOWN
    fault.service, fault.path = "eu", "/sellers/*"
    fault.kind, fault.status = "status", 418
    code, found = await checked(tmp_path, content)
    assert (code, found["demo eu call"]["code"]) == (1, "http_418")
    assert "endpoints" in found["demo eu call"]["advice"]


def config_of(folder: Path, content: dict[str, Any]) -> Config:
    return load_config(write(folder, content), {}).config


class SkippedTime:
    """A clock of the usage plans, on which waits are over at once, and `skipped` seconds."""

    def __init__(self) -> None:
        self.skipped = 0.0

    def now(self) -> float:
        return self.skipped

    def call_later(self, delay: float, callback: Callable[..., object], *arguments: Any) -> asyncio.Handle:
        def call() -> None:
            self.skipped += delay
            callback(*arguments)

        return asyncio.get_running_loop().call_soon(call)


async def test_a_429_is_paced_by_the_usage_plan_and_tried_again(simulator: Simulator, tmp_path: Path) -> None:
    body = json.dumps(errors_body("QuotaExceeded", "You exceeded your quota for the requested resource."))
    fault = Fault("answer", service="eu", path="/sellers/*", status=429, body=body, times=1)
    simulator.state.faults.append(fault)
    config, time = config_of(tmp_path, settings(simulator, demo="Atzr|demo-eu")), SkippedTime()
    report = Report([AccountRegion("demo", "eu")])
    await live_check.run_checks(config, report, now=time.now, call_later=time.call_later)
    assert report.ok, as_json(report)
    assert live_check.MAX_WAIT > time.skipped > 50, "getMarketplaceParticipations has a place a minute"
    fault.times = None
    report, time = Report([AccountRegion("demo", "eu")]), SkippedTime()
    await live_check.run_checks(config, report, now=time.now, call_later=time.call_later)
    (call,) = [finding for finding in report.results if finding.check == "call"]
    assert (call.result, call.code, call.advice) == ("failed", "throttled", advice.THROTTLED)
    assert time.skipped < live_check.MAX_WAIT, "every wait is bounded"


@pytest.mark.parametrize("service", ["lwa", "eu"])
async def test_a_host_that_fails_everybody_is_given_up(service: str, simulator: Simulator, tmp_path: Path) -> None:
    names = {f"shop{number}": f"Atzr|shop-{number}" for number in range(MANY)}
    simulator.state.faults.append(Fault("reset", service=service, method="POST" if service == "lwa" else "GET"))
    config = config_of(tmp_path, settings(simulator, **names))
    report = Report([AccountRegion(name, "eu") for name in names])
    await live_check.run_checks(config, report)
    results = [one.result for one in report.results if one.check == ("token" if service == "lwa" else "call")]
    assert (
        live_check.HOST_FAILURE_LIMIT <= results.count("failed") < live_check.HOST_FAILURE_LIMIT + live_check.PARALLEL
    )
    assert results.count("failed") + results.count("not tried") == MANY
    assert report.completed == MANY


@dataclass
class AtATerminal:
    """The command, with a terminal for its standard error."""

    process: asyncio.subprocess.Process
    terminal: asyncio.StreamReader

    async def ended(self) -> tuple[int, str]:
        assert self.process.stdout is not None
        printed = await asyncio.wait_for(self.process.stdout.read(), 30)
        return await asyncio.wait_for(self.process.wait(), 30), printed.decode()

    async def said(self) -> str:
        text = b""
        try:
            while data := await asyncio.wait_for(self.terminal.read(4096), 30):
                text += data
        except OSError:  # EIO: the other end of the terminal is closed
            pass
        return text.decode()


@asynccontextmanager
async def at_a_terminal(*arguments: str) -> AsyncIterator[AtATerminal]:
    ours, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy", *arguments),
        cwd=ROOT,
        env=_environment(None),
        stdout=asyncio.subprocess.PIPE,
        stderr=theirs,
    )
    os.close(theirs)
    async with shown_at(ours) as terminal:
        yield AtATerminal(process, terminal)


async def test_many_accounts_are_looked_at_side_by_side_with_progress(simulator: Simulator, tmp_path: Path) -> None:
    names = {f"shop{number}": f"Atzr|shop-{number}" for number in range(MANY)}
    simulator.state.faults.append(Fault("latency", service="eu", path="/sellers/*", seconds=0.15))
    simulator.state.revoked_sellers.add("Atzr|shop-7")
    path = write(tmp_path, settings(simulator, **names))
    async with at_a_terminal("check", "--live", "--config", path) as running:
        (code, printed), said = await asyncio.gather(running.ended(), running.said())
    assert code == 1
    assert f"49 of {MANY} accounts and regions work." in printed
    rows = [line.split() for line in printed.splitlines()]
    assert sum(row[1:] == ["eu", "ok", "ok", "DE"] for row in rows) == 49
    assert ["shop7", "eu", "FAILED", "-"] in rows
    shown = [line.strip() for line in said.split("\r") if line.strip()]
    assert len(shown) > 2
    assert all(line.startswith("checked ") and f"of {MANY}, " in line for line in shown)
    assert shown[-1].endswith("1 with trouble")
    assert said.endswith("\r"), "the line is wiped"


async def test_ctrl_c_shows_what_was_found_till_then(simulator: Simulator, tmp_path: Path) -> None:
    content = settings(simulator, fine="Atzr|other-eu", slow={"refresh_tokens": {"na": "Atzr|demo-na"}})
    simulator.state.faults.append(Fault("hang", service="na", seconds=30))
    async with at_a_terminal("check", "--live", "--config", write(tmp_path, content)) as running:
        said = (await asyncio.wait_for(running.terminal.readuntil(b"checked 1 of 2"), 30)).decode()
        running.process.send_signal(signal.SIGINT)
        code, printed = await running.ended()
        said += await running.said()
    assert code == 130
    assert "Interrupted: 1 of 2 were looked at." in printed
    assert ["fine", "eu", "ok", "ok", "DE"] in [line.split() for line in printed.splitlines()]
    assert "Traceback" not in printed + said
