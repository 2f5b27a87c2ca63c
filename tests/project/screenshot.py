"""Screenshot of the status page for the documentation: `python -m tests.project.screenshot` writes it."""

import asyncio
import math
import random

from playwright.async_api import Route, async_playwright

from proxy.observability.request_history import MAX_SAMPLES, SAMPLE_INTERVAL, RequestRecord, Sample
from proxy.request.forbidden_hints import HINTS
from proxy.server.admin import status_page
from proxy.server.admin.diagnosis import diagnose
from proxy.server.admin.snapshot import ErrorRow, PlanRow, Snapshot, TokenRow
from tests.server.admin.test_diagnosis import CONFIGURATION, NOW, seen
from tests.server.admin.test_status_page_in_browser import CHROMIUM, FLAGS
from tests.support.paths import ROOT

PICTURE = ROOT / "docs" / "status.png"
URL = "http://127.0.0.1:9090/"
SIZE = (1180, 1020)  # pixels

SELLERS = ("acme", "blumen-berg", "casa-nova", "dagny", "elm-street", "fjord", "gusto", "hana", "isla", "juniper")
OPERATIONS = (
    *("orders.v0.getOrders", "orders.v0.getOrderItems", "listings.2021-08-01.getListingsItem"),
    *("catalogItems.2022-04-01.getCatalogItem", "fbaInventory.v1.getInventorySummaries"),
)


def tokens() -> list[TokenRow]:
    """Return one account that needs attention, and many that do not."""
    refused = TokenRow(
        *("dagny", "main", "production", "eu", "failed"),
        error="TokenRefused",
        reason="invalid_grant",
        remedy="The refresh token is wrong, revoked or expired: authorise the application again and replace it. "
        "Look at accounts.dagny.refresh_tokens.eu.",
        failures=4,
        retry_in=38.0,
    )
    good = [
        TokenRow(
            name,
            "main",
            "production",
            region,
            "good",
            expires_in=random.uniform(600, 3500),
            age=random.uniform(60, 2000),
        )
        for name in SELLERS
        for region in ("eu", "na")
        if name != "dagny"
    ]
    return [refused, *good]


def requests() -> list[RequestRecord]:
    """Return the last requests, some of which failed."""
    found = []
    for number in range(1, 200):
        ago, upstream = (200 - number) * 0.6, random.lognormvariate(-1.4, 0.5)
        waited = random.choice((0.0, 0.0, 0.0, random.uniform(0.1, 1.5)))
        account, operation = random.choice(SELLERS), random.choice(OPERATIONS)
        status, error = ("502", "TokenRefused") if account == "dagny" else ("200", "")
        if error:
            upstream = waited = 0.0
        labels = (account, "eu", operation, "GET", status, "lwa", "proxy" if error else "amazon")
        took = waited + upstream + 0.001
        spent = None if error else upstream
        found.append(RequestRecord(number, labels, "", NOW - ago - took, took, waited, 0.0, spent, 1, error, ""))
    return found


def samples() -> list[Sample]:
    """Return ten minutes of samples with a busy period, in which Amazon throttled."""
    found = []
    for place in range(MAX_SAMPLES):
        busy = math.exp(-(((place - 130) / 30) ** 2))
        rate = 9 + 14 * busy + random.gauss(0, 1.2)
        median = 0.24 + 0.15 * busy + random.gauss(0, 0.01)
        throttled = max(0.0, random.gauss(3 * busy - 1, 0.5))
        at = NOW - (MAX_SAMPLES - 1 - place) * SAMPLE_INTERVAL
        found.append(Sample(at, SAMPLE_INTERVAL, round(rate * SAMPLE_INTERVAL), throttled, median, median * 2.2))
    return found


def made_up() -> Snapshot:
    """Return a snapshot with made-up data in every section."""
    role: str = HINTS["role"]
    return seen(
        requests(),
        tokens(),
        version="0.1.0",
        accounts=len(SELLERS),
        in_flight=3,
        configuration={**CONFIGURATION, "good_since": "2027-01-15T06:12:09.301+00:00"},
        plans=[
            PlanRow("acme", "eu", "orders.v0.getOrders", 0.0167, 0.2, 2, 0, 41),
            PlanRow("gusto", "na", "listings.2021-08-01.getListingsItem", 5.0, 3.8, 0, 0, 6),
        ],
        errors=[
            ErrorRow(
                "TokenRefused",
                19,
                63,
                "Login with Amazon refuses the credentials of this account; a person has to act.",
            ),
            ErrorRow("role", 0, 2, role),
        ],
        samples=samples(),
        store_is_up=True,
    )


async def picture() -> None:
    """Let a browser render the page, and write the screenshot."""
    given = made_up()
    text = status_page.render(given, diagnose(given), refresh_interval=3600)

    async def respond(route: Route) -> None:
        name = route.request.url.removeprefix(URL)
        if name in status_page.FILES:
            await route.fulfill(body=status_page.read_file(name), content_type=status_page.FILES[name])
        else:
            await route.fulfill(body=text, content_type="text/html; charset=utf-8", headers=status_page.HEADERS)

    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        shown = await browser.new_page(viewport={"width": SIZE[0], "height": SIZE[1]})
        await shown.route("**/*", respond)
        await shown.goto(URL)
        await shown.screenshot(path=PICTURE)
        await browser.close()


if __name__ == "__main__":
    random.seed(7)
    asyncio.run(picture())
