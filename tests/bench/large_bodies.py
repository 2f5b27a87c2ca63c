"""Streaming of 1 GiB up and down, with the proxy's memory measured: `python -m tests.bench.large_bodies`."""

import argparse
import http.client
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from tests.bench import throughput
from tests.bench.compare import environment_lines
from tests.bench.compared_proxies import ComparedProxy, bench_upstream, sp_api_proxy
from tests.bench.output import print_lines
from tests.bench.payload import BLOCK, MIB, blocks, digest_of
from tests.bench.processes import HOST, Cores, end_on_signals, memory_kib

MAX_GROWTH = 32.0  # MiB of resident memory
SLOW_MIB = 128  # size of the bodies that one side reads slowly; several times what may be buffered
SLOW_RATE = 32 * MIB  # bytes per second
SAMPLE_INTERVAL = 0.02  # seconds
IDLE_TIMEOUT = 60.0  # seconds without a byte, after which the transfer has failed

UPLOAD = "/feeds/2021-06-30/feeds"
DOWNLOAD = "/orders/v0/orders?MarketplaceIds=A1PA6795UKMFR9"


@dataclass(slots=True)
class Memory:
    """Resident memory of a process in MiB: before a transfer, the sampled peak, and `VmHWM`."""

    before: float
    peak: float
    high_water: float = 0.0

    @property
    def growth(self) -> float:
        """Growth in MiB; the kernel's high-water mark covers peaks between two samples."""
        return max(self.peak, self.high_water) - self.before


@dataclass(frozen=True, slots=True)
class Transfer:
    """One transfer: its duration in seconds, its memory, and its fault if any."""

    name: str
    mib: int
    seconds: float
    memory: Memory
    fault: str


