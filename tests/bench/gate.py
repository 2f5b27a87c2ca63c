"""Regression gate for CPU time per request: `python -m tests.bench.gate`; exit code 1 above the limit.

The figure is the ratio to a bare aiohttp proxy measured directly afterwards. The ratio is stable on a busy machine,
where requests per second and latency are not.
"""

import argparse
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from tests.bench.compare import measure_one
from tests.bench.compared_proxies import bare_aiohttp, bench_upstream, sp_api_proxy
from tests.bench.load import Sample
from tests.bench.output import print_lines
from tests.bench.processes import Cores, end_on_signals

MAX_RATIO = 0.65  # ratio to bare aiohttp; generous, so that only a large regression fails
CONNECTIONS = 32
ROUNDS, SECONDS = 3, 2.0


def main() -> int:
    """Measure and print the result; return 1 if the limit is exceeded or a request failed."""
    argparse.ArgumentParser(prog="python -m tests.bench.gate", description=__doc__).parse_args()
    end_on_signals()
    try:
        rounds = _measure()
    except KeyboardInterrupt:
        return 130
    ratio = median(ours.cpu_us / bare.cpu_us for ours, bare in rounds)
    ours, bare = (median(sample.cpu_us for sample in samples) for samples in zip(*rounds, strict=True))
    print_lines(f"CPU per request: {ours:.0f} µs, bare aiohttp {bare:.0f} µs")
    print_lines(f"ratio {ratio:.2f}; the limit of {MAX_RATIO} is {'met' if ratio <= MAX_RATIO else 'EXCEEDED'}")
    faults = {fault for pair in rounds for sample in pair for fault in sample.faults}
    for fault in sorted(faults):
        print_lines(f"FAULT: {fault}")
    return 1 if faults or ratio > MAX_RATIO else 0


def _measure() -> list[tuple[Sample, Sample]]:
    """Return the samples of the proxy and of bare aiohttp in each round."""
    cores = Cores.of_this_machine()
    os.sched_setaffinity(0, cores.other_cores)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sp-api-proxy-bench-")))
        upstream = stack.enter_context(bench_upstream(cores, folder))
        ours = stack.enter_context(sp_api_proxy(upstream, cores, folder, pace=True))
        bare = stack.enter_context(bare_aiohttp(upstream, cores, folder))
        return [
            (measure_one(ours, CONNECTIONS, SECONDS), measure_one(bare, CONNECTIONS, SECONDS)) for _ in range(ROUNDS)
        ]


if __name__ == "__main__":
    raise SystemExit(main())
