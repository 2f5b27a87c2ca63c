"""The pages of docs/ say what is so: every block of every page is run, and the site that is made of them is whole.

`python -m docs.generate` writes what the pages take from the code.
"""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from docs import generate
from docs.navigation import ROOT, START, first_page, llms_txt, sections
from proxy.errors import all_errors
from proxy.request.forbidden_hints import HINTS
from tests.conftest import needs
from tests.project import test_docs
from tests.support import pages
from tests.support.pages import Block, blocks, proxy_commands, run_page, same
from tests.support.site import build

FOLDER = ROOT / "docs"
PAGES = sorted([*FOLDER.glob("*.md"), *FOLDER.glob("reference/*.md")])
PROGRAMS = ("bash", "curl", "openssl", "node", "redis-server", "kubectl", "promtool")
# How many blocks of each page are looked at and not run; the page says why, above each.
NOT_RUN = {
    "access-control": 1,
    "authorize": 2,
    "check-live": 1,
    "container": 3,
    "first-call": 2,
    "moving": 4,
    "operating": 1,
    "reference/cli": 1,
    "replicas": 1,
    "sidecar": 1,
    "threat-model": 1,
}


def name_of(page: Path) -> str:
    """Return a page's name: its path below docs/, without the suffix."""
    return page.relative_to(FOLDER).with_suffix("").as_posix()


