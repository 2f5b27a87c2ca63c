"""Throughput of large bodies through the proxy and through nginx. Part of `python -m tests.bench.large_bodies`.

Both are measured in turn with ends that cost as little as Python allows (`bulk.py`). The share of its core that the
proxy used shows whether the proxy or something else limits a transfer.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tests.bench.bulk import Framing, download, upload
from tests.bench.compared_proxies import ComparedProxy, bench_upstream
from tests.bench.payload import MIB
from tests.bench.processes import Cores, cpu_seconds, memory_kib
from tests.bench.programs import find_nginx
from tests.bench.streaming_proxies import bulk_upstream, our_proxy, processes_of, streaming_nginx

MIN_SHARE = 0.5  # target share of nginx's throughput

WAYS: dict[str, tuple[Callable[[int, int, Framing], str], Framing]] = {
    "down, Content-Length": (download, "length"),
    "down, chunked": (download, "chunked"),
    "up, Content-Length": (upload, "length"),
    "up, chunked": (upload, "chunked"),
}


@dataclass(frozen=True, slots=True)
class Speed:
    """One transfer through one proxy; `grown` is the growth of its resident memory in MiB."""

    proxy: str
    way: str
    mib: int
    seconds: float
    cpu_seconds: float
    grown: float
    fault: str

    @property
    def mib_per_second(self) -> float:
        """Throughput in MiB per second."""
        return self.mib / self.seconds

    @property
    def cpu_per_gib(self) -> float:
        """CPU seconds of all the proxy's processes for each GiB."""
        return self.cpu_seconds * 1024 / self.mib

    @property
    def core(self) -> float:
        """The share of one core that the proxy used."""
        return self.cpu_seconds / self.seconds


def compare(cores: Cores, folder: Path, mib: int, rounds: int) -> tuple[list[Speed], list[str]]:
    """Send large bodies through the proxy and nginx in turn; return the transfers and the output of the proxies."""
    with ExitStack() as stack:
        upstream = stack.enter_context(bench_upstream(cores, folder))
        large = stack.enter_context(bulk_upstream(upstream, cores, folder))
        proxies = [stack.enter_context(our_proxy(upstream, large, cores, folder))]
        program = find_nginx()
        if program:
            for large_buffers in (False, True):
                peer = streaming_nginx(program, upstream, large, cores, folder, large_buffers=large_buffers)
                proxies.append(stack.enter_context(peer))
        for proxy in proxies:
            for name in WAYS:
                _transfer(proxy, name, 1)
        speeds = []
        for number in range(rounds):
            turn = number % len(proxies)
            order = (*proxies[turn:], *proxies[:turn])  # rotate the order in each round
            speeds += [_transfer(proxy, name, mib) for name in WAYS for proxy in order]
        said = [f"{proxy.name} wrote:\n{text}" for proxy in proxies if (text := proxy.process.output())]
    return speeds, said


def _transfer(proxy: ComparedProxy, way: str, mib: int) -> Speed:
    run, framing = WAYS[way]
    processes = processes_of(proxy.process.pid)
    for pid in processes:
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # resets VmHWM (proc(5))
    resident = sum(memory_kib(pid, "VmRSS") for pid in processes)
    used, began = cpu_seconds(proxy.process.pid), time.perf_counter()
    try:
        fault = run(proxy.port, mib, framing)
    except (OSError, ValueError) as exc:
        fault = f"{type(exc).__name__}: {exc}"
    seconds, used = time.perf_counter() - began, cpu_seconds(proxy.process.pid) - used
    grown = (sum(memory_kib(pid, "VmHWM") for pid in processes) - resident) * 1024 / MIB
    return Speed(proxy.name, way, mib, seconds, used, grown, fault)


def table(speeds: Sequence[Speed]) -> list[str]:
    """Return the medians of all rounds as Markdown, in brackets the ratio to nginx within each round."""
    lines = [
        "Large bodies, medians; in brackets the ratio to nginx in the same round.",
        "",
        "| transfer | proxy | MiB/s | CPU s/GiB | core used | growth MiB |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for way in WAYS:
        for name in dict.fromkeys(speed.proxy for speed in speeds):
            ours = _of(speeds, name, way)
            base = _of(speeds, "nginx", way)
            cells = [
                _cell([each.mib_per_second for each in ours], [each.mib_per_second for each in base], ",.0f"),
                _cell([each.cpu_per_gib for each in ours], [each.cpu_per_gib for each in base], ".2f"),
                f"{median(each.core for each in ours):.0%}",
                f"{max(each.grown for each in ours):.1f}",
            ]
            lines.append(f"| {way} | {name} | {' | '.join(cells)} |")
    return lines


def missed(speeds: Sequence[Speed]) -> list[str]:
    """Return descriptions of the transfers below the target share of nginx; nothing without nginx."""
    found = []
    for way in WAYS:
        ours, base = _of(speeds, "sp-api-proxy", way), _of(speeds, "nginx", way)
        if base:
            share = median(one.mib_per_second / other.mib_per_second for one, other in zip(ours, base, strict=True))
            if share < MIN_SHARE:
                found.append(f"{way}: {share:.2f} of nginx's throughput, the target is {MIN_SHARE:g}")
    return found


def _of(speeds: Sequence[Speed], proxy: str, way: str) -> list[Speed]:
    return [speed for speed in speeds if (speed.proxy, speed.way) == (proxy, way)]


def _cell(ours: Sequence[float], base: Sequence[float], form: str) -> str:
    value = format(median(ours), form)
    ratios = [one / other for one, other in zip(ours, base, strict=False) if other]
    return f"{value} ({median(ratios):.2f})" if ratios else value
