"""Growth of the cost of a request with accounts, operations and headers: `python -m tests.bench.memory_growth`.

The cases are loaded in turn over several rounds; each is compared within its round with the smallest of its kind.
"""

import argparse
import asyncio
import http.client
import itertools
import json
import os
import re
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import uvloop

from proxy.amazon.operations import Operation, load_table
from tests.bench.compare import environment_lines
from tests.bench.compared_proxies import PATH, BenchUpstream, bench_upstream
from tests.bench.instructions import can_count, counting
from tests.bench.load import FINAL_RESPONSE_TIMEOUT, Connection, Tally
from tests.bench.operations_upstream import filler
from tests.bench.output import print_lines
from tests.bench.processes import (
    HOST,
    Cores,
    Started,
    cpu_seconds,
    end_on_signals,
    free_port,
    memory_kib,
    python,
    started,
)
from tests.bench.upstream import RESPONSE_SIZE

ACCOUNTS = (1, 100, 2000)
OPERATIONS_EACH = 10  # called by every account before memory is measured again
WARM_UP = 0.3  # seconds
FIRST_TIME = 60.0  # seconds within which every request of a kind must complete once

TARGET = "/orders/v0/orders"
_BODY = b'{"filler": "a small body"}'
_PARAMETER = re.compile(r"\{[^}]*\}")


@dataclass(frozen=True, slots=True)
class Case:
    """One case: requests sent in rotation through the proxy that has `accounts` accounts."""

    kind: str
    name: str
    accounts: int
    requests: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class Cost:
    """One measurement of one case. `cpu_us` and `instructions` are those of the proxy, per request."""

    cpu_us: float
    instructions: float | None
    requests_per_second: float
    core: float
    faults: dict[str, int]


@dataclass(frozen=True, slots=True)
class Footprint:
    """Memory of a proxy with so many accounts: resident MiB, and the cost of one scrape of its metrics."""

    accounts: int
    when: str
    mib: float
    metrics_ms: float
    metrics_kib: float
    max_latency_ms: float  # slowest ordinary request during the scrape


@dataclass(frozen=True, slots=True)
class Proxy:
    """A running proxy with so many accounts."""

    accounts: int
    process: Started
    port: int
    admin: int


class Rotating(Connection):
    """Sends all requests in rotation; all connections share one rotation."""

    def __init__(self, requests: Iterator[bytes], tally: Tally) -> None:
        super().__init__(b"", RESPONSE_SIZE, tally)
        self._requests = requests

    def _send(self) -> None:
        request = None if self._finishing else next(self._requests, None)
        if request is None:
            self._finishing = True
        else:
            self._request = request
        super()._send()


