"""Requests during one hundred configuration reloads: none may fail. Run as `python -m tests.bench.reloads`.

Half of the new configurations are invalid, each in a different way. The valid ones change settings and add and remove
accounts and a listener. Clients send continuously, on persistent connections and on a new connection per request.
"""

import argparse
import asyncio
import os
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count, cycle, islice
from pathlib import Path
from statistics import quantiles
from typing import Any

import yaml

from tests.bench.harness import PLAIN_TARGET, Harness, running_harness
from tests.bench.output import print_lines
from tests.bench.processes import Cores, cpu_seconds, end_on_signals, free_port, memory_kib
from tests.support.raw_client import call, connect

KEPT, NEW_EACH_TIME = 6, 2  # clients on persistent connections, and clients that connect for each request
ALTERNATING_ACCOUNTS = 5  # accounts present in every other valid configuration
MAX_DURATION = 20.0  # seconds for one reload

Settings = dict[str, Any]


@dataclass(slots=True)
class Seen:
    """Results of the clients."""

    latencies: list[float] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)

    def percentiles(self) -> str:
        """Return the median and the 99th percentile, in milliseconds."""
        cuts = quantiles(self.latencies, n=100)
        return f"{cuts[49] * 1000:.1f} ms, p99 {cuts[98] * 1000:.1f} ms, worst {max(self.latencies) * 1000:.0f} ms"


