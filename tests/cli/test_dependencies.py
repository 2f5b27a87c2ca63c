"""A dependency out of its range is named at start, before anything is imported that could fail or hang with it."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from proxy.cli import dependencies
from tests.support.paths import ROOT
from tests.support.proxy_process import START

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_ranges_are_those_of_the_metadata() -> None:
    said = [line.partition(";")[0] for line in PROJECT["dependencies"] if "python_version" not in line]
    assert sorted((*dependencies.RANGES, dependencies.REDIS_RANGE)) == sorted(said)


def test_what_is_installed_here_is_within_them() -> None:
    assert dependencies.wrong_versions((*dependencies.RANGES, dependencies.REDIS_RANGE)) == []


@pytest.mark.parametrize(
    ("found", "is_within"),
    [
        ("3.14.3", False),
        ("3.14.4rc1", False),
        ("3.14.4.dev0", False),
        ("3.14.4", True),
        ("3.14.4.0", True),
        ("3.14.4.post1", True),
        ("3.14.4+local.1", True),
        ("3.14.5b2", True),
        ("3.14.10", True),
        ("3.15.0.dev1", False),
        ("3.15.0a1", False),
        ("3.15", False),
        ("4.0.0a2.dev0", False),
        ("unknown", False),
    ],
)
def test_versions_are_compared_as_pep_440_orders_them(found: str, *, is_within: bool) -> None:
    assert dependencies.is_within(found, ">=3.14.4,<3.15") == is_within


def test_zeros_at_the_end_of_a_version_count_for_nothing() -> None:
    assert dependencies.is_within("44", ">=44")
    assert dependencies.is_within("44.0.0", ">=44")
    assert dependencies.is_within("7.2", ">=7.2.0")
    assert not dependencies.is_within("9.0.0", ">=7.2,<9")
    assert dependencies.is_within("10", ">=9")


def with_distribution(folder: Path, name: str, version: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command where a package's metadata says another version, and any import of aiohttp ends the process."""
    metadata = folder / f"{name}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    (folder / "aiohttp.py").write_text("raise SystemExit('aiohttp was imported')\n", encoding="utf-8")
    program = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); from proxy.__main__ import main; raise SystemExit(main())"
    )
    command = [sys.executable, "-c", program, str(folder), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=START)


def test_a_wrong_version_ends_the_start_with_one_line(tmp_path: Path) -> None:
    ended = with_distribution(tmp_path, "aiohttp", "3.14.3", "serve", "--demo")
    assert ended.returncode == 1
    assert ended.stderr == (
        "sp-api-proxy: aiohttp 3.14.3 is installed; this version works with aiohttp >=3.14.4,<3.15. "
        "Fix: pip install 'aiohttp>=3.14.4,<3.15'\n"
    )
    assert ended.stdout == ""


def test_redis_is_checked_where_a_store_is_configured(tmp_path: Path) -> None:
    program = (
        "import sys, importlib.metadata as m; real = m.version\n"
        "import proxy.cli.dependencies as d; d.version = lambda name: '7.1.1' if name == 'redis' else real(name)\n"
        "from proxy.__main__ import main; raise SystemExit(main())\n"
    )
    config = tmp_path / "config.yaml"
    config.write_text(
        "{applications: {main: {client_id: c, client_secret: s}}, accounts: {a: {refresh_tokens: {eu: t}}}, "
        "store: 'redis://127.0.0.1:1', store_key: distinctive-store-key-0123456789abcdef}",
        encoding="utf-8",
    )
    command = [sys.executable, "-c", program, "serve", "--config", str(config)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=START)
    assert ended.returncode == 1
    assert ended.stderr == (
        "sp-api-proxy: redis 7.1.1 is installed; this version works with redis >=7.2,<9. "
        "Fix: pip install 'redis>=7.2,<9'\n"
    )
