"""What systemd hears of the service, and whether it takes our unit."""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import yaml

from proxy.server.systemd import Service
from tests.conftest import needs, settings_for
from tests.support.fake_upstream import FakeUpstream, TokenHost
from tests.support.paths import ROOT
from tests.support.proxy_process import ProxyProcess, started


def listening(address: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(address)
    sock.setblocking(False)
    return sock


async def test_it_hears_of_the_start_of_reloads_and_of_the_end(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings_for(fake_upstream, token_host)))
    loop = asyncio.get_running_loop()
    with listening(f"{tmp_path}/notify") as sock:
        arguments = ("serve", "--config", str(path), "--log-format", "json")
        async with started(*arguments, environment={"NOTIFY_SOCKET": f"{tmp_path}/notify"}) as proxy:
            assert await loop.sock_recv(sock, 4096) == b"READY=1\nSTATUS=serving"
            path.write_text("listen: nowhere")
            proxy.process.send_signal(signal.SIGHUP)
            reloading = await loop.sock_recv(sock, 4096)
            assert reloading.startswith(b"RELOADING=1\nMONOTONIC_USEC=")
            # Both have the machine's one monotonic clock.
            assert 0 < int(reloading.rpartition(b"=")[2]) < loop.time() * 1e6
            again = await loop.sock_recv(sock, 4096)
            assert again.startswith(b"READY=1\nSTATUS=the last configuration was rejected")
            assert await proxy.stop() == 0
            assert (await loop.sock_recv(sock, 4096)).startswith(b"STOPPING=1\n")


@asynccontextmanager
async def warming_up(
    fake_upstream: FakeUpstream, token_host: TokenHost, folder: Path
) -> AsyncIterator[tuple[ProxyProcess, socket.socket]]:
    """Run a proxy that waits for its first tokens until `token_host.held` is set; yield it, and what systemd hears."""
    token_host.held = asyncio.Event()
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings_for(fake_upstream, token_host, warm_up=True)))
    with listening(f"{folder}/notify") as sock:
        arguments = ("serve", "--config", str(path), "--log-format", "json")
        async with started(*arguments, environment={"NOTIFY_SOCKET": f"{folder}/notify"}) as proxy:
            yield proxy, sock


async def test_it_hears_nothing_before_the_tokens_are_there(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path
) -> None:
    async with warming_up(fake_upstream, token_host, tmp_path) as (_, sock):
        heard = asyncio.create_task(asyncio.get_running_loop().sock_recv(sock, 4096))
        await token_host.arrived.wait()
        assert not heard.done()
        assert token_host.held is not None
        token_host.held.set()
        assert (await heard).startswith(b"READY=1\n")


async def test_a_reload_before_the_tokens_are_there_makes_it_no_more_ready(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path
) -> None:
    async with warming_up(fake_upstream, token_host, tmp_path) as (proxy, sock):
        await token_host.arrived.wait()
        proxy.process.send_signal(signal.SIGHUP)
        await proxy.process_says("the configuration is unchanged")
        with pytest.raises(BlockingIOError):
            sock.recv(4096)
        assert token_host.held is not None
        token_host.held.set()
        assert (await asyncio.get_running_loop().sock_recv(sock, 4096)).startswith(b"READY=1\n")


def test_an_address_without_a_file_is_understood_and_one_without_a_reader_hurts_nobody(tmp_path: Path) -> None:
    name = f"sp-api-proxy-test-{os.getpid()}"
    with listening(f"\0{name}") as sock:
        Service(f"@{name}").notify_ready()
        assert sock.recv(4096) == b"READY=1\nSTATUS=serving"
    Service(f"@{name}").notify_ready()
    Service(f"{tmp_path}/nobody").notify_stopping()
    Service("").notify_reloading()


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    needs(shutil.which("systemd-analyze") is not None, "systemd-analyze")
    text = (ROOT / "config" / "systemd" / "sp-api-proxy.service").read_text(encoding="utf-8")
    unit = tmp_path / "sp-api-proxy.service"
    unit.write_text(text.replace("/usr/local/bin/sp-api-proxy", sys.executable), encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