def main() -> int:
    """Measure and print the result; return 1 if a request failed or a reload had the wrong outcome."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.reloads", description=__doc__)
    parser.add_argument("--reloads", type=int, default=100)
    parser.add_argument("--accounts", type=int, default=100)
    options = parser.parse_args()
    end_on_signals()
    os.sched_setaffinity(0, Cores.of_this_machine().other_cores)
    with suppress(KeyboardInterrupt):
        return asyncio.run(run(options.reloads, options.accounts))
    return 130


async def run(reloads: int, accounts: int, quiet_for: float = 5.0) -> int:
    """Reload `reloads` times under load, after `quiet_for` seconds without; return 1 if anything failed."""
    async with running_harness(accounts + ALTERNATING_ACCOUNTS, quit=False) as harness:
        settings = yaml.safe_load(harness.config.read_text(encoding="utf-8"))
        leaving = {
            name: settings["accounts"].pop(name)
            for name in (f"a{accounts + more}" for more in range(ALTERNATING_ACCOUNTS))
        }
        _write(harness.config, settings)
        await _reload(harness)
        for number in range(accounts):
            await harness.call(PLAIN_TARGET, f"a{number}")
        good, broken = _good_ones(settings, leaving), _broken_ones(settings)
        # Prepared in advance: it would block the event loop of the clients.
        texts = [next(broken) if number % 2 else next(good) for number in range(reloads)]
        quiet, busy, exchanges = Seen(), Seen(), await harness.exchanges()
        await _under_load(harness, accounts, quiet, asyncio.sleep(quiet_for))
        memory, cpu = memory_kib(harness.proxy.pid, "VmRSS"), cpu_seconds(harness.proxy.pid)
        outcomes, took = Counter[tuple[str, str]](), list[float]()
        began = time.monotonic()
        await _under_load(harness, accounts, busy, _many(harness, texts, outcomes, took))
        seconds = time.monotonic() - began
        cpu = cpu_seconds(harness.proxy.pid) - cpu
        grown = memory_kib(harness.proxy.pid, "VmRSS") - memory
        fetched = await harness.exchanges() - exchanges
    print_lines(f"{accounts} accounts, {reloads} reloads in {seconds:.0f} s, {len(busy.latencies)} requests meanwhile")
    for (selected, result), number in sorted(outcomes.items()):
        print_lines(f"  {number} x {result}, should have been {selected}")
    print_lines(
        f"failed requests: {busy.faults.total()}{''.join(f'; {n} x {what}' for what, n in busy.faults.items())}"
    )
    print_lines(f"tokens fetched again for unchanged accounts: {fetched}")
    print_lines(
        f"a reload took {sorted(took)[len(took) // 2] * 1000:.0f} ms in the middle, {max(took) * 1000:.0f} ms at most"
    )
    print_lines(f"latency without reloads: {quiet.percentiles()}")
    print_lines(f"latency with them:       {busy.percentiles()}")
    print_lines(f"memory grew by {grown / 1024:.1f} MiB; CPU {cpu / seconds * 100:.0f} % of a core")
    has_failed = any(selected != result for selected, result in outcomes)
    return 1 if busy.faults or quiet.faults or fetched or has_failed else 0


async def _under_load(harness: Harness, accounts: int, seen: Seen, work: Any) -> None:
    """Do `work` while the clients send, then let their last requests complete."""
    over = asyncio.Event()
    numbers = count()

    def account() -> str:
        return f"a{next(numbers) % accounts}"

    clients = [asyncio.create_task(_on_one_connection(harness, account, seen, over)) for _ in range(KEPT)]
    clients += [asyncio.create_task(_on_new_ones(harness, account, seen, over)) for _ in range(NEW_EACH_TIME)]
    try:
        await work
    finally:
        over.set()
        await asyncio.gather(*clients)


async def _on_one_connection(harness: Harness, account: Callable[[], str], seen: Seen, over: asyncio.Event) -> None:
    # The raw client of the tests: other clients silently resend a request when its connection ends.
    while not over.is_set():
        try:
            async with connect(harness.address.removeprefix("http://")) as client:
                while not over.is_set():
                    began = time.perf_counter()
                    got = await client.request("GET", PLAIN_TARGET, x_sp_account=account())
                    _note(seen, began, got.status, complete=got.complete)
        except (OSError, EOFError) as exc:
            seen.faults[type(exc).__name__] += 1


async def _on_new_ones(harness: Harness, account: Callable[[], str], seen: Seen, over: asyncio.Event) -> None:
    while not over.is_set():
        began = time.perf_counter()
        try:
            got = await call(harness.address.removeprefix("http://"), "GET", PLAIN_TARGET, x_sp_account=account())
            _note(seen, began, got.status, complete=got.complete)
        except (OSError, EOFError) as exc:
            seen.faults[type(exc).__name__] += 1


def _note(seen: Seen, began: float, status: int, *, complete: bool) -> None:
    seen.latencies.append(time.perf_counter() - began)
    if status != 200 or not complete:
        seen.faults[f"status {status}{'' if complete else ', cut off'}"] += 1


async def _many(harness: Harness, texts: list[str], outcomes: Counter[tuple[str, str]], took: list[float]) -> None:
    for number, text in enumerate(texts):
        selected = "failed" if number % 2 else "ok"
        harness.config.write_text(text, encoding="utf-8")
        began = time.perf_counter()
        result = await _reload(harness)
        took.append(time.perf_counter() - began)
        outcomes[selected, result] += 1


def _good_ones(settings: Settings, leaving: Settings) -> Iterator[str]:
    second = f"127.0.0.1:{free_port()}"
    for number in count(1):
        changed = {**settings, "limits": {"pace": False, "max_queue": 5000 + number}}
        if number % 2:
            changed["accounts"] = {**settings["accounts"], **leaving}
            changed["listen"] = [settings["listen"], second]
        if number % 4 > 1:
            changed["timeouts"] = {"connect": f"{4 + number % 3}s"}  # a change that replaces the connection pool
        yield yaml.safe_dump(changed)


def _broken_ones(settings: Settings) -> Iterator[str]:
    first = next(iter(settings["accounts"]))
    whole = yaml.safe_dump(settings)
    texts = (
        whole[: len(whole) // 2] + "\n  : {",
        yaml.safe_dump({**settings, "acounts": {}}),
        yaml.safe_dump({**settings, "listen": [settings["listen"], settings["admin"]]}),  # in use
        yaml.safe_dump({**settings, "accounts": {first: {"refresh_tokens": {"eu": {"file": "absent"}}}}}),
        "",
    )
    return islice(cycle(texts), 1_000_000)


async def _reload(harness: Harness) -> str:
    before = await _last_reload(harness)
    harness.proxy.popen.send_signal(signal.SIGHUP)
    async with asyncio.timeout(MAX_DURATION):
        while (last := await _last_reload(harness)) == before:  # noqa: ASYNC110 - it is another process's
            await asyncio.sleep(0.005)
    return str(last["result"])


async def _last_reload(harness: Harness) -> Any:
    async with harness.session.get(f"{harness.admin}/status") as response:
        return (await response.json())["configuration"]["last_reload"]


def _write(path: Path, settings: Settings) -> None:
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")


if __name__ == "__main__":
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    raise SystemExit(main())
