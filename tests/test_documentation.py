"""The pages of docs/ say what is so: every block of every page is run, and the site that is made of them is whole."""

import shutil
from pathlib import Path

import pytest

from docs.navigation import ROOT
from tests.conftest import needs
from tests.pages import PageError, blocks, run_page, same

PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_reader_who_does_what_a_page_says_sees_what_it_says(page: Path, tmp_path: Path) -> None:
    for program in ("bash", "curl", "openssl", "node", "redis-server", "kubectl"):
        needs(shutil.which(program) is not None, program)
    run_page(page.read_text(encoding="utf-8"), tmp_path)
