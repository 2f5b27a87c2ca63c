"""Build the Dockerfile and run its image: not root, nothing writable, as process 1.

Works without a container engine and without access to a registry: buildah executes the Dockerfile on a substitute for
Python's image, a bare Debian with the same Python. As root, on Debian, with buildah and mmdebstrap.
"""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 600
START = 30.0
UNPRIVILEGED_ID = "65532"
# An empty environment, a read-only private tree, no capabilities, process 1.
CONTAINER = """
mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && mount -t proc proc "$0/proc"
exec chroot "$0" setpriv --reuid 65532 --regid 65532 --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all \
    env -i "$@"
"""


def run(*command: str | Path) -> str:
    """Run a command to its end and return what it printed."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT).stdout.strip()


class Builder:
    """Buildah with its storage in one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        kept = ("--root", folder / "images", "--runroot", folder / "run", "--storage-driver", "overlay")
        self._buildah: tuple[str | Path, ...] = ("buildah", *kept)
        os.environ["BUILDAH_ISOLATION"] = "chroot"

    def __call__(self, *arguments: str | Path) -> str:
        return run(*self._buildah, *arguments)

    def substitute(self, name: str) -> None:
        """Create an image like Python's slim one: Debian's essential packages, Python in /usr/local, no compiler."""
        tree = self._folder / "debian"
        packages = "--include=python3,python3-venv,ca-certificates"
        lean = "--dpkgopt=path-exclude=/usr/share/{doc,locale,man}/*"
        run(
            "mmdebstrap",
            "--quiet",
            "--variant=essential",
            packages,
            lean,
            "trixie",
            tree,
            "http://deb.debian.org/debian",
        )
        run("chroot", tree, "python3", "-m", "venv", "/usr/local")
        working = self("from", "scratch")
        self("add", "--quiet", working, tree, "/")
        self("config", "--env", "PATH=/usr/local/bin:/usr/bin:/bin", working)
        self("commit", "--quiet", working, name)

    def build(self, base: str, image: str) -> Path:
        """Build the project's image on `base`, and return the path of its mounted tree."""
        text, count = re.subn(
            r"^FROM python:\S+", f"FROM {base}", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE
        )
        assert count == 1, "Python's image is named once"
        recipe = self._folder / "Dockerfile"
        recipe.write_text(text)
        trusted = "/etc/ssl/certs:/etc/ssl/certs:ro"  # this machine's CA certificates, for access to PyPI
        where = ("--network", "host", "--volume", trusted, "--file", recipe, "--ignorefile", ROOT / ".dockerignore")
        self("build", "--quiet", "--format", "docker", *where, "--tag", image, ROOT)
        return Path(self("mount", self("from", image)))

    def settings(self, image: str) -> dict[str, Any]:
        """Return the configuration of the image's containers."""
        found: dict[str, Any] = json.loads(self("inspect", "--type", "image", image))["Docker"]["config"]
        return found


