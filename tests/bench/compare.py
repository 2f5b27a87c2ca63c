"""What does the proxy cost, beside a bare aiohttp proxy and nginx? Run as `python -m tests.bench.compare`.

All are loaded in turn, several rounds of it, so that what else the machine does falls on each of them alike.
"""

import argparse
import json
import os
import platform
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median

from tests.bench.contenders import Contender, bare_aiohttp, far_end, find_nginx, nginx, sp_api_proxy
from tests.bench.load import Sample, measure
from tests.bench.processes import Cores, cpu_seconds, end_on_signals
from tests.bench.upstream import ANSWER_SIZE

BASELINE = "bare aiohttp"
REQUEST = (
    b"GET /orders/v0/orders?MarketplaceIds=A1PA6795UKMFR9&CreatedAfter=2026-01-01T00%3A00%3A00Z HTTP/1.1\r\n"
    b"Host: localhost\r\nAccept: application/json\r\nUser-Agent: bench\r\n\r\n"
)

Samples = dict[tuple[str, int], list[Sample]]  # by contender and number of connections, one for each round


def main() -> int:
    """Run the comparison, print it as Markdown; 1 when a request failed."""
    options = _options()
    end_on_signals()
    try:
        return _compare(options)
    except KeyboardInterrupt:
        return 130


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.compare", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement (default 3)")
    parser.add_argument("--rounds", type=int, default=5, help="in which each is measured once (default 5)")
    parser.add_argument("--connections", type=int, default=32, help="at once, besides 1 (default 32)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every single measurement there")
    return parser.parse_args()


def _compare(options: argparse.Namespace) -> int:
    cores = Cores.of_this_machine()
    measured_with = machine(cores)
    os.sched_setaffinity(0, cores.others)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sp-api-proxy-bench-")))
        contenders = _start(stack, cores, folder)
        samples = _measure_all(contenders, options)
        logs = {contender.name: contender.process.said() for contender in contenders}
    _say(*measured_with, "", *table(samples, options))
    troubles = [*_faults(samples), *(f"{name} wrote:\n{text}" for name, text in logs.items() if text)]
    if troubles:
        _say("", *troubles)
    if options.json:
        options.json.write_text(json.dumps(_as_json(measured_with, samples), indent=1))
    return 1 if any(_faults(samples)) else 0


def _start(stack: ExitStack, cores: Cores, folder: Path) -> list[Contender]:
    end = stack.enter_context(far_end(cores, folder))
    contenders = [
        stack.enter_context(sp_api_proxy(end, cores, folder)),
        stack.enter_context(bare_aiohttp(end, cores, folder)),
    ]
    program = find_nginx()
    if program:
        contenders.append(stack.enter_context(nginx(program, end, cores, folder)))
    else:
        _say("nginx is not installed, so its rows are left out: install the package nginx-light.", "")
    return contenders


def _measure_all(contenders: Sequence[Contender], options: argparse.Namespace) -> Samples:
    samples: Samples = {}
    levels = sorted({1, options.connections})
    for number in range(options.rounds):
        _note(f"round {number + 1} of {options.rounds}")
        turn = number % len(contenders)
        for connections in levels:
            for contender in (*contenders[turn:], *contenders[:turn]):  # another one begins each time
                sample = measure(
                    contender.port,
                    REQUEST,
                    ANSWER_SIZE,
                    connections=connections,
                    seconds=options.seconds,
                    cpu=partial(cpu_seconds, contender.process.pid),
                )
                samples.setdefault((contender.name, connections), []).append(sample)
    return {(name, level): samples[name, level] for level in levels for name in (each.name for each in contenders)}


def machine(cores: Cores) -> list[str]:
    """Return lines on what the figures were measured with."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    packages = ", ".join(f"{name} {version(name)}" for name in ("aiohttp", "uvloop"))
    placed = (
        "one core for the proxy under test, the others for load and upstream"
        if cores.proxy != cores.others
        else "a single core shared by all, so requests per second and latency say little"
    )
    return [
        f"- machine: {model}, {os.cpu_count()} cores, Linux {platform.release()}; {placed}",
        f"- load average before the run: {os.getloadavg()[0]:.1f} (above about 0.3, others work here too)",
        f"- Python {platform.python_version()}, {packages}, {ssl.OPENSSL_VERSION}",
        f"- nginx: {_nginx_version()}",
    ]


def _nginx_version() -> str:
    program = find_nginx()
    if program is None:
        return "not installed"
    said = subprocess.run([program, "-v"], capture_output=True, text=True, check=False).stderr
    return said.strip().rpartition("/")[2]


def table(samples: Samples, options: argparse.Namespace) -> list[str]:
    """Return the medians of all rounds, and the medians of each round's ratio to the baseline, as Markdown."""
    lines = [
        f"Medians of {options.rounds} × {options.seconds:g} s; in brackets the ratio to {BASELINE}.",
        "",
        "| connections | proxy | requests/s | CPU µs/request | p50 ms | p99 ms | core used |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (name, connections), rounds in samples.items():
        base = samples[BASELINE, connections]
        cells = [
            _cell(rounds, base, lambda sample: sample.requests_per_second, ",.0f"),
            _cell(rounds, base, lambda sample: sample.cpu_us, ",.0f"),
            _cell(rounds, base, lambda sample: sample.p50_ms, ".2f"),
            _cell(rounds, base, lambda sample: sample.p99_ms, ".2f"),
            f"{median(sample.core for sample in rounds):.0%}",
        ]
        lines.append(f"| {connections} | {name} | {' | '.join(cells)} |")
    return lines


def _cell(rounds: Sequence[Sample], base: Sequence[Sample], figure: Callable[[Sample], float], form: str) -> str:
    """Return a median with its ratio; ratios are taken within a round, where both met the same conditions."""
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


def _say(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def _note(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    raise SystemExit(main())
