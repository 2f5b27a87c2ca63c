"""Smoke test of the wheel in an empty environment: version, one request, status page.

`check_wheel.py` installs the locked dependencies with the running Python. `check_wheel.py --others` does the same with
every other supported Python on the machine, and passes if there is none.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 300
SUPPORTED_MINORS = range(11, 15)  # Python 3.11 to 3.14


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command to its end and return what it printed."""
    return subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT).stdout


def build_wheel(folder: Path) -> Path:
    """Build the wheel in `folder` and return its path."""
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, cwd=ROOT)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path, python: str) -> Path:
    """Install the wheel with the locked dependencies in a new environment of `python`, and return the command."""
    run(python, "-m", "venv", folder / "venv", cwd=folder)
    pip: list[str | Path] = [
        folder / "venv/bin/python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
    ]
    run(*pip, "--require-hashes", "-r", ROOT / "requirements.lock", cwd=folder)
    run(*pip, "--no-deps", "--no-index", wheel, cwd=folder)
    return folder / "venv/bin/sp-api-proxy"


def other_pythons() -> dict[str, str]:
    """Return the supported Pythons of this machine by version, except the running one."""
    found: dict[str, str] = {}
    for minor in SUPPORTED_MINORS:
        name = f"python3.{minor}"
        pyenv = sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/{name}"))
        for program in (shutil.which(name), *map(str, pyenv)):
            if minor == sys.version_info.minor or program is None:
                continue
            # pyenv's shim fails for a version that is not selected; Debian's Python may lack venv.
            probe = [program, "-c", "import ensurepip, sys, venv; print(*sys.version_info[:3], sep='.')"]
            said = subprocess.run(probe, capture_output=True, text=True, check=False, timeout=TIMEOUT)
            if said.returncode == 0:
                found[said.stdout.strip()] = program
                break
    return found


def one_request(command: Path, folder: Path) -> None:
    """Start the proxy on free ports against its own simulator, send one request, and fetch its status page."""
    addresses = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")
    arguments = [str(command), "serve", "--demo", *addresses, "--log-format", "json"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder)}
    with subprocess.Popen(arguments, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            lines = (json.loads(line) for line in process.stderr)
            serving = next(line for line in lines if line["message"] == "serving")
            address = serving["listen"][0]
            url = f"http://{address}/sellers/v1/marketplaceParticipations"
            request = urllib.request.Request(url, headers={"x-sp-region": "eu"})
            with urllib.request.urlopen(request, timeout=30) as response:
                sys.stdout.write(f"{response.status} {response.headers['x-sp-proxy']}\n")
            for name in ("", "page.css", "page.js"):  # data files of the package
                with urllib.request.urlopen(f"http://{serving['admin']}/{name}", timeout=30) as response:
                    sys.stdout.write(f"{response.status} /{name} {len(response.read())} bytes\n")
        finally:
            process.terminate()
            process.communicate(timeout=30)
    assert process.returncode == 0, f"ended with {process.returncode}"


def smoke_test(command: Path, folder: Path) -> None:
    """Run the installed command: version, operation table, one request; an exception is a failure."""
    sys.stdout.write(run(command, "--version", cwd=folder))
    sys.stdout.write(f"{run(command, 'operations', cwd=folder).count(chr(10))} operations\n")
    one_request(command, folder)


def check(version: str, python: str) -> None:
    """Build, install and test the wheel with one Python."""
    sys.stdout.write(f"The wheel on Python {version}\n")
    sys.stdout.flush()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        smoke_test(install(build_wheel(folder / "dist"), folder, python), folder)


def main() -> None:
    """Run the whole check; an exception is a failure."""
    if sys.argv[1:] == ["--others"]:
        for version, python in other_pythons().items():
            check(version, python)
    else:
        check(platform.python_version(), sys.executable)


if __name__ == "__main__":
    main()
