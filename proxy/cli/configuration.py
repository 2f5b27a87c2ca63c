"""Loading the configuration for a command, and reporting what is wrong with it."""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from pathlib import Path

from proxy.amazon.operations import OperationTable, load_table
from proxy.cli.common import CONFIG_VARIABLE, USAGE, print_err
from proxy.cli.options import settings_of
from proxy.config import ConfigError, Loaded, Problem, load_config
from proxy.request import authorization
from proxy.request.upstream import connector
from proxy.server import tls

DEFAULT_CONFIG_FILE = "config.yaml"  # the Makefile's; no command takes a file that nobody named

Run = Callable[[argparse.Namespace], int]


def reports_config_errors(run: Run) -> Run:
    """Make a command print what is wrong with the configuration, and end with exit code 2."""

    @wraps(run)
    def reporting(options: argparse.Namespace) -> int:
        try:
            return run(options)
        except ConfigError as exc:
            print_err(f"{len(exc.problems)} problem{'s'[: len(exc.problems) != 1]} in the configuration:")
            for problem in exc.problems:
                print_err(f"  {problem}")
            if config_path(options) is None and _has_unnamed_file(exc.problems):
                print_err(f"There is a {DEFAULT_CONFIG_FILE} here: --config {DEFAULT_CONFIG_FILE}")
            return USAGE

    return reporting


def config_path(options: argparse.Namespace) -> str | None:
    """Return the path of the configuration file, None if there is none."""
    path: str | None = options.config or os.environ.get(CONFIG_VARIABLE)
    return path


def load(options: argparse.Namespace, environ: Mapping[str, str] | None = None) -> Loaded:
    """Load and check the configuration that flags, environment and file give; raise ConfigError."""
    environ = os.environ if environ is None else environ
    loaded = load_config(options.config or environ.get(CONFIG_VARIABLE), environ, settings_of(options))
    return checked(loaded)


def checked(loaded: Loaded) -> Loaded:
    """Return the same if it also holds against the operation table and this machine; raise ConfigError."""
    config = loaded.config
    found = [
        *authorization.validate_policies(config, operation_table()),
        *tls.validate(config),
        *connector.validate(config),
    ]
    if found:
        raise ConfigError(loaded.with_locations(found), loaded.files)
    return loaded


@cache
def operation_table() -> OperationTable:
    """Return the table of operations, read once."""
    return load_table()


def _has_unnamed_file(problems: Sequence[Problem]) -> bool:
    """Return whether the file that `make run` takes is here, while what it would say is missing."""
    missing = [problem for problem in problems if problem.key in {"accounts", "applications"}]
    return any(problem.message.startswith("is missing") for problem in missing) and Path(DEFAULT_CONFIG_FILE).is_file()
