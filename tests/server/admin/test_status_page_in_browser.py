"""The status page in a real browser: light and dark, wide and narrow, with and without its script."""

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, Page, async_playwright

from proxy.server.runtime import RunningProxy
from tests.conftest import StartProxy, needs, settings_for
from tests.support.fake_upstream import FakeUpstream, TokenHost, http_response
from tests.support.proxy_process import serving
from tests.support.raw_client import call

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or ""
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
TIMEOUT = 30_000.0  # milliseconds

ORDERS = "/orders/v0/orders"
REFUSAL = http_response("400 Bad Request", b'{"error": "invalid_grant"}', content_type="application/json")

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    needs(bool(CHROMIUM), "chromium")
    async with async_playwright() as playwright:
        started = await playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield started
        await started.close()


@dataclass
class Tab:
    """An open page, the addresses that it requested, and the messages of its console."""

    page: Page
    requested: list[str] = field(default_factory=list)
    console: list[str] = field(default_factory=list)

    async def violations(self) -> list[str]:
        found: list[str] = await self.page.evaluate("window.violations")
        return found


@asynccontextmanager
async def open_tab(
    browser: Browser,
    url: str,
    *,
    scheme: Literal["light", "dark"] = "light",
    width: int = 1280,
    with_script: bool = True,
) -> AsyncIterator[Tab]:
    context = await browser.new_context(
        color_scheme=scheme, viewport={"width": width, "height": 900}, java_script_enabled=with_script
    )
    context.set_default_timeout(TIMEOUT)
    page = await context.new_page()
    await page.add_init_script(
        "window.violations = []; addEventListener('securitypolicyviolation', (event) => "
        "violations.push(`${event.violatedDirective} ${event.blockedURI}`));"
    )
    tab = Tab(page)
    page.on("request", lambda request: tab.requested.append(request.url))
    page.on("console", lambda message: tab.console.append(message.text))
    page.on("pageerror", lambda error: tab.console.append(str(error)))
    await page.goto(url)
    try:
        yield tab
    finally:
        await context.close()


async def until(page: Page, condition: str) -> None:
    """Wait until a condition holds in the page; the test's own timeout is the bound."""
    poll = f"const poll = () => ({condition}) ? done(true) : setTimeout(poll, 50); poll();"
    await page.evaluate(f"new Promise((done) => {{ {poll} }})")


def url_of(proxy: RunningProxy) -> str:
    return f"http://{proxy.admin}/"


async def with_traffic(start_proxy: StartProxy, token_host: TokenHost, count: int) -> RunningProxy:
    """Start a proxy with `count` accounts, some of them with problems, and send a request for each."""
    accounts: dict[str, Any] = {f"seller-{number:04}": {"refresh_tokens": {"eu": "Atzr|x"}} for number in range(count)}
    proxy = await start_proxy(accounts=accounts, limits={"max_wait": "0"})
    for number, name in enumerate(accounts):
        if number % 40 == 7:
            token_host.responses = [REFUSAL]
        await call(proxy.addresses[0], "GET", ORDERS, x_sp_account=name)
    for _ in range(21):
        await call(proxy.addresses[0], "GET", ORDERS, x_sp_account="seller-0000")
    await call(proxy.addresses[0], "GET", ORDERS, x_sp_account="nobody")
    return proxy


@pytest.mark.parametrize("count", [1, 200])
async def test_the_page_is_accessible_on_any_screen(
    count: int, browser: Browser, start_proxy: StartProxy, token_host: TokenHost
) -> None:
    proxy = await with_traffic(start_proxy, token_host, count)
    schemes: tuple[Literal["light", "dark"], ...] = ("light", "dark")
    grounds = set()
    for scheme, width in [(scheme, width) for scheme in schemes for width in (1280, 390)]:
        async with open_tab(browser, url_of(proxy), scheme=scheme, width=width) as tab:
            for details in await tab.page.query_selector_all("details > summary"):
                await details.click()
            found = await Axe().run(tab.page)
            assert found.violations_count == 0, found.generate_report()
            assert await tab.page.evaluate("document.documentElement.scrollWidth") == width
            grounds.add((scheme, await tab.page.evaluate("getComputedStyle(document.body).backgroundColor")))
            diagnosis = await tab.page.inner_text("#diagnosis")
            assert "Cause: your side." in diagnosis
            assert "What to do: " in diagnosis
            assert ("seller-0007 in eu" in diagnosis) == (count > 1)
            assert tab.console == []
    assert grounds == {("light", "rgb(255, 255, 255)"), ("dark", "rgb(20, 23, 27)")}


