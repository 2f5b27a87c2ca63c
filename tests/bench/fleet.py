"""Replicas that share one Redis: correctness under load and faults, and cost: `python -m tests.bench.fleet`.

Real processes: a redis-server, the simulator of Amazon and Login with Amazon, and 1, 3 and 10 proxies for 100 accounts.
Some accounts are offered more calls than their plans permit; all tokens are kept in use. The runs are repeated with
Redis and one of the proxies killed half way. The exit code is 1 if a requirement is not met.
"""

import argparse
import asyncio
import os
import re
import resource
import shutil
import signal
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from tests.bench.harness import PLAIN_TARGET, running_simulator, settings_of
from tests.bench.processes import HOST, Cores, Started, cpu_seconds, end_on_signals, free_port, python, started
from tests.support.redis_server import RedisServer, redis_server

ACCOUNTS = 100
RENEWALS = 3  # of each token in one run
LIFETIME = 1 / 2.85  # of a token, in runs: the third renewal comes at 0.84 to 0.95 of the run, the fourth after its end
RATE, BURST = 5.0, 10  # of getListingsItem in the table
TEMPLATE = "/listings/2021-08-01/items/{sellerId}/{sku}"
TARGET = "/listings/2021-08-01/items/A1SELLER/sku-1"
PACED = 4  # accounts that are offered more calls than their plans permit
MIN_SHARE, MAX_SHARE, MAX_THROTTLED = 0.98, 1.02, 0.01
BACKGROUND = 200.0  # requests per second over all accounts and proxies, so that every token is in use everywhere
KEY = "0123456789abcdef" * 3
NO_RESPONSE = 0  # status of a request without a response


@dataclass(slots=True)
class Proxy:
    """One replica."""

    process: Started
    address: str
    admin: str
    is_alive: bool = True


@dataclass(slots=True)
class Fleet:
    """The running processes, and the counts of responses."""

    proxies: list[Proxy]
    redis: RedisServer
    control: str
    session: aiohttp.ClientSession
    # By load (paced, background), status, and error code of the proxy.
    statuses: Counter[tuple[str, int, str]] = field(default_factory=Counter)
    lost_with_the_replica: int = 0

    async def call(self, load: str, proxy: Proxy, target: str, account: int) -> int:
        """Send one request and count its status."""
        try:
            headers = {"x-sp-account": f"a{account}"}
            async with self.session.get(proxy.address + target, headers=headers) as response:
                await response.read()
                status, error = response.status, response.headers.get("x-sp-proxy-error", "")
        except (aiohttp.ClientError, OSError):
            status, error = NO_RESPONSE, "no response"
        if status == NO_RESPONSE and not proxy.is_alive:
            self.lost_with_the_replica += 1
        else:
            self.statuses[load, status, error] += 1
        return status

    def alive(self) -> list[Proxy]:
        """Return the replicas that run, as the health checks of a load balancer would report."""
        return [proxy for proxy in self.proxies if proxy.is_alive]

    async def counts(self) -> dict[str, int]:
        """Return the counters of the simulator."""
        async with self.session.get(f"{self.control}/state") as response:
            counts: dict[str, int] = (await response.json())["counts"]
            return counts

    async def up(self) -> list[float]:
        """Return, for each replica, whether it is connected to Redis."""
        found = []
        for proxy in self.alive():
            async with self.session.get(f"{proxy.admin}/metrics") as response:
                text = await response.text()
            match = re.search(r"^spapi_proxy_store_up (\S+)$", text, re.MULTILINE)
            assert match is not None
            found.append(float(match[1]))
        return found


@asynccontextmanager
async def fleet(replicas: int, lifetime: float, *, shared: bool = True) -> AsyncIterator[Fleet]:
    """Start all processes; `lifetime` is that of the tokens, in seconds."""
    everywhere = frozenset(os.sched_getaffinity(0))
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sp-api-proxy-bench-")))
        redis = stack.enter_context(redis_server(folder))
        simulator = stack.enter_context(running_simulator(folder, Cores(everywhere, everywhere), lifetime))
        control = f"http://{HOST}:{simulator}/_simulator"
        limits = aiohttp.ClientTimeout(total=60)
        connector = aiohttp.TCPConnector(limit=0)
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector, timeout=limits))
        for number in range(ACCOUNTS):
            seller = {"name": f"a{number}", "region": "eu", "refresh_token": f"Atzr|a{number}"}
            async with session.post(f"{control}/sellers", json=seller) as response:
                assert response.status == 200
        store: dict[str, Any] = {"store": redis.url, "store_key": KEY} if shared else {}
        proxies = [_proxy(stack, folder, simulator, number, everywhere, store) for number in range(replicas)]
        plan = {"method": "GET", "path": TEMPLATE, "rate": RATE, "burst": BURST, "announce": True, "enforce": True}
        async with session.post(f"{control}/plans", json=plan) as response:
            assert response.status == 200
        yield Fleet(proxies, redis, control, session)


