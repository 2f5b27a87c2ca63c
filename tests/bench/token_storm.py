"""How many tokens does the proxy fetch, and does anybody wait for them? `python -m tests.bench.token_storm`.

Real processes: the proxy, the simulator of Amazon and Login with Amazon, and this load. The exit code is 1 where a
promise is not kept.
"""

import argparse
import asyncio
import resource
import sys
import time
from collections.abc import Awaitable, Callable

from proxy.request.tokens.refresh_policy import CHECK_INTERVAL, RENEW_AT, RENEW_LEAD
from tests.bench.harness import ORDINARY, World, said, world
from tests.bench.processes import end_on_signals, memory_kib

ADDRESS = "/orders/v0/orders/{}/address"


Result = tuple[str, bool]


async def cold_start(_: float) -> Result:
    """(a) 2,000 requests at once over 100 accounts, and no token yet."""
    async with world(100) as here:
        await asyncio.gather(*(here.call(ORDINARY, f"a{number % 100}") for number in range(2000)))
        exchanges = await here.exchanges()
    return f"{said(here.statuses)}; {exchanges} exchanges", here.statuses == {200: 2000} and exchanges == 100


async def short_lives(seconds: float) -> Result:
    """(b) tokens that live 3 s, a token host that takes 1 s, 300 requests per second."""
    life, takes = 3.0, 1.0
    period = min(RENEW_AT * life, life - life / 20 - RENEW_LEAD * takes)
    async with world(1, lifetime=life) as here:
        await here.order("/faults", {"kind": "latency", "service": "lwa", "seconds": takes})
        await here.call(ORDINARY)
        (before, waited_before), exchanged_before = await here.waits(), await here.exchanges()
        await here.load(300, seconds)
        (after, waited), exchanges = await here.waits(), await here.exchanges()
    waited, exchanges = waited - waited_before, exchanges - exchanged_before
    most = 1.3 * seconds / period
    text = (
        f"{said(here.statuses)}; {waited} of {after - before} waited for a token; {exchanges} exchanges in "
        f"{seconds:g} s, renewed every {period:.2f} s, at most {most:.0f}"
    )
    return text, set(here.statuses) == {200} and waited == 0 and exchanges <= most


async def dead_token_host(_: float) -> Result:
    """(c) the token host dead for the last third of a token's life, 100 requests per second."""
    life = 30.0
    async with world(1, lifetime=life) as here:
        asked = time.monotonic()
        await here.call(ORDINARY)

        async def die_and_return() -> None:
            await asyncio.sleep(asked + life * 2 / 3 - time.monotonic())
            await here.order("/faults", {"kind": "status", "service": "lwa", "status": 503})
            await asyncio.sleep(asked + life - time.monotonic() - 0.1)
            await here.forget_faults()

        await asyncio.gather(here.load(100, life + CHECK_INTERVAL), die_and_return())
        exchanges = await here.exchanges()
    return f"{said(here.statuses)}; {exchanges} exchanges", set(here.statuses) == {200} and exchanges == 2


async def many_orders(_: float) -> Result:
    """(d) the addresses of 5,000 orders."""
    async with world(1) as here:
        orders = iter(range(5000))

        async def one_after_another() -> None:
            for number in orders:
                await here.call(ADDRESS.format(f"902-0000000-{number:07d}"))

        await asyncio.gather(*(one_after_another() for _ in range(20)))
        minted, exchanges = await here.exchanges("rdt"), await here.exchanges()
    text = f"{said(here.statuses)}; {minted} RDT, {exchanges} ordinary exchange"
    return text, here.statuses == {200: 5000} and (minted, exchanges) == (1, 1)


async def many_accounts(_: float) -> Result:
    """2,000 accounts: from start to ready, and resident memory; aim: under 2 s and 120 MiB."""
    async with world(2000) as here:
        seconds = await _until_ready(here)
        memory = memory_kib(here.proxy.pid, "VmRSS") / 1024
    async with world(2000, warm_up=True) as warm:
        warm_seconds = await _until_ready(warm)
        warm_memory = memory_kib(warm.proxy.pid, "VmRSS") / 1024
        exchanges = await warm.exchanges()
    text = (
        f"ready after {seconds:.2f} s with {memory:.0f} MiB; with warm_up after {warm_seconds:.2f} s and "
        f"{exchanges} exchanges, with {warm_memory:.0f} MiB"
    )
    return text, seconds < 2 and memory < 120 and exchanges == 2000


async def _until_ready(here: World) -> float:
    while True:
        async with here.session.get(f"{here.admin}/readyz") as response:
            if response.status == 200:
                return time.monotonic() - here.started_at
        await asyncio.sleep(0.01)


RUNS: dict[str, Callable[[float], Awaitable[Result]]] = {
    "a": cold_start,
    "b": short_lives,
    "c": dead_token_host,
    "d": many_orders,
    "accounts": many_accounts,
}


def main() -> int:
    """Make the runs and print them as Markdown; 1 where a promise was not kept."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.token_storm", description=__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"which: {', '.join(RUNS)} (default: all)")
    parser.add_argument("--seconds", type=float, default=60, help="how long (b) takes (default 60)")
    options = parser.parse_args()
    end_on_signals()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # two thousand connections at once, twice
    kept = []
    for name in options.runs or RUNS:
        title = (RUNS[name].__doc__ or "").strip()
        text, good = asyncio.run(_run(RUNS[name], options.seconds))
        kept.append(good)
        sys.stdout.write(f"- {title}\n  {'kept' if good else 'NOT KEPT'}: {text}\n")
        sys.stdout.flush()
    return 0 if all(kept) else 1


async def _run(run: Callable[[float], Awaitable[Result]], seconds: float) -> Result:
    return await run(seconds)


if __name__ == "__main__":
    sys.exit(main())
