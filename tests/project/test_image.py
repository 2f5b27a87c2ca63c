"""Contents of the Dockerfile; .ci/check_image.py builds and runs the image."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from proxy.cli import main
from tests.conftest import needs
from tests.support.paths import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PYTHON_BIN = Path(sys.executable).parent


def program(name: str) -> str:
    """Return the path of a program of the dev dependencies; skip the test if it is missing."""
    found = shutil.which(name, path=PYTHON_BIN) or shutil.which(name)
    needs(found is not None, name)
    assert found is not None
    return found


def instructions(name: str) -> list[str]:
    """Return the arguments of every instruction of a name, continued lines joined."""
    joined = DOCKERFILE.replace("\\\n", " ")
    return [match[1].strip() for match in re.finditer(rf"^{name} (.*)$", joined, re.MULTILINE)]


def copied() -> list[str]:
    """Return what is copied from the build context."""
    words = (line.split() for line in instructions("COPY") if not line.startswith("--from"))
    return [name for line in words for name in line[:-1]]


def test_hadolint_reports_nothing() -> None:
    done = subprocess.run(
        [program("hadolint"), ROOT / "Dockerfile"], capture_output=True, check=False, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_pythons_image_is_pinned_by_its_digest_and_named_in_the_label() -> None:
    (base,) = (line.split()[0] for line in instructions("FROM") if line.startswith("python:"))
    name, _, digest = base.partition("@")
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", digest)
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", name)
    assert f'image.base.name="docker.io/library/{name}"' in DOCKERFILE
    others = [line.split()[0] for line in instructions("FROM") if not line.startswith("python:")]
    assert set(others) == {"base"}


def test_every_installed_package_is_pinned_by_a_hash() -> None:
    commands = [part for line in instructions("RUN") for part in line.split("&&") if " install " in part]
    assert len(commands) == 3
    assert all("--require-hashes" in part or "--no-deps --no-index" in part for part in commands)


def test_the_build_backend_is_the_one_that_the_tests_use() -> None:
    pin = re.compile(r"^(\S+==\S+)", re.MULTILINE)
    pins = [set(pin.findall((ROOT / f"requirements-{name}.lock").read_text())) for name in ("build", "dev")]
    assert "hatchling" in {each.partition("==")[0] for each in pins[0]}
    assert pins[0] <= pins[1]


def test_the_build_context_holds_what_is_copied_and_nothing_else() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    let_in = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert let_in == set(copied())
    assert all((ROOT / name).exists() for name in let_in)


def test_the_program_is_started_without_a_shell_and_by_a_number() -> None:
    assert instructions("USER") == ["65532:65532"]
    assert instructions("STOPSIGNAL") == ["SIGTERM"]
    assert [json.loads(line) for line in instructions("ENTRYPOINT")] == [["sp-api-proxy"]]


def test_the_command_of_the_image_is_valid() -> None:
    (start,) = (json.loads(line) for line in instructions("CMD"))
    main._parser().parse_args(start)


def test_the_health_check_of_the_image_is_a_valid_command() -> None:
    (health,) = instructions("HEALTHCHECK")
    program_name, *words = json.loads(health.partition(" CMD ")[2])
    assert program_name == "sp-api-proxy"
    main._parser().parse_args(words)


def test_no_setting_of_the_proxy_is_in_the_image() -> None:
    names = [word.partition("=")[0] for line in instructions("ENV") for word in shlex.split(line)]
    assert "PATH" in names
    assert not [name for name in names if name.startswith(("SP_API", "LWA"))]
