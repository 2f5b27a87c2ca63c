"""`healthcheck` and its like import nothing that they do not need, and find the address of the proxy all the same."""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from proxy.cli import common, main, probe
from proxy.config import admin_addresses, environment
from proxy.config.model import Config
from tests.support.paths import ROOT

HEAVY = {
    "aiocache",
    "aiohttp",
    "cryptography",
    "httptools",
    "multidict",
    "prometheus_client",
    "pydantic",
    "redis",
    "yaml",
}


@pytest.mark.parametrize(
    "command",
    [
        ["healthcheck", "--url", "http://127.0.0.1:1"],
        ["healthcheck", "--config", "config/minimal.yaml", "--admin", "127.0.0.1:1"],
        ["shutdown", "--url", "http://127.0.0.1:1"],
        ["version"],
        ["--help"],
    ],
)
def test_a_light_command_imports_no_library(command: list[str]) -> None:
    program = (
        "import sys\nfrom proxy.__main__ import main\nsys.argv[1:] = sys.argv[1:]\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print('imported', *{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *command], capture_output=True, text=True, cwd=ROOT, check=True, timeout=60
    )
    imported = set(done.stdout.splitlines()[-1].split())
    assert "imported" in imported
    assert not imported & HEAVY


def options(*arguments: str) -> argparse.Namespace:
    return main._parser().parse_args(["healthcheck", *arguments])


def test_what_is_written_twice_is_the_same() -> None:
    assert environment.CONFIG_VARIABLE == common.CONFIG_VARIABLE
    assert str(Config.model_fields["admin"].default) == probe.DEFAULT_ADMIN


PLAIN = {"absent", "plain", "nested alone", "name", "windows line ends", "document start"}
FILES = {
    "absent": "accounts: {}\n",
    "plain": "# comment\nlisten:\n- 127.0.0.1:1\nadmin: 127.0.0.1:9191  # here\naccounts:\n  admin: x\n",
    "nested alone": "accounts:\n  admin: 127.0.0.1:1\n",
    "name": "admin: localhost:9191\n",
    "quoted": 'admin: "127.0.0.1:9191"\n',
    "quoted key": '"admin": 127.0.0.1:9191\n',
    "flow": "{admin: 127.0.0.1:9191}\n",
    "variable": "admin: ${ADMIN_HERE}\n",
    "none": "admin: null\nhealth: 127.0.0.1:9292\n",
    "next line": "admin:\n  127.0.0.1:9191\n",
    "document start": "---\nadmin: 127.0.0.1:9191\n",
    "flow behind a document start": "--- {admin: 127.0.0.1:9191}\n",
    "ipv6": "admin: '[::1]:9191'\n",
    "windows line ends": "admin: 127.0.0.1:9191\r\naccounts: {}\r\n",
}


@pytest.mark.parametrize("name", FILES)
def test_a_plain_address_is_that_of_the_whole_configuration(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADMIN_HERE", "127.0.0.1:9191")
    path = tmp_path / "config.yaml"
    path.write_bytes(FILES[name].encode())
    plain = probe.plain_admin_address(options("--config", str(path)))
    full = admin_addresses(str(path), os.environ)[0]
    assert plain is None or (plain.host, plain.port) == (full.host, full.port)
    assert (plain is not None) == (
        name in {"absent", "plain", "nested alone", "name", "windows line ends", "document start"}
    )


@pytest.mark.parametrize(
    ("variables", "arguments", "expected"),
    [
        ({}, (), ("127.0.0.1", 9090)),
        ({"SP_API_PROXY_ADMIN": "127.0.0.1:7"}, (), ("127.0.0.1", 7)),
        ({"SP_API_PROXY_ADMIN": "127.0.0.1:7"}, ("--admin", "127.0.0.1:8"), ("127.0.0.1", 8)),
        ({}, ("--admin", "none"), None),
        ({}, ("--set", "admin=127.0.0.1:8"), None),
        ({"SP_API_PROXY_ADMIN": "unix:/run/admin.sock"}, (), None),
    ],
)
def test_flags_override_the_environment(
    variables: dict[str, str], arguments: tuple[str, ...], expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(common.CONFIG_VARIABLE, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    plain = probe.plain_admin_address(options(*arguments))
    assert (None if plain is None else (plain.host, plain.port)) == expected
