"""The commands, as users run them: real processes, their output, their exit codes, their signals."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml

from proxy import __version__
from proxy.amazon.placeholder_tokens import Resource, placeholder_for
from proxy.cli import demo, main
from proxy.simulator.cli import _for_people
from tests.conftest import StartProxy, needs, settings_for
from tests.support.fake_upstream import FakeUpstream, Received, TokenHost, http_response
from tests.support.paths import ROOT
from tests.support.proxy_process import command, serving, started
from tests.support.raw_client import call, connect, request

SELLERS = "/sellers/v1/marketplaceParticipations"
ENVIRONMENT = {
    "LWA_APP_ID": "amzn1.application-oa2-client.x",
    "LWA_CLIENT_SECRET": "distinctive-secret",
    "SP_API_REFRESH_TOKEN": "Atzr|distinctive-token",
    "SP_API_REGION": "eu",
}


async def test_the_version_is_printed() -> None:
    assert await command("--version") == (0, f"sp-api-proxy {__version__}\n", "")
    assert await command("version") == (0, f"sp-api-proxy {__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        *(
            [name, "--help"]
            for name in (
                "serve",
                "check",
                "authorize",
                "explain",
                "wait",
                "healthcheck",
                "shutdown",
                "operations",
                "simulate",
                "schema",
            )
        ),
    ],
)
async def test_help_explains_every_command_with_an_example(arguments: list[str]) -> None:
    code, printed, complained = await command(*arguments)
    assert (code, complained) == (0, "")
    assert "sp-api-proxy" in printed
    assert "example" in printed or "commands" in printed


async def test_no_command_at_all_is_told_which_there_are() -> None:
    code, printed, complained = await command()
    assert (code, printed) == (2, "")
    assert re.findall(r"^    (\w+)", complained, re.MULTILINE)[:3] == ["serve", "check", "explain"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["serve", "--nonsense"], "--nonsense"),
        (["wait", "--log-level", "debug"], "--log-level"),
        (["explain"], "METHOD, TARGET"),
        (["explain", "GET", "/", "-H", "distinctive-header"], "-H: must be 'NAME: VALUE'"),
        (["explain", "GET", "/", "--listener", "first"], "--listener: must be a whole number"),
        (["explain", "GET", "/", "--listener", "1"], "no such listener; there is 0 (127.0.0.1:8080)"),
        (["explain", "GET", "/", "--caller", "jbo"], "no such caller in the configuration; none is configured"),
        (
            ["explain", "GET", "/", "--set", "callers={job: {key: k}}", "--caller", "jbo"],
            "no such caller in the configuration; did you mean job? known: job",
        ),
        (["rotate", "mian"], "no application mian in the configuration; did you mean main? known: main"),
        (["operations", "--removed-by", "soon"], "--removed-by: must be a day such as 2027-03-31"),
        (["serve", "--set", "distinctive"], "--set: must be KEY=VALUE, such as limits.max_wait=30s"),
        (["healthcheck", "--url", "https://localhost"], "--url: must be a URL without a path, such as http://"),
        (["check", "--admin", "x"], "--admin: admin: must be an address"),
        (["wait", "--timeout", "soon"], "--timeout: must be a duration such as 30s or 2m"),
    ],
)
async def test_wrong_usage_says_what_is_right(arguments: list[str], said: str) -> None:
    code, printed, complained = await command(*arguments, environment=ENVIRONMENT)
    assert (code, printed) == (2, "")
    assert said in complained
    assert "distinctive" not in complained
    assert "Traceback" not in complained


@pytest.mark.parametrize("arguments", [["nonsense"], ["serve", "--nonsense"], ["explain"], ["serve", "--set", "x"]])
async def test_wrong_usage_is_one_line_and_exit_code_2(arguments: list[str]) -> None:
    code, printed, complained = await command(*arguments, environment=ENVIRONMENT)
    assert (code, printed) == (2, "")
    assert "Traceback" not in complained
    assert complained


@pytest.mark.parametrize(
    "arguments", [["check"], ["check", "--live"], ["authorize", "--marketplace", "DE", "--output", "token"], ["serve"]]
)
def test_a_file_that_lies_here_and_was_not_named_is_pointed_at(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("LWA_", "SP_API_"))]:
        monkeypatch.delenv(name)
    assert main.main(arguments) == 2
    without = capsys.readouterr().err
    assert "applications: is missing" in without
    Path("config.yaml").write_text("applications: {}\n", encoding="utf-8")
    assert main.main(arguments) == 2
    assert capsys.readouterr().err == f"{without}There is a config.yaml here: --config config.yaml\n"
    assert main.main([*arguments, "--config", "config.yaml"]) == 2  # it was named
    assert "There is a" not in capsys.readouterr().err


async def test_check_shows_what_is_in_force_and_hides_secrets() -> None:
    code, printed, complained = await command("check", "--set", "limits.max_wait=3s", environment=ENVIRONMENT)
    assert (code, complained) == (0, "")
    rows = {line.split()[0]: line for line in printed.splitlines() if line}
    assert rows["applications.main.client_secret"].split()[1] == "***"
    assert "environment variable LWA_CLIENT_SECRET" in rows["applications.main.client_secret"]
    assert rows["limits.max_wait"].split()[1:] == ["3s", "--set"]
    assert rows["timeouts.connect"].split()[1:] == ["5s", "default"]
    assert "distinctive" not in printed


async def test_check_names_every_problem_at_once(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "limits: {max_wait: soon}\naplications: {}\naccounts: {acme: {refresh_tokens: {xx: distinctive}}}\n"
    )
    code, printed, complained = await command("check", "--config", str(path))
    assert (code, printed) == (2, "")
    for words in ("limits.max_wait", "did you mean applications?", "accounts.acme.refresh_tokens.xx", f"{path}:1"):
        assert words in complained
    assert "distinctive" not in complained


async def test_a_missing_file_is_said_plainly() -> None:
    code, _, complained = await command("serve", "--config", "/nonexistent/config.yaml")
    assert code == 2
    assert "/nonexistent/config.yaml: cannot be read: No such file or directory" in complained


async def test_the_schema_is_json() -> None:
    code, printed, _ = await command("schema")
    assert code == 0
    schema = json.loads(printed)
    assert schema["properties"]["limits"]


async def test_explain_says_what_would_be_done_and_sends_nothing() -> None:
    code, printed, _ = await command("explain", "GET", "/orders/v0/orders/1/address?x=1", environment=ENVIRONMENT)
    assert code == 0
    assert "Restricted Data Token: for GET /orders/v0/orders/{orderId}/address" in printed
    assert "eu (from the only region of default)" in printed
    assert "distinctive" not in printed


async def test_explain_says_why_a_request_is_refused() -> None:
    arguments = ("explain", "GET", "/orders/v0/orders", "-H", "x-sp-account: nobody", "--json")
    code, printed, _ = await command(*arguments, environment=ENVIRONMENT)
    assert code == 1
    decided = json.loads(printed)
    assert decided["refused"] == "400 UnknownAccount"
    assert decided["do"]


@pytest.mark.parametrize("target", ["/auth/o2/token", "/@anybody/eu/auth/o2/token"])
async def test_explain_says_that_a_request_for_a_token_goes_nowhere(target: str) -> None:
    several = {
        **ENVIRONMENT,
        "SP_API_REFRESH_TOKEN_ACME_NA": "distinctive-token",
        "SP_API_PROXY_CALLERS_ONE_KEY": "key",
    }
    code, printed, _ = await command("explain", "POST", target, "--json", environment=several)
    assert code == 0
    decided = json.loads(printed)
    assert decided["operation"] == "lwa.token"
    assert "nothing is sent to Amazon" in decided["answered by"]
    code, printed, _ = await command("explain", "GET", target, "--json", environment=several)
    assert (code, "refused" in json.loads(printed)) == (1, True)


@pytest.mark.parametrize(
    ("local", "said"), [("false", "the app gets a token of Amazon's"), ("true", "nothing is sent to Amazon")]
)
async def test_explain_says_who_serves_a_request_for_a_restricted_token(local: str, said: str) -> None:
    arguments = ("explain", "POST", "/tokens/2021-03-01/restrictedDataToken", "--set", f"local_rdt={local}")
    code, printed, _ = await command(*arguments, environment=ENVIRONMENT)
    assert code == 0
    assert said in printed


async def test_explain_says_who_asks_for_personal_data() -> None:
    token = placeholder_for([Resource("GET", "/orders/v0/orders", ("buyerInfo",))])
    arguments = ("explain", "GET", "/orders/v0/orders", "-H", f"x-amz-access-token: {token}", "--set", "local_rdt=true")
    code, printed, _ = await command(*arguments, environment=ENVIRONMENT)
    assert code == 0
    assert "with buyerInfo, which the app's Restricted Data Token asks for" in printed


async def test_operations_are_listed_and_filtered() -> None:
    code, printed, complained = await command("operations")
    assert (code, len(printed.splitlines()), complained) == (0, 370, "370 operations\n")
    _, printed, _ = await command("operations", "--restricted")
    assert len(printed.splitlines()) == 31
    _, printed, _ = await command("operations", "getOrderAddress", "--json")
    (operation,) = json.loads(printed)
    assert (operation["name"], operation["restricted"]) == ("orders.v0.getOrderAddress", True)
    _, printed, _ = await command("operations", "--removed-by", "2027-03-31")
    assert "orders.v0.getOrders" in printed


async def test_serve_with_the_environment_alone(fake_upstream: FakeUpstream, token_host: TokenHost) -> None:
    endpoints = {"SP_API_PROXY_ENDPOINTS_EU": fake_upstream.url, "SP_API_PROXY_ENDPOINTS_LWA": token_host.url}
    arguments = ("serve", "--listen", "127.0.0.1:0", "--admin", "none", "--log-format", "json")
    async with started(*arguments, environment={**ENVIRONMENT, **endpoints}) as proxy:
        got = await call(proxy.addresses[0], "GET", SELLERS)
        assert got.status == 200
        assert proxy.admin is None
        assert await proxy.stop() == 0
    assert b"refresh_token=Atzr%7Cdistinctive-token" in token_host.received[0].body
    assert "distinctive" not in "".join(proxy.log)


async def test_the_demo_serves_its_three_calls_without_credentials() -> None:
    needs(shutil.which("curl") is not None, "curl")
    arguments = ("serve", "--demo", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--log-format", "json")
    async with started(*arguments) as proxy:
        assert proxy.process.stdout is not None
        welcome = (await proxy.process.stdout.readuntil(b"Ctrl-C ends both.")).decode()
        lines = [line.strip() for line in welcome.splitlines() if line.strip().startswith("curl")]
        assert len(lines) == 3
        kinds = []
        for line in lines:
            process = await asyncio.create_subprocess_shell(line, stdout=asyncio.subprocess.PIPE)
            printed = (await asyncio.wait_for(process.communicate(), 30))[0].decode()
            assert printed.startswith("HTTP/1.1 200"), printed
            kinds.append(printed.partition("token=")[2].partition(";")[0])
        assert kinds == ["lwa", "grantless", "rdt"]
        assert await proxy.stop(signal.SIGINT) == 0


async def test_the_demo_is_not_taken_where_credentials_are_given() -> None:
    partly = {"LWA_APP_ID": "amzn1.application-oa2-client.x"}
    code, _, complained = await command("serve", "--demo", environment=partly)
    assert code == 2
    assert "applications.main.client_secret: is missing" in complained


async def test_a_port_in_use_is_one_line_and_exit_code_1() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        code, _, complained = await command("serve", "--listen", address, "--admin", "none", environment=ENVIRONMENT)
    assert code == 1
    (line,) = [line for line in complained.splitlines() if not line.startswith("{")]
    assert line == (
        f"sp-api-proxy: cannot listen on {address}: Address already in use; stop what uses it, "
        "or change listen[0] in the configuration, or give another address with --listen"
    )


async def test_the_demo_says_how_make_takes_another_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        code, printed, complained = await command("serve", "--demo", "--listen", "127.0.0.1:0", "--admin", address)
    assert (code, printed) == (1, "")
    assert "or give another address with --admin" in complained
    assert 'make run ARGS="--listen 127.0.0.1:8081 --admin 127.0.0.1:9091"' in complained


async def test_the_demos_lines_are_written_at_once(monkeypatch: pytest.MonkeyPatch, start_proxy: StartProxy) -> None:
    written: list[str] = []

    class Terminal(StringIO):
        def write(self, text: str, /) -> int:
            written.append(text)
            return len(text)

    monkeypatch.setattr(sys, "stdout", Terminal())
    demo._welcome(await start_proxy())
    assert len(written) == 1
    assert written[0].count("curl -si") == 3


async def test_sigterm_lets_requests_finish_and_takes_no_more(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path
) -> None:
    release = asyncio.Event()

    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        await release.wait()
        writer.write(http_response("200 OK", b"late"))

    fake_upstream.script = script
    async with serving(settings_for(fake_upstream, token_host), tmp_path) as proxy:
        async with connect(proxy.addresses[0]) as client:
            await client.send(request("GET", SELLERS))
            await fake_upstream.arrived.wait()
            proxy.process.send_signal(signal.SIGTERM)
            await refuses(proxy.addresses[0])
            assert proxy.admin is not None
            assert (await call(proxy.admin, "GET", "/readyz")).status == 503
            release.set()
            got = await client.read_response()
            assert (got.status, got.body) == (200, b"late")
        assert await asyncio.wait_for(proxy.process.wait(), 30) == 0


async def refuses(address: str) -> None:
    """Wait until nobody listens on the address any more."""
    while True:
        try:
            async with connect(address):
                pass
        except OSError:
            return
        await asyncio.sleep(0)


async def test_a_second_signal_ends_at_once(fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path) -> None:
    never = asyncio.Event()

    async def script(_: Received, __: asyncio.StreamWriter) -> None:
        await never.wait()

    fake_upstream.script = script
    async with (
        serving(settings_for(fake_upstream, token_host), tmp_path) as proxy,
        connect(proxy.addresses[0]) as client,
    ):
        await client.send(request("GET", SELLERS))
        await fake_upstream.arrived.wait()
        proxy.process.send_signal(signal.SIGTERM)
        await refuses(proxy.addresses[0])
        assert await proxy.stop(signal.SIGTERM) == 143
        assert (await client.read_response()).error == "ShuttingDown"
    assert (proxy.lines()[-1]["message"], proxy.lines()[-1]["cut_off"]) == ("ended", 1)


async def test_what_hangs_in_the_end_is_not_waited_for_after_a_second_signal(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path
) -> None:
    """A collector of traces that takes nothing would have three seconds for the last spans."""
    never = asyncio.Event()

    async def script(_: Received, __: asyncio.StreamWriter) -> None:
        await never.wait()

    async def take_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1024):
            pass
        writer.close()

    fake_upstream.script = script
    held = await asyncio.start_server(take_nothing, "127.0.0.1", 0)
    host, port = held.sockets[0].getsockname()
    settings = settings_for(fake_upstream, token_host, tracing={"endpoint": f"http://{host}:{port}"})
    async with serving(settings, tmp_path) as proxy, connect(proxy.addresses[0]) as client:
        await client.send(request("GET", SELLERS))
        await fake_upstream.arrived.wait()
        proxy.process.send_signal(signal.SIGTERM)
        await refuses(proxy.addresses[0])
        began = time.monotonic()
        assert await proxy.stop(signal.SIGTERM) == 143
        assert time.monotonic() - began < 2.5
    held.close()
    assert (proxy.lines()[-1]["message"], proxy.lines()[-1]["cut_off"]) == ("ended", 1)


async def test_requests_that_take_too_long_are_cut_off_and_the_exit_code_says_so(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path
) -> None:
    never = asyncio.Event()

    async def script(_: Received, __: asyncio.StreamWriter) -> None:
        await never.wait()

    fake_upstream.script = script
    settings = settings_for(fake_upstream, token_host, timeouts={"shutdown": "200ms"})
    async with serving(settings, tmp_path) as proxy, connect(proxy.addresses[0]) as client:
        await client.send(request("GET", SELLERS))
        await fake_upstream.arrived.wait()
        assert await proxy.stop() == 143
        response = await client.read_response()
        assert (response.status, response.error, response.get("connection")) == (503, "ShuttingDown", "close")
        assert await client.at_end()
    lines = proxy.lines()
    assert [line["connections"] for line in lines if line["message"] == "aborted in-flight requests"] == [1]
    assert [(line["code"], line["error"]) for line in lines if line["message"] == "request"] == [(503, "ShuttingDown")]
    assert (lines[-1]["message"], lines[-1]["cut_off"]) == ("ended", 1)


async def test_sighup_takes_up_a_changed_configuration_with_references_as_at_the_start(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path
) -> None:
    """The secret's variable is taken out of the environment at the start, and the file's name is a relative one."""
    (tmp_path / "token").write_text("Atzr|acme-eu")
    path = tmp_path / "config.yaml"

    def write(*accounts: str) -> None:
        main = {"client_id": "client", "client_secret": "${THE_SECRET}"}
        settings = settings_for(fake_upstream, token_host, applications={"main": main})
        path.write_text(
            yaml.safe_dump(
                {**settings, "accounts": {name: {"refresh_tokens": {"eu": {"file": "token"}}} for name in accounts}}
            )
        )

    write("acme")
    up = "/".join([".."] * len(ROOT.parts[1:]))
    arguments = ("serve", "--config", f"{up}{path}", "--log-format", "json")
    async with started(*arguments, environment={"THE_SECRET": "distinctive-secret"}) as proxy:
        write("acme", "other")
        proxy.process.send_signal(signal.SIGHUP)
        await proxy.process_says("the new configuration is in force")
        assert (await call(proxy.addresses[0], "GET", SELLERS, x_sp_account="other")).status == 200
        path.write_text("listen: nowhere")
        proxy.process.send_signal(signal.SIGHUP)
        await proxy.process_says("the new configuration was rejected; the previous one stays in force")
        assert (await call(proxy.addresses[0], "GET", SELLERS, x_sp_account="other")).status == 200
        assert await proxy.stop() == 0
    assert b"client_secret=distinctive-secret" in token_host.received[-1].body
    assert "distinctive" not in "".join(proxy.log)


async def test_the_demo_is_checked_like_everything_else() -> None:
    environment = {"SP_API_PROXY_LISTEN": "{address: '127.0.0.1:0', operations: [nosuch.*]}"}
    code, _, complained = await command("serve", "--demo", "--admin", "none", environment=environment)
    assert code == 2
    assert "listen[0].operations[0]: matches no operation" in complained


async def test_after_sigterm_requests_are_taken_for_the_delay_while_readiness_says_no(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path
) -> None:
    settings = settings_for(fake_upstream, token_host, timeouts={"shutdown_delay": "1s"})
    async with serving(settings, tmp_path) as proxy:
        assert proxy.admin is not None
        proxy.process.send_signal(signal.SIGTERM)
        await proxy.process_says("shutting down")
        assert (await call(proxy.admin, "GET", "/readyz")).status == 503
        assert (await call(proxy.addresses[0], "GET", SELLERS)).status == 200
        proxy.process.send_signal(signal.SIGHUP)
        assert await asyncio.wait_for(proxy.process.wait(), 30) == 0
    assert [line["because"] for line in proxy.lines() if line["message"] == "shutting down"] == ["SIGTERM"]
    assert [line["cut_off"] for line in proxy.lines() if line["message"] == "ended"] == [0]


async def test_a_second_signal_ends_the_delay_too(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path
) -> None:
    settings = settings_for(fake_upstream, token_host, timeouts={"shutdown_delay": "10m"})
    async with serving(settings, tmp_path) as proxy:
        proxy.process.send_signal(signal.SIGTERM)
        await proxy.process_says("shutting down")
        assert await proxy.stop(signal.SIGINT) == 130


async def test_many_idle_connections_do_not_delay_the_end(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path
) -> None:
    async with (
        serving(settings_for(fake_upstream, token_host), tmp_path) as proxy,
        contextlib.AsyncExitStack() as stack,
    ):
        for _ in range(10):
            client = await stack.enter_async_context(connect(proxy.addresses[0]))
            assert (await client.request("GET", SELLERS)).status == 200
        assert await proxy.stop() == 0


async def test_rebuild_runs_as_a_command(tmp_path: Path) -> None:
    code, _, complained = await command("operations", "rebuild", str(tmp_path), "--output", str(tmp_path / "x.csv"))
    assert code == 1
    assert complained


def test_the_example_of_the_simulators_settings_is_a_configuration() -> None:
    said = _for_people({name: f"http://127.0.0.1/{name}" for name in ("na", "eu", "fe", "lwa", "documents", "control")})
    tree: Any = yaml.safe_load(said)
    assert set(tree) == {"endpoints", "applications", "accounts"}