def check_contents(settings: dict[str, Any], tree: Path) -> None:
    """Check user, command and contents of the image."""
    assert settings["User"] == f"{UNPRIVILEGED_ID}:{UNPRIVILEGED_ID}"
    assert settings["StopSignal"] == "SIGTERM"
    assert settings["Entrypoint"] == ["sp-api-proxy"]
    assert settings["Healthcheck"]["Test"] == ["CMD", "sp-api-proxy", "healthcheck"]
    assert settings["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    ours = tree / "opt/sp-api-proxy"
    installed = next(ours.glob("lib/python3.*/site-packages"))
    assert not [path for path in tree.glob("**/site-packages/pip*") if path.is_dir()], "pip was not removed"
    assert not (tree / "build").exists(), "the sources were not removed"
    modules = list(installed.rglob("*.py"))
    compiled = {path.name.partition(".")[0] for path in installed.rglob("*.pyc")}
    assert {path.stem for path in modules} <= compiled, "something would be compiled at each start"
    writable = [path for path in ours.rglob("*") if not path.is_symlink() and path.stat().st_mode & 0o022]
    assert not writable, f"others may write to {writable[:3]}"
    size = sum(path.lstat().st_size for path in ours.rglob("*")) / 2**20
    sys.stdout.write(f"{len(modules)} modules, {size:.0f} MiB beside Python\n")


def container(tree: Path, settings: dict[str, Any], *command: str, **given: str) -> list[str]:
    """Return the command line that runs `command` in the image as an engine would, except for the network."""
    environment = [*settings["Env"], *(f"{name}={value}" for name, value in given.items())]
    apart = ("unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child")
    return [*apart, "sh", "-ec", CONTAINER, str(tree), *environment, *command]


@contextmanager
def serving(tree: Path, settings: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
    """Run the image's program with the simulator, as compose does."""
    listen = '{address: "0.0.0.0:8080", insecure_network: true}'
    command = container(tree, settings, *settings["Entrypoint"], "serve", "--demo", SP_API_PROXY_LISTEN=listen)
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stderr is not None
            assert any('"message": "serving"' in line for line in process.stderr), "it does not serve"
            yield process
        finally:
            process.kill()


def children(pid: int) -> list[int]:
    """Return the child processes of a process."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def run_image(tree: Path, settings: dict[str, Any]) -> None:
    """Start it, check its privileges and its health, and stop it with a request in flight."""
    run("ip", "link", "set", "lo", "up")
    with serving(tree, settings) as process:
        (proxy,) = children(process.pid)
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{proxy}/status").read_text().splitlines())
        assert status["NSpid"].split()[-1] == "1", "it is not process 1"
        assert set(status["Uid"].split()) == {UNPRIVILEGED_ID}
        assert int(status["CapEff"], 16) == 0
        healthcheck = settings["Healthcheck"]["Test"][1:]
        run(*container(tree, settings, *healthcheck))
        connection = http.client.HTTPConnection("127.0.0.1", 8080, timeout=START)
        connection.request("GET", "/sellers/v1/marketplaceParticipations", headers={"x-sp-region": "eu"})
        response = connection.getresponse()
        assert response.status == 200, response.status
        response.read()
        finish_in_flight(proxy)
        assert process.wait(START) == 0, process.returncode
    sys.stdout.write(f"served, {status['VmRSS'].strip()} at first, ended with 0\n")


def finish_in_flight(proxy: int) -> None:
    """Send half a request, send SIGTERM to the proxy, send the rest: it must still get a response."""
    with socket.create_connection(("127.0.0.1", 8080), START) as half:
        half.sendall(b"POST /notifications/v1/destinations HTTP/1.1\r\nHost: 127.0.0.1\r\nx-sp-region: eu\r\n")
        half.sendall(b"Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{")
        time.sleep(0.5)  # the proxy has read the head
        os.kill(proxy, signal.SIGTERM)
        time.sleep(0.5)  # the proxy has received the signal
        half.sendall(b"}")
        assert half.recv(65536).startswith(b"HTTP/1.1 "), "the request in flight was aborted"


def main() -> None:
    """Run the whole check; an exception is a failure."""
    if len(sys.argv) == 3:
        run_image(Path(sys.argv[1]), json.loads(sys.argv[2]))
        return
    with tempfile.TemporaryDirectory() as folder:
        # In memory, because it is temporary: on a disk it takes three times as long.
        run("mount", "-t", "tmpfs", "-o", "size=4g", "image", folder)
        try:
            check(Path(folder))
        finally:
            run("umount", "--lazy", folder)


def check(folder: Path) -> None:
    """Build the image and run it; all files are in `folder`."""
    builder = Builder(folder)
    builder.substitute("substitute")
    try:
        tree = builder.build("localhost/substitute", "sp-api-proxy")
        settings = builder.settings("sp-api-proxy")
        check_contents(settings, tree)
        # In its own network namespace, so that its ports are free.
        sys.stdout.write(run("unshare", "--net", sys.executable, __file__, tree, json.dumps(settings)) + "\n")
    finally:
        builder("umount", "--all")


if __name__ == "__main__":
    main()
