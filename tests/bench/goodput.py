"""How much of what Amazon permits is used, and how many 429s does that cost? `python -m tests.bench.goodput`.

Clients call one operation as often as they can, through the proxy, against the simulator with its plans enforced. The
same work is done by python-amazon-sp-api with its throttle_retry, where `--peer` names a Python that has it.
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
RATE, BURST = 5.0, 10  # of getListingsItem in the table
CLIENTS = 20
MIN_SHARE, MAX_THROTTLED = 0.98, 0.01  # what is aimed at where the plan is the table's


@dataclass(frozen=True, slots=True)
class Scenario:
    """What the simulator's true rate is, what it becomes half way, and whether answers announce it."""

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
    """What came of one run: answers in its time, what the plan permitted in it, and 429s on either side."""

    name: str
    served: int
    permitted: float
    reached_clients: int
    sent_by_amazon: int

    @property
    def share(self) -> float:
        """The answers as a share of what was permitted."""
        return self.served / self.permitted

    @property
    def throttled(self) -> float:
        """The 429s that Amazon sent as a share of the calls that it got."""
        return self.sent_by_amazon / max(1, self.served + self.sent_by_amazon)

    def row(self) -> str:
        """Return the row of the table."""
        return (
            f"| {self.name} | {self.served} of {self.permitted:.0f} | {self.share:.1%} | {self.reached_clients} | "
            f"{self.sent_by_amazon} ({self.throttled:.1%}) |"
        )


async def plan(harness: Harness, rate: float, *, announce: bool) -> None:
    """Set the simulator's plan; its bucket is full then."""
    content = {"method": "GET", "path": TEMPLATE, "rate": rate, "burst": BURST, "announce": announce, "enforce": True}
    await harness.post_control("/plans", content)


async def run_proxy(scenario: Scenario, seconds: float) -> Outcome:
    """Let the clients call through the proxy for so many seconds."""
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
    if scenario.later is not None:  # the bucket is full again with the new plan
        permitted = 2 * BURST + (scenario.rate + scenario.later) * seconds / 2
    return Outcome(scenario.name, statuses.count(200), permitted, statuses.count(429), throttled)


async def run_peer(python: str, seconds: float) -> Outcome:
    """Let python-amazon-sp-api do the same work, with the plan as the table says."""
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
    """Make the runs, print their table, and return whether what was aimed at was reached."""
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
    """Print the table; 1 where a 429 reached a client, or the aim was missed with the plan that the table says."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.goodput", description=__doc__)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help="how its name begins (default: all)")
    parser.add_argument("--seconds", type=float, default=60, help="how long each run takes (default 60)")
    parser.add_argument("--peer", metavar="PYTHON", help="a Python with python-amazon-sp-api")
    options = parser.parse_args()
    end_on_signals()
    return 0 if asyncio.run(run(options.seconds, options.peer, options.scenarios)) else 1


if __name__ == "__main__":
    sys.exit(main())
