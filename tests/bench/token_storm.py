"""How many tokens does the proxy fetch, and does anybody wait for them? `python -m tests.bench.token_storm`.

Real processes: the proxy, the simulator of Amazon and Login with Amazon, and this load. The exit code is 1 where a
promise is not kept.
"""

import argparse
import asyncio
import re
import resource
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from proxy.request.tokens import LOOK_AGAIN, RENEW_AT, RENEW_LEAD
from proxy.simulator.state import DEMO_CLIENT, DEMO_SECRET
from tests.bench.processes import HOST, Cores, Started, end_on_signals, free_port, memory_kib, python, started

ORDINARY = "/brand/new"
ADDRESS = "/orders/v0/orders/{}/address"
WAITED = "0.1"  # seconds: a bucket of the histogram, far above what the proxy needs and below every exchange here


@dataclass(slots=True)
class World:
    """A simulator and a proxy before it."""

    proxy: Started
    address: str
    admin: str
    control: str
    session: aiohttp.ClientSession
    started_at: float
    statuses: Counter[int] = field(default_factory=Counter)

    async def order(self, path: str, content: dict[str, Any]) -> None:
        """Tell the simulator something."""
        async with self.session.post(self.control + path, json=content) as answer:
            assert answer.status == 200, await answer.text()

    async def forget_faults(self) -> None:
        """Let everything work again."""
        async with self.session.delete(f"{self.control}/faults") as answer:
            assert answer.status == 200

    async def exchanges(self, kind: str = "refresh_token") -> int:
        """Return how many tokens of a kind the simulator gave."""
        async with self.session.get(f"{self.control}/state") as answer:
            counts: dict[str, int] = (await answer.json())["counts"]
        return counts.get(f"exchanges.{kind}", 0)

    async def call(self, target: str, account: str = "a0") -> None:
        """Send one request, and count its status."""
        url, headers = self.address + target, {"x-sp-account": account, "Connection": "keep-alive"}
        async with self.session.get(url, headers=headers) as answer:
            await answer.read()
            self.statuses[answer.status] += 1

    async def waits(self) -> tuple[int, int]:
        """Return how many requests asked for a token so far, and how many of them waited for it."""
        async with self.session.get(f"{self.admin}/metrics") as answer:
            text = await answer.text()
        count = _sample(text, "spapi_proxy_token_wait_seconds_count")
        return count, count - _sample(text, f'spapi_proxy_token_wait_seconds_bucket{{le="{WAITED}"}}')

    async def load(self, rate: float, seconds: float, target: str = ORDINARY) -> None:
        """Send `rate` requests per second for `seconds`, whether answers come or not."""
        loop = asyncio.get_running_loop()
        begin, tasks = loop.time(), set[asyncio.Task[None]]()
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
async def world(accounts: int, *, lifetime: float = 3600.0, **settings: Any) -> AsyncIterator[World]:
    """Start a simulator that knows `accounts` sellers, and a proxy for them."""
    cores = Cores.of_this_machine()
    with tempfile.TemporaryDirectory() as name, _simulator(Path(name), cores, lifetime) as simulator:
        control = f"http://{HOST}:{simulator}/_simulator"
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=120)) as session:
            for number in range(accounts):
                seller = {"name": f"a{number}", "region": "eu", "refresh_token": f"Atzr|a{number}"}
                async with session.post(f"{control}/sellers", json=seller) as answer:
                    assert answer.status == 200
            port, admin = free_port(), free_port()
            path = Path(name) / "config.yaml"
            path.write_text(yaml.safe_dump(_settings(accounts, simulator, port, admin, settings)))
            began = time.monotonic()
            command = python("proxy", "serve", "--config", path, "--log-level", "error")
            with started("proxy", command, port, cores.proxy, Path(name)) as proxy:
                at = (f"http://{HOST}:{port}", f"http://{HOST}:{admin}", control)
                yield World(proxy, *at, session, began)


@contextmanager
def _simulator(folder: Path, cores: Cores, lifetime: float) -> Iterator[int]:
    port = _four_free_ports()
    command = python("proxy", "simulate", "--port", port, "--token-lifetime", str(lifetime))
    with started("simulator", command, port, cores.others, folder):
        yield port


def _four_free_ports() -> int:
    """Return the first of four ports in a row that nobody uses at the moment."""
    while True:
        first = free_port()
        try:
            for port in range(first + 1, first + 4):
                with socket.socket() as probe:
                    probe.bind((HOST, port))
        except (OSError, OverflowError):
            continue
        return first


def _settings(accounts: int, simulator: int, port: int, admin: int, settings: dict[str, Any]) -> dict[str, Any]:
    regions = {region: f"http://{HOST}:{simulator + number}" for number, region in enumerate(("na", "eu", "fe"), 1)}
    return {
        "listen": f"{HOST}:{port}",
        "admin": f"{HOST}:{admin}",
        "applications": {"main": {"client_id": DEMO_CLIENT, "client_secret": DEMO_SECRET}},
        "accounts": {f"a{number}": {"refresh_tokens": {"eu": f"Atzr|a{number}"}} for number in range(accounts)},
        "endpoints": {**regions, "lwa": f"http://{HOST}:{simulator}/auth/o2/token"},
        "limits": {"pace": False},
        **settings,
    }


