"""`version`: print the version."""

import argparse

from proxy import __version__
from proxy.cli.common import OK, Command, no_flags, print_out


def _version(_: argparse.Namespace) -> int:
    print_out(f"sp-api-proxy {__version__}")
    return OK


COMMANDS = {"version": Command("sp-api-proxy version", no_flags, _version)}
