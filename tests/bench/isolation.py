"""The isolation matrix: what each kind of trouble costs everybody else. Run as `python -m tests.bench.isolation`.

Rows are sources of trouble, columns are victims: callers that have nothing to do with it. Each cell is the victim's
goodput (responses 200 in time) as a share of its own goodput in a run without trouble. A real proxy process stands
before a stand-in for Amazon with true token buckets. `--rows` picks rows by the beginning of their names.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from tests.bench.metered_amazon import HOST, MeteredAmazon, Plan, metered_amazon, report_type
from tests.bench.processes import Cores, Started, end_on_signals, free_port, python, started

AIM = 0.98
IN_TIME = 5.0  # seconds: a response that comes later is of no use to a victim
ITEM = "/catalog/2022-04-01/items/{}"
LISTING = "/listings/2021-08-01/items/A1SELLER/{}"
REPORTS = "/reports/2021-06-30/reports"
PLANS = [
    Plan("GET", r"/catalog/2022-04-01/items/[^/]+", 2.0, 2.0, announce=2.0),
    Plan("PATCH", r"/listings/2021-08-01/items/[^/]+/[^/]+", 5.0, 5.0, announce=5.0),
    Plan("GET", r"/listings/2021-08-01/items/[^/]+/[^/]+", 5.0, 10.0),
    Plan("POST", REPORTS, 0.0167, 15.0),
    Plan("GET", r"/orders/v0/orders", 0.0167, 20.0, announce=0.0167),
]
ACCOUNTS = ("acme", "beta", "gamma")
KEYS = {"good": "key-of-the-good-caller-0123456789", "greedy": "key-of-the-greedy-caller-012345678"}


@dataclass(slots=True)
class World:
    """A proxy before the stand-in, and clients of two callers."""

    amazon: MeteredAmazon
    proxy: Started
    address: str
    sessions: dict[str, aiohttp.ClientSession]
    numbers: Iterator[int] = field(default_factory=itertools.count)

    async def call(
        self,
        method: str,
        path: str,
        account: str = "acme",
        region: str = "eu",
        *,
        caller: str = "good",
        body: Any = None,
        within: float = 60.0,
        **headers: str,
    ) -> int:
        """Send one call and return its status, 0 if none came within `within` seconds."""
        sent = {"x-sp-account": account, "x-sp-region": region, "x-sp-key": KEYS[caller]}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        session = self.sessions[caller]
        try:
            async with asyncio.timeout(within):
                async with session.request(method, self.address + path, headers=sent, json=body) as response:
                    await response.read()
                    return response.status
        except (TimeoutError, aiohttp.ClientError):
            return 0


@dataclass(frozen=True, slots=True)
class Victim:
    """Calls at a fixed rate per second, sent whether responses come or not."""

    name: str
    rate: float
    call: Callable[[World], Awaitable[int]]


def _item(world: World, prefix: str = "GOOD") -> str:
    return ITEM.format(f"{prefix}{next(world.numbers) % 50:03}")


VICTIMS = (
    Victim("other item", 0.9, lambda w: w.call("GET", _item(w), within=IN_TIME)),
    Victim(
        "other listing",
        2.0,
        lambda w: w.call("PATCH", LISTING.format(f"S{next(w.numbers) % 50}"), body={}, within=IN_TIME),
    ),
    Victim(
        "other report type",
        0.4,
        lambda w: w.call("POST", REPORTS, body={"reportType": f"GET_GOOD_{next(w.numbers) % 5}"}, within=IN_TIME),
    ),
    Victim("other operation", 2.0, lambda w: w.call("GET", LISTING.format(f"S{next(w.numbers) % 50}"), within=IN_TIME)),
    Victim("no plan", 5.0, lambda w: w.call("GET", "/brand/new", within=IN_TIME)),
    Victim("other seller", 1.5, lambda w: w.call("GET", _item(w), "beta", within=IN_TIME)),
    Victim("other region", 1.5, lambda w: w.call("GET", _item(w), "acme", "na", within=IN_TIME)),
)


@dataclass(frozen=True, slots=True)
class Row:
    """A trouble: what is switched on at Amazon, and what a greedy caller does meanwhile."""

    name: str
    begin: Callable[[MeteredAmazon], None] = lambda _: None
    act: Callable[[World], Awaitable[None]] | None = None
    workers: int = 1


async def _forever(call: Callable[[], Awaitable[object]], pause: float = 0.0) -> None:
    while True:
        await call()
        await asyncio.sleep(pause)


def _repeat(pause: float, *arguments: Any, **options: Any) -> Callable[[World], Awaitable[None]]:
    return lambda world: _forever(lambda: world.call(*arguments, caller="greedy", **options), pause)


def _throttle_poison(amazon: MeteredAmazon) -> None:
    def is_poisoned(_: str, __: str, ___: str, path: str, body: bytes) -> bool:
        return "POISON" in path or report_type(body) == "GET_POISON"

    amazon.trouble.throttled = is_poisoned


async def _dribble(world: World) -> None:
    """Open POSTs that are never finished, a few bytes at a time."""
    writers: list[asyncio.StreamWriter] = []
    host, port = world.address.removeprefix("http://").split(":")
    try:
        for number in range(400):
            _, writer = await asyncio.open_connection(host, int(port))
            account = ("acme", "beta")[number % 2]
            head = f"POST {REPORTS} HTTP/1.1\r\nHost: localhost\r\nx-sp-account: {account}\r\nx-sp-region: eu\r\n"
            head += f"x-sp-key: {KEYS['greedy']}\r\nContent-Length: 100000\r\n\r\n" + "{"
            writer.write(head.encode())
            writers.append(writer)
        while True:
            for writer in writers:
                if not writer.is_closing():
                    writer.write(b" " * 30)
            await asyncio.sleep(0.2)
    finally:
        for writer in writers:
            writer.close()


async def _unread(world: World) -> None:
    """Ask for large documents and read none of them."""
    host, port = world.address.removeprefix("http://").split(":")
    writers: list[asyncio.StreamWriter] = []
    try:
        for number in range(200):
            _, writer = await asyncio.open_connection(host, int(port), limit=1024)
            account = ("acme", "beta")[number % 2]
            head = f"GET /large HTTP/1.1\r\nHost: localhost\r\nx-sp-account: {account}\r\nx-sp-region: eu\r\n"
            writer.write(f"{head}x-sp-key: {KEYS['greedy']}\r\n\r\n".encode())
            writers.append(writer)
        await asyncio.sleep(3600)
    finally:
        for writer in writers:
            writer.close()


async def _outside(world: World) -> None:
    while True:
        world.amazon.take("acme", "eu", "GET", ITEM.format("OUTSIDE"))
        await asyncio.sleep(1.0)


async def _new_names(world: World) -> None:
    for number in itertools.count():
        await world.call("GET", _item(world, "MANY"), caller="greedy", x_sp_client=f"n{number}", x_sp_max_wait="30s")


def _set(**changes: Any) -> Callable[[MeteredAmazon], None]:
    def begin(amazon: MeteredAmazon) -> None:
        for name, value in changes.items():
            setattr(amazon.trouble, name, value)

    return begin


ROWS = (
    Row(
        "one report type always 429",
        _throttle_poison,
        _repeat(2.0, "POST", REPORTS, body={"reportType": "GET_POISON"}, x_sp_max_wait="2m"),
    ),
    Row(
        "one item always 429, nine workers",
        _throttle_poison,
        _repeat(0.1, "GET", ITEM.format("POISON"), x_sp_max_wait="30s"),
        9,
    ),
    Row(
        "one listing always 429",
        _throttle_poison,
        _repeat(0.2, "PATCH", LISTING.format("POISON"), body={}, x_sp_max_wait="30s"),
        3,
    ),
    Row("a caller floods one plan", act=_repeat(0.0, "GET", ITEM.format("MUCH"), x_sp_max_wait="30s"), workers=30),
    Row("a new x-sp-client on each call", act=_new_names, workers=30),
    Row(
        "clients that leave", act=_repeat(0.0, "GET", ITEM.format("LEFT"), within=1.0, x_sp_max_wait="30s"), workers=20
    ),
    Row("unfinished uploads", act=_dribble),
    Row("unread downloads", _set(large=4 << 20), _unread),
    Row("a seller without consent", _set(revoked={"gamma"}), _repeat(0.02, "GET", "/brand/new", "gamma"), 4),
    Row(
        "a seller throttled always",
        _set(throttled=lambda *call: call[0] == "gamma"),
        _repeat(0.05, "GET", ITEM.format("G"), "gamma", x_sp_max_wait="30s"),
        5,
    ),
    Row(
        "tokens of a seller are slow",
        _set(slow_tokens={"gamma": 8.0}),
        _repeat(0.1, "GET", "/brand/new", "gamma", within=2.0),
        10,
    ),
    Row(
        "a region breaks every connection",
        _set(broken_regions={"fe"}),
        _repeat(0.02, "GET", "/brand/new", "gamma", "fe"),
        10,
    ),
    Row(
        "one operation fails with 503",
        _set(failing=lambda *call: 503 if call[3].startswith("/bad/") else 0),
        _repeat(0.02, "GET", "/bad/v1/x", "beta"),
        10,
    ),
    Row("another program on the plan", act=_outside),
)


async def measure(world: World, row: Row | None, seconds: float) -> dict[str, Counter[int]]:
    """Let the victims call for so many seconds, beside the trouble; return their statuses."""
    troubled: list[asyncio.Task[None]] = []
    if row is not None:
        row.begin(world.amazon)
        if row.act is not None:
            troubled = [asyncio.create_task(_ended(row.act(world))) for _ in range(row.workers)]
            await asyncio.sleep(min(3.0, seconds / 5))  # the trouble is there before its victims come
    try:
        counted = await asyncio.gather(*(_victim(world, victim, seconds) for victim in VICTIMS))
    finally:
        for task in troubled:
            task.cancel()
        await asyncio.gather(*troubled, return_exceptions=True)
    return {victim.name: statuses for victim, statuses in zip(VICTIMS, counted, strict=True)}


async def _ended(act: Awaitable[None]) -> None:
    with contextlib.suppress(ConnectionError):
        await act


async def _victim(world: World, victim: Victim, seconds: float) -> Counter[int]:
    loop, tasks = asyncio.get_running_loop(), list[asyncio.Task[int]]()
    begin = loop.time()
    for number in range(int(victim.rate * seconds)):
        await asyncio.sleep(max(0.0, begin + number / victim.rate - loop.time()))
        tasks.append(asyncio.ensure_future(victim.call(world)))
    return Counter(await asyncio.gather(*tasks))


@asynccontextmanager
async def world(settings: dict[str, Any]) -> AsyncIterator[World]:
    """Start the stand-in and a proxy for it."""
    cores = Cores.of_this_machine()
    async with metered_amazon(PLANS) as amazon, contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        port, admin = free_port(), free_port()
        path = folder / "config.yaml"
        regions = ("na", "eu", "fe")
        path.write_text(
            yaml.safe_dump(
                {
                    "listen": f"{HOST}:{port}",
                    "admin": f"{HOST}:{admin}",
                    "applications": {"main": {"client_id": "client", "client_secret": "client-secret"}},
                    "accounts": {name: {"refresh_tokens": dict.fromkeys(regions, f"Atzr|{name}")} for name in ACCOUNTS},
                    "callers": {
                        "good": {"key": KEYS["good"]},
                        "greedy": {"key": KEYS["greedy"]},
                    },
                    "endpoints": amazon.endpoints,
                    **settings,
                }
            )
        )
        path.chmod(0o600)
        command = python("proxy", "serve", "--config", path, "--log-level", "error")
        proxy = await asyncio.to_thread(stack.enter_context, started("proxy", command, port, cores.proxy, folder))
        sessions = {
            name: await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
            for name in KEYS
        }
        yield World(amazon, proxy, f"http://{HOST}:{port}", sessions)


async def run(rows: Sequence[Row], seconds: float, settings: dict[str, Any], *, verbose: bool) -> bool:
    """Print the matrix; return whether every cell reaches the aim."""
    async with world(settings) as calm:
        alone = await measure(calm, None, seconds)
    names = [victim.name for victim in VICTIMS]
    sys.stdout.write(f"| trouble | {' | '.join(names)} |\n| --- |{' ---: |' * len(names)}\n")
    base = [f"{alone[name][200]} of {alone[name].total()}" for name in names]
    sys.stdout.write(f"| none | {' | '.join(base)} |\n")
    is_good = True
    for row in rows:
        async with world(settings) as troubled:
            found = await measure(troubled, row, seconds)
        shares = [found[name][200] / max(1, alone[name][200]) for name in names]
        is_good = is_good and all(share >= AIM for share in shares)
        sys.stdout.write(f"| {row.name} | {' | '.join(f'{share:.0%}' for share in shares)} |\n")
        sys.stdout.flush()
        if verbose:
            sys.stderr.write(json.dumps({name: dict(statuses) for name, statuses in found.items()}) + "\n")
    return is_good


def main() -> int:
    """Print the matrix; 1 if a cell misses the aim."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.isolation", description=__doc__)
    parser.add_argument("--rows", nargs="*", metavar="ROW", default=[], help="how its name begins (default: all)")
    parser.add_argument("--seconds", type=float, default=30, help="how long each run takes (default 30)")
    parser.add_argument("--verbose", action="store_true", help="the victims' statuses on standard error")
    options = parser.parse_args()
    end_on_signals()
    rows = [row for row in ROWS if not options.rows or row.name.startswith(tuple(options.rows))]
    return 0 if asyncio.run(run(rows, options.seconds, {}, verbose=options.verbose)) else 1


if __name__ == "__main__":
    sys.exit(main())
