"""The demo: the proxy beside a simulator of Amazon, for those who have no credentials yet."""

import argparse
import os
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any

from proxy.cli.common import print_out
from proxy.cli.configuration import checked
from proxy.cli.options import settings_of
from proxy.cli.runner import logging_to, serve_until_signal
from proxy.config import REGIONS, Loaded, load_config
from proxy.server.runtime import RunningProxy

_DEMO_SELLER = "demo"


async def demo(options: argparse.Namespace) -> int:
    from proxy.simulator import Simulator  # noqa: PLC0415 - only the demo needs it

    async with AsyncExitStack() as stack:
        simulator = await stack.enter_async_context(Simulator())
        environ = demo_environment(os.environ, simulator)

        def load() -> Loaded:
            return checked(load_config(None, environ, settings_of(options)))

        loaded = load()
        with logging_to(loaded.config.log, loaded.config.audit):
            return await serve_until_signal(loaded, load, _welcome, is_demo=True)


def demo_environment(environ: Mapping[str, str], simulator: Any) -> dict[str, str]:
    """Return the environment with the simulator's addresses and its made-up credentials added."""
    names = (*REGIONS, "lwa", "documents")
    endpoints = {f"SP_API_PROXY_ENDPOINTS_{name.upper()}": simulator.endpoints[name] for name in names}
    account = f"SP_API_PROXY_ACCOUNTS_{_DEMO_SELLER.upper()}_REFRESH_TOKENS_"
    tokens = {account + region.upper(): f"Atzr|demo-{region}" for region in REGIONS}
    application = {
        "LWA_APP_ID": "amzn1.application-oa2-client.simulator",
        "LWA_CLIENT_SECRET": "amzn1.oa2-cs.v1.simulator",
    }
    return {**environ, **endpoints, **tokens, **application}


def _welcome(proxy: RunningProxy) -> None:
    # 0.0.0.0 is no address that a request can be sent to.
    address = proxy.addresses[0].replace("0.0.0.0:", "127.0.0.1:")
    curl = (
        f"curl -si --unix-socket {address.removeprefix('unix:')} http://localhost"
        if address.startswith("unix:")
        else (f"curl -si http://{address}")
    )
    end = f"The status page is at http://{proxy.admin}/. " if proxy.admin else ""
    # One write: a log line, which another thread writes, must not come in between.
    print_out(
        f"""\
No credentials were given, so the proxy runs against a simulator of Amazon on this machine. Try:

  # an ordinary call
  {curl}/sellers/v1/marketplaceParticipations -H 'x-sp-region: eu'
  # a grantless call
  {curl}/notifications/v1/destinations -H 'x-sp-region: eu'
  # a call that needs a Restricted Data Token
  {curl}/orders/v0/orders/902-1845936-5435065/address -H 'x-sp-region: eu'

{end}Ctrl-C ends both."""
    )
    sys.stdout.flush()
