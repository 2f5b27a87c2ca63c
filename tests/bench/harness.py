"""Test environment of the token and plan benchmarks: a simulator and a proxy in front of it, real processes."""

import asyncio
import re
import socket
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from proxy.simulator.state import DEMO_CLIENT, DEMO_SECRET
from tests.bench.processes import HOST, Cores, Started, free_port, python, started

PLAIN_TARGET = "/brand/new"
WAIT_BUCKET = (
    "0.1"  # seconds: a histogram bucket above the proxy's own time and below every exchange in these benchmarks
)


@dataclass(slots=True)
class Harness:
    """A running simulator and a running proxy in front of it."""

    proxy: Started
    address: str
    admin: str
    control: str
    simulator: int
    config: Path
    session: aiohttp.ClientSession
    started_at: float
    statuses: Counter[int] = field(default_factory=Counter)

    async def post_control(self, path: str, content: dict[str, Any]) -> None:
        """Send a command to the control API of the simulator."""
        async with self.session.post(self.control + path, json=content) as response:
            assert response.status == 200, await response.text()

    async def clear_faults(self) -> None:
        """Remove all injected faults."""
        async with self.session.delete(f"{self.control}/faults") as response:
            assert response.status == 200

    async def exchanges(self, kind: str = "refresh_token") -> int:
        """Return how many tokens of a kind the simulator issued."""
        async with self.session.get(f"{self.control}/state") as response:
            counts: dict[str, int] = (await response.json())["counts"]
        return counts.get(f"exchanges.{kind}", 0)

    async def response_count(self, service: str, status: int) -> int:
        """Return how many responses with `status` a service of the simulator sent."""
        async with self.session.get(f"{self.control}/state") as response:
            counts: dict[str, int] = (await response.json())["counts"]
        return counts.get(f"answers.{service}.{status}", 0)

    @property
    def token_host(self) -> str:
        """The simulator's Login with Amazon endpoint."""
        return f"http://{HOST}:{self.simulator}/auth/o2/token"

    def region(self, name: str) -> str:
        """Return the address of one of the simulator's regions."""
        return _regions(self.simulator)[name]

    async def call(self, target: str, account: str = "a0") -> int:
        """Send one request, count its status, and return it."""
        url, headers = self.address + target, {"x-sp-account": account, "Connection": "keep-alive"}
        async with self.session.get(url, headers=headers) as response:
            await response.read()
            self.statuses[response.status] += 1
            return response.status

    async def token_waits(self) -> tuple[int, int]:
        """Return how many requests needed a token so far, and how many of them waited for it."""
        async with self.session.get(f"{self.admin}/metrics") as response:
            text = await response.text()
        count = _sample(text, "spapi_proxy_token_wait_seconds_count")
        return count, count - _sample(text, f'spapi_proxy_token_wait_seconds_bucket{{le="{WAIT_BUCKET}"}}')

    async def load(self, rate: float, seconds: float, target: str = PLAIN_TARGET) -> None:
        """Send `rate` requests per second for `seconds`, without waiting for responses."""
        loop = asyncio.get_running_loop()
        begin, tasks = loop.time(), set[asyncio.Task[int]]()
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, begin + number / rate - loop.time()))
            task = asyncio.create_task(self.call(target))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)


def _sample(text: str, name: str) -> int:
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return int(float(found[1])) if found else 0


@asynccontextmanager
async def running_harness(accounts: int, *, lifetime: float = 3600.0, **settings: Any) -> AsyncIterator[Harness]:
    """Start a simulator that knows `accounts` sellers, and a proxy for them."""
    cores = Cores.of_this_machine()
    with tempfile.TemporaryDirectory() as name, running_simulator(Path(name), cores, lifetime) as simulator:
        control = f"http://{HOST}:{simulator}/_simulator"
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=120)) as session:
            for number in range(accounts):
                seller = {"name": f"a{number}", "region": "eu", "refresh_token": f"Atzr|a{number}"}
                async with session.post(f"{control}/sellers", json=seller) as response:
                    assert response.status == 200
            port, admin = free_port(), free_port()
            path = Path(name) / "config.yaml"
            path.write_text(yaml.safe_dump(settings_of(accounts, simulator, port, admin, settings)))
            path.chmod(0o600)
            began = time.monotonic()
            command = python("proxy", "serve", "--config", path, "--log-level", "error")
            with started("proxy", command, port, cores.proxy, Path(name)) as proxy:
                at = (f"http://{HOST}:{port}", f"http://{HOST}:{admin}", control, simulator, path)
                yield Harness(proxy, *at, session, began)


@contextmanager
def running_simulator(folder: Path, cores: Cores, lifetime: float) -> Iterator[int]:
    """Run a simulator that issues tokens with this lifetime in seconds; yield its port."""
    port = _four_free_ports()
    command = python("proxy", "simulate", "--port", port, "--token-lifetime", str(lifetime))
    with started("simulator", command, port, cores.other_cores, folder):
        yield port


def _four_free_ports() -> int:
    """Return the first of four consecutive ports that are free at the moment."""
    while True:
        first = free_port()
        try:
            for port in range(first + 1, first + 4):
                with socket.socket() as probe:
                    probe.bind((HOST, port))
        except (OSError, OverflowError):
            continue
        return first


def _regions(simulator: int) -> dict[str, str]:
    return {region: f"http://{HOST}:{simulator + number}" for number, region in enumerate(("na", "eu", "fe"), 1)}


def settings_of(accounts: int, simulator: int, port: int, admin: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of a proxy in front of the simulator."""
    return {
        "listen": f"{HOST}:{port}",
        "admin": f"{HOST}:{admin}",
        "applications": {"main": {"client_id": DEMO_CLIENT, "client_secret": DEMO_SECRET}},
        "accounts": {f"a{number}": {"refresh_tokens": {"eu": f"Atzr|a{number}"}} for number in range(accounts)},
        "endpoints": {**_regions(simulator), "lwa": f"http://{HOST}:{simulator}/auth/o2/token"},
        "limits": {"pace": False},
        **settings,
    }


def format_statuses(statuses: Counter[int]) -> str:
    return ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items()))
