"""Load generator: throughput and latency of a server in a closed loop on raw connections.

Each connection sends its next request when the previous response is complete. It is part of the project and in Python,
so that everybody measures with the same tool; it costs a small part of what a Python proxy costs.
"""

import asyncio
import gc
import time
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import cast

import uvloop

from tests.bench.processes import HOST

WARM_UP = 0.5  # seconds before measuring, in which connections are opened on both sides
FINAL_RESPONSE_TIMEOUT = 5.0  # seconds

_HEAD_END = b"\r\n\r\n"
_LENGTH = b"\r\ncontent-length:"
_OK = b"HTTP/1.1 200"


@dataclass(slots=True)
class Tally:
    """Counts so far; latencies in seconds."""

    latencies: "array[float]" = field(default_factory=lambda: array("d"))
    faults: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement of one server. `core` is the share of one core that the server used, 0 to 1."""

    requests_per_second: float
    cpu_us: float  # microseconds of CPU time per request, user and system, all processes of the server
    p50_ms: float
    p99_ms: float
    core: float
    faults: dict[str, int]
    memory_mib: float = 0.0  # all processes of the server, right after


class Connection(asyncio.Protocol):
    """Repeats one request for as long as it is open."""

    def __init__(self, request: bytes, body_size: int, tally: Tally) -> None:
        self._request = request
        self._body_size = body_size
        self._tally = tally
        self._buffer = b""
        self._sent = 0.0
        self._transport: asyncio.Transport | None = None
        self._finishing = False
        self.finished = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first request."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's transports do not subclass it
        self._send()

    def data_received(self, data: bytes) -> None:
        """Send the next request once the response is complete."""
        self._buffer = self._buffer + data if self._buffer else data
        head = self._buffer.find(_HEAD_END)
        if head < 0:
            return
        length = _content_length(self._buffer[:head])
        missing = head + len(_HEAD_END) + length - len(self._buffer)
        if missing > 0:
            return
        self._tally.latencies.append(time.perf_counter() - self._sent)
        if not self._buffer.startswith(_OK):
            self._tally.faults[self._buffer.split(b"\r\n", 1)[0].decode("latin-1")] += 1
        elif missing < 0 or length != self._body_size:
            self._tally.faults["unexpected body"] += 1
        self._buffer = b""
        self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        """Record a connection that the server ended."""
        if not self.finished.is_set():
            self._tally.faults[f"the server ended a connection ({type(exc).__name__})"] += 1
            self.finished.set()

    def finish(self) -> None:
        """Send no further request; `finished` is set after the last response, when the connection is closed."""
        self._finishing = True

    def _send(self) -> None:
        if self._transport is None or self._finishing:
            self.finished.set()
            if self._transport is not None:
                self._transport.close()
        else:
            self._sent = time.perf_counter()
            self._transport.write(self._request)


def measure(
    port: int, request: bytes, body_size: int, *, connections: int, seconds: float, cpu: Callable[[], float]
) -> Sample:
    """Load a server of this machine for `seconds` and return the measurement; `cpu` reads its CPU seconds so far.

    Each response must be a 200 with a body of `body_size` bytes and a Content-Length; anything else is a fault.
    """
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection pause here would be measured as latency of the server
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_measure(port, request, body_size, connections, seconds, cpu))
    finally:
        gc.enable()
        gc.unfreeze()


async def _measure(
    port: int, request: bytes, body_size: int, connections: int, seconds: float, cpu: Callable[[], float]
) -> Sample:
    loop = asyncio.get_running_loop()
    tally = Tally()
    opened = [
        (await loop.create_connection(lambda: Connection(request, body_size, tally), HOST, port))[1]
        for _ in range(connections)
    ]
    await asyncio.sleep(WARM_UP)
    del tally.latencies[:]
    cpu_before, before = cpu(), time.perf_counter()
    await asyncio.sleep(seconds)
    cpu_used, took = cpu() - cpu_before, time.perf_counter() - before
    sample = _sample(tally, cpu_used, took)
    await _finish(opened, tally)
    return replace(sample, faults=dict(tally.faults))


async def _finish(opened: list[Connection], tally: Tally) -> None:
    """Complete all requests: an aborted one would be logged by the server and add to the next measurement."""
    for connection in opened:
        connection.finish()
    for connection in opened:
        try:
            async with asyncio.timeout(FINAL_RESPONSE_TIMEOUT):
                await connection.finished.wait()
        except TimeoutError:
            tally.faults[f"no response within {FINAL_RESPONSE_TIMEOUT:g} s"] += 1


def _sample(tally: Tally, cpu_used: float, took: float) -> Sample:
    count = len(tally.latencies)
    if not count:
        raise SystemExit(f"No response within {took:.1f} s: {dict(tally.faults)}")
    ordered = sorted(tally.latencies)
    return Sample(
        requests_per_second=count / took,
        cpu_us=cpu_used / count * 1e6,
        p50_ms=ordered[count // 2] * 1e3,
        p99_ms=ordered[count * 99 // 100] * 1e3,
        core=cpu_used / took,
        faults={},
    )


def _content_length(head: bytes) -> int:
    fields = head.lower()
    found = fields.find(_LENGTH)
    if found < 0:
        return 0
    return int(fields[found + len(_LENGTH) :].split(b"\r\n", 1)[0])
