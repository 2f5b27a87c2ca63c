"""Amazon's own examples, all of them, through a real proxy process against the simulator.

The models' static sandbox examples are the nearest thing to real traffic that can be had without Amazon: for each,
the simulator must get the right region, the right kind of token, the raw target, the headers and the body, and the
app must get the example's answer.
"""

import json
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from proxy.simulator import Example, Recorded, Seller, Settings, Simulator, examples
from proxy.simulator.restricted_operations import grantless_scope, is_restricted_document, restricted
from tests.conftest import MODELS, needs
from tests.support.proxy_process import serving
from tests.support.raw_client import Client, RawResponse, connect

CLIENT, SECRET = "amzn1.application-oa2-client.replay", "replay-secret"
REGIONS = ("na", "eu", "fe")

# The marketplaces that the examples name; all others in them are made-up values.
MARKETPLACES = {
    "ATVPDKIKX0DER": "na",
    "A2EUQ1WTGCTBG2": "na",
    "A2Q3Y263D00KWC": "na",
    "A21TJRUUN4KGV": "eu",
    "A1PA6795UKMFR9": "eu",
}


# The examples that are not replayed, and why.
LEFT_OUT = {
    "catalogItems_2022-04-01.json getCatalogItem 400": "another example names the same parameters with the same status"
}


async def test_every_static_example_of_amazons_models_is_served(tmp_path: Path) -> None:
    needs(MODELS.is_dir(), "the folder of Amazon's models")
    replayed, wrong = 0, list[str]()
    left_out: dict[str, str] = {}
    sellers = [Seller("replay", region, f"Atzr|replay-{region}", CLIENT) for region in REGIONS]
    settings = Settings(clients={CLIENT: SECRET}, sellers=sellers, models=MODELS)
    async with (
        Simulator(settings) as simulator,
        serving(proxy_settings(simulator), tmp_path) as proxy,
        connect(proxy.addresses[0]) as client,
    ):
        for number, example in enumerate(examples(MODELS)):
            if example.reason:
                left_out[f"{example.file} {example.operation} {example.status}"] = example.reason
                continue
            region = region_of(example, number)
            simulator.journal.clear()
            got = await send(client, example, region)
            wrong += [
                f"{example.operation} {example.target}: {what}" for what in faults(example, region, got, simulator)
            ]
            replayed += 1
    assert not wrong, "\n".join(wrong)
    assert left_out == LEFT_OUT
    assert replayed == 500


def proxy_settings(simulator: Simulator) -> dict[str, Any]:
    """Return settings that send at once: several examples of one operation would wait for its usage plan."""
    return {
        "listen": "127.0.0.1:0",
        "admin": "127.0.0.1:0",
        "applications": {"main": {"client_id": CLIENT, "client_secret": SECRET}},
        "accounts": {"replay": {"refresh_tokens": {region: f"Atzr|replay-{region}" for region in REGIONS}}},
        "endpoints": {name: simulator.endpoints[name] for name in (*REGIONS, "lwa")},
        "limits": {"pace": False},
        "retry": {"attempts": 1},
    }


def region_of(example: Example, number: int) -> str:
    """Return the region of the example's marketplace; each region in turn where it names none."""
    values = [value for values in parse_qs(example.query).values() for value in values]
    named = [MARKETPLACES[part] for value in values for part in value.split(",") if part in MARKETPLACES]
    return named[0] if named else REGIONS[number % len(REGIONS)]


async def send(client: Client, example: Example, region: str) -> RawResponse:
    headers = {**example.headers, "x-sp-region": region, "x-custom": "kept", "accept": "application/json"}
    if example.body is not None:
        headers["content-type"] = "application/json"
    return await client.request(example.method, example.target, example.body, **headers)


def faults(example: Example, region: str, got: RawResponse, simulator: Simulator) -> list[str]:
    """Return what is not as it must be, on either side."""
    calls = [entry for entry in simulator.journal if entry.service in REGIONS and not is_minting(entry, example)]
    if len(calls) != 1:
        return [f"{len(calls)} calls arrived, the app got {got.status} {got.error} {got.body[:200]!r}"]
    (call,) = calls
    checks = {
        f"region {call.service}, not {region}": call.service == region,
        f"token {call.token_kind}, not {token_kind(example)}": call.token_kind == token_kind(example),
        f"seller {call.seller}": call.seller == ("" if call.token_kind == "grantless" else "replay"),
        f"target {call.target}": call.target == example.target,
        f"method {call.method}": call.method == example.method,
        "the body is another": (call.body or None) == example.body,
        "a header of the app's is missing": call.header("x-custom") == "kept",
        "a header of the proxy's is missing": bool(call.header("x-amz-date") and call.header("user-agent")),
        "a header meant for the proxy arrived": call.header("x-sp-region") is None,
        f"status {got.status}, not {example.status}: {got.body[:200]!r}": got.status == example.status,
        f"the answer is another: {got.body[:200]!r}": is_the_response(got, example),
        f"x-sp-proxy says {got.decided}": got.decided["region"] == region and got.decided["token"] == call.token_kind,
    }
    return [what for what, is_right in checks.items() if not is_right]


def is_the_response(got: RawResponse, example: Example) -> bool:
    if example.status == 204 or example.content is None:
        return got.body == b""  # some examples write `{}` where HTTP has no body
    content = json.loads(got.body)
    if example.operation == "createRestrictedDataToken":
        # The simulator really mints a token, or refuses with Amazon's own words; the examples' texts are made up.
        return bool(content.keys() == example.content.keys())
    return bool(content == example.content)


def is_minting(entry: Recorded, example: Example) -> bool:
    """Return whether the call is one of the proxy's own for a Restricted Data Token."""
    return entry.target.endswith("/restrictedDataToken") and example.operation != "createRestrictedDataToken"


def token_kind(example: Example) -> str:
    """Return the kind of token that the example's call needs, by the simulator's own lists."""
    if grantless_scope(example.method, example.path):
        return "grantless"
    operation = restricted(example.method, example.path)
    if operation is None or operation.optional:
        return "lwa"
    return "rdt" if operation.generic or is_restricted_document(example.path) else "lwa"