def _proxy(
    stack: AsyncExitStack, folder: Path, simulator: int, number: int, cores: frozenset[int], store: dict[str, Any]
) -> Proxy:
    port, admin = free_port(), free_port()
    path = folder / f"config-{number}.yaml"
    path.write_text(
        yaml.safe_dump(
            settings_of(ACCOUNTS, simulator, port, admin, {"limits": {"pace": True, "max_wait": "30s"}, **store})
        )
    )
    path.chmod(0o600)
    command = python("proxy", "serve", "--config", path, "--log-level", "warning")
    process = stack.enter_context(started(f"proxy-{number}", command, port, cores, folder))
    return Proxy(process, f"http://{HOST}:{port}", f"http://{HOST}:{admin}")


@dataclass(frozen=True, slots=True)
class Outcome:
    """Results of one run."""

    replicas: int
    fault: bool
    exchanges: int
    share: float  # of the calls that the plans of the paced accounts permitted
    throttled: float  # share of Amazon's responses under the plan that were 429s
    failed: dict[str, int]
    lost: int
    answered: int
    healed: bool
    lines: int  # of the store in the log

    def problems(self) -> list[str]:
        """Return the requirements that are not met."""
        wrong = [f"{count} requests failed: {what}" for what, count in self.failed.items()]
        if not self.healed:
            wrong.append("a replica did not take Redis up again")
        if not self.fault:
            if self.exchanges != ACCOUNTS * (RENEWALS + 1):
                wrong.append(f"{self.exchanges} exchanges instead of {ACCOUNTS * (RENEWALS + 1)}")
            if not MIN_SHARE <= self.share <= MAX_SHARE:
                wrong.append(f"{self.share:.1%} of the plan")
            if self.throttled > MAX_THROTTLED:
                wrong.append(f"{self.throttled:.1%} of Amazon's responses were 429s")
        return wrong

    def row(self) -> str:
        """Return the row of the table."""
        failed = ", ".join(f"{count} x {what}" for what, count in self.failed.items()) or "none"
        return (
            f"| {self.replicas} | {'Redis and a replica killed' if self.fault else '-'} | {self.answered} | "
            f"{self.exchanges} | {self.share:.1%} | {self.throttled:.1%} | {failed} | {self.lost} | {self.lines} |"
        )


HEAD = (
    "| replicas | fault | responses | exchanges | of the plan | 429s by Amazon | failed | lost with the replica | "
    "log lines of the store |\n"
    "| ---: | --- | ---: | ---: | ---: | ---: | --- | ---: | ---: |\n"
)


