"""Cost of 10,000 idle connections and 1,000 slow readers to other clients.

Run as `python -m tests.bench.idle_and_slow_clients`.

A few connections send ordinary requests before the idle or slow clients connect, while they are connected, and after
they left; first through sp-api-proxy, then through nginx if it is installed. The kernel buffers a whole small download,
however slowly it is read; a tenth as many readers of large downloads, which the proxy must hold back, come as well.
"""

import argparse
import json
import os
import resource
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median

from tests.bench.bulk import DOWNLOAD, HEADERS
from tests.bench.compare import REQUEST, environment_lines
from tests.bench.compared_proxies import ComparedProxy, bench_upstream
from tests.bench.load import Sample, measure
from tests.bench.output import print_lines, print_progress
from tests.bench.processes import HOST, Cores, cpu_seconds, end_on_signals, memory_kib
from tests.bench.programs import find_nginx
from tests.bench.streaming_proxies import bulk_upstream, our_proxy, processes_of, streaming_nginx
from tests.bench.upstream import RESPONSE_SIZE

ACTIVE_CONNECTIONS = 8  # connections that send ordinary requests throughout
SPARE_DESCRIPTORS = 1000  # descriptors not used by the idle and slow clients
READ_SIZE, READ_INTERVAL = 4096, 1.0  # each slow reader reads this many bytes per this many seconds
RECEIVE_BUFFER = 4096  # bytes; small, so that the kernel does not buffer for a slow reader
IDLE_INTERVAL = 0.5  # seconds with a nearly idle proxy, after which cleanup is complete
SETTLE_TIMEOUT = 20.0  # seconds, after which measuring starts anyway
SMALL, LARGE = 1, 32  # MiB of a download; the kernel buffers up to 4 MiB (net.ipv4.tcp_wmem)
FIRST_BYTE_TIMEOUT = 30.0  # seconds within which each slow reader must receive data
SOURCES = [f"127.0.0.{number}" for number in range(2, 10)]  # source addresses: one address has too few ports


@dataclass(frozen=True, slots=True)
class Phase:
    """Measurements of one phase: the ordinary requests, and the proxy's memory in KiB.

    `clients` is the number of idle or slow clients; `unread_kib` is what the kernel buffers for all of them;
    `leaving_ms` is the duration of an ordinary request sent at the moment when they disconnected.
    """

    proxy: str
    name: str
    samples: list[Sample]
    memory_kib: int
    unread_kib: float
    clients: int = 0
    leaving_ms: float = 0.0
    faults: list[str] = field(default_factory=list)


