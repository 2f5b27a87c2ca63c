"""The commands about a proxy that runs: wait, healthcheck, shutdown; and the address that ends it."""

import asyncio
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import yaml

from proxy.cli import admin_client
from proxy.config import Address
from proxy.server.runtime import RunningProxy
from tests.conftest import StartProxy, settings_for
from tests.support.clock import FakeClock
from tests.support.fake_upstream import FakeUpstream, Received, TokenHost, http_response
from tests.support.paths import ROOT
from tests.support.proxy_process import command, serving
from tests.support.raw_client import call

SELLERS = "/sellers/v1/marketplaceParticipations"


async def test_the_state_of_a_proxy_is_asked_for_by_url_and_by_configuration(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path
) -> None:
    settings = settings_for(fake_upstream, token_host, admin=f"unix:{tmp_path}/admin.sock")
    async with serving({**settings, "health": "127.0.0.1:0"}, tmp_path) as proxy:
        (line,) = [line for line in proxy.lines() if line["message"] == "serving"]
        config = ("--config", str(tmp_path / "config.yaml"))
        # What is wrong with a newer configuration says nothing of the proxy.
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({**settings, "acounts": {}}))
        assert await command("wait", "--timeout", "5s", *config) == (0, "ok\n", "")
        assert await command("healthcheck", *config) == (0, "ok\n", "")
        url = ("--url", f"http://{line['health']}")
        assert await command("healthcheck", "--live", *url) == (0, "ok\n", "")
        code, _, complained = await command("shutdown", *url)
        assert code == 1
        assert complained.startswith("404: Not Found. The health address only says how it is: ask at the admin address")
        code, _, complained = await command("shutdown", *config)
        assert code == 1
        assert complained == (
            "404: switched off: the setting quit is false; set quit: true, which needs no restart, and ask again\n"
        )
        code, _, complained = await command("healthcheck", "--url", f"http://{proxy.addresses[0]}")
        assert code == 1
        assert f". {proxy.addresses[0]} is where apps send their requests. Name its admin or health" in complained
    for name, *more in (("healthcheck",), ("wait", "--timeout", "50ms"), ("shutdown",)):
        code, printed, complained = await command(name, *more, *url)
        assert (code, printed) == (1, "")
        assert complained == (
            f"no answer from {line['health']}: Connection refused. Is the proxy running? "
            "Name its admin or health address with --url, or the file that says it with --config\n"
        )


@pytest.mark.parametrize(
    "arguments",
    [
        ("wait", "--timeout", "soon"),
        ("healthcheck", "--url", "https://localhost:1"),
        ("healthcheck", "--url", "http://localhost:1/readyz"),
        ("healthcheck", "--url", "http://localhost:port"),
        ("healthcheck", "--admin", "none"),
        ("healthcheck", "--admin", "127.0.0.1:0"),
        ("healthcheck", "--config", "/nonexistent"),
    ],
)
async def test_what_cannot_be_asked_is_wrong_usage(arguments: tuple[str, ...]) -> None:
    code, printed, complained = await command(*arguments)
    assert (code, printed) == (2, "")
    assert "Traceback" not in complained


async def test_somebody_else_at_the_address_is_not_taken_for_the_proxy(fake_upstream: FakeUpstream) -> None:
    async def script(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(http_response("404 Not Found", b"404 page not found"))

    fake_upstream.script = script
    address = admin_client.address_in(fake_upstream.url)
    told = await asyncio.to_thread(admin_client.request, address, "GET", "/readyz")
    assert told.text.startswith(f"404: 404 page not found. {address} is perhaps no proxy's. ")


async def test_waiting_ends_when_the_proxy_is_ready(start_proxy: StartProxy, token_host: TokenHost) -> None:
    token_host.held = asyncio.Event()
    proxy = await start_proxy(warm_up=True)
    assert proxy.admin is not None
    address = admin_client.address_in(proxy.admin)
    first = await asyncio.to_thread(admin_client.request, address, "GET", "/readyz")
    assert first == (False, "503: not ready: the tokens (warm_up)")
    waiting = asyncio.create_task(asyncio.to_thread(admin_client.wait_until_ready, address, 20.0))
    token_host.held.set()
    assert await waiting == (True, "ok")


def test_waiting_ends_with_its_time() -> None:
    clock = FakeClock()
    nobody = Address("127.0.0.1", 1)
    response = admin_client.wait_until_ready(nobody, 5.0, now=clock, sleep=clock.advance)
    assert not response.ok
    assert 4.8 <= clock() - FakeClock()() <= 5.0


def test_an_address_that_is_open_to_all_is_asked_at_this_machines_own() -> None:
    assert ": Connection refused. " in admin_client.request(Address("0.0.0.0", 1), "GET", "/livez").text
    assert admin_client.address_in("http://[::1]:9090") == Address("::1", 9090)


async def test_a_post_ends_the_proxy_as_a_signal_does(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path
) -> None:
    async with serving(settings_for(fake_upstream, token_host, quit=True), tmp_path) as proxy:
        assert proxy.admin is not None
        assert (await call(proxy.admin, "GET", "/quitquitquit")).status == 405
        assert (await call(proxy.admin, "POST", "/quitquitquit", host="evil.example")).status == 421
        assert (await call(proxy.admin, "POST", "/quitquitquit", origin="https://evil.example")).status == 403
        assert (await call(proxy.addresses[0], "GET", SELLERS)).status == 200
        assert await command("shutdown", "--url", f"http://{proxy.admin}") == (0, "shutting down\n", "")
        assert await asyncio.wait_for(proxy.process.wait(), 30) == 0
    assert [line["because"] for line in proxy.lines() if line["message"] == "shutting down"] == ["/quitquitquit"]


async def test_a_job_as_the_reference_has_it_ends_the_proxy_and_keeps_its_own_exit_code(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path
) -> None:
    page = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```sh\n(set -e\nsp-api-proxy wait [^`]*)```", page)
    async with serving(settings_for(fake_upstream, token_host, quit=True), tmp_path) as proxy:
        for name, text in {
            "sp-api-proxy": f'cd {ROOT} && exec {sys.executable} -m proxy "$@" --url http://{proxy.admin}',
            "my-job": "exit 7",
        }.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
            (tmp_path / name).chmod(0o755)
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        job = await asyncio.create_subprocess_exec("sh", "-c", script, env=environment)
        assert await asyncio.wait_for(job.wait(), 60) == 7
        assert await asyncio.wait_for(proxy.process.wait(), 30) == 0


async def test_a_signal_after_the_post_ends_at_once(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path
) -> None:
    settings = settings_for(fake_upstream, token_host, quit=True, timeouts={"shutdown_delay": "10m"})
    async with serving(settings, tmp_path) as proxy:
        assert proxy.admin is not None
        assert (await call(proxy.admin, "POST", "/quitquitquit")).status == 200
        await proxy.process_says("shutting down")
        assert await proxy.stop(signal.SIGTERM) == 143


async def test_nobody_ends_the_proxy_where_it_is_not_asked_for(proxy: RunningProxy) -> None:
    assert proxy.admin is not None
    assert (await call(proxy.admin, "POST", "/quitquitquit")).status == 404
    assert not proxy.quit.is_set()
    assert (await call(proxy.admin, "GET", "/status")).get("content-type") == "application/json; charset=utf-8"
