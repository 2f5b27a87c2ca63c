"""Settings of Sphinx, which makes a site of the Markdown pages: `make docs`. It works offline; a warning is an error.

The sources are read from the root of the repository, so that a link between two files is the same on a code host, in a
checkout and in the site: README.md links to docs/limits.md, docs/limits.md to reference/headers.md.
"""

import re
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.search.en import SearchEnglish
from sphinx.writers.html5 import HTML5Translator

from docs.navigation import ROOT, START, first_page, llms_full_txt, llms_txt, sections, trees
from proxy import __version__

project = "sp-api-proxy"
version = release = __version__
root_doc = START
include_patterns = ["*.md", "docs/*.md", "docs/reference/*.md", "tests/*/README.md"]
extensions = ["myst_parser", "sphinx_copybutton"]
myst_heading_anchors = 3  # a link to a heading that is not there is a warning
nitpicky = True
suppress_warnings = ["misc.highlighting_failure"]  # Pygments does not know the colons in names of recording rules
language = "en"

html_theme = "furo"  # no font, script or picture from another host
html_title = f"sp-api-proxy {version}"
html_copy_source = False
html_show_copyright = False
html_use_index = False
html_static_path = ["static"]
html_css_files = ["site.css"]
html_js_files = [("search.js", {"defer": "defer"})]  # after Sphinx's own script of the search page

_TO_THE_START = f'<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url={START}.html">\n'


class EnglishWithStatuses(SearchEnglish):
    """Words of the search index: Sphinx leaves out all numbers, but readers search for 403 and 429."""

    def word_filter(self, word: str) -> bool:
        """Return whether a word is in the index."""
        return super().word_filter(word) or re.fullmatch(r"[1-5][0-9]{2}", word) is not None


class BreakingTranslator(HTML5Translator):
    """HTML whose tables may break a long name, such as a series or a key, behind its punctuation."""

    def visit_Text(self, node: nodes.Text) -> None:  # noqa: N802 - Sphinx's name
        """Write a text."""
        begin = len(self.body)
        super().visit_Text(node)
        if self.protect_literal_text and _is_in_table(node):
            words = self.body[begin:]
            self.body[begin:] = [
                re.sub(r"(?<=[_./:=,-])(?<!</)(?=\w)", "<wbr>", word) if word.startswith(_WORD) else word
                for word in words
            ]


_WORD = '<span class="pre">'  # how Sphinx begins each word of inline code


def _is_in_table(node: nodes.Node | None) -> bool:
    while node is not None and not isinstance(node, nodes.entry):
        node = node.parent
    return node is not None


def setup(app: Sphinx) -> None:
    """Add what Sphinx does not do of itself."""
    app.add_search_language(EnglishWithStatuses)
    app.set_translator("html", BreakingTranslator)
    app.connect("source-read", add_navigation)
    app.connect("build-finished", finish)


def add_navigation(_: Sphinx, name: str, source: list[str]) -> None:
    """Give the first page, which lists all others for readers, the same list for Sphinx."""
    if name == START:
        source[0] += trees(source[0])


def finish(app: Sphinx, error: Exception | None) -> None:
    """Write a page for the site's root, which leads to the first one, and what programs that read text want."""
    if error is not None or app.builder.name != "html":
        return
    site, text = Path(app.outdir), first_page()
    texts = {"index.html": _TO_THE_START, "llms.txt": llms_txt(text), "llms-full.txt": llms_full_txt(text)}
    for name in (f"{START}.md", *(page.path for _, pages in sections(text) for page in pages)):
        texts[name] = (ROOT / name).read_text(encoding="utf-8")
    for name, content in texts.items():
        (site / name).write_text(content, encoding="utf-8")
