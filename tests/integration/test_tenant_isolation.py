"""No two accounts are ever mixed: whatever expires, is refused, fails or leaves, in whatever order.

The simulator knows whose token is whose; every path names the account that it was asked for.
"""

import asyncio
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from proxy.server.runtime import start_proxy
from proxy.simulator import Fault, Seller, Simulator
from proxy.simulator.state import DEMO_CLIENT, DEMO_SECRET, Recorded
from tests.conftest import config_from
from tests.support.raw_client import RawResponse, connect, request

ACCOUNTS = ("ann", "bob", "cid")
REGIONS = ("na", "eu")
MINT = "/tokens/2021-03-01/restrictedDataToken"

PATHS = (
    "/brand/new/{}",
    "/orders/v0/orders/{}-1",
    "/orders/v0/orders/{}-1/address",
    "/orders/v0/orders/{}-1/orderItems",
    "/reports/2021-06-30/documents/restricted-{}",
    "/reports/2021-06-30/documents/plain-{}",
)
ELEMENTS = (None, "none", "buyerInfo", "shippingAddress", "buyerInfo,shippingAddress")


@dataclass(frozen=True)
class Call:
    """One request of an app; `leaves` is after how many turns of the loop it hangs up, None for never."""

    account: str
    region: str
    path: str
    elements: str | None
    leaves: int | None


@dataclass(frozen=True)
class Event:
    """Something that happens to one seller, or to all."""

    kind: str
    account: str
    region: str


CALLS = st.builds(
    Call,
    st.sampled_from(ACCOUNTS),
    st.sampled_from(REGIONS),
    st.sampled_from((*PATHS, PATHS[1], PATHS[1])),  # the one that shows which personal data its token covers
    st.sampled_from(ELEMENTS),
    st.none() | st.integers(0, 30),
)
EVENTS = st.builds(
    Event,
    st.sampled_from(
        ["expire", "revoke", "withdraw", "authorise", "elements", "all elements", "short", "long", "fault", "storm"]
    ),
    st.sampled_from(ACCOUNTS),
    st.sampled_from(REGIONS),
)
STEPS = st.lists(st.tuples(st.lists(EVENTS, max_size=2), st.lists(CALLS, min_size=1, max_size=8)), max_size=6)


@given(STEPS)
@hypothesis_settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_two_accounts_are_ever_mixed(steps: list[tuple[list[Event], list[Call]]]) -> None:
    asyncio.run(play(steps))


async def play(steps: Sequence[tuple[list[Event], list[Call]]]) -> None:
    async with Simulator() as simulator:
        for account in ACCOUNTS:
            for region in REGIONS:
                token = f"Atzr|{account}-{region}"
                simulator.state.sellers[token] = Seller(account, region, token)
        with tempfile.TemporaryDirectory() as folder:
            async with start_proxy(config_from(settings(simulator), Path(folder))) as proxy:
                for events, calls in steps:
                    for event in events:
                        happen(simulator, event)
                    await asyncio.gather(*(make(proxy.addresses[0], call) for call in calls))
        for entry in simulator.journal:
            check_entry(entry)


def settings(simulator: Simulator) -> dict[str, object]:
    return {
        "listen": "127.0.0.1:0",
        "admin": None,
        "applications": {"main": {"client_id": DEMO_CLIENT, "client_secret": DEMO_SECRET}},
        "accounts": {
            account: {"refresh_tokens": {region: f"Atzr|{account}-{region}" for region in REGIONS}}
            for account in ACCOUNTS
        },
        "endpoints": {name: simulator.endpoints[name] for name in ("na", "eu", "fe", "lwa")},
        "limits": {"pace": False},
    }


def happen(simulator: Simulator, event: Event) -> None:
    state = simulator.state
    refresh_token = f"Atzr|{event.account}-{event.region}"
    if event.kind in {"expire", "revoke"}:
        for token in state.tokens.values():
            if token.seller == event.account:
                token.revoked = token.revoked or event.kind == "revoke"
                token.expires_at = min(token.expires_at, state.now())
    elif event.kind == "withdraw":
        state.revoked_sellers.add(refresh_token)
    elif event.kind == "authorise":
        state.revoked_sellers.discard(refresh_token)
    elif event.kind in {"elements", "all elements"}:
        state.elements = {"buyerInfo"} if event.kind == "elements" else {"buyerInfo", "shippingAddress"}
    elif event.kind in {"short", "long"}:
        state.lifetime = 0.02 if event.kind == "short" else 3600.0
    elif event.kind == "fault":
        state.faults.append(Fault("status", service="lwa", status=503, times=1))
    else:
        body = (
            '{"errors":[{"code":"Unauthorized","message":"","details":"The access token you provided has expired."}]}'
        )
        state.faults.append(Fault("status", service=event.region, status=403, body=body, times=3))


async def make(address: str, call: Call) -> None:
    target = call.path.format(call.account)
    fields = {"x_sp_account": call.account, "x_sp_region": call.region}
    if call.elements is not None:
        fields["x_sp_data_elements"] = call.elements
    async with connect(address) as client:
        await client.send(request("GET", target, **fields))
        if call.leaves is not None:
            for _ in range(call.leaves):
                await asyncio.sleep(0)
            return
        check_response(call, await client.read_response())


def check_response(call: Call, response: RawResponse) -> None:
    assert response.status in {200, 403, 502, 503}, response.body
    assert (response.decided["account"], response.decided["region"]) == (call.account, call.region)
    if response.status == 403 and response.error is None and not json.loads(response.body)["errors"][0]["details"]:
        # Amazon's bare refusal: of another region's token, and of a token that is not for this path.
        assert call.elements == "none"
        assert call.path in {PATHS[2], PATHS[4]}
    if response.status != 200:
        return
    assert call.account.encode() in response.body, "the response is to this very request"
    asked = set((call.elements or "").split(",")) if call.path == PATHS[1] else set()
    for element, sign in (("buyerInfo", b"BuyerEmail"), ("shippingAddress", b"AddressLine1")):
        if call.path == PATHS[1] and element not in asked:
            assert sign not in response.body, "personal data that nobody asked for"


def check_entry(entry: Recorded) -> None:
    """Whatever reached Amazon with a good token reached the right region with the right seller's."""
    if entry.service != "lwa" and entry.target != MINT:
        assert entry.seller in entry.target
