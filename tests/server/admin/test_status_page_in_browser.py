"""The status page in a real browser: by day and by night, on a desk and on a phone, with its script and without."""

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
PATIENCE = 30_000.0  # milliseconds

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
class Opened:
    """A page that is open, and what it did: addresses that it asked for, what its console and its policy said."""

    page: Page
    asked: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    async def violations(self) -> list[str]:
        found: list[str] = await self.page.evaluate("window.violations")
        return found


@asynccontextmanager
async def opened(
    browser: Browser,
    url: str,
    *,
    scheme: Literal["light", "dark"] = "light",
    width: int = 1280,
    with_script: bool = True,
) -> AsyncIterator[Opened]:
    context = await browser.new_context(
        color_scheme=scheme, viewport={"width": width, "height": 900}, java_script_enabled=with_script
    )
    context.set_default_timeout(PATIENCE)
    page = await context.new_page()
    await page.add_init_script(
        "window.violations = []; addEventListener('securitypolicyviolation', (event) => "
        "violations.push(`${event.violatedDirective} ${event.blockedURI}`));"
    )
    one = Opened(page)
    page.on("request", lambda request: one.asked.append(request.url))
    page.on("console", lambda message: one.said.append(message.text))
    page.on("pageerror", lambda error: one.said.append(str(error)))
    await page.goto(url)
    try:
        yield one
    finally:
        await context.close()


async def until(page: Page, condition: str) -> None:
    """Wait until a condition holds in the page; the test's own timeout is the bound."""
    look = f"const look = () => ({condition}) ? done(true) : setTimeout(look, 50); look();"
    await page.evaluate(f"new Promise((done) => {{ {look} }})")


def url_of(proxy: RunningProxy) -> str:
    return f"http://{proxy.admin}/"


async def with_traffic(start_proxy: StartProxy, token_host: TokenHost, count: int) -> RunningProxy:
    """Start a proxy with so many accounts, some of which have trouble, and send something for each."""
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
async def test_everybody_can_read_it_on_any_screen(
    count: int, browser: Browser, start_proxy: StartProxy, token_host: TokenHost
) -> None:
    proxy = await with_traffic(start_proxy, token_host, count)
    schemes: tuple[Literal["light", "dark"], ...] = ("light", "dark")
    grounds = set()
    for scheme, width in [(scheme, width) for scheme in schemes for width in (1280, 390)]:
        async with opened(browser, url_of(proxy), scheme=scheme, width=width) as one:
            for details in await one.page.query_selector_all("details > summary"):
                await details.click()
            found = await Axe().run(one.page)
            assert found.violations_count == 0, found.generate_report()
            assert await one.page.evaluate("document.documentElement.scrollWidth") == width
            grounds.add((scheme, await one.page.evaluate("getComputedStyle(document.body).backgroundColor")))
            diagnosis = await one.page.inner_text("#verdict")
            assert "The cause is yours." in diagnosis
            assert "What to do: " in diagnosis
            assert ("seller-0007 in eu" in diagnosis) == (count > 1)
            assert one.said == []
    assert grounds == {("light", "rgb(255, 255, 255)"), ("dark", "rgb(20, 23, 27)")}


async def test_axe_would_find_something(browser: Browser, proxy: RunningProxy) -> None:
    async with opened(browser, url_of(proxy)) as one:
        await one.page.evaluate("document.querySelector('#verdict').innerHTML += '<img src=\"/favicon.ico\">'")
        assert (await Axe().run(one.page)).violations_count > 0


async def test_without_its_script_it_is_whole(browser: Browser, start_proxy: StartProxy, token_host: TokenHost) -> None:
    proxy = await with_traffic(start_proxy, token_host, 1)
    async with opened(browser, url_of(proxy), with_script=False) as one:
        text = await one.page.inner_text("main")
        for part in ("What to do: ", "seller-0000", "GET orders.v0.getOrders", "UsagePlanExhausted", "in force since"):
            assert part in text
        assert await one.page.locator("svg path").count() >= 3
        assert await one.page.get_attribute("meta[http-equiv=refresh]", "content") == "10"