Result = tuple[str, bool]


async def cold_start(_: float) -> Result:
    """(a) 2,000 requests at once over 100 accounts, and no token yet."""
    async with world(100) as here:
        await asyncio.gather(*(here.call(ORDINARY, f"a{number % 100}") for number in range(2000)))
        exchanges = await here.exchanges()
    return f"{_said(here.statuses)}; {exchanges} exchanges", here.statuses == {200: 2000} and exchanges == 100


async def short_lives(seconds: float) -> Result:
    """(b) tokens that live 3 s, a token host that takes 1 s, 300 requests per second."""
    life, takes = 3.0, 1.0
    period = min(RENEW_AT * life, life - life / 20 - RENEW_LEAD * takes)
    async with world(1, lifetime=life) as here:
        await here.order("/faults", {"kind": "latency", "service": "lwa", "seconds": takes})
        await here.call(ORDINARY)
        (before, waited_before), exchanged_before = await here.waits(), await here.exchanges()
        await here.load(300, seconds)
        (after, waited), exchanges = await here.waits(), await here.exchanges()
    waited, exchanges = waited - waited_before, exchanges - exchanged_before
    most = 1.3 * seconds / period
    text = (
        f"{_said(here.statuses)}; {waited} of {after - before} waited for a token; {exchanges} exchanges in "
        f"{seconds:g} s, renewed every {period:.2f} s, at most {most:.0f}"
    )
    return text, set(here.statuses) == {200} and waited == 0 and exchanges <= most


async def dead_token_host(_: float) -> Result:
    """(c) the token host dead for the last third of a token's life, 100 requests per second."""
    life = 30.0
    async with world(1, lifetime=life) as here:
        asked = time.monotonic()
        await here.call(ORDINARY)

        async def die_and_return() -> None:
            await asyncio.sleep(asked + life * 2 / 3 - time.monotonic())
            await here.order("/faults", {"kind": "status", "service": "lwa", "status": 503})
            await asyncio.sleep(asked + life - time.monotonic() - 0.1)
            await here.forget_faults()

        await asyncio.gather(here.load(100, life + LOOK_AGAIN), die_and_return())
        exchanges = await here.exchanges()
    return f"{_said(here.statuses)}; {exchanges} exchanges", set(here.statuses) == {200} and exchanges == 2


async def many_orders(_: float) -> Result:
    """(d) the addresses of 5,000 orders."""
    async with world(1) as here:
        orders = iter(range(5000))

        async def one_after_another() -> None:
            for number in orders:
                await here.call(ADDRESS.format(f"902-0000000-{number:07d}"))

        await asyncio.gather(*(one_after_another() for _ in range(20)))
        minted, exchanges = await here.exchanges("rdt"), await here.exchanges()
    text = f"{_said(here.statuses)}; {minted} RDT, {exchanges} ordinary exchange"
    return text, here.statuses == {200: 5000} and (minted, exchanges) == (1, 1)


async def many_accounts(_: float) -> Result:
    """2,000 accounts: from start to ready, and resident memory; aim: under 2 s and 120 MiB."""
    async with world(2000) as here:
        seconds = await _until_ready(here)
        memory = memory_kib(here.proxy.pid, "VmRSS") / 1024
    async with world(2000, warm_up=True) as warm:
        warm_seconds = await _until_ready(warm)
        warm_memory = memory_kib(warm.proxy.pid, "VmRSS") / 1024
        exchanges = await warm.exchanges()
    text = (
        f"ready after {seconds:.2f} s with {memory:.0f} MiB; with warm_up after {warm_seconds:.2f} s and "
        f"{exchanges} exchanges, with {warm_memory:.0f} MiB"
    )
    return text, seconds < 2 and memory < 120 and exchanges == 2000


async def _until_ready(here: World) -> float:
    while True:
        async with here.session.get(f"{here.admin}/readyz") as answer:
            if answer.status == 200:
                return time.monotonic() - here.started_at
        await asyncio.sleep(0.01)


def _said(statuses: Counter[int]) -> str:
    return ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items()))


RUNS: dict[str, Callable[[float], Awaitable[Result]]] = {
    "a": cold_start,
    "b": short_lives,
    "c": dead_token_host,
    "d": many_orders,
    "accounts": many_accounts,
}


def main() -> int:
    """Make the runs and print them as Markdown; 1 where a promise was not kept."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.token_storm", description=__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"which: {', '.join(RUNS)} (default: all)")
    parser.add_argument("--seconds", type=float, default=60, help="how long (b) takes (default 60)")
    options = parser.parse_args()
    end_on_signals()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # two thousand connections at once, twice
    kept = []
    for name in options.runs or RUNS:
        title = (RUNS[name].__doc__ or "").strip()
        text, good = asyncio.run(_run(RUNS[name], options.seconds))
        kept.append(good)
        sys.stdout.write(f"- {title}\n  {'kept' if good else 'NOT KEPT'}: {text}\n")
        sys.stdout.flush()
    return 0 if all(kept) else 1


async def _run(run: Callable[[float], Awaitable[Result]], seconds: float) -> Result:
    return await run(seconds)


if __name__ == "__main__":
    sys.exit(main())
