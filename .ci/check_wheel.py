"""Does the wheel work by itself: built, installed in an empty environment elsewhere, version, request, status page?"""

import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 300


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command to its end and return what it printed."""
    return subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT).stdout


def install(folder: Path) -> Path:
    """Build the wheel, install it with the locked dependencies in `folder`, and return the command."""
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "dist", cwd=ROOT)
    (wheel,) = (folder / "dist").glob("*.whl")
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
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


def one_request(command: Path, folder: Path) -> None:
    """Start the proxy on free ports against its own simulator, send one request through it, and look at its page."""
    places = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")
    arguments = [str(command), "serve", "--demo", *places, "--log-format", "json"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder)}
    with subprocess.Popen(arguments, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            lines = (json.loads(line) for line in process.stderr)
            serving = next(line for line in lines if line["message"] == "serving")
            address = serving["listen"][0]
            url = f"http://{address}/sellers/v1/marketplaceParticipations"
            request = urllib.request.Request(url, headers={"x-sp-region": "eu"})
            with urllib.request.urlopen(request, timeout=30) as answer:
                sys.stdout.write(f"{answer.status} {answer.headers['x-sp-proxy']}\n")
            for name in ("", "page.css", "page.js"):  # files of the package
                with urllib.request.urlopen(f"http://{serving['admin']}/{name}", timeout=30) as answer:
                    sys.stdout.write(f"{answer.status} /{name} {len(answer.read())} bytes\n")
        finally:
            process.terminate()
            process.communicate(timeout=30)
    assert process.returncode == 0, f"ended with {process.returncode}"


def main() -> None:
    """Run the whole check; an exception is a failure."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = install(folder)
        sys.stdout.write(run(command, "--version", cwd=folder))
        sys.stdout.write(f"{run(command, 'operations', cwd=folder).count(chr(10))} operations\n")
        one_request(command, folder)


if __name__ == "__main__":
    main()
