"""Test the wheel with the lowest or the newest dependencies that its metadata allows, without a lock file.

`check_dependencies.py lowest|newest [--pre] [--python PYTHON]`: the wheel alone in an empty environment, its smoke
test, then the tests of code that uses undocumented names of libraries. Test tools come from the lock file; they must
not change a version that the resolution chose. `--pre` allows pre-releases, and lists releases outside the ranges.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from email.parser import Parser
from pathlib import Path

import uv
from check_wheel import ROOT, build_wheel, run, smoke_test

TESTS = (
    "tests/server/test_http_protocol.py",
    "tests/server/test_connections.py",
    "tests/server/test_self_check.py",
    "tests/request/test_aiohttp_internals.py",
    "tests/store/test_redis_tokens.py",
    "tests/request/ratelimit/test_redis_limiter.py",
    "tests/observability/test_metrics.py",
    "tests/request/test_tracing.py",
    "tests/project/test_private_names.py",
    "tests/store/test_redis_internals.py",
    "tests/cli/test_dependencies.py",
)
# The message differs between an installed wheel and a checkout.
DESELECTED = "tests/request/test_tracing.py::test_without_the_extra_the_start_says_what_to_install"
TOOLS = ("hypothesis", "pytest", "pytest-asyncio", "pytest-timeout")
EXTRA = "otel"
OLDEST_PYTHON = "3.11"  # has wheels of all lower bounds; later Pythons may need higher versions
TESTS_TIMEOUT = 900  # seconds

RESOLUTIONS = {"lowest": "lowest-direct", "newest": "highest"}


def requirements(wheel: Path) -> tuple[list[str], list[str]]:
    """Return the requirements of the wheel and of its extra, from its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist", [])
    of_extra = [line.partition(";")[0].strip() for line in lines if f"extra == '{EXTRA}'" in line]
    return [line for line in lines if "extra ==" not in line], of_extra


def locked(names: tuple[str, ...]) -> list[str]:
    """Return the pins of packages in the lock file of the development tools."""
    text = (ROOT / "requirements-dev.lock").read_text(encoding="utf-8")
    return [re.search(rf"^{re.escape(name)}==[^\s;]+", text, re.MULTILINE)[0] for name in names]  # type: ignore[index]


def name_of(requirement: str) -> str:
    """Return the normalized name of a requirement or pin."""
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


class Environment:
    """A new virtual environment managed by uv."""

    def __init__(self, folder: Path, python: str, options: list[str]) -> None:
        self.folder = folder
        self.bin = folder / "venv/bin"
        self._options = options
        run(uv.find_uv_bin(), "venv", "--quiet", "--python", python, folder / "venv", cwd=folder)

    def install(self, *arguments: str | Path) -> None:
        """Install packages under the chosen resolution."""
        program = [uv.find_uv_bin(), "pip", "install", "--quiet", "--no-build", "--python", self.bin / "python"]
        run(*program, *self._options, *arguments, cwd=self.folder)

    def versions(self) -> dict[str, str]:
        """Return the version of each installed package."""
        program = [uv.find_uv_bin(), "pip", "freeze", "--quiet", "--python", self.bin / "python"]
        pins = [line.split("==") for line in run(*program, cwd=self.folder).splitlines() if "==" in line]
        return {name_of(name): version for name, version in pins}


def install(environment: Environment, wheel: Path) -> dict[str, str]:
    """Install the wheel with what it requires, and return the versions; `lowest` is about direct requirements only."""
    required, _ = requirements(wheel)
    environment.install(*required, wheel)
    names = sorted({name_of(line) for line in required})
    versions = environment.versions()
    sys.stdout.write("".join(f"  {name} {versions[name]}\n" for name in names if name in versions))
    return versions


def check_floors(wheel: Path, versions: dict[str, str]) -> None:
    """Raise AssertionError if a lower bound of the metadata is not the installed version."""
    for line in requirements(wheel)[0]:
        floor = re.search(r">=([\d.]+)", line.partition(";")[0])
        if "python_version" not in line and floor is not None:
            tried = versions[name_of(line)]
            assert re.sub(r"(\.0)+$", "", tried) == floor[1], f"{line}: {tried} is the lowest that can be installed"


def run_tests(environment: Environment, wheel: Path) -> None:
    """Run TESTS against the installed wheel, from a copy of the checkout without the package."""
    before = environment.versions()
    constraints = environment.folder / "chosen.txt"
    pins = [f"{name}=={version}\n" for name, version in before.items() if name != "sp-api-proxy"]
    constraints.write_text("".join(pins), encoding="utf-8")
    _, of_extra = requirements(wheel)
    environment.install("--constraint", constraints, *locked(TOOLS), *of_extra)
    after = environment.versions()
    sys.stdout.write("".join(f"  {name} {after[name]}\n" for name in map(name_of, of_extra)))
    assert all(after[name] == version for name, version in before.items())
    checkout = environment.folder / "checkout"
    ignored = shutil.ignore_patterns("proxy", ".*", "__pycache__", "build", "dist", "node_modules")
    shutil.copytree(ROOT, checkout, ignore=ignored)
    sys.stdout.flush()
    command = [environment.bin / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["--deselect", DESELECTED, *TESTS]
    subprocess.run(command, cwd=checkout, check=True, timeout=TESTS_TIMEOUT)


def print_later_releases(environment: Environment, wheel: Path) -> None:
    """Print newer releases outside the ranges; they are no failure."""
    names = sorted({name_of(line) for line in [*requirements(wheel)[0], *requirements(wheel)[1]]})
    (environment.folder / "names.txt").write_text("\n".join(names), encoding="utf-8")
    program = [uv.find_uv_bin(), "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--prerelease", "allow"]
    target = ["--python", environment.bin / "python", environment.folder / "names.txt"]
    found = dict(line.split("==") for line in run(*program, *target, cwd=environment.folder).splitlines())
    used = environment.versions()
    for name in names:
        if name in used and found[name] != used[name]:
            sys.stdout.write(f"Out of range: {name} {found[name]} (tried: {used[name]})\n")


def main() -> None:
    """Run the whole check; an exception is a failure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", choices=RESOLUTIONS)
    parser.add_argument("--pre", action="store_true", help="allow pre-releases")
    parser.add_argument("--python", default=sys.executable, help="Python of the environment")
    options = parser.parse_args()
    start = time.monotonic()
    chosen = ["--resolution", RESOLUTIONS[options.which], *(["--prerelease", "allow"] if options.pre else [])]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        environment = Environment(folder, options.python, chosen)
        python = run(environment.bin / "python", "-V", cwd=folder).strip()
        sys.stdout.write(f"The {options.which} versions that the metadata allows, {python}\n")
        wheel = build_wheel(folder / "dist")
        versions = install(environment, wheel)
        if options.which == "lowest" and python.startswith(f"Python {OLDEST_PYTHON}."):
            check_floors(wheel, versions)
        smoke_test(environment.bin / "sp-api-proxy", folder)
        run_tests(environment, wheel)
        if options.pre:
            print_later_releases(environment, wheel)
    sys.stdout.write(f"Passed in {time.monotonic() - start:.0f} s\n")


if __name__ == "__main__":
    main()
