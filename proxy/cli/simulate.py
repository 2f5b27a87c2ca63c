"""`simulate` in the list of commands. main.py hands its arguments to proxy/simulator before they are parsed here."""

import argparse

from proxy import simulator
from proxy.cli.common import Command, no_flags


def _simulate(_: argparse.Namespace) -> int:
    return simulator.main([])


COMMANDS = {"simulate": Command("sp-api-proxy simulate --help", no_flags, _simulate)}
