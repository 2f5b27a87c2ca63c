"""Processes of the benchmarks: started, pinned to cores, measured from outside and ended.

Their cost is read from `/proc`: Linux only; every child process is included.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.paths import ROOT

HOST = "127.0.0.1"
START_TIMEOUT = 15.0  # seconds
MAX_OUTPUT = 30  # lines
END_TIMEOUT = 5.0  # seconds, after which it is killed
_TICKS = os.sysconf("SC_CLK_TCK")  # per second of CPU time
_PRIVATE = ("SP_API_", "LWA_")  # the user's own settings must not reach the proxy under test


@dataclass(frozen=True, slots=True)
class Cores:
    """Core assignment: the proxy under test has a core of its own; load and upstream share the others."""

    proxy: frozenset[int]
    other_cores: frozenset[int]

    @classmethod
    def of_this_machine(cls) -> "Cores":
        """Divide the cores this process may use; with a single one, all share it."""
        first, *rest = sorted(os.sched_getaffinity(0))
        return cls(frozenset({first}), frozenset(rest or {first}))


@dataclass(frozen=True, slots=True)
class Started:
    """A process started here, with its output."""

    name: str
    popen: subprocess.Popen[bytes]
    log_file: Path

    @property
    def pid(self) -> int:
        """The process's id; its children are in a process group of the same number."""
        return self.popen.pid

    def output(self) -> str:
        """Return the last lines of its standard output and error."""
        return "\n".join(self.log_file.read_text(errors="replace").strip().splitlines()[-MAX_OUTPUT:])


@contextmanager
def started(
    name: str,
    command: Sequence[str],
    port: int,
    cores: frozenset[int],
    folder: Path,
    settings: Mapping[str, str] | None = None,
) -> Iterator[Started]:
    """Run `command` on `cores` until the block ends; yield it once it listens on `port`. `folder` takes its output.

    `settings` are environment variables in addition to those of this process.
    """
    log_file = folder / f"{name}.log"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(_PRIVATE)}
    environment.update(settings or {})
    with log_file.open("wb") as log, _confined_to(cores):
        popen = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    process = Started(name, popen, log_file)
    try:
        _wait_until_listening(process, port)
        yield process
    finally:
        _end(popen)


@contextmanager
def _confined_to(cores: frozenset[int]) -> Iterator[None]:
    """Pin this process to `cores` while a child starts: it inherits them for every thread from the first on."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def python(module: str, *arguments: str | Path | int) -> list[str]:
    """Return the command that runs `module` with this Python."""
    return [sys.executable, "-m", module, *map(str, arguments)]


def free_port() -> int:
    """Return a TCP port of the loopback address that is free at the moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def end_on_signals() -> None:
    """Make SIGTERM end this process like Ctrl-C: every `finally` runs, so that no process is left."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds (user and system) that `pid` and its children have used; resolution about 10 ms."""
    total = 0
    for _, fields in _group(pid):
        total += sum(map(int, fields[11:15]))  # utime, stime, and those of children that have ended
    return total / _TICKS


def pss_mib(pid: int) -> float:
    """Return the proportional set size of `pid` and its children in MiB."""
    total = 0
    for entry, _ in _group(pid):
        try:
            lines = (entry / "smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def _group(pid: int) -> Iterator[tuple[Path, list[str]]]:
    """Return the /proc folder and the fields of `_stat` of each process in the process group of `pid`."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            fields = _stat(entry / "stat")
            if fields and int(fields[2]) == pid:
                yield entry, fields


def memory_kib(pid: int, field: str) -> int:
    """Return a memory figure of `pid` in KiB: `VmRSS` (resident now) or `VmHWM` (peak resident)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0])
    raise RuntimeError(f"process {pid} has no {field}: it has ended")


def _stat(path: Path) -> list[str]:
    """Return the fields of /proc/PID/stat from the third on (the second may contain spaces); none if it has ended."""
    try:
        return path.read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _wait_until_listening(process: Started, port: int) -> None:
    end = time.monotonic() + START_TIMEOUT
    while time.monotonic() < end and process.popen.poll() is None:
        try:
            socket.create_connection((HOST, port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise SystemExit(f"{process.name} did not start; its output:\n{process.output()}")


def _end(popen: subprocess.Popen[bytes]) -> None:
    """End a process and its children; the process group has no other members."""
    try:
        os.killpg(popen.pid, signal.SIGTERM)
        popen.wait(END_TIMEOUT)
    except ProcessLookupError:
        popen.wait()
    except subprocess.TimeoutExpired:
        os.killpg(popen.pid, signal.SIGKILL)
        popen.wait()