# The pages, word by word.


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_reader_who_does_what_a_page_says_sees_what_it_says(page: Path, tmp_path: Path) -> None:
    for program in PROGRAMS:
        needs(shutil.which(program) is not None, program)
    assert run_page(page.read_text(encoding="utf-8"), tmp_path) == NOT_RUN.get(name_of(page), 0)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_of_a_page_is_understood(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "selling-partner-api-models" / "models").mkdir(parents=True)  # a reader has made this checkout
    for words in proxy_commands(page.read_text(encoding="utf-8")):
        parser, arguments = test_docs.parser_for(words)
        if len(words) > 1:
            parser.parse_args(arguments)
            continue
        with pytest.raises(SystemExit, match=r"^0$"):  # the name of a command alone
            parser.parse_args([*arguments, "--help"])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_names_only_files_settings_headers_and_series_that_there_are(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    series, headers = test_docs.part("metrics.md", "metrics"), test_docs.text_of("docs/reference/headers.md")
    files = re.findall(r"`((?:proxy|tests|config|docs|\.ci)/[\w./-]+)`", text)
    assert not [name for name in files if not (ROOT / name).exists()]
    assert not [name for name in re.findall(r"\b(spapi_proxy_\w+)\b(?=`)", text) if f"`{name}`" not in series]
    assert not [name for name in re.findall(r"`(x-sp-[a-z-]+)[`:]", text) if f"`{name}" not in headers]
    keys = {key.replace("[N]", "").replace(".NAME", "").replace(".REGION", "") for key, _, _ in generate.settings()}
    groups = {key.partition(".")[0] for key in keys if "." in key}
    named = re.findall(rf"`((?:{'|'.join(sorted(groups))})\.[a-z_]+)`", text)
    assert not [key for key in named if key not in keys]


@pytest.mark.timeout(600)
def test_the_quick_start_of_the_readme_works_as_written(tmp_path: Path) -> None:
    section = test_docs.text_of("README.md").partition("\n## Quick start\n")[2].partition("\n## ")[0]
    as_installed = section.replace("```sh\nmake run\n", "```sh server\nsp-api-proxy serve --demo\n")
    assert as_installed != section
    assert [block.language for block in blocks(section)] == ["sh", "sh", "output", "python", "output"]
    assert run_page(as_installed, tmp_path) == 0


@pytest.mark.timeout(600)
def test_authorization_at_the_simulator_works_by_the_command_without_a_configuration(tmp_path: Path) -> None:
    page = test_docs.text_of("docs/authorize.md")
    command = next(blocks(page.partition("\n## Without a configuration file\n")[2])).text
    assert "https://app.example/redirect?" in page
    consent = next(block for block in blocks(page) if "# consent.py" in block.text)
    played = command.replace("sp-api-proxy authorize", "python consent.py")
    assert played != command
    fence = "```"
    run_page(
        f"{fence}sh server\nsp-api-proxy simulate --port 9700\n{fence}\n"
        f"{fence}python\n{consent.text}{fence}\n{fence}sh\n{played}{fence}\n"
        f"{fence}sh\ngrep -c '^Atzr|' acme_eu\n{fence}\n\n{fence}output\n1\n{fence}\n",
        tmp_path,
    )


@pytest.mark.parametrize(("name", "most"), [("README.md", 250), ("CONTRIBUTING.md", 150)])
def test_a_first_page_is_short(name: str, most: int) -> None:
    assert len(test_docs.text_of(name).splitlines()) <= most


@pytest.mark.timeout(600)
def test_a_page_that_nobody_can_follow_fails(tmp_path: Path) -> None:
    fence = "```"
    for number, (text, complaint) in enumerate(
        (
            (f"{fence}sh\necho one\n{fence}\n\n{fence}output\ntwo\n{fence}\n", "line 5: prints something else"),
            (f"{fence}sh\nfalse\n{fence}\n", "line 1: ended with 1 instead of 0"),
            (f"{fence}sh exit=2\ntrue\n{fence}\n", "line 1: ended with 0 instead of 2"),
            (f"{fence}sh\nfalse | true\n{fence}\n", "line 1: ended with 1"),
            (f"{fence}python\n1 / 0\n{fence}\n", "ZeroDivisionError"),
            (f"{fence}sh server\nsp-api-proxy serve --config no.yaml\n{fence}\n", "line 1: does not serve"),
            (f"{fence}yaml\nlimits: {{max_weight: 1s}}\n{fence}\n", "limits.max_weight"),
            (f"{fence}yaml\n# pod.yaml\nkind: Pod\napiVersion: v1\nspec: {{}}\n{fence}\n", "containers"),
            (f"{fence}promql\nsum(\n{fence}\n", "unclosed left parenthesis"),
            (f"{fence}\necho\n{fence}\n", "nothing runs a block of no language"),
            (f"{fence}ruby\nputs 1\n{fence}\n", "nothing runs a block of ruby"),
            (f"{fence}output\none\n{fence}\n", "no block before it prints anything"),
            (
                f"<!-- not run: why -->\n{fence}sh\nkubectl apply -k config/nothing\n{fence}\n",
                "there is no config/nothing",
            ),
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(Exception, match=complaint):
            run_page(text, folder)


def test_what_a_server_says_at_its_start_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "PATIENCE", 5.0)
    server = "```sh server\nbash -c 'echo serving; echo one; exec sleep 60'\n```\n\n```output\n…\n{}\n```\n"
    with pytest.raises(AssertionError, match="line 5: prints something else"):
        run_page(server.format("two"), tmp_path)


def not_in_its_program(block: Block) -> list[str]:
    """Return the lines of a block that the program of tests/integration/libraries/ that is said to run it has not.

    The line with the address is the reader's to change; an import may bring less than the program's does.
    """
    named = re.search(r"tests/integration/libraries/\S+", block.not_run or "")
    assert named is not None
    program = (ROOT / named[0]).read_text(encoding="utf-8")
    has = {line.strip() for line in program.splitlines()}
    imported = {words[-1] for line in has if (words := _IMPORTED.findall(line))}
    lines = [re.sub(r" +// .*", "", line.strip()) for line in block.text.splitlines()]
    return [
        line
        for line in lines
        if line
        and line not in has
        and "127.0.0.1:8080" not in line
        and not ((words := _IMPORTED.findall(line)) and words[-1] in imported)
    ]


# Of an import, where from: in Python, and in JavaScript.
_IMPORTED = re.compile(r"^(?:from|import) ([\w.]+) ?(?:import|$)|^import .+ from (\".+\");$")


def test_what_a_page_shows_of_a_library_is_what_its_program_does() -> None:
    shown = list(blocks((FOLDER / "moving.md").read_text(encoding="utf-8")))
    assert len(shown) == NOT_RUN["moving"]
    assert [not_in_its_program(block) for block in shown] == [[]] * len(shown)
    changed = [replace(block, text=block.text.replace("new ", "").replace("Client", "Customer")) for block in shown]
    assert all(not_in_its_program(block) for block in changed)


def test_only_the_block_below_its_comment_is_not_run() -> None:
    text = "<!-- not run: a reason -->\n```sh\none\n```\n\n```sh exit=1\ntwo\n```\n"
    assert [(block.line, block.options, block.not_run) for block in blocks(text)] == [
        (2, (), "a reason"),
        (6, ("exit=1",), None),
    ]


@pytest.mark.parametrize(
    ("expected", "printed", "fits"),
    [
        ("one\ntwo", "one\ntwo\n", True),
        ("one\r\n", "one  \r\n\n", True),
        ("one", "one\ntwo", False),
        ("o…e", "one", True),
        ("o…e", "o\ne", False),
        ("…", "", True),
        ("one\n…\nthree", "one\nthree", True),
        ("one\n…\nthree", "one\n2\n2\nthree", True),
        ("one\n…", "two", False),
        ("a.c", "abc", False),
    ],
)
def test_dots_stand_for_anything_and_nothing_else_does(expected: str, printed: str, fits: bool) -> None:
    assert same(expected, printed) is fits


# The site.


def test_make_docs_builds_what_is_tested_here() -> None:
    wanted = "-m sphinx --fail-on-warning --keep-going --quiet --builder html --conf-dir docs . build/docs"
    assert wanted in test_docs.text_of("Makefile")


@pytest.mark.timeout(600)
def test_the_site_has_every_page_and_needs_no_other_host(site: Path) -> None:
    for page in PAGES:
        assert (site / "docs" / f"{name_of(page)}.html").is_file()
    assert f"url={START}.html" in (site / "index.html").read_text(encoding="utf-8")
    loaded = re.compile(
        r"""<(?:script|img|link|iframe)\b[^>]*(?:src|href)=["'](?:https?:)?//|url\(["']?(?:https?:)?//|@import"""
    )
    texts = [path for path in site.rglob("*") if path.suffix in {".html", ".css"}]
    assert len(texts) > len(PAGES)
    assert not [path for path in texts if loaded.search(path.read_text(encoding="utf-8"))]


@pytest.mark.timeout(600)
def test_a_link_that_leads_nowhere_or_a_page_that_no_list_names_fails(tmp_path: Path) -> None:
    root = tmp_path / "checkout"
    left_out = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "corpora")
    shutil.copytree(ROOT, root, ignore=left_out)
    wrong = "[a](gone.md) [b](limits.md#no-such-heading) [c](../config/gone.yaml)"
    (root / "docs" / "lost.md").write_text(f"# Lost\n\n{wrong}\n", encoding="utf-8")
    done = build(tmp_path / "site", root)
    assert done.returncode != 0
    complaints = done.stderr.splitlines()
    assert [line.partition("docs/")[2].partition(":")[0] for line in complaints] == ["lost.md"] * 4, complaints
    for what in ("isn't included in any toctree", "gone.md", "no-such-heading", "config/gone.yaml"):
        assert [line for line in complaints if what in line], what


@pytest.mark.timeout(600)
def test_llms_txt_has_every_page_with_what_it_is_for(site: Path) -> None:
    text = (site / "llms.txt").read_text(encoding="utf-8")
    title, _, summary, *_ = text.splitlines()
    assert title == "# sp-api-proxy"
    assert summary.startswith("> A local reverse proxy for Amazon's Selling Partner API.")
    entries = re.findall(r"^- \[(.+)\]\((.+)\): (.+)$", text, re.MULTILINE)
    assert {link for _, link, _ in entries} >= {f"docs/{name_of(page)}.md" for page in PAGES if page.stem != "index"}
    for name, link, description in entries:
        original = (ROOT / link).read_text(encoding="utf-8")
        assert (site / link).read_text(encoding="utf-8") == original
        assert name
        assert 20 < len(description) < 160, link
    full = (site / "llms-full.txt").read_text(encoding="utf-8")
    assert not [link for _, link, _ in entries if (ROOT / link).read_text(encoding="utf-8").strip() not in full]


def test_what_the_first_page_says_of_a_page_is_in_llms_txt() -> None:
    listed = [page for _, pages in sections(first_page()) for page in pages]
    assert len({page.path for page in listed}) == len(listed) >= len(PAGES) - 1
    assert all(f"- [{page.title}]({page.path}): {page.description}\n" in llms_txt(first_page()) for page in listed)


# What the pages take from the code.


@pytest.mark.parametrize("name", generate.PAGES)
def test_what_a_page_takes_from_the_code_is_as_the_code_says(name: str) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert generate.PAGES[name](text) == text, "run `python -m docs.generate`"


def headings(name: str) -> set[str]:
    return set(re.findall(r"^### (.+)$", (FOLDER / name).read_text(encoding="utf-8"), re.MULTILINE))


def test_the_pages_of_errors_and_hints_have_none_that_is_gone() -> None:
    assert headings("errors.md") == {error.code for error in all_errors()}
    assert headings("forbidden.md") == {f"`{hint}`" for hint in HINTS}
