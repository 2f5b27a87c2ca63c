"""A proxy as users run it: a process started with a configuration file and stopped by a signal."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.support.paths import ROOT

START = 30.0  # seconds


@dataclass
class ProxyProcess:
    """A running process: its addresses, and its standard error so far."""

    process: asyncio.subprocess.Process
    addresses: list[str] = field(default_factory=list)
    admin: str | None = None
    log: list[str] = field(default_factory=list)
    wrote: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def process_says(self, message: str) -> None:
        """Wait until a line with this message is logged."""
        async with asyncio.timeout(START), self.wrote:
            await self.wrote.wait_for(lambda: any(f'"message": "{message}"' in line for line in self.log))

    def lines(self) -> list[dict[str, Any]]:
        """Return the log's JSON lines."""
        return [json.loads(line) for line in self.log]

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        if self.process.returncode is None:
            self.process.send_signal(number)
        return await asyncio.wait_for(self.process.wait(), START)


async def command(*arguments: str, environment: dict[str, str] | None = None) -> tuple[int, str, str]:
    """Run `python -m proxy …` to its end; return its exit code, standard output and standard error."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy", *arguments),
        cwd=ROOT,
        env=_environment(environment),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    printed, complained = await asyncio.wait_for(process.communicate(), START)
    assert process.returncode is not None
    return process.returncode, printed.decode(), complained.decode()


def _environment(added: dict[str, str] | None) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name.startswith(("COVERAGE", "PATH", "LANG", "HOME"))}
    return {**kept, "PYTHONWARNINGS": "error", **(added or {})}


@asynccontextmanager
async def serving(settings: dict[str, Any], folder: Path) -> AsyncIterator[ProxyProcess]:
    """Start `serve --config`, wait until it serves, and stop it at the end of the block."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    async with started("serve", "--config", str(path), "--log-format", "json") as proxy:
        yield proxy


@asynccontextmanager
async def started(*arguments: str, environment: dict[str, str] | None = None) -> AsyncIterator[ProxyProcess]:
    """Start `python -m proxy …`, wait until it serves, and stop it at the end of the block."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy", *arguments),
        cwd=ROOT,
        env=_environment(environment),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=1024 * 1024,
    )
    proxy = ProxyProcess(process)
    ready = asyncio.Event()
    reading = asyncio.create_task(_read_log(proxy, ready))
    try:
        await asyncio.wait_for(ready.wait(), START)
        yield proxy
    finally:
        await proxy.stop()
        await reading


async def _read_log(proxy: ProxyProcess, ready: asyncio.Event) -> None:
    assert proxy.process.stderr is not None
    async for data in proxy.process.stderr:
        line = data.decode().rstrip("\n")
        async with proxy.wrote:
            proxy.log.append(line)
            proxy.wrote.notify_all()
        if '"message": "serving"' in line:
            said = json.loads(line)
            proxy.addresses, proxy.admin = said["listen"], said["admin"]
            ready.set()
    ready.set()  # end of output: waiters continue and check the exit code