async def test_axe_finds_a_violation_that_is_there(browser: Browser, proxy: RunningProxy) -> None:
    async with open_tab(browser, url_of(proxy)) as tab:
        await tab.page.evaluate("document.querySelector('#diagnosis').innerHTML += '<img src=\"/favicon.ico\">'")
        assert (await Axe().run(tab.page)).violations_count > 0


async def test_without_its_script_the_page_is_complete(
    browser: Browser, start_proxy: StartProxy, token_host: TokenHost
) -> None:
    proxy = await with_traffic(start_proxy, token_host, 1)
    async with open_tab(browser, url_of(proxy), with_script=False) as tab:
        text = await tab.page.inner_text("main")
        for part in ("What to do: ", "seller-0000", "GET orders.v0.getOrders", "UsagePlanExhausted", "in force since"):
            assert part in text
        assert await tab.page.locator("svg path").count() >= 3
        assert await tab.page.get_attribute("meta[http-equiv=refresh]", "content") == "10"


async def test_the_page_updates_itself_and_leaves_a_selection_alone(browser: Browser, proxy: RunningProxy) -> None:
    async with open_tab(browser, url_of(proxy)) as tab:
        page = tab.page
        assert "None yet." in await page.inner_text("#requests")
        for _ in range(9):
            await call(proxy.addresses[0], "GET", ORDERS)
        rows = "document.querySelectorAll('#request-rows tbody tr').length"
        await until(page, f"{rows} === 9")
        line = "document.querySelector('#charts path.first').getAttribute('d')"
        drawn = await page.evaluate(line)
        await until(page, f"{line} !== '{drawn}' && {line} !== ''")
        assert "maximum" in (await page.get_attribute("#charts svg", "aria-label") or "")
        await page.click("#as-table summary")
        await page.focus("#request-rows")
        await call(proxy.addresses[0], "GET", ORDERS)
        await until(page, f"{rows} === 10")
        assert await page.evaluate("document.querySelector('#as-table').open")
        assert await page.evaluate("document.activeElement.id") == "request-rows"
        await page.evaluate("getSelection().selectAllChildren(document.querySelector('#request-rows tbody'))")
        await call(proxy.addresses[0], "GET", "/brand/new")
        await until(page, "document.querySelector('#diagnosis').textContent.includes('11 recent requests')")
        assert await page.locator("#request-rows tbody tr").count() == 10
        assert "orders.v0.getOrders" in await page.evaluate("getSelection().toString()")


async def test_the_page_keeps_its_policy_and_requests_nothing_elsewhere(browser: Browser, proxy: RunningProxy) -> None:
    async with open_tab(browser, url_of(proxy)) as tab:
        async with tab.page.expect_response(url_of(proxy), timeout=TIMEOUT):
            pass  # its script has fetched the page once
        assert await tab.violations() == []
        assert tab.console == []
        assert set(tab.requested) <= {url_of(proxy) + name for name in ("", "page.css", "page.js", "favicon.ico")}
        assert {url_of(proxy), url_of(proxy) + "page.css", url_of(proxy) + "page.js"} <= set(tab.requested)
        # What it forbids: shows that violations are noticed, and the empty list above means something.
        await tab.page.evaluate("document.body.insertAdjacentHTML('beforeend', '<p style=\"color: red\">')")
        await tab.page.evaluate("fetch('http://127.0.0.1:1/').catch(() => 0)")
        await tab.page.evaluate("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:1/'}))")
        await until(tab.page, "window.violations.length >= 3")
        assert {text.split(" ")[0] for text in await tab.violations()} == {"style-src-attr", "connect-src", "img-src"}


async def test_the_page_says_that_the_proxy_does_not_respond(
    browser: Browser, fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path
) -> None:
    async with (
        serving(settings_for(fake_upstream, token_host), tmp_path) as proxy,
        open_tab(browser, f"http://{proxy.admin}/") as tab,
    ):
        assert not await tab.page.is_visible("#unreachable")
        await proxy.stop()
        await tab.page.wait_for_selector("#unreachable", state="visible")
        found = await Axe().run(tab.page)
        assert found.violations_count == 0, found.generate_report()
        assert "sp-api-proxy" in await tab.page.inner_text("header")


async def test_one_account_can_be_shown_alone(browser: Browser, start_proxy: StartProxy, token_host: TokenHost) -> None:
    proxy = await with_traffic(start_proxy, token_host, 50)
    async with open_tab(browser, url_of(proxy)) as tab:
        await tab.page.click("#failing a:text-is('seller-0047')")
        await tab.page.wait_for_url("**/?account=seller-0047")
        assert await tab.page.locator("#tokens tbody tr").count() == 1
        assert await tab.page.locator("#request-rows tbody tr").count() == 1
        await tab.page.click("text=Show all")
        await tab.page.wait_for_selector("#failing")
