"""Share of the permitted calls that is used, and the 429s that this costs: `python -m tests.bench.goodput`.

Clients call one operation as fast as they can, through the proxy, against the simulator with enforced plans. With
`--peer PYTHON`, python-amazon-sp-api with its throttle_retry does the same work.
"""

import argparse
import asyncio
import json
import sys
from dataclasses import dataclass

from proxy.simulator.state import DEMO_CLIENT, DEMO_SECRET
from tests.bench.harness import Harness, running_harness
from tests.bench.processes import end_on_signals

TEMPLATE = "/listings/2021-08-01/items/{sellerId}/{sku}"
TARGET = "/listings/2021-08-01/items/A1SELLER/sku-{}"
RATE, BURST = 5.0, 10  # of getListingsItem in Amazon's documentation
CLIENTS = 20
MIN_SHARE, MAX_THROTTLED = 0.98, 0.01  # targets with the documented plan


@dataclass(frozen=True, slots=True)
class Scenario:
    """The simulator's true rate, its rate from half way on (`later`), and whether responses announce it."""

    name: str
    rate: float
    announce: bool
    later: float | None = None
    has_aim: bool = False


SCENARIOS = (
    Scenario("as the table says", RATE, announce=False, has_aim=True),
    Scenario("as the table says, announced", RATE, announce=True, has_aim=True),
    Scenario("half, unannounced", RATE / 2, announce=False),
    Scenario("half, announced", RATE / 2, announce=True),
    Scenario("double, unannounced", RATE * 2, announce=False),
    Scenario("double, announced", RATE * 2, announce=True),
    Scenario("half from half way on, unannounced", RATE, announce=False, later=RATE / 2),
    Scenario("half from half way on, announced", RATE, announce=True, later=RATE / 2),
    Scenario("double from half way on, announced", RATE, announce=True, later=RATE * 2),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Results of one run: responses in time, calls that the plan permitted, and 429s on either side."""

    name: str
    served: int
    permitted: float
    reached_clients: int
    sent_by_amazon: int

    @property
    def share(self) -> float:
        """The share of the permitted calls that was served."""
        return self.served / self.permitted

    @property
    def throttled(self) -> float:
        """The share of the calls to Amazon that got a 429."""
        return self.sent_by_amazon / max(1, self.served + self.sent_by_amazon)

    def row(self) -> str:
        """Return the row of the table."""
        return (
            f"| {self.name} | {self.served} of {self.permitted:.0f} | {self.share:.1%} | {self.reached_clients} | "
            f"{self.sent_by_amazon} ({self.throttled:.1%}) |"
        )


async def plan(harness: Harness, rate: float, *, announce: bool) -> None:
    """Set the simulator's plan; its bucket is then full."""
    content = {"method": "GET", "path": TEMPLATE, "rate": rate, "burst": BURST, "announce": announce, "enforce": True}
    await harness.post_control("/plans", content)


async def run_proxy(scenario: Scenario, seconds: float) -> Outcome:
    """Let the clients call through the proxy for `seconds`."""
    async with running_harness(1, limits={"pace": True}) as harness:
        await plan(harness, scenario.rate, announce=scenario.announce)
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        statuses: list[int] = []

        async def client(number: int) -> None:
            while loop.time() < end:
                status = await harness.call(TARGET.format(number))
                if loop.time() <= end:
                    statuses.append(status)

        async def change() -> None:
            if scenario.later is not None:
                await asyncio.sleep(seconds / 2)
                await plan(harness, scenario.later, announce=scenario.announce)

        await asyncio.gather(change(), *(client(number) for number in range(CLIENTS)))
        throttled = await harness.response_count("eu", 429)
    permitted = BURST + scenario.rate * seconds
    if scenario.later is not None:  # a new plan starts with a full bucket
        permitted = 2 * BURST + (scenario.rate + scenario.later) * seconds / 2
    return Outcome(scenario.name, statuses.count(200), permitted, statuses.count(429), throttled)


async def run_peer(python: str, seconds: float) -> Outcome:
    """Let python-amazon-sp-api do the same work, with the documented plan."""
    async with running_harness(1) as harness:
        await plan(harness, RATE, announce=True)
        arguments = (harness.region("eu"), harness.token_host, DEMO_CLIENT, DEMO_SECRET, "Atzr|a0")
        process = await asyncio.create_subprocess_exec(
            *(python, __file__.replace("goodput.py", "peer.py"), str(seconds), str(CLIENTS), *arguments),
            stdout=asyncio.subprocess.PIPE,
        )
        output, _ = await process.communicate()
        served, reached_clients = json.loads(output)
        throttled = await harness.response_count("eu", 429)
    return Outcome("python-amazon-sp-api alone", served, BURST + RATE * seconds, reached_clients, throttled)


async def run(seconds: float, peer: str | None, selected: list[str]) -> bool:
    """Make the runs and print their table; return whether the targets were reached."""
    sys.stdout.write(
        "| true plan | served | share | 429s to clients | 429s by Amazon |\n| --- | ---: | ---: | ---: | ---: |\n"
    )
    good = True
    for scenario in SCENARIOS:
        if not selected or any(scenario.name.startswith(name) for name in selected):
            outcome = await run_proxy(scenario, seconds)
            sys.stdout.write(f"{outcome.row()}\n")
            sys.stdout.flush()
            reached = outcome.share >= MIN_SHARE and outcome.throttled < MAX_THROTTLED
            good = good and outcome.reached_clients == 0 and (reached or not scenario.has_aim)
    if peer:
        sys.stdout.write(f"{(await run_peer(peer, seconds)).row()}\n")
    return good


def main() -> int:
    """Print the table; return 1 if a 429 reached a client or a target was missed with the documented plan."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.goodput", description=__doc__)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help="prefix of its name (default: all)")
    parser.add_argument("--seconds", type=float, default=60, help="seconds of each run (default 60)")
    parser.add_argument("--peer", metavar="PYTHON", help="a Python with python-amazon-sp-api")
    options = parser.parse_args()
    end_on_signals()
    return 0 if asyncio.run(run(options.seconds, options.peer, options.scenarios)) else 1


if __name__ == "__main__":
    sys.exit(main())