async def run(replicas: int, seconds: float, *, fault: bool) -> Outcome:
    """Load a fleet for `seconds`; with `fault`, kill Redis and a replica half way, and restart Redis later."""
    async with fleet(replicas, seconds * LIFETIME) as harness:
        loop = asyncio.get_running_loop()
        for proxy in harness.proxies:  # warm-up: fetch tokens and open connections
            await asyncio.gather(
                *(harness.call("background", proxy, PLAIN_TARGET, number) for number in range(ACCOUNTS))
            )
        begin = loop.time()
        end = begin + seconds
        served = 0

        async def client(number: int) -> None:
            nonlocal served
            turn = number // PACED
            while loop.time() < end:
                proxies = harness.alive()  # round robin, as a load balancer does
                status = await harness.call("paced", proxies[turn % len(proxies)], TARGET, number % PACED)
                turn += 1
                served += status == 200 and loop.time() <= end

        async def background() -> None:
            tasks = set[asyncio.Task[int]]()
            for number in range(int(BACKGROUND * seconds)):
                await asyncio.sleep(max(0.0, begin + number / BACKGROUND - loop.time()))
                proxies = harness.alive()
                # Every account at every replica in turn.
                proxy, account = proxies[number // ACCOUNTS % len(proxies)], number % ACCOUNTS
                task = asyncio.create_task(harness.call("background", proxy, PLAIN_TARGET, account))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            await asyncio.gather(*tasks)

        async def kill() -> None:
            if not fault:
                return
            await asyncio.sleep(seconds / 2)
            harness.redis.stop(signal.SIGKILL)
            if replicas > 1:
                harness.proxies[-1].is_alive = False
                os.kill(harness.proxies[-1].process.pid, signal.SIGKILL)
            await asyncio.sleep(seconds / 6)
            harness.redis.start()

        async def count() -> dict[str, int]:
            await asyncio.sleep(end - loop.time())  # before the next renewal
            return await harness.counts()

        clients = (client(number) for number in range(PACED * max(5, 2 * replicas)))
        counting = asyncio.create_task(count())
        await asyncio.gather(kill(), background(), *clients)
        counts = await counting
        throttled = counts.get("answers.eu.429", 0)
        healed = await harness.up() == [1.0] * len(harness.alive())
        failed = {
            f"{load} {status or ''} {error}".rstrip(): count
            for (load, status, error), count in harness.statuses.items()
            if status != 200
        }
        return Outcome(
            replicas,
            fault,
            counts.get("exchanges.refresh_token", 0),
            served / (PACED * (BURST + RATE * seconds)),
            throttled / max(1, throttled + harness.statuses["paced", 200, ""]),
            failed,
            harness.lost_with_the_replica,
            sum(harness.statuses.values()),
            healed,
            sum(proxy.process.log_file.read_text().count('"message": "store') for proxy in harness.proxies),
        )


# Cost.


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of requests that never wait for their plan: CPU of the proxy, and latency."""

    cpu_us: float
    p50_ms: float
    p99_ms: float


async def cost(seconds: float, *, shared: bool, connections: int) -> Cost:
    """Send requests of all accounts, each well below its plan, over `connections` connections."""
    async with fleet(1, 3600.0, shared=shared) as harness:
        loop, (proxy,) = asyncio.get_running_loop(), harness.proxies
        # A plan without effective limit: the request to Redis is measured, not a wait.
        plan = {"method": "GET", "path": TEMPLATE, "rate": 10000, "burst": 10000, "announce": True, "enforce": False}
        async with harness.session.post(f"{harness.control}/plans", json=plan) as response:
            assert response.status == 200
        for account in range(ACCOUNTS):
            assert await harness.call("warm", proxy, TARGET, account) == 200
        latencies: list[float] = []
        before, end = cpu_seconds(proxy.process.pid), loop.time() + seconds

        async def client(first: int) -> None:
            account = first
            while (began := loop.time()) < end:
                assert await harness.call("cost", proxy, TARGET, account % ACCOUNTS) == 200
                latencies.append(loop.time() - began)
                account += connections

        await asyncio.gather(*(client(number) for number in range(connections)))
        used = cpu_seconds(proxy.process.pid) - before
        cuts = statistics.quantiles(latencies, n=100)
        return Cost(used / len(latencies) * 1e6, cuts[49] * 1e3, cuts[98] * 1e3)


async def costs(seconds: float, rounds: int) -> None:
    """Print the medians with the store in memory and in Redis, measured alternately."""
    say("\n| connections | store | CPU µs/request | p50 ms | p99 ms |\n| ---: | --- | ---: | ---: | ---: |\n")
    for connections in (1, 32):
        found: dict[bool, list[Cost]] = {False: [], True: []}
        for _ in range(rounds):
            for shared, so_far in found.items():
                so_far.append(await cost(seconds, shared=shared, connections=connections))
        for shared, so_far in found.items():
            cpu, p50, p99 = (
                statistics.median(getattr(one, name) for one in so_far) for name in ("cpu_us", "p50_ms", "p99_ms")
            )
            say(f"| {connections} | {'Redis' if shared else 'memory'} | {cpu:.0f} | {p50:.2f} | {p99:.2f} |\n")


def say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


async def runs(options: argparse.Namespace) -> bool:
    """Make the runs and print their table; return whether all requirements are met."""
    problems: list[str] = []
    selected = {"all": (False, True), "steady": (False,), "faults": (True,), "cost": ()}[options.what]
    if selected:
        say(HEAD)
        for fault in selected:
            for replicas in options.replicas:
                outcome = await run(replicas, options.seconds, fault=fault)
                say(outcome.row() + "\n")
                problems += [f"{replicas} replicas{', fault' if fault else ''}: {text}" for text in outcome.problems()]
    if options.what in {"all", "cost"}:
        await costs(min(options.seconds, 8.0), options.rounds)
    for text in problems:
        say(f"NOT KEPT: {text}\n")
    return not problems


def main() -> int:
    """Print the tables; return 1 if a requirement is not met."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.fleet", description=__doc__)
    parser.add_argument("what", nargs="?", choices=("all", "steady", "faults", "cost"), default="all")
    parser.add_argument("--seconds", type=float, default=60, help="how long each run takes (default 60)")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 3, 10], help="how many proxies (default 1 3 10)")
    parser.add_argument("--rounds", type=int, default=3, help="how often the cost is measured (default 3)")
    options = parser.parse_args()
    if shutil.which("redis-server") is None:
        say("redis-server is missing: apt-get install redis-server\n")
        return 2
    end_on_signals()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return 0 if asyncio.run(runs(options)) else 1


if __name__ == "__main__":
    sys.exit(main())
