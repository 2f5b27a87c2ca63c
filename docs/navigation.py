"""Which pages are there, in which order, and what is each for? The lists of docs/index.md say it once, for all."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from posixpath import normpath

ROOT = Path(__file__).resolve().parent.parent
START = "docs/index"
_HEADING = re.compile(r"^## (.+)$", re.MULTILINE)
_ENTRY = re.compile(r"^- \[(?P<title>[^\]]+)\]\((?P<link>[^)]+)\): (?P<description>.+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Page:
    """A page as docs/index.md lists it; `path` is its file, from the repository's root."""

    title: str
    path: str
    description: str


def first_page() -> str:
    """Return the text of docs/index.md."""
    return (ROOT / f"{START}.md").read_text(encoding="utf-8")


def sections(text: str) -> Iterator[tuple[str, list[Page]]]:
    """Yield each heading of the first page that has a list below it, with the pages of the list."""
    parts = _HEADING.split(text)[1:]
    for heading, below in zip(parts[::2], parts[1::2], strict=True):
        pages = [
            Page(found["title"], normpath(PurePosixPath("docs", found["link"]).as_posix()), found["description"])
            for found in _ENTRY.finditer(below)
        ]
        if pages:
            yield heading, pages


def trees(text: str) -> str:
    """Return the navigation in MyST's own words, to stand at the end of the first page."""
    return "".join(
        f"\n```{{toctree}}\n:hidden:\n:caption: {heading}\n\n"
        + "".join(f"{page.title} </{page.path}>\n" for page in pages)
        + "```\n"
        for heading, pages in sections(text)
    )


def llms_txt(text: str) -> str:
    """Return the site's llms.txt (https://llmstxt.org): title, summary, and each page with what it is for."""
    title, summary = re.findall(r"\A# (.+)\n\n((?:.+\n)+)", text)[0]
    lists = (
        f"\n## {heading}\n\n" + "".join(f"- [{page.title}]({page.path}): {page.description}\n" for page in pages)
        for heading, pages in sections(text)
    )
    return f"# {title}\n\n> {' '.join(summary.split())}\n{''.join(lists)}"


def llms_full_txt(text: str) -> str:
    """Return all pages, one after the other."""
    files = [f"{START}.md", *(page.path for _, pages in sections(text) for page in pages)]
    return (
        "\n\n".join(f"<!-- {name} -->\n\n{(ROOT / name).read_text(encoding='utf-8').strip()}" for name in files) + "\n"
    )