def main() -> int:
    """Measure and print the table as Markdown; return 1 if a request failed or a client was rejected."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.idle_and_slow_clients", description=__doc__)
    parser.add_argument("--idle", type=int, default=10_000, help="idle connections (default 10,000)")
    parser.add_argument("--readers", type=int, default=1000, help="slow readers (default 1,000)")
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds of each measurement (default 1)")
    parser.add_argument("--rounds", type=int, default=2, help="measurements in each phase (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement to FILE")
    options = parser.parse_args()
    end_on_signals()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))  # the proxies inherit it
    if max(options.idle, 2 * options.readers) > limit - SPARE_DESCRIPTORS:
        options.idle, options.readers = (
            min(options.idle, limit - SPARE_DESCRIPTORS),
            min(options.readers, (limit - SPARE_DESCRIPTORS) // 2),
        )
        print_lines(
            f"Only {limit} files may be open here: {options.idle} idle connections, {options.readers} slow readers.", ""
        )
    try:
        return _run(options)
    except KeyboardInterrupt:
        return 130


def _run(options: argparse.Namespace) -> int:
    cores = Cores.of_this_machine()
    environment = environment_lines(cores)
    os.sched_setaffinity(0, cores.other_cores)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sp-api-proxy-bench-")))
        upstream = stack.enter_context(bench_upstream(cores, folder))
        large = stack.enter_context(bulk_upstream(upstream, cores, folder))
        proxies = [stack.enter_context(our_proxy(upstream, large, cores, folder, **_settings(options)))]
        program = find_nginx()
        if program:
            proxies.append(stack.enter_context(streaming_nginx(program, upstream, large, cores, folder)))
        phases = [phase for proxy in proxies for phase in _phases(proxy, options)]
        output = [f"{proxy.name} wrote:\n{text}" for proxy in proxies if (text := proxy.process.output())]
    faults = [f"FAULT: {phase.proxy}, {phase.name}: {fault}" for phase in phases for fault in _faults(phase)]
    print_lines(*environment, "", *table(phases, options), "", *output, *faults)
    if options.json:
        content = {"machine": environment, "phases": [asdict(phase) for phase in phases]}
        options.json.write_text(json.dumps(content, indent=1))
    return 1 if faults else 0


def _settings(options: argparse.Namespace) -> dict[str, object]:
    """Return settings with limits high enough for the clients: the defaults would reject them."""
    at_once = options.readers + 100
    return {
        "bounds": {"connections": options.idle + SPARE_DESCRIPTORS, "requests": at_once, "account_requests": at_once},
        "pool": {"max_connections": at_once},
        "timeouts": {"keep_alive": "10m"},
    }


def _phases(proxy: ComparedProxy, options: argparse.Namespace) -> Iterator[Phase]:
    """Measure one proxy without and with each group of clients."""
    _measured(proxy, "", options)  # warm-up
    yield _measured(proxy, "before", options)
    print_progress(f"{proxy.name}: {options.idle} connections")
    with idle_connections(proxy.port, options.idle) as idle:
        present = _measured(proxy, f"{options.idle:,} idle connections", options, clients=len(idle))
        closed_count = sum(map(_is_closed, idle))
    present.faults.extend([f"{closed_count} were closed"] if closed_count else [])
    yield replace(present, leaving_ms=_one_request(proxy.port) * 1e3)
    yield _settled(proxy, options)
    for count, mib in ((options.readers, SMALL), (options.readers // 10, LARGE)):
        name = f"{count:,} slow readers of {mib} MiB"
        print_progress(f"{proxy.name}: {name}")
        with slow_readers(proxy.port, count, mib) as readers:
            present = _measured(proxy, name, options, clients=count)
        present.faults.extend(readers.faults)
        yield replace(present, leaving_ms=_one_request(proxy.port) * 1e3)
        yield _settled(proxy, options)


def _one_request(port: int) -> float:
    """Send an ordinary request on its own connection; return the seconds until the response was complete."""
    began = time.perf_counter()
    with idle_connections(port, 1):
        return time.perf_counter() - began


def _settled(proxy: ComparedProxy, options: argparse.Namespace) -> Phase:
    """Measure after the proxy has finished the work that the clients left."""
    end = time.monotonic() + SETTLE_TIMEOUT
    busy = True
    while busy and time.monotonic() < end:
        before = cpu_seconds(proxy.process.pid)
        time.sleep(IDLE_INTERVAL)
        busy = cpu_seconds(proxy.process.pid) - before > IDLE_INTERVAL / 10
    return _measured(proxy, "after they left", options)


def _measured(proxy: ComparedProxy, name: str, options: argparse.Namespace, clients: int = 0) -> Phase:
    cpu = partial(cpu_seconds, proxy.process.pid)
    samples = [
        measure(proxy.port, REQUEST, RESPONSE_SIZE, connections=ACTIVE_CONNECTIONS, seconds=options.seconds, cpu=cpu)
        for _ in range(options.rounds if name else 1)
    ]
    memory = sum(memory_kib(pid, "VmRSS") for pid in processes_of(proxy.process.pid))
    return Phase(proxy.name, name, samples, memory, _unread_kib(proxy.port), clients)


def _unread_kib(port: int) -> float:
    """Return the KiB written to connections on `port` that the peer has not received (proc(5), /proc/net/tcp)."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    established = [row for row in rows if row[1].endswith(f":{port:04X}") and row[3] == "01"]
    return sum(int(row[4].partition(":")[0], 16) for row in established) / 1024


# Idle and slow clients.


@contextmanager
def idle_connections(port: int, count: int) -> Iterator[list[socket.socket]]:
    """Open connections that send one request each and are then idle; close them at the end of the block."""
    opened: list[socket.socket] = []
    try:
        for number in range(count):
            sock = socket.create_connection((HOST, port), FIRST_BYTE_TIMEOUT, (SOURCES[number % len(SOURCES)], 0))
            opened.append(sock)
            sock.sendall(REQUEST)
            _read_response(sock)
            sock.setblocking(False)
        yield opened
    finally:
        for sock in opened:
            sock.close()


