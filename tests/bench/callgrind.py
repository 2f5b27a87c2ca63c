"""Instructions per request, counted by valgrind's callgrind: `python -m tests.bench.callgrind`.

Counts user-space instructions of the proxy process. Unlike CPU time, the count does not depend on other load on the
machine. Needs valgrind (Debian package `valgrind`).
"""

import argparse
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tests.bench.compared_proxies import PATH, ComparedProxy, bare_aiohttp, bench_upstream, sp_api_proxy
from tests.bench.processes import HOST, Cores, end_on_signals
from tests.bench.upstream import RESPONSE_SIZE

CONNECTIONS = 8
_TIMEOUT = 60.0  # seconds; valgrind slows the process down about fifty times


def main() -> int:
    """Count for the proxy and for bare aiohttp and print the results."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.callgrind", description=__doc__)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--keep", type=Path, help="folder for the profiles (input of callgrind_annotate)")
    options = parser.parse_args()
    end_on_signals()
    if shutil.which("valgrind") is None:
        sys.stderr.write("valgrind is missing: apt-get install valgrind\n")
        return 2
    counts = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sp-api-proxy-bench-")))
        cores = Cores.of_this_machine()
        upstream = stack.enter_context(bench_upstream(cores, folder))
        for name, start in (("sp-api-proxy", partial(sp_api_proxy, pace=True)), ("bare aiohttp", bare_aiohttp)):
            profile = (options.keep or folder) / name.replace(" ", "-")
            under = ("valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={profile}")
            with start(upstream, cores, folder, under=under) as proxy:
                counts[name] = _count(proxy, options.requests, profile)
    for name, count in counts.items():
        sys.stdout.write(f"{name}: {count:,.0f} instructions per request\n")
    sys.stdout.write(f"ratio {counts['sp-api-proxy'] / counts['bare aiohttp']:.2f}\n")
    return 0


def _count(proxy: ComparedProxy, requests: int, profile: Path) -> float:
    """Return the mean number of instructions per request, after a warm-up for one-time work."""
    _load(proxy.port, CONNECTIONS * 50)
    for order in (("-i", "on"), ("-z",)):
        _control(proxy.process.pid, *order)
    sent = _load(proxy.port, requests)
    for order in (("-i", "off"), ("-d",)):
        _control(proxy.process.pid, *order)
    text = profile.with_name(f"{profile.name}.1").read_text()
    totals = re.search(r"^totals: (\d+)$", text, re.MULTILINE)
    if totals is None:
        raise SystemExit("callgrind wrote no totals")
    return int(totals[1]) / sent


def _control(pid: int, *order: str) -> None:
    command = ["callgrind_control", *order, str(pid)]
    output = subprocess.run(command, check=False, capture_output=True, text=True, timeout=_TIMEOUT)
    if output.returncode != 0 or "OK" not in output.stdout:
        raise SystemExit(f"callgrind_control {' '.join(order)}: {output.stdout}{output.stderr}")


def _load(port: int, requests: int) -> int:
    """Send about `requests` requests, one at a time on each connection; return how many were sent."""
    message = (
        f"GET {PATH} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: bench\r\nAccept: application/json\r\n\r\n".encode()
    )
    rounds = max(1, requests // CONNECTIONS)
    with ExitStack() as stack:
        opened = [stack.enter_context(socket.create_connection((HOST, port), _TIMEOUT)) for _ in range(CONNECTIONS)]
        for _ in range(rounds):
            for connection in opened:
                connection.sendall(message)
            for connection in opened:
                _read_response(connection)
    return rounds * CONNECTIONS


def _read_response(connection: socket.socket) -> None:
    data = b""
    while b"\r\n\r\n" not in data or len(data.partition(b"\r\n\r\n")[2]) < RESPONSE_SIZE:
        more = connection.recv(65536)
        if not more:
            raise SystemExit(f"the connection ended: {data[:200]!r}")
        data += more
    if not data.startswith(b"HTTP/1.1 200"):
        raise SystemExit(f"unexpected response: {data[:200]!r}")


if __name__ == "__main__":
    os.environ.setdefault(
        "PYTHONHASHSEED", "0"
    )  # inherited by the started processes: set order, and so the count, is reproducible
    raise SystemExit(main())
