"""Try the wheel with the lowest or the newest dependencies that its metadata allows, without a lock file.

`check_dependencies.py lowest|newest [--pre] [--python PYTHON]`: the wheel alone in an empty environment, its smoke
test, then the tests of what depends on names that a library does not promise to keep. Test tools come from the lock;
they must not move a version that the resolution chose. `--pre` allows pre-releases, and names releases out of range.
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
# What an installed wheel says differently from a checkout.
DESELECTED = "tests/request/test_tracing.py::test_without_the_extra_the_start_says_what_to_install"
TOOLS = ("hypothesis", "pytest", "pytest-asyncio", "pytest-timeout")
EXTRA = "otel"
OLDEST_PYTHON = "3.11"  # all lower bounds have wheels for it; with a later one, `lowest` is the lowest that has
TESTS_TIMEOUT = 900  # seconds

RESOLUTIONS = {"lowest": "lowest-direct", "newest": "highest"}


def requirements(wheel: Path) -> tuple[list[str], list[str]]:
    """Return what the wheel requires by itself and what its extra adds, as its metadata says it."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist", [])
    of_extra = [line.partition(";")[0].strip() for line in lines if f"extra == '{EXTRA}'" in line]
    return [line for line in lines if "extra ==" not in line], of_extra


def locked(names: tuple[str, ...]) -> list[str]:
    """Return the pins of some packages in the lock file of the development tools."""
    text = (ROOT / "requirements-dev.lock").read_text(encoding="utf-8")
    return [re.search(rf"^{re.escape(name)}==[^\s;]+", text, re.MULTILINE)[0] for name in names]  # type: ignore[index]


def name_of(requirement: str) -> str:
    """Return the normalized name of a requirement or pin."""
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


class Environment:
    """An empty environment that uv fills."""

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
    """Raise AssertionError where a lower bound of the metadata is not the version that was tried."""
    for line in requirements(wheel)[0]:
        floor = re.search(r">=([\d.]+)", line.partition(";")[0])
        if "python_version" not in line and floor is not None:
            tried = versions[name_of(line)]
            assert re.sub(r"(\.0)+$", "", tried) == floor[1], f"{line}: {tried} is the lowest that can be installed"


def run_tests(environment: Environment, wheel: Path) -> None:
    """Run TESTS against the installed wheel, from a copy of the checkout that has no package beside them."""
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


def tell_of_later(environment: Environment, wheel: Path) -> None:
    """Print which newer releases the ranges leave out; that is no failure."""
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
    parser.add_argument("--python", default=sys.executable, help="the Python of the environment")
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
            tell_of_later(environment, wheel)
    sys.stdout.write(f"Passed in {time.monotonic() - start:.0f} s\n")


if __name__ == "__main__":
    main()
