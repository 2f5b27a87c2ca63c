"""Data elements without a role are left out for a while."""

import asyncio
import json
from pathlib import Path

import pytest

from proxy.errors import RestrictedDataRefused
from proxy.request.tokens.provider import TokenProvider
from tests.request.tokens.conftest import RDT, open_tokens
from tests.support.clock import FakeClock
from tests.support.fake_upstream import FakeUpstream, Received, TokenHost, http_response


def elements_refused(*names: str) -> bytes:
    text = f"Application does not have access to one or more requested data elements: [{', '.join(names)}]"
    return http_response(
        "400 Bad Request", json.dumps({"errors": [{"code": "InvalidInput", "message": text}]}).encode()
    )


ORDERS = RDT._replace(path="/orders/v0/orders", data_elements=("buyerInfo", "shippingAddress"), optional=True)


def asked(received: Received) -> list[str]:
    elements: list[str] = json.loads(received.body)["restrictedResources"][0].get("dataElements", [])
    return elements


async def test_an_element_without_a_role_is_left_out_for_an_hour(
    fake_upstream: FakeUpstream,
    token_host: TokenHost,
    tmp_path: Path,
    clock: FakeClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with open_tokens(fake_upstream, token_host, tmp_path, clock) as (tokens, metrics):
        inner = fake_upstream.respond

        async def respond(received: Received, writer: asyncio.StreamWriter) -> None:
            if "shippingAddress" in asked(received):
                fake_upstream.received.remove(received)
                fake_upstream.minted.append(received)
                writer.write(elements_refused("shippingAddress"))
            else:
                await inner(received, writer)

        fake_upstream.respond = respond  # type: ignore[assignment, method-assign]
        item = ORDERS._replace(path="/orders/v0/orders/{orderId}")
        concurrency = await asyncio.gather(*(tokens.get(wanted) for wanted in [ORDERS, item] * 20))
        assert {(token.kind, token.data_elements) for token in concurrency} == {("rdt", ("buyerInfo",))}
        both = ["buyerInfo", "shippingAddress"]
        assert sorted(map(asked, fake_upstream.minted)) == [["buyerInfo"], ["buyerInfo"], both, both]
        labels = {"account": "acme", "region": "eu", "element": "shippingAddress"}
        assert metrics.registry.get_sample_value("spapi_proxy_data_elements_refused_total", labels) == 2
        assert sum("data element denied" in record.message for record in caplog.records) == 1
        clock.advance(3601)
        await tokens.get(ORDERS)
        assert asked(fake_upstream.minted[4]) == both, "the role may have been granted meanwhile"


async def test_with_no_element_left_the_ordinary_token_goes_where_it_works(
    tokens: TokenProvider, fake_upstream: FakeUpstream
) -> None:
    fake_upstream.rdt_response = elements_refused("buyerInfo", "shippingAddress")
    token = await tokens.get(ORDERS)
    assert (token.kind, token.value.reveal(), token.data_elements) == ("lwa", "Atza|1", ())
    await tokens.get(ORDERS)
    assert len(fake_upstream.minted) == 1


async def test_with_no_element_left_other_operations_are_refused_clearly(
    tokens: TokenProvider, fake_upstream: FakeUpstream
) -> None:
    fake_upstream.rdt_response = elements_refused("buyerInfo", "shippingAddress")
    for _ in range(3):
        with pytest.raises(RestrictedDataRefused, match="no role for any") as caught:
            await tokens.get(ORDERS._replace(optional=False))
        assert caught.value.hint
    assert len(fake_upstream.minted) == 1


async def test_elements_refused_for_one_account_are_asked_for_another(
    fake_upstream: FakeUpstream, token_host: TokenHost, tmp_path: Path, clock: FakeClock
) -> None:
    accounts = {name: {"refresh_tokens": {"eu": f"Atzr|{name}"}} for name in ("acme", "zeta")}
    async with open_tokens(fake_upstream, token_host, tmp_path, clock, accounts=accounts) as (tokens, _):
        fake_upstream.rdt_response = elements_refused("buyerInfo", "shippingAddress")
        await tokens.get(ORDERS)
        fake_upstream.rdt_response = None
        assert (await tokens.get(ORDERS._replace(account="zeta"))).data_elements == ("buyerInfo", "shippingAddress")


async def test_a_refusal_that_names_other_elements_is_no_endless_loop(
    tokens: TokenProvider, fake_upstream: FakeUpstream
) -> None:
    fake_upstream.rdt_response = elements_refused("buyerTaxInformation")
    with pytest.raises(RestrictedDataRefused):
        await tokens.get(ORDERS)
    assert len(fake_upstream.minted) == 1
