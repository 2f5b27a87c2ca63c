"""The command `sp-api-proxy simulate`."""

import argparse
import asyncio
import ipaddress
import json
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from proxy.simulator import control_api
from proxy.simulator.server import Simulator
from proxy.simulator.state import DEMO_APPLICATION, DEMO_CLIENT, DEMO_SECRET, REGIONS, Seller, Settings, demo_sellers

LAST_PORT = 65535

_EPILOG = f"""\
It starts with one fictitious application and seller:
  client id      {DEMO_CLIENT}
  client secret  {DEMO_SECRET}
  application id {DEMO_APPLICATION} (a draft, for authorize)
  refresh tokens {", ".join(f"Atzr|demo-{region}" for region in REGIONS)} (seller demo, one for each region)

examples:
  sp-api-proxy simulate
  sp-api-proxy simulate --port 0 --json --token-lifetime 60
  sp-api-proxy simulate --models selling-partner-api-models/models --enforce-plans

control, on the first port:
{control_api.__doc__.partition(chr(10) * 2)[2].partition(chr(10) * 2)[2] if control_api.__doc__ else ""}"""


def main(argv: list[str] | None = None) -> int:
    """Run a simulator until it is told to stop; return 0, or 1 where it cannot listen."""
    parser = _parser()
    options = parser.parse_args(argv)
    if (options.tls_cert is None) is not (options.tls_key is None):
        parser.error("--tls-cert and --tls-key need each other")
    try:
        return asyncio.run(_run(_settings(options), as_json=options.json))
    except OSError as exc:
        reason = os.strerror(exc.errno) if exc.errno and exc.errno > 0 else "the address cannot be used"
        sys.stderr.write(f"sp-api-proxy simulate: cannot listen: {reason}; choose another --port\n")
        return 1


class _Parser(argparse.ArgumentParser):
    """Ends wrong usage with one line that says where help is."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sp-api-proxy simulate",
        description="A local Selling Partner API and Login with Amazon, for tests.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    listening = parser.add_argument_group("listeners")
    listening.add_argument(
        "--host",
        type=_loopback,
        default="127.0.0.1",
        metavar="ADDRESS",
        help="a loopback address: it is a test tool (%(default)s)",
    )
    listening.add_argument(
        "--port",
        type=_port,
        default=9700,
        metavar="N",
        help="of the token host and of control; na, eu and fe take the next three. 0: free ones (%(default)s)",
    )
    listening.add_argument(
        "--tls-cert", type=Path, metavar="FILE", help="a PEM file: serve the regions over TLS, as localhost"
    )
    listening.add_argument("--tls-key", type=Path, metavar="FILE", help="a PEM file: the certificate's private key")
    listening.add_argument("--json", action="store_true", help="print the addresses as one line of JSON")
    acting = parser.add_argument_group("behaviour")
    acting.add_argument(
        "--models", type=_folder, metavar="DIR", help="a folder of Amazon's models: respond with their examples"
    )
    acting.add_argument(
        "--token-lifetime",
        type=_seconds,
        default=3600.0,
        metavar="SECONDS",
        help="lifetime of new tokens (3600, as Amazon's)",
    )
    acting.add_argument("--enforce-plans", action="store_true", help="respond with 429 when a usage plan is exhausted")
    acting.add_argument(
        "--plan",
        type=_plan,
        default=(5.0, 10.0),
        metavar="RATE:BURST",
        help="calls per second, and calls at once, where no plan is known (5:10)",
    )
    knowing = parser.add_argument_group("clients and sellers, in addition to the fictitious ones")
    knowing.add_argument(
        "--client",
        type=_client,
        action="append",
        default=[],
        metavar="ID:SECRET",
        help="an application; may be repeated",
    )
    knowing.add_argument(
        "--seller",
        type=_seller,
        action="append",
        default=[],
        metavar="NAME:REGION:REFRESH_TOKEN",
        help="a seller in a region: na, eu or fe; may be repeated",
    )
    return parser


def _loopback(text: str) -> str:
    try:
        is_loopback = text == "localhost" or ipaddress.ip_address(text).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        raise argparse.ArgumentTypeError("must be a loopback address, such as 127.0.0.1")
    return text


def _port(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 6 else LAST_PORT
    if number > LAST_PORT - 3:
        raise argparse.ArgumentTypeError(
            f"must be a whole number up to {LAST_PORT - 3}: the regions take the next three"
        )
    return number


def _folder(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError("must be a folder")
    return Path(text)


def _seconds(text: str) -> float:
    return _positive(text, "must be a number of seconds, such as 60")


def _plan(text: str) -> tuple[float, float]:
    rate, _, burst = text.partition(":")
    wanted = "must be RATE:BURST, such as 0.5:10"
    return _positive(rate, wanted), _positive(burst, wanted)


def _positive(text: str, wanted: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(wanted)
    return number


def _client(text: str) -> tuple[str, str]:
    client, colon, secret = text.rpartition(":")
    if not colon or not client or not secret:
        raise argparse.ArgumentTypeError("must be ID:SECRET")
    return client, secret


def _seller(text: str) -> Seller:
    name, _, rest = text.partition(":")
    region, _, refresh_token = rest.partition(":")
    if not name or region not in REGIONS or not refresh_token:
        raise argparse.ArgumentTypeError(f"must be NAME:REGION:REFRESH_TOKEN, REGION one of {', '.join(REGIONS)}")
    return Seller(name, region, refresh_token)


def _settings(options: argparse.Namespace) -> Settings:
    first = options.port
    ports = (0, 0, 0, 0) if first == 0 else (first, first + 1, first + 2, first + 3)
    tls = (options.tls_cert, options.tls_key) if options.tls_cert and options.tls_key else None
    return Settings(
        host=options.host,
        ports=ports,
        clients={DEMO_CLIENT: DEMO_SECRET, **dict(options.client)},
        sellers=(*demo_sellers(), *options.seller),
        token_lifetime=options.token_lifetime,
        models=options.models,
        enforce_plans=options.enforce_plans,
        default_plan=options.plan,
        tls=tls,
    )


async def _run(settings: Settings, *, as_json: bool) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with Simulator(settings) as simulator:
        sys.stdout.write(json.dumps(simulator.endpoints) + "\n" if as_json else _for_people(simulator.endpoints))
        sys.stdout.flush()
        await stop.wait()
    return 0


def _for_people(endpoints: dict[str, str]) -> str:
    lines = [
        "# The simulator listens. A configuration for the proxy:",
        "",
        "endpoints:",
        *(f"  {name}: {endpoints[name]}" for name in (*REGIONS, "lwa", "documents")),
        "applications:",
        f"  main: {{client_id: {DEMO_CLIENT}, client_secret: {DEMO_SECRET}}}",
        "accounts:",
        "  demo:",
        f"    refresh_tokens: {{{', '.join(f'{region}: Atzr|demo-{region}' for region in REGIONS)}}}",
        "",
        f"# Control: {endpoints['control']}/state. Ctrl-C ends it.",
        "",
    ]
    return "\n".join(lines)
