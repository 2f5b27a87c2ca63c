"""The simulator's consent page and codes: as strict as Amazon, so that what works here is what works there."""

import json
import re
from collections.abc import AsyncIterator
from html import unescape
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest

from proxy.simulator import Settings, Simulator
from proxy.simulator.consent_page import CODE_LIFETIME
from proxy.simulator.state import DEMO_APPLICATION, DEMO_CLIENT, DEMO_SECRET
from tests.support.clock import FakeClock
from tests.support.raw_client import RawResponse, call

CONSENT = "/apps/authorize/consent"
REDIRECT = "https://app.example/redirect"
USUAL = {"application_id": DEMO_APPLICATION, "state": "s&1", "version": "beta"}
FOR_CODE = {"grant_type": "authorization_code", "client_id": DEMO_CLIENT, "client_secret": DEMO_SECRET}


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def simulator(clock: FakeClock) -> AsyncIterator[Simulator]:
    clients = {DEMO_CLIENT: DEMO_SECRET, "another": "another-secret"}
    async with Simulator(Settings(clients=clients), now=clock) as running:
        yield running


def address(simulator: Simulator, service: str) -> str:
    return simulator.endpoints[service].split("/")[2]


async def opened(simulator: Simulator, target: str, method: str = "GET") -> RawResponse:
    return await call(address(simulator, "fe"), method, target)


async def code(simulator: Simulator, **more: str) -> str:
    """Consent, and return the authorization code."""
    page = await opened(simulator, f"{CONSENT}?{urlencode({**USUAL, **more})}")
    assert page.status == 200
    link = re.search(r'id="confirm" href="([^"]+)"', page.body.decode())
    assert link
    led_to = (await opened(simulator, unescape(link[1]))).get("Location")
    assert led_to is not None
    assert led_to.startswith(f"{REDIRECT}?")
    return parse_qs(urlsplit(led_to).query)["spapi_oauth_code"][0]


async def exchange(simulator: Simulator, **fields: str) -> tuple[int, dict[str, Any]]:
    body = urlencode({**FOR_CODE, **fields}).encode()
    kind = "application/x-www-form-urlencoded"
    response = await call(address(simulator, "lwa"), "POST", "/auth/o2/token", body, content_type=kind)
    return response.status, json.loads(response.body)


async def test_a_code_is_good_once_and_gives_an_authorisation_of_its_region(simulator: Simulator) -> None:
    given = await code(simulator)
    status, granted = await exchange(simulator, code=given)
    assert (status, granted["token_type"], granted["expires_in"]) == (200, "bearer", 3600)
    assert granted["access_token"].startswith("Atza|")
    refresh_token = granted["refresh_token"]
    assert simulator.state.sellers[refresh_token].region == "fe"
    status, again = await exchange(simulator, grant_type="refresh_token", refresh_token=refresh_token)
    assert (status, again["refresh_token"]) == (200, refresh_token)
    status, refused = await exchange(simulator, code=given)
    assert (status, refused["error"]) == (400, "invalid_grant")


@pytest.mark.parametrize(
    ("fields", "status", "error"),
    [
        ({"client_id": "another", "client_secret": "another-secret"}, 400, "invalid_grant"),
        ({"client_secret": "wrong"}, 401, "invalid_client"),
        ({"redirect_uri": "https://app.example/another"}, 400, "invalid_grant"),
        ({"code": "made-up"}, 400, "invalid_grant"),
        ({"code": ""}, 400, "invalid_request"),
    ],
)
async def test_a_code_is_for_one_client_and_one_address(
    simulator: Simulator, fields: dict[str, str], status: int, error: str
) -> None:
    refused = await exchange(simulator, **{"code": await code(simulator), **fields})
    assert (refused[0], refused[1]["error"]) == (status, error)
    good, _ = await exchange(simulator, code=await code(simulator), redirect_uri=REDIRECT)
    assert good == 200


async def test_a_code_lives_five_minutes(simulator: Simulator, clock: FakeClock) -> None:
    late, in_time = await code(simulator), await code(simulator)
    clock.advance(CODE_LIFETIME - 1)
    assert (await exchange(simulator, code=in_time))[0] == 200
    clock.advance(1)
    assert (await exchange(simulator, code=late))[1]["error"] == "invalid_grant"


@pytest.mark.parametrize(
    ("changed", "status", "words"),
    [
        ({}, 200, DEMO_APPLICATION),
        ({"application_id": "amzn1.sp.solution.other"}, 400, "MD1000"),
        ({"version": ""}, 400, "MD1000"),
        ({"redirect_uri": "http://127.0.0.1:1/"}, 400, "MD5101"),
        ({"redirect_uri": REDIRECT}, 200, DEMO_APPLICATION),
    ],
)
async def test_consent_is_asked_for_what_is_registered_alone(
    simulator: Simulator, changed: dict[str, str], status: int, words: str
) -> None:
    page = await opened(simulator, f"{CONSENT}?{urlencode({**USUAL, **changed})}")
    assert (page.status, words in page.body.decode()) == (status, True)


async def test_other_ways_to_a_code_do_not_exist(simulator: Simulator) -> None:
    elsewhere = urlencode({"state": "s", "redirect_uri": "https://evil.example/"})
    assert (await opened(simulator, f"/apps/authorize/confirm/{DEMO_APPLICATION}?{elsewhere}")).status == 404
    assert (await opened(simulator, f"/apps/authorize/confirm/unknown?{elsewhere}")).status == 404
    assert (await opened(simulator, "/apps/authorize/")).status == 404
    assert (await opened(simulator, f"{CONSENT}?{urlencode(USUAL)}", "DELETE")).status == 405
    assert (await opened(simulator, f"{CONSENT}?&&state")).status == 400
    assert simulator.state.codes == {}


async def test_applications_can_be_registered_by_order(simulator: Simulator) -> None:
    async def ordered(order: dict[str, Any]) -> int:
        body = json.dumps(order).encode()
        return (await call(address(simulator, "lwa"), "POST", "/_simulator/applications", body)).status

    assert await ordered({"application_id": "published", "redirect_uris": [REDIRECT], "draft": False}) == 200
    assert await ordered({"application_id": "nowhere", "redirect_uris": []}) == 400
    page = await opened(simulator, f"{CONSENT}?application_id=published&state=s")
    assert page.status == 200
    page = await opened(simulator, f"{CONSENT}?application_id=published&state=s&version=beta")
    assert page.status == 400
