"""The command `requests`: what it shows of a proxy that runs, and how it ends."""

import argparse
import asyncio
import json
import os
import pty
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from proxy.cli.admin_client import AdminAddress, address_in
from proxy.cli.tail import RequestFilter, add_flags, filter_from, follow
from proxy.server.runtime import RunningProxy
from tests.conftest import StartProxy, settings_for
from tests.support.fake_upstream import FakeUpstream, TokenHost
from tests.support.paths import ROOT
from tests.support.proxy_process import _environment, command, serving
from tests.support.raw_client import call

ORDERS = "/orders/v0/orders"
TIMEOUT = 30.0

# The command as it runs in a terminal's foreground: where tests run in the background, Ctrl-C may be ignored.
START = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from proxy.cli.main import main
sys.exit(main())
"""


@asynccontextmanager
async def following(
    *arguments: str, stdout: int = asyncio.subprocess.PIPE, **environment: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run the command beside the test, and end it."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", START, "requests", *arguments),
        cwd=ROOT,
        env=_environment(environment),
        stdout=stdout,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await asyncio.wait_for(process.communicate(), TIMEOUT)


async def line_of(stream: asyncio.StreamReader | None) -> str:
    assert stream is not None
    return (await asyncio.wait_for(stream.readline(), TIMEOUT)).decode()


def admin(proxy: RunningProxy) -> str:
    assert proxy.admin is not None
    return proxy.admin


async def test_past_and_present_are_shown_until_ctrl_c(proxy: RunningProxy) -> None:
    for path in ("/brand/new", ORDERS, ORDERS):
        await call(proxy.addresses[0], "GET", path)
    async with following("--url", admin(proxy), "-n", "2") as process:
        lines = [await line_of(process.stdout) for _ in range(2)]
        assert [line.split()[1:5] for line in lines] == [["200", "acme/eu", "GET", "orders.v0.getOrders"]] * 2
        assert "(wait 0.000, token 0.000, Amazon 0.0" in lines[1]
        await call(proxy.addresses[0], "GET", ORDERS, x_sp_account="nobody")
        assert (await line_of(process.stdout)).rstrip().endswith("UnknownAccount")
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), TIMEOUT) == 130
        assert process.stderr is not None
        assert await process.stderr.read() == b""


async def test_what_is_not_wanted_is_left_out(start_proxy: StartProxy) -> None:
    accounts = {name: {"refresh_tokens": {"eu": f"Atzr|{name}"}} for name in ("acme", "other")}
    proxy = await start_proxy(accounts=accounts)
    for account in ("acme", "other", "nobody"):
        await call(proxy.addresses[0], "GET", ORDERS, x_sp_account=account)

    code, printed, complained = await command("requests", "--once", "--json", "--failed", "--url", admin(proxy))
    assert (code, complained) == (0, "")
    (line,) = [json.loads(line) for line in printed.splitlines()]
    assert (line["account"], line["status"], line["error"]) == ("-", 400, "UnknownAccount")
    assert {"at", "duration", "wait", "token_wait", "upstream", "attempts", "operation"} <= set(line)

    async def shown(*arguments: str) -> list[tuple[str, int]]:
        parser = argparse.ArgumentParser()
        add_flags(parser)
        which, out = filter_from(parser.parse_args(["--once", "--json", *arguments])), StringIO()
        assert await asyncio.to_thread(follow, address_in(admin(proxy)), which, out, pytest.fail) == 0
        lines = [json.loads(line) for line in out.getvalue().splitlines()]
        return [(line["account"], line["status"]) for line in lines]

    acme, other, nobody = ("acme", 200), ("other", 200), ("-", 400)
    assert await shown() == [acme, other, nobody]
    assert await shown("-n", "1") == [nobody]
    assert await shown("-n", "0") == []
    assert await shown("--account", "other") == [other]
    assert await shown("--failed") == [nobody]
    assert await shown("--status", "400") == [nobody]
    assert await shown("--status", "2xx", "-n", "1") == [other]
    code, printed, complained = await command(
        *("requests", "--once", "--status", "4XX", "--account", "acme", "--url", admin(proxy))
    )
    assert (code, printed, complained) == (0, "", "no request matches\n")


async def test_the_configuration_says_where_to_ask(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path
) -> None:
    settings = settings_for(fake_upstream, token_host, admin=f"unix:{tmp_path}/admin.sock", health="127.0.0.1:0")
    async with serving(settings, tmp_path) as proxy:
        await call(proxy.addresses[0], "GET", ORDERS)
        code, printed, _ = await command("requests", "--once", "--config", str(tmp_path / "config.yaml"))
        assert (code, printed.count("orders.v0.getOrders")) == (0, 1)
        (line,) = [line for line in proxy.lines() if line["message"] == "serving"]
        code, printed, complained = await command("requests", "--url", line["health"])
        assert (code, printed) == (1, "")
        assert complained.startswith("404: Not Found. The health address only says how it is: ask at the admin address")


async def test_a_proxy_that_is_restarted_is_followed_on(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path
) -> None:
    settings = settings_for(fake_upstream, token_host, admin=f"unix:{tmp_path}/admin.sock")
    async with serving(settings, tmp_path) as first:
        await call(first.addresses[0], "GET", ORDERS)
        async with following("--config", str(tmp_path / "config.yaml")) as process:
            assert "orders.v0.getOrders" in await line_of(process.stdout)
            await first.stop()
            assert (await line_of(process.stderr)).endswith("; waiting for it\n")
            async with serving(settings, tmp_path) as second:
                await call(second.addresses[0], "GET", "/brand/new")
                assert await line_of(process.stderr) == "the proxy was restarted\n"
                assert " unknown " in await line_of(process.stdout)


async def test_a_closed_pipe_ends_it_though_nothing_is_written(proxy: RunningProxy) -> None:
    read, write = os.pipe()
    async with following("--url", admin(proxy), stdout=write) as process:
        os.close(write)
        os.close(read)
        assert await asyncio.wait_for(process.wait(), TIMEOUT) == 0
        assert process.stderr is not None
        assert await process.stderr.read() == b""


@pytest.mark.parametrize(
    ("environment", "is_coloured"),
    [({"TERM": "xterm"}, True), ({"TERM": "xterm", "NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
)
async def test_there_is_colour_on_a_terminal_that_wants_it(
    proxy: RunningProxy, environment: dict[str, str], is_coloured: bool
) -> None:
    await call(proxy.addresses[0], "GET", ORDERS)
    ours, its = pty.openpty()
    async with following("--url", admin(proxy), "--once", stdout=its, **environment) as process:
        os.close(its)
        assert await asyncio.wait_for(process.wait(), TIMEOUT) == 0
        shown = os.read(ours, 10_000)
    os.close(ours)
    assert b"orders.v0.getOrders" in shown
    assert (b"\x1b[32m200\x1b[0m" in shown) == is_coloured


async def test_nobody_there_is_a_failure_at_once() -> None:
    assert await command("requests", "--url", "127.0.0.1:1") == (
        1,
        "",
        (
            "no response from 127.0.0.1:1: Connection refused. Is the proxy running? "
            "Name its admin or health address with --url, or the file that says it with --config\n"
        ),
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("--status", "many"),
        ("--status", "6xx"),
        ("-n", "-1"),
        ("-n", "some"),
        ("--url", "https://localhost:1"),
        ("--admin", "none"),
    ],
)
async def test_what_means_nothing_is_wrong_usage(arguments: tuple[str, ...]) -> None:
    code, printed, complained = await command("requests", *arguments)
    assert (code, printed) == (2, "")
    assert "Traceback" not in complained


async def test_a_server_that_is_no_proxy_is_reported_as_such(fake_upstream: FakeUpstream) -> None:
    code, _, complained = await command("requests", "--url", fake_upstream.url)
    assert (code, complained) == (1, f"what answers at 127.0.0.1:{fake_upstream.port} is no proxy of this version\n")


async def test_a_line_can_do_nothing_to_a_terminal(fake_upstream: FakeUpstream) -> None:
    def odd() -> bytes:
        line: dict[str, Any] = {
            "at": "2026-01-01T00:00:00.000+00:00",
            "account": "\x1b[2J",
            "region": "eu",
            "status": 200,
            "method": "GET",
        }
        line |= {"operation": "x", "duration": 1.0, "wait": 0, "token_wait": 0, "upstream": None, "attempts": 2}
        line |= {"error": None, "hint": "role\n", "caller": "job"}
        body = json.dumps({"instance": "i", "cursor": "i:1", "missed": 0, "requests": [line]}).encode()
        return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body

    async def script(_: object, writer: asyncio.StreamWriter) -> None:
        writer.write(odd())

    fake_upstream.script = script
    out, complaints = StringIO(), list[str]()
    address = AdminAddress("127.0.0.1", fake_upstream.port)
    code = await asyncio.to_thread(
        follow, address, RequestFilter(follow=False), out, complaints.append, with_colour=True
    )
    assert (code, complaints) == (0, [])
    assert out.getvalue().split() == [
        *("00:00:00.000", "\x1b[32m200\x1b[0m", "?[2J/eu", "GET", "x", "1.000", "s"),
        *("(wait", "0.000,", "token", "0.000,", "Amazon", "–)", "role?,", "2", "attempts,", "by", "job"),
    ]
