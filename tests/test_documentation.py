"""The pages of docs/ say what is so: every block of every page is run, and the site that is made of them is whole.

`python -m tests.test_documentation` writes anew what the pages take from the code.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from docs.navigation import ROOT
from proxy.amazon.reports import RESTRICTED_TYPES
from proxy.errors import ProxyError, all_errors
from proxy.request.forbidden import HINTS
from tests import test_docs
from tests.conftest import needs
from tests.pages import run_page

FOLDER = ROOT / "docs"
PAGES = sorted(FOLDER.glob("*.md"))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_reader_who_does_what_a_page_says_sees_what_it_says(page: Path, tmp_path: Path) -> None:
    for program in ("bash", "curl", "openssl", "node", "redis-server", "kubectl"):
        needs(shutil.which(program) is not None, program)
    run_page(page.read_text(encoding="utf-8"), tmp_path)


# What the pages take from the code.


def with_errors(text: str) -> str:
    advice = {row[0]: row[-1] for row in test_docs.cells(test_docs.section("errors"))}
    return with_openings(text, {error.code: about(error, advice[f"`{error.code}`"]) for error in all_errors()})


def about(error: type[ProxyError], advice: str) -> str:
    again = "yes" if error.retryable else "no"
    meaning = (error.__doc__ or "").splitlines()[0]
    return f"*{error.status}, fault: {error.fault}, try again: {again}.* {meaning} **What to do:** {advice}"


def with_hints(text: str) -> str:
    return with_openings(text, {f"`{hint}`": meaning for hint, meaning in HINTS.items()})


def with_openings(text: str, paragraphs: dict[str, str]) -> str:
    """Return a page in which the first paragraph below each of these headings is as given; new ones stand at the end."""
    for heading, paragraph in paragraphs.items():
        opening = f"\n### {heading}\n\n"
        if opening not in text:
            text = f"{text.rstrip()}\n{opening}\n"
        before, _, after = text.partition(opening)
        text = f"{before}{opening}{paragraph}\n{after[after.index(chr(10)) + 1 :]}"
    return text


def with_report_types(text: str) -> str:
    before, _, rest = text.partition("<!-- report types -->\n")
    after = rest.partition("<!-- /report types -->")[2]
    types = "".join(f"- `{name}`\n" for name in sorted(RESTRICTED_TYPES))
    return f"{before}<!-- report types -->\n{types}<!-- /report types -->{after}"


MADE: dict[str, Callable[[str], str]] = {
    "errors.md": with_errors,
    "forbidden.md": with_hints,
    "personal-data.md": with_report_types,
}


@pytest.mark.parametrize("name", MADE)
def test_what_a_page_takes_from_the_code_is_as_the_code_says(name: str) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert MADE[name](text) == text, "run `python -m tests.test_documentation`"


def headings(name: str) -> set[str]:
    return set(re.findall(r"^### (.+)$", (FOLDER / name).read_text(encoding="utf-8"), re.MULTILINE))


def test_the_pages_of_errors_and_hints_have_none_that_is_gone() -> None:
    assert headings("errors.md") == {error.code for error in all_errors()}
    assert headings("forbidden.md") == {f"`{hint}`" for hint in HINTS}


def write() -> None:
    for name, made in MADE.items():
        path = FOLDER / name
        path.write_text(made(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write()
