"""A real Redis for tests and benchmarks: on a free port or a socket, with nothing on disk, ended with the block."""

import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from docs.navigation import ROOT

START = 10.0  # seconds
PROGRAM = shutil.which("redis-server")


def documented_permissions() -> list[str]:
    """Return the permissions that docs/replicas.md gives the proxy's user of Redis, one rule each."""
    page = (ROOT / "docs" / "replicas.md").read_text(encoding="utf-8")
    (rules,) = re.findall(r" ACL SETUSER proxy reset on '>made-up-password' ((?:.*\\\n)*.*)\n", page)
    return shlex.split(rules.replace("\\\n", " "))


@dataclass
class RedisServer:
    """A server that can be ended and begun again at its old place."""

    folder: Path
    port: int
    options: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        """Return what a proxy's `store` is."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def socket(self) -> Path:
        """Return its Unix socket."""
        return self.folder / "redis.sock"

    def start(self) -> None:
        """Start it, empty, and wait until it answers."""
        place = ("--bind", "127.0.0.1", "--port", str(self.port), "--unixsocket", str(self.socket))
        nothing_kept = ("--save", "", "--appendonly", "no", "--dir", str(self.folder), "--logfile", "redis.log")
        assert PROGRAM is not None
        self.process = subprocess.Popen([PROGRAM, *place, *nothing_kept, *self.options])
        end = time.monotonic() + START
        while time.monotonic() < end:
            with socket.socket(socket.AF_UNIX) as probe:
                try:
                    probe.connect(str(self.socket))
                except OSError:
                    time.sleep(0.01)  # it tells nobody when it listens, but systemd where it was built for that
                    continue
                return
        raise AssertionError("redis-server did not start")

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self.process is not None
        self.process.send_signal(number)

    def stop(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End it."""
        if self.process is not None:
            self.send(number)
            self.process.wait(START)
            self.process = None
            self.socket.unlink(missing_ok=True)


@contextmanager
def redis_server(folder: Path, *options: str) -> Iterator[RedisServer]:
    """Run a server until the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = folder / f"redis-{port}"
    place.mkdir()
    server = RedisServer(place, port, options)
    server.start()
    try:
        yield server
    finally:
        server.stop()