def main() -> int:
    """Run the transfers and print them as Markdown; return 1 if a body was changed or the proxy buffered it."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.large_bodies", description=__doc__)
    parser.add_argument("--mib", type=int, default=1024, help="size of each body in MiB (default 1024)")
    parser.add_argument("--peers", action="store_true", help="how fast they go, beside nginx where it is installed")
    parser.add_argument("--rounds", type=int, default=3, help="of the comparison with --peers (default 3)")
    options = parser.parse_args()
    end_on_signals()
    cores = Cores.of_this_machine()
    os.sched_setaffinity(0, cores.other_cores)
    try:
        if options.peers:
            return _compare(cores, options.mib, options.rounds)
        return _run(cores, options.mib)
    except KeyboardInterrupt:
        return 130


def _compare(cores: Cores, mib: int, rounds: int) -> int:
    with tempfile.TemporaryDirectory(prefix="sp-api-proxy-bench-") as name:
        speeds, output = throughput.compare(cores, Path(name), mib, rounds)
    print_lines(*environment_lines(cores), "", *throughput.table(speeds), "", *output)
    bad = [f"{each.proxy}, {each.way}: {each.fault}" for each in speeds if each.fault] + throughput.missed(speeds)
    ours = [each for each in speeds if each.proxy == "sp-api-proxy" and each.grown >= MAX_GROWTH]
    bad += [f"{each.proxy}, {each.way}: memory grew by {each.grown:.1f} MiB" for each in ours]
    print_lines(*(f"FAULT: {each}" for each in bad))
    return 1 if bad else 0


def _run(cores: Cores, mib: int) -> int:
    with tempfile.TemporaryDirectory(prefix="sp-api-proxy-bench-") as name:
        folder = Path(name)
        with bench_upstream(cores, folder) as upstream, sp_api_proxy(upstream, cores, folder, large=True) as proxy:
            transfers = _transfers(proxy, mib)
            output = proxy.process.output()
    print_lines(*_table(transfers), "", *([f"The proxy wrote:\n{output}"] if output else []))
    bad = [each for each in transfers if each.fault or each.memory.growth >= MAX_GROWTH]
    for each in bad:
        print_lines(f"FAULT: {each.name}: {each.fault or f'memory grew by {each.memory.growth:.1f} MiB'}")
    return 1 if bad else 0


def _transfers(proxy: ComparedProxy, mib: int) -> list[Transfer]:
    port, fragments = proxy.port, min(mib, SLOW_MIB)
    for size in (1, fragments, mib):
        digest_of(size)  # cached, so that it is computed outside the timed part
    for framing in ("length", "chunked"):  # warm-up: imports, token, connections
        _upload(port, 1, framing)
        _download(port, 1, framing)
    return [
        _with_memory(proxy, "up, Content-Length", mib, lambda: _upload(port, mib, "length")),
        _with_memory(proxy, "up, chunked", mib, lambda: _upload(port, mib, "chunked")),
        _with_memory(proxy, "up, slow upstream", fragments, lambda: _upload(port, fragments, "length", rate=SLOW_RATE)),
        _with_memory(proxy, "down, Content-Length", mib, lambda: _download(port, mib, "length")),
        _with_memory(proxy, "down, chunked", mib, lambda: _download(port, mib, "chunked")),
        _with_memory(
            proxy, "down, slow reader", fragments, lambda: _download(port, fragments, "length", rate=SLOW_RATE)
        ),
    ]


def _with_memory(proxy: ComparedProxy, name: str, mib: int, run: Callable[[], str]) -> Transfer:
    started_transfer = time.perf_counter()
    with _memory_of(proxy.process.pid) as memory:
        try:
            fault = run()
        except (OSError, http.client.HTTPException, ValueError) as exc:
            fault = f"{type(exc).__name__}: {exc}"
        seconds = time.perf_counter() - started_transfer
    return Transfer(name, mib, seconds, memory, fault)


def _upload(port: int, mib: int, framing: str, *, rate: int = 0) -> str:
    """Send `mib` MiB; return the fault in what the upstream reports, an empty string if there is none.

    The upstream reads at most `rate` bytes per second; 0 is unlimited.
    """
    connection = http.client.HTTPConnection(HOST, port, timeout=IDLE_TIMEOUT, blocksize=BLOCK)
    fields = {"Content-Type": "text/plain"}
    fields |= {"Transfer-Encoding": "chunked"} if framing == "chunked" else {"Content-Length": str(mib * MIB)}
    connection.request(
        "POST", f"{UPLOAD}?rate={rate}", body=blocks(mib), headers=fields, encode_chunked=framing == "chunked"
    )
    response = connection.getresponse()
    text = response.read()
    connection.close()
    if response.status != 200:
        return f"{response.status}: {text[:500]!r}"
    expected = {"bytes": mib * MIB, "sha256": digest_of(mib), "framing": framing}
    received = json.loads(text)
    return "" if received == expected else f"the upstream received {received}, not {expected}"


def _download(port: int, mib: int, framing: str, *, rate: int = 0) -> str:
    """Fetch `mib` MiB at `rate` bytes per second (0: unlimited) and return the fault, if any."""
    connection = http.client.HTTPConnection(HOST, port, timeout=IDLE_TIMEOUT)
    connection.request("GET", f"{DOWNLOAD}&mib={mib}&framing={framing}")
    response = connection.getresponse()
    if response.status != 200:
        return f"{response.status}: {response.read(500)!r}"
    came = "chunked" if response.getheader("Transfer-Encoding") else "length"
    received, size, buffer = sha256(), 0, memoryview(bytearray(BLOCK))
    while count := response.readinto(buffer):
        received.update(buffer[:count])
        size += count
        if rate:
            time.sleep(count / rate)
    connection.close()
    if (received.hexdigest(), came) == (digest_of(mib), framing):
        return ""
    return f"{size} bytes came, framed by {came}, with the digest {received.hexdigest()}"


@contextmanager
def _memory_of(pid: int) -> Iterator[Memory]:
    """Sample the memory of `pid` until the block ends."""
    _forget_high_water(pid)
    resident = memory_kib(pid, "VmRSS") / 1024
    memory, over = Memory(resident, resident), threading.Event()

    def sample() -> None:
        while not over.wait(SAMPLE_INTERVAL):
            memory.peak = max(memory.peak, memory_kib(pid, "VmRSS") / 1024)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield memory
    finally:
        over.set()
        sampler.join()
        memory.high_water = memory_kib(pid, "VmHWM") / 1024


def _forget_high_water(pid: int) -> None:
    """Reset `VmHWM`, so that it covers one transfer (proc(5), clear_refs)."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def _table(transfers: list[Transfer]) -> list[str]:
    lines = [
        f"Through the proxy, with its memory in MiB; at most {MAX_GROWTH:g} of growth are allowed.",
        "",
        "| transfer | MiB | seconds | MiB/s | VmRSS before | VmRSS peak | VmHWM | growth | digest |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for each in transfers:
        memory = each.memory
        figures = [each.seconds, each.mib / each.seconds, memory.before, memory.peak, memory.high_water, memory.growth]
        cells = " | ".join(f"{figure:.1f}" for figure in figures)
        lines.append(f"| {each.name} | {each.mib} | {cells} | {'wrong' if each.fault else 'same'} |")
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
