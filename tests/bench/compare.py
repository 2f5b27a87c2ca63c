"""Cost of the proxy compared with Envoy, nginx, Caddy and a bare aiohttp proxy: `python -m tests.bench.compare`.

The proxies are loaded in turn over several rounds, so that other load on the machine affects all of them alike.
"""

import argparse
import json
import os
import platform
import ssl
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median

from tests.bench.compared_proxies import (
    PATH,
    ComparedProxy,
    bare_aiohttp,
    bench_upstream,
    nginx,
    plan_wait,
    sp_api_proxy,
)
from tests.bench.gateways import caddy, envoy
from tests.bench.load import Sample, measure
from tests.bench.output import print_lines, print_progress
from tests.bench.plot import Group, svg
from tests.bench.processes import Cores, cpu_seconds, end_on_signals, pss_mib
from tests.bench.programs import Program, find_all
from tests.bench.upstream import RESPONSE_SIZE

OURS, BARE, BEST = "sp-api-proxy", "bare aiohttp", "Envoy"
MAX_WAIT_US = 50.0  # microseconds per request waited for the usage plan; above this, pacing dominates the figures
REQUEST = (f"GET {PATH} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\nUser-Agent: bench\r\n\r\n").encode()
_STARTED_BY = {"Envoy": envoy, "nginx": nginx, "Caddy": caddy}

Samples = dict[tuple[str, int], list[Sample]]  # by proxy and number of connections, one per round


def main() -> int:
    """Run the comparison and print it as Markdown; return 1 if a request failed."""
    options = _options()
    end_on_signals()
    try:
        return _compare(options)
    except KeyboardInterrupt:
        return 130


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.compare", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds of each measurement (default 3)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds in which each is measured once (default 5)")
    parser.add_argument(
        "--connections", type=int, default=32, help="concurrent connections, in addition to 1 (default 32)"
    )
    parser.add_argument("--no-install", action="store_true", help="leave out missing proxies, and fetch nothing")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write a chart of the medians to FILE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement to FILE")
    return parser.parse_args()


def _compare(options: argparse.Namespace) -> int:
    programs, missing = find_all(install=not options.no_install)
    cores = Cores.of_this_machine()
    environment = environment_lines(cores, programs)
    os.sched_setaffinity(0, cores.other_cores)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sp-api-proxy-bench-")))
        proxies = _start(stack, cores, folder, programs)
        before = plan_wait(proxies[0])
        samples = _measure_all(proxies, options)
        waits = _waits(before, plan_wait(proxies[0]))
        logs = {proxy.name: _without_notices(proxy.process.output()) for proxy in proxies}
    print_lines(*environment, f"- {OURS} spent {waits:.1f} µs per request waiting for its usage plan", *missing, "")
    print_lines(*table(samples, options))
    faults = [*_faults(samples)]
    if waits > MAX_WAIT_US:
        faults.append(f"FAULT: {OURS} paced the load, so its figures are not comparable")
    problems = [*faults, *(f"{name} wrote:\n{text}" for name, text in logs.items() if text)]
    if problems:
        print_lines("", *problems)
    if options.json:
        options.json.write_text(json.dumps(_as_json(environment, samples), indent=1))
    if options.svg:
        options.svg.write_text(picture(samples, options.connections))
    return 1 if faults else 0


def _start(stack: ExitStack, cores: Cores, folder: Path, programs: Mapping[str, Program]) -> list[ComparedProxy]:
    upstream = stack.enter_context(bench_upstream(cores, folder))
    return [
        stack.enter_context(sp_api_proxy(upstream, cores, folder, pace=True)),
        *(
            stack.enter_context(start(programs[name].path, upstream, cores, folder))
            for name, start in _STARTED_BY.items()
            if name in programs
        ),
        stack.enter_context(bare_aiohttp(upstream, cores, folder)),
    ]


def _waits(before: tuple[float, int], after: tuple[float, int]) -> float:
    """Return microseconds waited per request between two samples of (seconds waited, requests)."""
    return (after[0] - before[0]) / max(1, after[1] - before[1]) * 1e6


def _without_notices(text: str) -> str:
    """Return the output of a proxy without notices: Caddy logs where its configuration is."""
    return "\n".join(line for line in text.splitlines() if '"level":"info"' not in line)


def _measure_all(proxies: Sequence[ComparedProxy], options: argparse.Namespace) -> Samples:
    samples: Samples = {}
    levels = sorted({1, options.connections})
    for number in range(options.rounds):
        print_progress(f"round {number + 1} of {options.rounds}")
        turn = number % len(proxies)
        for connections in levels:
            for proxy in (*proxies[turn:], *proxies[:turn]):  # rotate the order in each round
                sample = measure_one(proxy, connections, options.seconds)
                samples.setdefault((proxy.name, connections), []).append(sample)
    return {(name, level): samples[name, level] for level in levels for name in (each.name for each in proxies)}


