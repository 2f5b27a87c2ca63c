"""Number of tokens that the proxy fetches, and requests that wait for one: `python -m tests.bench.token_storm`.

Real processes: the proxy, the simulator of Amazon and Login with Amazon, and this load. The exit code is 1 if a
requirement is not met.
"""

import argparse
import asyncio
import resource
import sys
import time
from collections.abc import Awaitable, Callable

from proxy.request.tokens.refresh_policy import CHECK_INTERVAL, RENEW_AT, RENEW_LEAD
from tests.bench.harness import PLAIN_TARGET, Harness, format_statuses, running_harness
from tests.bench.processes import end_on_signals, memory_kib

ADDRESS = "/orders/v0/orders/{}/address"


Result = tuple[str, bool]


async def cold_start(_: float) -> Result:
    """(a) 2,000 requests at once over 100 accounts, and no token yet."""
    async with running_harness(100) as harness:
        await asyncio.gather(*(harness.call(PLAIN_TARGET, f"a{number % 100}") for number in range(2000)))
        exchanges = await harness.exchanges()
    return f"{format_statuses(harness.statuses)}; {exchanges} exchanges", harness.statuses == {
        200: 2000
    } and exchanges == 100


async def short_lives(seconds: float) -> Result:
    """(b) tokens that live 3 s, a token host that takes 1 s, 300 requests per second."""
    life, takes = 3.0, 1.0
    period = min(RENEW_AT * life, life - life / 20 - RENEW_LEAD * takes)
    async with running_harness(1, lifetime=life) as harness:
        await harness.post_control("/faults", {"kind": "latency", "service": "lwa", "seconds": takes})
        await harness.call(PLAIN_TARGET)
        (before, waited_before), exchanged_before = await harness.token_waits(), await harness.exchanges()
        await harness.load(300, seconds)
        (after, waited), exchanges = await harness.token_waits(), await harness.exchanges()
    waited, exchanges = waited - waited_before, exchanges - exchanged_before
    limit = 1.3 * seconds / period
    text = (
        f"{format_statuses(harness.statuses)}; {waited} of {after - before} waited for a token; "
        f"{exchanges} exchanges in {seconds:g} s, renewed every {period:.2f} s, at most {limit:.0f}"
    )
    return text, set(harness.statuses) == {200} and waited == 0 and exchanges <= limit


async def dead_token_host(_: float) -> Result:
    """(c) the token host fails for the last third of a token's life, 100 requests per second."""
    life = 30.0
    async with running_harness(1, lifetime=life) as harness:
        asked = time.monotonic()
        await harness.call(PLAIN_TARGET)

        async def fail_and_recover() -> None:
            await asyncio.sleep(asked + life * 2 / 3 - time.monotonic())
            await harness.post_control("/faults", {"kind": "status", "service": "lwa", "status": 503})
            await asyncio.sleep(asked + life - time.monotonic() - 0.1)
            await harness.clear_faults()

        await asyncio.gather(harness.load(100, life + CHECK_INTERVAL), fail_and_recover())
        exchanges = await harness.exchanges()
    return f"{format_statuses(harness.statuses)}; {exchanges} exchanges", set(harness.statuses) == {
        200
    } and exchanges == 2


async def many_orders(_: float) -> Result:
    """(d) the addresses of 5,000 orders."""
    async with running_harness(1) as harness:
        orders = iter(range(5000))

        async def call_in_turn() -> None:
            for number in orders:
                await harness.call(ADDRESS.format(f"902-0000000-{number:07d}"))

        await asyncio.gather(*(call_in_turn() for _ in range(20)))
        minted, exchanges = await harness.exchanges("rdt"), await harness.exchanges()
    text = f"{format_statuses(harness.statuses)}; {minted} RDT, {exchanges} ordinary exchange"
    return text, harness.statuses == {200: 5000} and (minted, exchanges) == (1, 1)


async def many_accounts(_: float) -> Result:
    """2,000 accounts: start to ready, and resident memory; target: under 2 s and 120 MiB."""
    async with running_harness(2000) as harness:
        seconds = await _until_ready(harness)
        memory = memory_kib(harness.proxy.pid, "VmRSS") / 1024
    async with running_harness(2000, warm_up=True) as warm:
        warm_seconds = await _until_ready(warm)
        warm_memory = memory_kib(warm.proxy.pid, "VmRSS") / 1024
        exchanges = await warm.exchanges()
    text = (
        f"ready after {seconds:.2f} s with {memory:.0f} MiB; with warm_up after {warm_seconds:.2f} s and "
        f"{exchanges} exchanges, with {warm_memory:.0f} MiB"
    )
    return text, seconds < 2 and memory < 120 and exchanges == 2000


async def _until_ready(harness: Harness) -> float:
    while True:
        async with harness.session.get(f"{harness.admin}/readyz") as response:
            if response.status == 200:
                return time.monotonic() - harness.started_at
        await asyncio.sleep(0.01)


RUNS: dict[str, Callable[[float], Awaitable[Result]]] = {
    "a": cold_start,
    "b": short_lives,
    "c": dead_token_host,
    "d": many_orders,
    "accounts": many_accounts,
}


def main() -> int:
    """Make the runs and print them as Markdown; return 1 if a requirement is not met."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.token_storm", description=__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"which: {', '.join(RUNS)} (default: all)")
    parser.add_argument("--seconds", type=float, default=60, help="how long (b) takes (default 60)")
    options = parser.parse_args()
    end_on_signals()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))  # two thousand concurrent connections on both sides
    kept = []
    for name in options.runs or RUNS:
        title = (RUNS[name].__doc__ or "").strip()
        text, good = asyncio.run(_run(RUNS[name], options.seconds))
        kept.append(good)
        sys.stdout.write(f"- {title}\n  {'met' if good else 'NOT MET'}: {text}\n")
        sys.stdout.flush()
    return 0 if all(kept) else 1


async def _run(run: Callable[[float], Awaitable[Result]], seconds: float) -> Result:
    return await run(seconds)


if __name__ == "__main__":
    sys.exit(main())
