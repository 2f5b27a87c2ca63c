"""The source distribution contains every tracked file."""

import subprocess
import sys
import tarfile
from pathlib import Path

from tests.conftest import needs
from tests.support.paths import ROOT


def test_the_sdist_contains_every_tracked_file(tmp_path: Path) -> None:
    needs((ROOT / ".git").exists(), "a checkout")
    kept = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=60)
    (archive,) = tmp_path.iterdir()
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    assert len(kept) > 100
    assert set(kept) - held == set()