def measure_one(proxy: ComparedProxy, connections: int, seconds: float) -> Sample:
    """Load a proxy for `seconds` after the warm-up and return the measurement."""
    cpu = partial(cpu_seconds, proxy.process.pid)
    sample = measure(proxy.port, REQUEST, RESPONSE_SIZE, connections=connections, seconds=seconds, cpu=cpu)
    return replace(sample, memory_mib=pss_mib(proxy.process.pid))


def environment_lines(cores: Cores, programs: Mapping[str, Program] | None = None) -> list[str]:
    """Return lines that describe the machine and the versions of the software."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    packages = ", ".join(f"{name} {version(name)}" for name in ("aiohttp", "uvloop"))
    placed = (
        "one core for the proxy under test, the others for load and upstream"
        if cores.proxy != cores.other_cores
        else "a single core shared by all, so requests per second and latency say little"
    )
    return [
        f"- machine: {model}, {os.cpu_count()} cores, Linux {platform.release()}; {placed}",
        f"- load average before the run: {os.getloadavg()[0]:.1f} (above about 0.3, other processes are running)",
        f"- Python {platform.python_version()}, {packages}, {ssl.OPENSSL_VERSION}",
        "- "
        + (", ".join(f"{name} {program.version}" for name, program in (programs or {}).items()) or "no other proxies"),
    ]


def table(samples: Samples, options: argparse.Namespace) -> list[str]:
    """Return a Markdown table: medians of all rounds, and medians of the ratios to the baseline within each round."""
    baseline = BEST if (BEST, 1) in samples else BARE
    lines = [
        f"Medians of {options.rounds} × {options.seconds:g} s; in brackets the ratio to {baseline}.",
        "",
        "| connections | proxy | requests/s | CPU µs/request | p50 ms | p99 ms | core used | memory MiB |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (name, connections), rounds in samples.items():
        base = samples[baseline, connections]
        cells = [
            _cell(rounds, base, lambda sample: sample.requests_per_second, ",.0f"),
            _cell(rounds, base, lambda sample: sample.cpu_us, ",.0f"),
            _cell(rounds, base, lambda sample: sample.p50_ms, ".2f"),
            _cell(rounds, base, lambda sample: sample.p99_ms, ".2f"),
            f"{median(sample.core for sample in rounds):.0%}",
            _cell(rounds, base, lambda sample: sample.memory_mib, ",.0f"),
        ]
        lines.append(f"| {connections} | {name} | {' | '.join(cells)} |")
    return lines


def picture(samples: Samples, connections: int) -> str:
    """Return the medians drawn as SVG: CPU time, and latency with one connection."""
    names = list(dict.fromkeys(name for name, _ in samples))

    def rows(
        *figures: tuple[int, Callable[[Sample], float]],
    ) -> list[tuple[str, tuple[float, float]]]:
        medians = [[median(map(figure, samples[name, level])) for level, figure in figures] for name in names]
        return [(name, (first, second)) for name, (first, second) in zip(names, medians, strict=True)]

    cpu = rows((connections, lambda sample: sample.cpu_us), (1, lambda sample: sample.cpu_us))
    latency = rows((1, lambda sample: sample.p50_ms), (1, lambda sample: sample.p99_ms))
    description = "; ".join(
        f"{name}: {many:.0f} µs with {connections} connections, {one:.0f} with 1, p50 {p50:.2f} ms, p99 {p99:.2f} ms"
        for (name, (many, one)), (_, (p50, p99)) in zip(cpu, latency, strict=True)
    )
    groups = [
        Group("CPU time per request, µs", (f"{connections} connections", "1 connection"), ",.0f", cpu),
        Group("Latency with 1 connection, ms", ("p50", "p99"), ".2f", latency),
    ]
    return svg("What a request through each proxy costs; less is better", description, OURS, groups)


def _cell(rounds: Sequence[Sample], base: Sequence[Sample], figure: Callable[[Sample], float], form: str) -> str:
    """Return a median with its ratio; ratios are taken within a round, where both had the same conditions."""
    value = format(median(map(figure, rounds)), form)
    ratio = median(figure(sample) / figure(other) for sample, other in zip(rounds, base, strict=True))
    return f"{value} ({ratio:.2f})"


def _faults(samples: Samples) -> Iterable[str]:
    for (name, connections), rounds in samples.items():
        for sample in rounds:
            for fault, count in sample.faults.items():
                yield f"FAULT: {name}, {connections} connections: {count} × {fault}"


def _as_json(lines: list[str], samples: Samples) -> dict[str, object]:
    rows = [
        {"proxy": name, "connections": connections, "round": number, **asdict(sample)}
        for (name, connections), rounds in samples.items()
        for number, sample in enumerate(rounds, 1)
    ]
    return {"machine": lines, "samples": rows}


if __name__ == "__main__":
    raise SystemExit(main())