def main() -> int:
    """Measure and print the tables as Markdown; return 1 if a request failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.memory_growth", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each measurement (default 1.5)")
    parser.add_argument("--rounds", type=int, default=5, help="in which each is measured once (default 5)")
    parser.add_argument("--connections", type=int, default=32, help="at once (default 32)")
    parser.add_argument("--only", metavar="KIND", help="accounts, operations, request or response (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every single measurement there")
    options = parser.parse_args()
    end_on_signals()
    try:
        return _run(options)
    except KeyboardInterrupt:
        return 130


def _run(options: argparse.Namespace) -> int:
    cores = Cores.of_this_machine()
    environment = [
        *environment_lines(cores),
        f"- instructions: {'by perf' if can_count() else 'no counter available to perf'}",
    ]
    os.sched_setaffinity(0, cores.other_cores)
    cases = [case for case in all_cases() if (options.only or "") in case.kind]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sp-api-proxy-bench-")))
        upstream = stack.enter_context(bench_upstream(cores, folder))
        api_port = stack.enter_context(operations_upstream(upstream, cores, folder))
        proxies = {count: stack.enter_context(_proxy(count, upstream, api_port, cores, folder)) for count in ACCOUNTS}
        footprints = [_measure_memory(proxy, "at start") for proxy in proxies.values()]
        costs = _measure_all(cases, proxies, options)
        footprints += [_measure_memory(proxy, "in use") for proxy in proxies.values()]
        for proxy in proxies.values():
            _once(proxy, list(_every_account(proxy.accounts, _targets_of_reads()[:OPERATIONS_EACH])))
        footprints += [_measure_memory(proxy, f"{OPERATIONS_EACH} operations each") for proxy in proxies.values()]
        output = [
            f"{proxy.process.name} wrote:\n{text}" for proxy in proxies.values() if (text := proxy.process.output())
        ]
    faults = [f"FAULT: {case.name}: {cost.faults}" for case in cases for cost in costs[case.name] if cost.faults]
    print_lines(*environment, "", *table(cases, costs, options), "", *_footprint_table(footprints), *output, *faults)
    if options.json:
        rows = [
            {"case": name, "round": n, **asdict(cost)} for name, of in costs.items() for n, cost in enumerate(of, 1)
        ]
        content = {
            "machine": environment,
            "costs": rows,
            "footprints": [asdict(footprint) for footprint in footprints],
        }
        options.json.write_text(json.dumps(content, indent=1))
    return 1 if faults else 0


# Cases.


def all_cases() -> list[Case]:
    """Return the cases, the smallest of each kind first."""
    reads = [_request(operation.method, path_of(operation)) for operation in _operations(reading=True)]
    writes = [_request(operation.method, path_of(operation)) for operation in _operations(reading=False)]
    one_each = {operation.method: path_of(operation) for operation in reversed(_operations(reading=False))}
    same_mix = [_request(operation.method, one_each[operation.method]) for operation in _operations(reading=False)]
    return [
        *(Case("accounts", f"{n:,} account{'s' * (n > 1)}", n, list(_every_account(n, [TARGET]))) for n in ACCOUNTS),
        Case("operations that read", "1 GET operation", 1, [_request("GET", TARGET)]),
        Case("operations that read", f"{len(reads)} GET operations", 1, reads),
        Case("operations that write", f"{len(one_each)} operations, as many of each method", 1, same_mix),
        Case("operations that write", f"{len(writes)} operations that are no GET", 1, writes),
        Case("request headers", "1 KiB of request headers", 1, [_request("GET", TARGET, filler(900))]),
        Case("request headers", "31 KiB of request headers, 64 fields", 1, [_request("GET", TARGET, filler(31_500))]),
        Case("request headers", "30 KiB in one request header", 1, [_request("GET", TARGET, filler(30_720, 30_720))]),
        Case("response headers", "1 KiB of response headers", 1, [_request("GET", f"{TARGET}?head=800")]),
        Case("response headers", "32 KiB of response headers, 66 fields", 1, [_request("GET", f"{TARGET}?head=32768")]),
    ]


def _operations(*, reading: bool) -> list[Operation]:
    return [operation for operation in load_table() if (operation.method == "GET") == reading]


def path_of(operation: Operation) -> str:
    """Return a path of the operation: its template with a value for each parameter."""
    return _PARAMETER.sub("B000000001", operation.template)


def _targets_of_reads() -> list[str]:
    """Return paths of operations that need only an access token."""
    ordinary = [operation for operation in _operations(reading=True) if not (operation.restricted or operation.scope)]
    return [path_of(operation) for operation in ordinary]


def _every_account(count: int, targets: Sequence[str]) -> Iterator[bytes]:
    return (_request("GET", target, account=number) for target in targets for number in range(count))


def _request(method: str, target: str, more: bytes = b"", *, account: int = 0) -> bytes:
    head = (
        f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: bench\r\nx-sp-account: a{account}\r\n".encode()
    )
    if method in {"POST", "PUT", "PATCH"}:
        more += b"Content-Type: application/json\r\nContent-Length: %d\r\n" % len(_BODY)
        return head + more + b"\r\n" + _BODY
    return head + more + b"\r\n"


# Processes.


@contextmanager
def operations_upstream(upstream: BenchUpstream, cores: Cores, folder: Path) -> Iterator[int]:
    """Run the upstream that serves every operation; yield its port."""
    port = free_port()
    files = ("--certificate", upstream.certificates.certificate, "--key", upstream.certificates.key)
    command = python("tests.bench.operations_upstream", "--port", port, *files)
    with started("operations upstream", command, port, cores.other_cores, folder):
        yield port


@contextmanager
def _proxy(accounts: int, upstream: BenchUpstream, api_port: int, cores: Cores, folder: Path) -> Iterator[Proxy]:
    port, admin = free_port(), free_port()
    path = folder / f"proxy-{accounts}.yaml"
    content = {
        "listen": f"{HOST}:{port}",
        "admin": f"{HOST}:{admin}",
        "applications": {"bench": {"client_id": "amzn1.application-oa2-client.bench", "client_secret": "bench"}},
        "accounts": {f"a{number}": {"refresh_tokens": {"eu": f"Atzr|a{number}"}} for number in range(accounts)},
        "endpoints": {
            "eu": f"https://localhost:{api_port}",
            "lwa": f"http://{HOST}:{upstream.token_port}/auth/o2/token",
        },
        "limits": {"pace": False},
        "pool": {"ca_file": str(upstream.certificates.authority)},
        "log": {"level": "warning"},
    }
    path.write_text(json.dumps(content))  # JSON is YAML
    path.chmod(0o600)
    command = python("proxy", "serve", "--config", path)
    with started(f"proxy with {accounts} accounts", command, port, cores.proxy, folder) as process:
        yield Proxy(accounts, process, port, admin)


# Measurement.


def _measure_all(
    cases: Sequence[Case], proxies: dict[int, Proxy], options: argparse.Namespace
) -> dict[str, list[Cost]]:
    counts = can_count()
    for case in cases:
        _once(proxies[case.accounts], case.requests)  # warm-up: tokens and connections
    costs: dict[str, list[Cost]] = {}
    for number in range(options.rounds):
        sys.stderr.write(f"round {number + 1} of {options.rounds}\n")
        turn = number % len(cases)
        for case in (*cases[turn:], *cases[:turn]):  # rotate the order in each round
            proxy = proxies[case.accounts]
            cost = _measure(proxy, case.requests, options.connections, options.seconds, counts=counts)
            costs.setdefault(case.name, []).append(cost)
    return costs


def _measure(proxy: Proxy, requests: Sequence[bytes], connections: int, seconds: float, *, counts: bool) -> Cost:
    async def run() -> Cost:
        async with _loaded(proxy.port, itertools.cycle(requests), connections) as (tally, _):
            await asyncio.sleep(WARM_UP)
            pid = proxy.process.pid
            counted: AbstractContextManager[Callable[[], float | None]] = (
                counting(pid) if counts else nullcontext(lambda: None)
            )
            with counted as end_count:
                done, cpu, began = len(tally.latencies), cpu_seconds(pid), time.perf_counter()
                await asyncio.sleep(seconds)
                instructions = end_count()
                done, cpu = len(tally.latencies) - done, cpu_seconds(pid) - cpu
                took = time.perf_counter() - began
        if not done:
            raise SystemExit(f"No response within {took:.1f} s: {dict(tally.faults)}")
        each = instructions / done if instructions is not None else None
        return Cost(cpu / done * 1e6, each, done / took, cpu / took, dict(tally.faults))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run())


def _once(proxy: Proxy, requests: Sequence[bytes]) -> None:
    """Send every request once."""

    async def run() -> None:
        async with _loaded(proxy.port, iter(requests), 8) as (tally, opened), asyncio.timeout(FIRST_TIME):
            for connection in opened:
                await connection.finished.wait()
        if tally.faults:
            raise SystemExit(f"{proxy.process.name}, before anything was measured: {dict(tally.faults)}")

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


@asynccontextmanager
async def _loaded(
    port: int, requests: Iterator[bytes], connections: int
) -> AsyncIterator[tuple[Tally, list[Rotating]]]:
    """Open connections that send requests until the block ends, and wait for their last responses."""
    loop, tally = asyncio.get_running_loop(), Tally()
    opened = [
        (await loop.create_connection(lambda: Rotating(requests, tally), HOST, port))[1] for _ in range(connections)
    ]
    try:
        yield tally, opened
    finally:
        for connection in opened:
            connection.finish()
        async with asyncio.timeout(FINAL_RESPONSE_TIMEOUT):
            for connection in opened:
                await connection.finished.wait()


def _measure_memory(proxy: Proxy, when: str) -> Footprint:
    took, size, slowest = [], 0, []
    with ThreadPoolExecutor(1) as beside:
        for _ in range(3):
            began = time.perf_counter()
            scrape = beside.submit(_metrics_of, proxy)
            slowest.append(_max_latency_until(scrape, proxy))
            took.append(time.perf_counter() - began)
            size = scrape.result()
    mib = memory_kib(proxy.process.pid, "VmRSS") / 1024
    return Footprint(proxy.accounts, when, mib, median(took) * 1e3, size / 1024, median(slowest) * 1e3)


def _metrics_of(proxy: Proxy) -> int:
    with urllib.request.urlopen(f"http://{HOST}:{proxy.admin}/metrics") as response:
        return len(response.read())


def _max_latency_until(scrape: "Future[int]", proxy: Proxy) -> float:
    """Send requests one after another until the scrape is complete; return the longest duration in seconds."""
    connection, slowest = http.client.HTTPConnection(HOST, proxy.port, timeout=FINAL_RESPONSE_TIMEOUT), 0.0
    try:
        while not scrape.done():
            began = time.perf_counter()
            connection.request("GET", PATH, headers={"x-sp-account": "a0"})
            size = len(connection.getresponse().read())
            slowest = max(slowest, time.perf_counter() - began)
            if size != RESPONSE_SIZE:
                raise SystemExit("unexpected response during a scrape of the metrics")
    finally:
        connection.close()
    return slowest


# Output.


def table(cases: Sequence[Case], costs: dict[str, list[Cost]], options: argparse.Namespace) -> list[str]:
    """Return a Markdown table: medians, and medians of the ratios to the smallest of the kind within each round."""
    lines = [
        f"Medians of {options.rounds} × {options.seconds:g} s, {options.connections} connections (ratio to the first).",
        "",
        "| kind | what | CPU µs/request | instructions/request | requests/s | core used |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    first = {case.kind: case for case in reversed(cases)}
    for case in cases:
        ours, base = costs[case.name], costs[first[case.kind].name]
        cpu = _cell([cost.cpu_us for cost in ours], [cost.cpu_us for cost in base])
        executed = _cell([cost.instructions for cost in ours], [cost.instructions for cost in base])
        rate = f"{median(cost.requests_per_second for cost in ours):,.0f}"
        core = f"{median(cost.core for cost in ours):.0%}"
        lines.append(f"| {case.kind} | {case.name} | {cpu} | {executed} | {rate} | {core} |")
    return lines


def _cell(ours: Sequence[float | None], base: Sequence[float | None]) -> str:
    pairs = [(one, other) for one, other in zip(ours, base, strict=True) if one is not None and other]
    if not pairs:
        return "not counted"
    return f"{median(one for one, _ in pairs):,.0f} ({median(one / other for one, other in pairs):.2f})"


def _footprint_table(footprints: Sequence[Footprint]) -> list[str]:
    return [
        "| accounts | when | resident MiB | `/metrics` ms | `/metrics` KiB | a request meanwhile, ms at most |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
        *(
            f"| {each.accounts:,} | {each.when} | {each.mib:.1f} | {each.metrics_ms:.0f} | {each.metrics_kib:,.0f} "
            f"| {each.max_latency_ms:.0f} |"
            for each in footprints
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(main())
