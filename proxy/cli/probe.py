"""`wait`, `healthcheck`, `shutdown`: ask a running proxy. Containers run `healthcheck` every few seconds.

So this module needs the standard library alone, unless the configuration has to be read for the proxy's address.
"""

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path

from proxy.cli import admin_client
from proxy.cli.admin_client import AdminAddress
from proxy.cli.common import CONFIG_VARIABLE, FAILED, OK, Command, print_err, print_out
from proxy.cli.options import ADMIN_CLIENT_FLAGS, add_config_flags, address, duration

DEFAULT_ADMIN = "127.0.0.1:9090"  # that of config/model.py; a test compares them
_PLAIN_ADDRESS = re.compile(r"(\d+(?:\.\d+){3}|localhost):(\d{1,5})", re.ASCII)
_ADMIN_LINE = re.compile(r"admin:[ ]+(\S+)[ ]*(?:#.*)?")
# What a file may hold and still be read line by line: top-level keys in block style.
_KEY_LINE = re.compile(r"[a-z_]+:(?:\s.*)?", re.ASCII)


def add_admin_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which proxy is asked."""
    parser.add_argument(
        "--url",
        metavar="URL",
        type=address,
        help="the proxy's admin or health address, such as http://127.0.0.1:9090; otherwise that of its configuration",
    )
    add_config_flags(parser, ADMIN_CLIENT_FLAGS)


def _add_wait_flags(parser: argparse.ArgumentParser) -> None:
    add_admin_flags(parser)
    parser.add_argument(
        "--timeout", metavar="TIME", type=duration, default=30.0, help="how long at most, such as 30s or 2m (30s)"
    )


def _add_healthcheck_flags(parser: argparse.ArgumentParser) -> None:
    add_admin_flags(parser)
    parser.add_argument("--live", action="store_true", help="ask whether it is alive, ready or not")


def _wait(options: argparse.Namespace) -> int:
    return _ask(options, lambda target: admin_client.wait_until_ready(target, options.timeout))


def _healthcheck(options: argparse.Namespace) -> int:
    return _ask(options, lambda target: admin_client.request(target, "GET", "/livez" if options.live else "/readyz"))


def _shutdown(options: argparse.Namespace) -> int:
    # The health address ends nothing.
    return _ask(options, lambda target: admin_client.request(target, "POST", "/quitquitquit"))


def _ask(options: argparse.Namespace, ask: Callable[[AdminAddress], admin_client.AdminResponse]) -> int:
    return with_admin_address(options, lambda target: _report(ask(target)))


def _report(response: admin_client.AdminResponse) -> int:
    (print_out if response.ok else print_err)(response.text)
    return OK if response.ok else FAILED


def with_admin_address(options: argparse.Namespace, ask: Callable[[AdminAddress], int]) -> int:
    """Return what `ask` returns for the address of the proxy that the flags and the configuration name."""
    target: AdminAddress | None = options.url or plain_admin_address(options)
    return ask(target) if target is not None else _with_configured_address(options, ask)


def _with_configured_address(options: argparse.Namespace, ask: Callable[[AdminAddress], int]) -> int:
    # 0.3 s of CPU: only where the address is not plain to see.
    from proxy.cli.configuration import config_path, reports_config_errors  # noqa: PLC0415
    from proxy.cli.options import settings_of  # noqa: PLC0415
    from proxy.config import ConfigError, Problem, admin_addresses  # noqa: PLC0415

    @reports_config_errors
    def run(options: argparse.Namespace) -> int:
        found = admin_addresses(config_path(options), os.environ, settings_of(options))
        if not found or not (found[0].path or found[0].port):
            raise ConfigError([Problem("admin", "names no address to ask: give --url, or set admin or health")])
        return ask(AdminAddress(found[0].host, found[0].port, found[0].path or ""))

    return run(options)


def plain_admin_address(options: argparse.Namespace) -> AdminAddress | None:
    """Return the admin address if flags, environment and file say it plainly; None if they have to be read in full."""
    names = [name for name in os.environ if name.startswith("SP_API_PROXY_ADMIN")]
    if options.set or any(name != "SP_API_PROXY_ADMIN" for name in names):
        return None
    path = options.config or os.environ.get(CONFIG_VARIABLE)
    written = options.admin or os.environ.get("SP_API_PROXY_ADMIN")
    if written is None:
        written = _admin_in_file(Path(path)) if path else DEFAULT_ADMIN
    found = _PLAIN_ADDRESS.fullmatch(written)
    return AdminAddress(found[1], int(found[2])) if found is not None and 0 < int(found[2]) < 65536 else None


def _admin_in_file(path: Path) -> str:
    """Return the value of the key `admin` in a YAML file, an empty text unless the file is plain block style."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return ""
    for line in lines:
        # Indented lines, comments, list items without indentation, and the marker of a document's start.
        if not line.strip() or line[0] in " #" or line.startswith("- ") or line.rstrip() == "---":
            continue
        if not _KEY_LINE.fullmatch(line):
            return ""
        if line.startswith("admin:"):
            found = _ADMIN_LINE.fullmatch(line)
            return found[1] if found is not None else ""
    return DEFAULT_ADMIN


COMMANDS = {
    "wait": Command("sp-api-proxy wait --timeout 30s && my-job", _add_wait_flags, _wait),
    "healthcheck": Command("sp-api-proxy healthcheck", _add_healthcheck_flags, _healthcheck),
    "shutdown": Command("sp-api-proxy shutdown --url http://127.0.0.1:9090", add_admin_flags, _shutdown),
}
