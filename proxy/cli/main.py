"""The command line: which commands there are, their help, and their exit codes.

Exit codes: 0 done. 1 a failure while running, such as an address in use. 2 wrong usage or configuration. 130 and 143:
ended by SIGINT or SIGTERM before the requests in flight were finished; 143 also if /quitquitquit ended it so.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import NoReturn

from proxy import __version__
from proxy.cli.common import INTERRUPTED, OK, USAGE, Command, print_err

_EXIT_CODES = "Exit codes: 0 done, 1 failure while running, 2 wrong usage or configuration"

# Each command: the module of this package that has it, and its line in --help.
COMMANDS = {
    "serve": ("serve", "run the proxy"),
    "check": (
        "check",
        "check the configuration and show what is in force, secrets hidden; with --live, test the credentials",
    ),
    "explain": ("explain", "say what the proxy would do with a request and why, without sending it"),
    "operations": ("operations", "list the operations the proxy knows"),
    "schema": ("schema", "print the JSON Schema of the configuration, for editors"),
    "simulate": ("simulate", "run a local SP-API and Login with Amazon for tests"),
    "rotate": ("rotate_secret", "ask Amazon for a new client secret of an application"),
    "authorize": ("authorize", "get a refresh token: a selling partner consents at Amazon, and a file keeps it"),
    "wait": ("probe", "wait until a proxy is ready"),
    "healthcheck": ("probe", "ask a proxy once whether it is ready"),
    "shutdown": ("probe", "make a proxy finish its requests and exit (its setting quit must be true)"),
    "requests": ("tail", "follow the requests that a proxy serves, as tail -f does"),
    "version": ("version", "print the version"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["simulate"]:
        # Apart from the rest, and with options of its own: it shares no code with the proxy.
        from proxy import simulator  # noqa: PLC0415 - only this command needs it

        return simulator.main(arguments[1:])
    if arguments[:2] == ["operations", "rebuild"]:
        from proxy.amazon.catalog import rebuild  # noqa: PLC0415 - as above

        return rebuild.main(arguments[2:])
    parser = _parser(arguments[0] if arguments and arguments[0] in COMMANDS else "")
    if not arguments:
        parser.print_help(sys.stderr)
        return USAGE
    options = parser.parse_args(arguments)
    try:
        code: int = options.run(options)
    except KeyboardInterrupt:
        print_err("sp-api-proxy: interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # `sp-api-proxy operations | head`: nobody reads any more, which is no failure.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    return code


class _Parser(argparse.ArgumentParser):
    """Ends wrong usage with one line that says where help is."""

    def error(self, message: str) -> NoReturn:
        print_err(f"sp-api-proxy: {message} (see {self.prog} --help)")
        raise SystemExit(USAGE)


def _parser(only: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the command line. `only`: the one command whose flags are needed; None for all of them."""
    parser = _Parser(
        prog="sp-api-proxy",
        description="A local authenticating reverse proxy for Amazon's Selling Partner API.",
        epilog=f"Try it without credentials: sp-api-proxy serve --demo. {_EXIT_CODES}.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"sp-api-proxy {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (module, text) in COMMANDS.items():
        if only is not None and name != only:
            commands.add_parser(name, help=text)
            continue
        of_module: Mapping[str, Command] = import_module(f"proxy.cli.{module}").COMMANDS
        command = of_module[name]
        one = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example: {command.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_flags(one)
        one.set_defaults(run=command.run)
    return parser
