"""What all commands share: exit codes, printing, and the form of a command. Standard library alone."""

import argparse
import sys
from collections.abc import Callable
from typing import NamedTuple

OK, FAILED, USAGE = 0, 1, 2
INTERRUPTED = 130  # 128 + SIGINT, as shells have it

CONFIG_VARIABLE = "SP_API_PROXY_CONFIG"  # that of config/environment.py; a test compares them


class Command(NamedTuple):
    """A command: its example in `--help`, what adds its flags, and what runs it and returns the exit code."""

    example: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def print_out(text: str = "") -> None:
    """Print a line to standard output."""
    sys.stdout.write(f"{text}\n")


def print_err(text: str) -> None:
    """Print a line to standard error."""
    sys.stderr.write(f"{text}\n")


def no_flags(_: argparse.ArgumentParser) -> None:
    """Add no flags."""
