"""Flags that several commands share, and how their values are parsed. Standard library alone."""

import argparse
from datetime import date
from typing import Any

from proxy.cli.admin_client import AdminAddress, address_in
from proxy.cli.common import CONFIG_VARIABLE

_HELP = """\
A flag overrides the environment, which overrides the file, which overrides the default.
--set and the environment take any setting, a list as [a, b], a mapping as {key: value}:
  --set limits.max_wait=30s                     SP_API_PROXY_LIMITS_MAX_WAIT=30s
  --set pool.max_connections=100                SP_API_PROXY_POOL_MAX_CONNECTIONS=100
  --set 'allowed_hosts=[a.example, b.example]'  SP_API_PROXY_ALLOWED_HOSTS='[a.example, b.example]'
  --set 'marketplaces={A1EXAMPLE: eu}'          SP_API_PROXY_MARKETPLACES='{A1EXAMPLE: eu}'
  --set 'listen[0].account=acme'                SP_API_PROXY_LISTEN_0_ACCOUNT=acme"""


def _setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError("must be KEY=VALUE, such as limits.max_wait=30s")
    return key, value


_FLAGS: dict[str, dict[str, Any]] = {
    "--config": {"metavar": "FILE", "help": f"the YAML file (also ${CONFIG_VARIABLE})"},
    "--listen": {
        "metavar": "ADDRESS",
        "action": "append",
        "help": "host:port or unix:/path for the apps; may be repeated",
    },
    "--admin": {"metavar": "ADDRESS", "help": "host:port for metrics and health; none for no admin listener"},
    "--default-account": {"metavar": "NAME", "help": "the account of requests that name none"},
    "--environment": {"choices": ("production", "sandbox"), "help": "Amazon's environment"},
    "--log-level": {
        "choices": ("debug", "info", "warning", "error"),
        "help": "the lowest level that is logged (info)",
    },
    "--log-format": {
        "choices": ("auto", "text", "json"),
        "help": "the format of log lines; auto: text on a terminal, JSON otherwise (auto)",
    },
    "--set": {
        "metavar": "KEY=VALUE",
        "action": "append",
        "type": _setting,
        "default": [],
        "help": "any other setting, as above; may be repeated",
    },
}

ALL_FLAGS = tuple(_FLAGS)
REQUEST_FLAGS = ("--config", "--listen", "--default-account", "--environment", "--set")
ADMIN_CLIENT_FLAGS = ("--config", "--admin", "--set")
ROTATION_FLAGS = ("--config", "--environment", "--set")

_SETTINGS = {
    "--listen": "listen",
    "--admin": "admin",
    "--default-account": "default_account",
    "--environment": "environment",
    "--log-level": "log.level",
    "--log-format": "log.format",
}


def add_config_flags(parser: argparse.ArgumentParser, flags: tuple[str, ...] = ALL_FLAGS) -> None:
    """Add those flags about the configuration that the command uses."""
    group = parser.add_argument_group("configuration", _HELP)
    for flag in flags:
        group.add_argument(flag, **_FLAGS[flag])


def settings_of(options: argparse.Namespace) -> list[tuple[str, Any, str]]:
    """Return what the command line set, as (key, value, flag)."""
    found: list[tuple[str, Any, str]] = []
    for flag, key in _SETTINGS.items():
        value = getattr(options, flag.removeprefix("--").replace("-", "_"), None)
        if value is not None:
            found.append((key, None if flag == "--admin" and value == "none" else value, flag))
    return found + [(key, value, "--set") for key, value in options.set]


# What argparse says of a value that is wrong does not quote it: it may be a secret.


def whole_number(text: str) -> int:
    """Return the number that a flag's value is; raise argparse's error."""
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise argparse.ArgumentTypeError("must be a whole number")
    return int(text)


def day(text: str) -> str:
    """Return a day as it was written, YYYY-MM-DD; raise argparse's error where it is none."""
    try:
        is_day = date.fromisoformat(text).isoformat() == text
    except ValueError:
        is_day = False
    if not is_day:
        raise argparse.ArgumentTypeError("must be a day such as 2027-03-31")
    return text


def duration(text: str) -> float:
    """Return seconds; raise argparse's error."""
    from proxy.config import parse_duration  # noqa: PLC0415 - 0.3 s of CPU that `healthcheck` does not need

    try:
        return parse_duration(text)
    except ValueError:
        raise argparse.ArgumentTypeError("must be a duration such as 30s or 2m") from None


def address(text: str) -> AdminAddress:
    """Return the address of a proxy's URL; raise argparse's error."""
    try:
        return address_in(text)
    except ValueError:
        raise argparse.ArgumentTypeError("must be a URL without a path, such as http://127.0.0.1:9090") from None


def header(text: str) -> tuple[str, str]:
    """Return name and value of `NAME: VALUE`; raise argparse's error."""
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise argparse.ArgumentTypeError("must be 'NAME: VALUE', such as 'x-sp-account: acme'")
    return name.strip(), value.strip()
