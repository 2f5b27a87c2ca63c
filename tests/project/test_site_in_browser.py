"""The site of the documentation in a real browser: what is wide fits, code can be copied, a search finds its page."""

import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from playwright.async_api import Browser, Page, async_playwright

from tests.conftest import needs
from tests.support.pages import blocks
from tests.support.paths import ROOT
from tests.support.site import served

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or ""
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
PATIENCE = 30_000.0  # milliseconds

# By how many pixels the tables and the code blocks of a page are wider than their column, and how many there are.
MEASURE = """() => {
  const wider = (selector) => [...document.querySelectorAll(selector)]
    .filter((each) => each.scrollWidth > each.clientWidth + 1)
    .map((each) => `${each.scrollWidth - each.clientWidth} px: ${each.innerText.slice(0, 60)}`);
  return {
    page: wider("html"),
    tables: wider("article .table-wrapper"),
    code: wider("article pre"),
    blocks: document.querySelectorAll("article pre").length,
    buttons: document.querySelectorAll("article .highlight button.copybtn").length,
  };
}"""
RESULTS = "[...document.querySelectorAll('ul.search > li > a')].map((link) => new URL(link.href).pathname)"

_LEFT = "net::ERR_ABORTED"  # the page was left while it still loaded

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(name="address")
def address_of_the_site(site: Path) -> Iterator[str]:
    with served(site) as address:
        yield address


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    needs(bool(CHROMIUM), "chromium")
    async with async_playwright() as playwright:
        started = await playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield started
        await started.close()


async def page_of(browser: Browser, complaints: list[str] | None = None) -> Page:
    """Return a new page, which adds errors of scripts and failed requests to `complaints`."""
    context = await browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(PATIENCE)
    page = await context.new_page()
    noted = complaints if complaints is not None else []
    page.on("pageerror", lambda error: noted.append(str(error)))
    page.on("requestfailed", lambda request: noted.extend([] if request.failure == _LEFT else [request.url]))
    return page


def names(site: Path) -> list[str]:
    """Return the pages that are made from Markdown, by their path in the site."""
    found = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    return [name for name in found if (ROOT / name).with_suffix(".md").is_file()]


async def test_what_is_wide_fits(browser: Browser, site: Path, address: str) -> None:
    complaints: list[str] = []
    page = await page_of(browser, complaints)
    wrong: dict[str, Any] = {}
    tables = 0
    for name in names(site):
        await page.goto(f"{address}/{name}")
        tables += await page.locator("article .table-wrapper").count()
        for width in (1280, 1600, 390):
            await page.set_viewport_size({"width": width, "height": 900})
            found = await page.evaluate(MEASURE)
            assert found["buttons"] == found["blocks"], name
            # A table may be scrolled on a phone, and so may a diagram; the page itself never.
            is_desk = width > 1000
            too_wide = found["page"] + (found["tables"] + found["code"]) * is_desk
            if too_wide:
                wrong[f"{name} at {width}"] = too_wide
    assert wrong == {}
    assert complaints == []
    assert tables > 40


async def test_the_button_of_a_block_copies_it_as_it_is_in_the_page(browser: Browser, address: str) -> None:
    page = await page_of(browser)
    await page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    await page.goto(f"{address}/docs/reference/configuration.html")
    text = (ROOT / "docs/reference/configuration.md").read_text(encoding="utf-8")
    for number, block in enumerate(blocks(text)):
        await page.locator("article .highlight button.copybtn").nth(number).click()
        await page.locator("article .highlight button.copybtn.success").nth(number).wait_for()
        assert (await page.evaluate("navigator.clipboard.readText()")).strip() == block.text.strip()


# What is searched for, the page that is to be found, and how near to the top.
SEARCHES = {
    "403": ("docs/forbidden", 1),
    "429": ("docs/limits", 1),
    "NextToken": ("docs/pagination", 1),
    "python-amazon-sp-api": ("docs/moving", 1),
    "UsagePlanExhausted": ("docs/errors", 1),
    "spapi_proxy_errors_total": ("docs/reference/metrics", 3),  # the pages on what to do name it, too
}


async def test_a_search_finds_its_page(browser: Browser, address: str) -> None:
    complaints: list[str] = []
    searching = await page_of(browser, complaints)
    wrong = {}
    for query, (page, best) in SEARCHES.items():
        await searching.goto(f"{address}/search.html?q={quote(query)}")
        await searching.wait_for_function(
            "/found|did not match/.test(document.querySelector('.search-summary')?.innerText)"
        )
        found = await searching.evaluate(RESULTS)
        if f"/{page}.html" not in found[:best]:
            wrong[query] = found[:5]
    assert wrong == {}
    assert complaints == []