async def test_it_stays_up_to_date_and_leaves_alone_what_somebody_reads(browser: Browser, proxy: RunningProxy) -> None:
    async with opened(browser, url_of(proxy)) as one:
        page = one.page
        assert "None yet." in await page.inner_text("#requests")
        for _ in range(9):
            await call(proxy.addresses[0], "GET", ORDERS)
        rows = "document.querySelectorAll('#request-rows tbody tr').length"
        await until(page, f"{rows} === 9")
        line = "document.querySelector('#lately path.first').getAttribute('d')"
        drawn = await page.evaluate(line)
        await until(page, f"{line} !== '{drawn}' && {line} !== ''")
        assert "at most" in (await page.get_attribute("#lately svg", "aria-label") or "")
        await page.click("#as-table summary")
        await page.focus("#request-rows")
        await call(proxy.addresses[0], "GET", ORDERS)
        await until(page, f"{rows} === 10")
        assert await page.evaluate("document.querySelector('#as-table').open")
        assert await page.evaluate("document.activeElement.id") == "request-rows"
        await page.evaluate("getSelection().selectAllChildren(document.querySelector('#request-rows tbody'))")
        await call(proxy.addresses[0], "GET", "/brand/new")
        await until(page, "document.querySelector('#verdict').textContent.includes('11 requests')")
        assert await page.locator("#request-rows tbody tr").count() == 10
        assert "orders.v0.getOrders" in await page.evaluate("getSelection().toString()")


async def test_its_policy_is_kept_and_nothing_is_asked_of_anybody_else(browser: Browser, proxy: RunningProxy) -> None:
    async with opened(browser, url_of(proxy)) as one:
        async with one.page.expect_response(url_of(proxy), timeout=PATIENCE):
            pass  # its script looked once
        assert await one.violations() == []
        assert one.said == []
        assert set(one.asked) <= {url_of(proxy) + name for name in ("", "page.css", "page.js", "favicon.ico")}
        assert {url_of(proxy), url_of(proxy) + "page.css", url_of(proxy) + "page.js"} <= set(one.asked)
        # What it forbids: without this, the list above could be empty because nobody looks.
        await one.page.evaluate("document.body.insertAdjacentHTML('beforeend', '<p style=\"color: red\">')")
        await one.page.evaluate("fetch('http://127.0.0.1:1/').catch(() => 0)")
        await one.page.evaluate("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:1/'}))")
        await until(one.page, "window.violations.length >= 3")
        assert {text.split(" ")[0] for text in await one.violations()} == {"style-src-attr", "connect-src", "img-src"}


async def test_a_proxy_that_is_gone_is_said_to_be(
    browser: Browser, fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path
) -> None:
    async with (
        serving(settings_for(fake_upstream, token_host), tmp_path) as proxy,
        opened(browser, f"http://{proxy.admin}/") as one,
    ):
        assert not await one.page.is_visible("#lost")
        await proxy.stop()
        await one.page.wait_for_selector("#lost", state="visible")
        found = await Axe().run(one.page)
        assert found.violations_count == 0, found.generate_report()
        assert "sp-api-proxy" in await one.page.inner_text("header")


async def test_one_account_is_shown_alone(browser: Browser, start_proxy: StartProxy, token_host: TokenHost) -> None:
    proxy = await with_traffic(start_proxy, token_host, 50)
    async with opened(browser, url_of(proxy)) as one:
        await one.page.click("#needy a:text-is('seller-0047')")
        await one.page.wait_for_url("**/?account=seller-0047")
        assert await one.page.locator("#tokens tbody tr").count() == 1
        assert await one.page.locator("#request-rows tbody tr").count() == 1
        await one.page.click("text=Show all")
        await one.page.wait_for_selector("#needy")