def _read_response(sock: socket.socket) -> None:
    """Read a small response completely."""
    read = b""
    while len(read.partition(b"\r\n\r\n")[2]) < RESPONSE_SIZE:
        more = sock.recv(16_384)
        if not more or not (read or more.startswith(b"HTTP/1.1 200")):
            raise SystemExit(f"unexpected response on an idle connection: {read + more!r}")
        read += more


def _is_closed(sock: socket.socket) -> bool:
    """Return whether the peer has closed an idle connection."""
    try:
        return sock.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


class Readers:
    """Clients that each read a download at a few KiB per second, in a thread of their own."""

    def __init__(self) -> None:
        self.sockets: list[socket.socket] = []
        self.faults: list[str] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)

    def begin(self, port: int, count: int, mib: int) -> None:
        """Request the downloads and wait until all have started."""
        request = f"GET {DOWNLOAD}?mib={mib}&framing=length HTTP/1.1\r\n{HEADERS}\r\n\r\n".encode()
        for number in range(count):
            sock = socket.socket()
            self.sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
            sock.settimeout(FIRST_BYTE_TIMEOUT)
            sock.bind((SOURCES[number % len(SOURCES)], 0))
            sock.connect((HOST, port))
            sock.sendall(request)
        for sock in self.sockets:
            head = sock.recv(READ_SIZE)
            if not head.startswith(b"HTTP/1.1 200"):
                raise SystemExit(f"unexpected response for a slow reader: {head!r}")
            sock.setblocking(False)
        self._thread.start()

    def end(self) -> None:
        """Disconnect in the middle of the downloads."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        for sock in self.sockets:
            sock.close()

    def _read(self) -> None:
        pause, ended = READ_INTERVAL / len(self.sockets), 0
        due = time.monotonic()
        while not self._over.is_set():
            for sock in self.sockets:
                ended += not _read_some(sock)
                due += pause
                if due > time.monotonic() and self._over.wait(due - time.monotonic()):
                    break
            if ended:
                self.faults.append(f"{ended} downloads ended")
                return


def _read_some(sock: socket.socket) -> bool:
    """Read what is available; return whether the download continues."""
    try:
        return sock.recv(READ_SIZE) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


@contextmanager
def slow_readers(port: int, count: int, mib: int) -> Iterator[Readers]:
    """Let `count` clients read downloads of `mib` MiB slowly until the block ends."""
    readers = Readers()
    try:
        readers.begin(port, count, mib)
        yield readers
    finally:
        readers.end()


# Output.


def table(phases: Sequence[Phase], options: argparse.Namespace) -> list[str]:
    """Return the medians of each phase as Markdown; with clients, also the ratio to the phases before and after."""
    lines = [
        f"{ACTIVE_CONNECTIONS} active connections, {options.rounds} × {options.seconds:g} s (ratio to no load)",
        "",
        "| proxy | when | requests/s | CPU µs | p50 ms | p99 ms | RSS MiB | KiB each | unread KiB | leaving ms |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for number, phase in enumerate(phases):
        quiet = [*phases[number - 1].samples, *phases[number + 1].samples] if phase.clients else []
        cells = [
            _cell([each.requests_per_second for each in of] for of in (phase.samples, quiet)),
            _cell([each.cpu_us for each in of] for of in (phase.samples, quiet)),
            _cell(([each.p50_ms for each in of] for of in (phase.samples, quiet)), ".2f"),
            _cell(([each.p99_ms for each in of] for of in (phase.samples, quiet)), ".2f"),
            f"{phase.memory_kib / 1024:.1f}",
        ]
        client_cells = ["", "", ""]
        if phase.clients:
            grown = (phase.memory_kib - phases[number - 1].memory_kib) / phase.clients
            client_cells = [f"{grown:.1f}", f"{phase.unread_kib / phase.clients:,.0f}", f"{phase.leaving_ms:,.0f}"]
        lines.append(f"| {phase.proxy} | {phase.name} | {' | '.join(cells + client_cells)} |")
    return lines


def _cell(figures: Iterator[list[float]], form: str = ",.0f") -> str:
    ours, quiet = figures
    return f"{median(ours):{form}}" + (f" ({median(ours) / median(quiet):.2f})" if quiet else "")


def _faults(phase: Phase) -> Iterator[str]:
    yield from phase.faults
    for sample in phase.samples:
        yield from (f"{count} × {fault}" for fault, count in sample.faults.items())


if __name__ == "__main__":
    raise SystemExit(main())
